"""Layers of the deep-compression autoencoder, for images [B, C, H, W] and clips [B, C, T, H, W] alike.

The names of attributes are the published names of the weights; hence ``main``, ``op_list``, ``aggreg``.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn

HEAD_DIM = 32


class ChannelRMSNorm(nn.Module):
    """Root-mean-square norm over the channels of every position, with scale and bias; in float32."""

    def __init__(self, channels: int, *, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        shape = [-1] + [1] * (x.ndim - 2)
        norm = torch.linalg.vector_norm(x, dim=1, keepdim=True, dtype=torch.float32)
        scale = torch.rsqrt(norm.square() / x.shape[1] + self.eps)
        return torch.addcmul(self.bias.view(shape), (x * scale).to(x.dtype), self.weight.view(shape))


class ConvLayer(nn.Module):
    """Convolution that keeps the size (divided by `stride`), then norm, then activation."""

    def __init__(
        self,
        channels_in: int,
        channels_out: int,
        *,
        is_video: bool,
        kernel: int = 3,
        stride: tuple[int, ...] | int = 1,
        groups: int = 1,
        bias: bool = True,
        norm: bool = False,
        act: nn.Module | None = None,
    ) -> None:
        super().__init__()
        make = nn.Conv3d if is_video else nn.Conv2d
        self.conv = make(channels_in, channels_out, kernel, stride, kernel // 2, groups=groups, bias=bias)
        self.norm = ChannelRMSNorm(channels_out) if norm else None
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        if self.norm is not None:
            x = self.norm(x)
        return x if self.act is None else self.act(x)


class Residual(nn.Module):
    """``x + main(x)``."""

    def __init__(self, main: nn.Module) -> None:
        super().__init__()
        self.main = main

    def forward(self, x: Tensor) -> Tensor:
        return self.main(x) + x


class ConvPair(nn.Module):
    """The body of a residual block."""

    def __init__(self, channels: int, *, is_video: bool) -> None:
        super().__init__()
        self.conv1 = ConvLayer(channels, channels, is_video=is_video, act=nn.SiLU())
        self.conv2 = ConvLayer(channels, channels, is_video=is_video, bias=False, norm=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(self.conv1(x))


class LinearAttention(nn.Module):
    """ReLU attention at a cost linear in the tokens, over all positions of a clip or an image.

    Args:
        scales: kernel sizes of the depthwise branches whose queries, keys and values are further heads.

    Source: EfficientViT, arXiv:2205.14756, section 3.1.
    """

    def __init__(self, channels: int, *, scales: tuple[int, ...], is_video: bool) -> None:
        super().__init__()
        heads = channels // HEAD_DIM
        wide = 3 * heads * HEAD_DIM
        conv = nn.Conv3d if is_video else nn.Conv2d
        self.qkv = ConvLayer(channels, wide, is_video=is_video, kernel=1, bias=False)
        self.aggreg = nn.ModuleList(
            nn.Sequential(
                conv(wide, wide, scale, padding=scale // 2, groups=wide, bias=False),
                conv(wide, wide, 1, groups=3 * heads, bias=False),
            )
            for scale in scales
        )
        width = heads * HEAD_DIM * (1 + len(scales))
        self.proj = ConvLayer(width, channels, is_video=is_video, kernel=1, bias=False, norm=True)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(x)
        qkv = torch.cat([qkv, *(branch(qkv) for branch in self.aggreg)], dim=1)
        heads = qkv.shape[1] // (3 * HEAD_DIM)
        # The sums run over all tokens of a clip: in bfloat16 they would lose most of their terms.
        with _without_autocast(x.device.type):
            q, k, v = qkv.float().flatten(2).unflatten(1, (heads, 3 * HEAD_DIM)).chunk(3, dim=2)
            out = relu_attention(q, k, v)
        return self.proj(out.flatten(1, 2).unflatten(2, x.shape[2:]).to(x.dtype))


def _without_autocast(device_type: str) -> AbstractContextManager[None]:
    """Computation in the dtypes of the operands; ``meta``, on which sizes are planned, knows no autocast."""
    if torch.amp.is_autocast_available(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()


def relu_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """``sum_j relu(q_i) . relu(k_j) v_j / sum_j relu(q_i) . relu(k_j)``.

    Args:
        q, k, v: float32 [B, heads, dim, tokens].
    """
    q, k = q.relu(), k.relu()
    v = F.pad(v, (0, 0, 0, 1), value=1.0)  # one more row of values counts the weights
    out = (v @ k.transpose(-1, -2)) @ q
    return out[:, :, :-1] / (out[:, :, -1:] + 1e-15)


class GatedConv(nn.Module):
    """The feed-forward part: widen, mix neighbours, gate, narrow."""

    def __init__(self, channels: int, *, is_video: bool, expand: int = 4) -> None:
        super().__init__()
        wide = channels * expand
        self.inverted_conv = ConvLayer(channels, 2 * wide, is_video=is_video, kernel=1, act=nn.SiLU())
        self.depth_conv = ConvLayer(2 * wide, 2 * wide, is_video=is_video, groups=2 * wide)
        self.point_conv = ConvLayer(wide, channels, is_video=is_video, kernel=1, bias=False, norm=True)

    def forward(self, x: Tensor) -> Tensor:
        x, gate = self.depth_conv(self.inverted_conv(x)).chunk(2, dim=1)
        return self.point_conv(x * F.silu(gate))


class EfficientViTBlock(nn.Module):
    """Linear attention and a gated convolution, each with a residual path."""

    def __init__(self, channels: int, *, scales: tuple[int, ...], is_video: bool) -> None:
        super().__init__()
        self.context_module = Residual(LinearAttention(channels, scales=scales, is_video=is_video))
        self.local_module = Residual(GatedConv(channels, is_video=is_video))

    def forward(self, x: Tensor) -> Tensor:
        return self.local_module(self.context_module(x))


# name of a block -> scales of its attention; None has no attention
BLOCKS: dict[str, tuple[int, ...] | None] = {"ResBlock": None, "EViT_GLU": (), "EViTS5_GLU": (5,)}


def build_block(kind: str, channels: int, *, is_video: bool) -> nn.Module:
    """A block that keeps size and width."""
    scales = BLOCKS[kind]
    if scales is None:
        return Residual(ConvPair(channels, is_video=is_video))
    return EfficientViTBlock(channels, scales=scales, is_video=is_video)


def unshuffle(x: Tensor, factors: tuple[int, ...]) -> Tensor:
    """Move blocks of `factors` positions into the channels; channel-major, as ``F.pixel_unshuffle``."""
    shape = list(x.shape[:2])
    for size, factor in zip(x.shape[2:], factors, strict=True):
        shape += [size // factor, factor]
    n = len(factors)
    order = [0, 1, *range(3, 3 + 2 * n, 2), *range(2, 2 + 2 * n, 2)]
    return x.reshape(shape).permute(order).flatten(1, 1 + n)


def shuffle(x: Tensor, factors: tuple[int, ...]) -> Tensor:
    """The inverse of `unshuffle`."""
    n = len(factors)
    x = x.unflatten(1, (-1, *factors))
    order = [0, 1]
    for i in range(n):
        order += [2 + n + i, 2 + i]
    sizes = [size * factor for size, factor in zip(x.shape[2 + n :], factors, strict=True)]
    return x.permute(order).reshape(x.shape[0], x.shape[1], *sizes)


def average_channels(x: Tensor, channels: int) -> Tensor:
    """Narrow to `channels` by the mean of neighbouring ones."""
    return x.unflatten(1, (channels, -1)).mean(dim=2)


def duplicate_channels(x: Tensor, channels: int) -> Tensor:
    """Widen to `channels` by repeating each one."""
    return x.repeat_interleave(channels // x.shape[1], dim=1)


class ShortcutConv(nn.Module):
    """A convolution that changes the width, with a path around it that averages or repeats channels."""

    def __init__(self, main: nn.Module, channels_out: int) -> None:
        super().__init__()
        self.main = main
        self.channels_out = channels_out

    def forward(self, x: Tensor) -> Tensor:
        change = average_channels if x.shape[1] >= self.channels_out else duplicate_channels
        return self.main(x) + change(x, self.channels_out)


class Downsample(nn.Module):
    """Half the size, with an averaging path around the convolution.

    Args:
        factors: of the axes after the channels, e.g. (2, 2, 2).
        strided: a strided convolution; else a convolution whose output moves blocks of pixels into channels.
    """

    def __init__(
        self, channels_in: int, channels_out: int, *, factors: tuple[int, ...], strided: bool, is_video: bool
    ) -> None:
        super().__init__()
        self.factors, self.channels_out = factors, channels_out
        if strided:
            self.main = ConvLayer(channels_in, channels_out, is_video=is_video, stride=factors)
        else:
            self.main = UnshuffleConv(channels_in, channels_out, factors=factors, is_video=is_video)

    def forward(self, x: Tensor) -> Tensor:
        factors = without_time(self.factors) if is_single_frame(x) else self.factors
        return self.main(x) + average_channels(unshuffle(x, factors), self.channels_out)


class UnshuffleConv(nn.Module):
    """A convolution whose output gives blocks of pixels to the channels."""

    def __init__(self, channels_in: int, channels_out: int, *, factors: tuple[int, ...], is_video: bool) -> None:
        super().__init__()
        self.factors = factors
        self.conv = ConvLayer(channels_in, channels_out // volume(factors), is_video=is_video)

    def forward(self, x: Tensor) -> Tensor:
        return unshuffle(self.conv(x), self.factors)


class Upsample(nn.Module):
    """Twice the size, with a repeating path around the convolution.

    Args:
        interpolate: repeat pixels, then convolve; else a convolution whose channels become blocks of pixels.
    """

    def __init__(
        self, channels_in: int, channels_out: int, *, factors: tuple[int, ...], interpolate: bool, is_video: bool
    ) -> None:
        super().__init__()
        self.factors, self.channels_out = factors, channels_out
        make = InterpolateConv if interpolate else ShuffleConv
        self.main = make(channels_in, channels_out, factors=factors, is_video=is_video)

    def forward(self, x: Tensor) -> Tensor:
        factors = without_time(self.factors) if is_single_frame(x) else self.factors
        return self.main(x) + shuffle(duplicate_channels(x, self.channels_out * volume(factors)), factors)


class InterpolateConv(nn.Module):
    """Nearest upsampling, then a convolution; a single frame is not repeated in time."""

    def __init__(self, channels_in: int, channels_out: int, *, factors: tuple[int, ...], is_video: bool) -> None:
        super().__init__()
        self.factors = factors
        self.conv = ConvLayer(channels_in, channels_out, is_video=is_video)

    def forward(self, x: Tensor) -> Tensor:
        factors = without_time(self.factors) if is_single_frame(x) else self.factors
        return self.conv(F.interpolate(x, scale_factor=tuple(map(float, factors)), mode="nearest"))


class ShuffleConv(nn.Module):
    """A convolution whose channels become blocks of pixels."""

    def __init__(self, channels_in: int, channels_out: int, *, factors: tuple[int, ...], is_video: bool) -> None:
        super().__init__()
        self.factors = factors
        self.conv = ConvLayer(channels_in, channels_out * volume(factors), is_video=is_video)

    def forward(self, x: Tensor) -> Tensor:
        return shuffle(self.conv(x), self.factors)


def is_single_frame(x: Tensor) -> bool:
    """A clip of one frame is an image: nothing is done in time."""
    return x.ndim == 5 and x.shape[2] == 1


def without_time(factors: tuple[int, ...]) -> tuple[int, ...]:
    return (1, *factors[1:])


def volume(factors: tuple[int, ...]) -> int:
    result = 1
    for factor in factors:
        result *= factor
    return result
