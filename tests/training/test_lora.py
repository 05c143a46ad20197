"""LoRA: the base is frozen, adapters are trained in float32, saved, resumed bit for bit, merged, sampled from."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch

from opensora_like.checkpoint import layout
from opensora_like.checkpoint.pieces import PieceReader
from opensora_like.checkpoint.weights import read_weights
from opensora_like.config import read_config
from opensora_like.evaluation.generate import VideoGenerator
from opensora_like.evaluation.prompts import read_prompts
from opensora_like.evaluation.sampling import with_found_sources
from opensora_like.models.lora import adapters_of, add_lora, file_name, merge_lora, own_name
from opensora_like.settings import InferenceConfig
from opensora_like.training.build import build_model
from tests.training.harness import CONFIG, ROOT, assert_same, build_toy, metrics_of, torchrun, train_toy
from tools.zero_to_bf16 import prepare

LORA = "{'r': 2, 'lora_alpha': 8, 'target_modules': ['qkv', 'proj', 'linear1'], 'lora_dropout': 0.1}"
COLOSSALAI = "{'type': 'colossalai', 'plugin': 'zero2'}"
INFERENCE = ROOT / "tests/training/toy_inference.py"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of the whole model."""
    outputs = tmp_path_factory.mktemp("base")
    train_toy(outputs, "--steps", "3", "--ema_decay", "None")
    return layout.complete_checkpoints(outputs / "toy")[-1]


def lora_arguments(base: Path, *more: str) -> list[str]:
    return ["--model.from_pretrained", str(base), "--lora_config", LORA, "--steps", "6", *more]


@pytest.fixture(scope="module")
def whole(base: Path, tmp_path_factory: pytest.TempPathFactory):
    """An uninterrupted LoRA run of six steps and its folder."""
    outputs = tmp_path_factory.mktemp("lora")
    return train_toy(outputs, *lora_arguments(base)), outputs / "toy"


def test_only_adapters_are_trained_and_saved(base: Path, whole) -> None:
    """The base stays what it was bit for bit; checkpoints hold adapters alone, and they have moved."""
    run, folder = whole
    names = {name for name, _ in run.booster.master_shards()}
    assert names and all(".lora_" in name for name in names)
    reader = PieceReader(layout.complete_checkpoints(folder)[-1])
    assert all(set(reader.names(kind)) == names for kind in reader.kinds())
    assert all(reader.read_whole("master", n).any() for n in names if ".lora_B." in n)
    plain = read_weights(base)
    model = run.step_fn.model
    frozen = {n.replace(".base_layer", ""): p for n, p in model.named_parameters() if not p.requires_grad}
    assert frozen.keys() == plain.keys() and all(torch.equal(p, plain[n]) for n, p in frozen.items())


@pytest.mark.parametrize("booster", ["{'type': 'ddp'}", COLOSSALAI], ids=["ddp", "colossalai"])
def test_killed_and_resumed_equals_uninterrupted(base: Path, booster: str, tmp_path: Path) -> None:
    """Adapters, moments, EMA and metrics, with dropout; float32 masters under both boosters."""
    arguments = lora_arguments(base, "--booster", booster, "--ckpt-every", "1")
    run = train_toy(tmp_path / "a", *arguments)
    train_toy(tmp_path / "b", *arguments, kill_before=4)
    again = train_toy(tmp_path / "b", *arguments, "--load", "latest")
    assert_same(again, run)
    assert metrics_of(tmp_path / "a/toy") == metrics_of(tmp_path / "b/toy")
    assert all(shard.dtype == torch.float32 for _, shard in run.booster.master_shards())


@pytest.mark.parametrize("how", ["--load", "--lora_checkpoint"])
def test_adapters_of_another_strength_are_refused(base: Path, whole, tmp_path: Path, how: str) -> None:
    """alpha / rank is no part of the tensors: with another one they would add more than they were trained to."""
    other = LORA.replace("'lora_alpha': 8", "'lora_alpha': 2")
    with pytest.raises(ValueError, match=r"another scale .* than the 1 of lora_config: \['all: 4'\]"):
        build_toy(tmp_path, *lora_arguments(base, "--lora_config", other, how, str(whole[1])))


def test_another_base_is_told(base: Path, whole, tmp_path: Path) -> None:
    """A resume on other frozen weights, or on the same ones that have been moved, which nothing here can tell apart."""
    moved = shutil.copytree(base, tmp_path / base.name)
    for source, is_told in ((base, False), (moved, True)):
        run = build_toy(tmp_path / str(is_told), *lora_arguments(source, "--load", str(whole[1])))
        run.lock.close()
        log = (tmp_path / str(is_told) / "toy/log.txt").read_text()
        assert ("they have to be the same" in log and str(moved) in log) == is_told


def test_sources_that_name_a_run_are_looked_up_once(base: Path, whole, tmp_path: Path) -> None:
    """By rank 0, and written down: what the run publishes meanwhile is neither another rank's nor a resume's."""
    folder = shutil.copytree(base.parent, tmp_path / "base")
    adapters = shutil.copytree(whole[1], tmp_path / "adapters")
    (link := tmp_path / "latest").symlink_to(folder / base.name)
    run = build_toy(tmp_path / "out", *lora_arguments(folder, "--lora_checkpoint", str(adapters)))
    run.lock.close()
    written = read_config(tmp_path / "out/toy/config.py").config
    assert written.model["from_pretrained"] == str(folder / base.name)
    assert written.lora_checkpoint == str(layout.complete_checkpoints(adapters)[-1])
    sampling = read_config(INFERENCE, ["--prompt", "a", "--lora-checkpoint", str(link)], schema=InferenceConfig).config
    expert = {"boundary": 0.9, "from_pretrained": "not read", "ckpt_path": str(folder)}
    found = with_found_sources(dataclasses.replace(sampling, ckpt_path=str(folder), other_expert=expert))
    assert found.lora_checkpoint == found.ckpt_path == found.other_expert["ckpt_path"] == str(folder / base.name)


