"""Tensor parallelism: linears cut over the ranks of a group, as a model's `ParallelPlan` says.

The cut weights are plain tensors, so every backend can shard them further. torch's own `parallelize_module` keeps
a linear's outputs in one piece per rank, which is wrong for a fused qkv: each of its parts has to be cut.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from opensora_like.boosters.base import ShardRange, ShardStrips, Strip
from opensora_like.boosters.plan import divisors, head_counts, modules_at, names_at
from opensora_like.models.base import ParallelPlan


class TensorCut(NamedTuple):
    """How a parameter is cut: along `dim`, the parts of `sizes` each in even pieces, of which a rank has one each."""

    shape: tuple[int, ...]  # of the whole parameter
    dim: int
    sizes: tuple[int, ...]
    rank: int
    size: int

    def pieces(self) -> Iterator[tuple[int, int, int]]:
        """(first index in the whole, first index here, length) along `dim`, of each part."""
        whole = here = 0
        for size in self.sizes:
            length = size // self.size
            yield whole + self.rank * length, here, length
            whole, here = whole + size, here + length

    def take(self, whole: Tensor) -> Tensor:
        """This rank's pieces, side by side; a copy."""
        return torch.cat([whole.narrow(self.dim, first, length) for first, _, length in self.pieces()], dim=self.dim)


class _Copy(torch.autograd.Function):
    """To all ranks of the group, which hold the same already; its gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor, None]:
        return _summed(grad, ctx.group), None


class _Sum(torch.autograd.Function):
    """Over the ranks of the group."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        return _summed(x, group)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _Mean(torch.autograd.Function):
    """Over the ranks of the group, each of which goes on with it; so is that of its gradients."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return _summed(x, group) / dist.get_world_size(group)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor, None]:
        return _summed(grad, ctx.group) / dist.get_world_size(ctx.group), None


def mean_over_group(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The mean over the ranks, for `ParallelPlan.split_norms`: each rank goes on with it for its own part."""
    return _Mean.apply(x, group)


