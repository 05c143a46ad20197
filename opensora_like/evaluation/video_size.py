"""How large a video is made: from a resolution and a ratio, or as it is told."""

from __future__ import annotations

from opensora_like.datasets.aspect import shape_table
from opensora_like.registry import nearest
from opensora_like.settings import InferenceConfig


def video_size(cfg: InferenceConfig, *, multiple: int) -> tuple[int, int]:
    """Height and width in pixels, from both or from resolution and aspect ratio.

    Open-Sora v2 samples some ratios at sizes that it is not trained at (4:3 at 768px: 656 x 880, not 672 x 880).

    Args:
        multiple: what both have to divide by: the autoencoder's stride times the patch size.

    Raises:
        ValueError: neither or both ways are given, or a size that does not divide.
    """
    if (cfg.resolution is None) == (cfg.height is None or cfg.width is None):
        raise ValueError(
            f"resolution={cfg.resolution!r}, height={cfg.height!r}, width={cfg.width!r}: give either resolution "
            "(and aspect_ratio) or both height and width; --resolution none takes back that of a config"
        )
    if cfg.resolution is None:
        if cfg.aspect_ratio != InferenceConfig.aspect_ratio:  # a config's own 16:9 stays when a flag gives a size
            raise ValueError(
                f"aspect_ratio={cfg.aspect_ratio!r} goes with resolution, and height={cfg.height}, width={cfg.width} "
                "are given: remove it, or use --height none --width none --resolution 256px"
            )
        height, width = cfg.height, cfg.width
    else:
        # where training has a shape for the ratio it is that one: the model has seen it
        table = shape_table(cfg.resolution, multiple=multiple, training=False)
        table |= shape_table(cfg.resolution, multiple=multiple)
        if cfg.aspect_ratio not in table:
            raise ValueError(
                f"aspect_ratio={cfg.aspect_ratio!r} is none that {cfg.resolution!r} has; "
                f"{nearest(cfg.aspect_ratio, table)} Any other size: --resolution none --height H --width W"
            )
        height, width = table[cfg.aspect_ratio]
    for name, value in (("height", height), ("width", width)):
        if value % multiple:
            near = [value // multiple * multiple, (value // multiple + 1) * multiple]
            raise ValueError(
                f"{name}={value} must be a multiple of {multiple} (autoencoder x patch); use one of {near}"
            )
    return height, width