def test_two_processes_train_as_one_does(base: Path, tmp_path: Path) -> None:
    """ColossalAI ZeRO-2 on two processes: losses and adapters of one DDP process with the same micro-batches."""
    train_toy(tmp_path / "one", *lora_arguments(base, "--accumulation_steps", "2"))
    done = torchrun(2, *lora_arguments(base, "--outputs", str(tmp_path / "two"), "--booster", COLOSSALAI))
    assert done.returncode == 0, done.output
    losses, weights = zip(
        *((metrics_of(tmp_path / n / "toy", "loss"), read_weights(tmp_path / n / "toy")) for n in ("one", "two")),
        strict=True,
    )
    torch.testing.assert_close(torch.tensor(losses[1]), torch.tensor(losses[0]), rtol=1e-4, atol=0)
    assert weights[0].keys() == weights[1].keys() and len(weights[0]) > 0
    for name, weight in weights[0].items():
        torch.testing.assert_close(weights[1][name], weight, atol=1e-3, rtol=0)


def test_adapters_begin_as_nothing_and_merge_exactly(base: Path) -> None:
    """Putting them in changes no output; merged, they give the outputs that they gave before, under plain names."""
    model = build_model(read_config(CONFIG, ["--model.from_pretrained", str(base)]).config).eval()
    x, t = torch.randn(2, 12, 2, 4, 4), torch.tensor([0.2, 0.8])
    conditions = {"text": torch.randn(2, 3, 16), "pooled": torch.randn(2, 16), "visual": torch.randn(2, 13, 2, 4, 4)}
    names, before = set(model.state_dict()), model(x, t, conditions)
    add_lora(model, {"r": 2, "target_modules": ("qkv", "linear2")}, seed=0)
    model.eval()
    torch.testing.assert_close(model(x, t, conditions), before, atol=1e-6, rtol=0)
    for parameter in adapters_of(model).values():
        torch.nn.init.normal_(parameter, std=0.1)
    changed = model(x, t, conditions)
    assert (changed - before).abs().max() > 1e-3
    assert all(own_name(file_name(n)) == n for n in adapters_of(model))
    merge_lora(model)
    assert set(model.state_dict()) == names
    torch.testing.assert_close(model(x, t, conditions), changed, atol=1e-4, rtol=0)


def sample(*arguments: str) -> torch.Tensor:
    config = read_config(INFERENCE, [*arguments, "--prompt", "a cat"], schema=InferenceConfig).config
    generator = VideoGenerator(config, torch.device("cpu"))
    return next(iter(generator.sample(read_prompts(config)))).video_CTHW


def export(*arguments: object) -> None:
    assert prepare(list(map(str, arguments)))() == 0


def test_exported_and_sampled(base: Path, whole, tmp_path: Path) -> None:
    """Base and adapters, the merged export, and the adapters exported as peft's and as kohya's give one sample."""
    _, folder = whole
    export(folder, tmp_path / "merged", "--merge_lora", "--ema", "--dtype", "fp32")
    export(folder, tmp_path / "peft", "--ema", "--dtype", "fp32")
    assert json.loads((tmp_path / "peft/adapter_config.json").read_text())["r"] == 2
    merged = sample("--ckpt-path", str(tmp_path / "merged"))
    export(folder, tmp_path / "kohya", "--ema", "--dtype", "fp32", "--lora_format", "kohya")
    for source in (folder, tmp_path / "peft", tmp_path / "kohya/lora_kohya.safetensors"):
        two = sample("--ckpt-path", str(base), "--lora-checkpoint", str(source))
        torch.testing.assert_close(two, merged, atol=1e-4, rtol=0)
    plain = sample("--ckpt-path", str(base))
    assert (plain - merged).abs().max() > 1e-3
    off = sample("--ckpt-path", str(base), "--lora-checkpoint", str(folder), "--lora-scale", "0.0")
    torch.testing.assert_close(off, plain, atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match=r"lora_scale=0.5 is read with lora_checkpoint only"):
        sample("--ckpt-path", str(base), "--lora-scale", "0.5")


def test_another_run_begins_from_adapters(base: Path, whole, tmp_path: Path) -> None:
    """lora_checkpoint: the adapters of another run, as they were saved."""
    first, folder = whole
    second = build_toy(tmp_path, *lora_arguments(base, "--lora_checkpoint", str(folder)))
    mine, theirs = dict(first.booster.master_shards()), dict(second.booster.master_shards())
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[n], theirs[n]) for n in mine)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--lora_config", "{'r': 2}"], "target_modules is not set"),
        (["--lora_config", "{'rank': 2, 'target_modules': ['qkv']}"], "rank"),
        (["--lora_config", "{'r': 2, 'target_modules': ['qqq']}"], "qqq.*linears end in"),
        (["--lora_config", "{'r': 2, 'target_modules': ['qkv'], 'modules_to_save': ['x']}"], "modules_to_save"),
        (["--lora_config", LORA[:-1] + ", 'init_lora_weights': 'pissa'}"], "'pissa' changes the frozen weights"),
        (["--lora_checkpoint", "x"], "lora_config only"),
    ],
)
def test_mistakes_are_named(arguments: list[str], message: str, tmp_path: Path) -> None:
    """Before anything is trained."""
    with pytest.raises(ValueError, match=message):
        build_toy(tmp_path, *arguments)
