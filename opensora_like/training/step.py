"""One forward of flow matching: a batch in, a float32 loss out."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

import torch
from torch import Tensor

from opensora_like import rng
from opensora_like.conditioning.encode import Encode, Inputs
from opensora_like.datasets.batch import Batch
from opensora_like.training.errors import ErrorOptions, sample_errors


class Scheduler(Protocol):
    """What the step needs of a noise schedule; see schedulers/flow_matching.py."""

    def draw_t(self, generators: list[torch.Generator], latent_shape: tuple[int, int, int]) -> Tensor: ...

    def add_noise(self, x0: Tensor, noise: Tensor, t_B: Tensor) -> Tensor: ...

    def target(self, x0: Tensor, noise: Tensor) -> Tensor: ...

    def weight(self, t_B: Tensor) -> Tensor: ...


class FlowMatchingStep:
    """Velocity regression at a drawn time, for text-to-video and for given frames alike.

    Args:
        model: called as ``model(x_BCTHW, t_B, conditions)``; the booster's wrapped denoiser.
        dtype: of the inputs at the model's door; t stays float32.
        errors: what a sample's error is made of.
        dropout: the model draws from torch's own generator, which is then seeded for every micro-batch.
        around_forward: makes what the forward runs in, such as `offload.ActivationOffload`.
    """

    def __init__(
        self,
        model: Callable[[Tensor, Tensor, dict[str, Tensor]], Tensor],
        encode: Encode,
        scheduler: Scheduler,
        *,
        seed: int,
        dtype: torch.dtype,
        errors: ErrorOptions = ErrorOptions(),
        dropout: bool = False,
        around_forward: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        self.model, self.encode, self.scheduler = model, encode, scheduler
        self._seed, self._dtype, self._options, self._dropout = seed, dtype, errors, dropout
        self._around_forward = around_forward

    def __call__(self, batch: Batch) -> Tensor:
        """Mean loss of the micro-batch. Returns: float32 scalar."""
        inputs = self.encode(batch)
        x0 = inputs.x0_BCTHW
        times = [rng.generator(self._seed, "t", batch.epoch, row) for row in batch.rows]
        t_B = self.scheduler.draw_t(times, tuple(x0.shape[2:])).to(x0.device, non_blocking=True)
        noise = draw_noise(x0.shape, self._seed, batch.epoch, batch.rows, device=x0.device)
        if self._dropout:  # or what is dropped would depend on where the run was resumed
            torch.manual_seed(rng.seed_of(self._seed, "dropout", batch.epoch, *batch.rows))
        with self._around_forward():
            return (self.errors(inputs, noise, t_B) * self.scheduler.weight(t_B)).mean()

    def errors(self, inputs: Inputs, noise: Tensor, t_B: Tensor) -> Tensor:
        """Mean squared error of each sample's velocity at a given noise and time. Returns: float32 [B]."""
        x_t = self.scheduler.add_noise(inputs.x0_BCTHW, noise, t_B)
        conditions = {k: v.to(self._dtype) for k, v in inputs.conditions.items()}
        prediction = self.model(x_t.to(self._dtype), t_B, conditions)
        target = self.scheduler.target(inputs.x0_BCTHW, noise)
        return sample_errors(prediction, target, inputs.given_BT, self._options)


def draw_noise(
    shape: torch.Size, seed: int, epoch: int, rows: list[int], *, device: torch.device, purpose: str = "noise"
) -> Tensor:
    """Standard normal noise of each sample from its own counter. Returns: float32 of `shape`, on `device`."""
    noise = torch.empty(shape, device=device)
    for place, row in zip(noise, rows, strict=True):
        generator = rng.generator(seed, purpose, epoch, row, device=device)
        torch.randn(place.shape, generator=generator, device=device, out=place)
    return noise
