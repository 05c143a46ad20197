"""Saves in the background hold their step, whatever happens while they are written, and copy no more than they must."""

from __future__ import annotations

import os
from pathlib import Path
from threading import Event

import pytest
import torch

from opensora_like.boosters.base import Booster
from opensora_like.checkpoint import files, layout
from opensora_like.checkpoint.live import DOORS, Background
from opensora_like.checkpoint.manager import CheckpointManager, TrainState
from opensora_like.checkpoint.memory import LiveBytes
from opensora_like.checkpoint.pieces import Piece, PieceReader
from tests.checkpoint.one_process import make_manager
from tests.distributed.programs import found_by

HARMLESS = {"prepare", "param_groups", "micro_batch", "backward", "ranges", "gather"}
WIDTH = 3000  # a weight of several chunks


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Event:
    """No byte reaches the disk until it is set; chunks are small, so that each file takes several."""
    real, opened = os.pwrite, Event()

    def pwrite(handle: int, data: memoryview, offset: int) -> int:
        assert opened.wait(60)
        return real(handle, data, offset)

    monkeypatch.setattr(files, "CHUNK", files.ALIGNMENT)
    monkeypatch.setattr(os, "pwrite", pwrite)
    return opened


def tensors_of(manager: CheckpointManager) -> dict[str, torch.Tensor]:
    """Copies of all that a checkpoint holds."""
    kinds = {"master": dict(manager.booster.master_shards()), **manager.booster.optimizer_shards(), "ema": manager.ema}
    return {f"{kind}/{name}": t.clone() for kind, tensors in kinds.items() for name, t in tensors.items()}


def saved_in(folder: Path, like: dict[str, torch.Tensor]) -> bool:
    """Whether a checkpoint has these numbers, bit by bit."""
    reader = PieceReader(folder)
    return all(torch.equal(reader.read(*key.split("/")).view_as(tensor), tensor) for key, tensor in like.items())


def change_by(door: str, manager: CheckpointManager) -> None:
    """Change what is saved in the way that a user of this door does."""
    booster = manager.booster
    with torch.no_grad():
        if door == "step":
            for parameter in booster._parameters.values():
                parameter.grad = torch.ones_like(parameter)
            booster.step()
        elif door == "refresh":
            booster.refresh()
        elif door == "master_shards":  # as the EMA and a validation do
            for name, shard in booster.master_shards():
                manager.ema[name].lerp_(shard.add_(1), 0.5)
        else:
            for tensors in booster.optimizer_shards().values():
                for tensor in tensors.values():
                    tensor.add_(1)


@pytest.mark.parametrize("door", DOORS)
def test_what_changes_while_it_is_written_is_copied_first(tmp_path: Path, gate: Event, door: str) -> None:
    """By every door; the next save, in the middle of which nothing changes, copies nothing more and is as good."""
    manager = make_manager(tmp_path, width=WIDTH, async_io=True)
    before = tensors_of(manager)
    folder = manager.save(TrainState(step=1))
    assert not manager._background._buffers
    change_by(door, manager)
    copied = {key: buffer.data_ptr() for key, buffer in manager._background._buffers.items()}
    assert copied
    change_by("step", manager)
    gate.set()
    manager.wait()
    assert saved_in(folder, before)
    after = tensors_of(manager)
    assert not any(torch.equal(tensor, before[key]) for key, tensor in after.items() if not key.startswith("ema"))
    folder = manager.save(TrainState(step=2))
    manager.wait()
    assert saved_in(folder, after)
    assert copied == {key: buffer.data_ptr() for key, buffer in manager._background._buffers.items()}


def test_all_ways_of_a_booster_to_what_is_saved_are_doors() -> None:
    """A method that the protocol gets has to be put on one side or the other; a door takes no arguments."""
    methods = {name for name in vars(Booster) if not name.startswith("_")}
    assert methods == HARMLESS | set(DOORS)


def test_a_change_past_the_doors_is_noticed(tmp_path: Path, gate: Event) -> None:
    """By views that were taken before: no checkpoint shows, the error names a tensor, and the next save is good."""
    manager = make_manager(tmp_path, width=WIDTH, async_io=True)
    views = dict(manager.booster.master_shards())
    manager.save(TrainState(step=1))
    with torch.no_grad():
        for shard in views.values():
            shard.add_(1)
    gate.set()
    with pytest.raises(OSError, match=r"could not save epoch0-global_step1: master of '.*' was changed while"):
        manager.wait()
    assert layout.complete_checkpoints(tmp_path) == []
    folder = manager.save(TrainState(step=2))
    manager.wait()
    assert saved_in(folder, tensors_of(manager))


def test_live_bytes_are_those_of_their_beginning_at_any_cut() -> None:
    """Taken in parts, with a copy made between any two of them and the tensor overwritten after it."""
    tensor = torch.randn(1000)
    for cut in (0, 1, 64, 3999, 4000):
        live = LiveBytes("t", tensor, lambda: torch.empty(1000))
        expected, found = tensor.numpy().tobytes(), memoryview(bytearray(4000))
        live.take(found[:cut])
        assert live.secure() == 4000 - cut
        tensor.add_(1)
        if cut < 4000:
            live.take(found[cut:])
        assert bytes(found) == expected


def test_what_cannot_stay_is_copied_at_once_into_memory_that_is_kept() -> None:
    """As for tensors of a device, or where another program writes; and a tensor that does not lie in one row."""
    matrix = torch.randn(4, 6)
    for stays, tensor in ((False, matrix), (True, matrix.t())):
        background, kept = Background(stays=stays), set()
        for _ in range(2):
            (piece,) = background.begin([Piece("master", "a", (24,), 0, 24, tensor)])
            before = tensor.clone()
            tensor.add_(1)
            assert torch.equal(piece.tensor, before)
            kept.add(piece.tensor.data_ptr())
        assert len(kept) == 1


@pytest.fixture(scope="module")
def facts(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """What `live_save_cases` found, with two processes."""
    pytest.importorskip("colossalai", reason="pip install -r requirements/colossalai.txt")
    return found_by("live_save_cases", tmp_path_factory.mktemp("live"), file="facts2.json")


def test_an_update_before_the_write_ends_is_not_in_the_checkpoint(facts: dict) -> None:
    """The training loop with DDP, FSDP2, ColossalAI's and DeepSpeed's ZeRO-2, and a disk that takes nothing until the
    next update was made and averaged: every tensor is that of the run that saved at once."""
    assert {"ddp", "fsdp2", "colossalai"} <= facts.keys()
    for backend, found in facts.items():
        assert found["differ"] == [], backend
        assert all(copied > 0 for copied in found["copied"]), backend


def test_without_the_doors_the_checkpoint_is_refused(facts: dict) -> None:
    """The danger is real: with the doors taken off no checkpoint of that step shows."""
    assert all(found["unguarded"] == [] for found in facts.values()), facts
