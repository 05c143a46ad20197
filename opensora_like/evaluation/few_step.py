"""Samples with a distilled model: the settings it takes, and the noise that its steps add."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor

from opensora_like.schedulers.few_step import Flow, check_times, sample_few_step, shifted
from opensora_like.schedulers.samplers import Velocity
from opensora_like.settings import InferenceConfig

SAMPLER = "few_step"


def check_few_step(cfg: InferenceConfig) -> None:
    """Refuse settings that a distilled model is not sampled with, and times that nothing reads.

    Raises:
        ValueError: `few_step_times` without the sampler or the other way round, guidance, or another number of steps.
    """
    times = cfg.few_step_times
    if cfg.sampler != SAMPLER:
        if times is not None:
            raise ValueError(f"few_step_times={times!r} is read with sampler='few_step' only, not {cfg.sampler!r}")
        return
    if times is None:
        raise ValueError("sampler='few_step' needs few_step_times, the distill.times of the training")
    check_times(times, where="few_step_times")
    other = (cfg.other_expert or {}).get("guidance")
    for name, value, wanted in (
        ("num_steps", cfg.num_steps, len(times)),
        ("guidance", cfg.guidance, 1.0),
        ("other_expert.guidance", 1.0 if other is None else other, 1.0),
        ("time_grid", cfg.time_grid, "even"),
    ):
        if value != wanted:
            raise ValueError(
                f"{name}={value!r} with sampler='few_step' and {len(times)} few_step_times; a distilled model has its "
                f"guidance and its times from training: set {name}={wanted!r}"
            )
    if cfg.cond_type != "t2v" and cfg.guidance_img != 1:
        raise ValueError(f"guidance_img={cfg.guidance_img!r} with sampler='few_step': set guidance_img=1.0")


def step_noises(cfg: InferenceConfig, draw: Callable[[str], Tensor]) -> dict[str, Tensor]:
    """What the steps after the first add, by their number; {} for other samplers. Args: draw: purpose -> noise."""
    times = cfg.few_step_times or []
    return {str(step): draw(f"renoise {step}") for step in range(1, len(times))}


def denoise(velocity: Velocity, noises: Mapping[str, Tensor], cfg: InferenceConfig, flow: Flow) -> Tensor:
    """Latents from noise. Args: noises: "x", the beginning, and those of `step_noises`."""
    assert cfg.few_step_times is not None
    x = noises["x"]
    times = shifted(cfg.few_step_times, flow, tuple(x.shape[2:]))
    return sample_few_step(velocity, x, times, flow=flow, noise=lambda step: noises[str(step)])
