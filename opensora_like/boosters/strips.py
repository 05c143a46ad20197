"""Shards that are rows of a matrix or boxes of it: who owns which rows, and the ways between part and whole."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from opensora_like.boosters.base import ShardRange, ShardStrips, Strip


def owned_rows(num_rows: int, index: int, count: int) -> tuple[int, int]:
    """[first, last) of the rows that one of `count` ranks owns, each of which holds all of them."""
    length = -(-num_rows // count)
    return min(index * length, num_rows), min((index + 1) * length, num_rows)


def fill_rows(local: Tensor, group: dist.ProcessGroup, count: int, device: torch.device) -> None:
    """Make `local`, contiguous, equal on the `count` ranks of a group; each has the truth in its `owned_rows`.

    Args:
        device: where tensors can be communicated; `local` may be in host memory.
    """
    first, last = owned_rows(len(local), dist.get_rank(group), count)
    own = torch.zeros(-(-len(local) // count), *local.shape[1:], dtype=local.dtype, device=device)
    own[: last - first] = local[first:last]
    parts = [torch.empty_like(own) for _ in range(count)]
    dist.all_gather(parts, own, group=group)
    local.copy_(torch.cat(parts)[: len(local)])


def put(whole: Tensor, shard: Tensor, place: ShardRange | ShardStrips) -> None:
    """Write a flat shard to its place in a flat whole."""
    for strip in place.strips:
        _runs(whole, strip.start, strip.stride, strip).copy_(_runs(shard, strip.at, strip.step, strip))


def _runs(flat: Tensor, first: int, distance: int, strip: Strip) -> Tensor:
    """The runs of a strip as a matrix, a view."""
    return flat.as_strided((strip.count, strip.length), (distance, 1), flat.storage_offset() + first)


def gather_strips(
    shards: Mapping[str, Tensor], places: Mapping[str, ShardRange | ShardStrips], device: torch.device
) -> dict[str, Tensor]:
    """Whole tensors on rank 0; every rank calls it with the same names in the same order.

    Args:
        shards: flat, laid out as `places` says; a tensor without dimension is the same on all ranks.
        device: where tensors can be communicated.

    Returns: CPU copies in their shapes; {} except on rank 0.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    everywhere: list[Mapping[str, ShardRange | ShardStrips]] = [{}] * world_size
    dist.all_gather_object(everywhere, {name: places[name] for name in shards})
    whole: dict[str, Tensor] = {}
    for name, shard in shards.items():
        shard = shard.detach()
        if shard.ndim == 0:
            if rank == 0:
                whole[name] = shard.to("cpu", copy=True)
            continue
        lengths = [sum(s.length * s.count for s in there[name].strips) for there in everywhere]
        own = torch.zeros(max(lengths), dtype=shard.dtype, device=device)
        own[: shard.numel()] = shard
        parts = [torch.empty_like(own) for _ in lengths] if rank == 0 else None
        dist.gather(own, parts, dst=0)
        if parts is not None:
            flat = torch.empty(math.prod(places[name].shape), dtype=shard.dtype)
            for part, there in zip(parts, everywhere, strict=True):
                put(flat, part.cpu(), there[name])
            whole[name] = flat.reshape(places[name].shape)
    return whole
