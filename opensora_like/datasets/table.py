"""Read and check a table of clips: numbers as numpy columns, the rest in arrow memory that workers share by fork."""

from __future__ import annotations

import csv
import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

if TYPE_CHECKING:
    from opensora_like.datasets.quarantine import Quarantine

REQUIRED = ("path", "text", "num_frames", "height", "width", "fps")
COUNTS = ("num_frames", "height", "width")  # whole numbers, never missing
NUMBERS = (*COUNTS, "fps", "aspect_ratio", "resolution")
STRINGS = ("path", "text")
_BLOCK_BYTES = 32 << 20  # of a csv read at once; no row may be longer
_HASHED_ROWS = 1 << 20  # at once, so that columns on disk are never whole in memory


@dataclass(frozen=True, eq=False)
class Table:
    """A checked table; a row's number is its identity in plans and random draws.

    Args:
        num_frames, height, width: int64 [N], 0 or more (frames, pixels, pixels).
        fps: float64 [N], NaN where it is unknown, as for images.
        other: the remaining columns, path and text among them.
        fingerprint: of the row order and of what decides the plan: path, num_frames, height, width, fps.
            The same content gives the same one, whatever the file format.
        notes: what is worth a warning, one sentence each.
        quarantine: rows that stay in the table and come into no plan.
    """

    path: str
    num_frames: np.ndarray
    height: np.ndarray
    width: np.ndarray
    fps: np.ndarray
    other: pa.Table
    fingerprint: str
    notes: tuple[str, ...]
    quarantine: Quarantine | None = None

    @property
    def num_rows(self) -> int:
        return len(self.num_frames)

    @property
    def column_names(self) -> list[str]:
        """What `row` can give."""
        return [*self.other.column_names, *COUNTS, "fps"]

    @property
    def aspect_ratio(self) -> np.ndarray:
        """height / width, float64 [N]; NaN where the width is 0."""
        return self.height / np.where(self.width > 0, self.width, np.nan)

    @property
    def resolution(self) -> np.ndarray:
        """Pixels of one frame, int64 [N]."""
        return self.height * self.width

    def row(self, index: int) -> dict[str, Any]:
        """One row by column name; columns without a value there (null, NaN, "") are left out, but `fps` and `text`.

        Raises:
            IndexError: no such row.
        """
        if not 0 <= index < self.num_rows:
            raise IndexError(f"row {index} of {self.path!r}, which has rows 0 to {self.num_rows - 1}")
        values = self.other.slice(index, 1).to_pylist()[0]
        return {"text": "", **present_values(values), **row_numbers(self, index)}

    def columns(self, names: list[str]) -> Iterator[pa.Table]:
        """Columns of `other`, such as path and text, in pieces that follow each other."""
        yield self.other.select(names)

    def paths(self, rows: np.ndarray) -> list[str]:
        """Of some rows, in their order. Args: rows: int64."""
        return self.other["path"].take(pa.array(rows, pa.int64())).to_pylist()

    def with_quarantine(self, quarantine: Quarantine) -> Table:
        """The same table without these rows in its plans."""
        return replace(self, quarantine=quarantine)


def present_values(values: Mapping[str, Any]) -> dict[str, Any]:
    """Without what has no value: null, NaN, ""."""
    return {k: v for k, v in values.items() if v not in (None, "") and not (isinstance(v, float) and math.isnan(v))}


def row_numbers(table: Any, index: int) -> dict[str, Any]:
    """What every row has, from the numeric columns."""
    return {name: int(getattr(table, name)[index]) for name in COUNTS} | {"fps": float(table.fps[index])}


def read_table(path: str | Path) -> Table:
    """Read a table of clips and check it.

    Args:
        path: a csv, parquet, json (a list of records) or jsonl file with the columns of `REQUIRED`. The video
            paths in it are taken as written. `aspect_ratio` and `resolution` are derived, not believed. In a csv,
            columns named score_* are numbers and other columns are text.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it cannot be parsed, has no rows, lacks a column, or a value is missing, negative or of
            another type; the row is named.
    """
    file = Path(path)
    if not file.exists():
        raise FileNotFoundError(f"table {str(path)!r} does not exist; check dataset.data_path")
    reader = _READERS.get(file.suffix.lower())
    if reader is None or file.is_dir():
        raise ValueError(f"table {str(path)!r} is not one of the files that can be read: {sorted(_READERS)}")
    if file.stat().st_size == 0:
        raise ValueError(f"table {str(path)!r} is an empty file; write a header with the columns {list(REQUIRED)}")
    try:
        table = reader(file)
    except (pa.ArrowException, UnicodeDecodeError, json.JSONDecodeError, csv.Error) as problem:
        raise ValueError(f"table {str(path)!r} cannot be parsed as {file.suffix[1:].lower()}: {problem}") from problem
    return table_of(table, path=str(path))


