"""The protocols that the rest of the house knows about a model.

Letters of the shape suffixes, everywhere: B batch, C channels, T time, H W space, L tokens, D width, N heads.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

TokenStream = Literal["text", "image", "joint"]  # joint: text, then image


@dataclass(frozen=True)
class ParallelPlan:
    """What a backend must know of a model to cut it up; names are module paths, ``*`` is one index.

    Args:
        blocks: repeated blocks: units of gradient checkpointing, of sharding (FSDP2) and of compilation,
            in the order they run, e.g. ``("double_blocks.*", "single_blocks.*")``.
        attention: modules that call `layers.attention`; their heads are split by tensor and sequence parallelism.
        column: linears cut along their outputs under tensor parallelism -> sizes of the parts that are each cut
            (a fused qkv has three), or () for one part.
        row: linears cut along their inputs -> sizes of the parts of the input, or () for one part.
        head_counts: attributes to divide by ``tp_size``, ``path.attribute``.
        per_head: parameters kept whole but used by each rank for its own heads only: under tensor parallelism
            their gradients are to be summed over the ranks.
        split_norms: RMS norms over a width that `column` cuts. Under tensor parallelism their ``weight`` is cut with
            it, and their ``mean_over_ranks`` is to be set: the mean over the ranks, in the forward pass of the mean
            square, in the backward pass of its gradient.
        token_streams: patterns of `column` and `row` -> which of the tokens that `sequence_cut` cuts the linears work
            on: all of `row`, and of `column` all but those whose inputs every rank has whole.
    """

    blocks: tuple[str, ...]
    attention: tuple[str, ...] = ()
    column: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    row: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    head_counts: tuple[str, ...] = ()
    per_head: tuple[str, ...] = ()
    split_norms: tuple[str, ...] = ()
    token_streams: Mapping[str, TokenStream] = field(default_factory=dict)


@runtime_checkable
class Denoiser(Protocol):
    """A network that predicts the velocity; an ``nn.Module``, built on any device including ``meta``.

    Patchify, position ids and unpatchify live inside, so callers only see latents.
    """

    condition_names: ClassVar[frozenset[str]] | frozenset[str]  # what `forward` reads from its conditions
    latent_channels: int  # before patchify; not a published `in_channels`, which may count packed channels
    patch_size: int  # of H and W; latents' H and W must be multiples of it

    from_pretrained: str | None  # where `checkpoint.weights` finds published weights; the model reads nothing
    strict_load: bool  # whether each of its keys has to be there

    def forward(self, x_BCTHW: Tensor, t_B: Tensor, conditions: dict[str, Tensor]) -> Tensor:
        """Velocity at `x_BCTHW`.

        Args:
            t_B: float32 [B] in [0, 1]; 1 is noise.
            conditions: by the names in `condition_names`; a missing or an unknown one raises ValueError.

        Returns: [B, C, T, H, W] in the dtype of the weights.
        """

    def adapt_weights(self, weights: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
        """A published state dict under this model's names and in its layout.

        Returns: the weights; one that fits already comes back as it is. And a line for every change, for the log.
        """

    def parallel_plan(self) -> ParallelPlan: ...

    def set_grad_checkpoint(self, settings: Sequence[int] | bool) -> None:
        """How many blocks of each kind recompute their activations in the backward pass; True means all."""


@runtime_checkable
class Autoencoder(Protocol):
    """Pixels in [-1, 1] to latents and back; frozen; an ``nn.Module``."""

    latent_channels: int
    temporal_stride: int
    spatial_stride: int
    is_causal: bool  # the first frame is coded alone: 4k+1 frames give k+1 latent frames
    has_deviation: bool  # `posterior` gives one

    def encode(self, video_BCTHW: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Latents, scaled for the denoiser. With a generator the posterior is sampled, without it is its mean."""

    def posterior(self, video_BCTHW: Tensor) -> tuple[Tensor, Tensor | None]:
        """What `encode` draws from: mean and standard deviation, scaled; None from one that does not sample."""

    def decode(self, z_BCTHW: Tensor) -> Tensor:
        """Pixels, not clipped."""

    def latent_shape(self, num_frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """(C, T, H, W) of the latents of a clip of this size.

        Raises:
            ValueError: a size the autoencoder cannot code.
        """


@runtime_checkable
class TextEncoder(Protocol):
    """Captions to embeddings; frozen; an ``nn.Module``."""

    def encode(self, texts: Sequence[str]) -> Tensor:
        """[B, L, D] token embeddings, or [B, D] for an encoder that pools; on the encoder's device."""


@runtime_checkable
class ImageEncoder(Protocol):
    """Pictures to embeddings; frozen; an ``nn.Module``."""

    def encode_images(self, images_BCHW: Tensor) -> Tensor:
        """[B, L, D] of images in [-1, 1], of any size."""


@runtime_checkable
class CaptionedImageEncoder(Protocol):
    """Captions, each read together with a picture, to embeddings; frozen; an ``nn.Module``."""

    def encode_captioned_images(self, texts: Sequence[str], images_BCHW: Tensor) -> Tensor:
        """[B, L, D]; zero rows are padding."""


@runtime_checkable
class AudioEncoder(Protocol):
    """Sound to embeddings; frozen; an ``nn.Module``."""

    def encode_audio(self, waveforms: Sequence[Tensor], sample_rate: int) -> Tensor:
        """[B, K, D] of mono sounds [S] in [-1, 1], of any lengths; zero rows are padding."""


EncoderKind = Literal["text", "image", "captioned image", "audio"]
# what an encoder is an encoder of -> the method that it has for that; each encoder has one of them
ENCODER_METHODS: dict[EncoderKind, str] = {
    "text": "encode",
    "image": "encode_images",
    "captioned image": "encode_captioned_images",
    "audio": "encode_audio",
}


def encoders_of(kind: EncoderKind, encoders: Mapping[str, Any]) -> list[str]:
    """Names of the encoders, or classes of encoders, of one kind."""
    return [name for name, encoder in encoders.items() if hasattr(encoder, ENCODER_METHODS[kind])]
