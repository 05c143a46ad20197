"""Saves and loads the whole state of a run, for every booster alike."""

from __future__ import annotations

import dataclasses
import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Condition
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from opensora_like.boosters.base import Booster, ShardRange, ShardStrips
from opensora_like.checkpoint import layout
from opensora_like.checkpoint.facts import (
    CHECKSUMS_FILE,
    CONFIG_FILE,
    FORMAT_VERSION,
    damage,
    read_state,
    versions,
)
from opensora_like.checkpoint.files import WrittenFile, find_nvme_writer, write_text
from opensora_like.checkpoint.pieces import Piece, PieceReader, pieces_of, write_pieces
from opensora_like.checkpoint.weights import LoadReport, compare_shapes
from opensora_like.runtime import logger

Loaded = TypeVar("Loaded")


class Damaged(OSError):
    """Files of a checkpoint are not as they were written."""


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
    TensorNVMe does the writing where it is installed and there is a GPU.

    Args:
        run: the run's folder; checkpoints are ``epoch{E}-global_step{S}`` in it.
        config_text: the resolved config, kept beside the tensors.
        keep_n_latest: complete checkpoints kept; -1 keeps all.
        keep_every: updates whose multiples are kept for good, beside these; 0 keeps none for good.
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
        keep_every: int = 0,
        order: Mapping[str, Any],
        about: Mapping[str, Any],
        async_io: bool = False,
        on_save_error: str = "stop",
        hook: Callable[[str], None] = lambda stage: None,
    ) -> None:
        self.run, self.booster, self.ema = run, booster, ema
        self._config_text, self._keep, self._about = config_text, keep_n_latest, dict(about)
        self.order, self._keep_every = dict(order), keep_every
        if keep_n_latest == 0 or keep_n_latest < -1:
            raise ValueError(f"keep_n_latest={keep_n_latest} would keep no checkpoint; use 1 or more, or -1 for all")
        if keep_every < 0:
            raise ValueError(f"keep_every={keep_every} must be a number of updates, or 0")
        run.mkdir(parents=True, exist_ok=True)
        self._nvme_writer = find_nvme_writer() if async_io else None
        self._intact: set[Path] = set()
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
        copied, grown = [], 0
        for piece in pieces:
            key, tensor = (piece.kind, piece.name), piece.tensor.detach()
            buffer = self._staged.get(key)
            if buffer is None or buffer.shape != tensor.shape:
                buffer = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
                self._staged[key] = buffer
                grown += buffer.numel() * buffer.element_size()
            copied.append(piece._replace(tensor=buffer.copy_(tensor, non_blocking=True)))
        if torch.cuda.is_available():
            torch.cuda.current_stream().synchronize()
        if grown:
            logger.info("async_io keeps %.1f MiB of host memory on this rank for the copy", grown / 2**20)
        return copied

    def _write(self, state: TrainState, name: str, pieces: list[Piece]) -> str:
        """Write, agree, publish. Returns: what went wrong on any rank, "" if nothing; the same on all."""
        began = time.perf_counter()
        staging = layout.staging_folder(self.run, name)
        written: dict[str, WrittenFile] = {}
        problem = ""
        try:
            staging.mkdir(exist_ok=True)  # without parents: a lost mount must not be replaced by the disk below it
            written = write_pieces(
                staging,
                dist.get_rank(),
                pieces,
                on_file=lambda file: self._hook(f"file {file}"),
                nvme_writer=self._nvme_writer,
            )
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
        facts = {
            "format_version": FORMAT_VERSION,
            **dataclasses.asdict(state),
            "data_order": self.order,
            **self._about,
            "versions": versions(),
        }
        files = {
            **files,
            CONFIG_FILE: write_text(staging / CONFIG_FILE, self._config_text),
            layout.STATE_FILE: write_text(staging / layout.STATE_FILE, json.dumps(facts, indent=1)),
        }
        self._hook("state")
        sums = {file: facts._asdict() for file, facts in sorted(files.items())}
        write_text(staging / CHECKSUMS_FILE, json.dumps(sums, indent=1))
        layout.sync_folder(staging)
        self._hook("checksums")
        layout.publish(self.run, name, hook=self._hook)
        self._hook("published")
        self._tidy(name)

    def _tidy(self, name: str) -> None:
        """What comes after a checkpoint is complete. A failure here is reported and harms nothing."""
        try:
            layout.link_latest(self.run, name)
            self._hook("linked")
            layout.remove_old(self.run, self._keep, keep_every=self._keep_every)
            self._hook("removed")
        except OSError as problem:
            logger.warning("%s is complete, but tidying up after it failed: %s", name, problem)

    def load(self, folder: Path, *, check: Callable[[Mapping[str, Any]], None] | None = None) -> TrainState:
        """Read weights, optimizer and EMA of this rank's ranges, whatever number of ranks wrote them.

        Args:
            check: is given the facts of the state file before anything is read; may raise.

        Returns: the state that the checkpoint was saved with.

        Raises:
            Damaged: files are missing, cut short or changed; what was read until then is worth nothing.
            ValueError: the checkpoint belongs to another model, optimizer or format.
        """
        with self.verified(folder) as wait:
            facts = read_state(folder)
            if check is not None:
                check(facts)
            reader = PieceReader(folder, before_open=wait)
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

    @contextmanager
    def verified(self, folder: Path) -> Iterator[Callable[[str], None]]:
        """Compare size and checksum of every file with what was written, while the body reads them.

        The ranks share the work. The body is given a function that waits until a file has been compared, where this
        rank does that: the file is then in memory, and is not read from the disk twice.

        Raises:
            Damaged: on every rank, naming each file that is gone, cut short or changed, whatever the body met.
        """
        if folder in self._intact:
            yield lambda file: None
            return
        rank, world_size = dist.get_rank(), dist.get_world_size()
        compared, over = set(), Condition()

        def tell(file: str | None) -> None:
            with over:
                compared.add(file)
                over.notify_all()

        def compare() -> list[list[str]]:
            try:
                found = damage(folder, rank, world_size, on_file=tell)
            finally:
                tell(None)  # nothing more will come
            return self._gather(found)

        def wait(file: str) -> None:
            with over:
                over.wait_for(lambda: file in compared or None in compared)

        with ThreadPoolExecutor(1, "verify") as thread:
            checking = thread.submit(compare)
            try:
                yield wait if world_size == 1 or self._wrote_as_many(folder) else lambda file: None
            finally:
                if problems := [p for found in checking.result() for p in found]:
                    raise Damaged(f"{'; '.join(problems)}; take an earlier checkpoint, or a copy of this one")
        self._intact.add(folder)

    def _wrote_as_many(self, folder: Path) -> bool:
        """Whether as many ranks wrote a checkpoint as there are, so that each reads what it compares."""
        return len(list(folder.glob("pieces.rank*.json"))) == dist.get_world_size()

    def newest_intact(self, load: Callable[[Path], Loaded]) -> Loaded:
        """What `load` makes of the newest complete checkpoint of the run; damaged ones are reported and passed over.

        Raises:
            FileNotFoundError: there is none.
        """
        found = layout.complete_checkpoints(self.run)
        for folder in reversed(found):
            try:
                return load(folder)
            except Damaged as problem:
                logger.warning("load='latest' passes over %s: %s", folder.name, problem)
        raise FileNotFoundError(
            f"load='latest': {str(self.run)!r} has {len(found)} complete checkpoints and none is intact; "
            "start without --load in another --exp-name"
        )

    def load_weights(self, folder: Path, *, strict: bool = True) -> LoadReport:
        """Read the weights alone; optimizer and state stay as they are, and the EMA begins at these weights.

        Args:
            strict: False lets tensors be missing, unexpected or of another shape.

        Returns: what happened to every tensor; the caller logs it.

        Raises:
            Damaged: as `load`.
            ValueError: strict and not every tensor fits, or none does.
        """
        with self.verified(folder):
            read_state(folder)
            reader, ranges = PieceReader(folder), self.booster.ranges()
            saved = {name: reader.shape("master", name) for name in reader.names("master")}
            report, fitting = compare_shapes(saved, {name: place.shape for name, place in ranges.items()})
            if not fitting or (strict and not report.fits):
                raise ValueError(
                    f"load={str(folder)!r} does not fit the model: {report}; load_strict=False takes what fits"
                )
            with torch.no_grad():
                for name, shard in self.booster.master_shards():
                    if name in fitting:
                        _read_into(shard, reader, "master", name, ranges[name])
                    if self.ema is not None:
                        self.ema[name].copy_(shard)
        self.booster.refresh()
        return report

    def _check_names(self, reader: PieceReader, folder: Path) -> None:
        ranges = self.booster.ranges()
        saved = {name: reader.shape("master", name) for name in reader.names("master")}
        report, _ = compare_shapes(saved, {name: place.shape for name, place in ranges.items()})
        if not report.fits:
            raise ValueError(
                f"load={str(folder)!r} is of another model: {report}; use the config saved in "
                f"{str(folder / CONFIG_FILE)!r}, or take what fits with --load-weights-only --load-strict False"
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
        in_place = shard.device.type == "cpu" and shard.ndim == 1 and shard.is_contiguous()
        in_place = in_place and reader.dtype(kind, name) == shard.dtype
        read = reader.read_place(kind, name, place, out=shard if in_place else None)
        if not in_place:
            shard.copy_(read)
