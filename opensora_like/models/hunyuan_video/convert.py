"""Two layouts of HunyuanVideo weights: the single file of the original code, and diffusers', this model's own."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

PREFIXES = ("model.diffusion_model.", "diffusion_model.", "module.", "model.")

_LINEAR = {"mlp.0": "linear_1", "mlp.2": "linear_2", "in_layer": "linear_1", "out_layer": "linear_2"}
_LINEAR |= {"linear_1": "linear_1", "linear_2": "linear_2"}
_TOP = {
    "img_in": "x_embedder",
    "time_in": "time_text_embed.timestep_embedder",
    "vector_in": "time_text_embed.text_embedder",
    "guidance_in": "time_text_embed.guidance_embedder",
    "txt_in.t_embedder": "context_embedder.time_text_embed.timestep_embedder",
    "txt_in.c_embedder": "context_embedder.time_text_embed.text_embedder",
    "txt_in.input_embedder": "context_embedder.proj_in",
    "final_layer.linear": "proj_out",
    "final_layer.adaLN_modulation.1": "norm_out.linear",
}
_DOUBLE = {
    "img_mod.linear": "norm1.linear",
    "txt_mod.linear": "norm1_context.linear",
    "img_attn_q_norm": "attn.norm_q",
    "img_attn_k_norm": "attn.norm_k",
    "txt_attn_q_norm": "attn.norm_added_q",
    "txt_attn_k_norm": "attn.norm_added_k",
    "img_attn_proj": "attn.to_out.0",
    "txt_attn_proj": "attn.to_add_out",
    "img_mlp.fc1": "ff.net.0.proj",
    "img_mlp.fc2": "ff.net.2",
    "txt_mlp.fc1": "ff_context.net.0.proj",
    "txt_mlp.fc2": "ff_context.net.2",
}
_SINGLE = {
    "modulation.linear": "norm.linear",
    "q_norm": "attn.norm_q",
    "k_norm": "attn.norm_k",
    "linear2": "proj_out",
}
_REFINER = {
    "norm1": "norm1",
    "norm2": "norm2",
    "self_attn_proj": "attn.to_out.0",
    "mlp.fc1": "ff.net.0.proj",
    "mlp.fc2": "ff.net.2",
    "adaLN_modulation.1": "norm_out.linear",
}
_OWN = ("attn.to_q", "attn.to_k", "attn.to_v")
_ADDED = ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj")
# blocks of the original -> ours, their renamed modules, and the fused ones with what they are split into
_BLOCKS = {
    "double_blocks": ("transformer_blocks", _DOUBLE, {"img_attn_qkv": _OWN, "txt_attn_qkv": _ADDED}),
    "single_blocks": ("single_transformer_blocks", _SINGLE, {"linear1": (*_OWN, "proj_mlp")}),
    "txt_in.individual_token_refiner.blocks": (
        "context_embedder.token_refiner.refiner_blocks",
        _REFINER,
        {"self_attn_qkv": _OWN},
    ),
}
_NAME = re.compile(rf"(?P<blocks>{'|'.join(map(re.escape, _BLOCKS))})\.(?P<i>\d+)\.(?P<module>.+)\.(?P<kind>\w+)")


def is_original(weights: Mapping[str, Tensor]) -> bool:
    """Whether the names are of the original layout, with or without a prefix."""
    return any("double_blocks." in name or "individual_token_refiner." in name for name in weights)


def to_diffusers(weights: Mapping[str, Tensor], *, dim: int) -> dict[str, Tensor]:
    """Weights under this model's names, from the original layout.

    Prefixes that other programs put before every name are taken off; a name that is unknown stays, for the loader to
    report.

    Args:
        dim: width of a token, which tells the parts of fused projections.

    Raises:
        ValueError: a fused projection without the parts that it has to have.
    """
    out: dict[str, Tensor] = {}
    for prefix in PREFIXES:
        if all(name.startswith(prefix) for name in weights):
            weights = {name.removeprefix(prefix): tensor for name, tensor in weights.items()}
            break
    for name, tensor in weights.items():
        out.update(_in_block(name, tensor, dim) if _NAME.fullmatch(name) else [(_top(name), _top_value(name, tensor))])
    return out


def _in_block(name: str, tensor: Tensor, dim: int) -> Iterator[tuple[str, Tensor]]:
    match = _NAME.fullmatch(name)
    ours, renamed, fused = _BLOCKS[match["blocks"]]
    start, module, kind = f"{ours}.{match['i']}", match["module"], match["kind"]
    if module not in fused:
        yield (f"{start}.{renamed[module]}.{kind}" if module in renamed else name), tensor
        return
    parts = fused[module]
    sizes = [dim] * 3 + [len(tensor) - 3 * dim] * (len(parts) - 3)
    if sum(sizes) != len(tensor) or min(sizes) < 1:
        raise ValueError(f"hunyuan_video weights: {name!r} has {len(tensor)} rows, {parts} of width {dim} do not fit")
    for part, piece in zip(parts, tensor.split(sizes), strict=True):
        yield f"{start}.{part}.{kind}", piece


def _top(name: str) -> str:
    module, _, kind = name.rpartition(".")
    if module in _TOP:
        return f"{_TOP[module]}.{kind}"
    for old, new in _LINEAR.items():
        parent = module.removesuffix(f".{old}")
        if parent != module and parent in _TOP:
            return f"{_TOP[parent]}.{new}.{kind}"
    if name.startswith("img_in."):
        return f"{_TOP['img_in']}.{name.removeprefix('img_in.')}"
    return name


def _top_value(name: str, tensor: Tensor) -> Tensor:
    """The output layer's modulation is shift and scale in the original, scale and shift here."""
    if not name.startswith("final_layer.adaLN_modulation.1."):
        return tensor
    shift, scale = tensor.chunk(2)
    return torch.cat([scale, shift])
