"""Arrays on disk that the processes of a machine share: made by one of them, mapped into memory by all."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import glob
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import numpy as np

from opensora_like.publish import NO_LOCKS

Read = TypeVar("Read")


def make_folder_once(folder: Path, build: Callable[[Path], None]) -> Path:
    """Make a folder of files that is there whole or not at all.

    One process of a machine builds while the others wait for it. Where the file system has no locks, several
    build the same and the first to finish wins.

    Args:
        folder: named after everything that decides its content.
        build: fills the empty folder that it is given.

    Returns: `folder`.

    Raises:
        OSError: the folder cannot be written.
    """
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _locked(folder.parent / ".lock") as alone:
        if folder.is_dir():
            return folder
        staged = hidden_beside(folder)
        for left in folder.parent.glob(f".{glob.escape(folder.name)}.*") if alone else []:
            shutil.rmtree(left, ignore_errors=True)  # by a process that was killed
        staged.mkdir()
        try:
            build(staged)
            _flush(staged)
            staged.rename(folder)
        except OSError as problem:
            # another process was first, where there are no locks
            if problem.errno not in (errno.ENOTEMPTY, errno.EEXIST) or not folder.is_dir():
                raise
        finally:
            shutil.rmtree(staged, ignore_errors=True)
    return folder


def read_made(folder: Path, build: Callable[[Path], None], read: Callable[[Path], Read]) -> Read:
    """What `read` finds in a folder that `make_folder_once` made, though others may remove it at any time."""
    try:
        return read(make_folder_once(folder, build))
    except FileNotFoundError:  # removed in between; who does so is epochs ahead, and does it once
        return read(make_folder_once(folder, build))


def remove_folder(folder: Path) -> None:
    """Delete what `make_folder_once` made; nobody sees a part of it. Others may be deleting or reading it, too."""
    hidden = hidden_beside(folder)
    with contextlib.suppress(FileNotFoundError):  # another process was first
        folder.rename(hidden)
    # what a file system keeps of files that are in use goes with the next one that is made
    shutil.rmtree(hidden, ignore_errors=True)


def hidden_beside(folder: Path) -> Path:
    """A name that nobody else takes, and nobody reads; process ids would not do, in containers all have the same."""
    return folder.parent / f".{folder.name}.{secrets.token_hex(6)}"


@contextmanager
def _locked(path: Path) -> Iterator[bool]:
    """Wait for the lock. Gives: False where the file system has none."""
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
            alone = True
        except OSError as problem:
            if problem.errno not in NO_LOCKS:
                raise
            alone = False
        yield alone


def _flush(folder: Path) -> None:
    """To the disk, before the rename says that all is there."""
    for path in (*folder.iterdir(), folder):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def new_array(path: Path, dtype: type, num: int) -> np.ndarray:
    """A .npy file of `num` zeros, mapped for writing; the pages that were written may leave memory at any time.

    Raises:
        OSError: the disk has no room for it.
    """
    if num == 0:
        np.save(path, np.zeros(0, dtype))
        return np.zeros(0, dtype)
    array = np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=(num,))
    with path.open("r+b") as file:
        try:  # a page that is written where the disk is full ends the process by SIGBUS
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
        except OSError as problem:
            reason = f"{problem.strerror} for {array.nbytes} bytes; make room and run again"
            raise OSError(problem.errno, reason, str(path)) from problem
    return array


def open_array(path: Path) -> np.ndarray:
    """A .npy file, mapped for reading.

    Raises:
        ValueError: it is not whole; the message says to delete it.
    """
    try:
        return np.load(path, mmap_mode="r")
    except ValueError as problem:
        if "mmap length" in str(problem) or path.stat().st_size <= 128:  # an empty array has nothing to map
            try:
                return np.load(path)
            except (ValueError, EOFError):
                pass  # the message below says what to do
        raise ValueError(f"index file {str(path)!r} cannot be read: {problem}; delete its folder") from problem


class Mapped:
    """A .npy file, mapped for reading; its pickle is its path."""

    def __init__(self, path: Path) -> None:
        self._path, self._array = path, open_array(path)

    def __reduce__(self):
        return Mapped, (self._path,)

    @property
    def dtype(self) -> np.dtype:
        return self._array.dtype

    def __len__(self) -> int:
        return len(self._array)

    def __getitem__(self, key: slice | np.ndarray) -> np.ndarray:
        return self._array[key]
