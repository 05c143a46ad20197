"""Saves with every backend on two processes, and goes on with every backend on one and on four.

    python elastic_cases.py FOLDER

Four micro-batches make a step everywhere. Writes ``facts.json``: what was loaded where -> which tensors differ.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import sys
from pathlib import Path

import torch
import torch._dynamo  # an optimizer imports it when it is made; here, so that forks have it
import torch.distributed as dist
from torch import Tensor

from opensora_like import runtime as rt
from opensora_like.checkpoint import layout
from opensora_like.checkpoint.pieces import PieceReader
from opensora_like.config import read_config
from opensora_like.training.build import build_frozen, build_model, build_run
from opensora_like.training.trainer import Run, train
from tests.distributed.forks import World

CONFIG = Path(__file__).parents[1] / "training/toy_config.py"
BACKENDS = {
    "ddp": "{'type': 'ddp'}",
    "colossalai": "{'type': 'colossalai', 'plugin': 'zero2'}",
    "fsdp2": "{'type': 'fsdp2'}",
    **({"deepspeed": "{'type': 'deepspeed', 'stage': 2}"} if importlib.util.find_spec("deepspeed") else {}),
}
MICRO, SAVED, LAST = 4, 3, 6


def build_toy(folder: Path, backend: str, name: str, *arguments: str) -> Run:
    """The toy run with this backend, and a global batch that does not depend on the number of processes."""
    runtime = rt.start()
    settings = ["--outputs", str(folder), "--exp-name", name, "--booster", BACKENDS[backend], "--steps", str(LAST)]
    settings += ["--ckpt-every", str(SAVED), "--accumulation-steps", str(MICRO // runtime.world_size)]
    return build_run(read_config(CONFIG, [*settings, *arguments]).config, runtime, config_name=str(CONFIG))


def checkpoint(folder: Path, name: str) -> Path:
    return next(f for f in layout.complete_checkpoints(folder / name) if layout.step_of(f) == SAVED)


def tensors_of(checkpoint: Path) -> dict[str, Tensor]:
    """All, whole."""
    reader = PieceReader(checkpoint)
    return {f"{kind}/{name}": reader.read_whole(kind, name) for kind in reader.kinds() for name in reader.names(kind)}


def differences(one: Path, other: Path) -> list[str]:
    """Tensors that are not the same in every bit, or not in both."""
    mine, theirs = tensors_of(one), tensors_of(other)
    common = mine.keys() & theirs.keys()
    return sorted((mine.keys() ^ theirs.keys()) | {n for n in common if not torch.equal(mine[n], theirs[n])})


def train_and_note(run: Run) -> dict[str, list[int]]:
    """Train to the end. Returns: "epoch index" of each micro-batch of all ranks -> its rows."""
    seen: dict[str, list[int]] = {}
    inner = run.on_batch

    def on_batch(batch) -> None:
        seen[f"{batch.epoch} {batch.index}"] = [int(row) for row in batch.rows]
        inner(batch)

    run.on_batch = on_batch
    train(run)
    everyone: list[dict | None] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, seen)
    return {key: rows for found in everyone for key, rows in found.items()}


def metrics_of(folder: Path) -> list[list[float]]:
    """Of the steps after the checkpoint."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [[r["step"], r["samples"], r["loss"], r["grad_norm"]] for r in rows if r["step"] > SAVED]


def write_all(folder: Path, rank: int, facts: dict) -> None:
    """On two processes: each backend trains to the end and leaves a checkpoint on the way."""
    for backend in BACKENDS:
        seen = train_and_note(build_toy(folder, backend, backend))
        facts[backend] = {"rows": seen, "metrics": metrics_of(folder / backend)}


def read_all(folder: Path, rank: int, facts: dict) -> None:
    """On any number: each backend loads every checkpoint, saves it again, and trains on from one."""
    for backend in BACKENDS:
        name = f"{backend}-on-{dist.get_world_size()}"
        source = checkpoint(folder, "ddp")
        run = build_toy(folder, backend, name, "--load", str(source))
        for saver in BACKENDS:
            origin = checkpoint(folder, saver)
            state = run.checkpoints.load(origin)
            copy = run.checkpoints.save(state)
            dist.barrier()
            if rank == 0:
                facts[f"{saver} -> {name}"] = {"differ": differences(origin, copy), "num": len(tensors_of(copy))}
            dist.barrier()
        run.checkpoints.load(source)
        facts[name] = {"rows": train_and_note(run), "metrics": metrics_of(folder / name)}


def in_world(folder: Path, size: int, work) -> dict:
    """Run `work` on `size` processes. Returns: the facts of rank 0."""

    def all_of_it(rank: int) -> None:
        facts: dict = {}
        work(folder, rank, facts)
        if rank == 0:
            (folder / f"facts{size}.json").write_text(json.dumps(facts))

    codes = World(size, all_of_it, log=folder / "log.txt").join(400)
    if any(codes):
        raise RuntimeError(f"world {size} ended with {codes}:\n{(folder / 'log.txt').read_text()[-6000:]}")
    return json.loads((folder / f"facts{size}.json").read_text())


def preload() -> None:
    """Import what the runs import."""
    cfg = read_config(CONFIG, []).config
    build_model(cfg)
    build_frozen(cfg, torch.device("cpu"))
    from opensora_like.boosters.colossalai_import import import_colossalai

    import_colossalai()


def main(folder: Path) -> None:
    os.environ |= {"GLOO_SOCKET_IFNAME": "lo", "CXX": "/no/compiler"}  # no name look-up, nothing compiled
    preload()
    found = {"writer": in_world(folder, 2, write_all)}
    for size in (1, 4):
        found[f"world {size}"] = in_world(folder, size, read_all)
    (folder / "facts.json").write_text(json.dumps(found))
    for run in folder.iterdir():
        if run.is_dir():
            shutil.rmtree(run)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
