"""Distillation: the published numbers, whose turn it is, what moves in it, and resumes that change nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from opensora_like.boosters.base import BESIDE
from opensora_like.checkpoint import layout
from opensora_like.checkpoint.pieces import PieceReader
from opensora_like.checkpoint.weights import read_weights
from opensora_like.config import read_config
from opensora_like.datasets.batch import Batch
from opensora_like.evaluation.generate import VideoGenerator
from opensora_like.evaluation.prompts import read_prompts
from opensora_like.models.lora import add_lora
from opensora_like.preparation.table import cache_table
from opensora_like.registry import MODELS, build
from opensora_like.schedulers.few_step import jump, shifted, walk
from opensora_like.schedulers.flow_matching import FlowMatching
from opensora_like.settings import Distill, InferenceConfig
from opensora_like.training.distill import (
    exit_of,
    matching_loss,
    own_steps,
    score,
    score_gradient,
    turn_of,
    updates_of_generator,
)
from opensora_like.training.distill_roles import check_distill
from opensora_like.training.trainer import train
from tests.training import cached_clips
from tests.training.harness import ROOT, assert_same, build_toy, metrics_of, tensors_of, train_toy

INFERENCE = ROOT / "tests/training/toy_inference.py"
GOLDEN = Path(__file__).parents[1] / "golden/videox_dmd_a"
CASES = json.loads(GOLDEN.with_suffix(".json").read_text())["cases"]
DISTILL = "dict(times=(1.0,0.75,0.5),gen_update_interval=2,critic_lr=5e-3,real_guidance=4.0,negative_prompt='grey')"
LORA = "{'r': 2, 'lora_alpha': 8, 'target_modules': ['qkv', 'proj', 'linear1']}"
DDP = "dict(type='ddp')"


class Linear(nn.Module):
    """The nets of the recorded numbers: ``W x + b + t a + mean(context) K``."""

    def __init__(self, weights: dict[str, Tensor]) -> None:
        super().__init__()
        for name, weight in weights.items():
            self.register_parameter(name, nn.Parameter(weight))

    def forward(self, x: Tensor, t_B: Tensor, conditions: dict[str, Tensor]) -> Tensor:
        per_channel = self.b + t_B.float()[:, None] * self.a + conditions["text"].mean(1) @ self.K
        return torch.einsum("oc,bc...->bo...", self.W, x) + per_channel[:, :, None, None, None]


class Recorded:
    """One recorded iteration, and our functions on its inputs.

    The published walk tells its model times cut to whole thousandths and takes the noise level of the nearest time in
    its table for them. `as_published` does so; our own walk uses the times as they are.
    """

    def __init__(self, number: int) -> None:
        tensors = load_file(GOLDEN.with_suffix(".safetensors"))
        self.case, prefix = CASES[number], f"dmd/{number}/"
        self.tensors = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
        self.nets = {role: Linear(self.group(f"weights/{role}.")) for role in ("generator", "fake", "real")}
        self.flow = FlowMatching(shift=self.case["shift"], sigma_min=0.0)
        self.conditions, self.null = {"text": self.tensors["prompt"]}, {"text": self.tensors["neg"]}
        self.times = shifted([s / 1000 for s in self.case["steps"]], self.flow, (1, 1, 1))
        level = torch.arange(1000, 0, -1) / 1000
        self.table = self.case["shift"] * level / (1 + (self.case["shift"] - 1) * level)

    def group(self, prefix: str) -> dict[str, Tensor]:
        return {n.removeprefix(prefix): t for n, t in self.tensors.items() if n.startswith(prefix)}

    def as_published(self, x: Tensor, t_B: Tensor, step: int) -> Tensor:
        told = (t_B * 1000).long() / 1000
        level = self.table[(self.table - told[0]).abs().argmin()]
        return self.nets["generator"](x, told, self.conditions) * level / t_B[0]

    def generate(self, exit_step: int, first: int) -> Tensor:
        """The data at an exit; the noise is the recorded one from number `first` on."""
        noise = lambda step: self.tensors[f"randn_{first + step}"]  # noqa: E731
        with torch.no_grad():
            x = walk(self.as_published, noise(0), self.times[: exit_step + 1], flow=self.flow, noise=noise)
        return jump(self.as_published, x, self.times[exit_step], exit_step, flow=self.flow)


@pytest.mark.parametrize("number", range(len(CASES)))
def test_the_published_numbers(number: int) -> None:
    """Walk, scores with guidance, normalizer, both losses and every gradient, from the recorded noise."""
    run = Recorded(number)
    case, out = run.case, run.group("out/")
    torch.testing.assert_close(torch.tensor(run.times) * 1000, torch.tensor(case["denoising_step_list"]))
    near = {"atol": 1e-5, "rtol": 1e-5}

    x0 = run.generate(case["gen_final_step_index"], 0)
    torch.testing.assert_close(x0, out["generator_pred"], **near)
    t_B = torch.tensor(case["generator_timestep"]) / 1000
    x_t = run.flow.add_noise(x0, run.tensors[f"randn_{case['randn_used_by_generator'] - 1}"], t_B).detach()
    torch.testing.assert_close(x_t, out["generator_denoised_input"], **near)
    asked = (x_t, t_B, run.conditions, run.null)
    fake = score(run.nets["fake"], *asked, scale=case["fake"], flow=run.flow)
    real = score(run.nets["real"], *asked, scale=case["real"], flow=run.flow)
    torch.testing.assert_close(fake, out["fake_score_main"], **near)
    torch.testing.assert_close(real, out["real_score_main"], **near)
    gradient = score_gradient(x0, fake, real)
    torch.testing.assert_close(gradient, out["fake_to_real_grad"], **near)
    normalizer = ((fake - real) / gradient).mean(dim=(1, 2, 3, 4)).detach()
    torch.testing.assert_close(normalizer, out["normalizer"].flatten(), atol=1e-4, rtol=1e-4)
    loss = matching_loss(x0, gradient)
    assert loss.item() == pytest.approx(case["dmd_loss"], rel=1e-5)
    loss.backward()

    first = case["randn_used_by_generator"]
    with torch.no_grad():
        made = run.generate(case["critic_final_step_index"], first)
    noise, t_B = run.tensors[f"randn_{case['randn_total'] - 1}"], torch.tensor(case["critic_timestep"]) / 1000
    v = run.nets["fake"](run.flow.add_noise(made, noise, t_B), t_B, run.conditions)
    loss = (v - run.flow.target(made, noise)).square().mean()
    assert loss.item() == pytest.approx(case["denoising_loss"], rel=1e-5)
    loss.backward()
    for role in ("generator", "fake"):
        for name, wanted in run.group(f"grads/{role}.").items():
            torch.testing.assert_close(getattr(run.nets[role], name).grad, wanted, **near)
    assert all(p.grad is None for p in run.nets["real"].parameters())


def test_the_gradient_is_that_of_the_paper() -> None:
    """0 where critic and teacher agree, also where both see the data itself; else (f - r) / mean |x - r| / elements."""
    x0 = torch.randn(2, 3, 2, 4, 4, requires_grad=True)
    fake, real = torch.randn(2, *x0.shape).unbind()
    for agreed in (fake, x0.detach()):
        (zero,) = torch.autograd.grad(matching_loss(x0, score_gradient(x0, agreed, agreed)), x0)
        assert not zero.any()
    (found,) = torch.autograd.grad(matching_loss(x0, score_gradient(x0, fake, real)), x0)
    distance = (x0 - real).abs().mean(dim=(1, 2, 3, 4), keepdim=True)
    torch.testing.assert_close(found, ((fake - real) / distance / x0.numel()).detach())


def test_turns_and_exits_are_functions_of_the_step() -> None:
    """One update of the generator, then five of the critic; each exit comes up about as often."""
    turns = [turn_of(step, 5) for step in range(600)]
    assert turns[:7] == ["generator", *["critic"] * 5, "generator"] and turns.count("generator") == 100
    counted = [updates_of_generator(step, 5) for step in range(1, 14)]
    assert counted == [1, *[None] * 5, 2, *[None] * 5, 3]
    exits = [exit_of(step, 4, seed=1) for step in range(400)]
    assert all(70 < exits.count(k) < 130 for k in range(4))


def test_experts_share_the_steps() -> None:
    """With Wan 2.2's shift and boundary, the first two of its four steps are the high expert's."""
    times = shifted((1.0, 0.75, 0.5, 0.25), FlowMatching(shift=5.0), (1, 1, 1))
    torch.testing.assert_close(torch.tensor(times), torch.tensor([1.0, 0.9375, 5 / 6, 0.625]))
    settings = Distill(boundary=0.9)
    assert list(own_steps(times, settings, has_before=False)) == [0, 1]
    assert list(own_steps(times, settings, has_before=True)) == [2, 3]
    with pytest.raises(ValueError, match="0 are the high"):
        own_steps([0.8], settings, has_before=False)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    outputs = tmp_path_factory.mktemp("teacher")
    train_toy(outputs, "--steps", "3", "--ema_decay", "None")
    return layout.complete_checkpoints(outputs / "toy")[-1]


def arguments_of(teacher: Path, *more: str) -> list[str]:
    return ["--model.from_pretrained", str(teacher), "--distill", DISTILL, "--booster", DDP, "--steps", "8", *more]


def of_roles(tensors: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Tensors of the generator, EMA included, and of the critic."""
    found: dict[str, dict[str, Tensor]] = {"generator": {}, "critic": {}}
    for name, tensor in tensors.items():
        found["critic" if f"/{BESIDE}" in name else "generator"][name] = tensor
    return found


