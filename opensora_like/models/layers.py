"""What models share identically: one attention dispatch point, RMSNorm, RoPE and time embeddings.

Letters of the shape suffixes: B batch, N heads, L tokens, D width (of a head in BNLD), A axes of a position.
"""

from __future__ import annotations

import functools
import importlib.util
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

AttentionBackend = Literal["auto", "sdpa", "flash"]
HALF = (torch.float16, torch.bfloat16)


@functools.cache
def flash_attention() -> Callable[..., Tensor] | None:
    """flash-attn's function on [B, L, N, D], or None where the package is not installed."""
    if importlib.util.find_spec("flash_attn") is None:
        return None
    from flash_attn import flash_attn_func

    return flash_attn_func


def attention(
    q_BNLD: Tensor,
    k_BNLD: Tensor,
    v_BNLD: Tensor,
    *,
    backend: AttentionBackend = "auto",
    mask: Tensor | None = None,
) -> Tensor:
    """Softmax attention of all tokens to all tokens, scaled by 1/sqrt(D).

    Args:
        backend: "auto" takes flash-attn for half precision on CUDA where it can be imported and SDPA elsewhere;
            SDPA is the reference.
        mask: bool, broadcast to [B, N, L, K]: True where a query sees a key; each has to see one. SDPA applies it.

    Returns: [B, N, L, D] in the dtype of `v_BNLD`.

    Raises:
        ValueError: "flash" where it cannot run.
    """
    q_BNLD, k_BNLD = q_BNLD.to(v_BNLD.dtype), k_BNLD.to(v_BNLD.dtype)
    able = v_BNLD.is_cuda and v_BNLD.dtype in HALF and v_BNLD.shape[-1] <= 256
    flash = flash_attention() if backend != "sdpa" and able and mask is None else None
    if flash is not None:
        out_BLND = flash(*(x.transpose(1, 2) for x in (q_BNLD, k_BNLD, v_BNLD)))
        return out_BLND.transpose(1, 2)
    if backend == "flash":
        where = f"{v_BNLD.dtype} on {v_BNLD.device.type!r}, head dim {v_BNLD.shape[-1]}"
        raise ValueError(
            f"attention backend='flash': got {where}; it needs the package flash-attn, half precision on cuda"
            " and head dim <= 256; use 'auto' or 'sdpa'"
        )
    return F.scaled_dot_product_attention(q_BNLD, k_BNLD, v_BNLD, attn_mask=mask)


class Attention(nn.Module):
    """The call of `attention` as a module without parameters, so that a backend can put another in its place.

    A replacement takes and returns the same shapes. Sequence parallelism gives it this rank's tokens of all
    heads, tensor parallelism all tokens of this rank's heads.
    """

    def __init__(self, *, backend: AttentionBackend = "auto") -> None:
        super().__init__()
        self.backend = backend

    def forward(self, q_BNLD: Tensor, k_BNLD: Tensor, v_BNLD: Tensor) -> Tensor:
        """Returns: [B, L, N * D], heads side by side."""
        return attention(q_BNLD, k_BNLD, v_BNLD, backend=self.backend).transpose(1, 2).flatten(2)


class SequenceCut(Protocol):
    """What sequence parallelism puts around the blocks of a model; without it a rank holds all tokens."""

    def cut(self, txt_BLD: Tensor, img_BLD: Tensor, rope: Rope) -> tuple[Tensor, Tensor, Rope]:
        """This rank's run of the joint sequence [text; image]; either part may be empty."""

    def join(self, img_BLD: Tensor) -> Tensor:
        """All image tokens, from every rank's."""


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) * weight over the last dim, in float32, returned in the dtype of x.

    On CUDA torch has one kernel for it, which saves `x` and no float32 copies for the backward, where both have one
    dtype; so a weight that is wider, as under autocast, widens `x` first.
    """
    wide = x if x.dtype == weight.dtype else x.float()
    return F.rms_norm(wide, weight.shape, weight.to(wide.dtype), eps).to(x.dtype)


class RMSNorm(nn.Module):
    """x / rms(x) * scale over the last dim, in float32, returned in the dtype of x."""

    def __init__(self, dim: int, *, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.scale = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.scale, self.eps)


@dataclass(frozen=True)
class Rope:
    """Rotation tables of one sequence; a plain object, so that casts of a block's tensor arguments spare it.

    Args:
        cos_LF, sin_LF: float32 [L, D / 2], one column per rotated pair.
        interleaved: pairs are (2i, 2i + 1); otherwise (i, i + D / 2).
    """

    cos_LF: Tensor
    sin_LF: Tensor
    interleaved: bool

    def __call__(self, x_BNLD: Tensor) -> Tensor:
        """Rotate in float32. Returns: as `x_BNLD`, in its dtype."""
        wide = x_BNLD.float()
        a, b = wide.unflatten(-1, (-1, 2)).unbind(-1) if self.interleaved else wide.chunk(2, dim=-1)
        turned = (a * self.cos_LF - b * self.sin_LF, b * self.cos_LF + a * self.sin_LF)
        out = torch.stack(turned, dim=-1).flatten(-2) if self.interleaved else torch.cat(turned, dim=-1)
        return out.to(x_BNLD.dtype)

    def narrow(self, start: int, stop: int) -> Rope:
        """The tables of tokens start..stop - 1."""
        return replace(self, cos_LF=self.cos_LF[start:stop], sin_LF=self.sin_LF[start:stop])


def build_rope(ids_LA: Tensor, axes_dim: Sequence[int], *, theta: float, interleaved: bool) -> Rope:
    """Tables for tokens at positions `ids_LA`; each axis turns its own part of a head's width.

    Args:
        ids_LA: [L, A], any number dtype; one column per axis.
        axes_dim: A even numbers that add up to a head's width.

    Source: RoFormer (arXiv:2104.09864), one table per axis as in FLUX; angles in float64, because float32
        loses the fast frequencies of far positions.
    """
    angles = []
    for axis, dim in enumerate(axes_dim):
        exponents = torch.arange(0, dim, 2, dtype=torch.float64, device=ids_LA.device) / dim
        angles.append(ids_LA[:, axis, None].double() * theta**-exponents)
    angle_LF = torch.cat(angles, dim=-1)
    return Rope(angle_LF.cos().float(), angle_LF.sin().float(), interleaved)


def time_embedding(t_B: Tensor, dim: int = 256, *, max_period: float = 10000.0, factor: float = 1000.0) -> Tensor:
    """Sinusoids of `factor` * t: first cosines, then sines.

    Args:
        t_B: [B]; pass float32: bfloat16 near t = 1 is off by up to 2 of 1000.
        dim: even.

    Returns: float32 [B, dim].
    """
    half = dim // 2
    freqs = torch.exp(-math.log(max_period) / half * torch.arange(half, dtype=torch.float32, device=t_B.device))
    angle_BF = factor * t_B.float()[:, None] * freqs
    return torch.cat([angle_BF.cos(), angle_BF.sin()], dim=-1)


class MLPEmbedder(nn.Module):
    """Linear, SiLU, Linear: a vector of any width to the model's."""

    def __init__(self, in_dim: int, hidden_size: int) -> None:
        super().__init__()
        self.in_layer = nn.Linear(in_dim, hidden_size)
        self.out_layer = nn.Linear(hidden_size, hidden_size)

    def forward(self, x_BD: Tensor) -> Tensor:
        """Returns: [B, hidden_size]."""
        return self.out_layer(F.silu(self.in_layer(x_BD)))
