"""Saves and loads the whole state of a run, for every booster alike."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from opensora_like.boosters.base import Booster
from opensora_like.checkpoint import layout
from opensora_like.checkpoint.pieces import PieceReader, pieces_of, sync_file, write_pieces
from opensora_like.datasets.plan import what_changed

FORMAT_VERSION = 1
CONFIG_FILE = "config.py"


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

    Args:
        run: the run's folder; checkpoints are ``epoch{E}-global_step{S}`` in it.
        config_text: the resolved config, kept beside the tensors.
        keep_n_latest: complete checkpoints kept; -1 keeps all.
        order: what the order of the data depends on, `datasets.plan.order_key`.
        about: further facts for the state file (world size, booster...).
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
    ) -> None:
        self.run, self.booster, self.ema = run, booster, ema
        self._config_text, self._keep, self._about = config_text, keep_n_latest, dict(about)
        self.order = dict(order)
        if keep_n_latest == 0 or keep_n_latest < -1:
            raise ValueError(f"keep_n_latest={keep_n_latest} would keep no checkpoint; use 1 or more, or -1 for all")

    def save(self, state: TrainState) -> Path:
        """Write a complete checkpoint on all ranks together; return when it is durable and visible."""
        name = layout.checkpoint_name(state.epoch, state.step)
        staging = layout.staging_folder(self.run, name)
        rank = dist.get_rank()
        if rank == 0:
            staging.mkdir(parents=True, exist_ok=True)
        dist.barrier()
        ranges = self.booster.ranges()
        pieces = pieces_of("master", dict(self.booster.master_shards()), ranges)
        for kind, tensors in self.booster.optimizer_shards().items():
            pieces += pieces_of(kind, tensors, ranges)
        if self.ema is not None:
            pieces += pieces_of("ema", self.ema, ranges)
        sizes = write_pieces(staging, rank, pieces)
        all_sizes: list[dict[str, int] | None] = [None] * dist.get_world_size()
        dist.all_gather_object(all_sizes, sizes)
        if rank == 0:
            self._write_state(staging, state, {k: v for s in all_sizes for k, v in s.items()})
            layout.publish(self.run, name)
            layout.remove_old(self.run, self._keep)
        dist.barrier()
        return self.run / name

    def _write_state(self, staging: Path, state: TrainState, sizes: Mapping[str, int]) -> None:
        (staging / CONFIG_FILE).write_text(self._config_text)
        sync_file(staging / CONFIG_FILE)
        facts = {
            "format_version": FORMAT_VERSION,
            **dataclasses.asdict(state),
            "data_order": self.order,
            **self._about,
            "versions": _versions(),
            "files": dict(sorted(sizes.items())),
        }
        path = staging / layout.STATE_FILE
        path.write_text(json.dumps(facts, indent=1))
        sync_file(path)
        layout.sync_folder(staging)

    def load(self, folder: Path) -> TrainState:
        """Read weights, optimizer and EMA of this rank's ranges, whatever number of ranks wrote them.

        Returns: the state that the checkpoint was saved with.

        Raises:
            OSError: files missing or cut short.
            ValueError: the checkpoint belongs to another model, optimizer or format.
        """
        facts = read_state(folder)
        check_sizes(folder, facts)
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


def _read_into(shard: Tensor, reader: PieceReader, kind: str, name: str, place: tuple) -> None:
    if shard.ndim == 0:
        shard.copy_(reader.read(kind, name)[0])
    elif shard.numel():
        shard.copy_(reader.read(kind, name, place[1], place[2]))


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


def check_sizes(folder: Path, facts: Mapping[str, Any]) -> None:
    """Compare every file with the size it had when it was saved.

    Raises:
        OSError: a file is gone or has another size.
    """
    for file, size in facts["files"].items():
        path = folder / file
        if not path.is_file():
            raise OSError(f"{str(path)!r} is missing from the checkpoint; take an earlier one")
        if path.stat().st_size != size:
            raise OSError(
                f"{str(path)!r} has {path.stat().st_size} bytes, {size} were written; take an earlier checkpoint"
            )


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
    for name in ("opensora_like", "torch", "colossalai", "transformers", "diffusers", "mmengine-lite"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    found["git"] = _git_commit()
    return found


def _git_commit() -> str:
    """Commit of this package's checkout, "" where it is not one."""
    here = Path(__file__).parent
    asked = subprocess.run(
        ["git", "-C", str(here), "describe", "--always", "--dirty"],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "GIT_OPTIONAL_LOCKS": "0"},
    )
    return asked.stdout.strip()
