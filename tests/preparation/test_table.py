"""What a training config encodes is cached by any number of processes, once, whatever kills them on the way."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from opensora_like.datasets.latent_store import LatentStore, open_store
from opensora_like.preparation.table import Summary, cache_table
from tests.training.cached_clips import config_of, from_cache, from_videos, patch, write_table

ROOT = Path(__file__).parents[2]


def assert_same_entries(store: LatentStore, other: LatentStore) -> None:
    assert store.fingerprint == other.fingerprint
    assert store.table().equals(other.table())
    for key in store.table()["key"].to_pylist():
        mine, theirs = store.read(key), other.read(key)
        assert mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_table(tmp_path_factory.mktemp("clips"))


@pytest.fixture(scope="module")
def stores(table: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which `cache_cases` left its stores and summaries."""
    folder = tmp_path_factory.mktemp("stores")
    command = [sys.executable, str(ROOT / "tests/distributed/cache_cases.py"), str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command += [*patch(), *from_videos(table)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def summary_of(stores: Path, name: str) -> Summary:
    return Summary(**json.loads((stores / f"{name}.json").read_text()))


def test_two_processes_make_the_store_of_one(stores: Path) -> None:
    """Entries, facts and bits; each has written a part, and the file that is missing is the only failure."""
    store = open_store(stores / "two")
    assert_same_entries(store, open_store(stores / "one"))
    assert {file.name.split("-")[1] for file in (stores / "two").glob("part-*")} == {"00000", "00001"}
    assert summary_of(stores, "one") == summary_of(stores, "two")
    made = summary_of(stores, "two")
    assert made.written == len(store) and made.skipped == 0 and made.failed > 0
    listed = [line for file in (stores / "two").glob("failures.*") for line in file.read_text().splitlines()]
    assert listed and all("gone.mp4" in json.loads(line)["reason"] for line in listed)


def test_another_number_of_processes_finds_nothing_to_do(stores: Path) -> None:
    """Three processes after two; the file that is missing is tried again."""
    again = summary_of(stores, "two_again")
    assert again.written == 0 and again.skipped == len(open_store(stores / "two")) and again.failed > 0


def test_a_killed_preparation_goes_on(stores: Path) -> None:
    """SIGKILL twice, then a run to the end: the store is that of a run that was not killed, and work was kept."""
    made = summary_of(stores, "killed")
    assert made.skipped > 9 and made.written + made.skipped == len(open_store(stores / "one"))
    assert_same_entries(open_store(stores / "killed"), open_store(stores / "one"))


def test_all_buckets_of_a_row_are_cached(stores: Path) -> None:
    """With a bucket that is skipped by chance every clip is there in both lengths, images in theirs."""
    entries = open_store(stores / "one").table().to_pydict()
    lengths: dict[str, set[int]] = {}
    for path, num_frames in zip(entries["path"], entries["num_frames"], strict=True):
        lengths.setdefault(path, set()).add(num_frames)
    assert all(found == ({1} if "image" in path else {5, 9}) for path, found in lengths.items())
    assert len(lengths) == 16


def test_what_cannot_be_cached_says_so(table: Path, tmp_path: Path) -> None:
    """A dataset that is a cache already, counts below 1, another run's store."""
    cache_table(config_of(*patch(), *from_videos(table)), tmp_path / "c", batch_size=4)
    with pytest.raises(ValueError, match=r"dataset\.type='latents'"):
        cache_table(config_of(*patch(), *from_cache(tmp_path / "c", table)), tmp_path / "a")
    with pytest.raises(ValueError, match="epochs=0"):
        cache_table(config_of(*patch(), *from_videos(table)), tmp_path / "b", epochs=0)
    with pytest.raises(ValueError, match=r"dataset\.seed: 42 there, 43 here"):
        cache_table(config_of(*patch(), *from_videos(table), "--seed", "43"), tmp_path / "c")
