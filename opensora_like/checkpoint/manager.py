"""Saves and loads the whole state of a run, for every booster alike."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from opensora_like.boosters.base import Booster, ShardRange, ShardStrips
from opensora_like.checkpoint import layout
from opensora_like.checkpoint.files import WrittenFile, file_crc32, write_text
from opensora_like.checkpoint.pieces import Piece, PieceReader, pieces_of, write_pieces
from opensora_like.datasets.plan import what_changed
from opensora_like.runtime import logger

FORMAT_VERSION = 1
CONFIG_FILE = "config.py"
CHECKSUMS_FILE = "checksums.json"


@dataclass
class TrainState:
    """How far a run has come; with the tensors, all that a resume needs.

    Args:
        step: updates done.
        epoch, micro_batch: the next micro-batch to train on, of the global plan.
        samples: seen in all.
    """

    step: int = 0
    epoch: int = 0
    micro_batch: int = 0
    samples: int = 0


class CheckpointManager:
    """Writes checkpoints of one run into its folder and reads them back.

    With `async_io` a save waits only for the copy out of the device; a thread writes, syncs and publishes. One save
    is in flight at most; its copy takes as much host memory as this rank's part of the checkpoint, allocated once.

    Args:
        run: the run's folder; checkpoints are ``epoch{E}-global_step{S}`` in it.
        config_text: the resolved config, kept beside the tensors.
        keep_n_latest: complete checkpoints kept; -1 keeps all.
        order: what the order of the data depends on, `datasets.plan.order_key`.
        about: further facts for the state file (world size, booster...).
        on_save_error: "stop" raises at the next step, "continue" logs and trains on.
        hook: told the name of each stage of a save as it is reached; for tests of crashes.
    """

    def __init__(
        self,
        run: Path,
        booster: Booster,
        *,
        ema: Mapping[str, Tensor] | None,
        config_text: str,
        keep_n_latest: int,
        order: Mapping[str, Any],
        about: Mapping[str, Any],
        async_io: bool = False,
        on_save_error: str = "stop",
        hook: Callable[[str], None] = lambda stage: None,
    ) -> None:
        self.run, self.booster, self.ema = run, booster, ema
        self._config_text, self._keep, self._about = config_text, keep_n_latest, dict(about)
        self.order = dict(order)
        if keep_n_latest == 0 or keep_n_latest < -1:
            raise ValueError(f"keep_n_latest={keep_n_latest} would keep no checkpoint; use 1 or more, or -1 for all")
        self._stop_on_error, self._hook = on_save_error == "stop", hook
        self._thread = ThreadPoolExecutor(1, "checkpoint") if async_io else None
        self._pending: Future[str] | None = None
        self._staged: dict[tuple[str, str], Tensor] = {}
        # a group of its own: the writer thread talks while the training does
        self._group = dist.new_group(backend="gloo") if dist.get_world_size() > 1 else None

    def save(self, state: TrainState) -> Path:
        """Save on all ranks together: wait for it, or with `async_io` for the copy only.

        Returns: where it will be.

        Raises:
            OSError: this save, or the one before it, could not be written, and errors stop the run.
        """
        self.wait()
        self._hook("begin")
        name = layout.checkpoint_name(state.epoch, state.step)
        pieces = self._pieces()
        if self._thread is not None:
            pieces = self._stage(pieces)
            self._hook("copied")
            self._pending = self._thread.submit(self._write, dataclasses.replace(state), name, pieces)
        else:
            self._report(self._write(state, name, pieces))
        return self.run / name

    def check(self) -> None:
        """Hear of a save that has ended in the background; call it once per step.

        Raises:
            OSError: it failed, and errors stop the run.
        """
        if self._pending is not None and self._pending.done():
            self.wait()

    def wait(self) -> None:
        """Wait for the save in flight, if there is one. Raises as `check`."""
        if self._pending is not None:
            pending, self._pending = self._pending, None
            self._report(pending.result())

    def _report(self, problem: str) -> None:
        if not problem:
            return
        if self._stop_on_error:
            raise OSError(f"{problem}; the last complete checkpoint is untouched. free space or mend the disk")
        logger.error("%s; training goes on (on_save_error='continue')", problem)

    def _pieces(self) -> list[Piece]:
        ranges = self.booster.ranges()
        pieces = pieces_of("master", dict(self.booster.master_shards()), ranges)
        for kind, tensors in self.booster.optimizer_shards().items():
            pieces += pieces_of(kind, tensors, ranges)
        if self.ema is not None:
            pieces += pieces_of("ema", self.ema, ranges)
        return pieces

    def _stage(self, pieces: list[Piece]) -> list[Piece]:
        """Copy the tensors into host buffers that are kept for the next save; pinned where there is a GPU."""
        copied = []
        for piece in pieces:
            key, tensor = (piece.kind, piece.name), piece.tensor.detach()
            buffer = self._staged.get(key)
            if buffer is None or buffer.shape != tensor.shape:
                buffer = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
                self._staged[key] = buffer
            copied.append(piece._replace(tensor=buffer.copy_(tensor, non_blocking=True)))
        if torch.cuda.is_available():
            torch.cuda.current_stream().synchronize()
        return copied

    def _write(self, state: TrainState, name: str, pieces: list[Piece]) -> str:
        """Write, agree, publish. Returns: what went wrong on any rank, "" if nothing; the same on all."""
        began = time.perf_counter()
        staging = layout.staging_folder(self.run, name)
        written: dict[str, WrittenFile] = {}
        problem = ""
        try:
            staging.mkdir(parents=True, exist_ok=True)
            written = write_pieces(staging, dist.get_rank(), pieces, on_file=lambda file: self._hook(f"file {file}"))
        except OSError as error:
            problem = f"rank {dist.get_rank()} could not save {name}: {error}"
        self._hook("written")
        everything = self._gather((written, problem))
        problems = [p for _, p in everything if p]
        if not problems and dist.get_rank() == 0:
            files = {file: facts for files, _ in everything for file, facts in files.items()}
            try:
                self._publish(staging, name, state, files)
            except OSError as error:
                problems = [f"rank 0 could not publish {name}: {error}"]
        problem = self._gather("; ".join(problems))[0]
        if dist.get_rank() == 0:
            if problem:
                shutil.rmtree(staging, ignore_errors=True)  # what is left of it is taken away at the next start
            else:
                logger.info("saved %s in %.2f seconds", self.run / name, time.perf_counter() - began)
        return problem

    def _gather(self, value: Any) -> list[Any]:
        """`value` of every rank, on every rank; from the writer's own group."""
        if self._group is None:
            return [value]
        found = [None] * dist.get_world_size()
        dist.all_gather_object(found, value, group=self._group)
        return found

    def _publish(self, staging: Path, name: str, state: TrainState, files: Mapping[str, WrittenFile]) -> None:
        """Rank 0, when every rank's files are on disk."""
        files = {**files, CONFIG_FILE: write_text(staging / CONFIG_FILE, self._config_text)}
        sums = {file: facts._asdict() for file, facts in sorted(files.items())}
        write_text(staging / CHECKSUMS_FILE, json.dumps(sums, indent=1))
        self._hook("checksums")
        facts = {
            "format_version": FORMAT_VERSION,
            **dataclasses.asdict(state),
            "data_order": self.order,
            **self._about,
            "versions": _versions(),
        }
        write_text(staging / layout.STATE_FILE, json.dumps(facts, indent=1))
        layout.sync_folder(staging)
        self._hook("state")
        layout.publish(self.run, name)
        self._hook("published")
        layout.remove_old(self.run, self._keep)
        self._hook("removed")

    def load(self, folder: Path) -> TrainState:
        """Read weights, optimizer and EMA of this rank's ranges, whatever number of ranks wrote them.

        Returns: the state that the checkpoint was saved with.

        Raises:
            OSError: files missing or cut short.
            ValueError: the checkpoint belongs to another model, optimizer or format.
        """
        facts = read_state(folder)
        self.check_files(folder)
        reader = PieceReader(folder)
        ranges = self.booster.ranges()
        self._check_names(reader, folder)
        with torch.no_grad():
            for name, shard in self.booster.master_shards():
                _read_into(shard, reader, "master", name, ranges[name])
            for kind, tensors in self.booster.optimizer_shards().items():
                for name, shard in tensors.items():
                    _read_into(shard, reader, kind, name, ranges[name])
            if self.ema is not None:
                kind = "ema" if "ema" in reader.kinds() else "master"
                for name, shard in self.ema.items():
                    _read_into(shard, reader, kind, name, ranges[name])
        self.booster.refresh()
        return TrainState(**{f.name: facts[f.name] for f in dataclasses.fields(TrainState)})

    def check_files(self, folder: Path) -> None:
        """Compare size and checksum of every file with what was written; the ranks share the reading.

        Raises:
            OSError: on every rank, naming each file that is gone, cut short or changed.
        """
        sums = json.loads((folder / CHECKSUMS_FILE).read_text())
        rank, world_size = dist.get_rank(), dist.get_world_size()
        mine = [check_file(folder / file, **sums[file]) for file in sorted(sums)[rank::world_size]]
        problems = [p for found in self._gather([p for p in mine if p]) for p in found]
        if problems:
            raise OSError(f"{'; '.join(problems)}; take an earlier checkpoint, or a copy of this one")

    def newest_intact(self) -> Path:
        """The newest complete checkpoint of the run whose files are as they were written; damaged ones are reported.

        Raises:
            FileNotFoundError: there is none.
        """
        found = layout.complete_checkpoints(self.run)
        for folder in reversed(found):
            try:
                self.check_files(folder)
            except OSError as problem:
                logger.warning("load='latest' passes over %s: %s", folder.name, problem)
            else:
                return folder
        raise FileNotFoundError(
            f"load='latest': {str(self.run)!r} has {len(found)} complete checkpoints and none is intact; "
            "start without --load in another --exp-name"
        )

    def _check_names(self, reader: PieceReader, folder: Path) -> None:
        ranges = self.booster.ranges()
        saved = {name: reader.shape("master", name) for name in reader.names("master")}
        missing = sorted(set(ranges) - set(saved))
        unexpected = sorted(set(saved) - set(ranges))
        differ = [
            f"{n}: {saved[n]} saved, {tuple(r.shape)} here"
            for n, r in ranges.items()
            if n in saved and saved[n] != tuple(r.shape)
        ]
        if missing or unexpected or differ:
            raise ValueError(
                f"load={str(folder)!r} is of another model: {len(missing)} tensors missing {missing[:3]}, "
                f"{len(unexpected)} unexpected {unexpected[:3]}, {len(differ)} of another shape {differ[:3]}; "
                f"use the config saved in {str(folder / CONFIG_FILE)!r}"
            )
        kinds = set(self.booster.optimizer_shards()) - set(reader.kinds())
        if kinds:
            raise ValueError(
                f"load={str(folder)!r} has no optimizer state {sorted(kinds)}: another optim.type was saved"
            )


