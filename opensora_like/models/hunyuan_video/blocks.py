"""Attention of HunyuanVideo's blocks: text and latents together, keys that are padding left out.

Letters of the shape suffixes: B batch, N heads, L tokens, D width (of a head in BNLD).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from opensora_like.models.layers import Attention, Rope


class JointAttention:
    """How diffusers' ``Attention`` of a block attends: all tokens to latents and to text that is no padding.

    Blocks of two streams have projections of their own for text, those of one stream use the same for both. Without
    a mask it goes through `layers.Attention`, which takes the fastest there is; with one through SDPA.
    """

    def __call__(
        self,
        attn: nn.Module,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        image_rotary_emb: Rope | None = None,
    ) -> tuple[Tensor, Tensor]:
        num_image = hidden_states.shape[1]
        if attn.add_q_proj is None:
            text_layers = (attn.to_q, attn.to_k, attn.to_v, attn.norm_q, attn.norm_k)
        else:
            text_layers = (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj, attn.norm_added_q, attn.norm_added_k)
        layers = (attn.to_q, attn.to_k, attn.to_v, attn.norm_q, attn.norm_k)
        image = _heads(hidden_states, *layers, num_heads=attn.heads)
        text = _heads(encoder_hidden_states, *text_layers, num_heads=attn.heads)
        image = (image_rotary_emb(image[0]), image_rotary_emb(image[1]), image[2])
        q_BNLD, k_BNLD, v_BNLD = (torch.cat(parts, dim=2) for parts in zip(image, text, strict=True))
        out_BLD = _attend(attn.attention, q_BNLD, k_BNLD, v_BNLD, attention_mask)
        image_BLD, text_BLD = out_BLD[:, :num_image], out_BLD[:, num_image:]
        if attn.add_q_proj is None:
            return image_BLD, text_BLD
        for layer in attn.to_out:
            image_BLD = layer(image_BLD)
        return image_BLD, attn.to_add_out(text_BLD)


def _heads(
    x_BLD: Tensor,
    to_q: nn.Module,
    to_k: nn.Module,
    to_v: nn.Module,
    norm_q: nn.Module,
    norm_k: nn.Module,
    *,
    num_heads: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values, each [B, N, L, D]; queries and keys normed."""
    q, k, v = (layer(x_BLD).unflatten(-1, (num_heads, -1)).transpose(1, 2) for layer in (to_q, to_k, to_v))
    return norm_q(q), norm_k(k), v


def _attend(attention: nn.Module, q_BNLD: Tensor, k_BNLD: Tensor, v_BNLD: Tensor, mask: Tensor | None) -> Tensor:
    """Returns: [B, L, N * D]."""
    if mask is None:
        return attention(q_BNLD, k_BNLD, v_BNLD)
    q_BNLD, k_BNLD = q_BNLD.to(v_BNLD.dtype), k_BNLD.to(v_BNLD.dtype)
    return F.scaled_dot_product_attention(q_BNLD, k_BNLD, v_BNLD, attn_mask=mask).transpose(1, 2).flatten(2)


def refit_block(block: nn.Module) -> None:
    """Exchange the attention of a diffusers block, in place; names and shapes of its weights stay."""
    block.attn.attention = Attention()
    block.attn.set_processor(JointAttention())
