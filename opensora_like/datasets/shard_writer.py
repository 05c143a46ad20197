"""Cuts a table into parquet shards, with a manifest and the index of its numbers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from opensora_like.datasets.index import hidden_beside, new_array, remove_folder
from opensora_like.datasets.shards import (
    COLUMN_TYPES,
    COLUMNS,
    FOOTER_KEY,
    MANIFEST,
    ROWS_PER_GROUP,
    Shard,
    ShardedTable,
)
from opensora_like.datasets.table import COUNTS, REQUIRED, Fingerprint, Table, read_table, table_of

ROWS_PER_SHARD = 100_000


def write_shards(
    source: str | Path, *, num_shards: int | None = None, folder: str | Path | None = None, replace: bool = False
) -> ShardedTable:
    """Cut a table into shards and check its rows on the way; a parquet table is never whole in memory.

    Args:
        num_shards: None makes shards of 100,000 rows.
        folder: None takes the source's path without its suffix.
        replace: put them in the place of older shards.

    Raises:
        FileNotFoundError: no such table.
        ValueError: as `read_table`, or `folder` exists.
    """
    source = Path(source)
    target = Path(folder) if folder is not None else source.with_suffix("")
    if target.exists() and not (replace and (target / MANIFEST).is_file()):
        what = "exists; replace its shards with --replace" if (target / MANIFEST).is_file() else "is in the way"
        raise ValueError(f"{str(target)!r} {what}, or name another folder with --output")
    num_rows, tables = _read_in_pieces(source)
    if num_shards is not None and not 1 <= num_shards <= num_rows:
        raise ValueError(f"num_shards={num_shards!r} must be from 1 to {num_rows}, the rows of {str(source)!r}")
    per_shard = ROWS_PER_SHARD if num_shards is None else -(-num_rows // num_shards)
    about = {"name": source.name, "bytes": source.stat().st_size}
    staged = hidden_beside(target)
    try:
        staged.mkdir(parents=True)
        write_pieces(tables, staged, num_rows=num_rows, per_shard=per_shard, source=about)
        if replace and target.exists():
            remove_folder(target)
        staged.rename(target)
    finally:
        shutil.rmtree(staged, ignore_errors=True)
    return ShardedTable(target)


def _read_in_pieces(source: Path) -> tuple[int, Iterator[pa.Table]]:
    from pyarrow import parquet

    if source.suffix.lower() != ".parquet":
        table = read_table(source)
        whole = table.other
        for name in COLUMNS:
            whole = whole.append_column(name, pa.array(getattr(table, name)))
        return table.num_rows, iter([whole])
    if not source.is_file():
        raise FileNotFoundError(f"table {str(source)!r} does not exist")
    try:
        file = parquet.ParquetFile(source)
    except pa.ArrowException as problem:
        raise ValueError(f"table {str(source)!r} cannot be parsed as parquet: {problem}") from problem
    if missing := [name for name in REQUIRED if name not in file.schema_arrow.names]:
        raise ValueError(f"table {str(source)!r} has no column {missing}, only {file.schema_arrow.names}")
    if file.metadata.num_rows == 0:
        raise ValueError(f"table {str(source)!r} has 0 rows; add at least one clip")
    return file.metadata.num_rows, (pa.table(batch) for batch in file.iter_batches(batch_size=20_000))


def write_pieces(
    tables: Iterable[pa.Table], folder: Path, *, num_rows: int, per_shard: int, source: dict[str, Any]
) -> None:
    """Write rows that come in pieces as shards, their index and their manifest into an empty folder.

    Args:
        tables: pieces with the columns of a table of clips, `num_rows` rows in all.
        per_shard: rows; the last shard has fewer.
        source: ``{"name", "bytes"}`` of what they come from.
    """
    columns = folder / "index" / "columns"
    columns.mkdir(parents=True)
    numbers = {name: new_array(columns / f"{name}.npy", COLUMN_TYPES[name], num_rows) for name in COLUMNS}
    whole, shards, first, names = Fingerprint(), [], 0, []
    for piece in _pieces_of(tables, per_shard):
        checked = table_of(piece, path=f"{source['name']} (rows from {first} on)")
        digest, table = _as_written(checked)
        name = f"{len(shards) + 1:05d}.parquet"
        _write_parquet(table, folder / name, digest)
        shards.append(Shard(name, checked.num_rows, (folder / name).stat().st_size, digest))
        whole.add(table["path"])
        for column in COLUMNS:
            numbers[column][first : first + checked.num_rows] = getattr(checked, column)
        first, names = first + checked.num_rows, table.column_names
    fingerprint = whole.of(numbers)
    columns.rename(folder / "index" / f"columns-{fingerprint[:16]}")
    manifest = {"version": 1, "fingerprint": fingerprint, "num_rows": first, "columns": names, "source": source}
    manifest |= {"rows_per_group": ROWS_PER_GROUP, "shards": shards}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=0))


def _pieces_of(tables: Iterable[pa.Table], size: int) -> Iterator[pa.Table]:
    """The same rows in tables of `size` rows, the last one smaller."""
    waiting: list[pa.Table] = []
    for table in tables:
        waiting.append(table)
        while (have := sum(t.num_rows for t in waiting)) >= size:
            joined = pa.concat_tables(waiting)
            yield joined.slice(0, size)
            waiting = [joined.slice(size)] if have > size else []
    if waiting:
        yield pa.concat_tables(waiting)


def _as_written(checked: Table) -> tuple[str, pa.Table]:
    table = checked.other
    for name in COLUMNS:
        values = getattr(checked, name)
        if name in COUNTS and values.max() > np.iinfo(np.int32).max:
            raise ValueError(f"{checked.path}: {name}={values.max()} is above {np.iinfo(np.int32).max}; remove the row")
        table = table.append_column(name, pa.array(values))
    return checked.fingerprint, table


def _write_parquet(table: pa.Table, file: Path, digest: str) -> None:
    from pyarrow import parquet

    schema = table.schema.with_metadata({FOOTER_KEY: digest})
    with parquet.ParquetWriter(file, schema, compression="zstd") as writer:
        writer.write_table(table.replace_schema_metadata(schema.metadata), row_group_size=ROWS_PER_GROUP)
