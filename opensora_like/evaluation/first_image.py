"""The first stage of text-to-image-to-video: an image for every job without a reference, before any video is made."""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from opensora_like import rng
from opensora_like.datasets.aspect import closest_ratio, shape_table
from opensora_like.datasets.video_writing import write_image
from opensora_like.evaluation.jobs import first_image_path
from opensora_like.evaluation.placement import in_use
from opensora_like.evaluation.prompts import Job
from opensora_like.models.base import TextEncoder, encoders_of
from opensora_like.models.flux_image import MULTIPLE, FluxImage
from opensora_like.publish import staged
from opensora_like.registry import MODELS, build
from opensora_like.runtime import DTYPES, logger
from opensora_like.settings import InferenceConfig

SHARED = ("text", "pooled")  # the conditions whose encoders FLUX can take over


def image_size(resolution: str, video_size: tuple[int, int]) -> tuple[int, int]:
    """Height and width of the image for a video of `video_size`, both in pixels."""
    table = shape_table(resolution, multiple=MULTIPLE, training=False)
    names = list(table)
    return table[names[int(closest_ratio(video_size[0], video_size[1], names))]]


def make_first_images(
    cfg: InferenceConfig,
    jobs: Sequence[Job],
    *,
    video_size: tuple[int, int],
    encoders: Mapping[str, TextEncoder],
    device: torch.device,
) -> None:
    """Draw the images of `jobs` that are not there, then give the memory back: FLUX and the video model never meet.

    The noise of an image depends on (seed, prompt, repeat) alone.

    Args:
        encoders: of the run, which `FluxImage.share_encoders` uses.

    Raises:
        ValueError, FileNotFoundError: see `FluxImage`.
    """
    missing = [job for job in jobs if not job.prompt.refs and not first_image_path(cfg, job).exists()]
    if cfg.first_image is None or not missing:
        return
    drawer: FluxImage = build(cfg.first_image, MODELS, where="first_image")
    of_text = encoders_of("text", encoders)
    if drawer.share_encoders and not set(SHARED) <= set(of_text):
        raise ValueError(
            f"first_image.share_encoders=True needs text encoders named {list(SHARED)}, there are {sorted(of_text)}; "
            "set it to False for the pipeline's own"
        )
    texts = list(dict.fromkeys(job.prompt.spoken for job in missing)) if drawer.share_encoders else []
    embeddings = _embeddings(texts, encoders, device, offload=cfg.offload)  # before FLUX needs the room
    drawer.load(device, DTYPES[cfg.dtype], offload=cfg.offload)
    size = image_size(drawer.resolution, video_size)
    for job in missing:
        prompt = job.prompt
        generator = rng.generator(cfg.seed + job.repeat, f"first image {prompt.text}", prompt.occurrence)
        image = drawer.draw(prompt.spoken, size, generator=generator, embeddings=embeddings.get(prompt.spoken))
        path = first_image_path(cfg, job)
        with staged(path, shared=True) as draft:
            write_image(draft, image)
        logger.info("first image %s", path)
    del drawer
    gc.collect()  # hooks of offloading hold the models in cycles
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _embeddings(
    texts: Sequence[str], encoders: Mapping[str, TextEncoder], device: torch.device, *, offload: bool
) -> dict[str, tuple[Tensor, Tensor]]:
    """Text -> its embeddings by tokens and pooled, on the CPU."""
    if not texts:
        return {}
    found: list[list[Tensor]] = []
    for name in SHARED:
        with in_use(encoders[name], device, offload=offload):
            found.append([encoders[name].encode([text]).cpu() for text in texts])
    return dict(zip(texts, zip(*found, strict=True), strict=True))


def with_first_image(cfg: InferenceConfig, job: Job) -> Job:
    """`job` with the image that was made for it as its reference; one with references stays as it is.

    Returns: the job to sample.
    """
    if cfg.first_image is None or job.prompt.refs:
        return job
    return Job(dataclasses.replace(job.prompt, refs=(str(first_image_path(cfg, job)),)), job.repeat)
