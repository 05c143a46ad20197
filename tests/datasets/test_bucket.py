"""Rows find the buckets that the published system gives them, and those that find none are told why."""

import json
import math
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from opensora_like.datasets import bucket as bucket_module
from opensora_like.datasets.aspect import num_pixels, ratio_value, shape_table
from opensora_like.datasets.bucket import assign, compile_buckets, sampling_interval
from opensora_like.datasets.drops import REASONS, drop_reasons
from opensora_like.rng import uniform

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "opensora_bucket_a.json").read_text())
STAGE1 = {
    "256px": {
        1: (1.0, 45),
        **dict.fromkeys(range(5, 34, 4), (1.0, 12)),
        **dict.fromkeys(range(37, 66, 4), (1.0, 6)),
        **dict.fromkeys(range(69, 98, 4), (1.0, 4)),
        **dict.fromkeys(range(101, 130, 4), (1.0, 3)),
    },
    "768px": {1: (0.5, 13)},
    "1024px": {1: (0.5, 7)},
}


def _columns(rows):
    table = np.array([[math.nan if v is None else v for v in row] for row in rows], np.float64)
    return (*(table[:, i].astype(np.int64) for i in range(3)), table[:, 3])


COLUMNS = _columns(GOLDEN["rows"])


def _repeated(row, count):
    return _columns([row] * count)


def _names(ids, buckets):
    return [None if i < 0 else f"{buckets.name(i).replace('/', '|')}|{buckets.ratios[i]}" for i in ids.tolist()]


@pytest.mark.parametrize("case", GOLDEN["cases"][:2], ids=["four_resolutions", "suffixes"])
def test_certain_buckets_are_the_recorded_ones(case):
    """With probabilities 1, bucket, shape and batch size of all 2,000 rows are as recorded."""
    buckets = compile_buckets(case["config"], multiple=16)
    ids = assign(*COLUMNS, buckets, fps_max=case["fps_max"], seed=0, epoch=0)
    by_id = {entry["id"]: (name, entry) for name, entry in case["id_table"].items()}
    assert len(buckets) == case["num_bucket"]
    assert _names(ids, buckets) == [by_id[i][0] if i >= 0 else None for i in case["ids"]]
    for mine, recorded in zip(ids.tolist(), case["ids"], strict=True):
        if mine >= 0:
            assert list(buckets.shapes[mine][1:]) == by_id[recorded][1]["thw"]
            assert buckets.batch_sizes[mine] == by_id[recorded][1]["bs"]


def test_drawn_buckets_have_the_recorded_shares():
    """With probabilities and skips, the mean counts over 40 epochs lie within 4 sigma of the recorded draw."""
    case = GOLDEN["cases"][2]
    buckets = compile_buckets(case["config"], multiple=16)
    recorded_names = {entry["id"]: name for name, entry in case["id_table"].items()}
    recorded = Counter(recorded_names[i].rsplit("|", 1)[0] if i >= 0 else None for i in case["ids"])
    mine = Counter()
    for epoch in range(40):
        ids = assign(*COLUMNS, buckets, fps_max=case["fps_max"], seed=7, epoch=epoch)
        mine.update(n and n.rsplit("|", 1)[0] for n in _names(ids, buckets))
    assert set(mine) == set(recorded)
    assert mine[None] == 40 * recorded[None]  # nobody loses every draw in this config
    for name, count in recorded.items():
        share = mine[name] / 40 / len(COLUMNS[0])
        sigma = math.sqrt(len(COLUMNS[0]) * share * (1 - share))
        assert abs(mine[name] / 40 - count) < 4 * sigma, (name, mine[name] / 40, count)


