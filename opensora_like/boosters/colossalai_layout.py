"""Who holds and who owns what of each parameter under ColossalAI: cut by tensor parallelism, then by ZeRO."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch.distributed as dist
from torch import Tensor

from opensora_like.boosters import layout
from opensora_like.boosters.base import ShardRange, ShardStrips, Strip
from opensora_like.boosters.sequence_parallel import SequenceGroup
from opensora_like.boosters.tensor_parallel import TensorCut


@dataclass(frozen=True)
class Groups:
    """The ranks this rank shares something with.

    Args:
        shard: those with the same piece of every weight, whose gradients are averaged: data times sequence.
        tensor: those with the other pieces; None where there is one.
        sequence: those with the other tokens of the same samples, which may be those of `tensor`; None where there is
            one.
    """

    shard: dist.ProcessGroup | None
    tensor: dist.ProcessGroup | None
    sequence: SequenceGroup | None
    dp_rank: int
    dp_size: int

    @property
    def tensor_size(self) -> int:
        """Ranks that share a linear."""
        return 1 if self.tensor is None else layout.ranks(self.tensor)[1]

    @property
    def tokens_follow_linears(self) -> bool:
        """Whether the ranks that share linears share the tokens between them, see `split_gather`."""
        return self.sequence is not None and self.sequence.mode == "split_gather"


class Part(NamedTuple):
    """Of a parameter as this rank has it, cut and flattened: elements [start, stop) are of its shard, [first, last)
    of these it owns. The rest of the shard is owned by ranks that hold the same."""

    shape: tuple[int, ...]  # of the whole parameter
    cut: TensorCut | None
    start: int
    stop: int
    first: int
    last: int

    def take(self, whole: Tensor) -> Tensor:
        """What this rank has of a whole parameter, flat."""
        return (whole if self.cut is None else self.cut.take(whole)).reshape(-1)

    @property
    def place(self) -> ShardRange | ShardStrips:
        """Where what it owns lies in the whole."""
        if self.cut is None:
            return ShardRange(self.shape, self.first, self.last)
        return place_in_cut(self.cut, self.first, self.last)


def part_of(shape: tuple[int, ...], cut: TensorCut | None, groups: Groups) -> Part:
    """The part of a parameter that this rank has to do with."""
    here = math.prod(shape) if cut is None else math.prod(shape) // cut.size
    _, start, stop = layout.even_range((here,), *layout.ranks(groups.shard))
    if cut is not None or groups.tensor is None:
        return Part(tuple(shape), cut, start, stop, start, stop)
    _, first, last = layout.even_range((stop - start,), *layout.ranks(groups.tensor))
    return Part(tuple(shape), cut, start, stop, start + first, start + last)


def place_in_cut(cut: TensorCut, first: int, last: int) -> ShardRange | ShardStrips:
    """Where elements first to last - 1 of a cut parameter, as a rank has it, flattened, lie in the whole."""
    strips = tuple(_strips(cut, first, last))
    if not strips:
        return ShardRange(cut.shape, 0, 0)
    if len(strips) == 1 and strips[0].count == 1:
        return ShardRange(cut.shape, strips[0].start, strips[0].start + strips[0].length)
    return ShardStrips(cut.shape, strips)


def _strips(cut: TensorCut, first: int, last: int) -> Iterator[Strip]:
    """One for each piece and box of it; a cut along the rows is one along the columns of a matrix with one row."""
    inner = math.prod(cut.shape[cut.dim + 1 :])
    width = math.prod(cut.shape[cut.dim :])
    pieces = [(whole * inner, here * inner, length * inner) for whole, here, length in cut.pieces()]
    width_here = sum(length for *_, length in pieces)
    for row, count, low, high in _boxes(first, last, width_here):
        for whole, here, length in pieces:
            a, b = max(low, here), min(high, here + length)
            if a < b:
                at = row * width_here + a - first
                yield Strip(row * width + whole + a - here, width, at, width_here, b - a, count)


def _boxes(first: int, last: int, width: int) -> Iterator[tuple[int, int, int, int]]:
    """(first row, rows, first column, one past the last column) of elements of a matrix, flattened: whole rows, and
    what is left before and behind."""
    row, column = divmod(first, width)
    if column and first < last:
        stop = min(last - row * width, width)
        yield row, 1, column, stop
        row, first = row + 1, row * width + stop
    if (count := (last - first) // width) > 0:
        yield row, count, 0, width
        row, first = row + count, first + count * width
    if first < last:
        yield row, 1, 0, last - first
