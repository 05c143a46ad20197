"""Lays out the next epoch of a table in shards while the present one trains."""

from __future__ import annotations

import multiprocessing
import os
from multiprocessing.process import BaseProcess

from opensora_like.datasets.bucket import Buckets
from opensora_like.datasets.plan import build_plan
from opensora_like.datasets.shards import ShardedTable


def build_ahead(table: ShardedTable, buckets: Buckets, *, fps_max: float | None, seed: int, epoch: int) -> BaseProcess:
    """Build the plan of `epoch` in a process of its own, with low priority; for one process of a machine to call.

    Who asks for the plan meanwhile waits for this process, and afterwards finds it on disk. If it dies, who asks
    builds the plan and meets what it met.

    Returns: the process, which ends with the caller's.
    """
    arguments = (table, buckets, fps_max, seed, epoch)
    process = multiprocessing.get_context("spawn").Process(target=_build, args=arguments, daemon=True)
    process.start()
    return process


def _build(table: ShardedTable, buckets: Buckets, fps_max: float | None, seed: int, epoch: int) -> None:
    os.nice(10)
    build_plan(table, buckets, fps_max=fps_max, seed=seed, epoch=epoch)
