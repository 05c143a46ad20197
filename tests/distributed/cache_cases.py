"""Worlds that cache the same table: one process, two, and some that are killed on the way. One start for all of them.

python tests/distributed/cache_cases.py FOLDER [--key value ...]
"""

from __future__ import annotations

import functools
import json
import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from opensora_like.datasets.latent_store import StoreWriter
from opensora_like.preparation import table
from opensora_like.training.build import build_frozen
from tests.distributed.forks import World
from tests.training.cached_clips import config_of

EPOCHS = 2


def cache(folder: Path, settings: list[str], *, summary: Path, kill_after: int | None = None) -> None:
    """Cache, and write the summary; with `kill_after`, die before so many entries more are added."""
    left, inner = kill_after, StoreWriter.add

    def add(self: StoreWriter, *entry: object) -> None:
        nonlocal left
        if left is not None:
            left -= 1
            if left < 0:
                os.kill(os.getpid(), signal.SIGKILL)
        inner(self, *entry)

    StoreWriter.add = add
    table.StoreWriter = functools.partial(StoreWriter, shard_bytes=50_000)
    made = table.cache_table(config_of(*settings), folder, epochs=EPOCHS)
    summary.write_text(json.dumps(made._asdict()))


def main(root: Path, settings: list[str]) -> None:
    cases: list[tuple[str, int, int | None]] = [("one", 1, None), ("two", 2, None), ("two_again", 3, None)]
    cases += [("killed", 1, 9), ("killed", 1, 12), ("killed", 1, None)]
    build_frozen(config_of(*settings), torch.device("cpu"))  # what it imports is then imported once
    for name, size, kill_after in cases:
        folder = root / name.removesuffix("_again")
        given = {"summary": root / f"{name}.json", "kill_after": kill_after}
        world = World(size, lambda rank, f=folder, g=given: cache(f, settings, **g), log=root / "log.txt")
        expected = [-signal.SIGKILL if kill_after else 0] * size
        if (codes := world.join()) != expected:
            sys.exit(f"{name}: exit codes {codes}, expected {expected}\n{(root / 'log.txt').read_text()[-3000:]}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
