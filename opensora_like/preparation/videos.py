"""Encode the clips of a folder of videos, each process its share: latents, the caption's embedding, the first frame."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from opensora_like import rng
from opensora_like.datasets.meta_file import jpeg_of
from opensora_like.datasets.resize import to_frames
from opensora_like.datasets.video_io import BadSample, probe
from opensora_like.models.autoencoders.posterior import draw_latents
from opensora_like.models.base import Autoencoder, TextEncoder
from opensora_like.preparation.captions import Clip
from opensora_like.preparation.frames import FrameChoice, Pick, Picture, read_clip
from opensora_like.preparation.sinks import Encoded, Sample, Sink

logger = logging.getLogger("opensora_like")

# what a single file can be to blame for; anything else ends the run
PROBLEMS = (BadSample, ValueError, FloatingPointError, MemoryError, torch.OutOfMemoryError)
_LOG_SECONDS = 30.0


class Counts(NamedTuple):
    """Samples that were made now, that were there already, and clips that could not be made."""

    made: int = 0
    kept: int = 0
    failed: int = 0


@dataclass(frozen=True, eq=False)
class Recipe:
    """How a clip becomes a sample.

    Args:
        posterior: keep its mean; or a sample, drawn by the sample's name; or mean and standard deviation, to be drawn
            from whenever they are read.
        latents_dtype: in which latents are kept; they are computed in the autoencoder's.
    """

    folder: Path
    frames: FrameChoice
    picture: Picture
    autoencoder: Autoencoder
    text_encoder: TextEncoder
    device: torch.device
    posterior: Literal["mean", "sample", "std"] = "mean"
    seed: int = 0
    latents_dtype: torch.dtype = torch.float16

    def samples(self, clip: Clip) -> list[Sample]:
        """What a clip gives.

        Raises:
            BadSample: it cannot be read, or its list makes no sense.
        """
        path = self.folder / clip.file
        if clip.problem:
            raise BadSample(path, clip.problem)
        info = probe(path)
        picks = self.frames.picks(path, info, clip.start_frame, clip.end_frame)
        num_bytes = path.stat().st_size
        return [Sample(clip, pick, self.frames.is_split, info, num_bytes) for pick in picks]

    def read(self, samples: Sequence[Sample]) -> list[Tensor]:
        """Pixels of samples of one clip, decoded in one go."""
        joined = Pick(tuple(i for sample in samples for i in sample.pick.indices), 0, (1, 1), 0.0)
        video_CTHW = read_clip(self.folder / samples[0].clip.file, joined, self.picture)
        return list(video_CTHW.split([len(sample.pick.indices) for sample in samples], dim=1))

    @torch.no_grad()
    def encode(self, sample: Sample, video_CTHW: Tensor) -> Encoded:
        """Raises FloatingPointError where the latents are not finite in the dtype in which they are kept."""
        mean, std = self.autoencoder.posterior(video_CTHW[None].to(self.device))
        draw = rng.generator(self.seed, f"cached posterior {sample.key}") if self.posterior == "sample" else None
        latents_CTHW = self._kept(draw_latents(mean, std, draw)[0])
        std_CTHW = self._kept(std[0]) if self.posterior == "std" and std is not None else None
        embeddings_LD = self.text_encoder.encode([sample.clip.text or ""])[0]
        first_frame = jpeg_of(to_frames(video_CTHW[:, :1])[0]) if self.frames.mode == "video" else None
        return Encoded(latents_CTHW, embeddings_LD.cpu(), tuple(video_CTHW.shape[2:]), std_CTHW, first_frame)

    def _kept(self, z: Tensor) -> Tensor:
        kept = z.to(self.latents_dtype).cpu()
        if not bool(torch.isfinite(kept).all()):
            raise FloatingPointError(f"latents as large as {z.abs().max().item()} are not finite in {kept.dtype}")
        return kept


def prepare_clips(clips: Sequence[Clip], recipe: Recipe, sink: Sink, *, read_ahead: int = 2) -> Counts:
    """Make what is not there yet; a clip that cannot be made is written down with the reason, and the rest goes on.

    Args:
        clips: the share of this process.
        read_ahead: threads that decode the next clips meanwhile, each with one in memory; 0 decodes in between.
    """
    sink.add_null(recipe.text_encoder.encode([""])[0])
    tally = _Tally(len(clips), sink)
    with ThreadPoolExecutor(max(1, read_ahead)) as pool:
        waiting: deque[tuple[list[Sample], Future | None]] = deque()
        for samples in _to_do(clips, recipe, sink, tally):
            waiting.append((samples, pool.submit(recipe.read, samples) if read_ahead else None))
            while len(waiting) > read_ahead:
                _make(*waiting.popleft(), recipe, sink, tally)
        while waiting:
            _make(*waiting.popleft(), recipe, sink, tally)
    return tally.counts


class _Tally:
    """Counts, and tells from time to time."""

    def __init__(self, num_clips: int, sink: Sink) -> None:
        self._num_clips, self._sink = num_clips, sink
        self._started = self._told = time.monotonic()
        self._failed: set[Clip] = set()
        self._made = self._kept = self._seen = 0

    def seen(self) -> None:
        self._seen += 1
        if (now := time.monotonic()) - self._told > _LOG_SECONDS:
            self._told, rate = now, self._seen / (now - self._started)
            logger.info("clips %d of %d, %.2f per second, %s", self._seen, self._num_clips, rate, self.counts)

    def made(self) -> None:
        self._made += 1

    def kept(self) -> None:
        self._kept += 1

    def failed(self, clip: Clip, problem: Exception) -> None:
        reason = problem.reason if isinstance(problem, BadSample) else f"{type(problem).__name__}: {problem}"
        if clip not in self._failed:
            self._failed.add(clip)
            self._sink.fail(clip.key, reason)
            logger.warning("%s: %s", clip.key, reason)

    @property
    def counts(self) -> Counts:
        return Counts(self._made, self._kept, len(self._failed))


def _to_do(clips: Sequence[Clip], recipe: Recipe, sink: Sink, tally: _Tally) -> Iterator[list[Sample]]:
    """Samples that are still to be made, those together that are decoded in one go."""
    for clip in clips:
        tally.seen()
        try:
            samples = recipe.samples(clip)
            missing = [sample for sample in samples if not sink.has(sample)]
        except PROBLEMS as problem:
            tally.failed(clip, problem)
            continue
        for _ in range(len(samples) - len(missing)):
            tally.kept()
        if recipe.frames.mode == "frames" and missing:
            yield missing
        else:
            yield from ([sample] for sample in missing)


def _make(samples: list[Sample], future: Future | None, recipe: Recipe, sink: Sink, tally: _Tally) -> None:
    try:
        videos = recipe.read(samples) if future is None else future.result()
        for sample, video_CTHW in zip(samples, videos, strict=True):
            sink.add(sample, recipe.encode(sample, video_CTHW))
            tally.made()
    except PROBLEMS as problem:
        tally.failed(samples[0].clip, problem)
        if isinstance(problem, torch.OutOfMemoryError):
            torch.cuda.empty_cache()  # or the next, shorter clip may meet the pieces of this one
