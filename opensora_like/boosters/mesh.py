"""Where a rank stands in the grid of replicas, shards, sequence groups and tensor groups."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from opensora_like.boosters.plan import divisors


@dataclass(frozen=True)
class Grid:
    """Ranks as [replicate, shard, tensor], the last the fastest; a sequence group lies within the shards.

    Args:
        sharding: the axes that FSDP works on, one, or two where there are replicas of all shards.
        shard, tensor: groups along one axis; None where it has one rank.
        copies, cut_copies: ranks that hold equal shards of a parameter that tensor parallelism leaves whole or cuts.
        copy_index, cut_copy_index: of this rank among them.
    """

    sharding: DeviceMesh
    shard: dist.ProcessGroup | None
    tensor: dist.ProcessGroup | None
    copies: dist.ProcessGroup | None
    cut_copies: dist.ProcessGroup | None
    shard_index: int
    shard_size: int
    copy_index: tuple[int, int]  # (index, how many)
    cut_copy_index: tuple[int, int]


def check_grid(world_size: int, **sizes: int) -> None:
    """Check that the processes fill whole groups.

    Args:
        **sizes: keys of the booster and their values; their product is what has to divide.

    Raises:
        ValueError: it does not, or one is below 1.
    """
    product = 1
    for key, size in sizes.items():
        if size < 1:
            raise ValueError(f"booster.{key}={size} must be 1 or more")
        product *= size
    if world_size % product:
        named = " x ".join(f"booster.{key}={size}" for key, size in sizes.items() if size > 1)
        raise ValueError(
            f"{named} needs a multiple of {product} processes, there are {world_size}; start {product} or a multiple,"
            f" or choose sizes whose product is one of {divisors(world_size)}"
        )


def build_grid(device_type: str, *, replicate: int, tp_size: int) -> Grid:
    """The grid over all processes; every rank calls it."""
    world_size, rank = dist.get_world_size(), dist.get_rank()
    ranks = torch.arange(world_size).view(replicate, -1, tp_size)
    r, s, t = (int(i) for i in (ranks == rank).nonzero()[0])
    axes: dict[str, Any] = {"mesh_dim_names": ("replicate", "shard", "tensor")}
    mesh = DeviceMesh(device_type, ranks, **axes)
    sharding = mesh["replicate", "shard"] if replicate > 1 else mesh["shard"]
    return Grid(
        sharding=sharding,
        shard=mesh.get_group("shard") if ranks.shape[1] > 1 else None,
        tensor=mesh.get_group("tensor") if tp_size > 1 else None,
        copies=_group(ranks.permute(1, 0, 2).flatten(1)),
        cut_copies=mesh.get_group("replicate") if replicate > 1 else None,
        shard_index=s,
        shard_size=ranks.shape[1],
        copy_index=(r * tp_size + t, replicate * tp_size),
        cut_copy_index=(r, replicate),
    )


def _group(rows: torch.Tensor) -> dist.ProcessGroup | None:
    """The group of this rank, of groups that are the rows."""
    if rows.shape[1] == 1:
        return None
    group, _ = dist.new_subgroups_by_enumeration(rows.tolist())
    return group
