"""The deep-compression autoencoder of Open-Sora v2: 4x32x32 pixels to one cell of 128 channels, without sampling."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor, nn

from opensora_like.models.autoencoders.batching import resolve_mini_batch, run_by_samples
from opensora_like.models.autoencoders.dc_ae_networks import CONFIGS, Decoder, Encoder
from opensora_like.models.autoencoders.loading import finish
from opensora_like.models.autoencoders.sizes import check_multiple
from opensora_like.models.autoencoders.tiling import Tiling
from opensora_like.registry import MODELS, nearest


@MODELS.register_module("dc_ae")
class DCAE(nn.Module):
    """A deterministic autoencoder that looks both ways in time; its weights have the published names.

    A clip has one frame or a multiple of the temporal stride. One latent frame is decoded as an image: a clip of four
    frames comes back as one, so train and sample with one frame or with eight and more. Parameters are frozen.

    Args:
        model_name: an architecture in `dc_ae_networks.CONFIGS`; the arguments that default to None replace its entries.
        from_pretrained: a safetensors file that holds exactly these weights; None leaves them random.
        scaling_factor: latents for the denoiser are ``z / scaling_factor``, in training and in sampling. Published
            training used 0.493, published sampling none at all, and so decoded latents of another scale.
        use_spatial_tiling, spatial_tile_size: tile clips with a side longer than this, in pixels.
        use_temporal_tiling, temporal_tile_size: tile clips longer than this, in frames.
        tile_overlap_factor: part of a tile that it shares with the next.
        mini_batch_size: at most so many samples at a time; None takes the batch whole; the result is the same.
        dtype: of the weights, and of the computation; None keeps that of the file, or float32.

    Raises:
        ValueError: an unknown name, or sizes or weights that do not fit.
        FileNotFoundError: `from_pretrained` is not there.

    Source: DC-AE, arXiv:2410.10733; the video variant is Open-Sora v2's.
    """

    is_causal = False
    has_deviation = False

    def __init__(
        self,
        model_name: str = "dc-ae-f32t4c128",
        *,
        from_pretrained: str | None = None,
        scaling_factor: float | None = None,
        use_spatial_tiling: bool = False,
        use_temporal_tiling: bool = False,
        spatial_tile_size: int = 256,
        temporal_tile_size: int = 32,
        tile_overlap_factor: float = 0.25,
        mini_batch_size: int | None = None,
        dtype: Literal["fp32", "bf16", "fp16"] | None = None,
        widths: tuple[int, ...] | None = None,
        encoder_depths: tuple[int, ...] | None = None,
        decoder_depths: tuple[int, ...] | None = None,
        blocks: tuple[str, ...] | None = None,
        temporal_levels: tuple[bool, ...] | None = None,
        latent_channels: int | None = None,
        is_video: bool | None = None,
        downsample: Literal["conv", "pixel_unshuffle"] | None = None,
        upsample: Literal["interpolate", "pixel_shuffle"] | None = None,
    ) -> None:
        super().__init__()
        if model_name not in CONFIGS:
            raise ValueError(f"autoencoder.model_name={model_name!r} is unknown; {nearest(model_name, CONFIGS)}")
        changes = {
            "widths": widths,
            "encoder_depths": encoder_depths,
            "decoder_depths": decoder_depths,
            "blocks": blocks,
            "temporal_levels": temporal_levels,
            "latent_channels": latent_channels,
            "is_video": is_video,
            "downsample": downsample,
            "upsample": upsample,
            "scaling_factor": scaling_factor,
        }
        self.config = replace(CONFIGS[model_name], **{k: v for k, v in changes.items() if v is not None})
        self.latent_channels = self.config.latent_channels
        self.temporal_stride = 2 ** sum(self.config.temporal_levels)
        self.spatial_stride = 2 ** (len(self.config.widths) - 1)
        self.mini_batch_size = resolve_mini_batch(mini_batch_size, use_slicing=False)
        self.tiling = Tiling(
            spatial_stride=self.spatial_stride,
            temporal_stride=self.temporal_stride,
            spatial_size=spatial_tile_size if use_spatial_tiling else None,
            temporal_size=temporal_tile_size if use_temporal_tiling else None,
            overlap=tile_overlap_factor,
        )
        # With a file, random weights would be drawn only to be thrown away.
        with torch.device("meta" if from_pretrained else torch.get_default_device()):
            self.encoder = Encoder(self.config)
            self.decoder = Decoder(self.config)
        if not from_pretrained:
            self.apply(_draw_weights)
        finish(self, from_pretrained=from_pretrained, dtype=dtype)

    def latent_shape(self, num_frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """(C, T, H, W) of the latents of a clip.

        Raises:
            ValueError: more than one frame, but no multiple of the temporal stride; or a side that is no multiple of
                the spatial stride.
        """
        check_multiple(num_frames, self.temporal_stride, or_one=True, where="dc_ae: num_frames")
        check_multiple(height, self.spatial_stride, where="dc_ae: height")
        check_multiple(width, self.spatial_stride, where="dc_ae: width")
        frames = max(1, num_frames // self.temporal_stride)
        return self.latent_channels, frames, height // self.spatial_stride, width // self.spatial_stride

    def encode(self, video_BCTHW: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Latents for the denoiser.

        Args:
            video_BCTHW: [B, 3, T, H, W] in [-1, 1], any floating dtype.
            generator: not used, this autoencoder does not sample; callers need not know.

        Returns: float32 [B, C, T/4 or 1, H/32, W/32].

        Raises:
            ValueError: a size that cannot be coded, see `latent_shape`.
        """
        self.latent_shape(*video_BCTHW.shape[2:])
        video = video_BCTHW.to(self.encoder.project_in.conv.weight.dtype)
        run = self._per_frame(self.encoder)
        z = run_by_samples(lambda part: self.tiling.encode(run, part), video, self.mini_batch_size)
        return z.float() / self.config.scaling_factor

    def posterior(self, video_BCTHW: Tensor) -> tuple[Tensor, None]:
        """The latents as `encode` gives them, and no deviation: nothing is drawn."""
        return self.encode(video_BCTHW), None

    def decode(self, z_BCTHW: Tensor) -> Tensor:
        """Pixels [B, 3, 4T (1 if T is 1), 32H, 32W], not clipped, in the dtype of the weights."""
        z = (z_BCTHW.float() * self.config.scaling_factor).to(self.encoder.project_in.conv.weight.dtype)
        run = self._per_frame(self.decoder)
        return run_by_samples(lambda part: self.tiling.decode(run, part), z, self.mini_batch_size)

    def _per_frame(self, network: nn.Module) -> Callable[[Tensor], Tensor]:
        """`network`, or for the image variant `network` over all frames as a batch of images."""
        if self.config.is_video:
            return network

        def run(x_BCTHW: Tensor) -> Tensor:
            batch = x_BCTHW.shape[0]
            images = network(x_BCTHW.transpose(1, 2).flatten(0, 1))
            return images.unflatten(0, (batch, -1)).transpose(1, 2)

        return run


def _draw_weights(module: nn.Module) -> None:
    """Truncated normal of standard deviation 0.02, norm scales included: residual branches start near zero."""
    if isinstance(getattr(module, "weight", None), nn.Parameter):
        nn.init.trunc_normal_(module.weight, std=0.02)
    if isinstance(getattr(module, "bias", None), nn.Parameter):
        nn.init.zeros_(module.bias)
