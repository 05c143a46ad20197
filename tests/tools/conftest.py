"""Videos and models of a few thousand weights for the tests of tools/cache_latents.py."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def model(tmp_path_factory) -> Path:
    """A pipeline's folder with a Wan autoencoder and a umT5 of a few thousand random weights."""
    from opensora_like.models.autoencoders.wan_vae import WanVAE
    from tests.models.test_umt5 import saved

    folder = tmp_path_factory.mktemp("model")
    saved(folder, parts=True)
    WanVAE(tiny={}).model.save_pretrained(folder / "vae")
    return folder


@pytest.fixture(scope="session")
def made_once(tmp_path_factory) -> Path:
    """The folder of four clips that tests copy."""
    from tools.make_shapes import ShapesSet, write_set

    folder = tmp_path_factory.mktemp("shapes")
    write_set(ShapesSet(num_clips=4, size=48, num_frames=11, fps=8), folder)
    return folder / "clips"


@pytest.fixture
def videos(made_once: Path, tmp_path: Path) -> Path:
    """Four clips of 11 frames with a meta.json, whose second clip is a part of its file."""
    shutil.copytree(made_once, tmp_path / "videos")
    entries = [
        {"file_name": f"{n:06d}.mp4", "width": 48, "height": 48, "start_frame": 2 if n == 1 else 0, "end_frame": 11}
        for n in range(4)
    ]
    captions = ["a red circle", "circle", "red red circle of four", "red"]
    for entry, caption in zip(entries, captions, strict=True):
        entry["vila_caption"] = caption
    (tmp_path / "videos/meta.json").write_text(json.dumps(entries))
    return tmp_path / "videos"
