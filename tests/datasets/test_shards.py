"""A table in shards is the same table: same rows, same plan, at a memory cost that does not grow with it."""

import json
import math
import multiprocessing
import os
import pickle
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from opensora_like.datasets import classes as classes_module
from opensora_like.datasets import plan as plan_module
from opensora_like.datasets import row_index, shard_writer, shards, shuffle
from opensora_like.datasets.ahead import build_ahead
from opensora_like.datasets.balance import Balance, balance_plan
from opensora_like.datasets.bucket import assign, compile_buckets
from opensora_like.datasets.classes import UNSETTLED, RowClasses, classify
from opensora_like.datasets.index import make_folder_once, new_array, open_array
from opensora_like.datasets.plan import build_plan
from opensora_like.datasets.quarantine import Quarantine
from opensora_like.datasets.shard_writer import write_shards
from opensora_like.datasets.shards import open_shards
from opensora_like.datasets.table import read_table

CONFIG = {
    "256px": {1: (0.7, 5), 17: ((0.5, 0.5), 3), 33: (0.8, 3), 65: ((1.0, 0.3), 2)},
    "512px": {1: ((0.5, 0.5), 2), 33: (0.5, 2)},
    "144p": {1: (1.0, 40), 3: ((0.5, 0.2), 2), 5: (0.5, 2)},
}
BUCKETS = compile_buckets(CONFIG, multiple=16)
OPTIONS = {"fps_max": 24, "seed": 3}


def _columns(num_rows, seed=0):
    rng = np.random.default_rng(seed)
    frames = rng.choice([1, 4, 40, 90], num_rows)
    return {
        "path": [f"clips/{i}.mp4" for i in range(num_rows)],
        "text": [f"clip \u00fc {i}" if i % 7 else "" for i in range(num_rows)],
        "num_frames": frames,
        "height": rng.integers(0, 700, num_rows),
        "width": rng.integers(100, 700, num_rows),
        "fps": np.where(frames == 1, math.nan, rng.choice([23.976, 29.97, 24.0], num_rows)),
        "score_vmafmotion": rng.random(num_rows),
    }


@pytest.fixture
def source(tmp_path):
    file = tmp_path / "v1.2 clips.parquet"  # a dot and a blank in the name
    pq.write_table(pa.table(_columns(2500)), file, row_group_size=700)
    return file


def test_shards_hold_the_rows_of_the_table(source, monkeypatch):
    """Rows, numbers, columns and fingerprint are those of the unsharded table, for even and uneven cuts."""
    whole = read_table(source)
    monkeypatch.setattr(shards, "OPEN_GROUPS", 2)
    monkeypatch.setattr(shards, "OPEN_FILES", 1)
    for num_shards in (None, 1, 4, 7):
        table = write_shards(source, num_shards=num_shards, replace=True)
        assert len(table.shards) == (num_shards or 1)
        assert (table.num_rows, table.fingerprint) == (whole.num_rows, whole.fingerprint)
        assert sorted(table.column_names) == sorted(whole.column_names)
        for name in ("num_frames", "height", "width", "fps"):
            np.testing.assert_array_equal(getattr(table, name), getattr(whole, name))
        assert all(_plain(table.row(i)) == _plain(whole.row(i)) for i in (0, 7, 2499, 1250, 999, 1000, 357))
    with pytest.raises(IndexError, match="rows 0 to 2499"):
        table.row(2500)
    source.unlink()
    for path in (source, source.with_suffix("")):
        assert _plain(open_shards(path).row(3)) == _plain(whole.row(3))


def _plain(row):
    return sorted((name, repr(value)) for name, value in row.items())  # nan is not equal to itself


def test_row_classes_draw_what_assign_draws(monkeypatch):
    """Classes found once give, epoch by epoch, the ids that `assign` finds from the numbers, in chunks of any size."""
    columns = [np.asarray(_columns(3000)[name]) for name in ("num_frames", "height", "width", "fps")]
    for chunk in (1 << 16, 77):
        monkeypatch.setattr(classes_module, "CHUNK", chunk)
        codes, asks = classify(*columns, BUCKETS, fps_max=24)
        found = RowClasses(asks, BUCKETS)
        settled = found.settled()[codes]
        for epoch in range(3):
            wanted = assign(*columns, BUCKETS, fps_max=24, seed=5, epoch=epoch)
            rows = np.arange(3000)
            np.testing.assert_array_equal(found.draw(codes, rows, seed=5, epoch=epoch), wanted)
            np.testing.assert_array_equal(found.draw(codes[::7], rows[::7], seed=5, epoch=epoch), wanted[::7])
            sure = settled != UNSETTLED
            assert 0 < sure.sum() < 3000 and (wanted[sure] == settled[sure]).all()


