"""The training set on disk holds what its table says, the same bytes for the same seed, and survives being read."""

from __future__ import annotations

import csv
import hashlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from opensora_like.datasets.video_io import probe, read_frames
from opensora_like.datasets.video_writing import write_video
from opensora_like.evaluation.shapes import score
from opensora_like.evaluation.world import COLOURS, Combination, clip_generator, draw_clip, to_video
from tools import make_shapes, score_shapes
from tools.make_shapes import ShapesSet, write_set

ROOT = Path(__file__).parents[2]


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def truth_of(row: dict[str, str]) -> Combination:
    return Combination(row["colour"], row["shape"], row["direction"])


def read_at_16(path: str) -> torch.Tensor:
    """Decode, and resize bilinearly without anti-aliasing: the harshest of what a loader does."""
    frames = torch.from_numpy(to_video(read_frames(path, range(5)))).transpose(0, 1)
    return torch.nn.functional.interpolate(frames, size=(16, 16), mode="bilinear").transpose(0, 1)


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("shapes") / "set"
    write_set(ShapesSet(num_clips=320, seed=7), output)
    return output


def test_every_clip_read_from_disk_scores_right(written):
    """Encoded, decoded and resized to 16 x 16, with and without anti-aliasing: no error in 320 clips."""
    rows = rows_of(written / "clips.csv")
    truths = [truth_of(row) for row in rows]
    assert score([read_at_16(row["path"]) for row in rows], truths)["all_accuracy"] == 1
    smooth = []
    for row in rows[:40]:
        frames = torch.from_numpy(to_video(read_frames(row["path"], range(5)))).transpose(0, 1)
        small = torch.nn.functional.interpolate(frames, size=(16, 16), mode="bilinear", antialias=True)
        smooth.append(small.transpose(0, 1))
    assert score(smooth, truths[:40])["all_accuracy"] == 1


def test_encoding_keeps_the_colours(written):
    """What is decoded differs from what was drawn by less than 1.5 of 255 levels on average."""
    what = ShapesSet(num_clips=320, seed=7)
    for index in (0, 100, 319):
        drawn = what.draw(index, what.truths()[index])
        decoded = read_frames(written / f"clips/{index:06d}.mp4", range(5))
        assert np.abs(decoded.astype(int) - drawn).mean() < 1.5


def test_tables_agree_with_the_files(written):
    """Captions state the truth, files have the stated frames, and no held-out combination was written."""
    rows, held_out = rows_of(written / "clips.csv"), rows_of(written / "held_out.csv")
    assert list(rows[0]) == ["path", "text", "colour", "shape", "direction"] and len(rows) == 320
    assert all(truth_of(row).caption == row["text"] for row in rows)
    info = probe(rows[5]["path"])
    assert (info.num_frames, info.height, info.width, info.fps) == (5, 64, 64, 8.0)
    shown = {row["text"] for row in rows}
    assert len(held_out) == 8 and shown.isdisjoint(row["text"] for row in held_out)
    assert shown == {row["text"] for row in rows_of(written / "seen.csv")}
    assert json.loads((written / "world.json").read_text())["seed"] == 7


def test_the_same_seed_writes_the_same_bytes(tmp_path):
    """Also with several processes; fewer clips are a prefix; another seed differs."""

    def digests(name: str, num_workers: int = 1, **settings: int) -> list[str]:
        write_set(ShapesSet(**settings), tmp_path / name, num_workers=num_workers)
        return [hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted((tmp_path / name / "clips").iterdir())]

    first = digests("a", num_clips=12, seed=1)
    assert digests("b", num_workers=2, num_clips=12, seed=1) == first
    assert digests("c", num_clips=5, seed=1) == first[:5]
    assert not set(digests("d", num_clips=12, seed=2)) & set(first)


@pytest.mark.parametrize("settings", [{"size": 16}, {"size": 32, "num_frames": 9}, {"codec": "mpeg4"}])
def test_other_sizes_and_codecs_are_readable(tmp_path, settings):
    """Small clips and MPEG-4 are read right too, at their own size."""
    write_set(ShapesSet(num_clips=40, **settings), tmp_path / "set")
    rows = rows_of(tmp_path / "set/clips.csv")
    clips = [score_shapes.read_clip(Path(row["path"])) for row in rows]
    assert score(clips, [truth_of(row) for row in rows])["all_accuracy"] == 1


