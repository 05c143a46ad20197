"""Parts put into diffusers' Wan blocks: attention that can be exchanged, norms that can be cut, float32 time.

Letters of the shape suffixes: B batch, N heads, L tokens, D width (of a head in BNLD).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.amp import is_autocast_available

from opensora_like.models.layers import Attention, Rope, rms_norm


class Context(NamedTuple):
    """What the cross-attention looks at; each part has keys and values of its own."""

    text_BLD: Tensor
    image_BLD: Tensor | None


class WidthRMSNorm(nn.Module):
    """x / rms(x) * weight over the width of all heads, in float32, returned in the dtype of x.

    `mean_over_ranks` is None where a rank has all heads; see `ParallelPlan.split_norms`.
    """

    def __init__(self, dim: int, *, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))
        self.mean_over_ranks: Callable[[Tensor], Tensor] | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.mean_over_ranks is None:
            return rms_norm(x, self.weight, self.eps)
        wide = x.float()
        mean_square = self.mean_over_ranks(wide.square().mean(dim=-1, keepdim=True))
        return (wide * torch.rsqrt(mean_square + self.eps) * self.weight.float()).to(x.dtype)


class Float32Linear(nn.Linear):
    """A linear that computes in float32, whatever its weights are stored in: t and the modulation go through it."""

    def forward(self, x: Tensor) -> Tensor:
        kind = x.device.type
        with torch.autocast(kind, enabled=False) if is_autocast_available(kind) else nullcontext():
            return F.linear(x.float(), self.weight.float(), None if self.bias is None else self.bias.float())


class SelfAttention:
    """How diffusers' ``WanAttention`` attends to the latent tokens: through `layers.Attention`."""

    def __call__(self, attn: nn.Module, x_BLD: Tensor, context: None, attention_mask: None, rotary_emb: Rope) -> Tensor:
        q, k = attn.norm_q(attn.to_q(x_BLD)), attn.norm_k(attn.to_k(x_BLD))
        q, k, v = (split_heads(part, attn.heads) for part in (q, k, attn.to_v(x_BLD)))
        return project_out(attn, attn.attention(rotary_emb(q), rotary_emb(k), v))


class CrossAttention:
    """How diffusers' ``WanAttention`` attends to text, and to the image where there is one; no token is masked.

    Queries are this rank's tokens, keys are whole, so sequence parallelism has nothing to do here.
    """

    def __call__(
        self, attn: nn.Module, x_BLD: Tensor, context: Context, attention_mask: None, rotary_emb: None
    ) -> Tensor:
        return project_out(attn, attend_to_context(attn, cross_queries(attn, x_BLD), context))


def cross_queries(attn: nn.Module, x_BLD: Tensor) -> Tensor:
    """Of a cross-attention; one set for all that it looks at. Returns: [B, N, L, D]."""
    return split_heads(attn.norm_q(attn.to_q(x_BLD)), attn.heads)


def attend_to_context(attn: nn.Module, q_BNLD: Tensor, context: Context) -> Tensor:
    """What text and image add up to, before the output linear. Returns: [B, L, N * D]."""
    text = attn.norm_k(attn.to_k(context.text_BLD)), attn.to_v(context.text_BLD)
    out_BLD = attn.attention(q_BNLD, *(split_heads(part, attn.heads) for part in text))
    if context.image_BLD is not None:
        image = attn.norm_added_k(attn.add_k_proj(context.image_BLD)), attn.add_v_proj(context.image_BLD)
        out_BLD = out_BLD + attn.attention(q_BNLD, *(split_heads(part, attn.heads) for part in image))
    return out_BLD


def split_heads(x_BLC: Tensor, num_heads: int) -> Tensor:
    """[B, L, N * D] to [B, N, L, D]."""
    return x_BLC.unflatten(-1, (num_heads, -1)).transpose(1, 2)


def project_out(attn: nn.Module, x_BLD: Tensor) -> Tensor:
    """The output linear, and diffusers' dropout after it, which published models leave at 0."""
    for layer in attn.to_out:
        x_BLD = layer(x_BLD)
    return x_BLD


def refit_block(block: nn.Module, *, eps: float) -> None:
    """Exchange the parts of a diffusers block, in place; names and shapes of its weights stay."""
    for attn, processor in ((block.attn1, SelfAttention()), (block.attn2, CrossAttention())):
        for name in ("norm_q", "norm_k", "norm_added_k"):
            if getattr(attn, name, None) is not None:
                setattr(attn, name, WidthRMSNorm(attn.inner_dim, eps=eps))
        attn.attention = Attention()
        attn.set_processor(processor)


def refit_embedder(embedder: nn.Module) -> None:
    """Make the path from t to the modulation compute in float32, in place."""
    time = embedder.time_embedder
    time.linear_1, time.linear_2 = _in_float32(time.linear_1), _in_float32(time.linear_2)
    embedder.time_proj = _in_float32(embedder.time_proj)


def _in_float32(linear: nn.Linear) -> Float32Linear:
    out = Float32Linear(linear.in_features, linear.out_features, device="meta")
    out.weight, out.bias = linear.weight, linear.bias
    return out