def test_the_plan_of_shards_is_that_of_the_table(source, monkeypatch):
    """All micro-batches of three epochs, balanced or not, are equal, in spans and pieces of any size."""
    whole = read_table(source)
    balance = Balance(np.arange(len(BUCKETS)) % 13, window=64, group=8)
    for span, piece, sort_up_to in ((1 << 22, 4096, 1 << 14), (333, 7, 40)):
        monkeypatch.setattr(row_index, "SPAN", span)
        monkeypatch.setattr(plan_module, "PIECE", piece)
        monkeypatch.setattr(shuffle, "SORTED", sort_up_to)
        monkeypatch.setattr(shuffle, "KEPT_BUCKETS", 2)
        table = write_shards(source, num_shards=3, replace=True)
        for epoch in range(3):
            plan = build_plan(whole, BUCKETS, **OPTIONS, epoch=epoch)
            mapped = build_plan(table, BUCKETS, **OPTIONS, epoch=epoch)
            assert mapped.fingerprint == plan.fingerprint and len(mapped) == len(plan)
            _assert_same(mapped, plan)
            _assert_same(balance_plan(mapped, balance, seed=3), balance_plan(plan, balance, seed=3))
            _assert_same(pickle.loads(pickle.dumps(mapped)), plan)


def test_a_quarantine_leaves_rows_out_of_shards_as_of_a_table(source, monkeypatch):
    """None of its rows is planned, all others are, at no cost to the index, and shards and table agree."""
    monkeypatch.setattr(shuffle, "SORTED", 40)
    quarantine = Quarantine("list.csv", np.arange(0, 2500, 3))
    whole = read_table(source).with_quarantine(quarantine)
    table = write_shards(source, num_shards=3)
    free = build_plan(table, BUCKETS, **OPTIONS, epoch=0)
    index = [f.name for f in table.index_folder.glob("buckets*")]
    table = table.with_quarantine(quarantine)
    plan = build_plan(table, BUCKETS, **OPTIONS, epoch=0)
    assert sorted(plan.rows[:].tolist()) == sorted(set(free.rows[:].tolist()) - set(quarantine.rows.tolist()))
    _assert_same(plan, build_plan(whole, BUCKETS, **OPTIONS, epoch=0))
    _assert_same(pickle.loads(pickle.dumps(plan)), plan)
    assert [f.name for f in table.index_folder.glob("buckets*")] == index


def test_the_next_epoch_is_built_ahead(source):
    """A process of its own leaves the plan of the next epoch where the trainer finds it."""
    table = write_shards(source, num_shards=2)
    balance = Balance(np.arange(len(BUCKETS)) % 13, window=64, group=8)
    process = build_ahead(table, BUCKETS, **OPTIONS, epoch=1)
    process.join()
    assert process.exitcode == 0
    (folder,) = table.index_folder.glob("plan-*-1")
    made = {file: file.stat().st_mtime_ns for file in folder.rglob("*.npy")}
    plan = balance_plan(build_plan(table, BUCKETS, **OPTIONS, epoch=1), balance, seed=3)
    assert {file: file.stat().st_mtime_ns for file in folder.rglob("*.npy")} == made
    whole = build_plan(read_table(source), BUCKETS, **OPTIONS, epoch=1)
    _assert_same(plan, balance_plan(whole, balance, seed=3))


def _assert_same(plan, other):
    assert plan.fingerprint == other.fingerprint and len(plan) == len(other)
    for index in range(len(plan)):
        mine, its = plan[index], other[index]
        assert mine.shape == its.shape and mine.rows.tolist() == its.rows.tolist()
        assert mine.spares.tolist() == its.spares.tolist()


def test_only_two_epochs_stay_on_disk(source):
    """Plans of epochs that are over are deleted; one that is still mapped goes on to work."""
    table = write_shards(source, num_shards=2)
    first = build_plan(table, BUCKETS, **OPTIONS, epoch=0)
    rows = [first[i].rows.tolist() for i in range(len(first))]
    first = build_plan(table, BUCKETS, **OPTIONS, epoch=0)  # nothing sorted yet
    for epoch in range(1, 4):
        build_plan(table, BUCKETS, **OPTIONS, epoch=epoch)
    left = sorted(int(f.name.rsplit("-", 1)[1]) for f in table.index_folder.glob("plan-*"))
    assert left == [2, 3]
    assert [first[i].rows.tolist() for i in range(len(first))] == rows


