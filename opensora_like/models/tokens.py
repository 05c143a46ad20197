"""Latents as a row of tokens and back, and the positions of the tokens."""

from __future__ import annotations

import torch
from torch import Tensor


def patchify(x_BCTHW: Tensor, patch_size: int) -> Tensor:
    """Cut H and W into patches: "b c t (h p) (w q) -> b (t h w) (c p q)".

    Raises:
        ValueError: H or W is not a multiple of `patch_size`.
    """
    b, c, t, height, width = x_BCTHW.shape
    p = patch_size
    if height % p or width % p:
        raise ValueError(f"latents of height {height}, width {width} do not divide by patch_size={p}; pad or resize")
    x = x_BCTHW.reshape(b, c, t, height // p, p, width // p, p)
    return x.permute(0, 2, 3, 5, 1, 4, 6).reshape(b, t * (height // p) * (width // p), c * p * p)


def unpatchify(x_BLC: Tensor, patch_size: int, *, num_frames: int, height: int, width: int) -> Tensor:
    """Undo `patchify`; sizes are those of the latents, before they were cut."""
    p = patch_size
    x = x_BLC.unflatten(2, (-1, p, p)).unflatten(1, (num_frames, height // p, width // p))
    return x.permute(0, 4, 1, 2, 5, 3, 6).reshape(len(x_BLC), -1, num_frames, height, width)


def position_ids(num_frames: int, rows: int, columns: int, *, device: torch.device | str = "cpu") -> Tensor:
    """Indices (t, h, w) of every patch in the order of `patchify`. Returns: int64 [L, 3]."""
    axes = [torch.arange(n, device=device) for n in (num_frames, rows, columns)]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).reshape(-1, 3)
