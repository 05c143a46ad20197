"""Training from cached latents and embeddings is training from videos, bit for bit; what does not fit is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from opensora_like.datasets.latent_store import open_store
from opensora_like.datasets.latents import Latents
from opensora_like.datasets.video_text import VideoText
from opensora_like.models.stand_ins import CachedAutoencoder, CachedText
from opensora_like.preparation.table import cache_table
from opensora_like.training.cached import check_no_pixels_needed, open_cached
from tests.training.cached_clips import (
    BUCKETS,
    config_of,
    from_cache,
    from_videos,
    hunyuan,
    patch,
    write_autoencoder,
    write_table,
)
from tests.training.harness import assert_same, build_toy, metrics_of, train_toy

EPOCHS = 5  # more than 8 steps see


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    write_table(folder)
    write_autoencoder(folder / "vae.safetensors")
    return folder


@pytest.fixture(scope="module")
def cache(world: Path) -> Callable[..., Path]:
    """Settings -> the store of them, made once."""
    made: dict[str, Path] = {}

    def store_of(*settings: str) -> Path:
        key = repr(settings)
        if key not in made:
            made[key] = world / f"store{len(made)}"
            cache_table(config_of(*settings, *from_videos(world / "table.csv")), made[key], epochs=EPOCHS)
        return made[key]

    return store_of


@pytest.mark.parametrize(("kind", "sample_posterior"), [("hunyuan", "True"), ("hunyuan", "False"), ("patch", "True")])
def test_cached_training_is_training_from_videos(
    world: Path, cache: Callable[..., Path], tmp_path: Path, kind: str, sample_posterior: str
) -> None:
    """Losses, gradient norms, weights, Adam and EMA after 8 steps of 2 micro-batches; images, videos, i2v_head, dropped
    captions, a file that is missing. No weight of an encoder is there."""
    settings = [*(hunyuan(world / "vae.safetensors") if kind == "hunyuan" else patch())]
    settings += ["--sample_posterior", sample_posterior]
    table = world / "table.csv"
    store = open_store(cache(*settings))
    assert ("latents_std" in store.tensor_names()) == (kind == "hunyuan" and sample_posterior == "True")
    videos = train_toy(tmp_path / "videos", *settings, *from_videos(table))
    workers = ["--num_workers", "2"] if kind == "patch" else []
    cached = train_toy(tmp_path / "cached", *settings, *from_cache(store.folder, table), *workers)
    assert metrics_of(tmp_path / "videos/toy") == metrics_of(tmp_path / "cached/toy")
    assert videos.state.epoch < EPOCHS and videos.state.epoch > 0
    assert_same(videos, cached)
    bad = [(tmp_path / name / "toy/bad_samples.jsonl") for name in ("videos", "cached")]
    rows = [[line.split(",")[0] for line in file.read_text().splitlines()] for file in bad]
    assert rows[0] and rows[0] == rows[1]
    encode = cached.step_fn.encode
    assert isinstance(encode.autoencoder, CachedAutoencoder) and not list(encode.autoencoder.parameters())
    assert all(isinstance(e, CachedText) and not list(e.parameters()) for e in encode.encoders.values())


def test_a_checkpoint_goes_from_videos_to_the_cache(world: Path, cache: Callable[..., Path], tmp_path: Path) -> None:
    """The order of the data is the same, so half a run from videos and half from the cache is a whole run."""
    table, settings = world / "table.csv", patch()
    whole = train_toy(tmp_path / "whole", *settings, *from_videos(table))
    train_toy(tmp_path / "halves", *settings, *from_videos(table), "--steps", "3")
    halves = train_toy(tmp_path / "halves", *settings, *from_cache(cache(*settings), table), "--load", "latest")
    assert_same(whole, halves)


def test_a_store_trains_without_its_table(world: Path, cache: Callable[..., Path], tmp_path: Path) -> None:
    """Its entries are the rows; their sizes make the buckets."""
    settings = [*hunyuan(world / "vae.safetensors"), "--condition_config", "{'t2v': 1}"]
    store = cache(*settings)
    run = train_toy(tmp_path, *settings, *from_cache(store, None))
    assert run.state.step == 8 and all(loss > 0 for _, loss in metrics_of(tmp_path / "toy", "step", "loss"))


def test_later_epochs_repeat_what_was_cached(world: Path, tmp_path: Path) -> None:
    """Of a store of one epoch, later epochs read the clips of epoch 0 where their own were not cached."""
    table = str(world / "table.csv")
    cache_table(config_of(*patch(), *from_videos(world / "table.csv")), tmp_path / "store")
    options = {"bucket_config": BUCKETS, "multiple": 4, "seed": 42}
    cached, videos = Latents(str(tmp_path / "store"), table, **options), VideoText(table, **options)
    shape = next(shape for shape in cached.buckets.shapes if shape.num_frames == 9)
    row = int(videos.table.num_frames.argmax())
    begins = [videos.choose_clip(row, 9, epoch).indices[0] for epoch in range(12)]
    assert len(set(begins)) > 1
    latents = [cached.read(row, shape, epoch).latents_CTHW for epoch in range(12)]
    assert all(torch.equal(z, latents[0]) for z in latents)


def other_weights(world: Path) -> list[str]:
    state = world / "other.safetensors"
    if not state.exists():
        from safetensors.torch import load_file, save_file

        weights = load_file(world / "vae.safetensors")
        save_file({name: tensor + (name == "quant_conv.bias") for name, tensor in weights.items()}, state)
    return hunyuan(state)


REFUSED = {
    "weights": (lambda world: other_weights(world), r"autoencoder\.weights: 'files .* there, 'files .* here"),
    "text encoder": (
        lambda world: ["--encoders.text.dtype", "bf16"],
        r"encoders\.text\.dtype: 'fp32' there, 'bf16' here",
    ),
    "posterior": (lambda world: ["--sample_posterior", "True"], "sample_posterior=True needs the deviation"),
    "tasks": (
        lambda world: ["--condition_config", "{'t2v': 1, 'i2v_loop': 1}"],
        r"needs latents of given frames \(\['tail1'\]\), store .* has those of \['head1'\]",
    ),
    "bucket": (
        lambda world: ["--bucket_config", "{'32px_ar1:1': {1: (1.0, 2), 5: (1.0, 2), 13: (1.0, 1)}}"],
        "rows of .* may come to bucket 32px_ar1:1/13 of 32x32, of which store .* has none",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_the_store_cannot_give_is_refused(
    world: Path, cache: Callable[..., Path], tmp_path: Path, case: str
) -> None:
    """Before a step is made, with both values and the remedy."""
    settings = [*hunyuan(world / "vae.safetensors"), "--sample_posterior", "False"]
    other, text = REFUSED[case]
    with pytest.raises(ValueError, match=text):
        build_toy(tmp_path, *settings, *from_cache(cache(*settings), world / "table.csv"), *other(world))


WAN = {"type": "wan", "num_attention_heads": 2, "attention_head_dim": 12, "ffn_dim": 32, "num_layers": 1}
WAN |= {"in_channels": 36, "out_channels": 16, "text_dim": 16}


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        (["--model", repr(WAN)], r"model\.ungiven='grey' encodes clips .* set model\.ungiven='zero'"),
        (["--encoders", "{'image': {'type': 'clip_vision', 'tiny': {}}}"], r"encoders\.image encodes given frames"),
    ],
)
def test_conditions_that_need_pixels_are_refused(
    world: Path, cache: Callable[..., Path], tmp_path: Path, settings: list[str], text: str
) -> None:
    """Those of published Wan i2v weights, when they are to be cached and when they are to be read."""
    check_no_pixels_needed(config_of("--model", repr(WAN | {"ungiven": "zero"})))
    check_no_pixels_needed(config_of("--model", repr(WAN | {"in_channels": 16})))  # text to video
    with pytest.raises(ValueError, match=text):
        cache_table(config_of(*patch(), *from_videos(world / "table.csv"), *settings), tmp_path / "store")
    with pytest.raises(ValueError, match=text):
        open_cached(config_of(*patch(), *from_cache(cache(*patch()), world / "table.csv"), *settings))


def test_another_table_or_caption_is_refused(world: Path, cache: Callable[..., Path], tmp_path: Path) -> None:
    """Rows of another table when the run is built, an edited caption when its row is read."""
    store, lines = cache(*patch()), (world / "table.csv").read_text().splitlines()
    (tmp_path / "short.csv").write_text("\n".join(lines[:-1]) + "\n")
    with pytest.raises(ValueError, match=r"has other rows .16, .* than the table in store"):
        build_toy(tmp_path, *patch(), *from_cache(store, tmp_path / "short.csv"))
    (tmp_path / "edited.csv").write_text("\n".join(lines).replace(",clip ", ",a clip ") + "\n")
    with pytest.raises(ValueError, match=r"has the caption 'a clip .*cached is 'clip"):
        train_toy(tmp_path, *patch(), *from_cache(store, tmp_path / "edited.csv"))


def test_what_an_entry_holds(world: Path, cache: Callable[..., Path]) -> None:
    """Mean, deviation and latents of the given frame in float32, as the encoder gives them."""
    store = open_store(cache(*hunyuan(world / "vae.safetensors"), "--sample_posterior", "True"))
    key = next(k for k in store.table()["key"].to_pylist() if "/9x32x32/" in k)
    found = store.read(key)
    assert {name: t.dtype for name, t in found.items() if "embeddings" not in name} == dict.fromkeys(
        ("latents", "latents_std", "references.head1"), torch.float32
    )
    assert found["references.head1"].shape == (4, 1, 4, 4) and (found["latents_std"] > 0).all()
