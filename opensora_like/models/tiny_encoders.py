"""Text encoders with fixed random weights over bytes, for demos and tests: no file is needed.

Letters of the shape suffixes: B batch, L tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from opensora_like.models.text_loading import Tokenize
from opensora_like.registry import nearest
from opensora_like.rng import generator

# ids of the byte tokenizer, bytes at 3 to 258; CLIP's pooling gives an end id of 2 a meaning of its own
PAD, EOS, FIRST_BYTE, BOS = 0, 1, 3, 259
NUM_BYTE_IDS = 260
TINY = {"hidden_size": 64, "num_layers": 2, "num_heads": 4, "seed": 0}
# part of a weight's name -> its size over the usual. T5's heads look at places, so that the order of bytes matters;
# CLIP's end token carries more of what it attends to than of where it stands. Chosen by a linear probe of captions.
TINY_GAINS = {"relative_attention_bias": 2.0, "position_embedding": 0.3, "out_proj": 3.0}


def byte_tokenizer(*, bos: bool) -> Tokenize:
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


def tiny_sizes(tiny: Mapping[str, int], kind: str) -> dict[str, int]:
    """All sizes. Raises ValueError: an unknown one, or heads that do not divide the width."""
    for key in tiny:
        if key not in TINY:
            raise ValueError(f"{kind} encoder: tiny has no {key!r}; {nearest(key, TINY)}")
    sizes = {**TINY, **tiny}
    if sizes["hidden_size"] % sizes["num_heads"]:
        raise ValueError(
            f"{kind} encoder: tiny hidden_size={sizes['hidden_size']} does not divide by num_heads={sizes['num_heads']}"
        )
    return sizes


def tiny_t5(sizes: Mapping[str, int], kind: Literal["t5", "umt5"]) -> nn.Module:
    """An encoder of these sizes with gated layers."""
    import transformers

    config_class, model_class = {
        "t5": (transformers.T5Config, transformers.T5EncoderModel),
        "umt5": (transformers.UMT5Config, transformers.UMT5EncoderModel),
    }[kind]
    width, heads = sizes["hidden_size"], sizes["num_heads"]
    config = config_class(
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
    return filled(lambda: model_class(config), sizes["seed"])


def tiny_clip(sizes: Mapping[str, int], max_length: int) -> nn.Module:
    """A text model of these sizes with `max_length` positions."""
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
    return filled(lambda: CLIPTextModel(config), sizes["seed"])


def tiny_vision(sizes: Mapping[str, int], *, image_size: int, patch_size: int) -> tuple[Any, Any]:
    """Settings of a CLIP image model of these sizes, and the processor that brings pictures to its square.

    Args:
        image_size, patch_size: pixels of a side.
    """
    from transformers import CLIPImageProcessor, CLIPVisionConfig

    config = CLIPVisionConfig(
        hidden_size=sizes["hidden_size"],
        intermediate_size=2 * sizes["hidden_size"],
        num_hidden_layers=sizes["num_layers"],
        num_attention_heads=sizes["num_heads"],
        image_size=image_size,
        patch_size=patch_size,
    )
    crop = {"height": image_size, "width": image_size}
    return config, CLIPImageProcessor(size={"shortest_edge": image_size}, crop_size=crop)


def filled(build: Callable[[], nn.Module], seed: int) -> nn.Module:
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
