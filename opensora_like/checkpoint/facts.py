"""What is written beside the tensors of a checkpoint: state, versions and checksums; reading and checking them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from importlib import metadata
from pathlib import Path
from typing import Any

from opensora_like.checkpoint import layout
from opensora_like.checkpoint.files import WrittenFile, read_through
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


def frozen_facts(trainable_modules: Sequence[str] | None, base: str | None) -> dict[str, Any]:
    """What the state file says of weights that a run neither trains nor saves; {} where it saves all.

    Args:
        base: where they were read from; None where the seed made them.
    """
    return {} if trainable_modules is None else {"frozen": {"except": list(trainable_modules), "from": base}}


def frozen_source(folder: Path) -> str | None:
    """Where the weights stand that a checkpoint leaves out; None where it holds all, or is none of this program's.

    Raises:
        ValueError: nowhere: the run began from random weights.
    """
    if not (folder / layout.STATE_FILE).is_file() or (facts := read_state(folder).get("frozen")) is None:
        return None
    if facts["from"] is None:
        raise ValueError(
            f"{str(folder)!r} holds what trainable_modules={facts['except']!r} names, and the rest began as random "
            "weights; make whole weights of it with tools/zero_to_bf16.py"
        )
    return facts["from"]


Take = Callable[[int, memoryview], None]


def check_file(path: Path, take: Take, *, size: int, xxh3_64: str) -> str:
    """What is wrong with a file of a checkpoint, "" if nothing.

    Args:
        take: see `files.read_through`; not called where the size is wrong already.
    """
    try:
        if not path.is_file():
            return f"{str(path)!r} is missing"
        if path.stat().st_size != size:
            return f"{str(path)!r} has {path.stat().st_size} bytes, {size} were written"
        found = read_through(path, take)
    except OSError as problem:
        return str(problem)
    return "" if found == xxh3_64 else f"{str(path)!r} has checksum {found}, {xxh3_64} was written: it has changed"


def file_checks(folder: Path, rank: int, world_size: int) -> dict[str, Callable[[Take], str]]:
    """File -> what compares it with what was written, see `check_file`; of this rank's share of a checkpoint.

    With the number of ranks that wrote it each rank has its own files, in the order in which a load asks for them.
    """
    path = folder / CHECKSUMS_FILE
    try:
        written = {file: WrittenFile(**facts) for file, facts in json.loads(path.read_text()).items()}
    except OSError as problem:
        wrong = str(problem)
    except (ValueError, TypeError, AttributeError) as problem:  # no JSON, or not as it was written
        wrong = f"{str(path)!r} has changed: {problem}"
    else:
        own = sorted((file for file in written if _writer_of(file) % world_size == rank), key=_when_loaded)
        return {file: partial(check_file, folder / file, **written[file]._asdict()) for file in own}
    return {CHECKSUMS_FILE: lambda take: wrong}


def damage(folder: Path, rank: int, world_size: int) -> list[str]:
    """What is wrong with this rank's share of the files of a checkpoint."""
    checks = file_checks(folder, rank, world_size)
    return [problem for check in checks.values() if (problem := check(lambda at, data: None))]


def _when_loaded(file: str) -> tuple[int, str]:
    kind = file.split(".")[0]
    return {"pieces": 0, "master": 1, "ema": 3}.get(kind, 2), file


def _writer_of(file: str) -> int:
    """The rank in the name of a file of tensors; rank 0 has the others."""
    rank = file.partition(".")[2].partition(".")[0].removeprefix("rank")
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
