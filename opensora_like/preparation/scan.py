"""Write the list of clips, meta.json, of a folder of videos: measured, with the captions that are found."""

from __future__ import annotations

import json
import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from opensora_like.datasets.video_io import BadSample, probe
from opensora_like.preparation.captions import CAPTION_TABLES, META_JSON, Clip, Format, list_clips
from opensora_like.publish import staged


class Scan(NamedTuple):
    """Entries of meta.json, (file, reason) of what cannot be read, and what is worth telling."""

    entries: list[dict[str, Any]]
    problems: list[tuple[str, str]]
    notes: tuple[str, ...]


def scan(
    folder: str | Path,
    *,
    form: Format = "auto",
    field: str | None = None,
    table: str | Path | None = None,
    num_workers: int = 8,
) -> Scan:
    """Measure the videos of a folder and look for their captions; an existing meta.json is not read.

    Args:
        form, field, table: as `list_clips`.
        num_workers: threads.

    Raises: as `list_clips`.
    """
    folder = Path(folder)
    if form == "auto" and table is None:
        form = "table" if any((folder / name).is_file() for name in CAPTION_TABLES) else "sidecar"
    listing = list_clips(folder, form=form, field=field, table=table, missing="empty")
    with ThreadPoolExecutor(max(1, num_workers)) as pool:
        measured = list(pool.map(lambda clip: _measure(folder, clip), listing.clips))
    entries = [found for found in measured if isinstance(found, dict)]
    problems = [found for found in measured if isinstance(found, tuple)]
    without = sum(not entry["vila_caption"] for entry in entries)
    notes = [*listing.notes, *([f"{without} of {len(entries)} clips have no caption yet"] if without else [])]
    return Scan(entries, problems, tuple(notes))


def _measure(folder: Path, clip: Clip) -> dict[str, Any] | tuple[str, str]:
    if clip.problem:
        return clip.file, clip.problem
    try:
        info = probe(folder / clip.file)
    except BadSample as problem:
        return clip.file, problem.reason
    last = info.num_frames - 1
    return {
        "file_name": clip.file,
        "width": info.width,
        "height": info.height,
        "start_frame": clip.start_frame,
        "end_frame": last if clip.end_frame is None else min(clip.end_frame, last),
        "fps": None if math.isnan(info.fps) else info.fps,
        "vila_caption": clip.text,
    }


def check_absent(folder: str | Path, *, overwrite: bool) -> None:
    """Raises ValueError if there is a meta.json and `overwrite` is not given, since people write captions into it."""
    target = Path(folder) / META_JSON
    if target.exists() and not overwrite:
        raise ValueError(f"{str(target)!r} exists and may hold captions; move it away, or give --overwrite")


def write_meta_json(folder: str | Path, entries: list[dict[str, Any]], *, overwrite: bool = False) -> Path:
    """Write meta.json into the folder. Returns: its path. Raises: as `check_absent`."""
    check_absent(folder, overwrite=overwrite)
    target = Path(folder) / META_JSON
    with staged(target) as draft:
        draft.write_text(json.dumps(entries, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return target
