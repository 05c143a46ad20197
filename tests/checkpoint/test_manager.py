"""What a checkpoint holds, what is kept of many, and what is taken of one."""

from __future__ import annotations

import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import local
from types import SimpleNamespace

import pytest
import torch

from opensora_like.checkpoint import files, layout
from opensora_like.checkpoint.facts import FORMAT_VERSION
from opensora_like.checkpoint.files import write_safetensors
from opensora_like.checkpoint.manager import CheckpointManager, TrainState
from opensora_like.checkpoint.pieces import PieceReader
from tests.checkpoint.one_process import make_manager
from tests.distributed.programs import found_by


def masters(manager: CheckpointManager) -> dict[str, torch.Tensor]:
    return {name: shard.clone() for name, shard in manager.booster.master_shards()}


def test_the_state_file_says_what_it_is(tmp_path: Path) -> None:
    """Format, position, facts, versions and commit are readable; config and checksums lie beside."""
    manager = make_manager(tmp_path, config_text="steps = 3\n", about={"world_size": 1, "booster": {"type": "ddp"}})
    folder = manager.save(TrainState(step=3, epoch=1, micro_batch=2, samples=9))
    facts = json.loads((folder / layout.STATE_FILE).read_text())
    assert facts["format_version"] == FORMAT_VERSION
    assert [facts[n] for n in ("step", "epoch", "micro_batch", "samples")] == [3, 1, 2, 9]
    assert facts["booster"] == {"type": "ddp"} and facts["versions"]["torch"] == torch.__version__
    assert "git" in facts["versions"]
    assert (folder / "config.py").read_text() == "steps = 3\n"
    sums = json.loads((folder / "checksums.json").read_text())
    assert {f.name for f in folder.iterdir()} == {*sums, "checksums.json"}
    assert PieceReader(folder).kinds() == ["ema", "exp_avg", "exp_avg_sq", "master", "step"]


def test_latest_points_to_the_newest_and_old_ones_go(tmp_path: Path) -> None:
    """The two newest and every multiple of 4 stay; the link can be given to load."""
    manager = make_manager(tmp_path, keep_n_latest=2, keep_every=4)
    for step in range(1, 12):
        folder = manager.save(TrainState(step=step))
        assert os.readlink(tmp_path / layout.LATEST) == folder.name  # noqa: PTH115 - the text of the link
    assert [layout.step_of(f) for f in layout.complete_checkpoints(tmp_path)] == [4, 8, 10, 11]
    assert layout.find_checkpoint(str(tmp_path / layout.LATEST), tmp_path) == folder
    with pytest.raises(ValueError, match="keep_every=-1"):
        make_manager(tmp_path, keep_every=-1)


def test_weights_alone(tmp_path: Path) -> None:
    """Masters are the checkpoint's, the EMA begins at them, the moments stay this run's."""
    source = make_manager(tmp_path / "a")
    folder = source.save(TrainState(step=7))
    other = make_manager(tmp_path / "b", seed=1)
    moments = {n: t.clone() for n, t in other.booster.optimizer_shards()["exp_avg"].items()}
    report = other.load_weights(folder)
    assert report.fits and report.loaded == 4 and report.lines() == []
    wanted = masters(source)
    for name, tensor in masters(other).items():
        assert torch.equal(tensor, wanted[name]) and torch.equal(other.ema[name], wanted[name])
    assert all(torch.equal(t, moments[n]) for n, t in other.booster.optimizer_shards()["exp_avg"].items())


def test_a_partial_load_reports_every_key(tmp_path: Path) -> None:
    """Missing, unexpected and misshapen tensors: an error, or one line for each; what fits is loaded."""
    folder = make_manager(tmp_path / "a", extra=True).save(TrainState(step=1))
    narrow = make_manager(tmp_path / "b", width=4)
    before = masters(narrow)
    with pytest.raises(ValueError, match=r"2 unexpected .* 3 of another shape"):
        narrow.load_weights(folder)
    assert all(torch.equal(t, before[n]) for n, t in masters(narrow).items())
    report = narrow.load_weights(folder, strict=False)
    assert report.loaded == 1 and len(report.lines()) == 5
    assert torch.equal(masters(narrow)["1.bias"], PieceReader(folder).read("master", "1.bias"))
    assert torch.equal(masters(narrow)["0.weight"], before["0.weight"])
    small = make_manager(tmp_path / "c").save(TrainState(step=1))
    report = make_manager(tmp_path / "d", extra=True).load_weights(small, strict=False)
    assert report.lines() == [f"missing, keeps its initial value: 2.{n}" for n in ("bias", "weight")]
    with pytest.raises(ValueError, match=r"another model.*2 missing"):
        make_manager(tmp_path / "e", extra=True).load(small)


