"""A second denoiser that makes a part of the times, as the low-noise expert of Wan 2.2 does."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from opensora_like.boosters.sequence_parallel import SequenceGroup
from opensora_like.evaluation.placement import in_use
from opensora_like.evaluation.shared_video import cut_sequence
from opensora_like.models.base import Denoiser
from opensora_like.registry import fit_arguments
from opensora_like.schedulers.samplers import Guidance, Velocity
from opensora_like.settings import InferenceConfig

ROUNDING = 1e-6  # of times in float32: 0.9 is not below a boundary of 0.9


@dataclass(frozen=True)
class ExpertSettings:
    """The section `other_expert`.

    Args:
        noise: which part of the times it makes.
        boundary: the time at which it changes, in (0, 1); the high-noise expert makes the step at the boundary itself.
        from_pretrained, ckpt_path: its weights, as `model.from_pretrained` and, over it, `ckpt_path` of the config.
        use_ema, lora_checkpoint, lora_scale: as those of the config, for this expert.
        guidance: its text guidance scale; None takes that of the config.
    """

    boundary: float
    noise: Literal["low", "high"] = "low"
    from_pretrained: str | None = None
    ckpt_path: str | None = None
    use_ema: bool = True
    lora_checkpoint: str | None = None
    lora_scale: float = 1.0
    guidance: float | None = None

    @property
    def source(self) -> str:
        """Where its weights are."""
        return str(self.ckpt_path or self.from_pretrained)

    def makes(self, t: float) -> bool:
        """Whether the step that begins at `t` is this expert's."""
        return (t < self.boundary - ROUNDING) == (self.noise == "low")


@dataclass(frozen=True)
class Expert:
    """The other denoiser, loaded."""

    settings: ExpertSettings
    model: Denoiser

    def guidance(self, own: Guidance) -> Guidance:
        """The scales with which it is asked; `own` are the config's."""
        text = self.settings.guidance
        return own if text is None else dataclasses.replace(own, text=text)


def read_expert(cfg: InferenceConfig) -> ExpertSettings | None:
    """The section `other_expert`, checked; None where there is none.

    Raises:
        ValueError: an unknown or missing key, a boundary outside (0, 1), or not one source of weights.
    """
    if cfg.other_expert is None:
        return None
    section = {"type": "other_expert", **cfg.other_expert}
    settings = ExpertSettings(**fit_arguments(ExpertSettings, section, where="other_expert"))
    if not 0 < settings.boundary < 1:
        raise ValueError(f"other_expert.boundary={settings.boundary} must be between 0 and 1; Wan 2.2 has 0.875 or 0.9")
    if settings.from_pretrained is None and settings.ckpt_path is None:
        raise ValueError("other_expert has no weights; give other_expert.from_pretrained or other_expert.ckpt_path")
    return settings


def load_expert(
    cfg: InferenceConfig,
    device: torch.device,
    load: Callable[[InferenceConfig], Denoiser],
    *,
    sequence: SequenceGroup | None,
) -> Expert | None:
    """The other expert with its weights, of the sizes of `cfg.model`; None where the config has none.

    Args:
        load: makes a denoiser of a config.

    Raises: as `read_expert` and `load`.
    """
    settings = read_expert(cfg)
    if settings is None:
        return None
    own = {
        "model": {**cfg.model, "from_pretrained": settings.from_pretrained},
        "ckpt_path": settings.ckpt_path,
        "use_ema": settings.use_ema,
        "lora_checkpoint": settings.lora_checkpoint,
        "lora_scale": settings.lora_scale,
    }
    model = load(dataclasses.replace(cfg, **own)).to("cpu" if cfg.offload else device)
    if sequence is not None:
        cut_sequence(model, sequence)
    return Expert(settings, model)


Switch = Callable[[Velocity, Callable[[Expert], Velocity]], Velocity]


@contextmanager
def taking_turns(own: nn.Module, other: Expert | None, device: torch.device, *, offload: bool) -> Iterator[Switch]:
    """While a video is denoised: with `offload`, the one that is asked is on `device` and the other on the CPU.

    Yields: (velocity of `own`, what makes that of the other) -> a velocity that asks whose time it is.
    """
    if other is None:
        with in_use(own, device, offload=offload):
            yield lambda velocity, of_other: velocity
        return
    models = (own, other.model)

    def switch(own_velocity: Velocity, of_other: Callable[[Expert], Velocity]) -> Velocity:
        velocities = (own_velocity, of_other(other))

        def velocity(x: Tensor, t_B: Tensor, step: int) -> Tensor:
            asked = int(other.settings.makes(float(t_B[0])))  # one number to the host per step, which takes seconds
            if offload:
                models[1 - asked].to("cpu")
                models[asked].to(device)
            return velocities[asked](x, t_B, step)

        return velocity

    try:
        yield switch
    finally:
        if offload:
            for model in models:
                model.to("cpu")
