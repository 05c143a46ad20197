"""Frozen text encoders, T5, umT5 and CLIP, with a bounded cache of what they encoded.

Letters of the shape suffixes: B batch, L tokens, D width.
"""

from __future__ import annotations

import html
import importlib.util
import math
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from opensora_like.registry import MODELS, nearest
from opensora_like.rng import generator

Precision = Literal["bf16", "fp16", "fp32"]
Tokenize = Callable[[Sequence[str], int], Tensor]  # (texts, length) -> int64 [B, length]
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

# ids of the byte tokenizer, bytes at 3 to 258; CLIP's pooling gives an end id of 2 a meaning of its own
PAD, EOS, FIRST_BYTE, BOS = 0, 1, 3, 259
NUM_BYTE_IDS = 260
ARCHITECTURES = {
    "t5": {"t5": "T5EncoderModel", "mt5": "MT5EncoderModel", "umt5": "UMT5EncoderModel"},
    "umt5": {"umt5": "UMT5EncoderModel"},
    "clip": {"clip": "CLIPTextModel", "clip_text_model": "CLIPTextModel"},
}
TINY = {"hidden_size": 64, "num_layers": 2, "num_heads": 4, "seed": 0}
# part of a weight's name -> its size over the usual. T5's heads look at places, so that the order of bytes matters;
# CLIP's end token carries more of what it attends to than of where it stands. Chosen by a linear probe of captions.
TINY_GAINS = {"relative_attention_bias": 2.0, "position_embedding": 0.3, "out_proj": 3.0}


@MODELS.register_module("t5")
class T5TextEncoder(nn.Module):
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
        super().__init__()
        _check_source("t5", from_pretrained, tiny, max_length=max_length, chunk_size=chunk_size)
        self.max_length, self._attend_padding, self._chunk_size = max_length, attend_padding, chunk_size
        self.tp = tp
        if tiny is not None:
            self.model = _tiny_t5(_tiny_sizes(tiny, "t5")).to(DTYPES[dtype])
            self._tokenize: Tokenize = _byte_tokenizer(bos=False)
        else:
            self.model = _load_model("t5", from_pretrained, dtype=dtype, cache_dir=cache_dir)
            self._tokenize = _load_tokenizer(from_pretrained, cache_dir=cache_dir)
        self.model.requires_grad_(False).eval()
        self.output_dim = int(self.model.config.d_model)
        self._pad_id = int(self.model.config.pad_token_id or 0)
        self._cache = EmbeddingCache(cache_size, keep_on_cpu=cache_device == "cpu")

    def cut(self, cut_model: Callable[[nn.Module], None]) -> None:
        """Let `cut_model` change the encoder in place, as tensor parallelism does; its embeddings stay the same."""
        cut_model(self.model)

    def train(self, mode: bool = True) -> T5TextEncoder:
        """Stays in evaluation mode: the encoder is frozen."""
        return super().train(False)

    @property
    def device(self) -> torch.device:
        """Where the weights are; moved with ``.to``."""
        return next(self.model.parameters()).device

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
        return self._cache.look_up(
            texts, length, lambda missing: self._run(missing, length), chunk_size=self._chunk_size, device=self.device
        )

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
        ids_BL = nn.functional.pad(ids_BL, (0, length - self.max_length), value=self._pad_id).to(self.device)
        mask = None if self._attend_padding else (ids_BL != self._pad_id).long()
        return self.model(input_ids=ids_BL, attention_mask=mask).last_hidden_state


