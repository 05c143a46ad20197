"""Samplers and guidance reproduce recorded runs, and cost only the forward passes that matter."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from opensora_like.schedulers.flow_matching import FlowMatching
from opensora_like.schedulers.grids import diffusers_grid
from opensora_like.schedulers.samplers import (
    Guidance,
    guidance_scales,
    guided,
    guided_text_and_image,
    guided_velocity,
    oscillating,
    sample_euler,
    sample_unipc,
)

GOLDEN = Path(__file__).parents[1] / "golden"
MATHS, JSON = (
    load_file(GOLDEN / "opensora_maths_a.safetensors"),
    json.loads((GOLDEN / "opensora_maths_a.json").read_text()),
)


class ToyModel:
    """The net of the recorded runs: elementwise in x, one number per token from `visual`, one per sample from `y`."""

    def __init__(self):
        self.batch_sizes = []

    def __call__(self, x, t_B, conditions):
        self.batch_sizes.append(len(x))
        offset = 0.3 * t_B + 0.4 * conditions["y"].mean(1) + 0.05 * conditions["guidance"]
        v = 0.7 * x + offset.view(-1, 1, 1, 1, 1)
        if "visual" in conditions:  # mean over the features of a token, which is a 2 x 2 patch
            token = F.avg_pool3d(conditions["visual"].mean(1, keepdim=True), (1, 2, 2))
            v = v + 0.2 * token.repeat_interleave(2, 3).repeat_interleave(2, 4)
        return torch.tanh(v)


def unpack(tokens, shape):
    B, C, T, H, W = shape
    x = tokens.view(B, T, H // 2, W // 2, C, 2, 2).permute(0, 4, 1, 2, 5, 3, 6)
    return x.reshape(shape)


@pytest.mark.parametrize("i", range(4))
def test_guided_euler_matches_the_published_denoiser(i):
    """Euler with guidance by text and image, oscillation and scaling over time equals Open-Sora's, to 1e-5."""
    case, z, y = JSON["denoise"][i], MATHS["denoise/z"], MATHS["denoise/y_vec"]
    visual = torch.cat([MATHS["denoise/masks"], MATHS["denoise/masks"] * MATHS["denoise/ref"]], dim=1)
    model = ToyModel()
    velocity = guided_velocity(
        model,
        {"y": y[:1], "guidance": torch.tensor([case["guidance"]]), "visual": visual},
        null_text={"y": y[1:2]},
        null_image={"y": y[2:], "visual": torch.zeros_like(visual)},
        guidance=Guidance(
            text=case["guidance"],
            image=case["guidance_img"],
            text_osci=case["text_osci"],
            image_osci=case["image_osci"],
            scale_temporal_osci=case["temporal"],
        ),
        num_steps=case["steps"],
    )
    x = sample_euler(velocity, z, torch.tensor(case["timesteps"]))
    torch.testing.assert_close(x, unpack(MATHS[f"denoise/i2v/{i}"], z.shape), atol=1e-5, rtol=0)
    assert len(model.batch_sizes) == case["steps"]
    # the published loop runs three branches at every step
    assert (
        model.batch_sizes
        == {
            0: [3] * 6,
            1: [3] * 11 + [1, 3, 1, 3, 1],
            2: [3] * 11 + [1, 3, 1],
            3: [2] * 5,
        }[i]
    )


def test_unguided_euler_matches_the_published_distilled_denoiser():
    """A distilled model is run once per step, with its guidance as a condition."""
    z = MATHS["denoise/z"]
    velocity = guided_velocity(
        ToyModel(),
        {"y": MATHS["denoise/y_vec"][:1], "guidance": torch.tensor([3.5])},
        null_text={},
        null_image={},
        guidance=Guidance(text=1.0).for_task("t2v"),
        num_steps=5,
    )
    x = sample_euler(velocity, z, torch.tensor(JSON["denoise"][3]["timesteps"]))
    torch.testing.assert_close(x, unpack(MATHS["denoise/distilled"], z.shape), atol=1e-5, rtol=0)


