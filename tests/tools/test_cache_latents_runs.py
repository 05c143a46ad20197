"""tools/cache_latents.py in any number of processes, after a stop, among bad files: nothing is lost or made twice."""

from __future__ import annotations

import json
import re
import signal
import time

import pytest
import torch

from opensora_like.datasets.latent_store import open_store
from opensora_like.datasets.meta_file import read_content, read_meta
from opensora_like.datasets.store_files import read_failures
from opensora_like.preparation import run as cache_run
from opensora_like.preparation.sinks import MetaSink, StoreSink
from tests.tools.cache_harness import SIZE, assert_same, encode, entries_of, process, run, start


def test_two_processes_make_the_store_of_one(videos, model, tmp_path):
    """Entries, tensors and facts do not depend on how many processes there were; .meta files are the same bytes."""
    options = ["--video_folder", videos, "--model", model, *SIZE, "--mode", "frames", "--num-frames", "2"]
    done = process(*options, "--output_dir", tmp_path / "two", "--verify", "2", processes=2)
    assert done.returncode == 0, done.stderr
    assert "8 samples made, 0 there already, 0 clips failed, of 4 clips" in done.stdout
    assert done.stdout.count("PSNR") == 3
    assert run(*options, "--output_dir", tmp_path / "one") == 0
    assert_same(entries_of(tmp_path / "one"), entries_of(tmp_path / "two"))
    assert len(open_store(tmp_path / "two")._shards) == 2


@pytest.mark.parametrize("form", ["store", "automodel"])
def test_a_run_that_was_stopped_goes_on(videos, model, tmp_path, capsys, monkeypatch, form):
    """After a stop between two samples the next run makes the rest, and the result is that of one run."""
    sink = StoreSink if form == "store" else MetaSink
    add, made = sink.add, []

    def stop_after_two(self, sample, encoded):
        if len(made) == 2:
            raise KeyboardInterrupt
        made.append(sample.key)
        add(self, sample, encoded)

    with monkeypatch.context() as patched:
        patched.setattr(sink, "add", stop_after_two)
        with pytest.raises(KeyboardInterrupt):
            encode(videos, tmp_path / "out", model, "--output_format", form)
    capsys.readouterr()
    assert encode(videos, tmp_path / "out", model, "--output_format", form) == 0
    assert "2 samples made, 2 there already, 0 clips failed" in capsys.readouterr().out
    assert encode(videos, tmp_path / "whole", model, "--output_format", form) == 0
    if form == "store":
        assert_same(entries_of(tmp_path / "out"), entries_of(tmp_path / "whole"))
    for file in (tmp_path / "whole").glob("*.meta"):
        one, other = read_content(file), read_content(tmp_path / "out" / file.name)
        tensors = ("video_latents", "text_embeddings")
        assert all(torch.equal(one.pop(name), other.pop(name)) for name in tensors) and one == other


@pytest.mark.parametrize("form", ["store", "automodel"])
def test_two_commands_do_not_fill_one_folder(videos, model, tmp_path, monkeypatch, form):
    """The first to finish would remove the files that the other is writing, as what a kill has left."""
    begin, refused = cache_run.forget_failures, []

    def another(folder):
        begin(folder)
        with pytest.raises(ValueError, match=r"another command is filling '.*out'; wait"):
            encode(videos, tmp_path / "out", model, "--output_format", form)
        refused.append(folder)

    monkeypatch.setattr(cache_run, "forget_failures", another)
    assert encode(videos, tmp_path / "out", model, "--output_format", form) == 0 and refused
    monkeypatch.undo()
    assert encode(videos, tmp_path / "out", model, "--output_format", form) == 0


