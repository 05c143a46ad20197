"""What is written beside the tensors of a checkpoint: state, versions and checksums; reading and checking them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from opensora_like.checkpoint import layout
from opensora_like.checkpoint.files import file_checksum
from opensora_like.datasets.plan import what_changed

FORMAT_VERSION = 2
CONFIG_FILE = "config.py"
CHECKSUMS_FILE = "checksums.json"
READERS = 4  # files that a rank checks at once


def read_state(folder: Path) -> dict[str, Any]:
    """The facts of a checkpoint, from its state file.

    Raises:
        ValueError: written by a newer format.
    """
    facts = json.loads((folder / layout.STATE_FILE).read_text())
    if facts["format_version"] > FORMAT_VERSION:
        raise ValueError(
            f"{str(folder)!r} has format {facts['format_version']}, this program reads {FORMAT_VERSION}; update it"
        )
    return facts


def check_file(path: Path, *, size: int, xxh3_64: str) -> str:
    """What is wrong with a file of a checkpoint, "" if nothing."""
    if not path.is_file():
        return f"{str(path)!r} is missing"
    if path.stat().st_size != size:
        return f"{str(path)!r} has {path.stat().st_size} bytes, {size} were written"
    found = file_checksum(path)
    return "" if found == xxh3_64 else f"{str(path)!r} has checksum {found}, {xxh3_64} was written: it has changed"


def damage(folder: Path, rank: int, world_size: int) -> list[str]:
    """What is wrong with every `world_size`-th file of a checkpoint, from the `rank`-th on."""
    try:
        sums = json.loads((folder / CHECKSUMS_FILE).read_text())
        mine = sorted(sums)[rank::world_size]
        with ThreadPoolExecutor(READERS, "reader") as pool:
            found = list(pool.map(lambda file: check_file(folder / file, **sums[file]), mine))
        return [problem for problem in found if problem]
    except OSError as problem:
        return [str(problem)]
    except (ValueError, TypeError) as problem:  # no JSON, or not as it was written
        return [f"{str(folder / CHECKSUMS_FILE)!r} has changed: {problem}"]


def check_order(facts: Mapping[str, Any], order: Mapping[str, Any], folder: Path) -> None:
    """Refuse to resume over other data than the checkpoint's.

    Args:
        order: `datasets.plan.order_key` of the data at hand.

    Raises:
        ValueError: what changed, with both values.
    """
    if changes := what_changed(facts["data_order"], order):
        raise ValueError(
            f"load={str(folder)!r}: the data changed since it was saved ({'; '.join(changes)}), so its position in "
            "the epoch means nothing; restore them, or keep weights and optimizer and restart the data with "
            "--start-epoch 0 --start-step 0"
        )


@cache
def versions() -> dict[str, str]:
    """Of this package, of what it stands on, and the commit of its checkout."""
    found = {}
    for name in ("opensora_like", "torch", "colossalai", "deepspeed", "transformers", "diffusers", "mmengine-lite"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    found["git"] = _git_commit()
    return found


def _git_commit() -> str:
    """Commit of this package's checkout, "" where it is not one or there is no git."""
    if shutil.which("git") is None:
        return ""
    asked = subprocess.run(
        ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "GIT_OPTIONAL_LOCKS": "0"},
    )
    return asked.stdout.strip()
