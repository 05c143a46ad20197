"""A table too large for memory: parquet shards with a manifest, an index of its numbers, captions read by row."""

from __future__ import annotations

import hashlib
import json
import os
from collections import OrderedDict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow as pa

from opensora_like.datasets.bucket import Buckets
from opensora_like.datasets.classes import RowClasses
from opensora_like.datasets.index import Mapped, make_folder_once, new_array, open_array, remove_folder
from opensora_like.datasets.row_index import RowIndex, build_row_index
from opensora_like.datasets.table import COUNTS, Fingerprint, present_values, row_numbers

if TYPE_CHECKING:
    from opensora_like.datasets.quarantine import Quarantine

MANIFEST = "manifest.json"
FOOTER_KEY = "opensora_like.shard"
ROWS_PER_GROUP = 1_000  # what reading one row decodes
OPEN_FILES, OPEN_GROUPS = 16, 16  # kept by each process
COLUMNS = (*COUNTS, "fps")
COLUMN_TYPES = {**dict.fromkeys(COUNTS, np.int32), "fps": np.float64}


class Shard(NamedTuple):
    """One file. Args: digest: `Fingerprint` of its rows, in the manifest and in the file's footer."""

    name: str
    rows: int
    bytes: int
    digest: str


class ShardedTable:
    """A table in a folder of shards with the interface of `Table`; what it holds in memory does not grow with it.

    num_frames, height, width (int32) and fps (float64) are mapped from an index that is made from the shards
    when it is not there. All processes of a machine share its pages.

    Args:
        folder: what `shard_writer.write_shards` wrote.
        cache: folder for the index; None puts it into "index" in `folder`.
        quarantine: rows that stay in the table and come into no plan.

    Raises:
        FileNotFoundError: the folder, its manifest or a shard is not there.
        ValueError: a shard is truncated or altered, or is not one of the manifest. What is inside of the files is
            compared when the index is made, and the order of the files whenever one is opened.
    """

    notes: tuple[str, ...] = ()

    def __init__(
        self, folder: str | Path, *, cache: str | Path | None = None, quarantine: Quarantine | None = None
    ) -> None:
        self.folder, self._cache, self.quarantine = Path(folder), cache, quarantine
        manifest = _read_manifest(self.folder)
        self.path = str(folder)
        self.fingerprint: str = manifest["fingerprint"]
        self.num_rows: int = manifest["num_rows"]
        self.column_names: list[str] = manifest["columns"]
        self.source: dict[str, Any] = manifest["source"]
        self.shards = [Shard(*entry) for entry in manifest["shards"]]
        self.first_rows = np.concatenate([[0], np.cumsum([shard.rows for shard in self.shards])])
        self.index_folder = Path(cache) if cache is not None else self.folder / "index"
        self._check_files()
        self._indexes: dict[str, RowIndex] = {}
        self._open_as = os.getpid()
        self._files: OrderedDict[int, Any] = OrderedDict()
        self._groups: OrderedDict[tuple[int, int], pa.Table] = OrderedDict()

    def __reduce__(self):
        return _reopen, (self.folder, self._cache, self.quarantine)

    def __len__(self) -> int:
        return self.num_rows

    @property
    def num_frames(self) -> np.ndarray:
        """Frames, int32 [N]."""
        return self._columns["num_frames"]

    @property
    def height(self) -> np.ndarray:
        """Pixels, int32 [N]."""
        return self._columns["height"]

    @property
    def width(self) -> np.ndarray:
        """Pixels, int32 [N]."""
        return self._columns["width"]

    @property
    def fps(self) -> np.ndarray:
        """Frames per second, float64 [N]; NaN where unknown."""
        return self._columns["fps"]

    def row(self, index: int) -> dict[str, Any]:
        """As `Table.row`; it decodes the row group that the row is in, of which the last few are kept.

        Raises:
            IndexError: no such row.
            FileNotFoundError, ValueError: the shard is gone, truncated or another one.
        """
        if not 0 <= index < self.num_rows:
            raise IndexError(f"row {index} of {self.path!r}, which has rows 0 to {self.num_rows - 1}")
        shard = int(np.searchsorted(self.first_rows, index, side="right")) - 1
        group, place = divmod(int(index - self.first_rows[shard]), ROWS_PER_GROUP)
        values = self._group(shard, group).slice(place, 1).to_pylist()[0]
        return {"text": "", **present_values(values), **row_numbers(self, index)}

    def columns(self, names: list[str]) -> Iterator[pa.Table]:
        """Columns such as path and text, shard after shard."""
        for number in range(len(self.shards)):
            yield self._open(number).read(columns=names, use_threads=False)

    def paths(self, rows: np.ndarray) -> list[str]:
        """Of some rows, in their order; only the row groups that they are in are read. Args: rows: int64."""
        found = np.empty(len(rows), object)
        shards = np.searchsorted(self.first_rows, rows, side="right") - 1
        for number in np.unique(shards).tolist():
            here = np.flatnonzero(shards == number)
            groups, places = np.divmod(rows[here] - self.first_rows[number], ROWS_PER_GROUP)
            wanted, nth = np.unique(groups, return_inverse=True)
            column = self._open(number).read_row_groups(wanted.tolist(), columns=["path"], use_threads=False)["path"]
            found[here] = column.take(pa.array(nth * ROWS_PER_GROUP + places)).to_pylist()
        return found.tolist()

    def with_quarantine(self, quarantine: Quarantine) -> ShardedTable:
        """The same table without these rows in its plans."""
        return _reopen(self.folder, self._cache, quarantine)

    def row_index(self, buckets: Buckets, *, fps_max: float | None) -> RowIndex:
        """The buckets of the rows before any draw, mapped from the index; made when they are not there.

        Raises:
            ValueError: as `build_row_index`.
        """
        text = json.dumps([buckets.config, buckets.multiple, None if fps_max is None else float(fps_max)])
        key = f"buckets2-{self.fingerprint[:16]}-{hashlib.blake2b(text.encode(), digest_size=8).hexdigest()}"
        if key not in self._indexes:
            columns = self._columns
            folder = self._make(key, lambda f: _write_row_index(f, columns, buckets, fps_max))
            arrays = [Mapped(folder / f"{name}.npy") for name in ("settled", "open_rows", "open_codes")]
            classes = RowClasses(np.load(folder / "asks.npy"), buckets)
            self._indexes[key] = RowIndex(arrays[0], np.load(folder / "bounds.npy"), *arrays[1:], classes)
        return self._indexes[key]

    def forget_epochs(self, prefix: str, *, before: int) -> None:
        """Delete plans of epochs that are over; who has one mapped keeps it."""
        for folder in self.index_folder.glob(f"{prefix}*"):
            epoch = folder.name.removeprefix(prefix)
            if epoch.isdecimal() and int(epoch) < before:
                remove_folder(folder)

    def verify(self) -> None:
        """Read every shard and compare its rows with the manifest.

        Raises:
            FileNotFoundError, ValueError: as the constructor.
        """
        for number in range(len(self.shards)):
            self._read_numbers(number)

    @cached_property
    def _columns(self) -> dict[str, np.ndarray]:
        folder = self._make(f"columns-{self.fingerprint[:16]}", self._write_columns)
        return {name: open_array(folder / f"{name}.npy") for name in COLUMNS}

    def _make(self, name: str, build: Callable[[Path], None]) -> Path:
        try:
            return make_folder_once(self.index_folder / name, build)
        except PermissionError as problem:
            raise PermissionError(
                f"table {self.path!r}: its index cannot be written to {str(self.index_folder)!r}: {problem}; "
                f"name a folder for it"
            ) from problem

    def _write_columns(self, folder: Path) -> None:
        out = {name: new_array(folder / f"{name}.npy", COLUMN_TYPES[name], self.num_rows) for name in COLUMNS}

        def copy(number: int) -> None:
            first, last = self.first_rows[number : number + 2]
            for name, values in self._read_numbers(number).items():
                out[name][first:last] = values

        with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as threads:
            list(threads.map(copy, range(len(self.shards))))

    def _read_numbers(self, number: int) -> dict[str, np.ndarray]:
        """The numeric columns of a shard whose content was compared with the manifest."""
        table = self._open(number).read(columns=["path", *COLUMNS], use_threads=False)
        numbers = {name: table[name].to_numpy() for name in COLUMNS}
        digest = Fingerprint()
        digest.add(table["path"].cast(pa.large_string()))
        shard = self.shards[number]
        if (found := digest.of(numbers)) != shard.digest:
            raise ValueError(
                f"shard {str(self.folder / shard.name)!r} holds other rows than when it was written (fingerprint "
                f"{found}, manifest {shard.digest}); write the shards again"
            )
        return numbers

    def _check_files(self) -> None:
        known = {shard.name for shard in self.shards}
        if extra := sorted(f.name for f in self.folder.glob("*.parquet") if f.name not in known):
            raise ValueError(f"{str(self.folder)!r} has {extra}, not in its {MANIFEST}; remove them, or shard again")
        for shard in self.shards:
            self._check_size(shard)

    def _check_size(self, shard: Shard) -> None:
        file = self.folder / shard.name
        try:
            size = file.stat().st_size
        except FileNotFoundError as problem:
            raise FileNotFoundError(
                f"shard {str(file)!r} is missing; its {shard.rows} rows are in the {MANIFEST}; copy it there, or "
                f"write the shards again"
            ) from problem
        if size != shard.bytes:
            what = "truncated" if size < shard.bytes else "altered"
            raise ValueError(
                f"shard {str(file)!r} is {what}: it has {size} bytes and the {MANIFEST} says {shard.bytes}; copy it "
                f"again, or write the shards again"
            )

    def _open(self, number: int) -> Any:
        """A shard as a ParquetFile, its footer compared with the manifest."""
        from pyarrow import parquet

        shard = self.shards[number]
        self._check_size(shard)
        try:
            file = parquet.ParquetFile(self.folder / shard.name, memory_map=True)
        except pa.ArrowException as problem:
            raise ValueError(
                f"shard {str(self.folder / shard.name)!r} is damaged: {problem}; copy it again"
            ) from problem
        stored = (file.metadata.metadata or {}).get(FOOTER_KEY.encode(), b"").decode()
        if stored != shard.digest:
            same = [other.name for other in self.shards if other.digest == stored]
            raise ValueError(
                f"shard {str(self.folder / shard.name)!r} is not the one of the {MANIFEST} (fingerprint "
                f"{stored or 'none'}, {MANIFEST} {shard.digest}){f': it is {same[0]}' if same else ''}; the files were "
                f"reordered or replaced: give each its name back, or write the shards again"
            )
        return file

    def _group(self, shard: int, group: int) -> pa.Table:
        if self._open_as != os.getpid():  # forked: files are the parent's
            self._open_as = os.getpid()
            self._files.clear()
            self._groups.clear()

        def read() -> pa.Table:
            file = _recent(self._files, shard, OPEN_FILES, lambda: self._open(shard))
            names = [name for name in self.column_names if name not in COLUMNS]
            return file.read_row_group(group, columns=names, use_threads=False)

        return _recent(self._groups, (shard, group), OPEN_GROUPS, read)


