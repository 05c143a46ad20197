"""The scorer reads every real clip of the world right, and nothing where there is nothing to read."""

from __future__ import annotations

import math
from collections import Counter
from itertools import combinations

import numpy as np
import pytest

from opensora_like.evaluation import world
from opensora_like.evaluation.shapes import ASPECTS, NONE, accuracy, score, score_clip
from opensora_like.evaluation.world import Combination

EVERYTHING = world.all_combinations(tuple(world.COLOURS))
TRUTHS = world.assign(EVERYTHING, 360, seed=3)


def draw(truths: list[Combination], *, size: int = 16, num_frames: int = 5) -> list[np.ndarray]:
    return [
        world.to_video(world.draw_clip(t, world.clip_generator(3, i), size=size, num_frames=num_frames))
        for i, t in enumerate(truths)
    ]


@pytest.fixture(scope="module")
def clips() -> list[np.ndarray]:
    return draw(TRUTHS)


def blur(clip: np.ndarray) -> np.ndarray:
    """The binomial (1, 4, 6, 4, 1) / 16 along height and width: a standard deviation of one pixel."""
    size = clip.shape[-1]
    for axis in (2, 3):
        padded = np.pad(clip, [(2, 2) if a == axis else (0, 0) for a in range(4)], mode="edge")
        clip = sum(w * np.take(padded, np.arange(k, k + size), axis) for k, w in enumerate((1, 4, 6, 4, 1))) / 16
    return clip


def test_every_real_clip_is_read_right(clips):
    """All six colours, every shape and direction, at the size that is generated: no error in 360 clips."""
    assert score(clips, TRUTHS) == {**{f"{a}_accuracy": 1.0 for a in (*ASPECTS, "all")}, "num": 360}


@pytest.mark.parametrize(("size", "num_frames"), [(16, 9), (32, 5), (64, 17), (48, 5)])
def test_reading_does_not_depend_on_size_or_length(size, num_frames):
    """The same clips at other sizes and lengths are read right as well."""
    assert score(draw(TRUTHS[:48], size=size, num_frames=num_frames), TRUTHS[:48])["all_accuracy"] == 1


def test_reading_survives_noise(clips):
    """Gaussian noise of sigma 0.1, a twentieth of the range of values, changes no reading."""
    rng = np.random.default_rng(0)
    assert score([c + 0.1 * rng.standard_normal(c.shape) for c in clips], TRUTHS)["all_accuracy"] == 1


def test_reading_survives_a_small_blur(clips):
    """A blur of one pixel, on shapes five pixels wide, costs at most one reading in twenty, and no direction."""
    scores = score([blur(c) for c in clips], TRUTHS)
    assert min(scores["colour_accuracy"], scores["shape_accuracy"]) >= 0.95
    assert scores["direction_accuracy"] == 1


@pytest.mark.parametrize("kind", ["uniform", "normal", "faint", "cloudy", "blank"])
def test_nothing_is_read_from_noise(kind):
    """Noise of any kind reads "none": a lucky guess must not add to a score."""
    rng, shape = np.random.default_rng(1), (3, 5, 16, 16)
    draws = {
        "uniform": lambda: rng.uniform(-1, 1, shape),
        "normal": lambda: rng.standard_normal(shape),
        "faint": lambda: 0.3 * rng.standard_normal(shape),
        "cloudy": lambda: 6 * blur(blur(rng.standard_normal(shape))),
        "blank": lambda: np.full(shape, rng.uniform(-1, 1)),
    }
    scores = score([draws[kind]() for _ in TRUTHS], TRUTHS)
    assert max(scores[f"{a}_accuracy"] for a in ASPECTS) <= 0.01


def test_direction_follows_the_order_of_the_frames(clips):
    """Played backwards is the opposite direction; standing still is none, and leaves colour and shape alone."""
    opposite = {"left": "right", "right": "left", "up": "down", "down": "up"}
    for clip, truth in zip(clips[:24], TRUTHS, strict=False):
        assert score_clip(clip[:, ::-1])["direction"] == opposite[truth.direction]
        assert score_clip(clip[:, [2, 2, 2, 2, 2]]) == {**truth._asdict(), "direction": NONE}


def test_two_shapes_or_a_flickering_one_are_not_one():
    """A clip with a second blob reads "none"; one that is empty in every other frame as well."""
    red = world.draw_clip(Combination("red", "circle", "up"), world.clip_generator(0, 0), size=16, num_frames=5)
    two = world.to_video(np.maximum(red, red[:, :, (np.arange(16) + 8) % 16]))
    assert set(score_clip(two).values()) == {NONE}
    gaps = world.to_video(red)
    gaps[:, [1, 3]] = world.to_video(np.full((1, 16, 16, 3), world.BACKGROUND[0], np.uint8))
    assert set(score_clip(gaps).values()) == {NONE}


