"""Export: what a checkpoint holds, in bfloat16, in files that other programs read."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from opensora_like.checkpoint import layout
from opensora_like.checkpoint.export import parse_size
from opensora_like.checkpoint.weights import read_weights
from tests.training.harness import ROOT, train_toy


def export(*arguments: str, script: str = "tools/zero_to_bf16.py") -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / script), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    outputs = tmp_path_factory.mktemp("export")
    train_toy(outputs, "--steps", "4", "--ckpt-every", "2")
    return outputs / "toy"


def test_shards_hold_the_weights(run_folder: Path, tmp_path: Path) -> None:
    """All shards together are the checkpoint's masters (or EMA) rounded to bfloat16, none above the size asked for."""
    newest = layout.complete_checkpoints(run_folder)[-1]
    for flags, ema in (([], False), (["--ema"], True)):
        out = tmp_path / str(ema)
        done = export(str(newest), str(out), "--max_shard_size", "50KB", "--safe_serialization", *flags)
        assert done.returncode == 0, done.stderr
        index = json.loads((out / "diffusion_pytorch_model.safetensors.index.json").read_text())
        assert len(set(index["weight_map"].values())) > 2
        whole, exported = read_weights(newest, use_ema=ema), read_weights(out)
        assert exported.keys() == whole.keys() == index["weight_map"].keys()
        assert all(torch.equal(exported[n], whole[n].bfloat16()) for n in whole)


def test_one_file_and_tags(run_folder: Path, tmp_path: Path) -> None:
    """Below the size there is one file; a run's folder means its newest checkpoint, a tag another one."""
    published = ["--max_shard_size", "80GB", "--safe_serialization"]
    done = export(str(run_folder), str(tmp_path / "a"), *published, script="scripts/zero_to_bf16.py")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "a/diffusion_pytorch_model.safetensors").is_file()
    tag = layout.complete_checkpoints(run_folder)[0].name
    assert export(str(run_folder), str(tmp_path / "b"), "-t", tag, "--dtype", "fp32").returncode == 0
    older = read_weights(run_folder / tag, use_ema=False)
    assert all(torch.equal(t, older[n]) for n, t in read_weights(tmp_path / "b").items())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere", "out"], "nowhere"),
        (["{run}", "out", "--max_shard_size", "big"], "big"),
        (["{run}", "out", "-t", "x"], "x"),
    ],
)
def test_mistakes_are_named(run_folder: Path, arguments: list[str], message: str) -> None:
    """One line, exit code 2."""
    done = export(*(a.format(run=run_folder) for a in arguments))
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr


def test_sizes() -> None:
    """Decimal and binary units."""
    assert [parse_size(t) for t in ("10", "80GB", "1.5MiB", "2 kb")] == [10, 80 * 10**9, 3 * 2**19, 2000]
