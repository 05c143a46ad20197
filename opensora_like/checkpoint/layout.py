"""Where checkpoints lie, which are complete, which is the newest, and how one becomes visible."""

from __future__ import annotations

import glob
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

from opensora_like.publish import DRAFT

NAME = re.compile(r"epoch(\d+)-global_step(\d+)")
STATE_FILE = "state.json"
START = "start"  # in it: how often the run had been started before, as far as checkpoints tell
STAGING = DRAFT  # of a checkpoint, which is a folder
REPLACED = ".replaced-"
LATEST = "latest"


def checkpoint_name(epoch: int, step: int) -> str:
    """Folder name of the checkpoint after update `step`, in `epoch`."""
    return f"epoch{epoch}-global_step{step}"


def step_of(folder: Path) -> int:
    """The update number in a checkpoint's name."""
    return int(NAME.fullmatch(folder.name).group(2))


def is_complete(folder: Path) -> bool:
    """Whether `folder` is a published checkpoint: the right name, and the state file inside."""
    return bool(NAME.fullmatch(folder.name)) and (folder / STATE_FILE).is_file()


def complete_checkpoints(run: Path) -> list[Path]:
    """All complete checkpoints of a run, the first written first.

    That is by start of the run, then by update: one that goes on from an earlier checkpoint leaves later ones behind.
    """
    if not run.is_dir():
        return []
    return sorted((f for f in run.iterdir() if is_complete(f)), key=lambda f: (start_of(f), step_of(f), f.name))


def start_of(folder: Path) -> int:
    """Which start of the run wrote a checkpoint, from 0; 0 where its state file does not say."""
    try:
        return json.loads((folder / STATE_FILE).read_text()).get(START, 0)
    except (ValueError, AttributeError):  # damaged, which is reported when it is loaded
        return 0


def next_start(run: Path) -> int:
    """The number of a start that finds the run's folder as it is."""
    return max((start_of(f) + 1 for f in complete_checkpoints(run)), default=0)


def find_checkpoint(load: str, run: Path) -> Path:
    """The checkpoint that ``load`` means: a folder, a pattern of folders (the newest), or ``latest`` of `run`.

    The link ``latest`` in a run's folder is a folder like any other; the word alone looks at what is there.

    Raises:
        FileNotFoundError: there is none, or it is not complete.
    """
    if load == "latest":
        found = complete_checkpoints(run)
        if not found:
            raise FileNotFoundError(f"load='latest': {str(run)!r} has no complete checkpoint; start without --load")
        return found[-1]
    if any(c in load for c in "*?["):
        matches = (Path(f) for f in glob.glob(load))  # noqa: PTH207 - Path.glob takes no absolute pattern
        found = [f for f in matches if is_complete(f)]
        if not found:
            raise FileNotFoundError(f"load={load!r} matches no complete checkpoint")
        of_one_run = len({f.parent for f in found}) == 1  # starts of several runs cannot be compared
        return max(found, key=lambda f: (of_one_run and start_of(f), step_of(f), f.name))
    folder = Path(load)
    if folder.is_symlink():
        folder = folder.resolve()
    if not folder.is_dir():
        raise FileNotFoundError(f"load={load!r} is not a folder{_available(folder.parent)}")
    if not (folder / STATE_FILE).is_file():
        inside = complete_checkpoints(folder)
        if inside:
            return inside[-1]
        raise FileNotFoundError(
            f"load={load!r} has no {STATE_FILE}: not a complete checkpoint{_available(folder.parent)}"
        )
    return folder


def _available(run: Path) -> str:
    found = [f.name for f in complete_checkpoints(run)]
    return f"; complete in {str(run)!r}: {found}" if found else ""


def staging_folder(run: Path, name: str) -> Path:
    """Where a checkpoint is written before anybody can see it."""
    return run / f"{STAGING}{name}"


def sync_folder(folder: Path) -> None:
    """Make the entries of `folder` durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def publish(run: Path, name: str, *, hook: Callable[[str], None] = lambda stage: None) -> Path:
    """Rename the finished staging folder into place; a reader sees all of it or nothing.

    A checkpoint of the same name (an earlier attempt at the same step) is moved aside first and
    deleted last; `recover` puts it back if a kill comes between.

    Args:
        hook: told "aside" and "renamed" when these are done; for tests of crashes.
    """
    target, aside = run / name, run / f"{REPLACED}{name}"
    if target.exists():
        target.rename(aside)
        hook("aside")
    staging_folder(run, name).rename(target)
    hook("renamed")
    sync_folder(run)
    if aside.exists():
        shutil.rmtree(aside)
    return target


def link_latest(run: Path, name: str) -> None:
    """Let ``latest`` in the run's folder point to checkpoint `name`: for people and other programs.

    Raises:
        OSError: the file system has no symbolic links.
    """
    temporary = run / f"{STAGING}{LATEST}"
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(name)
    temporary.replace(run / LATEST)


def recover(run: Path) -> None:
    """Undo what a kill left half done: unfinished staging goes, a replaced checkpoint without successor returns.

    Raises:
        OSError: the folder cannot be written.
    """
    if not run.is_dir():
        return
    for folder in run.iterdir():
        if folder.name.startswith(REPLACED):
            target = run / folder.name.removeprefix(REPLACED)
            if target.exists():
                shutil.rmtree(folder)
            else:
                folder.rename(target)
        elif folder.name.startswith(STAGING):
            is_file = folder.is_symlink() or not folder.is_dir()  # the link to the newest, or a file of metrics
            folder.unlink() if is_file else shutil.rmtree(folder)


def check_kept(keep: int, keep_every: int) -> None:
    """Check what `remove_old` is told.

    Raises:
        ValueError: `keep_n_latest` that keeps nothing, or `keep_every` that is no count or would be ignored.
    """
    if keep == 0 or keep < -1:
        raise ValueError(f"keep_n_latest={keep} would keep no checkpoint; use 1 or more, or -1 for all")
    if keep_every < 0:
        raise ValueError(f"keep_every={keep_every} must be a number of updates, or 0")
    if keep_every and keep == -1:
        raise ValueError(
            f"keep_every={keep_every} is for what keep_n_latest would remove, and keep_n_latest=-1 keeps all; set "
            "keep_n_latest to 1 or more, or remove keep_every"
        )


def remove_old(run: Path, keep: int, *, keep_every: int = 0) -> None:
    """Delete all but the `keep` newest complete checkpoints; called only after a publish. -1 keeps all.

    Args:
        keep_every: updates whose multiples are kept for good, beside the newest; 0 keeps none for good.
    """
    if keep == -1:
        return
    if keep < 1:
        raise ValueError(f"keep_n_latest={keep} would delete the checkpoint just written; use 1 or more, or -1 for all")
    for folder in complete_checkpoints(run)[:-keep]:
        if keep_every and step_of(folder) % keep_every == 0:
            continue
        hidden = run / f"{STAGING}removed-{folder.name}"  # renamed first: a kill while deleting leaves no half
        folder.rename(hidden)
        shutil.rmtree(hidden)
