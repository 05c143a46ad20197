"""How far a predicted velocity is from its target: the squared error of each sample, and what may be added to it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from opensora_like.conditioning.masks import reference_loss_mask
from opensora_like.settings import RunConfig

MIN_MOTION_FRAMES = 3  # latent frames from which on changes between frames count


@dataclass(frozen=True)
class ErrorOptions:
    """What the mean squared error of a sample is made of.

    Args:
        skip_given: leave given frames out.
        motion_ratio: share, 0 to 1, of the squared error of the changes from one latent frame to the next, in samples
            of three frames or more. Source: VideoX-Fun, motion_sub_loss.
        error_cut: single elements that are off by more count as 0, in the mean all the same; None cuts nothing. It
            does not apply to the changes between frames. Source: VideoX-Fun, custom_mse_loss, which cuts at 50.

    Raises:
        ValueError: a ratio outside [0, 1], or a cut that leaves nothing.
    """

    skip_given: bool = False
    motion_ratio: float = 0.0
    error_cut: float | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.motion_ratio <= 1:
            raise ValueError(f"motion_loss_ratio={self.motion_ratio} must be from 0 to 1")
        if self.error_cut is not None and self.error_cut <= 0:
            raise ValueError(f"error_cut={self.error_cut} must be above 0; None cuts nothing")


def error_options(cfg: RunConfig) -> ErrorOptions:
    """Those of a run."""
    return ErrorOptions(cfg.no_i2v_ref_loss, cfg.motion_loss_ratio, cfg.error_cut)


def sample_errors(prediction: Tensor, target: Tensor, given_BT: Tensor | None, options: ErrorOptions) -> Tensor:
    """The error of each sample.

    Args:
        prediction, target: [B, C, T, H, W]; the difference is taken in float32.
        given_BT: True where a latent frame is given; None where none is.

    Returns: float32 [B].
    """
    difference = prediction.float() - target.float()
    if not options.skip_given:
        given_BT = None
    squares = difference.square()
    if options.error_cut is not None:
        squares = torch.where(difference.abs() <= options.error_cut, squares, 0.0)
    error_B = _mean(squares, given_BT)
    if not options.motion_ratio or difference.shape[2] < MIN_MOTION_FRAMES:
        return error_B
    given_changes = None if given_BT is None else given_BT[:, 1:] | given_BT[:, :-1]
    return torch.lerp(error_B, _mean(difference.diff(dim=2).square(), given_changes), options.motion_ratio)


def _mean(squares_BCTHW: Tensor, given_BT: Tensor | None) -> Tensor:
    if given_BT is None:
        return squares_BCTHW.mean(dim=(1, 2, 3, 4))
    return (squares_BCTHW.mean(dim=(1, 3, 4)) * reference_loss_mask(given_BT)).mean(dim=1)
