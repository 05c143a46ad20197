"""What a denoiser hears of a batch: the sound of each clip through a frozen encoder, or nothing.

Letters of the shape suffixes: B batch, K vectors, D width.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from opensora_like.datasets.audio_io import SAMPLE_RATE
from opensora_like.models.base import AudioEncoder, encoders_of

CONDITION = "audio"  # of a denoiser that hears


def encode_sound(encoder: AudioEncoder, sounds: Sequence[Tensor] | None) -> Tensor:
    """Vectors of the sound of each clip.

    Args:
        sounds: as `Batch.audio`.

    Returns: float32 [B, K, D], zero beyond each clip's end.

    Raises:
        ValueError: the batch has none.
    """
    if sounds is None:
        raise ValueError(
            "an encoder takes sound, and the batch has none; use a dataset that reads it, such as "
            "dataset.type='video_speech'"
        )
    return encoder.encode_audio(sounds, SAMPLE_RATE)


def without_sound(heard_BKD: Tensor, dropped: np.ndarray) -> Tensor:
    """Zeros for the clips that lose their sound: to the denoiser a vector of zeros is none, so it adds nothing there.

    Silence would be something else: it has vectors, which say that nobody speaks.

    Args:
        dropped: bool [B].
    """
    kept = torch.from_numpy(~dropped).to(heard_BKD, non_blocking=True)
    return heard_BKD * kept[:, None, None]


def check_sound(encoders: Mapping[str, Any], wanted: Iterable[str]) -> None:
    """Whether encoders of sound make the condition "audio", and nothing else does.

    Args:
        wanted: names of the conditions that the model takes.

    Raises:
        ValueError: another condition is made of sound, or "audio" of something else.
    """
    names = encoders_of("audio", encoders)
    if other := [name for name in names if name != CONDITION]:
        raise ValueError(f"encoders.{other[0]} encodes sound, which is the condition {CONDITION!r}; rename it")
    if CONDITION in wanted and not names:
        raise ValueError(f"encoders.{CONDITION} does not encode sound; use type='wav2vec2'")
