"""Where DeepSpeed keeps the float32 weights of this rank: ranges of parameters inside flat tensors."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from opensora_like.boosters import layout
from opensora_like.boosters.base import ShardRange


class Place(NamedTuple):
    """Where a parameter's float32 weights are."""

    flat: Tensor  # what the optimizer updates on this rank; parts of many parameters, one after another
    offset: int  # in `flat`, of this rank's part
    ranges: tuple[ShardRange, ...]  # of every rank

    def own(self, flat: Tensor) -> Tensor:
        """The view of this rank's part in a tensor laid out as `self.flat`."""
        part = self.ranges[layout.ranks()[0]]
        return flat.detach()[self.offset : self.offset + part.stop - part.start]


def places_of_groups(zero: Any, names: Mapping[nn.Parameter, str]) -> Iterator[tuple[str, Place]]:
    """Stage 1 and 2: all parameters of a group flattened in a row, the row cut into one piece per rank."""
    rank, world_size = layout.ranks()
    for group, flat in enumerate(zero.single_partition_of_fp32_groups):
        for parameter, first in zip(
            zero.round_robin_bit16_groups[group], zero.round_robin_bit16_offsets[group], strict=True
        ):
            ranges = tuple(cut(parameter.shape, first, r, flat.numel()) for r in range(world_size))
            yield names[parameter], Place(flat, max(0, first - rank * flat.numel()), ranges)


def cut(shape: torch.Size | tuple[int, ...], first: int, rank: int, length: int) -> ShardRange:
    """What `rank` owns of a parameter that begins at element `first` of a row cut into pieces of `length`."""
    total = math.prod(shape)
    start, stop = (min(max(edge * length - first, 0), total) for edge in (rank, rank + 1))
    return ShardRange(tuple(shape), start, stop)


def places_of_shards(zero: Any, names: Mapping[nn.Parameter, str]) -> Iterator[tuple[str, Place]]:
    """Stage 3: each parameter cut evenly, and the rank's parts in a row, each with its padding."""
    world_size = layout.ranks()[1]
    for flat, parameters in zip(zero.fp32_partitioned_groups_flat, zero.fp16_groups, strict=True):
        offset = 0
        for parameter in parameters:
            ranges = tuple(layout.even_range(parameter.ds_shape, r, world_size) for r in range(world_size))
            yield names[parameter], Place(flat, offset, ranges)
            offset += parameter.partition_numel()


def gather_parts(shards: Mapping[str, Tensor], places: Mapping[str, Place]) -> dict[str, Tensor]:
    """Whole tensors on rank 0, each part sent by its owner; every rank calls it with the same names in the same order.

    Args:
        shards: flat, of the length that `places` says; a tensor without dimension is the same on all ranks.

    Returns: CPU copies in their shapes; {} except on rank 0.
    """
    rank = layout.ranks()[0]
    whole = {}
    for name, shard in shards.items():
        shard = shard.detach()
        if rank == 0:
            whole[name] = _receive(shard, places[name].ranges) if shard.ndim else shard.to("cpu", copy=True)
        elif shard.numel() and shard.ndim:
            dist.send(shard.contiguous(), dst=0)
    return whole


def _receive(own: Tensor, ranges: tuple[ShardRange, ...]) -> Tensor:
    shape = ranges[0].shape
    whole = torch.empty(math.prod(shape), dtype=own.dtype)
    for owner, place in enumerate(ranges):
        part = own
        if owner > 0 and place.stop > place.start:
            part = own.new_empty(place.stop - place.start)
            dist.recv(part, src=owner)
        if place.stop > place.start:
            whole[place.start : place.stop] = part
    return whole.reshape(shape)
