"""The shuffled rows of an epoch where there are too many to sort: put into small bins at once, sorted when read."""

from __future__ import annotations

import os
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from opensora_like.datasets.bucket import CHUNK
from opensora_like.datasets.classes import RowClasses
from opensora_like.datasets.index import new_array, open_array
from opensora_like.rng import uniform

PURPOSE = "plan.rows"  # of the draw that orders the rows of a bucket
PART = 1 << 22  # rows that one thread bins at once
BIN_ROWS = 1024
MAX_BINS = (1 << 16) - 1  # numpy sorts 16-bit numbers by counting
KEPT_BINS = 256


class BinnedRows:
    """Rows in the order (bucket, draw, row), as `plan.build_plan` sorts them, of which a bin is sorted when it is read.

    Args:
        folder: what `bin_rows` wrote.
    """

    def __init__(self, folder: Path, *, seed: int, epoch: int) -> None:
        self._folder, self._seed, self._epoch = folder, seed, epoch
        self._rows = open_array(folder / "rows.npy")
        self._pieces = open_array(folder / "pieces.npy")  # int64 [parts, bins + 1], where a bin's rows of a part begin
        self._starts = open_array(folder / "bins.npy")  # int64 [bins + 1], where a bin begins in the order
        self._sorted: OrderedDict[int, np.ndarray] = OrderedDict()

    def __reduce__(self):
        # mapped again where it is unpickled, not copied
        return _binned, (self._folder, self._seed, self._epoch)

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, part: slice) -> np.ndarray:
        """Args: part: with step 1. Returns: int64, a copy."""
        start, stop, _ = part.indices(len(self))
        if start >= stop:
            return np.zeros(0, np.int64)
        first = int(np.searchsorted(self._starts, start, side="right")) - 1
        last = int(np.searchsorted(self._starts, stop, side="left"))
        rows = np.concatenate([self._bin(number) for number in range(first, last)])
        begin = int(self._starts[first])
        return rows[start - begin : stop - begin]

    def _bin(self, number: int) -> np.ndarray:
        if number not in self._sorted:
            bounds = self._pieces[:, number : number + 2].tolist()
            rows = np.concatenate([self._rows[start:stop] for start, stop in bounds]).astype(np.int64)
            draw = uniform(self._seed, PURPOSE, self._epoch, rows)
            self._sorted[number] = rows[np.argsort(draw, kind="stable")]
            if len(self._sorted) > KEPT_BINS:
                self._sorted.popitem(last=False)
        self._sorted.move_to_end(number)
        return self._sorted[number]


def _binned(folder: Path, seed: int, epoch: int) -> BinnedRows:
    return BinnedRows(folder, seed=seed, epoch=epoch)


def bin_rows(
    folder: Path, codes: np.ndarray, rows_per_class: np.ndarray, classes: RowClasses, *, seed: int, epoch: int
) -> np.ndarray:
    """Draw the bucket of every row for one epoch and write the rows by bucket and bin into `folder`.

    Args:
        codes: integers [N], the class of each row. rows_per_class: int64 [classes].

    Returns: int64 [buckets + 1], where each bucket begins in `BinnedRows`.
    """
    num_bins = _bins_per_bucket(classes.expected_rows(rows_per_class))
    first_bin = np.concatenate([[0], np.cumsum(num_bins)])
    unused = int(first_bin[-1])  # the bin of rows without a bucket, which id -1 finds
    widths = np.append(num_bins, 0).astype(np.float64)
    kind = np.uint16 if unused <= MAX_BINS else np.uint32
    rows = new_array(folder / "rows.npy", np.uint32 if len(codes) < 2**32 else np.int64, len(codes))
    parts = range(0, len(codes), PART)

    def do_part(start: int) -> np.ndarray:
        stop = min(start + PART, len(codes))
        bins = np.empty(stop - start, kind)
        for chunk in range(start, stop, CHUNK):
            end = min(chunk + CHUNK, stop)
            ids = classes.draw(codes[chunk:end], first_row=chunk, seed=seed, epoch=epoch)
            draw = uniform(seed, PURPOSE, epoch, np.arange(chunk, end))
            bins[chunk - start : end - start] = first_bin[ids] + (draw * widths[ids]).astype(np.int64)
        counts = np.bincount(bins, minlength=unused + 1)[:unused]
        order = np.argsort(bins, kind="stable")[: counts.sum()]
        rows[start : start + len(order)] = order + start  # what has no bucket leaves a hole in the file
        return counts

    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as threads:
        counts = np.array(list(threads.map(do_part, parts)), np.int64).reshape(len(parts), unused)
    pieces = np.zeros((len(parts), unused + 1), np.int64)
    np.cumsum(counts, axis=1, out=pieces[:, 1:])
    pieces += np.array(parts, np.int64)[:, None]
    starts = np.concatenate([[0], np.cumsum(counts.sum(axis=0))])
    np.save(folder / "pieces.npy", pieces)
    np.save(folder / "bins.npy", starts)
    return starts[first_bin]


def _bins_per_bucket(expected: np.ndarray) -> np.ndarray:
    """How many bins each bucket gets, at least 1; their number changes what a read costs, never the order."""
    size = BIN_ROWS
    while True:
        num_bins = np.maximum(1, -(-expected // size))
        if num_bins.sum() <= MAX_BINS or size > expected.sum():
            return num_bins
        size *= 2
