"""Samples videos and images from prompts with trained weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from opensora_like import rng
from opensora_like.checkpoint.adapters import merge_adapters
from opensora_like.checkpoint.weights import load_pretrained
from opensora_like.conditioning.masks import given_frames, inference_condition
from opensora_like.datasets.aspect import shape_table
from opensora_like.datasets.video_io import (
    is_image,
    probe,
    read_frames,
    read_image,
    resize_crop,
    write_image,
    write_video,
)
from opensora_like.datasets.video_text import caption_with_suffix
from opensora_like.models.base import Autoencoder, Denoiser, TextEncoder
from opensora_like.registry import MODELS, SCHEDULERS, build, nearest
from opensora_like.runtime import DTYPES, logger
from opensora_like.schedulers.samplers import Guidance, guided_velocity, sample_euler, sample_unipc
from opensora_like.settings import InferenceConfig

SAMPLERS = {"euler": sample_euler, "unipc": sample_unipc}


@dataclass(frozen=True)
class Prompt:
    """What to make. `number` is the row in the list of prompts, part of the seed; `refs` are files."""

    number: int
    text: str
    name: str
    negative: str
    refs: tuple[str, ...] = ()


@dataclass(frozen=True)
class Sampled:
    """One result: pixels in [-1, 1], float32 on the CPU, and what it was made from."""

    prompt: Prompt
    repeat: int
    caption: str
    video_CTHW: Tensor


def read_prompts(cfg: InferenceConfig) -> list[Prompt]:
    """The prompts that a config names: one, or the rows of a csv.

    Raises:
        ValueError: none or both are given, or the csv has no column `text`.
        FileNotFoundError: no such csv.
    """
    if (cfg.prompt is None) == (cfg.prompts is None):
        raise ValueError("give one of --prompt 'some text' and --prompts file.csv")
    if cfg.prompt is not None:
        refs = tuple(cfg.ref.split(";")) if cfg.ref else ()
        return [Prompt(0, cfg.prompt, "prompt_0000", cfg.negative_prompt, refs)]
    import pandas as pd

    path = Path(cfg.prompts)
    if not path.is_file():
        raise FileNotFoundError(f"prompts={cfg.prompts!r} does not exist")
    table = pd.read_csv(path, keep_default_na=False)
    if "text" not in table.columns:
        raise ValueError(f"prompts={cfg.prompts!r} has no column 'text'; it has {list(table.columns)}")
    rows = table.to_dict("records")
    return [
        Prompt(
            number,
            str(row["text"]),
            str(row.get("name") or f"{path.stem}_{number:04d}"),
            str(row.get("neg") or cfg.negative_prompt),
            tuple(str(row["ref"]).split(";")) if row.get("ref") else (),
        )
        for number, row in enumerate(rows)
    ]


class VideoGenerator:
    """A denoiser with its autoencoder and text encoders, ready to sample.

    Args:
        device: where everything runs; with ``cfg.offload`` weights wait in host memory until they are used.

    Raises:
        ValueError, FileNotFoundError: weights that do not fit or are not there; see `read_weights`.
    """

    def __init__(self, cfg: InferenceConfig, device: torch.device) -> None:
        self.cfg, self.device, self.dtype = cfg, device, DTYPES[cfg.dtype]
        self.model: Denoiser = build(cfg.model, MODELS, where="model")
        source = cfg.ckpt_path or self.model.from_pretrained
        if not source:
            raise ValueError("no weights: give --ckpt-path with a checkpoint folder or a safetensors file")
        report = load_pretrained(self.model, source, where="ckpt_path", strict=True, use_ema=cfg.use_ema)
        logger.info("ckpt_path %s: %s", source, report)
        for line in report.lines():
            logger.warning("ckpt_path %s: %s", source, line)
        if cfg.lora_checkpoint is not None:
            number = merge_adapters(self.model, cfg.lora_checkpoint, where="lora_checkpoint", use_ema=cfg.use_ema)
            logger.info("lora_checkpoint %s: %d tensors merged", cfg.lora_checkpoint, number)
        self.model.requires_grad_(False).eval().to(self.dtype)
        self.autoencoder: Autoencoder = build(cfg.autoencoder, MODELS, where="autoencoder")
        self.encoders: dict[str, TextEncoder] = {
            name: build(c, MODELS, where=f"encoders.{name}") for name, c in cfg.encoders.items()
        }
        for module in (self.model, self.autoencoder, *self.encoders.values()):
            module.requires_grad_(False).eval().to("cpu" if cfg.offload else device)
        self.scheduler = build(cfg.scheduler, SCHEDULERS, where="scheduler", patch_size=self.model.patch_size)
        self.guidance = self._guidance()
        self.size = self._pixels()
        self.latent_shape = self.autoencoder.latent_shape(cfg.num_frames, *self.size)

    def _guidance(self) -> Guidance:
        """The scales that apply to the task.

        Raises:
            ValueError: an unknown task, or one with references for a model that takes none.
        """
        cfg = self.cfg
        if any(given_frames(cfg.cond_type, is_causal=True)) and "visual" not in self.model.condition_names:
            raise ValueError(f"cond_type={cfg.cond_type!r} needs a model with cond_embed=True; use cond_type='t2v'")
        guidance = Guidance(
            text=cfg.guidance,
            image=cfg.guidance_img,
            text_osci=cfg.text_osci,
            image_osci=cfg.image_osci,
            scale_temporal_osci=cfg.scale_temporal_osci,
        )
        return guidance.for_task(cfg.cond_type)

    def _pixels(self) -> tuple[int, int]:
        """Height and width, from both or from resolution and aspect ratio.

        Raises:
            ValueError: neither or both ways are given, or a size that is no multiple of what the model needs.
        """
        cfg = self.cfg
        multiple = self.autoencoder.spatial_stride * self.model.patch_size
        if (cfg.resolution is None) == (cfg.height is None or cfg.width is None):
            raise ValueError(
                f"resolution={cfg.resolution!r}, height={cfg.height!r}, width={cfg.width!r}: give either resolution "
                "(and aspect_ratio) or both height and width"
            )
        if cfg.resolution is None:
            height, width = cfg.height, cfg.width
        else:
            table = shape_table(cfg.resolution, multiple=multiple, training=False)
            if cfg.aspect_ratio not in table:
                raise ValueError(f"aspect_ratio={cfg.aspect_ratio!r}; {nearest(cfg.aspect_ratio, table)}")
            height, width = table[cfg.aspect_ratio]
        for name, value in (("height", height), ("width", width)):
            if value % multiple:
                near = [value // multiple * multiple, (value // multiple + 1) * multiple]
                raise ValueError(
                    f"{name}={value} must be a multiple of {multiple} (autoencoder x patch); use one of {near}"
                )
        return height, width

    def sample(self, prompts: Sequence[Prompt]) -> Iterator[Sampled]:
        """Sample every prompt `num_sample` times, `batch_size` at once.

        Each sample's noise depends on (seed, row of the prompt, repeat) alone, not on the batch or the process.
        """
        jobs = [(prompt, repeat) for prompt in prompts for repeat in range(self.cfg.num_sample)]
        for first in range(0, len(jobs), self.cfg.batch_size):
            yield from self._sample_batch(jobs[first : first + self.cfg.batch_size])

    def caption(self, text: str) -> str:
        """The prompt with the suffix that captions had in training."""
        fps = self.cfg.fps_save if self.cfg.fps_in_caption and self.cfg.num_frames > 1 else None
        return caption_with_suffix(text, fps, self.cfg.motion_score)

    @torch.no_grad()
    def _sample_batch(self, jobs: Sequence[tuple[Prompt, int]]) -> list[Sampled]:
        cfg = self.cfg
        captions = [self.caption(prompt.text) for prompt, _ in jobs]
        noise = torch.stack([self._noise(prompt.number, repeat) for prompt, repeat in jobs])
        conditions, null_text, null_image = {}, {}, {}
        for name, encoder in self.encoders.items():
            with self._in_use(encoder):
                conditions[name] = encoder.encode(captions)
                null_text[name] = encoder.encode([prompt.negative for prompt, _ in jobs])
        if "guidance" in self.model.condition_names:
            conditions["guidance"] = torch.full((len(jobs),), cfg.distilled_guidance, device=self.device)
        given_BT = torch.zeros(len(jobs), self.latent_shape[1], dtype=torch.bool, device=self.device)
        if "visual" in self.model.condition_names:
            conditions["visual"], given_BT = self._visual(jobs)
            null_image["visual"] = torch.zeros_like(conditions["visual"])
        velocity = guided_velocity(
            self._velocity,
            conditions,
            null_text=null_text,
            null_image=null_image,
            guidance=self.guidance,
            num_steps=cfg.num_steps,
        )
        times = self.scheduler.times(cfg.num_steps, self.latent_shape[1:]).to(self.device)
        with self._in_use(self.model):
            x0 = SAMPLERS[cfg.sampler](velocity, noise, times)
        if given_BT.any():  # what was given comes back as it was given
            x0 = torch.where(given_BT[:, None, :, None, None], conditions["visual"][:, 1:], x0)
        with self._in_use(self.autoencoder):
            videos = self.autoencoder.decode(x0).float().clamp(-1, 1).cpu()
        return [
            Sampled(prompt, repeat, caption, video)
            for (prompt, repeat), caption, video in zip(jobs, captions, videos, strict=True)
        ]

    def _visual(self, jobs: Sequence[tuple[Prompt, int]]) -> tuple[Tensor, Tensor]:
        """Visual condition of the references, and which latent frames they give."""
        return inference_condition(
            self.cfg.cond_type,
            [[self._encode_reference(path) for path in prompt.refs] for prompt, _ in jobs],
            latent_shape=self.latent_shape,
            is_causal=self.autoencoder.is_causal,
            temporal_stride=self.autoencoder.temporal_stride,
            device=self.device,
        )

    def _encode_reference(self, path: str) -> Tensor:
        """Latents of the frames of a reference that the task takes. Returns: [C, T, H, W]."""
        given = given_frames(self.cfg.cond_type, is_causal=self.autoencoder.is_causal)
        num_frames = max(given)
        if is_image(path):
            frames = read_image(path)
        else:
            first = 0 if given.head else probe(path).num_frames - num_frames
            frames = read_frames(path, range(first, first + num_frames))
        video_CTHW = resize_crop(frames, *self.size, image=is_image(path))
        with self._in_use(self.autoencoder):
            return self.autoencoder.encode(video_CTHW[None].to(self.device)).float()[0]

    @contextmanager
    def _in_use(self, module: torch.nn.Module) -> Iterator[None]:
        """With `offload`, `module` is on the device within this context only."""
        if not self.cfg.offload:
            yield
            return
        module.to(self.device)
        try:
            yield
        finally:
            module.to("cpu")

    def _velocity(self, x: Tensor, t_B: Tensor, conditions: dict[str, Tensor]) -> Tensor:
        cast = {k: v.to(self.dtype) for k, v in conditions.items()}
        return self.model(x.to(self.dtype), t_B, cast).float()

    def _noise(self, number: int, repeat: int) -> Tensor:
        generator = rng.generator(self.cfg.seed + repeat, "sample", number, device=self.device)
        return torch.randn(self.latent_shape, generator=generator, device=self.device)


def to_frames(video_CTHW: Tensor) -> Tensor:
    """[-1, 1] to uint8 [T, H, W, C]."""
    return ((video_CTHW.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 3, 0)


def save_samples(generator: VideoGenerator, prompts: Sequence[Prompt]) -> list[Path]:
    """Sample and write ``NAME[_k].mp4`` (.png for one frame) and the caption beside it as .txt.

    Returns: the files of pixels, in the order of the prompts.
    """
    folder = Path(generator.cfg.save_dir)
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for sampled in generator.sample(prompts):
        stem = sampled.prompt.name + (f"_{sampled.repeat}" if sampled.repeat else "")
        frames = to_frames(sampled.video_CTHW)
        path = folder / f"{stem}{'.png' if len(frames) == 1 else '.mp4'}"
        if len(frames) == 1:
            write_image(path, frames[0])
        else:
            write_video(path, frames, generator.cfg.fps_save)
        path.with_suffix(".txt").write_text(sampled.caption + "\n")
        logger.info("wrote %s", path)
        written.append(path)
    return written
