"""Which sizes of clips an autoencoder can code, and what they become."""

from __future__ import annotations

from opensora_like.models.base import Autoencoder


def check_multiple(value: int, multiple: int, *, where: str, offset: int = 0, or_one: bool = False) -> None:
    """Compare a size with what the autoencoder can code.

    Args:
        offset: sizes are ``multiple * k + offset``.
        or_one: 1 is allowed as well.

    Raises:
        ValueError: `value` is none of them; with the nearest that are.
    """
    over = (value - offset) % multiple
    if (value >= 1 and not over) or (or_one and value == 1):
        return
    below = value - over
    nearest = {n for n in (below, below + multiple) if n >= 1} | ({1} if or_one and value < multiple else set())
    rule = f"{multiple} * k" + (f" + {offset}" if offset else "") + (" or 1" if or_one else "")
    raise ValueError(f"{where}={value} is not {rule}; nearest allowed: {' or '.join(map(str, sorted(nearest)))}")


def causal_latent_shape(
    autoencoder: Autoencoder, num_frames: int, height: int, width: int, *, where: str
) -> tuple[int, int, int, int]:
    """(C, T, H, W) of the latents of an autoencoder that codes the first frame alone.

    Raises:
        ValueError: `num_frames` is not stride * k + 1 (the last frames would be lost), or a side is no multiple of its
            stride.
    """
    temporal, spatial = autoencoder.temporal_stride, autoencoder.spatial_stride
    check_multiple(num_frames, temporal, offset=1, where=f"{where}: num_frames")
    check_multiple(height, spatial, where=f"{where}: height")
    check_multiple(width, spatial, where=f"{where}: width")
    return autoencoder.latent_channels, (num_frames - 1) // temporal + 1, height // spatial, width // spatial