def _bucket_of_row(row, columns, config, fps_max, seed, epoch):
    """The rule of assignment, written for one row."""
    frames, height, width, fps = (c[row].item() for c in columns)
    usable = frames if math.isnan(fps) or fps < fps_max else frames // math.ceil(fps / fps_max)
    for name in sorted(config, key=num_pixels, reverse=True):
        if height * width < 0.8 * num_pixels(name):
            continue
        table = {int(n): entry for n, entry in config[name].items()}
        for n in sorted((n for n in table if (n == 1 if usable == 1 else 1 < n <= usable)), reverse=True):
            p_hw, p_skip = table[n][0] if isinstance(table[n][0], (list, tuple)) else (table[n][0], 0.0)
            if uniform(seed, f"bucket.skip/{name}/{n}", epoch, [row])[0] < p_skip:
                continue
            if uniform(seed, f"bucket.keep/{name}", epoch, [row])[0] < p_hw:
                ratios = shape_table(name, multiple=16)
                return f"{name}|{n}|{min(ratios, key=lambda r: abs(height / width - ratio_value(r)))}"
            break
    return None


def test_whole_columns_get_what_single_rows_get(monkeypatch):
    """The vectorised rule, in chunks of any size, equals the rule written for one row."""
    case = GOLDEN["cases"][2]
    config = case["config"] | {"144p": {"1": [[0.5, 0.5], 2], "5": [[0.5, 0.2], 2], "3": [0.5, 2]}}
    buckets = compile_buckets(config, multiple=16)
    columns = tuple(c[:600] for c in COLUMNS)
    expected = [_bucket_of_row(row, columns, config, 24, 3, 5) for row in range(600)]
    for chunk in (1 << 16, 77):
        monkeypatch.setattr(bucket_module, "CHUNK", chunk)
        assert _names(assign(*columns, buckets, fps_max=24, seed=3, epoch=5), buckets) == expected


@pytest.mark.parametrize(
    ("config", "row", "shares"),
    [
        ({"256px": {33: (0.3, 1), 65: (0.5, 1)}}, [100, 300, 300, None], {"256px/65": 0.5, None: 0.5}),
        (STAGE1, [1, 1080, 1920, None], {"1024px/1": 0.5, "768px/1": 0.25, "256px/1": 0.25}),
        (STAGE1, [150, 1080, 1920, 24], {"256px/129": 1.0}),
        ({"512px": {1: ((0.5, 0.4), 1)}}, [1, 600, 600, None], {"512px/1": 0.3, None: 0.7}),
        (
            {"512px": {65: ((0.5, 0.4), 1), 33: (1.0, 1)}, "256px": {5: (1.0, 1)}},
            [100, 600, 600, 24],
            {"512px/65": 0.3, "512px/33": 0.4, "256px/5": 0.3},
        ),
    ],
    ids=["float_never_falls_to_fewer_frames", "image", "long_clip", "pair_on_images", "pair_on_videos"],
)
def test_probabilities_mean_what_the_docs_say(config, row, shares):
    """Shares of 20,000 equal rows agree with the arithmetic within 2%."""
    buckets = compile_buckets(config, multiple=16)
    ids = assign(*_repeated(row, 20_000), buckets, fps_max=24, seed=0, epoch=0)
    found = Counter(buckets.name(i) if i >= 0 else None for i in ids.tolist())
    assert set(found) == set(shares)
    for name, share in shares.items():
        assert abs(found[name] / 20_000 - share) < 0.02


def test_draws_belong_to_seed_epoch_and_row_alone():
    """The same call repeats itself; another seed or epoch differs; an added resolution leaves the other draws alone."""
    columns = _repeated([1, 1080, 1920, None], 2000)
    config = {"1024px": {1: (0.5, 1)}, "768px": {1: (0.5, 1)}}

    def names(config=config, seed=0, epoch=0):
        buckets = compile_buckets(config, multiple=16)
        return _names(assign(*columns, buckets, fps_max=24, seed=seed, epoch=epoch), buckets)

    assert names() == names()
    assert names() != names(seed=1)
    assert names() != names(epoch=1)
    more = names({**config, "256px": {1: (1.0, 1)}})
    assert [n for n in more if not n.startswith("256px")] == [n for n in names() if n]


