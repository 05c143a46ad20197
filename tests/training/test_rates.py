"""Learning rate and weight decay are functions of the step alone; a setting that neither of them reads is refused."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from opensora_like.config import read_config
from opensora_like.settings import Optim, RunConfig
from opensora_like.training.optim import FALLING, Rates, build_rates, optimizer_factory
from tests.training.harness import CONFIG, build_toy, metrics_of, train_toy

TOY = read_config(CONFIG).config


def settings(**changed: Any) -> RunConfig:
    """The toy config with other rates: lr 1e-2, weight decay 0.01, three steps of warm-up."""
    return dataclasses.replace(TOY, **changed)


def rates(total_steps: int | None = 100, **changed: Any) -> Rates:
    return build_rates(settings(**changed), total_steps=total_steps)


def test_a_warm_up_begins_where_it_is_told_to() -> None:
    """From a rate of its own, or on a straight line from 0; both reach lr at warmup_steps, a number or a share."""
    given = rates(warmup_steps=4, warmup_lr=1e-3)
    assert [given.lr_factor(step) for step in range(6)] == pytest.approx([0.1, 0.325, 0.55, 0.775, 1.0, 1.0])
    assert [rates(warmup_steps=4).lr_factor(step) for step in range(5)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert rates(warmup_steps=0.04) == rates(warmup_steps=4) == rates(warmup_steps=4.0)


def test_the_published_warm_up() -> None:
    """Open-Sora's line begins at 1e-6; with its first rate as `warmup_lr` it is ours, and from 0 we are as near."""
    maths = json.loads((Path(__file__).parents[1] / "golden/opensora_maths_a.json").read_text())["warmup"]
    common = {"lr": maths["lr"], "warmup_steps": maths["warmup_steps"]}
    for warmup_lr, far in ((maths["lrs"][0], 1e-12), (None, maths["initial_lr"])):
        found = Rates(**common, warmup_lr=warmup_lr)
        assert [found.lr * found.lr_factor(n) for n in range(len(maths["lrs"]))] == pytest.approx(maths["lrs"], abs=far)


@pytest.mark.parametrize(
    ("schedule", "half_way"),
    [("linear", 0.1 + 0.9 * 0.5), ("cosine", 0.1 + 0.9 * 0.5), ("inverse_sqrt", math.sqrt(20 / 60))],
)
def test_a_schedule_falls_to_its_end(schedule: str, half_way: float) -> None:
    """lr at the end of the warm-up, the formula's value half way, min_lr from lr_decay_steps on, never rising."""
    found = rates(lr_schedule=schedule, warmup_steps=20, min_lr=1e-3, lr_decay_steps=100)
    factors = [found.lr_factor(step) for step in range(140)]
    assert factors[20] == 1.0 and factors[60] == pytest.approx(half_way)
    assert factors[101:] == pytest.approx([0.1] * 39)
    assert all(a >= b for a, b in itertools.pairwise(factors[20:]))


@pytest.mark.parametrize("shape", sorted(FALLING))
def test_wsd_is_stable_until_it_falls(shape: str) -> None:
    """Constant but for the last wsd_decay_steps; half way down each shape has its published value."""
    found = rates(lr_schedule="wsd", warmup_steps=10, wsd_decay_steps=20, wsd_decay=shape)
    factors = [found.lr_factor(step) for step in range(101)]
    assert set(factors[10:81]) == {1.0} and factors[100] == pytest.approx(0, abs=1e-12)
    half = {"linear": 0.5, "cosine": 0.5, "exponential": math.sqrt(2) - 1, "minus_sqrt": 1 - math.sqrt(0.5)}
    assert factors[90] == pytest.approx(half[shape])
    assert rates(lr_schedule="wsd").wsd_decay_steps == 10, "a tenth where nothing is said"


@pytest.mark.parametrize(("shape", "quarter"), [("linear", 0.02), ("cosine", 0.01 + 0.04 * (1 - math.sqrt(0.5)) / 2)])
def test_weight_decay_moves_too(shape: str, quarter: float) -> None:
    """From optim.weight_decay to weight_decay_end in weight_decay_steps, then it stays; without it nothing is set."""
    found = rates(weight_decay_end=0.05, weight_decay_steps=40, weight_decay_schedule=shape)
    assert [found.weight_decay_at(s) for s in (0, 10, 40, 90)] == pytest.approx([0.01, quarter, 0.05, 0.05])
    group = {"lr": 0.0, "base_lr": 2.0, "weight_decay": 0.5}
    found.set_on([group], 40)
    assert group == {"lr": 2.0, "base_lr": 2.0, "weight_decay": 0.05}
    rates().set_on([group], 0)
    assert group["weight_decay"] == 0.05 and group["lr"] == 0.5


