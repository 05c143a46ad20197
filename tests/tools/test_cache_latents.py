"""tools/cache_latents.py: the printed commands work, in any number of processes, after a stop; files are no risk."""

from __future__ import annotations

import io
import json
import math
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from opensora_like import runtime as rt
from opensora_like.config import read_config
from opensora_like.datasets.latent_store import open_store
from opensora_like.datasets.meta_file import read_content, read_meta
from opensora_like.datasets.resize import resize_crop
from opensora_like.datasets.store_files import read_failures
from opensora_like.datasets.video_io import read_frames
from opensora_like.models.autoencoders.wan_vae import WanVAE
from opensora_like.models.text_encoders import UMT5TextEncoder
from opensora_like.preparation.sinks import MetaSink, StoreSink
from opensora_like.training.build import build_run
from opensora_like.training.trainer import Run, train
from tests.models.test_umt5 import saved
from tests.training.cached_clips import CONFIG, patch, write_table
from tests.training.harness import metrics_of
from tools import cache_latents
from tools.make_shapes import ShapesSet, write_set

ROOT = Path(__file__).parents[2]
SIZE = ["--height", "32", "--width", "48", "--center-crop"]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A pipeline's folder with a Wan autoencoder and a umT5 of a few thousand random weights."""
    folder = tmp_path_factory.mktemp("model")
    saved(folder, parts=True)
    WanVAE(tiny={}).model.save_pretrained(folder / "vae")
    return folder


