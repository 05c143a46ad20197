"""tools/cache_latents.py: the printed commands work, and every option makes what it says."""

from __future__ import annotations

import io
import json
import math
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from opensora_like.datasets.latent_store import open_store
from opensora_like.datasets.meta_file import read_content, read_meta
from opensora_like.datasets.resize import resize_crop
from opensora_like.datasets.video_io import read_frames
from opensora_like.models.autoencoders.wan_vae import WanVAE
from opensora_like.models.text_encoders import UMT5TextEncoder
from tests.tools.cache_harness import encode, entries_of, run
from tools import cache_latents


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
