"""Sizes of the published HunyuanVideo models."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

Variant = Literal["t2v", "i2v"]

_13B = {
    "num_attention_heads": 24,
    "attention_head_dim": 128,
    "num_layers": 20,
    "num_single_layers": 40,
    "rope_axes_dim": (16, 56, 56),
}
VARIANTS: dict[str, dict[str, Any]] = {"t2v": _13B, "i2v": {**_13B, "token_replace": True}}


@dataclass(frozen=True)
class HunyuanSizes:
    """What the weights of a HunyuanVideo denoiser depend on; the names are those of diffusers' config.json.

    Args:
        num_layers: blocks with weights of their own for image and text.
        num_single_layers: blocks with the same weights for both.
        num_refiner_layers: of the encoder that text goes through first.
        pooled_dim: width of the pooled text embedding, diffusers' pooled_projection_dim.
        rope_axes_dim: how a head's width is shared among positions in t, h and w.
        guidance_embeds: the scale of guidance is an input.
        token_replace: the first frame may be given, diffusers' image_condition_type="token_replace".
    """

    num_attention_heads: int
    attention_head_dim: int
    num_layers: int
    num_single_layers: int
    rope_axes_dim: tuple[int, ...]
    num_refiner_layers: int = 2
    in_channels: int = 16
    mlp_ratio: float = 4.0
    text_dim: int = 4096
    pooled_dim: int = 768
    rope_theta: float = 256.0
    patch_size: int = 2
    guidance_embeds: bool = True
    token_replace: bool = False

    def __post_init__(self) -> None:
        counts = ("num_attention_heads", "attention_head_dim", "in_channels", "text_dim", "pooled_dim", "patch_size")
        for name in counts:
            if getattr(self, name) < 1:
                raise ValueError(f"model.{name}={getattr(self, name)} must be 1 or more")
        for name in ("num_layers", "num_single_layers", "num_refiner_layers"):
            if getattr(self, name) < 0:
                raise ValueError(f"model.{name}={getattr(self, name)} must be 0 or more")
        if self.num_layers + self.num_single_layers < 1:
            raise ValueError("model.num_layers=0 and model.num_single_layers=0 leave no block; give one or more")
        axes = tuple(self.rope_axes_dim)
        if len(axes) != 3 or any(dim % 2 or dim < 2 for dim in axes) or sum(axes) != self.attention_head_dim:
            raise ValueError(
                f"model.rope_axes_dim={axes} must be three even numbers, for t, h and w, that add up to"
                f" attention_head_dim={self.attention_head_dim}; these add up to {sum(axes)}"
            )

    @property
    def dim(self) -> int:
        """Width of a token."""
        return self.num_attention_heads * self.attention_head_dim


def resolve_sizes(variant: str | None, given: Mapping[str, Any]) -> HunyuanSizes:
    """The sizes of a variant, with those that were given in their place.

    Args:
        given: size -> value, None where it was not given.

    Raises:
        ValueError: an unknown variant, a size that has none, or sizes that do not fit.
    """
    if variant is not None and variant not in VARIANTS:
        raise ValueError(
            f"model.variant={variant!r} is not one of {sorted(VARIANTS)} (the variant with 33 input channels, which"
            " puts the image beside the latents, is not built)"
        )
    sizes = dict(VARIANTS[variant]) if variant is not None else {}
    sizes |= {name: value for name, value in given.items() if value is not None}
    if missing := [name for name in _13B if name not in sizes]:
        raise ValueError(f"model: hunyuan_video has no {missing}; give them, or variant=, one of {sorted(VARIANTS)}")
    return HunyuanSizes(**{**sizes, "rope_axes_dim": tuple(sizes["rope_axes_dim"])})
