"""What FantasyTalking adds to Wan: a projection of the audio, and keys and values of it in every cross-attention.

Letters of the shape suffixes: B batch, N heads, L tokens, K audio vectors, D width (of a head in BNLD), C width of an
audio vector, or of all heads.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from opensora_like.models.layers import attention
from opensora_like.models.wan.blocks import attend_to_context, cross_queries, project_out, split_heads


class SpeechContext(NamedTuple):
    """What the cross-attention looks at, and which of the audio each token hears.

    Args:
        heard_BLK: bool, of this rank's tokens.
        audio_scale: by which what the audio adds is multiplied.
    """

    text_BLD: Tensor
    image_BLD: Tensor | None
    audio_BKC: Tensor
    heard_BLK: Tensor
    audio_scale: float


class AudioProjection(nn.Module):
    """Embeddings of the audio encoder to the width at which blocks read them."""

    def __init__(self, audio_dim: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Linear(audio_dim, width, bias=False)
        self.norm = nn.LayerNorm(width)

    def forward(self, audio_BKD: Tensor) -> Tensor:
        """Returns: [B, K, width]."""
        return self.norm(self.proj(audio_BKD))


class SpeechAttention(nn.Module):
    """How a Wan cross-attention attends to text, image and audio: a processor of diffusers' ``WanAttention``.

    The queries are those of the text, and so is the output linear. `k_proj` and `v_proj` begin at zero, as published:
    the audio then adds nothing.

    Source: FantasyTalking, arXiv:2504.04842, section 3.1; Fantasy-AMAP/fantasy-talking:model.py.
    """

    def __init__(self, width: int, dim: int) -> None:
        super().__init__()
        self.k_proj = nn.Linear(width, dim, bias=False)
        self.v_proj = nn.Linear(width, dim, bias=False)
        for linear in (self.k_proj, self.v_proj):
            nn.init.zeros_(linear.weight)

    def forward(
        self, attn: nn.Module, x_BLD: Tensor, context: SpeechContext, attention_mask: None, rotary_emb: None
    ) -> Tensor:
        """Returns: [B, L, D], like `x_BLD`."""
        q_BNLD = cross_queries(attn, x_BLD)
        out_BLC = attend_to_context(attn, q_BNLD, context)
        k_BNKD, v_BNKD = (split_heads(linear(context.audio_BKC), attn.heads) for linear in (self.k_proj, self.v_proj))
        spoken = hear(q_BNLD, k_BNKD, v_BNKD, context.heard_BLK)
        return project_out(attn, out_BLC + context.audio_scale * spoken)


def hear(q_BNLD: Tensor, k_BNKD: Tensor, v_BNKD: Tensor, heard_BLK: Tensor) -> Tensor:
    """Attention of each token to the audio vectors that it hears, zero where it hears none.

    The published code fills windows up with vectors of zeros; where its attention has no mask, these take a share.

    Args:
        heard_BLK: bool.

    Returns: [B, L, N * D].
    """
    if not k_BNKD.shape[2]:
        return torch.zeros_like(q_BNLD, dtype=v_BNKD.dtype).transpose(1, 2).flatten(2)
    any_BL1 = heard_BLK.any(dim=-1, keepdim=True)
    mask_B1LK = (heard_BLK | ~any_BL1)[:, None]  # a query without a key would be 0 / 0
    out_BLC = attention(q_BNLD, k_BNKD, v_BNKD, mask=mask_B1LK).transpose(1, 2).flatten(2)
    return out_BLC.masked_fill(~any_BL1, 0.0)