@pytest.mark.parametrize("shift", [1.0, 3.0, 7.0])
@pytest.mark.parametrize("num_steps", [1, 2, 3, 5, 20])
def test_unipc_matches_diffusers(num_steps, shift):
    """UniPC equals diffusers' scheduler on a velocity that is not linear, to 1e-5."""
    from diffusers import UniPCMultistepScheduler

    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift)
    scheduler.set_timesteps(num_steps)
    x = torch.randn(2, 3, 2, 4, 4, generator=torch.Generator().manual_seed(0))

    def field(x, t):
        return torch.tanh(0.7 * x + 0.3 * t) + 0.4 * torch.sin(3 * t)

    expected = x
    for i, t in enumerate(scheduler.timesteps):
        expected = scheduler.step(field(expected, scheduler.sigmas[i]), t, expected).prev_sample
    seen = []

    def velocity(x, t_B, step):
        seen.append(step)
        return field(x, t_B.view(-1, 1, 1, 1, 1))

    actual = sample_unipc(velocity, x, scheduler.sigmas)
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)
    assert seen == list(range(num_steps)) and actual.dtype == torch.float32


@pytest.mark.parametrize("sample", [sample_euler, sample_unipc])
def test_samplers_follow_a_straight_flow_exactly(sample):
    """With the true velocity of one clip, any number of steps ends on the data."""
    x0, noise = torch.randn(2, 2, 3, 2, 4, 4, generator=torch.Generator().manual_seed(1))
    flow = FlowMatching(sigma_min=0.0, shift=5.0)
    for num_steps in (1, 4, 11):
        x = sample(lambda x, t_B, step: flow.target(x0, noise), noise, flow.times(num_steps, (2, 4, 4)))
        torch.testing.assert_close(x, x0, atol=1e-5, rtol=0)


def test_unipc_converges_faster_than_euler():
    """On a smooth flow, ten steps of UniPC are nearer to the solution than ten of Euler."""
    velocity = lambda x, t_B, step: torch.tanh(x) - 0.5 * torch.cos(2 * t_B.view(-1, 1, 1, 1, 1))  # noqa: E731
    x, flow = torch.randn(1, 2, 2, 3, 3, generator=torch.Generator().manual_seed(2)), FlowMatching()
    exact = sample_euler(velocity, x, flow.times(4000, (2, 3, 3)))
    times = flow.times(10, (2, 3, 3))
    euler, unipc = ((s(velocity, x, times) - exact).abs().max() for s in (sample_euler, sample_unipc))
    assert unipc < euler / 5


@pytest.mark.parametrize("times", [[0.0, 1.0], [1.0], [1.0, 0.5, 0.5, 0.0], [1.5, 0.0], [1.0, -0.1]])
def test_times_that_do_not_fall_are_refused(times):
    """A schedule that rises, stands still or leaves [0, 1] is an error, not a wrong video."""
    for sample in (sample_euler, sample_unipc):
        with pytest.raises(ValueError, match="times="):
            sample(lambda x, t_B, step: x, torch.zeros(1, 1, 1, 2, 2), torch.tensor(times))


def test_oscillation_matches_the_published_one():
    """The scale holds for the first steps and at even ones."""
    for case in JSON["oscillation"]:
        found = [oscillating(case["scale"], i, case["force_num"]) for i in range(len(case["values"]))]
        assert found == case["values"]


