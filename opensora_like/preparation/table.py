"""Caches everything that a training config reads and encodes: every row of its table in every bucket it may come to."""

from __future__ import annotations

import copy
import dataclasses
from collections import deque
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from opensora_like import runtime as rt
from opensora_like.conditioning.masks import references_of
from opensora_like.datasets.batch import Batch, BucketShape
from opensora_like.datasets.coverage import rows_of_buckets
from opensora_like.datasets.latent_store import NotFinite, StoreWriter, finish
from opensora_like.datasets.latents import CLIP_OPTIONS, clip_key
from opensora_like.datasets.loader import make_loader
from opensora_like.datasets.plan import MicroBatch
from opensora_like.datasets.video_text import VideoText
from opensora_like.models.base import Autoencoder, TextEncoder
from opensora_like.models.fingerprint import cache_fingerprint, latent_facts
from opensora_like.runtime import Runtime, logger
from opensora_like.settings import RunConfig
from opensora_like.training.batch_size import with_batch_sizes
from opensora_like.training.build import build_frozen
from opensora_like.training.cached import check_no_pixels_needed
from opensora_like.training.data import build_dataset
from opensora_like.training.data_checks import build_outline
from opensora_like.training.held_out_loss import hold_out

LOG_EVERY = 100  # batches of rank 0


class Summary(NamedTuple):
    """Entries of all processes: made now, found in the store, and not made because a file could not be read."""

    written: int
    skipped: int
    failed: int


def cache_table(cfg: RunConfig, folder: Path, *, epochs: int = 1, batch_size: int | None = None) -> Summary:
    """Encode what `cfg` trains on into a store; every process of a torchrun does its part. All ranks call it.

    What the store has already is not made again, so a run that was killed goes on, on any number of processes. Files
    that cannot be read are listed in the store; the next call tries them again.

    Args:
        cfg: of a training run that reads videos. Latents get their deviation where `sample_posterior` is set, and
            latents of given frames as `condition_config` needs them.
        epochs: cache the clips that these first epochs cut out of the files, from epoch 0; see `Latents`.
        batch_size: clips that are encoded at once. None encodes the micro-batches of the plans of these epochs, so that
            latents are those of training bit for bit even where they depend on the clips beside them, and then what
            those plans leave over.

    Raises:
        ValueError: a config that reads no videos of a table, whose conditions cannot be cached, or a store that was
            made with another one.
        FileNotFoundError: a table or weights that are not there.
    """
    if epochs < 1 or (batch_size is not None and batch_size < 1):
        raise ValueError(f"epochs={epochs} and batch_size={batch_size} must be 1 or more")
    check_no_pixels_needed(cfg)
    runtime = rt.start(timeout_minutes=cfg.timeout_minutes)
    cfg = with_batch_sizes(_without_parallel_encoders(cfg), runtime.world_size)
    outline = build_outline(cfg, None)
    dataset = build_dataset(cfg, multiple=outline.autoencoder.spatial_stride * outline.model.patch_size)
    if not isinstance(dataset, VideoText):
        raise ValueError(
            f"dataset.type={cfg.dataset['type']!r} has no clips to encode; give the config that trains from videos, "
            "with dataset.type='video_text'"
        )
    autoencoder, encoders = build_frozen(cfg, runtime.device)
    encode = _Encoding(cfg, autoencoder, encoders, runtime.device)
    fingerprint = _fingerprint(cfg, dataset, autoencoder, encode)
    work = _Work(cfg, dataset, runtime, epochs=epochs, batch_size=batch_size)
    # at the end one rank may wait longer for another's slow clips than what is a fault in training
    patient = rt.patient_group() if runtime.world_size > 1 else None
    with StoreWriter(folder, fingerprint=fingerprint, rank=runtime.rank, world_size=runtime.world_size) as writer:
        if runtime.is_main:
            writer.add_null({name: encoder.encode([""])[0] for name, encoder in encoders.items()})
        counts = _run(cfg, dataset, writer, work, encode)
    counts = torch.tensor(counts)
    if patient is not None:
        dist.all_reduce(counts, group=patient)  # also: every writer is closed
    if runtime.is_main:
        about = finish(folder)
        logger.info("store %s entries %d failures %d", folder, about["num_rows"], about["num_failures"])
    if patient is not None:
        dist.barrier(group=patient)
    return Summary(*counts.tolist())


class _Encoding:
    """Batches to tensors of entries, as `conditioning.encode` would make them."""

    def __init__(
        self, cfg: RunConfig, autoencoder: Autoencoder, encoders: Mapping[str, TextEncoder], device: torch.device
    ) -> None:
        self._autoencoder, self._encoders, self._device = autoencoder, encoders, device
        self.with_std = cfg.sample_posterior and autoencoder.has_deviation
        self.references = references_of(cfg.condition_config, is_causal=autoencoder.is_causal)

    @torch.no_grad()
    def __call__(self, batch: Batch) -> list[dict[str, Tensor]]:
        """One dict per sample, by the names of `StoreWriter.add`."""
        video = batch.video_BCTHW.to(self._device, non_blocking=True)
        mean, std = self._autoencoder.posterior(video)
        whole = {"latents": mean}
        if self.with_std:
            whole["latents_std"] = std
        for name, frames in self.references.items():
            if mean.shape[2] > 1 and video.shape[2] >= abs(frames.stop or frames.start):  # else no task is given them
                whole[f"references.{name}"] = self._autoencoder.encode(video[:, :, frames])
        for name, encoder in self._encoders.items():
            whole[f"embeddings.{name}"] = encoder.encode(batch.text)
        return [{name: tensor[place] for name, tensor in whole.items()} for place in range(len(batch))]


