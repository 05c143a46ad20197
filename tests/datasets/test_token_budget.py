"""Token lengths become buckets: frames of the published documents, within the budget, every size equally likely."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from opensora_like.datasets.aspect import closest_ratio, ratio_value
from opensora_like.datasets.bucket import compile_buckets
from opensora_like.datasets.plan import build_plan
from opensora_like.datasets.table import table_of
from opensora_like.datasets.token_budget import bucket_config_of, frames_at, published_shapes, sizes_of
from tools.token_buckets import prepare

SHAPES = json.loads((Path(__file__).parents[1] / "golden/videox_shapes_a.json").read_text())
RECORDED = json.loads((Path(__file__).parents[1] / "golden/videox_loss_a.json").read_text())["frames"]


def test_the_documented_numbers() -> None:
    """49 frames at 512: 13312 tokens, 29 frames at 640, 21 at 768, 13 at 896, 9 at 1024; all sizes equal give one."""
    found = {size: frames_at(size, token_size=512, num_frames=49) for size in (256, 384, 512, 640, 768, 896, 1024)}
    assert found == {256: 49, 384: 49, 512: 49, 640: 29, 768: 21, 896: 13, 1024: 9}
    assert (512 // 16) ** 2 * ((49 - 1) // 4 + 1) == 13312
    sizes = {"image_size": 640, "video_size": 640, "token_size": 640}
    assert bucket_config_of(**sizes, num_frames=81) == {"640px": {81: (1.0, 1), 1: (1.0, 1)}}


@pytest.mark.parametrize("case", RECORDED, ids=lambda case: str(case["args"]["token_sample_size"]))
def test_against_the_published_code(case: dict) -> None:
    """The same sizes; the same frames but where the code exceeds its own budget, and then the next fewer."""
    args = case["args"]
    sizes = sizes_of(image_size=args["image_sample_size"], video_size=args["video_sample_size"])
    assert sizes == [int(size) for size in case["length_to_frame_num"]]
    for size, theirs in case["length_to_frame_num"].items():
        ours = frames_at(int(size), token_size=args["token_sample_size"], num_frames=args["video_sample_n_frames"])
        most = min(case["target_token_length"] / int(size) ** 2, args["video_sample_n_frames"])
        assert ours % 4 == 1 and ours <= max(1, most)
        assert ours == theirs or (theirs > most and ours == max(1, theirs - 4))


def test_published_shapes() -> None:
    """The recorded list at 512; scaled, the shape that each recorded clip goes to, and that of its resize."""
    recorded = {tuple(map(int, shape)) for shape in SHAPES["ASPECT_RATIO_512"].values()}
    assert set(published_shapes(512, multiple=16)) == recorded and len(recorded) == 40
    for height, width, size, _, closest_h, closest_w, *_ in SHAPES["closest"]["rows"]:
        names = [f"{w}:{h}" for h, w in published_shapes(size, multiple=16)]
        found = names[closest_ratio(np.array([height]), np.array([width]), names)[0]]
        near = {name: abs(math.log(height / width) - math.log(ratio_value(name))) for name in names}
        wanted = f"{closest_w}:{closest_h}"
        assert found == wanted or abs(near[found] - near[wanted]) < 0.02, "names there tell the ratio at 512, to 0.01"


@pytest.mark.parametrize(
    ("multiple", "shapes"),
    [
        (16, {320: (240, 416), 480: (352, 624), 512: (384, 672), 640: (480, 832), 960: (720, 1248)}),
        (32, {480: (352, 608), 512: (384, 672), 640: (480, 832), 960: (704, 1248)}),
    ],
)
def test_shapes_of_a_clip_of_1080p(multiple: int, shapes: dict[int, tuple[int, int]]) -> None:
    """As the published trainers cut it, and portrait alike; a square stays one.

    At 320 in steps of 32 they take 224x416, by the ratio before rounding; here 224x384, whose ratio is nearer.
    """
    for size, shape in shapes.items():
        listed = published_shapes(size, multiple=multiple)
        names = [f"{w}:{h}" for h, w in listed]
        ours = [listed[closest_ratio(np.array([h]), np.array([w]), names)[0]] for h, w in ((1080, 1920), (1920, 1080))]
        assert ours == [shape, shape[::-1]]
        assert (size // multiple * multiple,) * 2 in listed


def test_listed_shapes_make_buckets() -> None:
    """Each size is one resolution with all of its shapes."""
    config = bucket_config_of(image_size=640, video_size=256, token_size=512, num_frames=49, multiple=16)
    buckets = compile_buckets(config, multiple=16)
    assert len({shape.resolution for shape in buckets.shapes}) == 4
    assert {(s.height, s.width) for s in buckets.shapes if s.num_frames == 29} == set(
        published_shapes(640, multiple=16)
    )
    with pytest.raises(ValueError, match="sample size 16 is too small"):
        published_shapes(16, multiple=16)


def test_sizes_are_equally_likely() -> None:
    """Clips that are large enough for all go to each as often; they are never enlarged."""
    config = bucket_config_of(image_size=512, video_size=256, token_size=512, num_frames=9)
    num = 6000
    large, small = [1024] * num, [300] * num
    columns = {"path": [f"{i}.mp4" for i in range(2 * num)], "text": ["x"] * 2 * num, "num_frames": [9] * 2 * num}
    table = table_of({**columns, "height": large + small, "width": large + small, "fps": [24.0] * 2 * num})
    buckets = compile_buckets(config, multiple=16)
    plan = build_plan(table, buckets, fps_max=24.0, seed=0, epoch=0)
    seen: dict[str, int] = dict.fromkeys(config, 0)
    for micro in (plan[i] for i in range(len(plan))):
        name = buckets.shapes[plan.bucket_ids[micro.index]].resolution
        seen[name] += int(np.sum(np.asarray(micro.rows) < num))
        assert name == "256px" or all(row < num for row in micro.rows)
    assert sum(seen.values()) == num
    for count in seen.values():
        assert abs(count - num / 3) < 5 * math.sqrt(num / 3)


def test_clips_alone_have_no_buckets_of_images(capsys: pytest.CaptureFixture[str]) -> None:
    """The sizes of FantasyTalking's commands, which name none for images: from 256 up to the video's, all 81 frames."""
    flags = ["--token_sample_size", "512", "--video_sample_n_frames", "81", "--video_sample_size"]
    found = []
    for size in ("512", "200"):
        assert prepare([*flags, size])() == 0
        scope: dict = {}
        exec(capsys.readouterr().out, scope)
        found.append({name: list(frames) for name, frames in scope["bucket_config"].items() if name != "_delete_"})
    assert found == [{"256px": [81], "384px": [81], "512px": [81]}, {"200px": [81]}]


def test_the_tool_prints_a_table_for_a_config(capsys: pytest.CaptureFixture[str]) -> None:
    """What it prints is Python; a wrong number is named."""
    sizes = ["--image_sample_size", "1024", "--video_sample_size", "256", "--token_sample_size", "512"]
    assert prepare([*sizes, "--video_sample_n_frames", "49"])() == 0
    scope: dict = {}
    exec(capsys.readouterr().out, scope)
    assert scope["bucket_config"]["1024px"][9] == (round(1 / 7, 6), 1)
    with pytest.raises(ValueError, match="video_sample_n_frames=0 must be 1 or more"):
        prepare([*sizes, "--video_sample_n_frames", "0"])
