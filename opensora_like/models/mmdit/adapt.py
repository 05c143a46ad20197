"""Published weights of FLUX and Open-Sora v2 for an MMDiT that was built with other options."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from torch import Tensor

from opensora_like.models.mmdit import convert
from opensora_like.models.mmdit.diffusers_layout import from_diffusers, is_diffusers

PREFIXES = ("model.diffusion_model.", "module.")


class Options(Protocol):
    """What of an MMDiT decides the layout of its weights."""

    fused_qkv: bool
    use_liger_rope: bool
    guidance_embed: bool
    cond_embed: bool


def adapt(weights: Mapping[str, Tensor], options: Options) -> tuple[dict[str, Tensor], list[str]]:
    """Weights under the names and in the layout of a model with these options.

    - The names of diffusers' FLUX transformer become those of the published file.
    - Queries, keys and values are split or joined. Files say by their names which they are, but not in which order
      the rotated pairs are: it is taken to be the published one (joined: (2i, 2i + 1) as FLUX; split: halves as
      Open-Sora v2) where the layouts of file and model differ, and the model's own where they do not.
    - `guidance_in` is left out where the model takes no guidance.
    - `cond_in` is left out where the model takes no visual condition; its bias, which is added to every token even
      when no frame is given, goes into `img_in`, so that the outputs for text-to-video stay what they were.

    `cond_in` and others that the file lacks stay missing: the caller reports them, and the model's own stay.

    Returns: the weights, those that need no change as they are; and one line per change.
    """
    notes: list[str] = []
    out = _without_prefix(weights, notes)
    out = _in_layout(out, options, notes)
    if not options.guidance_embed and (dropped := [n for n in out if n.startswith("guidance_in.")]):
        out = {n: w for n, w in out.items() if n not in dropped}
        notes.append(f"guidance_in: {len(dropped)} tensors left out, since model.guidance_embed is False")
    if not options.cond_embed and "cond_in.weight" in out:
        out = _without_cond_in(out, notes)
    return out, notes


def _without_prefix(weights: Mapping[str, Tensor], notes: list[str]) -> dict[str, Tensor]:
    """Without what other programs put in front of every name."""
    for prefix in PREFIXES:
        if weights and all(name.startswith(prefix) for name in weights):
            notes.append(f"{prefix!r} taken off all {len(weights)} names")
            return {name.removeprefix(prefix): w for name, w in weights.items()}
    return dict(weights)


def _in_layout(weights: dict[str, Tensor], options: Options, notes: list[str]) -> dict[str, Tensor]:
    if is_diffusers(weights):
        weights = from_diffusers(weights)
        notes.append("names of diffusers' FLUX transformer changed to those of the published file")
        if not options.fused_qkv and not options.use_liger_rope:
            return convert.split_qkv(weights)  # without the guess below: the order of diffusers is known
        if options.fused_qkv and options.use_liger_rope:
            return convert.to_liger_rope(weights)
    fused = convert.is_fused(weights)
    if fused is None or fused == options.fused_qkv:
        return weights
    if fused:
        out, change = convert.split_qkv(weights), "qkv and linear1 split into q_proj, k_proj, v_proj and v_mlp"
    else:
        out, change = convert.fuse_qkv(weights), "q_proj, k_proj, v_proj and v_mlp joined to qkv and linear1"
    notes.append(f"{change}: {len(weights)} tensors became {len(out)}, since model.fused_qkv is {options.fused_qkv}")
    liger = not fused  # as published
    order = "halves (i, i + D / 2), as Open-Sora v2 publishes" if liger else "pairs (2i, 2i + 1), as FLUX publishes"
    taken = f"rows of queries and keys taken to be in {order}"
    if liger != options.use_liger_rope:
        out = convert.to_liger_rope(out) if options.use_liger_rope else convert.to_interleaved_rope(out)
        taken += f", and reordered, since model.use_liger_rope is {options.use_liger_rope}"
    notes.append(f"{taken}; if that is not so, convert the file first with tools/convert.py --rope")
    return out


def _without_cond_in(weights: dict[str, Tensor], notes: list[str]) -> dict[str, Tensor]:
    out = {n: w for n, w in weights.items() if not n.startswith("cond_in.")}
    bias, given = out.get("img_in.bias"), weights.get("cond_in.bias")
    if bias is not None and given is not None:
        out["img_in.bias"] = (bias.float() + given.float()).to(bias.dtype)
    notes.append("cond_in left out, since model.cond_embed is False; its bias added to img_in.bias")
    return out
