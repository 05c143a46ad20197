"""Weights read in parts by each rank are those that every rank would have read whole, at a part of the cost."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from opensora_like.boosters.base import ShardRange, ShardStrips, Strip
from opensora_like.checkpoint.sharded import open_source

SCRIPT = Path(__file__).parents[1] / "distributed" / "sharded_load.py"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes wrote."""
    folder = tmp_path_factory.mktemp("sharded")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, SCRIPT, folder], env=environment, text=True, capture_output=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_loaded_in_parts_equals_loaded_whole(folder: Path) -> None:
    """One file with a prefix and keys missing, an indexed folder, a checkpoint, a torch file; ddp, fsdp2, tp."""
    assert [json.loads((folder / f"different{rank}.json").read_text()) for rank in (0, 1)] == [[], []]
    log = (folder / "log.txt").read_text()
    assert "only safetensors and checkpoints can be read in parts" in log  # the torch file
    assert len(re.findall(r"in parts: \d+ tensors loaded", log)) == 5 + 1  # one more without being asked
    assert log.count("peak_host_gib") == 15  # one of them made the weights


def test_unless_asked_the_numbers_stay_those_of_a_whole_load(folder: Path) -> None:
    """The default booster loads in parts where nothing random is missing; else whole, and says why."""
    said = (folder / "log.txt").read_text()
    assert "every rank loads it whole, since it lacks ['img_in.weight'" in said
    assert "load_sharded=True" in said


# booster -> most that a rank of two may need in all, over the size of the float32 file. Measured: 0.8 (of it 0.5 for
# the masters), 1.3 (1.0 for whole bfloat16 weights and half of the masters), 1.9 (1.0 for weights, masters and
# gradients, and what DeepSpeed copies); with whole loads 2.0, 2.0 and 3.0.
PEAKS = {"fsdp2": 1.1, "zero2": 1.65, "zero3": 2.4}


@pytest.mark.parametrize("booster", PEAKS)
def test_each_rank_reads_its_part_and_needs_less_memory(folder: Path, booster: str) -> None:
    """Of a model of some 200 MB on two ranks; the peak is that of the process, VmHWM, over what it had before."""
    if booster == "zero3" and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("deepspeed is not installed")
    size = (folder / "big.safetensors").stat().st_size
    parts, wholes = (
        [json.loads((folder / f"big_{booster}_{sharded}_{rank}.json").read_text()) for rank in (0, 1)]
        for sharded in (True, False)
    )
    for part, whole in zip(parts, wholes, strict=True):
        assert part["sum"] == whole["sum"]
        assert 0.49 * size < part["read"] < 0.51 * size
        assert part["peak"] < whole["peak"] - 0.3 * size, (part["peak"] / size, whole["peak"] / size)
        assert part["peak"] < PEAKS[booster] * size, part["peak"] / size


def test_every_kind_of_part_comes_out_of_a_file(tmp_path: Path) -> None:
    """Ranges across rows, boxes, boxes in pieces, scalars; and boxes cost no more than themselves."""
    matrix = torch.arange(7 * 12, dtype=torch.float32).reshape(7, 12)
    cube = torch.arange(2 * 3 * 4, dtype=torch.float32).reshape(2, 3, 4)
    save_file({"matrix": matrix, "cube": cube, "one": torch.tensor(5.0)}, tmp_path / "w.safetensors")
    read: list[int] = []
    source = open_source(tmp_path / "w.safetensors", where="w", on_read=read.append)
    assert source.shapes() == {"matrix": (7, 12), "cube": (2, 3, 4), "one": ()}
    assert torch.equal(source.read("matrix", ShardRange((7, 12), 17, 41)), matrix.view(-1)[17:41])
    assert torch.equal(source.read("cube", ShardRange((2, 3, 4), 5, 19)), cube.view(-1)[5:19])
    assert source.read("one", ShardRange((), 0, 1)).tolist() == [5.0]
    read.clear()
    boxes = (Strip(2 * 12 + 1, 12, 0, 5, 2, 3), Strip(2 * 12 + 8, 12, 2, 5, 3, 3))
    expected = torch.cat([matrix[2:5, 1:3], matrix[2:5, 8:11]], dim=1).reshape(-1)
    assert torch.equal(source.read("matrix", ShardStrips((7, 12), boxes)), expected)
    assert sum(read) == expected.nbytes
