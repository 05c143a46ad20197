"""Runs tools/cache_latents.py, here or as processes, and reads what it made."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch

from opensora_like.datasets.latent_store import open_store
from tools import cache_latents

ROOT = Path(__file__).parents[2]
SIZE = ["--height", "32", "--width", "48", "--center-crop"]


def run(*arguments: object) -> int:
    """The tool in this process. Returns: its exit code."""
    return cache_latents.prepare([str(argument) for argument in arguments])()


def encode(videos: Path, out: Path, model: Path, *arguments: object) -> int:
    return run("--video_folder", videos, "--output_folder", out, "--model", model, *SIZE, *arguments)


def start(*arguments: object, processes: int = 1) -> subprocess.Popen:
    """The tool as a command, under torchrun if there are several processes."""
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else []
    command = [sys.executable, *launch, str(ROOT / "tools/cache_latents.py"), *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, cwd=ROOT, env=environment, text=True, **pipes)


def process(*arguments: object, processes: int = 1) -> subprocess.CompletedProcess:
    """The same, to its end."""
    started = start(*arguments, processes=processes)
    told = started.communicate(timeout=300)
    return subprocess.CompletedProcess(started.args, started.returncode, *told)


def entries_of(store: Path) -> dict[str, dict]:
    """Key -> tensors and facts."""
    opened = open_store(store)
    keys = opened.table()["key"].to_pylist()
    return {key: {**opened.read(key), "facts": opened.facts(key)} for key in keys}


def assert_same(one: dict[str, dict], other: dict[str, dict]) -> None:
    assert one.keys() == other.keys() and one
    for key, entry in one.items():
        assert entry.keys() == other[key].keys()
        for name, value in entry.items():
            same = (
                torch.equal(value, other[key][name]) if isinstance(value, torch.Tensor) else value == other[key][name]
            )
            assert same, (key, name)
