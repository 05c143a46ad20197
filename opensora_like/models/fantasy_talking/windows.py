"""Which part of the audio each latent frame listens to.

Letters of the shape suffixes: B batch, T latent frames, L audio vectors.
"""

from __future__ import annotations

import torch
from torch import Tensor

FRAMES_PER_LATENT = 4  # pixel frames that a latent frame codes, but for the first, which codes one
MARGIN = 4  # vectors that a window is widened by on either side


def window_bounds(lengths_B: Tensor, num_latent_frames: int, *, margin: int = MARGIN) -> Tensor:
    """Where the windows begin and end; both may lie outside of the audio.

    The audio is taken to last as long as the 4 (T - 1) + 1 pixel frames. A window is centred on the middle of the four
    frames of its latent frame and has twice their length; that of the first latent frame ends where the second one's
    begins, and has as many vectors.

    Args:
        lengths_B: int64, vectors of each clip's audio.
        margin: vectors more on either side.

    Returns: int64 [B, T, 2] on the device of `lengths_B`: first vector, and the one after the last.

    Source: FantasyTalking, arXiv:2504.04842, section 3.1; Fantasy-AMAP/fantasy-talking:model.py, split_audio_sequence.
    """
    per_frame_B = lengths_B.double() / (FRAMES_PER_LATENT * (num_latent_frames - 1) + 1)
    half_B = (FRAMES_PER_LATENT * per_frame_B / 2).floor().long()
    begins_T = FRAMES_PER_LATENT * torch.arange(-1, num_latent_frames - 1, device=lengths_B.device) + 1
    # in float64 and in this order: the published numbers depend on how these round
    ends = per_frame_B[:, None] * begins_T + per_frame_B[:, None] * (begins_T + FRAMES_PER_LATENT)
    centres_BT = (ends / 2).floor().long() - 1
    first_BT, last_BT = centres_BT - half_B[:, None], centres_BT + half_B[:, None]
    # of a single frame there is no second window to end at: it is centred on the first vector
    meets_B = first_BT[:, 1] if num_latent_frames > 1 else half_B
    last_BT[:, 0] = meets_B
    first_BT[:, 0] = meets_B - 2 * half_B
    return torch.stack([first_BT - margin, last_BT + margin + 1], dim=-1)


def heard_vectors(audio_BLC: Tensor) -> Tensor:
    """How many vectors of each clip's audio there are: all up to the last one that is not zero. Returns: int64 [B]."""
    there_BL = (audio_BLC != 0).any(dim=-1)
    numbers_L = torch.arange(1, audio_BLC.shape[1] + 1, device=audio_BLC.device)
    return (there_BL * numbers_L).amax(dim=1) if audio_BLC.shape[1] else numbers_L.new_zeros(len(audio_BLC))


def window_mask(lengths_B: Tensor, num_latent_frames: int, num_vectors: int) -> Tensor:
    """Which vectors each latent frame listens to: those of its window that are there.

    Args:
        num_vectors: to which all audio is filled up.

    Returns: bool [B, T, L].
    """
    bounds = window_bounds(lengths_B, num_latent_frames)
    numbers_L = torch.arange(num_vectors, device=lengths_B.device)
    within = (numbers_L >= bounds[..., :1]) & (numbers_L < bounds[..., 1:])
    return within & (numbers_L < lengths_B[:, None, None])
