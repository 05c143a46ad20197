"""What takes the places of encoders whose outputs are cached: their sizes, and nothing to encode with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from opensora_like.models.autoencoders.sizes import check_multiple


class CachedAutoencoder(nn.Module):
    """The sizes of an autoencoder without its weights; an `Autoencoder` that neither encodes nor decodes.

    Args:
        facts: as `fingerprint.latent_facts` gives them.
    """

    def __init__(self, facts: Mapping[str, Any]) -> None:
        super().__init__()
        self.latent_channels, self.is_causal = int(facts["latent_channels"]), bool(facts["is_causal"])
        self.has_deviation = bool(facts["has_deviation"])
        self.temporal_stride, self.spatial_stride = int(facts["temporal_stride"]), int(facts["spatial_stride"])

    def latent_shape(self, num_frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """(C, T, H, W) of the latents of a clip.

        Raises:
            ValueError: frames or pixels that do not fill whole blocks.
        """
        stride, side = self.temporal_stride, self.spatial_stride
        check_multiple(
            num_frames, stride, offset=int(self.is_causal), or_one=True, where="cached autoencoder: num_frames"
        )
        check_multiple(height, side, where="cached autoencoder: height")
        check_multiple(width, side, where="cached autoencoder: width")
        coded = (num_frames - 1) // stride + 1 if self.is_causal else max(1, num_frames // stride)
        return self.latent_channels, coded, height // side, width // side

    def encode(self, video_BCTHW: Tensor, generator: torch.Generator | None = None) -> NoReturn:
        """Raises: ValueError: always."""
        self._refuse("encodes")

    def posterior(self, video_BCTHW: Tensor) -> NoReturn:
        """Raises: ValueError: always."""
        self._refuse("encodes")

    def decode(self, z_BCTHW: Tensor) -> NoReturn:
        """Raises: ValueError: always."""
        self._refuse("decodes")

    def _refuse(self, what: str) -> NoReturn:
        raise ValueError(
            f"dataset.type='latents' trains without autoencoder, and something {what}; use a dataset that reads videos"
        )


class CachedText(nn.Module):
    """The embedding of the empty caption; a `TextEncoder` that knows no other.

    Args:
        null: without a batch dimension, [L, D] or [D].
    """

    null: Tensor

    def __init__(self, name: str, null: Tensor) -> None:
        super().__init__()
        self.name = name
        self.max_length = null.shape[0] if null.ndim == 2 else 0  # tokens of a caption, for who counts work
        self.register_buffer("null", null[None], persistent=False)

    def encode(self, texts: Sequence[str]) -> Tensor:
        """The embedding of empty captions, as many as there are.

        Raises:
            ValueError: another caption.
        """
        if other := [text for text in texts if text]:
            raise ValueError(
                f"encoders.{self.name} was not built, as its embeddings are cached, and of {other[0]!r} there is none; "
                "cache it, or use a dataset that reads videos"
            )
        return self.null.expand(len(texts), *self.null.shape[1:])
