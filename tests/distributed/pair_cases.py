"""Distils with every backend on two processes, resumes there, goes on in one process, and returns to two.

    python pair_cases.py FOLDER

Two micro-batches make a step everywhere. Writes ``facts.json``: what was trained where -> metrics, and which tensors
differ.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from pathlib import Path

import torch.distributed as dist

from opensora_like import runtime as rt
from opensora_like.checkpoint import layout
from opensora_like.config import read_config
from opensora_like.training.build import build_run
from opensora_like.training.trainer import Run, train
from tests.distributed.elastic_cases import differences, in_world, preload

CONFIG = Path(__file__).parents[1] / "training/toy_config.py"
BACKENDS = {
    "ddp": "{'type': 'ddp'}",
    "ddp sp": "{'type': 'ddp', 'sp_size': 2}",
    "colossalai": "{'type': 'colossalai', 'plugin': 'zero2'}",
    "fsdp2": "{'type': 'fsdp2'}",
}
if importlib.util.find_spec("deepspeed"):
    BACKENDS |= {f"deepspeed {stage}": f"{{'type': 'deepspeed', 'stage': {stage}}}" for stage in (2, 3)}
DISTILL = "dict(times=(1.0,0.75,0.5),gen_update_interval=2,critic_lr=5e-3,real_guidance=4.0)"
LORA = "{'r': 2, 'lora_alpha': 8, 'target_modules': ['qkv', 'proj', 'linear1']}"
MODES = {"whole": [], "lora": ["--lora_config", LORA]}
CASES = [(m, b) for m in MODES for b in BACKENDS if m == "whole" or b not in ("ddp sp", "deepspeed 3")]
MICRO, SAVED, LAST = 2, 2, 5


def build_toy(folder: Path, backend: str, mode: str, name: str, *arguments: str) -> Run:
    """The toy run, with a global batch that does not depend on the number of processes."""
    runtime = rt.start()
    readers = runtime.world_size // (2 if backend.endswith(" sp") else 1)
    settings = ["--outputs", str(folder), "--exp-name", name, "--booster", BACKENDS[backend], "--distill", DISTILL]
    settings += ["--steps", str(LAST), "--ckpt-every", str(SAVED), "--accumulation-steps", str(MICRO // readers)]
    config = read_config(CONFIG, [*settings, *MODES[mode], *arguments]).config
    return build_run(config, runtime, config_name=str(CONFIG))


def checkpoint(folder: Path, name: str, step: int) -> Path:
    return next(f for f in layout.complete_checkpoints(folder / name) if layout.step_of(f) == step)


def metrics_of(folder: Path) -> list[dict[str, float]]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k.startswith(("step", "loss", "grad_norm"))} for row in rows]


def write_all(folder: Path, rank: int, facts: dict) -> None:
    """On two processes: each backend trains through, and again from its checkpoint on the way."""
    for mode, backend in CASES:
        name = f"{backend} {mode}"
        train(build_toy(folder, backend, mode, name))
        half = str(checkpoint(folder, name, SAVED))
        train(build_toy(folder, backend, mode, f"{name} again", "--load", half))
        if rank == 0:
            ends = [checkpoint(folder, n, LAST) for n in (name, f"{name} again")]
            facts[name] = {"metrics": metrics_of(folder / name), "differ": differences(*ends)}
        dist.barrier()


def read_all(folder: Path, rank: int, facts: dict) -> None:
    """In one process: what two wrote, saved again and trained on."""
    for mode, backend in CASES:
        if backend.endswith(" sp"):
            continue
        name = f"{backend} {mode}"
        origin = checkpoint(folder, name, SAVED)
        run = build_toy(folder, backend, mode, f"{name} alone", "--load", str(origin))
        copy = run.checkpoints.save(run.state)
        run.checkpoints.wait()
        differ = differences(origin, copy)
        train(run)
        facts[f"{name} alone"] = {"metrics": metrics_of(folder / f"{name} alone"), "differ": differ}


def return_all(folder: Path, rank: int, facts: dict) -> None:
    """On two processes again: what one wrote, with DDP, saved by every backend."""
    origin = checkpoint(folder, "ddp whole alone", LAST)
    for backend in BACKENDS:
        run = build_toy(folder, backend, "whole", f"{backend} back", "--load", str(origin))
        copy = run.checkpoints.save(run.state)
        dist.barrier()
        if rank == 0:
            facts[f"{backend} back"] = {"metrics": [], "differ": differences(origin, copy)}
        dist.barrier()


def main(folder: Path) -> None:
    os.environ |= {"GLOO_SOCKET_IFNAME": "lo", "CXX": "/no/compiler"}  # no name look-up, nothing compiled
    preload()
    found = in_world(folder, 2, write_all) | in_world(folder, 1, read_all) | in_world(folder, 2, return_all)
    (folder / "facts.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
