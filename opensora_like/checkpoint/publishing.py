"""Writes one checkpoint on all ranks together and makes it visible when all of it is on disk."""

from __future__ import annotations

import dataclasses
import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from opensora_like.checkpoint import layout
from opensora_like.checkpoint.facts import CHECKSUMS_FILE, CONFIG_FILE, FORMAT_VERSION, versions
from opensora_like.checkpoint.files import WrittenFile, write_text
from opensora_like.checkpoint.memory import Overwritten
from opensora_like.checkpoint.pieces import Piece, write_pieces
from opensora_like.runtime import logger


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


@dataclass(frozen=True)
class Publisher:
    """Writes checkpoints into a run's folder: staged, synced, agreed on, renamed.

    Args:
        config_text: the resolved config, kept beside the tensors.
        facts: what the state file says besides the state and the versions.
        keep, keep_every: see `layout.remove_old`.
        group: over which the ranks agree, from the thread that writes; None where there is one rank.
        hook: told the name of each stage as it is reached.
        nvme_writer: see `files.find_nvme_writer`.
    """

    run: Path
    config_text: str
    facts: Mapping[str, Any]
    keep: int
    keep_every: int
    group: dist.ProcessGroup | None
    hook: Callable[[str], None]
    nvme_writer: Callable[..., Any] | None

    def write(self, state: TrainState, name: str, pieces: Sequence[Piece]) -> str:
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
                on_file=lambda file: self.hook(f"file {file}"),
                nvme_writer=self.nvme_writer,
            )
        except OSError as error:
            problem = f"rank {dist.get_rank()} could not save {name}: {error}; free space or mend the disk"
        except Overwritten as error:
            problem = (
                f"rank {dist.get_rank()} could not save {name}: {error}; train with async_io=False until it is mended"
            )
        self.hook("written")
        everything = of_all_ranks((written, problem), self.group)
        problems = [p for _, p in everything if p]
        if not problems and dist.get_rank() == 0:
            files = {file: facts for files, _ in everything for file, facts in files.items()}
            try:
                self._publish(staging, name, state, files)
            except OSError as error:
                problems = [f"rank 0 could not publish {name}: {error}; free space or mend the disk"]
        problem = of_all_ranks("; ".join(problems), self.group)[0]
        if dist.get_rank() == 0:
            if problem:
                shutil.rmtree(staging, ignore_errors=True)  # what is left of it is taken away at the next start
            else:
                logger.info("saved %s in %.2f seconds", self.run / name, time.perf_counter() - began)
        return problem

    def _publish(self, staging: Path, name: str, state: TrainState, files: Mapping[str, WrittenFile]) -> None:
        """Rank 0, when every rank's files are on disk."""
        facts = {
            "format_version": FORMAT_VERSION,
            **dataclasses.asdict(state),
            **self.facts,
            "versions": versions(),
        }
        files = {
            **files,
            CONFIG_FILE: write_text(staging / CONFIG_FILE, self.config_text),
            layout.STATE_FILE: write_text(staging / layout.STATE_FILE, json.dumps(facts, indent=1)),
        }
        self.hook("state")
        sums = {file: facts._asdict() for file, facts in sorted(files.items())}
        write_text(staging / CHECKSUMS_FILE, json.dumps(sums, indent=1))
        layout.sync_folder(staging)
        self.hook("checksums")
        layout.publish(self.run, name, hook=self.hook)
        self.hook("published")
        self._tidy(name)

    def _tidy(self, name: str) -> None:
        """What comes after a checkpoint is complete. A failure here is reported and harms nothing."""
        try:
            layout.link_latest(self.run, name)
            self.hook("linked")
            layout.remove_old(self.run, self.keep, keep_every=self.keep_every)
            self.hook("removed")
        except OSError as problem:
            logger.warning("%s is complete, but tidying up after it failed: %s", name, problem)


def of_all_ranks(value: Any, group: dist.ProcessGroup | None) -> list[Any]:
    """`value` of every rank, on every rank; of this one where there is no group."""
    if group is None:
        return [value]
    found = [None] * dist.get_world_size(group)
    dist.all_gather_object(found, value, group=group)
    return found
