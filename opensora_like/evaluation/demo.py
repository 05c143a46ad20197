"""What the demo shows of its run: prompts for every combination, scores of the samples, the report."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from opensora_like.checkpoint.layout import find_checkpoint
from opensora_like.checkpoint.manager import read_state
from opensora_like.datasets.resize import resize_crop
from opensora_like.datasets.video_io import probe, read_frames
from opensora_like.evaluation.report import Clip, ContactSheet, Note, ScoreRow, ScoreTable, write_report
from opensora_like.evaluation.shapes import accuracy, score_clip
from opensora_like.evaluation.world import Combination, combination_of, to_video

TARGETS = {"colour": 0.98, "shape": None, "direction": 0.95}


class Scored(NamedTuple):
    """One sampled clip, what was asked for, and what was read from its pixels."""

    video_CTHW: np.ndarray
    truth: Combination
    read: Mapping[str, str]


def write_prompts(clips: Path, path: Path) -> Path:
    """A csv of every combination of the world: those trained on, then those held out. Returns: `path`."""
    rows = []
    for part in ("seen", "held_out"):
        with (clips / f"{part}.csv").open(newline="") as file:
            rows += [{"name": f"{part}_{n:02d}", "text": r["text"]} for n, r in enumerate(csv.DictReader(file))]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["name", "text"])
        writer.writeheader()
        writer.writerows(rows)
    return path


def score_samples(prompts: Path, samples: Path) -> dict[str, list[Scored]]:
    """Read back the files that inference wrote: the first sample of every prompt, then the second, and so on.

    Returns: "seen" and "held_out".

    Raises:
        FileNotFoundError: a prompt has no file.
    """
    found: dict[str, list[tuple[int, Scored]]] = {"seen": [], "held_out": []}
    with prompts.open(newline="") as file:
        for row in csv.DictReader(file):
            truth = combination_of(row["text"])
            files = {_repeat(p.stem, row["name"]): p for p in samples.glob(f"{row['name']}*.mp4")}
            if 0 not in files:
                raise FileNotFoundError(f"no sample of {row['name']!r} in {str(samples)!r}; inference did not finish")
            for repeat, path in files.items():
                if repeat is not None:
                    video = read_sample(path)
                    scored = Scored(video, truth, score_clip(video))
                    found[row["name"].rsplit("_", 1)[0]].append((repeat, scored))
    return {part: [scored for _, scored in sorted(clips, key=lambda c: c[0])] for part, clips in found.items()}


def _repeat(stem: str, name: str) -> int | None:
    """Which sample of prompt `name` a file holds; None if it is another prompt's."""
    if stem == name:
        return 0
    rest = stem.removeprefix(f"{name}_")
    return int(rest) if rest.isdigit() else None


def read_clips(table: Path, *, size: int, num: int | None = None) -> list[tuple[np.ndarray, Combination]]:
    """The first `num` clips of a table, or all, brought to `size` pixels as training does it, and their truth.

    Returns: float32 [C, T, H, W] in [-1, 1], and the combination.
    """
    found = []
    with table.open(newline="") as file:
        for row in islice(csv.DictReader(file), num):
            frames = read_frames(row["path"], range(int(row["num_frames"])))
            found.append((np.asarray(resize_crop(frames, size, size)), combination_of(row["text"])))
    return found


def read_real(table: Path, *, size: int, num: int) -> list[Scored]:
    """The first `num` training clips, brought to the size the model sees."""
    return [Scored(video, truth, score_clip(video)) for video, truth in read_clips(table, size=size, num=num)]


def read_sample(path: Path) -> np.ndarray:
    """The pixels of a file that inference wrote, [C, T, H, W] in [-1, 1]."""
    return to_video(np.asarray(read_frames(str(path), range(probe(str(path)).num_frames))))


def score_and_report(folder: Path, *, train_seconds: float, world_size: int) -> dict[str, Any]:
    """Score the samples in ``folder/samples``; write ``metrics.json`` and ``report.html``.

    Args:
        train_seconds: wall clock of the training command, its start included.

    Returns: what metrics.json holds.
    """
    train = folder / "train"
    scored = score_samples(folder / "prompts.csv", folder / "samples")
    shares = {part: accuracy([s.read for s in clips], [s.truth for s in clips]) for part, clips in scored.items()}
    size = scored["seen"][0].video_CTHW.shape[-1]
    real = read_real(folder / "clips" / "meta.csv", size=size, num=12)
    state = read_state(find_checkpoint(str(train), train))
    booster = state["booster"]
    metrics = {
        **{f"{aspect}_accuracy": shares["seen"][f"{aspect}_accuracy"] for aspect in TARGETS},
        **{f"held_out_{aspect}_accuracy": shares["held_out"][f"{aspect}_accuracy"] for aspect in TARGETS},
        "num_seen_clips": shares["seen"]["num"],
        "num_held_out_clips": shares["held_out"]["num"],
        "train_seconds": round(train_seconds, 1),
        "steps": state["step"],
        "samples": state["samples"],
        "world_size": world_size,
        "booster": " ".join(str(booster[k]) for k in ("type", "plugin") if k in booster),
        "dtype": state["dtype"],
    }
    (folder / "metrics.json").write_text(json.dumps(metrics, indent=1) + "\n")
    write_report(
        folder / "report.html",
        title="opensora_like: a world of moving shapes",
        summary={
            "trained": f"{metrics['steps']} steps, {metrics['samples']} clips, {train_seconds:.0f} seconds",
            "processes": world_size,
            "booster": f"{metrics['booster']}, {metrics['dtype']}",
        },
        metrics_jsonl=train / "metrics.jsonl",
        sections=_sections(scored, shares, real),
        config=(train / "config.py").read_text(),
        versions=state["versions"],
    )
    return metrics


def _sections(
    scored: Mapping[str, Sequence[Scored]], shares: Mapping[str, Mapping[str, float]], real: Sequence[Scored]
) -> list[Any]:
    rows = [
        ScoreRow(
            f"{aspect}, {'seen' if part == 'seen' else 'held-out'} combinations",
            shares[part][f"{aspect}_accuracy"],
            int(shares[part]["num"]),
            target if part == "seen" else None,
        )
        for part in ("seen", "held_out")
        for aspect, target in TARGETS.items()
    ]
    what = (
        "A transformer was trained from random weights on small videos of one coloured shape that moves, with captions "
        "such as 'a red circle moving left'. It was then asked for every combination of colour, shape and direction, "
        "among them some that it has never seen together. A program, not a person, read the sampled files: it scores "
        "100 % on real clips of the same size."
    )
    return [
        Note("What this is", what),
        ScoreTable("Scores", rows, "Read from the pixels of the sampled mp4 files."),
        _sheet("Sampled: combinations seen in training", scored["seen"]),
        _sheet("Sampled: combinations never seen in training", scored["held_out"]),
        _sheet("Real clips, as the model sees them", real),
    ]


def _sheet(title: str, clips: Sequence[Scored]) -> ContactSheet:
    return ContactSheet(title, [Clip(s.video_CTHW, s.truth.caption, s.read, s.truth._asdict()) for s in clips])