@pytest.mark.parametrize(("form", "number"), [("store", signal.SIGTERM), ("automodel", signal.SIGKILL)])
def test_a_process_that_was_ended_has_lost_nothing(videos, model, tmp_path, capsys, form, number):
    """What a killed process had written counts, and one that is told to end writes what it has."""
    options = ["--output_format", form, "--mode", "frames", "--num_frames", "11"]
    command = ["--video_folder", videos, "--output_folder", tmp_path / "out", "--model", model, *SIZE, *options]
    started = start(*command)
    while started.poll() is None and not list((tmp_path / "out").glob("null*" if form == "store" else "*_2.meta")):
        time.sleep(0.01)
    started.send_signal(number)
    started.communicate(timeout=300)
    capsys.readouterr()
    assert run(*command) == 0
    made, kept = map(int, re.search(r"(\d+) samples made, (\d+) there already", capsys.readouterr().out).groups())
    assert made + kept == 42 and (form == "store" or kept >= 1)
    if form == "store":
        assert len(entries_of(tmp_path / "out")) == 42
    else:
        files = list((tmp_path / "out").glob("*.meta"))
        assert len(files) == 42 and all(read_meta(file).latents_CTHW.shape == (16, 1, 4, 6) for file in files)


def test_what_changed_is_made_again(videos, model, tmp_path, capsys):
    """A new caption: a .meta file is replaced; an entry of a store, which cannot be, is an error of this clip."""
    for form in ("store", "meta"):
        assert encode(videos, tmp_path / form, model, "--output_format", form) == 0
    text = (videos / "meta.json").read_text()
    (videos / "meta.json").write_text(text.replace("a red circle", "no more a circle"))
    capsys.readouterr()
    assert encode(videos, tmp_path / "meta", model, "--output_format", "meta") == 0
    assert "1 samples made, 3 there already, 0 clips failed" in capsys.readouterr().out
    assert read_meta(tmp_path / "meta/000000.meta").text == "no more a circle"
    assert encode(videos, tmp_path / "store", model) == 0
    told = capsys.readouterr().out
    assert "0 samples made, 3 there already, 1 clips failed" in told and "cache into another folder" in told
    for form in ("store", "meta"):
        with pytest.raises(ValueError, match=r"made with other settings:\n  picture.antialias: False there, True here"):
            encode(videos, tmp_path / form, model, "--output_format", form, "--antialias")


def test_bad_files_do_not_end_the_run(videos, model, tmp_path, capsys):
    """Each is listed with its reason, the others are made; only where there is no sample at all is it a failure."""
    whole = (videos / "000000.mp4").read_bytes()
    (videos / "000000.mp4").write_bytes(whole[: len(whole) // 2])
    (videos / "000002.mp4").write_text("not a video")
    entries = json.loads((videos / "meta.json").read_text())
    entries[3] = {"file_name": "000003.mp4", "start_frame": 99, "caption": "x"}
    entries += [{"file_name": "absent.mp4", "caption": "x"}, {"file_name": "000003.mp4", "start_frame": "x"}]
    (videos / "meta.json").write_text(json.dumps(entries))
    assert encode(videos, tmp_path / "out", model, "--verify", "9") == 0
    told = capsys.readouterr().out
    assert "1 samples made, 0 there already, 5 clips failed, of 6 clips" in told and told.count("PSNR") == 2
    reasons = {failure["key"]: failure["reason"] for failure in read_failures(tmp_path / "out")}
    assert len(reasons) == 5 and "no such file" in reasons["absent.mp4"]
    assert "start_frame=99, but it has 11 frames" in reasons["000003.mp4#99-"]
    for file in videos.glob("*.mp4"):
        file.write_text("not a video")
    for form in ("store", "meta"):
        assert encode(videos, tmp_path / f"none-{form}", model, "--output_format", form) == 1
        assert "0 samples made" in capsys.readouterr().out
        assert len(read_failures(tmp_path / f"none-{form}")) == 6


def test_a_mistake_on_the_command_line_is_one_line(tmp_path):
    """Exit code 2, and no traceback."""
    done = process("--video_folder", tmp_path / "absent", "--output_folder", tmp_path / "o")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "is not a folder" in done.stderr
