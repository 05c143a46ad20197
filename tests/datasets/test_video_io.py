"""Videos are measured without decoding, and any frame is found by its number, whatever the file looks like."""

import json
import math
import os
import pickle
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from opensora_like.datasets import video_io, video_writing
from opensora_like.datasets.display import Turn, turn_of_matrix
from opensora_like.datasets.resize import center_crop, resize_crop, to_frames
from opensora_like.datasets.video_io import BadSample, VideoInfo, is_image, probe, read_frames

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from make_clips import cut, note_decoded, numbered_frames, numbers_of, turn, write_clip, write_fakes

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
NUM_FRAMES = 40
UNEVEN = np.cumsum(np.random.default_rng(0).integers(10, 200, NUM_FRAMES)).tolist()  # milliseconds
B_FRAMES = {"bf": "3", "g": "12"}
OPEN_GOP = {"bf": "3", "g": "12", "x264-params": "open-gop=1"}

# name -> what to write; each holds the same 40 numbered frames
KINDS = {
    "b_frames.mp4": {"options": B_FRAMES},
    "open_gop.mkv": {"options": OPEN_GOP},
    "open_gop.ts": {"options": OPEN_GOP},
    "b_frames.avi": {"options": B_FRAMES},
    "intra_refresh.ts": {"options": {"g": "20", "x264-params": "intra-refresh=1"}},
    "mpeg4.avi": {"codec": "mpeg4", "options": {"g": "12"}},
    "mpeg4.mp4": {"codec": "mpeg4", "options": {"g": "12", "bf": "2"}},
    "sound.mp4": {"with_audio": True, "fps": Fraction(24000, 1001)},
    "uneven.mp4": {"pts": UNEVEN, "options": B_FRAMES},
    "uneven.mkv": {"pts": UNEVEN, "options": B_FRAMES},
    "late_start.mp4": {"pts": [5000 + 40 * i for i in range(NUM_FRAMES)], "options": B_FRAMES},
    "late_start.mkv": {"pts": [5000 + 40 * i for i in range(NUM_FRAMES)], "options": B_FRAMES},
    "fragments.mp4": {"container_options": {"movflags": "frag_keyframe+empty_moov"}, "options": B_FRAMES},
    "faststart.mp4": {"container_options": {"movflags": "faststart"}, "options": B_FRAMES, "fps": 30},
}


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips")
    frames = numbered_frames(NUM_FRAMES, 64, 96)
    return {name: write_clip(folder / name, frames, **how) for name, how in KINDS.items()}


def rate_of(name):
    if name.startswith("uneven"):
        return 1000 * (NUM_FRAMES - 1) / (UNEVEN[-1] - UNEVEN[0])
    return {"late_start": 25.0, "sound": 23.976, "faststart": 30.0}.get(name.split(".")[0], 24.0)


@pytest.mark.parametrize("name", KINDS)
def test_probe_agrees_with_what_was_written(clips, name):
    """Count and size are exact for every container; the rate is exact where it is constant, else the mean."""
    info = probe(clips[name])
    assert info[:3] == (NUM_FRAMES, 64, 96)
    assert info.fps == pytest.approx(rate_of(name), rel=0.03 if "uneven" in name or "late" in name else 1e-9)


@pytest.mark.parametrize("name", KINDS)
def test_frames_are_found_by_number(clips, name):
    """Index n is the n-th frame shown: any order, repeats, the first, the last, and windows across keyframes."""
    rng = np.random.default_rng(1)
    for wanted in ([NUM_FRAMES - 1, 0, 17, 17, 3], list(range(11, 26, 2)), rng.integers(0, NUM_FRAMES, 5).tolist()):
        frames = read_frames(clips[name], wanted)
        assert frames.shape == (len(wanted), 64, 96, 3)
        assert frames.dtype == np.uint8
        assert numbers_of(frames) == wanted


def test_counting_packets_agrees_with_the_index(clips, monkeypatch):
    """Without the container's list of frames (older PyAV) the same is measured."""
    measured = {name: probe(path)[:3] for name, path in clips.items()}
    monkeypatch.setattr(video_io, "_count_in_index", lambda stream, size: None)
    assert {name: probe(path)[:3] for name, path in clips.items()} == measured


def test_a_window_is_decoded_from_its_keyframe(clips, monkeypatch):
    """Reading 4 frames decodes at most one keyframe distance more, not the file."""
    decoded = note_decoded(monkeypatch)
    assert numbers_of(read_frames(clips["b_frames.mp4"], [30, 31, 32, 33])) == [30, 31, 32, 33]
    assert len(decoded) <= 12 + 4


