"""Resolution names to pixel counts and to the (height, width) of each aspect ratio, and the ratio nearest to a clip."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from opensora_like.registry import nearest

# width:height, in the order in which shapes are made; the reversed names follow from them
RATIOS = ("2.39:1", "2:1", "16:9", "1.85:1", "9:16", "5:8", "3:2", "4:3", "1:1")
Shape = tuple[int, int]

_SIZES = re.compile(r"[1-9]\d*x[1-9]\d*(,[1-9]\d*x[1-9]\d*)*")
_NAME = re.compile(r"(?P<size>[1-9]\d*)(?P<unit>px|p)(?:_(?P<only>max|ar.+))?")


def num_pixels(name: str) -> int:
    """Pixels of one frame: "256px" is 256*256, "720p" is 720*1280, a suffix changes nothing. Of sizes the smallest.

    Raises:
        ValueError: not a resolution name.
    """
    return _parse(name)[0]


def ratio_value(name: str) -> float:
    """height / width of a ratio written width:height, so "16:9" gives 0.5625."""
    width, height = name.split(":")
    return float(height) / float(width)


def shape_table(name: str, *, multiple: int, training: bool = True) -> dict[str, Shape]:
    """The shapes of one resolution, by the name of their aspect ratio.

    Args:
        name: "256px", "720p"; with "_ar16:9" that ratio alone, with "_max" the ratio of most pixels alone. Or
            sizes, height x width: "480x832", "480x832,832x480", which are the shapes.
        multiple: both sides are multiples of it, in pixels: the autoencoder's stride times the patch size.
        training: sides are moved by one `multiple` where this comes nearer to the pixel count, and
            ratios that would repeat a shape are left out. False keeps all 15 names, as at inference.

    Returns: ratio name (width:height) -> (height, width), in the order in which ties are resolved.

    Raises:
        ValueError: not a resolution name, a ratio it does not have, or sides that `multiple` does not allow.

    Source: Open-Sora v2, opensora/datasets/aspect.py (both tables kept compatible).
    """
    if not isinstance(multiple, int) or multiple < 1:
        raise ValueError(f"multiple={multiple!r} must be a whole number of pixels, 1 or more")
    if sizes := _sizes(name):
        return _shapes_of(name, sizes, multiple)
    pixels, only = _parse(name)
    table = _training_table(pixels, multiple) if training else _inference_table(pixels, multiple)
    smallest = min(min(shape) for shape in table.values())
    if smallest < multiple:
        raise ValueError(f"resolution {name!r} has {pixels} pixels, too few for sides that are multiples of {multiple}")
    if only == "max":
        most = max(table, key=lambda ratio: math.prod(table[ratio]))
        return {most: table[most]}
    if only is not None:
        ratio = only.removeprefix("ar")
        if ratio in table:
            return {ratio: table[ratio]}
        known = {*RATIOS, *map(_reversed, RATIOS)}
        if ratio not in known:
            raise ValueError(f"resolution {name!r}: no aspect ratio {ratio!r} there; {nearest(ratio, known)}")
        # left out of the whole table because another ratio has its shape there; alone it is what was asked for
        return {ratio: _nearer_shape(_base_shape(pixels, ratio, multiple), pixels, multiple)}
    return table


class ClosestRatio:
    """Finds the ratio nearest to height/width, for many clips at once; of two equally near the first wins.

    Args:
        names: the ratio names to choose from; the result indexes this sequence.
    """

    def __init__(self, names: Sequence[str]) -> None:
        values = [ratio_value(name) for name in names]
        order = sorted(range(len(values)), key=values.__getitem__)
        self._order = np.array(order, np.int32)
        self._limits = np.array([_limit(values[low], values[high], low < high) for low, high in pairwise(order)])

    def __call__(self, ratio: np.ndarray) -> np.ndarray:
        """Args: ratio: float64 [N], height / width. Returns: int32 [N], an index into `names`."""
        return self._order[np.searchsorted(self._limits, ratio, side="left")]


def closest_ratio(height: np.ndarray, width: np.ndarray, names: Sequence[str]) -> np.ndarray:
    """The index in `names` of the ratio nearest to each clip. Returns: int32 [N]."""
    return ClosestRatio(names)(np.asarray(height, np.float64) / np.asarray(width, np.float64))


def _limit(low: float, high: float, low_wins_ties: bool) -> float:
    """The largest float that is nearer to `low` than to `high`.

    7:8 lies exactly between 3:4 and 1:1, so the limit must carry the rule for ties; and it must
    agree with distances as they are rounded, so it is looked for, not computed.
    """

    def low_wins(x: float) -> bool:
        return x - low < high - x or (low_wins_ties and x - low == high - x)

    x = (low + high) / 2
    while not low_wins(x):
        x = math.nextafter(x, -math.inf)
    while low_wins(math.nextafter(x, math.inf)):
        x = math.nextafter(x, math.inf)
    return x


def _sizes(name: str) -> list[Shape]:
    if not isinstance(name, str) or not _SIZES.fullmatch(name):
        return []
    return [tuple(map(int, size.split("x"))) for size in name.split(",")]


def _shapes_of(name: str, sizes: list[Shape], multiple: int) -> dict[str, Shape]:
    for height, width in sizes:
        if height % multiple or width % multiple:
            raise ValueError(f"resolution {name!r}: {height} and {width} must both be multiples of {multiple}")
    if len({height / width for height, width in sizes}) < len(sizes):
        raise ValueError(f"resolution {name!r} has sizes of one ratio; make two resolutions of them")
    return {f"{width}:{height}": (height, width) for height, width in sizes}


def _parse(name: str) -> tuple[int, str | None]:
    if sizes := _sizes(name):
        return min(height * width for height, width in sizes), None
    match = _NAME.fullmatch(name) if isinstance(name, str) else None
    if match is None:
        raise ValueError(
            f"{name!r} is not a resolution; write '256px' or '720p', then '_ar16:9' or '_max' if wanted, or '480x832'"
        )
    size = int(match["size"])
    return size * size if match["unit"] == "px" else int(size * size / 9 * 16), match["only"]


def _base_shape(pixels: int, ratio: str, multiple: int) -> Shape:
    ratio_width, ratio_height = (float(side) for side in ratio.split(":"))
    width = int(math.sqrt(pixels * ratio_width / ratio_height) / multiple) * multiple
    height = int(pixels / width / multiple) * multiple if width else 0
    return height, width


def _nearer_shape(shape: Shape, pixels: int, multiple: int) -> Shape:
    """The one of `shape` and its four neighbours whose pixel count is nearest to `pixels`; the first wins ties."""
    height, width = shape
    neighbours = [(height - multiple, width), (height + multiple, width)]
    neighbours += [(height, width - multiple), (height, width + multiple)]
    return min([shape, *neighbours], key=lambda s: abs(s[0] * s[1] - pixels))


def _training_table(pixels: int, multiple: int) -> dict[str, Shape]:
    table: dict[str, Shape] = {}
    turned: dict[str, Shape] = {}
    for ratio in RATIOS:
        height, width = _nearer_shape(_base_shape(pixels, ratio, multiple), pixels, multiple)
        if (height, width) not in table.values():
            table[ratio] = (height, width)
            turned[_reversed(ratio)] = (width, height)
    return table | turned


def _inference_table(pixels: int, multiple: int) -> dict[str, Shape]:
    table = {ratio: _base_shape(pixels, ratio, multiple) for ratio in RATIOS}
    return table | {_reversed(ratio): (width, height) for ratio, (height, width) in table.items()}


def _reversed(ratio: str) -> str:
    return ":".join(reversed(ratio.split(":")))
