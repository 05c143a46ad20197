"""Rows sorted by bucket once for all epochs, and those whose bucket is drawn, sorted anew in each."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, Protocol

import numpy as np

from opensora_like.datasets.bucket import CHUNK, Buckets
from opensora_like.datasets.classes import MAX_CLASSES, UNSETTLED, RowClasses, classify

SPAN = 1 << 22  # rows that one thread sorts at once
Make = Callable[[str, type, int], np.ndarray]  # name, type and length -> an array to fill


class RowArray(Protocol):
    """Row numbers in memory, or mapped from a file."""

    def __len__(self) -> int: ...

    def __getitem__(self, key: slice | np.ndarray) -> np.ndarray: ...


class RowIndex(NamedTuple):
    """What is known of the buckets of a table's rows before any draw.

    Args:
        settled: rows whose bucket is the same in every epoch, bucket after bucket, rising in each.
        bounds: int64 [buckets + 1]; bucket b has settled[bounds[b]:bounds[b + 1]].
        open_rows: rows whose bucket, or whether they have one, is drawn; rising.
        open_codes: uint16, the class of each of these.
        left_out: int64, rows that come into no bucket whatever is drawn; rising. `settled` is without them.
    """

    settled: RowArray
    bounds: np.ndarray
    open_rows: RowArray
    open_codes: RowArray
    classes: RowClasses
    left_out: np.ndarray = np.zeros(0, np.int64)


class DrawnRows(NamedTuple):
    """Rows that come to a bucket in one epoch by a draw.

    Args:
        rows: bucket after bucket, rising in each. bounds: int64 [buckets + 1], where each bucket begins.
    """

    rows: np.ndarray
    bounds: np.ndarray


def in_memory(name: str, dtype: type, num: int) -> np.ndarray:
    """A `Make` that keeps nothing."""
    return np.empty(num, dtype)


def row_type(num_rows: int) -> type:
    """The smallest integers that number so many rows."""
    return np.uint32 if num_rows < 2**32 else np.int64


def build_row_index(columns: Sequence[np.ndarray], buckets: Buckets, *, fps_max: float | None, make: Make) -> RowIndex:
    """Find the bucket, or the kind, of every row.

    Args:
        columns: num_frames, height, width, fps of the table.
        make: called with "codes" (needed while this runs only), "settled", "open_rows" and "open_codes".

    Raises:
        ValueError: the config tells more than `MAX_CLASSES` kinds of rows apart.
    """
    num_rows = len(columns[0])
    codes = make("codes", np.uint16, num_rows)
    classes, counts = _find_classes(columns, buckets, fps_max, codes)
    settled = classes.settled()
    unused = len(buckets) + 1
    place_of = np.where(settled == UNSETTLED, len(buckets), np.where(settled < 0, unused, settled))
    totals = np.bincount(place_of, weights=counts, minlength=unused + 1).astype(np.int64)
    sorted_rows = make("settled", row_type(num_rows), int(totals[: len(buckets)].sum()))
    open_rows = make("open_rows", row_type(num_rows), int(totals[len(buckets)]))
    bounds = np.concatenate([[0], np.cumsum(totals[: len(buckets)])])
    keys = place_of.astype(_key_type(unused))
    following = bounds.copy()  # where the next rows of each bucket go; the last entry counts the open ones
    following[-1] = 0

    def sort(span: slice) -> tuple[np.ndarray, np.ndarray]:
        return sorted_by(keys[codes[span]], unused + 1)

    for span, (order, ends) in in_spans(sort, num_rows):
        order = order[: ends[-2]].astype(sorted_rows.dtype) + sorted_rows.dtype.type(span.start)
        _append([sorted_rows] * len(buckets) + [open_rows], following, order, ends)
    open_codes = make("open_codes", np.uint16, len(open_rows))
    for start in range(0, len(open_rows), SPAN):
        open_codes[start : start + SPAN] = codes[open_rows[start : start + SPAN]]
    return RowIndex(sorted_rows, bounds, open_rows, open_codes, classes)


def draw_rows(index: RowIndex, *, seed: int, epoch: int, make: Make = in_memory) -> DrawnRows:
    """Draw the buckets of the open rows for one epoch. Args: make: called with "drawn"."""
    buckets = index.classes.buckets
    unused = len(buckets)

    def draw(span: slice) -> tuple[np.ndarray, np.ndarray]:
        rows = index.open_rows[span]
        ids = np.empty(len(rows), np.int32)
        for start in range(0, len(rows), CHUNK):
            part = slice(start, start + CHUNK)
            codes = index.open_codes[slice(span.start + start, min(span.start + start + CHUNK, span.stop))]
            ids[part] = index.classes.draw(codes, rows[part], seed=seed, epoch=epoch)
        if len(index.left_out):
            ids[np.isin(rows, index.left_out)] = -1
        ids[ids < 0] = unused
        order, ends = sorted_by(ids.astype(_key_type(unused)), unused + 1)
        return rows[order[: ends[-2]]], ends

    spans = [found for _, found in in_spans(draw, len(index.open_rows))]
    totals = sum((np.diff(ends)[:unused] for _, ends in spans), np.zeros(unused, np.int64))
    bounds = np.concatenate([[0], np.cumsum(totals)])
    drawn = make("drawn", index.open_rows.dtype, int(bounds[-1]))
    following = bounds[:-1].copy()
    for rows, ends in spans:
        _append([drawn] * unused, following, rows, ends)
    return DrawnRows(drawn, bounds)


def leave_out(index: RowIndex, rows: np.ndarray, columns: Sequence[np.ndarray], *, fps_max: float | None) -> RowIndex:
    """The index without some rows; nothing of what is mapped is copied.

    Args:
        rows: int64, rising. columns: num_frames, height, width, fps of the table.
    """
    buckets = index.classes.buckets
    codes, asks = classify(*(np.asarray(column[rows]) for column in columns), buckets, fps_max=fps_max)
    bucket_of = RowClasses(asks, buckets).settled()[codes]
    places = [np.zeros(0, np.int64)]
    for bucket in np.unique(bucket_of[bucket_of >= 0]).tolist():
        first, last = index.bounds[bucket : bucket + 2].tolist()
        places.append(first + np.searchsorted(index.settled[first:last], rows[bucket_of == bucket]))
    gaps = np.concatenate(places)
    bounds = index.bounds - np.searchsorted(gaps, index.bounds)
    return index._replace(settled=_WithGaps(index.settled, gaps), bounds=bounds, left_out=rows)


class _WithGaps:
    """A `RowArray` without the entries at some places. Args: gaps: int64, rising."""

    def __init__(self, rows: RowArray, gaps: np.ndarray) -> None:
        self._rows, self._before = rows, gaps - np.arange(len(gaps))  # entries that stay before each gap

    def __len__(self) -> int:
        return len(self._rows) - len(self._before)

    def __getitem__(self, places: np.ndarray) -> np.ndarray:
        return self._rows[places + np.searchsorted(self._before, places, side="right")]


def sorted_by(keys: np.ndarray, num_keys: int) -> tuple[np.ndarray, np.ndarray]:
    """Order of small integers, equal ones as they stand, and int64 [num_keys + 1] where each begins in it."""
    counts = np.bincount(keys, minlength=num_keys)
    return np.argsort(keys, kind="stable"), np.concatenate([[0], np.cumsum(counts)])


def in_spans(work: Callable[[slice], tuple], num: int) -> Iterable[tuple[slice, tuple]]:
    """Do spans of 0 to num - 1 in threads. Gives: span and result, in order."""
    spans = [slice(start, min(start + SPAN, num)) for start in range(0, num, SPAN)]
    if len(spans) < 2:
        yield from ((span, work(span)) for span in spans)
        return
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as threads:
        yield from zip(spans, threads.map(work, spans), strict=True)


def _append(targets: list[np.ndarray], following: np.ndarray, values: np.ndarray, ends: np.ndarray) -> None:
    """Copy the run of each key behind what its target has, and move `following` on."""
    counts = np.diff(ends)[: len(targets)]
    for key in np.flatnonzero(counts).tolist():
        start, count = int(following[key]), int(counts[key])
        targets[key][start : start + count] = values[ends[key] : ends[key] + count]
    following += counts


def _key_type(largest: int) -> type:
    return np.uint16 if largest < 2**16 else np.int32  # 16 bits are sorted by counting


def _find_classes(
    columns: Sequence[np.ndarray], buckets: Buckets, fps_max: float | None, codes: np.ndarray
) -> tuple[RowClasses, np.ndarray]:
    """Fill `codes`. Returns: the classes, and the rows of each, int64."""

    def find(span: slice) -> tuple[np.ndarray, np.ndarray]:
        found, asks = classify(*(column[span] for column in columns), buckets, fps_max=fps_max)
        return found.astype(_key_type(len(asks))), asks

    numbers: dict[bytes, int] = {}
    counts = np.zeros(MAX_CLASSES, np.int64)
    for span, (found, asks) in in_spans(find, len(codes)):
        known = np.array([numbers.setdefault(ask.tobytes(), len(numbers)) for ask in asks], np.int64)
        if len(numbers) > MAX_CLASSES:
            raise ValueError(f"bucket_config tells more than {MAX_CLASSES} kinds of rows apart; use fewer buckets")
        codes[span] = known.astype(np.uint16)[found]
        counts += np.bincount(known[found], minlength=MAX_CLASSES)
    asks = np.array([np.frombuffer(ask, np.int32) for ask in numbers], np.int32).reshape(-1, len(buckets.resolutions))
    return RowClasses(asks, buckets), counts[: len(numbers)]
