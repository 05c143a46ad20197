"""Every bucket that the rows of a table may come to, in any epoch."""

from __future__ import annotations

import numpy as np

from opensora_like.datasets.bucket import Buckets
from opensora_like.datasets.classes import classify
from opensora_like.datasets.shards import ShardedTable
from opensora_like.datasets.table import Table


def rows_of_buckets(table: Table | ShardedTable, buckets: Buckets, *, fps_max: float | None) -> dict[int, np.ndarray]:
    """The rows that each bucket may hold in some epoch, whatever is drawn; quarantined rows are in none.

    Args:
        fps_max: see `bucket.sampling_interval`.

    Returns: bucket id -> int64, rising, without the buckets that no row can come to.
    """
    columns = (table.num_frames, table.height, table.width, table.fps)
    codes, asks = classify(*columns, buckets, fps_max=fps_max)
    classes: dict[int, list[int]] = {}
    for number, asked in enumerate(asks.tolist()):
        for place, bucket in enumerate(asked):
            for reached in _reached(bucket, buckets, place) if bucket >= 0 else ():
                classes.setdefault(reached, []).append(number)
    usable = np.ones(table.num_rows, bool)
    if table.quarantine is not None:
        usable[table.quarantine.rows] = False
    found = {}
    for bucket in sorted(classes):
        among = np.zeros(len(asks), bool)
        among[classes[bucket]] = True
        if len(rows := np.flatnonzero(among[codes] & usable)):
            found[bucket] = rows
    return found


def _reached(bucket: int, buckets: Buckets, place: int) -> list[int]:
    """The bucket that is tried first at a resolution, and those of fewer frames that a skip leads to."""
    resolution = buckets.resolutions[place]
    own = sum(shape.resolution == resolution.name for shape in buckets.shapes)
    num_ratios = own // len(resolution.frames)
    rung, ratio = divmod(bucket - int(resolution.first_id[0]), num_ratios)
    reached = []
    while rung >= 0:
        if resolution.keep[rung] > 0 and resolution.skip[rung] < 1:
            reached.append(int(resolution.first_id[rung]) + ratio)
        rung = int(resolution.next_rung[rung]) if resolution.skip[rung] > 0 else -1
    return reached
