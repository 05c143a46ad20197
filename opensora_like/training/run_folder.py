"""The folder of a run: its name, and the lock that keeps other runs out."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TextIO

from opensora_like import runtime as rt
from opensora_like.checkpoint import layout
from opensora_like.config import config_text
from opensora_like.publish import staged, take_lock
from opensora_like.runtime import Runtime
from opensora_like.settings import RunConfig


def run_name(cfg: RunConfig, config_name: str) -> str:
    """``exp_name``, or date, time and the config's path below configs/."""
    if cfg.exp_name:
        return cfg.exp_name
    parts = Path(config_name).with_suffix("").parts
    below = parts[parts.index("configs") + 1 :] if "configs" in parts else parts[-1:]
    return f"{time.strftime('%y%m%d_%H%M%S')}-{'_'.join(below)}"


def open_run_folder(cfg: RunConfig, runtime: Runtime, config_name: str) -> tuple[Path, TextIO | None]:
    """Make the run's folder, refuse one that is in use or holds another run's checkpoints, write the config.

    Returns: the folder, and on rank 0 its lock: an open file; whoever holds it owns the folder.

    Raises:
        ValueError: on every rank: ``load='latest'`` without a name, a folder in use, one with checkpoints and no
            ``load``, or one that cannot be written.
    """
    if cfg.load == "latest" and not cfg.exp_name:
        raise ValueError("load='latest' looks in the run's own folder; say which with --exp-name")
    folder = Path(cfg.outputs) / rt.broadcast_text(run_name(cfg, config_name))
    lock, problem = None, ""
    if runtime.is_main:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock = take_lock(folder / ".lock")
            problem = _recovered(folder, is_new=cfg.load is None)
            if not problem:
                with staged(folder / "config.py") as draft:  # who samples may be reading that of the last start
                    draft.write_text(config_text(cfg))
        except BlockingIOError:
            problem = f"another run is training in {str(folder)!r}; stop it, or choose another --exp-name"
        except OSError as error:  # the others are waiting to hear of it
            problem = f"outputs={cfg.outputs!r} cannot be written: {error}; make room, or choose another --outputs"
    if problem := rt.broadcast_text(problem):
        raise ValueError(problem)
    return folder, lock


def _recovered(folder: Path, *, is_new: bool) -> str:
    """Undo what a kill left half done. Returns: why the folder is not this run's, "" if it is."""
    layout.recover(folder)
    found = layout.complete_checkpoints(folder)
    if found and is_new:
        return (
            f"{str(folder)!r} already holds {found[-1].name}; continue it with --load latest, "
            "or choose another --exp-name"
        )
    return ""