@pytest.mark.parametrize("lora", [[], ["--lora_config", LORA]], ids=["whole", "lora"])
def test_only_the_one_whose_turn_it_is_moves(teacher: Path, lora: list[str], tmp_path: Path) -> None:
    """Weights, moments, counters and EMA of the other stay bit for bit; the teacher has no gradient and stays."""
    run = build_toy(tmp_path, *arguments_of(teacher, *lora))
    before, moved, inner = of_roles(tensors_of(run)), [], run.on_batch
    plain = read_weights(teacher)

    def on_batch(batch: Batch) -> None:
        nonlocal before
        now = of_roles(tensors_of(run))
        moved.append([r for r in now if any(not torch.equal(now[r][n], before[r][n]) for n in now[r])])
        before = now
        inner(batch)

    run.on_batch = on_batch
    train(run)
    assert moved == [[], ["generator"], ["critic"], ["critic"], ["generator"], ["critic"], ["critic"], ["generator"]]
    assert {n for n in before["generator"] if n.startswith("ema/")} and not any(
        n.startswith("ema/") for n in before["critic"]
    )
    if lora:
        modules = run.step_fn.networks.generator.__closure__
        model = next(c.cell_contents for c in modules if isinstance(c.cell_contents, nn.Module))
        frozen = {n.replace(".base_layer", ""): p for n, p in model.named_parameters() if not p.requires_grad}
        assert frozen and all(torch.equal(p, plain[n]) for n, p in frozen.items())