def test_stage1_has_393_buckets():
    """Aspect ratios count apart, as in the published count."""
    buckets = compile_buckets(STAGE1, multiple=16)
    assert len(buckets) == len(buckets.shapes) == len(buckets.batch_sizes) == 393
    assert buckets.shapes[0].resolution == "1024px"
    assert all(s.height % 16 == 0 and s.width % 16 == 0 for s in buckets.shapes)


def test_sampling_interval_is_the_published_map():
    """Recorded pairs of fps and interval at 24; no fps or no limit is interval 1; a limit of 0 is an error."""
    fps = np.array([math.nan, 0, 23.976, 24, 25, 29.97, 30, 50, 60, 120])
    assert sampling_interval(fps, 24).tolist() == [1, 1, 1, 1, 2, 2, 2, 3, 3, 5]
    assert sampling_interval(fps, None).tolist() == [1] * 10
    assert sampling_interval(120.0, 16) == 8
    with pytest.raises(ValueError, match="fps_max=0 must be above 0"):
        sampling_interval(fps, 0)


def test_an_image_is_one_frame_at_any_fps():
    """A row of one frame at 25 fps goes to the image bucket; the published code divides it away."""
    buckets = compile_buckets({"256px": {1: (1.0, 1)}}, multiple=16)
    assert (assign(*_repeated([1, 300, 300, 25.0], 3), buckets, fps_max=24, seed=0, epoch=0) >= 0).all()


def test_spelling_of_the_config_does_not_matter():
    """String keys, lists and whole floats compile to the same buckets as ints and tuples."""
    plain = compile_buckets({"256px": {33: (1.0, 12), 1: ((0.5, 0.1), 4)}}, multiple=16)
    spelt = compile_buckets({"256px": {"1": [[0.5, 0.1], 4.0], "33": [1, "12"]}}, multiple=16)
    assert plain.to_json() == spelt.to_json()
    assert plain.shapes == spelt.shapes


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, "bucket_config={} has no bucket"),
        ({"256px": {}}, "bucket_config.256px={} has no frame counts"),
        ({"256": {1: (1.0, 1)}}, "bucket_config.256: '256' is not a resolution"),
        ({"256px": {33: (1.0, None)}}, "bucket_config.256px.33: batch size None must be a whole number"),
        ({"256px": {33: (1.0, 0)}}, "bucket_config.256px.33: batch size 0 must be"),
        ({"256px": {33: (1.0, 2.5)}}, "bucket_config.256px.33: batch size 2.5 must be"),
        ({"256px": {33: (1.5, 4)}}, "bucket_config.256px.33: probability 1.5 is not between 0 and 1"),
        ({"256px": {33: ((1.0, math.nan), 4)}}, "bucket_config.256px.33: probability nan is not"),
        ({"256px": {33: ((1.0, 0.0, 0.0), 4)}}, r"bucket_config.256px.33: probability \(1.0, 0.0, 0.0\) must be"),
        ({"256px": {33: 1.0}}, "bucket_config.256px.33=1.0 must be"),
        ({"256px": {0: (1.0, 4)}}, "bucket_config.256px.0: the frame count 0 must be"),
        ({"256px": {"many": (1.0, 4)}}, "bucket_config.256px.many: the frame count 'many' must be"),
        ({"256px": {33: (1.0, 4), "33": (1.0, 2)}}, "bucket_config.256px.33: 33 frames are given twice"),
        ({"256px_ar7:1": {33: (1.0, 4)}}, "no aspect ratio '7:1'"),
    ],
)
def test_a_bucket_config_that_cannot_be_names_its_key(config, message):
    """Every wrong entry is a ValueError that begins with the key."""
    with pytest.raises(ValueError, match=message):
        compile_buckets(config, multiple=16)


