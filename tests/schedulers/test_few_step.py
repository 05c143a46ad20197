"""Few-step sampling: it stops where training did, adds the noise it is given, and ends at what the model points at."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from opensora_like.config import read_config
from opensora_like.evaluation.few_step import check_few_step
from opensora_like.schedulers.few_step import check_times, sample_few_step, shifted, walk
from opensora_like.schedulers.flow_matching import FlowMatching
from opensora_like.settings import InferenceConfig
from tests.training.harness import ROOT

TIMES = (1.0, 0.75, 0.5, 0.25)


@pytest.mark.parametrize("shift", [None, 3.0, 5.0, 12.0])
def test_a_model_that_knows_the_data_is_followed(shift: float | None) -> None:
    """Its velocity is asked at the shifted times, at states that are the data under the noise given for them."""
    flow = FlowMatching(shift=shift)
    x0, *noises = torch.randn(5, 2, 3, 2, 4, 4)
    times, asked = shifted(TIMES, flow, (2, 4, 4)), []

    def velocity(x: Tensor, t_B: Tensor, step: int) -> Tensor:
        torch.testing.assert_close(x, flow.add_noise(x0, noises[step], t_B), atol=1e-5, rtol=0)
        asked.append(t_B[0].item())
        return flow.target(x0, noises[step])

    found = sample_few_step(velocity, noises[0], times, flow=flow, noise=noises.__getitem__)
    torch.testing.assert_close(found, x0, atol=1e-5, rtol=0)
    assert asked == times
    alpha = shift or 1.0
    assert times == pytest.approx([alpha * t / (1 + (alpha - 1) * t) for t in TIMES])


def test_a_walk_in_two_parts_is_the_walk() -> None:
    """As the low expert goes on from where the high one stopped."""
    flow, (x, *noises) = FlowMatching(shift=5.0), torch.randn(4, 1, 3, 2, 4, 4)
    times = shifted(TIMES, flow, (2, 4, 4))
    draw, velocity = (lambda step: noises[step - 1]), (lambda x, t_B, step: 0.1 * (step + 1) * x)
    whole = walk(velocity, x, times, flow=flow, noise=draw)
    half = walk(velocity, x, times[:2], flow=flow, noise=draw)
    assert torch.equal(walk(velocity, half, times, flow=flow, noise=draw, first=1), whole)


@pytest.mark.parametrize("times", [(), (0.9, 0.5), (1.0, 1.0), (1.0, 0.5, 0.6), (1.0, 0.0)])
def test_times_that_cannot_be_walked_are_refused(times: tuple[float, ...]) -> None:
    """They begin at noise, fall and stay above the data."""
    with pytest.raises(ValueError, match=r"must begin at 1\.0, fall strictly"):
        check_times(times, where="few_step_times")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--few_step_times", "[1.0]"], "sampler='few_step' only"),
        (["--sampler", "few_step"], "needs few_step_times"),
        (["--sampler", "few_step", "--few_step_times", "[1.0, 0.5]"], "set num_steps=2"),
        (["--sampler", "few_step", "--few_step_times", "[1.0, 0.5]", "--num_steps", "2"], "set guidance=1.0"),
    ],
)
def test_settings_that_would_be_ignored_are_refused(arguments: list[str], message: str) -> None:
    """And each error says what to set."""
    with pytest.raises(ValueError, match=message):
        check_few_step(read_config(ROOT / "tests/training/toy_inference.py", arguments, schema=InferenceConfig).config)
