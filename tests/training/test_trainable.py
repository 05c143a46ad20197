"""trainable_modules: only what it names is trained, clipped, saved, resumed; with rates of its own; whole on export."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from opensora_like.checkpoint import layout
from opensora_like.checkpoint.pieces import PieceReader
from opensora_like.checkpoint.weights import read_weights
from opensora_like.config import read_config
from opensora_like.evaluation.generate import load_denoiser
from opensora_like.settings import InferenceConfig
from opensora_like.training.build import build_model
from tests.training.harness import ROOT, assert_same, build_toy, metrics_of, torchrun, train_toy
from tools.zero_to_bf16 import prepare

PARTS = "['attn.', 'final_layer']"
SCALES = "{'final_layer': 0.5}"
BOOSTERS = {
    "ddp": "{'type': 'ddp'}",
    "zero2": "{'type': 'colossalai', 'plugin': 'zero2'}",
    "fsdp2": "{'type': 'fsdp2'}",
    "deepspeed 2": "{'type': 'deepspeed', 'stage': 2}",
    "deepspeed 3": "{'type': 'deepspeed', 'stage': 3}",
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of the whole model."""
    outputs = tmp_path_factory.mktemp("base")
    train_toy(outputs, "--steps", "2", "--ema_decay", "None")
    return layout.complete_checkpoints(outputs / "toy")[-1]


def arguments_of(base: Path, *more: str) -> list[str]:
    arguments = ["--model.from_pretrained", str(base), "--trainable_modules", PARTS, "--lr_scales", SCALES]
    return [*arguments, "--steps", "4", "--grad_clip", "0.05", *more]


@pytest.fixture(scope="module")
def whole(base: Path, tmp_path_factory: pytest.TempPathFactory):
    """An uninterrupted run of one process on joined micro-batches, and its folder."""
    outputs = tmp_path_factory.mktemp("partial")
    return train_toy(outputs, *arguments_of(base, "--accumulation_steps", "2")), outputs / "toy"


def is_named(name: str) -> bool:
    return "attn." in name or "final_layer" in name


def test_the_rest_is_frozen_and_not_saved(base: Path, whole) -> None:
    """Named parameters move and are all that a checkpoint holds; the others are bit for bit those of the base."""
    run, folder = whole
    before = read_weights(base)
    for name, parameter in run.step_fn.model.named_parameters():
        assert parameter.requires_grad == is_named(name)
        assert torch.equal(parameter, before[name]) != is_named(name) or not parameter.any()
    reader = PieceReader(layout.complete_checkpoints(folder)[-1])
    assert all(set(reader.names(kind)) == set(filter(is_named, before)) for kind in reader.kinds())


def test_rates(whole) -> None:
    """One group for each factor, that of 1 first; the schedule multiplies both."""
    groups = whole[0].booster.param_groups
    assert [group["lr"] / groups[0]["lr"] for group in groups] == [1, 0.5]
    assert sum(p.numel() for group in groups for p in group["params"]) == sum(
        p.numel() for n, p in whole[0].step_fn.model.named_parameters() if is_named(n)
    )


@pytest.mark.parametrize("booster", BOOSTERS)
def test_two_processes_train_as_one_does(base: Path, whole, booster: str, tmp_path: Path) -> None:
    """Losses, weights, and the norm that is clipped: of what is trained, over all ranks; the clip always cuts."""
    done = torchrun(2, *arguments_of(base, "--outputs", str(tmp_path), "--booster", BOOSTERS[booster]))
    assert done.returncode == 0, done.output
    mine, theirs = (torch.tensor(metrics_of(f, "loss", "grad_norm")) for f in (tmp_path / "toy", whole[1]))
    assert (theirs[:, 1] > 0.05).all()
    torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=0)
    weights, expected = read_weights(tmp_path / "toy"), read_weights(whole[1])
    assert weights.keys() == expected.keys()
    for name, weight in expected.items():
        torch.testing.assert_close(weights[name], weight, atol=1e-3, rtol=0)


def test_killed_and_resumed_equals_uninterrupted(base: Path, tmp_path: Path) -> None:
    """Weights, moments of both groups, EMA and metrics."""
    arguments = arguments_of(base, "--ckpt-every", "1")
    run = train_toy(tmp_path / "a", *arguments)
    train_toy(tmp_path / "b", *arguments, kill_before=3)
    assert_same(train_toy(tmp_path / "b", *arguments, "--load", "latest"), run)
    assert metrics_of(tmp_path / "a/toy") == metrics_of(tmp_path / "b/toy")


def test_whole_again_in_export_sampling_and_the_next_run(base: Path, whole, tmp_path: Path) -> None:
    """What a checkpoint leaves out comes from where the run had it."""
    trained, before = read_weights(whole[1], use_ema=False), read_weights(base)
    expected = {**before, **trained}
    assert prepare([str(whole[1]), str(tmp_path / "out"), "--dtype", "fp32"])() == 0
    exported = read_weights(tmp_path / "out")
    arguments, toy = ["--ckpt-path", str(whole[1]), "--use-ema", "False"], ROOT / "tests/training/toy_inference.py"
    sampled = load_denoiser(read_config(toy, arguments, schema=InferenceConfig).config)
    from_it = ["--model.from_pretrained", str(whole[1]), "--outputs", str(tmp_path)]
    following = build_model(read_config(ROOT / "tests/training/toy_config.py", from_it).config)
    ema = {**before, **read_weights(whole[1])}
    for found, wanted in ((exported, expected), (sampled.state_dict(), expected), (following.state_dict(), ema)):
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_from_random_weights_only_the_export_is_whole(tmp_path: Path) -> None:
    """The seed makes the frozen weights again; who has no config is told so."""
    run = train_toy(tmp_path, "--trainable_modules", PARTS, "--steps", "1")
    with pytest.raises(ValueError, match=r"began as random weights; make whole weights of it with tools/zero_to_bf16"):
        build_toy(tmp_path, "--model.from_pretrained", str(tmp_path / "toy"), "--exp_name", "next")
    assert prepare([str(tmp_path / "toy"), str(tmp_path / "out"), "--dtype", "fp32"])() == 0
    found = read_weights(tmp_path / "out")
    assert all(torch.equal(found[name], p) for name, p in run.step_fn.model.named_parameters())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--trainable_modules", "['atn.']"], r"trainable_modules: 'atn.' is in none of .* there are .*attn"),
        (["--trainable_modules", "[]"], "trains nothing"),
        (["--trainable_modules", "['.']"], "leave it at None, which trains all"),
        (
            ["--trainable_modules", "['attn']", "--lora_config", "{'r': 2, 'target_modules': ['qkv']}"],
            "both set.*remove one",
        ),
        (["--trainable_modules", "['attn.']", "--lr_scales", "{'final_layer': 0.5}"], "lr_scales: 'final_layer'"),
        (["--lr_scales", "{'attn': -1.0}"], "must be 0 or more"),
        (["--lr_scales", "{'attn': 0.5, 'img_attn': 0.1}"], "several factors"),
    ],
)
def test_mistakes_are_named(arguments: list[str], message: str, tmp_path: Path) -> None:
    """Before anything is trained."""
    with pytest.raises(ValueError, match=message):
        build_toy(tmp_path, *arguments)