class _Work:
    """Which batches are to be read, the same list on every rank, of which each takes its part."""

    def __init__(
        self, cfg: RunConfig, dataset: VideoText, runtime: Runtime, *, epochs: int, batch_size: int | None
    ) -> None:
        self._dataset, self._runtime, self._trained = dataset, runtime, copy.copy(dataset)
        self._epochs, self._batch_size = epochs, batch_size
        self._reachable = rows_of_buckets(dataset.table, dataset.buckets, fps_max=dataset.fps_max)
        hold_out(cfg, self._trained)  # so that the plans are those of training; what is held out is cached as well

    def batches(self) -> Iterator[MicroBatch]:
        """This rank's part."""
        for number, batch in enumerate(self._all()):
            if number % self._runtime.world_size == self._runtime.rank:
                yield batch

    def keys(self, batch: MicroBatch) -> dict[int, str]:
        """Row -> key, without rows whose clip an earlier epoch has made."""
        found = {}
        for row in batch.rows.tolist():
            key = self._key(row, batch.shape, batch.epoch)
            if all(self._key(row, batch.shape, earlier) != key for earlier in range(batch.epoch)):
                found[row] = key
        return found

    def _key(self, row: int, shape: BucketShape, epoch: int) -> str:
        return clip_key(row, shape, self._dataset.choose_clip(row, shape.num_frames, epoch))

    def _all(self) -> Iterator[MicroBatch]:
        for epoch in range(self._epochs):
            planned: dict[BucketShape, list[np.ndarray]] = {}
            if self._batch_size is None:
                plan = self._trained.plan(epoch)
                for number in range(len(plan)):
                    batch = plan[number]
                    planned.setdefault(batch.shape, []).append(batch.rows)
                    yield batch
            yield from self._left_over(epoch, planned)

    def _left_over(self, epoch: int, planned: Mapping[BucketShape, list[np.ndarray]]) -> Iterator[MicroBatch]:
        """Rows in the buckets that they may come to and do not come to in this epoch's plan."""
        for bucket, rows in self._reachable.items():
            shape = self._dataset.buckets.shapes[bucket]
            if shape in planned:
                rows = np.setdiff1d(rows, np.concatenate(planned[shape]))
            size = self._batch_size or int(self._dataset.buckets.batch_sizes[bucket])
            for start in range(0, len(rows), size):
                part = rows[start : start + size]
                yield MicroBatch(epoch, -1, shape, part, spares=part[:0])


def _run(cfg: RunConfig, dataset: VideoText, writer: StoreWriter, work: _Work, encode: _Encoding) -> list[int]:
    """Read, encode and write this rank's part. Returns: written, skipped, failed."""
    skipped = 0
    waiting: deque[dict[int, str]] = deque()

    def missing() -> Iterator[MicroBatch]:
        nonlocal skipped
        for batch in work.batches():
            keys = work.keys(batch)
            lacking = {row: key for row, key in keys.items() if not writer.has(key)}
            skipped += len(keys) - len(lacking)
            if lacking:
                waiting.append(lacking)
                yield batch

    written = failed = 0
    loader = make_loader(
        dataset, missing(), num_workers=cfg.num_workers, prefetch_factor=cfg.prefetch_factor, shrink=True
    )
    for number, batch in enumerate(loader, start=1):
        lacking = waiting.popleft()
        for row, path, reason in batch.bad:
            if row in lacking:
                writer.fail(lacking[row], f"{path}: {reason}")
                failed += 1
        for place, tensors in enumerate(encode(batch) if batch.rows else ()):
            key = lacking.get(batch.rows[place])  # none for a spare, which is written where its own turn is
            if key is None or writer.has(key):
                continue
            try:
                writer.add(key, tensors, _facts(dataset, batch, place))
                written += 1
            except NotFinite as problem:
                writer.fail(key, str(problem))
                failed += 1
        if number % LOG_EVERY == 0:
            logger.info("cached %d entries of this rank, failed %d", written, failed)
    return [written, skipped, failed]


def _facts(dataset: VideoText, batch: Batch, place: int) -> dict[str, Any]:
    row, shape = batch.rows[place], batch.shape
    clip = dataset.choose_clip(row, shape.num_frames, batch.epoch)
    sizes = {"num_frames": shape.num_frames, "height": shape.height, "width": shape.width}
    about = {"row": row, "epoch": batch.epoch, "first_frame_index": clip.indices[0]}
    return {"path": clip.path, "text": batch.text[place], **sizes, "fps": clip.fps, **about}


def _fingerprint(cfg: RunConfig, dataset: VideoText, autoencoder: Autoencoder, encode: _Encoding) -> dict[str, Any]:
    """What the store depends on, as rank 0 finds it."""
    box: list[dict[str, Any] | None] = [None]
    if dist.get_rank() == 0:
        facts = latent_facts(autoencoder) | {"with_std": encode.with_std}
        box = [cache_fingerprint(cfg.autoencoder, cfg.encoders, facts=facts)]
    if dist.get_world_size() > 1:
        dist.broadcast_object_list(box, src=0)
    table = dataset.table.fingerprint
    options = {name: getattr(dataset, name) for name in CLIP_OPTIONS}
    made = {"type": cfg.dataset["type"], "table": table, "seed": cfg.seed, **options}
    return box[0] | {"dataset": made, "references": list(encode.references)}


def _without_parallel_encoders(cfg: RunConfig) -> RunConfig:
    """Encoders whole on every rank: there is no booster that would cut them."""
    encoders = {name: {k: v for k, v in part.items() if k != "tp"} for name, part in cfg.encoders.items()}
    return dataclasses.replace(cfg, encoders=encoders, global_batch_size=None)
