"""Writes safetensors files that are known to be on disk: every byte counted, synced, and summed."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

CHUNK = 64 * 2**20  # bytes per write; below the 2 GiB that one call may write
DTYPE_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.int64: "I64"}


class WrittenFile(NamedTuple):
    """What is on disk after a write."""

    size: int
    crc32: int


def write_safetensors(path: Path, tensors: Sequence[tuple[str, Tensor]]) -> WrittenFile:
    """Write tensors as one safetensors file and wait until the disk has it.

    The checksum is computed beside the writing, from memory, so that what the disk got can be checked against what
    was meant.

    Args:
        tensors: (name, contiguous CPU tensor).

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
    return write_parts(path, parts)


def _bytes_of(tensor: Tensor) -> memoryview:
    flat = tensor.detach().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy() if flat.numel() else np.empty(0, np.uint8))


def write_parts(path: Path, parts: Sequence[memoryview]) -> WrittenFile:
    """Write byte parts one after another, sync, check the size."""
    total = sum(part.nbytes for part in parts)
    with ThreadPoolExecutor(max_workers=1) as pool:
        crc = pool.submit(_crc32, parts)
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        try:
            at = 0
            for part in parts:
                at = _write_all(handle, part, at)
            os.fsync(handle)
            size = os.fstat(handle).st_size
        except OSError as problem:
            raise OSError(problem.errno, f"{problem.strerror} while writing {total} bytes", str(path)) from problem
        finally:
            os.close(handle)
        if size != total:
            raise OSError(f"{str(path)!r} has {size} bytes after writing {total}; the disk lost some")
        return WrittenFile(total, crc.result())


def _write_all(handle: int, part: memoryview, at: int) -> int:
    done = 0
    while done < part.nbytes:  # a call may write less than it was given
        done += os.pwrite(handle, part[done : done + CHUNK], at + done)
    return at + done


def _crc32(parts: Sequence[memoryview]) -> int:
    crc = 0
    for part in parts:
        for start in range(0, part.nbytes, CHUNK):
            crc = zlib.crc32(part[start : start + CHUNK], crc)
    return crc


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
