"""Sequence parallelism: each rank of a group holds a run of the tokens, attention sees all of them.

Any backend that averages gradients over all its ranks can use it: build a group with `build_sequence_group`, give
the whole model to `apply_sequence_parallelism`, and let all ranks of a group read the same data (`data_ranks`).

Gradients are exact. Each rank has the gradient of its own tokens, so the gradient of the loss is the sum over the
group; `_Join` multiplies by the group's size, and the average that follows makes it the sum. `split_gather` shares
tokens in another way, and sums itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from opensora_like.boosters.plan import divisors, head_counts, modules_at, plan_of
from opensora_like.boosters.ring_attention import ring_attention
from opensora_like.models.base import ParallelPlan
from opensora_like.models.layers import Rope
from opensora_like.registry import nearest

Mode = Literal["all_to_all", "ring"]
MODES = ("all_to_all", "ring")


@dataclass(frozen=True)
class SequenceGroup:
    """The ranks that share a sequence, and how."""

    group: dist.ProcessGroup
    rank: int  # within the group
    size: int
    mode: Mode | Literal["split_gather"]  # the last only of ranks that share linears, too


def data_ranks(rank: int, world_size: int, *, sp_size: int, tp_size: int = 1) -> tuple[int, int]:
    """(dp_rank, dp_size): ranks of one sequence or tensor group are neighbours and read the same data."""
    return rank // (sp_size * tp_size), world_size // (sp_size * tp_size)


def check_sequence(sp_size: int, mode: str, world_size: int) -> None:
    """Check the settings of a booster.

    Raises:
        ValueError: an unknown mode, or a size that does not divide the number of processes.
    """
    if mode not in MODES:
        raise ValueError(f"booster.sequence_parallelism_mode={mode!r} is not known; {nearest(str(mode), MODES)}")
    if sp_size < 1 or world_size % sp_size:
        raise ValueError(
            f"booster.sp_size={sp_size} does not divide the {world_size} processes; use one of {divisors(world_size)}"
        )


def build_sequence_group(sp_size: int, mode: Mode, *, tp_size: int = 1) -> SequenceGroup | None:
    """The group of this rank; every rank calls it. None where `sp_size` is 1.

    Args:
        tp_size: ranks next to each other that hold the same tokens.
    """
    world_size = dist.get_world_size()
    check_sequence(sp_size, mode, world_size)
    if sp_size == 1:
        return None
    grid = torch.arange(world_size).view(-1, sp_size, tp_size).transpose(1, 2).reshape(-1, sp_size)
    group, _ = dist.new_subgroups_by_enumeration(grid.tolist())
    return SequenceGroup(group, dist.get_rank(group), sp_size, mode)


def apply_sequence_parallelism(model: nn.Module, sequence: SequenceGroup) -> None:
    """Make `model` work on this rank's tokens, in place; call it after tensor parallelism and before any wrapper.

    The model's `sequence_cut` is set, its attention modules are put into others, and its blocks are watched. From
    then on the ranks of a group call the model together, with the same inputs, and get the same output.

    Raises:
        ValueError: heads that all_to_all cannot share, or a model without the seam.
    """
    where = f"booster.sp_size={sequence.size}"
    plan = plan_of(model, where=where)
    attention = dict(modules_at(model, plan.attention))
    if not hasattr(model, "sequence_cut") or not attention:
        raise ValueError(
            f"{where}: {type(model).__name__} cannot cut its sequence (no sequence_cut); use booster.sp_size=1"
        )
    if sequence.mode == "all_to_all":
        for _, _, path, heads in head_counts(model, plan):
            if heads % sequence.size:
                raise ValueError(
                    f"{where} does not divide the {heads} heads of {path}; use one of {divisors(heads)}, or"
                    " booster.sequence_parallelism_mode='ring'"
                )
    cut = TokenCut(sequence, averaged=True)
    for name, module in attention.items():
        parent, _, child = name.rpartition(".")
        kind = UlyssesAttention(module, cut) if sequence.mode == "all_to_all" else RingAttention(cut)
        setattr(model.get_submodule(parent), child, kind)
    cut.put_into(model, plan)


@dataclass(frozen=True)
class CutRope(Rope):
    """The tables of this rank's tokens; they travel with them, also into a recomputation."""

    lengths: tuple[int, ...] = ()  # tokens of each rank of the group
    num_text: int = 0  # of all tokens together, the first


