"""The diagnosis says of every row what training's plan says, and quarantined rows are in no plan."""

import json
import logging
import math

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from opensora_like.datasets import diagnosis as dx
from opensora_like.datasets.bucket import compile_buckets
from opensora_like.datasets.drops import EmptyPlan, assign_rows
from opensora_like.datasets.held_out import held_out_rows, table_without
from opensora_like.datasets.plan import build_plan, order_key, what_changed
from opensora_like.datasets.quarantine import read_quarantine
from opensora_like.datasets.shard_writer import write_shards
from opensora_like.datasets.table import read_table
from opensora_like.datasets.video_text import VideoText

CONFIG = {
    "256px": {1: (0.7, 5), 17: ((0.5, 0.5), 3), 33: (0.8, 3), 65: ((1.0, 0.3), 2)},
    "512px": {1: ((0.5, 0.5), 2), 33: (0.5, 2)},
}
SEED = 3
BUILD = {"bucket_config": CONFIG, "multiple": 16, "seed": SEED}


def _columns(num_rows, seed):
    rng = np.random.default_rng(seed)
    frames = rng.choice([0, 1, 4, 20, 40, 90], num_rows)
    return {
        "path": [f"clips/{i}.mp4" for i in range(num_rows)],
        "text": [f"clip {i % 90}" if i % 7 else " " * (i % 3) for i in range(num_rows)],
        "num_frames": frames,
        "height": rng.integers(0, 700, num_rows),
        "width": rng.integers(100, 700, num_rows),
        "fps": np.where(frames == 1, math.nan, rng.choice([23.976, 60.0, 24.0, 0.5], num_rows)),
    }


def _write(folder, num_rows=400, seed=0):
    file = folder / "clips.parquet"
    pq.write_table(pa.table(_columns(num_rows, seed)), file)
    return file


def _list(folder, table, rows, name="quarantine.csv"):
    lines = ["row,path,reason"] + [f"{row},clips/{row}.mp4,said" for row in rows]
    (folder / name).write_text("\n".join(lines) + "\n")
    return str(folder / name)


def _plan_rows(plan):
    return np.unique(np.concatenate([plan[i].rows for i in range(len(plan))]))


@pytest.mark.parametrize("seed", range(4))
def test_every_row_has_the_outcome_that_the_plan_gives_it(tmp_path, seed):
    """Kept rows are those of the micro-batches, batches per bucket are the plan's, all outcomes sum to the rows."""
    source = _write(tmp_path, num_rows=350 + seed, seed=seed)
    table = read_table(source)
    listed = _list(tmp_path, table, range(0, 60, 7)) if seed % 2 else None
    for path in (str(source), str(write_shards(source, num_shards=3).folder)):
        dataset = VideoText(path, quarantine=listed, **BUILD)
        for epoch in (0, 2):
            plan, found = dataset.plan(epoch), dx.diagnose(dataset, seed=SEED, epoch=epoch)
            np.testing.assert_array_equal(np.flatnonzero(found.outcomes == 0), _plan_rows(plan))
            np.testing.assert_array_equal(
                found.micro_batches, np.bincount(plan.bucket_ids[:], minlength=len(plan.buckets))
            )
            assert sum(found.counts.values()) == table.num_rows and found.num_micro_batches == len(plan)
            assert sum(line.clips for line in found.per_bucket) == len(plan.rows)
            assert sum(line.micro_batches for line in found.per_bucket) == len(plan)
            assert sum(line.left_over for line in found.per_bucket) == found.counts.get("batch_remainder", 0)
            assert found.counts.get("quarantined", 0) == (9 if listed else 0)
            assert set(found.advice) == set(found.counts) - {"kept"}


def test_held_out_rows_have_their_own_outcome(tmp_path):
    """Rows kept for validation are told apart from rows with impossible numbers; the others are what they were."""
    dataset = VideoText(str(_write(tmp_path)), **BUILD)
    whole, before = dataset.table, dx.diagnose(dataset, seed=SEED, epoch=1)
    held = held_out_rows(whole, 0.2)
    dataset = VideoText(whole.path, **BUILD)
    dataset.table = table_without(whole, held)
    found = dx.diagnose(dataset, seed=SEED, epoch=1, whole=whole)
    named = np.array(dx.OUTCOMES)[found.outcomes] == "held_out"
    np.testing.assert_array_equal(named, held & (whole.num_frames > 0))
    assert found.counts["kept"] == len(_plan_rows(dataset.plan(1))) and set(found.advice) == set(found.counts) - {
        "kept"
    }
    unlike = ~held & (found.outcomes != before.outcomes)
    assert {dx.OUTCOMES[code] for code in found.outcomes[unlike]} <= {"kept", "batch_remainder"}


