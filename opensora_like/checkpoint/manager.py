"""Saves and loads the whole state of a run, for every booster alike."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist
from torch import Tensor

from opensora_like.boosters.base import BESIDE, Booster
from opensora_like.checkpoint import layout
from opensora_like.checkpoint.facts import CONFIG_FILE, file_checks, read_state
from opensora_like.checkpoint.files import find_nvme_writer
from opensora_like.checkpoint.live import Background, guard
from opensora_like.checkpoint.loading import Reading
from opensora_like.checkpoint.pieces import Piece, PieceReader, pieces_of
from opensora_like.checkpoint.publishing import Publisher, TrainState, of_all_ranks
from opensora_like.checkpoint.weights import LoadReport, compare_shapes
from opensora_like.runtime import logger

Loaded = TypeVar("Loaded")


class Damaged(OSError):
    """Files of a checkpoint are not as they were written."""


class CheckpointManager:
    """Writes checkpoints of one run into its folder and reads them back.

    With `async_io` a thread writes, syncs and publishes; one save is in flight at most. Tensors of a device are copied
    first. Those in host memory are written from where they are, and what was not written when the next update comes is
    copied then: see `live`. From here on they must be changed through the booster's doors alone.
    TensorNVMe does the writing where it is installed and there is a GPU; then all is copied first.

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
        self.run, self.booster, self.ema, self.order = run, booster, ema, dict(order)
        layout.check_kept(keep_n_latest, keep_every)
        run.mkdir(parents=True, exist_ok=True)
        self._stop_on_error, self._hook = on_save_error == "stop", hook
        # a group of its own: the writer thread talks while the training does
        self._group = dist.new_group(backend="gloo") if dist.get_world_size() > 1 else None
        self._publisher = Publisher(
            run,
            config_text,
            {layout.START: layout.next_start(run), "data_order": self.order, **about},
            keep=keep_n_latest,
            keep_every=keep_every,
            group=self._group,
            hook=hook,
            nvme_writer=find_nvme_writer() if async_io else None,
        )
        self._intact: set[Path] = set()
        self._failed = ""  # why the newest save did
        self._thread = ThreadPoolExecutor(1, "checkpoint") if async_io else None
        self._pending: Future[str] | None = None
        self._background = Background(stays=self._publisher.nvme_writer is None)
        if async_io:
            guard(booster, lambda: self.before_update())

    def save(self, state: TrainState) -> Path:
        """Save on all ranks together; with `async_io` wait only for what has to be copied from a device.

        Returns: where it will be.

        Raises:
            OSError: this save, or the one before it, could not be written, and errors stop the run.
        """
        self.wait()
        self._hook("begin")
        name = layout.checkpoint_name(state.epoch, state.step)
        pieces = self._pieces()
        if self._thread is not None:
            pieces = self._background.begin(pieces)
            self._hook("copied")
            self._pending = self._thread.submit(self._publisher.write, dataclasses.replace(state), name, pieces)
        else:
            self._report(self._publisher.write(state, name, pieces))
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
            problem = pending.result()
            self._background.release()
            self._report(problem)

    def finish(self) -> None:
        """Wait for the last save of a run.

        Raises:
            OSError: it failed, whatever `on_save_error` says: no later one will make up for it.
        """
        self.wait()
        if self._failed:
            raise OSError(f"{self._failed}; it was the last save of this run, go on from the one before")

    def before_update(self) -> None:
        """What is being saved is about to change: copy what was not written yet. The doors of the booster call this."""
        if self._pending is not None and not self._pending.done():
            self._background.secure()

    def _report(self, problem: str) -> None:
        self._failed = problem
        if not problem:
            return
        if self._stop_on_error:
            raise OSError(f"{problem}; the last complete checkpoint is untouched")
        logger.error("%s; training goes on (on_save_error='continue')", problem)

    def _pieces(self) -> list[Piece]:
        ranges = self.booster.ranges()
        pieces = pieces_of("master", dict(self.booster.master_shards()), ranges)
        for kind, tensors in self.booster.optimizer_shards().items():
            pieces += pieces_of(kind, tensors, ranges)
        if self.ema is not None:
            pieces += pieces_of("ema", self.ema, ranges)
        return pieces

    def load(self, folder: Path, *, check: Callable[[Mapping[str, Any]], None] | None = None) -> TrainState:
        """Read weights, optimizer and EMA of this rank's ranges, whatever number of ranks wrote them.

        Args:
            check: is given the facts of the state file before anything is read; may raise.

        Returns: the state that the checkpoint was saved with.

        Raises:
            Damaged: files are missing, cut short or changed; what was read until then is worth nothing.
            ValueError: the checkpoint belongs to another model, optimizer or format.
        """
        with self._reading(folder) as reading:
            facts = read_state(folder)
            if check is not None:
                check(facts)
            reader, ranges = PieceReader(folder), self.booster.ranges()
            self._check_names(reader, folder)
            wanted = {"master": dict(self.booster.master_shards()), **self.booster.optimizer_shards()}
            for kind, tensors in wanted.items():
                reading.add(kind, tensors, reader, ranges)
            if self.ema is not None:
                reading.add("ema" if "ema" in reader.kinds() else "master", self.ema, reader, ranges)
        self._tell_differences(folder, set(reader.kinds()), set(wanted))
        self.booster.refresh()
        return TrainState(**{f.name: facts[f.name] for f in dataclasses.fields(TrainState)})

    def _tell_differences(self, folder: Path, saved: set[str], wanted: set[str]) -> None:
        """What `load` passes over, and what it makes of nothing."""
        if unused := sorted(saved - wanted - ({"ema"} if self.ema is not None else set())):
            logger.warning("%s: %s are not taken, since this run has none (optim.type, ema_decay)", folder, unused)
        if self.ema is not None and "ema" not in saved:
            logger.warning("%s has no EMA: it begins at the weights", folder)

    @contextmanager
    def _reading(self, folder: Path) -> Iterator[Reading]:
        """Read what the body adds, once it has ended, and compare every file with what was written; ranks share that.

        Raises:
            Damaged: on every rank, naming each file that is gone, cut short or changed, whatever the body met.
        """
        self.wait()
        reading = Reading()
        try:
            yield reading
        except Exception:
            reading.clear()
            self._read(reading, folder)  # damage is a better reason, if there is any
            raise
        self._read(reading, folder)

    def _read(self, reading: Reading, folder: Path) -> None:
        is_known = folder in self._intact
        found = reading.run({} if is_known else file_checks(folder, dist.get_rank(), dist.get_world_size()))
        if problems := [problem for rank in of_all_ranks(found, self._group) for problem in rank]:
            raise Damaged(f"{'; '.join(problems)}; take an earlier checkpoint, or a copy of this one")
        self._intact.add(folder)

    def newest_intact(self, load: Callable[[Path], Loaded]) -> Loaded:
        """What `load` makes of the newest complete checkpoint of the run; damaged ones are reported and passed over.

        Raises:
            FileNotFoundError: there is none.
        """
        # of rank 0: a shared disk may show the others what was there a minute ago
        found = of_all_ranks(layout.complete_checkpoints(self.run), self._group)[0]
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
        with self._reading(folder) as reading:
            read_state(folder)
            reader, ranges = PieceReader(folder), self.booster.ranges()
            names = reader.names("master") if self._has_critic else reader.denoiser_names("master")
            saved = {name: reader.shape("master", name) for name in names}
            report, fitting = compare_shapes(saved, {name: place.shape for name, place in ranges.items()})
            if not fitting or (strict and not report.fits):
                raise ValueError(
                    f"load={str(folder)!r} does not fit the model: {report}; load_strict=False takes what fits"
                )
            masters = dict(self.booster.master_shards())
            reading.add("master", {name: masters[name] for name in masters if name in fitting}, reader, ranges)
        for name, shard in (self.ema or {}).items():  # of a distillation it is that of the generator alone
            shard.copy_(masters[name])
        self.booster.refresh()
        return report

    @property
    def _has_critic(self) -> bool:
        return any(name.startswith(BESIDE) for name in self.booster.ranges())

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
