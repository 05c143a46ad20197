"""Make a store of latents out of a folder of `.meta` files, so that it can be trained on."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from opensora_like.datasets.latent_store import StoreWriter, finish
from opensora_like.datasets.meta_file import MetaClip, read_meta
from opensora_like.models.fingerprint import cache_fingerprint, latent_facts
from opensora_like.preparation.sinks import NULL, SETTINGS, TEXT, forget_failures
from opensora_like.preparation.videos import Counts
from opensora_like.publish import is_draft
from opensora_like.registry import MODELS, build

logger = logging.getLogger("opensora_like")


def meta_files(folder: str | Path) -> list[Path]:
    """The `.meta` files of a folder and of those below it, sorted; some writers call them `.pt`.

    Raises:
        FileNotFoundError: no such folder, or none in it.
    """
    found = sorted(path for path in Path(folder).rglob("*") if path.suffix in (".meta", ".pt") and not is_draft(path))
    if not found:
        raise FileNotFoundError(f"from_meta={str(folder)!r} has no .meta files")
    return found


def convert(folder: str | Path, store: str | Path, made_by: Mapping[str, Any], null_LD: Tensor) -> Counts:
    """Add the clips of `.meta` files to a store; what is there already stays, a file that cannot be read is listed.

    Args:
        made_by: the fingerprint of the encoders that made the files; see `provenance`.
        null_LD: the embedding of the empty caption.

    Raises:
        FileNotFoundError, ValueError: no files, or a store that was made with other settings.
    """
    files = meta_files(folder)
    forget_failures(Path(store))
    made = kept = failed = 0
    left_out: Counter[str] = Counter()
    with StoreWriter(store, fingerprint=made_by, shard_bytes=2**28) as writer:
        writer.add_null({TEXT: null_LD})
        for file in files:
            key = file.relative_to(folder).as_posix()
            if writer.has(key):
                kept += 1
                continue
            try:
                clip = read_meta(file)
                if clip.embeddings_LD.shape != null_LD.shape:
                    shapes = f"{tuple(clip.embeddings_LD.shape)}, that of the empty caption {tuple(null_LD.shape)}"
                    raise ValueError(f"{str(file)!r}: the caption's embedding is {shapes}")
                writer.add(key, _tensors(clip), _facts(clip, key))
            except ValueError as problem:
                failed += 1
                writer.fail(key, str(problem))
                logger.warning("%s", problem)
                continue
            made += 1
            left_out.update(clip.other)
    for name, count in left_out.items():
        logger.warning("%s, which Wan 2.1 does not take, is left out of %d files", name, count)
    if made + kept:
        finish(store)
    return Counts(made, kept, failed)


def _tensors(clip: MetaClip) -> dict[str, Tensor]:
    tensors = {"latents": clip.latents_CTHW, f"embeddings.{TEXT}": clip.embeddings_LD}
    if clip.first_frame is not None:
        tensors["first_frame"] = torch.from_numpy(np.frombuffer(clip.first_frame, np.uint8).copy())
    return tensors


def _facts(clip: MetaClip, key: str) -> dict[str, str | int | float]:
    height, width = clip.size
    sizes = {"num_frames": clip.num_frames, "height": height, "width": width}
    return {"path": clip.file_name or key, "text": clip.text, **sizes, "fps": clip.fps}


def provenance(
    folder: str | Path, sections: tuple[Mapping[str, Any], Mapping[str, Any]] | None
) -> tuple[dict[str, Any], Tensor]:
    """By which encoders a folder of `.meta` files was made, and their embedding of the empty caption.

    Args:
        sections: autoencoder and text encoder as in a config, for files of other programs, which do not tell. The
            number of tokens is taken from the files. None for a folder that was made here.

    Raises:
        ValueError: the folder does not tell and there are no `sections`, or it tells and there are.
    """
    settings, null = Path(folder) / SETTINGS, Path(folder) / NULL
    if settings.is_file() and null.is_file():
        from safetensors.torch import load_file

        if sections is not None:
            raise ValueError(f"{str(settings)!r} says by which encoders the files were made; remove --model")
        return json.loads(settings.read_text()), load_file(null)[TEXT]
    if sections is None:
        raise ValueError(
            f"{str(folder)!r} has no {SETTINGS}, so nothing says by which encoders its files were made; give --model"
        )
    autoencoder, text_encoder = sections[0], {**sections[1], "max_length": _num_tokens(folder)}
    facts = latent_facts(build(autoencoder, MODELS, where="autoencoder"))
    null_LD = build(text_encoder, MODELS, where=f"encoders.{TEXT}").encode([""])[0]
    return cache_fingerprint(autoencoder, {TEXT: text_encoder}, facts=facts) | {"made_by": ".meta files"}, null_LD


def _num_tokens(folder: str | Path) -> int:
    """Of the first file that can be read. Raises ValueError if none can."""
    for file in meta_files(folder):
        try:
            return read_meta(file).embeddings_LD.shape[0]
        except ValueError as problem:
            logger.info("%s", problem)
    raise ValueError(f"from_meta={str(folder)!r}: none of the .meta files can be read")
