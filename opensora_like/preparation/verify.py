"""Decode what was cached and compare it with the videos: latents of another autoencoder, norm or frame show at once."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from opensora_like.datasets.batch import BucketShape
from opensora_like.datasets.latent_store import open_store
from opensora_like.datasets.resize import psnr, to_frames
from opensora_like.datasets.video_writing import write_image, write_video
from opensora_like.models.base import Autoencoder
from opensora_like.preparation.captions import Clip
from opensora_like.preparation.sinks import Sink
from opensora_like.preparation.videos import PROBLEMS, Recipe
from opensora_like.registry import MODELS, build
from opensora_like.settings import RunConfig
from opensora_like.training.data import build_dataset
from opensora_like.training.measure import build_on_meta


class Verified(NamedTuple):
    """Of one sample: how near its decoded latents come to its pixels.

    Args:
        psnr: in dB; infinite where they are the same.
        pair_CTHW: the pixels and, to their right, the decoded ones.
    """

    key: str
    psnr: float
    pair_CTHW: Tensor


def verify_clips(clips: Sequence[Clip], recipe: Recipe, sink: Sink, *, count: int) -> Iterator[Verified]:
    """Samples evenly spread over the clips, read back from disk; clips that could not be made are passed over."""
    for place in _spread(count, len(clips)):
        try:
            sample = recipe.samples(clips[place])[0]
            if not sink.has(sample):
                continue
            (video_CTHW,) = recipe.read([sample])
        except PROBLEMS:  # was told when it failed
            continue
        yield _compare(sample.key, sink.read(sample), video_CTHW, recipe.autoencoder, recipe.device)


def verify_table(cfg: RunConfig, folder: str | Path, device: torch.device, *, count: int) -> Iterator[Verified]:
    """Entries evenly spread over a store that `table.cache_table` made of a training config.

    Raises:
        FileNotFoundError, ValueError: as `open_store`, or a file that cannot be read any more.
    """
    store = open_store(folder)
    autoencoder = build(cfg.autoencoder, MODELS, where="autoencoder").to(device)
    multiple = autoencoder.spatial_stride * build_on_meta(cfg.model, where="model").patch_size
    dataset = build_dataset(cfg, multiple=multiple)
    shapes = {(shape.height, shape.width, shape.num_frames): shape for shape in dataset.buckets.shapes}
    table = store.table()
    for place in _spread(count, len(store)):
        about = table.slice(place, 1).to_pylist()[0]
        shape: BucketShape = shapes[about["height"], about["width"], about["num_frames"]]
        sample = dataset.read(about["row"], shape, about["epoch"])
        latents_CTHW = store.read(about["key"])["latents"]
        yield _compare(about["key"], latents_CTHW, sample.video_CTHW, autoencoder, device)


def report(found: Iterator[Verified], *, folder: Path | None = None, fps: float = 16.0) -> None:
    """Print every comparison, and their mean.

    Args:
        folder: where videos (png of single frames) of source and decoded side by side are written; None writes none.
        fps: at which they play.
    """
    values = []
    for key, decibel, pair_CTHW in found:
        print(f"verify {key}: PSNR {decibel:.2f} dB")
        values.append(decibel)
        if folder is not None:
            frames_THWC, name = to_frames(pair_CTHW), re.sub(r"[^\w.@+-]+", "_", key)
            if len(frames_THWC) > 1:
                write_video(folder / f"{name}.mp4", frames_THWC, fps)
            else:
                write_image(folder / f"{name}.png", frames_THWC)
    finite = [decibel for decibel in values if math.isfinite(decibel)]
    mean = f"mean PSNR {sum(finite) / len(finite):.2f} dB" if finite else "no difference"
    exact = f", {len(values) - len(finite)} of them exact" if finite and len(finite) < len(values) else ""
    print(f"verify: {len(values)} samples decoded, {mean}{exact}" if values else "verify: nothing could be compared")


def _spread(count: int, total: int) -> list[int]:
    count = min(count, total)
    return [n * total // count for n in range(count)]


@torch.no_grad()
def _compare(
    key: str, latents_CTHW: Tensor, video_CTHW: Tensor, autoencoder: Autoencoder, device: torch.device
) -> Verified:
    decoded_CTHW = autoencoder.decode(latents_CTHW[None].to(device))[0].float().cpu()
    return Verified(key, psnr(decoded_CTHW, video_CTHW), torch.cat([video_CTHW, decoded_CTHW], dim=3))
