"""Distribution matching distillation: a generator of few steps learns from a teacher's score and that of a critic.

Source: DMD2, arXiv:2405.14867; the choices of VideoX-Fun's train_distill, without its GAN or regression loss, which it
has not either.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from opensora_like import rng
from opensora_like.boosters.pair import CRITIC, GENERATOR
from opensora_like.conditioning.encode import Encode
from opensora_like.datasets.batch import Batch
from opensora_like.schedulers.few_step import Flow, jump, shifted, walk
from opensora_like.schedulers.samplers import guided
from opensora_like.settings import Distill
from opensora_like.training.errors import ErrorOptions, sample_errors
from opensora_like.training.step import Scheduler, draw_noise

Conditions = Mapping[str, Tensor]
Network = Callable[[Tensor, Tensor, Conditions], Tensor]  # (x [B, C, T, H, W], t_B, conditions) -> velocity
ROUNDING = 1e-6  # of times in float32: 0.9 is not below a boundary of 0.9
LEAST_DISTANCE = 1e-8  # a sample that is where the teacher wants it has a gradient of 0, not 0 / 0


class DistillScheduler(Scheduler, Flow, Protocol):
    """What distillation needs of a noise schedule."""


def turn_of(step: int, interval: int) -> str:
    """Whose update number `step` (from 0) is: the generator's, then `interval` of the critic's, and again."""
    return GENERATOR if step % (interval + 1) == 0 else CRITIC


def updates_of_generator(step: int, interval: int) -> int | None:
    """How many updates the generator has had after `step` updates in all; None where the last one was the critic's."""
    return (step - 1) // (interval + 1) + 1 if turn_of(step - 1, interval) == GENERATOR else None


def exit_of(step: int, num_steps: int, *, seed: int) -> int:
    """At which of `num_steps` evaluations all samples of update `step` leave their walk; the same on every rank."""
    return int(rng.numpy_generator(seed, "distill exit", step).integers(num_steps))


def score_gradient(x0: Tensor, fake: Tensor, real: Tensor) -> Tensor:
    """What leads generated data towards the teacher: (fake - real), by the mean distance from `real` of each sample.

    Args:
        x0, fake, real: [B, ...]: the data, and what the critic and the teacher make of it after noise.

    Returns: float32 [B, ...], without gradient.

    Source: DMD, arXiv:2311.18828, equations 7 and 8.
    """
    x0, fake, real = x0.detach().float(), fake.detach().float(), real.detach().float()
    distance = (x0 - real).abs().mean(dim=tuple(range(1, x0.ndim)), keepdim=True)
    return (fake - real) / distance.clamp_min(LEAST_DISTANCE)


def matching_loss(x0: Tensor, gradient: Tensor) -> Tensor:
    """A loss whose gradient by `x0` is `gradient` divided by the number of its elements. Returns: float64 scalar."""
    x0 = x0.double()
    return 0.5 * (x0 - (x0 - gradient.double()).detach()).square().mean()


def score(
    network: Network, x_t: Tensor, t_B: Tensor, conditions: Conditions, null: Conditions, *, scale: float, flow: Flow
) -> Tensor:
    """The data that a network sees behind `x_t`, guided by text. Returns: float32, like `x_t`.

    Args:
        null: conditions in place of those of the captions, for the other branch.
        scale: of guidance; at 0 and 1 the other branch is not run.
    """
    v = network(x_t, t_B, conditions)
    if scale not in (0.0, 1.0):
        v = guided(v, network(x_t, t_B, {**conditions, **null}), scale)
    return flow.to_x0(x_t, v, t_B)


@dataclass(frozen=True)
class Networks:
    """Who takes part, each called as ``network(x, t_B, conditions)`` with float32 latents and its answer float32.

    Args:
        real: the teacher, which is never trained.
        before: makes the steps before the generator's from noise; None where the generator makes all.
    """

    generator: Network
    critic: Network
    real: Network
    before: Network | None = None


