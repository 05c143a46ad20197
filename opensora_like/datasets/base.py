"""The protocol of a dataset: a table, its buckets, the plan of an epoch, and the reading of one row."""

from __future__ import annotations

from typing import Protocol

from opensora_like.datasets.batch import Sample
from opensora_like.datasets.bucket import Buckets, BucketShape
from opensora_like.datasets.plan import EpochPlan
from opensora_like.datasets.shards import ShardedTable
from opensora_like.datasets.table import Table


class ClipDataset(Protocol):
    """What the loop and the loader know of a dataset. Registered in DATASETS; picklable, for loader workers.

    The program gives ``bucket_config``, ``multiple`` (of heights and widths) and ``seed`` to its constructor.
    """

    table: Table | ShardedTable
    buckets: Buckets
    fps_max: float | None

    def plan(self, epoch: int) -> EpochPlan:
        """The micro-batches of an epoch, a pure function; the last one asked for is kept."""

    def read(self, row: int, shape: BucketShape, epoch: int) -> Sample:
        """One row, brought to `shape`; every random choice is a function of (seed, epoch, row).

        Raises:
            BadSample: the row cannot be read; the loader replaces it.
        """
