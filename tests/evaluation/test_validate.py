"""Validation of a checkpoint: prompts of a prepared folder, the weights that were asked for and never others."""

from __future__ import annotations

import csv
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from opensora_like import runtime as rt
from opensora_like.checkpoint import layout
from opensora_like.config import read_config
from opensora_like.datasets.latent_store import StoreWriter, finish
from opensora_like.datasets.meta_file import MetaClip, MetaFacts, write_meta
from opensora_like.evaluation import validate as validation
from opensora_like.evaluation.find_weights import find_weights
from opensora_like.evaluation.validate import build_validation, read_request
from opensora_like.models.base import Denoiser
from opensora_like.publish import DRAFT
from opensora_like.registry import MODELS, build
from opensora_like.settings import InferenceConfig
from tests.training.harness import ROOT, train_toy

CONFIG = ROOT / "tests/evaluation/tiny_wan.py"
TEXTS = ["a red ball", "a blue ball", "a dog, running", "a red ball"]


def settings() -> InferenceConfig:
    return read_config(CONFIG, schema=InferenceConfig).config


def tiny_wan(seed: int) -> Denoiser:
    torch.manual_seed(seed)
    model = build(settings().model, MODELS, where="model")
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model


def validate(*arguments: str) -> None:
    """What the script does, in this process."""
    build_validation(read_request(arguments), rt.start())()


