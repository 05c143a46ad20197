"""Reads adapters from a LoRA run's checkpoint or a file of another program, and puts them into a denoiser."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from opensora_like.checkpoint import layout
from opensora_like.checkpoint.facts import CONFIG_FILE
from opensora_like.checkpoint.lora_files import (
    Adapter,
    merge_into,
    parse_adapters,
    read_settings,
    scale_of,
    to_own_names,
)
from opensora_like.checkpoint.weights import newest_of, read_weights
from opensora_like.config import read_config
from opensora_like.models.lora import add_lora, is_adapter, merge_lora, put_adapters
from opensora_like.runtime import logger


def read_adapters(source: str, *, where: str, use_ema: bool) -> dict[str, Tensor]:
    """The adapters in a LoRA run's checkpoint.

    Raises:
        ValueError: it holds something else.
        FileNotFoundError: nothing is there.
    """
    weights = read_weights(source, use_ema=use_ema, where=where)
    if others := [n for n in weights if not is_adapter(n)]:
        raise ValueError(
            f"{where}={source!r} holds {len(others)} tensors that are no adapters, {others[:2]}; "
            "whole weights belong into model.from_pretrained"
        )
    return weights


def read_lora_config(source: str, *, where: str) -> dict[str, Any]:
    """The lora_config that the adapters of a run's checkpoint were made with.

    Raises:
        ValueError: a run without lora_config.
    """
    config = read_config(newest_of(Path(source), where) / CONFIG_FILE).config
    if config.lora_config is None:
        raise ValueError(f"{where}={source!r} was trained without lora_config; give it as --ckpt-path")
    return dict(config.lora_config)


def merge_adapters(model: nn.Module, source: str, *, where: str, use_ema: bool, strength: float = 1.0) -> int:
    """Add the adapters of `source` to the weights of `model`, scaled as they were trained.

    Args:
        source: a LoRA run's checkpoint, a folder of peft, or a file of peft, diffusers, kohya or ComfyUI.
        strength: what they are multiplied with.

    Returns: how many tensors they were.

    Raises: as `read_adapters`, `read_lora_config` and `parse_adapters`; ValueError where they do not fit the model.
    """
    place = f"{where}={source!r}"
    if is_own(source, where=where):
        add_lora(model, read_lora_config(source, where=where), seed=0)
        number = put_adapters(model, read_adapters(source, where=where, use_ema=use_ema), where=place)
        merge_lora(model, strength=strength)
        return number
    weights, adapters = read_foreign(model, source, where=where)
    merge_into(model, adapters, strength=strength)
    return len(weights)


def merge_asked(model: nn.Module, source: str | None, *, use_ema: bool, strength: float) -> None:
    """`merge_adapters` of the setting `lora_checkpoint`; nothing where that is None.

    Raises: as `merge_adapters`; ValueError for a strength that nothing reads.
    """
    if source is not None:
        number = merge_adapters(model, source, where="lora_checkpoint", use_ema=use_ema, strength=strength)
        logger.info("lora_checkpoint %s: %d tensors merged, times %g", source, number, strength)
    elif strength != 1:
        raise ValueError(f"lora_scale={strength} is read with lora_checkpoint only, and that is None")


def begin_from(model: nn.Module, source: str, lora_config: Mapping[str, Any], *, where: str) -> int:
    """Put the adapters of `source` into `model`, which was given adapters by `lora_config`.

    Returns: how many tensors they were.

    Raises: as `merge_adapters`; ValueError where they were trained with another scale (alpha / rank).
    """
    place = f"{where}={source!r}"
    if is_own(source, where=where):
        check_scales({"all": scale_of(read_lora_config(source, where=where))}, lora_config, where=place)
        return put_adapters(model, read_adapters(source, where=where, use_ema=False), where=place)
    _, adapters = read_foreign(plain_outline(model), source, where=where)
    check_scales({name: adapter.scale for name, adapter in adapters.items()}, lora_config, where=place)
    return put_adapters(model, to_own_names(adapters), where=place)


def check_scales(scales: Mapping[str, float], lora_config: Mapping[str, Any], *, where: str) -> None:
    """Refuse adapters, of which the scales are given by name, that would add more or less than they were trained to.

    Raises:
        ValueError: a scale is not that of `lora_config`.
    """
    mine = scale_of(lora_config)
    if other := [f"{name}: {scale:g}" for name, scale in scales.items() if not math.isclose(scale, mine, rel_tol=1e-3)]:
        raise ValueError(
            f"{where} was trained with another scale (alpha / rank) than the {mine:g} of lora_config: {other[:2]}; set "
            "lora_config.lora_alpha to fit"
        )


def is_own(source: str, *, where: str) -> bool:
    """Whether `source` is a checkpoint of this program."""
    return (newest_of(Path(source), where) / layout.STATE_FILE).is_file()


def read_foreign(model: nn.Module, source: str, *, where: str) -> tuple[dict[str, Tensor], dict[str, Adapter]]:
    """The tensors of another program's file or folder, and the adapters that they are for `model`, which has none."""
    weights = read_weights(source, where=where)
    place = f"{where}={source!r}"
    return weights, parse_adapters(weights, model, where=place, settings=read_settings(Path(source)))


def plain_outline(model: nn.Module) -> nn.Module:
    """`model` as it is without its adapters, on ``meta``."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    outline = copy.deepcopy(model, {id(p): nn.Parameter(p.to("meta"), p.requires_grad) for p in model.parameters()})
    for name, module in list(outline.named_modules()):
        if isinstance(module, BaseTunerLayer):
            holder, _, leaf = name.rpartition(".")
            setattr(outline.get_submodule(holder), leaf, module.get_base_layer())
    return outline


def peft_config(lora_config: Mapping[str, Any], base: str | None) -> str:
    """What peft reads beside ``adapter_model.safetensors``."""
    facts = {"peft_type": "LORA", "base_model_name_or_path": base, "inference_mode": True, "bias": "none"}
    return json.dumps({**facts, **lora_config}, indent=1, default=list)
