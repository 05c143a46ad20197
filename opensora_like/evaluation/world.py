"""A tiny world whose truth is known: one coloured shape on a grey ground that moves in one direction.

Lengths are in cells; a frame is 16 cells wide and high, so at 16 x 16 pixels a cell is a pixel.
Shape suffixes: T frames, H height, W width, C colour channels, 2 = (x, y) with y pointing down.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from itertools import combinations, product
from typing import NamedTuple

import numpy as np

from opensora_like.rng import numpy_generator

CELLS = 16
BACKGROUND = (24, 24, 24)
# 8-bit RGB. The first four are the default world; the last two are spare, for a fine-tuning that adds a colour.
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (230, 40, 40),
    "green": (40, 200, 60),
    "blue": (50, 80, 240),
    "yellow": (240, 220, 40),
    "magenta": (220, 50, 220),
    "cyan": (40, 210, 220),
}
DEFAULT_COLOURS = ("red", "green", "blue", "yellow")
SHAPES = ("circle", "square", "triangle")
DIRECTIONS: dict[str, tuple[int, int]] = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
RADIUS = 2.75  # of the circle; the other shapes have its area, so that size does not tell them apart
DISTANCE = (6.0, 7.5)  # between the first frame and the last, least and most


class Combination(NamedTuple):
    """The truth about one clip. `direction` is "" for a still image."""

    colour: str
    shape: str
    direction: str

    @property
    def caption(self) -> str:
        """For example "a red circle moving left"."""
        moving = f" moving {self.direction}" if self.direction else ""
        return f"a {self.colour} {self.shape}{moving}"


def combination_of(caption: str) -> Combination:
    """The truth that a caption states; the inverse of `Combination.caption`.

    Raises:
        ValueError: the caption is not one of this world.
    """
    words = caption.strip().rstrip(".").split()
    if words[:1] == ["a"] and (len(words) == 3 or (len(words) == 5 and words[3] == "moving")):
        found = Combination(words[1], words[2], words[4] if len(words) == 5 else "")
        if found.colour in COLOURS and found.shape in SHAPES and found.direction in ("", *DIRECTIONS):
            return found
    raise ValueError(
        f"caption {caption!r} is not of the form 'a COLOUR SHAPE moving DIRECTION' "
        f"with {list(COLOURS)}, {list(SHAPES)}, {list(DIRECTIONS)}"
    )


def all_combinations(colours: Sequence[str] = DEFAULT_COLOURS) -> list[Combination]:
    """Every colour with every shape and direction, in a fixed order.

    Raises:
        ValueError: an unknown or repeated colour, or none.
    """
    unknown = [c for c in colours if c not in COLOURS]
    if unknown or not colours or len(set(colours)) != len(colours):
        raise ValueError(f"colours={list(colours)!r} must be different names out of {list(COLOURS)}")
    return [Combination(*names) for names in product(colours, SHAPES, DIRECTIONS)]


def split(
    everything: Sequence[Combination], *, fraction: float, seed: int
) -> tuple[list[Combination], list[Combination]]:
    """Choose the combinations that training never sees, evenly over names and over pairs of names.

    Each next one is, among those left, the one whose names and pairs of names are held out least so far, so
    no word and no pair of words vanishes from training as long as `fraction` allows it.

    Args:
        fraction: share to hold out, 0 to 0.5, rounded to the nearest number of combinations.

    Returns: (seen, held out), each in the order of `everything`.

    Raises:
        ValueError: `fraction` is out of range.
    """
    if not 0 <= fraction <= 0.5:
        raise ValueError(f"held_out={fraction!r} is not within 0 to 0.5; 0.17 holds out 8 of 48 combinations")
    order = numpy_generator(seed, "shapes held out").permutation(len(everything))
    left = [everything[i] for i in order]
    held_out: set[Combination] = set()
    names: Counter[str] = Counter()
    pairs: Counter[tuple[str, str]] = Counter()
    for _ in range(round(fraction * len(everything))):
        costs = [(max(pairs[p] for p in combinations(c, 2)), sum(names[n] for n in c)) for c in left]
        chosen = left.pop(costs.index(min(costs)))
        held_out.add(chosen)
        names.update(chosen)
        pairs.update(combinations(chosen, 2))
    return [c for c in everything if c not in held_out], [c for c in everything if c in held_out]


def assign(seen: Sequence[Combination], num_clips: int, *, seed: int) -> list[Combination]:
    """One combination per clip: all of them in every run of `len(seen)` clips, each run in another order.

    More clips with the same seed begin with the same ones.
    """
    assigned: list[Combination] = []
    while len(assigned) < num_clips:
        order = numpy_generator(seed, "shapes order", len(assigned)).permutation(len(seen))
        assigned += [seen[i] for i in order]
    return assigned[:num_clips]


def _extent(shape: str, radius: float) -> tuple[float, float, float]:
    """How far a shape reaches from its centroid: (left and right, up, down)."""
    if shape == "circle":
        return radius, radius, radius
    if shape == "square":
        half = radius * math.sqrt(math.pi) / 2
        return half, half, half
    inner = _triangle_inner_radius(radius)
    return math.sqrt(3) * inner, 2 * inner, inner


def _triangle_inner_radius(radius: float) -> float:
    return radius * math.sqrt(math.pi / (3 * math.sqrt(3)))


def draw_path(
    combination: Combination,
    generator: np.random.Generator,
    *,
    num_frames: int,
    radius: float = RADIUS,
    distance: tuple[float, float] = DISTANCE,
) -> np.ndarray:
    """Draw where the centroid is in each frame: even motion along an axis that never leaves the frame.

    Opposite directions look the same in the middle frame. The best guess of the direction from the position in one
    frame is right for 41 % of the clips in the middle frame and 68 % in the first one, where chance is 25 %: the
    way is long for the frame, so it starts near a rim.

    Args:
        distance: range of the way from the first frame to the last; not used without a direction or in one frame.

    Returns: float64 [T, 2].

    Raises:
        ValueError: the shape does not fit into the frame with that radius and distance.
    """
    side, up, down = _extent(combination.shape, radius)
    low = np.array([side, up])
    high = np.array([CELLS - side, CELLS - down])
    step = np.array(DIRECTIONS.get(combination.direction, (0, 0)), dtype=float)
    way = step * generator.uniform(*distance) * (num_frames > 1)
    room = high - low - np.abs(way)
    if (room < 0).any():
        raise ValueError(
            f"a {combination.shape} of radius {radius} that moves {np.abs(way).max():.1f} of {CELLS} cells "
            "leaves the frame; lower radius or distance"
        )
    start = low + np.maximum(-way, 0) + generator.uniform(size=2) * room
    return start + np.linspace(0, 1, num_frames)[:, None] * way


def occupancy(
    shape: str,
    centres_T2: np.ndarray,
    *,
    size: int,
    radius: float | np.ndarray = RADIUS,
    softness: float = 1.0,
) -> np.ndarray:
    """How much of each pixel the shape covers, with smooth edges.

    Args:
        centres_T2: centroids.
        size: pixels per side.
        radius: one, or one per frame [T] (a shape that grows).
        softness: width of the edge in pixels; 1 is anti-aliased, more is blurred.

    Returns: float32 [T, H, W] in 0 to 1.
    """
    scale = size / CELLS
    grid = np.arange(size) + 0.5
    x = grid[None, None, :] - centres_T2[:, 0, None, None] * scale
    y = grid[None, :, None] - centres_T2[:, 1, None, None] * scale
    radii = np.broadcast_to(np.asarray(radius, dtype=float), len(centres_T2))[:, None, None] * scale
    if shape == "circle":
        outside = np.hypot(x, y) - radii
    elif shape == "square":
        outside = np.maximum(np.abs(x), np.abs(y)) - radii * math.sqrt(math.pi) / 2
    elif shape == "triangle":
        inner = _triangle_inner_radius(1.0) * radii
        outside = np.maximum(y, math.sqrt(0.75) * np.abs(x) - y / 2) - inner
    else:
        raise ValueError(f"shape={shape!r} is not one of {list(SHAPES)}")
    return np.clip(0.5 - outside / softness, 0, 1).astype(np.float32)


def draw_clip(
    combination: Combination,
    generator: np.random.Generator,
    *,
    size: int,
    num_frames: int,
    radius: float | np.ndarray = RADIUS,
    distance: tuple[float, float] = DISTANCE,
) -> np.ndarray:
    """Draw one clip; all that is random about it is where the shape is and how far it moves.

    Args:
        size: pixels per side.
        radius: as in `occupancy`; the largest decides where the shape may go.

    Returns: uint8 RGB [T, H, W, C].
    """
    path = draw_path(combination, generator, num_frames=num_frames, radius=float(np.max(radius)), distance=distance)
    covered = occupancy(combination.shape, path, size=size, radius=radius)[..., None]
    ground = np.array(BACKGROUND, dtype=np.float32)
    colour = np.array(COLOURS[combination.colour], dtype=np.float32)
    return np.rint(ground + covered * (colour - ground)).astype(np.uint8)


def clip_generator(seed: int, index: int) -> np.random.Generator:
    """The randomness of clip `index` of a set; it does not depend on how many clips there are."""
    return numpy_generator(seed, "shapes clip", index)


def to_video(frames_THWC: np.ndarray) -> np.ndarray:
    """8-bit frames as a model sees them. Returns: float32 [C, T, H, W] in [-1, 1]."""
    return np.ascontiguousarray(frames_THWC.transpose(3, 0, 1, 2), dtype=np.float32) / 127.5 - 1