def test_too_few_frames_names_both_numbers(clips):
    """Asking past the end says what was asked and what there is."""
    for name in ("b_frames.mp4", "b_frames.avi"):
        with pytest.raises(BadSample, match=r"frame 40 .* 40 frames"):
            read_frames(clips[name], [0, 40])
    with pytest.raises(ValueError, match="at least one frame"):
        read_frames(clips["b_frames.mp4"], [])


def test_a_truncated_file_has_the_frames_that_are_left(clips, tmp_path):
    """With its index in front, a cut file is measured by what is in it, and all of that can be read."""
    for name, share in (("faststart.mp4", 0.9), ("open_gop.mkv", 0.6), ("fragments.mp4", 0.7)):
        path = cut(clips[name], share, to=tmp_path / f"cut_{name}")
        count = probe(path).num_frames
        assert 0 < count < NUM_FRAMES
        numbers = numbers_of(read_frames(path, range(count)))
        assert numbers[0] == 0
        assert numbers == sorted(set(numbers))
        with pytest.raises(BadSample, match=rf"frame {count} .* {count} frames"):
            read_frames(path, [count])


@pytest.mark.parametrize(
    ("fake", "reason"),
    [
        ("empty", "empty file"),
        ("text", "not a video"),
        ("noise", "not a video"),
        ("sound", "no video stream, only \\['audio'\\]"),
        ("folder", "is a folder"),
        ("missing", "no such file"),
    ],
)
def test_what_is_no_video_is_a_bad_sample(tmp_path, fake, reason):
    """Measuring and reading raise the same kind of error, which names the file and survives a process border."""
    path = write_fakes(tmp_path)[fake]
    for read in (probe, lambda p: read_frames(p, [0])):
        with pytest.raises(BadSample, match=reason) as caught:
            read(path)
        copy = pickle.loads(pickle.dumps(caught.value))
        assert (copy.path, str(copy)) == (str(path), str(caught.value))


def test_a_file_cut_before_its_index_is_a_bad_sample(clips, tmp_path):
    """An mp4 whose index stood at the end cannot be read at all."""
    with pytest.raises(BadSample, match="cut off"):
        probe(cut(clips["b_frames.mp4"], 0.9, to=tmp_path / "cut.mp4"))


def test_a_pipe_does_not_hang(tmp_path):
    """What is not a file is refused before anything opens it."""
    os.mkfifo(tmp_path / "pipe.mp4")
    with pytest.raises(BadSample, match="device or pipe"):
        probe(tmp_path / "pipe.mp4")


@pytest.mark.parametrize(("degrees", "quarter_turns"), [(0, 0), (90, -1), (180, 2), (270, 1)])
def test_rotation_is_applied(tmp_path, degrees, quarter_turns):
    """Size and pixels are those of the picture as displayed."""
    path = write_clip(tmp_path / "a.mp4", numbered_frames(4, 32, 64), options=B_FRAMES)
    straight = read_frames(path, [2])[0]
    turned = np.rot90(straight, quarter_turns)
    assert probe(turn(path, degrees))[1:3] == turned.shape[:2]
    np.testing.assert_array_equal(read_frames(path, [2])[0], turned)


def test_mirrors_are_read_from_the_matrix():
    """A matrix with a negative diagonal mirrors; an odd angle is left alone."""
    picture = np.arange(6).reshape(2, 3, 1)
    assert turn_of_matrix([-1, 0, 0, 0, 1])(picture).tolist() == picture[:, ::-1].tolist()
    assert turn_of_matrix([1, 0, 0, 0, -1])(picture).tolist() == picture[::-1].tolist()
    assert turn_of_matrix([7, 7, 0, -7, 7]) == Turn()


def test_odd_sizes_are_read(tmp_path):
    """Sizes that the usual pixel format cannot hold are measured and read."""
    path = write_clip(tmp_path / "odd.mp4", numbered_frames(3, 37, 51), fps=12.5)
    assert probe(path) == (3, 37, 51, 12.5)
    assert numbers_of(read_frames(path, [2, 1])) == [2, 1]


def test_images(tmp_path):
    """An image is a clip of one frame without a rate, turned as its EXIF data say."""
    pixels = numbered_frames(6, 32, 48)[5]
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise
    Image.fromarray(pixels).save(tmp_path / "turned.png", exif=exif)
    info = probe(tmp_path / "turned.png")
    assert info[:3] == (1, 48, 32)
    assert math.isnan(info.fps)
    np.testing.assert_array_equal(video_io.read_image(tmp_path / "turned.png")[0], np.rot90(pixels, -1))
    cut(tmp_path / "turned.png", 0.5, to=tmp_path / "half.png")
    (tmp_path / "text.jpg").write_text("no")
    for name in ("half.png", "text.jpg", "none.webp"):
        with pytest.raises(BadSample, match=r"not a readable image|no such file"):
            video_io.read_image(tmp_path / name)
    assert is_image("a/B.JPG")
    assert not is_image("a.mp4")


