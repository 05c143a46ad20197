"""What two selections of a flattened tensor have in common; numbers only, no data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from torch import Tensor

from opensora_like.boosters.base import Strip


class Runs(NamedTuple):
    """Runs of elements, by their start; int64 arrays of one length."""

    start: np.ndarray  # in the whole tensor
    at: np.ndarray  # where they are kept
    length: np.ndarray

    @property
    def stop(self) -> int:
        """One past the last element."""
        return int((self.start + self.length).max(initial=0))


class Copies(NamedTuple):
    """What to copy; int64 arrays of one length."""

    target: np.ndarray
    source: np.ndarray
    length: np.ndarray

    def span(self) -> tuple[int, int]:
        """The first element of the sources, and one past the last."""
        return int(self.source.min()), int((self.source + self.length).max())

    def moved(self, by: int) -> Copies:
        """With another origin of the sources."""
        return self._replace(source=self.source + by)


def runs_of(strips: Sequence[Strip]) -> Runs:
    """All runs of all strips."""
    if not strips:
        return Runs(*(np.empty(0, np.int64) for _ in range(3)))
    steps = [np.arange(s.count, dtype=np.int64) for s in strips]
    start = np.concatenate([s.start + s.stride * i for s, i in zip(strips, steps, strict=True)])
    at = np.concatenate([s.at + s.step * i for s, i in zip(strips, steps, strict=True)])
    length = np.concatenate([np.full(s.count, s.length, np.int64) for s in strips])
    order = np.argsort(start, kind="stable")
    return Runs(start[order], at[order], length[order])


def overlap(wanted: Runs, stored: Runs) -> tuple[Copies, Runs]:
    """What of `wanted` is in `stored`, and what is still missing. Neither overlaps with itself.

    All ends of runs cut the tensor into intervals, each of which is inside or outside of a run as a whole.
    """
    ends = np.concatenate([wanted.start, wanted.start + wanted.length, stored.start, stored.start + stored.length])
    cuts = np.unique(ends)
    low, length = cuts[:-1], np.diff(cuts)
    want, wanted_in = _run_of(low, wanted)
    store, stored_in = _run_of(low, stored)
    both, rest = wanted_in & stored_in, wanted_in & ~stored_in
    target = wanted.at[want] + low - wanted.start[want]
    if not both.any():
        return Copies(*(np.empty(0, np.int64) for _ in range(3))), wanted
    source = stored.at[store] + low - stored.start[store]
    return Copies(target[both], source[both], length[both]), Runs(low[rest], target[rest], length[rest])


def _run_of(positions: np.ndarray, runs: Runs) -> tuple[np.ndarray, np.ndarray]:
    """The run at or before each position, and whether the position is in it."""
    index = np.searchsorted(runs.start, positions, side="right") - 1
    inside = (index >= 0) & (positions < runs.start[index] + runs.length[index])
    return index, inside


def copy_runs(target: Tensor, source: Tensor, copies: Copies) -> None:
    """Copy between flat contiguous tensors; runs at equal distances go in one call."""
    for size in np.unique(copies.length).tolist():
        chosen = copies.length == size
        to, origin = copies.target[chosen], copies.source[chosen]
        if (distances := _distances(to, origin)) is not None:
            to_step, from_step = distances
            rows = source.as_strided((len(to), size), (from_step, 1), source.storage_offset() + int(origin[0]))
            target.as_strided((len(to), size), (to_step, 1), target.storage_offset() + int(to[0])).copy_(rows)
            continue
        for first, begin in zip(to.tolist(), origin.tolist(), strict=True):
            target[first : first + size] = source[begin : begin + size]


def _distances(to: np.ndarray, origin: np.ndarray) -> tuple[int, int] | None:
    """(of the targets, of the sources), where each has one for all and a view can express it."""
    steps = [np.unique(np.diff(places)) for places in (to, origin)]
    if any(len(step) > 1 or (len(step) and step[0] <= 0) for step in steps):
        return None
    return tuple(int(step[0]) if len(step) else 1 for step in steps)
