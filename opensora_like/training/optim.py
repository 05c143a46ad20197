"""The optimizer, and the learning rate as a function of the step."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from opensora_like.boosters.base import OptimizerFactory


def optimizer_factory(optim: Mapping[str, Any], *, device: torch.device) -> OptimizerFactory:
    """What makes the optimizer once the booster knows its parameters.

    Args:
        optim: the config section `optim`, complete.

    Raises:
        ValueError: an optimizer that this device cannot run.
    """
    kind, lr, weight_decay = optim["type"], optim["lr"], optim["weight_decay"]
    if kind == "HybridAdam" and device.type != "cuda":
        raise ValueError("optim.type='HybridAdam' needs a GPU (it compiles CUDA kernels); use --optim.type AdamW")
    if kind != "SGD" and optim["momentum"]:
        raise ValueError(f"optim.momentum={optim['momentum']} is SGD's; {kind} has betas")

    def make(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        if kind == "SGD":
            return torch.optim.SGD(parameters, lr=lr, momentum=optim["momentum"], weight_decay=weight_decay)
        settings = {"lr": lr, "betas": tuple(optim["betas"]), "eps": optim["eps"], "weight_decay": weight_decay}
        if kind == "HybridAdam":
            from colossalai.nn.optimizer import HybridAdam

            return HybridAdam(parameters, adamw_mode=True, **settings)
        return torch.optim.AdamW(parameters, **settings)

    return make


def lr_factor(step: int, *, warmup_steps: int, schedule: str, total_steps: int) -> float:
    """What the base learning rate is multiplied with in update number `step` (from 0).

    Linear warm-up reaches 1 at `warmup_steps`; "constant" stays there, "cosine" falls to 0 at `total_steps`.
    """
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    if schedule == "constant":
        return 1.0
    done = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
