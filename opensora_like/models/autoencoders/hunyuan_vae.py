"""The causal 3D autoencoder of Open-Sora v2 and HunyuanVideo: 4x8x8 pixels to one cell of 16 channels."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from opensora_like.models.autoencoders.batching import resolve_mini_batch, run_by_samples
from opensora_like.models.autoencoders.hunyuan_layers import rebuild
from opensora_like.models.autoencoders.loading import finish
from opensora_like.models.autoencoders.posterior import draw_latents
from opensora_like.models.autoencoders.sizes import causal_latent_shape
from opensora_like.models.autoencoders.tiling import Tiling
from opensora_like.registry import MODELS


@MODELS.register_module("hunyuan_vae")
class HunyuanVAE(nn.Module):
    """A KL autoencoder in which no frame depends on a later one; an image is a clip of one frame.

    The networks are those of diffusers with the parts exchanged that limit the size of a clip (`hunyuan_layers`); the
    names of the weights are the published ones (``encoder.*``, ``decoder.*``, ``quant_conv``, ``post_quant_conv``).
    Parameters are frozen when built.

    Args:
        from_pretrained: a safetensors file that holds exactly these weights, or diffusers' folder of it, of a
            pipeline's folder ``vae/``; None leaves them random.
        latent_channels: of the latents; the encoder puts out twice as many, mean and log variance.
        layers_per_block: residual blocks per level of the encoder; the decoder has one more.
        block_out_channels: widths of the four levels; multiples of `norm_num_groups`.
        time_compression_ratio, spatial_compression_ratio: pixels of a cell in time, which is 4, and along a side, a
            power of 2 up to 16.
        scale_factor, shift_factor: latents for the denoiser are ``scale_factor * (z - shift_factor)``.
        sample_size: pixels; a clip with a longer side is tiled when `use_spatial_tiling`. Tiles have this side.
        sample_tsize: frames; a longer clip is tiled when `use_temporal_tiling`.
        tile_overlap_factor: part of a tile that it shares with the next.
        use_slicing: one sample at a time: the same as ``mini_batch_size=1``.
        mini_batch_size: at most so many samples at a time; None takes the batch whole. Neither changes the result.
        dtype: of the weights, and of the computation; None keeps that of the file, or float32.

    Raises:
        ValueError: tiles, widths, ratios or weights that do not fit.
        FileNotFoundError: `from_pretrained` is not there.

    Source: HunyuanVideo, arXiv:2412.03603, section 4.1; scale and tiles as Open-Sora v2 uses them.
    """

    temporal_stride = 4
    is_causal = True
    has_deviation = True

    def __init__(
        self,
        from_pretrained: str | None = None,
        *,
        in_channels: int = 3,
        out_channels: int = 3,
        latent_channels: int = 16,
        layers_per_block: int = 2,
        norm_num_groups: int = 32,
        block_out_channels: tuple[int, ...] = (128, 256, 512, 512),
        time_compression_ratio: int = 4,
        spatial_compression_ratio: int = 8,
        scale_factor: float = 0.476986,
        shift_factor: float = 0.0,
        sample_size: int = 256,
        sample_tsize: int = 64,
        tile_overlap_factor: float = 0.25,
        use_spatial_tiling: bool = False,
        use_temporal_tiling: bool = False,
        use_slicing: bool = False,
        mini_batch_size: int | None = None,
        dtype: Literal["fp32", "bf16", "fp16"] | None = None,
    ) -> None:
        super().__init__()
        if len(block_out_channels) != 4 or any(width % norm_num_groups for width in block_out_channels):
            raise ValueError(
                f"autoencoder.block_out_channels={block_out_channels!r} must be four multiples of "
                f"norm_num_groups={norm_num_groups}"
            )
        if time_compression_ratio != self.temporal_stride or spatial_compression_ratio not in (1, 2, 4, 8, 16):
            raise ValueError(
                f"autoencoder.time_compression_ratio={time_compression_ratio!r}, spatial_compression_ratio="
                f"{spatial_compression_ratio!r}: the first can only be 4, the second 1, 2, 4, 8 or 16"
            )
        self.latent_channels, self.spatial_stride = latent_channels, spatial_compression_ratio
        self.scale_factor, self.shift_factor = scale_factor, shift_factor
        self.mini_batch_size = resolve_mini_batch(mini_batch_size, use_slicing=use_slicing)
        self.tiling = Tiling(
            spatial_stride=self.spatial_stride,
            temporal_stride=self.temporal_stride,
            spatial_size=sample_size if use_spatial_tiling else None,
            temporal_size=sample_tsize if use_temporal_tiling else None,
            overlap=tile_overlap_factor,
            is_causal=True,
        )
        # With a file, random weights would be drawn only to be thrown away.
        with torch.device("meta" if from_pretrained else torch.get_default_device()):
            networks = _build_networks(
                in_channels=in_channels,
                out_channels=out_channels,
                latent_channels=latent_channels,
                layers_per_block=layers_per_block,
                norm_num_groups=norm_num_groups,
                block_out_channels=tuple(block_out_channels),
                spatial_compression_ratio=spatial_compression_ratio,
            )
        self.encoder, self.decoder, self.quant_conv, self.post_quant_conv = networks
        facts = {"scaling_factor": scale_factor, "spatial_compression_ratio": spatial_compression_ratio}
        finish(self, from_pretrained=_find_file(from_pretrained, facts), dtype=dtype)

    def latent_shape(self, num_frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """(C, T, H, W) of the latents of a clip.

        Raises:
            ValueError: `num_frames` is not 4k+1 (the last frames would be lost), or a side is no multiple of 8.
        """
        return causal_latent_shape(self, num_frames, height, width, where="hunyuan_vae")

    def encode(self, video_BCTHW: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Latents for the denoiser.

        Args:
            video_BCTHW: [B, 3, T, H, W] in [-1, 1], any floating dtype.
            generator: samples the posterior, one draw for the whole batch, whatever `mini_batch_size` is; without it
                the mean is taken.

        Returns: float32 [B, C, (T-1)/4+1, H/8, W/8].

        Raises:
            ValueError: a size that cannot be coded, see `latent_shape`.
        """
        return self.latents_of(self.moments(video_BCTHW), generator)

    def posterior(self, video_BCTHW: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the latents for the denoiser, each float32 and shaped as `encode` gives."""
        return self._scaled(self.moments(video_BCTHW))

    def moments(self, video_BCTHW: Tensor) -> Tensor:
        """Mean and log variance of the posterior: [B, 2C, T', H', W'] in the dtype of the weights."""
        self.latent_shape(*video_BCTHW.shape[2:])
        video = video_BCTHW.to(self.quant_conv.weight.dtype)
        return run_by_samples(lambda part: self.tiling.encode(self._encode_tile, part), video, self.mini_batch_size)

    def latents_of(self, moments: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Sample or mean of the posterior, scaled for the denoiser; float32."""
        return draw_latents(*self._scaled(moments), generator)

    def _scaled(self, moments: Tensor) -> tuple[Tensor, Tensor]:
        mean, log_variance = moments.float().chunk(2, dim=1)
        # The bounds keep exp() finite for a bad frame; published codes have the same.
        std = torch.exp(0.5 * log_variance.clamp(-30.0, 20.0))
        return self.scale_factor * (mean - self.shift_factor), self.scale_factor * std

    def decode(self, z_BCTHW: Tensor) -> Tensor:
        """Pixels [B, 3, (T-1)*4+1, H*8, W*8], not clipped, in the dtype of the weights."""
        z = z_BCTHW.float() / self.scale_factor + self.shift_factor
        z = z.to(self.post_quant_conv.weight.dtype)
        return run_by_samples(lambda part: self.tiling.decode(self._decode_tile, part), z, self.mini_batch_size)

    def _encode_tile(self, video: Tensor) -> Tensor:
        return self.quant_conv(self.encoder(video))

    def _decode_tile(self, z: Tensor) -> Tensor:
        return self.decoder(self.post_quant_conv(z))


def _find_file(source: str | None, facts: Mapping[str, float]) -> str | None:
    """The file of weights in a folder as diffusers saves it; anything else stays as it is.

    Args:
        facts: what the folder's config.json has to say where it says anything; no weight tells it.

    Raises:
        ValueError: none or several files, or other facts.
    """
    folder = None if source is None else Path(source)
    if folder is None or not folder.is_dir():
        return source
    folder = folder / "vae" if (folder / "vae").is_dir() else folder
    where = f"autoencoder.from_pretrained={source!r}"
    files = sorted(folder.glob("*.safetensors"))
    if len(files) != 1:
        raise ValueError(f"{where} has {len(files)} safetensors files in {str(folder)!r}; name the one of the weights")
    config = folder / "config.json"
    published = json.loads(config.read_text()) if config.is_file() else {}
    for name, value in facts.items():
        if published.get(name, value) != value:
            own = name.replace("scaling", "scale")
            raise ValueError(f"{where} has {name}={published[name]}, autoencoder.{own}={value}; set it to that")
    return str(files[0])


def _build_networks(
    *,
    in_channels: int,
    out_channels: int,
    latent_channels: int,
    layers_per_block: int,
    norm_num_groups: int,
    block_out_channels: tuple[int, ...],
    spatial_compression_ratio: int,
) -> tuple[nn.Module, nn.Module, nn.Conv3d, nn.Conv3d]:
    from diffusers import AutoencoderKLHunyuanVideo

    published = AutoencoderKLHunyuanVideo(
        in_channels=in_channels,
        out_channels=out_channels,
        latent_channels=latent_channels,
        layers_per_block=layers_per_block,
        norm_num_groups=norm_num_groups,
        block_out_channels=block_out_channels,
        spatial_compression_ratio=spatial_compression_ratio,
    )
    return rebuild(published.encoder), rebuild(published.decoder), published.quant_conv, published.post_quant_conv