def test_the_teacher_is_the_model_without_adapters(teacher: Path, tmp_path: Path) -> None:
    """With adapters that have moved, the teacher answers as the weights it was built from do, and leaves no trace."""
    whole = build_toy(tmp_path / "a", *arguments_of(teacher)).step_fn
    run = build_toy(tmp_path / "b", *arguments_of(teacher, "--lora_config", LORA))
    with torch.no_grad():
        for _, shard in run.booster.master_shards():
            shard.add_(0.1)
    x, t_B = torch.randn(2, 12, 2, 4, 4), torch.tensor([0.2, 0.8])
    conditions = {"text": torch.randn(2, 16, 16), "pooled": torch.randn(2, 16), "visual": torch.zeros(2, 13, 2, 4, 4)}
    networks = run.step_fn.networks
    trained = networks.generator(x, t_B, conditions)
    found, wanted = networks.real(x, t_B, conditions), whole.networks.real(x, t_B, conditions)
    torch.testing.assert_close(found, wanted, atol=1e-6, rtol=0)
    assert (trained - wanted).abs().max() > 1e-3
    assert torch.equal(networks.generator(x, t_B, conditions), trained)


@pytest.mark.parametrize("lora", [[], ["--lora_config", LORA]], ids=["whole", "lora"])
def test_killed_and_resumed_equals_uninterrupted(teacher: Path, lora: list[str], tmp_path: Path) -> None:
    """In the middle of a cycle, saving in the background: turns go on where they were, and so do both models."""
    arguments = arguments_of(teacher, "--ckpt-every", "1", "--async-io", *lora)
    run = train_toy(tmp_path / "a", *arguments)
    load: list[str] = []
    for kill in (3, 6):
        train_toy(tmp_path / "b", *arguments, *load, kill_before=kill)
        load = ["--load", "latest"]
    assert_same(train_toy(tmp_path / "b", *arguments, *load), run)
    rows = [[json.loads(x) for x in (tmp_path / f / "toy/metrics.jsonl").read_text().splitlines()] for f in "ab"]
    keys = {k for row in rows[0] for k in row if k.startswith(("loss", "grad_norm", "lr"))}
    assert keys == {f"{k}_{r}" for k in ("loss", "grad_norm", "lr") for r in ("generator", "critic")}
    assert [{k: r[k] for k in keys & r.keys()} for r in rows[0]] == [
        {k: r[k] for k in keys & r.keys()} for r in rows[1]
    ]


