"""Reads adapters from a LoRA run's checkpoint or a folder of peft, and puts them into a denoiser."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from opensora_like.checkpoint import layout
from opensora_like.checkpoint.facts import CONFIG_FILE
from opensora_like.checkpoint.weights import newest_of, read_weights
from opensora_like.config import read_config
from opensora_like.models.lora import add_lora, is_adapter, merge_lora, put_adapters

PEFT_CONFIG = "adapter_config.json"


def read_adapters(source: str, *, where: str, use_ema: bool) -> dict[str, Tensor]:
    """The adapters in a LoRA run's checkpoint, a folder of peft, or a file.

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
    """The lora_config that the adapters of a run's checkpoint, or of a folder of peft, were made with.

    Raises:
        ValueError: it is neither, or of a run without lora_config.
    """
    folder = newest_of(Path(source), where)
    if (folder / layout.STATE_FILE).is_file():
        config = read_config(folder / CONFIG_FILE).config
        if config.lora_config is None:
            raise ValueError(f"{where}={source!r} was trained without lora_config; give it as --ckpt-path")
        return dict(config.lora_config)
    if (folder / PEFT_CONFIG).is_file():
        settings = json.loads((folder / PEFT_CONFIG).read_text())
        return {k: v for k, v in settings.items() if k in ("r", "lora_alpha", "target_modules", "use_rslora")}
    raise ValueError(f"{where}={source!r} is neither a checkpoint of a LoRA run nor a folder with {PEFT_CONFIG}")


def merge_adapters(model: nn.Module, source: str, *, where: str, use_ema: bool) -> int:
    """Add the adapters of `source` to the weights of `model`, with the lora_config that they were made with.

    Returns: how many tensors they were.

    Raises: as `read_adapters` and `read_lora_config`; ValueError where they do not fit the model.
    """
    add_lora(model, read_lora_config(source, where=where), seed=0)
    number = put_adapters(model, read_adapters(source, where=where, use_ema=use_ema), where=f"{where}={source!r}")
    merge_lora(model)
    return number


def peft_config(lora_config: Mapping[str, Any], base: str | None) -> str:
    """What peft reads beside ``adapter_model.safetensors``."""
    facts = {"peft_type": "LORA", "base_model_name_or_path": base, "inference_mode": True, "bias": "none"}
    return json.dumps({**facts, **lora_config}, indent=1, default=list)
