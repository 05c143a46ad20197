"""Trains the toy config with each booster, looked at and not, and writes what came out, for the tests to compare.

    torchrun --nproc_per_node 2 validation_cases.py FOLDER        (or plain python: one process)

Each run is a folder ``FOLDER/world{N}/{booster}/{watched,plain}``; rank 0 adds ``final.pt``, the whole masters.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist

from opensora_like import runtime as rt
from opensora_like.config import read_config
from opensora_like.evaluation.observe import RunObserver
from opensora_like.training.build import build_run
from opensora_like.training.trainer import train

CONFIG = Path(__file__).parents[1] / "training/toy_config.py"
BOOSTERS = {
    "ddp": {"type": "ddp"},
    "zero2": {"type": "colossalai", "plugin": "zero2"},
    "fsdp2": {"type": "fsdp2"},
    "fsdp2_sp": {"type": "fsdp2", "sp_size": 2},
    "fsdp2_tp": {"type": "fsdp2", "tp_size": 2},
    "deepspeed3": {"type": "deepspeed", "stage": 3},  # the last one: it replaces torch's linear for good
}
WATCHED = [
    "--validation", "{'every': 2, 'dataset': {'num_clips': 20}, 'num_clips': 7, 'num_bins': 2}", "--sample-every", "2",
    "--sampling", "{'prompts': ['one', 'two', 'three'], 'height': 16, 'width': 16, 'num_frames': 5, 'num_steps': 2}",
]  # fmt: skip


def run_case(folder: Path, booster: dict, *arguments: str) -> None:
    """One training run of 4 updates."""
    common = ["--outputs", str(folder.parent), "--exp-name", folder.name, "--steps", "4", "--booster", str(booster)]
    config = read_config(CONFIG, [*common, *arguments]).config
    run = build_run(config, rt.start(), config_name=str(CONFIG), observe=RunObserver)
    train(run)
    whole = run.booster.gather(dict(run.booster.master_shards()))
    if dist.get_rank() == 0:
        torch.save(whole, folder / "final.pt")


def main() -> None:
    runtime = rt.start()
    root = Path(sys.argv[1]) / f"world{runtime.world_size}"
    for name, booster in BOOSTERS.items():
        if name == "ddp" or runtime.world_size > 1:
            run_case(root / name / "watched", booster, *WATCHED)
            run_case(root / name / "plain", booster)
    rt.finish()


if __name__ == "__main__":
    main()
