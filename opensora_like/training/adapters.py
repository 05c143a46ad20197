"""Puts the adapters that a config asks for into the denoiser."""

from __future__ import annotations

from opensora_like import rng
from opensora_like.checkpoint.adapters import begin_from
from opensora_like.models.base import Denoiser
from opensora_like.models.lora import add_lora
from opensora_like.runtime import logger
from opensora_like.settings import RunConfig


def add_adapters(cfg: RunConfig, model: Denoiser) -> None:
    """Freeze the model and put adapters in, from `lora_checkpoint` where it is set; nothing without `lora_config`.

    Raises:
        ValueError: a lora_config that does not fit the model, adapters of another, adapters without a lora_config, or
            tensor parallelism.
    """
    if cfg.lora_config is None:
        if cfg.lora_checkpoint is not None:
            raise ValueError(f"lora_checkpoint={cfg.lora_checkpoint!r} is used with lora_config only, and that is None")
        return
    if (cfg.booster.get("plugin_config") or {}).get("tp_size", 1) > 1 or cfg.booster.get("tp_size", 1) > 1:
        raise ValueError("tp_size above 1 in the booster cuts linears that lora_config adapts; use tp_size=1")
    add_lora(model, cfg.lora_config, seed=rng.seed_of(cfg.seed, "lora"))
    if cfg.lora_checkpoint is not None:
        where = f"lora_checkpoint={cfg.lora_checkpoint!r}"
        number = begin_from(model, cfg.lora_checkpoint, cfg.lora_config, where="lora_checkpoint")
        logger.info("%s: %d tensors loaded", where, number)
