"""Publishes files whole or not at all: written under another name, brought to the disk, renamed; and locks folders."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS)  # of flock, where a file system has none
DRAFT = ".writing-"  # what such names begin with; one is left behind by a kill only


def is_draft(path: Path) -> bool:
    """Whether this is a file under way, or what a kill left of one; who lists a folder passes over it."""
    return path.name.startswith(DRAFT)


@contextmanager
def staged(target: Path, *, shared: bool = False) -> Iterator[Path]:
    """A name to write to; what is there at the end is on disk, and then gets the name `target`.

    Args:
        target: its folder exists; the draft beside it ends in the same suffix.
        shared: several processes may publish it at the same time, and the last one wins.

    Raises:
        OSError: the disk is full, read-only or gone; nothing is left behind.
    """
    own = f"{secrets.token_hex(4)}-" if shared else ""
    draft = target.with_name(f"{DRAFT}{own}{target.name}")
    try:
        yield draft
        with draft.open("rb") as file:
            os.fsync(file.fileno())
        draft.replace(target)
        folder = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    finally:
        draft.unlink(missing_ok=True)


def take_lock(path: Path) -> TextIO:
    """Let no other process take the same lock until the file that is returned is closed, or this process ends.

    Where the file system has no locks, a warning says so, and everybody gets it.

    Raises:
        BlockingIOError: another has it.
        OSError: `path` cannot be written.
    """
    file = path.open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as problem:
        if problem.errno not in NO_LOCKS:
            file.close()
            raise
        logging.getLogger("opensora_like").warning(
            "%r is on a file system without locks (%s); let no other run write there", str(path.parent), problem
        )
    return file
