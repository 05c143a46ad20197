"""Flow matching: how `t` is drawn, how noise is mixed in, what the network should say, and how each sample counts.

All of it in float32. Times are in [0, 1] and 1 is noise; ``latent_shape`` is always (T, H, W) of the latents.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from opensora_like.registry import SCHEDULERS
from opensora_like.schedulers.distributions import (
    MAX_MODE_SCALE,
    MIN_BETA,
    BetaTimes,
    LogitNormalTimes,
    ModeTimes,
    Times,
    UniformTimes,
)

NUM_WEIGHT_BINS = 1000
VARYING_SHIFTS = ("resolution", "exponential", "root")  # those that depend on the number of tokens
CHOICES = {
    "t_distribution": ("logit_normal", "uniform", "mode", "mix", "lognorm", "beta"),
    "window": ("clamp", "truncate"),
    "weighting": (None, "uniform", "linear", "bsmntw", "sigma_sqrt", "cosmap"),
}
# argument -> (its default, the argument that decides whether it is read, and the values for which it is)
READ_ONLY_WITH = {
    "logit_mean": (0.0, "t_distribution", ("logit_normal",)),
    "logit_std": (1.0, "t_distribution", ("logit_normal",)),
    "mode_scale": (1.29, "t_distribution", ("mode",)),
    "beta_alpha": (2.5, "t_distribution", ("beta",)),
    "beta_beta": (1.5, "t_distribution", ("beta",)),
    "mix_uniform_ratio": (0.0, "t_distribution", ("logit_normal", "lognorm", "mix", "mode", "beta")),
    "base_tokens": (256, "shift", ("resolution", "exponential")),
    "max_tokens": (4096, "shift", VARYING_SHIFTS),
    "base_shift": (1.0, "shift", ("resolution", "exponential")),
    "max_shift": (3.0, "shift", VARYING_SHIFTS),
    "weight_slope": (None, "weighting", ("linear",)),
    "normalize_weight": (False, "weighting", ("linear", "bsmntw", "cosmap")),
}


def shift_time(t: Tensor, alpha: float | Tensor) -> Tensor:
    """Move times towards noise (alpha > 1) or data (alpha < 1); 0 and 1 stay. Source: SD3, arXiv:2403.03206, 5.3.2."""
    return alpha * t / (1 + (alpha - 1) * t)


def linear_shift(num_tokens: float, *, base_tokens: int, max_tokens: int, base_shift: float, max_shift: float) -> float:
    """The line through (base_tokens, base_shift) and (max_tokens, max_shift), not clamped at its ends."""
    slope = (max_shift - base_shift) / (max_tokens - base_tokens)
    return base_shift + slope * (num_tokens - base_tokens)


def bell_weight(t_B: Tensor, num_bins: int = NUM_WEIGHT_BINS) -> Tensor:
    """Weights highest at t = 0.5 and 0 at t = 0, of mean 1 over `num_bins` equal bins ("bsmntw").

    Source: NeMo Automodel's loss_weighting_scheme of this name.
    """
    bins = torch.arange(num_bins, dtype=torch.float64)
    floor = math.exp(-0.5)
    total = (torch.exp(-2 * (bins / num_bins - 0.5) ** 2) - floor).sum().item()
    nearest_bin = (t_B.float() * num_bins).floor().clamp(0, num_bins - 1)
    return (torch.exp(-2 * (nearest_bin / num_bins - 0.5) ** 2) - floor) * (num_bins / total)


def per_sample(t_B: Tensor, like: Tensor) -> Tensor:
    """`t_B` as float32 that broadcasts over `like` [B, ...]."""
    return t_B.float().view(-1, *[1] * (like.ndim - 1))


@SCHEDULERS.register_module("flow_matching")
class FlowMatching:
    """Straight paths from data (t=0) to noise (t=1); the target is the velocity.

    Args:
        t_distribution: of the times before the shift. "lognorm" and "mix" are both the standard logit-normal.
        logit_mean, logit_std: of "logit_normal".
        mode_scale: of "mode", in [-1, 1.7519].
        beta_alpha, beta_beta: of "beta"; 0.5 or more. Qwen-Image-Edit was trained with 2.5 and 1.5, and no shift.
        mix_uniform_ratio: probability, for each sample by itself, that its time is uniform instead.
        shift: None, a constant (Wan 2.1 uses 3 at 480p and 5 at 720p), or one that depends on the number of tokens:
            "resolution": the line from `base_shift` at `base_tokens` to `max_shift` at `max_tokens`, in tokens of
            one latent frame, times the root of the number of latent frames. Source: SD3, arXiv:2403.03206;
            Open-Sora, time_shift.
            "exponential": e to such a line, in tokens of the clip; FLUX has base_shift 0.5 and max_shift 1.15.
            "root": `max_shift` at `max_tokens` (DFM: 3 at 16384), in between with the root of the clip's tokens, but
            not below 1. Source of both: DFM, time_shift.
        patch_size: of the denoiser, in latent cells; what the tokens are counted with. Open-Sora counts H*W//4 in
            training whatever its patch, which is this with 2; at patch 1 its training and its sampling disagree.
        sigma_min: noise left at t=0.
        t_min, t_max: the times after the shift stay within.
        window: "clamp" puts the times outside on the ends; "truncate" draws from the distribution given that the
            time is inside, so no mass gathers at an end (one of two experts trains on a window this way).
        weighting: None or "uniform": 1; "linear": 1 + weight_slope * t; "bsmntw": see `bell_weight`; of SD3
            (arXiv:2403.03206, section 3.1) "sigma_sqrt": 1 / t^2, at most 10^6, and "cosmap": 2 / (pi (1 - 2t + 2t^2)).
        weight_slope: None is the shift, which then has to be a number.
        normalize_weight: divide by the mean weight under the distribution of `t`, so that the learning rate
            means the same with and without weighting; needs a shift that is the same for all clips.

    Raises:
        ValueError: a number out of range, or a setting that the others make meaningless.
    """

    def __init__(
        self,
        *,
        t_distribution: Literal["logit_normal", "uniform", "mode", "mix", "lognorm", "beta"] = "logit_normal",
        logit_mean: float = 0.0,
        logit_std: float = 1.0,
        mode_scale: float = 1.29,
        beta_alpha: float = 2.5,
        beta_beta: float = 1.5,
        mix_uniform_ratio: float = 0.0,
        shift: float | Literal["resolution", "exponential", "root"] | None = None,
        base_tokens: int = 256,
        max_tokens: int = 4096,
        base_shift: float = 1.0,
        max_shift: float = 3.0,
        patch_size: int = 2,
        sigma_min: float = 1e-5,
        t_min: float = 0.0,
        t_max: float = 1.0,
        window: Literal["clamp", "truncate"] = "clamp",
        weighting: Literal["uniform", "linear", "bsmntw", "sigma_sqrt", "cosmap"] | None = None,
        weight_slope: float | None = None,
        normalize_weight: bool = False,
    ) -> None:
        self.t_distribution, self.mode_scale, self.mix_uniform_ratio = t_distribution, mode_scale, mix_uniform_ratio
        self.logit_mean, self.logit_std = logit_mean, logit_std
        self.beta_alpha, self.beta_beta = beta_alpha, beta_beta
        self.shift, self.patch_size, self.sigma_min = shift, patch_size, sigma_min
        self.base_tokens, self.max_tokens = base_tokens, max_tokens
        self.base_shift, self.max_shift = base_shift, max_shift
        self.t_min, self.t_max, self.window = t_min, t_max, window
        self.weighting, self.weight_slope, self.normalize_weight = weighting, weight_slope, normalize_weight
        self._check_ranges()
        self._check_all_are_read()
        self._times = self._distribution()
        self._weight_scale = 1 / self._mean_weight() if normalize_weight else 1.0

    def _check_ranges(self) -> None:
        for name, known in CHOICES.items():
            if getattr(self, name) not in known:
                raise ValueError(f"scheduler.{name}={getattr(self, name)!r} is unknown; use one of {list(known)}")
        constant_shift = isinstance(self.shift, (int, float))
        if self.shift not in (None, *VARYING_SHIFTS) and not (constant_shift and self.shift > 0):
            raise ValueError(f"scheduler.shift={self.shift!r} must be above 0, one of {list(VARYING_SHIFTS)}, or None")
        has_slope = constant_shift or self.weight_slope is not None
        for name, is_right, needed in (
            ("logit_std", self.logit_std > 0, "above 0"),
            ("mode_scale", -1 <= self.mode_scale <= MAX_MODE_SCALE, f"in [-1, {MAX_MODE_SCALE:.4f}]"),
            ("mix_uniform_ratio", 0 <= self.mix_uniform_ratio <= 1, "in [0, 1]"),
            ("base_tokens", self.base_tokens < self.max_tokens, f"below max_tokens={self.max_tokens!r}"),
            ("patch_size", self.patch_size >= 1, "1 or more"),
            ("sigma_min", 0 <= self.sigma_min < 1, "in [0, 1)"),
            ("t_min", 0 <= self.t_min < self.t_max, f"0 or more and below t_max={self.t_max!r}"),
            ("t_max", self.t_max <= 1, "1 or less"),
            ("beta_alpha", self.beta_alpha >= MIN_BETA, f"{MIN_BETA} or more"),
            ("beta_beta", self.beta_beta >= MIN_BETA, f"{MIN_BETA} or more"),
            ("weighting", self.weighting != "linear" or has_slope, "'bsmntw' unless shift or weight_slope is a number"),
            ("weight_slope", self.weight_slope is None or self.weight_slope > -1, "above -1"),
            (
                "normalize_weight",
                not self.normalize_weight or self.shift not in VARYING_SHIFTS,
                "False where shift varies",
            ),
        ):
            if not is_right:
                raise ValueError(f"scheduler.{name}={getattr(self, name)!r} must be {needed}")

    def _check_all_are_read(self) -> None:
        for name, (default, decider, values) in READ_ONLY_WITH.items():
            given, decided = getattr(self, name), getattr(self, decider)
            if given != default and decided not in values:
                raise ValueError(
                    f"scheduler.{name}={given!r} is not read with {decider}={decided!r}, only with {list(values)}; "
                    f"remove it or change {decider}"
                )

    def _distribution(self) -> Times:
        if self.t_distribution == "uniform":
            return UniformTimes()
        if self.t_distribution == "mode":
            return ModeTimes(self.mode_scale)
        if self.t_distribution == "beta":
            return BetaTimes(self.beta_alpha, self.beta_beta)
        # "lognorm" and "mix" have mean 0 and deviation 1: `_check_all_are_read` keeps the defaults
        return LogitNormalTimes(self.logit_mean, self.logit_std)

    def alpha(self, latent_shape: tuple[int, int, int]) -> float:
        """The shift for latents of this shape; 1.0 where none is set."""
        if self.shift is None:
            return 1.0
        if self.shift not in VARYING_SHIFTS:
            return float(self.shift)
        num_frames, height, width = latent_shape
        tokens_of_frame = height * width // self.patch_size**2
        if self.shift == "root":
            return max(1.0, self.max_shift * math.sqrt(tokens_of_frame * num_frames / self.max_tokens))
        line = linear_shift(
            tokens_of_frame * (num_frames if self.shift == "exponential" else 1),
            base_tokens=self.base_tokens,
            max_tokens=self.max_tokens,
            base_shift=self.base_shift,
            max_shift=self.max_shift,
        )
        if self.shift == "exponential":
            return math.exp(line)
        if line <= 0:
            raise ValueError(
                f"scheduler.base_shift={self.base_shift!r}, max_shift={self.max_shift!r}: the line is {line:.3f} at "
                f"latents of {height}x{width}, but a shift must be above 0; lower max_shift or base_tokens"
            )
        return line * math.sqrt(num_frames)

    def shift_t(self, t: Tensor, latent_shape: tuple[int, int, int]) -> Tensor:
        """Times after the shift, float32, same shape as `t`. The window is not applied."""
        return shift_time(t.float(), self.alpha(latent_shape))

    def draw_t(self, generators: Sequence[torch.Generator], latent_shape: tuple[int, int, int]) -> Tensor:
        """Draw one time per sample.

        Args:
            generators: one per sample, all on one device; a sample's time depends on its own alone.

        Returns: float32 [B] in [t_min, t_max], on the device of the generators.
        """
        draws = [torch.rand(2, generator=g, device=g.device, dtype=torch.float64) for g in generators]
        gate_B, quantile_B = torch.stack(draws).unbind(1)
        return self.t_from_base(gate_B, quantile_B, latent_shape)

    def t_from_base(self, gate_B: Tensor, quantile_B: Tensor, latent_shape: tuple[int, int, int]) -> Tensor:
        """Times from uniform numbers; `draw_t` without the randomness.

        Args:
            gate_B: in [0, 1): below `mix_uniform_ratio` the sample's time is uniform.
            quantile_B: in [0, 1]: of the distribution; in float64, since float32 would coarsen the tails.

        Returns: float32 [B].
        """
        alpha = self.alpha(latent_shape)
        t = self._in_window(quantile_B.double(), alpha, self._times)
        if self.mix_uniform_ratio > 0:
            uniform = self._in_window(quantile_B.double(), alpha, UniformTimes())
            t = torch.where(gate_B < self.mix_uniform_ratio, uniform, t)
        return shift_time(t, alpha).float().clamp(self.t_min, self.t_max)

    def _in_window(self, quantile: Tensor, alpha: float, times: Times) -> Tensor:
        """Times before the shift; with "truncate" of a part of the distribution that falls inside [t_min, t_max]."""
        if self.window == "clamp":
            return times.time_at(quantile)
        unshifted = [end / (alpha - (alpha - 1) * end) for end in (self.t_min, self.t_max)]
        ends = sorted(times.quantile_of(t) for t in unshifted)
        return times.time_at(ends[0] + (ends[1] - ends[0]) * quantile)

    def add_noise(self, x0: Tensor, noise: Tensor, t_B: Tensor) -> Tensor:
        """Mix in float32, whatever `x0` is: bfloat16 keeps 8 bits of `t` and would round it.

        Args:
            x0, noise: [B, ...], same shape.

        Returns: float32 [B, ...]: ``(1 - t) x0 + (sigma_min + (1 - sigma_min) t) noise``; at t=1 it is the noise.
        """
        t = per_sample(t_B, x0)
        return (1 - t) * x0.float() + (1 - (1 - self.sigma_min) * (1 - t)) * noise.float()

    def target(self, x0: Tensor, noise: Tensor) -> Tensor:
        """The velocity, d x_t / d t, the same at every t. Returns: float32, shape of `x0`."""
        return (1 - self.sigma_min) * noise.float() - x0.float()

    def to_x0(self, x_t: Tensor, v: Tensor, t_B: Tensor) -> Tensor:
        """The data that a velocity points at: the inverse of `add_noise` and `target`. Returns: float32."""
        t = per_sample(t_B, x_t)
        return (1 - self.sigma_min) * x_t.float() - (1 - (1 - self.sigma_min) * (1 - t)) * v.float()

    def weight(self, t_B: Tensor) -> Tensor:
        """What each sample's loss is multiplied with. Returns: float32 [B]."""
        if self.weighting in (None, "uniform"):
            return torch.ones_like(t_B, dtype=torch.float32)
        if self.weighting == "bsmntw":
            return bell_weight(t_B) * self._weight_scale
        if self.weighting == "sigma_sqrt":
            return t_B.float().clamp(min=1 / NUM_WEIGHT_BINS) ** -2
        if self.weighting == "cosmap":
            t = t_B.float()
            return 2 / (math.pi * (1 - 2 * t + 2 * t * t)) * self._weight_scale
        slope = self.shift if self.weight_slope is None else self.weight_slope
        return (1 + float(slope) * t_B.float()) * self._weight_scale

    def _mean_weight(self) -> float:
        """The mean of `weight` over the distribution of `t`, by the midpoint rule."""
        self._weight_scale = 1.0
        quantile = (torch.arange(1 << 14, dtype=torch.float64) + 0.5) / (1 << 14)
        mean = 0.0
        for gate, share in ((0.0, self.mix_uniform_ratio), (1.0, 1 - self.mix_uniform_ratio)):
            t = self.t_from_base(torch.full_like(quantile, gate), quantile, (1, 1, 1))
            mean += share * self.weight(t).double().mean().item()
        return mean

    def times(self, num_steps: int, latent_shape: tuple[int, int, int]) -> Tensor:
        """Times to sample at: `num_steps` + 1 of them, from 1 to 0, shifted. Returns: float32, on the CPU."""
        if num_steps < 1:
            raise ValueError(f"num_steps={num_steps!r} must be 1 or more")
        return self.shift_t(torch.linspace(1, 0, num_steps + 1), latent_shape)
