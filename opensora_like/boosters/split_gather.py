"""Tokens shared by the ranks that share linears: between the cut linears each rank holds a run of them.

A column linear gathers the tokens of its stream for its own outputs, a row linear sums over the ranks and keeps its own
tokens. Norms, modulation and residuals lie between, on a run each. Gathered tokens are not kept for the backward pass,
which gathers them anew.

Gradients are exact. Of a parameter that is not cut, each rank has the part that its own tokens, or its own heads of
all tokens, give; the booster has to sum these over the group before it takes the step.

Source: Korthikanti et al., arXiv:2205.05198, section 4.2.2; ColossalAI's mode ``split_gather``.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import accumulate, pairwise

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx

from opensora_like.boosters.plan import modules_at
from opensora_like.boosters.sequence_parallel import SequenceGroup, TokenCut, gather_tokens
from opensora_like.models.base import ParallelPlan, TokenStream
from opensora_like.models.layers import Rope


def check_streams(model: nn.Module, plan: ParallelPlan, *, where: str) -> None:
    """Check that it is known which tokens each linear works on.

    Raises:
        ValueError: the model cannot cut its tokens, or its plan lacks ``token_streams`` of a row linear.
    """
    kind = type(model).__name__
    if not hasattr(model, "sequence_cut"):
        raise ValueError(f"{where}: {kind} cannot cut its sequence (no sequence_cut); remove it")
    if unknown := sorted(plan.row.keys() - plan.token_streams.keys()):
        raise ValueError(
            f"{where}: the plan of {kind} does not say which tokens {unknown[0]} works on (token_streams); use"
            " 'all_to_all' or 'ring_attn'"
        )


def apply_split_gather(model: nn.Module, plan: ParallelPlan, sequence: SequenceGroup) -> None:
    """Let the ranks of a tensor group share the tokens, in place; linears have been cut, and heads counted, before.

    Parameters and their names stay. From then on the ranks of a group call the model together, with the same inputs,
    and get the same output.
    """
    cut = SharedCut(sequence, averaged=False)
    for kind, patterns in ((GatherLinear, plan.column), (ScatterLinear, plan.row)):
        for pattern in patterns:
            for name, linear in list(modules_at(model, [pattern])):
                parent, _, child = name.rpartition(".")
                shared = kind(linear.weight, linear.bias, cut, plan.token_streams.get(pattern))
                setattr(model.get_submodule(parent), child, shared)
    cut.put_into(model, plan)


class SharedCut(TokenCut):
    """A `SequenceCut` whose ranks see all tokens in attention, so each has the whole tables."""

    def cut(self, txt_BLD: Tensor, img_BLD: Tensor, rope: Rope) -> tuple[Tensor, Tensor, Rope]:
        """This rank's run, and the tables of all."""
        txt_BLD, img_BLD, mine = super().cut(txt_BLD, img_BLD, rope)
        return txt_BLD, img_BLD, replace(mine, cos_LF=rope.cos_LF, sin_LF=rope.sin_LF)

    def lengths_of(self, stream: TokenStream) -> list[int]:
        """Tokens of a stream on each rank; some may have none."""
        bounds = [0, *accumulate(self.lengths)]
        if stream == "text":
            bounds = [min(bound, self.num_text) for bound in bounds]
        elif stream == "image":
            bounds = [max(bound, self.num_text) for bound in bounds]
        return [b - a for a, b in pairwise(bounds)]


class GatherLinear(nn.Module):
    """Some outputs of a linear for all tokens, from this rank's; without a stream, from inputs that are whole.

    Whole inputs get the gradient of this rank's outputs alone, a part like that of any weight before them.
    """

    def __init__(
        self, weight: nn.Parameter, bias: nn.Parameter | None, cut: SharedCut, stream: TokenStream | None
    ) -> None:
        super().__init__()
        self.weight, self.bias, self._cut, self._stream = weight, bias, cut, stream

    def forward(self, x_BLD: Tensor) -> Tensor:
        if self._stream is None:
            return F.linear(x_BLD, self.weight, self.bias)
        lengths = self._cut.lengths_of(self._stream)
        return _GatherLinear.apply(x_BLD, self.weight, self.bias, lengths, self._cut.sequence)


class ScatterLinear(nn.Module):
    """A linear from some of its inputs for all tokens, summed over the ranks, of which each keeps its tokens."""

    def __init__(self, weight: nn.Parameter, bias: nn.Parameter | None, cut: SharedCut, stream: TokenStream) -> None:
        super().__init__()
        self.weight, self.bias, self._cut, self._stream = weight, bias, cut, stream

    def forward(self, x_BLD: Tensor) -> Tensor:
        lengths = self._cut.lengths_of(self._stream)
        out_BLD = _Scatter.apply(F.linear(x_BLD, self.weight), lengths, self._cut.sequence)
        return out_BLD if self.bias is None else out_BLD + self.bias


class _GatherLinear(torch.autograd.Function):
    """`torch.nn.functional.linear` of gathered tokens, which are not kept."""

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        x_BLD: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        lengths: list[int],
        sequence: SequenceGroup,
    ) -> Tensor:
        ctx.save_for_backward(x_BLD, weight)
        ctx.lengths, ctx.sequence = lengths, sequence
        return F.linear(gather_tokens(x_BLD, lengths, sequence), weight, bias)

    @staticmethod
    def backward(ctx: FunctionCtx, grad_BLD: Tensor) -> tuple[Tensor | None, ...]:
        x_BLD, weight = ctx.saved_tensors
        grads: list[Tensor | None] = [None] * 5
        if ctx.needs_input_grad[0]:
            grads[0] = _scattered_sum(grad_BLD @ weight, ctx.lengths, ctx.sequence)
        if ctx.needs_input_grad[1]:
            whole_BLD = gather_tokens(x_BLD, ctx.lengths, ctx.sequence)
            grads[1] = grad_BLD.flatten(0, 1).T @ whole_BLD.flatten(0, 1)
        if ctx.needs_input_grad[2]:
            grads[2] = grad_BLD.sum((0, 1))
        return tuple(grads)


class _Scatter(torch.autograd.Function):
    """This rank's tokens of the sum over the ranks; the gradient of all tokens is gathered."""

    @staticmethod
    def forward(ctx: FunctionCtx, x_BLD: Tensor, lengths: list[int], sequence: SequenceGroup) -> Tensor:
        ctx.lengths, ctx.sequence = lengths, sequence
        return _scattered_sum(x_BLD, lengths, sequence)

    @staticmethod
    def backward(ctx: FunctionCtx, grad_BLD: Tensor) -> tuple[Tensor, None, None]:
        return gather_tokens(grad_BLD, ctx.lengths, ctx.sequence), None, None


def _scattered_sum(x_BLD: Tensor, lengths: list[int], sequence: SequenceGroup) -> Tensor:
    """This rank's tokens of the sum of all ranks' tensors."""
    most = max(lengths)
    parts = [F.pad(part, (0, 0, 0, most - part.shape[1])) for part in x_BLD.split(lengths, dim=1)]
    own = torch.empty_like(parts[0])
    dist.reduce_scatter(own, [part.contiguous() for part in parts], group=sequence.group)
    return own[:, : lengths[sequence.rank]]
