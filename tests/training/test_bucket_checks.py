"""Buckets that the autoencoder cannot code stop a run before it begins, with the sizes that would do."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from opensora_like.datasets.bucket import compile_buckets
from opensora_like.registry import MODELS, build
from opensora_like.training.data_checks import bucket_errors
from tests.training.harness import build_toy

CAUSAL = {"type": "hunyuan_vae", "latent_channels": 4, "layers_per_block": 1, "norm_num_groups": 4}
CAUSAL["block_out_channels"] = (8, 8, 8, 8)
NOT_CAUSAL = {"type": "dc_ae"}


def autoencoder_of(section: dict):
    with torch.device("meta"):
        return build(section, MODELS, where="autoencoder")


def test_frames_of_a_causal_autoencoder_are_4k_plus_1() -> None:
    """Each frame count that is not is named by its key, with both of its neighbours; images and 4k+1 pass."""
    buckets = compile_buckets({"256px": dict.fromkeys((1, 5, 32, 33, 34, 129), (1.0, 1))}, multiple=16)
    errors = bucket_errors(buckets, autoencoder_of(CAUSAL))
    assert [line.split(" (")[0] for line in errors] == ["bucket_config.256px.34", "bucket_config.256px.32"]
    assert "num_frames=34 is not 4 * k + 1; nearest allowed: 33 or 37" in errors[0]
    assert "num_frames=32 is not 4 * k + 1; nearest allowed: 29 or 33" in errors[1]


def test_frames_of_one_that_is_not_causal_are_4k() -> None:
    """The high-compression autoencoder takes multiples of 4, and images."""
    buckets = compile_buckets({"256px": dict.fromkeys((1, 32, 33), (1.0, 1))}, multiple=32)
    (error,) = bucket_errors(buckets, autoencoder_of(NOT_CAUSAL))
    assert error.startswith("bucket_config.256px.33") and "nearest allowed: 32 or 36" in error


def test_sides_that_do_not_divide_are_named_with_their_neighbours() -> None:
    """Sides follow from `multiple`, which a run takes from its models; of another one both neighbours are named."""
    buckets = compile_buckets({"100px_ar1:1": {1: (1.0, 1)}}, multiple=4)
    (error,) = bucket_errors(buckets, autoencoder_of(CAUSAL))
    assert "height=100 is not 8 * k; nearest allowed: 96 or 104" in error


def test_a_run_is_refused_before_it_begins(tmp_path: Path) -> None:
    """The keys of both wrong entries are in the message."""
    settings = ["--autoencoder.temporal_stride", "4", "--model.in_channels", "48"]
    settings += ["--bucket_config", "{'8px_ar1:1': {1: (1.0, 3), 6: (1.0, 2), 8: (0.5, 2)}}"]
    with pytest.raises(ValueError, match="the autoencoder cannot code these buckets") as caught:
        build_toy(tmp_path, *settings)
    assert "bucket_config.8px_ar1:1.8 (ratio 1:1): patch: num_frames=8 is not 4 * k + 1" in str(caught.value)
    assert "num_frames=6 is not 4 * k + 1; nearest allowed: 5 or 9" in str(caught.value)
