"""The csv tool measures what can be read, lists what cannot, and keeps everything else as it was."""

import json
import math
import os
import re
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tools")]
import meta  # noqa: E402
from make_clips import numbered_frames, turn, write_clip, write_fakes  # noqa: E402

from opensora_like.datasets import clip_facts  # noqa: E402
from opensora_like.datasets.table import read_table  # noqa: E402

LATE = 10.0  # seconds for a file: a busy machine may need some for one that does nothing
MEASURED = ["height", "width", "fps", "num_frames", "aspect_ratio", "resolution"]


@pytest.fixture
def folder(tmp_path):
    """Videos, an image and everything that is none, and a table of them with awkward captions."""
    write_clip(tmp_path / "a.mp4", numbered_frames(6, 32, 48))
    (tmp_path / "sub").mkdir()
    turn(write_clip(tmp_path / "sub/b.mp4", numbered_frames(5, 32, 48), fps=29.97), 90)
    Image.fromarray(numbered_frames(1, 20, 30)[0]).save(tmp_path / "c.png")
    fakes = write_fakes(tmp_path)
    rows = [("a.mp4", 'says "hi",\nNA', "007"), ("sub/b.mp4", "NA", "1e3"), ("c.png", "", "x"), ("a.mp4", "again", "")]
    rows += [(path.name, "?", "") for path in fakes.values()]
    table = pd.DataFrame(rows, columns=["path", "text", "id"])
    table.insert(1, "num_frames", 999)  # of an earlier run: measured anew
    table.to_csv(tmp_path / "in.csv", index=False)
    return tmp_path


def run(*arguments, **how):
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, **how)


def test_a_table_is_measured(folder):
    """Columns and captions stay, the measured ones follow, bad files are listed with the reason; exit status 0."""
    assert (
        meta.main(["--input", str(folder / "in.csv"), "--output", str(folder / "new/out.csv"), "--num_workers", "0"])
        == 0
    )
    out = pd.read_csv(folder / "new/out.csv", dtype=str, keep_default_na=False)
    assert list(out.columns) == ["path", "text", "id", *MEASURED]
    assert out["path"].tolist() == ["a.mp4", "sub/b.mp4", "c.png", "a.mp4"]
    assert out["text"].tolist() == ['says "hi",\nNA', "NA", "", "again"]
    assert out["id"].tolist() == ["007", "1e3", "x", ""]
    assert out[MEASURED].to_numpy().tolist()[:3] == [
        ["32", "48", "24.0", "6", repr(32 / 48), "1536"],
        ["48", "32", "29.97", "5", "1.5", "1536"],
        ["20", "30", "", "1", repr(20 / 30), "600"],
    ]
    errors = pd.read_csv(folder / "new/out_errors.csv")
    assert dict(zip(errors["path"], errors["reason"], strict=True)).keys() == {
        f"{name}.mp4" for name in ("empty", "text", "noise", "sound", "folder", "missing")
    }
    assert errors["reason"].str.len().min() > 5
    assert sorted(p.name for p in (folder / "new").iterdir()) == ["out.csv", "out_errors.csv"]


def test_both_commands_and_any_number_of_workers_agree(folder):
    """scripts/cnv/meta.py with two processes writes what tools/meta.py writes with none, and neither needs torch."""
    block = folder / "no_torch"
    block.mkdir()
    (block / "torch.py").write_text("raise ImportError('torch is not to be imported')")
    environment = {**os.environ, "PYTHONPATH": f"{block}{os.pathsep}{ROOT}"}
    for script, workers, name in (("tools/meta.py", 0, "x.csv"), ("scripts/cnv/meta.py", 2, "y.csv")):
        arguments = ["--input", folder / "in.csv", "--output", folder / name, "--num_workers", workers]
        done = run(ROOT / script, *arguments, env=environment)
        assert done.returncode == 0, done.stderr
        assert "6 of 10 rows cannot be read" in done.stderr
    assert (folder / "x.csv").read_text() == (folder / "y.csv").read_text()
    assert (folder / "x_errors.csv").read_text() == (folder / "y_errors.csv").read_text()


def test_a_folder_is_measured_with_its_captions(folder, capsys):
    """Captions come from .txt files and from captions.csv; the table is parquet and fit for training."""
    (folder / "a.txt").write_text("A dog.\n")
    (folder / ".writing-d.mp4").write_bytes(b"half of it")  # what a kill leaves of a sample
    (folder / "captions.csv").write_text("file_name,caption\nsub/b.mp4,A cat.\na.mp4,not used\n")
    assert meta.main(["--input", str(folder), "--output", str(folder / "out.parquet"), "--num_workers", "0"]) == 0
    out = pd.read_parquet(folder / "out.parquet")
    assert [Path(p).name for p in out["path"]] == ["a.mp4", "c.png", "b.mp4"]
    assert out["text"].tolist() == ["A dog.", "", "A cat."]
    assert [out[name].dtype.kind for name in MEASURED] == list("iififi")
    assert math.isnan(out["fps"][1])
    assert "have no caption" in capsys.readouterr().err
    from opensora_like.datasets.table import read_table

    assert read_table(folder / "out.parquet").num_frames.tolist() == [6, 1, 5]