def test_the_critic_has_its_own_rate(teacher: Path, tmp_path: Path) -> None:
    """critic_lr, with the same warm-up over the updates of the run."""
    train_toy(tmp_path, *arguments_of(teacher))
    rows = [json.loads(line) for line in (tmp_path / "toy/metrics.jsonl").read_text().splitlines()]
    rates = [row.get("lr_generator", row.get("lr_critic")) for row in rows]
    assert rates == pytest.approx([2.5e-3, 2.5e-3, 3.75e-3, 1e-2, 5e-3, 5e-3, 1e-2, 5e-3])


def test_a_row_has_the_last_step_of_each(teacher: Path, tmp_path: Path) -> None:
    """With a row every third update both are in each."""
    train_toy(tmp_path / "each", *arguments_of(teacher))
    train_toy(tmp_path / "third", *arguments_of(teacher, "--log_every", "3"))
    each = [json.loads(line) for line in (tmp_path / "each/toy/metrics.jsonl").read_text().splitlines()]
    found = metrics_of(tmp_path / "third/toy", "step", "loss_generator", "loss_critic")
    assert found == [(s, each[s - 3]["loss_generator"], each[s - 1]["loss_critic"]) for s in (3, 6)]


def test_the_generator_is_sampled_and_exported_alone(teacher: Path, tmp_path: Path) -> None:
    """Checkpoints hold the critic; who reads weights does not see it, and few-step sampling takes what is read."""
    train_toy(tmp_path, *arguments_of(teacher))
    folder = layout.complete_checkpoints(tmp_path / "toy")[-1]
    names = PieceReader(folder).names("master")
    assert sum(name.startswith(BESIDE) for name in names) == len(names) // 2
    assert read_weights(folder).keys() == read_weights(teacher).keys()
    run = build_toy(tmp_path / "plain", "--load", str(folder), "--load_weights_only", "--ema_decay", "None")
    assert dict(run.booster.master_shards()).keys() == read_weights(teacher).keys()
    few = ["--sampler", "few_step", "--few_step_times", "[1.0, 0.75, 0.5]", "--num_steps", "3", "--guidance", "1.0"]
    arguments = ["--ckpt-path", str(folder), "--prompt", "a cat", *few]
    config = read_config(INFERENCE, arguments, schema=InferenceConfig).config
    videos = [next(iter(VideoGenerator(config, torch.device("cpu")).sample(read_prompts(config)))) for _ in range(2)]
    assert torch.equal(videos[0].video_CTHW, videos[1].video_CTHW) and videos[0].video_CTHW.isfinite().all()


