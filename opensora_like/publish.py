"""Publishes files whole or not at all: written under another name, brought to the disk, renamed."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

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
