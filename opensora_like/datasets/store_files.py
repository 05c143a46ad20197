"""The files of a latent store: shards, their indexes, and how each is published."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

from opensora_like.publish import staged

if TYPE_CHECKING:
    import pyarrow as pa

FINGERPRINT, SHARD = b"opensora_like.fingerprint", b"opensora_like.shard"  # in the metadata of an index


class Shard(NamedTuple):
    """One file. Args: header_crc32: of the part that says what is where; it is compared when the file is opened."""

    name: str
    rows: int
    bytes: int
    crc32: int
    header_crc32: int


def save_tensors(
    tensors: Mapping[str, Tensor], target: Path, *, fingerprint: Mapping[str, Any], shared: bool = False
) -> None:
    """Publish tensors as one safetensors file.

    Args:
        shared: several processes may publish `target` at the same time.

    Raises:
        OSError: it cannot be written; the file is named.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    with staged(target, shared=shared) as draft:
        try:
            save_file(dict(tensors), draft, metadata={"fingerprint": json.dumps(fingerprint)})
        except SafetensorError as problem:
            raise OSError(f"{str(target)!r} cannot be written: {problem}; make room and run again") from problem


def write_index(rows: list[dict[str, Any]], shard: Path, *, fingerprint: Mapping[str, Any]) -> None:
    """Publish the list of what is in a shard that is on disk; from then on the shard counts."""
    import pyarrow as pa
    from pyarrow import parquet

    header = zlib.crc32(read_header(shard))
    about = Shard(shard.name, len(rows), shard.stat().st_size, file_crc32(shard), header)
    names = dict.fromkeys(name for row in rows for name in row)
    table = pa.table({name: [row.get(name) for row in rows] for name in names})
    metadata = {FINGERPRINT: json.dumps(fingerprint), SHARD: json.dumps(about._asdict())}
    with staged(shard.with_suffix(".parquet")) as draft:
        parquet.write_table(table.replace_schema_metadata(metadata), draft, compression="zstd")


def read_indexes(folder: Path) -> Iterator[pa.Table]:
    """The indexes of all complete shards, their facts in the metadata of the schema."""
    from pyarrow import parquet

    for file in sorted(folder.glob("part-*.parquet")):
        yield parquet.read_table(file, partitioning=None)


def read_failures(folder: Path) -> list[dict[str, str]]:
    """What `StoreWriter.fail` wrote down, of all processes and runs: key and reason."""
    return [line for file in sorted(folder.glob("failures.rank*.jsonl")) for line in read_lines(file)]


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a file of json lines that is appended to.

    A line that a kill or a full disk cut off does not count, nor does what a later run wrote behind it.
    """
    found = []
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return found


def check_size(path: Path, shard: Shard) -> None:
    """Raises FileNotFoundError or ValueError if the shard is gone, truncated or grown."""
    if not path.is_file():
        raise FileNotFoundError(f"shard {str(path)!r} is gone; restore it, or remove its index and cache again")
    if (size := path.stat().st_size) != shard.bytes:
        raise changed(path, "size", size, shard.bytes)


def changed(path: Path, what: str, found: int, wanted: int) -> ValueError:
    """The error of a shard that is not as it was written."""
    return ValueError(
        f"shard {str(path)!r} has {what} {found}, its index says {wanted}: it was truncated or changed; restore it, or "
        f"remove it and {path.with_suffix('.parquet').name!r} and cache again"
    )


def read_header(path: Path) -> bytes:
    """What says where the tensors of a safetensors file are."""
    with path.open("rb") as file:
        return file.read(int.from_bytes(file.read(8), "little"))


def read_metadata(path: Path) -> dict[str, str]:
    """What `save_tensors` wrote beside the tensors."""
    return json.loads(read_header(path)).get("__metadata__", {})


def file_crc32(path: Path) -> int:
    """The checksum of a file as it is on disk."""
    checksum = 0
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            checksum = zlib.crc32(chunk, checksum)
    return checksum
