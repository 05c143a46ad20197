"""Columns that are computed where they are read, a piece at a time."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

import numpy as np

KEPT_PIECES = 16


class Pieces:
    """Columns of one length, cut into pieces that are computed together.

    Args:
        num: rows. size: of a piece, the last one may be shorter.
        compute: first and last row of a piece, the last excluded -> its part of each column. It can be pickled.
    """

    def __init__(self, num: int, size: int, compute: Callable[[int, int], tuple[np.ndarray, ...]]) -> None:
        self.num, self.size, self._compute = num, size, compute
        self._kept: OrderedDict[int, tuple[np.ndarray, ...]] = OrderedDict()

    def __reduce__(self):
        return Pieces, (self.num, self.size, self._compute)

    def column(self, place: int) -> Column:
        """One of the columns."""
        return Column(self, place)

    def piece(self, number: int) -> tuple[np.ndarray, ...]:
        """Rows number * size and following of every column."""
        if number not in self._kept:
            first = number * self.size
            self._kept[number] = self._compute(first, min(first + self.size, self.num))
            if len(self._kept) > KEPT_PIECES:
                self._kept.popitem(last=False)
        self._kept.move_to_end(number)
        return self._kept[number]


class Column:
    """A column of `Pieces`, to be read like an array: by a number, by a slice, or whole."""

    def __init__(self, pieces: Pieces, place: int) -> None:
        self._pieces, self._place = pieces, place

    def __len__(self) -> int:
        return self._pieces.num

    def __getitem__(self, key: int | slice) -> np.integer | np.ndarray:
        size = self._pieces.size
        if not isinstance(key, slice):
            if not 0 <= key < len(self):
                raise IndexError(f"{key} of a column of {len(self)} rows")
            return self._pieces.piece(key // size)[self._place][key % size]
        start, stop, step = key.indices(len(self))
        if step < 0:
            return self[:][key]
        first, last = start // size, max(start // size, (stop - 1) // size)
        if not len(self):
            return self._pieces._compute(0, 0)[self._place]
        parts = [self._pieces.piece(number)[self._place] for number in range(first, last + 1)]
        joined = parts[0] if len(parts) == 1 else np.concatenate(parts)
        return joined[start - first * size : max(stop, start) - first * size : step]

    def __array__(self, dtype: type | None = None, copy: bool | None = None) -> np.ndarray:
        return np.array(self[:], dtype=dtype)
