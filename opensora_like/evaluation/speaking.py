"""The speech world: a coloured shape that stays where it is and is as large as a sound is loud, and how to read that.

Shape suffixes: T frames, S audio samples, C colour channels, H height, W width. Levels go from 0 (quiet) to 1 (loud).
"""

from __future__ import annotations

import math
import wave
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from opensora_like.datasets.audio_io import SAMPLE_RATE as RATE
from opensora_like.datasets.audio_io import read_sound
from opensora_like.evaluation import world
from opensora_like.evaluation.generate import Sampled
from opensora_like.evaluation.world import BACKGROUND, CELLS, COLOURS, Combination, combination_of
from opensora_like.rng import numpy_generator

FPS = 8  # of its clips
KNOT_SECONDS = 0.5  # between two levels that are drawn; in between they go straight
RANGE_DB = 40.0  # from level 0 to level 1
TONE_HZ = 220.0
RADII = (1.0, 4.5)  # cells, at level 0 and at level 1


class Spoken(NamedTuple):
    """One clip: uint8 RGB frames [T, H, W, C], its sound [S] in [-1, 1], and the level during each frame [T]."""

    frames_THWC: np.ndarray
    sound_S: np.ndarray
    levels_T: np.ndarray


def draw_spoken(truth: Combination, seed: int, index: int, *, size: int, num_frames: int, fps: int) -> Spoken:
    """Draw clip `index` of a set; it does not depend on how many clips there are.

    Args:
        size: pixels per side.
    """
    sound, levels = draw_sound(numpy_generator(seed, "speech sound", index), num_frames=num_frames, fps=fps)
    radius = RADII[0] + (RADII[1] - RADII[0]) * levels
    still = truth._replace(direction="")
    generator = world.clip_generator(seed, index)
    return Spoken(
        world.draw_clip(still, generator, size=size, num_frames=num_frames, radius=radius, distance=(0.0, 0.0)),
        sound,
        levels,
    )


def draw_sound(generator: np.random.Generator, *, num_frames: int, fps: int) -> tuple[np.ndarray, np.ndarray]:
    """A tone whose level rises and falls at random, as long as the frames are shown.

    Returns: float64 [S] in [-1, 1], and the mean level while each frame is shown, float64 [T].
    """
    seconds = num_frames / fps
    knots = generator.uniform(size=math.ceil(seconds / KNOT_SECONDS) + 1)
    times_S = np.arange(round(seconds * RATE)) / RATE
    level_S = np.interp(times_S / KNOT_SECONDS, np.arange(len(knots)), knots)
    sound_S = 10 ** ((level_S - 1) * RANGE_DB / 20) * np.sin(2 * np.pi * TONE_HZ * times_S)
    return sound_S, _by_frame(level_S, num_frames)


def write_wav(path: str | Path, sound_S: np.ndarray) -> None:
    """Write a sound in [-1, 1] as 16 bits at `RATE`."""
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(RATE)
        file.writeframes(np.rint(np.clip(sound_S, -1, 1) * 32767).astype("<i2").tobytes())


def loudness(sound_S: np.ndarray, num_frames: int) -> np.ndarray:
    """The level of a sound while each of its frames is shown, by its power; float64 [T]."""
    power_T = _by_frame(np.asarray(sound_S, np.float64) ** 2, num_frames)
    return 1 + 10 * np.log10(np.maximum(2 * power_T, 1e-12)) / RANGE_DB


def sizes(video_CTHW: Any, colour: str) -> np.ndarray:
    """The radius of a circle as large as what has the colour of the shape; in cells, float64 [T].

    Args:
        video_CTHW: numpy array or tensor [3, T, H, W] in [-1, 1], square.
        colour: by its name.
    """
    video = np.asarray(video_CTHW, np.float64)
    ground, full = (np.array(rgb) / 127.5 - 1 for rgb in (BACKGROUND, COLOURS[colour]))
    way = full - ground
    covered_THW = np.tensordot(way / (way @ way), video - ground[:, None, None, None], axes=1).clip(0, 1)
    cells_T = covered_THW.sum(axis=(1, 2)) * (CELLS / video.shape[-1]) ** 2
    return np.sqrt(cells_T / np.pi)


def correlation(sizes_T: np.ndarray, levels_T: np.ndarray) -> float:
    """Pearson's, of sizes and levels of one clip after its first frame, which is given; 0 where nothing changes."""
    a, b = (np.asarray(x, np.float64)[1:] - np.mean(x[1:]) for x in (sizes_T, levels_T))
    scale = np.linalg.norm(a) * np.linalg.norm(b)
    return float(a @ b / scale) if scale > 1e-9 else 0.0


def mean_correlation(sampled: Sequence[Sampled]) -> float:
    """Of samples with the sound that they were made for, whether it was heard or not; see `correlation`."""
    found = []
    for clip in sampled:
        num_frames = clip.video_CTHW.shape[1]
        samples = round(num_frames / FPS * RATE)
        levels = loudness(read_sound(clip.prompt.audio, 0.0, samples), num_frames)
        found.append(correlation(sizes(clip.video_CTHW, combination_of(clip.prompt.text).colour), levels))
    return float(np.mean(found))


def _by_frame(values_S: np.ndarray, num_frames: int) -> np.ndarray:
    """Means while each frame is shown. Returns: float64 [T]."""
    return np.array([part.mean() for part in np.array_split(values_S, num_frames)])
