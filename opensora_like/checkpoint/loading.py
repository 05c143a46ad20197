"""Reads a checkpoint into tensors: every file once, summed as its bytes pass, several files at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from threading import Lock
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from opensora_like.boosters.base import ShardRange, ShardStrips
from opensora_like.checkpoint.facts import Take
from opensora_like.checkpoint.files import TensorFile
from opensora_like.checkpoint.memory import bytes_of
from opensora_like.checkpoint.overlap import Copies, copy_runs
from opensora_like.checkpoint.pieces import PieceReader

READERS = 4  # files that a rank reads at once


class Reading:
    """What to read of a checkpoint into which tensors. `add` collects it, `run` reads it.

    Tensors in host memory are filled in place; for others one after another waits there, no longer than it takes to
    read it.
    """

    def __init__(self) -> None:
        self._files: dict[str, TensorFile] = {}
        self._sections: dict[str, list[_Section]] = {}

    def add(
        self,
        kind: str,
        shards: Mapping[str, Tensor],
        reader: PieceReader,
        ranges: Mapping[str, ShardRange | ShardStrips],
    ) -> None:
        """Fill flat shards laid out as a booster's `ranges` with what the checkpoint has of this kind.

        Raises:
            KeyError, OSError, ValueError: the lists of the checkpoint do not have all of it.
        """
        for name, shard in shards.items():
            if not shard.numel():
                continue
            place = ranges[name] if shard.ndim else ShardRange((), 0, 1)
            wanted = _Wanted(shard.detach().view(-1), reader.dtype(kind, name))
            for file, found in reader.parts(kind, name, place):
                low, high = found.span()
                size = (high - low) * wanted.dtype.itemsize
                section = _Section(file.offset(name, low, high - low), size, wanted, found)
                self._files[file.path.name] = file
                self._sections.setdefault(file.path.name, []).append(section)

    def clear(self) -> None:
        """Read nothing of all that was added."""
        self._sections.clear()

    def run(self, checks: Mapping[str, Callable[[Take], str]]) -> list[str]:
        """Read all that was added. A file that is compared here anyway is read whole, of others what was asked for.

        Args:
            checks: `facts.file_checks`.

        Returns: what is wrong with the files that are compared, and what could not be read of others; if there is
            anything, what was read is worth nothing.
        """
        with ThreadPoolExecutor(READERS, "reader") as pool:
            found = [pool.submit(check, _Scatter(self._sections.pop(file, []))) for file, check in checks.items()]
            found += [pool.submit(_read, self._files[file], sections) for file, sections in self._sections.items()]
        return [problem for reading in found if (problem := reading.result())]


class _Wanted:
    """A tensor that several sections fill, in any order and from any thread; it is used when the last one is there."""

    def __init__(self, shard: Tensor, dtype: torch.dtype) -> None:
        self.shard, self.dtype, self._missing, self._lock = shard, dtype, shard.numel(), Lock()
        self.in_place = shard.device.type == "cpu" and shard.is_contiguous() and shard.dtype == dtype
        self._tensor = shard if self.in_place else None

    def tensor(self) -> Tensor:
        with self._lock:
            if self._tensor is None:
                self._tensor = torch.empty(self.shard.numel(), dtype=self.dtype)
            return self._tensor

    def has(self, count: int) -> None:
        """So many elements more are in `tensor`."""
        with self._lock:
            self._missing -= count
            if self._missing or self.in_place:
                return
        self.shard.copy_(self._tensor)
        self._tensor = None


class _Section(NamedTuple):
    """Consecutive bytes of a file, and what they are read for."""

    begin: int
    size: int
    wanted: _Wanted
    copies: Copies

    def buffer(self) -> Tensor:
        """What they are read into."""
        if len(self.copies.length) == 1:
            target = int(self.copies.target[0])
            return self.wanted.tensor()[target : target + int(self.copies.length[0])]
        return torch.empty(self.size // self.wanted.dtype.itemsize, dtype=self.wanted.dtype)

    def finish(self, buffer: Tensor) -> None:
        """They are all in `buffer`."""
        if len(self.copies.length) > 1:
            copy_runs(self.wanted.tensor(), buffer, self.copies.moved(-self.copies.span()[0]))
        self.wanted.has(int(self.copies.length.sum()))


class _Scatter:
    """Takes the chunks of a file in turn and lays their bytes where sections of it want them."""

    def __init__(self, sections: list[_Section]) -> None:
        self._waiting = sorted(sections, key=lambda s: s.begin, reverse=True)
        self._open: list[tuple[_Section, Tensor]] = []

    def __call__(self, at: int, data: memoryview) -> None:
        end, source = at + data.nbytes, np.frombuffer(data, np.uint8)
        while self._waiting and self._waiting[-1].begin < end:
            section = self._waiting.pop()
            self._open.append((section, section.buffer()))
        still = []
        for section, buffer in self._open:
            low, high = max(at, section.begin), min(end, section.begin + section.size)
            target = np.frombuffer(bytes_of(buffer), np.uint8)
            target[low - section.begin : high - section.begin] = source[low - at : high - at]
            if high < section.begin + section.size:
                still.append((section, buffer))
            else:
                section.finish(buffer)
        self._open = still


def _read(file: TensorFile, sections: list[_Section]) -> str:
    """These sections alone, each straight into its place. Returns: why that was not possible, "" if it was."""
    try:
        for section in sections:
            buffer = section.buffer()
            file.read_bytes(bytes_of(buffer), section.begin)
            section.finish(buffer)
    except OSError as problem:
        return str(problem)
    return ""
