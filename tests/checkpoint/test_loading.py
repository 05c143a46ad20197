"""Every number lands in its tensor, whoever wrote it and wherever the tensor is, and damage on the way is named."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from opensora_like.boosters.base import ShardRange, ShardStrips, Strip
from opensora_like.checkpoint import files
from opensora_like.checkpoint.facts import CHECKSUMS_FILE, file_checks
from opensora_like.checkpoint.loading import Reading
from opensora_like.checkpoint.pieces import Piece, PieceReader, write_pieces

ROWS, COLUMNS = 301, 1500  # more than one chunk of bytes


@pytest.fixture
def whole(tmp_path: Path) -> dict[str, torch.Tensor]:
    """Three tensors in the pieces of three ranks, which cut them at random, and a counter of each rank."""
    tensors = {"a": torch.randn(ROWS, COLUMNS), "b": torch.randn(11), "c": torch.randn(700_001)}
    random, sums = np.random.default_rng(0), {}
    cuts = {name: [0, *sorted(random.integers(0, t.numel(), 2)), t.numel()] for name, t in tensors.items()}
    for rank in range(3):
        pieces = [Piece("step", "a", (), 0, 1, torch.tensor(7.0))]
        for name, tensor in tensors.items():
            low, high = (int(cut) for cut in cuts[name][rank : rank + 2])
            if low < high:
                pieces.append(Piece("master", name, tuple(tensor.shape), low, high, tensor.view(-1)[low:high]))
        sums |= {file: facts._asdict() for file, facts in write_pieces(tmp_path, rank, pieces).items()}
    (tmp_path / CHECKSUMS_FILE).write_text(json.dumps(sums))
    return tensors


@pytest.mark.parametrize("rank", [0, 1])
def test_every_place_is_filled(tmp_path: Path, whole: dict[str, torch.Tensor], rank: int) -> None:
    """Of two ranks, each of which compares some of the files: ranges in place and in another dtype, strips, a scalar,
    nothing at all."""
    shapes = {name: tuple(t.shape) for name, t in whole.items()}
    columns = ShardStrips(shapes["a"], (Strip(500 * rank, COLUMNS, 0, 400, 400, ROWS),))
    places = {"a": columns, "b": ShardRange(shapes["b"], 4, 4), "c": ShardRange(shapes["c"], 5, 600_000)}
    expected = {
        "a": whole["a"][:, 500 * rank : 500 * rank + 400].reshape(-1),
        "b": torch.empty(0),
        "c": whole["c"][5:600_000],
    }
    for dtype in (torch.float32, torch.float64):
        shards = {name: torch.full_like(t, -1, dtype=dtype) for name, t in expected.items()}
        counter, reading, reader = torch.zeros((), dtype=dtype), Reading(), PieceReader(tmp_path)
        reading.add("master", shards, reader, places)
        reading.add("step", {"a": counter}, reader, places)
        assert reading.run(file_checks(tmp_path, rank, 2)) == []
        assert counter == 7
        assert all(torch.equal(shard, expected[name].to(dtype)) for name, shard in shards.items())


def test_what_is_wrong_with_a_file_is_said_by_the_rank_that_compares_it(tmp_path: Path, whole: dict) -> None:
    """A changed bit in the middle, a file that is cut short and one that cannot be read."""
    changed, cut, gone = (tmp_path / f"master.rank{rank:05d}.safetensors" for rank in range(3))
    content = bytearray(changed.read_bytes())
    content[len(content) // 2] ^= 1
    changed.write_bytes(content)
    cut.write_bytes(cut.read_bytes()[:-1])
    gone.unlink()
    gone.symlink_to(tmp_path)
    found = [Reading().run(file_checks(tmp_path, rank, 2)) for rank in (0, 1)]
    assert [len(problems) for problems in found] == [2, 1]
    assert "it has changed" in found[0][0] and "is missing" in found[0][1] and "were written" in found[1][0]


def test_a_file_that_another_rank_compares_can_fail_too(tmp_path: Path, whole: dict[str, torch.Tensor]) -> None:
    """Then this rank says so and goes on, because the others wait to hear of it."""
    reader, reading = PieceReader(tmp_path), Reading()
    shape = tuple(whole["c"].shape)
    reading.add("master", {"c": torch.empty(shape)}, reader, {"c": ShardRange(shape, 0, shape[0])})
    cut = tmp_path / "master.rank00002.safetensors"
    cut.write_bytes(cut.read_bytes()[:-1])
    assert [cut.name in problem for problem in reading.run(file_checks(tmp_path, 1, 2))] == [True]


def test_a_file_passes_by_once_from_front_to_back(tmp_path: Path) -> None:
    """Whatever its size is to that of a chunk; the checksum is that of `file_checksum` and of what was written."""
    for size in (0, 1, files.CHUNK, 2 * files.CHUNK + 12345):
        content = torch.randint(0, 256, (size,), dtype=torch.uint8).numpy().tobytes()
        written = files.write_parts(tmp_path / "file", [memoryview(content)])
        read: list[bytes] = []
        places: list[int] = []

        def take(at: int, data: memoryview, read: list[bytes] = read, places: list[int] = places) -> None:
            places.append(at)
            read.append(bytes(data))

        assert files.read_through(tmp_path / "file", take) == written.xxh3_64
        assert b"".join(read) == content and places == list(range(0, size, files.CHUNK))
