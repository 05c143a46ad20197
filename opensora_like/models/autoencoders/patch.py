"""An exact autoencoder without parameters: pixels moved into channels. For demos and tests."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from opensora_like.models.autoencoders.sizes import check_multiple
from opensora_like.registry import MODELS


@MODELS.register_module("patch")
class PatchAutoencoder(nn.Module):
    """Space-to-depth, and in time the causal form of it; an `Autoencoder`.

    Each latent pixel holds a block of `temporal_stride` frames and `patch_size` squared pixels. Time is causal as
    in learned video autoencoders: the first frame alone fills the first latent frame (repeated), so 4k + 1 frames
    at stride 4 give k + 1 latent frames, and the first latent frame of a clip is that of its first frame alone.

    ``decode(encode(x))`` is x, bit for bit where `scale` is a power of two. ``encode(decode(z))`` is z with
    `temporal_stride` 1; above, the first latent frame has copies of which decoding reads the last.

    Args:
        patch_size: side of a block in pixels.
        temporal_stride: frames of a block.
        scale: factor from pixels to latents; 2.0 brings pictures in [-1, 1] near unit variance.
        channels: of the pixels.

    Raises:
        ValueError: a size below 1, or `scale` not above 0.
    """

    is_causal = True
    has_deviation = False

    def __init__(self, patch_size: int = 8, temporal_stride: int = 1, *, scale: float = 1.0, channels: int = 3) -> None:
        super().__init__()
        sizes = {"patch_size": patch_size, "temporal_stride": temporal_stride, "channels": channels}
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"autoencoder.{name}={size} must be 1 or more")
        if not scale > 0:
            raise ValueError(f"autoencoder.scale={scale} must be above 0")
        self.channels, self.scale = channels, scale
        self.spatial_stride, self.temporal_stride = patch_size, temporal_stride
        self.latent_channels = channels * temporal_stride * patch_size**2

    def encode(self, video_BCTHW: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Latents; nothing is drawn, so `generator` is not used. Returns: in the dtype of `video_BCTHW`.

        Raises:
            ValueError: a size that does not divide, or another number of channels.
        """
        b, c, num_frames, height, width = video_BCTHW.shape
        if c != self.channels:
            raise ValueError(f"patch autoencoder: video has {c} channels, {self.channels} are needed")
        shape = self.latent_shape(num_frames, height, width)
        s, p = self.temporal_stride, self.spatial_stride
        first = video_BCTHW[:, :, :1].expand(-1, -1, s - 1, -1, -1)
        x = torch.cat([first, video_BCTHW], dim=2).reshape(b, c, shape[1], s, height // p, p, width // p, p)
        return x.permute(0, 1, 3, 5, 7, 2, 4, 6).reshape(b, *shape) * self.scale

    def posterior(self, video_BCTHW: Tensor) -> tuple[Tensor, None]:
        """The latents as `encode` gives them, and no deviation: nothing is drawn."""
        return self.encode(video_BCTHW), None

    def decode(self, z_BCTHW: Tensor) -> Tensor:
        """Pixels, not clipped; in the dtype of `z_BCTHW`.

        Raises:
            ValueError: another number of channels.
        """
        b, c, num_latent_frames, h, w = z_BCTHW.shape
        if c != self.latent_channels:
            raise ValueError(f"patch autoencoder: latents have {c} channels, {self.latent_channels} are needed")
        s, p = self.temporal_stride, self.spatial_stride
        x = (z_BCTHW / self.scale).reshape(b, self.channels, s, p, p, num_latent_frames, h, w)
        x = x.permute(0, 1, 5, 2, 6, 3, 7, 4).reshape(b, self.channels, num_latent_frames * s, h * p, w * p)
        return x[:, :, s - 1 :]

    def latent_shape(self, num_frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """(C, T, H, W) of the latents of a clip of this size.

        Raises:
            ValueError: frames or pixels that do not fill whole blocks.
        """
        s, p = self.temporal_stride, self.spatial_stride
        check_multiple(num_frames, s, offset=1, where="patch: num_frames")
        check_multiple(height, p, where="patch: height")
        check_multiple(width, p, where="patch: width")
        return self.latent_channels, (num_frames - 1) // s + 1, height // p, width // p
