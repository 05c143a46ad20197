"""The published Wan workflow from end to end, through its commands: prepare, import a YAML, train, resume, validate."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from opensora_like.checkpoint.weights import read_weights
from tests.make_clips import numbered_frames, write_clip
from tests.training.harness import metrics_of
from tests.wan_stand_in import write_pipeline

ROOT = Path(__file__).parents[1]
YAML = """
model:
  pretrained_model_name_or_path: {model}
step_scheduler:
  global_batch_size: 4
  local_batch_size: 1
  num_epochs: 10
  ckpt_every_steps: 2
data:
  dataloader:
    meta_folder: {cache}
    num_workers: 1
optim:
  learning_rate: 1e-3
flow_matching:
  timestep_sampling: "uniform"
  flow_shift: 3.0
fsdp:
  dp_size: 2
checkpoint:
  enabled: true
  checkpoint_dir: {runs}
"""


def command(*arguments: object, num_processes: int = 1) -> str:
    """Run one of the program's commands. Returns: what it printed."""
    launcher = [sys.executable]
    if num_processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={num_processes}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*launcher, *map(str, arguments)],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny pipeline, and clips with a meta.json."""
    folder = tmp_path_factory.mktemp("workflow")
    write_pipeline(folder / "wan")
    videos = folder / "videos"
    videos.mkdir()
    entries = []
    for number in range(6):
        name = f"clip{number}.mp4"
        write_clip(videos / name, numbered_frames(17, 48, 64))
        about = {"file_name": name, "width": 64, "height": 48, "start_frame": 0, "end_frame": 16}
        entries.append({**about, "vila_caption": f"red circle {number}"})
    (videos / "meta.json").write_text(json.dumps(entries))
    return folder


def test_prepare_import_train_resume_and_validate(folder: Path) -> None:
    """Four steps of FSDP2 on two processes; the last two again from a checkpoint, bit for bit; videos of the result."""
    made = command(
        *("tools/cache_latents.py", "--video_folder", folder / "videos", "--output_folder", folder / "cache"),
        *("--model", folder / "wan", "--mode", "video", "--height", 32, "--width", 32, "--center-crop"),
    )
    assert (folder / "cache/manifest.json").is_file(), made
    text = YAML.format(model=folder / "wan", cache=folder / "cache", runs=folder / "runs")
    (folder / "wan.yaml").write_text(text)
    config = folder / "wan.py"
    told = command("tools/convert.py", "config", folder / "wan.yaml", config, "--bucket", "32x32x9")
    assert "carried  optim.learning_rate -> optim.lr" in told

    common = ["scripts/diffusion/train.py", config, "--dtype", "fp32", "--log-every", 1, "--tensorboard", "False"]
    command(*common, "--exp-name", "whole", "--steps", 4, num_processes=2)  # saves after 2, as the YAML says
    whole, parts = folder / "runs/whole", folder / "runs/parts"
    (half,) = whole.glob("epoch*-global_step2")
    command(*common, "--exp-name", "parts", "--steps", 4, "--load", half, num_processes=2)
    columns = ("step", "loss", "grad_norm", "lr", "samples")
    rows = metrics_of(whole, *columns)
    assert [row[0] for row in rows] == [1, 2, 3, 4] and rows[-1][-1] == 16
    assert metrics_of(parts, *columns) == rows[2:]
    trained, resumed, begun = (read_weights(path) for path in (whole, parts, folder / "wan/transformer"))
    assert trained.keys() == resumed.keys() == begun.keys()
    assert all(trained[name].equal(resumed[name]) for name in trained)
    assert any(not trained[name].equal(begun[name]) for name in trained)

    size = ["--height", 32, "--width", 32, "--num_frames", 9, "--num_inference_steps", 2, "--dtype", "fp32"]
    command(
        *("scripts/diffusion/validate.py", "--meta_folder", folder / "cache", "--checkpoint", parts / "LATEST"),
        *("--num_samples", 2, "--output_dir", folder / "samples", *size),
    )
    assert len(list((folder / "samples").glob("*.mp4"))) == 2
