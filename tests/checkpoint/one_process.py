"""A tiny trained model with its checkpoints, in a process group of one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from opensora_like import runtime as rt
from opensora_like.boosters.ddp import DDPBooster
from opensora_like.checkpoint.manager import CheckpointManager
from opensora_like.training.ema import EMA


def make_manager(
    run: Path, *, width: int = 5, extra: bool = False, seed: int = 0, has_ema: bool = True, **more: Any
) -> CheckpointManager:
    """Checkpoints of a model of two linears (`extra`: three) after one update of AdamW."""
    rt.start()
    torch.manual_seed(seed)
    layers = [nn.Linear(7, width), nn.Linear(width, 3), *([nn.Linear(3, 3)] if extra else [])]
    model = nn.Sequential(*layers)
    booster = DDPBooster(dtype="fp32", device=torch.device("cpu"))
    called = booster.prepare(model, torch.optim.AdamW)
    booster.backward(called(torch.randn(4, 7)).square().mean())
    booster.step()
    settings = {"keep_n_latest": -1, "order": {}, "about": {}, "config_text": "", **more}
    return CheckpointManager(run, booster, ema=EMA(booster, 0.9).shards if has_ema else None, **settings)
