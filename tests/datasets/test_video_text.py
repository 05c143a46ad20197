"""A row becomes the right frames, the right text and the right shape, as a function of (seed, epoch, row) alone."""

import json
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from opensora_like import registry
from opensora_like.datasets.bucket import BucketShape
from opensora_like.datasets.video_io import BadSample
from opensora_like.datasets.video_text import VideoText, caption_with_suffix, played_fps

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from make_clips import numbered_frames, numbers_of, write_clip

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
BUCKETS = {"144p": {1: (1.0, 1), 8: (1.0, 2)}}
SHAPE = BucketShape("144p", 8, 48, 64)
IMAGE = SHAPE._replace(num_frames=1)
BUILD = {"bucket_config": BUCKETS, "multiple": 16, "seed": 3}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A table of: a video at 24 fps, one at 60, an image, a file that is missing; paths relative to the table."""
    folder = tmp_path_factory.mktemp("clips")
    write_clip(folder / "a.mp4", numbered_frames(40, 48, 64), options={"g": "10"})
    write_clip(folder / "b.mp4", numbered_frames(40, 48, 64), fps=60, options={"g": "10"})
    Image.fromarray(numbered_frames(8, 48, 64)[7]).save(folder / "c.png")
    columns = {
        "path": ["a.mp4", "b.mp4", "c.png", "gone.mp4"],
        "text": ["A dog runs.", "A cat.", "A still.", "Nothing."],
        "num_frames": [40, 40, 1, 40],
        "height": [160] * 4,
        "width": [256] * 4,
        "fps": [24.0, 60.0, None, 24.0],
        "score_vmafmotion": [3.6, None, None, 1.0],
        "note": ["not needed"] * 4,
    }
    pq.write_table(pa.table(columns), folder / "table.parquet")
    lines = [",".join(columns)] + [
        ",".join("" if v is None else str(v) for v in row) for row in zip(*columns.values(), strict=True)
    ]
    (folder / "table.csv").write_text("\n".join(lines))
    return folder


def dataset(folder, **settings):
    return VideoText(str(folder / "table.parquet"), **{**BUILD, **settings})


def shown(sample):
    frames = (sample.video_CTHW.permute(1, 2, 3, 0) * 0.5 + 0.5) * 255
    return numbers_of(frames.round().byte().numpy())


def test_rates_are_mapped_as_published():
    """fps and interval equal the recorded ones, for every recorded pair."""
    for entry in json.loads((GOLDEN / "opensora_maths_a.json").read_text())["map_target_fps"]:
        assert played_fps(float(entry["fps"]), entry["max_fps"]) == tuple(entry["out"])
    assert played_fps(120.0, None) == (120.0, 1)


def test_captions_tell_rate_and_motion():
    """One form for training and inference; what is not known is not told."""
    assert caption_with_suffix("A dog runs.", 24.0, 3.6) == "A dog runs. 24 FPS, 4 motion score."
    assert caption_with_suffix("A dog.", 23.976) == "A dog. 23.976 FPS."
    assert caption_with_suffix("A dog.", None, 0.2) == "A dog. 0 motion score."
    assert caption_with_suffix("A dog.", 0.0) == "A dog."
    assert caption_with_suffix("", 16.0) == "16 FPS."


def test_a_sample_has_evenly_spaced_frames_and_its_text(folder):
    """Frames are those of the indices chosen, at the distance that the rate asks for."""
    data = dataset(folder, vmaf=True)
    slow, fast = data.read(0, SHAPE, 0), data.read(1, SHAPE, 0)
    assert slow.video_CTHW.shape == (3, 8, 48, 64)
    assert slow.video_CTHW.dtype == torch.float32
    assert slow.video_CTHW.abs().max() <= 1
    assert np.diff(shown(slow)).tolist() == [1] * 7
    assert np.diff(shown(fast)).tolist() == [3] * 7
    assert (slow.text, fast.text) == ("A dog runs. 24 FPS, 4 motion score.", "A cat. 20 FPS.")
    assert (slow.row, slow.path) == (0, str(folder / "a.mp4"))


def test_randomness_is_a_function_of_seed_epoch_and_row(folder):
    """The same draw gives the same sample in any order; another epoch or seed gives another."""
    data, again = dataset(folder), dataset(folder)
    again.read(1, SHAPE, 5)
    assert torch.equal(data.read(0, SHAPE, 1).video_CTHW, again.read(0, SHAPE, 1).video_CTHW)
    begins = {
        (seed, epoch): dataset(folder, seed=seed).choose_frames(0, 40, 24.0, 8, epoch)[0][0]
        for seed in (0, 1)
        for epoch in range(9)
    }
    assert len({begins[0, epoch] for epoch in range(9)}) > 3
    assert [begins[0, e] for e in range(9)] != [begins[1, e] for e in range(9)]


def test_every_beginning_is_drawn(folder):
    """The first and the last possible one included, and nothing past the end."""
    data = dataset(folder)
    begins = [data.choose_frames(row, 10, 24.0, 8, 0)[0] for row in range(200)]
    assert {b[0] for b in begins} == {0, 1, 2}
    assert max(max(b) for b in begins) == 9
    assert data.choose_frames(0, 8, 24.0, 8, 0)[0] == list(range(8))
    distant = [data.choose_frames(row, 22, 60.0, 8, 0) for row in range(50)]
    assert {b[0][0] for b in distant} == {0}
    assert {b[0][-1] for b in distant} == {21}


def test_a_random_interval_fits_the_clip(folder):
    """Every distance up to the limit is drawn, none reaches past the end, and the text tells the rate played."""
    data = dataset(folder, rand_sample_interval=3)
    chosen = [data.choose_frames(row, 40, 60.0, 8, 0) for row in range(100)]
    assert {(i[1] - i[0], fps) for i, fps in chosen} == {(1, 60.0), (2, 30.0), (3, 20.0)}
    assert max(i[-1] for i, _ in chosen) < 40
    assert {np.diff(data.choose_frames(row, 17, 60.0, 8, 0)[0])[0] for row in range(50)} == {1, 2}


def test_image_buckets_take_images_and_single_frames(folder):
    """An image is itself, a video gives one drawn frame; neither tells a rate."""
    data = dataset(folder)
    assert shown(data.read(2, IMAGE, 0)) == [7]
    assert len({shown(data.read(1, IMAGE, epoch))[0] for epoch in range(6)}) > 2
    assert data.read(1, IMAGE, 0).text == "A cat."
    assert data.read(2, IMAGE, 0).text == "A still."


def test_suffix_can_be_left_out(folder):
    """By its setting, and where clips of all rates are mixed."""
    assert dataset(folder, fps_in_caption=False).read(0, SHAPE, 0).text == "A dog runs."
    assert dataset(folder, fps_max=None).read(1, SHAPE, 0).text == "A cat."
    assert dataset(folder, fps_max=999).read(1, SHAPE, 0).text == "A cat."


def test_bad_rows_are_bad_samples(folder):
    """A missing file, an image in a video bucket, and a table that promises too many frames."""
    data = dataset(folder)
    with pytest.raises(BadSample, match="no such file"):
        data.read(3, SHAPE, 0)
    with pytest.raises(BadSample, match="an image"):
        data.read(2, SHAPE, 0)
    data.table.num_frames[0] = 4000
    with pytest.raises(BadSample, match="has 40 frames"):
        data.read(0, SHAPE, 0)


def test_memory_efficient_gives_the_same(folder, tmp_path, monkeypatch):
    """Plan, frames and text do not depend on where the table lives, and its captions are not in memory."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    plain = dataset(folder, vmaf=True)
    mapped = dataset(folder, vmaf=True, memory_efficient=True)
    assert mapped.table.fingerprint == plain.table.fingerprint
    assert mapped.table.other.column_names == ["path", "text", "score_vmafmotion"]
    assert [mapped.read(row, SHAPE, 0).text for row in (0, 1)] == [plain.read(row, SHAPE, 0).text for row in (0, 1)]
    assert "note" not in mapped.table.row(0)
    files = list(tmp_path.rglob("*.arrow"))
    assert len(files) == 1
    stamp = files[0].stat().st_mtime_ns
    dataset(folder, vmaf=True, memory_efficient=True)
    assert [f.stat().st_mtime_ns for f in tmp_path.rglob("*.arrow")] == [stamp]  # used again
    with pytest.raises(ValueError, match="reads parquet only"):
        VideoText(str(folder / "table.csv"), memory_efficient=True, **BUILD)