@pytest.mark.parametrize("async_io", [False, True])
def test_the_last_save_has_to_succeed(tmp_path: Path, async_io: bool) -> None:
    """With on_save_error='continue' one that fails is made up for by a later one; there is none after the last."""
    run = tmp_path / "run"
    manager = make_manager(run, on_save_error="continue", async_io=async_io)
    run.rename(tmp_path / "gone")
    manager.save(TrainState(step=1))
    with pytest.raises(OSError, match=r"could not save epoch0-global_step1.*last save of this run"):
        manager.finish()
    run.mkdir()
    manager.save(TrainState(step=2))
    manager.finish()
    assert [layout.step_of(f) for f in layout.complete_checkpoints(run)] == [2]


def test_what_is_not_taken_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An average and moments that the run has no use for, and an average that begins anew."""
    said: list[str] = []
    monkeypatch.setattr("opensora_like.checkpoint.manager.logger.warning", lambda text, *a: said.append(text % a))
    both = make_manager(tmp_path / "both")
    folder = both.save(TrainState(step=1))
    both.load(folder)
    assert said == []
    plain = make_manager(tmp_path / "plain", has_ema=False)
    plain.load(folder)
    assert len(said) == 1 and "['ema'] are not taken" in said.pop()
    both.load(plain.save(TrainState(step=1)))
    assert len(said) == 1 and "has no EMA: it begins at the weights" in said.pop()
    monkeypatch.setattr(plain.booster, "optimizer_shards", dict)  # as of SGD without momentum
    plain.load(folder)
    assert len(said) == 1 and "['ema', 'exp_avg', 'exp_avg_sq', 'step'] are not taken" in said.pop()


class StandIn:
    """The part of ``tensornvme.async_file_io.AsyncFileWriter`` that is used, as ColossalAI calls it; without speed."""

    lose: int | None = None  # which write to drop, as the real one drops a failed one without a word

    def __init__(self, path: str, n_entries: int = 16, backend: str | None = None, n_tasks: int = 0) -> None:
        self._handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        self._pool, self._tasks, self.offset, self._kept = ThreadPoolExecutor(2), [], 0, []

    def write_raw(self, py_ref: object, buffer: int, n_bytes: int, offset: int) -> None:
        import ctypes

        self._kept.append(py_ref)
        if len(self._kept) - 1 != self.lose:
            content = ctypes.string_at(buffer, n_bytes)
            self._tasks.append(self._pool.submit(os.pwrite, self._handle, content, offset))
        self.offset += n_bytes

    def synchronize(self) -> None:
        for task in self._tasks:
            task.result()
        os.close(self._handle)


def test_tensornvme_works_on_the_gpu_of_its_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads begin with GPU 0 as the current one; its stream is made on that of the thread that found it."""
    current = local()
    current.device = 3

    class OnDevice:
        def __init__(self, device: int) -> None:
            self.device = device

        def __enter__(self) -> None:
            current.device = self.device

        def __exit__(self, *problem: object) -> None:
            del current.device

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: getattr(current, "device", 0))
    monkeypatch.setattr(torch.cuda, "device", OnDevice)
    monkeypatch.setattr(files.util, "find_spec", lambda name: name)
    module = SimpleNamespace(AsyncFileWriter=lambda path, n_entries: (path, n_entries, torch.cuda.current_device()))
    monkeypatch.setattr(files, "import_module", lambda name: module)
    writer = files.find_nvme_writer()
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(writer, "file", n_entries=4).result() == ("file", 4, 3)


class LosesOne(StandIn):
    lose = 2


def test_tensornvme_is_called_by_its_contract(tmp_path: Path) -> None:
    """Only of the contract: a stand-in with TensorNVMe's interface gets every byte at its place, and a write that it
    loses is found. The library itself needs a GPU and is not in this test."""
    tensors = [("a", torch.randn(5, 3)), ("empty", torch.zeros(0)), ("b", torch.randn(1000).bfloat16())]
    plain = write_safetensors(tmp_path / "plain", tensors)
    assert write_safetensors(tmp_path / "nvme", tensors, nvme_writer=StandIn) == plain
    assert (tmp_path / "nvme").read_bytes() == (tmp_path / "plain").read_bytes()
    with pytest.raises(OSError, match="TensorNVMe lost a write"):
        write_safetensors(tmp_path / "lost", tensors, nvme_writer=LosesOne)
    with pytest.raises(OSError, match="Errno 2"):
        write_safetensors(tmp_path / "no" / "folder", tensors, nvme_writer=StandIn)


def test_ranks_load_what_the_first_of_them_sees(tmp_path: Path) -> None:
    """A shared disk shows the others what was there before, and a run that goes on publishes between two looks."""
    assert found_by("one_view_cases", tmp_path) == {"latest": [2, 2], "run": [2, 2]}
