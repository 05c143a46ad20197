"""How noise becomes data: solvers of the flow, and the guidance that steers them; pure functions in float32."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

Velocity = Callable[[Tensor, Tensor, int], Tensor]  # (x [B, ...], t_B float32 [B], number of the step) -> v like x
Model = Callable[[Tensor, Tensor, dict[str, Tensor]], Tensor]  # a Denoiser

NUM_STEADY_STEPS = 10  # a scale oscillates only after so many steps


def _host_times(times: Tensor) -> list[float]:
    """The times as numbers, checked: one copy to the host before the loop, none inside."""
    host = times.tolist()
    if len(host) < 2 or any(a <= b for a, b in pairwise(host)) or host[0] > 1 or host[-1] < 0:
        raise ValueError(f"times={host!r} must fall strictly, within [0, 1], and be 2 or more; use FlowMatching.times")
    return host


@torch.no_grad()
def sample_euler(velocity: Velocity, x: Tensor, times: Tensor) -> Tensor:
    """Follow the flow with straight steps.

    Args:
        x: noise [B, ...].
        times: float32 [steps + 1], falling, as `FlowMatching.times` makes them.

    Returns: float32, like `x`; data if `times` ends in 0.

    Raises:
        ValueError: times that do not fall.
    """
    host = _host_times(times)
    x = x.float()
    for step, (t, t_next) in enumerate(pairwise(host)):
        t_B = torch.full((x.shape[0],), t, dtype=torch.float32, device=x.device)
        x = x + (t_next - t) * velocity(x, t_B, step).float()
    return x


@torch.no_grad()
def sample_unipc(velocity: Velocity, x: Tensor, times: Tensor) -> Tensor:
    """Follow the flow with a predictor and a corrector of order 2 that share one velocity per step.

    Args and Returns: as `sample_euler`.

    Source: UniPC, arXiv:2302.04867, B2(h) in x0 form; the numbers of diffusers' UniPCMultistepScheduler with
    use_flow_sigmas and flow_prediction.
    """
    # log(1 - t) must exist at t = 1; float32, because that rounding of 1 - 1e-6 is what the scheduler named above uses
    top = torch.tensor(1 - 1e-6, dtype=torch.float32).item()
    host = [min(t, top) for t in _host_times(times)]
    x = x.float()
    previous: list[tuple[float, Tensor]] = []  # (t, predicted x0) of the last two steps
    start, order = x, 0  # where the last predictor began, and its order
    for step, (t, t_next) in enumerate(pairwise(host)):
        t_B = torch.full((x.shape[0],), t, dtype=torch.float32, device=x.device)
        x0 = x - t * velocity(x, t_B, step).float()
        if previous:
            x = _correct(start, t, x0, previous, order)
        previous = [*previous[-1:], (t, x0)]
        start, order = x, min(len(previous), len(host) - 1 - step)
        x = _predict(x, t_next, previous, order)
    return x


def _log_snr(t: float) -> float:
    return math.inf if t == 0 else math.log1p(-t) - math.log(t)


def _first_order(x: Tensor, t_from: float, t_to: float, x0: Tensor) -> tuple[Tensor, float, float]:
    """The exact solution for a constant `x0`. Returns: it, the step in log-SNR, and the factor of corrections."""
    step = _log_snr(t_to) - _log_snr(t_from)
    factor = (1 - t_to) * math.expm1(-step)
    return (t_to / t_from) * x - factor * x0, step, factor


def _predict(x: Tensor, t_to: float, previous: list[tuple[float, Tensor]], order: int) -> Tensor:
    t_from, x0 = previous[-1]
    result, step, factor = _first_order(x, t_from, t_to, x0)
    if order < 2:
        return result
    t_before, x0_before = previous[-2]
    ratio = (_log_snr(t_before) - _log_snr(t_from)) / step
    return result - factor * 0.5 * (x0_before - x0) / ratio


def _correct(start: Tensor, t: float, x0_now: Tensor, previous: list[tuple[float, Tensor]], order: int) -> Tensor:
    """Redo the last predictor's step to `t`, now that the prediction at its end is known."""
    t_from, x0 = previous[-1]
    result, step, factor = _first_order(start, t_from, t, x0)
    if order < 2:
        return result - factor * 0.5 * (x0_now - x0)
    t_before, x0_before = previous[-2]
    ratio = (_log_snr(t_before) - _log_snr(t_from)) / step
    scale = math.expm1(-step)
    first = -scale / step - 1  # phi_2 and phi_3 of the paper, up to their common factor
    second = -first / step - 0.5
    moment_1, moment_2 = first / scale, 2 * second / scale
    old = (moment_2 - moment_1) / (ratio - 1)  # solves [[1, 1], [ratio, 1]] (old, new) = (moment_1, moment_2)
    return result - factor * (old * (x0_before - x0) / ratio + (moment_1 - old) * (x0_now - x0))


def guided(v_cond: Tensor, v_uncond: Tensor, scale: float | Tensor) -> Tensor:
    """Classifier-free guidance: 1 is `v_cond`, more overshoots. `scale` may be a tensor that broadcasts."""
    return v_uncond + scale * (v_cond - v_uncond)


