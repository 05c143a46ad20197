"""How a stored picture is turned to be shown: read from frames, and from a container's header without decoding."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO, NamedTuple

import numpy as np


class Turn(NamedTuple):
    """How a stored picture becomes the displayed one: first exchange rows and columns, then mirror."""

    transpose: bool = False
    mirror: bool = False  # left and right
    flip: bool = False  # top and bottom

    def __call__(self, picture_HWC: np.ndarray) -> np.ndarray:
        """A view of `picture_HWC`."""
        if self.transpose:
            picture_HWC = picture_HWC.transpose(1, 0, 2)
        return picture_HWC[:: -1 if self.flip else 1, :: -1 if self.mirror else 1]


def turn_of_matrix(matrix: Sequence[int]) -> Turn:
    """A display matrix sends (x, y) to (a x + c y, b x + d y); only right angles and mirrors are honoured.

    Args:
        matrix: nine numbers row by row, of which a, b, u, c, d come first.
    """
    a, b, _, c, d = matrix[:5]
    if a == 0 and d == 0 and b and c:
        return Turn(transpose=True, mirror=c < 0, flip=b < 0)
    if b == 0 and c == 0 and a and d:
        return Turn(mirror=a < 0, flip=d < 0)
    return Turn()


def frame_turn(frame: Any) -> Turn:
    """Of a decoded frame (PyAV)."""
    for data in frame.side_data:
        if data.type.name == "DISPLAYMATRIX":
            return turn_of_matrix(struct.unpack("=9i", bytes(data)[:36]))
    return Turn()


def track_turn(file: BinaryIO, track_id: int) -> Turn:
    """Of one track of an mp4, from its header.

    Args:
        file: open for reading; its position changes.

    Source: ISO/IEC 14496-12, 8.3.2 track header box.
    """
    end = file.seek(0, os.SEEK_END)
    for moov in _boxes(file, 0, end, b"moov"):
        for trak in _boxes(file, *moov, b"trak"):
            for start, _ in _boxes(file, *trak, b"tkhd"):
                file.seek(start)
                header = file.read(88)
                is_long = header[:1] == b"\x01"  # 64-bit times
                if len(header) == 88 and struct.unpack_from(">I", header, 20 if is_long else 12)[0] == track_id:
                    return turn_of_matrix(struct.unpack_from(">9i", header, 52 if is_long else 40))
    return Turn()


def _boxes(file: BinaryIO, start: int, end: int, kind: bytes) -> Iterator[tuple[int, int]]:
    """(start, end) of the contents of each box of `kind` between two positions."""
    while start + 8 <= end:
        file.seek(start)
        head = file.read(16)
        if len(head) < 8:
            return
        size, name, begin = int.from_bytes(head[:4], "big"), head[4:8], start + 8
        if size == 1:
            size, begin = int.from_bytes(head[8:16], "big"), start + 16
        stop = end if size == 0 else start + size
        if stop < begin:  # a size that cannot be: nothing after it can be found
            return
        if name == kind:
            yield begin, min(stop, end)
        start = stop
