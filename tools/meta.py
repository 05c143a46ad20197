"""Measure the clips of a table: adds height, width, fps, num_frames, aspect_ratio and resolution to every row.

python tools/meta.py --input clips.csv --output clips_meta.csv [--num_workers N] [--resume]
python tools/meta.py --input clips.csv --output clips_meta.csv --engine ray          on all machines of a ray cluster

--input is a csv, parquet, json or jsonl file with the column `path` (looked up from the current folder, then from the
folder of the table, or from --data_root), or a folder. A table without `path` may name it `file_path`, and a json may
hold its rows as {"samples": [...]}, as metadata.json of other trainers do: the column becomes `path`. A folder is
searched with all below it for videos and images; the caption of a.mp4 is the text of a.txt beside it, or comes from
captions.csv or metadata.csv in the folder, with the columns path (or file_name), relative to the folder, and text (or
caption).

--output is a csv or parquet file. Existing columns stay as they are, the measured ones follow. Rows whose file cannot
be read are left out and listed with the reason in <output>_errors.csv. Files are not decoded, see video_io.probe.

Exit status: 0, or 1 if no file could be read, or 2 if the input or the command line is wrong.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

ROOT = str(Path(__file__).resolve().parents[1])
if ROOT not in sys.path:  # works from a checkout that is not installed
    sys.path.insert(0, ROOT)

from opensora_like.datasets.clip_facts import Engine, Journal, Result, check_engine, measure_all  # noqa: E402
from opensora_like.datasets.video_io import IMAGE_SUFFIXES, VIDEO_SUFFIXES, find_file  # noqa: E402
from opensora_like.publish import is_draft, staged  # noqa: E402

if TYPE_CHECKING:
    import pandas as pd

MEASURED = ("height", "width", "fps", "num_frames", "aspect_ratio", "resolution")
READABLE = (".csv", ".parquet", ".json", ".jsonl")
WRITABLE = (".csv", ".parquet")
OTHER_PATH = "file_path"  # what other trainers call the column `path`
CAPTION_TABLES = ("captions.csv", "metadata.csv")


def read_input(path: Path) -> pd.DataFrame:
    """The rows to measure.

    Raises:
        FileNotFoundError: no such file or folder.
        ValueError: another suffix, not parseable, no column `path`, or no rows.
    """
    import pandas as pd

    if path.is_dir():
        return _read_folder(path)
    if not path.exists():
        raise FileNotFoundError(f"--input {str(path)!r} does not exist")
    suffix = path.suffix.lower()
    try:
        if suffix == ".csv":  # as text: nothing is reformatted, and a caption "NA" stays one
            table = pd.read_csv(path, dtype=str, keep_default_na=False, encoding="utf-8-sig")
        elif suffix == ".parquet":
            table = pd.read_parquet(path)
        elif suffix in (".json", ".jsonl"):
            text = path.read_text(encoding="utf-8-sig")
            lines = [json.loads(line) for line in text.splitlines() if line.strip()]
            table = pd.DataFrame(lines if suffix == ".jsonl" else _rows_of(json.loads(text)))
        else:
            raise ValueError(f"the suffix {suffix!r} is not one of {READABLE}")
    except (ValueError, OSError) as problem:  # parsers' errors are ValueErrors, so is ArrowInvalid
        raise ValueError(f"--input {str(path)!r} cannot be read: {problem}") from problem
    if "path" not in table.columns and OTHER_PATH in table.columns:
        table = table.rename(columns={OTHER_PATH: "path"})
    if "path" not in table.columns:
        raise ValueError(f"--input {str(path)!r} has no column 'path', only {list(table.columns)}; add it")
    if not len(table):
        raise ValueError(f"--input {str(path)!r} has 0 rows")
    if bad := [i for i, value in enumerate(table["path"]) if not isinstance(value, str) or not value]:
        raise ValueError(f"--input {str(path)!r} has no path in {len(bad)} rows, first in row {bad[0]} (from 0)")
    return table


def _rows_of(content: Any) -> Any:
    """The list of rows of a json, which may be within ``{"samples": [...]}``."""
    return content["samples"] if isinstance(content, dict) and isinstance(content.get("samples"), list) else content


def _read_folder(folder: Path) -> pd.DataFrame:
    import pandas as pd

    kinds = IMAGE_SUFFIXES | VIDEO_SUFFIXES
    files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in kinds and p.is_file() and not is_draft(p))
    if not files:
        raise ValueError(f"--input {str(folder)!r} has no video or image in it; known are {sorted(kinds)}")
    captions = _read_captions(folder)
    texts = []
    for file in files:
        beside = file.with_suffix(".txt")
        written = beside.read_text(encoding="utf-8-sig").strip() if beside.is_file() else ""
        texts.append(written or captions.get(file.relative_to(folder).as_posix(), ""))
    if missing := sum(not text for text in texts):
        print(f"{missing} of {len(files)} files have no caption", file=sys.stderr)
    return pd.DataFrame({"path": [str(file) for file in files], "text": texts})


def _read_captions(folder: Path) -> dict[str, str]:
    """Path relative to the folder -> caption."""
    import pandas as pd

    source = next((folder / name for name in CAPTION_TABLES if (folder / name).is_file()), None)
    if source is None:
        return {}
    table = pd.read_csv(source, dtype=str, keep_default_na=False, encoding="utf-8-sig")
    names = [next((n for n in pair if n in table), None) for pair in (("path", "file_name"), ("text", "caption"))]
    if None in names:
        raise ValueError(f"{str(source)!r} needs the columns path and text, it has {list(table.columns)}")
    return {Path(name).as_posix(): text for name, text in zip(table[names[0]], table[names[1]], strict=True)}


def add_columns(table: pd.DataFrame, results: list[Result]) -> pd.DataFrame:
    """The rows that could be read, the measured columns after the others.

    Args:
        results: one per row.
    """
    table = table.drop(columns=[name for name in MEASURED if name in table.columns])
    table["height"] = [r.height for r in results]
    table["width"] = [r.width for r in results]
    table["fps"] = [r.fps for r in results]
    table["num_frames"] = [r.num_frames for r in results]
    table["aspect_ratio"] = table["height"] / table["width"].where(table["width"] > 0)
    table["resolution"] = table["height"] * table["width"]
    return table[[not r.problem for r in results]]


def write_table(table: pd.DataFrame, path: Path) -> None:
    """As csv or parquet by the suffix; complete or not at all."""
    import pandas as pd

    path.parent.mkdir(parents=True, exist_ok=True)
    with staged(path) as draft:
        if path.suffix.lower() == ".csv":
            table.to_csv(draft, index=False)
        else:
            for name in [n for n in table.columns if n.startswith("score_") and table[n].dtype.kind not in "fiu"]:
                table = table.assign(**{name: pd.to_numeric(table[name], errors="coerce")})
            table.to_parquet(draft, index=False)


def run(options: argparse.Namespace, *, show: Callable[..., Any]) -> int:
    """The whole command. Returns: the exit status, 0 or 1.

    Args:
        show: like tqdm.

    Raises:
        ValueError, FileNotFoundError: the input or an option is wrong.
    """
    source, target = Path(options.input), Path(options.output)
    if target.suffix.lower() not in WRITABLE:
        raise ValueError(f"--output {str(target)!r}: the suffix is not one of {WRITABLE}")
    if target.exists() and source.exists() and target.samefile(source):
        raise ValueError(f"--output {str(target)!r} is the input, whose unreadable rows would be lost; choose another")
    check_engine(options.engine)
    table = read_input(source)
    table_path = source if source.is_file() else Path.cwd() / "table.csv"  # rows of a folder start here
    files = [find_file(path, table_path=table_path, data_root=options.data_root) for path in table["path"]]
    beside = sum(file != path for file, path in zip(files, table["path"], strict=True))
    if options.data_root is not None:
        print(f"paths start at {options.data_root!r}: train with dataset.data_root set to it", file=sys.stderr)
    elif beside and target.resolve().parent != source.resolve().parent:
        print(
            f"{beside} paths start at {str(source.parent)!r}: train with dataset.data_root set to it", file=sys.stderr
        )
    journal = Journal(target.with_name(f"{target.stem}_progress.jsonl"), resume=options.resume)
    missing = [file for file in dict.fromkeys(files) if file not in journal.results]
    if len(missing) < len(set(files)):
        print(f"{len(set(files)) - len(missing)} of {len(set(files))} files were measured before", file=sys.stderr)
    measured = measure_all(
        missing, num_workers=options.num_workers, timeout_seconds=options.timeout_seconds, engine=options.engine
    )
    for file, result in show(measured, total=len(missing), unit="file"):
        journal.add(file, result)
    results = [journal.results[file] for file in files]
    return _finish(table, results, target, journal)


def _finish(table: pd.DataFrame, results: list[Result], target: Path, journal: Journal) -> int:
    import pandas as pd

    bad = [(path, r.problem) for path, r in zip(table["path"], results, strict=True) if r.problem]
    errors = target.with_name(f"{target.stem}_errors.csv")
    if bad:
        write_table(pd.DataFrame(bad, columns=["path", "reason"]), errors)
        print(f"{len(bad)} of {len(results)} rows cannot be read, see {str(errors)!r}", file=sys.stderr)
    else:
        errors.unlink(missing_ok=True)  # of an earlier run
    good = len(results) - len(bad)
    if good:
        write_table(add_columns(table, results), target)
        print(f"wrote {good} rows to {str(target)!r}", file=sys.stderr)
    else:
        print(f"no row of {len(results)} can be read, so {str(target)!r} was not written; {bad[0]}", file=sys.stderr)
    journal.remove()
    return 0 if good else 1


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", required=True, help="table or folder")
    parser.add_argument("--output", required=True, help="csv or parquet")
    parser.add_argument("--data_root", "--data-root", help="folder that the paths in the table start from")
    parser.add_argument("--num_workers", "--num-workers", type=int, help="processes; default all cores, 0 is this one")
    parser.add_argument("--resume", action="store_true", help="go on with a run that was cut off")
    parser.add_argument("--timeout_seconds", "--timeout-seconds", type=float, default=60.0, help="for one file")
    parser.add_argument("--engine", choices=get_args(Engine), default="processes")
    options = parser.parse_args(arguments)
    if options.engine == "ray" and options.num_workers == 0:
        parser.error("--num_workers 0 is this process, which --engine ray does not use; leave it out or give 1 or more")
    if (options.num_workers or 0) < 0 or not options.timeout_seconds > 0:
        parser.error("--num_workers must be 0 or more, --timeout_seconds above 0")
    return options


def main(arguments: list[str] | None = None) -> int:
    """Run with command-line arguments. Returns: the exit status."""
    from tqdm import tqdm

    options = parse(arguments)
    try:
        return run(options, show=tqdm)
    except (ValueError, OSError) as problem:
        print(f"meta: {problem}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("meta: stopped; the same command with --resume goes on from here", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