def test_every_row_without_a_bucket_has_its_reason():
    """Each reason is found on a row made for it, with the count and the number to change in its sentence."""
    rows = {
        "kept": [40, 300, 300, 24],
        "invalid_numbers": [40, 0, 300, 24],
        "too_few_frames": [64, 300, 300, 60],
        "too_small": [40, 100, 100, 24],
        "lost_draw": [40, 600, 600, 24],
        "no_image_bucket": [1, 300, 300, None],
    }
    buckets = compile_buckets({"256px": {33: (1.0, 1)}}, multiple=16)
    columns = _columns([rows[r] for r in rows if r != "lost_draw"])
    ids = assign(*columns, buckets, fps_max=24, seed=0, epoch=0)
    report = drop_reasons(*columns, buckets, ids, fps_max=24)
    assert [REASONS[c] for c in report.codes] == [r for r in rows if r != "lost_draw"]
    assert report.counts == dict.fromkeys(report.advice, 1) and "kept" not in report.counts
    said = "none has the 33 that bucket 256px/33 needs at fps_max=24, the longest has 21"
    assert said in report.advice["too_few_frames"]
    assert "10000 pixels and 256px begins at 52429" in report.advice["too_small"]
    assert "in row 1" in report.advice["invalid_numbers"]

    drawn = compile_buckets({"256px": {33: (0.0, 1), 1: (1.0, 1)}}, multiple=16)
    columns = _columns([rows["lost_draw"], rows["no_image_bucket"]])
    ids = assign(*columns, drawn, fps_max=24, seed=0, epoch=0)
    assert drop_reasons(*columns, drawn, ids, fps_max=24).counts == {"lost_draw": 1}

    images = compile_buckets({"256px": {1: (1.0, 1)}}, multiple=16)
    columns = _columns([rows["kept"], [3, 300, 300, 120]])
    ids = assign(*columns, images, fps_max=24, seed=0, epoch=0)
    assert drop_reasons(*columns, images, ids, fps_max=24).counts == {"no_video_bucket": 2}


def test_numbers_that_cannot_be_are_left_out_in_silence():
    """NaN, infinite, negative and huge values give no bucket and no numpy warning."""
    buckets = compile_buckets(STAGE1, multiple=16)
    bad = np.array([math.nan, math.inf, -1.0, 0.0, 1e300])
    good = np.full(5, 600.0)
    with np.errstate(all="raise"):
        for place in range(3):
            columns = [good, good, good, np.full(5, 24.0)]
            columns[place] = bad
            ids = assign(*columns, buckets, fps_max=24, seed=0, epoch=0)
            assert (ids[:4] == -1).all()
        ids = assign(good, good, good, np.array([math.inf, -5.0, 24, 24, 24]), buckets, fps_max=24, seed=0, epoch=0)
    assert (ids[:2] == -1).all() and (ids[2:] >= 0).all()


def test_reasons_cover_exactly_the_rows_without_a_bucket():
    """On the recorded rows: certain configs never blame the draw, and codes and ids agree row by row."""
    for case in GOLDEN["cases"]:
        buckets = compile_buckets(case["config"], multiple=16)
        ids = assign(*COLUMNS, buckets, fps_max=case["fps_max"], seed=0, epoch=0)
        report = drop_reasons(*COLUMNS, buckets, ids, fps_max=case["fps_max"])
        np.testing.assert_array_equal(report.codes > 0, ids < 0)
        assert sum(report.counts.values()) == (ids < 0).sum()
        assert "lost_draw" not in report.counts


def test_planning_needs_no_torch():
    """Tables, buckets and plans work where torch is not installed, and importing them loads no pandas."""
    program = """
import sys
sys.modules["torch"] = None
from opensora_like.datasets import aspect, bucket, plan, table
assert "pandas" not in sys.modules
row = dict(path="a", text="b", num_frames=1, height=300, width=300, fps=None)
clips = table.table_of({name: [value] for name, value in row.items()})
buckets = bucket.compile_buckets({"256px": {1: (1.0, 1)}}, multiple=16)
assert len(plan.build_plan(clips, buckets, fps_max=24, seed=0, epoch=0)) == 1
"""
    subprocess.run([sys.executable, "-c", program], check=True, cwd=Path(__file__).parents[2])
