"""The parts of the causal 3D autoencoder that diffusers builds for small clips only, rebuilt for long and large ones.

Same weights, same names and same results; what changes is memory:

* attention of the middle block: no mask over all pairs of tokens (2.1 GiB for one 129-frame 256px tile in bfloat16);
* convolutions run over pieces of time, so that no padded copy of the whole clip is made, and no call sees 2^31
  elements, where kernels with 32-bit indices stop;
* nearest upsampling is one strided copy, for the same limit;
* no level keeps its input alive while it runs.

Shapes: B batch, C channels, T time, H W space, L tokens.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Of the larger of input and output of one convolution call: 512 MiB in bfloat16, far below 2^31.
MAX_CONV_ELEMENTS = 2**28


class CausalConv3d(nn.Module):
    """A 3D convolution that sees no later frame; the borders repeat the first frame and the edge pixels.

    Args:
        conv: without padding of its own; strides are arbitrary, kernels odd in space.
        max_elements: above this many in the input or the output, time is cut into pieces; the result is the same.
    """

    def __init__(self, conv: nn.Conv3d, *, max_elements: int = MAX_CONV_ELEMENTS) -> None:
        super().__init__()
        self.conv = conv
        self.max_elements = max_elements

    def forward(self, x_BCTHW: Tensor) -> Tensor:
        frames_out = (x_BCTHW.shape[2] - 1) // self.conv.stride[0] + 1
        per_call = self._frames_per_call(x_BCTHW)
        if frames_out <= per_call:
            return self._frames(x_BCTHW, 0, frames_out)
        out: Tensor | None = None
        for first in range(0, frames_out, per_call):
            last = min(first + per_call, frames_out)
            part = self._frames(x_BCTHW, first, last)
            if out is None:
                out = part.new_empty([*part.shape[:2], frames_out, *part.shape[3:]])
            out[:, :, first:last] = part
        return out

    def _frames_per_call(self, x: Tensor) -> int:
        batch, channels, _, height, width = x.shape
        stride_t, stride_h, stride_w = self.conv.stride
        pad = self.conv.kernel_size[1] // 2
        inside = batch * channels * (height + 2 * pad) * (width + 2 * pad) * stride_t
        outside = batch * self.conv.out_channels * -(-height // stride_h) * -(-width // stride_w)
        return max(1, self.max_elements // max(inside, outside))

    def _frames(self, x: Tensor, first: int, last: int) -> Tensor:
        """Output frames first..last-1, from the input frames they see."""
        kernel_t, kernel_h, kernel_w = self.conv.kernel_size
        start = first * self.conv.stride[0] - (kernel_t - 1)
        stop = (last - 1) * self.conv.stride[0] + 1
        pad = (kernel_w // 2, kernel_w // 2, kernel_h // 2, kernel_h // 2, max(0, -start), 0)
        seen = x[:, :, max(0, start) : stop]
        return self.conv(F.pad(seen, pad, mode="replicate") if any(pad) else seen)


class CausalUpsample(nn.Module):
    """Repeats pixels and frames, but the first frame only in space, then convolves.

    Args:
        factors: of T, H, W.
    """

    def __init__(self, conv: CausalConv3d, factors: tuple[int, int, int]) -> None:
        super().__init__()
        self.conv = conv
        self.factors = factors

    def forward(self, x_BCTHW: Tensor) -> Tensor:
        return self.conv(repeat_causal(x_BCTHW, self.factors))


def repeat_causal(x_BCTHW: Tensor, factors: tuple[int, int, int]) -> Tensor:
    """Nearest upsampling. Returns: [B, C, 1 + (T - 1) * factors[0], H * factors[1], W * factors[2]]."""
    batch, channels, frames, height, width = x_BCTHW.shape
    ft, fh, fw = factors
    out = x_BCTHW.new_empty(batch, channels, 1 + (frames - 1) * ft, height * fh, width * fw)
    cells = out.unflatten(4, (width, fw)).unflatten(3, (height, fh))  # B C T H fh W fw, a view
    cells[:, :, :1] = x_BCTHW[:, :, :1, :, None, :, None]
    if frames > 1:
        later = cells[:, :, 1:].unflatten(2, (frames - 1, ft))
        later.copy_(x_BCTHW[:, :, 1:, None, :, None, :, None].expand_as(later))
    return out


class FrameCausalAttention(nn.Module):
    """Single-head attention over all tokens of a clip, in which a token sees its own frame and those before.

    Each frame attends to the prefix that ends with it. That is exact, needs no mask, computes only what is used
    (about half of all pairs), and leaves the kernel free to work in tiles.
    """

    def __init__(self, group_norm: nn.GroupNorm, to_q: nn.Linear, to_k: nn.Linear, to_v: nn.Linear, to_out: nn.Linear):
        super().__init__()
        self.group_norm = group_norm
        self.to_q, self.to_k, self.to_v = to_q, to_k, to_v
        self.to_out = nn.ModuleList([to_out])  # the published name is to_out.0

    def forward(self, x_BCTHW: Tensor) -> Tensor:
        frames, per_frame = x_BCTHW.shape[2], x_BCTHW.shape[3] * x_BCTHW.shape[4]
        tokens = self.group_norm(x_BCTHW.flatten(2)).transpose(1, 2)
        q, k, v = (project(tokens).unsqueeze(1) for project in (self.to_q, self.to_k, self.to_v))
        seen = [
            F.scaled_dot_product_attention(q[:, :, end - per_frame : end], k[:, :, :end], v[:, :, :end])
            for end in range(per_frame, frames * per_frame + 1, per_frame)
        ]
        out = self.to_out[0](torch.cat(seen, dim=2).squeeze(1))
        return x_BCTHW + out.transpose(1, 2).reshape_as(x_BCTHW)


class LayerChain(nn.Module):
    """A diffusers encoder or decoder, run layer by layer; children, and so the names of the weights, stay.

    Its own forward keeps the input of a whole level alive while the level runs: one more tensor of the largest size.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        for name, child in network.named_children():
            self.add_module(name, child)

    def layers(self) -> Iterator[nn.Module]:
        """In the order they run."""
        middle = (self.mid_block.resnets[0], self.mid_block.attentions[0], self.mid_block.resnets[1])
        yield self.conv_in
        if hasattr(self, "down_blocks"):
            for block in self.down_blocks:
                yield from (*block.resnets, *(block.downsamplers or ()))
            yield from middle
        else:
            yield from middle
            for block in self.up_blocks:
                yield from (*block.resnets, *(block.upsamplers or ()))
        yield from (self.conv_norm_out, self.conv_act, self.conv_out)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers():
            x = layer(x)
        return x


def rebuild(network: nn.Module) -> LayerChain:
    """A diffusers encoder or decoder with the parts of this file in the places of its own; weights are shared."""
    _exchange(network)
    return LayerChain(network)


def _exchange(module: nn.Module) -> None:
    from diffusers.models.attention_processor import Attention
    from diffusers.models.autoencoders import autoencoder_kl_hunyuan_video as published

    for name, child in module.named_children():
        _exchange(child)  # inner parts first: an upsampler then holds a CausalConv3d
        if isinstance(child, published.HunyuanVideoCausalConv3d):
            setattr(module, name, CausalConv3d(child.conv))
        elif isinstance(child, published.HunyuanVideoUpsampleCausal3D):
            setattr(module, name, CausalUpsample(child.conv, tuple(map(int, child.upsample_factor))))
        elif isinstance(child, Attention):
            parts = (child.group_norm, child.to_q, child.to_k, child.to_v, child.to_out[0])
            setattr(module, name, FrameCausalAttention(*parts))
        elif isinstance(child, nn.SiLU):
            child.inplace = True  # its input is always the output of a norm, which nothing else reads
