"""Frames of a sample: recorded indices, 4n+1, windows, rates; sizes to the nearest multiples; as training resizes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from opensora_like.datasets.resize import resize_crop
from opensora_like.datasets.video_io import BadSample, VideoInfo, read_frames
from opensora_like.datasets.video_writing import write_video
from opensora_like.preparation.frames import FrameChoice, Pick, Picture, read_clip

GOLDEN = json.loads((Path(__file__).parents[1] / "golden/dfm_a.json").read_text())


def picks(total: int, *, start: int = 0, end: int | None = None, fps: float = 24.0, **choice) -> list[Pick]:
    return FrameChoice(**choice).picks("x.mp4", VideoInfo(total, 40, 64, fps), start, end)


@pytest.mark.parametrize("case", [c for c in GOLDEN["frames"] if "frames_mode" in c and c["num_frames"]])
def test_evenly_spaced_frames_are_the_recorded_ones(case):
    """Mode "frames" takes the frames of the published trainer; each is a sample of one frame, numbered from 1."""
    found = picks(case["total"], mode="frames", num_frames=case["num_frames"])
    assert [pick.indices[0] for pick in found] == case["frames_mode"]
    assert [pick.number for pick in found] == [(n, len(found)) for n in range(1, len(found) + 1)]
    assert all(len(pick.indices) == 1 and pick.fps == 0 for pick in found)


@pytest.mark.parametrize("case", [c for c in GOLDEN["adjust_4n1"] if c.get("target") and "error" not in c])
def test_frames_spread_over_the_clip_are_the_recorded_ones(case):
    """Evenly spaced, both ends included; of too short a clip the published code shows frames twice, here it is cut."""
    found = picks(case["total"], target_frames=case["target"], select="uniform")[0].indices
    if case["target"] <= case["total"]:
        assert list(found) == case["indices"]
    else:
        assert len(found) % 4 == 1 and found == tuple(range(len(found))) and len(case["indices"]) > case["total"]


def test_resizing_by_lanczos_is_the_recorded_one():
    """Pixels of the published preparation, exactly."""
    tensors = load_file(Path(__file__).parents[1] / "golden/dfm_a.safetensors")
    made = Picture(height=16, width=16, center_crop=True, resize_mode="lanczos").bring(
        tensors["preprocess/clip"].numpy()
    )
    assert torch.equal(made, tensors["preprocess/out"])


def test_frames_within_the_clip():
    """Both ends belong to the clip, and an end behind that of the file is the file's."""
    assert [p.indices for p in picks(20, start=3, end=7, mode="frames", num_frames=3)] == [(3,), (5,), (7,)]
    assert [p.indices for p in picks(20, start=3, end=7, mode="frames", num_frames=1)] == [(3,)]
    assert picks(121, end=121)[0].indices == tuple(range(121))
    assert picks(20, start=3, end=7)[0] == Pick((3, 4, 5, 6, 7), 5, (1, 1), 24.0)
    with pytest.raises(BadSample, match="start_frame=20, but it has 20 frames"):
        picks(20, start=20)


@pytest.mark.parametrize(("num_frames", "kept"), [(1, 1), (4, 1), (5, 5), (10, 9), (12, 9), (13, 13), (122, 121)])
def test_four_n_plus_one(num_frames, kept):
    """The autoencoder would drop what is over without a word; here it is left out, repeated or refused, as told."""
    cut, filled = picks(num_frames)[0], picks(num_frames, rule="pad")[0]
    assert cut.indices == tuple(range(kept)) and cut.num_chosen == filled.num_chosen == num_frames
    assert len(filled.indices) == (num_frames if kept == num_frames else kept + 4)
    assert filled.indices[:num_frames] == tuple(range(num_frames)) and set(filled.indices[num_frames:]) <= {
        num_frames - 1
    }
    if kept == num_frames:
        assert picks(num_frames, rule="error") == [cut]
    else:
        with pytest.raises(BadSample, match=f"{num_frames} frames are not 4n\\+1"):
            picks(num_frames, rule="error")


