"""A store has whole shards only, the same entries whoever wrote it, and says what is wrong with it."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor

from opensora_like.datasets import store_files
from opensora_like.datasets.latent_store import NULL, NotFinite, StoreWriter, finish, open_store
from opensora_like.rng import generator

ROOT = Path(__file__).parents[2]
FINGERPRINT = {"autoencoder": {"type": "patch", "size": 2}, "seed": 1}
FACTS = {"text": "a", "num_frames": 9, "height": 16, "width": 24, "fps": 8.0}
KEYS = [f"clip{number:02d}" for number in range(10)]


def tensors_of(key: str) -> dict[str, Tensor]:
    draw = generator(0, key)
    return {
        "latents": torch.randn(4, 3, 2, 3, generator=draw),
        "embeddings.text": torch.randn(5, 6, generator=draw).to(torch.bfloat16),
        "first_frame": torch.arange(7, dtype=torch.uint8),
    }


def write(folder: Path, keys: list[str], **writer: object) -> StoreWriter:
    """A writer that added what it did not have, closed."""
    with StoreWriter(folder, **{"fingerprint": FINGERPRINT, "shard_bytes": 800, **writer}) as made:
        for key in keys:
            if not made.has(key):
                made.add(key, tensors_of(key), {"path": f"{key}.mp4", **FACTS})
    return made


def check_entries(folder: Path, keys: list[str]) -> None:
    store = open_store(folder, fingerprint=FINGERPRINT)
    assert store.table()["key"].to_pylist() == keys
    for key in keys:
        found, wanted = store.read(key), tensors_of(key)
        assert found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)
    store.verify()


def test_entries_come_back_by_key(tmp_path: Path) -> None:
    """Tensors with their dtypes, facts, shapes, a slice of latent frames, and the same from a pickled store."""
    writer = write(tmp_path, KEYS[::-1])
    writer.add_null({"text": torch.ones(5, 6)})
    about = finish(tmp_path)
    assert about["num_rows"] == 10 and len(about["shards"]) > 3
    check_entries(tmp_path, KEYS)
    store = pickle.loads(pickle.dumps(open_store(tmp_path)))
    assert KEYS[3] in store and "clip99" not in store
    assert store.tensors_of(KEYS[3])["latents"] == (4, 3, 2, 3)
    assert torch.equal(store.read(KEYS[3], frames=slice(1, 3))["latents"], tensors_of(KEYS[3])["latents"][:, 1:3])
    facts = store.facts(KEYS[3])
    assert facts["path"] == "clip03.mp4" and facts["fps"] == 8.0 and facts["latent_frames"] == 3
    assert store.null["text"].shape == (5, 6) and store.shapes() == {(9, 16, 24)}
    with pytest.raises(KeyError, match="of 10 entries has no 'clip99'"):
        store.read("clip99")
    assert len(store._open) <= 8


def test_world_size_and_restarts_do_not_show(tmp_path: Path) -> None:
    """Two processes that stop halfway, then three: nothing is made twice, and the store is that of one process."""
    for rank in range(2):
        write(tmp_path / "many", KEYS[rank:6:2], rank=rank, world_size=2)
    for rank in range(3):
        assert [write(tmp_path / "many", [], rank=rank, world_size=3).has(key) for key in KEYS[:6]] == [True] * 6
        write(tmp_path / "many", KEYS[rank::3], rank=rank, world_size=3)
    write(tmp_path / "one", KEYS)
    many, one = finish(tmp_path / "many"), finish(tmp_path / "one")
    assert sum(shard["rows"] for shard in many["shards"]) == many["num_rows"] == one["num_rows"] == 10
    check_entries(tmp_path / "many", KEYS)
    assert open_store(tmp_path / "many").table().equals(open_store(tmp_path / "one").table())


KILLED = """
import os, signal, sys
from contextlib import contextmanager
from pathlib import Path
from opensora_like.datasets import latent_store, store_files
from tests.datasets.test_latent_store import KEYS, MOMENTS, write
inner = store_files.staged

def kill_at(moment):
    left = moment
    def tick():
        nonlocal left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
    @contextmanager
    def staged(target, **how):
        with inner(target, **how) as draft:
            yield draft
            tick()
        tick()
    store_files.staged = latent_store.staged = staged

for moment in MOMENTS:
    pid = os.fork()
    if not pid:
        kill_at(moment)
        write(Path(sys.argv[1]) / str(moment), KEYS)
    assert os.waitpid(pid, 0)[1] == signal.SIGKILL
"""
MOMENTS = range(1, 7)


def test_killed_at_any_moment(tmp_path: Path) -> None:
    """Before and after a shard and its index get their names: only whole shards count, and the next run completes."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], env=environment, check=False)
    assert done.returncode == 0
    for moment in MOMENTS:
        folder = tmp_path / str(moment)
        complete = {row for index in folder.glob("part-*.parquet") for row in _keys_in(index)}
        assert len(complete) == (0 if moment < 4 else 3)
        assert {key for key in KEYS if write(folder, []).has(key)} == complete
        write(folder, KEYS)
        finish(folder)
        check_entries(folder, KEYS)
        assert not list(folder.glob(".*"))
        assert len(list(folder.glob("part-*.safetensors"))) == len(list(folder.glob("part-*.parquet")))


def _keys_in(index: Path) -> list[str]:
    from pyarrow import parquet

    return parquet.read_table(index)["key"].to_pylist()


