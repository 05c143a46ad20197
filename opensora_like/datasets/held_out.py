"""Clips that training never sees: which rows they are, the table without them, the few that are measured, and how."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa

from opensora_like.datasets.base import ClipDataset
from opensora_like.datasets.drops import assign_rows
from opensora_like.datasets.plan import MicroBatch
from opensora_like.datasets.shards import ShardedTable
from opensora_like.datasets.table import Table
from opensora_like.rng import uniform

SEED = 0  # not the run's: runs with other seeds are measured on the same clips


@dataclass(frozen=True)
class MeasuredLosses:
    """Losses of one set of weights.

    Args:
        weights: "base" (those that training began with), "raw" or "ema".
        losses_NK: float64, of clip n in part k of the range of t.
        base_NK: of the base: the same clips, noise and t.
        buckets: of each clip.
        edges: of the parts, K + 1 times.
    """

    step: int
    weights: str
    losses_NK: np.ndarray
    base_NK: np.ndarray
    buckets: list[str]
    edges: list[float]


def held_out_rows(table: Table | ShardedTable, share: float) -> np.ndarray:
    """Which rows are held out: those whose path hashes below `share`.

    So a clip stays held out when the table grows or is sorted anew, and rows of one file stay together.

    Args:
        share: of the rows, about, above 0 and up to 0.5.

    Returns: bool [N].

    Raises:
        ValueError: a share out of range, a table in shards, or a share that holds out no row or all of them.
    """
    if not 0 < share <= 0.5:
        raise ValueError(f"validation.share={share!r} must be above 0 and at most 0.5; 0.01 is usual")
    if isinstance(table, ShardedTable):
        raise ValueError(
            f"validation.share={share!r} needs a table in memory, and {table.path!r} is in shards; put the clips to "
            "hold out into a table of their own and name it in validation.dataset.data_path"
        )
    paths: pa.ChunkedArray = table.other["path"]
    limit = int(share * 2**64)
    rows = np.fromiter((_hash(path) < limit for path in paths.to_pylist()), bool, table.num_rows)
    if not 0 < np.count_nonzero(rows) < table.num_rows:
        raise ValueError(
            f"validation.share={share!r} holds out {np.count_nonzero(rows)} of the {table.num_rows} rows of "
            f"{table.path!r}; raise it, or name a table in validation.dataset.data_path"
        )
    return rows


def _hash(path: str) -> int:
    return int.from_bytes(hashlib.blake2b(path.encode(), digest_size=8).digest(), "little")


def table_without(table: Table, rows: np.ndarray) -> Table:
    """The table with the same row numbers, in which `rows` have no frames and so fit no bucket.

    Args:
        rows: bool [N].
    """
    decisive = f"{table.fingerprint}/".encode() + np.packbits(rows).tobytes()
    return replace(
        table,
        path=f"{table.path} without {np.count_nonzero(rows)} held-out rows",
        num_frames=np.where(rows, 0, table.num_frames),
        fingerprint=hashlib.blake2b(decisive, digest_size=16).hexdigest(),
    )


def choose_clips(dataset: ClipDataset, rows: np.ndarray | None, num_clips: int) -> list[MicroBatch]:
    """The held-out clips to measure, in micro-batches of one bucket each, whatever the number of processes.

    Args:
        rows: bool [N], those to choose from; None is all of the table.
        num_clips: at most; drawn by row, so that the buckets have the shares that they have in the table.

    Raises:
        ValueError: no row has a bucket.
    """
    table, buckets = dataset.table, dataset.buckets
    ids = assign_rows(table, buckets, fps_max=dataset.fps_max, seed=SEED, epoch=0)
    candidates = np.flatnonzero(ids >= 0 if rows is None else (ids >= 0) & rows)
    if not len(candidates):
        among = table.num_rows if rows is None else int(np.count_nonzero(rows))
        raise ValueError(
            f"validation: none of the {among} held-out clips of {table.path!r} has a bucket; hold out more, or add a "
            "bucket that takes them"
        )
    order = np.argsort(uniform(SEED, "validation.clips", 0, candidates), kind="stable")
    chosen = np.sort(candidates[order[:num_clips]])
    batches = []
    for bucket in np.unique(ids[chosen]):
        own = chosen[ids[chosen] == bucket]
        size = int(buckets.batch_sizes[bucket])
        for start in range(0, len(own), size):
            part = own[start : start + size]
            batches.append(MicroBatch(0, len(batches), buckets.shapes[bucket], part, spares=part[:0]))
    return batches
