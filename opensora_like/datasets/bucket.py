"""From rows of a table to buckets of one shape each, without a loop over rows."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from opensora_like.datasets.aspect import ClosestRatio, num_pixels, shape_table
from opensora_like.rng import uniform

# a clip may be this much smaller than the resolution it is brought to
SMALLEST_SHARE = 0.8
MAX_COUNT = 100_000  # frames or clips of a bucket; more is a slip of the pen
CHUNK = 1 << 16  # rows at once: what is in hand stays in the cache


class BucketShape(NamedTuple):
    """The one shape that every clip of a micro-batch is brought to; sizes in pixels."""

    resolution: str  # the name in bucket_config, "256px"
    num_frames: int
    height: int
    width: int


@dataclass(frozen=True, eq=False)
class Resolution:
    """One resolution of the bucket config as arrays over its frame counts ("rungs"), most frames first.

    Args:
        smallest: the fewest pixels a clip may have to come here.
        keep, skip: probabilities float64 [rungs].
        first_id: int32 [rungs], the bucket id of the rung's first aspect ratio.
        next_rung: int16 [rungs], where a skipped clip goes on; -1 is to the next resolution.
        rung_of: int16, the rung tried first for a number of usable frames, or -1.
    """

    name: str
    num_pixels: int
    smallest: float
    frames: np.ndarray
    keep: np.ndarray
    skip: np.ndarray
    first_id: np.ndarray
    next_rung: np.ndarray
    rung_of: np.ndarray
    closest: ClosestRatio

    @property
    def fewest_video_frames(self) -> float:
        """Frames of the shortest video bucket; infinite where there is none."""
        return min((f for f in self.frames.tolist() if f > 1), default=np.inf)

    @property
    def has_images(self) -> bool:
        return 1 in self.frames


@dataclass(frozen=True, eq=False)
class Buckets:
    """A checked bucket config; a bucket id indexes `shapes`, `ratios` and `batch_sizes`.

    Args:
        resolutions: in the order in which they are tried: most pixels first.
        batch_sizes: int64 [buckets].
        multiple: see `shape_table`.
        config: the config in plain values and in the order of search, for the fingerprint.
    """

    resolutions: tuple[Resolution, ...]
    shapes: tuple[BucketShape, ...]
    ratios: tuple[str, ...]
    batch_sizes: np.ndarray
    multiple: int
    config: dict[str, dict[str, Any]]

    def __len__(self) -> int:
        return len(self.shapes)

    def name(self, bucket: int) -> str:
        """What a reader of the config calls it: "256px/129"."""
        return f"{self.shapes[bucket].resolution}/{self.shapes[bucket].num_frames}"

    def to_json(self) -> str:
        """The same text for the same buckets, however the config was written."""
        return json.dumps(self.config)


def compile_buckets(bucket_config: Mapping[str, Any], *, multiple: int) -> Buckets:
    """Check a bucket config and lay it out for `assign`.

    Args:
        bucket_config: {resolution: {frames: (probability, batch size)}}. The probability is a float, or
            (p_hw, p_skip): a clip passes over this frame count with p_skip and tries a smaller one, and of
            the others the share p_hw stays; what does not stay tries the next smaller resolution. A float p
            means (p, 0). Images (frames 1) know both forms; having no smaller frame count, they stay with
            (1 - p_skip) * p_hw.
        multiple: both sides of a bucket are multiples of it, in pixels.

    Raises:
        ValueError: a resolution, frame count, probability or batch size that cannot be; named by its key.

    Source: Open-Sora v2, opensora/datasets/bucket.py, which raises for a pair of probabilities on images.
    """
    if not isinstance(bucket_config, Mapping) or not bucket_config:
        raise ValueError(f"bucket_config={bucket_config!r} has no bucket; write {{'256px': {{33: (1.0, 12)}}}}")
    tables = {name: _checked_frames(name, table) for name, table in bucket_config.items()}
    names = sorted(tables, key=num_pixels, reverse=True)  # stable: of equal sizes the first written is tried first
    resolutions, shapes, ratios, batch_sizes = [], [], [], []
    for name in names:
        by_ratio = shape_table(name, multiple=multiple)
        resolutions.append(_resolution(name, tables[name], list(by_ratio), len(shapes)))
        for frames, (_, _, batch_size) in tables[name].items():
            shapes += [BucketShape(name, frames, *size) for size in by_ratio.values()]
            ratios += by_ratio
            batch_sizes += [batch_size] * len(by_ratio)
    config = {name: {str(frames): list(entry) for frames, entry in tables[name].items()} for name in names}
    return Buckets(tuple(resolutions), tuple(shapes), tuple(ratios), np.array(batch_sizes, np.int64), multiple, config)


def _checked_frames(name: str, table: Any) -> dict[int, tuple[float, float, int]]:
    """frames -> (p_hw, p_skip, batch size), most frames first."""
    where = f"bucket_config.{name}"
    try:
        num_pixels(name)
    except ValueError as problem:
        raise ValueError(f"{where}: {problem}") from problem
    if not isinstance(table, Mapping) or not table:
        raise ValueError(f"{where}={table!r} has no frame counts; write {{33: (1.0, 12)}}, or remove {name!r}")
    checked: dict[int, tuple[float, float, int]] = {}
    for key, entry in table.items():
        frames = _whole(key, f"{where}.{key}", f"the frame count {key!r}", most=MAX_COUNT)
        if frames in checked:
            raise ValueError(f"{where}.{key}: {frames} frames are given twice; remove one of them")
        checked[frames] = _checked_entry(entry, f"{where}.{frames}")
    return dict(sorted(checked.items(), reverse=True))


def _checked_entry(entry: Any, where: str) -> tuple[float, float, int]:
    if not isinstance(entry, (list, tuple)) or len(entry) != 2:
        raise ValueError(f"{where}={entry!r} must be (probability, batch size), as in (1.0, 12)")
    probability, batch_size = entry
    pair = probability if isinstance(probability, (list, tuple)) else (probability, 0.0)
    if len(pair) != 2:
        raise ValueError(f"{where}: probability {probability!r} must be a number or the two numbers (p_hw, p_skip)")
    for p in pair:
        if isinstance(p, bool) or not isinstance(p, (int, float)) or not 0 <= p <= 1:
            raise ValueError(f"{where}: probability {p!r} is not between 0 and 1")
    return float(pair[0]), float(pair[1]), _whole(batch_size, where, f"batch size {batch_size!r}", most=MAX_COUNT)


def _whole(value: Any, where: str, what: str, *, most: int) -> int:
    """`value` as an int of 1 or more; "33" and 33.0 count, as command lines and json give them."""
    whole = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
    whole = whole or (isinstance(value, str) and value.strip().isdecimal())
    whole = whole or (isinstance(value, float) and value.is_integer())
    if not whole or not 1 <= int(value) <= most:
        raise ValueError(f"{where}: {what} must be a whole number from 1 to {most}")
    return int(value)


def _resolution(name: str, table: dict[int, tuple[float, float, int]], ratios: list[str], first_id: int) -> Resolution:
    frames = np.array(list(table), np.int64)
    rungs = np.arange(len(frames), dtype=np.int16)
    rung_of = np.full(max(int(frames.max()), 2) + 1, -1, np.int16)  # its last entry stands for all larger counts
    for rung in rungs[::-1]:  # few frames first, so that each rung overwrites from its own count upwards
        most = 2 if frames[rung] == 1 else None  # an image bucket takes single frames only
        rung_of[frames[rung] : most] = rung
    next_rung = np.where((rungs + 1 < len(frames)) & (np.append(frames[1:], 1) > 1), rungs + 1, -1).astype(np.int16)
    keep, skip, _ = np.array(list(table.values())).T
    pixels = num_pixels(name)
    return Resolution(
        name=name,
        num_pixels=pixels,
        smallest=SMALLEST_SHARE * pixels,
        frames=frames,
        keep=keep,
        skip=skip,
        first_id=(first_id + np.arange(len(frames)) * len(ratios)).astype(np.int32),
        next_rung=next_rung,
        rung_of=rung_of,
        closest=ClosestRatio(ratios),
    )


def sampling_interval(fps: np.ndarray | float, fps_max: float | None) -> np.ndarray:
    """Of how many source frames one is taken, so that the clip plays at `fps_max` or slower.

    Args:
        fps: frames per second, any shape; NaN or 0 for images.
        fps_max: frames per second; None for no limit.

    Returns: int64, ceil(fps / fps_max), or 1 where fps < fps_max.

    Source: Open-Sora v2, opensora/datasets/utils.py, map_target_fps.
    """
    _check_fps_max(fps_max)
    fps = np.asarray(fps, np.float64)
    if fps_max is None:
        return np.ones(fps.shape, np.int64)
    limited = np.where((fps >= fps_max) & np.isfinite(fps), fps, fps_max)  # comparisons with NaN are false
    return np.ceil(limited / fps_max).astype(np.int64)


def assign(
    num_frames: np.ndarray,
    height: np.ndarray,
    width: np.ndarray,
    fps: np.ndarray,
    buckets: Buckets,
    *,
    fps_max: float | None,
    seed: int,
    epoch: int,
) -> np.ndarray:
    """The bucket of each row in this epoch.

    Args:
        num_frames, height, width: integers [N] (frames, pixels, pixels); fps: float64 [N], NaN for images.
        fps_max: see `sampling_interval`.
        seed, epoch: with the row's index they decide every draw, and nothing else does.

    Returns: int32 [N], an id of `buckets`, or -1 where the row is not used this epoch.

    Source: Open-Sora v2, opensora/datasets/bucket.py, get_bucket_id, with draws of our own.
    """
    _check_fps_max(fps_max)
    num_rows = len(num_frames)
    ids = np.empty(num_rows, np.int32)
    for start in range(0, num_rows, CHUNK):
        part = slice(start, min(start + CHUNK, num_rows))
        clips = _Clips.of(num_frames[part], height[part], width[part], fps[part], fps_max)
        ids[part] = _assign_chunk(clips, buckets, start, seed, epoch)
    return ids


class _Clips(NamedTuple):
    """What decides a bucket: usable frames int64 [N] (0 for numbers that cannot be), pixels and ratio float64 [N]."""

    frames: np.ndarray
    pixels: np.ndarray
    ratio: np.ndarray
    valid: np.ndarray

    @classmethod
    def of(
        cls, num_frames: np.ndarray, height: np.ndarray, width: np.ndarray, fps: np.ndarray, fps_max: float | None
    ) -> _Clips:
        fps = np.asarray(fps, np.float64)
        height, width = np.asarray(height, np.float64), np.asarray(width, np.float64)
        valid = (num_frames >= 1) & (height >= 1) & (width >= 1) & ~((fps < 0) | np.isinf(fps))
        valid &= (height < np.inf) & (width < np.inf) & (num_frames < 2**53)
        if not valid.all():  # harmless numbers in their place, so that no arithmetic below can warn
            num_frames = np.where(valid, num_frames, 0)
            height, width, fps = (np.where(valid, side, 1.0) for side in (height, width, fps))
        num_frames = np.asarray(num_frames).astype(np.int64, copy=False)
        frames = num_frames // sampling_interval(fps, fps_max)
        frames[num_frames == 1] = 1  # an image, whatever a table says of its fps
        return cls(frames, height * width, height / width, valid)


def _assign_chunk(clips: _Clips, buckets: Buckets, start: int, seed: int, epoch: int) -> np.ndarray:
    ids = np.full(len(clips.frames), -1, np.int32)
    left = np.flatnonzero(clips.frames >= 1)
    for resolution in buckets.resolutions:
        among = left[np.flatnonzero(clips.pixels[left] >= resolution.smallest)]
        rung = resolution.rung_of[np.minimum(clips.frames[among], len(resolution.rung_of) - 1)]
        rung = _after_skips(rung, among + start, resolution, seed, epoch)
        here = np.flatnonzero(rung >= 0)  # indices: numpy takes by them several times faster than by a mask
        among, rung = among[here], rung[here]
        here = _staying(rung, among + start, resolution, seed, epoch)
        among, rung = among[here], rung[here]
        ids[among] = resolution.first_id[rung] + resolution.closest(clips.ratio[among])
        left = left[np.flatnonzero(ids[left] < 0)]
    return ids


def _after_skips(rung: np.ndarray, rows: np.ndarray, resolution: Resolution, seed: int, epoch: int) -> np.ndarray:
    """Pass over rungs with their probability p_skip; most frames first, so that one pass is enough."""
    for number in np.flatnonzero(resolution.skip > 0):
        here = np.flatnonzero(rung == number)
        draw = uniform(seed, f"bucket.skip/{resolution.name}/{resolution.frames[number]}", epoch, rows[here])
        rung[here[draw < resolution.skip[number]]] = resolution.next_rung[number]
    return rung


def _staying(rung: np.ndarray, rows: np.ndarray, resolution: Resolution, seed: int, epoch: int) -> np.ndarray | slice:
    """Draw who stays. A row asks once per resolution, so the resolution's name is purpose enough."""
    if (resolution.keep == 1).all():
        return slice(None)
    return np.flatnonzero(uniform(seed, f"bucket.keep/{resolution.name}", epoch, rows) < resolution.keep[rung])


def _check_fps_max(fps_max: float | None) -> None:
    if fps_max is not None and not fps_max > 0:
        raise ValueError(f"fps_max={fps_max!r} must be above 0 frames per second, or None for no limit")
