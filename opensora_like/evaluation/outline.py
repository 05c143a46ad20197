"""What a sampling run can be refused for before weights are read: task, scales, size, length and references."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from opensora_like.conditioning.captioned import check_tasks
from opensora_like.conditioning.masks import TASKS, Given, fits, given_frames
from opensora_like.datasets.video_io import BadSample, is_image, probe, read_image
from opensora_like.evaluation.few_step import check_few_step
from opensora_like.evaluation.speech import guided_by_sound
from opensora_like.evaluation.video_size import video_size
from opensora_like.models.base import Autoencoder, Denoiser
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


def check_references(refs: Sequence[str], given: Given, *, cond_type: str) -> None:
    """Raises BadSample: a reference that cannot be read, or has fewer frames than the task takes of one end of it."""
    for ref in refs:
        found = len(read_image(ref)) if is_image(ref) else probe(ref).num_frames
        if found < max(given):
            raise BadSample(ref, f"cond_type={cond_type!r} takes {max(given)} frames of it, it has {found}")
