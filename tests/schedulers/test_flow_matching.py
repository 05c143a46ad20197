"""Flow matching reproduces the recorded numbers of two published systems, and keeps its own promises."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from opensora_like.registry import SCHEDULERS, build
from opensora_like.schedulers.distributions import mode_time
from opensora_like.schedulers.flow_matching import FlowMatching, bell_weight, linear_shift, shift_time

GOLDEN = Path(__file__).parents[1] / "golden"
MATHS, MATHS_JSON = (
    load_file(GOLDEN / "opensora_maths_a.safetensors"),
    json.loads((GOLDEN / "opensora_maths_a.json").read_text()),
)
DFM, DFM_JSON = load_file(GOLDEN / "dfm_a.safetensors"), json.loads((GOLDEN / "dfm_a.json").read_text())
SHAPE = (1, 16, 16)


def close(actual, expected, atol=1e-6):
    torch.testing.assert_close(
        torch.as_tensor(actual).double(), torch.as_tensor(expected).double(), atol=atol, rtol=1e-6
    )


def pack(x, patch_size):
    """[B, C, T, H, W] -> [B, tokens, C * patch^2], the layout of the recorded tensors."""
    B, C, T, H, W = x.shape
    p = patch_size
    x = x.view(B, C, T, H // p, p, W // p, p).permute(0, 2, 3, 5, 1, 4, 6)
    return x.reshape(B, T * (H // p) * (W // p), C * p * p)


def unpack(tokens, shape, patch_size):
    B, C, T, H, W = shape
    p = patch_size
    x = tokens.view(B, T, H // p, W // p, C, p, p).permute(0, 4, 1, 2, 5, 3, 6)
    return x.reshape(shape)


def quantile_of(normal):
    return torch.special.ndtr(normal.double())


def draw(flow, rows, latent_shape=SHAPE):
    return flow.draw_t([torch.Generator().manual_seed(int(r)) for r in rows], latent_shape)


# -- recorded numbers -------------------------------------------------------------------------------------------------


def test_time_shift_and_its_line_match_the_published_ones():
    """The shift, and the line that its strength lies on, equal Open-Sora's."""
    for alpha, expected in zip(MATHS["time_shift/alpha"], MATHS["time_shift/value"], strict=True):
        close(shift_time(MATHS["time_shift/t"], alpha), expected)
    for case in MATHS_JSON["res_lin"]:
        ends = {"base_tokens": case["x1"], "base_shift": case["y1"], "max_tokens": case["x2"], "max_shift": case["y2"]}
        close([linear_shift(x, **ends) for x in case["x"]], case["y"])


@pytest.mark.parametrize("case", MATHS_JSON["schedule"], ids=lambda c: str(c["args"]))
def test_times_match_the_published_schedule(case):
    """Sampling times from 1 to 0 equal Open-Sora's for every shape and shift."""
    args = dict(case["args"])
    num_steps, tokens, frames = args.pop("num_steps"), args.pop("image_seq_len"), args.pop("num_frames")
    shift = args.pop("shift_alpha", "resolution" if args.pop("shift", True) else None)
    flow = FlowMatching(shift=shift, patch_size=1, **args)
    times = flow.times(num_steps, (frames, tokens, 1))
    assert times.dtype == torch.float32 and times[0] == 1 and times[-1] == 0
    close(times, case["timesteps"])


