"""Encoders that are shown a caption together with the first frame that is given."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

from opensora_like.conditioning.wan_i2v import first_given
from opensora_like.models.base import CaptionedImageEncoder, encoders_of


def encode_captions(
    encoder: CaptionedImageEncoder, texts: Sequence[str], video_BCTHW: Tensor | None, tasks: Sequence[str]
) -> Tensor:
    """Embeddings of captions, each with the first given frame of its clip, or with grey where none is given.

    Args:
        texts: one per sample, "" where the caption is dropped; the frame is shown all the same.
        video_BCTHW: pixels in [-1, 1].

    Raises:
        ValueError: the batch has latents only.
    """
    if video_BCTHW is None:
        raise ValueError(
            "an encoder is shown given frames with their captions, and the batch has latents only; use a dataset that"
            " reads videos"
        )
    return encoder.encode_captioned_images(texts, first_given(video_BCTHW, tasks))


def check_captioned(encoders: Mapping[str, Any], wanted: Iterable[str]) -> None:
    """Whether the model takes given frames where an encoder is shown them.

    Args:
        wanted: names of the conditions that the model takes.

    Raises:
        ValueError: it takes none.
    """
    if (names := encoders_of("captioned image", encoders)) and "visual" not in wanted:
        raise ValueError(
            f"encoders.{names[0]} is shown given frames, and the model takes none (no visual condition); use an"
            " encoder of captions alone, such as type='llm'"
        )


def check_tasks(model: Any, tasks: Iterable[str], *, where: str) -> None:
    """Whether the model was made for all of these tasks; one that does not say so takes any.

    Args:
        where: the setting that names them.

    Raises:
        ValueError: it was not.
    """
    allowed = getattr(model, "tasks", None)
    if allowed is not None and (others := sorted(set(tasks) - allowed)):
        raise ValueError(f"{where} has {others}, and {type(model).__name__} takes {sorted(allowed)} only; remove them")
