"""What published Wan image-to-video weights are shown: a mask of pixel frames, and a clip that is grey but for them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from opensora_like.conditioning.masks import Given, given_frames
from opensora_like.models.base import Autoencoder


def takes_grey_clips(model: object) -> bool:
    """Whether the visual condition of `model` is the one of this file; see ``Wan.ungiven``."""
    return getattr(model, "ungiven", "zero") == "grey"


@torch.no_grad()
def grey_condition(autoencoder: Autoencoder, video_BCTHW: Tensor, given: Sequence[Given]) -> tuple[Tensor, Tensor]:
    """The condition "visual" of published Wan i2v weights.

    Behind the given frames they have seen the latents of a clip that is grey (0) there, and a mask with one channel
    for each of the frames that a latent frame codes; the first frame counts for all of its own.

    Args:
        video_BCTHW: pixels in [-1, 1]; those of frames that are not given are not looked at.
        given: per sample, the number of frames given at both ends.

    Returns: ([B, S + C, T, H, W] float32: the S = temporal_stride mask channels, then the mean latents;
        bool [B, T], True where all frames of a latent frame are given).

    Raises:
        ValueError: an autoencoder that is not causal, or more frames given than there are.

    Source: diffusers:pipelines/wan/pipeline_wan_i2v.py, prepare_latents.
    """
    batch_size, _, num_frames = video_BCTHW.shape[:3]
    if not autoencoder.is_causal:
        raise ValueError("model.ungiven='grey' is for Wan's causal autoencoder; set model.ungiven='zero'")
    given_BF = torch.zeros(batch_size, num_frames, dtype=torch.bool, device=video_BCTHW.device)
    for row, ends in zip(given_BF, given, strict=True):
        if sum(ends) > num_frames:
            raise ValueError(f"{sum(ends)} frames of a clip of {num_frames} are given; take a shorter task")
        row[: ends.head] = True
        row[num_frames - ends.tail :] = True
    grey = torch.where(given_BF[:, None, :, None, None], video_BCTHW, 0.0)
    latents = autoencoder.encode(grey).float()
    stride = autoencoder.temporal_stride
    first_of_all = given_BF[:, :1].expand(-1, stride)
    mask_BST = torch.cat([first_of_all, given_BF[:, 1:]], dim=1).unflatten(1, (-1, stride)).transpose(1, 2)
    mask = mask_BST.to(latents.dtype)[..., None, None].expand(-1, -1, -1, *latents.shape[3:])
    return torch.cat([mask, latents], dim=1), mask_BST.all(dim=1)


def training_condition(
    autoencoder: Autoencoder, video_BCTHW: Tensor | None, tasks: Sequence[str]
) -> tuple[Tensor, Tensor]:
    """`grey_condition` for the drawn tasks of a batch.

    Raises:
        ValueError: the batch has latents only.
    """
    video = pixels_of(video_BCTHW)
    return grey_condition(autoencoder, video, [given_frames(task, is_causal=True) for task in tasks])


def sampling_clip(task: str, ends: Sequence[Tensor], shape: tuple[int, int, int]) -> Tensor:
    """A clip that is grey but for the frames of references.

    Args:
        ends: pixels [3, T, H, W] in [-1, 1] of the head's frames and of the tail's, where the task takes them.
        shape: frames, height and width of what is to be made.

    Raises:
        ValueError: a reference is missing.
    """
    given = given_frames(task, is_causal=True)
    if len(ends) != sum(count > 0 for count in given):
        raise ValueError(f"task {task!r} has no reference; give one, or use task 't2v'")
    clip = torch.zeros(3, *shape)
    for pixels, is_tail in zip(ends, [False, True] if given.head else [True], strict=False):
        frames = slice(shape[0] - given.tail, None) if is_tail else slice(given.head)
        clip[:, frames] = pixels.cpu()
    return clip


def first_given(video_BCTHW: Tensor | None, tasks: Sequence[str]) -> Tensor:
    """The picture that the image encoder is shown: the first frame that is given, grey where none is.

    Returns: [B, 3, H, W] in [-1, 1].
    """
    video = pixels_of(video_BCTHW)
    images = torch.zeros_like(video[:, :, 0])
    for image, clip, task in zip(images, video, tasks, strict=True):
        ends = given_frames(task, is_causal=True)
        if any(ends):
            image.copy_(clip[:, 0 if ends.head else clip.shape[1] - ends.tail])
    return images


def pixels_of(video_BCTHW: Tensor | None) -> Tensor:
    """The clips of a batch.

    Raises:
        ValueError: it has none.
    """
    if video_BCTHW is None:
        raise ValueError(
            "model.ungiven='grey' encodes clips that are grey but for the given frames, and the batch has latents "
            "only; use a dataset that reads videos"
        )
    return video_BCTHW
