"""Why rows of a table are in no bucket, and which number would let them in."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from opensora_like.datasets.bucket import Buckets, _Clips, assign
from opensora_like.datasets.shards import ShardedTable
from opensora_like.datasets.table import Table

# `DropReport.codes` index this
REASONS = (
    "kept",
    "invalid_numbers",
    "too_few_frames",
    "too_small",
    "no_image_bucket",
    "no_video_bucket",
    "lost_draw",
    "quarantined",
)
MAX_LISTED = 20  # buckets named in an error


class EmptyPlan(ValueError):
    """An epoch without a micro-batch: training would see nothing."""


class DropReport(NamedTuple):
    """Why rows have no bucket.

    Args:
        codes: int8 [N], an index of `REASONS`; 0 where the row has a bucket.
        counts: reason -> rows, without the reasons that did not occur.
        advice: the same reasons -> one sentence with the count and the number to change.
    """

    codes: np.ndarray
    counts: dict[str, int]
    advice: dict[str, str]


def assign_rows(
    table: Table | ShardedTable, buckets: Buckets, *, fps_max: float | None, seed: int, epoch: int
) -> np.ndarray:
    """The bucket of each row of a table, -1 where the row is not used this epoch or is quarantined.

    Returns: int32 [N]; see `bucket.assign`.
    """
    columns = (table.num_frames, table.height, table.width, table.fps)
    ids = assign(*columns, buckets, fps_max=fps_max, seed=seed, epoch=epoch)
    if table.quarantine is not None:
        ids[table.quarantine.rows] = -1
    return ids


def drop_reasons(
    num_frames: np.ndarray,
    height: np.ndarray,
    width: np.ndarray,
    fps: np.ndarray,
    buckets: Buckets,
    ids: np.ndarray,
    *,
    fps_max: float | None,
    quarantined: np.ndarray | None = None,
) -> DropReport:
    """Say of each row that `assign` left out why, and which number would let it in.

    Args:
        ids: int32 [N], what `assign` returned for these columns.
        quarantined: int64, rows that were left out whatever their numbers.
    """
    out = np.flatnonzero(np.asarray(ids) < 0)
    clips = _Clips.of(num_frames[out], height[out], width[out], fps[out], fps_max)
    image = clips.frames == 1
    needed = _frames_needed(clips, buckets)
    shortest = min(r.fewest_video_frames for r in buckets.resolutions)
    any_images = any(r.has_images for r in buckets.resolutions)
    conditions = {  # the first that holds is the reason
        "quarantined": np.isin(out, [] if quarantined is None else quarantined),
        "invalid_numbers": ~clips.valid,
        "no_image_bucket": image & (not any_images),
        "no_video_bucket": ~image & np.isinf(shortest),
        "too_few_frames": ~image & ((clips.frames < shortest) | (clips.frames < needed) & np.isfinite(needed)),
        "too_small": np.isinf(needed),
    }
    numbers = [REASONS.index(name) for name in conditions]
    why = np.select([*conditions.values()], numbers, REASONS.index("lost_draw")).astype(np.int8)
    codes = np.zeros(len(ids), np.int8)
    codes[out] = why
    found = np.bincount(why, minlength=len(REASONS)).tolist()
    counts = {reason: number for reason, number in zip(REASONS, found, strict=True) if number}
    advice = {}
    for reason in counts:
        these = np.flatnonzero(why == REASONS.index(reason))
        rows = out[these]
        group = _Clips(*(column[these] for column in clips))
        if reason == "too_few_frames":
            advice[reason] = _frames_advice(num_frames[rows], fps[rows], group, buckets, fps_max)
        else:
            advice[reason] = _advice(reason, rows, group, buckets)
    return DropReport(codes, counts, advice)


def _frames_needed(clips: _Clips, buckets: Buckets) -> np.ndarray:
    """Frames of the shortest bucket at a resolution that the clip is large enough for; infinite if none is."""
    needed = np.full(len(clips.frames), np.inf)
    for resolution in buckets.resolutions:
        shortest = np.where(clips.frames == 1, 1 if resolution.has_images else np.inf, resolution.fewest_video_frames)
        needed = np.where(clips.pixels >= resolution.smallest, np.minimum(needed, shortest), needed)
    return needed


def clips_of(number: int) -> str:
    """ "1 clip", "2 clips"."""
    return f"{number} {'clip' if number == 1 else 'clips'}"


def _frames_advice(
    num_frames: np.ndarray, fps: np.ndarray, clips: _Clips, buckets: Buckets, fps_max: float | None
) -> str:
    """Which bucket the longest of these clips falls short of, and what would let it in."""
    longest = int(np.argmax(clips.frames))
    has = int(clips.frames[longest])
    fitting = [r for r in buckets.resolutions if clips.pixels[longest] >= r.smallest and r.fewest_video_frames < np.inf]
    nearest = min(fitting or buckets.resolutions, key=lambda r: r.fewest_video_frames)
    needs = int(nearest.fewest_video_frames)
    rate = "" if fps_max is None else f" at fps_max={fps_max!r}"
    remedy = f"use a bucket of {max(has, 2)} frames or fewer"
    dense = np.flatnonzero((num_frames >= needs) & np.isfinite(fps))
    if len(dense):  # enough frames in the file, too few of them at this rate
        enough = float((fps[dense] / (num_frames[dense] // needs)).min())
        remedy += f", or raise fps_max to {enough:g}"
    return (
        f"{clips_of(len(num_frames))}: too few frames; none has the {needs} that bucket {nearest.name}/{needs} needs"
        f"{rate}, the longest has {has}: {remedy}"
    )


def _advice(reason: str, rows: np.ndarray, clips: _Clips, buckets: Buckets) -> str:
    """One sentence about the rows that share a reason."""
    start = f"{clips_of(len(rows))}: "
    if reason == "quarantined":
        return f"{start}in the list of dataset.quarantine; take them off the list once they are mended"
    if reason == "invalid_numbers":
        return f"{start}num_frames, height, width or fps cannot be, first in row {rows[0]}; run tools/meta.py again"
    if reason == "no_image_bucket":
        return f"{start}single frames, and no resolution has a bucket of 1 frame; add 1: (1.0, batch size)"
    if reason == "no_video_bucket":
        frames = max(int(clips.frames.max()), 2)
        return f"{start}videos, and there are only buckets of 1 frame; add one of {frames} frames or fewer"
    if reason == "too_small":
        largest = int(np.argmax(clips.pixels))
        image = clips.frames[largest] == 1
        kind = [r for r in buckets.resolutions if (r.has_images if image else r.fewest_video_frames < np.inf)]
        return (
            f"{start}too small; the largest has {clips.pixels[largest]:.0f} pixels and {kind[-1].name} begins at "
            f"{kind[-1].smallest:.0f}; add a smaller resolution with {clips.frames[largest]} frames or fewer"
        )
    return f"{start}lost the draw of this epoch; raise the probabilities below 1 in bucket_config"


def reasons_of_table(
    table: Table | ShardedTable, buckets: Buckets, ids: np.ndarray, *, fps_max: float | None
) -> DropReport:
    """`drop_reasons` of the rows of a table.

    Args:
        ids: int32 [N], from `assign_rows`.
    """
    columns = (table.num_frames, table.height, table.width, table.fps)
    listed = None if table.quarantine is None else table.quarantine.rows
    return drop_reasons(*columns, buckets, ids, fps_max=fps_max, quarantined=listed)


def why_empty(
    table: Table | ShardedTable, buckets: Buckets, ids: np.ndarray, *, fps_max: float | None, epoch: int
) -> str:
    """What each bucket lacks for a batch, and why rows have no bucket; for `EmptyPlan`.

    Args:
        ids: int32 [N], from `assign_rows`.
    """
    counts = np.bincount(ids[ids >= 0], minlength=len(buckets))
    filled = np.flatnonzero(counts)
    filled = filled[np.argsort(-counts[filled], kind="stable")]
    lines = [
        f"the plan of epoch {epoch} has 0 micro-batches: of {table.num_rows} clips in {table.path!r}, {counts.sum()} "
        f"have a bucket and no bucket fills a batch"
    ]
    for b in filled[:MAX_LISTED]:
        lines.append(
            f"bucket {buckets.name(b)} has {clips_of(counts[b])} of ratio {buckets.ratios[b]} but its batch size is "
            f"{buckets.batch_sizes[b]}: lower it to {counts[b]}"
        )
    if len(filled) > MAX_LISTED:
        lines.append(f"and {len(filled) - MAX_LISTED} more buckets with fewer clips")
    advice = reasons_of_table(table, buckets, ids, fps_max=fps_max).advice
    lines += [f"without a bucket, {reason}: {sentence}" for reason, sentence in advice.items()]
    return "\n".join(lines)
