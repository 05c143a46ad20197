"""Adapters in the files of other programs: peft's and diffusers' names, and those of kohya and ComfyUI.

The names are looked up in a table made of the model's own linears, never guessed; a key that is not in it is an error.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from opensora_like.models.lora import ADAPTER, own_name

PEFT_CONFIG = "adapter_config.json"
PEFT_STEM = "adapter_model"  # of the file that peft's settings lie beside
KOHYA_PREFIX = "lora_unet__"
# what other programs put before the names of a denoiser's modules; taken off as long as one is there
PREFIXES = (
    *("base_model.model.", "model.diffusion_model.", "diffusion_model.", "transformer."),
    *("lora_unet__", "lora_unet_", "lora_transformer_"),
)
_KEY = re.compile(
    r"(?P<module>.+)\.(?:(?P<down>lora_A|lora_down)|(?P<up>lora_B|lora_up)|(?P<alpha>alpha))(?:\.default)?(?:\.weight)?"
)
# settings of peft that change what an adapter does, and are not read from its files here
_REFUSED = ("alpha_pattern", "rank_pattern", "use_dora", "fan_in_fan_out")


class Adapter(NamedTuple):
    """The adapter of one linear: it adds ``scale * up @ down`` to the weight."""

    down: Tensor  # [rank, in]
    up: Tensor  # [out, rank]
    scale: float  # alpha / rank

    def delta(self) -> Tensor:
        """Float32 [out, in]."""
        return self.scale * (self.up.float() @ self.down.float())


def module_table(model: nn.Module) -> dict[str, str]:
    """Every name that a file may have for a linear of `model` -> its own name.

    Those are its own, that in the original layout where the model knows one (``other_name``), and both with
    underscores in the place of dots.

    Raises:
        ValueError: one name would mean two linears.
    """
    table: dict[str, str] = {}
    for own in linears_of(model):
        for name in {own, _original_name(model, own)}:
            for spelling in {name, name.replace(".", "_")}:
                if table.setdefault(spelling, own) != own:
                    raise ValueError(f"{spelling!r} could be {own!r} or {table[spelling]!r}; rename one of the modules")
    return table


def linears_of(model: nn.Module) -> list[str]:
    """Names of what an adapter can stand at."""
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]


def parse_adapters(
    weights: Mapping[str, Tensor], model: nn.Module, *, where: str, settings: Mapping[str, Any] | None = None
) -> dict[str, Adapter]:
    """Adapters by the own names of the linears of `model`, which has none put in.

    Args:
        settings: peft's adapter_config.json; None where there is none. A file without it and without ``.alpha`` has
            alpha = rank, as other programs take it.

    Raises:
        ValueError: a key that is of no linear of the model, half an adapter, shapes that do not fit, or settings that
            cannot be honoured.
    """
    for name in _REFUSED:
        if settings and settings.get(name):
            raise ValueError(f"{where}: {PEFT_CONFIG} has {name}={settings[name]!r}, which is not supported")
    table = module_table(model)
    parts: dict[str, dict[str, Tensor]] = {}
    unknown = []
    for key, tensor in weights.items():
        match = _KEY.fullmatch(key)
        module = table.get(_without_prefix(match["module"], table)) if match is not None else None
        if module is None:
            unknown.append(key)
        else:
            parts.setdefault(module, {})[str(match.lastgroup)] = tensor
    if unknown:
        raise ValueError(
            f"{where}: {len(unknown)} of {len(weights)} tensors are of no linear of {type(model).__name__}, "
            f"{unknown[:3]}; the file is of another model, or holds more than adapters of the denoiser"
        )
    return {module: _adapter(found, model, module, where, settings) for module, found in parts.items()}


def read_settings(source: Path) -> dict[str, Any] | None:
    """peft's adapter_config.json, of a folder or of the file in it; or what diffusers notes in a file's metadata; None
    where neither is."""
    file = (source if source.is_dir() else source.parent) / PEFT_CONFIG
    if (source.is_dir() or source.stem == PEFT_STEM) and file.is_file():
        return json.loads(file.read_text())
    if source.is_dir():
        return None
    if source.suffix != ".safetensors":
        return None
    from safetensors import safe_open

    with safe_open(source, "pt") as file:
        noted = (file.metadata() or {}).get("lora_adapter_metadata")
    if noted is None:
        return None
    settings = json.loads(noted)
    return {name.removeprefix("transformer."): value for name, value in settings.items()}


def to_own_names(adapters: Mapping[str, Adapter]) -> dict[str, Tensor]:
    """As `lora.put_adapters` takes them; the scales are not in them."""
    named = {f"{module}.lora_A.weight": adapter.down for module, adapter in adapters.items()}
    named |= {f"{module}.lora_B.weight": adapter.up for module, adapter in adapters.items()}
    return {own_name(name): tensor for name, tensor in named.items()}


@torch.no_grad()
def merge_into(model: nn.Module, adapters: Mapping[str, Adapter], *, strength: float = 1.0) -> None:
    """Add adapters to the weights that they are of, in float32.

    Args:
        strength: what they are multiplied with, beside their own scales.
    """
    for module, adapter in adapters.items():
        weight = model.get_submodule(module).weight
        weight.copy_((weight.float() + strength * adapter.delta()).to(weight))


def scale_of(lora_config: Mapping[str, Any]) -> float:
    """alpha / rank of peft's settings; with ``use_rslora`` alpha / sqrt(rank)."""
    rank = lora_config.get("r", 8)
    return lora_config.get("lora_alpha", 8) / (math.sqrt(rank) if lora_config.get("use_rslora") else rank)


