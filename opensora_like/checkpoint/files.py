"""Writes safetensors files that are known to be on disk: every byte counted, synced, and summed; and reads them."""

from __future__ import annotations

import errno
import fcntl
import json
import mmap
import os
from collections.abc import Callable, Sequence
from importlib import import_module, util
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import xxhash
from torch import Tensor

from opensora_like.checkpoint.memory import LiveBytes, bytes_of

CHUNK = 2**20  # bytes per call: what is summed is still in the processor's cache when it is written
ALIGNMENT = 4096  # of addresses, offsets and sizes, where the page cache is passed by
O_DIRECT = getattr(os, "O_DIRECT", 0)  # 0 where the system has none
NVME_ENTRIES = 32  # writes in flight; what ColossalAI takes
DTYPES = {
    "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64, "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class WrittenFile(NamedTuple):
    """What is on disk after a write: bytes, and their XXH3 checksum in hexadecimal."""

    size: int
    xxh3_64: str


def find_nvme_writer() -> Callable[..., Any] | None:
    """TensorNVMe's `AsyncFileWriter` where it is installed and there is a GPU (it makes a CUDA stream), else None.

    Called in any thread it works on the GPU that is current here: a thread begins with the first one, where each
    process of the machine would take memory for a context of its own.

    Raises:
        ImportError: it is installed but cannot be loaded.
    """
    if not torch.cuda.is_available() or util.find_spec("tensornvme") is None:
        return None
    make, device = import_module("tensornvme.async_file_io").AsyncFileWriter, torch.cuda.current_device()

    def make_here(*args: Any, **settings: Any) -> Any:
        with torch.cuda.device(device):
            return make(*args, **settings)

    return make_here


def write_safetensors(
    path: Path, tensors: Sequence[tuple[str, Tensor | LiveBytes]], *, nvme_writer: Callable[..., Any] | None = None
) -> WrittenFile:
    """Write tensors as one safetensors file and wait until the disk has it.

    The checksum is computed from memory, so that what the disk got can be checked against what
    was meant.

    Args:
        tensors: (name, contiguous CPU tensor, or the bytes of one that may change meanwhile).
        nvme_writer: see `find_nvme_writer`.

    Raises:
        OSError: the disk is full, read-only or gone; the message has the path and the errno.
    """
    header = {}
    offset = 0
    for name, tensor in tensors:
        size = tensor.nbytes
        header[name] = {
            "dtype": DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + size],
        }
        offset += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # data begin at a multiple of 8
    data = (tensor if isinstance(tensor, LiveBytes) else bytes_of(tensor) for _, tensor in tensors)
    parts = [memoryview(len(text).to_bytes(8, "little") + text), *data]
    return write_parts(path, parts, nvme_writer=nvme_writer)


def write_parts(
    path: Path, parts: Sequence[memoryview | LiveBytes], *, nvme_writer: Callable[..., Any] | None = None
) -> WrittenFile:
    """Write byte parts one after another, sync, check the size.

    Raises:
        OSError: as `write_safetensors`.
    """
    total = sum(part.nbytes for part in parts)
    try:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        try:
            if nvme_writer is None:
                checksum = _write_in_turn(handle, parts)
            else:
                checksum = _write_by_nvme(handle, path, parts, nvme_writer)
            os.fsync(handle)
            size = os.fstat(handle).st_size
        finally:
            os.close(handle)
    except OSError as problem:
        raise OSError(problem.errno, f"{problem.strerror} while writing {total} bytes", str(path)) from problem
    if size != total:
        raise OSError(f"{str(path)!r} has {size} bytes after writing {total}; the disk lost some")
    if nvme_writer is not None and (found := file_checksum(path)) != checksum:
        raise OSError(f"{str(path)!r} has checksum {found} after writing {checksum}; TensorNVMe lost a write")
    return WrittenFile(total, checksum)


def _write_in_turn(handle: int, parts: Sequence[memoryview | LiveBytes]) -> str:
    """Write past the page cache where the file system can: no copy in the kernel, and none of its memory.

    Returns: the checksum.
    """
    summed = xxhash.xxh3_64()
    total, at, filled = sum(part.nbytes for part in parts), 0, 0
    direct = total >= CHUNK and _set_direct(handle, True)
    chunk = memoryview(mmap.mmap(-1, CHUNK))  # begins at a page
    for part in parts:
        done = 0
        while done < part.nbytes:
            size = min(CHUNK - filled, part.nbytes - done)
            _take(part, done, chunk[filled : filled + size])
            done, filled = done + size, filled + size
            if filled == CHUNK:
                summed.update(chunk)
                direct = _write_at(handle, chunk, at, direct=direct)
                at, filled = at + CHUNK, 0
    if direct:  # the end is no whole number of blocks
        _set_direct(handle, False)
    summed.update(chunk[:filled])
    _write_at(handle, chunk[:filled], at, direct=False)
    return summed.hexdigest()


def _take(part: memoryview | LiveBytes, begin: int, into: memoryview) -> None:
    """Fill `into` with the bytes of `part` from `begin` on, where the last call for it ended."""
    if isinstance(part, LiveBytes):
        part.take(into)
    else:  # as arrays: other threads run meanwhile
        np.copyto(np.frombuffer(into, np.uint8), np.frombuffer(part[begin : begin + into.nbytes], np.uint8))