def test_the_index_is_made_again_from_the_shards(source, tmp_path):
    """Without its index, or with one elsewhere, a table reads the same; both are made from the checked files."""
    table = write_shards(source, num_shards=3)
    fps = np.array(table.fps)
    shutil.rmtree(table.index_folder)
    np.testing.assert_array_equal(open_shards(source).fps, fps)
    shutil.rmtree(table.index_folder)
    np.testing.assert_array_equal(open_shards(source, cache=tmp_path / "elsewhere").fps, fps)
    assert not table.index_folder.exists()


def _damage_missing(table):
    (table.folder / "00002.parquet").unlink()


def _damage_truncated(table):
    file = table.folder / "00002.parquet"
    file.write_bytes(file.read_bytes()[:-100])


def _damage_longer(table):
    with (table.folder / "00002.parquet").open("ab") as file:
        file.write(b"x")


def _damage_extra(table):
    shutil.copy(table.folder / "00002.parquet", table.folder / "00009.parquet")


def _damage_manifest(table):
    (table.folder / "manifest.json").write_text("{")


def _swap(table):
    one, two = (table.folder / f"0000{i}.parquet" for i in (1, 2))
    one.rename(table.folder / "x")
    two.rename(one)
    (table.folder / "x").rename(two)
    _match_sizes(table)


def _match_sizes(table):
    file = table.folder / "manifest.json"
    manifest = json.loads(file.read_text())
    for shard in manifest["shards"]:
        shard[2] = (table.folder / shard[0]).stat().st_size
    file.write_text(json.dumps(manifest))


def _reorder_rows(table):
    file = table.folder / "00002.parquet"
    metadata = pq.read_schema(file).metadata
    rows = pq.read_table(file)
    backwards = rows.take(list(range(rows.num_rows))[::-1]).replace_schema_metadata(metadata)
    pq.write_table(backwards, file)
    _match_sizes(table)


@pytest.mark.parametrize(
    ("damage", "kind", "message"),
    [
        (_damage_missing, FileNotFoundError, "00002.parquet' is missing; its 834 rows"),
        (_damage_truncated, ValueError, "00002.parquet' is truncated: it has"),
        (_damage_longer, ValueError, "00002.parquet' is altered: it has"),
        (_damage_extra, ValueError, "00009.parquet'], not in its manifest.json"),
        (_damage_manifest, ValueError, "is not a manifest that can be read"),
        (_swap, ValueError, r"00001.parquet' is not the one of the manifest.json .* it is 00002.parquet"),
        (_reorder_rows, ValueError, "00002.parquet' holds other rows than when it was written"),
    ],
)
def test_damaged_shards_are_named(source, damage, kind, message):
    """Missing, truncated, altered, surplus, swapped or reordered: the error names the file, before any row is used."""
    table = write_shards(source, num_shards=3)
    damage(table)
    shutil.rmtree(table.index_folder)
    with pytest.raises(kind, match=message):
        _ = open_shards(source).num_frames


def test_swapped_shards_are_found_by_a_row(source):
    """With an index that is there already, the first row read from a wrong file says so."""
    table = write_shards(source, num_shards=3)
    _swap(table)
    with pytest.raises(ValueError, match="files were reordered or replaced"):
        open_shards(source).row(0)


def test_what_cannot_be_cut_says_why(source, tmp_path):
    """No table, no rows, too many shards, a bad value with its row, shards that are there, a table changed since."""
    with pytest.raises(FileNotFoundError, match="does not exist"):
        write_shards(tmp_path / "none.parquet")
    with pytest.raises(FileNotFoundError, match=r"has no manifest\.json; write it with"):
        open_shards(source)
    with pytest.raises(ValueError, match="num_shards=3000 must be from 1 to 2500"):
        write_shards(source, num_shards=3000)
    columns = _columns(30)
    columns["height"][25] = -1
    bad = tmp_path / "bad.parquet"
    pq.write_table(pa.table(columns), bad)
    with pytest.raises(ValueError, match=r"bad.parquet \(rows from 20 on\)': height=-1 in row 5"):
        write_shards(bad, num_shards=3)
    assert not bad.with_suffix("").exists() and not list(tmp_path.glob(".bad*"))  # nothing half done
    write_shards(source)
    with pytest.raises(ValueError, match="exists; replace its shards with --replace"):
        write_shards(source)
    pq.write_table(pa.table(_columns(100)), source)
    with pytest.raises(ValueError, match=r"its shards in .* are of one with"):
        open_shards(source)
    (tmp_path / "mine").mkdir()
    with pytest.raises(ValueError, match="is in the way"):
        write_shards(source, folder=tmp_path / "mine", replace=True)


