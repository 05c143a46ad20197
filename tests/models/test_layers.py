"""Shared layers: attention dispatch, RMSNorm, rotary positions and time embeddings against recorded numbers."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from opensora_like.models.layers import Attention, RMSNorm, attention, build_rope, flash_attention, time_embedding

GOLDEN = Path(__file__).parents[1] / "golden"


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", ["mmdit_fused_small_a", "mmdit_split_i2v_small_a"])
def test_tables_are_the_recorded_ones(name):
    """Rotary tables in both layouts and time embeddings equal the published system's."""
    tensors = load_file(GOLDEN / f"{name}.safetensors")
    ids_LA = torch.cat([tensors["inputs/txt_ids"][0], tensors["inputs/img_ids"][0]])
    rope = build_rope(ids_LA, (4, 6, 6), theta=10000.0, interleaved="pe/freqs" in tensors)
    if rope.interleaved:
        turn = tensors["pe/freqs"][0, 0]  # [L, D / 2, 2, 2]: rows (cos, -sin), (sin, cos)
        want_cos, want_sin = turn[..., 0, 0], turn[..., 1, 0]
    else:
        half = tensors["pe/cos"].shape[-1] // 2
        want_cos, want_sin = tensors["pe/cos"][0, :, :half], tensors["pe/sin"][0, :, :half]
    torch.testing.assert_close(rope.cos_LF, want_cos, atol=1e-6, rtol=0)
    torch.testing.assert_close(rope.sin_LF, want_sin, atol=1e-6, rtol=0)
    got = time_embedding(tensors["inputs/timesteps"], 256)
    # 1000 t is rounded to 6e-5 at most before its sine is taken, so that much may differ
    torch.testing.assert_close(got, tensors["timestep_embedding"], atol=1e-4, rtol=0)


@pytest.mark.parametrize("interleaved", [True, False])
def test_rotation_keeps_norms_and_sees_only_differences(interleaved):
    """Scores of rotated queries and keys depend on how far apart they are, and rotation keeps lengths."""
    ids_LA = torch.cartesian_prod(torch.arange(3), torch.arange(2), torch.arange(4))
    dims = (4, 6, 6)
    q, k = draw(1, 2, len(ids_LA), 16), draw(1, 2, len(ids_LA), 16, seed=1)
    here = build_rope(ids_LA, dims, theta=1e4, interleaved=interleaved)
    there = build_rope(ids_LA + torch.tensor([7, 300, 41]), dims, theta=1e4, interleaved=interleaved)
    torch.testing.assert_close(here(q).norm(dim=-1), q.norm(dim=-1))
    scores, moved = here(q) @ here(k).mT, there(q) @ there(k).mT
    torch.testing.assert_close(scores, moved, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(scores, q @ k.mT)
    assert torch.equal(here(q)[:, :, 5:9], here.narrow(5, 9)(q[:, :, 5:9]))


def test_rotation_is_done_in_float32():
    """A bfloat16 input is rotated exactly and rounded once."""
    rope = build_rope(torch.arange(500)[:, None].expand(-1, 3), (4, 6, 6), theta=1e4, interleaved=False)
    x = draw(1, 1, 500, 16).bfloat16()
    assert torch.equal(rope(x), rope(x.float()).bfloat16())


def test_attention_is_softmax_attention():
    """The dispatch point equals the formula, for other numbers of keys than queries too."""
    q, k, v = draw(2, 3, 5, 8), draw(2, 3, 7, 8, seed=1), draw(2, 3, 7, 8, seed=2)
    want = torch.softmax(q @ k.mT / 8**0.5, dim=-1) @ v
    torch.testing.assert_close(attention(q, k, v), want)
    torch.testing.assert_close(Attention()(q, k, v), want.transpose(1, 2).reshape(2, 5, 24))
    assert not list(Attention().parameters())
    assert attention(q, k, v.bfloat16()).dtype == torch.bfloat16


def test_flash_attention_is_not_taken_where_it_cannot_run():
    """On the CPU "auto" means SDPA, and asking for flash-attn is an error that says what it needs."""
    x = draw(1, 2, 3, 8)
    assert torch.equal(attention(x, x, x, backend="auto"), attention(x, x, x, backend="sdpa"))
    with pytest.raises(ValueError, match=r"backend='flash': got torch.float32 on 'cpu', head dim 8"):
        attention(x, x, x, backend="flash")


@pytest.mark.skipif(not torch.cuda.is_available() or flash_attention() is None, reason="needs a GPU and flash-attn")
def test_flash_attention_agrees_with_the_reference():
    """In bfloat16 on a GPU flash-attn and SDPA agree to rounding."""
    q, k, v = (draw(2, 4, 64, 32, seed=s).cuda().bfloat16() for s in range(3))
    torch.testing.assert_close(
        attention(q, k, v, backend="flash"), attention(q, k, v, backend="sdpa"), atol=2e-2, rtol=2e-2
    )


def test_rms_norm_is_float32_inside():
    """Large bfloat16 values neither overflow nor round twice; the scale is applied."""
    norm = RMSNorm(8)
    with torch.no_grad():
        norm.scale.copy_(torch.arange(1.0, 9.0))
    x = draw(4, 8) * 1e4
    wide = x.bfloat16().float()
    want = wide / (wide.square().mean(-1, keepdim=True) + 1e-6).sqrt() * torch.arange(1.0, 9.0)
    torch.testing.assert_close(norm(x.bfloat16()), want.bfloat16())
    assert norm.half()(x.half()).isfinite().all()
    assert list(norm.state_dict()) == ["scale"]


def test_time_embedding_starts_with_cosines():
    """At t = 0 the first half is 1 and the second 0; bfloat16 times are read as they are, in float32."""
    out = time_embedding(torch.zeros(2), 8)
    assert torch.equal(out, torch.tensor([[1.0] * 4 + [0.0] * 4] * 2))
    half = torch.tensor([0.3]).bfloat16()
    assert torch.equal(time_embedding(half, 8), time_embedding(half.float(), 8))
