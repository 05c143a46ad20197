"""The blocks of the MMDiT: two streams that attend jointly, then one stream.

Letters of the shape suffixes: B batch, N heads, L tokens, D width (of a head in BNLD).
Names of modules and parameters are those of the published weights.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from opensora_like.models.layers import Attention, RMSNorm, Rope


class Modulation(nn.Module):
    """Shifts, scales and gates from the conditioning vector, 3 for each sub-layer."""

    def __init__(self, hidden_size: int, *, num_sublayers: int) -> None:
        super().__init__()
        self.num_parts = 3 * num_sublayers
        self.lin = nn.Linear(hidden_size, self.num_parts * hidden_size)

    def forward(self, vec_BD: Tensor) -> tuple[Tensor, ...]:
        """Returns: shift, scale, gate of each sub-layer in turn, each [B, 1, D]."""
        return self.lin(F.silu(vec_BD))[:, None].chunk(self.num_parts, dim=-1)


def layer_norm(hidden_size: int) -> nn.LayerNorm:
    """The blocks' norm: without weights, which the modulation supplies."""
    return nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)


def modulate(x_BLD: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """(1 + scale) * x + shift."""
    return (1 + scale) * x_BLD + shift


class QKNorm(nn.Module):
    """RMS norms of queries and keys, per head."""

    def __init__(self, head_dim: int) -> None:
        super().__init__()
        self.query_norm = RMSNorm(head_dim)
        self.key_norm = RMSNorm(head_dim)


def split_heads(x_BLC: Tensor, num_heads: int) -> Tensor:
    """[B, L, N * D] to [B, N, L, D]."""
    return x_BLC.unflatten(-1, (num_heads, -1)).transpose(1, 2)


class StreamAttention(nn.Module):
    """Queries, keys and values of one stream, and the projection of what it attended to.

    `num_heads` counts the heads of this rank, so tensor parallelism divides it.
    """

    def __init__(self, hidden_size: int, *, num_heads: int, qkv_bias: bool, fused_qkv: bool) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.fused_qkv = fused_qkv
        if fused_qkv:
            self.qkv = nn.Linear(hidden_size, 3 * hidden_size, bias=qkv_bias)
        else:
            self.q_proj = nn.Linear(hidden_size, hidden_size, bias=qkv_bias)
            self.k_proj = nn.Linear(hidden_size, hidden_size, bias=qkv_bias)
            self.v_proj = nn.Linear(hidden_size, hidden_size, bias=qkv_bias)
        self.norm = QKNorm(hidden_size // num_heads)
        self.proj = nn.Linear(hidden_size, hidden_size)

    def project(self, x_BLD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Returns: queries and keys, normed, and values, each [B, N, L, D]."""
        parts = self.qkv(x_BLD).chunk(3, -1) if self.fused_qkv else [f(x_BLD) for f in self._projections()]
        q, k, v = (split_heads(part, self.num_heads) for part in parts)
        return self.norm.query_norm(q), self.norm.key_norm(k), v

    def _projections(self) -> tuple[nn.Module, nn.Module, nn.Module]:
        return self.q_proj, self.k_proj, self.v_proj


def mlp(hidden_size: int, mlp_hidden_size: int) -> nn.Sequential:
    """Linear, tanh-GELU, Linear."""
    return nn.Sequential(
        nn.Linear(hidden_size, mlp_hidden_size), nn.GELU(approximate="tanh"), nn.Linear(mlp_hidden_size, hidden_size)
    )


class DoubleBlock(nn.Module):
    """Image and text streams with weights of their own and one joint attention, text first.

    Source: Stable Diffusion 3 (arXiv:2403.03206) section 4; names and order of FLUX and Open-Sora v2.
    """

    def __init__(
        self, hidden_size: int, *, num_heads: int, mlp_hidden_size: int, qkv_bias: bool, fused_qkv: bool
    ) -> None:
        super().__init__()
        streams = {"num_heads": num_heads, "qkv_bias": qkv_bias, "fused_qkv": fused_qkv}
        self.img_mod = Modulation(hidden_size, num_sublayers=2)
        self.img_norm1 = layer_norm(hidden_size)
        self.img_attn = StreamAttention(hidden_size, **streams)
        self.img_norm2 = layer_norm(hidden_size)
        self.img_mlp = mlp(hidden_size, mlp_hidden_size)
        self.txt_mod = Modulation(hidden_size, num_sublayers=2)
        self.txt_norm1 = layer_norm(hidden_size)
        self.txt_attn = StreamAttention(hidden_size, **streams)
        self.txt_norm2 = layer_norm(hidden_size)
        self.txt_mlp = mlp(hidden_size, mlp_hidden_size)
        self.attention = Attention()

    def forward(self, img_BLD: Tensor, txt_BLD: Tensor, vec_BD: Tensor, rope: Rope) -> tuple[Tensor, Tensor]:
        """Returns: image and text streams, shapes kept."""
        img_parts, txt_parts = self.img_mod(vec_BD), self.txt_mod(vec_BD)
        img_qkv = self.img_attn.project(modulate(self.img_norm1(img_BLD), *img_parts[:2]))
        txt_qkv = self.txt_attn.project(modulate(self.txt_norm1(txt_BLD), *txt_parts[:2]))
        q, k, v = (torch.cat([txt, img], dim=2) for txt, img in zip(txt_qkv, img_qkv, strict=True))
        joint = self.attention(rope(q), rope(k), v)
        num_text = txt_qkv[0].shape[2]  # a backend may project more tokens than this rank's

        img_BLD = img_BLD + img_parts[2] * self.img_attn.proj(joint[:, num_text:])
        img_BLD = img_BLD + img_parts[5] * self.img_mlp(modulate(self.img_norm2(img_BLD), *img_parts[3:5]))
        txt_BLD = txt_BLD + txt_parts[2] * self.txt_attn.proj(joint[:, :num_text])
        txt_BLD = txt_BLD + txt_parts[5] * self.txt_mlp(modulate(self.txt_norm2(txt_BLD), *txt_parts[3:5]))
        return img_BLD, txt_BLD


class SingleBlock(nn.Module):
    """One stream of text and image tokens; attention and MLP side by side.

    Source: ViT-22B (arXiv:2302.05442) section 2.1; names and order of FLUX and Open-Sora v2.
    """

    def __init__(self, hidden_size: int, *, num_heads: int, mlp_hidden_size: int, fused_qkv: bool) -> None:
        super().__init__()
        self.num_heads = num_heads  # of this rank
        self.head_dim = hidden_size // num_heads
        self.fused_qkv = fused_qkv
        if fused_qkv:
            self.linear1 = nn.Linear(hidden_size, 3 * hidden_size + mlp_hidden_size)
        else:
            self.q_proj = nn.Linear(hidden_size, hidden_size)
            self.k_proj = nn.Linear(hidden_size, hidden_size)
            self.v_mlp = nn.Linear(hidden_size, hidden_size + mlp_hidden_size)
        self.linear2 = nn.Linear(hidden_size + mlp_hidden_size, hidden_size)
        self.norm = QKNorm(self.head_dim)
        self.pre_norm = layer_norm(hidden_size)
        self.modulation = Modulation(hidden_size, num_sublayers=1)
        self.attention = Attention()

    def forward(self, x_BLD: Tensor, vec_BD: Tensor, rope: Rope) -> Tensor:
        """Returns: the stream, shape kept."""
        shift, scale, gate = self.modulation(vec_BD)
        q, k, v, mlp_in = self._project(modulate(self.pre_norm(x_BLD), shift, scale))
        q, k, v = (split_heads(part, self.num_heads) for part in (q, k, v))
        joint = self.attention(rope(self.norm.query_norm(q)), rope(self.norm.key_norm(k)), v)
        return x_BLD + gate * self.linear2(torch.cat([joint, F.gelu(mlp_in, approximate="tanh")], dim=-1))

    def _project(self, x_BLD: Tensor) -> tuple[Tensor, ...]:
        """Queries, keys, values and the MLP's inner activations, before heads are split."""
        width = self.num_heads * self.head_dim
        if self.fused_qkv:
            out = self.linear1(x_BLD)
            return out.split([width, width, width, out.shape[-1] - 3 * width], dim=-1)
        v_mlp = self.v_mlp(x_BLD)
        return self.q_proj(x_BLD), self.k_proj(x_BLD), *v_mlp.split([width, v_mlp.shape[-1] - width], dim=-1)


class FinalLayer(nn.Module):
    """Modulated norm and projection of image tokens to packed latents."""

    def __init__(self, hidden_size: int, *, out_channels: int) -> None:
        super().__init__()
        self.norm_final = layer_norm(hidden_size)
        self.linear = nn.Linear(hidden_size, out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 2 * hidden_size))

    def forward(self, img_BLD: Tensor, vec_BD: Tensor) -> Tensor:
        """Returns: [B, L, out_channels]."""
        shift, scale = self.adaLN_modulation(vec_BD)[:, None].chunk(2, dim=-1)
        return self.linear(modulate(self.norm_final(img_BLD), shift, scale))
