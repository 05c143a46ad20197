"""Score generated clips of the shapes world against what their prompts asked for.

python tools/score_shapes.py SAMPLES_DIR --prompts data/shapes/seen.csv [--json scores.json] [--allow_missing]

SAMPLES_DIR is what scripts/diffusion/inference.py wrote with the same csv: NAME[_k].mp4 or .png per row, NAME being
the row's `name` or the csv's own name and the row number. The truth is in the columns colour, shape, direction, or
else in the text. Every clip is scored as it is in the file, at its own size; "none" means that nothing definite is
there.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from opensora_like.cli import run_guarded
from opensora_like.datasets.video_io import is_image, probe, read_frames, read_image
from opensora_like.evaluation.shapes import ASPECTS, accuracy, score_clip
from opensora_like.evaluation.world import COLOURS, DIRECTIONS, SHAPES, Combination, combination_of, to_video
from opensora_like.publish import is_draft

KNOWN = {"colour": COLOURS, "shape": SHAPES, "direction": ("", *DIRECTIONS)}


class Wanted(NamedTuple):
    """One row of the prompts: the name its files begin with, its text and its truth."""

    name: str
    text: str
    truth: Combination


def read_prompts(path: Path) -> list[Wanted]:
    """Read the csv that the samples were made from.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no rows, no column `text`, or a truth that is not of this world.
    """
    if not path.is_file():
        raise FileNotFoundError(f"prompts={str(path)!r} does not exist")
    with path.open(newline="", encoding="utf-8-sig") as file:
        rows = list(csv.DictReader(file))
    if not rows or "text" not in rows[0]:
        raise ValueError(f"prompts={str(path)!r} needs a column 'text' and at least one row")
    return [
        Wanted(row.get("name") or f"{path.stem}_{number:04d}", row["text"], _truth(row, f"{path} row {number}"))
        for number, row in enumerate(rows)
    ]


def _truth(row: Mapping[str, str], where: str) -> Combination:
    if not all(aspect in row for aspect in ASPECTS):
        return combination_of(row["text"])
    for aspect in ASPECTS:
        if row[aspect] not in KNOWN[aspect]:
            raise ValueError(f"{where}: {aspect}={row[aspect]!r} is not one of {list(KNOWN[aspect])}")
    return Combination(*(row[aspect] for aspect in ASPECTS))


def find_samples(folder: Path, wanted: Sequence[Wanted], *, allow_missing: bool) -> list[tuple[Path, Wanted]]:
    """The files of every prompt, repeats included.

    Raises:
        FileNotFoundError: no folder, or prompts without a file and not `allow_missing`.
        ValueError: the caption beside a file is not that of its row: the csv is another one.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"samples {str(folder)!r} is not a folder")
    files = {p.stem: p for p in sorted(folder.iterdir()) if p.suffix in (".mp4", ".png") and not is_draft(p)}
    found, missing = [], []
    for prompt in wanted:
        names, repeat = [prompt.name], 1
        while f"{prompt.name}_{repeat}" in files:
            names.append(f"{prompt.name}_{repeat}")
            repeat += 1
        own = [files[name] for name in names if name in files]
        found += [(file, prompt) for file in own]
        if not own:
            missing.append(prompt.name)
    if not found or (missing and not allow_missing):
        raise FileNotFoundError(
            f"samples {str(folder)!r} has no file for {len(missing)} of {len(wanted)} prompts, such as "
            f"{missing[0]}.mp4; sample them, or score the others with --allow_missing"
        )
    for file, prompt in found:
        beside = file.with_suffix(".txt")
        if beside.is_file() and not beside.read_text().startswith(prompt.text.rstrip(". \n")):
            raise ValueError(
                f"{str(file)!r} was made from {beside.read_text().strip()!r}, the prompts say {prompt.text!r}; "
                "give the csv that it was sampled with"
            )
    return found


def read_clip(path: Path) -> np.ndarray:
    """Pixels of a file. Returns: float32 [3, T, H, W] in [-1, 1]."""
    return to_video(read_image(path) if is_image(path) else read_frames(path, range(probe(path).num_frames)))


def score_files(samples: Sequence[tuple[Path, Wanted]]) -> dict[str, Any]:
    """Scores, how often each aspect read "none", and what was read of each file."""
    readings = [score_clip(read_clip(file)) for file, _ in samples]
    clips = [
        {"file": file.name, "text": prompt.text, "truth": prompt.truth._asdict(), "read": reading}
        for (file, prompt), reading in zip(samples, readings, strict=True)
    ]
    nones = Counter(aspect for reading in readings for aspect in ASPECTS if reading[aspect] == "none")
    scores = accuracy(readings, [prompt.truth for _, prompt in samples])
    return {**scores, **{f"{aspect}_none": nones[aspect] for aspect in ASPECTS}, "clips": clips}


def print_scores(scores: Mapping[str, Any], *, prompts: Path, missing: int) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{scores['num']} clips of {prompts.name}" + (f", {missing} missing" if missing else ""))
    for name in ("", "right", "none"):
        table.add_column(name, justify="left" if not name else "right")
    for aspect in (*ASPECTS, "all"):
        none = str(scores[f"{aspect}_none"]) if aspect != "all" else ""
        table.add_row(aspect if aspect != "all" else "all three", f"{scores[f'{aspect}_accuracy']:.1%}", none)
    Console().print(table)


def prepare(arguments: list[str]) -> Callable[[], int]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("samples", type=Path, help="folder of generated clips")
    parser.add_argument("--prompts", type=Path, required=True, help="the csv they were made from")
    parser.add_argument("--json", type=Path, help="where to write the scores; default SAMPLES/scores_PROMPTS.json")
    parser.add_argument("--allow_missing", action="store_true", help="score what is there; what is missing is counted")
    given = parser.parse_args(arguments)
    wanted = read_prompts(given.prompts)
    samples = find_samples(given.samples, wanted, allow_missing=given.allow_missing)
    missing = len(wanted) - len({prompt.name for _, prompt in samples})

    def work() -> int:
        scores = {"prompts": given.prompts.as_posix(), "missing": missing, **score_files(samples)}
        print_scores(scores, prompts=given.prompts, missing=missing)
        output = given.json or given.samples / f"scores_{given.prompts.stem}.json"
        valid = {k: None if isinstance(v, float) and math.isnan(v) else v for k, v in scores.items()}
        output.write_text(json.dumps(valid, indent=1) + "\n")
        print(f"wrote {output}")
        return 0

    return work


if __name__ == "__main__":
    sys.exit(run_guarded(prepare))
