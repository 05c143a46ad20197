"""Samples the shapes world with trained weights and scores what comes out, without a file in between."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from opensora_like.config import read_config
from opensora_like.datasets.resize import psnr, resize_crop
from opensora_like.datasets.video_io import read_frames, read_image
from opensora_like.evaluation.demo import read_sample
from opensora_like.evaluation.generate import Sampled, VideoGenerator
from opensora_like.evaluation.prompts import read_prompts
from opensora_like.evaluation.shapes import accuracy, score_clip
from opensora_like.evaluation.world import combination_of
from opensora_like.settings import InferenceConfig


class Check(NamedTuple):
    """One number and the least it has to be."""

    name: str
    found: float
    least: float

    def __str__(self) -> str:
        verdict = "reached" if self.found >= self.least else "MISSED"
        return f"{self.name} {self.found:.3f}, at least {self.least:g}: {verdict}"


def write_first_frames(table: Path, folder: Path, *, num: int, sounds: bool = False) -> Path:
    """The first frame of each of the first `num` clips as an image, and a csv of prompts that refer to them.

    Args:
        table: csv with path and text.
        sounds: give each prompt the sound of its clip; the table then has audio_path.

    Returns: the csv, with name, text and ref, and audio.
    """
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    with table.open(newline="") as file:
        rows = [row for _, row in zip(range(num), csv.DictReader(file), strict=False)]
    prompts = folder / "prompts.csv"
    with prompts.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["name", "text", "ref", *(["audio"] if sounds else [])])
        for number, row in enumerate(rows):
            image = folder / f"first_{number:03d}.png"
            Image.fromarray(np.asarray(read_frames(row["path"], [0]))[0]).save(image)
            writer.writerow([f"clip_{number:03d}", row["text"], image, *([row["audio_path"]] if sounds else [])])
    return prompts


def sample(config: str, arguments: Sequence[str]) -> list[Sampled]:
    """What scripts/diffusion/inference.py would write, before it is encoded as a file."""
    cfg = read_config(config, arguments, schema=InferenceConfig).config
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return list(VideoGenerator(cfg, device).sample(read_prompts(cfg)))


def scores(sampled: Sequence[Sampled]) -> Mapping[str, float]:
    """Shares of clips in which colour, shape and direction are those of the prompt; see `shapes.accuracy`."""
    return accuracy([score_clip(s.video_CTHW) for s in sampled], [combination_of(s.prompt.text) for s in sampled])


def score_files(table: Path) -> Mapping[str, float]:
    """As `scores`, of files.

    Args:
        table: csv with path, from the table's folder, and text, as scripts/diffusion/validate.py writes it.
    """
    with table.open(newline="") as file:
        rows = list(csv.DictReader(file))
    readings = [score_clip(read_sample(table.parent / row["path"])) for row in rows]
    return accuracy(readings, [combination_of(row["text"]) for row in rows])


def first_frame_psnr(sampled: Sequence[Sampled]) -> list[float]:
    """How near the first frame of each clip is to its reference, in dB of a range of 2, [-1, 1].

    The reference is brought to the clip's size as the sampler does it.
    """
    found = []
    for clip in sampled:
        height, width = clip.video_CTHW.shape[2:]
        wanted = torch.as_tensor(resize_crop(read_image(clip.prompt.refs[0]), height, width, image=True))
        found.append(psnr(clip.video_CTHW[:, :1], wanted))
    return found
