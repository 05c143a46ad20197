"""Encoder and decoder of the deep-compression autoencoder, and the table of published architectures."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from opensora_like.models.autoencoders.dc_ae_layers import (
    BLOCKS,
    HEAD_DIM,
    ChannelRMSNorm,
    ConvLayer,
    Downsample,
    ShortcutConv,
    Upsample,
    build_block,
)
from opensora_like.registry import nearest


@dataclass(frozen=True)
class DCAEConfig:
    """An architecture. Level 0 has the full resolution; each further level halves it.

    Args:
        widths: channels per level.
        encoder_depths, decoder_depths: blocks per level.
        blocks: kind of block per level, one of `BLOCKS`; encoder and decoder alike.
        temporal_levels: whether the step from this level to the next also halves time; for clips only.
        is_video: 3D convolutions; without, every frame is an image of its own.
        downsample: "conv" (strided) or "pixel_unshuffle".
        upsample: "interpolate" or "pixel_shuffle".
        scaling_factor: latents for the denoiser are ``z / scaling_factor``.
    """

    widths: tuple[int, ...]
    encoder_depths: tuple[int, ...]
    decoder_depths: tuple[int, ...]
    blocks: tuple[str, ...]
    temporal_levels: tuple[bool, ...]
    latent_channels: int
    is_video: bool
    downsample: Literal["conv", "pixel_unshuffle"] = "conv"
    upsample: Literal["interpolate", "pixel_shuffle"] = "interpolate"
    scaling_factor: float = 1.0

    def __post_init__(self) -> None:
        levels = len(self.widths)
        for name in ("encoder_depths", "decoder_depths", "blocks", "temporal_levels"):
            if len(getattr(self, name)) != levels:
                raise ValueError(
                    f"autoencoder.{name}={getattr(self, name)!r} must have {levels} entries, as widths has"
                )
        for kind, width in zip(self.blocks, self.widths, strict=True):
            if kind not in BLOCKS:
                raise ValueError(f"autoencoder.blocks: unknown {kind!r}; {nearest(kind, BLOCKS)}")
            if BLOCKS[kind] is not None and width % HEAD_DIM:
                raise ValueError(f"autoencoder.widths: {width} at a level of {kind!r} is not a multiple of {HEAD_DIM}")
        for name in ("encoder_depths", "decoder_depths"):
            if min(getattr(self, name)) < 1:
                raise ValueError(f"autoencoder.{name}={getattr(self, name)!r}: every level needs at least one block")
        if self.temporal_levels[-1] or (any(self.temporal_levels) and not self.is_video):
            raise ValueError(
                f"autoencoder.temporal_levels={self.temporal_levels!r}: the last level has no next one, and only "
                "is_video=True has time; use False there"
            )
        if any(self.temporal_levels) and (self.downsample, self.upsample) != ("conv", "interpolate"):
            raise ValueError(
                "autoencoder.temporal_levels: only downsample='conv' with upsample='interpolate' halves time"
            )
        self._check_shortcuts()

    def _check_shortcuts(self) -> None:
        """The paths around the convolutions average or repeat whole groups of channels."""
        for level, (wide, narrow) in enumerate(zip(self.widths[1:], self.widths, strict=False)):
            for volume in (4, 4 * (1 + self.temporal_levels[level])):  # an image passes the same level without time
                if narrow * volume % wide:
                    raise ValueError(
                        f"autoencoder.widths: {wide} at level {level + 1} must divide {volume} * {narrow} "
                        f"of level {level}"
                    )
        if self.widths[-1] % self.latent_channels:
            raise ValueError(
                f"autoencoder.latent_channels={self.latent_channels} must divide the last width {self.widths[-1]}"
            )

    def factors(self, level: int) -> tuple[int, ...]:
        """Between `level` and the next, of T (clips only), H and W."""
        return (1 + self.temporal_levels[level], 2, 2) if self.is_video else (2, 2)


_RES_TO_VIT = ("ResBlock",) * 3 + ("EViTS5_GLU",) * 3
_WIDTHS = (128, 256, 512, 512, 1024, 1024)

# name -> architecture
CONFIGS: dict[str, DCAEConfig] = {
    # Open-Sora v2. Its training configs set the scaling factor, its inference config does not: latents that the
    # denoiser was never trained on. Here it belongs to the architecture and holds in both directions.
    "dc-ae-f32t4c128": DCAEConfig(
        widths=_WIDTHS,
        encoder_depths=(2, 2, 2, 3, 3, 3),
        decoder_depths=(3, 3, 3, 3, 3, 3),
        blocks=_RES_TO_VIT,
        temporal_levels=(False, False, False, True, True, False),
        latent_channels=128,
        is_video=True,
        scaling_factor=0.493,
    ),
    # The image autoencoder that it grew out of (arXiv:2410.10733, as trained for Sana, arXiv:2410.10629).
    "dc-ae-f32c32": DCAEConfig(
        widths=_WIDTHS,
        encoder_depths=(2, 2, 2, 3, 3, 3),
        decoder_depths=(3, 3, 3, 3, 3, 3),
        blocks=_RES_TO_VIT,
        temporal_levels=(False,) * 6,
        latent_channels=32,
        is_video=False,
    ),
    # Of no published weights: a small one for demos and tests.
    "dc-ae-f4t4c8": DCAEConfig(
        widths=(8, 8, 32),
        encoder_depths=(1, 1, 1),
        decoder_depths=(1, 1, 1),
        blocks=("ResBlock", "ResBlock", "EViTS5_GLU"),
        temporal_levels=(True, True, False),
        latent_channels=8,
        is_video=True,
    ),
}


class OpSequence(nn.Module):
    """A sequence under the published name ``op_list``."""

    def __init__(self, *ops: nn.Module) -> None:
        super().__init__()
        self.op_list = nn.ModuleList(ops)

    def forward(self, x: Tensor) -> Tensor:
        for op in self.op_list:
            x = op(x)
        return x


class Encoder(nn.Module):
    """Pixels to latents, unscaled."""

    def __init__(self, config: DCAEConfig, *, channels: int = 3) -> None:
        super().__init__()
        self.project_in = ConvLayer(channels, config.widths[0], is_video=config.is_video)
        self.stages = nn.ModuleList(self._stage(config, level) for level in range(len(config.widths)))
        last = ConvLayer(config.widths[-1], config.latent_channels, is_video=config.is_video)
        self.project_out = ShortcutConv(OpSequence(last), config.latent_channels)

    @staticmethod
    def _stage(config: DCAEConfig, level: int) -> OpSequence:
        width = config.widths[level]
        ops = [
            build_block(config.blocks[level], width, is_video=config.is_video)
            for _ in range(config.encoder_depths[level])
        ]
        if level + 1 < len(config.widths):
            down = Downsample(
                width,
                config.widths[level + 1],
                factors=config.factors(level),
                strided=config.downsample == "conv",
                is_video=config.is_video,
            )
            ops.append(down)
        return OpSequence(*ops)

    def forward(self, x: Tensor) -> Tensor:
        x = self.project_in(x)
        for stage in self.stages:
            x = stage(x)
        return self.project_out(x)


class Decoder(nn.Module):
    """Unscaled latents to pixels; ``stages.0`` has the full resolution and runs last."""

    def __init__(self, config: DCAEConfig, *, channels: int = 3) -> None:
        super().__init__()
        first = ConvLayer(config.latent_channels, config.widths[-1], is_video=config.is_video)
        self.project_in = ShortcutConv(first, config.widths[-1])
        self.stages = nn.ModuleList(self._stage(config, level) for level in range(len(config.widths)))
        last = ConvLayer(config.widths[0], channels, is_video=config.is_video)
        self.project_out = OpSequence(ChannelRMSNorm(config.widths[0]), nn.ReLU(), last)

    @staticmethod
    def _stage(config: DCAEConfig, level: int) -> OpSequence:
        width = config.widths[level]
        ops: list[nn.Module] = []
        if level + 1 < len(config.widths):
            up = Upsample(
                config.widths[level + 1],
                width,
                factors=config.factors(level),
                interpolate=config.upsample == "interpolate",
                is_video=config.is_video,
            )
            ops.append(up)
        for _ in range(config.decoder_depths[level]):
            ops.append(build_block(config.blocks[level], width, is_video=config.is_video))
        return OpSequence(*ops)

    def forward(self, z: Tensor) -> Tensor:
        z = self.project_in(z)
        for stage in reversed(self.stages):
            z = stage(z)
        return self.project_out(z)