def test_stills_are_images_without_a_direction(tmp_path):
    """A share of the rows are png files with a caption that claims no motion; colour and shape are read from one."""
    write_set(ShapesSet(num_clips=40, image_fraction=0.5), tmp_path / "set")
    rows = rows_of(tmp_path / "set/clips.csv")
    stills = [row for row in rows if row["path"].endswith(".png")]
    assert 8 <= len(stills) <= 32
    assert all(row["direction"] == "" and "moving" not in row["text"] for row in stills)
    clips = [score_shapes.read_clip(Path(row["path"])) for row in stills]
    assert score(clips, [truth_of(row) for row in stills])["all_accuracy"] == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--size", "17"], "size=17 must be an even number from 16 to 256"),
        (["--num_clips", "0"], "num_clips=0"),
        (["--held_out", "0.9"], "held_out=0.9"),
        (["--colours", "red,pink"], "pink"),
    ],
)
def test_settings_out_of_range_are_refused(tmp_path, arguments, message):
    """Before anything is written, with the name and the value."""
    with pytest.raises(ValueError, match=message):
        make_shapes.prepare(["--output", str(tmp_path / "set"), *arguments])
    assert not (tmp_path / "set").exists()


def test_a_set_is_not_mixed_with_another(tmp_path):
    """A folder that holds clips is refused, and replaced whole with --overwrite."""
    output = ["--output", str(tmp_path / "set")]
    assert make_shapes.prepare([*output, "--num_clips", "6"])() == 0
    with pytest.raises(ValueError, match="holds clips already"):
        make_shapes.prepare(output)
    assert make_shapes.prepare([*output, "--num_clips", "3", "--overwrite"])() == 0
    assert len(list((tmp_path / "set/clips").iterdir())) == len(rows_of(tmp_path / "set/clips.csv")) == 3


@pytest.fixture
def samples(tmp_path) -> tuple[Path, Path]:
    """Two samples for each of four prompts as inference names them; one shows another colour than asked for."""
    prompts, folder = tmp_path / "some.csv", tmp_path / "samples"
    truths = [Combination(c, "circle", d) for c, d in zip(COLOURS, ("up", "left") * 2, strict=False)]
    prompts.write_text("text\n" + "".join(t.caption + "\n" for t in truths))
    for row, truth in enumerate(truths):
        for repeat in (0, 1):
            shown = truth._replace(colour="cyan") if (row, repeat) == (2, 1) else truth
            frames = draw_clip(shown, clip_generator(repeat, row), size=16, num_frames=5)
            path = folder / f"some_{row:04d}{f'_{repeat}' if repeat else ''}.mp4"
            write_video(path, frames, 8)
            path.with_suffix(".txt").write_text(truth.caption + ". 8 FPS.\n")
    return folder, prompts


def test_generated_files_are_scored_against_their_prompts(samples):
    """Every repeat counts, a wrong one is found by name, and the command writes the numbers as json."""
    folder, prompts = samples
    done = subprocess.run(
        [sys.executable, "tools/score_shapes.py", str(folder), "--prompts", str(prompts)],
        cwd=ROOT,
        env={"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    scores = json.loads((folder / "scores_some.json").read_text())
    assert (scores["num"], scores["missing"], scores["colour_accuracy"], scores["shape_accuracy"]) == (8, 0, 7 / 8, 1)
    assert [c["file"] for c in scores["clips"] if c["read"] != c["truth"]] == ["some_0002_1.mp4"]
    assert "87.5%" in done.stdout


def test_samples_of_other_prompts_are_refused(samples):
    """A caption that is not the row's, and prompts without a sample, are errors; the latter can be allowed."""
    folder, prompts = samples
    wanted = score_shapes.read_prompts(prompts)
    for file in folder.glob("some_0003*"):
        file.unlink()
    with pytest.raises(FileNotFoundError, match="1 of 4 prompts, such as some_0003"):
        score_shapes.find_samples(folder, wanted, allow_missing=False)
    assert len(score_shapes.find_samples(folder, wanted, allow_missing=True)) == 6
    (folder / "some_0001.txt").write_text("a blue square moving down. 8 FPS.")
    with pytest.raises(ValueError, match="give the csv that it was sampled with"):
        score_shapes.find_samples(folder, wanted, allow_missing=True)
