"""Two ranks of which the second does not see the newest checkpoint; what each of them loads goes to facts.json."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch.distributed as dist

from opensora_like.checkpoint import layout
from opensora_like.checkpoint.publishing import TrainState, of_all_ranks
from opensora_like.training.resume import load_state
from tests.checkpoint.one_process import make_manager
from tests.distributed.forks import World


def work(rank: int) -> None:
    folder = Path(sys.argv[1])
    manager = make_manager(folder / "run", order={"fingerprint": "same"})
    for step in (1, 2):
        manager.save(TrainState(step=step))
    whole = layout.complete_checkpoints
    layout.complete_checkpoints = lambda run: whole(run)[: 2 - rank]
    found = {}
    for load in ("latest", str(folder / "run")):
        settings = dict.fromkeys(("start_epoch", "start_step"), None) | {"load_weights_only": False}
        cfg = SimpleNamespace(load=load, load_strict=True, lora_config=None, trainable_modules=None, **settings)
        state = load_state(cfg, folder / "run", manager, micro_per_step=1)
        found[Path(load).name] = of_all_ranks(state.step, dist.group.WORLD)
    if rank == 0:
        (folder / "facts.json").write_text(json.dumps(found))


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    codes = World(2, work, log=folder / "log.txt").join(grace_seconds=60)
    if any(codes):
        sys.exit((folder / "log.txt").read_text())
