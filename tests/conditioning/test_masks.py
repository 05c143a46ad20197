"""Given frames: conditions equal the recorded ones, and drawing them never changes a config."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from opensora_like.conditioning.masks import (
    TASKS,
    check_condition_config,
    draw_tasks,
    fits,
    given_latent_frames,
    inference_condition,
    reference_loss_mask,
    visual_condition,
)

GOLDEN = Path(__file__).parents[1] / "golden"
MATHS, JSON = (
    load_file(GOLDEN / "opensora_maths_a.safetensors"),
    json.loads((GOLDEN / "opensora_maths_a.json").read_text()),
)


class ToyAutoencoder:
    """The one of the recorded runs: 2x2 means, a mix of channels, and the mean of every group of frames."""

    latent_channels, spatial_stride = 4, 2

    def __init__(self, *, is_causal, temporal_stride, mix=MATHS["cond/mix"]):
        self.is_causal, self.temporal_stride, self.mix = is_causal, temporal_stride, mix
        self.calls = []

    def encode(self, video_BCTHW, generator=None):
        self.calls.append(tuple(video_BCTHW.shape))
        z = F.avg_pool3d(torch.einsum("oc,bcthw->bothw", self.mix, video_BCTHW), (1, 2, 2)) + 0.1
        if z.shape[2] == 1:
            return z
        head = z[:, :, :1] if self.is_causal else z[:, :, :0]
        rest = F.avg_pool3d(z[:, :, head.shape[2] :], (self.temporal_stride, 1, 1))
        return torch.cat([head, rest], dim=2)


def case_of(case):
    autoencoder = ToyAutoencoder(is_causal=case["causal"], temporal_stride=case["tc"])
    video = MATHS["cond/x"][:, :, : case["frames"]]
    return autoencoder, video, autoencoder.encode(video)


# `pad` repeats the end frames before encoding; no published config turns it on, and its tail takes a wrong frame
CASES = [c for c in JSON["cond"] if not c["pad"]]


@pytest.mark.parametrize("case", [c for c in CASES if not c["error"]], ids=lambda c: c["key"])
def test_visual_condition_matches_the_published_one(case):
    """Masks and latents of every task, length, stride and kind of autoencoder equal Open-Sora's."""
    autoencoder, video, x0 = case_of(case)
    visual, mask_BT = visual_condition(autoencoder, video, x0, [case["mask"]])
    assert mask_BT.dtype == torch.bool and mask_BT[0].int().tolist() == case["mask_frames"]
    assert list(visual.shape) == case["cond_shape"] and visual.dtype == x0.dtype
    torch.testing.assert_close(visual.double().sum().item(), case["cond_sum"], atol=1e-4, rtol=0)
    torch.testing.assert_close(visual.double().abs().sum().item(), case["cond_abs_sum"], atol=1e-4, rtol=0)
    if case["key"] + "/cond" in MATHS:
        torch.testing.assert_close(x0, MATHS[case["key"] + "/x0"], atol=1e-6, rtol=0)
        torch.testing.assert_close(visual, MATHS[case["key"] + "/cond"], atol=1e-6, rtol=0)


def test_tasks_too_long_for_a_clip_are_not_drawn_and_come_back():
    """Where the published system removes a task from the config for good, here only this clip does without it."""
    cases = [c for c in CASES if c["error"]]
    assert len(cases) > 20
    for case in cases:
        autoencoder, video, x0 = case_of(case)
        kind = {"is_causal": case["causal"], "temporal_stride": case["tc"]}
        assert not fits(case["mask"], x0.shape[2], **kind)
        config = {case["mask"]: 5.0, "t2v": 1.0}
        generators = [torch.Generator().manual_seed(s) for s in range(6)]
        assert draw_tasks(config, x0.shape[2], generators, case["causal"], temporal_stride=case["tc"]) == ["t2v"] * 6
        assert config == {case["mask"]: 5.0, "t2v": 1.0}
        assert case["mask"] in draw_tasks(config, 40, generators, case["causal"], temporal_stride=case["tc"])
        with pytest.raises(ValueError, match="add t2v"):
            draw_tasks({case["mask"]: 1.0}, x0.shape[2], generators, case["causal"], temporal_stride=case["tc"])
        if sum(given_latent_frames(case["mask"], **kind)) > x0.shape[2]:
            with pytest.raises(ValueError, match="where it fits"):
                visual_condition(autoencoder, video, x0, [case["mask"]])


