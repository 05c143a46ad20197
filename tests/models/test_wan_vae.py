"""The Wan autoencoder: sizes, the norm of the latents, causality, tiles, and every form of published weights."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from opensora_like.models.autoencoders.planning import plan_encode
from opensora_like.models.autoencoders.wan_vae import WanVAE
from opensora_like.models.base import Autoencoder
from opensora_like.registry import MODELS, build

GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.fixture(scope="module")
def vae() -> WanVAE:
    return build({"type": "wan_vae", "tiny": {}}, MODELS)


def clip(num_frames: int = 9, height: int = 16, width: int = 24, batch_size: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(num_frames)
    return torch.rand(batch_size, 3, num_frames, height, width, generator=generator) * 2 - 1


def test_protocol_sizes_and_frozen(vae):
    """Latents have the announced shape, decoding gives the clip's shape back; nothing is trained."""
    assert isinstance(vae, Autoencoder) and vae.is_causal
    assert (vae.latent_channels, vae.temporal_stride, vae.spatial_stride) == (16, 4, 8)
    for size in ((1, 8, 8), (5, 16, 8), (13, 8, 24)):
        z = vae.encode(clip(*size, batch_size=2))
        assert z.shape == (2, *vae.latent_shape(*size)) and z.dtype == torch.float32
        assert vae.decode(z).shape == (2, 3, *size)
    assert vae.latent_shape(81, 480, 832) == (16, 21, 60, 104)
    assert not any(p.requires_grad for p in vae.parameters()) and not vae.train().training


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ((8, 16, 16), r"num_frames=8 is not 4 \* k \+ 1; nearest allowed: 5 or 9"),
        ((0, 16, 16), "num_frames=0"),
        ((9, 20, 16), r"height=20 is not 8 \* k; nearest allowed: 16 or 24"),
        ((9, 16, 4), "width=4 is not"),
    ],
)
def test_sizes_that_cannot_be_coded(vae, size, message):
    """A size that would lose frames or pixels is refused, with the nearest that would not."""
    with pytest.raises(ValueError, match=message):
        vae.latent_shape(*size)
    if size[0]:
        with pytest.raises(ValueError, match=message):
            vae.encode(clip(*size))


