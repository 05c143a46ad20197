"""Published text encoders and their tokenizers, from a folder or the hub."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

Precision = Literal["bf16", "fp16", "fp32"]
Tokenize = Callable[[Sequence[str], int], Tensor]  # (texts, length) -> int64 [B, length]
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

ARCHITECTURES = {
    "t5": {"t5": "T5EncoderModel", "mt5": "MT5EncoderModel", "umt5": "UMT5EncoderModel"},
    "umt5": {"umt5": "UMT5EncoderModel"},
    "clip": {"clip": "CLIPTextModel", "clip_text_model": "CLIPTextModel"},
    "llm": {"llama": "LlamaModel"},
    "llava": {"llava": "LlavaForConditionalGeneration"},
}


def check_source(name: str, from_pretrained: str | None, tiny: Mapping | None, **sizes: int) -> None:
    """Raises ValueError: both or neither of `from_pretrained` and `tiny`, or a size below 1."""
    if (from_pretrained is None) == (tiny is None):
        raise ValueError(
            f"{name} encoder: from_pretrained={from_pretrained!r} and tiny={tiny!r}; give exactly one of a folder or"
            " hub name, and the sizes of a tiny random encoder"
        )
    for key, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name} encoder: {key}={size} must be 1 or more")


def load_model(
    kind: str, source: str, tokenizer: str, *, dtype: Precision, cache_dir: str | None
) -> tuple[nn.Module, Any]:
    """The published encoder at `source`, of the architecture its config names, and its tokenizer, which is read first.

    Args:
        kind: a key of `ARCHITECTURES`.
        source, tokenizer: folders, or names on the hub.

    Raises:
        FileNotFoundError: a path that is no folder, or no model or no tokenizer there.
        ValueError: a model of another architecture.
    """
    import transformers

    if source.startswith(("/", "./", "../", "~")) and not Path(source).is_dir():
        raise FileNotFoundError(f"{kind} encoder: from_pretrained={source!r} is not a folder; download the model there")
    try:
        architecture = transformers.AutoConfig.from_pretrained(source, cache_dir=cache_dir).model_type
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"{kind} encoder: from_pretrained={source!r} is neither a folder with a model nor one the hub gives;"
            " give a local folder, or check the name and the network"
        ) from error
    if architecture not in ARCHITECTURES[kind]:
        raise ValueError(
            f"{kind} encoder: from_pretrained={source!r} holds a {architecture!r} model, one of"
            f" {sorted(ARCHITECTURES[kind])} is needed"
        )
    cls = getattr(transformers, ARCHITECTURES[kind][architecture])
    words = read_tokenizer(tokenizer, cache_dir=cache_dir)
    try:
        return cls.from_pretrained(source, dtype=DTYPES[dtype], cache_dir=cache_dir), words
    except OSError as error:
        raise FileNotFoundError(f"{kind} encoder: from_pretrained={source!r} has no weights: {error}") from error


def pipeline_parts(source: str, *, suffix: str = "") -> tuple[str, str]:
    """Where the model and the tokenizer are: side by side, or in the folders of a pipeline.

    Args:
        suffix: of the names of these folders; "_2" is the second encoder of a pipeline.
    """
    parts = Path(source) / f"text_encoder{suffix}", Path(source) / f"tokenizer{suffix}"
    return (str(parts[0]), str(parts[1])) if all(part.is_dir() for part in parts) else (source, source)


def tie_embeddings(model: nn.Module, *, where: str) -> None:
    """Let the encoder read the table that was loaded; transformers 5 can leave its own name for it zero.

    Args:
        where: of the weights, for the error.

    Raises:
        ValueError: both tables are zero.
    """
    shared, own = model.shared.weight, model.encoder.embed_tokens.weight
    if own is not shared and not torch.equal(own, shared):
        model.encoder.embed_tokens.weight = model.shared.weight = shared if shared.any() else own
    if not model.shared.weight.any():
        raise ValueError(f"{where}: the table of token embeddings (shared.weight) is zero; the weights are not whole")


def read_tokenizer(source: str, *, cache_dir: str | None) -> Any:
    """The published tokenizer at `source`, a folder or a name on the hub.

    Raises:
        FileNotFoundError: there is none. Of a folder without its files transformers makes one without words, from the
            model's config: every caption would be the same to it.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(source, cache_dir=cache_dir)
    except (OSError, ValueError) as error:
        raise FileNotFoundError(f"{source!r} has no tokenizer that can be read: {error}") from error
    files = set(tokenizer.vocab_files_names.values())
    if Path(source).is_dir() and files and not any((Path(source) / name).is_file() for name in files):
        raise FileNotFoundError(
            f"{source!r} has no tokenizer: a {type(tokenizer).__name__} needs one of {sorted(files)}; download it there"
        )
    return tokenizer


def cut_and_pad(tokenizer: Any) -> Tokenize:
    """What `read_tokenizer` finds; captions are cut and padded to the length."""

    def tokenize(texts: Sequence[str], length: int) -> Tensor:
        options = {"max_length": length, "padding": "max_length", "truncation": True, "return_tensors": "pt"}
        return tokenizer(list(texts), **options).input_ids

    return tokenize
