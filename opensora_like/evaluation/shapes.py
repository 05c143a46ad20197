"""Read colour, shape and direction off the pixels of a clip of the tiny world, and score them against the truth."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from opensora_like.evaluation.world import (
    CELLS,
    COLOURS,
    DIRECTIONS,
    RADIUS,
    SHAPES,
    Combination,
    occupancy,
)

NONE = "none"
ASPECTS = ("colour", "shape", "direction")

# Distances of colours are Euclidean in RGB of [-1, 1]; the world's colours are 1.6 to 2.7 from its ground.
_DENOISE = 0.6  # cells of blur before the shape is looked for
_SALIENT = 0.5  # a pixel this far from the ground belongs to the shape
_COLOUR_REACH = 0.6  # half the distance between the two nearest colours: further away is no colour of the world
_AREA = (0.4, 2.2)  # of the shape's own; a soft or badly drawn shape is still read, a frame of noise is not
_SPREAD = 1.5  # of the shape's own; two blobs or scattered pixels are wider
_LEAST_SHARE = 0.8  # of the frames must hold one blob
_LEAST_DISTANCE = 3.0  # cells; half the least of the world
_STRAIGHT = 2.0  # how many times further along one axis than along the other
_OFF_TRACK = 0.25  # cells of root mean square off an even motion, per cell of distance
_UNEXPLAINED = 0.2  # of the shape's energy that the best template may leave
_WINDOW = 5.5  # cells around the centroid that are compared with templates
_BLURS = (0.0, 0.5, 0.8, 1.2)  # sigma in cells, tried on the templates: a soft square must not read as a circle
_SIZES = (0.8, 0.9, 1.0, 1.1)  # of the radius that the area suggests


class Blobs(NamedTuple):
    """What stands out in each frame: [T] flags of frames that hold one blob, [T, 2] centroids in cells."""

    found_T: np.ndarray
    centres_T2: np.ndarray
    weights_THW: np.ndarray


def score_clip(video_CTHW: Any) -> dict[str, str]:
    """Read one clip.

    Args:
        video_CTHW: numpy array or tensor [3, T, H, W] in [-1, 1], square; any size from 16 x 16.

    Returns: colour, shape and direction by name; "none" where nothing definite is there. A clip that is blank,
        noisy, or holds two blobs reads "none" throughout.

    Raises:
        ValueError: another layout, or values that are not finite.
    """
    video = _to_array(video_CTHW)
    ground = np.median(video, axis=(1, 2, 3))
    offset = video - ground[:, None, None, None]
    smooth = _gaussian(video.shape[-1], _DENOISE * video.shape[-1] / CELLS)
    blobs = _find_blobs(np.linalg.norm(smooth @ offset @ smooth.T, axis=0))
    if blobs.found_T.sum() < max(1, math.ceil(_LEAST_SHARE * video.shape[1])):
        return dict.fromkeys(ASPECTS, NONE)
    weights = blobs.weights_THW * blobs.found_T[:, None, None]
    inner = weights**4  # the inside of the shape, where a soft edge has not mixed in the ground
    mean = (video * inner).sum(axis=(1, 2, 3)) / inner.sum()
    direction = mean - ground
    covered_THW = np.tensordot(direction / (direction @ direction), offset, axes=1)
    return {
        "colour": _read_colour(mean),
        "shape": _read_shape(covered_THW[blobs.found_T], blobs.centres_T2[blobs.found_T]),
        "direction": _read_direction(blobs),
    }


def score(videos: Iterable[Any], truths: Sequence[Combination]) -> dict[str, float]:
    """Read clips and score what was read; the arguments are those of `score_clip` and `accuracy`."""
    return accuracy([score_clip(video) for video in videos], truths)


def accuracy(readings: Sequence[Mapping[str, str]], truths: Sequence[Combination]) -> dict[str, float]:
    """Shares of readings that are right; "none" is never right.

    Args:
        truths: one per reading. An empty name in it (a still image has no direction) is not scored.

    Returns: colour_accuracy, shape_accuracy, direction_accuracy and all_accuracy (all three right in one clip),
        0 to 1, NaN where nothing was scored; num, how many clips.

    Raises:
        ValueError: the numbers of readings and truths differ.
    """
    if len(readings) != len(truths):
        raise ValueError(f"{len(readings)} clips and {len(truths)} truths; give one truth per clip")
    right = {
        a: [r[a] == getattr(t, a) for r, t in zip(readings, truths, strict=True) if getattr(t, a)] for a in ASPECTS
    }
    every = [
        all(r[a] == getattr(t, a) or not getattr(t, a) for a in ASPECTS) for r, t in zip(readings, truths, strict=True)
    ]
    shares = {f"{a}_accuracy": _share(right[a]) for a in ASPECTS}
    return {**shares, "all_accuracy": _share(every), "num": len(truths)}


def _share(right: Sequence[bool]) -> float:
    return sum(right) / len(right) if right else math.nan


def _to_array(video_CTHW: Any) -> np.ndarray:
    if hasattr(video_CTHW, "detach"):  # a tensor; torch itself is not needed to read files
        video_CTHW = video_CTHW.detach().float().cpu().numpy()
    video = np.asarray(video_CTHW, dtype=np.float64)
    if video.ndim != 4 or video.shape[0] != 3 or video.shape[2] != video.shape[3] or video.shape[2] < CELLS:
        raise ValueError(f"a clip of shape {video.shape} cannot be scored; give [3, T, H, H] with H of 16 or more")
    if not np.isfinite(video).all():
        raise ValueError(f"a clip of shape {video.shape} holds values that are not finite; it cannot be scored")
    return _reduce(np.clip(video, -1, 1))


def _reduce(video_CTHW: np.ndarray) -> np.ndarray:
    """Average large frames over squares of pixels; nothing that is read needs more than two pixels per cell."""
    channels, num_frames, size, _ = video_CTHW.shape
    factor = size // (2 * CELLS)
    if factor < 2 or size % factor:
        return video_CTHW
    small = size // factor
    return video_CTHW.reshape(channels, num_frames, small, factor, small, factor).mean(axis=(3, 5))


def _find_blobs(distance_THW: np.ndarray) -> Blobs:
    """Weigh pixels by how far they are from the ground, and check that each frame holds one compact blob."""
    size = distance_THW.shape[-1]
    cell = size / CELLS
    weights = np.where(distance_THW > _SALIENT, distance_THW, 0.0)
    total = weights.sum(axis=(1, 2))
    safe = np.maximum(total, 1e-9)[:, None]
    grid = (np.arange(size) + 0.5) / cell
    centres = np.concatenate(
        [(weights.sum(axis=1) @ grid)[:, None] / safe, (weights.sum(axis=2) @ grid)[:, None] / safe], axis=1
    )
    squares = (grid[None, None, :] - centres[:, 0, None, None]) ** 2 + (
        grid[None, :, None] - centres[:, 1, None, None]
    ) ** 2
    spread = np.sqrt((weights * squares).sum(axis=(1, 2)) / safe[:, 0])
    area = (weights > 0).sum(axis=(1, 2)) / cell**2 / (math.pi * RADIUS**2)
    own_spread = RADIUS / math.sqrt(2)  # of an evenly filled circle
    found = (area >= _AREA[0]) & (area <= _AREA[1]) & (spread <= _SPREAD * own_spread)
    return Blobs(found, centres, weights)


def _read_colour(mean_C: np.ndarray) -> str:
    prototypes = {name: np.array(rgb) / 127.5 - 1 for name, rgb in COLOURS.items()}
    distances = {name: float(np.linalg.norm(mean_C - value)) for name, value in prototypes.items()}
    best = min(distances, key=distances.__getitem__)
    return best if distances[best] <= _COLOUR_REACH else NONE


def _read_direction(blobs: Blobs) -> str:
    """The axis of an even motion fitted to the centroids of all frames."""
    times = np.flatnonzero(blobs.found_T).astype(float)
    if len(times) < 2:
        return NONE
    centres = blobs.centres_T2[blobs.found_T]
    design = np.stack([np.ones_like(times), times], axis=1)
    fitted, *_ = np.linalg.lstsq(design, centres, rcond=None)
    way = fitted[1] * (len(blobs.found_T) - 1)
    main = int(np.argmax(np.abs(way)))
    length = abs(way[main])
    off_track = math.sqrt(float(((design @ fitted - centres) ** 2).sum(axis=1).mean()))
    if length < _LEAST_DISTANCE or length < _STRAIGHT * abs(way[1 - main]) or off_track > _OFF_TRACK * length:
        return NONE
    sign = np.sign(way[main])
    return next(name for name, step in DIRECTIONS.items() if step[main] == sign)


def _read_shape(covered_THW: np.ndarray, centres_T2: np.ndarray) -> str:
    """The shape whose drawing, at the same centroids, explains most of what is there."""
    size = covered_THW.shape[-1]
    cell = size / CELLS
    grid = (np.arange(size) + 0.5) / cell
    across = np.abs(grid[None, None, :] - centres_T2[:, 0, None, None])
    along = np.abs(grid[None, :, None] - centres_T2[:, 1, None, None])
    seen = covered_THW * (np.maximum(across, along) <= _WINDOW)  # not clipped: the noise must average out
    area = max(float(seen.sum(axis=(1, 2)).mean()) / cell**2, 1.0)
    norm = math.sqrt(float((seen**2).sum()))
    kernels = [_gaussian(size, sigma * cell) for sigma in _BLURS]
    best, best_cosine = NONE, math.sqrt(1 - _UNEXPLAINED)
    for shape in SHAPES:
        for factor in _SIZES:
            sharp = occupancy(shape, centres_T2, size=size, radius=factor * math.sqrt(area / math.pi))
            for kernel in kernels:
                drawn = kernel @ sharp @ kernel.T
                cosine = float((drawn * seen).sum()) / max(norm * math.sqrt(float((drawn**2).sum())), 1e-9)
                if cosine > best_cosine:
                    best, best_cosine = shape, cosine
    return best


def _gaussian(size: int, sigma: float) -> np.ndarray:
    """Blur along one axis as a matrix [size, size]; the identity where sigma is 0."""
    if sigma == 0:
        return np.eye(size)
    apart = np.arange(size)[:, None] - np.arange(size)[None, :]
    weights = np.exp(-(apart**2) / (2 * sigma**2))
    return weights / weights.sum(axis=1, keepdims=True)