def test_parts_of_a_long_clip():
    """The first, middle, evenly spaced or all windows; a clip that is shorter stays whole."""
    assert picks(20, target_frames=5)[0].indices == (0, 1, 2, 3, 4)
    assert picks(20, target_frames=5, select="middle")[0].indices == (7, 8, 9, 10, 11)
    spread = picks(21, target_frames=5, select="uniform")[0]
    assert spread.indices == (0, 5, 10, 15, 20) and spread.fps == pytest.approx(24 / 5)
    assert [p.indices[0] for p in picks(20, target_frames=5, select="windows")] == [0, 5, 10, 15]
    strided = picks(20, target_frames=9, select="windows", window_stride=4)
    assert [(p.indices[0], p.number) for p in strided] == [(0, (1, 3)), (4, (2, 3)), (8, (3, 3))]
    for select in ("head", "middle", "uniform", "windows"):
        assert picks(7, target_frames=9, select=select)[0].indices == (0, 1, 2, 3, 4)


def test_a_slower_rate():
    """Frames nearest in time are kept, none twice; slower clips and those of unknown rate stay as they are."""
    halved = FrameChoice(fps=12.0).picks("x", VideoInfo(25, 1, 1, 24.0), 0, None)[0]
    assert halved.indices == tuple(range(0, 25, 2)) and halved.fps == 12.0
    uneven = FrameChoice(fps=16.0).picks("x", VideoInfo(24, 1, 1, 24.0), 0, None)[0]
    assert uneven.indices[:6] == (0, 2, 3, 5, 6, 8) and len(set(uneven.indices)) == len(uneven.indices) == 13
    for own in (8.0, float("nan")):
        same = FrameChoice(fps=16.0).picks("x", VideoInfo(9, 1, 1, own), 0, None)[0]
        assert same.indices == tuple(range(9)) and same.fps == (8.0 if own == 8.0 else 0.0)


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({"mode": "frames"}, "needs num_frames"),
        ({"mode": "frames", "num_frames": 3, "fps": 8.0}, r"\['fps'\] say nothing in mode 'frames'"),
        ({"num_frames": 3}, "num_frames=3 is for mode 'frames'"),
        ({"target_frames": 10}, "target_frames=10 is not 4n.1; use 9 or 13"),
        ({"select": "uniform"}, "need target_frames"),
        ({"target_frames": 5, "window_stride": 2}, "needs select='windows'"),
        ({"target_frames": 0}, "must be 1 or more"),
        ({"fps": 0.0}, "fps=0.0 must be above 0"),
        ({"mode": "film"}, "mode='film' is not one of"),
    ],
)
def test_settings_that_do_not_fit(choice, message):
    """A setting that would say nothing is an error."""
    with pytest.raises(ValueError, match=message):
        FrameChoice(**choice)


@pytest.mark.parametrize(
    ("source", "picture", "want"),
    [
        ((480, 720), {"height": 480, "width": 832, "center_crop": True}, (480, 832)),
        ((1280, 720), {"height": 480, "width": 832, "center_crop": True}, (480, 832)),
        ((720, 1280), {"height": 832, "width": 480, "center_crop": True}, (832, 480)),
        ((720, 1280), {"height": 480, "width": 832}, (464, 832)),
        ((1280, 720), {"height": 480, "width": 832}, (480, 272)),
        ((333, 777), {"height": 480, "width": 832, "keep_aspect": False}, (480, 832)),
        ((1080, 1920), {}, (1088, 1920)),
        ((9, 31), {}, (16, 32)),
    ],
)
def test_sizes_are_to_the_nearest_multiple(source, picture, want):
    """Rounding down lost a pixel, and so a column of latents: no size falls short or is off the multiples of 16."""
    made = Picture(**picture)
    assert made.size_of(*source) == want
    small = np.zeros((1, *source, 3), np.uint8)
    for mode in ("bilinear", "bicubic", "nearest", "area", "lanczos"):
        assert Picture(**picture, resize_mode=mode).bring(small).shape == (3, 1, *want)