@pytest.fixture(scope="module")
def made_once(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("shapes")
    write_set(ShapesSet(num_clips=4, size=48, num_frames=11, fps=8), folder)
    return folder / "clips"


@pytest.fixture
def videos(made_once: Path, tmp_path: Path) -> Path:
    """Four clips of 11 frames with a meta.json, whose second clip is a part of its file."""
    shutil.copytree(made_once, tmp_path / "videos")
    entries = [
        {"file_name": f"{n:06d}.mp4", "width": 48, "height": 48, "start_frame": 2 if n == 1 else 0, "end_frame": 11}
        for n in range(4)
    ]
    captions = ["a red circle", "circle", "red red circle of four", "red"]
    for entry, caption in zip(entries, captions, strict=True):
        entry["vila_caption"] = caption
    (tmp_path / "videos/meta.json").write_text(json.dumps(entries))
    return tmp_path / "videos"


def run(*arguments: object) -> int:
    """The tool in this process. Returns: its exit code."""
    return cache_latents.prepare([str(argument) for argument in arguments])()


def encode(videos: Path, out: Path, model: Path, *arguments: object) -> int:
    return run("--video_folder", videos, "--output_folder", out, "--model", model, *SIZE, *arguments)


def start(*arguments: object, processes: int = 1) -> subprocess.Popen:
    """The tool as a command, under torchrun if there are several processes."""
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else []
    command = [sys.executable, *launch, str(ROOT / "tools/cache_latents.py"), *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, cwd=ROOT, env=environment, text=True, **pipes)


def process(*arguments: object, processes: int = 1) -> subprocess.CompletedProcess:
    """The same, to its end."""
    started = start(*arguments, processes=processes)
    told = started.communicate(timeout=300)
    return subprocess.CompletedProcess(started.args, started.returncode, *told)


def entries_of(store: Path) -> dict[str, dict]:
    """Key -> tensors and facts."""
    opened = open_store(store)
    keys = opened.table()["key"].to_pylist()
    return {key: {**opened.read(key), "facts": opened.facts(key)} for key in keys}


def assert_same(one: dict[str, dict], other: dict[str, dict]) -> None:
    assert one.keys() == other.keys() and one
    for key, entry in one.items():
        assert entry.keys() == other[key].keys()
        for name, value in entry.items():
            same = (
                torch.equal(value, other[key][name]) if isinstance(value, torch.Tensor) else value == other[key][name]
            )
            assert same, (key, name)


def latents_of(model: Path, path: Path, indices: list[int]) -> torch.Tensor:
    """Posterior mean less the published mean over the published deviation, written out here once more."""
    vae = WanVAE(str(model)).model
    video = resize_crop(read_frames(path, indices), 32, 48)
    mean = vae.encode(video[None]).latent_dist.mean[0]
    norm = [torch.tensor(values).view(16, 1, 1, 1) for values in (vae.config.latents_mean, vae.config.latents_std)]
    assert norm[0][0] == torch.tensor(-0.7571) and norm[1][15] == torch.tensor(1.916)
    return ((mean - norm[0]) / norm[1]).detach()


SEED_FLAGS = {
    "video": "--output_format automodel --mode video --resize_mode bilinear",
    "frames": "--output_format automodel --mode frames --num-frames 40 --resize_mode bilinear",
}


def test_the_printed_command_for_whole_videos(videos, model, tmp_path):
    """One .meta per video: normed latents of 4n+1 frames, 512 tokens of umT5 in bf16, a JPEG, the caption."""
    assert encode(videos, tmp_path / "out", model, *SEED_FLAGS["video"].split()) == 0
    files = sorted((tmp_path / "out").glob("*.meta"))
    assert [file.name for file in files] == [f"{n:06d}.meta" for n in range(4)]
    umt5 = UMT5TextEncoder(str(model))
    for number, file in enumerate(files):
        clip, content = read_meta(file), read_content(file)
        first = 2 if number == 1 else 0
        want = latents_of(model, videos / f"{number:06d}.mp4", list(range(first, first + 9)))
        torch.testing.assert_close(clip.latents_CTHW, want.half(), atol=0, rtol=0)
        assert clip.latents_CTHW.shape == (16, 3, 4, 6)
        assert clip.embeddings_LD.shape == (512, 16) and clip.embeddings_LD.dtype == torch.bfloat16
        assert torch.equal(clip.embeddings_LD, umt5.encode([clip.text])[0])
        assert clip.embeddings_LD.isfinite().all() and clip.embeddings_LD.any()
        frame = np.asarray(Image.open(io.BytesIO(clip.first_frame)))
        source = resize_crop(read_frames(videos / f"{number:06d}.mp4", [first]), 32, 48)[:, 0]
        assert Image.open(io.BytesIO(clip.first_frame)).format == "JPEG" and frame.shape == (32, 48, 3)
        assert np.abs(frame / 127.5 - 1 - source.permute(1, 2, 0).numpy()).mean() < 0.1
        assert (content["num_frames"], content["num_frames_read"]) == (9, 9 if number == 1 else 11)
        assert content["metadata"]["start_frame"] == first and content["fps"] == 8.0
        assert content["resize_settings"]["target_size"] == (32, 48) and content["deterministic_latents"]
    assert read_meta(files[0]).text == "a red circle"


def test_the_printed_command_for_single_frames(videos, model, tmp_path):
    """One .meta per frame, numbered from 1, evenly spaced, with the clip's caption and no JPEG."""
    assert encode(videos, tmp_path / "out", model, *SEED_FLAGS["frames"].replace("40", "4").split()) == 0
    names = {file.name for file in (tmp_path / "out").glob("*.meta")}
    assert names == {f"{n:06d}_{k}.meta" for n in range(4) for k in range(1, 5)}
    for k, index in enumerate((2, 4, 7, 10), 1):
        file = tmp_path / f"out/000001_{k}.meta"
        clip, content = read_meta(file), read_content(file)
        want = latents_of(model, videos / "000001.mp4", [index])
        torch.testing.assert_close(clip.latents_CTHW, want.half(), atol=0, rtol=0)
        assert (content["frame_index"], content["total_frames_in_video"], content["num_frames"]) == (k, 4, 1)
        assert clip.first_frame is None and clip.text == "circle"


def test_more_frames_than_there_are(videos, model, tmp_path):
    """As printed, 40 frames of a clip of 11 are 11 samples, none twice."""
    assert encode(videos, tmp_path / "out", model, *SEED_FLAGS["frames"].split()) == 0
    assert len(list((tmp_path / "out").glob("000000_*.meta"))) == 11
    assert len(list((tmp_path / "out").glob("000001_*.meta"))) == 9


def test_both_spellings_of_every_flag():
    """Flags mean the same with - and _, and under the names of either published tool."""
    parser = cache_latents.video_parser()
    one = "--video_folder v --output_folder o --num_frames 3 --resize_mode area --center_crop --max_length 226 --fps=8"
    other = "--video-dir v --output-dir o --num-frames 3 --resize-mode=area --center-crop --max-sequence-length=226"
    parsed = [parser.parse_args(cache_latents.underscored(line.split())) for line in (one, other + " --fps 8")]
    assert parsed[0] == parsed[1] and parsed[0].center_crop and parsed[0].num_frames == 3
    off = "--output-folder a-b=c-d --center-crop --no-center-crop --no-memory-optimization --no-aspect-ratio"
    parsed = parser.parse_args(cache_latents.underscored(off.split()))
    assert not parsed.center_crop and not parsed.tiling and parsed.no_aspect_ratio
    assert cache_latents.underscored(["--a-b=c-d=e", "x-y=z", "-h", "--", "--in-c", "--d-e"]) == [
        "--a_b=c-d=e",
        "x-y=z",
        "-h",
        "--",
        "--in_c",
        "--d_e",
    ]


def test_a_store_holds_the_same(videos, model, tmp_path):
    """The default output has the tensors of the .meta files, and the facts that training asks for."""
    assert encode(videos, tmp_path / "meta", model, "--output-format", "meta") == 0
    assert encode(videos, tmp_path / "store", model) == 0
    entries = entries_of(tmp_path / "store")
    assert sorted(entries) == [f"{n:06d}.mp4" for n in range(4)]
    for key, entry in entries.items():
        clip = read_meta(tmp_path / "meta" / f"{Path(key).stem}.meta")
        assert torch.equal(entry["latents"], clip.latents_CTHW)
        assert torch.equal(entry["embeddings.text"], clip.embeddings_LD)
        assert bytes(entry["first_frame"].numpy()) == clip.first_frame
        facts = {name: entry["facts"][name] for name in ("text", "num_frames", "height", "width", "fps")}
        assert facts == {"text": clip.text, "num_frames": 9, "height": 32, "width": 48, "fps": 8.0}
    null = open_store(tmp_path / "store").null["text"]
    assert torch.equal(null, UMT5TextEncoder(str(model)).null()[0])


@pytest.mark.parametrize("source", ["jsonl", "json", "txt", "captions.csv", "list.jsonl"])
def test_every_source_of_captions(videos, model, tmp_path, source):
    """Wherever a caption stands, it is the one that is encoded."""
    (videos / "meta.json").unlink()
    texts = {f"{n:06d}": f"red circle {n}" for n in range(4)}
    options = []
    if "." in source:
        rows = [{"file_name": f"{name}.mp4", "caption": text} for name, text in texts.items()]
        lines = ["file_name,caption", *(f"{row['file_name']},{row['caption']}" for row in rows)]
        path = videos / source if source.endswith("csv") else tmp_path / source
        path.write_text("\n".join(lines if source.endswith("csv") else map(json.dumps, rows)))
        options = [] if source.endswith("csv") else ["--captions", path]
    for name, text in texts.items() if "." not in source else ():
        content = text if source == "txt" else json.dumps({"caption": text})
        (videos / f"{name}.{source}").write_text(content)
    assert encode(videos, tmp_path / "out", model, "--target_frames", "1", *options) == 0
    entries = entries_of(tmp_path / "out")
    assert {key: entry["facts"]["text"] for key, entry in entries.items()} == {f"{k}.mp4": v for k, v in texts.items()}


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


def test_windows_of_a_long_clip(videos, model, tmp_path):
    """Windows are samples of their own, with names that no other clip's sample can have."""
    assert encode(videos, tmp_path / "out", model, "--target_frames", "5", "--select", "windows") == 0
    assert (
        encode(videos, tmp_path / "meta", model, "--target_frames=5", "--select=windows", "--output_format=meta") == 0
    )
    entries = entries_of(tmp_path / "out")
    assert sorted(entries)[:3] == ["000000.mp4@1", "000000.mp4@2", "000001.mp4@1"]
    assert sorted(file.name for file in (tmp_path / "meta").glob("*.meta"))[:2] == ["000000_w1.meta", "000000_w2.meta"]
    want = latents_of(model, videos / "000000.mp4", [5, 6, 7, 8, 9])
    torch.testing.assert_close(entries["000000.mp4@2"]["latents"], want.half(), atol=0, rtol=0)


def test_stochastic_latents(videos, model, tmp_path):
    """A store keeps the deviation to draw with; a .meta file keeps one draw, made by its name and the seed."""
    options = ["--stochastic", "--output_format"]
    assert encode(videos, tmp_path / "store", model, *options, "store") == 0
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        assert encode(videos, tmp_path / name, model, *options, "meta", "--seed", seed) == 0
    entry = entries_of(tmp_path / "store")["000000.mp4"]
    drawn = [read_meta(tmp_path / name / "000000.meta").latents_CTHW for name in "abc"]
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
    distance = (drawn[0].float() - entry["latents"].float()) / entry["latents_std"].float()
    assert 0.8 < distance.std() < 1.2 and entry["latents_std"].shape == entry["latents"].shape
    assert not read_content(tmp_path / "a/000000.meta")["deterministic_latents"]


def test_other_options_reach_what_they_name(videos, model, tmp_path):
    """Each option changes what it says: size, dtype, tokens, tiles, frames, source of the encoders."""
    out = tmp_path / "out"
    assert run(
        *("--video_folder", videos, "--output_folder", out, "--autoencoder", model / "vae", "--text_encoder", model),
        *("--height", "32", "--width", "64", "--resize_mode", "area", "--latents_dtype", "fp32", "--max_length", "226"),
        *("--fps", "4", "--frame_rule", "pad", "--tiling", "--text_dtype", "fp32", "--vae_dtype", "fp32"),
        *("--device", "cpu", "--read_ahead", "0", "--missing-caption", "stem"),
    ) == 0  # fmt: skip
    entry = entries_of(out)["000000.mp4"]
    assert entry["latents"].shape == (16, 3, 4, 4) and entry["latents"].dtype == torch.float32
    assert entry["embeddings.text"].shape == (226, 16) and entry["embeddings.text"].dtype == torch.float32
    assert (entry["facts"]["num_frames"], entry["facts"]["fps"], entry["facts"]["width"]) == (9, 4.0, 32)
    fingerprint = open_store(out).fingerprint
    assert fingerprint["autoencoder"]["use_tiling"] and fingerprint["picture"]["resize_mode"] == "area"


def test_a_name_on_the_hub_is_what_was_downloaded(videos, model, tmp_path, monkeypatch):
    """A name finds the parts of the pipeline in the hub's cache, and counts as the same model as their folder."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    cached = tmp_path / "hub/models--Wan-AI--Wan2.1"
    shutil.copytree(model, cached / "snapshots/abc")
    (cached / "refs").mkdir()
    (cached / "refs/main").write_text("abc")
    assert encode(videos, tmp_path / "out", Path("Wan-AI/Wan2.1"), "--target_frames", "1") == 0
    assert encode(videos, tmp_path / "out", model, "--target_frames", "1") == 0, "settings are the same"
    with pytest.raises(FileNotFoundError, match="model='Wan-AI/absent' is not a folder, and the hub does not give it"):
        encode(videos, tmp_path / "other", Path("Wan-AI/absent"))


def test_scan_writes_the_list(videos, model, tmp_path, capsys):
    """meta.json of a folder, sizes and lengths measured, captions as found; it is never overwritten unasked."""
    (videos / "meta.json").unlink()
    (videos / "000000.txt").write_text("a red circle")
    (videos / "broken.mp4").write_text("")
    assert run("scan", videos) == 0
    told = capsys.readouterr().out
    assert "4 clips, 1 videos cannot be read" in told and "broken.mp4: empty file" in told
    assert "3 of 4 clips have no caption yet" in told
    entries = json.loads((videos / "meta.json").read_text())
    want = {"file_name": "000000.mp4", "width": 48, "height": 48, "start_frame": 0, "end_frame": 10, "fps": 8.0}
    assert entries[0] == {**want, "vila_caption": "a red circle"}
    with pytest.raises(ValueError, match="--overwrite"):
        run("scan", videos)
    assert run("scan", videos, "--overwrite") == 0
    capsys.readouterr()
    assert encode(videos, tmp_path / "out", model) == 0
    assert "1 samples made, 0 there already, 3 clips failed" in capsys.readouterr().out
    assert "no caption" in read_failures(tmp_path / "out")[0]["reason"]


def test_meta_files_become_a_store(videos, model, tmp_path, capsys):
    """Files that were made here bring their settings along, and the store is as if it had been made at once."""
    assert encode(videos, tmp_path / "meta", model, "--output_format", "automodel") == 0
    assert encode(videos, tmp_path / "direct", model) == 0
    convert = ["--from_meta", tmp_path / "meta", "--output_folder", tmp_path / "store"]
    assert run(*convert) == 0
    direct, made = entries_of(tmp_path / "direct"), entries_of(tmp_path / "store")
    for key, entry in direct.items():
        other = made[f"{Path(key).stem}.meta"]
        for name in ("latents", "embeddings.text", "first_frame"):
            assert torch.equal(entry[name], other[name])
        assert all(entry["facts"][n] == other["facts"][n] for n in ("path", "text", "num_frames", "height", "fps"))
    assert open_store(tmp_path / "store").fingerprint == open_store(tmp_path / "direct").fingerprint
    assert torch.equal(open_store(tmp_path / "store").null["text"], open_store(tmp_path / "direct").null["text"])
    capsys.readouterr()
    assert run(*convert) == 0
    assert "0 samples made, 4 there already, 0 failed" in capsys.readouterr().out
    with pytest.raises(ValueError, match="remove --model"):
        run(*convert, "--model", model)


def test_meta_files_of_others_become_a_store(model, tmp_path, capsys):
    """They need the name of their encoders; a hostile file is refused and listed, and the others are converted."""
    folder = tmp_path / "meta"
    folder.mkdir()
    content = {
        "text_embeddings": torch.ones(1, 226, 16, dtype=torch.float16),
        "video_latents": torch.ones(1, 16, 3, 4, 6, dtype=torch.float16),
        "metadata": {"vila_caption": "a red circle"},
        "text_mask": torch.ones(1, 226),
    }
    (folder / "a.meta").write_bytes(pickle.dumps(content))
    (folder / "48x32").mkdir()
    torch.save({**content, "prompt": "circle", "metadata": None}, folder / "48x32" / "b.pt")
    (folder / "evil.meta").write_bytes(b"cposix\nsystem\n(S'touch " + str(tmp_path / "was-run").encode() + b"'\ntR.")
    short = {**content, "text_embeddings": torch.ones(1, 7, 16)}
    (folder / "short.meta").write_bytes(pickle.dumps(short))
    convert = ["--from_meta", folder, "--output_folder", tmp_path / "store"]
    with pytest.raises(ValueError, match=r"has no prepare\.json.* give --model"):
        run(*convert)
    assert run(*convert, "--model", model) == 0
    assert "2 samples made, 0 there already, 2 failed" in capsys.readouterr().out
    entries = entries_of(tmp_path / "store")
    assert [entry["facts"]["text"] for entry in entries.values()] == ["circle", "a red circle"]
    reasons = {failure["key"]: failure["reason"] for failure in read_failures(tmp_path / "store")}
    assert "asks for posix.system" in reasons["evil.meta"] and "(7, 16)" in reasons["short.meta"]
    assert not (tmp_path / "was-run").exists()
    store = open_store(tmp_path / "store")
    assert store.fingerprint["encoders"]["text"]["max_length"] == 226 and store.null["text"].shape == (226, 16)


def test_a_config_is_cached_and_verified(tmp_path, capsys):
    """With the parameter-free autoencoder, what was cached of a config decodes to the very pixels."""
    table = write_table(tmp_path, num_clips=3, num_images=1)
    settings = [
        "--dataset",
        repr({"type": "video_text", "data_path": str(table)}),
        *patch(),
        "--condition_config",
        "None",
    ]
    assert run(CONFIG, "--out", tmp_path / "store", "--verify", "3", *settings) == 0
    told = capsys.readouterr().out
    made = int(re.search(r'"written": (\d+)', told)[1])
    assert made == len(entries_of(tmp_path / "store")) > 3
    values = [float(found) for found in re.findall(r": PSNR (\S+) dB", told)]
    assert len(values) == 3 and all(value > 90 for value in values)
    assert run(CONFIG, "--out", tmp_path / "store", *settings) == 0
    assert f'"written": 0, "skipped": {made}' in capsys.readouterr().out


def test_training_on_what_was_prepared(videos, model, tmp_path):
    """A run on the store, without autoencoder and text encoder; other encoders in its config are an error."""
    assert encode(videos, tmp_path / "store", model) == 0
    sizes = "num_attention_heads=2, attention_head_dim=12, ffn_dim=32, num_layers=1, text_dim=16, text_length=512"
    config = tmp_path / "wan.py"
    config.write_text(f"""
model = dict(type="wan", {sizes})
autoencoder = dict(type="wan_vae", from_pretrained={str(model / "vae")!r})
encoders = dict(text=dict(type="umt5", from_pretrained={str(model)!r}))
dataset = dict(type="latents", cache_path={str(tmp_path / "store")!r})
bucket_config = {{"32x48": {{9: (1.0, 2), 5: (1.0, 2)}}}}
booster = dict(type="ddp")
sample_posterior = False
dropout_ratio = dict(text=0.5)
dtype = "fp32"
num_workers = 0
steps = 3
log_every = 1
tensorboard = False
exp_name = "wan"
outputs = {str(tmp_path / "outputs")!r}
""")

    def built(*arguments: str) -> Run:
        return build_run(read_config(config, list(arguments)).config, rt.start(), config_name=str(config))

    train(built())
    losses = [loss for (loss,) in metrics_of(tmp_path / "outputs/wan", "loss")]
    assert len(losses) == 3 and all(math.isfinite(loss) for loss in losses)
    for number, (changed, message) in enumerate(
        (
            (
                "--encoders.text.max-length=226",
                r"made with other settings:\n  encoders\.text\.max_length: 512 there, 226",
            ),
            (
                "--autoencoder.use-tiling=True",
                r"made with other settings:\n  autoencoder\.use_tiling: False there, True",
            ),
            ("--sample-posterior=True", "sample_posterior=True needs the deviation"),
        )
    ):
        with pytest.raises(ValueError, match=message):
            built(changed, f"--exp-name=other{number}")


def test_verify_is_finite_for_random_weights(videos, model, tmp_path, capsys):
    """Random weights do not invert each other; the number is there and is small."""
    shown = ["--verify", "2", "--verify-folder", tmp_path / "shown"]
    assert encode(videos, tmp_path / "out", model, *shown, "--output_format", "meta") == 0
    assert encode(videos, tmp_path / "images", model, *shown, "--target_frames", "1") == 0
    for path in ("000000.mp4.mp4", "000002.mp4.mp4"):
        frames = torch.from_numpy(read_frames(tmp_path / "shown" / path, range(9)))
        source = resize_crop(read_frames(videos / path.removesuffix(".mp4"), range(9)), 32, 48)
        assert frames.shape == (9, 32, 96, 3)
        assert (frames[:, :, :48].permute(3, 0, 1, 2) / 127.5 - 1 - source).abs().mean() < 0.1
    assert len(list((tmp_path / "shown").glob("*.png"))) == 2
    told = capsys.readouterr().out
    values = [float(found) for found in re.findall(r": PSNR (\S+) dB", told)]
    assert len(values) == 4 and all(math.isfinite(value) and 0 < value < 20 for value in values)
    assert "verify: 2 samples decoded, mean PSNR" in told


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("", "give --video_folder"),
        ("--output_folder OUT", "--video_folder is missing"),
        ("VIDEOS --height 30 --width 32", "height=30 is not a multiple of 16"),
        ("VIDEOS --num_frames 3", "is for mode 'frames'"),
        ("VIDEOS --model ./absent", r"model='\./absent' is not a folder"),
        ("VIDEOS --autoencoder x.pth --text_encoder x", r"autoencoder='x\.pth' is not there"),
        ("VIDEOS --autoencoder x.pth", "give --model, or --text_encoder"),
        ("VIDEOS --verify -1", "must be 0 or more"),
        ("VIDEOS --verify_folder x", "nothing is decoded without --verify"),
        ("VIDEOS --from_meta x --missing_caption stem", r"\['--missing_caption', '--video_folder'\] would do nothing"),
        ("--output_folder OUT --from_meta absent", r"has no \.meta files"),
    ],
)
def test_mistakes_are_named(videos, tmp_path, arguments, message):
    """Before anything is made; the message names the flag."""
    line = arguments.replace("VIDEOS", f"--video_folder {videos} --output_folder OUT").replace("OUT", f"{tmp_path}/out")
    with pytest.raises((ValueError, OSError), match=message):
        cache_latents.prepare(line.split())
    assert not (tmp_path / "out").exists()


def test_a_mistake_on_the_command_line_is_one_line(tmp_path):
    """Exit code 2, and no traceback."""
    done = process("--video_folder", tmp_path / "absent", "--output_folder", tmp_path / "o")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "is not a folder" in done.stderr
