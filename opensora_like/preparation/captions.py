"""Which clips a folder of videos holds: the files, the stretch of each, and the caption, wherever it was written."""

from __future__ import annotations

import csv
import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any, Literal, get_args

from opensora_like.datasets.meta_file import CAPTION_KEYS, caption_in
from opensora_like.datasets.video_io import VIDEO_SUFFIXES

META_JSON = "meta.json"
CAPTION_TABLES = ("captions.csv", "metadata.csv")
FILE_KEYS = ("file_name", "path", "filename")
Format = Literal["auto", "meta_json", "table", "sidecar", "jsonl", "json", "txt"]
Missing = Literal["error", "skip", "stem", "empty"]


@dataclass(frozen=True)
class Clip:
    """A stretch of a video, and what is to be seen in it.

    Args:
        file: relative to the folder, with "/".
        start_frame, end_frame: from 0, both within the clip; None is the video's last.
        is_part: the file has other clips, too, so that its name alone does not name this one.
        problem: why the clip cannot be prepared; "" if it can.
    """

    file: str
    text: str | None = None
    start_frame: int = 0
    end_frame: int | None = None
    is_part: bool = False
    problem: str = ""

    @property
    def key(self) -> str:
        """Its name among the clips of the folder."""
        end = "" if self.end_frame is None else self.end_frame
        return f"{self.file}#{self.start_frame}-{end}" if self.is_part else self.file

    @property
    def stem(self) -> str:
        """The name of a file that is made of it, without a suffix; folders become part of it."""
        path = PurePosixPath(self.file)
        name = str(path.with_suffix("") if path.suffix.lower() == ".mp4" else path).replace("/", "__")
        return name + self.key[len(self.file) :].replace("#", "_")


@dataclass(frozen=True)
class Listing:
    """Clips in the order of their keys, and what is worth telling of them, one line each."""

    clips: tuple[Clip, ...]
    notes: tuple[str, ...]


