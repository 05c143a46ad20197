"""What the latents and embeddings of a cache depend on: the encoders' arguments and the identity of their weights."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from opensora_like.models.base import Autoencoder
from opensora_like.registry import MODELS, build, fit_arguments, parameters_of, resolve

# arguments that say how an encoder is run, not what comes out; where its weights are is told by their digest
_WITHOUT_EFFECT = {
    *("from_pretrained", "cache_dir", "cache_size", "cache_device", "tp", "mini_batch_size", "use_slicing"),
    "version",  # weights are of one
}
# of a pipeline's folder, what an encoder reads
_PARTS = {
    "wan_vae": ("vae",),
    "hunyuan_vae": ("vae",),
    "umt5": ("text_encoder", "tokenizer"),
    "llm": ("text_encoder", "tokenizer"),
    "clip": ("text_encoder_2", "tokenizer_2"),
}
_END = 1 << 16  # bytes that are read at both ends of a file


def cache_fingerprint(
    autoencoder: Mapping[str, Any], encoders: Mapping[str, Mapping[str, Any]], *, facts: Mapping[str, Any]
) -> dict[str, Any]:
    """The fingerprint of a store of latents and text embeddings.

    Args:
        autoencoder, encoders: sections of a config; encoders by condition name.
        facts: `latent_facts` of the autoencoder.

    Returns: nested and json-able, for `latent_store.StoreWriter`; who writes adds parts of its own.

    Raises:
        ValueError, FileNotFoundError: as `encoder_fingerprint`.
    """
    return {
        "autoencoder": encoder_fingerprint(autoencoder, where="autoencoder"),
        "latents": dict(facts),
        "encoders": {name: encoder_fingerprint(part, where=f"encoders.{name}") for name, part in encoders.items()},
    }


def latent_facts(autoencoder: Autoencoder) -> dict[str, Any]:
    """What a run on cached latents must know of the autoencoder that it does not build."""
    names = ("latent_channels", "temporal_stride", "spatial_stride", "is_causal", "has_deviation")
    return {name: getattr(autoencoder, name) for name in names}


def encoder_fingerprint(section: Mapping[str, Any], *, where: str) -> dict[str, Any]:
    """Type, arguments and weights of an autoencoder or a text encoder, without loading published weights.

    Weights of files are told by names, sizes and the bytes at both ends, so a copy on another machine is the same one,
    and an edit that keeps all of these is not seen. Weights of the hub are told by their name, and the commit where it
    is in the cache. Random weights are built and hashed.

    Raises:
        ValueError: the section does not fit its type.
        FileNotFoundError: weights that are not there.
    """
    cls = resolve(section.get("type"), MODELS, where=where)
    given = fit_arguments(cls, section, where=where)
    defaults = {n: p.default for n, p in parameters_of(cls).items() if p.default is not inspect.Parameter.empty}
    options = {name: value for name, value in {**defaults, **given}.items() if name not in _WITHOUT_EFFECT}
    source = given.get("from_pretrained")
    if source is None:
        weights = parameters_digest(build(section, MODELS, where=where))
    else:
        weights = _source_digest(source, section["type"], cache_dir=given.get("cache_dir"), where=where)
    return {"type": section["type"], **options, "weights": weights}


def parameters_digest(module: nn.Module) -> str:
    """Names, dtypes, shapes and values of all parameters and buffers."""
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name}/{tensor.dtype}/{list(tensor.shape)}/".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return f"values {digest.hexdigest()}"


def _source_digest(source: str, kind: str, *, cache_dir: str | None, where: str) -> str:
    path = Path(source)
    if path.is_file():
        return files_digest([path], root=path.parent)
    if path.is_dir():
        parts = [path / part for part in _PARTS.get(kind, ()) if (path / part).is_dir()] or [path]
        root = parts[0] if len(parts) == 1 else path  # so that a pipeline and its part are the same
        found = [file.relative_to(root) for part in parts for file in part.rglob("*") if file.is_file()]
        return files_digest([root / file for file in found if not str(file).startswith(".")], root=root)
    if source.startswith(("/", ".", "~")):
        raise FileNotFoundError(f"{where}.from_pretrained={source!r} is not there; correct the path")
    from huggingface_hub import try_to_load_from_cache

    config = try_to_load_from_cache(source, "config.json", cache_dir=cache_dir)
    return f"hub {source}" + (f" {Path(config).parent.name}" if isinstance(config, str) else "")


def files_digest(files: Iterable[Path], *, root: Path) -> str:
    """Names below `root`, sizes and ends of files; it does not depend on where the folder is, nor on times."""
    about = []
    for file in sorted(files):
        size = file.stat().st_size
        with file.open("rb") as stream:
            ends = hashlib.blake2b(stream.read(_END), digest_size=16)
            stream.seek(max(0, size - _END))
            ends.update(stream.read(_END))
        about.append([str(file.relative_to(root)), size, ends.hexdigest()])
    return f"files {hashlib.blake2b(json.dumps(about).encode(), digest_size=16).hexdigest()}"