class DistillStep:
    """A loss of the generator or of the critic, by whose turn it is. Clips give shapes and conditions alone.

    Args:
        null: conditions of the negative prompt, each [1, ...].
        seed: of every draw: noise and times of a sample come from (epoch, row), the exit from the step.
        errors: what the critic's error is made of.
        around_forward: makes what forwards that keep a graph run in.
    """

    def __init__(
        self,
        networks: Networks,
        encode: Encode,
        scheduler: DistillScheduler,
        *,
        settings: Distill,
        null: Conditions,
        seed: int,
        dtype: torch.dtype,
        errors: ErrorOptions = ErrorOptions(),
        around_forward: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        self.networks, self.encode, self.scheduler, self.settings = networks, encode, scheduler, settings
        self._null, self._seed, self._dtype, self._around_forward = null, seed, dtype, around_forward
        self._errors, self._step, self._role = errors, 0, GENERATOR

    def take_turn(self, step: int) -> str:
        """What follows is of update `step`, from 0. Returns: whose it is."""
        self._step, self._role = step, turn_of(step, self.settings.gen_update_interval)
        return self._role

    def __call__(self, batch: Batch) -> Tensor:
        """Mean loss of the micro-batch. Returns: float32 scalar."""
        inputs = self.encode(batch)
        draws = Draws(self._seed, batch, inputs.x0_BCTHW)
        conditions = {name: value.to(self._dtype) for name, value in inputs.conditions.items()}
        null = {n: v.to(self._dtype).expand(len(batch), *v.shape[1:]) for n, v in self._null.items()}
        if self._role == GENERATOR:
            return self._generator_loss(draws, conditions, null)
        return self._critic_loss(draws, conditions)

    def _generator_loss(self, draws: Draws, conditions: Conditions, null: Conditions) -> Tensor:
        with self._around_forward():
            x0 = self._generate(draws, conditions)
        settings, networks = self.settings, self.networks
        with torch.no_grad():
            t_B, noise = draws.times(self.scheduler), draws.noise("score")
            x_t = self.scheduler.add_noise(x0, noise, t_B)
            asked = (x_t, t_B, conditions, null)
            fake = score(networks.critic, *asked, scale=settings.fake_guidance, flow=self.scheduler)
            real = score(networks.real, *asked, scale=settings.real_guidance, flow=self.scheduler)
        return matching_loss(x0, score_gradient(x0, fake, real)).float()

    def _critic_loss(self, draws: Draws, conditions: Conditions) -> Tensor:
        """Flow matching on what the generator makes."""
        with torch.no_grad():
            x0 = self._generate(draws, conditions)
        t_B, noise = draws.times(self.scheduler), draws.noise("score")
        with self._around_forward():
            prediction = self.networks.critic(self.scheduler.add_noise(x0, noise, t_B), t_B, conditions)
        error_B = sample_errors(prediction, self.scheduler.target(x0, noise), None, self._errors)
        return (error_B * self.scheduler.weight(t_B)).mean()

    def _generate(self, draws: Draws, conditions: Conditions) -> Tensor:
        """Data of the generator from noise, at the exit of this update; the walk there is without gradients."""
        times = shifted(self.settings.times, self.scheduler, tuple(draws.like.shape[2:]))
        own = own_steps(times, self.settings, has_before=self.networks.before is not None)
        exit_step = own[exit_of(self._step, len(own), seed=self._seed)]

        def velocity(x: Tensor, t_B: Tensor, step: int) -> Tensor:
            network = self.networks.generator if step in own else self.networks.before
            assert network is not None  # `own_steps` begins at 0 without it
            return network(x, t_B, conditions)

        with torch.no_grad():
            x = walk(velocity, draws.noise(0), times[: exit_step + 1], flow=self.scheduler, noise=draws.noise)
        return jump(velocity, x, times[exit_step], exit_step, flow=self.scheduler)


def own_steps(times: list[float], settings: Distill, *, has_before: bool) -> range:
    """Which of the evaluations at `times`, after the shift, are the trained model's.

    Raises:
        ValueError: none is, or where there is an expert before, all are.
    """
    if settings.boundary is None:
        return range(len(times))
    switch = sum(t >= settings.boundary - ROUNDING for t in times)
    own = range(switch, len(times)) if has_before else range(switch)
    if not len(own) or (has_before and not own[0]):
        raise ValueError(
            f"distill.boundary={settings.boundary}: of the times {[round(t, 4) for t in times]} after the shift "
            f"{switch} are the high expert's and {len(times) - switch} the low one's, and this run trains the "
            f"{'low' if has_before else 'high'} one; change distill.times or boundary"
        )
    return own


class Draws:
    """All that is random of a micro-batch: of each sample a function of (seed, epoch, row).

    Args:
        like: latents of the shape and device that noise is drawn for.
    """

    def __init__(self, seed: int, batch: Batch, like: Tensor) -> None:
        self._seed, self._batch, self.like = seed, batch, like

    def noise(self, what: int | str) -> Tensor:
        """Standard normal, float32: of step 0 the beginning, of a later one what is added for it."""
        epoch, rows = self._batch.epoch, self._batch.rows
        purpose = f"distill noise {what}"
        return draw_noise(self.like.shape, self._seed, epoch, rows, device=self.like.device, purpose=purpose)

    def times(self, scheduler: Scheduler) -> Tensor:
        """At which the scores look, within the scheduler's window. Returns: float32 [B]."""
        epoch, rows = self._batch.epoch, self._batch.rows
        generators = [rng.generator(self._seed, "distill t", epoch, row) for row in rows]
        return scheduler.draw_t(generators, tuple(self.like.shape[2:])).to(self.like.device, non_blocking=True)
