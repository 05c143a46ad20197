"""Every config in configs/ is read whole, and those that train agree with themselves: model, autoencoder, buckets."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from opensora_like.boosters import colossalai
from opensora_like.boosters.colossalai_options import read_hybrid_options, read_options
from opensora_like.conditioning.masks import check_condition_config
from opensora_like.config import read_config
from opensora_like.datasets.bucket import Buckets, compile_buckets
from opensora_like.datasets.plan import build_plan
from opensora_like.datasets.table import Table, table_of
from opensora_like.models.base import Autoencoder, Denoiser
from opensora_like.registry import MODELS, SCHEDULERS, build
from opensora_like.settings import InferenceConfig, RunConfig

ROOT = Path(__file__).parent.parent / "configs"
CONFIGS = sorted(p for p in ROOT.rglob("*.py") if "_base_" not in p.parts)
SAMPLING = [p for p in CONFIGS if "inference" in p.parts]
TRAINING = [p for p in CONFIGS if p not in SAMPLING]


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def on_meta(section: dict, *, where: str):
    """The module of a section, without weights and without a file of them."""
    with torch.device("meta"):
        return build({k: v for k, v in section.items() if k != "from_pretrained"}, MODELS, where=where)


def models_of(config: RunConfig | InferenceConfig) -> tuple[Denoiser, Autoencoder]:
    return on_meta(config.model, where="model"), on_meta(config.autoencoder, where="autoencoder")


def clips(num_frames: list[int]) -> Table:
    """Clips and images of many lengths, sizes and ratios; enough of each to fill batches."""
    rng = np.random.default_rng(0)
    num = 20_000
    frames = rng.choice(num_frames, num)
    return table_of(
        {
            "path": [f"{i}.mp4" for i in range(num)],
            "text": ["a clip"] * num,
            "num_frames": frames,
            "height": rng.choice([16, 160, 480, 768, 1080, 2160], num),
            "width": rng.choice([16, 160, 640, 1024, 1920, 3840], num),
            "fps": np.where(frames == 1, np.nan, 24.0),
        }
    )


def test_there_are_configs() -> None:
    """The published stages, and a short name for the first of them."""
    names = {name_of(p) for p in CONFIGS}
    stages = ["image", "stage1", "stage2", "stage1_i2v", "stage2_i2v", "high_compression"]
    train = {f"diffusion/train/{n}.py" for n in stages}
    sample = {
        f"diffusion/inference/{n}.py" for n in ["256px", "768px", "t2i2v_256px", "t2i2v_768px", "high_compression"]
    }
    assert names >= {"stage1.py"} | train | sample


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT)))
def test_a_config_is_short_and_says_what_it_is_for(path: Path) -> None:
    """It opens with a docstring, has fewer than 60 lines, and one that is run has its command."""
    text = path.read_text()
    assert text.startswith('"""') and len(text.splitlines()) < 60
    assert "_base_" in path.parts or "scripts/diffusion/" in text.split('"""')[1]


@pytest.mark.parametrize("path", TRAINING, ids=name_of)
def test_a_training_config_fits_itself(path: Path) -> None:
    """Latents fit the model, and so does every bucket's shape; tasks fit the lengths; clips fill all resolutions."""
    config = read_config(path).config
    model, autoencoder = models_of(config)
    assert model.latent_channels == autoencoder.latent_channels
    model.set_grad_checkpoint(config.model.get("grad_ckpt_settings") or False)
    build(config.scheduler, SCHEDULERS, where="scheduler", patch_size=model.patch_size)
    assert set(config.encoders) == model.condition_names - {"guidance", "visual"}
    buckets = compile_buckets(config.bucket_config, multiple=autoencoder.spatial_stride * model.patch_size)
    lengths = set()
    for shape in buckets.shapes:
        channels, frames, height, width = autoencoder.latent_shape(*shape[1:])
        assert channels == model.latent_channels and height % model.patch_size == width % model.patch_size == 0
        lengths.add(frames)
    if config.condition_config:
        assert "visual" in model.condition_names
        facts = {"is_causal": autoencoder.is_causal, "temporal_stride": autoencoder.temporal_stride}
        check_condition_config(config.condition_config, num_latent_frames=lengths, **facts)
    check_plan(config, buckets)


def check_plan(config: RunConfig, buckets: Buckets) -> None:
    """Clips of all sizes and lengths make full batches, of the bucket's shape, in every resolution."""
    frames = sorted({n for table in config.bucket_config.values() for n in table})
    fps_max = config.dataset.get("fps_max", 24.0)
    interval = math.ceil(24.0 / fps_max)  # frames of a clip of 24 fps of which one is taken
    frames = [n if n == 1 else n * interval for n in frames]
    plan = build_plan(clips(frames), buckets, fps_max=fps_max, seed=0, epoch=0)
    for micro in (plan[i] for i in range(0, len(plan), max(1, len(plan) // 50))):
        bucket = plan.bucket_ids[micro.index]
        assert len(micro.rows) == buckets.batch_sizes[bucket] and micro.shape == buckets.shapes[bucket]
    seen = {buckets.shapes[b].resolution for b in np.unique(plan.bucket_ids)}
    assert seen == set(config.bucket_config)


@pytest.mark.parametrize("path", SAMPLING, ids=name_of)
def test_an_inference_config_fits_itself(path: Path) -> None:
    """Latents fit the model, and the length that it asks for can be coded."""
    config = read_config(path, schema=InferenceConfig).config
    model, autoencoder = models_of(config)
    assert model.latent_channels == autoencoder.latent_channels
    multiple = autoencoder.spatial_stride * model.patch_size
    assert autoencoder.latent_shape(config.num_frames, 4 * multiple, 4 * multiple)[1] > 1


def test_sizes_of_the_published_model() -> None:
    """11.89 billion weights with visual conditions; the fraction for DC-AE latents differs by its ends only."""
    with_frames, _ = models_of(read_config(ROOT / "diffusion/train/stage1_i2v.py").config)
    assert sum(p.numel() for p in with_frames.parameters()) == 11_891_390_528
    assert len(with_frames.state_dict()) == 1082


@pytest.mark.parametrize("path", TRAINING, ids=name_of)
def test_the_booster_takes_its_options(path: Path) -> None:
    """Every option of plugin_config is known to its plugin."""
    booster = read_config(path).config.booster
    if booster["type"] != "colossalai":
        pytest.skip("only ColossalAI has plugins")
    plugin = booster.get("plugin", "zero2")
    if plugin not in colossalai.PLUGINS:
        pytest.skip(f"this version has no plugin {plugin!r}")
    read = read_hybrid_options if plugin == "hybrid" else read_options
    options = read(booster.get("plugin_config") or {}, plugin=plugin, device=torch.device("cpu"))
    if plugin == "hybrid":
        assert (options.sp_size, options.sequence_parallelism_mode, options.zero_stage) == (4, "ring_attn", 2)
