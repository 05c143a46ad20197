"""What is written beside the tensors of a checkpoint: state, versions and checksums; reading and checking them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable, Mapping
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


def damage(
    folder: Path, rank: int, world_size: int, *, on_file: Callable[[str], None] = lambda file: None
) -> list[str]:
    """What is wrong with this rank's share of the files of a checkpoint.

    With the number of ranks that wrote it each rank has its own files, in the order in which a load asks for them.

    Args:
        on_file: told the name of each file that has been compared.
    """
    problems = []
    try:
        sums = json.loads((folder / CHECKSUMS_FILE).read_text())
        for file in sorted(sums, key=_when_loaded):
            if _writer_of(file) % world_size == rank:
                problems.append(check_file(folder / file, **sums[file]))
                on_file(file)
    except OSError as problem:
        problems.append(str(problem))
    except (ValueError, TypeError) as problem:  # no JSON, or not as it was written
        problems.append(f"{str(folder / CHECKSUMS_FILE)!r} has changed: {problem}")
    return [problem for problem in problems if problem]


def _when_loaded(file: str) -> tuple[int, str]:
    kind = file.split(".")[0]
    return {"pieces": 0, "master": 1, "ema": 3}.get(kind, 2), file


def _writer_of(file: str) -> int:
    """The rank in the name of a file of tensors; rank 0 has the others."""
    rank = file.split(".")[1].removeprefix("rank")
    return int(rank) if rank.isdigit() else 0


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