def test_frames_come_back_from_the_range_of_a_model():
    """All 256 levels, of arrays and of tensors in float32 and bfloat16; what is outside is clipped."""
    levels = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1).repeat(3, axis=-1)
    video_CTHW = resize_crop(levels, 16, 16)
    np.testing.assert_array_equal(to_frames(video_CTHW), levels)
    np.testing.assert_array_equal(to_frames(video_CTHW.numpy()), levels)
    assert np.abs(to_frames(video_CTHW.bfloat16()).astype(int) - levels).max() <= 1
    assert to_frames(video_CTHW * 3)[0, 0, 0, 0] == 0 and to_frames(video_CTHW * 3)[0, -1, -1, 0] == 255


def test_resize_is_that_of_the_published_system():
    """Videos within 1e-6, images exactly."""
    facts = json.loads((GOLDEN / "opensora_maths_a.json").read_text())["resize"]
    golden = load_file(GOLDEN / "opensora_maths_a.safetensors")
    for i, fact in enumerate(facts):
        clip = golden[f"resize/{i}/clip"].permute(0, 2, 3, 1).numpy()
        side = fact["center"]
        for function, size, name in (
            (resize_crop, fact["target"], "resize_crop"),
            (center_crop, (side, side), "center"),
        ):
            video = function(clip, *size)
            torch.testing.assert_close(video.transpose(0, 1), golden[f"resize/{i}/{name}"], atol=1e-6, rtol=0)
            picture = function(clip[:1], *size, image=True)
            expected = (golden[f"resize/{i}/pil_{name}"].permute(2, 0, 1).float() / 255 - 0.5) / 0.5
            assert torch.equal(picture[:, 0], expected)
    with pytest.raises(ValueError, match=r"16 x 24; use 'resize_crop'"):
        center_crop(clip, 16, 24)


def test_written_videos_are_read_back(tmp_path):
    """Frames survive within coding noise, count and rate exactly; what cannot be written is refused."""
    frames = numbered_frames(9, 48, 64)
    video_writing.write_video(tmp_path / "new/a.mp4", frames, 23.976)
    assert probe(tmp_path / "new/a.mp4") == VideoInfo(9, 48, 64, 23.976)
    back = read_frames(tmp_path / "new/a.mp4", range(9))
    assert np.abs(back.astype(int) - frames).mean() < 4
    video_writing.write_image(tmp_path / "a.png", frames[3])
    np.testing.assert_array_equal(video_io.read_image(tmp_path / "a.png")[0], frames[3])
    with pytest.raises(ValueError, match="even sizes, got 63 x 48"):
        video_writing.write_video(tmp_path / "b.mp4", frames[:, :, :63], 24)
    with pytest.raises(ValueError, match=r"uint8 \[T, H, W, 3\], got float64"):
        video_writing.write_video(tmp_path / "b.mp4", frames / 255, 24)
    with pytest.raises(ValueError, match="fps=0"):
        video_writing.write_video(tmp_path / "b.mp4", frames, 0)
    with pytest.raises(ValueError, match="1 frame, got 9"):
        video_writing.write_image(tmp_path / "b.png", frames)


def test_open_files_stay_flat(clips, tmp_path):
    """200 reads, good and bad, leave no file open."""
    bad = cut(clips["faststart.mp4"], 0.5, to=tmp_path / "bad.mp4")
    folder = Path("/proc/self/fd")
    if not folder.exists():
        pytest.skip("needs /proc")
    read_frames(clips["b_frames.mp4"], [5])
    before = len(list(folder.iterdir()))
    for i in range(100):
        read_frames(clips["b_frames.mp4"], [i % NUM_FRAMES])
        with pytest.raises(BadSample):
            read_frames(bad, [NUM_FRAMES - 1])
    assert len(list(folder.iterdir())) == before


def test_the_module_needs_no_torch(clips):
    """Measuring and reading work where torch cannot be imported."""
    program = (
        "import sys; sys.modules['torch'] = None\n"
        "from opensora_like.datasets.video_io import probe, read_frames\n"
        "print(probe(sys.argv[1]).num_frames, read_frames(sys.argv[1], [1]).shape[1])"
    )
    command = [sys.executable, "-c", program, str(clips["mpeg4.mp4"])]
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=root)
    assert done.stdout.split() == [str(NUM_FRAMES), "64"]