@pytest.mark.parametrize("i", range(3))
def test_training_maths_match_the_published_step(i):
    """t from a normal draw, x_t and the target equal Open-Sora's.

    Its token count is H*W//4 whatever the patch size, which is patch_size=2 here; see the next test for patch 1.
    """
    case, prefix = MATHS_JSON["train"][i], f"train/{i}"
    flow = FlowMatching(shift="resolution", patch_size=2, sigma_min=case["sigma_min"])
    x0, normal = MATHS[f"{prefix}/x0"], MATHS[f"{prefix}/normal"]
    noise = unpack(MATHS[f"{prefix}/x1"], x0.shape, case["patch_size"])
    close(flow.alpha(tuple(x0.shape[2:])), case["shift_alpha"])
    t = flow.t_from_base(torch.ones_like(normal), quantile_of(normal), tuple(x0.shape[2:]))
    close(t, MATHS[f"{prefix}/t"])
    close(pack(flow.add_noise(x0, noise, t), case["patch_size"]), MATHS[f"{prefix}/xt"])
    close(pack(flow.target(x0, noise), case["patch_size"]), MATHS[f"{prefix}/vt"])


def test_shift_counts_the_tokens_the_model_sees():
    """Training and sampling use one shift at patch 1, where the published system uses two (2.663 and 3.300)."""
    latents = (8, 24, 24)  # 768 x 768, 32 frames, a 32x autoencoder
    close(FlowMatching(shift="resolution", patch_size=2).alpha(latents), 2.6634, atol=1e-3)
    close(FlowMatching(shift="resolution", patch_size=1).alpha(latents), 3.3, atol=1e-3)
    examples = {(33, 24, 42): 5.7326, (1, 72, 128): 2.0667, (33, 72, 128): 11.872, (1, 128, 128): 3.0}
    for shape, alpha in examples.items():
        close(FlowMatching(shift="resolution").alpha(shape), alpha, atol=1e-3)


