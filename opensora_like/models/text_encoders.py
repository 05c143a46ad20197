"""Frozen text encoders: T5, umT5 and CLIP.

Letters of the shape suffixes: B batch, L tokens, D width.
"""

from __future__ import annotations

import html
import importlib.util
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from opensora_like.models.embedding_cache import EmbeddingCache
from opensora_like.models.text_loading import (
    DTYPES,
    Precision,
    Tokenize,
    check_source,
    cut_and_pad,
    load_model,
    pipeline_parts,
    tie_embeddings,
)
from opensora_like.models.tiny_encoders import byte_tokenizer, tiny_clip, tiny_sizes, tiny_t5
from opensora_like.registry import MODELS

# encoders that a pipeline's folder may be given for -> which of its encoders they are
SUFFIXES = {"umt5": "", "clip": "_2"}


class FrozenEncoder(nn.Module):
    """What the encoders share: weights that stay as they are, a tokenizer, and a cache of what was encoded."""

    def __init__(
        self,
        model: nn.Module,
        tokenize: Tokenize,
        *,
        max_length: int,
        cache_size: int,
        cache_device: Literal["cpu", "same"],
        chunk_size: int,
    ) -> None:
        super().__init__()
        self.model, self._tokenize = model.requires_grad_(False).eval(), tokenize
        self.max_length, self._chunk_size = max_length, chunk_size
        self.output_dim = int(model.config.hidden_size)
        self._cache = EmbeddingCache(cache_size, keep_on_cpu=cache_device == "cpu")

    def train(self, mode: bool = True) -> nn.Module:
        """Stays in evaluation mode: the encoder is frozen."""
        return super().train(False)

    @property
    def device(self) -> torch.device:
        """Where the weights are; moved with ``.to``."""
        return next(self.model.parameters()).device

    def _look_up(self, texts: Sequence[str], length: int, run: Callable[[Sequence[str]], Tensor]) -> Tensor:
        return self._cache.look_up(texts, length, run, chunk_size=self._chunk_size, device=self.device)


def _read(
    kind: Literal["t5", "umt5", "clip"],
    from_pretrained: str | None,
    tiny: Mapping[str, int] | None,
    *,
    max_length: int,
    chunk_size: int,
    dtype: Precision,
    cache_dir: str | None,
) -> tuple[nn.Module, Tokenize]:
    """Model and tokenizer of one of the two sources."""
    check_source(kind, from_pretrained, tiny, max_length=max_length, chunk_size=chunk_size)
    if from_pretrained is not None:
        model, tokenizer = from_pretrained, from_pretrained
        if kind in SUFFIXES:
            model, tokenizer = pipeline_parts(from_pretrained, suffix=SUFFIXES[kind])
        loaded, words = load_model(kind, model, tokenizer, dtype=dtype, cache_dir=cache_dir)
        return loaded, cut_and_pad(words)
    sizes = tiny_sizes(tiny, kind)
    made = tiny_clip(sizes, max_length) if kind == "clip" else tiny_t5(sizes, kind)
    return made.to(DTYPES[dtype]), byte_tokenizer(bos=kind == "clip")


