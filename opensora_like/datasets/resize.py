"""Bring frames to the size of a bucket and to the range of a model, and back to 8 bits; tell how near they are."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import torch


def resize_crop(frames_THWC: np.ndarray, height: int, width: int, *, image: bool = False) -> torch.Tensor:
    """Scale until both sides cover (height, width), cut the middle out, bring 0..255 to [-1, 1].

    Args:
        frames_THWC: uint8.
        image: resample as images are (PIL, bicubic), not as videos (bilinear, no antialias).

    Returns: float32 [3, T, height, width].

    Source: Open-Sora v2, opensora/datasets/utils.py, resize_crop_to_fill.
    """
    size, (extra_h, extra_w) = _cover(frames_THWC.shape[1:3], height, width)
    if image:  # the published code rounds the offset of an image after halving and that of a video before
        top, left = round(extra_h / 2), round(extra_w / 2)
        return _to_unit(_resize_pictures(frames_THWC, size)[:, top : top + height, left : left + width])
    return _resize_frames(frames_THWC, size, extra_h // 2, extra_w // 2, height, width)


def center_crop(frames_THWC: np.ndarray, height: int, width: int, *, image: bool = False) -> torch.Tensor:
    """Scale the shorter side to the target, which is square, and cut the middle out; else as `resize_crop`.

    Raises:
        ValueError: the target is not square.

    Source: Open-Sora v2, the transform "center"; images shrink by halves first (guided-diffusion).
    """
    if height != width:
        raise ValueError(f"the transform 'center' makes squares, not {height} x {width}; use 'resize_crop'")
    if not image:
        size, (extra_h, extra_w) = _cover(frames_THWC.shape[1:3], height, width)
        return _resize_frames(frames_THWC, size, round(extra_h / 2), round(extra_w / 2), height, width)
    while min(frames_THWC.shape[1:3]) >= 2 * height:
        frames_THWC = _resize_pictures(frames_THWC, tuple(n // 2 for n in frames_THWC.shape[1:3]), halve=True)
    size, (extra_h, extra_w) = _cover(frames_THWC.shape[1:3], height, width)
    top, left = extra_h // 2, extra_w // 2
    return _to_unit(_resize_pictures(frames_THWC, size)[:, top : top + height, left : left + width])


def to_frames(video_CTHW: Any) -> np.ndarray:
    """[-1, 1] to 8 bits; values outside are clipped.

    Args:
        video_CTHW: array or tensor of any float type.

    Returns: uint8 [T, H, W, C].
    """
    if hasattr(video_CTHW, "detach"):  # a tensor; torch itself is not needed
        video_CTHW = video_CTHW.detach().float().cpu().numpy()
    levels = np.rint((np.clip(video_CTHW, -1, 1) + 1) * 127.5)
    return levels.astype(np.uint8).transpose(1, 2, 3, 0)


def psnr(one: torch.Tensor, other: torch.Tensor) -> float:
    """Peak signal-to-noise ratio in dB of pixels in [-1, 1]; infinite for equal ones.

    Args:
        one: values outside are clipped.
    """
    error = ((one.clamp(-1, 1).double() - other.double()) ** 2).mean().item()
    return math.inf if error == 0 else 10 * math.log10(4 / error)


def _cover(size: tuple[int, int], height: int, width: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """The smallest scaled (H, W) that covers the target, and by how much it is too large."""
    ratio_h, ratio_w = height / size[0], width / size[1]
    scaled = (height, round(size[1] * ratio_h)) if ratio_h > ratio_w else (round(size[0] * ratio_w), width)
    return scaled, (scaled[0] - height, scaled[1] - width)


def _resize_frames(
    frames_THWC: np.ndarray, size: tuple[int, int], top: int, left: int, height: int, width: int
) -> torch.Tensor:
    """Frame by frame, so that the clip is never held in float32 at its source's size."""
    import torch
    import torch.nn.functional as F

    out = torch.empty(3, len(frames_THWC), height, width)
    # one for all frames: the system would zero the pages of a new one each time, half of the time taken at 1080p
    wide_1CHW = torch.empty(1, 3, *frames_THWC.shape[1:3], memory_format=torch.channels_last)
    for t, frame in enumerate(frames_THWC):
        wide_1CHW.copy_(torch.from_numpy(np.ascontiguousarray(frame)).permute(2, 0, 1)[None]).div_(255)
        x_1CHW = F.interpolate(wide_1CHW, size=size, mode="bilinear", align_corners=False, antialias=False)
        out[:, t] = (x_1CHW[0, :, top : top + height, left : left + width] - 0.5) / 0.5
    return out


def _resize_pictures(frames_THWC: np.ndarray, size: tuple[int, int], *, halve: bool = False) -> np.ndarray:
    from PIL import Image

    method = Image.Resampling.BOX if halve else Image.Resampling.BICUBIC
    pictures = [Image.fromarray(frame).resize((size[1], size[0]), method) for frame in frames_THWC]
    return np.stack([np.asarray(picture) for picture in pictures])


def _to_unit(frames_THWC: np.ndarray) -> torch.Tensor:
    import torch

    return (torch.from_numpy(np.ascontiguousarray(frames_THWC)).permute(3, 0, 1, 2).float() / 255 - 0.5) / 0.5
