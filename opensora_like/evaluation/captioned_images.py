"""What encoders of captions with images are shown in sampling: prompts, each with the first frame of its references."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from opensora_like.evaluation.placement import in_use
from opensora_like.evaluation.prompts import Job
from opensora_like.models.base import encoders_of
from opensora_like.schedulers.samplers import Guidance
from opensora_like.settings import InferenceConfig


class Captioned(NamedTuple):
    """Condition name -> embeddings: of the prompts, of the negative ones, and of these without an image."""

    conditions: dict[str, Tensor]
    null_text: dict[str, Tensor]
    null_image: dict[str, Tensor]


def encode_prompts(
    encoders: Mapping[str, Any],
    jobs: Sequence[Job],
    captions: Sequence[str],
    read_references: Callable[[Sequence[str]], list[Tensor]],
    *,
    cfg: InferenceConfig,
    guidance: Guidance,
    size: tuple[int, int],
    device: torch.device,
) -> Captioned:
    """Run the encoders of a run that take captions with images; the others are passed over.

    Negative prompts are shown with the same image, as training shows it to samples without a caption; image guidance
    compares with grey.

    Args:
        read_references: of the references of a job, the pixels [3, T, H, W] that the task takes, [] for none.
        size: height and width of the video, of the grey image where there is no reference.
        guidance: negative prompts are run where one of its scales is not 1.
    """
    found = Captioned({}, {}, {})
    names = encoders_of("captioned image", encoders)
    if not names:
        return found
    ends = [read_references(job.prompt.refs) for job in jobs]
    images = torch.stack([end[0][:, 0].cpu() if end else torch.zeros(3, *size) for end in ends]).to(device)
    negatives = [job.prompt.negative for job in jobs]
    for name in names:
        with in_use(encoders[name], device, offload=cfg.offload):
            run = encoders[name].encode_captioned_images
            found.conditions[name] = run(captions, images).float()
            if guidance.text == 1 and guidance.image == 1:
                continue
            found.null_text[name] = run(negatives, images).float()
            found.null_image[name] = run(negatives, torch.zeros_like(images)).float()
    return found


def start_of(model: Any, noise_BCTHW: Tensor, conditions: Mapping[str, Tensor]) -> Tensor:
    """What sampling begins with: noise, or what the model makes of it."""
    return model.start_of(noise_BCTHW, conditions) if hasattr(model, "start_of") else noise_BCTHW