def test_quarantined_rows_are_in_no_plan_and_change_no_other_draw(tmp_path):
    """In memory and in shards alike, over epochs: the other rows keep their buckets, and both plans are equal."""
    source = _write(tmp_path)
    whole = read_table(source)
    rows = np.arange(5, 400, 9)
    listed = _list(tmp_path, whole, rows)
    buckets = compile_buckets(CONFIG, multiple=16)
    table = whole.with_quarantine(read_quarantine(listed, whole))
    options = {"fps_max": 24, "seed": SEED}
    for epoch in range(3):
        ids = assign_rows(whole, buckets, **options, epoch=epoch)
        without = assign_rows(table, buckets, **options, epoch=epoch)
        np.testing.assert_array_equal(np.delete(ids, rows), np.delete(without, rows))
        plan = build_plan(table, buckets, **options, epoch=epoch)
        in_plan = np.sort(plan.rows)
        np.testing.assert_array_equal(in_plan, np.flatnonzero(without >= 0))
        spares = np.concatenate([plan[i].spares for i in range(len(plan))])
        assert not np.isin(rows, np.concatenate([in_plan, spares])).any()
        shards = write_shards(source, num_shards=2, replace=True)
        mapped = build_plan(shards.with_quarantine(read_quarantine(listed, shards)), buckets, **options, epoch=epoch)
        assert mapped.fingerprint == plan.fingerprint and len(mapped) == len(plan)
        for index in range(len(plan)):
            np.testing.assert_array_equal(mapped[index].rows, plan[index].rows)


def test_the_order_names_a_changed_list(tmp_path):
    """What is listed counts, not how: repeats, order and an empty list change nothing; another row is named."""
    table = read_table(_write(tmp_path))
    buckets = compile_buckets(CONFIG, multiple=16)

    def key(rows):
        listed = table.with_quarantine(read_quarantine(_list(tmp_path, table, rows), table))
        return order_key(listed, buckets, fps_max=24, seed=SEED)

    plain = order_key(table, buckets, fps_max=24, seed=SEED)
    assert key([])["fingerprint"] == plain["fingerprint"]
    assert key([7, 3, 7])["fingerprint"] == key([3, 7])["fingerprint"] != plain["fingerprint"]
    (said,) = what_changed(json.loads(json.dumps(key([3, 7]))), key([3, 8]))
    assert said.startswith("dataset.quarantine: 2 rows (") and said.count("2 rows") == 2
    assert what_changed(plain, key([3]))[0].startswith("dataset.quarantine: none -> 1 rows (")


def test_a_run_s_own_list_of_bad_samples_is_a_quarantine(tmp_path):
    """bad_samples.jsonl has the path that was opened, below data_root, and a row as often as it was met."""
    table = read_table(_write(tmp_path))
    file = tmp_path / "bad_samples.jsonl"
    lines = [{"row": row, "path": f"/data/clips/{row}.mp4", "reason": "gone", "epoch": 1} for row in (9, 2, 9)]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert read_quarantine(file, table).rows.tolist() == [2, 9]
    file.write_text("")
    assert len(read_quarantine(file, table)) == 0


def test_a_line_that_a_kill_cut_off_is_left_out_and_told(tmp_path, caplog):
    """With its number, and what the next start wrote behind it; a file without any whole line is no list."""
    table = read_table(_write(tmp_path))
    file = tmp_path / "bad_samples.jsonl"
    whole = json.dumps({"row": 2, "path": "clips/2.mp4", "reason": "gone"})
    file.write_text(f'{whole}\n{{"row": 9, "pa{whole}\n{whole}\n{{"row": 7, "path": "clips/7.mp4", "re')
    logger = logging.getLogger("opensora_like")
    with caplog.at_level("WARNING", logger="opensora_like"):
        logger.addHandler(caplog.handler)  # a run before this test may have turned propagation off
        try:
            assert read_quarantine(file, table).rows.tolist() == [2]
        finally:
            logger.removeHandler(caplog.handler)
    told = "\n".join(caplog.messages)
    assert f"{file}:2 " in told and f"{file}:4 " in told and f"{file}:1 " not in told and f"{file}:3 " not in told
    file.write_text("row 2\nrow 9\n")
    with pytest.raises(ValueError, match="cannot be read"):
        read_quarantine(file, table)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("row,path\n3,clips/4.mp4\n", r"row 3 is 'clips/4.mp4' there and 'clips/3.mp4' in table"),
        ("row,path\n400,clips/400.mp4\n", "row 400 is not in table .* rows 0 to 399"),
        ("row,path\nthree,clips/3.mp4\n", "cannot be read"),
        ("row,file\n3,clips/3.mp4\n", r"needs the columns \['row', 'path'\]"),
    ],
)
def test_a_list_of_another_table_is_an_error(tmp_path, text, message):
    """Rows that moved, rows that are not there and files that are no list are named."""
    table = read_table(_write(tmp_path))
    (tmp_path / "list.csv").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_quarantine(tmp_path / "list.csv", table)
    with pytest.raises(FileNotFoundError, match=r"dataset.quarantine='none.csv' does not exist"):
        read_quarantine("none.csv", table)


