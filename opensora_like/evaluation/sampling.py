"""A sampling run from its settings to its files, in one process or in many."""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from opensora_like import runtime as rt
from opensora_like.boosters.sequence_parallel import SequenceGroup
from opensora_like.checkpoint.weights import newest_of
from opensora_like.datasets.resize import to_frames
from opensora_like.datasets.video_writing import write_image, write_video
from opensora_like.evaluation.first_image import make_first_images, with_first_image
from opensora_like.evaluation.generate import Frozen, Sampled, VideoGenerator, build_frozen
from opensora_like.evaluation.jobs import plan, share, video_path
from opensora_like.evaluation.prompts import Job
from opensora_like.evaluation.shared_video import is_leader, join_group, sequence_size
from opensora_like.evaluation.speech import sound_track
from opensora_like.evaluation.video_size import video_size
from opensora_like.models.base import Denoiser
from opensora_like.publish import staged
from opensora_like.registry import MODELS, build
from opensora_like.runtime import Runtime, logger
from opensora_like.settings import InferenceConfig


def build_sampling(cfg: InferenceConfig, runtime: Runtime) -> Callable[[], list[Path]]:
    """Find out what is left to make, make the first images, load the weights.

    Returns: the rest of the work: sampling and writing. It returns the files that this rank wrote.

    Raises:
        ValueError, FileNotFoundError: as `plan`, `make_first_images` and `VideoGenerator`.
    """
    sequence = join_group(cfg, runtime)
    cfg = _pinned(cfg)
    jobs = plan(cfg, runtime)
    if not jobs:
        logger.info("nothing to do in %r", cfg.save_dir)
        return list
    mine = share(jobs, runtime, sp_size=sequence_size(cfg, runtime))
    frozen = _first_stage(cfg, mine, runtime.device, sequence)
    if not mine:
        return list
    generator = VideoGenerator(cfg, runtime.device, frozen=frozen, sequence=sequence)
    if not is_leader(sequence):
        return lambda: generator.follow() or []
    return lambda: save_samples(generator, [with_first_image(cfg, job) for job in mine])


def _pinned(cfg: InferenceConfig) -> InferenceConfig:
    """With the checkpoints that its runs have now, as rank 0 sees them: they may have others a moment later."""

    def newest(source: str | None, where: str) -> str | None:
        return str(rt.found_by_main(lambda: newest_of(Path(source), where))) if source else source

    names, other = ("ckpt_path", "lora_checkpoint"), cfg.other_expert
    found: dict[str, Any] = {name: newest(getattr(cfg, name), name) for name in names}
    if other is not None:
        pinned = {name: newest(other[name], f"other_expert.{name}") for name in names if name in other}
        found["other_expert"] = {**other, **pinned}
    return dataclasses.replace(cfg, **found)


def _first_stage(
    cfg: InferenceConfig, jobs: Sequence[Job], device: torch.device, sequence: SequenceGroup | None
) -> Frozen | None:
    """Make the images that `jobs` go on from; the ranks of a group share them out.

    Returns: what the leader of a group samples with; None for the others.
    """
    if cfg.first_image is None:
        return None
    frozen = build_frozen(cfg, device)
    with torch.device("meta"):  # only to ask how it cuts its latents
        model: Denoiser = build(cfg.model, MODELS, where="model")
    size = video_size(cfg, multiple=frozen.autoencoder.spatial_stride * model.patch_size)
    own = jobs if sequence is None else jobs[sequence.rank :: sequence.size]
    make_first_images(cfg, own, video_size=size, encoders=frozen.encoders, device=device)
    if sequence is not None:
        dist.barrier(group=sequence.group)
    if is_leader(sequence):
        return frozen
    del frozen
    gc.collect()
    return None


def save_samples(generator: VideoGenerator, jobs: Sequence[Job]) -> list[Path]:
    """Sample and write ``NAME[_k].mp4`` (.png for one frame) and the caption beside it as .txt.

    Returns: the files of pixels, in the order of the jobs.
    """
    Path(generator.cfg.save_dir).mkdir(parents=True, exist_ok=True)
    written = [write_sampled(generator.cfg, sampled) for sampled in generator.sample_jobs(jobs)]
    generator.finish()
    return written


def write_sampled(cfg: InferenceConfig, sampled: Sampled) -> Path:
    """Write one sample into the folder of `cfg`.

    The file of pixels comes last and by rename: where it is there, all is there and whole.
    """
    path = video_path(cfg, Job(sampled.prompt, sampled.repeat))
    with staged(path.with_suffix(".txt")) as draft:
        draft.write_text(f"{sampled.caption}\n", encoding="utf-8")
    frames = to_frames(sampled.video_CTHW)
    with staged(path) as draft:
        if len(frames) == 1:
            write_image(draft, frames[0])
        else:
            write_video(draft, frames, cfg.fps_save, sound=sound_track(sampled.prompt.audio, len(frames), cfg.fps_save))
    logger.info("wrote %s", path)
    return path