def test_image_scale_rises_over_time_and_sinks_over_steps():
    """With temporal scaling the first latent frame is never guided, the last most, and less in later steps."""
    guidance = Guidance(image=3.0, image_osci=True, scale_temporal_osci=True)
    _, first = guidance_scales(0, 50, guidance=guidance, num_latent_frames=5)
    _, later = guidance_scales(40, 50, guidance=guidance, num_latent_frames=5)
    assert torch.equal(first, torch.tensor([1.0, 1.5, 2.0, 2.5, 3.0]))
    torch.testing.assert_close(later, torch.linspace(1, 1.4, 5))
    assert guidance_scales(41, 50, guidance=guidance, num_latent_frames=5) == (1.0, 1.0)
    assert guidance.for_task("v2v_head") == Guidance(image=3.0, scale_temporal_osci=False)
    assert guidance.for_task("t2v").image == 1.0


def three_branches(text, image):
    """Guidance over a model whose branches answer 1, 10 and 100; and how many of them ran."""
    sizes = []

    def model(x, t_B, conditions):
        sizes.append(len(x) // 2)
        return conditions["answer"].view(-1, 1, 1, 1, 1).expand_as(x)

    velocity = guided_velocity(
        model,
        {"answer": torch.full((2,), 1.0)},
        null_text={"answer": torch.full((2,), 10.0)},
        null_image={"answer": torch.full((2,), 100.0)},
        guidance=Guidance(text=text, image=image, text_osci=False, image_osci=False, scale_temporal_osci=False),
        num_steps=1,
    )
    return velocity(torch.zeros(2, 1, 2, 2, 2), torch.ones(2), 0), sizes


def test_branches_that_count_for_nothing_are_not_run():
    """Whatever branches are left out, the result is the formula with all three."""
    ones = torch.ones(2, 1, 2, 2, 2)
    for text in (0.0, 1.0, 3.0, 7.5):
        for image in (0.0, 1.0, 3.0):
            v, sizes = three_branches(text, image)
            expected = guided_text_and_image(1 * ones, 10 * ones, 100 * ones, text=text, image=image)
            torch.testing.assert_close(v, expected)
            assert sizes == [sum(factor != 0 for factor in (text, image - text, 1 - image))]
    torch.testing.assert_close(guided(3 * ones, ones, 2.0), 5 * ones)


def test_conditions_that_cannot_be_guided_are_refused():
    """A null for nothing, of another shape, or missing is an error before the first forward pass."""
    x, ok = {"a": torch.zeros(1, 4)}, {"null_text": {}, "null_image": {}, "num_steps": 1}
    plain = Guidance(text=1.0).for_task("t2v")
    with pytest.raises(ValueError, match="replaces no condition"):
        guided_velocity(ToyModel(), x, **{**ok, "null_text": {"b": torch.zeros(1, 4)}}, guidance=plain)
    with pytest.raises(ValueError, match="same shape"):
        guided_velocity(ToyModel(), x, **{**ok, "null_text": {"a": torch.zeros(1, 5)}}, guidance=plain)
    with pytest.raises(ValueError, match="needs null_text"):
        guided_velocity(ToyModel(), x, **ok, guidance=Guidance().for_task("t2v"))
    with pytest.raises(ValueError, match="needs null_image"):
        guided_velocity(ToyModel(), x, **ok, guidance=Guidance())


@pytest.mark.parametrize("shift", [1.0, 3.0, 5.0])
@pytest.mark.parametrize("num_steps", [1, 2, 3, 10, 37, 48, 50])
def test_grids_are_those_of_diffusers(num_steps, shift):
    """Times and what the model is told of them equal both schedulers', to float32's last bit."""
    from diffusers import FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler

    published = {
        "unipc": UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift),
        "euler": FlowMatchEulerDiscreteScheduler(shift=shift),
    }
    for sampler, scheduler in published.items():
        scheduler.set_timesteps(num_steps)
        grid = diffusers_grid(num_steps, sampler=sampler, shift=shift)
        torch.testing.assert_close(grid.times, scheduler.sigmas, atol=1e-6, rtol=0)
        torch.testing.assert_close(grid.told * 1000, scheduler.timesteps.float(), atol=1e-3, rtol=0)
    with pytest.raises(ValueError, match="num_steps"):
        diffusers_grid(0, sampler="euler", shift=shift)
