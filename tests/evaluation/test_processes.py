"""Several processes make the files of one: each file once, and videos that they share with the same pixels."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from opensora_like.config import read_config
from opensora_like.datasets.video_writing import write_image
from opensora_like.evaluation.generate import VideoGenerator
from opensora_like.evaluation.prompts import read_prompts
from opensora_like.evaluation.shared_video import cut_sequence
from opensora_like.models.mmdit.model import MMDiT
from opensora_like.settings import InferenceConfig
from tests.distributed.sampling_cases import CONFIG, SHARED, flags_of
from tests.stand_ins import save_flux
from tests.training.harness import ROOT, train_toy

TEXTS = ["a cat", "a dog", "a bird"]
FILES = sorted(f"p_{row:04d}{k}.mp4" for row in range(3) for k in ("", "_1"))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which two processes have made all cases."""
    folder = tmp_path_factory.mktemp("processes")
    train_toy(folder, "--steps", "3")
    save_flux(folder / "flux", with_encoders=False)
    write_image(folder / "ref.png", np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8))
    (folder / "p.csv").write_text("text\n" + "".join(f"{text}\n" for text in TEXTS))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += [str(ROOT / "tests/distributed/sampling_cases.py"), str(folder), str(folder / "toy")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*command, str(folder / "flux")],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr[-6000:]
    return folder


def written(made: Path, case: str) -> list[list[str]]:
    """Files that each rank made."""
    return [json.loads((made / f"rank{rank}.json").read_text())[case] for rank in range(2)]


@pytest.mark.parametrize("name", SHARED)
def test_a_shared_video_is_that_of_one_process(made: Path, name: str) -> None:
    """Uneven tokens, both kinds of attention, both samplers, guidance by text and image: within 1e-5."""
    config = read_config(CONFIG, flags_of(name, made, str(made / "toy")), schema=InferenceConfig).config
    generator = VideoGenerator(config, torch.device("cpu"))
    alone = torch.stack([s.video_CTHW for s in generator.sample(read_prompts(config))])
    torch.testing.assert_close(torch.load(made / f"{name}.pt"), alone, atol=1e-5, rtol=0)


def test_every_file_is_made_once(made: Path) -> None:
    """Each process makes its share; with nothing left, or too little for both, nobody waits."""
    shares = written(made, "shares")
    assert sorted(itertools.chain(*shares)) == FILES == sorted(p.name for p in made.glob("shares/*.mp4"))
    assert [len(names) for names in shares] == [3, 3]
    assert written(made, "again") == [[], []]
    assert written(made, "fewer") == [["prompt_0000.mp4"], []]


def test_a_group_draws_its_images_together(made: Path) -> None:
    """With FLUX and all processes on one video: images are shared out, the first process writes the videos."""
    assert written(made, "together") == [FILES, []]
    images = {p.stem for p in made.glob("together/generated_condition/*.png")}
    assert images == {Path(name).stem for name in FILES}


def test_a_refusal_reaches_every_process(made: Path) -> None:
    """A size that leaves processes over, and a folder with other files: the same words on each rank, no hang."""
    for case, words in (("refused", "sp_size=3 does not divide the 2 processes"), ("other", "made with seed=42")):
        assert all(words in message for message in written(made, case))


def test_heads_that_cannot_be_shared_are_named() -> None:
    """Before anything is cut: both numbers, and what would do."""
    from opensora_like.boosters.sequence_parallel import SequenceGroup

    sizes = {"context_in_dim": 8, "hidden_size": 36, "num_heads": 3, "depth": 1, "depth_single_blocks": 1}
    model = MMDiT(12, 8, **sizes, axes_dim=(4, 4, 4), patch_size=1)
    with pytest.raises(ValueError, match=r"sp_size=2 does not divide the 3 heads of .*\[1, 3\], or --sp-mode ring"):
        cut_sequence(model, SequenceGroup(None, 0, 2, "all_to_all"))