def to_kohya(weights: Mapping[str, Tensor], lora_config: Mapping[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """A run's adapters as kohya and ComfyUI name them, in the original layout, each with its alpha.

    Args:
        weights: by our names, as a checkpoint has them.
        model: without adapters; it may be on ``meta``.

    Raises:
        ValueError: what this form cannot hold: DoRA, ranks or alphas that differ by pattern, other adapters.
    """
    for name in _REFUSED:
        if lora_config.get(name):
            raise ValueError(f"lora_config.{name}={lora_config[name]!r} cannot be written in this form; use peft's")
    plain = {name.replace(f".{ADAPTER}", ""): tensor for name, tensor in weights.items()}
    out: dict[str, Tensor] = {}
    for name, tensor in plain.items():
        match = _KEY.fullmatch(name)
        if match is None:
            raise ValueError(f"{name!r} is no low-rank adapter of a linear; use peft's form")
        key = KOHYA_PREFIX + _original_name(model, match["module"]).replace(".", "_")
        if match["down"]:
            out[f"{key}.lora_down.weight"] = tensor
            out[f"{key}.alpha"] = torch.tensor(scale_of(lora_config) * len(tensor))
        else:
            out[f"{key}.lora_up.weight"] = tensor
    return out


def _original_name(model: nn.Module, module: str) -> str:
    other = getattr(model, "other_name", None)
    return module if other is None else other(module)


def _without_prefix(name: str, table: Mapping[str, str]) -> str:
    while name not in table:
        prefix = next((p for p in PREFIXES if name.startswith(p)), None)
        if prefix is None:
            return name
        name = name.removeprefix(prefix)
    return name


def _adapter(
    found: Mapping[str, Tensor], model: nn.Module, module: str, where: str, settings: Mapping[str, Any] | None
) -> Adapter:
    if not {"down", "up"} <= found.keys():
        raise ValueError(f"{where}: the adapter of {module!r} has {sorted(found)} only; down and up are needed")
    down, up = (found[name].flatten(1) for name in ("down", "up"))  # some files hold them as 1x1 convolutions
    size = tuple(model.get_submodule(module).weight.shape)
    if (len(up), down.shape[1]) != size or len(down) != up.shape[1]:
        raise ValueError(
            f"{where}: the adapter of {module!r} has shapes {tuple(up.shape)} and {tuple(down.shape)}, the linear has "
            f"{size}; it is of another model"
        )
    if "alpha" in found:
        return Adapter(down, up, found["alpha"].item() / len(down))
    return Adapter(down, up, 1.0 if settings is None else scale_of({**settings, "r": len(down)}))