@pytest.mark.parametrize("is_causal", [True, False])
def test_a_batch_of_mixed_tasks_equals_its_samples_one_by_one(is_causal):
    """Samples share encoder calls without touching each other: one call per length of the given pieces."""
    autoencoder = ToyAutoencoder(is_causal=is_causal, temporal_stride=4)
    frames = 69 if is_causal else 68
    video = torch.randn(9, 3, frames, 4, 4, generator=torch.Generator().manual_seed(0))
    x0, tasks = autoencoder.encode(video), [*TASKS, "i2v_loop"]
    alone = [visual_condition(autoencoder, video[i : i + 1], x0[i : i + 1], [task]) for i, task in enumerate(tasks)]
    autoencoder.calls.clear()
    visual, mask_BT = visual_condition(autoencoder, video, x0, tasks)
    torch.testing.assert_close(visual, torch.cat([v for v, _ in alone]), atol=1e-6, rtol=0)
    assert torch.equal(mask_BT, torch.cat([m for _, m in alone]))
    expected = {(6, 3, 1, 4, 4), (2, 3, 33, 4, 4), (2, 3, 65, 4, 4)} if is_causal else {(6, 3, 1, 4, 4)}
    assert set(autoencoder.calls) == expected and len(autoencoder.calls) == len(expected)
    assert torch.equal(visual[:, 0, :, 0, 0].bool(), mask_BT)


def test_latents_without_pixels_serve_what_needs_no_encoding():
    """Cached latents do for t2v and images; a task that must encode its frames says what is missing."""
    autoencoder = ToyAutoencoder(is_causal=True, temporal_stride=4)
    x0 = torch.randn(1, 4, 10, 2, 2)
    assert visual_condition(autoencoder, None, x0, ["t2v"])[0].abs().sum() == 0
    assert visual_condition(autoencoder, None, x0[:, :, :1], ["i2v_head"])[0].abs().sum() == 0
    with pytest.raises(ValueError, match="needs pixels"):
        visual_condition(autoencoder, None, x0, ["i2v_head"])
    with pytest.raises(ValueError, match="2 tasks for 1"):
        visual_condition(autoencoder, None, x0, ["t2v", "t2v"])


def test_tasks_are_drawn_by_weight_from_each_samples_generator():
    """Frequencies follow the weights; neither the batch nor the order of the config changes a sample's task."""
    config = {"t2v": 1.0, "i2v_head": 5.0, "i2v_loop": 1.0, "i2v_tail": 1.0, "v2v_head": 0.0}

    def draw(config, rows, length=10):
        return draw_tasks(config, length, [torch.Generator().manual_seed(r) for r in rows], True)

    tasks = draw(config, range(4000))
    assert set(tasks) == set(config) - {"v2v_head"}
    assert abs(tasks.count("i2v_head") / 4000 - 5 / 8) < 0.04
    assert draw(config, range(100, 110)) == tasks[100:110]
    assert draw(dict(reversed(config.items())), range(200)) == tasks[:200]
    assert set(draw(config, range(50), length=1)) == {"t2v"}
    assert "i2v_loop" not in draw(config, range(200), length=2)  # both of its frames would be given


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"i2v_haed": 1.0}, "i2v_head"),
        ({"t2v": -1.0}, "t2v=-1.0"),
        ({"t2v": float("nan")}, "nan"),
        ({"t2v": 0.0}, "draws nothing"),
        ({}, "draws nothing"),
        ({"v2v_head": 1.0}, "fits 5 latent frames"),
    ],
)
def test_wrong_task_weights_are_refused(config, message):
    """Unknown names, impossible weights, and lengths without a task are found when the config is read."""
    with pytest.raises(ValueError, match=message):
        check_condition_config(config, num_latent_frames=[1, 10, 5])
    check_condition_config({"v2v_head": 1.0, "t2v": 0.5}, num_latent_frames=[1, 10, 5])


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("task", list(TASKS))
def test_inference_condition_matches_the_published_one(task, is_causal):
    """Masks and reference latents for sampling equal Open-Sora's."""
    key = f"infcond/{task}/causal{int(is_causal)}"
    a, b = MATHS["infcond/refA"], MATHS["infcond/refB"]
    refs = [[a, b]] if task == "i2v_loop" else [[a]]
    visual, mask_BT = inference_condition(task, refs, latent_shape=(3, 19, 2, 2), is_causal=is_causal)
    assert torch.equal(mask_BT.float(), MATHS[f"{key}/masks"][:, 0])
    assert torch.equal(visual[:, 1:], MATHS[f"{key}/ref"])
    assert torch.equal(visual[:, 0, :, 1, 1], mask_BT.float())


