"""The times at which diffusers samples, for results that are to equal those of a published pipeline."""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from opensora_like.schedulers.flow_matching import shift_time
from opensora_like.schedulers.samplers import Velocity

NUM_TIMESTEPS = 1000


class Grid(NamedTuple):
    """Where a sampler stops.

    Args:
        times: float32 [steps + 1], falling, ends in 0.
        told: float32 [steps]: what the model is told in their place.
    """

    times: Tensor
    told: Tensor

    def tell(self, velocity: Velocity) -> Velocity:
        """`velocity` that hears of `told`."""

        def heard(x: Tensor, t_B: Tensor, step: int) -> Tensor:
            return velocity(x, torch.full_like(t_B, self.told[step].item()), step)

        return heard


def diffusers_grid(num_steps: int, *, sampler: Literal["euler", "unipc"], shift: float) -> Grid:
    """The grid of diffusers' flow scheduler of this sampler, at a constant shift.

    "unipc" leaves out the last thousandth before the shift and tells the model whole thousandths, cut down; "euler"
    shifts the last time before 0 twice.

    Raises:
        ValueError: no steps, or a sampler that diffusers has no such scheduler for.

    Source: diffusers, UniPCMultistepScheduler with use_flow_sigmas, FlowMatchEulerDiscreteScheduler.
    """
    if num_steps < 1:
        raise ValueError(f"num_steps={num_steps!r} must be 1 or more")
    last = torch.tensor(1 / NUM_TIMESTEPS, dtype=torch.float64)
    if sampler == "unipc":
        # numpy's: torch's rounds otherwise, and 334 thousandths would be told as 333 or the other way round
        even = torch.from_numpy(np.linspace(1, last.item(), num_steps + 1)[:-1])
        times = shift_time(even, shift).clamp(max=1 - 1e-6)
        told = (times * NUM_TIMESTEPS).floor() / NUM_TIMESTEPS
    elif sampler == "euler":
        even = torch.linspace(1, shift_time(last, shift).item(), num_steps, dtype=torch.float64)
        times = told = shift_time(even, shift)
    else:
        raise ValueError(f"sampler={sampler!r} has no grid of diffusers; use 'unipc' or 'euler'")
    return Grid(torch.cat([times, torch.zeros(1, dtype=torch.float64)]).float(), told.float())