def _reopen(folder: Path, cache: str | Path | None, quarantine: Quarantine | None) -> ShardedTable:
    return ShardedTable(folder, cache=cache, quarantine=quarantine)


def _recent(kept: OrderedDict, key: Any, limit: int, make: Callable[[], Any]) -> Any:
    if key not in kept:
        kept[key] = make()
        if len(kept) > limit:
            kept.popitem(last=False)
    kept.move_to_end(key)
    return kept[key]


def _read_manifest(folder: Path) -> dict[str, Any]:
    file = folder / MANIFEST
    if not file.is_file():
        raise FileNotFoundError(
            f"table {str(folder)!r} has no {MANIFEST}; write it with python scripts/cnv/shard.py {folder}.parquet"
        )
    try:
        manifest = json.loads(file.read_text())
        if manifest["version"] != 1 or manifest["rows_per_group"] != ROWS_PER_GROUP:
            raise KeyError("version")
    except (json.JSONDecodeError, KeyError, TypeError) as problem:
        raise ValueError(f"{str(file)!r} is not a manifest that can be read: {problem!r}; shard again") from problem
    return manifest


def open_shards(path: str | Path, *, cache: str | Path | None = None) -> ShardedTable:
    """The shards of a table.

    Args:
        path: the folder, or the table that was cut up: "clips.parquet" has its shards in "clips" beside it. The table
            itself need not be there any more.
        cache: see `ShardedTable`.

    Raises:
        FileNotFoundError, ValueError: as `ShardedTable`, or the table was changed since.
    """
    source = Path(path)
    table = ShardedTable(source if source.is_dir() else source.with_suffix(""), cache=cache)
    if source.is_file() and table.source["bytes"] != source.stat().st_size:
        raise ValueError(
            f"table {str(path)!r} has {source.stat().st_size} bytes, and its shards in {table.path!r} are of one with "
            f"{table.source['bytes']}; write them again: python scripts/cnv/shard.py {path}"
        )
    return table


def _write_row_index(folder: Path, columns: dict[str, np.ndarray], buckets: Buckets, fps_max: float | None) -> None:
    def make(name: str, dtype: type, num: int) -> np.ndarray:
        return new_array(folder / f"{name}.npy", dtype, num)

    index = build_row_index([columns[name] for name in COLUMNS], buckets, fps_max=fps_max, make=make)
    np.save(folder / "bounds.npy", index.bounds)
    np.save(folder / "asks.npy", index.classes.asks)
    (folder / "codes.npy").unlink()
