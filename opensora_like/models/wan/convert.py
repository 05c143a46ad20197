"""Two layouts of Wan weights: the single files of the original code, and diffusers', which is this model's own.

Only names differ; no tensor changes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

PREFIXES = ("model.diffusion_model.", "diffusion_model.", "module.", "model.")
# diffusers once saved a norm that nothing calls
UNUSED = re.compile(r"blocks\.\d+\.attn2\.norm_added_q\.weight")

_TOP = {
    "text_embedding.0": "condition_embedder.text_embedder.linear_1",
    "text_embedding.2": "condition_embedder.text_embedder.linear_2",
    "time_embedding.0": "condition_embedder.time_embedder.linear_1",
    "time_embedding.2": "condition_embedder.time_embedder.linear_2",
    "time_projection.1": "condition_embedder.time_proj",
    "img_emb.proj.0": "condition_embedder.image_embedder.norm1",
    "img_emb.proj.1": "condition_embedder.image_embedder.ff.net.0.proj",
    "img_emb.proj.3": "condition_embedder.image_embedder.ff.net.2",
    "img_emb.proj.4": "condition_embedder.image_embedder.norm2",
    "head.head": "proj_out",
    "head.modulation": "scale_shift_table",
}
_ATTENTION = {"q": "to_q", "k": "to_k", "v": "to_v", "o": "to_out.0", "norm_q": "norm_q", "norm_k": "norm_k"}
_IMAGE = {"k_img": "add_k_proj", "v_img": "add_v_proj", "norm_k_img": "norm_added_k"}
_BLOCK = {
    **{f"self_attn.{old}": f"attn1.{new}" for old, new in _ATTENTION.items()},
    **{f"cross_attn.{old}": f"attn2.{new}" for old, new in (_ATTENTION | _IMAGE).items()},
    "norm3": "norm2",  # the one norm of a block with weights, before the cross-attention
    "ffn.0": "ffn.net.0.proj",
    "ffn.2": "ffn.net.2",
    "modulation": "scale_shift_table",
}
_NAME = re.compile(r"(?P<block>blocks\.\d+\.)?(?P<module>.+?)(?P<kind>\.(?:weight|bias))?")


def to_diffusers_name(name: str) -> str:
    """diffusers' name of a parameter of the original layout; a name of neither layout stays as it is."""
    return _renamed(name, _TOP, _BLOCK)


def to_original_name(name: str) -> str:
    """Undo `to_diffusers_name`."""
    return _renamed(name, {new: old for old, new in _TOP.items()}, {new: old for old, new in _BLOCK.items()})


def to_diffusers(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights under this model's names, from either layout.

    Prefixes that other programs put before every name are taken off, and a norm that the model never calls is left
    out.

    Raises:
        ValueError: two tensors would get one name.
    """
    weights = without_prefix(weights)
    if not is_original(weights):
        return {name: tensor for name, tensor in weights.items() if not UNUSED.fullmatch(name)}
    return _rename_all(weights, to_diffusers_name)


def to_original(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights in the layout of the original code, from this model's.

    Raises:
        ValueError: two tensors would get one name.
    """
    return _rename_all(weights, to_original_name)


def is_original(weights: Mapping[str, Tensor]) -> bool:
    """Whether the names are of the original layout."""
    return any(name.startswith(("head.", "time_projection.")) or ".self_attn." in name for name in weights)


def _renamed(name: str, top: Mapping[str, str], block: Mapping[str, str]) -> str:
    match = _NAME.fullmatch(name)
    if match is None:
        return name
    prefix, module, kind = match["block"] or "", match["module"], match["kind"] or ""
    return f"{prefix}{(block if prefix else top).get(module, module)}{kind}"


def _rename_all(weights: Mapping[str, Tensor], rename) -> dict[str, Tensor]:
    out: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        if rename(name) in out:
            raise ValueError(f"wan weights: {name!r} is a second tensor for {rename(name)!r}; two layouts are mixed")
        out[rename(name)] = tensor
    return out


def without_prefix(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Without what other programs put before every name; see `PREFIXES`."""
    for prefix in PREFIXES:
        if weights and all(name.startswith(prefix) for name in weights):
            return {name.removeprefix(prefix): tensor for name, tensor in weights.items()}
    return dict(weights)
