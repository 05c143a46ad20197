"""The optimizer, and the learning rate as a function of the step."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from opensora_like.boosters.base import OptimizerFactory
from opensora_like.boosters.colossalai_import import import_colossalai
from opensora_like.settings import Optim, RunConfig
from opensora_like.training.trainable import group_by_scale


def optimizer_factory(
    optim: Mapping[str, Any], *, device: torch.device, lr_scales: Sequence[float] = ()
) -> OptimizerFactory:
    """What makes the optimizer once the booster knows its parameters.

    Args:
        optim: the config section `optim`, complete.
        lr_scales: of the trainable parameters, in their order; as `trainable.lr_scales_of` gives them.

    Raises:
        ValueError: an optimizer that this device cannot run.
    """
    kind, lr, weight_decay = optim["type"], optim["lr"], optim["weight_decay"]
    if kind == "HybridAdam" and device.type != "cuda":
        raise ValueError("optim.type='HybridAdam' needs a GPU (it compiles CUDA kernels); use --optim.type AdamW")
    if kind != "SGD" and optim["momentum"]:
        raise ValueError(f"optim.momentum={optim['momentum']} is SGD's; {kind} has betas")
    for name, default in (("betas", Optim.betas), ("eps", Optim.eps)) if kind == "SGD" else ():
        if optim.get(name, default) != default:
            raise ValueError(f"optim.{name}={optim[name]!r} is Adam's; SGD has none: set it to {default!r}")

    def make(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        parameters = group_by_scale(parameters, lr_scales)
        if kind == "SGD":
            return torch.optim.SGD(parameters, lr=lr, momentum=optim["momentum"], weight_decay=weight_decay)
        settings = {"lr": lr, "betas": tuple(optim["betas"]), "eps": optim["eps"], "weight_decay": weight_decay}
        if kind == "HybridAdam":
            return hybrid_adam()(parameters, adamw_mode=True, **settings)
        return torch.optim.AdamW(parameters, **settings)

    return make


def hybrid_adam() -> type[torch.optim.Optimizer]:
    """ColossalAI's; with any booster it needs what `import_colossalai` puts in place of packages that are not there."""
    import_colossalai("optim.type='HybridAdam'", "--optim.type AdamW")
    from colossalai.nn.optimizer import HybridAdam

    return HybridAdam


@dataclass(frozen=True)
class Rates:
    """The learning rate and the weight decay as functions of the step; nothing of them is saved.

    Args:
        lr: of `optim`, reached at the end of the warm-up.
        schedule: after the warm-up: "constant"; "linear", "cosine" and "wsd" fall to `min_lr` at `decay_steps`, "wsd"
            (warm-up, stable, decay) only in its last `wsd_decay_steps`, along `wsd_decay`; "inverse_sqrt" is
            ``lr * sqrt(warmup_steps / step)``, but not below `min_lr`.
        warmup_lr: of the first update; None: the first of `warmup_steps` + 1 even parts of `lr`.
        decay_steps: update from which on the rate is `min_lr`; None: never.
        weight_decay: (first, last, updates, "linear" or "cosine"), or None where it stays as it is.

    Source: the formulas and the counting of steps, from 0, of Megatron-LM's OptimizerParamScheduler, which NeMo
    Automodel shares; there lr_decay_style, init_lr, wsd_decay_steps, lr_wsd_decay_style, wd_incr_style.
    """

    lr: float
    schedule: str = "constant"
    warmup_steps: int = 0
    warmup_lr: float | None = None
    min_lr: float = 0.0
    decay_steps: int | None = None
    wsd_decay_steps: int = 0
    wsd_decay: str = "linear"
    weight_decay: tuple[float, float, int, str] | None = None

    def lr_factor(self, step: int) -> float:
        """What `lr` is multiplied with in update number `step`, from 0."""
        if step < self.warmup_steps:
            if self.warmup_lr is None:
                return (step + 1) / (self.warmup_steps + 1)
            low = self.warmup_lr / self.lr
            return low + (1 - low) * step / self.warmup_steps
        floor = self.min_lr / self.lr
        if self.schedule == "constant":
            return 1.0
        if self.decay_steps is not None and step > self.decay_steps:
            return floor
        if self.schedule == "inverse_sqrt":
            return max(floor, math.sqrt(max(1, self.warmup_steps) / max(1, step)))
        return floor + (1 - floor) * self._left(step)

    def _left(self, step: int) -> float:
        """1 where the decay begins, 0 at `decay_steps`."""
        assert self.decay_steps is not None
        begin, style = self.warmup_steps, self.schedule
        if self.schedule == "wsd":
            begin, style = self.decay_steps - self.wsd_decay_steps, self.wsd_decay
        done = min(1.0, max(0, step - begin) / max(1, self.decay_steps - begin))
        return FALLING[style](done)

    def weight_decay_at(self, step: int) -> float | None:
        """The weight decay of update number `step`; None where the optimizer's own stays."""
        if self.weight_decay is None:
            return None
        first, last, num_steps, style = self.weight_decay
        return last + (first - last) * FALLING[style](min(1.0, step / num_steps))

    def set_on(self, groups: Iterable[dict[str, Any]], step: int) -> None:
        """Write both into the optimizer's groups, which know their ``base_lr``."""
        factor, weight_decay = self.lr_factor(step), self.weight_decay_at(step)
        for group in groups:
            group["lr"] = group["base_lr"] * factor
            if weight_decay is not None:
                group["weight_decay"] = weight_decay


