"""Writes safetensors files that are known to be on disk: every byte counted, synced, and summed."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module, util
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

CHUNK = 2**20  # bytes per call: what is summed is still in the processor's cache when it is written
NVME_ENTRIES = 32  # writes in flight; what ColossalAI takes
DTYPE_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.int64: "I64"}


class WrittenFile(NamedTuple):
    """What is on disk after a write."""

    size: int
    crc32: int


def find_nvme_writer() -> Callable[..., Any] | None:
    """TensorNVMe's `AsyncFileWriter` where it is installed and there is a GPU (it makes a CUDA stream), else None.

    Raises:
        ImportError: it is installed but cannot be loaded.
    """
    if not torch.cuda.is_available() or util.find_spec("tensornvme") is None:
        return None
    return import_module("tensornvme.async_file_io").AsyncFileWriter


def write_safetensors(
    path: Path, tensors: Sequence[tuple[str, Tensor]], *, nvme_writer: Callable[..., Any] | None = None
) -> WrittenFile:
    """Write tensors as one safetensors file and wait until the disk has it.

    The checksum is computed from memory, so that what the disk got can be checked against what
    was meant.

    Args:
        tensors: (name, contiguous CPU tensor).
        nvme_writer: see `find_nvme_writer`.

    Raises:
        OSError: the disk is full, read-only or gone; the message has the path and the errno.
    """
    header = {}
    offset = 0
    for name, tensor in tensors:
        size = tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + size],
        }
        offset += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # data begin at a multiple of 8
    parts = [memoryview(len(text).to_bytes(8, "little") + text), *(_bytes_of(t) for _, t in tensors)]
    return write_parts(path, parts, nvme_writer=nvme_writer)


def _bytes_of(tensor: Tensor) -> memoryview:
    flat = tensor.detach().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy() if flat.numel() else np.empty(0, np.uint8))


def write_parts(
    path: Path, parts: Sequence[memoryview], *, nvme_writer: Callable[..., Any] | None = None
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
                crc = _write_in_turn(handle, parts)
            else:
                crc = _write_by_nvme(handle, path, parts, nvme_writer)
            os.fsync(handle)
            size = os.fstat(handle).st_size
        finally:
            os.close(handle)
    except OSError as problem:
        raise OSError(problem.errno, f"{problem.strerror} while writing {total} bytes", str(path)) from problem
    if size != total:
        raise OSError(f"{str(path)!r} has {size} bytes after writing {total}; the disk lost some")
    if nvme_writer is not None and (found := file_crc32(path)) != crc:
        raise OSError(f"{str(path)!r} has checksum {found:08x} after writing {crc:08x}; TensorNVMe lost a write")
    return WrittenFile(total, crc)


def _write_in_turn(handle: int, parts: Sequence[memoryview]) -> int:
    """Returns: the checksum."""
    at = crc = 0
    for chunk in _chunks(parts):
        crc = zlib.crc32(chunk, crc)
        done = 0
        while done < chunk.nbytes:  # a call may write less than it was given
            done += os.pwrite(handle, chunk[done:], at + done)
        at += done
    return crc


def _write_by_nvme(handle: int, path: Path, parts: Sequence[memoryview], nvme_writer: Callable[..., Any]) -> int:
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
    crc = 0
    for chunk in _chunks(parts):  # while it writes
        crc = zlib.crc32(chunk, crc)
    writer.synchronize()
    return crc


def _chunks(parts: Sequence[memoryview]) -> Iterator[memoryview]:
    for part in parts:
        for start in range(0, part.nbytes, CHUNK):
            yield part[start : start + CHUNK]


def write_text(path: Path, text: str) -> WrittenFile:
    """Write a small text file and wait until the disk has it."""
    return write_parts(path, [memoryview(text.encode())])


def file_crc32(path: Path) -> int:
    """The checksum of a file as it is on disk."""
    crc = 0
    with path.open("rb", buffering=0) as file:
        while chunk := file.read(CHUNK):
            crc = zlib.crc32(chunk, crc)
    return crc