@MODELS.register_module("umt5")
class UMT5TextEncoder(nn.Module):
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
        super().__init__()
        _check_source("umt5", from_pretrained, tiny, max_length=max_length, chunk_size=chunk_size)
        if dtype not in ("bf16", "fp32"):
            raise ValueError(f"umt5 encoder: dtype={dtype!r} overflows or is unknown; use 'bf16' or 'fp32'")
        self.max_length, self._clean, self._chunk_size = max_length, clean, chunk_size
        self.tp = tp
        if tiny is not None:
            self.model = _tiny_umt5(_tiny_sizes(tiny, "umt5")).to(DTYPES[dtype])
            self._tokenize: Tokenize = _byte_tokenizer(bos=False)
        else:
            source, tokenizer = _pipeline_parts(from_pretrained)
            self.model = _load_model("umt5", source, dtype=dtype, cache_dir=cache_dir)
            self._tokenize = _load_tokenizer(tokenizer, cache_dir=cache_dir)
        _tie_embeddings(self.model, where=f"umt5 encoder: from_pretrained={from_pretrained!r}")
        self.model.requires_grad_(False).eval()
        self.output_dim = int(self.model.config.d_model)
        self._pad_id = int(self.model.config.pad_token_id or 0)
        self._cache = EmbeddingCache(cache_size, keep_on_cpu=cache_device == "cpu")

    def cut(self, cut_model: Callable[[nn.Module], None]) -> None:
        """As `T5TextEncoder.cut`."""
        cut_model(self.model)

    def train(self, mode: bool = True) -> UMT5TextEncoder:
        """Stays in evaluation mode: the encoder is frozen."""
        return super().train(False)

    @property
    def device(self) -> torch.device:
        """Where the weights are; moved with ``.to``."""
        return next(self.model.parameters()).device

    def encode(self, texts: Sequence[str]) -> Tensor:
        """Embeddings of captions.

        Returns: [B, max_length, D], exactly zero beyond each caption's end; on the encoder's device.

        Raises:
            FloatingPointError: an embedding that is not finite, or zero throughout.
        """
        if self._clean and not isinstance(texts, str):
            texts = [clean_caption(text) for text in texts]
        return self._cache.look_up(texts, self.max_length, self._run, chunk_size=self._chunk_size, device=self.device)

    def null(self) -> Tensor:
        """What a dropped caption becomes: the embedding of the empty one. Returns: [1, L, D]."""
        return self.encode([""])

    @torch.no_grad()
    def _run(self, texts: Sequence[str]) -> Tensor:
        ids_BL = self._tokenize(texts, self.max_length).to(self.device)
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
class CLIPTextEncoder(nn.Module):
    """The pooled embedding of a CLIP text encoder: its last hidden state at the end of the caption.

    Args:
        from_pretrained, tiny, max_length, dtype, cache_dir, cache_size, cache_device, chunk_size: as `T5TextEncoder`.

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
        super().__init__()
        _check_source("clip", from_pretrained, tiny, max_length=max_length, chunk_size=chunk_size)
        self.max_length, self._chunk_size = max_length, chunk_size
        if tiny is not None:
            self.model = _tiny_clip(_tiny_sizes(tiny, "clip"), max_length).to(DTYPES[dtype])
            self._tokenize: Tokenize = _byte_tokenizer(bos=True)
        else:
            self.model = _load_model("clip", from_pretrained, dtype=dtype, cache_dir=cache_dir)
            self._tokenize = _load_tokenizer(from_pretrained, cache_dir=cache_dir)
        positions = self.model.config.max_position_embeddings
        if max_length > positions:
            raise ValueError(
                f"clip encoder: max_length={max_length}, but the model has {positions} positions; lower it"
            )
        self.model.requires_grad_(False).eval()
        self.output_dim = int(self.model.config.hidden_size)
        self._cache = EmbeddingCache(cache_size, keep_on_cpu=cache_device == "cpu")

    def train(self, mode: bool = True) -> CLIPTextEncoder:
        """Stays in evaluation mode: the encoder is frozen."""
        return super().train(False)

    @property
    def device(self) -> torch.device:
        """Where the weights are; moved with ``.to``."""
        return next(self.model.parameters()).device

    def encode(self, texts: Sequence[str]) -> Tensor:
        """Embeddings of captions. Returns: [B, D]; on the encoder's device."""
        return self._cache.look_up(texts, self.max_length, self._run, chunk_size=self._chunk_size, device=self.device)

    def null(self) -> Tensor:
        """What a dropped caption becomes: the embedding of the empty one. Returns: [1, D]."""
        return self.encode([""])

    @torch.no_grad()
    def _run(self, texts: Sequence[str]) -> Tensor:
        ids_BL = self._tokenize(texts, self.max_length).to(self.device)
        return self.model(input_ids=ids_BL).pooler_output


