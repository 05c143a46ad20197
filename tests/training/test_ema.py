"""The moving average: the published update once the decay has risen, and none before the weights have moved."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from opensora_like.boosters.ddp import DDPBooster
from opensora_like.training.ema import EMA

TENSORS = load_file(Path(__file__).parents[1] / "golden/opensora_maths_a.safetensors")


def test_an_update_is_the_recorded_one() -> None:
    """Of trained weights, at a decay of 0.99; the bias was frozen and stays. Early on we follow faster."""
    model = torch.nn.Linear(3, 2)
    model.load_state_dict({name: TENSORS[f"ema/ema_before.{name}"] for name in ("weight", "bias")})
    model.bias.requires_grad_(False)
    booster = DDPBooster(device=torch.device("cpu"), dtype="fp32", grad_clip=0.0)
    booster.prepare(model, lambda parameters: torch.optim.SGD(parameters, lr=0.0))
    late, early = EMA(booster, 0.99), EMA(booster, 0.99)
    for _, master in booster.master_shards():
        master.copy_(TENSORS["ema/model.weight"].view_as(master))
    late.update(10_000)
    (average,) = late.shards.values()
    torch.testing.assert_close(average.view(2, 3), TENSORS["ema/ema_after.weight"], atol=1e-6, rtol=0)
    assert torch.equal(TENSORS["ema/ema_after.bias"], TENSORS["ema/ema_before.bias"])
    early.update(1)
    (average,) = early.shards.values()
    expected = torch.lerp(TENSORS["ema/ema_before.weight"], TENSORS["ema/model.weight"], 1 - 2 / 11)
    torch.testing.assert_close(average.view(2, 3), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("decay", [-0.1, 1.0])
def test_a_decay_that_averages_nothing_is_refused(decay: float) -> None:
    """Below 0 or at 1."""
    booster = DDPBooster(device=torch.device("cpu"), dtype="fp32", grad_clip=0.0)
    with pytest.raises(ValueError, match="ema_decay="):
        EMA(booster, decay)
