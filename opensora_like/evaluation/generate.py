"""Samples videos and images from prompts with trained weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from opensora_like import rng
from opensora_like.boosters.sequence_parallel import SequenceGroup
from opensora_like.checkpoint.adapters import merge_asked
from opensora_like.checkpoint.weights import LoadReport, check_agree, compare_shapes, read_adapted, read_also
from opensora_like.conditioning import wan_i2v
from opensora_like.conditioning.masks import given_frames, inference_condition
from opensora_like.datasets.resize import resize_crop
from opensora_like.datasets.video_io import is_image
from opensora_like.evaluation import few_step, speech
from opensora_like.evaluation.captioned_images import encode_prompts, start_of
from opensora_like.evaluation.experts import load_expert, taking_turns
from opensora_like.evaluation.outline import guidance_of, read_references
from opensora_like.evaluation.placement import in_use
from opensora_like.evaluation.prompts import Job, Prompt, caption_of, jobs_of
from opensora_like.evaluation.shared_video import Inputs, cut_sequence, is_leader, receive, send
from opensora_like.evaluation.video_size import video_size
from opensora_like.models.base import Autoencoder, Denoiser, TextEncoder, encoders_of
from opensora_like.registry import MODELS, SCHEDULERS, build
from opensora_like.runtime import DTYPES, logger
from opensora_like.schedulers.grids import diffusers_grid
from opensora_like.schedulers.samplers import Guidance, Velocity, guided_velocity, sample_euler, sample_unipc
from opensora_like.settings import InferenceConfig

FRAMES_INPUT = "cond_in."  # of an MMDiT with cond_embed; its training begins at zero
SAMPLERS = {"euler": sample_euler, "unipc": sample_unipc}


@dataclass(frozen=True)
class Sampled:
    """One result: pixels in [-1, 1], float32 on the CPU, and what it was made from."""

    prompt: Prompt
    repeat: int
    caption: str
    video_CTHW: Tensor


class Frozen(NamedTuple):
    """What stands around the denoiser."""

    autoencoder: Autoencoder
    encoders: dict[str, TextEncoder]


def build_frozen(cfg: InferenceConfig, device: torch.device) -> Frozen:
    """Autoencoder and text encoders; with ``cfg.offload`` they wait in host memory.

    Raises:
        ValueError, FileNotFoundError: weights that do not fit or are not there.
    """
    autoencoder = build(cfg.autoencoder, MODELS, where="autoencoder")
    encoders = {name: build(c, MODELS, where=f"encoders.{name}") for name, c in cfg.encoders.items()}
    for module in (autoencoder, *encoders.values()):
        module.requires_grad_(False).eval().to("cpu" if cfg.offload else device)
    return Frozen(autoencoder, encoders)


def load_denoiser(cfg: InferenceConfig) -> Denoiser:
    """The denoiser with its weights, in `dtype`, on the CPU.

    It is built without memory and takes the tensors that were read, so the host holds the weights once.

    Raises:
        ValueError, FileNotFoundError: weights that do not fit or are not there; see `read_adapted`.
    """
    model = _build_unfilled(cfg)
    source = cfg.ckpt_path or model.from_pretrained
    if not source:
        raise ValueError("no weights: give --ckpt-path with a checkpoint folder or a safetensors file")
    weights, changes = read_adapted(model, source, use_ema=cfg.use_ema, where="ckpt_path")
    added, more = read_also(model)  # a checkpoint has been trained on top of it
    if cfg.ckpt_path is None:
        check_agree(model, weights, added, source=source)
    weights = {**added, **weights}
    own = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    report, fitting = compare_shapes({name: tuple(tensor.shape) for name, tensor in weights.items()}, own)
    report = report._replace(adapted=(*changes, *more))
    _check_fit(report, cfg, source)
    logger.info("ckpt_path %s: %s", source, report)
    for line in report.lines():
        logger.warning("ckpt_path %s: %s", source, line)
    dtype = DTYPES[cfg.dtype] if cfg.lora_checkpoint is None else torch.float32  # adapters are added in float32
    filled = {name: weights.pop(name).to(dtype) for name in fitting}
    filled |= {name: torch.zeros(own[name], dtype=dtype) for name in report.missing}
    model.load_state_dict(filled, assign=True)
    merge_asked(model, cfg.lora_checkpoint, use_ema=cfg.use_ema, strength=cfg.lora_scale)
    return model.requires_grad_(False).eval().to(DTYPES[cfg.dtype])


def _build_unfilled(cfg: InferenceConfig) -> Denoiser:
    """The denoiser on ``meta``, unless it has tensors that no file holds."""
    with torch.device("meta"):
        model: Denoiser = build(cfg.model, MODELS, where="model")
    if {name for name, _ in model.named_buffers()} - model.state_dict().keys():
        model = build(cfg.model, MODELS, where="model")
    return model


def _check_fit(report: LoadReport, cfg: InferenceConfig, source: str) -> None:
    """Every weight has to be there, but for the input of given frames where none are given: zero, it adds nothing.

    Raises:
        ValueError: the weights are of another model, or of one that was not trained with given frames.
    """
    if report.fits:
        return
    lacks_input = report.missing and all(name.startswith(FRAMES_INPUT) for name in report.missing)
    if not lacks_input or report.unexpected or report.mismatched:
        raise ValueError(f"ckpt_path={source!r} does not fit the model: {report}")
    if any(given_frames(cfg.cond_type, is_causal=True)):
        raise ValueError(
            f"ckpt_path={source!r} was trained without given frames (it has no {report.missing}), and "
            f"cond_type={cfg.cond_type!r} gives some; use --cond-type t2v --first-image none, or weights of a training "
            "with model.cond_embed=True"
        )


class Loaded(NamedTuple):
    """A denoiser in memory. `forward` is called in its place: itself, or what a booster wrapped around it."""

    model: Denoiser
    forward: Callable[..., Tensor]


class VideoGenerator:
    """A denoiser with its autoencoder and text encoders, ready to sample.

    Args:
        device: where everything runs; with ``cfg.offload`` weights wait in host memory until they are used.
        frozen: autoencoder and encoders that are built already; None builds them.
        denoiser: one that is on `device` already; None loads it.
        sequence: the ranks that share each video. Its first one samples, the others `follow`, with the denoiser alone.

    Raises:
        ValueError, FileNotFoundError: weights that do not fit or are not there, settings that do not fit the model.
    """

    def __init__(
        self,
        cfg: InferenceConfig,
        device: torch.device,
        *,
        frozen: Frozen | None = None,
        denoiser: Loaded | None = None,
        sequence: SequenceGroup | None = None,
    ) -> None:
        self.cfg, self.device, self.dtype, self._sequence = cfg, device, DTYPES[cfg.dtype], sequence
        if denoiser is None:
            model = load_denoiser(cfg).to("cpu" if cfg.offload else device)
            denoiser = Loaded(model, model)
        self.model, self._forward = denoiser
        if sequence is not None:
            cut_sequence(self.model, sequence)
        self._other = load_expert(cfg, device, load_denoiser, sequence=sequence)
        self.scheduler = build(cfg.scheduler, SCHEDULERS, where="scheduler", patch_size=self.model.patch_size)
        few_step.check_few_step(cfg)
        self.guidance = guidance_of(cfg, self.model)
        if is_leader(sequence):
            self.autoencoder, self.encoders = frozen or build_frozen(cfg, device)
            self.size = video_size(cfg, multiple=self.autoencoder.spatial_stride * self.model.patch_size)
            self._set_length(cfg.num_frames)

    def _set_length(self, num_frames: int) -> None:
        self.num_frames = num_frames
        self.latent_shape = self.autoencoder.latent_shape(num_frames, *self.size)

    def sample(self, prompts: Sequence[Prompt]) -> Iterator[Sampled]:
        """Sample every prompt `num_sample` times, `batch_size` at once."""
        return self.sample_jobs(jobs_of(prompts, self.cfg.num_sample))

    def sample_jobs(self, jobs: Sequence[Job]) -> Iterator[Sampled]:
        """Make `jobs`, `batch_size` at once; the leader of a group calls it, and `finish` at the end.

        Noise depends on (seed, repeat, text of the prompt) alone, not on the batch, the process, the device or the
        other prompts.
        """
        for num_frames, batch in speech.batches(self.cfg, jobs):
            self._set_length(num_frames)
            yield from self._sample_batch(batch)

    def finish(self) -> None:
        """Let the ranks that follow go."""
        if self._sequence is not None:
            send(None, self._sequence)

    def follow(self) -> None:
        """Denoise what the leader of the group sends, until it finishes."""
        while (inputs := receive(self._sequence, self.device)) is not None:
            self._denoise(inputs)

    @torch.no_grad()
    def _sample_batch(self, jobs: Sequence[Job]) -> list[Sampled]:
        captions = [caption_of(job.prompt, self.cfg) for job in jobs]
        inputs, given_BT = self._inputs(jobs, captions)
        if self._sequence is not None:
            send(inputs, self._sequence)
        x0 = self._denoise(inputs)
        if given_BT.any():  # what was given comes back as it was given
            x0 = torch.where(given_BT[:, None, :, None, None], inputs["conditions"]["visual"][:, 1:], x0)
        with in_use(self.autoencoder, self.device, offload=self.cfg.offload):
            videos = self.autoencoder.decode(x0).float().clamp(-1, 1).cpu()
        return [
            Sampled(job.prompt, job.repeat, caption, video)
            for job, caption, video in zip(jobs, captions, videos, strict=True)
        ]

    def _inputs(self, jobs: Sequence[Job], captions: Sequence[str]) -> tuple[Inputs, Tensor]:
        """All that the denoiser is given, and which latent frames [B, T] are given."""
        conditions, null_text, null_image = {}, {}, {}
        for name in encoders_of("text", self.encoders):
            encoder = self.encoders[name]
            with in_use(encoder, self.device, offload=self.cfg.offload):
                conditions[name] = encoder.encode(captions)
                null_text[name] = encoder.encode([job.prompt.negative for job in jobs])
        if "guidance" in self.model.condition_names:
            conditions["guidance"] = torch.full((len(jobs),), self.cfg.distilled_guidance, device=self.device)
        given_BT = torch.zeros(len(jobs), self.latent_shape[1], dtype=torch.bool, device=self.device)
        if wan_i2v.takes_grey_clips(self.model) and "visual" in self.model.condition_names:
            found = self._grey_conditions([job.prompt.refs for job in jobs])
            conditions, null_image = {**conditions, **found[0]}, found[1]
        elif "visual" in self.model.condition_names:
            conditions["visual"], given_BT = self._visual(jobs)
            null_image["visual"] = torch.zeros_like(conditions["visual"])
        where = {"cfg": self.cfg, "guidance": self.guidance, "size": self.size, "device": self.device}
        shown = encode_prompts(self.encoders, jobs, captions, self._read_references, **where)
        conditions |= shown.conditions
        start = start_of(self.model, self._noises(jobs, "sample"), conditions)
        noise = {"x": start, **few_step.step_noises(self.cfg, partial(self._noises, jobs))}
        given = {"noise": noise, "conditions": conditions}
        heard = speech.encode_jobs(self.encoders, jobs, self.num_frames, self.cfg, self.device)
        conditions |= heard
        null_image = speech.without(heard) or null_image | shown.null_image
        given |= {"null_text": null_text | shown.null_text, "null_image": null_image}
        return given, given_BT

    @torch.no_grad()
    def _denoise(self, inputs: Inputs) -> Tensor:
        """Latents from noise; every rank of a group calls it with the same inputs. Returns: float32 [B, C, T, H, W]."""
        noise = inputs["noise"]["x"]

        def velocity_of(forward: Callable[..., Tensor], guidance: Guidance) -> Velocity:
            return guided_velocity(
                partial(self._velocity, forward),
                inputs["conditions"],
                null_text=inputs.get("null_text", {}),
                null_image=inputs.get("null_image", {}),
                guidance=guidance,
                num_steps=self.cfg.num_steps,
            )

        with taking_turns(self.model, self._other, self.device, offload=self.cfg.offload) as switch:
            own = velocity_of(self._forward, self.guidance)
            velocity = switch(own, lambda other: velocity_of(other.model, other.guidance(self.guidance)))
            velocity, times = self._on_grid(velocity, tuple(noise.shape[2:]))
            if self.cfg.sampler == few_step.SAMPLER:
                return few_step.denoise(velocity, inputs["noise"], self.cfg, self.scheduler)
            return SAMPLERS[self.cfg.sampler](velocity, noise, times.to(self.device))

    def _on_grid(self, velocity: Velocity, latent_shape: tuple[int, int, int]) -> tuple[Velocity, Tensor]:
        """The velocity as it is told of the times to sample at, and these times; `latent_shape` is (T, H, W)."""
        cfg = self.cfg
        if cfg.time_grid == "even":
            return velocity, self.scheduler.times(cfg.num_steps, latent_shape)
        grid = diffusers_grid(cfg.num_steps, sampler=cfg.sampler, shift=self.scheduler.alpha(latent_shape))
        return grid.tell(velocity), grid.times

    def _visual(self, jobs: Sequence[Job]) -> tuple[Tensor, Tensor]:
        """Visual condition of the references, and which latent frames come back as they were given."""
        return inference_condition(
            self.cfg.cond_type,
            [self._encode_references(job.prompt.refs) for job in jobs],
            latent_shape=self.latent_shape,
            is_causal=self.autoencoder.is_causal,
            temporal_stride=self.autoencoder.temporal_stride,
            device=self.device,
        )

    def _grey_conditions(self, refs: Sequence[Sequence[str]]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """What published Wan i2v weights are shown of the references, and the same without any."""
        task, shape = self.cfg.cond_type, (self.num_frames, *self.size)
        clips = torch.stack([wan_i2v.sampling_clip(task, self._read_references(paths), shape) for paths in refs])
        clips = clips.to(self.device)
        shown: list[dict[str, Tensor]] = []
        for name, pixels in ((task, clips), ("t2v", torch.zeros_like(clips))):
            with in_use(self.autoencoder, self.device, offload=self.cfg.offload):
                visual, _ = wan_i2v.training_condition(self.autoencoder, pixels, [name] * len(refs))
            shown.append({"visual": visual})
            for condition in encoders_of("image", self.encoders):
                with in_use(self.encoders[condition], self.device, offload=self.cfg.offload):
                    images = wan_i2v.first_given(pixels, [name] * len(refs))
                    shown[-1][condition] = self.encoders[condition].encode_images(images).float()
        return shown[0], shown[1]

    def _encode_references(self, refs: Sequence[str]) -> list[Tensor]:
        """Latents [C, T, H, W] of `_read_references`."""
        return [self._encode(pixels[None])[0] for pixels in self._read_references(refs)]

    def _encode(self, video_BCTHW: Tensor) -> Tensor:
        with in_use(self.autoencoder, self.device, offload=self.cfg.offload):
            return self.autoencoder.encode(video_BCTHW.to(self.device)).float()

    def _read_references(self, refs: Sequence[str]) -> list[Tensor]:
        """Pixels [C, T, H, W] of the frames that the task takes."""
        given = given_frames(self.cfg.cond_type, is_causal=self.autoencoder.is_causal)
        read = read_references(refs, given, cond_type=self.cfg.cond_type)
        return [resize_crop(frames, *self.size, image=is_image(path)) for path, frames in read]

    def _velocity(
        self, forward: Callable[..., Tensor], x: Tensor, t_B: Tensor, conditions: dict[str, Tensor]
    ) -> Tensor:
        cast = {k: v.to(self.dtype) for k, v in conditions.items()}
        return forward(x.to(self.dtype), t_B, cast).float()

    def _noises(self, jobs: Sequence[Job], purpose: str) -> Tensor:
        return torch.stack([self._noise(job, purpose) for job in jobs]).to(self.device)

    def _noise(self, job: Job, purpose: str = "sample") -> Tensor:
        # on the CPU: generators of other devices draw other numbers
        prompt = job.prompt
        generator = rng.generator(self.cfg.seed + job.repeat, f"{purpose} {prompt.text}", prompt.occurrence)
        return torch.randn(self.latent_shape, generator=generator)