def run_script(*arguments: str, num_processes: int = 1) -> subprocess.CompletedProcess:
    """Run the script as a user does."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(num_processes)]
    command = [sys.executable, *(launcher if num_processes > 1 else []), str(ROOT / "scripts/diffusion/validate.py")]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    for inherited in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        env.pop(inherited, None)
    return subprocess.run([*command, *arguments], cwd=ROOT, env=env, capture_output=True, text=True, check=False)


def results(folder: Path) -> dict:
    return json.loads((folder / "validation.json").read_text())


def videos(folder: Path) -> dict[str, bytes]:
    return {file.stem: file.read_bytes() for file in folder.glob("*.mp4")}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same prompts as a store of latents, as a folder of .meta files and as a csv."""
    folder = tmp_path_factory.mktemp("prepared")
    encoder = build(settings().encoders["text"], MODELS, where="encoders.text").eval()
    with torch.no_grad():
        embeddings, null = encoder.encode(TEXTS), encoder.encode([""])[0]
    facts = {"num_frames": 5, "height": 16, "width": 16, "fps": 8.0}
    with StoreWriter(folder / "store", fingerprint={}) as writer:
        writer.add_null({"text": null})
        for number, text in enumerate(TEXTS):
            tensors = {"latents": torch.zeros(12, 5, 8, 8), "embeddings.text": embeddings[number]}
            writer.add(f"clip_{number}", tensors, {**facts, "path": f"clip_{number}.mp4", "text": text})
        writer.add("silent", {"latents": torch.zeros(12, 5, 8, 8)}, {**facts, "path": "s.mp4", "text": " "})
    finish(folder / "store")
    for number, text in enumerate(TEXTS):
        clip = MetaClip(torch.zeros(16, 2, 2, 2), embeddings[number], text, 5)
        path = folder / f"meta/clip_{number}.meta"
        write_meta(path, clip, MetaFacts(metadata={}, source_path="", num_frames_read=5))
    (folder / f"meta/{DRAFT}clip_9.meta").write_bytes(b"half of it")  # what a kill leaves
    with (folder / "prompts.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["text", "name"], *([text, f"clip_{n}"] for n, text in enumerate(TEXTS))])
    return {"store": folder / "store", "meta": folder / "meta", "csv": folder / "prompts.csv"}


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of another program: the average and whole weights in one folder, shards in the next."""
    import torch.distributed.checkpoint as dcp

    folder = tmp_path_factory.mktemp("weights")
    (folder / "epoch_0_step_999").mkdir()
    torch.save(tiny_wan(1).state_dict(), folder / "epoch_0_step_999/ema_shadow.pt")
    torch.save(tiny_wan(2).state_dict(), folder / "epoch_0_step_999/consolidated_model.bin")
    shards = {f"model._fsdp_wrapped_module.{n}": t for n, t in tiny_wan(2).state_dict().items()}
    dcp.save(shards, checkpoint_id=folder / "epoch_0_step_499/model", no_dist=True)
    (folder / "epoch_1_step_1499").mkdir()  # killed before anything was in it
    (folder / "LATEST").symlink_to("epoch_1_step_1499")
    return folder


def test_the_published_command_on_a_prepared_folder(prepared, weights: Path, tmp_path: Path) -> None:
    """Its flags by their names; LATEST is the newest with weights, EMA before whole ones; what was made is listed."""
    out = tmp_path / "out"
    done = run_script(
        str(CONFIG), "--meta_folder", str(prepared["store"]), "--guidance_scale", "5", "--checkpoint",
        str(weights / "LATEST"), "--num_samples", "3", "--num_inference_steps=3", "--height", "12", "--width", "20",
        "--num_frames", "9", "--fps", "4", "--seed", "7", "--output_dir", str(out),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = results(out)
    assert found["weights"]["kind"] == "ema" and found["weights"]["step"] == 999
    assert found["weights"]["path"].endswith("epoch_0_step_999/ema_shadow.pt")
    names = ("guidance", "num_steps", "height", "width", "num_frames", "fps_save", "seed")
    assert [found["settings"][name] for name in names] == [5.0, 3, 12, 20, 9, 4, 7]
    assert [row["text"] for row in found["samples"]] == TEXTS[:3]
    assert sorted(videos(out)) == ["clip_0", "clip_1", "clip_2"]
    with (out / "validation.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(r["path"], r["text"], r["weights"]) for r in rows] == [
        (f"clip_{n}.mp4", TEXTS[n], "ema") for n in range(3)
    ]
    assert "clip_2.mp4" in (out / "validation.html").read_text()
    assert "1 of 5 clips have no text" in done.stderr


def test_cached_embeddings_are_those_of_the_encoder(prepared, weights: Path, tmp_path: Path) -> None:
    """From a store, from .meta files and from a csv with the encoder itself: the same files, on one process and two."""
    common = [str(CONFIG), "--checkpoint", str(weights / "epoch_0_step_999/consolidated_model.bin")]
    found = {}
    for kind, num_processes in (("store", 1), ("meta", 1), ("csv", 1), ("store", 2)):
        out = tmp_path / f"{kind}{num_processes}"
        arguments = [*common, "--meta_folder", str(prepared[kind]), "--output_dir", str(out)]
        if num_processes == 1:
            validate(*arguments)
        else:
            done = run_script(*arguments, num_processes=num_processes)
            assert done.returncode == 0, done.stderr
        found[out.name] = videos(out)
        assert results(out)["weights"]["kind"] == "consolidated"
        assert [row["name"] for row in results(out)["samples"]] == [f"clip_{n}" for n in range(4)]
    assert len(found["csv1"]) == 4 and found["csv1"] == found["store1"] == found["meta1"] == found["store2"]
    assert found["csv1"]["clip_0"] != found["csv1"]["clip_3"], "equal prompts have noise of their own"


def test_shards_are_the_whole_weights(prepared, weights: Path, tmp_path: Path) -> None:
    """A distributed checkpoint gives what the file of whole weights gives, without a process group."""
    found = []
    for name in ("epoch_0_step_499", "epoch_0_step_999/consolidated_model.bin"):
        out = tmp_path / str(len(found))
        validate(
            str(CONFIG), "--meta_folder", str(prepared["store"]), "--checkpoint", str(weights / name),
            "--num_samples", "1", "--output_dir", str(out),
        )  # fmt: skip
        found.append(videos(out))
        assert not list(out.glob(".joined*"))
    assert results(tmp_path / "0")["weights"]["kind"] == "sharded" and found[0] == found[1]


def test_a_rank_without_prompts_waits_for_the_others(
    prepared, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However long their videos take: `timeout_minutes` is for who waits in vain."""
    gather, waited = dist.all_gather_object, []

    def note(found: list, own: object, group: dist.ProcessGroup) -> None:
        waited.append(group._get_backend(torch.device("cpu")).options._timeout)
        gather(found, own, group=group)

    monkeypatch.setattr(dist, "all_gather_object", note)
    validate(
        str(CONFIG), "--meta_folder", str(prepared["store"]), "--output_dir", str(tmp_path), "--num_samples", "1",
        "--checkpoint", str(weights / "epoch_0_step_999/consolidated_model.bin"),
    )  # fmt: skip
    assert waited and min(waited).days >= 1


def test_commands_with_other_weights_may_share_a_folder(
    prepared, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each joins its shards in a file of its own, which goes with it, whatever becomes of it."""
    arguments = [str(CONFIG), "--meta_folder", str(prepared["store"]), "--output_dir", str(tmp_path)]
    arguments += ["--checkpoint", str(weights / "epoch_0_step_499"), "--num_samples", "1"]
    join, joined = validation.join_shards, []

    def join_both(folder: Path, out: Path) -> Path:
        joined.append(out)
        if len(joined) == 1:
            validate(*arguments)
        assert not out.exists()
        return join(folder, out)

    monkeypatch.setattr(validation, "join_shards", join_both)
    validate(*arguments)
    assert len(set(joined)) == 2 and len(videos(tmp_path)) == 1
    monkeypatch.setattr(validation, "VideoGenerator", None)
    with pytest.raises(TypeError):
        validate(*arguments)
    assert len(set(joined)) == 3 and not list(tmp_path.glob(".joined*"))


def test_own_checkpoints_bring_their_models(tmp_path: Path) -> None:
    """Without a config: models of the run, its EMA, of the newest complete checkpoint; a half one is passed over."""
    train_toy(tmp_path, "--steps", "4", "--ckpt-every", "2")
    run = tmp_path / "toy"
    (run / "epoch9-global_step90").mkdir()
    (tmp_path / "p.csv").write_text("text\na cat\n")
    common = ["--meta_folder", str(tmp_path / "p.csv"), "--checkpoint", str(run / "LATEST")]
    request = read_request(common)
    assert request.weights.kind == "ema" and request.weights.step == 4 and request.weights.path.parent == run
    assert request.config.model["type"] == "mmdit" and request.config.dtype == "fp32"
    assert (request.config.num_frames, request.config.height, request.config.width) == (81, 480, 832)
    small = ["--height", "16", "--width", "16", "--num_frames", "5", "--num_inference_steps", "2"]
    validate(*common, *small, "--output_dir", str(tmp_path / "out"))
    assert results(tmp_path / "out")["weights"]["step"] == 4 and len(videos(tmp_path / "out")) == 1


@pytest.mark.parametrize(
    ("checkpoint", "message"),
    [
        ("nowhere/step_1000", "does not exist"),
        ("nowhere/LATEST", "has no complete checkpoint; looked for epoch"),
        ("{weights}/epoch_1_step_1499", "looked for ['ema_shadow.pt', "),
        ("{broken}/zip.bin", "zip.bin"),
        ("{broken}/parts", "holds parts of tensors"),
        ("{broken}/other", "does not fit the model"),
    ],
)
def test_a_checkpoint_that_cannot_be_read_is_an_error(
    prepared, weights: Path, tmp_path: Path, checkpoint: str, message: str
) -> None:
    """Never the base model in its place: no file is made, and what was looked for is said."""
    (tmp_path / "parts/model").mkdir(parents=True)
    (tmp_path / "parts/model/shard-00001-model-00001-of-00001.safetensors").write_bytes(b"")
    (tmp_path / "other").mkdir()
    torch.save({"some": torch.zeros(2)}, tmp_path / "other/ema_shadow.pt")
    (tmp_path / "zip.bin").write_bytes(b"not a file of tensors")
    arguments = [str(CONFIG), "--meta_folder", str(prepared["store"]), "--output_dir", str(tmp_path / "out")]
    with pytest.raises((ValueError, FileNotFoundError), match=re.escape(message)):
        validate(*arguments, "--checkpoint", checkpoint.format(weights=weights, broken=tmp_path))
    assert not list(tmp_path.rglob("*.mp4"))


def test_a_published_pipeline_is_a_folder(prepared) -> None:
    """--model_id names the folder of a pipeline; without a config everything else has the published values."""
    request = read_request(["--meta_folder", str(prepared["store"]), "--model_id", "ckpts/wan"])
    cfg = request.config
    assert (
        cfg.model["from_pretrained"] == "ckpts/wan/transformer"
        and cfg.autoencoder["from_pretrained"] == "ckpts/wan/vae"
    )
    assert cfg.encoders["text"]["from_pretrained"] == "ckpts/wan" and request.weights is None
    published = (cfg.num_steps, cfg.guidance, cfg.height, cfg.width, cfg.num_frames, cfg.fps_save, cfg.seed)
    assert published == (50, 5.0, 480, 832, 81, 16, 42) and cfg.save_dir == "validation_outputs"


def test_the_script_fails_with_its_message(prepared, tmp_path: Path) -> None:
    """One line that says what was looked for, and an exit code that is not 0."""
    out = ["--output_dir", str(tmp_path / "out")]
    done = run_script(str(CONFIG), "--meta_folder", str(prepared["store"]), "--checkpoint", "nowhere/LATEST", *out)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "checkpoint='nowhere/LATEST'" in done.stderr and not (tmp_path / "out").exists()


def test_the_order_of_preference(weights: Path, tmp_path: Path) -> None:
    """EMA, then whole weights, then shards; of an own checkpoint without EMA, its masters."""
    folder = weights / "epoch_0_step_999"
    assert find_weights(str(folder)).kind == "ema"
    other = tmp_path / "step_7"
    other.mkdir()
    (other / "consolidated_model.bin").symlink_to(folder / "consolidated_model.bin")
    (other / "model").symlink_to(weights / "epoch_0_step_499/model")
    assert find_weights(str(other))[:3] == ("consolidated", other / "consolidated_model.bin", 7)
    (other / "consolidated_model.bin").unlink()
    assert find_weights(str(other)).kind == "sharded"
    train_toy(tmp_path, "--steps", "1", "--ema-decay", "none")
    assert find_weights(str(tmp_path / "toy"))[:1] == ("sharded",)
    assert find_weights(str(tmp_path / "toy")).path == layout.complete_checkpoints(tmp_path / "toy")[-1].resolve()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--checkpoint", "{weights}/LATEST"], "--meta_folder is missing"),
        (["--meta_folder", "x", "--num_samples", "0"], "1 or more"),
        (["--meta_folder", "x", "--prompt", "y"], "prompt='y' is not read here"),
        (["--meta_folder", "x", "--checkpoint", "{weights}/LATEST", "--ckpt-path", "y"], "both name weights"),
        (["--meta_folder", "x", "--gudance_scale", "3"], "guidance"),
    ],
)
def test_mistakes_are_named(weights: Path, arguments: list[str], message: str) -> None:
    """Before anything is loaded."""
    with pytest.raises(ValueError, match=message):
        read_request([str(CONFIG), *(a.format(weights=weights) for a in arguments)])