def test_scores_count_none_as_wrong_and_a_still_has_no_direction():
    """Accuracy by hand: two of three colours; the direction of a still image is not scored."""
    truths = [
        Combination("red", "circle", "up"),
        Combination("blue", "square", ""),
        Combination("red", "square", "left"),
    ]
    readings = [t._asdict() for t in truths]
    readings[0] = {**readings[0], "colour": NONE}
    scores = accuracy(readings, truths)
    assert scores == pytest.approx(
        {"colour_accuracy": 2 / 3, "shape_accuracy": 1, "direction_accuracy": 1, "all_accuracy": 2 / 3, "num": 3}
    )
    assert math.isnan(accuracy([], [])["colour_accuracy"])
    with pytest.raises(ValueError, match="1 clips and 0 truths"):
        accuracy(readings[:1], [])


def test_tensors_and_bad_input():
    """A torch tensor of any float type is scored like the array; what is no clip is refused with its shape."""
    import torch

    clip = draw(TRUTHS[:1])[0]
    assert score_clip(torch.from_numpy(clip).bfloat16().requires_grad_()) == TRUTHS[0]._asdict()
    for bad in (clip[:2], clip[..., :8], clip[:, :, :8, :8], clip[0]):
        with pytest.raises(ValueError, match="cannot be scored"):
            score_clip(bad)
    with pytest.raises(ValueError, match="not finite"):
        score_clip(np.where(clip > 0, np.nan, clip))


def test_captions_state_the_truth():
    """A caption and its truth are each other's inverse, with or without a direction; other text is refused."""
    for truth in [*EVERYTHING, Combination("red", "square", "")]:
        assert world.combination_of(truth.caption) == truth
    for text in ("", "red circle moving left", "a pink circle moving left", "a red circle going left"):
        with pytest.raises(ValueError, match="caption"):
            world.combination_of(text)


@pytest.mark.parametrize("seed", range(40))
def test_held_out_combinations_leave_every_word_and_pair_in_training(seed):
    """Of 48, eight are held out; no two of them share two words, and no word is in more than four."""
    everything = world.all_combinations()
    seen, held_out = world.split(everything, fraction=1 / 6, seed=seed)
    assert len(held_out) == 8 and sorted(seen + held_out) == sorted(everything)
    assert max(Counter(p for c in held_out for p in combinations(c, 2)).values()) == 1
    assert max(Counter(name for c in held_out for name in c).values()) <= 4
    assert world.split(everything, fraction=1 / 6, seed=seed)[1] == held_out


def test_assignment_is_balanced_and_a_prefix():
    """Every combination comes equally often, and more clips begin with the same ones."""
    seen, _ = world.split(world.all_combinations(), fraction=1 / 6, seed=0)
    assigned = world.assign(seen, 120, seed=5)
    assert set(Counter(assigned).values()) == {3}
    assert world.assign(seen, 97, seed=5) == assigned[:97]


def test_shapes_stay_inside_and_have_one_area():
    """Nothing touches the frame's rim from outside, whatever the size; the three shapes cover the same area."""
    areas: dict[str, list[float]] = {}
    for i, truth in enumerate(world.assign(EVERYTHING, 144, seed=1)):
        path = world.draw_path(truth, world.clip_generator(1, i), num_frames=5)
        inside = world.occupancy(truth.shape, path, size=64).sum(axis=(1, 2)) / 16
        areas.setdefault(truth.shape, []).extend(inside)
        way = path[-1] - path[0]
        step = np.array(world.DIRECTIONS[truth.direction])
        assert world.DISTANCE[0] <= way @ step <= world.DISTANCE[1] and way @ step[::-1] == 0
    for values in areas.values():
        np.testing.assert_allclose(values, math.pi * world.RADIUS**2, rtol=0.01)
    with pytest.raises(ValueError, match="leaves the frame"):
        world.draw_path(Combination("red", "circle", "up"), world.clip_generator(0, 0), num_frames=5, distance=(12, 13))


def test_the_middle_frame_does_not_tell_left_from_right():
    """Half way, the positions of leftward and rightward clips have the same distribution."""
    middles = {
        d: np.array(
            [
                world.draw_path(Combination("red", "circle", d), world.clip_generator(2, i), num_frames=5)[2]
                for i in range(400)
            ]
        )
        for d in ("left", "right")
    }
    left, right = middles["left"], middles["right"]
    np.testing.assert_allclose(left.mean(axis=0), right.mean(axis=0), atol=0.5)
    np.testing.assert_allclose(left.std(axis=0), right.std(axis=0), atol=0.3)


def test_a_radius_per_frame_grows_the_shape():
    """The area follows the radius of each frame, so a size can carry a signal."""
    radius = np.linspace(1.5, 3.0, 5)
    centres = np.full((5, 2), 8.0)
    area = world.occupancy("square", centres, size=128, radius=radius).sum(axis=(1, 2)) / 64
    np.testing.assert_allclose(area, math.pi * radius**2, rtol=0.02)