# how much is left of a fall, of which the share `done` is done
FALLING: dict[str, Callable[[float], float]] = {
    "linear": lambda done: 1 - done,
    "cosine": lambda done: 0.5 * (1 + math.cos(math.pi * done)),
    "exponential": lambda done: 2 * 0.5**done - 1,
    "minus_sqrt": lambda done: 1 - math.sqrt(done),
}


def build_rates(cfg: RunConfig, *, total_steps: int | None) -> Rates:
    """The rates of a run.

    Args:
        total_steps: updates of the run; None where they are not known.

    Raises:
        ValueError: numbers that cannot be, settings that would be ignored, or an end that is not known.
    """
    _check_read(cfg)
    end = cfg.lr_decay_steps or total_steps
    name, lr = cfg.lr_schedule, cfg.optim["lr"]
    if lr <= 0:
        raise ValueError(f"optim.lr={lr} must be above 0; parts of the model are frozen with trainable_modules")
    if end is None and (name in ("linear", "cosine", "wsd") or 0 < cfg.warmup_steps < 1 or _lacks_decay_steps(cfg)):
        raise ValueError(
            f"lr_schedule={name!r}, warmup_steps={cfg.warmup_steps}, weight_decay_end={cfg.weight_decay_end} need the "
            "number of steps, which keep probabilities below 1 and buckets with fewer clips than a batch leave open; "
            "set --steps"
        )
    warmup_steps = _warmup_steps(cfg.warmup_steps, end)
    wsd_decay_steps = 0
    if name == "wsd":
        wsd_decay_steps = cfg.wsd_decay_steps if cfg.wsd_decay_steps is not None else max(1, end // 10)
    if name != "constant" and end is not None and warmup_steps + wsd_decay_steps > end:
        raise ValueError(
            f"warmup_steps={warmup_steps} and wsd_decay_steps={wsd_decay_steps} do not fit into the {end} steps after "
            f"which lr_schedule={name!r} is at its end; lower them, or raise lr_decay_steps or steps"
        )
    if max(cfg.min_lr, cfg.warmup_lr or 0.0) > lr or min(cfg.min_lr, cfg.warmup_lr or 0.0) < 0:
        raise ValueError(f"min_lr={cfg.min_lr} and warmup_lr={cfg.warmup_lr} must be from 0 to optim.lr={lr}")
    weight_decay = None
    if cfg.weight_decay_end is not None:
        if cfg.weight_decay_end < 0:
            raise ValueError(f"weight_decay_end={cfg.weight_decay_end} must be 0 or more")
        num_steps = cfg.weight_decay_steps or end
        weight_decay = (cfg.optim["weight_decay"], cfg.weight_decay_end, num_steps, cfg.weight_decay_schedule)
    return Rates(
        lr=lr,
        schedule=name,
        warmup_steps=warmup_steps,
        warmup_lr=cfg.warmup_lr,
        min_lr=cfg.min_lr,
        decay_steps=end if name != "inverse_sqrt" else cfg.lr_decay_steps,
        wsd_decay_steps=wsd_decay_steps,
        wsd_decay=cfg.wsd_decay,
        weight_decay=weight_decay,
    )


def _warmup_steps(given: float, end: int | None) -> int:
    if given < 0 or (given >= 1 and given != int(given)):
        raise ValueError(f"warmup_steps={given} must be a number of updates, or a share of them below 1")
    return int(given * end) if 0 < given < 1 and end is not None else int(given)


def _lacks_decay_steps(cfg: RunConfig) -> bool:
    return cfg.weight_decay_end is not None and cfg.weight_decay_steps is None


def _check_read(cfg: RunConfig) -> None:
    """Refuse settings that nothing reads."""
    fields = {f.name: f.default for f in dataclasses.fields(cfg)}
    decays, is_wsd = cfg.lr_schedule != "constant", cfg.lr_schedule == "wsd"
    for name, is_read, remedy in (
        ("min_lr", decays, "set lr_schedule"),
        ("lr_decay_steps", decays, "set lr_schedule"),
        ("wsd_decay_steps", is_wsd, "set lr_schedule='wsd'"),
        ("wsd_decay", is_wsd, "set lr_schedule='wsd'"),
        ("warmup_lr", cfg.warmup_steps > 0, "set warmup_steps"),
        ("weight_decay_steps", cfg.weight_decay_end is not None, "set weight_decay_end"),
        ("weight_decay_schedule", cfg.weight_decay_end is not None, "set weight_decay_end"),
    ):
        value = getattr(cfg, name)
        if value != fields[name] and not is_read:
            raise ValueError(f"{name}={value!r} is not read with these settings; {remedy}, or remove it")
        if name.endswith("_steps") and value is not None and value < 1:
            raise ValueError(f"{name}={value!r} must be 1 or more")
