"""What of the settings about weights cannot be: found on outlines, before minutes are spent on reading weights."""

from __future__ import annotations

from opensora_like.checkpoint.weights import found_sources
from opensora_like.datasets.base import ClipDataset
from opensora_like.models.base import encoders_of
from opensora_like.registry import MODELS, resolve
from opensora_like.schedulers.few_step import shifted
from opensora_like.settings import RunConfig
from opensora_like.training.adapters import add_adapters
from opensora_like.training.cached import Cached
from opensora_like.training.data_checks import Outline
from opensora_like.training.distill import DistillScheduler, own_steps
from opensora_like.training.distill_roles import check_distill, check_generator, null_conditions
from opensora_like.training.ema import check_decay
from opensora_like.training.trainable import lr_scales_of


def check_before_weights(
    cfg: RunConfig, outline: Outline, dataset: ClipDataset, scheduler: DistillScheduler, cached: Cached | None
) -> None:
    """Refuse what would be refused once the weights are there; all ranks call it.

    Args:
        outline: of a run whose dataset was found to fit it; its model gets adapters where the run's does.
        cached: as `open_cached` gives it.

    Raises:
        ValueError: adapters, `lr_scales`, `ema_decay` or `distill` that do not fit the model or the buckets.
        FileNotFoundError: no adapters, or no expert, where the settings say.
    """
    add_adapters(cfg, outline.model)
    lr_scales_of(outline.model, cfg.lr_scales)
    if cfg.ema_decay is not None:
        check_decay(cfg.ema_decay)
    if cfg.distill is not None:
        _check_distill(cfg, outline, dataset, scheduler, cached)


def _check_distill(
    cfg: RunConfig, outline: Outline, dataset: ClipDataset, scheduler: DistillScheduler, cached: Cached | None
) -> None:
    settings = check_distill(cfg)
    check_generator(outline.model)
    classes = {name: resolve(section.get("type"), MODELS) for name, section in cfg.encoders.items()}
    shown = {name: classes[name] for name in encoders_of("captioned image", classes)}
    null_conditions({**shown, **(cached.encoders if cached is not None else {})}, settings)
    for shape in dataset.buckets.shapes:
        latent_shape = outline.autoencoder.latent_shape(shape.num_frames, shape.height, shape.width)[1:]
        own_steps(shifted(settings.times, scheduler, latent_shape), settings, has_before=settings.before is not None)
    before = settings.before or {}
    found_sources(before, list(before), where="distill.before.")