@pytest.mark.parametrize("suffix", ["json", "jsonl", "parquet"])
def test_other_tables_are_read(folder, suffix):
    """Numbers stay numbers."""
    table = pd.DataFrame({"path": ["a.mp4"], "text": ["A dog."], "score_vmafmotion": [1.5]})
    source = folder / f"in.{suffix}"
    if suffix == "parquet":
        table.to_parquet(source)
    else:
        table.to_json(source, orient="records", lines=suffix == "jsonl")
    assert meta.main(["--input", str(source), "--output", str(folder / "out.parquet"), "--num_workers", "0"]) == 0
    assert pd.read_parquet(folder / "out.parquet").iloc[0][["score_vmafmotion", "num_frames"]].tolist() == [1.5, 6]


@pytest.mark.parametrize(
    ("content", "output", "problem"),
    [
        (None, "out.csv", "does not exist"),
        ("file,text\na.mp4,x\n", "out.csv", "no column 'path', only \\['file', 'text'\\]"),
        ("path,text\n", "out.csv", "0 rows"),
        ("", "out.csv", "cannot be read"),
        ("path,text\n,x\n", "out.csv", "no path in 1 rows, first in row 0"),
        ("path,text\na.mp4,x\n", "out.txt", "suffix is not one of"),
        ("path,text\na.mp4,x\n", "t.csv", "is the input"),
    ],
)
def test_wrong_input_is_one_line_and_status_2(tmp_path, capsys, content, output, problem):
    """The message names the file and what is wrong; no traceback."""
    if content is not None:
        (tmp_path / "t.csv").write_text(content)
    assert meta.main(["--input", str(tmp_path / "t.csv"), "--output", str(tmp_path / output)]) == 2
    text = capsys.readouterr().err
    assert re.search(problem, text)
    assert text.startswith("meta: ")
    assert "Traceback" not in text


def test_nothing_readable_is_status_1(tmp_path, capsys):
    """Then no table is written, and the reasons are."""
    (tmp_path / "t.csv").write_text("path,text\nnone.mp4,x\n")
    assert (
        meta.main(["--input", str(tmp_path / "t.csv"), "--output", str(tmp_path / "o.csv"), "--num_workers", "0"]) == 1
    )
    assert not (tmp_path / "o.csv").exists()
    assert "no such file" in (tmp_path / "o_errors.csv").read_text()
    assert "no row of 1 can be read" in capsys.readouterr().err


def test_a_run_that_was_cut_off_goes_on(folder, monkeypatch):
    """--resume measures only what is missing, even if the last line of the journal is half written."""
    arguments = ["--input", str(folder / "in.csv"), "--output", str(folder / "o.csv"), "--num_workers", "0"]
    assert meta.main(arguments) == 0
    expected = (folder / "o.csv").read_text()
    seen, original = [], clip_facts.measure

    def stops_after_three(file):
        if len(seen) == 3:
            raise KeyboardInterrupt
        seen.append(file)
        return original(file)

    monkeypatch.setattr(meta, "measure_all", partial(meta.measure_all, work=stops_after_three))
    assert meta.main(arguments) == 130
    with (folder / "o_progress.jsonl").open("a") as journal:
        journal.write('["half')
    again = []
    monkeypatch.setattr(
        meta, "measure_all", partial(clip_facts.measure_all, work=lambda file: again.append(file) or original(file))
    )
    assert meta.main([*arguments, "--resume"]) == 0
    assert (folder / "o.csv").read_text() == expected
    assert not set(seen) & set(again)
    assert len(set(seen) | set(again)) == len(seen) + len(again) == 9
    assert not (folder / "o_progress.jsonl").exists()


def hang_or_die(file):
    if "hang" in file:
        time.sleep(600)
    if "die" in file:
        os._exit(1)
    if "raise" in file:
        raise MemoryError(file)
    return clip_facts.Result(num_frames=len(Path(file).name))


def test_a_file_that_hangs_or_crashes_costs_only_itself():
    """The worker is replaced, the others are measured, and the result says what happened."""
    files = ["hang1", "die1", *(f"file{i}" for i in range(20)), "raise1", "die2"]
    results = dict(clip_facts.measure_all(files, num_workers=2, timeout_seconds=LATE, work=hang_or_die))
    assert_only_bad_files_are_lost(results, files)


def assert_only_bad_files_are_lost(results, files):
    assert set(results) == set(files)
    assert results["hang1"].problem == f"took over {LATE:g} s"
    assert results["die1"].problem == results["die2"].problem == "the process that read it crashed"
    assert results["raise1"].problem.startswith("the process that read it crashed")
    assert all(results[f][::4] == (len(f), "") for f in files if f.startswith("file"))