def _read_into(shard: Tensor, reader: PieceReader, kind: str, name: str, place: ShardRange | ShardStrips) -> None:
    if shard.ndim == 0:
        shard.copy_(reader.read(kind, name)[0])
    elif shard.numel():
        shard.copy_(reader.read_place(kind, name, place))


def read_state(folder: Path) -> dict[str, Any]:
    """The facts of a checkpoint, from its state file.

    Raises:
        ValueError: written by a newer format.
    """
    facts = json.loads((folder / layout.STATE_FILE).read_text())
    if facts["format_version"] > FORMAT_VERSION:
        raise ValueError(
            f"{str(folder)!r} has format {facts['format_version']}, this program reads {FORMAT_VERSION}; update it"
        )
    return facts


def check_file(path: Path, *, size: int, crc32: int) -> str:
    """What is wrong with a file of a checkpoint, "" if nothing."""
    if not path.is_file():
        return f"{str(path)!r} is missing"
    if path.stat().st_size != size:
        return f"{str(path)!r} has {path.stat().st_size} bytes, {size} were written"
    found = file_crc32(path)
    return "" if found == crc32 else f"{str(path)!r} has checksum {found:08x}, {crc32:08x} was written: it has changed"


def check_order(facts: Mapping[str, Any], order: Mapping[str, Any], folder: Path) -> None:
    """Refuse to resume over other data than the checkpoint's.

    Args:
        order: `datasets.plan.order_key` of the data at hand.

    Raises:
        ValueError: what changed, with both values.
    """
    if changes := what_changed(facts["data_order"], order):
        raise ValueError(
            f"load={str(folder)!r}: the data changed since it was saved ({'; '.join(changes)}), so its position in "
            "the epoch means nothing; restore them, or keep weights and optimizer and restart the data with "
            "--start-epoch 0 --start-step 0"
        )


def _versions() -> dict[str, str]:
    found = {}
    for name in ("opensora_like", "torch", "colossalai", "deepspeed", "transformers", "diffusers", "mmengine-lite"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    found["git"] = _git_commit()
    return found


def _git_commit() -> str:
    """Commit of this package's checkout, "" where it is not one or there is no git."""
    if shutil.which("git") is None:
        return ""
    asked = subprocess.run(
        ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "GIT_OPTIONAL_LOCKS": "0"},
    )
    return asked.stdout.strip()