def test_ranks_keep_the_null_embeddings_at_the_same_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither takes away what the other is about to publish."""
    both = threading.Barrier(2, timeout=300)
    staged = store_files.staged

    @contextmanager
    def staged_together(target: Path, **how: bool) -> Iterator[Path]:
        with staged(target, **how) as draft:
            yield draft
            both.wait()

    monkeypatch.setattr(store_files, "staged", staged_together)
    writers = [StoreWriter(tmp_path, fingerprint=FINGERPRINT, rank=rank, world_size=2) for rank in range(2)]
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda writer: writer.add_null({"text": torch.ones(5, 6)}), writers))
    assert [file.name for file in tmp_path.iterdir()] == [NULL]


def test_stale_fingerprints_are_refused(tmp_path: Path) -> None:
    """Of a writer and of a reader; the error has every difference with both values, and the remedy."""
    write(tmp_path, KEYS)
    finish(tmp_path)
    other = {"autoencoder": {"type": "patch", "size": 4}, "seed": 1, "more": True}
    text = r"(?s)autoencoder\.size: 2 there, 4 here.*more: None there, True here.*cache into another folder"
    with pytest.raises(ValueError, match=text):
        StoreWriter(tmp_path, fingerprint=other)
    with pytest.raises(ValueError, match=text):
        open_store(tmp_path, fingerprint=other)
    open_store(tmp_path, fingerprint={"autoencoder": {"size": 2}})  # what is left out is not compared


def test_a_broken_shard_is_named(tmp_path: Path) -> None:
    """Truncated, changed, gone: by a reader, by one that has it open already, and by the next writer."""
    write(tmp_path, KEYS)
    finish(tmp_path)
    store = open_store(tmp_path)
    shard = tmp_path / store._row(KEYS[0])["_shard"]
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-8])
    for reads in (lambda: open_store(tmp_path), lambda: store.read(KEYS[0]), lambda: write(tmp_path, [])):
        with pytest.raises(ValueError, match=f"{shard.name}.*size {len(whole) - 8}, its index says {len(whole)}"):
            reads()
    shard.write_bytes(whole.replace(b"latents", b"latentz", 1))
    with pytest.raises(ValueError, match=f"{shard.name}.*checksum of the header"):
        store.read(KEYS[0])
    shard.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(ValueError, match=f"{shard.name}.*checksum"):
        store.verify()
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=f"{shard.name}' is gone"):
        open_store(tmp_path)


def test_what_is_not_a_store_says_so(tmp_path: Path) -> None:
    """No folder, not finished, nothing written."""
    with pytest.raises(FileNotFoundError, match=r"has no manifest.json; make it with tools/cache_latents.py"):
        open_store(tmp_path / "none")
    write(tmp_path, KEYS)
    with pytest.raises(FileNotFoundError, match="is not finished"):
        open_store(tmp_path)
    with pytest.raises(ValueError, match="has no complete shard"):
        finish(tmp_path / "none")


def test_failures_are_listed_and_counted(tmp_path: Path) -> None:
    """One line per failure; one that a later run made after all does not count."""
    with StoreWriter(tmp_path, fingerprint=FINGERPRINT) as writer:
        writer.fail("gone", "no such file")
        writer.fail(KEYS[0], "no such file")
        with pytest.raises(NotFinite, match="'latents' of 'bad'"):
            writer.add("bad", {"latents": torch.full((1, 1, 1, 1), torch.nan)}, {"path": "bad.mp4", **FACTS})
    write(tmp_path, KEYS[:2])
    assert finish(tmp_path)["num_failures"] == 1
    check_entries(tmp_path, KEYS[:2])
    with (tmp_path / "failures.rank00000.jsonl").open() as file:
        assert len(file.readlines()) == 2


def test_a_line_that_a_full_disk_cut_off_stops_nothing(tmp_path: Path) -> None:
    """Nor does what the next run wrote behind it; of the list of failures only these two are lost."""
    writer = write(tmp_path, KEYS[:1])
    writer.fail("a", "\u2028 is no end of a line")
    with (tmp_path / "failures.rank00000.jsonl").open("a") as file:
        file.write('{"key": "b", "rea')
    for key in ("c", "d"):
        writer.fail(key, "bad")
    assert [failure["key"] for failure in store_files.read_failures(tmp_path)] == ["a", "d"]
    assert finish(tmp_path)["num_failures"] == 2


@pytest.mark.parametrize(
    ("key", "tensors", "facts", "text"),
    [
        ("", {"latents": torch.zeros(1, 1, 1, 1)}, FACTS | {"path": "a"}, "is empty or there already"),
        ("a", {"latents": torch.zeros(1, 1, 1)}, FACTS | {"path": "a"}, "need 'latents' of 4 dimensions"),
        ("a", {"latents": torch.zeros(1, 1, 1, 1), "mask": torch.zeros(1)}, FACTS | {"path": "a"}, "'mask' of 'a'"),
        ("a", {"latents": torch.zeros(1, 1, 1, 1)}, FACTS, r"lack \['path'\]"),
        ("a", {"latents": torch.zeros(1, 1, 1, 1)}, FACTS | {"path": "a", "key": "b"}, r"have \['key'\]"),
    ],
)
def test_an_entry_that_cannot_be(tmp_path: Path, key: str, tensors: dict, facts: dict, text: str) -> None:
    """Keys, tensors and facts are checked before anything is kept."""
    with StoreWriter(tmp_path, fingerprint=FINGERPRINT) as writer:
        with pytest.raises(ValueError, match=text):
            writer.add(key, tensors, facts)
    assert not list(tmp_path.iterdir())
