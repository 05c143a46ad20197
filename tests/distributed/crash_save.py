"""Kills two real processes at every stage of a save, by SIGKILL through the hook, and lets others go on from there.

    python crash_save.py FOLDER

Writes ``facts.json``: what was killed where -> what was found afterwards.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from pathlib import Path

import torch
import torch._dynamo  # an optimizer imports it when it is made; here, so that forks have it
import torch.distributed as dist
from torch import nn

from opensora_like.boosters.ddp import DDPBooster
from opensora_like.checkpoint import layout
from opensora_like.checkpoint.facts import damage, read_state
from opensora_like.checkpoint.manager import CheckpointManager, TrainState
from opensora_like.training.ema import EMA
from tests.distributed.forks import World


def make_manager(run: Path, hook=lambda stage: None, *, async_io: bool = False) -> CheckpointManager:
    """A tiny model behind DDP, with AdamW and EMA."""
    model = nn.Sequential(nn.Linear(7, 5), nn.Linear(5, 3))
    booster = DDPBooster(dtype="fp32", device=torch.device("cpu"))
    booster.prepare(model, torch.optim.AdamW)
    ema = EMA(booster, 0.9)
    return CheckpointManager(
        run,
        booster,
        ema=ema.shards,
        config_text="steps = 3\n",
        keep_n_latest=1,
        order={},
        about={},
        async_io=async_io,
        hook=hook,
    )


def tensors_of(manager: CheckpointManager) -> list[torch.Tensor]:
    states = manager.booster.optimizer_shards().values()
    masters = [t for _, t in manager.booster.master_shards()]
    return [*masters, *manager.ema.values(), *(t for tensors in states for t in tensors.values())]


def set_step(manager: CheckpointManager, step: int) -> None:
    """What the run would hold after that many updates; it differs in every tensor and element."""
    with torch.no_grad():
        for number, tensor in enumerate(tensors_of(manager)):
            own = dist.get_rank() if tensor.ndim else 0  # counters are the same on all ranks
            tensor.copy_(1000 * step + 10 * number + own + torch.linspace(0, 1, tensor.numel()).view_as(tensor))


def holds_step(manager: CheckpointManager, step: int) -> bool:
    found = [t.clone() for t in tensors_of(manager)]
    set_step(manager, step)
    return all(torch.equal(a, b) for a, b in zip(found, tensors_of(manager), strict=True))


def save(manager: CheckpointManager, step: int) -> None:
    set_step(manager, step)
    manager.save(TrainState(step=step, epoch=0, micro_batch=2 * step, samples=4 * step))
    manager.wait()


def first_life(run: Path, rank: int, *, stage: str, victim: int, everyone: bool, again: bool, async_io: bool) -> None:
    """Save step 1, then step 2 (`again`: a second time) and die in it."""
    pids: list[int | None] = [None, None]
    dist.all_gather_object(pids, os.getpid())
    armed = False

    def hook(reached: str) -> None:
        if armed and rank == victim and reached == stage:
            for pid in reversed(pids) if everyone else [os.getpid()]:
                if pid != os.getpid():
                    os.kill(pid, signal.SIGKILL)
            os.kill(os.getpid(), signal.SIGKILL)

    manager = make_manager(run, hook, async_io=async_io)
    save(manager, 1)
    if again:
        save(manager, 2)
    armed = True
    save(manager, 2)


def second_life(run: Path, rank: int, *, expected: list[int]) -> None:
    """Resume from what is there, check every number, train on and save."""
    if rank == 0:
        layout.recover(run)
    dist.barrier()
    manager = make_manager(run)
    state = manager.newest_intact(manager.load)
    assert state.step in expected and state.micro_batch == 2 * state.step, (state, expected)
    assert holds_step(manager, state.step), f"not the tensors of step {state.step}"
    save(manager, 3)


def crash(run: Path, log: Path, *, stage: str, victim: int, everyone: bool, again: bool = False) -> dict:
    """One kill and what came after it."""
    how = {"stage": stage, "victim": victim, "everyone": everyone, "again": again}
    codes = World(2, lambda rank: first_life(run, rank, **how, async_io=everyone or not again), log=log).join()
    visible = layout.complete_checkpoints(run)
    damaged = [p for folder in visible for p in damage(folder, 0, 1)]
    steps = sorted(layout.step_of(folder) for folder in visible)
    hidden_steps = [2] if again else []  # moved aside: `recover` brings it back
    after = World(2, lambda rank: second_life(run, rank, expected=[max([*steps, *hidden_steps])]), log=log).join()
    left = sorted(f.name for f in run.iterdir() if f.name.startswith("."))
    linked = str((run / layout.LATEST).readlink()) if (run / layout.LATEST).is_symlink() else ""
    final = [layout.step_of(f) for f in layout.complete_checkpoints(run)]
    shutil.rmtree(run)
    return how | {
        "codes": codes, "visible": steps, "damaged": damaged, "after": after, "left": left, "linked": linked,
        "final": final,
    }  # fmt: skip


def stages_of(run: Path, log: Path, folder: Path) -> dict[int, list[str]]:
    """All stages that each rank goes through, in order."""

    def work(rank: int) -> None:
        stages: list[str] = []
        manager = make_manager(run, stages.append, async_io=True)
        save(manager, 1)
        save(manager, 2)
        (folder / f"stages{rank}.json").write_text(json.dumps(list(dict.fromkeys(stages))))

    assert World(2, work, log=log).join() == [0, 0]
    assert read_state(layout.complete_checkpoints(run)[-1])["step"] == 2
    shutil.rmtree(run)
    return {rank: json.loads((folder / f"stages{rank}.json").read_text()) for rank in (0, 1)}


def main(folder: Path) -> None:
    run, log = folder / "run", folder / "log.txt"
    stages = stages_of(run, log, folder)
    found = []
    for victim, names in stages.items():
        for number, stage in enumerate(names):
            found.append(crash(run, log, stage=stage, victim=victim, everyone=bool(number % 2)))
            if not stage.startswith("file"):
                found.append(crash(run, log, stage=stage, victim=victim, everyone=not number % 2))
    for stage in ("aside", "renamed"):
        found.append(crash(run, log, stage=stage, victim=0, everyone=stage == "aside", again=True))
    (folder / "facts.json").write_text(json.dumps({"stages": stages, "crashes": found}, indent=1))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
