"""A fingerprint tells encoders with other outputs apart, and copies of the same not."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from opensora_like.models.fingerprint import cache_fingerprint, encoder_fingerprint, latent_facts
from opensora_like.registry import MODELS, build

TEXT = {"type": "t5", "tiny": {"hidden_size": 16, "num_layers": 1, "num_heads": 2}, "dtype": "fp32"}


def folder_of(path: Path, *, content: bytes = b"weights" * 50_000) -> Path:
    """What looks like a pipeline."""
    for part in ("vae", "text_encoder", "tokenizer", "transformer"):
        (path / part).mkdir(parents=True)
        (path / part / "config.json").write_text("{}")
        (path / part / "model.safetensors").write_bytes(content + part.encode())
    return path


def weights_of(kind: str, source: Path) -> str:
    return encoder_fingerprint({"type": kind, "from_pretrained": str(source)}, where="encoders.text")["weights"]


def test_random_weights_are_told_by_their_values() -> None:
    """Another seed or dtype is another encoder; how it is run and what is left at its default is not."""
    one = encoder_fingerprint(TEXT, where="encoders.text")
    run = {**TEXT, "cache_size": 3, "tp": True, "max_length": 512}
    assert encoder_fingerprint(run, where="encoders.text") == one
    for other in ({"tiny": {**TEXT["tiny"], "seed": 1}}, {"dtype": "bf16"}, {"max_length": 64}):
        assert encoder_fingerprint({**TEXT, **other}, where="encoders.text") != one
    patch = {"type": "patch", "patch_size": 4}
    made = cache_fingerprint(patch, {"text": TEXT}, facts=latent_facts(build(patch, MODELS)))
    assert made["encoders"]["text"] == one and made["latents"]["spatial_stride"] == 4


def test_files_are_told_by_what_is_in_them(tmp_path: Path) -> None:
    """A copy elsewhere is the same, whatever its times; a byte at either end or another size is not."""
    one = folder_of(tmp_path / "one")
    shutil.copytree(one, tmp_path / "copy")
    for kind in ("wan_vae", "umt5"):
        assert weights_of(kind, one) == weights_of(kind, tmp_path / "copy")
        assert weights_of(kind, folder_of(tmp_path / kind, content=b"weightz" * 50_000)) != weights_of(kind, one)
    assert weights_of("wan_vae", one) == weights_of("wan_vae", one / "vae")
    (one / "transformer" / "more.bin").write_bytes(b"of another model")
    assert weights_of("umt5", one) == weights_of("umt5", tmp_path / "copy")
    file = one / "vae" / "model.safetensors"
    before = weights_of("wan_vae", file)
    file.write_bytes(file.read_bytes() + b"x")
    assert weights_of("wan_vae", file) != before


def test_what_is_not_there_says_so(tmp_path: Path) -> None:
    """A path, not a name of the hub."""
    with pytest.raises(FileNotFoundError, match=r"encoders\.text\.from_pretrained=.* is not there"):
        weights_of("umt5", tmp_path / "none")
    assert encoder_fingerprint({"type": "umt5", "from_pretrained": "some/name"}, where="encoders.text")[
        "weights"
    ].startswith("hub some/name")
