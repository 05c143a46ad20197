"""A stranger's folder of videos, sound ones and odd ones, through meta, the table check and training."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np

from tests.make_clips import numbered_frames, turn, write_clip, write_fakes
from tests.training.harness import ROOT


def write_folder(folder: Path) -> Path:
    """Odd sizes, rates, time stamps, sound, a turned one, an image, and three files that are no videos."""
    from PIL import Image

    frames = numbered_frames(24, 66, 98)
    paths = [
        write_clip(folder / "plain.mp4", numbered_frames(24, 64, 96)),
        write_clip(folder / "odd_fps.mp4", frames, fps=29.97),
        write_clip(folder / "talking.mp4", frames, with_audio=True),
        write_clip(folder / "mpeg4.mp4", frames, codec="mpeg4", fps=12),
        write_clip(folder / "varied.mp4", frames, pts=[20 * (i + i // 3) for i in range(24)]),
        turn(write_clip(folder / "turned.mp4", frames), 90),
    ]
    Image.fromarray(np.zeros((80, 70, 3), np.uint8)).save(folder / "photo.png")
    paths += [folder / "photo.png", *write_fakes(folder).values()]
    table = folder / "clips.csv"
    table.write_text("path,text\n" + "".join(f"{p},a clip called {p.stem}\n" for p in paths))
    return table


def run(*command: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *command], capture_output=True, text=True, check=False, cwd=ROOT)


def test_from_a_folder_to_a_checkpoint(tmp_path: Path) -> None:
    """Good files train, bad ones are listed with reasons; a file that vanishes later is counted and replaced."""
    table = write_folder(tmp_path)
    meta = run("tools/meta.py", "--input", str(table), "--output", str(tmp_path / "meta.csv"), "--num_workers", "0")
    assert meta.returncode == 0, meta.stderr
    rows = (tmp_path / "meta.csv").read_text().splitlines()
    errors = (tmp_path / "meta_errors.csv").read_text().splitlines()
    assert len(rows) - 1 == 7 and len(errors) - 1 == len(table.read_text().splitlines()) - 1 - 7
    (tmp_path / "mpeg4.mp4").unlink()

    config = tmp_path / "my_config.py"
    config.write_text(
        f'_base_ = ["{ROOT}/configs/diffusion/train/tiny.py"]\n'
        f'dataset = dict(data_path="{tmp_path}/meta.csv")\n'
        'bucket_config = {"_delete_": True, "32px": {5: (1.0, 2), 1: (1.0, 1)}}\n'
        "model = dict(hidden_size=64, depth=1, depth_single_blocks=1, axes_dim=(4, 6, 6))\n"
        f'outputs = "{tmp_path}"\nexp_name = "run"\nsteps = 6\nlog_every = 1\nnum_workers = 1\n'
        "max_bad_fraction = 0.5\n"
    )
    trained = run("scripts/diffusion/train.py", str(config), "--booster", "{'type': 'ddp'}")
    assert trained.returncode == 0, trained.stderr
    losses = [json.loads(line)["loss"] for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert len(losses) == 6 and all(np.isfinite(losses))
    bad = [json.loads(line) for line in (tmp_path / "run/bad_samples.jsonl").read_text().splitlines()]
    assert bad and all(row["path"].endswith("mpeg4.mp4") for row in bad)

    told = run("scripts/diffusion/train.py", str(config), "--exp-name", "b", "--bucket_config.32px.5", "(1.0, 90)",
               "--bucket_config.32px.1", "(1.0, 90)", "--booster", "{'type': 'ddp'}")  # fmt: skip
    assert told.returncode == 2 and "Traceback" not in told.stderr and "batch size" in told.stderr
