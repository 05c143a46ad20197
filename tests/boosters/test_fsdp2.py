"""FSDP2 in every layout trains as one process does, and its checkpoints move between layouts."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from fsdp2_cases import LOADED, Case, name_of, results
from fsdp2_compare import ALL, compare

from opensora_like.boosters.base import ShardRange, ShardStrips
from opensora_like.boosters.strips import put
from opensora_like.boosters.tensor_parallel import TensorCut, owned
from opensora_like.checkpoint.pieces import PieceReader, pieces_of, write_pieces

TRAINED = [(world, case) for world, case in ALL if "sp_size" not in dict(case.options)]
MOVED = [f"{a} {name_of(b)} -> {world} {name_of(c)}" for world, moves in LOADED.items() for a, b, c in moves]


@pytest.mark.parametrize(("world", "case"), TRAINED, ids=[f"{world} {case.name}" for world, case in TRAINED])
def test_trains_as_one_process(world: int, case: Case) -> None:
    """On its share of the joined batch every layout makes the updates of a single process."""
    compare(world, case)


@pytest.mark.parametrize("move", MOVED)
def test_checkpoint_moves_between_layouts(move: str) -> None:
    """Masters, EMA and optimizer state come back bit for bit in any layout; the next step is the same."""
    found = results()[int(move.split("-> ")[1][0])][move]
    assert found["exact"]
    assert found["loss"] < 1e-6 and found["norm"] < 1e-6


def test_checkpoint_of_tensor_parallelism_opens_without_it() -> None:
    """What two tensor-parallel ranks wrote, a plain ddp process continues."""
    found = results()[1]["2 tp_size=2 -> 1 ddp"]
    assert found["exact"] and found["loss"] < 1e-6 and found["norm"] < 1e-6


@pytest.mark.parametrize("layout", ["plain", "tp_size=2", "sp_size=2", "cpu_offload=True"])
def test_non_finite_step_leaves_no_trace(layout: str) -> None:
    """An infinite loss on one rank: every rank hears of it, weights and optimizer stay, the next step is clean."""
    found = results()[2][f"skips {layout}"]
    assert not math.isfinite(found["norm"])
    assert found["unchanged"] and found["forgotten"]


@pytest.mark.parametrize("layout", ["plain", "tp_size=2", "sp_size=2", "cpu_offload=True"])
def test_model_on_meta_is_filled_by_a_load(layout: str) -> None:
    """A model that never was whole in memory trains on from a checkpoint."""
    found = results()[2][f"meta {layout}"]
    assert found["exact"] and found["loss"] < 1e-6 and found["norm"] < 1e-6


def test_accumulation_reduces_once() -> None:
    """Gradients are reduced in the last micro-batch of a step only, once per block and once for the rest."""
    assert results()[2]["communication"] == {"False": 0, "True": 4}


@pytest.mark.parametrize(
    ("layout", "words"),
    [
        ("tp 3", "booster.tp_size=3 needs a multiple of 3 processes, there are 2; .* one of [1, 2]"),
        ("tp 2 sp 2", "booster.tp_size=2 x booster.sp_size=2 needs a multiple of 4 processes, there are 2"),
        ("replicas 0", "booster.dp_replicate_size=0 must be 1 or more"),
        ("mode", "booster.sequence_parallelism_mode='rings' .* did you mean ['ring']?"),
        ("reduce_dtype", "booster.reduce_dtype='fp16'"),
        ("heads tp", "booster.tp_size=2 does not divide the 3 heads of double_blocks.0.img_attn.num_heads"),
        ("heads sp", "booster.sp_size=2 does not divide the 3 heads .* booster.sequence_parallelism_mode='ring'"),
        ("odd width", "booster.tp_size=2 does not divide the part of 21 of double_blocks.0.img_mlp.0"),
        ("no plan", "Linear has no parallel_plan"),
        ("ddp sp 4", "booster.sp_size=4 does not divide the 2 processes; use one of [1, 2]"),
        ("ddp heads sp", "booster.sp_size=2 does not divide the 3 heads .* use one of [1, 3]"),
        ("ddp no plan", "booster.sp_size=2: Linear has no parallel_plan"),
    ],
)
def test_what_does_not_fit_is_refused(layout: str, words: str) -> None:
    """The message has the key, both numbers, and what would do."""
    message, at = results()[2]["errors"][layout], 0
    for part in words.split(" .* "):
        assert part in message[at:], message
        at = message.index(part, at) + len(part)


def test_ring_takes_any_number_of_heads() -> None:
    """Three heads on two ranks: all_to_all refuses, ring does not."""
    assert results()[2]["errors"]["heads ring"] == ""
    assert results()[2]["errors"]["ddp heads ring"] == ""


def test_ddp_with_sequence_groups_owns_by_rank_and_loads() -> None:
    """Ranges of a flat shard go by the rank in the world, not in the data: a checkpoint of tp comes back bit for bit,
    into a model on meta."""
    found = results()[2]["meta ddp"]
    assert found["exact"] and found["loss"] < 1e-6 and found["norm"] < 1e-6


def shards_of(whole: torch.Tensor, cut_dim: int, sizes: tuple[int, ...], tp: int, shards: int) -> list:
    """(place, flat shard) of every rank that holds part of `whole`, as tensor parallelism and FSDP cut it."""
    found = []
    for rank in range(tp):
        cut = TensorCut(tuple(whole.shape), cut_dim, sizes, rank, tp)
        local = cut.take(whole)
        rows = -(-len(local) // shards)
        for i in range(shards):
            first, last = min(i * rows, len(local)), min((i + 1) * rows, len(local))
            found.append((owned(cut, first, last), local[first:last].reshape(-1)))
    return found


def test_any_cut_writes_and_reads_back(tmp_path: Path) -> None:
    """Whatever cut wrote a matrix or a bias, whatever other cut or range reads the same elements."""
    random = np.random.default_rng(0)
    for trial in range(30):
        tp, dim = int(random.choice([1, 2, 3])), int(random.integers(2))
        sizes = tuple(int(6 * n) for n in random.integers(1, 4, random.integers(1, 4)))
        other = () if dim == 0 and trial % 3 == 0 else (int(random.integers(1, 9)),)
        shape = (sum(sizes), *other) if dim == 0 else (other[0], sum(sizes))
        whole = torch.randn(shape)
        folder = tmp_path / str(trial)
        folder.mkdir()
        joined = torch.full((whole.numel(),), torch.nan)
        for rank, (place, shard) in enumerate(shards_of(whole, dim, sizes, tp, int(random.integers(1, 5)))):
            put(joined, shard, place)
            write_pieces(folder, rank, pieces_of("master", {"w": shard}, {"w": place}))
        assert torch.equal(joined.view(shape), whole)

        reader = PieceReader(folder)
        assert torch.equal(reader.read_whole("master", "w"), whole)
        for place, shard in shards_of(whole, dim, sizes, int(random.choice([1, 2, 3, 6])), 2):
            assert torch.equal(reader.read_place("master", "w", place), shard)
            view = torch.empty(len(shard) + 3)[3:]  # masters are often views of something larger
            assert torch.equal(reader.read_place("master", "w", place, out=view), shard)
        start, stop = sorted(random.integers(0, whole.numel() + 1, 2).tolist())
        assert torch.equal(reader.read("master", "w", start, stop), whole.flatten()[start:stop])


def test_strips_are_for_what_is_no_range() -> None:
    """A column cut in one part is a range; several parts, or a row cut, are strips; no row is an empty range."""
    one, two = TensorCut((8, 3), 0, (8,), 1, 2), TensorCut((8, 3), 0, (4, 4), 1, 2)
    assert owned(one, 1, 3) == ShardRange((8, 3), 15, 21)
    assert owned(two, 0, 2) == ShardRange((8, 3), 6, 12)
    assert isinstance(owned(two, 1, 3), ShardStrips)
    assert isinstance(owned(TensorCut((3, 8), 1, (8,), 0, 2), 0, 3), ShardStrips)
    assert owned(one, 4, 4) == ShardRange((8, 3), 0, 0)
