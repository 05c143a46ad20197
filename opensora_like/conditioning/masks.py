"""Tasks: which frames of a clip are given to the denoiser, in training and in sampling."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from opensora_like.models.base import Autoencoder
from opensora_like.registry import nearest


class Given(NamedTuple):
    """Frames of pixels given at the two ends of a clip, for a causal autoencoder."""

    head: int
    tail: int


# A causal autoencoder codes 4k+1 frames; one that is not codes 4k, and is given one frame less of 33 and of 65.
TASKS: dict[str, Given] = {
    "t2v": Given(0, 0),
    "i2v_head": Given(1, 0),
    "i2v_tail": Given(0, 1),
    "i2v_loop": Given(1, 1),
    "v2v_head": Given(33, 0),
    "v2v_tail": Given(0, 33),
    "v2v_head_easy": Given(65, 0),
    "v2v_tail_easy": Given(0, 65),
}


def given_frames(task: str, *, is_causal: bool) -> Given:
    """Frames of pixels that a task is given.

    Raises:
        ValueError: an unknown task.

    Source: Open-Sora v2, utils/train.py, the two prepare_visual_condition functions.
    """
    if task not in TASKS:
        raise ValueError(f"unknown task {task!r}; {nearest(task, TASKS)}")
    return Given(*(n if is_causal or n <= 1 else n - 1 for n in TASKS[task]))


def given_latent_frames(task: str, *, is_causal: bool, temporal_stride: int) -> Given:
    """Latent frames that a task is given; a single frame is always one latent frame."""
    frames = given_frames(task, is_causal=is_causal)
    coded = ((n - 1) // temporal_stride + 1 if is_causal else n // temporal_stride for n in frames)
    return Given(*(n if n <= 1 else k for n, k in zip(frames, coded, strict=True)))


def fits(task: str, num_latent_frames: int, *, is_causal: bool, temporal_stride: int) -> bool:
    """Whether a clip has a frame left to make after what the task is given."""
    given = given_latent_frames(task, is_causal=is_causal, temporal_stride=temporal_stride)
    return sum(given) < num_latent_frames


def check_condition_config(
    condition_config: Mapping[str, float],
    *,
    is_causal: bool = True,
    temporal_stride: int = 4,
    num_latent_frames: Iterable[int] = (),
) -> None:
    """Check task weights when they are read, so that no clip can fail later.

    Args:
        condition_config: task -> relative frequency; they need not sum to 1.
        num_latent_frames: lengths that the buckets hold; images (1) need no task.

    Raises:
        ValueError: an unknown task, a weight that is negative or not finite, no weight above 0, or a length that no
            task fits.
    """
    for task, weight in condition_config.items():
        if task not in TASKS:
            raise ValueError(f"condition_config.{task}: unknown task; {nearest(str(task), TASKS)}")
        if not math.isfinite(weight) or weight < 0:
            raise ValueError(f"condition_config.{task}={weight!r} must be 0 or more")
    if not any(weight > 0 for weight in condition_config.values()):
        raise ValueError(f"condition_config={dict(condition_config)!r} draws nothing; give one task a weight above 0")
    for length in num_latent_frames:
        _eligible(condition_config, length, is_causal=is_causal, temporal_stride=temporal_stride)


def _eligible(
    condition_config: Mapping[str, float], num_latent_frames: int, *, is_causal: bool, temporal_stride: int
) -> dict[str, float]:
    """The weights of the tasks that fit, in the order of the table: the order of a config must not matter."""
    if num_latent_frames == 1:
        return {"t2v": 1.0}  # an image has no other frame to be made from the given one
    eligible = {
        task: float(condition_config[task])
        for task in TASKS
        if condition_config.get(task, 0) > 0
        and fits(task, num_latent_frames, is_causal=is_causal, temporal_stride=temporal_stride)
    }
    if not eligible:
        raise ValueError(
            f"condition_config: none of {sorted(condition_config)} fits {num_latent_frames} latent frames; add t2v"
        )
    return eligible


def draw_tasks(
    condition_config: Mapping[str, float],
    num_latent_frames: int,
    generators: Sequence[torch.Generator],
    is_causal: bool,
    *,
    temporal_stride: int = 4,
) -> list[str]:
    """Draw one task per sample, each from the sample's own generator.

    A task that leaves no latent frame to make is not drawn for this clip, and stays in the config for the next;
    images (1 latent frame) are always t2v.

    Args:
        generators: one per sample; on the CPU, or the draw waits for the device.

    Raises:
        ValueError: no task fits.
    """
    eligible = _eligible(condition_config, num_latent_frames, is_causal=is_causal, temporal_stride=temporal_stride)
    tasks, ends = list(eligible), list(accumulate(eligible.values()))
    draws = [torch.rand((), generator=g, device=g.device, dtype=torch.float64) for g in generators]
    # the last end is left out: rounding of u * total can reach it, and then it is the last task all the same
    return [tasks[bisect_right(ends[:-1], u * ends[-1])] for u in torch.stack(draws).tolist()]


class _Piece(NamedTuple):
    """Frames of one sample that are given together."""

    sample: int
    frames: slice  # of the clip
    latent_frames: slice  # of its latents
    num_frames: int

    @property
    def name(self) -> str:
        """What cached latents of these frames are called."""
        return f"{'head' if self.frames.start is None else 'tail'}{self.num_frames}"


def _pieces(
    tasks: Sequence[str], num_frames: int, num_latent_frames: int, *, is_causal: bool, stride: int
) -> list[_Piece]:
    pieces = []
    for sample, task in enumerate(tasks):
        frames = given_frames(task, is_causal=is_causal)
        latent = given_latent_frames(task, is_causal=is_causal, temporal_stride=stride)
        if sum(latent) > num_latent_frames or max(frames) > num_frames:
            raise ValueError(
                f"task {task!r} is given {sum(latent)} latent frames ({max(frames)} frames at one end), the clip has "
                f"{num_latent_frames} ({num_frames}); draw it only where it fits"
            )
        if frames.head:
            pieces.append(_Piece(sample, slice(frames.head), slice(latent.head), frames.head))
        if frames.tail:
            tail = slice(num_frames - frames.tail, None), slice(num_latent_frames - latent.tail, None)
            pieces.append(_Piece(sample, *tail, frames.tail))
    return pieces


def references_of(condition_config: Mapping[str, float] | None, *, is_causal: bool) -> dict[str, slice]:
    """What has to be cached of a clip, so that its visual condition can be made without pixels.

    Returns: name -> frames of the clip that are encoded alone; empty for t2v only.
    """
    found = {}
    for task in (name for name, weight in (condition_config or {}).items() if weight > 0):
        for end, count in given_frames(task, is_causal=is_causal)._asdict().items():
            if count == 1 or (count and is_causal):
                found[f"{end}{count}"] = slice(count) if end == "head" else slice(-count, None)
    return dict(sorted(found.items()))


@torch.no_grad()
def visual_condition(
    autoencoder: Autoencoder,
    video_BCTHW: Tensor | None,
    x0_BCTHW: Tensor,
    tasks: Sequence[str],
    *,
    references: Mapping[str, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """What the denoiser is shown of the clips: a mask, and the latents of the given frames.

    The given frames are encoded without the rest of the clip, as in sampling, where the rest does not exist yet.
    Pieces of one length go through the autoencoder in one call, whatever their samples and ends. From an autoencoder
    that is not causal, v2v copies the latents of the whole clip, whose groups of frames do not overlap.

    Args:
        video_BCTHW: pixels that `x0_BCTHW` was encoded from; None is enough where no piece has to be encoded.
        tasks: one per sample.
        references: latents of given frames by the names of `references_of`, [B, C, T', H, W]; used without pixels.

    Returns: ([B, 1 + C, T, H, W] in the dtype of `x0_BCTHW`: mask first, then latents, zero outside the mask;
        bool [B, T], True where the frame is given). Both are zero for images.

    Raises:
        ValueError: a task that is unknown or longer than the clip, pixels that are needed and missing.
    """
    batch_size, _, num_latent_frames = x0_BCTHW.shape[:3]
    if len(tasks) != batch_size:
        raise ValueError(f"{len(tasks)} tasks for {batch_size} samples; draw one for each")
    is_causal, stride = autoencoder.is_causal, autoencoder.temporal_stride
    mask_BT = torch.zeros(batch_size, num_latent_frames, dtype=torch.bool, device=x0_BCTHW.device)
    latents = torch.zeros_like(x0_BCTHW)
    if num_latent_frames == 1:
        return _concat_mask(mask_BT, latents), mask_BT

    coded = (num_latent_frames - 1) * stride + 1 if is_causal else num_latent_frames * stride
    num_frames = coded if video_BCTHW is None else video_BCTHW.shape[2]
    pieces = _pieces(tasks, num_frames, num_latent_frames, is_causal=is_causal, stride=stride)
    to_encode: dict[int, list[_Piece]] = {}
    for piece in pieces:
        mask_BT[piece.sample, piece.latent_frames] = True
        if is_causal or piece.num_frames == 1:
            to_encode.setdefault(piece.num_frames, []).append(piece)
        else:
            latents[piece.sample, :, piece.latent_frames] = x0_BCTHW[piece.sample, :, piece.latent_frames]
    for group in to_encode.values():
        if video_BCTHW is None:
            encoded = [_cached(piece, references or {}, tasks) for piece in group]
        else:
            encoded = autoencoder.encode(torch.stack([video_BCTHW[p.sample, :, p.frames] for p in group]))
        for piece, z in zip(group, encoded, strict=True):
            latents[piece.sample, :, piece.latent_frames] = z.to(latents.dtype)
    return _concat_mask(mask_BT, latents), mask_BT


def _cached(piece: _Piece, references: Mapping[str, Tensor], tasks: Sequence[str]) -> Tensor:
    if piece.name not in references:
        raise ValueError(
            f"condition_config.{tasks[piece.sample]} needs pixels or cached latents of the given frames "
            f"({piece.name!r}), the batch has latents only and of given frames {sorted(references)}; cache with this "
            "condition_config, use a dataset that reads videos, or condition_config=dict(_delete_=True, t2v=1.0)"
        )
    return references[piece.name][piece.sample]


def _concat_mask(mask_BT: Tensor, latents_BCTHW: Tensor) -> Tensor:
    batch_size, _, num_latent_frames, height, width = latents_BCTHW.shape
    mask = mask_BT.to(latents_BCTHW.dtype)[:, None, :, None, None]
    return torch.cat([mask.expand(batch_size, 1, num_latent_frames, height, width), latents_BCTHW], dim=1)


def inference_condition(
    task: str,
    references: Sequence[Sequence[Tensor]],
    *,
    latent_shape: tuple[int, int, int, int],
    is_causal: bool,
    temporal_stride: int = 4,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """The visual condition for sampling, from encoded references.

    Args:
        references: per sample, latents [C, T', H, W] of its references. The head comes from the first frames of the
            first reference, the tail from the last frames of the last one (v2v: of the first, its only one).
        latent_shape: (C, T, H, W) of what is to be made.

    Returns: as `visual_condition`.

    Raises:
        ValueError: an unknown task, one that leaves nothing to make, a reference that is missing, too short or of
            another size.

    Source: Open-Sora v2, prepare_inference_condition; there a missing reference turns the task into t2v.
    """
    given = given_latent_frames(task, is_causal=is_causal, temporal_stride=temporal_stride)
    channels, num_latent_frames, height, width = latent_shape
    if any(given) and not fits(task, num_latent_frames, is_causal=is_causal, temporal_stride=temporal_stride):
        raise ValueError(
            f"task {task!r} is given {sum(given)} of {num_latent_frames} latent frames, none is left to make; "
            "raise num_frames"
        )
    mask_BT = torch.zeros(len(references), num_latent_frames, dtype=torch.bool, device=device)
    mask_BT[:, : given.head] = True
    mask_BT[:, num_latent_frames - given.tail :] = True
    latents = torch.zeros(len(references), *latent_shape, dtype=dtype, device=device)
    for sample, refs in enumerate(references):
        for count, end in ((given.head, "head"), (given.tail, "tail")):
            if not count:
                continue
            reference = _reference(refs, end, task=task, sample=sample, shape=(channels, count, height, width))
            if end == "head":
                latents[sample, :, :count] = reference[:, :count]
            else:
                latents[sample, :, -count:] = reference[:, -count:]
    return _concat_mask(mask_BT, latents), mask_BT


def _reference(refs: Sequence[Tensor], end: str, *, task: str, sample: int, shape: tuple[int, int, int, int]) -> Tensor:
    if not refs:
        raise ValueError(f"task {task!r} of sample {sample} has no reference; give one, or use task 't2v'")
    reference = refs[0] if end == "head" or task.startswith("v2v") else refs[-1]
    channels, count, height, width = shape
    found = tuple(reference.shape)
    if (found[0], *found[2:]) != (channels, height, width) or found[1] < count:
        raise ValueError(
            f"task {task!r} of sample {sample}: the reference is {list(found)}, needed are {count} frames or more of "
            f"{[channels, '*', height, width]}; resize it to the size of the video, or take a longer one"
        )
    return reference


def reference_loss_mask(mask_BT: Tensor) -> Tensor:
    """Weights that leave the given frames out of the loss (``no_i2v_ref_loss``).

    Args:
        mask_BT: bool, True where the frame is given.

    Returns: float32 [B, T]: 0 where given; elsewhere so large that the mean over a sample's frames of weight * loss
        is the mean loss of its frames that are made. 0 everywhere for a sample with none to make.

    Source: Open-Sora v2, get_batch_loss; it means this, drops only a lone first or last frame, and is never reached.
    """
    made_BT = (~mask_BT).float()
    return made_BT * mask_BT.shape[1] / made_BT.sum(dim=1, keepdim=True).clamp(min=1)