@MODELS.register_module("t5")
class T5TextEncoder(FrozenEncoder):
    """Token embeddings of a T5 encoder (also mT5, umT5).

    Captions are padded to `max_length`, and by default the padding is attended to and returned like any token, as
    Open-Sora v2 and FLUX were trained.

    Args:
        from_pretrained: folder, or name on the hub, of weights and tokenizer.
        tiny: instead: sizes of an encoder with fixed random weights, the same in every process, over bytes;
            any of hidden_size, num_layers, num_heads, seed. ``{}`` takes the defaults. For demos and tests.
        max_length: tokens of a caption; longer ones are cut.
        dtype: of weights and embeddings.
        cache_dir: where hub downloads are kept.
        attend_padding: False hides padding from the attention; its embeddings are then still returned.
        cache_size: captions whose embeddings are kept in memory (T5-XXL, 512 tokens, bf16: 4 MiB each).
        cache_device: "cpu", or "same" as the encoder.
        chunk_size: captions per forward. At 1 an embedding does not depend on the captions beside it, so that a
            resumed run with an empty cache repeats bit by bit.
        tp: the encoder is to be cut over the booster's tensor-parallel ranks, which encode the same captions; the
            program that builds a run does so with `cut`.

    Raises:
        ValueError: both or neither of `from_pretrained` and `tiny`, a size that does not fit.
        FileNotFoundError: `from_pretrained` is a path and there is no such folder.
        OSError: the folder or the hub has no such model.

    Source: hpcaitech/Open-Sora:opensora/models/text.
    """

    def __init__(
        self,
        from_pretrained: str | None = None,
        *,
        tiny: dict[str, int] | None = None,
        max_length: int = 512,
        dtype: Precision = "bf16",
        cache_dir: str | None = None,
        attend_padding: bool = True,
        cache_size: int = 256,
        cache_device: Literal["cpu", "same"] = "cpu",
        chunk_size: int = 1,
        tp: bool = False,
    ) -> None:
        sizes = {"max_length": max_length, "chunk_size": chunk_size}
        model, tokenize = _read("t5", from_pretrained, tiny, dtype=dtype, cache_dir=cache_dir, **sizes)
        super().__init__(model, tokenize, cache_size=cache_size, cache_device=cache_device, **sizes)
        self.tp, self._attend_padding = tp, attend_padding
        self._pad_id = int(model.config.pad_token_id or 0)

    def cut(self, cut_model: Callable[[nn.Module], None]) -> None:
        """Let `cut_model` change the encoder in place, as tensor parallelism does; its embeddings stay the same."""
        cut_model(self.model)

    def encode(self, texts: Sequence[str], *, pad_to: int | None = None) -> Tensor:
        """Embeddings of captions.

        Args:
            pad_to: tokens, not below `max_length`; the rest is padding. See `padded_length`.

        Returns: [B, L, D] with L = `pad_to` or `max_length`; on the encoder's device.

        Raises:
            ValueError: no captions, or a `pad_to` below `max_length`.
        """
        length = self.max_length if pad_to is None else pad_to
        if length < self.max_length:
            raise ValueError(
                f"t5 encoder: pad_to={pad_to} is below max_length={self.max_length}; only padding is added"
            )
        return self._look_up(texts, length, lambda missing: self._run(missing, length))

    def null(self, *, pad_to: int | None = None) -> Tensor:
        """What a dropped caption becomes: the embedding of the empty one. Returns: [1, L, D]."""
        return self.encode([""], pad_to=pad_to)

    def padded_length(self, num_image_tokens: int, *, multiple: int) -> int:
        """The least number of text tokens, from `max_length`, that makes all tokens a multiple of `multiple`."""
        return self.max_length + -(num_image_tokens + self.max_length) % multiple

    @torch.no_grad()
    def _run(self, texts: Sequence[str], length: int) -> Tensor:
        # cut at max_length first, so that pad_to never lets more of a caption in
        ids_BL = self._tokenize(texts, self.max_length)
        ids_BL = nn.functional.pad(ids_BL, (0, length - self.max_length), value=self._pad_id)
        ids_BL = ids_BL.to(self.device, non_blocking=True)
        mask = None if self._attend_padding else (ids_BL != self._pad_id).long()
        return self.model(input_ids=ids_BL, attention_mask=mask).last_hidden_state


