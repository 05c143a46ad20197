"""Sampling: files from prompts, csv and references; the same pixels whatever the batch and the source of weights."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from opensora_like.checkpoint.export import checkpoint_weights, export_weights
from opensora_like.config import read_config
from opensora_like.datasets.video_io import probe, read_frames, read_image
from opensora_like.datasets.video_writing import write_image
from opensora_like.evaluation.generate import Sampled, VideoGenerator
from opensora_like.evaluation.prompts import read_prompts
from opensora_like.settings import InferenceConfig
from tests.training.harness import ROOT, train_toy

CONFIG = ROOT / "tests/training/toy_inference.py"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    outputs = tmp_path_factory.mktemp("generate")
    train_toy(outputs, "--steps", "3")
    return outputs / "toy"


def generator_of(*arguments: str) -> VideoGenerator:
    return VideoGenerator(read_config(CONFIG, arguments, schema=InferenceConfig).config, torch.device("cpu"))


def sample(*arguments: str) -> list[Sampled]:
    generator = generator_of(*arguments)
    return list(generator.sample(read_prompts(generator.cfg)))


def test_a_sample_depends_on_its_prompt_and_seed_alone(checkpoint: Path, tmp_path: Path) -> None:
    """Batches of any size, and repeats, give each prompt the pixels it has alone; another seed gives others."""
    prompts = tmp_path / "p.csv"
    prompts.write_text("text,name\na red ball,red\na blue ball,blue\na dog,dog\n")
    common = ["--ckpt-path", str(checkpoint), "--prompts", str(prompts), "--num-sample", "2"]
    one, three = sample(*common, "--batch-size", "1"), sample(*common, "--batch-size", "3")
    assert [(s.prompt.name, s.repeat) for s in one] == [(n, k) for n in ("red", "blue", "dog") for k in (0, 1)]
    for a, b in zip(one, three, strict=True):
        torch.testing.assert_close(a.video_CTHW, b.video_CTHW, atol=1e-5, rtol=0)
    assert not torch.equal(one[0].video_CTHW, one[1].video_CTHW)
    shifted = sample(*common, "--seed", "43")  # its first repeat is the second of seed 42
    torch.testing.assert_close(shifted[0].video_CTHW, one[1].video_CTHW, atol=1e-5, rtol=0)


def test_weights_from_checkpoint_and_file_are_the_same(checkpoint: Path, tmp_path: Path) -> None:
    """A run's folder, its checkpoint and the exported safetensors give one result; EMA is preferred."""
    folder = next(checkpoint.glob("epoch*"))
    export_weights(checkpoint_weights(folder, use_ema=True), tmp_path, max_shard_size=10**9, dtype=torch.float32)
    sources = [str(checkpoint), str(folder), str(tmp_path / "diffusion_pytorch_model.safetensors"), str(tmp_path)]
    videos = [sample("--ckpt-path", source, "--prompt", "a cat")[0].video_CTHW for source in sources]
    assert all(torch.equal(videos[0], v) for v in videos[1:])
    raw = sample("--ckpt-path", str(folder), "--use-ema", "False", "--prompt", "a cat")[0].video_CTHW
    assert not torch.equal(raw, videos[0])


def test_given_frames_come_back(checkpoint: Path, tmp_path: Path) -> None:
    """i2v: the first frame of what is made is the reference image, brought to the size."""
    image = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    write_image(tmp_path / "ref.png", image)
    (made,) = sample(
        "--ckpt-path", str(checkpoint), "--prompt", "x", "--cond-type", "i2v_head", "--ref", str(tmp_path / "ref.png")
    )
    first = made.video_CTHW[:, 0].permute(1, 2, 0)
    torch.testing.assert_close(first, torch.from_numpy(image) / 127.5 - 1, atol=1e-2, rtol=0)


def test_offload_changes_nothing_but_where_weights_wait(checkpoint: Path) -> None:
    """The same pixels; between uses no weight is on the device, and each model's are there while it runs."""
    common = ["--ckpt-path", str(checkpoint), "--prompt", "a cat"]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    videos = []
    for offload in ("False", "True"):
        config = read_config(CONFIG, [*common, "--offload", offload], schema=InferenceConfig).config
        generator = VideoGenerator(config, device)
        modules = [generator.model, generator.autoencoder, *generator.encoders.values()]
        homes = {p.device.type for m in modules for p in m.parameters()}
        assert homes == ({"cpu"} if offload == "True" else {device.type})
        (made,) = generator.sample(read_prompts(config))
        videos.append(made.video_CTHW)
        assert {p.device.type for m in modules for p in m.parameters()} == homes
    torch.testing.assert_close(videos[1], videos[0], atol=1e-5, rtol=0)


def run_script(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "scripts/diffusion/inference.py"), str(CONFIG), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)


def test_script_writes_videos_and_images(checkpoint: Path, tmp_path: Path) -> None:
    """mp4 with the asked rate and size, png for one frame, the caption beside each."""
    out = tmp_path / "out"
    common = ["--ckpt-path", str(checkpoint), "--save-dir", str(out), "--prompt", "a cat"]
    done = run_script(*common, "--fps-save", "12")
    assert done.returncode == 0, done.stderr
    video = out / "prompt_0000.mp4"
    info = probe(str(video))
    assert (info.num_frames, info.height, info.width, info.fps) == (5, 16, 16, 12.0)
    assert np.asarray(read_frames(str(video), range(5))).shape == (5, 16, 16, 3)
    assert (out / "prompt_0000.txt").read_text() == "a cat 12 FPS.\n"
    assert run_script(*common, "--num-frames", "1").returncode == 0
    assert np.asarray(read_image(str(out / "prompt_0000.png"))).shape[-3:] == (16, 16, 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ckpt-path", "nowhere", "--prompt", "x"], "ckpt_path='nowhere' does not exist"),
        (["--prompt", "x"], "--ckpt-path"),
        (["--ckpt-path", "{run}"], "--prompt"),
        (["--ckpt-path", "{run}", "--prompt", "x", "--height", "15"], r"height=15 must be a multiple of 2"),
        (["--ckpt-path", "{run}", "--prompt", "x", "--resolution", "16px"], "give either resolution"),
        (["--ckpt-path", "{run}", "--prompt", "x", "--aspect-ratio", "1:1"], "aspect_ratio='1:1' goes with resolution"),
        (["--ckpt-path", "{run}", "--prompt", "x", "--cond-type", "i2v_haed"], "i2v_head"),
        (["--ckpt-path", "{run}", "--prompt", "x", "--cond-type", "i2v_head"], "no reference"),
        (["--ckpt-path", "{run}", "--prompt", "x", "--model.depth", "2"], "does not fit the model"),
        (["--ckpt-path", "{run}", "--prompts", "gone.csv"], "gone.csv"),
    ],
)
def test_mistakes_are_named(checkpoint: Path, arguments: list[str], message: str) -> None:
    """Each says what to give."""
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        sample(*(a.format(run=checkpoint) for a in arguments))
