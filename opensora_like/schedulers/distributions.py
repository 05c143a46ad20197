"""How times are distributed before the shift: each distribution as its quantile function and the inverse of that."""

from __future__ import annotations

import math
from statistics import NormalDist

import torch
from torch import Tensor

MAX_MODE_SCALE = 2 / (math.pi - 2)  # beyond it the map of `mode_time` folds back
NUM_BETA_PANELS = 4096
MIN_BETA = 0.5  # below it the density in the angle of `BetaTimes` has no bound


def mode_time(u: Tensor, scale: float) -> Tensor:
    """Uniform numbers to times with a heavier (scale > 0) or lighter middle. Source: SD3, arXiv:2403.03206, eq. 20."""
    return 1 - u - scale * (torch.cos(math.pi / 2 * u) ** 2 - 1 + u)


class UniformTimes:
    """Every time is as likely."""

    def time_at(self, quantile: Tensor) -> Tensor:
        """The time below which the share `quantile` lies (for "mode": above which)."""
        return quantile

    def quantile_of(self, t: float) -> float:
        """The number that `time_at` maps to `t`."""
        return t


class LogitNormalTimes:
    """The sigmoid of a normal number."""

    def __init__(self, mean: float, std: float) -> None:
        self._mean, self._std = mean, std

    def time_at(self, quantile: Tensor) -> Tensor:
        return torch.sigmoid(self._mean + self._std * torch.special.ndtri(quantile))

    def quantile_of(self, t: float) -> float:
        if t <= 0 or t >= 1:
            return float(t >= 1)
        return NormalDist(self._mean, self._std).cdf(math.log(t / (1 - t)))


class ModeTimes:
    """`mode_time` of a uniform number; it falls from 1 to 0."""

    def __init__(self, scale: float) -> None:
        self._scale = scale

    def time_at(self, quantile: Tensor) -> Tensor:
        return mode_time(quantile, self._scale).clamp(0, 1)

    def quantile_of(self, t: float) -> float:
        low, high = 0.0, 1.0  # there is no closed inverse
        for _ in range(60):
            middle = (low + high) / 2
            too_late = mode_time(torch.tensor(middle, dtype=torch.float64), self._scale).item() > t
            low, high = (middle, high) if too_late else (low, middle)
        return (low + high) / 2


class BetaTimes:
    """Beta(alpha, beta), by a table: t is sin(angle)^2, in which the density is bounded and smooth.

    Args:
        alpha, beta: 0.5 or more; alpha above beta leans to noise.
    """

    def __init__(self, alpha: float, beta: float) -> None:
        angles = torch.linspace(0, math.pi / 2, 2 * NUM_BETA_PANELS + 1, dtype=torch.float64)
        density = torch.sin(angles) ** (2 * alpha - 1) * torch.cos(angles).clamp(min=0) ** (2 * beta - 1)
        panels = density[:-2:2] + 4 * density[1::2] + density[2::2]  # Simpson
        below = torch.cat([torch.zeros(1, dtype=torch.float64), panels.cumsum(0)])
        self._angles, self._below = angles[::2].contiguous(), below / below[-1]

    def time_at(self, quantile: Tensor) -> Tensor:
        below, angles = self._below.to(quantile.device), self._angles.to(quantile.device)
        return torch.sin(_interpolate(quantile, below, angles)) ** 2

    def quantile_of(self, t: float) -> float:
        angle = torch.tensor([math.asin(math.sqrt(min(max(t, 0.0), 1.0)))], dtype=torch.float64)
        return _interpolate(angle, self._angles, self._below).item()


def _interpolate(x: Tensor, knots: Tensor, values: Tensor) -> Tensor:
    """The polygon through (knots, values) at `x`; the knots rise."""
    right = torch.searchsorted(knots, x.contiguous()).clamp(1, len(knots) - 1)
    left = right - 1
    width = (knots[right] - knots[left]).clamp(min=torch.finfo(knots.dtype).tiny)
    share = ((x - knots[left]) / width).clamp(0, 1)
    return values[left] + share * (values[right] - values[left])


Times = UniformTimes | LogitNormalTimes | ModeTimes | BetaTimes
