"""Runs an autoencoder over overlapping tiles in space and in time, and blends the overlaps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

Run = Callable[[Tensor], Tensor]


class Span(NamedTuple):
    """One direction of a tiling. `tile` and `stride` count input positions, `keep` and `blend` output positions."""

    tile: int
    stride: int
    keep: int
    blend: int

    def output_size(self, size: int) -> int:
        return size * self.keep // self.stride


@dataclass(frozen=True)
class Tiling:
    """The tiles of one autoencoder; both directions of the code are derived from the pixel sizes here, once.

    Args:
        spatial_size: side of a tile in pixels; None does not tile in space.
        temporal_size: length of a tile in frames; None does not tile in time.
        overlap: part of a tile that it shares with the next, in [0, 1). Steps from tile to tile are rounded down to
            whole latents; the published code rounds each direction by itself, and where `overlap` does not divide a
            tile its clips come out in another size.
        is_causal: a temporal tile takes one more frame in front, whose output is dropped.

    Raises:
        ValueError: a size that is no multiple of its stride, or tiles that would not advance.

    Source: Open-Sora v2, which tiles its two published autoencoders alike.
    """

    spatial_stride: int
    temporal_stride: int
    spatial_size: int | None = None
    temporal_size: int | None = None
    overlap: float = 0.25
    is_causal: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.overlap < 1:
            raise ValueError(f"autoencoder.tile_overlap_factor={self.overlap!r} must be in [0, 1)")
        for name, size, stride in (
            ("spatial tile size", self.spatial_size, self.spatial_stride),
            ("temporal tile size", self.temporal_size, self.temporal_stride),
        ):
            if size is None:
                continue
            if size < stride or size % stride:
                raise ValueError(
                    f"autoencoder: {name} {size} is not a multiple of the stride {stride}; use {stride} * k"
                )
            if int(size // stride * (1 - self.overlap)) < 1:
                raise ValueError(
                    f"autoencoder: {name} {size} is {size // stride} latent cells, with overlap {self.overlap} the "
                    "tiles would not advance; use a larger tile or a smaller overlap"
                )

    def encode(self, run: Run, video_BCTHW: Tensor) -> Tensor:
        """`run` over the tiles of a clip; a clip that fits one tile is run whole."""
        return self._apply(run, video_BCTHW, encoding=True)

    def decode(self, run: Run, z_BCTHW: Tensor) -> Tensor:
        """`run` over the tiles of latents."""
        return self._apply(run, z_BCTHW, encoding=False)

    def _apply(self, run: Run, x: Tensor, *, encoding: bool) -> Tensor:
        space = self._span(self.spatial_size, self.spatial_stride, encoding)

        def spatial_run(part: Tensor) -> Tensor:
            if space is None or max(part.shape[-2:]) <= space.tile:
                return run(part)
            return tile_space(run, part, space)

        time = self._span(self.temporal_size, self.temporal_stride, encoding)
        if time is not None and x.shape[2] > time.tile:
            # A remainder this short adds nothing: in a causal code it is the frame in front alone; in the other its
            # code has weight zero, and decoded alone it would come out as an image instead of a piece of video.
            negligible = self.temporal_stride if encoding and not self.is_causal else 1
            return tile_time(spatial_run, x, time, is_causal=self.is_causal, negligible=negligible)
        return spatial_run(x)

    def _span(self, size: int | None, stride: int, encoding: bool) -> Span | None:
        if size is None:
            return None
        latents = size // stride
        step = int(latents * (1 - self.overlap))
        if encoding:
            return Span(size, step * stride, step, latents - step)
        return Span(latents, step, step * stride, size - step * stride)


def tile_space(run: Run, x_BCTHW: Tensor, span: Span) -> Tensor:
    """`run` over tiles of H and W.

    A tile is blended with the one above, then with the one on its left, each as blended before: the order matters in
    the corners and is that of the published codes. Only the edges of finished tiles are kept.

    Returns: the output of `run` for the whole, as one tensor.
    """
    height, width = x_BCTHW.shape[-2:]
    out: Tensor | None = None
    above: list[Tensor] = []
    for row, top in enumerate(range(0, height, span.stride)):
        left: Tensor | None = None
        for column, start in enumerate(range(0, width, span.stride)):
            tile = run(x_BCTHW[..., top : top + span.tile, start : start + span.tile])
            if out is None:
                size = [*tile.shape[:3], span.output_size(height), span.output_size(width)]
                out = tile.new_empty(size)
            if row:
                blend(above[column], tile, span.blend, dim=3)
            if left is not None:
                blend(left, tile, span.blend, dim=4)
            bottom_edge, left = _edge(tile, span.blend, dim=3), _edge(tile, span.blend, dim=4)
            above[column : column + 1] = [bottom_edge]
            kept = tile[..., : span.keep, : span.keep]
            y, x = row * span.keep, column * span.keep
            out[..., y : y + kept.shape[3], x : x + kept.shape[4]] = kept
    return out


def tile_time(run: Run, x_BCTHW: Tensor, span: Span, *, is_causal: bool, negligible: int = 1) -> Tensor:
    """`run` over tiles of T.

    Args:
        is_causal: see `Tiling`.
        negligible: a last tile of at most this many input frames is left out; the one before runs to the end.
    """
    frames, extra = x_BCTHW.shape[2], int(is_causal)
    starts = list(range(0, frames, span.stride))
    if len(starts) > 1 and frames - starts[-1] <= negligible:
        starts.pop()
    out: Tensor | None = None
    before: Tensor | None = None
    position = 0
    for index, start in enumerate(starts):
        last = index == len(starts) - 1
        tile = run(x_BCTHW[:, :, start : frames if last else start + span.tile + extra])
        if out is None:
            out = tile.new_empty([*tile.shape[:2], span.output_size(frames - extra) + extra, *tile.shape[3:]])
        elif is_causal:
            tile = tile[:, :, 1:]
        if before is not None:
            blend(before, tile, span.blend, dim=2)
        before = _edge(tile, span.blend, dim=2)
        kept = tile if last else tile[:, :, : span.keep + (extra if index == 0 else 0)]
        out[:, :, position : position + kept.shape[2]] = kept
        position += kept.shape[2]
    return out


def blend(before: Tensor, tile: Tensor, extent: int, *, dim: int) -> None:
    """Fade from the end of `before` into the start of `tile`, in place in `tile`; linear, in float32.

    Args:
        extent: length of the fade; less where a tile is shorter.
    """
    extent = min(before.shape[dim], tile.shape[dim], extent)
    if not extent:
        return
    ramp = torch.arange(extent, device=tile.device, dtype=torch.float32) / extent
    ramp = ramp.view([-1 if d == dim else 1 for d in range(tile.ndim)])
    old = before.narrow(dim, before.shape[dim] - extent, extent).float()
    new = tile.narrow(dim, 0, extent)
    new.copy_(old * (1 - ramp) + new.float() * ramp)


def _edge(tile: Tensor, extent: int, *, dim: int) -> Tensor:
    """A copy of the last `extent` positions, so that the tile itself can be freed."""
    extent = min(extent, tile.shape[dim])
    return tile.narrow(dim, tile.shape[dim] - extent, extent).clone()
