"""Trains the toy config, from the beginning or from checkpoints of other runs, and notes what every step was fed.

    torchrun --nproc_per_node N elastic_order_cases.py FOLDER RUNS

RUNS is json: a list of {"name", "load": a checkpoint below FOLDER or null, "arguments"}. The steps of each run go into
FOLDER/NAME.json: step -> for each micro-batch of all ranks its epoch, number, rows, and a hash of every tensor that the
model was given: of what was read, noised and conditioned.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections import defaultdict
from pathlib import Path

import torch
import torch.distributed as dist

from opensora_like import runtime as rt
from opensora_like.config import read_config
from opensora_like.training.build import build_run
from opensora_like.training.trainer import Run, train

CONFIG = Path(__file__).parents[1] / "training/toy_config.py"
MICRO = 4  # micro-batches of a step in every world


def train_and_note(run: Run) -> dict[int, list]:
    """Train to the end. Returns: on every rank, what all of them were fed by step."""
    fed: dict[int, list] = defaultdict(list)
    model, on_batch = run.step_fn.model, run.on_batch
    now: list = []

    def note_batch(batch) -> None:
        now[:] = [run.state.step + 1, batch.epoch, batch.index, [int(row) for row in batch.rows]]
        on_batch(batch)

    def note_inputs(x_t: torch.Tensor, t_B: torch.Tensor, conditions: dict[str, torch.Tensor]) -> torch.Tensor:
        digest = hashlib.blake2b(digest_size=8)
        for tensor in (x_t, t_B, *(conditions[name] for name in sorted(conditions))):
            digest.update(tensor.detach().float().numpy().tobytes())
        step, *micro = now
        fed[step].append([*micro, digest.hexdigest()])
        return model(x_t, t_B, conditions)

    run.on_batch, run.step_fn.model = note_batch, note_inputs
    train(run)
    everyone: list[dict | None] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, dict(fed))
    return {step: sorted(micro for found in everyone for micro in found[step]) for step in fed}


def main(folder: Path, runs: list[dict]) -> None:
    runtime = rt.start()
    for wanted in runs:
        settings = [
            "--outputs",
            str(folder),
            "--exp-name",
            wanted["name"],
            "--ckpt-every",
            "1",
            "--keep-n-latest",
            "99",
        ]
        settings += ["--accumulation-steps", str(MICRO // runtime.world_size), *wanted["arguments"]]
        if wanted["load"] is not None:
            settings += ["--load", str(folder / wanted["load"])]
        run = build_run(read_config(CONFIG, settings).config, runtime, config_name=str(CONFIG))
        fed = train_and_note(run)
        if runtime.is_main:
            (folder / f"{wanted['name']}.json").write_text(json.dumps({"steps": fed, "end": run.state.step}))
    rt.finish()


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
