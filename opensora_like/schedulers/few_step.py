"""Sampling in a few steps: a jump to the data from each of a few times, and fresh noise up to the next one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor

from opensora_like.schedulers.samplers import Velocity

Noise = Callable[[int], Tensor]  # number of the step that it is added for -> standard normal, like x


class Flow(Protocol):
    """What is needed of a noise schedule; see flow_matching.py."""

    def to_x0(self, x_t: Tensor, v: Tensor, t_B: Tensor) -> Tensor: ...

    def add_noise(self, x0: Tensor, noise: Tensor, t_B: Tensor) -> Tensor: ...

    def shift_t(self, t: Tensor, latent_shape: tuple[int, int, int]) -> Tensor: ...


def check_times(times: Sequence[float], *, where: str) -> None:
    """Refuse times that cannot be walked.

    Raises:
        ValueError: they do not begin at 1, where there is nothing but noise, or do not fall, or reach 0.
    """
    falls = all(a > b for a, b in pairwise(times))
    if not times or times[0] != 1 or not falls or times[-1] <= 0:
        raise ValueError(f"{where}={list(times)!r} must begin at 1.0, fall strictly and stay above 0")


def shifted(times: Sequence[float], flow: Flow, latent_shape: tuple[int, int, int]) -> list[float]:
    """Times after the schedule's shift for latents of (T, H, W): 1, 0.75, 0.5, 0.25 at 5 are 1, 0.9375, 0.8333, 0.625.

    Float32 numbers, so that training and sampling name the same instants.
    """
    return flow.shift_t(torch.tensor(times, dtype=torch.float64), latent_shape).tolist()


def jump(velocity: Velocity, x: Tensor, t: float, step: int, *, flow: Flow) -> Tensor:
    """The data that the velocity at `x` points at. Returns: float32, like `x`."""
    t_B = torch.full((x.shape[0],), t, dtype=torch.float32, device=x.device)
    return flow.to_x0(x.float(), velocity(x, t_B, step), t_B)


def walk(velocity: Velocity, x: Tensor, times: Sequence[float], *, flow: Flow, noise: Noise, first: int = 0) -> Tensor:
    """From `x` at ``times[first]`` to the state at the last of `times`, without jumping from there.

    Returns: float32, like `x`.
    """
    for step in range(first, len(times) - 1):
        x0 = jump(velocity, x, times[step], step, flow=flow)
        t_B = torch.full((x.shape[0],), times[step + 1], dtype=torch.float32, device=x.device)
        x = flow.add_noise(x0, noise(step + 1), t_B)
    return x.float()


@torch.no_grad()
def sample_few_step(velocity: Velocity, x: Tensor, times: Sequence[float], *, flow: Flow, noise: Noise) -> Tensor:
    """Data from noise, in as many evaluations as there are times.

    Args:
        x: noise [B, ...], the state at ``times[0]``, which is 1.
        times: after the shift, falling, as `shifted` makes them.

    Returns: float32, like `x`.

    Source: the backward simulation of DMD2, arXiv:2405.14867, section 4.5, which trains exactly this.
    """
    return jump(velocity, walk(velocity, x, times, flow=flow, noise=noise), times[-1], len(times) - 1, flow=flow)