def frames(height: int = 40, width: int = 64) -> np.ndarray:
    rows, columns = np.mgrid[:height, :width]
    one = np.stack([rows * 5, columns * 3, (rows + columns) * 2], -1)
    return np.stack([one, 255 - one]).clip(0, 255).astype(np.uint8)


def test_resizing_is_that_of_training():
    """The default gives bit for bit what a run on the videos themselves would see."""
    made = Picture(height=32, width=48, center_crop=True).bring(frames())
    assert torch.equal(made, resize_crop(frames(), 32, 48))


@pytest.mark.parametrize("mode", ["bilinear", "bicubic", "nearest", "area", "lanczos"])
def test_every_way_of_resizing_keeps_the_picture(mode):
    """Ways differ, but not in place, range or orientation: each is near the default, and within -1 to 1."""
    default = Picture(height=32, width=48, center_crop=True).bring(frames())
    made = Picture(height=32, width=48, center_crop=True, resize_mode=mode).bring(frames())
    assert made.dtype == torch.float32 and made.abs().max() <= 1
    assert (made - default).abs().mean() < 0.02
    assert (mode == "bilinear") == torch.equal(made, default)
    stretched = Picture(height=32, width=48, keep_aspect=False, resize_mode=mode).bring(frames())
    assert stretched.shape == (3, 2, 32, 48) and not torch.equal(stretched, made)


def test_antialias_averages():
    """A fine pattern that is made small becomes grey instead of noise."""
    fine = np.tile(np.array([0, 255], np.uint8).repeat(3).reshape(1, 2, 3), (1, 64, 64, 1)).reshape(1, 64, 128, 3)
    for mode in ("bilinear", "bicubic"):
        made = Picture(height=16, width=32, center_crop=True, resize_mode=mode, antialias=True).bring(fine)
        assert made[..., 4:-4].abs().max() < 0.2


@pytest.mark.parametrize(
    ("picture", "message"),
    [
        ({"height": 480}, "give both"),
        ({"height": 470, "width": 832}, "height=470 is not a multiple of 16; the nearest is 464"),
        ({"height": 480, "width": 832, "resize_mode": "cubic"}, "resize_mode='cubic' is not one of"),
        ({"height": 480, "width": 832, "resize_mode": "area", "antialias": True}, "antialias is for"),
        ({"height": 480, "width": 832, "keep_aspect": False, "center_crop": True}, "nothing to cut off"),
        ({"center_crop": True}, "need height and width"),
    ],
)
def test_pictures_that_do_not_fit(picture, message):
    """Errors name the setting and the nearest that fits."""
    with pytest.raises(ValueError, match=message):
        Picture(**picture)


def test_a_clip_is_read_in_parts(tmp_path, monkeypatch):
    """However many frames are decoded at once, the clip is the same, and repeated frames are there."""
    video = np.stack([np.full((32, 48, 3), 8 * n, np.uint8) for n in range(12)])
    write_video(tmp_path / "a.mp4", video, 8)
    picture, indices = Picture(height=16, width=16, center_crop=True), (2, 3, 5, 7, 11, 11)
    whole = read_clip(tmp_path / "a.mp4", Pick(indices, 6, (1, 1), 8.0), picture)
    monkeypatch.setattr("opensora_like.preparation.frames._CHUNK", 4)
    assert torch.equal(read_clip(tmp_path / "a.mp4", Pick(indices, 6, (1, 1), 8.0), picture), whole)
    assert torch.equal(whole, picture.bring(read_frames(tmp_path / "a.mp4", indices)))
    means = whole.mean(dim=(0, 2, 3))
    assert torch.allclose(means, torch.tensor(indices) * 8 / 127.5 - 1, atol=0.03)
