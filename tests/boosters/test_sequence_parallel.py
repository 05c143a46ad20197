"""Ranks that share a sequence train as one process that has all of it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from fsdp2_cases import Case
from fsdp2_compare import ALL, compare

from opensora_like.boosters.ring_attention import Block, attend, attend_backward
from opensora_like.boosters.sequence_parallel import check_sequence, data_ranks

SHARED = [(world, case) for world, case in ALL if "sp_size" in dict(case.options)]


@pytest.mark.parametrize(("world", "case"), SHARED, ids=[f"{world} {case.name}" for world, case in SHARED])
def test_gradients_are_those_of_one_process(world: int, case: Case) -> None:
    """Uneven runs, runs without image tokens or without any, a batch of 1: losses, norms and weights are the same."""
    compare(world, case)


def test_ranks_of_a_group_read_the_same_data() -> None:
    """Neighbours share a slice of the batch; there are as many slices as groups."""
    found = [data_ranks(rank, 8, sp_size=2, tp_size=2) for rank in range(8)]
    assert found == [(0, 2)] * 4 + [(1, 2)] * 4


def test_settings_are_checked() -> None:
    """Another mode, and a size that leaves ranks over, are refused with what would do."""
    with pytest.raises(
        ValueError, match=r"sequence_parallelism_mode='ring_attn' is not known; did you mean \['ring'\]"
    ):
        check_sequence(2, "ring_attn", 4)
    with pytest.raises(ValueError, match=r"booster.sp_size=3 does not divide the 4 processes; use one of \[1, 2, 4\]"):
        check_sequence(3, "ring", 4)


def merged_over_blocks(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, grad: torch.Tensor) -> list[torch.Tensor]:
    """Output and gradients of attention whose keys are seen in two blocks, as on a ring of two."""
    cuts = list(zip(k.split([5, k.shape[2] - 5], 2), v.split([5, k.shape[2] - 5], 2), strict=True))
    blocks = [attend(q, *(part.contiguous() for part in cut)) for cut in cuts]
    lse = torch.logaddexp(blocks[0].lse_BNL, blocks[1].lse_BNL)
    out = sum(b.out_BNLD.float() * (b.lse_BNL - lse).exp()[..., None] for b in blocks).to(q.dtype)
    parts = [attend_backward(grad, q, *(p.contiguous() for p in cut), Block(out, lse)) for cut in cuts]
    dk, dv = (torch.cat([part[i] for part in parts], dim=2) for i in (1, 2))
    return [out, parts[0][0] + parts[1][0], dk, dv]


@pytest.mark.parametrize(
    ("device", "dtype", "tolerance"),
    [
        ("cpu", torch.float32, 1e-5),
        pytest.param(
            "cuda",
            torch.bfloat16,
            3e-2,  # of values around 1: outputs and gradients are rounded to bfloat16 twice
            marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: the fused kernel"),
        ),
    ],
)
def test_blocks_merge_to_whole_attention(device: str, dtype: torch.dtype, tolerance: float) -> None:
    """Attention to two blocks of keys, merged, has the output and gradients of torch's own; queries fill two chunks."""
    torch.manual_seed(0)
    q = torch.randn(2, 3, 1100, 16)
    k, v = torch.randn(2, 2, 3, 37, 16)
    grad = torch.randn_like(q)
    leaves = [x.double().requires_grad_() for x in (q, k, v)]
    out = F.scaled_dot_product_attention(*leaves)
    expected = [out, *torch.autograd.grad(out, leaves, grad.double())]
    found = merged_over_blocks(*(x.to(device, dtype) for x in (q, k, v, grad)))
    for mine, true in zip(found, expected, strict=True):
        scale = true.abs().max().clamp(min=1)
        assert (mine.cpu().double() - true).abs().max() / scale < tolerance
