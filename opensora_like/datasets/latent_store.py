"""A folder of cached latents and text embeddings: safetensors shards, written by many processes, read by key.

A shard is there once its index (parquet) is; `finish` joins the indexes, sorted by key, so that the rows of a store do
not depend on how many processes wrote it, nor on how often they were killed.
"""

from __future__ import annotations

import json
import re
import secrets
import zlib
from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from opensora_like.datasets import store_files as files
from opensora_like.datasets.store_files import Shard
from opensora_like.publish import is_draft, staged

if TYPE_CHECKING:
    import pyarrow as pa

MANIFEST, NULL = "manifest.json", "null.safetensors"
VERSION = 1
FACTS = ("path", "text", "num_frames", "height", "width", "fps")  # that every entry has
LATENT_SHAPE = ("latent_channels", "latent_frames", "latent_height", "latent_width")
NAMES = re.compile(r"latents|latents_std|first_frame|(embeddings|references)\.\w+")
TIMED = ("latents", "latents_std")  # tensors with a time dimension, [C, T, H, W]
OPEN_SHARDS = 8  # kept mapped by each process
_OWN = ("_shard", "_slot", "_tensors")  # columns of the index that `table` leaves out


class NotFinite(ValueError):
    """A tensor has values that are not finite."""


class StoreWriter:
    """One process' part in filling a store; what any complete shard holds already need not be made again.

    Args:
        fingerprint: what the tensors depend on (encoders, seed...), as nested mappings that json can hold.
        rank, world_size: of the processes that write at the same time; it may be another number each time.
        shard_bytes: a shard is written when it has this many bytes; until then it is in memory.

    Raises:
        ValueError: the folder holds entries of another fingerprint; what differs is named.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        fingerprint: Mapping[str, Any],
        rank: int = 0,
        world_size: int = 1,
        shard_bytes: int = 2**30,
    ) -> None:
        if not 0 <= rank < world_size:
            raise ValueError(f"rank={rank} of world_size={world_size} processes; it must be from 0 to {world_size - 1}")
        self.folder, self.rank, self.shard_bytes = Path(folder), rank, shard_bytes
        self.fingerprint = _plain(fingerprint)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._keys: set[str] = set()
        for index in files.read_indexes(self.folder):
            check_fingerprint(self.folder, json.loads(index.schema.metadata[files.FINGERPRINT]), self.fingerprint)
            shard = Shard(**json.loads(index.schema.metadata[files.SHARD]))
            files.check_size(self.folder / shard.name, shard)
            self._keys.update(index["key"].to_pylist())
        if (null := self.folder / NULL).is_file():
            check_fingerprint(self.folder, json.loads(files.read_metadata(null)["fingerprint"]), self.fingerprint)
        self._tensors: dict[str, Tensor] = {}
        self._rows: list[dict[str, Any]] = []
        self._num_bytes = 0

    def __enter__(self) -> StoreWriter:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()  # also after an error: what was added is whole

    def has(self, key: str) -> bool:
        """Whether this writer was given `key`, or a shard that was complete when it was opened holds it."""
        return key in self._keys

    def add(self, key: str, tensors: Mapping[str, Tensor], facts: Mapping[str, str | int | float]) -> None:
        """Add one entry.

        Args:
            tensors: "latents" (posterior mean, [C, T, H, W], scaled for the denoiser); also "latents_std" of the same
                shape, "embeddings.<condition>" without a batch dimension, "references.<name>" [C, T', H, W],
                "first_frame" (uint8 [N], the bytes of a JPEG). Copied to the CPU, dtypes are kept.
            facts: `FACTS` and any others. num_frames, height, width are those of the pixels that were encoded, fps the
                rate at which they play (0 where there is none), text what was given to the text encoders.

        Raises:
            ValueError: a key that is there already, a name that is not one of these, or a fact that is missing.
            NotFinite: see there; nothing is added.
        """
        if key in self._keys or not key:
            raise ValueError(f"key {key!r} of store {str(self.folder)!r} is empty or there already; ask `has` first")
        missing, taken = set(FACTS) - facts.keys(), facts.keys() & {"key", *LATENT_SHAPE, *_OWN}
        if missing or taken:
            raise ValueError(f"facts of {key!r} lack {sorted(missing)}, or have {sorted(taken)}, which are the store's")
        if "latents" not in tensors or tensors["latents"].ndim != 4:
            found = {name: list(t.shape) for name, t in tensors.items()}
            raise ValueError(f"tensors of {key!r} need 'latents' of 4 dimensions [C, T, H, W], got {found}")
        for name, tensor in tensors.items():
            _check_tensor(key, name, tensor)
        slot, kinds = len(self._rows), {}
        for name, tensor in tensors.items():
            copy = tensor.detach().to("cpu", copy=True).contiguous()
            self._tensors[f"{slot}/{name}"] = copy
            self._num_bytes += copy.numel() * copy.element_size()
            kinds[name] = [str(copy.dtype).removeprefix("torch."), list(copy.shape)]
        shape = dict(zip(LATENT_SHAPE, tensors["latents"].shape, strict=True))
        self._rows.append({"key": key, **facts, **shape, "_slot": slot, "_tensors": json.dumps(kinds)})
        self._keys.add(key)
        if self._num_bytes >= self.shard_bytes:
            self.flush()

    def add_null(self, embeddings: Mapping[str, Tensor]) -> None:
        """Keep the embeddings of the empty caption, by condition name, without a batch dimension.

        Every process may call it; an older one of the same fingerprint stays.
        """
        for name, tensor in embeddings.items():
            _check_tensor("null", f"embeddings.{name}", tensor)
        if not (self.folder / NULL).exists():
            copies = {name: t.detach().to("cpu", copy=True).contiguous() for name, t in embeddings.items()}
            files.save_tensors(copies, self.folder / NULL, fingerprint=self.fingerprint, shared=True)

    def fail(self, key: str, reason: str) -> None:
        """Write down that `key` could not be made: one line of json in failures.rank*.jsonl."""
        with (self.folder / f"failures.rank{self.rank:05d}.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps({"key": key, "reason": reason}, ensure_ascii=False) + "\n")

    def flush(self) -> None:
        """Write what is in memory as a shard, and publish it.

        Raises:
            OSError: the disk is full, read-only or gone; the entries stay in memory.
        """
        if not self._rows:
            return
        token = secrets.token_hex(6)  # so that no other process, alive or killed, has the name
        shard = self.folder / f"part-{self.rank:05d}-{token}.safetensors"
        files.save_tensors(self._tensors, shard, fingerprint=self.fingerprint)
        files.write_index([row | {"_shard": shard.name} for row in self._rows], shard, fingerprint=self.fingerprint)
        self._tensors, self._rows, self._num_bytes = {}, [], 0

    def close(self) -> None:
        """Write the last shard."""
        self.flush()


def finish(folder: str | Path) -> dict[str, Any]:
    """Make what the writers wrote a store that can be opened; called once, by one process, after all have closed.

    Files that a killed writer left are removed. A key that two processes wrote counts once.

    Returns: the manifest: version, fingerprint, num_rows, shards (name, rows, bytes, crc32), num_failures, index.

    Raises:
        ValueError: there is nothing in the folder.
    """
    import pyarrow as pa

    folder = Path(folder)
    found = list(files.read_indexes(folder))
    if not found:
        raise ValueError(f"store {str(folder)!r} has no complete shard; see failures.rank*.jsonl there")
    for file in folder.iterdir():
        orphan = file.suffix == ".safetensors" and file.name != NULL and not file.with_suffix(".parquet").exists()
        if is_draft(file) or orphan:
            file.unlink()
    fingerprint, shards = json.loads(found[0].schema.metadata[files.FINGERPRINT]), []
    for index in found:
        check_fingerprint(folder, json.loads(index.schema.metadata[files.FINGERPRINT]), fingerprint)
        shards.append(json.loads(index.schema.metadata[files.SHARD]))
    joined = pa.concat_tables([t.replace_schema_metadata(None) for t in found], promote_options="permissive")
    joined = joined.sort_by([("key", "ascending"), ("_shard", "ascending")]).combine_chunks()
    keys = joined["key"].to_pylist()
    first = [n == 0 or keys[n - 1] != key for n, key in enumerate(keys)]
    joined = joined.filter(pa.array(first))
    num_failures = len({failure["key"] for failure in files.read_failures(folder)} - set(keys))
    manifest = {"version": VERSION, "fingerprint": fingerprint, "num_rows": joined.num_rows, "shards": shards}
    name = f"index-{secrets.token_hex(6)}.arrow"
    with staged(folder / name) as draft, pa.OSFile(str(draft), "wb") as sink:
        with pa.ipc.new_file(sink, joined.schema) as writer:
            writer.write_table(joined)
    with staged(folder / MANIFEST) as draft:
        draft.write_text(json.dumps(manifest | {"num_failures": num_failures, "index": name}, indent=1))
    for old in folder.glob("index-*.arrow"):
        if old.name != name:
            old.unlink()
    return manifest | {"num_failures": num_failures, "index": name}


def open_store(folder: str | Path, *, fingerprint: Mapping[str, Any] | None = None) -> LatentStore:
    """Open a finished store.

    Args:
        fingerprint: what the caller's tensors would depend on; parts that it leaves out are not compared.

    Raises:
        FileNotFoundError: no such folder, not finished, or a shard is gone.
        ValueError: a shard is truncated, another version, or a fingerprint that differs.
    """
    folder = Path(folder)
    manifest = folder / MANIFEST
    if not manifest.is_file():
        what = "is not finished: it has shards and no" if any(folder.glob("part-*.parquet")) else "has no"
        raise FileNotFoundError(
            f"store {str(folder)!r} {what} {MANIFEST}; make it with tools/cache_latents.py, which goes on where it was"
        )
    about = json.loads(manifest.read_text())
    if about["version"] != VERSION:
        raise ValueError(f"store {str(folder)!r} has version {about['version']}, this program reads {VERSION}")
    if fingerprint is not None:
        check_fingerprint(folder, about["fingerprint"], fingerprint, partly=True)
    for shard in (Shard(**entry) for entry in about["shards"]):
        files.check_size(folder / shard.name, shard)
    return LatentStore(folder, about)


class LatentStore:
    """Entries by key, or by their number in the order of keys; `open_store` makes it. Picklable.

    Tensors are mapped from the shards: a page is read when it is used, and shared by the processes of a machine.
    """

    def __init__(self, folder: Path, manifest: dict[str, Any]) -> None:
        self.folder, self._manifest = folder, manifest
        self.fingerprint: dict[str, Any] = manifest["fingerprint"]
        self.num_rows: int = manifest["num_rows"]
        self._shards = {entry["name"]: Shard(**entry) for entry in manifest["shards"]}
        self._open: OrderedDict[str, Any] = OrderedDict()

    def __reduce__(self):
        return LatentStore, (self.folder, self._manifest)

    def __len__(self) -> int:
        return self.num_rows

    def __contains__(self, key: str) -> bool:
        return self._find(key) is not None

    def table(self) -> pa.Table:
        """key, the facts of every entry, and the shape of its latents, in the order of keys; mapped from disk."""
        return self._index.select([name for name in self._index.column_names if name not in _OWN])

    def facts(self, key: str) -> dict[str, Any]:
        """One row of `table`. Raises KeyError if there is none."""
        return {name: value for name, value in self._row(key).items() if name not in _OWN}

    def tensors_of(self, key: str) -> dict[str, tuple[int, ...]]:
        """Names and shapes of the tensors of an entry; KeyError if there is none."""
        return {name: tuple(shape) for name, (_, shape) in json.loads(self._row(key)["_tensors"]).items()}

    def tensor_names(self) -> list[str]:
        """Names of tensors of the first entry; those of all entries, where one program made them."""
        return list(json.loads(self._index["_tensors"][0].as_py()))

    def shapes(self) -> set[tuple[int, int, int]]:
        """(num_frames, height, width) of the clips that were encoded."""
        sizes = self._index.select(["num_frames", "height", "width"])
        unique = sizes.group_by(sizes.column_names).aggregate([]).to_pydict()
        return set(zip(*unique.values(), strict=True))

    def read(self, key: str, *, frames: slice | None = None) -> dict[str, Tensor]:
        """The tensors of an entry.

        Args:
            frames: latent frames of "latents" and "latents_std" to read; None reads all.

        Raises:
            KeyError: no such entry.
            FileNotFoundError, ValueError: its shard is gone, truncated or another one.
        """
        row = self._row(key)
        shard = self._shard(row["_shard"])
        out = {}
        for name in json.loads(row["_tensors"]):
            stored = f"{row['_slot']}/{name}"
            if frames is not None and name in TIMED:
                out[name] = shard.get_slice(stored)[:, frames].contiguous()
            else:
                out[name] = shard.get_tensor(stored)
        return out

    @cached_property
    def null(self) -> dict[str, Tensor]:
        """Embeddings of the empty caption, by condition name, without a batch dimension; {} if none were kept."""
        from safetensors.torch import load_file

        file = self.folder / NULL
        return load_file(file) if file.is_file() else {}

    def verify(self) -> None:
        """Read every byte and compare the checksums.

        Raises:
            FileNotFoundError, ValueError: as `read`.
        """
        for shard in self._shards.values():
            files.check_size(self.folder / shard.name, shard)
            if (found := files.file_crc32(self.folder / shard.name)) != shard.crc32:
                raise files.changed(self.folder / shard.name, "checksum", found, shard.crc32)

    @cached_property
    def _index(self) -> pa.Table:
        import pyarrow as pa

        file = self.folder / self._manifest["index"]
        if not file.is_file():
            raise FileNotFoundError(f"index {str(file)!r} of the store is gone; finish the store again")
        return pa.ipc.open_file(pa.memory_map(str(file))).read_all()

    @cached_property
    def _key_column(self) -> Any:
        return self._index["key"].combine_chunks()

    def _find(self, key: str) -> int | None:
        keys = self._key_column
        at = bisect_left(range(len(keys)), key, key=lambda n: keys[n].as_py())
        return at if at < len(keys) and keys[at].as_py() == key else None

    def _row(self, key: str) -> dict[str, Any]:
        at = self._find(key)
        if at is None:
            raise KeyError(f"store {str(self.folder)!r} of {self.num_rows} entries has no {key!r}")
        return self._index.slice(at, 1).to_pylist()[0]

    def _shard(self, name: str) -> Any:
        from safetensors import SafetensorError, safe_open

        if name in self._open:
            self._open.move_to_end(name)
            return self._open[name]
        path, shard = self.folder / name, self._shards[name]
        files.check_size(path, shard)
        try:
            if (found := zlib.crc32(files.read_header(path))) != shard.header_crc32:
                raise files.changed(path, "checksum of the header", found, shard.header_crc32)
            self._open[name] = safe_open(path, framework="pt")
        except SafetensorError as problem:
            raise ValueError(f"shard {str(path)!r} cannot be read: {problem}; cache its entries again") from problem
        while len(self._open) > OPEN_SHARDS:
            self._open.popitem(last=False)
        return self._open[name]


def check_fingerprint(
    folder: str | Path, found: Mapping[str, Any], wanted: Mapping[str, Any], *, partly: bool = False
) -> None:
    """Compare what a store was made with with what is wanted.

    Args:
        partly: parts that `wanted` leaves out are not compared.

    Raises:
        ValueError: they differ; every difference is named with both values.
    """
    have, want = dict(_flat(_plain(found))), dict(_flat(_plain(wanted)))
    names = sorted(want if partly else have.keys() | want.keys())
    differ = [f"  {n}: {have.get(n)!r} there, {want.get(n)!r} here" for n in names if have.get(n) != want.get(n)]
    if differ:
        raise ValueError(
            f"store {str(folder)!r} was made with other settings:\n" + "\n".join(differ) + "\nuse those of the store, "
            "or cache into another folder"
        )


def _plain(value: Mapping[str, Any]) -> dict[str, Any]:
    """As json gives it back."""
    return json.loads(json.dumps(value, sort_keys=True, default=str))


def _flat(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if not isinstance(value, dict) or not value:
        yield prefix, value
        return
    for name, part in value.items():
        yield from _flat(part, f"{prefix}.{name}" if prefix else name)


def _check_tensor(key: str, name: str, tensor: Tensor) -> None:
    if not NAMES.fullmatch(name):
        raise ValueError(f"tensor {name!r} of {key!r} is none of {NAMES.pattern!r}")
    if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
        raise NotFinite(f"tensor {name!r} of {key!r} has values that are not finite; check its encoder's dtype")