def table_of(columns: pa.Table | Mapping[str, Iterable[Any]], *, path: str = "<memory>") -> Table:
    """Check columns that are in memory already.

    Args:
        columns: an arrow table, or lists by column name.
        path: what errors call it.

    Raises:
        ValueError: as `read_table`.
    """
    table = columns if isinstance(columns, pa.Table) else pa.table({k: _array(v, k, path) for k, v in columns.items()})
    _check_columns(table, path)
    numbers = {name: _numbers(table[name], name, path) for name in (*COUNTS, "fps")}
    for name in COUNTS:
        numbers[name] = _whole(numbers[name], name, path)
    _check_none(numbers["fps"] < 0, "fps", numbers["fps"], path, "is negative; leave it empty if it is unknown")
    for name in STRINGS:
        table = table.set_column(table.schema.get_field_index(name), name, _strings(table[name], name, path))
    _check_paths(table["path"], path)
    for name in table.column_names:
        if name.startswith("score_"):
            values = _numbers(table[name], name, path)
            table = table.set_column(table.schema.get_field_index(name), name, pa.array(values))
    other = table.select([n for n in table.column_names if n not in NUMBERS and not n.startswith("__index_level_")])
    return Table(
        path=path,
        other=other,
        fingerprint=_fingerprint(table["path"], numbers),
        notes=_notes(table, numbers),
        **numbers,
    )


def _read_csv(file: Path) -> pa.Table:
    from pyarrow import csv as arrow_csv

    with file.open(newline="", encoding="utf-8-sig") as lines:
        names = next(csv.reader(lines), [])

    def read(numbers: Iterable[str]) -> pa.Table:
        types = {n: pa.float64() if n in numbers else pa.string() for n in names}
        return arrow_csv.read_csv(
            file,
            read_options=arrow_csv.ReadOptions(block_size=_BLOCK_BYTES),
            parse_options=arrow_csv.ParseOptions(newlines_in_values=True),  # captions have them
            convert_options=arrow_csv.ConvertOptions(column_types=types, strings_can_be_null=False),
        )

    try:
        return read({n for n in names if n in NUMBERS or n.startswith("score_")})
    except pa.ArrowInvalid:
        return read(())  # as text, so that the check of the columns can name the row; or it fails here as well


def _read_parquet(file: Path) -> pa.Table:
    from pyarrow import parquet

    return parquet.read_table(file, partitioning=None)


def _read_json(file: Path) -> pa.Table:
    records = json.loads(file.read_text(encoding="utf-8-sig"))
    if not isinstance(records, list) or not all(isinstance(record, dict) for record in records):
        raise pa.ArrowInvalid("it is not a list of records; write [{'path': ..., 'text': ...}, ...], or jsonl")
    names = dict.fromkeys(name for record in records for name in record)
    return pa.table({n: _array([record.get(n) for record in records], n, str(file)) for n in names})


def _read_jsonl(file: Path) -> pa.Table:
    from pyarrow import json as arrow_json

    return arrow_json.read_json(file, read_options=arrow_json.ReadOptions(block_size=_BLOCK_BYTES))


# suffix -> reader
_READERS: dict[str, Callable[[Path], pa.Table]] = {
    ".csv": _read_csv,
    ".parquet": _read_parquet,
    ".json": _read_json,
    ".jsonl": _read_jsonl,
}


def _array(values: Iterable[Any], name: str, path: str) -> pa.Array:
    """An arrow array, of text where the values are of several types: the checks will then name the row."""
    values = list(values)
    try:
        return pa.array(values)
    except (pa.ArrowInvalid, pa.ArrowTypeError):
        return pa.array([None if v is None else str(v) for v in values])


def _check_columns(table: pa.Table, path: str) -> None:
    names = table.column_names
    if repeated := sorted({n for n in names if names.count(n) > 1}):
        raise ValueError(f"table {path!r} has more than one column named {repeated}; remove all but one")
    missing = [n for n in REQUIRED if n not in names]
    measured = [n for n in missing if n not in STRINGS]
    if missing:
        remedy = [f"run tools/meta.py on it to add {measured}"] if measured else []
        if "path" in missing and "file_path" in names:
            remedy, missing = ["run tools/meta.py on it, which names file_path path and measures the rest"], ["path"]
        remedy += [f"add {written} to the table" for written in [[n for n in missing if n in STRINGS]] if written]
        raise ValueError(f"table {path!r} has no column {missing}, only {names}; {' and '.join(remedy)}")
    if table.num_rows == 0:
        raise ValueError(f"table {path!r} has a header and 0 rows; add at least one clip")


def _numbers(column: pa.ChunkedArray, name: str, path: str) -> np.ndarray:
    """float64 [N], NaN where there is no value."""
    try:
        if _is_text(column.type):
            text = pc.utf8_trim_whitespace(column.cast(pa.large_string()))
            absent = pc.is_in(pc.utf8_lower(text), value_set=pa.array(["", "nan", "null", "none"], pa.large_string()))
            column = pc.if_else(absent, pa.scalar(None, pa.large_string()), text)
        elif pa.types.is_boolean(column.type):
            raise pa.ArrowInvalid("true and false are not numbers")
        return column.cast(pa.float64()).to_numpy().astype(np.float64, copy=False)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, pa.ArrowTypeError) as problem:
        row, value = _first_that_is_no_number(column)
        raise ValueError(
            f"table {path!r}: {name}={value!r} in row {row} (the first is 0) is not a number; "
            f"correct it, or run tools/meta.py again"
        ) from problem