def guided_text_and_image(
    v_both: Tensor, v_image: Tensor, v_none: Tensor, *, text: float, image: float | Tensor
) -> Tensor:
    """Guidance by text and by a given frame: ``none + image (image - none) + text (both - image)``.

    Source: InstructPix2Pix, arXiv:2211.09800, with the order of Open-Sora's i2v denoiser.
    """
    return guided(v_image, v_none, image) + text * (v_both - v_image)


@dataclass(frozen=True)
class Guidance:
    """How strongly text and given frames steer.

    Args:
        text, image: scales; 1 is no guidance.
        text_osci, image_osci: from step 10 on, the scale is 1 at every odd step, which saves colours from burning and,
            where both are 1, two of three forward passes.
        scale_temporal_osci: the image scale rises over the latent frames, from 1 at the first to a value that falls
            with the steps; for clips that continue an image.
    """

    text: float = 7.5
    image: float = 3.0
    text_osci: bool = True
    image_osci: bool = True
    scale_temporal_osci: bool = True

    def for_task(self, task: str) -> Guidance:
        """What of it applies to a task: t2v has no image to be guided by, only i2v scales over time."""
        if task == "t2v":
            return replace(self, image=1.0, image_osci=False, scale_temporal_osci=False)
        return replace(self, scale_temporal_osci=self.scale_temporal_osci and task.startswith("i2v"))


def oscillating(scale: float, step: int, num_steady: int = NUM_STEADY_STEPS) -> float:
    """`scale` at the first `num_steady` steps and at even ones, 1 at the others. Source: Open-Sora v2."""
    return scale if step < num_steady or step % 2 == 0 else 1.0


def guidance_scales(
    step: int, num_steps: int, *, guidance: Guidance, num_latent_frames: int
) -> tuple[float, float | Tensor]:
    """The scales of text and image at one step.

    Returns: (text, image); image is float32 [num_latent_frames], on the CPU, where it varies over time.
    """
    text = oscillating(guidance.text, step) if guidance.text_osci else guidance.text
    image = oscillating(guidance.image, step) if guidance.image_osci else guidance.image
    if guidance.scale_temporal_osci and image > 1:
        upper = image + (1 - image) * step / num_steps
        return text, torch.linspace(1.0, upper, num_latent_frames)
    return text, image


def guided_velocity(
    model: Model,
    conditions: Mapping[str, Tensor],
    *,
    null_text: Mapping[str, Tensor],
    null_image: Mapping[str, Tensor],
    guidance: Guidance,
    num_steps: int,
) -> Velocity:
    """A velocity for the samplers that runs the branches of guidance as one batch.

    A branch that the scales of a step multiply with 0 is not run: text guidance alone needs two, text and image
    three, and a step whose scales are all 1 needs one.

    Args:
        conditions: name -> [B, ...]: everything the model is given.
        null_text: those that differ without the text (the embeddings of the negative prompt), same shapes.
        null_image: those that differ without the given frames (zeros); {} where there is no image guidance.

    Raises:
        ValueError: a null condition that is no condition, or of another shape; an image scale without `null_image`.
    """
    _check_nulls(conditions, null_text=null_text, null_image=null_image, guidance=guidance)
    branches = [dict(conditions), {**conditions, **null_text}, {**conditions, **null_text, **null_image}]

    def velocity(x: Tensor, t_B: Tensor, step: int) -> Tensor:
        text, image = guidance_scales(step, num_steps, guidance=guidance, num_latent_frames=x.shape[2])
        if isinstance(image, Tensor):
            image = image.to(x.device, non_blocking=True).view(1, 1, -1, 1, 1)
            factors = (text, 1.0, 1.0)  # what matters below is only whether one is 0
        else:
            factors = (text, image - text, 1 - image)
        run = [i for i, factor in enumerate(factors) if factor != 0]
        batched = {name: torch.cat([branches[i][name] for i in run]) for name in conditions}
        v = model(torch.cat([x] * len(run)), t_B.repeat(len(run)), batched).float()
        found = dict(zip(run, v.chunk(len(run)), strict=True))
        if len(run) == 1:
            return found[run[0]]
        if 2 not in found:
            return guided(found[0], found[1], text)
        if 1 not in found:
            return guided(found[0], found[2], text)
        if 0 not in found:
            return guided(found[1], found[2], image)
        return guided_text_and_image(found[0], found[1], found[2], text=text, image=image)

    return velocity


def _check_nulls(
    conditions: Mapping[str, Tensor],
    *,
    null_text: Mapping[str, Tensor],
    null_image: Mapping[str, Tensor],
    guidance: Guidance,
) -> None:
    for group, nulls in (("null_text", null_text), ("null_image", null_image)):
        for name, null in nulls.items():
            if name not in conditions:
                raise ValueError(f"{group}[{name!r}] replaces no condition; conditions are {sorted(conditions)}")
            if null.shape != conditions[name].shape:
                raise ValueError(
                    f"{group}[{name!r}] is {list(null.shape)}, the condition is {list(conditions[name].shape)}; "
                    "expand or pad it to the same shape"
                )
    if guidance.image != 1 and not null_image:
        raise ValueError(f"guidance.image={guidance.image!r} needs null_image; pass it or use Guidance.for_task('t2v')")
    if guidance.text != 1 and not null_text:
        raise ValueError(f"guidance.text={guidance.text!r} needs null_text; pass it or set the scale to 1")
