"""Trains with every backend while the disk takes nothing until the update after the save was made.

    python live_save_cases.py FOLDER

Writes ``facts2.json``: backend -> how the checkpoint differs from one that was written at once.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from threading import Event

import torch.distributed as dist

from opensora_like.checkpoint import files, layout
from opensora_like.checkpoint.live import DOORS
from opensora_like.training.trainer import Run, train
from tests.distributed.elastic_cases import BACKENDS, SAVED, build_toy, checkpoint, differences, in_world, preload

GATE = Event()


def slow_down() -> None:
    """Let no byte reach the disk while the gate is shut; chunks are small, so that each file takes several."""
    real = os.pwrite

    def pwrite(handle: int, data: memoryview, offset: int) -> int:
        if not GATE.wait(60):
            raise OSError("nobody opened the gate")
        return real(handle, data, offset)

    files.CHUNK, os.pwrite = files.ALIGNMENT, pwrite


def train_past_the_save(run: Run) -> int:
    """Train to the end, with the gate shut from before the save until after the next update. Returns: bytes copied."""
    inner = run.on_batch

    def on_batch(batch) -> None:
        if run.state.step == SAVED - 1:
            GATE.clear()
        elif run.state.step == SAVED + 1:
            GATE.set()
        inner(batch)

    run.on_batch = on_batch
    train(run)
    return sum(buffer.nbytes for buffer in run.checkpoints._background._buffers.values())


def save_live(folder: Path, rank: int, facts: dict) -> None:
    """Each backend: at once, in the background, and in the background with the doors taken off."""
    slow_down()
    GATE.set()
    for backend in BACKENDS:
        train(build_toy(folder, backend, backend))
        copied = train_past_the_save(build_toy(folder, backend, f"{backend}-live", "--async-io"))
        everyone = [0] * dist.get_world_size()
        dist.all_gather_object(everyone, copied)
        run = build_toy(folder, backend, f"{backend}-unguarded", "--async-io", "--on-save-error", "continue")
        for door in DOORS:
            delattr(run.booster, door)
        train_past_the_save(run)
        dist.barrier()
        if rank == 0:
            left = [layout.step_of(f) for f in layout.complete_checkpoints(folder / f"{backend}-unguarded")]
            facts[backend] = {
                "differ": differences(checkpoint(folder, backend), checkpoint(folder, f"{backend}-live")),
                "copied": everyone,
                "unguarded": [step for step in left if step == SAVED],
            }
        dist.barrier()


if __name__ == "__main__":
    preload()
    in_world(Path(sys.argv[1]), 2, save_live)
