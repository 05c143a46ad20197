"""Layouts of FantasyTalking's weights: the published file of the added parts, flat files, and this model's names.

Only names differ; no tensor changes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from opensora_like.models.wan import convert as wan

PARTS = {"audio_processor": "", "proj_model": "proj_model."}  # of the published file -> what their names begin with
PROJECTION = "proj_model."
OWN, PUBLISHED = ".attn2.processor.", ".cross_attn.processor."


def is_added(name: str) -> bool:
    """Whether a parameter is one that FantasyTalking adds to Wan, in either layout."""
    return name.startswith(PROJECTION) or OWN in name or PUBLISHED in name


def flatten(weights: Mapping[str, Any]) -> dict[str, Tensor]:
    """Without the two tables of the published file; a flat file stays as it is.

    Raises:
        ValueError: tables by other names.
    """
    flat: dict[str, Tensor] = {}
    for key, value in weights.items():
        if not isinstance(value, Mapping):
            flat[key] = value
        elif key in PARTS:
            flat |= {f"{PARTS[key]}{name}": tensor for name, tensor in value.items()}
        else:
            raise ValueError(f"fantasy_talking weights: unknown table {key!r}; the published file has {sorted(PARTS)}")
    return flat


def to_diffusers(weights: Mapping[str, Any]) -> dict[str, Tensor]:
    """Weights under this model's names, from any layout; of Wan's part see `wan.convert.to_diffusers`.

    Raises:
        ValueError: two tensors would get one name, or unknown tables.
    """
    flat = wan.without_prefix(flatten(weights))
    added = {name.replace(PUBLISHED, OWN): tensor for name, tensor in flat.items() if is_added(name)}
    return {**wan.to_diffusers({n: t for n, t in flat.items() if not is_added(n)}), **added}


def to_original(weights: Mapping[str, Any]) -> dict[str, Tensor]:
    """Weights in the layout of the original code, flat, from any.

    Raises:
        ValueError: as `to_diffusers`.
    """
    own = to_diffusers(weights)
    added = {name.replace(OWN, PUBLISHED): tensor for name, tensor in own.items() if is_added(name)}
    return {**wan.to_original({n: t for n, t in own.items() if not is_added(n)}), **added}
