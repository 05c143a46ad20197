"""A sample's error: recorded numbers of the published loss, its options, and weights by time."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from opensora_like.schedulers.flow_matching import FlowMatching
from opensora_like.training.errors import ErrorOptions, sample_errors
from tests.training.harness import train_toy

GOLDEN = Path(__file__).parents[1] / "golden"
FACTS = json.loads((GOLDEN / "videox_loss_a.json").read_text())
LOSS = load_file(GOLDEN / "videox_loss_a.safetensors")
PREDICTION, TARGET = LOSS["loss/pred"], LOSS["loss/target"]


def error(**options) -> torch.Tensor:
    return sample_errors(PREDICTION, TARGET, None, ErrorOptions(**options))


def test_the_published_numbers() -> None:
    """Cut at 50 and at 1, weighted by sample, and with a quarter of the changes between frames."""
    recorded, weight = FACTS["loss"], LOSS["loss/weighting"].flatten()
    assert error(error_cut=50.0).mean().item() == pytest.approx(recorded["plain"], abs=1e-6)
    assert error(error_cut=1.0).mean().item() == pytest.approx(recorded["threshold_1"], abs=1e-6)
    weighted = (error(error_cut=50.0) * weight).mean().item()
    assert weighted == pytest.approx(recorded["weighted"], abs=1e-6)
    motion = recorded["motion_sub"]
    assert error(motion_ratio=1.0).mean().item() == pytest.approx(motion["sub_loss"], rel=1e-6)
    total = error(motion_ratio=motion["ratio"], error_cut=50.0).mean().item()
    assert total == pytest.approx(motion["total"], rel=1e-6)


@pytest.mark.parametrize("name", ["sigma_sqrt", "cosmap"])
def test_weights_by_time_are_the_published_ones(name: str) -> None:
    """Of SD3, at recorded times; the one that has no bound is bounded at a thousandth."""
    flow = FlowMatching(weighting=name)
    t = torch.tensor(FACTS["sd3"]["sigmas"])
    expected = torch.tensor(FACTS["sd3"]["weight"][name])
    torch.testing.assert_close(flow.weight(t), expected, rtol=1e-5, atol=0)
    assert flow.weight(torch.zeros(1)).isfinite().all()


def test_cosmap_can_be_normed_and_sigma_sqrt_cannot() -> None:
    """The mean of 1 / t^2 does not exist."""
    flow = FlowMatching(weighting="cosmap", normalize_weight=True, t_distribution="uniform")
    t = (torch.arange(10_000) + 0.5) / 10_000
    assert flow.weight(t).mean().item() == pytest.approx(1, abs=1e-3)
    with pytest.raises(ValueError, match="normalize_weight=True is not read"):
        FlowMatching(weighting="sigma_sqrt", normalize_weight=True)


def test_motion_needs_three_frames_and_skips_given_ones() -> None:
    """Images and two frames have their plain error; a change to or from a given frame is not counted."""
    short = sample_errors(PREDICTION[:, :, :2], TARGET[:, :, :2], None, ErrorOptions(motion_ratio=0.5))
    assert torch.equal(short, sample_errors(PREDICTION[:, :, :2], TARGET[:, :, :2], None, ErrorOptions()))
    given_BT = torch.tensor([[True, False, False, False]] * 2)
    options = ErrorOptions(skip_given=True, motion_ratio=1.0)
    found = sample_errors(PREDICTION, TARGET, given_BT, options)
    torch.testing.assert_close(found, sample_errors(PREDICTION[:, :, 1:], TARGET[:, :, 1:], None, options))


def test_the_settings_reach_the_loss(tmp_path: Path) -> None:
    """From the command line to the step."""
    run = train_toy(tmp_path, "--steps", "1", "--motion_loss_ratio", "0.25", "--error_cut", "50.0")
    assert run.step_fn._options == ErrorOptions(False, 0.25, 50.0)
    with pytest.raises(ValueError, match=r"motion_loss_ratio=1.5 must be from 0 to 1"):
        train_toy(tmp_path / "wrong", "--motion_loss_ratio", "1.5")
