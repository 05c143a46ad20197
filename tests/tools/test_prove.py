"""tools/prove.py runs a mode from clips to scores, reports every number, and fails when one is missed."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CHECKS = {
    "hunyuan_video": {
        "colour": 0.95,
        "direction": 0.85,
        "given a frame: first frame, dB, the worst clip": 30,
        "given a frame: direction": 0.85,
        "given a frame: colour": 0.85,
    },
    "wan": {"colour": 0.95, "direction": 0.85},
    "latents": {
        "colour read off latents of new clips": 0.97,
        "direction read off latents of new clips": 0.95,
        "colour": 0.9,
        "direction": 0.85,
    },
}


def prove(*arguments: object) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "tools/prove.py", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.parametrize("mode", sorted(CHECKS))
def test_two_steps_prove_nothing(mode: str, tmp_path: Path) -> None:
    """The whole way with two updates: numbers against what is asked for, and exit code 1."""
    done = prove(mode, "--outputs", tmp_path / "proof", "--steps", 2, "--num_clips", 40, "--num_sample", 1)
    assert done.returncode == 1, done.stdout + done.stderr
    found = json.loads((tmp_path / "proof/proof.json").read_text())
    assert {check["name"]: check["least"] for check in found} == CHECKS[mode]
    assert all(math.isfinite(check["found"]) for check in found)
    assert done.stdout.count("reached") + done.stdout.count("MISSED") == len(found) and "MISSED" in done.stdout
    assert "seen: colour_accuracy" in done.stdout and "held_out: colour_accuracy" in done.stdout
    assert "num 40.000" in done.stdout and "num 8.000" in done.stdout
    assert done.stdout.count("nearness") == (3 if mode == "latents" else 0)


def test_two_steps_do_not_teach_to_listen(tmp_path: Path) -> None:
    """Clips with sound, training, samples with and without it: the sound decides nothing yet, and that is told."""
    done = prove("speech", "--outputs", tmp_path / "proof", "--steps", 2, "--num_clips", 40)
    assert done.returncode == 1, done.stdout + done.stderr
    heard, unheard = json.loads((tmp_path / "proof/proof.json").read_text())
    assert heard["least"] == 0.8 > heard["found"] and unheard["least"] == 0 and math.isfinite(unheard["found"])
    assert "correlation of size and loudness, heard" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("i2v", "--demo", "none"), "run make demo first"),
        (("lora", "--num_clips", 50), "does not read ['--num_clips']"),
        (("distill", "--demo", "none"), "run make demo first"),
        (("wan", "--demo", "none"), "does not read ['--demo']"),
        (("latents", "--num_clips", 39), "must be 40 or more"),
        (("speech", "--num_sample", 4), "does not read ['--num_sample']"),
    ],
)
def test_what_would_be_ignored_or_is_missing_is_an_error(arguments: tuple[object, ...], told: str) -> None:
    """Exit code 2, before anything is removed."""
    done = prove(*arguments)
    assert done.returncode == 2 and told in done.stderr
