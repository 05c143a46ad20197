"""The random order of an epoch, found where it is read: nothing is sorted, or written, for the epoch as a whole."""

from __future__ import annotations

from collections import OrderedDict
from functools import partial

import numpy as np

from opensora_like.datasets.bucket import CHUNK
from opensora_like.datasets.row_index import DrawnRows, RowArray
from opensora_like.rng import bijection, seed_of, uniform

PURPOSE = "plan.rows"  # of the draw that orders the rows of a bucket
SORTED = 1 << 14  # so many things or fewer are sorted by their draws; more are moved by a bijection
KEPT_BUCKETS = 64  # whose rows stay sorted in memory


class ShuffledRows:
    """The rows of an epoch, bucket after bucket, each in random order; a slice is computed when it is read.

    Args:
        settled, bounds: as in `RowIndex`. drawn: of this epoch.
    """

    def __init__(self, settled: RowArray, bounds: np.ndarray, drawn: DrawnRows, *, seed: int, epoch: int) -> None:
        self._settled, self._settled_bounds, self._drawn = settled, bounds, drawn
        self._seed, self._epoch = seed, epoch
        self.bounds = bounds + drawn.bounds
        self._sorted: OrderedDict[int, np.ndarray] = OrderedDict()

    def __reduce__(self):
        options = {"seed": self._seed, "epoch": self._epoch}
        return partial(ShuffledRows, **options), (self._settled, self._settled_bounds, self._drawn)

    def __len__(self) -> int:
        return int(self.bounds[-1])

    def __getitem__(self, part: slice) -> np.ndarray:
        """Args: part: with step 1. Returns: int64."""
        start, stop, _ = part.indices(len(self))
        pieces = [np.zeros(0, np.int64)]
        while start < stop:
            bucket = int(np.searchsorted(self.bounds, start, side="right")) - 1
            first, last = self.bounds[bucket : bucket + 2].tolist()
            end = min(stop, last, start + CHUNK)  # what is in hand stays in the cache
            pieces.append(self._of_bucket(bucket, start - first, end - first, last - first))
            start = end
        return np.concatenate(pieces)

    def _of_bucket(self, bucket: int, start: int, stop: int, num: int) -> np.ndarray:
        if num > SORTED:
            key = seed_of(self._seed, PURPOSE, self._epoch, bucket)
            return self._take(bucket, bijection(np.arange(start, stop), num, key))
        if bucket not in self._sorted:
            rows = self._take(bucket, np.arange(num))
            self._sorted[bucket] = rows[np.argsort(uniform(self._seed, PURPOSE, self._epoch, rows), kind="stable")]
            if len(self._sorted) > KEPT_BUCKETS:
                self._sorted.popitem(last=False)
        self._sorted.move_to_end(bucket)
        return self._sorted[bucket][start:stop]

    def _take(self, bucket: int, places: np.ndarray) -> np.ndarray:
        """Rows of a bucket by their place among its settled rows, which the drawn ones follow."""
        first, last = self._settled_bounds[bucket : bucket + 2].tolist()
        is_settled = places < last - first
        rows = np.empty(len(places), np.int64)
        rows[is_settled] = self._settled[first + places[is_settled]]
        start = int(self._drawn.bounds[bucket]) - (last - first)
        rows[~is_settled] = self._drawn.rows[start + places[~is_settled]]
        return rows


def shuffled(index: np.ndarray, num: int, *, seed: int, purpose: str, epoch: int) -> np.ndarray:
    """What stands at these places of a random order of 0 to num - 1. Args: index: integers. Returns: int64."""
    if num > SORTED:
        return bijection(index, num, seed_of(seed, purpose, epoch))
    return np.argsort(uniform(seed, purpose, epoch, np.arange(num)), kind="stable")[index]