def test_references_that_cannot_serve_are_refused():
    """A missing, short or wrong-sized reference is an error; the published system would make a t2v video."""
    shape = {"latent_shape": (3, 19, 2, 2), "is_causal": True}
    assert inference_condition("t2v", [[], []], **shape)[0].abs().sum() == 0
    for refs, message in (([[]], "no reference"), ([[torch.zeros(3, 8, 2, 2)]], r"\[3, 8, 2, 2\]")):
        with pytest.raises(ValueError, match=message):
            inference_condition("v2v_head", refs, **shape)
    with pytest.raises(ValueError, match="resize"):
        inference_condition("i2v_head", [[torch.zeros(3, 1, 4, 2)]], **shape)
    with pytest.raises(ValueError, match="none is left"):
        inference_condition("v2v_head", [[torch.zeros(3, 9, 2, 2)]], latent_shape=(3, 9, 2, 2), is_causal=True)
    with pytest.raises(ValueError, match="i2v_head"):
        inference_condition("i2v_heads", [[]], **shape)


def masked_loss(masked_frames):
    """Per-element loss of the recorded tensors, weighted by the frames that are made."""
    dims = JSON["loss_dims"]
    loss = ((MATHS["loss/pred"] - MATHS["loss/target"]) ** 2).unflatten(1, (dims["T"], -1))
    mask_BT = torch.zeros(3, dims["T"], dtype=torch.bool)
    for sample, frames in enumerate(masked_frames):
        mask_BT[sample, frames] = True
    return (loss * reference_loss_mask(mask_BT)[:, :, None, None]).mean().item()


def test_loss_without_given_frames_matches_the_published_intention():
    """A sample's loss is the mean over the frames it has to make; equal to Open-Sora's where that drops frames."""
    published = {json.dumps(c["masked_frames"]): c["loss"] for c in JSON["loss"]}
    for frames in ([[0], [], [4]], [[0], [0], [0]]):
        assert masked_loss(frames) == pytest.approx(published[json.dumps(frames)], abs=1e-6)
    # it drops first and last frame only, and only if nothing else is given: the two other samples keep all theirs
    assert masked_loss([[0, 4], [], []]) == pytest.approx(published["[[0, 4], [0, 1], [2]]"], abs=1e-6)
    assert masked_loss([[], [], []]) == pytest.approx(published["[[3, 4], [1], []]"], abs=1e-6)
    assert masked_loss([[], [], []]) == pytest.approx(JSON["loss_nomask"], abs=1e-6)


def test_given_frames_do_not_reach_the_loss():
    """Whatever the loss on given frames, v2v included, it changes nothing; a clip without frames to make counts 0."""
    mask_BT = torch.tensor([[True, True, False, False], [False] * 4, [True] * 4])
    weights = reference_loss_mask(mask_BT)
    assert torch.equal(weights, torch.tensor([[0, 0, 2.0, 2.0], [1.0] * 4, [0.0] * 4]))
