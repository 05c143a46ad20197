"""Layouts of MMDiT weights: one linear or three for queries, keys and values; two orders of rotated pairs.

All functions take and return state dicts by plain names; tensors of other names pass through untouched.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

_HOLDER = r"(?P<holder>.*double_blocks\.\d+\.(?:img|txt)_attn|.*single_blocks\.\d+)"
_FUSED = re.compile(_HOLDER + r"\.(?:qkv|linear1)\.(?P<kind>weight|bias)")
_SPLIT = re.compile(_HOLDER + r"\.q_proj\.(?P<kind>weight|bias)")
_LINEAR = re.compile(_HOLDER + r"\.(?P<name>qkv|linear1|q_proj|k_proj)\.(?:weight|bias)")
_SCALE = re.compile(_HOLDER + r"\.norm\.(?:query|key)_norm\.scale")


def is_fused(state: Mapping[str, Tensor]) -> bool | None:
    """Whether the weights have one linear for queries, keys and values; None for weights without any.

    Raises:
        ValueError: both layouts are mixed.
    """
    found = {layout for key in state for layout, names in ((True, _FUSED), (False, _SPLIT)) if names.fullmatch(key)}
    if len(found) > 1:
        raise ValueError("mmdit weights: some blocks have fused, some have split qkv; convert a whole state dict")
    return found.pop() if found else None


def split_qkv(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights for ``fused_qkv=False`` from weights for ``fused_qkv=True``."""
    out: dict[str, Tensor] = {}
    for key, tensor in state.items():
        match = _FUSED.fullmatch(key)
        if match is None:
            out[key] = tensor
            continue
        holder, kind = match["holder"], match["kind"]
        h = _hidden_size(state, holder, key)
        q, k, rest = tensor.split([h, h, len(tensor) - 2 * h])
        last = "v_mlp" if "single_blocks" in holder else "v_proj"
        out |= {f"{holder}.{n}.{kind}": t.clone() for n, t in (("q_proj", q), ("k_proj", k), (last, rest))}
    return out


def fuse_qkv(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights for ``fused_qkv=True`` from weights for ``fused_qkv=False``."""
    out = dict(state)
    for key in state:
        match = _SPLIT.fullmatch(key)
        if match is None:
            continue
        holder, kind = match["holder"], match["kind"]
        last, fused = ("v_mlp", "linear1") if "single_blocks" in holder else ("v_proj", "qkv")
        names = [f"{holder}.{n}.{kind}" for n in ("q_proj", "k_proj", last)]
        out[f"{holder}.{fused}.{kind}"] = torch.cat([_partner(state, name, key) for name in names])
        for name in names:
            del out[name]
    return out


def to_liger_rope(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights for ``use_liger_rope=True`` from weights for ``use_liger_rope=False``, fused or split.

    Within each head the rows of queries and keys and their norms' scales move so that the pair (2i, 2i + 1)
    becomes (i, i + D / 2). Nothing in a state dict says which order it has: converting twice spoils it.
    """
    return _permute(state, inverse=False)


def to_interleaved_rope(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Undo `to_liger_rope`."""
    return _permute(state, inverse=True)


def _permute(state: Mapping[str, Tensor], *, inverse: bool) -> dict[str, Tensor]:
    out = dict(state)
    for key, tensor in state.items():
        if _SCALE.fullmatch(key):
            out[key] = tensor[_order(len(tensor), inverse=inverse)]
        elif match := _LINEAR.fullmatch(key):
            holder = match["holder"]
            order = _order(len(_partner(state, f"{holder}.norm.query_norm.scale", key)), inverse=inverse)
            rows = len(tensor) if match["name"] in ("q_proj", "k_proj") else 2 * _hidden_size(state, holder, key)
            heads = tensor[:rows].unflatten(0, (-1, len(order)))
            out[key] = torch.cat([heads[:, order].flatten(0, 1), tensor[rows:]])
    return out


def _order(head_dim: int, *, inverse: bool) -> Tensor:
    """Even places, then odd ones: which row of a head each row is taken from."""
    order = torch.arange(head_dim).view(-1, 2).t().flatten()
    return order.argsort() if inverse else order


def _hidden_size(state: Mapping[str, Tensor], holder: str, key: str) -> int:
    """Width of the queries of a fused linear, read from the input width of its weight."""
    name = "linear1" if "single_blocks" in holder else "qkv"
    return _partner(state, f"{holder}.{name}.weight", key).shape[1]


def _partner(state: Mapping[str, Tensor], name: str, key: str) -> Tensor:
    if name not in state:
        raise ValueError(f"mmdit weights: {key!r} is there but {name!r} is not; convert a whole state dict")
    return state[name]