class TokenCut:
    """A `SequenceCut`: the joint sequence in runs whose lengths differ by one at most.

    Nothing is padded: attention needs no mask and keeps its fast kernels. A rank may hold no image token, or none
    at all.

    Args:
        averaged: whether gradients are averaged over the group in the end; else they are summed.
    """

    def __init__(self, sequence: SequenceGroup, *, averaged: bool) -> None:
        self.sequence, self._factor = sequence, sequence.size if averaged else 1
        self.lengths: tuple[int, ...] = ()  # of the sequence that a block works on now
        self.num_text = 0  # in it

    def put_into(self, model: nn.Module, plan: ParallelPlan) -> None:
        """Let `model` cut its tokens, and watch its blocks."""
        model.sequence_cut = self
        for _, block in modules_at(model, plan.blocks):
            block.register_forward_pre_hook(self.note_lengths, with_kwargs=True)

    def cut(self, txt_BLD: Tensor, img_BLD: Tensor, rope: Rope) -> tuple[Tensor, Tensor, CutRope]:
        """This rank's run; see `SequenceCut`."""
        num_text, num_image = txt_BLD.shape[1], img_BLD.shape[1]
        total, size = num_text + num_image, self.sequence.size
        assert len(rope.cos_LF) == total, f"rope has {len(rope.cos_LF)} positions for {total} tokens"
        bounds = [total * i // size for i in range(size + 1)]
        lengths = tuple(b - a for a, b in pairwise(bounds))
        # how many image tokens lie before each bound
        self._image_bounds = [max(b - num_text, 0) for b in bounds]
        start, stop = bounds[self.sequence.rank], bounds[self.sequence.rank + 1]
        mine = CutRope(rope.cos_LF[start:stop], rope.sin_LF[start:stop], rope.interleaved, lengths, num_text)
        txt_BLD = txt_BLD[:, min(start, num_text) : min(stop, num_text)]
        first, last = self._image_bounds[self.sequence.rank], self._image_bounds[self.sequence.rank + 1]
        return txt_BLD, img_BLD[:, first:last], mine

    def join(self, img_BLD: Tensor) -> Tensor:
        """All image tokens on every rank; see `SequenceCut`."""
        return _Join.apply(img_BLD, tuple(self._image_bounds), self.sequence, self._factor)

    def note_lengths(self, block: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Before a block: which sequence its tokens are of. A recomputation may come after another forward."""
        ropes = [value for value in (*args, *kwargs.values()) if isinstance(value, CutRope)]
        if not ropes:
            raise RuntimeError(
                f"sequence parallelism: {type(block).__name__} was not given the rope that sequence_cut.cut returned;"
                " pass it to every block"
            )
        self.lengths, self.num_text = ropes[0].lengths, ropes[0].num_text


def gather_tokens(x_BLD: Tensor, lengths: Sequence[int], sequence: SequenceGroup) -> Tensor:
    """The tokens of all ranks side by side, of which each has as many as `lengths` says; without gradient."""
    padded = x_BLD.new_zeros(x_BLD.shape[0], max(lengths), x_BLD.shape[2])
    padded[:, : x_BLD.shape[1]] = x_BLD
    parts = [torch.empty_like(padded) for _ in lengths]
    dist.all_gather(parts, padded, group=sequence.group)
    return torch.cat([part[:, :length] for part, length in zip(parts, lengths, strict=True)], dim=1)


class _Join(torch.autograd.Function):
    """Concatenates the ranks' tokens; its gradient is this rank's slice times a factor."""

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        x_BLD: Tensor,
        bounds: tuple[int, ...],
        sequence: SequenceGroup,
        factor: int,
    ) -> Tensor:
        ctx.factor, ctx.slice = factor, slice(bounds[sequence.rank], bounds[sequence.rank + 1])
        return gather_tokens(x_BLD, [b - a for a, b in pairwise(bounds)], sequence)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return grad[:, ctx.slice] * ctx.factor, None, None, None


class _Exchange(torch.autograd.Function):
    """Part i of a flat tensor goes to rank i; what comes is in the order of the ranks."""

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        flat: Tensor,
        given: list[int],
        taken: list[int],
        group: dist.ProcessGroup,
    ) -> Tensor:
        ctx.given, ctx.taken, ctx.group = given, taken, group
        out = flat.new_empty(sum(taken))
        dist.all_to_all_single(out, flat.contiguous(), taken, given, group=group)
        return out

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor, None, None, None]:
        out = grad.new_empty(sum(ctx.given))
        dist.all_to_all_single(out, grad.contiguous(), ctx.given, ctx.taken, group=ctx.group)
        return out, None, None, None


class UlyssesAttention(nn.Module):
    """Some heads of all tokens in place of all heads of some tokens, and back: two exchanges per attention.

    Source: DeepSpeed Ulysses, arXiv:2309.14509.
    """

    def __init__(self, inner: nn.Module, cut: TokenCut) -> None:
        super().__init__()
        self.inner, self._cut = inner, cut

    def forward(self, q_BNLD: Tensor, k_BNLD: Tensor, v_BNLD: Tensor) -> Tensor:
        """Returns: [B, L, N * D], of this rank's tokens."""
        sequence, lengths = self._cut.sequence, self._cut.lengths
        size, own, total = sequence.size, v_BNLD.shape[2], sum(lengths)
        x = torch.stack([q_BNLD.to(v_BNLD), k_BNLD.to(v_BNLD), v_BNLD])
        _, batch, num_heads, _, dim = x.shape
        heads = num_heads // size
        flat = x.unflatten(2, (size, heads)).movedim(2, 0).reshape(-1)
        row = 3 * batch * heads * dim
        taken = [row * n for n in lengths]
        came = _Exchange.apply(flat, [row * own] * size, taken, sequence.group).split(taken)
        x = torch.cat([c.view(3, batch, heads, n, dim) for c, n in zip(came, lengths, strict=True)], dim=3)
        out_BLC = self.inner(*x)

        row = batch * heads * dim
        flat = torch.cat([part.reshape(-1) for part in out_BLC.view(batch, total, -1).split(lengths, dim=1)])
        came = _Exchange.apply(flat, [row * n for n in lengths], [row * own] * size, sequence.group)
        return came.view(size, batch, own, heads * dim).permute(1, 2, 0, 3).flatten(2)


class RingAttention(nn.Module):
    """Keys and values go round the ranks, queries stay; any number of heads. See `ring_attention`."""

    def __init__(self, cut: TokenCut) -> None:
        super().__init__()
        self._cut = cut

    def forward(self, q_BNLD: Tensor, k_BNLD: Tensor, v_BNLD: Tensor) -> Tensor:
        """Returns: [B, L, N * D], of this rank's tokens."""
        q_BNLD, k_BNLD = q_BNLD.to(v_BNLD.dtype), k_BNLD.to(v_BNLD.dtype)
        out = ring_attention(q_BNLD, k_BNLD, v_BNLD, lengths=self._cut.lengths, group=self._cut.sequence.group)
        return out.transpose(1, 2).flatten(2)
