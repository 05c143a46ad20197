"""Resolution names become the shapes that the published checkpoints were trained at."""

import json
from pathlib import Path

import numpy as np
import pytest

from opensora_like.datasets.aspect import ClosestRatio, closest_ratio, num_pixels, ratio_value, shape_table

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "opensora_aspect_a.json").read_text())


@pytest.mark.parametrize("key", GOLDEN["tables"])
def test_tables_are_the_recorded_ones(key):
    """Names, shapes and their order (it decides ties) agree for every resolution and multiple."""
    multiple, name = int(key.split("/")[0][1:]), key.split("/")[1]
    recorded = {kind: _pairs(GOLDEN["tables"][key][kind]) for kind in ("train", "infer", "max", "ar16:9")}
    assert num_pixels(name) == GOLDEN["tables"][key]["num_pixels"]
    assert list(shape_table(name, multiple=multiple).items()) == recorded["train"]
    assert list(shape_table(name, multiple=multiple, training=False).items()) == recorded["infer"]
    assert list(shape_table(f"{name}_max", multiple=multiple).items()) == recorded["max"]
    assert list(shape_table(f"{name}_ar16:9", multiple=multiple).items()) == recorded["ar16:9"]


def _pairs(table):
    return [(name, tuple(shape)) for name, shape in table.items()]


def test_ratio_names_are_width_to_height():
    """A ratio's value is height / width, as recorded."""
    assert {name: ratio_value(name) for name in GOLDEN["ratios"]} == GOLDEN["get_ratio"]


def test_closest_ratio_is_the_recorded_one():
    """200 sizes go to the ratio that the published system gives them."""
    rows = json.loads((Path(__file__).parents[1] / "golden/opensora_maths_a.json").read_text())["closest_ratio"]
    for height, width, resolution, ratio in rows:
        names = list(shape_table(resolution, multiple=16))
        assert names[closest_ratio(np.array([height]), np.array([width]), names)[0]] == ratio


def test_closest_ratio_is_the_first_of_the_smallest_distances():
    """For random sizes and for exact ties the index is what argmin over all distances gives."""
    rng = np.random.default_rng(0)
    height, width = rng.integers(1, 3000, (2, 20_000))
    height[:3], width[:3] = [700, 350, 1], [800, 400, 4000]  # 7:8 lies exactly between 3:4 and 1:1
    for name, multiple in (("256px", 16), ("768px", 16), ("768px", 32)):
        names = list(shape_table(name, multiple=multiple))
        values = np.array([ratio_value(n) for n in names])
        expected = np.argmin(np.abs((height / width)[:, None] - values), axis=1)
        np.testing.assert_array_equal(closest_ratio(height, width, names), expected)


def test_closest_ratio_is_exact_beside_its_limits():
    """The floats next to every limit fall on the side that the rounded distances say."""
    names = list(shape_table("720p", multiple=16))
    values, closest = np.array([ratio_value(n) for n in names]), ClosestRatio(names)
    limits = closest._limits
    near = np.concatenate([limits, np.nextafter(limits, -np.inf), np.nextafter(limits, np.inf)])
    np.testing.assert_array_equal(closest(near), np.argmin(np.abs(near[:, None] - values), axis=1))


@pytest.mark.parametrize(
    ("name", "multiple", "message"),
    [
        ("256", 16, "'256' is not a resolution"),
        ("0px", 16, "'0px' is not a resolution"),
        ("256px_square", 16, "'256px_square' is not a resolution"),
        ("256px_ar16:10", 16, "no aspect ratio '16:10' there; did you mean"),
        ("256px_ar3:5", 16, "no aspect ratio '3:5'"),
        ("16px", 16, "256 pixels, too few for sides that are multiples of 16"),
        ("256px", 0, "multiple=0 must be"),
        ("480x830", 16, "480 and 830 must both be multiples of 16"),
        ("480x832,240x416", 16, "sizes of one ratio"),
    ],
)
def test_a_name_that_cannot_be_says_so(name, multiple, message):
    """A wrong name, ratio or multiple is a ValueError with the value in it."""
    with pytest.raises(ValueError, match=message):
        shape_table(name, multiple=multiple)


def test_sizes_are_a_resolution():
    """Height x width, for clips whose sizes are given, such as cached latents; the nearest is their own."""
    assert num_pixels("480x832") == num_pixels("832x480,640x640,480x832") == 480 * 832
    for training in (True, False):
        assert shape_table("480x832", multiple=16, training=training) == {"832:480": (480, 832)}
    names = list(shape_table("832x480,640x640,480x832", multiple=16))
    assert closest_ratio(np.array([480, 640, 832]), np.array([832, 640, 480]), names).tolist() == [2, 1, 0]