def test_norm_of_the_latents_is_the_published_one(vae):
    """Normed latents of a mean, and their inverse, are those recorded from the published trainer."""
    recorded = json.loads((GOLDEN / "wan_latents_a.json").read_text())["AutoencoderKLWan"]
    tensors = load_file(GOLDEN / "wan_latents_a.safetensors")
    assert vae._mean.flatten().tolist() == pytest.approx(recorded["mean"], abs=1e-6)
    assert vae._std.flatten().tolist() == pytest.approx(recorded["std"], abs=1e-6)
    mean = tensors["wan_latents/mu"]
    normed = vae.latents_of(mean, torch.zeros_like(mean))
    torch.testing.assert_close(normed, tensors["wan_latents/normalised"], atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(normed * vae._std + vae._mean, tensors["wan_latents/denormalised"], atol=1e-5, rtol=0)


def test_encode_and_decode_undo_the_norm(vae):
    """What the network sees in decode is the posterior's mean that encode started from."""
    video, seen = clip(), []
    hook = vae.model.post_quant_conv.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    vae.decode(vae.encode(video))
    hook.remove()
    torch.testing.assert_close(torch.cat(seen, dim=2), vae.model.encode(video).latent_dist.mean, atol=1e-5, rtol=1e-5)


def test_sample_is_drawn_before_it_is_normed(vae):
    """Samples have the posterior's own spread over the channel's std; one generator gives one sample."""
    log_variance = torch.tensor([-2.0, 1.0]).repeat(8).view(1, 16, 1, 1, 1).expand(1, 16, 5, 40, 40)
    draws = vae.latents_of(torch.zeros_like(log_variance), log_variance, torch.Generator().manual_seed(0))
    want = torch.exp(0.5 * log_variance)[0, :, 0, 0, 0] / vae._std.flatten()
    torch.testing.assert_close(draws.std(dim=(0, 2, 3, 4)), want, rtol=0.05, atol=0)
    video = clip()
    first, second = (vae.encode(video, torch.Generator().manual_seed(7)) for _ in range(2))
    assert torch.equal(first, second) and not torch.equal(first, vae.encode(video))


def test_causal_and_by_sample(vae):
    """Later frames do not reach earlier latents; slicing gives what the whole batch does."""
    video = clip(9, batch_size=2)
    z = vae.encode(video)
    torch.testing.assert_close(vae.encode(video[:, :, :5]), z[:, :, :2], atol=1e-5, rtol=1e-5)
    sliced = WanVAE(tiny={}, use_slicing=True)
    assert sliced.model.use_slicing
    torch.testing.assert_close(sliced.encode(video), z, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(sliced.decode(z), vae.decode(z), atol=1e-4, rtol=0)


def test_tiles(vae):
    """A picture no larger than a tile is not tiled; a larger one is, within each tile's own core unchanged."""
    tiled = WanVAE(tiny={}, use_tiling=True, tile_size=32, tile_stride=24)
    small, large = clip(1, 32, 32), clip(1, 32, 56)
    assert torch.equal(tiled.encode(small), vae.encode(small))
    z = tiled.encode(large)
    assert z.shape == (1, *vae.latent_shape(1, 32, 56)) and not torch.equal(z, vae.encode(large))
    torch.testing.assert_close(z[..., :3], vae.encode(large[..., :32])[..., :3], atol=1e-5, rtol=1e-5)
    assert tiled.decode(z).shape == large.shape


def test_tiny_weights_are_the_same_everywhere():
    """Weights depend on the seed alone, building draws nothing, and a cast keeps the norm in float32."""
    torch.manual_seed(0)
    want = torch.rand(3)
    torch.manual_seed(0)
    first, second, other = WanVAE(tiny={}), WanVAE(tiny={}, dtype="bf16"), WanVAE(tiny={"seed": 1})
    assert torch.equal(torch.rand(3), want)
    video = clip(5)
    assert not torch.allclose(first.encode(video), other.encode(video))
    z = second.encode(video)
    assert z.dtype == torch.float32 and (z - first.encode(video)).norm() < 0.05 * z.norm()
    assert second.decode(z).dtype == torch.bfloat16 and torch.equal(second.bfloat16()._std, first._std)


def test_memory_can_be_planned():
    """Built on meta at the published width, the work of a clip is known without computing it."""
    with torch.device("meta"):
        large = WanVAE(tiny={"base_dim": 96, "num_res_blocks": 2})
    assert sum(p.numel() for p in large.parameters()) == 126_892_531
    assert plan_encode(large, 5, 64, 64).flops > plan_encode(large, 1, 64, 64).flops > 1e9


def _to_original(name: str) -> str:
    """The original file's name of a weight of the published architecture."""
    residual = {"norm1": "residual.0", "conv1": "residual.2", "norm2": "residual.3", "conv2": "residual.6"}
    name = re.sub(r"resnets\.(\d)\.", lambda m: f"resnets.{m[1]}.", name)
    name = re.sub(r"\b(norm1|conv1|norm2|conv2)\.", lambda m: residual[m[1]] + ".", name).replace(
        "conv_shortcut", "shortcut"
    )
    name = re.sub(r"^(encoder|decoder)\.conv_in", r"\1.conv1", name)
    name = re.sub(r"^(encoder|decoder)\.norm_out", r"\1.head.0", name)
    name = re.sub(r"^(encoder|decoder)\.conv_out", r"\1.head.2", name)
    name = re.sub(r"^quant_conv", "conv1", re.sub(r"^post_quant_conv", "conv2", name))
    name = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"middle.{2 * int(m[1])}", name)
    name = name.replace("mid_block.attentions.0", "middle.1").replace("down_blocks", "downsamples")
    up = r"up_blocks\.(\d)\."
    name = re.sub(up + r"resnets\.(\d)", lambda m: f"upsamples.{4 * int(m[1]) + int(m[2])}", name)
    return re.sub(up + r"upsamplers\.0", lambda m: f"upsamples.{4 * int(m[1]) + 3}", name)


def test_every_form_of_published_weights_loads(vae, tmp_path):
    """A diffusers folder, a pipeline's folder, and single files of either naming give the same latents."""
    source = WanVAE(tiny={"num_res_blocks": 2})
    source.model.save_pretrained(tmp_path / "pipe" / "vae")
    weights = source.model.state_dict()
    save_file(weights, tmp_path / "own.safetensors")
    original = {_to_original(name): tensor for name, tensor in weights.items()}
    assert len(original) == len(weights) and "decoder.upsamples.4.shortcut.weight" in original
    torch.save(original, tmp_path / "Wan2.1_VAE.pth")
    torch.save({"state_dict": original}, tmp_path / "wrapped.pth")
    want = source.encode(clip())
    for path in ("pipe", "pipe/vae", "own.safetensors", "Wan2.1_VAE.pth", "wrapped.pth"):
        loaded = WanVAE(str(tmp_path / path))
        assert torch.equal(loaded.encode(clip()), want), path
        assert torch.equal(loaded.decode(want), source.decode(want)), path
        assert not any(p.requires_grad for p in loaded.parameters())
    assert WanVAE(str(tmp_path / "pipe"), dtype="bf16").model.dtype == torch.bfloat16


def test_what_cannot_be_built_says_so(tmp_path):
    """Errors name the argument: no source or two, missing files, weights that are not whole or of another model."""
    for arguments, message in (
        ({}, "give exactly one"),
        ({"from_pretrained": "x", "tiny": {}}, "give exactly one"),
        ({"tiny": {"base_dims": 4}}, r"tiny has no 'base_dims'; did you mean \['base_dim'\]"),
        ({"tiny": {}, "tile_size": 100}, "tile_size=100 and tile_stride=192 must be multiples of 8"),
    ):
        with pytest.raises(ValueError, match=message):
            WanVAE(**arguments)
    with pytest.raises(FileNotFoundError, match="is not a folder"):
        WanVAE(str(tmp_path / "absent"))
    with pytest.raises(FileNotFoundError, match="is not a file"):
        WanVAE(str(tmp_path / "absent.safetensors"))
    with pytest.raises(OSError, match="neither a folder with an autoencoder"):
        WanVAE(str(tmp_path))
    (tmp_path / "broken.pth").write_bytes(b"no weights")
    with pytest.raises(ValueError, match=r"cannot be read as \.pth"):
        WanVAE(str(tmp_path / "broken.pth"))
    save_file({"x": torch.ones(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="holds no Wan autoencoder"):
        WanVAE(str(tmp_path / "other.safetensors"))
    model = WanVAE(tiny={"num_res_blocks": 2}).model
    weights = model.state_dict()
    del weights["decoder.conv_out.bias"]
    save_file(weights, tmp_path / "part.safetensors")
    with pytest.raises(ValueError, match=r"1 missing \['decoder.conv_out.bias'\]"):
        WanVAE(str(tmp_path / "part.safetensors"))
    model.save_pretrained(tmp_path / "folder")
    save_file(weights, tmp_path / "folder" / "diffusion_pytorch_model.safetensors")
    with pytest.raises(ValueError, match="1 weights are missing"):
        WanVAE(str(tmp_path / "folder"))