@pytest.fixture(scope="module")
def ray_cluster():
    """Two machines of one core each, as far as ray can tell."""
    ray = pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    node = {"num_cpus": 1, "object_store_memory": 80 * 2**20}
    cluster = Cluster(initialize_head=True, head_node_args={**node, "include_dashboard": False})
    cluster.add_node(**node)
    ray.init(address=cluster.address, log_to_driver=False, logging_level="error")
    yield ray
    ray.shutdown()
    cluster.shutdown()


def test_a_ray_cluster_writes_what_processes_write(folder, ray_cluster, monkeypatch):
    """Both machines measure; a run that was cut off goes on; bad files cost only themselves."""
    monkeypatch.chdir(folder)
    assert meta.main(["--input", "in.csv", "--output", "x.csv", "--num_workers", "0"]) == 0
    arguments = ["--input", "in.csv", "--output", "y.csv", "--engine", "ray"]
    files = [file for file in pd.read_csv("in.csv")["path"].unique() if file != "a.mp4"]
    journal = clip_facts.Journal(Path("y_progress.jsonl"), resume=False)
    journal.add("a.mp4", clip_facts.measure("a.mp4"))
    journal.file.close()
    assert meta.main([*arguments, "--resume"]) == 0
    for name in ("{}.csv", "{}_errors.csv"):
        assert Path(name.format("y")).read_text() == Path(name.format("x")).read_text()
    assert not Path("y_progress.jsonl").exists() and len(files) == 8

    assert ray_cluster.cluster_resources()["CPU"] == 2
    files = ["hang1", "die1", *(f"file{i}" for i in range(20)), "raise1", "die2"]
    how = {"num_workers": None, "timeout_seconds": LATE, "engine": "ray"}
    assert_only_bad_files_are_lost(dict(clip_facts.measure_all(files, **how, work=hang_or_die)), files)
    machines = {r.problem for _, r in clip_facts.measure_all([str(i) for i in range(20)], **how, work=name_of_machine)}
    assert len(machines) == 2


def name_of_machine(file):
    import ray

    time.sleep(0.05)  # or one could do them all before the other begins
    return clip_facts.Result(problem=ray.get_runtime_context().get_node_id())


def test_an_engine_that_is_not_there_says_what_to_install(folder, capsys, monkeypatch):
    """One line, status 2; and 0 workers are not for ray."""
    monkeypatch.setitem(sys.modules, "ray", None)
    arguments = ["--input", str(folder / "in.csv"), "--output", str(folder / "y.csv"), "--engine", "ray"]
    assert meta.main(arguments) == 2
    assert "pip install -r requirements/ray.txt" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        meta.main([*arguments, "--num_workers", "0"])


def test_the_journal_keeps_results_exactly(tmp_path):
    """NaN, text and numbers come back as they were."""
    journal = clip_facts.Journal(tmp_path / "j.jsonl", resume=False)
    results = {
        "ä.mp4": clip_facts.Result(3, 4, 5, 23.976),
        "b.png": clip_facts.Result(1, 2, 3),
        "c": clip_facts.Result(problem="x\ny"),
    }
    for file, result in results.items():
        journal.add(file, result)
    back = clip_facts.Journal(tmp_path / "j.jsonl", resume=True).results
    assert json.dumps(back) == json.dumps(results)
    assert np.isnan(back["b.png"].fps)


def test_metadata_of_other_trainers(folder):
    """A json list with file_path, text, type and sizes, videos and images mixed: path, measured; the rest is kept."""
    rows = [
        {"file_path": "a.mp4", "text": "says hi", "type": "video", "width": 1, "height": 2, "audio_path": "a.wav"},
        {"file_path": "c.png", "text": "x", "type": "image", "width": 30, "height": 20},
    ]
    for content in ({"samples": rows}, rows):
        (folder / "metadata.json").write_text(json.dumps(content))
        arguments = ["--output", str(folder / "out.csv"), "--data_root", str(folder), "--num_workers", "0"]
        assert meta.main(["--input", str(folder / "metadata.json"), *arguments]) == 0
        out = pd.read_csv(folder / "out.csv", dtype=str, keep_default_na=False)
        assert list(out.columns) == ["path", "text", "type", "audio_path", *MEASURED]
        assert out["path"].tolist() == ["a.mp4", "c.png"] and out["audio_path"].tolist() == ["a.wav", ""]
        assert out["width"].tolist() == ["48", "30"] and out["num_frames"].tolist() == ["6", "1"]
        assert read_table(folder / "out.csv").num_rows == 2
    with pytest.raises(ValueError, match=r"no column \['path'\].*run tools/meta.py on it, which names file_path path"):
        read_table(folder / "metadata.json")
