"""The tensor format of a checkpoint: every tensor flattened and cut into ranges, one file per rank and kind.

A piece is a contiguous range of a whole tensor or, under tensor parallelism, strips of it. Whoever reads asks for
a range or for strips and gets them from the files that hold parts of them, so it does not matter to those that read
how many processes wrote, and how they had cut the model.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from opensora_like.boosters.base import BESIDE, ShardRange, ShardStrips, Strip
from opensora_like.checkpoint.files import TensorFile, WrittenFile, write_safetensors, write_text
from opensora_like.checkpoint.memory import LiveBytes
from opensora_like.checkpoint.overlap import Copies, copy_runs, overlap, runs_of

WRITERS = 4  # files that a rank writes at once


class Piece(NamedTuple):
    """Part [start, stop) of a flattened tensor of `shape`; `kind` is "master", "ema" or an optimizer state.

    With `strips`, these elements of it alone, in the order of the strips' places in `tensor`. That is `LiveBytes` when
    it is written while training goes on.
    """

    kind: str
    name: str
    shape: tuple[int, ...]
    start: int
    stop: int
    tensor: Tensor | LiveBytes
    strips: tuple[Strip, ...] = ()


class _Stored(NamedTuple):
    start: int
    stop: int
    file: str
    strips: tuple[Strip, ...]


def write_pieces(
    folder: Path,
    rank: int,
    pieces: Iterable[Piece],
    *,
    on_file: Callable[[str], None] = lambda file: None,
    nvme_writer: Callable[..., Any] | None = None,
) -> dict[str, WrittenFile]:
    """Write this rank's pieces, one safetensors file per kind, and the list that says what is where.

    Args:
        on_file: told the name of each file when the disk has it.
        nvme_writer: see `files.find_nvme_writer`.

    Returns: file name -> size and checksum, of every file written.
    """
    by_file: dict[str, list[tuple[str, Tensor | LiveBytes]]] = {}
    listing = []
    for piece in pieces:
        file = f"{piece.kind}.rank{rank:05d}.safetensors"
        tensor = piece.tensor
        if not isinstance(tensor, LiveBytes):
            tensor = tensor.detach().cpu().contiguous()
        by_file.setdefault(file, []).append((piece.name, tensor))
        where = [piece.start, piece.stop, file, *([piece.strips] if piece.strips else [])]
        listing.append([piece.kind, piece.name, list(piece.shape), *where])
    written = {}
    with ThreadPoolExecutor(WRITERS, "writer") as pool:  # one file is written while another waits for the disk
        running = {
            file: pool.submit(write_safetensors, folder / file, tensors, nvme_writer=nvme_writer)
            for file, tensors in by_file.items()
        }
        for file, writing in running.items():
            written[file] = writing.result()
            on_file(file)
    table = f"pieces.rank{rank:05d}.json"
    written[table] = write_text(folder / table, json.dumps(listing))
    on_file(table)
    return written


class PieceReader:
    """Reads whole tensors or ranges out of the pieces of all ranks, touching only the bytes asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._pieces: dict[tuple[str, str], list[_Stored]] = {}
        self._shapes: dict[tuple[str, str], tuple[int, ...]] = {}
        tables = sorted(folder.glob("pieces.rank*.json"))
        if not tables:
            raise FileNotFoundError(f"{str(folder)!r} has no pieces.rank*.json: not a checkpoint of this program")
        for table in tables:
            for kind, name, shape, start, stop, file, *more in json.loads(table.read_text()):
                strips = tuple(Strip(*s) for s in more[0]) if more else ShardRange(tuple(shape), start, stop).strips
                self._pieces.setdefault((kind, name), []).append(_Stored(start, stop, file, strips))
                self._shapes[kind, name] = tuple(shape)
        self._open: dict[str, TensorFile] = {}

    def kinds(self) -> list[str]:
        """Which kinds of tensors there are: "master", "ema", "exp_avg"..."""
        return sorted({kind for kind, _ in self._pieces})

    def names(self, kind: str) -> list[str]:
        return [name for k, name in self._pieces if k == kind]

    def denoiser_names(self, kind: str) -> list[str]:
        """`names` without those of a critic, which a distillation trains beside the denoiser."""
        return [name for name in self.names(kind) if not name.startswith(BESIDE)]

    def shape(self, kind: str, name: str) -> tuple[int, ...]:
        """Shape of the whole tensor; KeyError if there is none."""
        return self._shapes[kind, name]

    def dtype(self, kind: str, name: str) -> torch.dtype:
        """Of the stored tensor; KeyError if there is none."""
        self._shape_of(kind, name)
        return self._file(self._pieces[kind, name][0].file).dtype(name)

    def read(self, kind: str, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Elements [start, stop) of the flattened tensor, on the CPU.

        Raises:
            KeyError: no such tensor.
            OSError: a file is missing, cut short, or the pieces leave a gap.
        """
        shape = self._shape_of(kind, name)
        return self.read_place(kind, name, ShardRange(shape, start, math.prod(shape) if stop is None else stop))

    def read_place(self, kind: str, name: str, place: ShardRange | ShardStrips, *, out: Tensor | None = None) -> Tensor:
        """What a rank owns of a tensor, flat, on the CPU. Raises as `read`.

        Strips out of a range read all that lies between them.

        Args:
            out: a flat contiguous CPU tensor of the stored dtype to fill, instead of a new one.
        """
        for file, found in self.parts(kind, name, place):
            if out is None:
                out = torch.empty(int(runs_of(place.strips).length.sum()), dtype=file.dtype(name))
            if len(found.length) == 1:
                target = int(found.target[0])
                file.read_into(out[target : target + int(found.length[0])], name, int(found.source[0]))
                continue
            low, high = found.span()
            part = torch.empty(high - low, dtype=out.dtype)
            file.read_into(part, name, low)
            copy_runs(out, part, found.moved(-low))
        return torch.empty(0) if out is None else out

    def parts(self, kind: str, name: str, place: ShardRange | ShardStrips) -> Iterator[tuple[TensorFile, Copies]]:
        """The files that hold parts of a place of a tensor, and what to copy from each. Raises as `read`."""
        self._shape_of(kind, name)
        missing = runs_of(place.strips)
        stop = missing.stop
        for stored in sorted(self._pieces[kind, name]):
            if not len(missing.start) or stored.stop <= missing.start[0] or stored.start >= missing.stop:
                continue
            found, missing = overlap(missing, runs_of(stored.strips))
            if len(found.length):
                yield self._file(stored.file), found
        if len(missing.start):
            gap = f"elements {missing.start[0]} to {stop} of {math.prod(self._shapes[kind, name])}"
            raise OSError(f"{str(self.folder)!r}: {kind} of {name!r} has no {gap}")

    def _shape_of(self, kind: str, name: str) -> tuple[int, ...]:
        if (kind, name) not in self._shapes:
            raise KeyError(f"{str(self.folder)!r} has no {kind} of {name!r}")
        return self._shapes[kind, name]

    def read_whole(self, kind: str, name: str) -> Tensor:
        """The whole tensor in its shape."""
        return self.read(kind, name).reshape(self.shape(kind, name))

    def _file(self, name: str) -> TensorFile:
        if name not in self._open:
            self._open[name] = TensorFile(self.folder / name)
        return self._open[name]


def pieces_of(kind: str, tensors: Mapping[str, Tensor], ranges: Mapping[str, ShardRange | ShardStrips]) -> list[Piece]:
    """Pieces of flat shards laid out as a booster's `ranges`; a tensor without dimension is a piece of its own."""
    pieces = []
    for name, tensor in tensors.items():
        place = ranges[name]
        if tensor.ndim == 0:
            pieces.append(Piece(kind, name, (), 0, 1, tensor))
        elif isinstance(place, ShardStrips):
            runs = runs_of(place.strips)
            pieces.append(Piece(kind, name, place.shape, int(runs.start[0]), runs.stop, tensor, place.strips))
        elif place.stop > place.start:
            pieces.append(Piece(kind, name, tuple(place.shape), place.start, place.stop, tensor))
    return pieces
