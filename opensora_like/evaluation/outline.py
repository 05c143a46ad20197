"""What a sampling run can be refused for before weights are read: task, scales, size, length and references."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from opensora_like.conditioning.captioned import check_tasks
from opensora_like.conditioning.masks import TASKS, Given, fits, given_frames
from opensora_like.datasets.aspect import shape_table
from opensora_like.datasets.video_io import BadSample, is_image, probe, read_frames, read_image
from opensora_like.evaluation.few_step import check_few_step
from opensora_like.evaluation.speech import guided_by_sound
from opensora_like.evaluation.video_size import video_size
from opensora_like.models.base import Autoencoder, Denoiser
from opensora_like.models.flux_image import MULTIPLE, FluxImage
from opensora_like.registry import MODELS, build, nearest
from opensora_like.schedulers.samplers import Guidance
from opensora_like.settings import InferenceConfig


def check_outline(cfg: InferenceConfig) -> Given:
    """Build the models without memory, and check against them what is asked for.

    Returns: frames that the task is given.

    Raises:
        ValueError: a task, a size or a length that the models cannot make, or scales and times that nothing reads.
    """
    if cfg.cond_type not in TASKS:
        raise ValueError(f"cond_type={cfg.cond_type!r}: unknown task; {nearest(cfg.cond_type, TASKS)}")
    model: Denoiser = _on_meta(cfg.model, where="model")
    autoencoder: Autoencoder = _on_meta(cfg.autoencoder, where="autoencoder")
    guidance_of(cfg, model)
    check_few_step(cfg)
    size = video_size(cfg, multiple=autoencoder.spatial_stride * model.patch_size)
    num_latent_frames = autoencoder.latent_shape(cfg.num_frames, *size)[1]
    given = given_frames(cfg.cond_type, is_causal=autoencoder.is_causal)
    causality = {"is_causal": autoencoder.is_causal, "temporal_stride": autoencoder.temporal_stride}
    if any(given) and not fits(cfg.cond_type, num_latent_frames, **causality):
        raise ValueError(
            f"num_frames={cfg.num_frames}: cond_type={cfg.cond_type!r} is given {sum(given)} frames, none is left to "
            "make; raise num_frames"
        )
    return given


def _on_meta(section: Mapping[str, Any], *, where: str) -> Any:
    with torch.device("meta"):
        return build({k: v for k, v in section.items() if k != "from_pretrained"}, MODELS, where=where)


def guidance_of(cfg: InferenceConfig, model: Denoiser) -> Guidance:
    """The scales that apply to the task.

    Raises:
        ValueError: a task that the model does not know or has no references for, or scales without an effect.
    """
    _check_given_frames(cfg, model)
    guidance = Guidance(
        text=cfg.guidance,
        image=cfg.guidance_img,
        text_osci=cfg.text_osci,
        image_osci=cfg.image_osci,
        scale_temporal_osci=cfg.scale_temporal_osci,
    )
    return guided_by_sound(cfg, guidance.for_task(cfg.cond_type), model)


def _check_given_frames(cfg: InferenceConfig, model: Denoiser) -> None:
    """Raises ValueError: a task that the model does not know, or one with references where it takes none."""
    if any(given_frames(cfg.cond_type, is_causal=True)) and "visual" not in model.condition_names:
        raise ValueError(f"cond_type={cfg.cond_type!r} needs a model with cond_embed=True; use cond_type='t2v'")
    check_tasks(model, [cfg.cond_type], where=f"cond_type={cfg.cond_type!r}")


def check_first_image(section: Mapping[str, Any]) -> None:
    """Raises ValueError: settings that what draws the first image does not take, or a resolution that cannot be."""
    drawer: FluxImage = build(section, MODELS, where="first_image")
    try:
        shape_table(drawer.resolution, multiple=MULTIPLE, training=False)
    except ValueError as problem:
        raise ValueError(f"first_image.resolution={drawer.resolution!r}: {problem}") from problem


def check_references(refs: Sequence[str], given: Given, *, cond_type: str) -> None:
    """Raises BadSample: a reference that cannot be read, or of which the task takes frames that it has not whole."""
    for ref in refs:
        found = len(read_image(ref)) if is_image(ref) else probe(ref).num_frames
        if found < max(given):
            raise _too_short(ref, found, max(given), cond_type)
    if not all(is_image(ref) for ref in refs):
        read_references(refs, given, cond_type=cond_type)  # a header knows nothing of damaged frames


def read_references(refs: Sequence[str], given: Given, *, cond_type: str) -> list[tuple[str, np.ndarray]]:
    """The frames that the task takes: the head's from the first reference, the tail's from the last one (v2v: from the
    first).

    Returns: (reference, uint8 [T, H, W, 3]) of head and tail, as far as the task has them.

    Raises:
        BadSample: a reference that cannot be read, or is too short.
    """
    if not refs:
        return []
    head, tail = refs[0], refs[0] if cond_type.startswith("v2v") else refs[-1]
    read = [(head, _read_end(head, given.head, is_tail=False, cond_type=cond_type))] if given.head else []
    if given.tail:
        read.append((tail, _read_end(tail, given.tail, is_tail=True, cond_type=cond_type)))
    return read


def _read_end(path: str, num_frames: int, *, is_tail: bool, cond_type: str) -> np.ndarray:
    """The first or last frames of one reference; an image has one frame."""
    if is_image(path):
        return read_image(path)
    found = probe(path).num_frames
    if found < num_frames:
        raise _too_short(path, found, num_frames, cond_type)
    first = found - num_frames if is_tail else 0
    return read_frames(path, range(first, first + num_frames))


def _too_short(path: str, found: int, num_frames: int, cond_type: str) -> BadSample:
    return BadSample(path, f"cond_type={cond_type!r} takes {num_frames} frames of it, it has {found}")