def test_whole_training_batches_match_the_published_ones():
    """From recorded draws, model inputs and targets equal those of the published training script."""
    golden, cases = (
        load_file(GOLDEN / "opensora_train_a.safetensors"),
        json.loads((GOLDEN / "opensora_train_a.json").read_text())["cases"],
    )
    flow = FlowMatching(shift="resolution")
    for i, case in enumerate(cases):
        frames, height, width = case["video"][1:]
        latent_frames = (frames - 1) // case["tc"] + 1 if case["causal"] else frames // case["tc"]
        shape = (latent_frames, height // case["sp"], width // case["sp"])
        normal = golden[f"{i}/draw/0_randn"]
        t = flow.t_from_base(torch.ones_like(normal), quantile_of(normal), shape)
        close(t, golden[f"{i}/inp/timesteps"])
        x0, noise = golden[f"{i}/x_0"], golden[f"{i}/x_1"]
        x_t = flow.add_noise(x0, noise, t)
        close(x_t, golden[f"{i}/inp/img"])
        loss = ((torch.tanh(x_t) * 0.5 - flow.target(x0, noise)) ** 2).mean()
        close(loss, case["loss_of_half_tanh"], atol=1e-5)


@pytest.mark.parametrize("case", DFM_JSON["sample"], ids=lambda c: c["key"])
def test_times_match_the_other_published_samplers(case):
    """Every distribution of t equals DFM's and Automodel's, given their base draws.

    Their gate is one draw for the whole batch, here one per sample; their unknown names silently mean uniform; their
    times before the shift are 1e-5 or more, which t_min expresses.
    """
    mode, cfg = case["mode"], case["cfg"]
    if mode == "unknown":
        with pytest.raises(ValueError, match="unknown"):
            FlowMatching(t_distribution=mode)
        return
    arguments = {"t_distribution": mode, "shift": cfg.get("flow_shift", 3.0)}
    floor = shift_time(torch.tensor(1e-5, dtype=torch.float64), arguments["shift"]).item()
    arguments.update(t_min=max(floor, cfg.get("sigma_min", 0.0)), t_max=cfg.get("sigma_max", 1.0))
    if mode == "logit_normal":
        arguments.update(logit_mean=cfg.get("logit_mean", 0.0), logit_std=cfg.get("logit_std", 1.0))
    if mode != "uniform":
        arguments.update(mix_uniform_ratio=cfg.get("mix_uniform_ratio", 0.1))
    flow = FlowMatching(**arguments)
    uniform, gate = DFM["draws/uniform"], torch.full((16,), case["gate_draw"])
    is_uniform = mode in ("uniform", "mode") or case["method"] == "uniform"
    quantile = uniform.double() if is_uniform else quantile_of(DFM["draws/normal"])
    close(flow.t_from_base(gate, quantile, SHAPE), DFM[case["key"] + "/sigma"])


def test_weights_densities_and_shifts_match_the_other_published_ones():
    """Both weightings, the mode map and the constant shift equal DFM's."""
    t = DFM["time_shift/t"]
    close(FlowMatching(shift=3.0).shift_t(t, SHAPE), DFM["time_shift/constant/L256/default"])
    close(FlowMatching(shift=5.0).shift_t(t, SHAPE), DFM["time_shift/constant/L256/alt"])
    close(FlowMatching().shift_t(t, SHAPE), DFM["time_shift/none/L256/default"])
    root = FlowMatching(shift="root", max_tokens=16384, patch_size=1)
    for length in (256, 4096, 16384, 65536):
        for name, ends in (("default", (0.5, 1.15)), ("alt", (0.3, 2.0))):
            line = {"base_tokens": 0, "base_shift": ends[0], "max_shift": ends[1]}
            exponential = FlowMatching(shift="exponential", patch_size=1, **line)
            for flow, kind in ((exponential, "linear"), (root, "sqrt")):
                shape = (16, length // 16, 1)  # all frames are counted
                close(flow.shift_t(t, shape), DFM[f"time_shift/{kind}/L{length}/{name}"], atol=2e-6)
    for shift in (3.0, 7.0):
        close(FlowMatching(shift=shift, weighting="linear").weight(t), DFM[f"loss_weight/shift{shift:.0f}"])
    close(bell_weight((torch.arange(200) + 0.5) / 200, 200), DFM["loss_weight/bsmntw_200"])
    close(mode_time(DFM["draws/uniform"], 1.29), DFM["density/mode"])


def test_beta_times_have_the_published_shape():
    """Beta(2.5, 1.5) has the mean and variance of its formula, to 1e-6, and the quantiles of a recorded sample."""
    recorded = DFM_JSON["beta"]
    flow = FlowMatching(t_distribution="beta", beta_alpha=recorded["alpha"], beta_beta=recorded["beta"])
    quantile = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
    t = flow.t_from_base(torch.ones_like(quantile), quantile, SHAPE).double()
    close(t.mean(), 0.625)
    close(t.var(), 0.046875)
    at = torch.tensor([0.05, 0.25, 0.5, 0.75, 0.95], dtype=torch.float64)
    close(t.quantile(at), recorded["quantiles"], atol=5e-3)
    arcsine = FlowMatching(t_distribution="beta", beta_alpha=0.5, beta_beta=0.5)
    close(arcsine.t_from_base(torch.ones_like(at), at, SHAPE), torch.sin(math.pi / 2 * at) ** 2)


def test_without_a_shift_times_and_weights_match_the_published_ones():
    """The published switch that turns the shift off leaves the slope of the weights at it: weight_slope."""
    flow = FlowMatching(t_distribution="uniform", weighting="linear", weight_slope=3.0)
    t = DFM["time_shift/t"]
    close(flow.weight(t), DFM["loss_weight/shift3"])
    clamped = FlowMatching(t_distribution="uniform", t_min=0.1, t_max=0.8)
    close(clamped.t_from_base(torch.ones(16), DFM["draws/uniform"], SHAPE), DFM["sample/no_shift/sigma"])


@pytest.mark.parametrize("i", range(3))
def test_a_whole_weighted_loss_matches_the_published_pipeline(i):
    """Noise, target, weight and loss together equal a recorded step of DFM's pipeline on a linear net."""
    case, g = (
        DFM_JSON["step"][i],
        {k.removeprefix(f"step/{i}/"): v for k, v in DFM.items() if k.startswith(f"step/{i}/")},
    )
    cfg, x0, noise = case["cfg"], g["latents"], g["noise"]
    mode = cfg["timestep_sampling"]
    flow = FlowMatching(
        t_distribution=mode,
        shift=cfg.get("flow_shift", 3.0),
        sigma_min=0.0,
        weighting="linear" if cfg.get("use_loss_weighting", True) else None,
    )
    quantile = quantile_of(g["normal"]) if mode == "logit_normal" else g["uniform"]
    t = flow.t_from_base(torch.ones_like(quantile), quantile, SHAPE)
    close(t.mean(), case["metrics"]["sigma_mean"])
    x_t = flow.add_noise(x0, noise, t)
    close(x_t.max(), case["metrics"]["noisy_max"], atol=1e-5)
    context = g["text"].mean(1) @ g["weights/K"]
    at = (slice(None), slice(None), *[None] * (x0.ndim - 2))
    v = torch.einsum("oc,bc...->bo...", g["weights/W"], x_t)
    v = v + g["weights/b"][None][at] + (t[:, None] * g["weights/a"])[at] + context[at]
    loss = flow.weight(t).view(-1, *[1] * (x0.ndim - 1)) * (v - flow.target(x0, noise)) ** 2
    close(loss, g["weighted_loss"], atol=1e-5)
    close(loss.mean(), g["average"], atol=1e-5)


# -- promises ---------------------------------------------------------------------------------------------------------


def test_true_velocity_reaches_data_in_one_step():
    """From any t, the target leads back to x0, and x_t is noise at 1: fixes sign, direction and scale together."""
    x0, noise = torch.randn(2, 4, 16, 5, 8, 8, generator=torch.Generator().manual_seed(0))
    t_B = torch.tensor([0.0, 0.25, 0.5, 1.0])
    for sigma_min in (0.0, 1e-5, 0.1):
        flow = FlowMatching(sigma_min=sigma_min)
        x_t = flow.add_noise(x0, noise, t_B)
        close(flow.to_x0(x_t, flow.target(x0, noise), t_B), x0, atol=1e-5)
        close(x_t[3], noise[3])
        close(x_t[0], x0[0] + sigma_min * noise[0])
    assert x_t.dtype == flow.target(x0.bfloat16(), noise).dtype == torch.float32


@pytest.mark.parametrize("name", ["logit_normal", "uniform", "mode", "mix", "lognorm", "beta"])
def test_a_samples_time_depends_on_its_generator_alone(name):
    """Batches cut or ordered differently give each row the same time, the uniform mixture included."""
    flow = FlowMatching(t_distribution=name, mix_uniform_ratio=0.0 if name == "uniform" else 0.5, shift="resolution")
    together = draw(flow, range(8))
    apart = torch.cat([draw(flow, [r]) for r in reversed(range(8))]).flip(0)
    assert together.dtype == torch.float32 and torch.equal(together, apart)
    assert len(set(together.tolist())) == 8


def test_uniform_mixture_is_decided_per_sample():
    """Within one batch some samples are uniform and some are not, in the ratio asked for."""
    rows = range(2000)
    plain = draw(FlowMatching(logit_mean=6.0), rows)
    mixed = draw(FlowMatching(logit_mean=6.0, mix_uniform_ratio=0.3), rows)
    share = (plain != mixed).float().mean().item()
    assert abs(share - 0.3) < 4 * math.sqrt(0.3 * 0.7 / 2000)
    assert abs(mixed[plain != mixed].mean().item() - 0.5) < 0.05


@pytest.mark.parametrize("name", ["logit_normal", "uniform", "mode", "beta"])
def test_truncation_leaves_no_mass_at_the_ends(name):
    """A truncated window keeps the shape of the distribution inside; a clamp would put most samples on its end."""
    base = {"t_distribution": name, "shift": 3.0}
    quantile, gate = (torch.arange(20000, dtype=torch.float64) + 0.5) / 20000, torch.ones(20000)
    whole = FlowMatching(**base).t_from_base(gate, quantile, SHAPE)
    inside = whole[whole > 0.875].sort().values
    cut = FlowMatching(**base, t_min=0.875, window="truncate").t_from_base(gate, quantile, SHAPE).sort().values
    clamped = FlowMatching(**base, t_min=0.875).t_from_base(gate, quantile, SHAPE)
    assert cut.min() >= 0.875 and (cut == 0.875).float().mean() < 1e-3
    assert (clamped == 0.875).float().mean() > 0.5
    at = torch.linspace(0.01, 0.99, 50)
    close(cut.double().quantile(at.double()), inside.double().quantile(at.double()), atol=2e-4)


@pytest.mark.parametrize("weighting", ["linear", "bsmntw"])
def test_normalized_weights_have_mean_one_where_t_is_drawn(weighting):
    """With normalize_weight the learning rate means the same as without weighting."""
    flow = FlowMatching(shift=3.0, weighting=weighting, mix_uniform_ratio=0.2, normalize_weight=True)
    weights = flow.weight(draw(flow, range(4000)))
    assert abs(weights.mean().item() - 1) < 4 * weights.std().item() / math.sqrt(4000)
    close(FlowMatching().weight(torch.rand(5)), torch.ones(5))


def test_float32_times_stay_distinct():
    """Noise is mixed with the exact t also for bfloat16 latents: 200 close times give 200 results."""
    x0, noise = torch.zeros(200, 1, dtype=torch.bfloat16), torch.ones(200, 1, dtype=torch.bfloat16)
    t_B = 0.9 + torch.arange(200) * 1e-5
    assert FlowMatching().add_noise(x0, noise, t_B).unique().numel() == 200


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"t_min": 0.5, "t_max": 0.5}, "t_min=0.5"),
        ({"shift": 0.0}, "shift=0.0"),
        ({"shift": "resolutoin"}, "resolutoin"),
        ({"logit_std": 0.0}, "logit_std"),
        ({"t_distribution": "mode", "mode_scale": 2.0}, "1.7519"),
        ({"mix_uniform_ratio": 1.5}, "mix_uniform_ratio"),
        ({"sigma_min": 1.0}, "sigma_min"),
        ({"weighting": "linear"}, "a number"),
        ({"shift": "resolution", "weighting": "bsmntw", "normalize_weight": True}, "normalize_weight"),
        ({"t_distribution": "uniform", "logit_mean": 1.0}, "not read"),
        ({"t_distribution": "lognorm", "logit_std": 1.5}, "not read"),
        ({"mode_scale": 1.0}, "not read"),
        ({"shift": 3.0, "max_shift": 4.0}, "not read"),
        ({"normalize_weight": True}, "not read"),
        ({"weighting": "cubic"}, "weighting"),
        ({"weight_slope": 2.0}, "not read"),
        ({"weighting": "linear", "weight_slope": -1.0}, "weight_slope"),
        ({"beta_alpha": 3.0}, "not read"),
        ({"t_distribution": "beta", "beta_beta": 0.4}, "0.5 or more"),
        ({"shift": "root", "base_shift": 2.0}, "not read"),
        ({"window": "cut"}, "window"),
    ],
)
def test_wrong_or_ignored_settings_are_refused(arguments, message):
    """A setting out of range, or one that would be ignored, is an error that names it."""
    with pytest.raises(ValueError, match=message):
        FlowMatching(**arguments)


def test_built_from_a_config_section():
    """The registry builds it from a config, with integers where floats are meant."""
    flow = build({"type": "flow_matching", "shift": 3, "weighting": "linear"}, SCHEDULERS, where="scheduler")
    assert flow.alpha((1, 2, 2)) == 3.0
    with pytest.raises(ValueError, match="num_steps"):
        flow.times(0, SHAPE)
