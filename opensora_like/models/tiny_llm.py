"""Language models with fixed random weights over bytes, alone and with an image encoder, for demos and tests.

Letters of the shape suffixes: B batch, L tokens.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from opensora_like.models.tiny_encoders import BOS, FIRST_BYTE, NUM_BYTE_IDS, PAD, filled, tiny_vision

IMAGE = "<image>"
END_HEADER = "<|end_header_id|>"
SPECIAL = ("<|start_header_id|>", END_HEADER, "<|eot_id|>", IMAGE)  # one id each, behind those of the bytes
IMAGE_SIDE, PATCH = 16, 4  # pixels: 16 tokens of an image


def special_id(text: str) -> int:
    """The id of one of `SPECIAL`."""
    return NUM_BYTE_IDS + SPECIAL.index(text)


def tokenize_bytes(texts: Sequence[str], length: int) -> tuple[Tensor, Tensor]:
    """Ids of the UTF-8 bytes and of the special texts, a begin id before them; cut and padded at the end.

    Returns: int64 [B, L] ids, and bool [B, L], False for padding.
    """
    ids_BL = torch.full((len(texts), length), PAD)
    for row, text in zip(ids_BL, texts, strict=True):
        ids = [BOS, *ids_of(text)][:length]
        row[: len(ids)] = torch.tensor(ids)
    return ids_BL, ids_BL != PAD


def ids_of(text: str) -> list[int]:
    """Of a text, without a begin id."""
    found: list[int] = []
    for part in re.split(f"({'|'.join(map(re.escape, SPECIAL))})", text):
        found += [special_id(part)] if part in SPECIAL else [FIRST_BYTE + byte for byte in part.encode()]
    return found


def tiny_llama(sizes: Mapping[str, int]) -> nn.Module:
    """A LLaMA of these sizes, without a head."""
    from transformers import LlamaModel

    config = _llama_config(sizes)
    return filled(lambda: LlamaModel(config), sizes["seed"])


def tiny_llava(sizes: Mapping[str, int]) -> tuple[nn.Module, Any]:
    """A LLaVA whose language model and image encoder have these sizes, and the processor of its images."""
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    vision, processor = tiny_vision(sizes, image_size=IMAGE_SIDE, patch_size=PATCH)
    config = LlavaConfig(
        vision_config=vision,
        text_config=_llama_config(sizes),
        image_token_index=special_id(IMAGE),
        pad_token_id=PAD,
    )
    return filled(lambda: LlavaForConditionalGeneration(config), sizes["seed"]), processor


def _llama_config(sizes: Mapping[str, int]) -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=NUM_BYTE_IDS + len(SPECIAL),
        hidden_size=sizes["hidden_size"],
        intermediate_size=2 * sizes["hidden_size"],
        num_hidden_layers=sizes["num_layers"],
        num_attention_heads=sizes["num_heads"],
        num_key_value_heads=sizes["num_heads"],
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=None,
    )
