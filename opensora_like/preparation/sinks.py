"""Where prepared samples go: a store of latents, or a folder of `.meta` files; both go on where they were."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from opensora_like.datasets import store_files
from opensora_like.datasets.latent_store import StoreWriter, check_fingerprint, open_store
from opensora_like.datasets.meta_file import MetaClip, MetaFacts, read_meta, write_meta
from opensora_like.datasets.video_io import VideoInfo
from opensora_like.preparation.captions import Clip
from opensora_like.preparation.frames import Pick
from opensora_like.publish import is_draft, staged, take_lock
from opensora_like.runtime import Runtime, broadcast_text

SETTINGS, NULL, LOCK = "prepare.json", "null.safetensors", ".lock"
TEXT = "text"  # the name of the condition that the caption's embedding is


@dataclass(frozen=True)
class Sample:
    """One sample of a clip, before it is encoded.

    Args:
        is_split: the clip may have other samples, so that this one is numbered.
        info: of the whole file.
        file_bytes: its size, by which a file that was replaced is known.
    """

    clip: Clip
    pick: Pick
    is_split: bool
    info: VideoInfo
    file_bytes: int

    @property
    def key(self) -> str:
        """Its name in a store."""
        return f"{self.clip.key}@{self.pick.number[0]}" if self.is_split else self.clip.key

    @property
    def file_name(self) -> str:
        """Its name in a folder of `.meta` files. Source: NVIDIA-NeMo/DFM, <stem>.meta and <stem>_<k>.meta."""
        number = self.pick.number[0]
        mark = "" if not self.is_split else f"_{number}" if self.pick.num_chosen == 1 else f"_w{number}"
        return f"{self.clip.stem}{mark}.meta"

    @property
    def digest(self) -> str:
        """Of what the encoders are given, beside the settings of the run."""
        facts = [self.clip.text, self.pick.indices, self.file_bytes]
        return hashlib.blake2b(json.dumps(facts).encode(), digest_size=8).hexdigest()


@dataclass(frozen=True, eq=False)
class Encoded:
    """What a sample became.

    Args:
        latents_CTHW: mean of the posterior, or drawn from it.
        std_CTHW: its standard deviation, where latents are to be drawn anew whenever they are read.
        size: (height, width) in pixels.
        first_frame: a JPEG, or None for a frame that is a sample of its own.
    """

    latents_CTHW: Tensor
    embeddings_LD: Tensor
    size: tuple[int, int]
    std_CTHW: Tensor | None = None
    first_frame: bytes | None = None


class Sink(Protocol):
    """Takes samples; every process has its own, on the same folder."""

    def has(self, sample: Sample) -> bool:
        """Whether it was made before. Raises ValueError if it was made of something else and cannot be replaced."""

    def add(self, sample: Sample, encoded: Encoded) -> None: ...

    def add_null(self, embeddings_LD: Tensor) -> None:
        """Keep the embedding of the empty caption."""

    def fail(self, key: str, reason: str) -> None: ...

    def read(self, sample: Sample) -> Tensor:
        """The latents of a sample that was made, [C, T, H, W]; after all sinks are closed and the folder finished."""

    def close(self) -> None: ...


class StoreSink:
    """A store of latents (`datasets.latent_store`).

    Args:
        fingerprint: what the tensors depend on beside the clip; see `models.fingerprint`.
        shard_bytes: what a kill loses at most.

    Raises:
        ValueError: the store was made with other settings.
    """

    def __init__(
        self, folder: Path, *, fingerprint: Mapping[str, Any], rank: int, world_size: int, shard_bytes: int = 2**28
    ) -> None:
        self.folder = folder
        given = {"rank": rank, "world_size": world_size, "shard_bytes": shard_bytes}
        self._writer = StoreWriter(folder, fingerprint=fingerprint, **given)
        self._digests: dict[str, str] = {}
        for index in store_files.read_indexes(folder):
            if "digest" in index.column_names:
                self._digests |= dict(zip(index["key"].to_pylist(), index["digest"].to_pylist(), strict=True))

    def has(self, sample: Sample) -> bool:
        if not self._writer.has(sample.key):
            return False
        if self._digests.get(sample.key, sample.digest) != sample.digest:
            raise ValueError(
                f"{sample.key!r} is in store {str(self.folder)!r} with another caption, other frames or from another "
                "file, and entries of a store are not replaced; cache into another folder"
            )
        return True

    def add(self, sample: Sample, encoded: Encoded) -> None:
        tensors = {"latents": encoded.latents_CTHW, f"embeddings.{TEXT}": encoded.embeddings_LD}
        if encoded.std_CTHW is not None:
            tensors["latents_std"] = encoded.std_CTHW
        if encoded.first_frame is not None:
            tensors["first_frame"] = torch.from_numpy(np.frombuffer(encoded.first_frame, np.uint8).copy())
        facts = {
            "path": sample.clip.file,
            "text": sample.clip.text or "",
            "num_frames": len(sample.pick.indices),
            "height": encoded.size[0],
            "width": encoded.size[1],
            "fps": sample.pick.fps,
            "first_index": sample.pick.indices[0],
            "digest": sample.digest,
        }
        self._writer.add(sample.key, tensors, facts)

    def add_null(self, embeddings_LD: Tensor) -> None:
        self._writer.add_null({TEXT: embeddings_LD})

    def fail(self, key: str, reason: str) -> None:
        self._writer.fail(key, reason)

    def read(self, sample: Sample) -> Tensor:
        return open_store(self.folder).read(sample.key)["latents"]

    def close(self) -> None:
        self._writer.close()


class MetaSink:
    """A folder of `.meta` files, one per sample, which other trainers read as well.

    Beside them are ``prepare.json`` (the settings), ``prepared.rank*.jsonl`` (what was made of what, so that a changed
    caption or video is made again), ``failures.rank*.jsonl`` and ``null.safetensors``.

    Args:
        fingerprint: what the tensors depend on beside the clip.
        facts: of every sample: mode, is_deterministic, is_tiled, resize of `MetaFacts`.

    Raises:
        ValueError: the folder was made with other settings, or has `.meta` files that were not made here.
    """

    def __init__(
        self, folder: Path, *, fingerprint: Mapping[str, Any], facts: Mapping[str, Any], rank: int, video_folder: Path
    ) -> None:
        self.folder, self._facts, self._video_folder = folder, facts, video_folder
        folder.mkdir(parents=True, exist_ok=True)
        plain = json.loads(json.dumps(fingerprint, sort_keys=True))
        settings = folder / SETTINGS
        strange = any(not is_draft(file) for file in folder.glob("*.meta"))  # before: another rank begins with settings
        if settings.is_file():
            check_fingerprint(folder, json.loads(settings.read_text()), plain)
        elif strange:
            raise ValueError(f"{str(folder)!r} has .meta files of another program; write into another folder")
        else:
            with staged(settings, shared=True) as draft:
                draft.write_text(json.dumps(plain, indent=1))
        lines = [line for journal in folder.glob("prepared.rank*.jsonl") for line in store_files.read_lines(journal)]
        lines.sort(key=lambda line: line["time_ns"])  # a sample may have been made again, by another rank
        self._made = {line["name"]: line["digest"] for line in lines}
        self._journal = (folder / f"prepared.rank{rank:05d}.jsonl").open("a", encoding="utf-8")
        self._failures = folder / f"failures.rank{rank:05d}.jsonl"
        self._fingerprint = plain

    def has(self, sample: Sample) -> bool:
        made = self._made.get(sample.file_name) == sample.digest
        return made and (self.folder / sample.file_name).is_file()

    def add(self, sample: Sample, encoded: Encoded) -> None:
        clip, pick, path = sample.clip, sample.pick, self.folder / sample.file_name
        metadata = {
            "file_name": clip.file,
            "width": sample.info.width,
            "height": sample.info.height,
            "start_frame": clip.start_frame,
            "end_frame": sample.info.num_frames - 1 if clip.end_frame is None else clip.end_frame,
        }
        content = MetaClip(
            encoded.latents_CTHW,
            encoded.embeddings_LD,
            clip.text or "",
            len(pick.indices),
            encoded.first_frame,
            Path(clip.file).name,
            pick.fps,
        )
        numbered = pick.number if sample.is_split else None
        source = str(self._video_folder / clip.file)
        write_meta(path, content, MetaFacts(metadata, source, pick.num_chosen, frame=numbered, **self._facts))
        self._made[path.name] = sample.digest
        line = {"name": path.name, "digest": sample.digest, "time_ns": time.time_ns()}
        self._journal.write(json.dumps(line) + "\n")
        self._journal.flush()

    def add_null(self, embeddings_LD: Tensor) -> None:
        if not (self.folder / NULL).exists():
            null = {TEXT: embeddings_LD.cpu()}
            store_files.save_tensors(null, self.folder / NULL, fingerprint=self._fingerprint, shared=True)

    def fail(self, key: str, reason: str) -> None:
        with self._failures.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"key": key, "reason": reason}, ensure_ascii=False) + "\n")

    def read(self, sample: Sample) -> Tensor:
        return read_meta(self.folder / sample.file_name).latents_CTHW

    def close(self) -> None:
        self._journal.close()


def hold_folder(folder: Path, runtime: Runtime | None = None) -> AbstractContextManager:
    """Let no other command fill `folder` meanwhile: the first to finish would remove what the other is writing.

    Args:
        runtime: where several processes fill it together; all call this.

    Returns: what lets go of it at its end.

    Raises:
        ValueError: on all processes: another command is filling it, or it cannot be written.
    """
    lock, problem = nullcontext(), ""
    if runtime is None or runtime.is_main:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock = take_lock(folder / LOCK)
        except BlockingIOError:
            problem = f"another command is filling {str(folder)!r}; wait for its end, or name another folder"
        except OSError as error:  # the others are waiting to hear of it
            problem = f"{str(folder)!r} cannot be written: {error}; make room, or name another folder"
    if problem := problem if runtime is None else broadcast_text(problem):
        raise ValueError(problem)
    return lock


def forget_failures(folder: Path) -> None:
    """Remove the lists of failures of earlier runs, since all that failed is tried again; for one process to call."""
    for file in folder.glob("failures.rank*.jsonl"):
        file.unlink()