class EmbeddingCache:
    """Embeddings of the captions used last.

    Args:
        size: most captions kept; 0 keeps none.
        keep_on_cpu: keep them on the CPU, whatever device made them.
    """

    def __init__(self, size: int, *, keep_on_cpu: bool) -> None:
        if size < 0:
            raise ValueError(f"encoder cache_size={size} must be 0 or more")
        self._size, self._keep_on_cpu = size, keep_on_cpu
        self._kept: OrderedDict[tuple[str, int], Tensor] = OrderedDict()

    def __len__(self) -> int:
        return len(self._kept)

    def look_up(
        self,
        texts: Sequence[str],
        length: int,
        run: Callable[[Sequence[str]], Tensor],
        *,
        chunk_size: int,
        device: torch.device,
    ) -> Tensor:
        """One embedding per text on `device`; each distinct text that is not kept is run once.

        Args:
            length: tokens; part of the key.
            run: texts -> stacked embeddings.
        """
        if isinstance(texts, str) or not texts:
            raise ValueError(f"text encoder: got {texts!r}; give a list of at least one caption")
        found = {text: self._kept[text, length] for text in texts if (text, length) in self._kept}
        missing = [text for text in dict.fromkeys(texts) if text not in found]
        for start in range(0, len(missing), chunk_size):
            chunk = missing[start : start + chunk_size]
            found |= zip(chunk, run(chunk).unbind(), strict=True)
        for text, embedding in found.items():
            self._keep((text, length), embedding)
        return torch.stack([found[text].to(device) for text in texts])

    def _keep(self, key: tuple[str, int], embedding: Tensor) -> None:
        if key not in self._kept and self._size:
            # a copy, since a view would keep the memory of its whole chunk
            self._kept[key] = embedding.to("cpu" if self._keep_on_cpu else embedding.device, copy=True)
        if key in self._kept:
            self._kept.move_to_end(key)
        while len(self._kept) > self._size:
            self._kept.popitem(last=False)


def _check_source(name: str, from_pretrained: str | None, tiny: Mapping | None, **sizes: int) -> None:
    if (from_pretrained is None) == (tiny is None):
        raise ValueError(
            f"{name} encoder: from_pretrained={from_pretrained!r} and tiny={tiny!r}; give exactly one of a folder or"
            " hub name, and the sizes of a tiny random encoder"
        )
    for key, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name} encoder: {key}={size} must be 1 or more")


def _load_model(kind: str, source: str, *, dtype: Precision, cache_dir: str | None) -> nn.Module:
    """The published encoder at `source`, of the architecture its config names."""
    import transformers

    if source.startswith(("/", "./", "../", "~")) and not Path(source).is_dir():
        raise FileNotFoundError(f"{kind} encoder: from_pretrained={source!r} is not a folder; download the model there")
    try:
        architecture = transformers.AutoConfig.from_pretrained(source, cache_dir=cache_dir).model_type
    except (OSError, ValueError) as error:
        raise OSError(
            f"{kind} encoder: from_pretrained={source!r} is neither a folder with a model nor one the hub gives;"
            " give a local folder, or check the name and the network"
        ) from error
    if architecture not in ARCHITECTURES[kind]:
        raise ValueError(
            f"{kind} encoder: from_pretrained={source!r} holds a {architecture!r} model, one of"
            f" {sorted(ARCHITECTURES[kind])} is needed"
        )
    cls = getattr(transformers, ARCHITECTURES[kind][architecture])
    return cls.from_pretrained(source, dtype=DTYPES[dtype], cache_dir=cache_dir)


def _pipeline_parts(source: str) -> tuple[str, str]:
    """Where the model and the tokenizer are: side by side, or in the folders of a pipeline."""
    parts = Path(source) / "text_encoder", Path(source) / "tokenizer"
    return (str(parts[0]), str(parts[1])) if all(part.is_dir() for part in parts) else (source, source)


def _tie_embeddings(model: nn.Module, *, where: str) -> None:
    """Let the encoder read the table that was loaded; transformers 5 can leave its own name for it zero."""
    shared, own = model.shared.weight, model.encoder.embed_tokens.weight
    if own is not shared and not torch.equal(own, shared):
        model.encoder.embed_tokens.weight = model.shared.weight = shared if shared.any() else own
    if not model.shared.weight.any():
        raise ValueError(f"{where}: the table of token embeddings (shared.weight) is zero; the weights are not whole")