@pytest.mark.parametrize(
    ("distill", "more", "message"),
    [
        ("dict(times=(0.9, 0.5))", [], "must begin at 1.0"),
        ("dict(time=(1.0,))", [], "times"),
        ("dict(gen_update_interval=0)", [], "must be 1 or more"),
        ("dict(real_guidance=1.0, negative_prompt='x')", [], "read with guidance only"),
        ("dict(real_guidance=0.0)", [], "does not hear the captions; 1 is without"),
        ("dict(before=dict(from_pretrained='x'))", [], "set distill.boundary"),
        ("dict(boundary=0.9)", [], "scheduler.t_min=0.9"),
        ("dict(boundary=0.9, before=dict(from_pretrained='x'))", [], "scheduler.t_max=0.9"),
        ("dict(boundary=0.9, before=dict(weights='x'))", [], "has from_pretrained"),
        ("dict()", ["--peak_tflops", "1.0"], "peak_tflops cannot be set with distill"),
        ("dict()", ["--no_i2v_ref_loss"], "no_i2v_ref_loss cannot be set"),
        ("dict()", ["--lora_config", LORA[:-1] + ", 'lora_dropout': 0.1}"], "lora_dropout cannot be set"),
    ],
)
def test_mistakes_are_named(distill: str, more: list[str], message: str, tmp_path: Path) -> None:
    """Before anything is built."""
    with pytest.raises(ValueError, match=message):
        build_toy(tmp_path, "--distill", distill, "--booster", DDP, *more)


WINDOW = ["--scheduler.t_max", "0.5", "--scheduler.window", "truncate"]
LOW = "boundary=0.5, before=dict(from_pretrained={!r})"


@pytest.mark.parametrize(
    ("distill", "more", "message"),
    [
        (f"times=(1.0,), {LOW.format(str(ROOT))}", WINDOW, r"of the times \[1.0\] .* 1 are the high expert's and 0"),
        (LOW.format("gone"), WINDOW, "distill.before.from_pretrained='gone' does not exist"),
        ("", ["--lr_scales", "{'qkw': 2.0}"], "lr_scales: 'qkw' is in none"),
        ("", ["--lr_scales", "{'qkv': -1.0}"], "must be 0 or more"),
        ("", ["--ema_decay", "2.0"], "ema_decay=2.0"),
        ("", ["--lora_checkpoint", "gone"], "lora_checkpoint='gone' is used with lora_config only"),
        ("", ["--lora_checkpoint", "gone", "--lora_config", LORA], "lora_checkpoint='gone' does not exist"),
        ("", ["--lora_config", LORA.replace("qkv", "qkw").replace("proj", "x").replace("linear1", "y")], "linears end"),
    ],
)
def test_what_does_not_fit_is_refused_before_weights_are_read(
    distill: str, more: list[str], message: str, tmp_path: Path
) -> None:
    """That there are none in the file is not found out: reading those of a large model takes minutes."""
    weights = ["--model.from_pretrained", __file__, "--distill", f"dict({distill})", "--booster", DDP]
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        build_toy(tmp_path, *weights, *more)


