"""Prompts of a prepared dataset: their texts, and the embeddings that are cached there, in place of a text encoder."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from opensora_like.datasets.latent_store import MANIFEST, open_store
from opensora_like.datasets.meta_file import read_meta
from opensora_like.models.base import TextEncoder
from opensora_like.publish import is_draft
from opensora_like.runtime import logger

ReadEmbeddings = Callable[[], dict[str, Tensor]]
PREFIX = "embeddings."
META_CONDITION = "text"  # what the embeddings of a .meta file are to Wan


@dataclass(frozen=True)
class CachedPrompt:
    """One clip of a prepared dataset.

    Args:
        name: stem of its files.
        read: condition name -> embeddings without a batch dimension, read when they are needed.
    """

    name: str
    text: str
    read: ReadEmbeddings


@dataclass(frozen=True)
class CachedPrompts:
    """The clips of a folder that have a text.

    Args:
        null: condition name -> embeddings of the empty prompt; {} where none were kept.
    """

    prompts: Sequence[CachedPrompt]
    null: Mapping[str, Tensor]


def read_cached_prompts(folder: str | Path) -> CachedPrompts:
    """The prompts of a store of latents, or of a folder of ``.meta`` files, in the order of their names.

    Raises:
        FileNotFoundError: no such folder, or nothing prepared in it.
        ValueError: a file that is broken, or no clip with a text.
    """
    folder = Path(folder)
    if (folder / MANIFEST).is_file():
        found = _of_store(folder)
    else:
        files = sorted(f for f in folder.glob("*.meta") if not is_draft(f)) if folder.is_dir() else []
        if not files:
            raise FileNotFoundError(
                f"meta_folder={str(folder)!r} has neither {MANIFEST} of a store of latents nor *.meta files"
            )
        found = _of_files(files)
    with_text = [prompt for prompt in found.prompts if prompt.text.strip()]
    if skipped := len(found.prompts) - len(with_text):
        logger.warning("meta_folder=%r: %d of %d clips have no text", str(folder), skipped, len(found.prompts))
    if not with_text:
        raise ValueError(f"meta_folder={str(folder)!r}: none of {len(found.prompts)} clips has a text")
    return CachedPrompts(with_text, found.null)


def _of_store(folder: Path) -> CachedPrompts:
    store = open_store(folder)
    rows = store.table().select(["key", "text"]).to_pylist()

    def reader(key: str) -> ReadEmbeddings:
        return lambda: {n.removeprefix(PREFIX): t for n, t in store.read(key).items() if n.startswith(PREFIX)}

    names = _file_names([row["key"] for row in rows])
    prompts = [CachedPrompt(name, row["text"] or "", reader(row["key"])) for name, row in zip(names, rows, strict=True)]
    return CachedPrompts(prompts, store.null)


def _of_files(files: Sequence[Path]) -> CachedPrompts:
    def reader(file: Path) -> ReadEmbeddings:
        return lambda: {META_CONDITION: read_meta(file).embeddings_LD}

    return CachedPrompts([CachedPrompt(f.stem, read_meta(f).text, reader(f)) for f in files], {})


def _file_names(keys: Sequence[str]) -> list[str]:
    """Keys may be paths: the last part, with a number where it is not the only one."""
    stems = [Path(key).stem or "clip" for key in keys]
    counts = Counter(stems)
    return [stem if counts[stem] == 1 else f"{stem}_{number:06d}" for number, stem in enumerate(stems)]


class KnownTexts(nn.Module):
    """A `TextEncoder` of texts whose embeddings are known; the others, as the negative prompt, are encoded once.

    Args:
        condition: name of the condition.
        readers: text -> its embeddings.
        null: of the empty prompt, None where it was not kept.
        build: makes the encoder; called when it is needed, and what it makes is let go at once.
        device: of what is returned.
    """

    def __init__(
        self,
        condition: str,
        readers: Mapping[str, ReadEmbeddings],
        *,
        null: Tensor | None,
        build: Callable[[], TextEncoder],
        device: torch.device,
    ) -> None:
        super().__init__()
        self._condition, self._readers, self._build, self._device = condition, readers, build, device
        self._known: dict[str, Tensor] = {} if null is None else {"": null}
        self._shape: torch.Size | None = None

    @torch.no_grad()
    def encode(self, texts: Sequence[str]) -> Tensor:
        """[B, L, D] or [B, D], as cached.

        Raises:
            ValueError: embeddings of several shapes, or not of this condition.
        """
        if unknown := [t for t in dict.fromkeys(texts) if t not in self._readers and t not in self._known]:
            encoder = self._build()
            for text in unknown:
                self._known[text] = encoder.encode([text])[0].cpu()
            del encoder
        return torch.stack([self._of(text) for text in texts]).to(self._device)

    def _of(self, text: str) -> Tensor:
        if text in self._readers:
            found = self._readers[text]()
            if self._condition not in found:
                raise ValueError(
                    f"embeddings of {text!r} are of {sorted(found)}, the model takes {self._condition!r}; prepare the "
                    "data with the encoders of this config"
                )
            return self._fitted(found[self._condition], text)
        return self._fitted(self._known[text], text)

    def _fitted(self, embedding: Tensor, text: str) -> Tensor:
        """With as many tokens as the cached ones have: what is cut off or put on is zero."""
        if self._shape is None:
            self._shape = embedding.shape
        if embedding.shape == self._shape or embedding.ndim != 2:
            return embedding
        length = self._shape[0]
        if len(embedding) < length:
            return torch.cat([embedding, embedding.new_zeros(length - len(embedding), embedding.shape[1])])
        if embedding[length:].any():
            raise ValueError(
                f"embeddings of {text!r} fill {len(embedding)} tokens, others of this folder have {length}; prepare "
                "all with one max_length"
            )
        return embedding[:length]