def _load_tokenizer(source: str, *, cache_dir: str | None) -> Tokenize:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(source, cache_dir=cache_dir)

    def tokenize(texts: Sequence[str], length: int) -> Tensor:
        options = {"max_length": length, "padding": "max_length", "truncation": True, "return_tensors": "pt"}
        return tokenizer(list(texts), **options).input_ids

    return tokenize


def _byte_tokenizer(*, bos: bool) -> Tokenize:
    """Ids of the UTF-8 bytes, an end id always among them; needs no file."""

    def tokenize(texts: Sequence[str], length: int) -> Tensor:
        ids_BL = torch.full((len(texts), length), PAD)
        for row, text in zip(ids_BL, texts, strict=True):
            head = [BOS] if bos else []
            body = [FIRST_BYTE + byte for byte in text.encode()][: length - len(head) - 1]
            ids = [*head, *body, EOS]
            row[: len(ids)] = torch.tensor(ids)
        return ids_BL

    return tokenize


def _tiny_sizes(tiny: Mapping[str, int], kind: str) -> dict[str, int]:
    for key in tiny:
        if key not in TINY:
            raise ValueError(f"{kind} encoder: tiny has no {key!r}; {nearest(key, TINY)}")
    sizes = {**TINY, **tiny}
    if sizes["hidden_size"] % sizes["num_heads"]:
        raise ValueError(
            f"{kind} encoder: tiny hidden_size={sizes['hidden_size']} does not divide by num_heads={sizes['num_heads']}"
        )
    return sizes


def _tiny_t5(sizes: Mapping[str, int]) -> nn.Module:
    from transformers import T5Config, T5EncoderModel

    width, heads = sizes["hidden_size"], sizes["num_heads"]
    config = T5Config(
        vocab_size=NUM_BYTE_IDS,
        d_model=width,
        d_kv=width // heads,
        d_ff=2 * width,
        num_layers=sizes["num_layers"],
        num_heads=heads,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
        pad_token_id=PAD,
        eos_token_id=EOS,
    )
    return _filled(lambda: T5EncoderModel(config), sizes["seed"])


def _tiny_umt5(sizes: Mapping[str, int]) -> nn.Module:
    from transformers import UMT5Config, UMT5EncoderModel

    width, heads = sizes["hidden_size"], sizes["num_heads"]
    config = UMT5Config(
        vocab_size=NUM_BYTE_IDS,
        d_model=width,
        d_kv=width // heads,
        d_ff=2 * width,
        num_layers=sizes["num_layers"],
        num_heads=heads,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
        pad_token_id=PAD,
        eos_token_id=EOS,
    )
    return _filled(lambda: UMT5EncoderModel(config), sizes["seed"])


def _tiny_clip(sizes: Mapping[str, int], max_length: int) -> nn.Module:
    from transformers import CLIPTextConfig, CLIPTextModel

    config = CLIPTextConfig(
        vocab_size=NUM_BYTE_IDS,
        hidden_size=sizes["hidden_size"],
        intermediate_size=2 * sizes["hidden_size"],
        projection_dim=sizes["hidden_size"],
        num_hidden_layers=sizes["num_layers"],
        num_attention_heads=sizes["num_heads"],
        max_position_embeddings=max_length,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
    )
    return _filled(lambda: CLIPTextModel(config), sizes["seed"])


def _filled(build: Callable[[], nn.Module], seed: int) -> nn.Module:
    """A model whose weights are a function of (seed, name), the same in every process and with every transformers."""
    with torch.random.fork_rng(devices=[]):  # transformers draws weights of its own first
        model = build()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)
                continue
            is_table = any(part in name for part in ("embedding", "shared", "relative_attention_bias"))
            gain = next((gain for part, gain in TINY_GAINS.items() if part in name), 1.0)
            if not is_table:
                gain /= math.sqrt(parameter.shape[1])
            if name.endswith("SelfAttention.q.weight"):
                gain /= math.sqrt(model.config.d_kv)  # T5 does not divide its logits
            noise = torch.randn(parameter.shape, generator=generator(seed, f"tiny encoder {name}"))
            parameter.copy_(gain * noise)
    return model