def _first_that_is_no_number(column: pa.ChunkedArray) -> tuple[int, Any]:
    for row, value in enumerate(column.to_pylist()):  # only on the way to an error
        try:
            if isinstance(value, bool):
                return row, value
            float(value if value is not None else "nan")
        except (TypeError, ValueError):
            return row, value
    return 0, column[0].as_py()


def _whole(values: np.ndarray, name: str, path: str) -> np.ndarray:
    """int64 [N] of float64 counts, or an error about those that are none."""
    remedy = "remove these rows, or run tools/meta.py again"
    _check_none(np.isnan(values), name, values, path, f"is missing; {remedy}")
    _check_none(values < 0, name, values, path, f"is negative; {remedy}")
    _check_none((values != np.floor(values)) | (values >= 2**53), name, values, path, f"is no whole number; {remedy}")
    return values.astype(np.int64)


def _check_none(bad: np.ndarray, name: str, values: np.ndarray, path: str, what: str) -> None:
    count = int(np.count_nonzero(bad))
    if count:
        row = int(np.argmax(bad))
        raise ValueError(
            f"table {path!r}: {name}={values[row]:g} in row {row} (the first is 0; {count} of {len(values)} rows) "
            f"{what}"
        )


def _strings(column: pa.ChunkedArray, name: str, path: str) -> pa.ChunkedArray:
    """As large_string: captions of a big table pass the 2 GiB of a string array."""
    if not _is_text(column.type) and not pa.types.is_null(column.type):
        value = next((v for v in column.to_pylist() if v is not None), None)
        raise ValueError(f"table {path!r}: {name}={value!r} is not text, the column holds {column.type}; correct it")
    return column.cast(pa.large_string())


def _check_paths(paths: pa.ChunkedArray, path: str) -> None:
    absent = pc.fill_null(pc.equal(pc.binary_length(paths), 0), True).to_numpy()
    if absent.any():
        row, count = int(np.argmax(absent)), int(absent.sum())
        raise ValueError(
            f"table {path!r}: no path in row {row} (the first is 0; {count} of {len(paths)} rows); remove these rows"
        )


def _is_text(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def _notes(table: pa.Table, numbers: Mapping[str, np.ndarray]) -> tuple[str, ...]:
    notes = []
    twice = table.num_rows - pc.count_distinct(table["path"]).as_py()
    if twice:
        notes.append(f"{twice} of {table.num_rows} rows repeat the path of another row; each counts as a clip")
    blank = pc.fill_null(pc.equal(pc.binary_length(pc.utf8_trim_whitespace(table["text"])), 0), True)
    empty = pc.sum(blank).as_py()
    if empty:
        notes.append(f"{empty} of {table.num_rows} rows have an empty text; they train without a caption")
    zero = int(np.count_nonzero((numbers["num_frames"] == 0) | (numbers["height"] == 0) | (numbers["width"] == 0)))
    if zero:
        notes.append(f"{zero} of {table.num_rows} rows have num_frames, height or width 0; they fit no bucket")
    return tuple(notes)


class Fingerprint:
    """The fingerprint of a table that is seen in pieces: the paths as they come, the numbers at the end.

    Lengths and bytes of the paths are hashed apart, so that neither arrow's chunks nor ours show.
    """

    def __init__(self) -> None:
        self._lengths, self._texts = hashlib.blake2b(digest_size=16), hashlib.blake2b(digest_size=16)
        self._num_rows = 0

    def add(self, paths: pa.ChunkedArray) -> None:
        """Args: paths: large_string, no nulls; the next rows."""
        for chunk in paths.chunks:
            offsets = np.frombuffer(chunk.buffers()[1], np.int64)[chunk.offset : chunk.offset + len(chunk) + 1]
            if len(chunk):
                self._lengths.update(np.diff(offsets))
                data = chunk.buffers()[2]
                self._texts.update(memoryview(data)[offsets[0] : offsets[-1]] if data is not None else b"")
        self._num_rows += len(paths)

    def of(self, numbers: Mapping[str, np.ndarray]) -> str:
        """Args: numbers: the columns of `COUNTS` (whole numbers of any width) and fps, of all rows."""
        texts = self._lengths.digest() + self._texts.digest()
        whole = hashlib.blake2b(f"{self._num_rows}/".encode() + texts, digest_size=16)
        for name in (*COUNTS, "fps"):
            column = numbers[name]
            for start in range(0, len(column), _HASHED_ROWS):
                part = column[start : start + _HASHED_ROWS]
                if name == "fps":  # one bit pattern for NaN, and for 0
                    whole.update(np.where(np.isnan(part), np.nan, part + 0.0))
                else:
                    whole.update(part.astype(np.int64, copy=False))
        return whole.hexdigest()


def _fingerprint(paths: pa.ChunkedArray, numbers: Mapping[str, np.ndarray]) -> str:
    fingerprint = Fingerprint()
    fingerprint.add(paths)
    return fingerprint.of(numbers)
