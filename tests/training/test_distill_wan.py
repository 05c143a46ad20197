"""Two experts of a Wan of toy size, as Wan 2.2 has them: each is distilled, and both make a clip in four steps."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from opensora_like import runtime as rt
from opensora_like.checkpoint.adapters import read_adapters
from opensora_like.config import read_config
from opensora_like.evaluation.generate import VideoGenerator
from opensora_like.evaluation.prompts import read_prompts
from opensora_like.settings import InferenceConfig
from opensora_like.training.build import build_run
from opensora_like.training.trainer import train

HERE = Path(__file__).parent
LORA = "dict(r=2, lora_alpha=4, target_modules=['to_q', 'to_k', 'to_v', 'ffn.net.0.proj', 'ffn.net.2'])"
DISTILL = "boundary=0.9, gen_update_interval=1, critic_lr=1e-2"


def train_wan(outputs: Path, *arguments: str) -> Path:
    """Returns: the run's folder."""
    config = read_config(HERE / "toy_wan_config.py", ["--outputs", str(outputs), *arguments]).config
    train(build_run(config, rt.start(), config_name="toy_wan_config.py"))
    return outputs / "wan"


def losses_of(run: Path) -> list[list[float]]:
    """Of each step; their names end in the role."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [[value for name, value in row.items() if name.startswith("loss_")] for row in rows]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The weights of both experts before they are distilled."""
    return train_wan(tmp_path_factory.mktemp("base"), "--ema_decay", "None", "--steps", "1")


def distil(expert: str, base: Path, outputs: Path, *more: str, before: str = "") -> Path:
    window = {"high": "--scheduler.t_min", "low": "--scheduler.t_max"}[expert]
    settings = ["--model.from_pretrained", str(base), "--lora_config", LORA, "--scheduler.window", "truncate"]
    return train_wan(outputs, *settings, window, "0.9", "--distill", f"dict({DISTILL}{before})", *more)


def test_high_then_low_then_a_clip(base: Path, tmp_path: Path) -> None:
    """The low expert learns from what the distilled high one makes; few-step sampling takes turns as training did."""
    high = distil("high", base, tmp_path / "high")
    adapters = f", before=dict(from_pretrained={str(base)!r}, lora_checkpoint={str(high)!r})"
    low = distil("low", base, tmp_path / "low", before=adapters)
    plain = distil("low", base, tmp_path / "plain", before=f", before=dict(from_pretrained={str(base)!r})")
    assert losses_of(low) != losses_of(plain)  # the adapters of the high expert were used

    torch.manual_seed(0)
    from PIL import Image

    Image.fromarray((torch.rand(32, 32, 3) * 255).byte().numpy()).save(tmp_path / "first.png")
    other = f"dict(boundary=0.9, ckpt_path={str(base)!r}, lora_checkpoint={str(low)!r})"
    arguments = ["--ckpt-path", str(base), "--lora-checkpoint", str(high), "--other_expert", other]
    arguments += ["--prompt", "a cat", "--ref", str(tmp_path / "first.png")]
    generator = VideoGenerator(
        read_config(HERE / "toy_wan_inference.py", arguments, schema=InferenceConfig).config, torch.device("cpu")
    )
    clip = next(iter(generator.sample(read_prompts(generator.cfg)))).video_CTHW
    assert clip.shape == (3, 5, 16, 16) and clip.isfinite().all()


@pytest.mark.parametrize("booster", ["{'type': 'ddp'}", "{'type': 'colossalai'}", "{'type': 'fsdp2'}"])
def test_bfloat16_stays_near_float32(base: Path, booster: str, tmp_path: Path) -> None:
    """The teacher without adapters, walk and scores in bfloat16 with every backend that can."""
    exact = losses_of(distil("high", base, tmp_path / "exact"))
    found = distil("high", base, tmp_path / "bf16", "--dtype", "bf16", "--booster", booster)
    for mine, wanted in zip(losses_of(found), exact, strict=True):
        assert mine == pytest.approx(wanted, rel=0.1)
    names = read_adapters(str(found), where="lora_checkpoint", use_ema=True)
    assert len(names) == 2 * 2 * 8  # pairs, blocks, linears


def test_given_frames_in_the_place_of_noise_are_refused(tmp_path: Path) -> None:
    """What such a model says of them means nothing, and it would be scored. Its weights are not looked for."""
    model = ["--model.in_channels", "48", "--model.token_replace", "True", "--model.from_pretrained", __file__]
    with pytest.raises(ValueError, match="token_replace=True"):
        train_wan(tmp_path, *model, "--distill", "dict()")
