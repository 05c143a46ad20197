"""The speech world: sizes read from files follow the loudness read from files, of the own sound and of no other."""

from __future__ import annotations

import csv

import numpy as np
import pytest

from opensora_like.datasets.audio_io import SAMPLE_RATE, read_sound
from opensora_like.datasets.resize import resize_crop
from opensora_like.datasets.video_io import read_frames
from opensora_like.evaluation import speaking
from opensora_like.evaluation.world import to_video
from tools.make_speech import SpeechSet, write_set

NUM_FRAMES, NUM_CLIPS = 17, 12


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    folder = tmp_path_factory.mktemp("speech")
    write_set(SpeechSet(num_clips=NUM_CLIPS), folder)
    with (folder / "clips.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def sizes_of(row: dict) -> np.ndarray:
    """At the size at which the proof's denoiser sees the clip."""
    return speaking.sizes(resize_crop(read_frames(row["path"], range(NUM_FRAMES)), 16, 16, image=False), row["colour"])


def levels_of(row: dict) -> np.ndarray:
    num_samples = round(NUM_FRAMES / speaking.FPS * SAMPLE_RATE)
    return speaking.loudness(read_sound(row["audio_path"], 0.0, num_samples), NUM_FRAMES)


def test_files_tell_the_truth(rows: list[dict]) -> None:
    """Of mp4 and wav: each clip's size follows its own sound; the mean over sounds of other clips is about 0."""
    sizes, levels = [sizes_of(row) for row in rows], [levels_of(row) for row in rows]
    own = [speaking.correlation(s, level) for s, level in zip(sizes, levels, strict=True)]
    assert min(own) > 0.95
    others = [speaking.correlation(s, level) for s in sizes for level in levels]
    assert abs((sum(others) - sum(own)) / (len(others) - len(own))) < 0.2
    assert {row["colour"] for row in rows} == {"red", "green", "blue", "yellow"}
    assert all(row["text"] == f"a {row['colour']} {row['shape']}" for row in rows)


def test_a_clip_shows_its_levels() -> None:
    """Loudness read from the sound, and size from the pixels, are those that were drawn; without change both are 0."""
    [truth, *_] = SpeechSet().truths()
    clip = speaking.draw_spoken(truth, 0, 3, size=64, num_frames=NUM_FRAMES, fps=8)
    np.testing.assert_allclose(speaking.loudness(clip.sound_S, NUM_FRAMES), clip.levels_T, atol=0.05)
    radii = speaking.RADII[0] + (speaking.RADII[1] - speaking.RADII[0]) * clip.levels_T
    np.testing.assert_allclose(speaking.sizes(to_video(clip.frames_THWC), truth.colour), radii, atol=0.1)
    assert speaking.correlation(np.ones(5), np.arange(5.0)) == 0.0


def test_sets_grow_at_their_end() -> None:
    """Clip and sound of a number do not depend on how many there are; another seed gives others."""
    few, many = (SpeechSet(num_clips=n).truths() for n in (12, 30))
    assert many[:12] == few
    a, b, other = (speaking.draw_spoken(few[0], seed, 5, size=16, num_frames=NUM_FRAMES, fps=8) for seed in (0, 0, 1))
    assert np.array_equal(a.frames_THWC, b.frames_THWC) and np.array_equal(a.sound_S, b.sound_S)
    assert not np.array_equal(a.sound_S, other.sound_S)
    with pytest.raises(ValueError, match="num_frames=1 must be 2 or more"):
        SpeechSet(num_frames=1)