def test_captions_are_compared_over_all_shards(tmp_path):
    """Empty ones and repeats of an earlier row are those that a loop finds, in memory and in shards."""
    source = _write(tmp_path)
    seen, empty, repeated = set(), [], []
    for row, text in enumerate(_columns(400, 0)["text"]):
        (empty if not text.strip() else repeated if text in seen else []).append(row)
        seen.add(text)
    for path in (str(source), str(write_shards(source, num_shards=3).folder)):
        found = dx.check_captions(VideoText(path, **BUILD))
        assert found["empty_caption"].rows.tolist() == empty
        assert found["duplicate_caption"].rows.tolist() == repeated


def test_rows_are_written_with_their_paths_from_shards_too(tmp_path):
    """The csv has the numbers of the table, reasons and details, and is read back as a quarantine."""
    source = _write(tmp_path)
    for path in (str(source), str(write_shards(source, num_shards=3).folder)):
        dataset = VideoText(path, **BUILD)
        found = dx.diagnose(dataset, seed=SEED, epoch=0)
        rows = {"missing_file": np.array([5, 250, 399]), "absurd_fps": np.array([5])}
        assert dx.write_rows(tmp_path / "rows.csv", found, rows, {"missing_file": {250: 'a "quoted", one'}}) == 4
        assert read_quarantine(tmp_path / "rows.csv", dataset.table).rows.tolist() == [5, 250, 399]
        lines = (tmp_path / "rows.csv").read_text().splitlines()
        assert lines[0].split(",")[0] == '"row"' and lines[2].startswith('250,"clips/250.mp4","missing_file",')
        assert 'a ""quoted"", one' in lines[2]


def test_paths_of_some_rows_are_found_in_any_row_group(tmp_path):
    """In the order asked for, over groups and shards."""
    rows = np.array([2499, 0, 1999, 2000, 1000, 999, 7, 7])
    source = _write(tmp_path, num_rows=2500)
    for table in (read_table(source), write_shards(source, num_shards=2)):
        assert table.paths(rows) == [f"clips/{row}.mp4" for row in rows]
        assert table.paths(rows[:0]) == []


def test_an_empty_plan_says_which_number_to_change():
    """The bucket that is missed, the longest clip, and fps_max only where it would help."""
    from opensora_like.datasets.table import table_of

    def message(num_frames, fps):
        num = len(num_frames)
        size = {"height": [256] * num, "width": [256] * num, "text": ["a"] * num}
        table = table_of({"path": [f"{i}" for i in range(num)], "num_frames": num_frames, "fps": fps, **size})
        buckets = compile_buckets({"256px": {51: (1.0, 2), 97: (1.0, 1)}}, multiple=16)
        with pytest.raises(EmptyPlan) as caught:
            build_plan(table, buckets, fps_max=24, seed=0, epoch=0)
        return str(caught.value)

    text = message([33, 60, 20], [24.0, 48.0, 24.0])
    assert (
        "3 clips: too few frames; none has the 51 that bucket 256px/51 needs at fps_max=24, the longest has 33" in text
    )
    assert text.endswith("use a bucket of 33 frames or fewer, or raise fps_max to 48")
    text = message([33, 20], [24.0, 24.0])
    assert text.endswith("the longest has 33: use a bucket of 33 frames or fewer")
    assert "bucket 256px/51 has 1 clip of ratio 1:1 but its batch size is 2: lower it to 1" in message([60], [24.0])


def test_a_sample_of_rows_is_a_function_of_the_seed():
    """As many as asked for, rising, others for another seed; all where there are no more."""
    rows = np.arange(0, 1000, 3)
    first, again, other = (dx.choose_rows(rows, 20, seed=s, purpose="doctor.decode") for s in (1, 1, 2))
    assert len(first) == 20 and (np.diff(first) > 0).all() and np.isin(first, rows).all()
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)
    assert dx.choose_rows(rows, 400, seed=1, purpose="doctor.decode") is rows
