"""The names under which diffusers keeps a FLUX transformer, and back.

Rotated pairs are (2i, 2i + 1) there, and so they are here with ``use_liger_rope=False``.

Source: huggingface/diffusers:src/diffusers/models/transformers/transformer_flux.py.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from opensora_like.models.mmdit.convert import fuse_qkv, is_fused, split_qkv

_EMBEDDERS = {
    "time_in": "time_text_embed.timestep_embedder",
    "guidance_in": "time_text_embed.guidance_embedder",
    "vector_in": "time_text_embed.text_embedder",
}
# module here -> module in diffusers, with q, k, v in a linear each
_MODULES = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    **{f"{ours}.in_layer": f"{theirs}.linear_1" for ours, theirs in _EMBEDDERS.items()},
    **{f"{ours}.out_layer": f"{theirs}.linear_2" for ours, theirs in _EMBEDDERS.items()},
    "final_layer.linear": "proj_out",
    "final_layer.adaLN_modulation.1": "norm_out.linear",
}
_DOUBLE = {
    "img_mod.lin": "norm1.linear",
    "txt_mod.lin": "norm1_context.linear",
    "img_attn.q_proj": "attn.to_q",
    "img_attn.k_proj": "attn.to_k",
    "img_attn.v_proj": "attn.to_v",
    "img_attn.proj": "attn.to_out.0",
    "txt_attn.q_proj": "attn.add_q_proj",
    "txt_attn.k_proj": "attn.add_k_proj",
    "txt_attn.v_proj": "attn.add_v_proj",
    "txt_attn.proj": "attn.to_add_out",
    "img_mlp.0": "ff.net.0.proj",
    "img_mlp.2": "ff.net.2",
    "txt_mlp.0": "ff_context.net.0.proj",
    "txt_mlp.2": "ff_context.net.2",
    "img_attn.norm.query_norm": "attn.norm_q",
    "img_attn.norm.key_norm": "attn.norm_k",
    "txt_attn.norm.query_norm": "attn.norm_added_q",
    "txt_attn.norm.key_norm": "attn.norm_added_k",
}
_SINGLE = {
    "modulation.lin": "norm.linear",
    "q_proj": "attn.to_q",
    "k_proj": "attn.to_k",
    "linear2": "proj_out",
    "norm.query_norm": "attn.norm_q",
    "norm.key_norm": "attn.norm_k",
}
_BLOCKS = {"double_blocks": ("transformer_blocks", _DOUBLE), "single_blocks": ("single_transformer_blocks", _SINGLE)}
_BLOCK = re.compile(r"(?P<list>\w+_blocks)\.(?P<index>\d+)\.(?P<module>.+)\.(?P<kind>\w+)")


def is_diffusers(state: Mapping[str, Tensor]) -> bool:
    """Whether the weights have diffusers' names."""
    return any(name.startswith(("transformer_blocks.", "single_transformer_blocks.")) for name in state)


def to_diffusers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """diffusers' layout from either layout of this model.

    Raises:
        ValueError: tensors that a FLUX transformer does not have, such as those of the visual condition.
    """
    if is_diffusers(state):
        return dict(state)
    out: dict[str, Tensor] = {}
    for name, tensor in (split_qkv(state) if is_fused(state) else state).items():
        if match := re.fullmatch(r"single_blocks\.(\d+)\.v_mlp\.(\w+)", name):
            width = len(state[f"single_blocks.{match[1]}.linear2.bias"])
            place = f"single_transformer_blocks.{match[1]}"
            out[f"{place}.attn.to_v.{match[2]}"] = tensor[:width].clone()
            out[f"{place}.proj_mlp.{match[2]}"] = tensor[width:].clone()
            continue
        out[_renamed(name, _names(to_theirs=True))] = _final_norm(name, tensor, "final_layer.adaLN_modulation.1")
    return out


def from_diffusers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The layout of ``fused_qkv=True, use_liger_rope=False`` from diffusers' one.

    Raises:
        ValueError: tensors that a FLUX transformer does not have.
    """
    if not is_diffusers(state):
        return dict(state)
    out: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if match := re.fullmatch(r"single_transformer_blocks\.(\d+)\.(attn\.to_v|proj_mlp)\.(\w+)", name):
            place, kind = f"single_transformer_blocks.{match[1]}", match[3]
            both = [state[f"{place}.{module}.{kind}"] for module in ("attn.to_v", "proj_mlp")]
            out[f"single_blocks.{match[1]}.v_mlp.{kind}"] = torch.cat(both)
            continue
        out[_renamed(name, _names(to_theirs=False))] = _final_norm(name, tensor, "norm_out.linear")
    return fuse_qkv(out)


def _names(*, to_theirs: bool) -> tuple[dict[str, str], dict[str, tuple[str, dict[str, str]]]]:
    """Renaming of modules outside of blocks, and list of blocks -> (its name, renaming inside)."""
    if to_theirs:
        return _MODULES, _BLOCKS
    flipped = {theirs: (ours, {b: a for a, b in inside.items()}) for ours, (theirs, inside) in _BLOCKS.items()}
    return {b: a for a, b in _MODULES.items()}, flipped


def _renamed(name: str, names: tuple[dict[str, str], dict[str, tuple[str, dict[str, str]]]]) -> str:
    outside, blocks = names
    if (match := _BLOCK.fullmatch(name)) and match["list"] in blocks:
        into, inside = blocks[match["list"]]
        if match["module"] in inside:
            module = inside[match["module"]]
            return f"{into}.{match['index']}.{module}.{_kind(module, match['kind'])}"
    module, _, kind = name.rpartition(".")
    if module not in outside:
        raise ValueError(
            f"mmdit weights: {name!r} has no place in the other layout; a FLUX transformer of diffusers takes text, "
            "pooled text and guidance only"
        )
    return f"{outside[module]}.{kind}"


def _kind(module: str, kind: str) -> str:
    """Name of a parameter in its new `module`: a norm has a ``scale`` here and a ``weight`` there."""
    return "scale" if module.endswith("_norm") else {"scale": "weight"}.get(kind, kind)


def _final_norm(name: str, tensor: Tensor, module: str) -> Tensor:
    """The last modulation gives (shift, scale) here and (scale, shift) there."""
    return torch.cat([*reversed(tensor.chunk(2))]) if name.rpartition(".")[0] == module else tensor
