"""The posterior of an autoencoder, scaled for the denoiser: the same draw from what was just encoded or was cached."""

from __future__ import annotations

import torch
from torch import Tensor


def draw_latents(mean: Tensor, std: Tensor | None, generator: torch.Generator | None) -> Tensor:
    """A sample where there is something to draw and something to draw it with, else the mean.

    Args:
        mean, std: as `Autoencoder.posterior` gives them, of a whole batch; one draw serves all of it.

    Returns: float32, as `mean`.
    """
    if std is None or generator is None:
        return mean.float()
    noise = torch.randn(mean.shape, generator=generator, device=generator.device)
    return mean.float() + std.float() * noise.to(mean.device)
