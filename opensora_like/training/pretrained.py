"""Published weights for a sharded denoiser: built without values, then each rank reads its own part."""

from __future__ import annotations

import resource
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from opensora_like.boosters.base import Booster
from opensora_like.checkpoint.facts import frozen_source
from opensora_like.checkpoint.initial import InitialValues
from opensora_like.checkpoint.sharded import WeightSource, load_pretrained_sharded, open_source, plan_load
from opensora_like.checkpoint.weights import newest_of
from opensora_like.models.base import Denoiser
from opensora_like.registry import MODELS, build
from opensora_like.runtime import Runtime, logger
from opensora_like.settings import RunConfig
from opensora_like.training.resume import log_report

WHERE = "model.from_pretrained"


@dataclass(frozen=True)
class Unfilled:
    """A model on ``meta``, and where its values will come from.

    Args:
        names: parameter -> tensor of the source.
        initial: parameter that the source lacks -> what makes its initial value.
    """

    model: Denoiser
    source: WeightSource
    names: dict[str, str]
    initial: dict[str, Callable[[], Tensor]]

    def fill(self, booster: Booster) -> None:
        """Load this rank's part, once `booster` has prepared the model."""
        load_pretrained_sharded(booster, self.source, self.names, initial=lambda name: self.initial[name]())


def build_unfilled(cfg: RunConfig, booster: Booster, world_size: int) -> Unfilled | None:
    """The denoiser for loading in parts; None where the settings do not ask for it or the weights do not allow it.

    Unless asked for, it is done only where it gives the numbers that a load of the whole gives.

    Raises:
        ValueError: `load_sharded` without weights to load, or weights that do not fit.
        FileNotFoundError: no such weights.
    """
    path = cfg.model.get("from_pretrained")
    if cfg.load_sharded and not path:
        raise ValueError("load_sharded=True is about the weights of model.from_pretrained, and that is not set")
    wanted = cfg.load_sharded
    if wanted is None:
        wanted = world_size > 1 and getattr(booster, "loads_in_parts", False)
    if not path or not wanted:
        return None
    found = _unfilled(cfg, path)
    if isinstance(found, str):
        logger.info("%s %s: every rank loads it whole, since %s", WHERE, path, found)
        return None
    return found


def _unfilled(cfg: RunConfig, path: str) -> Unfilled | str:
    """The model, or why it has to be loaded whole."""
    if cfg.lora_config is not None:
        return "lora_config freezes the model"
    if cfg.trainable_modules is not None:
        return "trainable_modules freezes the rest of the model"
    if frozen_source(newest_of(Path(path), WHERE)) is not None:
        return "it holds only what its run trained"
    source = open_source(path, where=WHERE)
    if source is None:
        return "only safetensors and checkpoints can be read in parts"
    initial = InitialValues(cfg.seed)
    with torch.device("meta"), initial:
        model = build(cfg.model, MODELS, where="model")
    if also := list(getattr(model, "also_pretrained", {})):
        return f"{also[0]} is a second source"
    if buffers := [name for name, _ in model.named_buffers()]:
        return f"the model has buffers, {buffers[:3]}"
    if frozen := [name for name, p in model.named_parameters() if not (p.is_meta and p.requires_grad)]:
        return f"parameters are frozen or cannot be built on meta, {frozen[:3]}"
    plan = plan_load(model, source)
    if plan is None:
        return "its tensors have to be changed to fit the model"
    plan.check(where=f"{WHERE}={path!r}", strict=model.strict_load)
    missing = {name: p for name, p in model.named_parameters() if name not in plan.names}
    if unknown := [name for name, p in missing.items() if not initial.knows(p)]:
        return f"initial values of what it lacks cannot be made alone, {unknown[:3]}"
    drawn = [name for name, p in missing.items() if initial.is_drawn(p)]
    if drawn and cfg.load_sharded is None:
        return (
            f"it lacks {drawn[:3]}, which begin with random numbers that would be others (load_sharded=True loads it in"
            " parts all the same)"
        )
    log_report(f"{WHERE} {path}, in parts", plan.report)
    makers = {name: initial.maker(name, p) for name, p in missing.items()}
    return Unfilled(model, source, plan.names, makers)


def log_peak_memory(runtime: Runtime) -> None:
    """One line with the most host memory that each process has had so far, in GiB. All ranks call it."""
    peaks: list[float] = [0.0] * runtime.world_size
    dist.all_gather_object(peaks, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)  # Linux counts KiB
    logger.info("peak_host_gib %s", " ".join(f"{peak:.2f}" for peak in peaks))
