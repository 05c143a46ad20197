"""Samples per update: how many micro-batches they are, whatever the number of processes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from opensora_like.boosters.plan import divisors
from opensora_like.settings import RunConfig


def with_batch_sizes(cfg: RunConfig, world_size: int) -> RunConfig:
    """`cfg` with `accumulation_steps` and the buckets' batch sizes as `global_batch_size` and `local_batch_size` ask.

    The config that is written into the run's folder stays as it was, so that it can be read by any number of processes.

    Raises:
        ValueError: sizes that do not divide, or `accumulation_steps` beside `global_batch_size`.
    """
    cfg = _with_local(cfg)
    if cfg.global_batch_size is None:
        return cfg
    if cfg.accumulation_steps != 1:
        raise ValueError(
            f"global_batch_size={cfg.global_batch_size} and accumulation_steps={cfg.accumulation_steps} both say how "
            "many micro-batches an update has; remove one"
        )
    sizes = {int(entry[1]) for table in cfg.bucket_config.values() for entry in table.values()}
    if len(sizes) != 1:
        raise ValueError(
            f"global_batch_size={cfg.global_batch_size} counts samples, and the buckets have batches of "
            f"{sorted(sizes)}; set local_batch_size, or accumulation_steps in place of global_batch_size"
        )
    if (size := min(sizes)) < 1:
        raise ValueError(f"bucket_config has batches of {size}; their size must be 1 or more")
    num_ranks = world_size // ranks_per_sample(cfg.booster)
    if num_ranks < 1:
        raise ValueError(
            f"booster={dict(cfg.booster)!r} shares a sample among more ranks than the {world_size} started"
        )
    steps = accumulation_of(cfg.global_batch_size, sizes.pop(), num_ranks)
    return dataclasses.replace(cfg, accumulation_steps=steps)


def accumulation_of(global_batch_size: int, local_batch_size: int, num_ranks: int) -> int:
    """Micro-batches per rank and update.

    Args:
        num_ranks: data-parallel ones: those that read different samples.

    Raises:
        ValueError: the sizes do not divide; the message has sizes that do.
    """
    at_once = local_batch_size * num_ranks
    if global_batch_size >= 1 and global_batch_size % at_once == 0:
        return global_batch_size // at_once
    above = -(-max(1, global_batch_size) // at_once) * at_once
    near = [size for size in (above - at_once, above) if size > 0]
    remedies = [f"global_batch_size {' or '.join(map(str, near))}"]
    if global_batch_size >= 1 and global_batch_size % num_ranks == 0:
        remedies.append(f"local_batch_size one of {divisors(global_batch_size // num_ranks)}")
    if global_batch_size >= 1 and global_batch_size % local_batch_size == 0:
        remedies.append(f"a number of data-parallel ranks out of {divisors(global_batch_size // local_batch_size)}")
    raise ValueError(
        f"global_batch_size={global_batch_size} cannot be made of batches of {local_batch_size} on {num_ranks} "
        f"data-parallel ranks, {at_once} samples at once; use {', or '.join(remedies)}"
    )


def ranks_per_sample(booster: Mapping[str, Any]) -> int:
    """Ranks that work on the same samples: those of tensor and sequence parallelism."""
    options = {**booster, **(booster.get("plugin_config") or {})}
    return int(options.get("tp_size") or 1) * int(options.get("sp_size") or 1)


def _with_local(cfg: RunConfig) -> RunConfig:
    size = cfg.local_batch_size
    if size is None:
        return cfg
    if size < 1:
        raise ValueError(f"local_batch_size={size} must be 1 or more")
    buckets = {
        resolution: {num_frames: (entry[0], size) for num_frames, entry in table.items()}
        for resolution, table in cfg.bucket_config.items()
    }
    return dataclasses.replace(cfg, bucket_config=buckets)