def test_a_csv_can_be_cut(source, tmp_path):
    """Other formats are read whole and give the same shards."""
    rows = read_table(source)
    csv = tmp_path / "t.jsonl"
    csv.write_text("".join(json.dumps({k: v for k, v in rows.row(i).items() if v == v}) + "\n" for i in range(50)))
    table = write_shards(csv, num_shards=2)
    assert table.num_rows == 50 and _plain(table.row(7)) == _plain(read_table(csv).row(7))


def _build_slowly(folder, log):
    def build(inside):
        with log.open("a") as file:
            file.write("built\n")
        new_array(inside / "a.npy", np.int64, 1000)[:] = 7

    make_folder_once(folder, build)
    assert (open_array(folder / "a.npy") == 7).all()


def test_one_process_builds_and_the_others_wait(tmp_path):
    """Of four processes that need the same folder, one fills it; a build that fails leaves nothing."""
    context = multiprocessing.get_context("fork")
    folder, log = tmp_path / "index", tmp_path / "log"
    processes = [context.Process(target=_build_slowly, args=(folder, log)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert log.read_text() == "built\n"
    with pytest.raises(ZeroDivisionError):
        make_folder_once(tmp_path / "other", lambda _: 1 / 0)
    (tmp_path / ".third.host.1").mkdir()  # of a process that was killed
    make_folder_once(tmp_path / "third", lambda _: None).rmdir()
    assert sorted(f.name for f in tmp_path.iterdir()) == [".lock", "index", "log"]


def _read_rows(table, rows, queue):
    queue.put([table.row(row)["path"] for row in rows])


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_workers_read_rows_at_the_same_time(source, start):
    """Forked and spawned processes read from one table, whose pickle is a few bytes."""
    table = write_shards(source, num_shards=5)
    table.row(0)
    assert len(pickle.dumps(table)) < 1000
    context = multiprocessing.get_context(start)
    queue = context.Queue()
    parts = [list(range(i, 2500, 500)) for i in range(3)]
    workers = [context.Process(target=_read_rows, args=(table, part, queue)) for part in parts]
    for worker in workers:
        worker.start()
    found = [queue.get(timeout=300) for _ in workers]
    for worker in workers:
        worker.join()
    assert sorted(found) == sorted([f"clips/{i}.mp4" for i in part] for part in parts)


def test_two_commands_of_one_process_id_do_not_meet(source):
    """In containers all have the same, and one that was killed leaves what it was writing."""
    other = source.parent / f".{source.stem}.{os.getpid()}"
    other.mkdir()
    write_shards(source, num_shards=2)
    assert other.is_dir()


def test_a_plan_that_another_run_forgets_meanwhile_is_made_again(source, monkeypatch):
    """Of the same order, some epochs ahead; and at no time is a plan there in part."""
    table, mapped, shown = write_shards(source, num_shards=5), plan_module.Mapped, []
    wanted = build_plan(table, BUCKETS, **OPTIONS, epoch=0).rows[:]

    def open_late(path):
        if not shown:
            table.forget_epochs(path.parent.name.removesuffix("0"), before=1)
        return mapped(path)

    def remove(folder, **how):
        shown.append(list(table.index_folder.glob("plan-*")))
        rmtree(folder, **how)

    rmtree = shutil.rmtree
    monkeypatch.setattr(shutil, "rmtree", remove)
    monkeypatch.setattr(plan_module, "Mapped", open_late)
    np.testing.assert_array_equal(build_plan(table, BUCKETS, **OPTIONS, epoch=0).rows[:], wanted)
    assert shown[0] == []


def test_the_last_piece_is_not_lost():
    """Pieces of any size are cut into shards of one size, the last one smaller, and no row is lost."""
    tables = [pa.table({"a": list(range(start, start + n))}) for start, n in ((0, 3), (3, 10), (13, 1), (14, 6))]
    cut = [t["a"].to_pylist() for t in shard_writer._pieces_of(tables, 7)]
    assert cut == [list(range(7)), list(range(7, 14)), list(range(14, 20))]