def _write_at(handle: int, data: memoryview, offset: int, *, direct: bool) -> bool:
    """Write all of `data`. Returns: whether the next write may pass the page cache by, too."""
    done = 0
    while done < data.nbytes:  # a call may write less than it was given
        try:
            done += os.pwrite(handle, data[done:], offset + done)
        except OSError as problem:
            if not direct or problem.errno != errno.EINVAL:
                raise
            _set_direct(handle, False)  # it takes the flag, but no such writes
            direct = False
        if direct:
            done -= done % ALIGNMENT
    return direct


def _set_direct(handle: int, wanted: bool) -> bool:
    """Switch O_DIRECT. Returns: whether it was done; a file system may have no such writes."""
    flags = fcntl.fcntl(handle, fcntl.F_GETFL)
    try:
        fcntl.fcntl(handle, fcntl.F_SETFL, flags | O_DIRECT if wanted else flags & ~O_DIRECT)
    except OSError as problem:
        if problem.errno != errno.EINVAL:
            raise
        return False
    return bool(O_DIRECT)


def _write_by_nvme(handle: int, path: Path, parts: Sequence[memoryview], nvme_writer: Callable[..., Any]) -> str:
    """Let TensorNVMe write. It does not say when a write fails, so the room is taken before, where it can be.

    Returns: the checksum.
    """
    total = sum(part.nbytes for part in parts)
    writer = nvme_writer(str(path), n_entries=NVME_ENTRIES, backend="pthread", n_tasks=len(parts))
    if total:
        os.posix_fallocate(handle, 0, total)  # after it has opened, and cut, the file
    for part in parts:
        if part.nbytes:
            address = np.frombuffer(part, np.uint8).ctypes.data
            writer.write_raw(part, address, part.nbytes, writer.offset)
    summed = xxhash.xxh3_64()
    for part in parts:  # while it writes
        summed.update(part)
    writer.synchronize()
    return summed.hexdigest()


def write_text(path: Path, text: str) -> WrittenFile:
    """Write a small text file and wait until the disk has it."""
    return write_parts(path, [memoryview(text.encode())])


def file_checksum(path: Path) -> str:
    """The checksum of a file as it is on disk."""
    return read_through(path, lambda at, data: None)


def read_through(path: Path, take: Callable[[int, memoryview], None]) -> str:
    """Read a whole file once, front to back; the system is told so and reads ahead of it.

    Reading past the page cache would save a copy, and be half as fast: nothing is under way while a chunk is summed.

    Args:
        take: is given every chunk in turn, its offset and its bytes, which are good for the time of the call.

    Returns: the checksum.
    """
    summed, at = xxhash.xxh3_64(), 0
    chunk = memoryview(bytearray(CHUNK))
    with path.open("rb", buffering=0) as file:
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)
        while size := file.readinto(chunk):
            summed.update(chunk[:size])
            take(at, chunk[:size])
            at += size
    return summed.hexdigest()


class TensorFile:
    """A safetensors file of flat tensors, read by ranges of elements straight into their place.

    Raises:
        OSError: the file is missing, or its header cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file = path.open("rb", buffering=0)
            size = int.from_bytes(self._file.read(8), "little")
            if size > path.stat().st_size:
                raise ValueError(f"a header of {size} bytes in a file of {path.stat().st_size}")
            self._header = json.loads(self._file.read(size))
        except (OSError, ValueError) as problem:
            raise OSError(f"{str(path)!r} cannot be read ({problem}); take an earlier checkpoint") from problem
        self._origin = 8 + size

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of every tensor, by name."""
        return {name: tuple(facts["shape"]) for name, facts in self._header.items() if name != "__metadata__"}

    def dtype(self, name: str) -> torch.dtype:
        """Of the elements of a tensor.

        Raises:
            ValueError: one that no weights have.
        """
        written = self._header[name]["dtype"]
        if written not in DTYPES:
            raise ValueError(
                f"{str(self.path)!r}: {name!r} is {written}, which is none of {sorted(DTYPES)}; convert it"
            )
        return DTYPES[written]

    def offset(self, name: str, start: int, count: int) -> int:
        """Where in the file elements [start, start + count) of a tensor begin, in bytes.

        Raises:
            ValueError: it has not so many.
        """
        begin, end = (self._origin + offset for offset in self._header[name]["data_offsets"])
        dtype = self.dtype(name)
        if begin + (start + count) * dtype.itemsize > end:
            raise ValueError(f"{str(self.path)!r}: {name!r} has no {count} {dtype} from {start} on")
        return begin + start * dtype.itemsize

    def read_into(self, out: Tensor, name: str, start: int) -> None:
        """Fill `out`, a flat contiguous CPU tensor, with the elements from `start` on.

        Raises:
            OSError: the file ends before.
        """
        if not out.numel():
            return
        if out.dtype != self.dtype(name):
            raise ValueError(f"{str(self.path)!r}: {name!r} is {self.dtype(name)}, not {out.dtype}")
        self.read_bytes(bytes_of(out), self.offset(name, start, out.numel()))

    def read_bytes(self, out: memoryview, offset: int) -> None:
        """Fill `out` with the bytes from `offset` of the file on.

        Raises:
            OSError: the file ends before.
        """
        done = 0
        while done < out.nbytes:
            size = os.preadv(self._file.fileno(), [out[done:]], offset + done)
            if not size:
                missing = out.nbytes - done
                raise OSError(
                    f"{str(self.path)!r} ends at byte {offset + done}, {missing} were to come; it was cut short"
                )
            done += size