def list_clips(
    folder: str | Path,
    *,
    form: Format = "auto",
    field: str | None = None,
    table: str | Path | None = None,
    missing: Missing = "error",
) -> Listing:
    """Find the clips of a folder of videos, with all below it.

    Args:
        form: where captions are. "meta_json": lists named meta.json, which also say which clips there are. "table":
            the same in `table`, or in captions.csv or metadata.csv in the folder. "jsonl", "json", "txt": files beside
            the videos, of the same name, and "sidecar" the first of them that is there. "auto": the first of all these.
        field: the key of the caption; None takes the first of `CAPTION_KEYS`.
        table: a csv, parquet, json or jsonl file with a file_name (or path) relative to `folder`.
        missing: what to do without a caption: make it the clip's problem, leave the clip out, take the file's name for
            one, or an empty one.

    Raises:
        FileNotFoundError: no such folder or list.
        ValueError: a list that cannot be read, no videos, or two clips of one name.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"video_folder={str(folder)!r} is not a folder")
    keys = CAPTION_KEYS if field is None else (field,)
    videos = find_videos(folder)
    lists = _find_lists(folder, form, table)
    if lists:
        clips = [clip for source, root in lists for clip in _listed(source, root, folder, keys)]
        named = {clip.file for clip in clips}
        unnamed = [video for video in videos if video not in named]
        notes = [f"{len(unnamed)} videos are in no list and left out, {unnamed[:3]}"] if unnamed else []
    else:
        clips, notes = [_beside(folder, video, form, keys) for video in videos], []
    if not clips:
        raise ValueError(f"video_folder={str(folder)!r} has no videos {sorted(VIDEO_SUFFIXES)} in it")
    with_text = [clip for clip in (_settle(clip, missing) for clip in clips) if clip is not None]
    if len(with_text) < len(clips):
        notes.append(f"{len(clips) - len(with_text)} clips without a caption are skipped")
    return Listing(_named(with_text), tuple(notes))


def find_videos(folder: Path) -> list[str]:
    """Videos in the folder and below it, relative to it, sorted; hidden ones are not taken."""
    found = (path.relative_to(folder) for path in folder.rglob("*") if path.suffix.lower() in VIDEO_SUFFIXES)
    return sorted(path.as_posix() for path in found if not any(part.startswith(".") for part in path.parts))


def read_records(source: Path) -> list[Any]:
    """The entries of a list of clips: json (a list, or one under "items" or "data"), jsonl, csv or parquet.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it cannot be parsed.
    """
    if not source.is_file():
        raise FileNotFoundError(f"list of clips {str(source)!r} does not exist")
    reader = _READERS.get(source.suffix.lower())
    if reader is None:
        raise ValueError(f"list of clips {str(source)!r} is not one of {sorted(_READERS)}")
    try:
        return reader(source)
    except (UnicodeDecodeError, csv.Error, ValueError) as problem:  # json's and arrow's errors are ValueErrors
        raise ValueError(f"list of clips {str(source)!r} cannot be read: {problem}") from problem


def _read_json(source: Path) -> list[Any]:
    found = json.loads(source.read_text(encoding="utf-8-sig"))
    if isinstance(found, dict):
        found = next((found[key] for key in ("items", "data") if isinstance(found.get(key), list)), found)
    if not isinstance(found, list):
        raise ValueError('it holds no list; write [{"file_name": ..., "vila_caption": ...}, ...]')
    return found


def _read_jsonl(source: Path) -> list[Any]:
    return [json.loads(line) for line in source.read_text(encoding="utf-8-sig").splitlines() if line.strip()]


def _read_csv(source: Path) -> list[Any]:
    with source.open(newline="", encoding="utf-8-sig") as lines:
        return list(csv.DictReader(lines))


def _read_parquet(source: Path) -> list[Any]:
    from pyarrow import parquet

    return parquet.read_table(source, partitioning=None).to_pylist()


_READERS: dict[str, Callable[[Path], list[Any]]] = {
    ".json": _read_json,
    ".jsonl": _read_jsonl,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}


def _find_lists(folder: Path, form: str, table: str | Path | None) -> list[tuple[Path, Path]]:
    """(list, folder that its file names start from); [] where captions are beside the videos."""
    if form not in get_args(Format):
        raise ValueError(f"caption_format={form!r} is not one of {list(get_args(Format))}")
    if table is not None:
        if form not in ("auto", "table"):
            raise ValueError(
                f"captions={str(table)!r} is a list, but caption_format={form!r} looks elsewhere; remove one"
            )
        return [(Path(table), folder)]
    if form in ("auto", "meta_json"):
        found = sorted(path for path in folder.rglob(META_JSON) if path.is_file())
        if found or form == "meta_json":
            return [(path, path.parent) for path in found or [folder / META_JSON]]
    if form in ("auto", "table"):
        found = [folder / name for name in CAPTION_TABLES if (folder / name).is_file()]
        if not found and form == "table":
            raise FileNotFoundError(f"{str(folder)!r} has none of {list(CAPTION_TABLES)}; give --captions FILE")
        return [(path, folder) for path in found[:1]]
    return []


def _listed(source: Path, root: Path, folder: Path, keys: tuple[str, ...]) -> list[Clip]:
    """The clips of one list; an entry that makes no sense becomes a clip with a problem."""
    clips = []
    for number, record in enumerate(read_records(source)):
        where = f"entry {number} of {source.relative_to(folder) if source.is_relative_to(folder) else source}"
        name = _first_text(record, FILE_KEYS) if isinstance(record, Mapping) else None
        if name is None:
            clips.append(Clip(f"{source.name}[{number}]", problem=f"{where} has none of {list(FILE_KEYS)}"))
            continue
        file = root / name
        if ".." in Path(name).parts or not file.is_relative_to(folder):
            clips.append(Clip(name, problem=f"{where} names a file outside of the folder"))
            continue
        clips.append(_with(Clip(file.relative_to(folder).as_posix()), record, keys, where))
    return clips


def _with(clip: Clip, record: Mapping[str, Any], keys: tuple[str, ...], where: str) -> Clip:
    """The clip with the caption and the frames that a record gives."""
    try:
        start, end = _frame(record, "start_frame"), _frame(record, "end_frame")
        start = start or 0
        if end is not None and end < start:
            raise ValueError(f"end_frame={end} is before start_frame={start}")
    except ValueError as problem:
        return replace(clip, problem=f"{where}: {problem}")
    return replace(clip, text=caption_in(record, keys), start_frame=start, end_frame=end)


def _frame(record: Mapping[str, Any], key: str) -> int | None:
    value = record.get(key)
    if value is None or value == "" or (isinstance(value, float) and math.isnan(value)):
        return None
    try:
        number = float(value)
    except (TypeError, ValueError) as problem:
        raise ValueError(f"{key}={value!r} is not a number") from problem
    if isinstance(value, bool) or number < 0 or number != int(number):
        raise ValueError(f"{key}={value!r} is not a whole number from 0 on")
    return int(number)


def _beside(folder: Path, video: str, form: str, keys: tuple[str, ...]) -> Clip:
    """The clip of a video whose caption is in a file of the same name."""
    clip, path = Clip(video), folder / video
    for kind in ("jsonl", "json", "txt") if form in ("auto", "sidecar") else (form,):
        source = path.with_suffix(f".{kind}")
        if kind == "jsonl" and not source.is_file():
            source = path.with_name(f"{path.stem.rpartition('_sample')[0] or path.stem}_internvl.json")
        if source.is_file():
            try:
                record = _record_in(source, kind, path.name, keys)
            except (UnicodeDecodeError, ValueError) as problem:
                return replace(clip, problem=f"caption file {source.name!r} cannot be read: {problem}")
            return _with(clip, record, keys, source.name)
    return clip


def _record_in(source: Path, kind: str, video: str, keys: tuple[str, ...]) -> Mapping[str, Any]:
    """What a file beside a video says. Of lines, the first that is about this video, whole and has text."""
    text = source.read_text(encoding="utf-8-sig").strip()
    if kind == "txt":
        return {keys[0]: text}
    if kind == "json":
        found = json.loads(text)
        return {keys[0]: found} if isinstance(found, str) else _as_record(found)
    for line in filter(None, map(str.strip, text.splitlines())):
        try:
            record = _as_record(json.loads(line))
        except ValueError:  # a line that was cut off; another may be whole
            continue
        if record.get("file_name") not in (None, video):
            continue
        other = [] if len(keys) == 1 else [k for k, v in record.items() if isinstance(v, str) and k not in FILE_KEYS]
        if found := caption_in(record, (*keys, *other)):
            return {**record, keys[0]: found}
    return {}


def _as_record(found: Any) -> Mapping[str, Any]:
    if not isinstance(found, Mapping):
        raise ValueError(f"it holds a {type(found).__name__}, not an object with a caption")
    return found


def _first_text(record: Mapping[str, Any], keys: Iterable[str]) -> str | None:
    return next((record[k] for k in keys if isinstance(record.get(k), str) and record[k].strip()), None)


def _settle(clip: Clip, missing: str) -> Clip | None:
    """What `missing` makes of a clip without a caption."""
    if missing not in get_args(Missing):
        raise ValueError(f"missing_caption={missing!r} is not one of {list(get_args(Missing))}")
    if clip.problem or clip.text:
        return clip
    if missing == "skip":
        return None
    if missing == "error":
        return replace(clip, problem="no caption; add one, or choose with --missing_caption skip, stem or empty")
    return replace(clip, text=PurePosixPath(clip.file).stem.replace("_", " ") if missing == "stem" else "")


def _named(clips: Sequence[Clip]) -> tuple[Clip, ...]:
    """Sorted by name.

    Raises:
        ValueError: two clips, or the files made of them, would have the same name.
    """
    count = Counter(clip.file for clip in clips)
    clips = sorted((replace(clip, is_part=count[clip.file] > 1) for clip in clips), key=lambda clip: clip.key)
    first: dict[str, Clip] = {}
    for clip in clips:
        other = first.setdefault(clip.stem, clip)
        if other is not clip and not (clip.problem and other.problem):
            raise ValueError(f"clips {other.key!r} and {clip.key!r} would both be called {clip.stem!r}; rename one")
    return tuple(clips)