def _summed(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    x = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(x, group=group)
    return x


class ColumnLinear(nn.Module):
    """Some outputs of a linear, from whole inputs."""

    def __init__(self, weight: nn.Parameter, bias: nn.Parameter | None, group: dist.ProcessGroup) -> None:
        super().__init__()
        self.weight, self.bias, self._group = weight, bias, group

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(_Copy.apply(x, self._group), self.weight, self.bias)


class RowLinear(nn.Module):
    """A linear from some of its inputs, summed over the ranks; the bias is whole and added once."""

    def __init__(self, weight: nn.Parameter, bias: nn.Parameter | None, group: dist.ProcessGroup) -> None:
        super().__init__()
        self.weight, self.bias, self._group = weight, bias, group

    def forward(self, x: Tensor) -> Tensor:
        out = _Sum.apply(F.linear(x, self.weight), self._group)
        return out if self.bias is None else out + self.bias


def apply_tensor_parallelism(model: nn.Module, plan: ParallelPlan, group: dist.ProcessGroup) -> dict[str, TensorCut]:
    """Cut `model`, whole and equal on all ranks (or on ``meta``), in place; names of parameters stay.

    All ranks of the group have to be given the same inputs. Parameters that are not cut have equal gradients on
    all of them, but for those of `per_head_names`, whose gradients are to be summed.

    Returns: how each cut parameter is cut.

    Raises:
        ValueError: heads, or the parts of a linear, that the group's size does not divide; not a linear.
    """
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    for module, attribute, path, heads in list(head_counts(model, plan)):
        if heads % size:
            raise ValueError(
                f"booster.tp_size={size} does not divide the {heads} heads of {path}; use one of {divisors(heads)}"
            )
        setattr(module, attribute, heads // size)
    cuts: dict[str, TensorCut] = {}
    for kind, linears in ((ColumnLinear, plan.column), (RowLinear, plan.row)):
        for pattern, parts in linears.items():
            for name, linear in list(modules_at(model, [pattern])):
                _check_linear(name, linear, size)
                dim = 0 if kind is ColumnLinear else 1
                found = _cuts_of(linear, parts or (linear.weight.shape[dim],), dim=dim, rank=rank, size=size)
                _check_parts(name, linear, found["weight"])
                parent, _, child = name.rpartition(".")
                setattr(model.get_submodule(parent), child, kind(*_taken(linear, found), group))
                cuts |= {f"{name}.{parameter}": cut for parameter, cut in found.items()}
    for name, norm in modules_at(model, plan.split_norms):
        cut = TensorCut(tuple(norm.weight.shape), 0, tuple(norm.weight.shape), rank, size)
        norm.weight = nn.Parameter(cut.take(norm.weight.detach()), requires_grad=norm.weight.requires_grad)
        norm.mean_over_ranks = partial(mean_over_group, group=group)
        cuts[f"{name}.weight"] = cut
    return cuts


def per_head_names(model: nn.Module, plan: ParallelPlan) -> list[str]:
    """Parameters whose gradients are to be summed over the group."""
    names = [name for name, _ in model.named_parameters()]
    return [name for pattern in plan.per_head for name in names_at(names, pattern)]


def _check_linear(name: str, linear: nn.Module, size: int) -> None:
    if not isinstance(linear, nn.Linear):
        raise ValueError(
            f"booster.tp_size={size}: {name} is a {type(linear).__name__}, only nn.Linear can be cut (adapters cannot);"
            " use booster.tp_size=1"
        )


def _check_parts(name: str, linear: nn.Linear, cut: TensorCut) -> None:
    assert sum(cut.sizes) == cut.shape[cut.dim], f"plan of {name}: parts {cut.sizes} of {tuple(linear.weight.shape)}"
    if uneven := [part for part in cut.sizes if part % cut.size]:
        raise ValueError(
            f"booster.tp_size={cut.size} does not divide the part of {uneven[0]} of {name}; use one of"
            f" {divisors(uneven[0])}"
        )


def _cuts_of(linear: nn.Linear, parts: Sequence[int], *, dim: int, rank: int, size: int) -> dict[str, TensorCut]:
    cuts = {"weight": TensorCut(tuple(linear.weight.shape), dim, tuple(parts), rank, size)}
    if dim == 0 and linear.bias is not None:
        cuts["bias"] = cuts["weight"]._replace(shape=tuple(linear.bias.shape))
    return cuts


def _taken(linear: nn.Linear, cuts: dict[str, TensorCut]) -> list[nn.Parameter | None]:
    taken: list[nn.Parameter | None] = []
    for name in ("weight", "bias"):
        whole = getattr(linear, name)
        if whole is not None and name in cuts:
            taken.append(nn.Parameter(cuts[name].take(whole.detach()), requires_grad=whole.requires_grad))
        else:
            taken.append(whole)
    return taken


def owned(cut: TensorCut, first: int, last: int) -> ShardRange | ShardStrips:
    """Where rows first to last - 1 of a cut parameter, as this rank holds it, lie in the whole."""
    width = 1 if len(cut.shape) == 1 else cut.shape[1]
    strips = []
    if cut.dim == 0:
        for whole, here, length in cut.pieces():
            low, high = max(first, here), min(last, here + length)
            if low < high:
                size = (high - low) * width
                strips.append(Strip((whole + low - here) * width, size, (low - first) * width, size, size, 1))
    elif first < last:
        local = sum(length for *_, length in cut.pieces())
        for whole, here, length in cut.pieces():
            strips.append(Strip(first * width + whole, width, here, local, length, last - first))
    if not strips:
        return ShardRange(cut.shape, 0, 0)
    if len(strips) == 1 and strips[0].count == 1:
        return ShardRange(cut.shape, strips[0].start, strips[0].start + strips[0].length)
    return ShardStrips(cut.shape, tuple(strips))