@MODELS.register_module("umt5")
class UMT5TextEncoder(FrozenEncoder):
    """Token embeddings of a umT5 encoder as Wan takes them: padding is not attended to, and its embeddings are zero.

    Args:
        from_pretrained: folder, or name on the hub, of weights and tokenizer; of a pipeline's folder its
            ``text_encoder`` and ``tokenizer`` are taken.
        tiny, cache_dir, cache_size, cache_device, chunk_size, tp: as `T5TextEncoder`.
        max_length: tokens of a caption; longer ones are cut. Wan has seen 512, and attends to every row.
        dtype: of weights and embeddings; float16 is not offered, since umT5 overflows in it.
        clean: bring captions to the form that `clean_caption` describes.

    Raises:
        ValueError, FileNotFoundError, OSError: as `T5TextEncoder`; ValueError also for weights whose table of token
            embeddings is missing.

    Source: Wan, arXiv:2503.20314, section 4.2.2; diffusers:pipelines/wan.
    """

    def __init__(
        self,
        from_pretrained: str | None = None,
        *,
        tiny: dict[str, int] | None = None,
        max_length: int = 512,
        dtype: Literal["bf16", "fp32"] = "bf16",
        clean: bool = True,
        cache_dir: str | None = None,
        cache_size: int = 256,
        cache_device: Literal["cpu", "same"] = "cpu",
        chunk_size: int = 1,
        tp: bool = False,
    ) -> None:
        if dtype not in ("bf16", "fp32"):
            raise ValueError(f"umt5 encoder: dtype={dtype!r} overflows or is unknown; use 'bf16' or 'fp32'")
        sizes = {"max_length": max_length, "chunk_size": chunk_size}
        model, tokenize = _read("umt5", from_pretrained, tiny, dtype=dtype, cache_dir=cache_dir, **sizes)
        tie_embeddings(model, where=f"umt5 encoder: from_pretrained={from_pretrained!r}")
        super().__init__(model, tokenize, cache_size=cache_size, cache_device=cache_device, **sizes)
        self.tp, self._clean = tp, clean
        self._pad_id = int(model.config.pad_token_id or 0)

    def cut(self, cut_model: Callable[[nn.Module], None]) -> None:
        """As `T5TextEncoder.cut`."""
        cut_model(self.model)

    def encode(self, texts: Sequence[str]) -> Tensor:
        """Embeddings of captions.

        Returns: [B, max_length, D], exactly zero beyond each caption's end; on the encoder's device.

        Raises:
            FloatingPointError: an embedding that is not finite, or zero throughout.
        """
        if self._clean and not isinstance(texts, str):
            texts = [clean_caption(text) for text in texts]
        return self._look_up(texts, self.max_length, self._run)

    def null(self) -> Tensor:
        """What a dropped caption becomes: the embedding of the empty one. Returns: [1, L, D]."""
        return self.encode([""])

    @torch.no_grad()
    def _run(self, texts: Sequence[str]) -> Tensor:
        ids_BL = self._tokenize(texts, self.max_length).to(self.device, non_blocking=True)
        mask_BL = ids_BL != self._pad_id
        out_BLD = self.model(input_ids=ids_BL, attention_mask=mask_BL.long()).last_hidden_state
        out_BLD = out_BLD.masked_fill(~mask_BL[..., None], 0.0)
        largest_B = out_BLD.float().abs().amax(dim=(1, 2))  # nan where there is one
        for text, largest in zip(texts, largest_B.tolist(), strict=True):
            if not math.isfinite(largest) or largest == 0:
                raise FloatingPointError(
                    f"umt5 encoder: the embedding of {text[:60]!r} has a largest value of {largest} in"
                    f" {out_BLD.dtype}; the weights are broken, or use dtype='fp32'"
                )
        return out_BLD


def clean_caption(text: str) -> str:
    """A caption as Wan's were: mojibake mended (where ftfy is installed), HTML entities resolved, spaces single."""
    if importlib.util.find_spec("ftfy") is not None:
        import ftfy

        text = ftfy.fix_text(text)
    # twice, since captions from the web are often escaped twice
    return " ".join(html.unescape(html.unescape(text)).split())


@MODELS.register_module("clip")
class CLIPTextEncoder(FrozenEncoder):
    """The pooled embedding of a CLIP text encoder: its last hidden state at the end of the caption.

    Args:
        from_pretrained: as `T5TextEncoder`; of a pipeline's folder its ``text_encoder_2`` and ``tokenizer_2``, where
            HunyuanVideo has them, are taken.
        tiny, max_length, dtype, cache_dir, cache_size, cache_device, chunk_size: as `T5TextEncoder`.

    Raises:
        ValueError, FileNotFoundError, OSError: as `T5TextEncoder`; ValueError also where the model has fewer than
            `max_length` positions.

    Source: hpcaitech/Open-Sora:opensora/models/text.
    """

    def __init__(
        self,
        from_pretrained: str | None = None,
        *,
        tiny: dict[str, int] | None = None,
        max_length: int = 77,
        dtype: Precision = "bf16",
        cache_dir: str | None = None,
        cache_size: int = 4096,
        cache_device: Literal["cpu", "same"] = "cpu",
        chunk_size: int = 1,
    ) -> None:
        sizes = {"max_length": max_length, "chunk_size": chunk_size}
        model, tokenize = _read("clip", from_pretrained, tiny, dtype=dtype, cache_dir=cache_dir, **sizes)
        positions = model.config.max_position_embeddings
        if max_length > positions:
            raise ValueError(
                f"clip encoder: max_length={max_length}, but the model has {positions} positions; lower it"
            )
        super().__init__(model, tokenize, cache_size=cache_size, cache_device=cache_device, **sizes)

    def encode(self, texts: Sequence[str]) -> Tensor:
        """Embeddings of captions. Returns: [B, D]; on the encoder's device."""
        return self._look_up(texts, self.max_length, self._run)

    def null(self) -> Tensor:
        """What a dropped caption becomes: the embedding of the empty one. Returns: [1, D]."""
        return self.encode([""])

    @torch.no_grad()
    def _run(self, texts: Sequence[str]) -> Tensor:
        ids_BL = self._tokenize(texts, self.max_length).to(self.device, non_blocking=True)
        return self.model(input_ids=ids_BL).pooler_output
