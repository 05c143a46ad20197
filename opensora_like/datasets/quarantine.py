"""Rows that are kept out of every plan: a list of them, read and compared with its table."""

from __future__ import annotations

import hashlib
import io
import json as plain_json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from opensora_like.runtime import logger

if TYPE_CHECKING:
    from opensora_like.datasets.shards import ShardedTable
    from opensora_like.datasets.table import Table

COLUMNS = ("row", "path")
WHERE = "dataset.quarantine"


@dataclass(frozen=True, eq=False)
class Quarantine:
    """Args: path: of the list. rows: int64, rising, each once."""

    path: str
    rows: np.ndarray

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def key(self) -> dict[str, Any]:
        """For `plan.order_key`: it tells the rows, not how or in which order they were written."""
        digest = hashlib.blake2b(self.rows.astype(np.int64), digest_size=16).hexdigest()
        return {"rows": len(self.rows), "digest": digest}


def read_quarantine(path: str | Path, table: Table | ShardedTable) -> Quarantine:
    """Read a list of rows.

    Args:
        path: a csv (tools/doctor.py writes one) or a jsonl file (a run's bad_samples.jsonl) with the columns row, from
            0, and path. Other columns are for the reader; a row may be listed more than once. A line of jsonl that
            a kill or a full disk cut off does not count, and a warning tells which it is.
        table: whose rows they are.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it cannot be parsed, or names a row that the table does not have or has another path for.
    """
    file = Path(path)
    where = f"{WHERE}={str(path)!r}"
    if not file.is_file():
        raise FileNotFoundError(f"{where} does not exist; tools/doctor.py writes it")
    listed = _read(file, where)
    rows = listed["row"].to_numpy()
    if outside := np.flatnonzero((rows < 0) | (rows >= table.num_rows)).tolist():
        raise ValueError(
            f"{where}: row {rows[outside[0]]} is not in table {table.path!r}, which has rows 0 to "
            f"{table.num_rows - 1}; run tools/doctor.py on this table again"
        )
    unique, first = np.unique(rows, return_index=True)
    written = listed["path"].take(pa.array(first)).to_pylist()
    for row, old, now in zip(unique.tolist(), written, table.paths(unique), strict=True):
        if old != now and not (old or "").endswith("/" + now.removeprefix("./")):  # a run writes where it found it
            raise ValueError(
                f"{where}: row {row} is {old!r} there and {now!r} in table {table.path!r}; the table has changed, run "
                f"tools/doctor.py on it again"
            )
    return Quarantine(str(path), unique.astype(np.int64))


def _read(file: Path, where: str) -> pa.Table:
    from pyarrow import csv, json

    types = {"row": pa.int64(), "path": pa.string()}
    try:
        if file.suffix.lower() == ".csv":
            options = csv.ConvertOptions(column_types=types, include_columns=COLUMNS, strings_can_be_null=False)
            table = csv.read_csv(file, parse_options=csv.ParseOptions(newlines_in_values=True), convert_options=options)
        elif file.suffix.lower() == ".jsonl":
            schema = pa.schema(types)
            options = json.ParseOptions(explicit_schema=schema, unexpected_field_behavior="ignore")
            lines = _whole_lines(file)
            table = json.read_json(io.BytesIO(lines), parse_options=options) if lines else schema.empty_table()
        else:
            raise pa.ArrowInvalid("its suffix is neither .csv nor .jsonl")
    except (pa.ArrowException, UnicodeDecodeError) as problem:
        raise ValueError(f"{where} cannot be read: {problem}; it needs the columns {list(COLUMNS)}") from problem
    if missing := [name for name in COLUMNS if table[name].null_count]:
        raise ValueError(f"{where} has rows without {missing}; remove these lines, or run tools/doctor.py again")
    return table


def _whole_lines(file: Path) -> bytes:
    """The lines that are objects; all lines of a file that has no such, which is refused and is not an empty list."""
    lines = file.read_bytes().splitlines(keepends=True)
    broken = {number for number, line in enumerate(lines, 1) if line.strip() and not _is_object(line)}
    if len(broken) == sum(1 for line in lines if line.strip()) > 1:
        return b"".join(lines)
    for number in sorted(broken):
        logger.warning(
            "%s:%d is not a whole line of json and is left out: %r; where it was written by hand, mend it",
            *(file, number, lines[number - 1][:120].decode(errors="replace").strip()),
        )
    return b"".join(line for number, line in enumerate(lines, 1) if number not in broken)


def _is_object(line: bytes) -> bool:
    try:
        return isinstance(plain_json.loads(line), dict)
    except ValueError:  # of json, or of a letter that was cut in two
        return False
