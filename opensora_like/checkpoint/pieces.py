"""The tensor format of a checkpoint: every tensor flattened and cut into ranges, one file per rank and kind.

A piece is a contiguous range of a whole tensor. Whoever reads asks for a range and gets it from the files
that hold parts of it, so the number of processes that wrote does not matter to those that read.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor

from opensora_like.checkpoint.files import WrittenFile, write_safetensors, write_text


class Piece(NamedTuple):
    """Part [start, stop) of a flattened tensor of `shape`; `kind` is "master", "ema" or an optimizer state."""

    kind: str
    name: str
    shape: tuple[int, ...]
    start: int
    stop: int
    tensor: Tensor


def write_pieces(
    folder: Path, rank: int, pieces: Iterable[Piece], *, on_file: Callable[[str], None] = lambda file: None
) -> dict[str, WrittenFile]:
    """Write this rank's pieces, one safetensors file per kind, and the list that says what is where.

    Args:
        on_file: told the name of each file when the disk has it.

    Returns: file name -> size and checksum, of every file written.
    """
    by_file: dict[str, list[tuple[str, Tensor]]] = {}
    listing = []
    for piece in pieces:
        file = f"{piece.kind}.rank{rank:05d}.safetensors"
        by_file.setdefault(file, []).append((piece.name, piece.tensor.detach().cpu().contiguous()))
        listing.append([piece.kind, piece.name, list(piece.shape), piece.start, piece.stop, file])
    written = {}
    for file, tensors in by_file.items():
        written[file] = write_safetensors(folder / file, tensors)
        on_file(file)
    table = f"pieces.rank{rank:05d}.json"
    written[table] = write_text(folder / table, json.dumps(listing))
    on_file(table)
    return written


class PieceReader:
    """Reads whole tensors or ranges out of the pieces of all ranks, touching only the bytes asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._pieces: dict[tuple[str, str], list[tuple[int, int, str]]] = {}
        self._shapes: dict[tuple[str, str], tuple[int, ...]] = {}
        tables = sorted(folder.glob("pieces.rank*.json"))
        if not tables:
            raise FileNotFoundError(f"{str(folder)!r} has no pieces.rank*.json: not a checkpoint of this program")
        for table in tables:
            for kind, name, shape, start, stop, file in json.loads(table.read_text()):
                self._pieces.setdefault((kind, name), []).append((start, stop, file))
                self._shapes[kind, name] = tuple(shape)
        self._open: dict[str, safe_open] = {}

    def kinds(self) -> list[str]:
        """Which kinds of tensors there are: "master", "ema", "exp_avg"..."""
        return sorted({kind for kind, _ in self._pieces})

    def names(self, kind: str) -> list[str]:
        return [name for k, name in self._pieces if k == kind]

    def shape(self, kind: str, name: str) -> tuple[int, ...]:
        """Shape of the whole tensor; KeyError if there is none."""
        return self._shapes[kind, name]

    def read(self, kind: str, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Elements [start, stop) of the flattened tensor, on the CPU.

        Raises:
            KeyError: no such tensor.
            OSError: a file is missing, cut short, or the pieces leave a gap.
        """
        if (kind, name) not in self._pieces:
            raise KeyError(f"{str(self.folder)!r} has no {kind} of {name!r}")
        total = math.prod(self._shapes[kind, name])
        stop = total if stop is None else stop
        parts, at = [], start
        for first, last, file in sorted(self._pieces[kind, name]):
            if last <= at or first >= stop:
                continue
            if first > at:
                break
            end = min(last, stop)
            parts.append(self._slice(file, name, at - first, end - first))
            at = end
        if at < stop:
            raise OSError(f"{str(self.folder)!r}: {kind} of {name!r} has no elements {at} to {stop} of {total}")
        if len(parts) == 1:
            return parts[0]
        return torch.cat(parts) if parts else torch.empty(0)

    def read_whole(self, kind: str, name: str) -> Tensor:
        """The whole tensor in its shape."""
        return self.read(kind, name).reshape(self.shape(kind, name))

    def _slice(self, file: str, name: str, start: int, stop: int) -> Tensor:
        if file not in self._open:
            path = self.folder / file
            try:
                self._open[file] = safe_open(path, framework="pt")
            except Exception as problem:  # safetensors raises its own type and plain OSError
                raise OSError(f"{str(path)!r} cannot be read ({problem}); take an earlier checkpoint") from problem
        handle = self._open[file].get_slice(name)
        return handle[start:stop] if handle.get_shape() else self._open[file].get_tensor(name).reshape(1)


def pieces_of(kind: str, tensors: Mapping[str, Tensor], ranges: Mapping[str, tuple]) -> list[Piece]:
    """Pieces of flat shards laid out as a booster's `ranges`; a tensor without dimension is a piece of its own."""
    pieces = []
    for name, tensor in tensors.items():
        shape, start, stop = ranges[name]
        if tensor.ndim == 0:
            pieces.append(Piece(kind, name, (), 0, 1, tensor))
        elif stop > start:
            pieces.append(Piece(kind, name, tuple(shape), start, stop, tensor))
    return pieces
