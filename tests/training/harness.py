"""Runs the toy config: in this process, or under torchrun."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from torch import Tensor

from opensora_like import runtime as rt
from opensora_like.config import read_config
from opensora_like.datasets.batch import Batch
from opensora_like.training.build import build_run
from opensora_like.training.trainer import Run, train

ROOT = Path(__file__).parent.parent.parent
CONFIG = Path(__file__).parent / "toy_config.py"


class Killed(Exception):
    """Stands for a kill at a certain micro-batch."""


def build_toy(outputs: Path, *arguments: str) -> Run:
    """The toy run, built and loaded."""
    config = read_config(CONFIG, ["--outputs", str(outputs), *arguments]).config
    return build_run(config, rt.start(), config_name=str(CONFIG))


def train_toy(outputs: Path, *arguments: str, kill_before: int | None = None) -> Run:
    """Build and train; with `kill_before`, an exception before this update (from 1)."""
    run = build_toy(outputs, *arguments)
    if kill_before is not None:
        inner = run.on_batch

        def on_batch(batch: Batch) -> None:
            if run.state.step + 1 >= kill_before:
                raise Killed
            inner(batch)

        run.on_batch = on_batch
    try:
        train(run)
    except Killed:
        run.checkpoints.wait()
    return run


def tensors_of(run: Run) -> dict[str, Tensor]:
    """Copies of all that a checkpoint holds."""
    found = {f"master/{n}": t.clone() for n, t in run.booster.master_shards()}
    for kind, tensors in run.booster.optimizer_shards().items():
        found |= {f"{kind}/{n}": t.clone() for n, t in tensors.items()}
    if run.ema is not None:
        found |= {f"ema/{n}": t.clone() for n, t in run.ema.shards.items()}
    return found


def assert_same(run: Run, other: Run) -> None:
    """Bit for bit, tensors and position."""
    assert run.state == other.state
    mine, theirs = tensors_of(run), tensors_of(other)
    assert mine.keys() == theirs.keys()
    different = [name for name in mine if not torch.equal(mine[name], theirs[name])]
    assert not different


def metrics_of(folder: Path, *names: str) -> list[tuple]:
    """Rows of metrics.jsonl, only what does not depend on time."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [tuple(row[n] for n in names or ("step", "loss", "grad_norm", "lr", "epoch", "samples")) for row in rows]


def torchrun(num_processes: int, *arguments: str, wait: bool = True, config: Path = CONFIG) -> subprocess.Popen:
    """Start scripts/diffusion/train.py on the toy config, or on another, with real processes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={num_processes}"]
    command += [str(ROOT / "scripts/diffusion/train.py"), str(config), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    if wait:
        output, _ = process.communicate(timeout=300)
        process.output = output
    return process