def test_the_low_expert_goes_on_from_the_high_one(teacher: Path, tmp_path: Path) -> None:
    """Steps above the boundary are walked by the frozen expert, the others by the generator; scores stay below it."""
    before = f"dict(times=(1.0, 0.75, 0.5, 0.25), boundary=0.6, before=dict(from_pretrained={str(teacher)!r}))"
    window = ["--scheduler.t_max", "0.6", "--scheduler.window", "truncate"]
    run = build_toy(tmp_path, *arguments_of(teacher, "--distill", before, *window))
    called: list[tuple[str, float]] = []
    networks = run.step_fn.networks
    for name in ("generator", "critic", "real", "before"):
        inner = getattr(networks, name)

        def heard(x: Tensor, t_B: Tensor, c: dict, inner=inner, name=name) -> Tensor:
            called.append((name, round(t_B.max().item(), 4)))
            return inner(x, t_B, c)

        object.__setattr__(networks, name, heard)
    train(run)
    assert {t for name, t in called if name == "before"} == {1.0, 0.75}
    assert {t for name, t in called if name == "generator"} == {0.5, 0.25}
    assert all(t <= 0.6 for name, t in called if name in ("real", "critic"))


@pytest.mark.parametrize(("expert", "own"), [("high", [0, 1]), ("low", [2, 3])])
def test_the_published_recipe(expert: str, own: list[int]) -> None:
    """Wan 2.2's experts with the numbers of the seed, and eight adapted linears in each block: 320 in forty."""
    config = read_config(ROOT / f"configs/diffusion/train/wan2_2_i2v_a14b_distill_{expert}.py").config
    settings = check_distill(config)
    assert (settings.critic_lr, settings.real_guidance, settings.fake_guidance) == (1e-6, 6.0, 0.0)
    assert (settings.gen_update_interval, settings.boundary, config.scheduler["shift"]) == (5, 0.9, 5.0)
    optim = {name: config.optim[name] for name in ("lr", "weight_decay", "eps")}
    assert optim == {"lr": 1e-5, "weight_decay": 3e-2, "eps": 1e-10} and config.grad_clip == 0.05
    times = shifted(settings.times, FlowMatching(shift=5.0), (1, 1, 1))
    assert list(own_steps(times, settings, has_before=settings.before is not None)) == own
    with torch.device("meta"):
        model = build({"type": "wan", "variant": "i2v-A14B", "num_layers": 2}, MODELS)
    add_lora(model, config.lora_config, seed=0)
    assert sum(name.endswith("lora_A.default") for name, _ in model.named_modules()) == 2 * 8
    assert (config.lora_config["r"], config.lora_config["lora_alpha"]) == (64, 32)


def test_latents_of_clips_are_neither_used_nor_encoded(tmp_path: Path) -> None:
    """Without given frames a run with zeros in their place is the run with latents, bit for bit."""
    plain = ["--distill", DISTILL, "--booster", DDP, "--steps", "4", "--model.cond_embed", "False"]
    runs = [build_toy(tmp_path / name, *plain, "--condition_config", "None") for name in "ab"]
    runs[1].step_fn.encode._shapes_only = False
    for run in runs:
        train(run)
    assert_same(*runs)
    latents = [run.step_fn.encode(next(run.batches)).x0_BCTHW for run in runs]
    assert latents[0].shape == latents[1].shape and not latents[0].any() and latents[1].any()


def test_a_store_of_latents_is_enough(tmp_path: Path) -> None:
    """From cached captions the run that encodes them, bit for bit; a negative prompt that is not cached is refused."""
    table = cached_clips.write_table(tmp_path)
    videos, latents = cached_clips.from_videos(table), cached_clips.from_cache(tmp_path / "store", table)
    plain = [*cached_clips.patch(), "--model.cond_embed", "False", "--condition_config", "None", "--booster", DDP]
    cache_table(cached_clips.config_of(*plain, *videos), tmp_path / "store")
    distill = ["--steps", "4", "--distill", "dict(times=(1.0,0.5),gen_update_interval=1)"]
    runs = [train_toy(tmp_path / n, *plain, *distill, *data) for n, data in (("a", videos), ("b", latents))]
    assert_same(*runs)
    with pytest.raises(ValueError, match="of 'grey' there is none"):
        weights = ["--model.from_pretrained", __file__]  # which is not read before
        build_toy(tmp_path / "c", *plain, *distill, *weights, "--distill.negative_prompt", "grey", *latents)
