"""Around tools/cache_latents.py: lists of clips, stores from .meta files and from a config, and training on them."""

from __future__ import annotations

import json
import math
import pickle
import re
from pathlib import Path

import pytest
import torch

from opensora_like import runtime as rt
from opensora_like.config import read_config
from opensora_like.datasets.latent_store import open_store
from opensora_like.datasets.store_files import read_failures
from opensora_like.training.build import build_run
from opensora_like.training.trainer import Run, train
from tests.tools.cache_harness import encode, entries_of, run
from tests.training.cached_clips import CONFIG, patch, write_table
from tests.training.harness import metrics_of


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
    (tmp_path / "meta/.writing-d.meta").write_bytes(b"half of it")  # what a kill leaves
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