def test_memory_efficient_keeps_captions_on_disk(tmp_path, monkeypatch):
    """4 MB of captions take no memory of Arrow's, and 4 MB without the option."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    count = 20_000
    columns = {"path": [f"{i}.mp4" for i in range(count)], "text": [f"{i:0200d}" for i in range(count)]}
    columns |= {name: [160] * count for name in ("num_frames", "height", "width")}
    pq.write_table(pa.table(columns | {"fps": [24.0] * count}), tmp_path / "t.parquet")
    del columns
    grown = {}
    for memory_efficient in (True, False):
        before = pa.total_allocated_bytes()
        data = VideoText(str(tmp_path / "t.parquet"), memory_efficient=memory_efficient, **BUILD)
        grown[memory_efficient] = pa.total_allocated_bytes() - before
        assert data.table.row(17)["text"] == f"{17:0200d}"
        del data
    assert grown[True] < 500_000  # the numbers
    assert grown[False] > 4_000_000


def test_it_is_built_from_a_config(folder):
    """The registry builds it, csv and parquet give one plan, kept for the epoch asked for last."""
    cfg = {"type": "video_text", "data_path": str(folder / "table.csv"), "fps_max": 24}
    data = registry.build(cfg, registry.DATASETS, where="dataset", **BUILD)
    plan = data.plan(0)
    assert plan is data.plan(0)
    assert plan.fingerprint == dataset(folder).plan(0).fingerprint
    assert plan[0].epoch == 0
    assert data.plan(1).epoch == 1


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"transform_name": "resize_corp"}, "did you mean \\['resize_crop'\\]"),
        ({"rand_sample_interval": 0}, "rand_sample_interval=0"),
        ({"data_path": "nowhere.csv"}, "nowhere.csv"),
    ],
)
def test_settings_are_checked(folder, settings, problem):
    """A setting that cannot be is an error when the dataset is built."""
    with pytest.raises((ValueError, FileNotFoundError), match=problem):
        VideoText(**{"data_path": str(folder / "table.csv"), **BUILD, **settings})


def test_paths_start_where_the_user_says(folder, tmp_path, monkeypatch):
    """data_root, else the current folder, else the table's folder."""
    (tmp_path / "a.mp4").write_bytes((folder / "b.mp4").read_bytes())
    assert dataset(folder, data_root=str(tmp_path)).read(0, SHAPE, 0).path == str(tmp_path / "a.mp4")
    monkeypatch.chdir(tmp_path)
    assert dataset(folder).read(0, SHAPE, 0).path == "a.mp4"
    assert dataset(folder).read(1, SHAPE, 0).path == str(folder / "b.mp4")