def test_a_run_follows_its_schedule(tmp_path: Path) -> None:
    """What the optimizer was given is what the formula says, across a resume too."""
    arguments = ["--lr-schedule", "linear", "--min-lr", "1e-3", "--warmup-lr", "1e-3", "--warmup-steps", "2"]
    arguments += ["--lr-decay-steps", "4", "--weight-decay-end", "0.05", "--weight-decay-steps", "8"]
    train_toy(tmp_path, *arguments, "--steps", "3")
    run = train_toy(tmp_path, *arguments, "--steps", "5", "--load", "latest")
    assert run.booster.param_groups[0]["weight_decay"] == pytest.approx(0.03), "of update 4, half way"
    found = [row[0] for row in metrics_of(tmp_path / "toy", "lr")]
    assert found == pytest.approx([1e-3, 5.5e-3, 1e-2, 5.5e-3, 1e-3])


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"min_lr": 1e-3}, "min_lr=0.001 is not read .* set lr_schedule"),
        ({"lr_decay_steps": 5}, "lr_decay_steps=5 is not read"),
        ({"lr_schedule": "cosine", "wsd_decay": "cosine"}, "wsd_decay='cosine' is not read"),
        ({"warmup_steps": 0, "warmup_lr": 1e-3}, "set warmup_steps"),
        ({"weight_decay_steps": 5}, "set weight_decay_end"),
        ({"lr_schedule": "linear", "min_lr": 1.0}, "from 0 to optim.lr=0.01"),
        ({"lr_schedule": "linear", "warmup_steps": 200}, "do not fit into the 100 steps"),
        ({"lr_schedule": "wsd", "wsd_decay_steps": 98}, "wsd_decay_steps=98"),
        ({"lr_schedule": "linear", "lr_decay_steps": 0}, "1 or more"),
        ({"warmup_steps": 1.5}, "a share of them below 1"),
        ({"warmup_steps": -1}, "warmup_steps=-1"),
        ({"weight_decay_end": -0.1}, "weight_decay_end=-0.1 must be 0 or more"),
    ],
)
def test_wrong_or_ignored_rates_are_refused(changed: dict[str, Any], message: str) -> None:
    """The message names the setting and what to do."""
    with pytest.raises(ValueError, match=message):
        rates(**changed)


@pytest.mark.parametrize(
    "changed",
    [{"lr_schedule": "cosine"}, {"lr_schedule": "wsd"}, {"warmup_steps": 0.1}, {"weight_decay_end": 0.1}],
)
def test_an_end_that_is_not_known_is_asked_for(changed: dict[str, Any]) -> None:
    """Where the number of steps depends on draws; inverse_sqrt does without."""
    with pytest.raises(ValueError, match="set --steps"):
        rates(total_steps=None, **changed)
    assert rates(total_steps=None, lr_schedule="inverse_sqrt").lr_factor(12) == 0.5


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"type": "SGD", "betas": (0.8, 0.9)}, r"optim\.betas=\(0\.8, 0\.9\) is Adam's"),
        ({"type": "SGD", "eps": 1e-10}, r"optim\.eps=1e-10 is Adam's"),
        ({"momentum": 0.9}, r"optim\.momentum=0\.9 is SGD's"),
    ],
)
def test_numbers_of_another_optimizer_are_refused(changed: dict[str, Any], message: str) -> None:
    """SGD has no betas and no eps, Adam no momentum."""
    optim = {**dataclasses.asdict(Optim()), **changed}
    with pytest.raises(ValueError, match=message):
        optimizer_factory(optim, device=torch.device("cpu"))


def test_a_rate_of_0_is_refused() -> None:
    """All factors are shares of it."""
    with pytest.raises(ValueError, match=r"optim\.lr=0\.0 must be above 0"):
        rates(optim={**TOY.optim, "lr": 0.0})


@pytest.mark.parametrize("name", ["log_every", "ckpt_every"])
def test_negative_counts_are_refused(tmp_path: Path, name: str) -> None:
    """0 may mean never; -1 means nothing."""
    with pytest.raises(ValueError, match=f"{name}=-1 must be 0 or more"):
        build_toy(tmp_path, f"--{name}", "-1")


def test_hybrid_adam_is_found_without_the_booster_of_colossalai() -> None:
    """Its package imports two others that are not installed, on a GPU with any booster."""
    code = "from opensora_like.training.optim import hybrid_adam; print(hybrid_adam().__name__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=200)
    assert done.stdout.endswith("HybridAdam\n"), done.stderr[-2000:]


def test_all_groups_have_the_timeout_of_the_run() -> None:
    """Those of tensor and sequence parallelism, of checkpoints and of signals as well as the group of all ranks."""
    code = """
import torch, torch.distributed as dist
from opensora_like import runtime
runtime.start(timeout_minutes=7.0)
for group in (dist.group.WORLD, dist.new_group([0]), dist.new_group(backend="gloo")):
    print(group._get_backend(torch.device("cpu")).options._timeout.total_seconds())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=200)
    assert done.stdout.split() == ["420.0"] * 3, done.stderr[-2000:]
