"""Which buckets a row may come to, found once; which it comes to in an epoch, drawn from that at little cost."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from opensora_like.datasets.bucket import CHUNK, Buckets, Resolution, _after_skips, _Clips, _staying

UNSETTLED = -2
MAX_CLASSES = 1 << 16


@dataclass(frozen=True, eq=False)
class RowClasses:
    """The kinds of rows of a table; rows of one kind differ in their draws only.

    Args:
        asks: int32 [classes, resolutions], the bucket that such a row tries first at each resolution, in the order
            in which they are tried; -1 for none, and after a bucket that keeps every row.
    """

    asks: np.ndarray
    buckets: Buckets

    def __post_init__(self) -> None:
        per_resolution = [_num_ratios(self.buckets, r) for r in self.buckets.resolutions]
        object.__setattr__(self, "_num_ratios", per_resolution)
        tried = [self._rung_and_ratio(place) for place in range(len(per_resolution))]
        object.__setattr__(self, "_tried", tried)

    def _rung_and_ratio(self, place: int) -> tuple[np.ndarray, np.ndarray]:
        """Of the bucket that each class tries at a resolution: int16 and int32 [classes]; rung -1 for none."""
        ask = self.asks[:, place]
        rung, ratio = np.divmod(ask - self.buckets.resolutions[place].first_id[0], self._num_ratios[place])
        return np.where(ask >= 0, rung, -1).astype(np.int16), ratio.astype(np.int32)

    def settled(self) -> np.ndarray:
        """int32 [classes], the bucket of every such row in every epoch, -1 for none, or `UNSETTLED`."""
        settled = np.full(len(self.asks), UNSETTLED, np.int32)
        num_asks = (self.asks >= 0).sum(axis=1)
        settled[num_asks == 0] = -1
        for place, resolution in enumerate(self.buckets.resolutions):
            ask = self.asks[:, place]
            rung = (ask - resolution.first_id[0]) // self._num_ratios[place]
            sure = (ask >= 0) & (num_asks == 1)
            sure[sure] = _is_sure(resolution)[rung[sure]]
            settled[sure] = ask[sure]
        return settled

    def draw(self, codes: np.ndarray, rows: np.ndarray, *, seed: int, epoch: int) -> np.ndarray:
        """The same as `bucket.assign` for these rows.

        Args:
            codes: integers [N], the class of each row. rows: integers [N], their numbers in the table.

        Returns: int32 [N], an id of the buckets or -1.
        """
        ids = np.full(len(codes), -1, np.int32)
        left = np.arange(len(codes))
        for place, resolution in enumerate(self.buckets.resolutions):
            if not len(left):
                break
            rung_of, ratio_of = self._tried[place]
            rung = rung_of[codes[left]]
            here = np.flatnonzero(rung >= 0)
            among, rung = left[here], rung[here]
            if resolution.skip.any():
                rung = _after_skips(rung, rows[among], resolution, seed, epoch)
                here = np.flatnonzero(rung >= 0)
                among, rung = among[here], rung[here]
            here = _staying(rung, rows[among], resolution, seed, epoch)
            among, rung = among[here], rung[here]
            ids[among] = resolution.first_id[rung] + ratio_of[codes[among]]
            if place + 1 < len(self._tried):
                left = left[np.flatnonzero(ids[left] < 0)]
        return ids


def classify(
    num_frames: np.ndarray,
    height: np.ndarray,
    width: np.ndarray,
    fps: np.ndarray,
    buckets: Buckets,
    *,
    fps_max: float | None,
) -> tuple[np.ndarray, np.ndarray]:
    """Sort rows into classes.

    Returns: int32 [N], the class of each row, and int32 [classes, resolutions], the classes; see `RowClasses`.
        Classes are numbered in the order in which `np.unique` finds them, which is that of no other table.
    """
    codes = np.empty(len(num_frames), np.int32)
    known = [np.zeros((1, 0), np.int32)] * (len(buckets.resolutions) + 1)  # by stage: asks so far
    tables = [np.zeros(0, np.int32) for _ in buckets.resolutions]  # by stage: (class so far, ask) -> class
    for start in range(0, len(num_frames), CHUNK):
        part = slice(start, min(start + CHUNK, len(num_frames)))
        clips = _Clips.of(num_frames[part], height[part], width[part], fps[part], fps_max)
        state = np.zeros(len(clips.frames), np.int32)
        left = np.flatnonzero(clips.frames >= 1)
        for place, resolution in enumerate(buckets.resolutions):
            ask = np.full(len(state), -1, np.int32)
            left = _ask(clips, resolution, left, ask)
            ask[ask >= 0] -= resolution.first_id[0]
            size = len(resolution.frames) * _num_ratios(buckets, resolution) + 1
            joint = state * size + (ask + 1)
            if joint.size and (highest := int(joint.max())) >= len(tables[place]):
                grown = np.full(max(highest + 1, 2 * len(tables[place])), -1, np.int32)
                grown[: len(tables[place])] = tables[place]
                tables[place] = grown
            state = tables[place][joint]
            if (fresh := np.unique(joint[state < 0])).size:
                before, found = np.divmod(fresh, size)
                column = np.where(found > 0, found - 1 + resolution.first_id[0], -1).astype(np.int32)
                rows = np.column_stack([known[place][before], column])
                number = len(known[place + 1]) if known[place + 1].shape[1] == place + 1 else 0
                known[place + 1] = np.concatenate([known[place + 1], rows]) if number else rows
                tables[place][fresh] = number + np.arange(len(fresh), dtype=np.int32)
                state = tables[place][joint]
        codes[part] = state
    asks = known[-1] if known[-1].shape[1] == len(buckets.resolutions) else np.zeros((0, len(tables)), np.int32)
    return codes, asks


def _ask(clips: _Clips, resolution: Resolution, left: np.ndarray, ask: np.ndarray) -> np.ndarray:
    """Write the bucket that the rows `left` try at a resolution. Returns: those that it does not keep for sure."""
    among = left[np.flatnonzero(clips.pixels[left] >= resolution.smallest)]
    rung = resolution.rung_of[np.minimum(clips.frames[among], len(resolution.rung_of) - 1)]
    here = np.flatnonzero(rung >= 0)
    among, rung = among[here], rung[here]
    ask[among] = resolution.first_id[rung] + resolution.closest(clips.ratio[among])
    sure = among[_is_sure(resolution)[rung]]
    stays = np.ones(len(ask), bool)
    stays[sure] = False
    return left[stays[left]]


def _is_sure(resolution: Resolution) -> np.ndarray:
    """bool [rungs], whether a rung keeps every row that tries it."""
    return (resolution.keep == 1) & (resolution.skip == 0)


def _num_ratios(buckets: Buckets, resolution: Resolution) -> int:
    return sum(shape.resolution == resolution.name for shape in buckets.shapes) // len(resolution.frames)
