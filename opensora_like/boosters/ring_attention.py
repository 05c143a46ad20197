"""Attention over tokens spread on a ring of ranks, exact forward and backward.

Letters of the shape suffixes: B batch, N heads, L tokens, D width of a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

QUERIES_AT_ONCE = 1024  # bounds the scores in memory where no fused kernel runs


class Block(NamedTuple):
    """Attention to some of the keys: the output, normalised over these, and the log of the sum of exponentials."""

    out_BNLD: Tensor
    lse_BNL: Tensor


def ring_attention(
    q_BNLD: Tensor, k_BNLD: Tensor, v_BNLD: Tensor, *, lengths: Sequence[int], group: dist.ProcessGroup
) -> Tensor:
    """Softmax attention of this rank's queries to the keys of all ranks, scaled by 1/sqrt(D).

    Each block of keys and values travels once round the ring, the next under way while one is worked on; blocks
    are merged by their log-sum-exp in float32. The backward sends them round again with their gradients, float32.

    Args:
        lengths: tokens of each rank of `group`; may differ, may be 0.

    Returns: [B, N, L, D] in the dtype of `v_BNLD`, of this rank's tokens.

    Source: Ring Attention, arXiv:2310.01889.
    """
    return _Ring.apply(q_BNLD, k_BNLD, v_BNLD, tuple(lengths), group)


class _Ring(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        lengths: tuple[int, ...],
        group: dist.ProcessGroup,
    ) -> Tensor:
        with torch.autocast(q.device.type, enabled=False):
            out, lse = _ring_forward(q, torch.stack([k, v]), lengths, group)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.lengths, ctx.group = lengths, group
        return out

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        with torch.autocast(q.device.type, enabled=False):
            dq, dkv = _ring_backward(grad, q, torch.stack([k, v]), Block(out, lse), ctx.lengths, ctx.group)
        return dq.to(q.dtype), dkv[0].to(k.dtype), dkv[1].to(v.dtype), None, None


def _ring_forward(q: Tensor, kv: Tensor, lengths: tuple[int, ...], group: dist.ProcessGroup) -> Block:
    rank, size = dist.get_rank(group), len(lengths)
    out = torch.zeros_like(q, dtype=torch.float32)
    lse = torch.full(q.shape[:3], -torch.inf, dtype=torch.float32, device=q.device)
    for hop in range(size):
        coming = _Hop(kv, lengths[(rank - hop - 1) % size], group) if hop < size - 1 else None
        if kv.shape[3] and q.shape[2]:
            block = attend(q, kv[0], kv[1])
            merged = torch.logaddexp(lse, block.lse_BNL)
            out *= (lse - merged).exp()[..., None]
            out += block.out_BNLD.float() * (block.lse_BNL - merged).exp()[..., None]
            lse = merged
        if coming is not None:
            kv = coming.wait()
    return Block(out.to(q.dtype), lse)


def _ring_backward(
    grad: Tensor, q: Tensor, kv: Tensor, whole: Block, lengths: tuple[int, ...], group: dist.ProcessGroup
) -> tuple[Tensor, Tensor]:
    rank, size = dist.get_rank(group), len(lengths)
    dq = torch.zeros_like(q, dtype=torch.float32)
    under_way: _Hop | None = None
    for hop in range(size):
        next_length = lengths[(rank - hop - 1) % size]
        coming = _Hop(kv, next_length, group) if hop < size - 1 else None
        dkv = torch.zeros_like(kv, dtype=torch.float32)
        if kv.shape[3] and q.shape[2]:
            parts = attend_backward(grad, q, kv[0], kv[1], whole)
            dq += parts[0]
            dkv[0], dkv[1] = parts[1], parts[2]
        if under_way is not None:
            dkv += under_way.wait()
        under_way = _Hop(dkv, next_length, group, tag=1)  # after the last block, one more brings each home
        if coming is not None:
            kv = coming.wait()
    assert under_way is not None
    return dq, under_way.wait()


class _Hop:
    """A block of [2, B, N, L, D] on its way to the next rank, and the one that comes from the rank before."""

    def __init__(self, sent: Tensor, length: int, group: dist.ProcessGroup, *, tag: int = 0) -> None:
        rank, size = dist.get_rank(group), dist.get_world_size(group)
        after, before = (dist.get_global_rank(group, (rank + n) % size) for n in (1, -1))
        self._sent = sent.contiguous()  # kept until it has arrived
        self._got = sent.new_empty(*sent.shape[:3], length, sent.shape[4])
        sending = dist.P2POp(dist.isend, self._sent, after, group, tag)
        getting = dist.P2POp(dist.irecv, self._got, before, group, tag)
        self._works = dist.batch_isend_irecv([sending, getting])

    def wait(self) -> Tensor:
        for work in self._works:
            work.wait()
        return self._got


def attend(q: Tensor, k: Tensor, v: Tensor) -> Block:
    """Attention to a block of keys, by the fused kernel where there is one."""
    if has_kernel(q):
        out, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)
        return Block(out, lse)
    scale, k, v = q.shape[-1] ** -0.5, k.float(), v.float()
    blocks = []
    for part in q.split(QUERIES_AT_ONCE, dim=2):
        scores = part.float() @ k.mT * scale
        lse = scores.logsumexp(-1)
        blocks.append(Block((scores - lse[..., None]).exp() @ v, lse))
    return Block(torch.cat([b.out_BNLD for b in blocks], dim=2), torch.cat([b.lse_BNL for b in blocks], dim=2))


def attend_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, whole: Block) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of queries, keys and values through one block of keys.

    Args:
        whole: output and log-sum-exp over the keys of all blocks: with them the block's share of the softmax
            follows from its own scores.

    Returns: float32 where no kernel ran.
    """
    if has_kernel(q):
        return _kernel_backward(grad, q, k, v, whole)
    scale, k, v = q.shape[-1] ** -0.5, k.float(), v.float()
    dq, dk, dv = [], torch.zeros_like(k), torch.zeros_like(v)
    for start in range(0, q.shape[2], QUERIES_AT_ONCE):
        rows = slice(start, start + QUERIES_AT_ONCE)
        part, g = q[:, :, rows].float(), grad[:, :, rows].float()
        share = (part @ k.mT * scale - whole.lse_BNL[:, :, rows, None]).exp()
        dv += share.mT @ g
        along = (g * whole.out_BNLD[:, :, rows].float()).sum(-1, keepdim=True)
        dscores = share * (g @ v.mT - along) * scale
        dq.append(dscores @ k)
        dk += dscores.mT @ part
    return torch.cat(dq, dim=2), dk, dv


def has_kernel(q: Tensor) -> bool:
    """Whether torch's flash attention takes these queries."""
    dim = q.shape[-1]
    return q.is_cuda and q.dtype in (torch.float16, torch.bfloat16) and dim <= 256 and dim % 8 == 0


def _kernel_backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, whole: Block) -> tuple[Tensor, Tensor, Tensor]:
    unread = torch.empty(2, dtype=torch.uint64, device=q.device)  # the state of a dropout that is not done
    return torch.ops.aten._scaled_dot_product_flash_attention_backward(
        grad, q, k, v, whole.out_BNLD, whole.lse_BNL, None, None, q.shape[2], k.shape[2], 0.0, False, unread, unread
    )
