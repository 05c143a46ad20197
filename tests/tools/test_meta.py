"""The csv tool measures what can be read, lists what cannot, and keeps everything else as it was."""

import json
import math
import multiprocessing
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tools")]
import meta  # noqa: E402
from make_clips import numbered_frames, turn, write_clip, write_fakes  # noqa: E402

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
    seen, original = [], meta.measure

    def stops_after_three(file):
        if len(seen) == 3:
            raise KeyboardInterrupt
        seen.append(file)
        return original(file)

    monkeypatch.setattr(meta, "measure", stops_after_three)
    assert meta.main(arguments) == 130
    with (folder / "o_progress.jsonl").open("a") as journal:
        journal.write('["half')
    again = []
    monkeypatch.setattr(meta, "measure", lambda file: again.append(file) or original(file))
    assert meta.main([*arguments, "--resume"]) == 0
    assert (folder / "o.csv").read_text() == expected
    assert not set(seen) & set(again)
    assert len(set(seen) | set(again)) == len(seen) + len(again) == 9
    assert not (folder / "o_progress.jsonl").exists()


def hang_or_die(file):
    if "hang" in file:
        time.sleep(60)
    if "die" in file:
        os._exit(1)
    return meta.Result(num_frames=len(file))


def test_a_file_that_hangs_or_crashes_costs_only_itself(monkeypatch):
    """The worker is replaced, the others are measured, and the result says what happened."""
    monkeypatch.setattr(meta, "measure", hang_or_die)
    monkeypatch.setattr(meta, "START_SECONDS", 0.0)
    fork = multiprocessing.get_context("fork")  # so that the workers see the replaced function
    monkeypatch.setattr(meta.multiprocessing, "get_context", lambda kind: fork)
    files = ["hang1", "die1", *(f"file{i}" for i in range(20)), "die2"]
    begin = time.monotonic()
    results = dict(meta.measure_all(files, num_workers=2, timeout_seconds=1.0))
    assert time.monotonic() - begin < 10
    assert set(results) == set(files)
    assert results["hang1"].problem == "took over 1 s"
    assert results["die1"].problem == results["die2"].problem == "the process that read it crashed"
    assert all(results[f"file{i}"].problem == "" for i in range(20))


def test_the_journal_keeps_results_exactly(tmp_path):
    """NaN, text and numbers come back as they were."""
    journal = meta.Journal(tmp_path / "j.jsonl", resume=False)
    results = {"ä.mp4": meta.Result(3, 4, 5, 23.976), "b.png": meta.Result(1, 2, 3), "c": meta.Result(problem="x\ny")}
    for file, result in results.items():
        journal.add(file, result)
    back = meta.Journal(tmp_path / "j.jsonl", resume=True).results
    assert json.dumps(back) == json.dumps(results)
    assert np.isnan(back["b.png"].fps)
