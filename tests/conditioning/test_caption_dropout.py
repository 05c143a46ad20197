"""Cached captions drop out one by one, by the row's own counter, to the cached embedding of the empty caption."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from opensora_like.conditioning.encode import Encode
from opensora_like.datasets.batch import Batch, BucketShape
from opensora_like.models.stand_ins import CachedAutoencoder, CachedText
from opensora_like.models.wan import Wan

FACTS = {"latent_channels": 16, "is_causal": True, "has_deviation": True, "temporal_stride": 4, "spatial_stride": 8}
SIZES = {"num_attention_heads": 2, "attention_head_dim": 12, "ffn_dim": 24, "num_layers": 1, "text_dim": 16}
NULL = torch.full((8, 16), -1.0)


def dropped(rows: list[int], *, ratio: float = 0.1, epoch: int = 0) -> Tensor:
    """Which of these rows, read from a cache, lose their captions. Returns: bool [B]."""
    encode = Encode(
        Wan(**SIZES, text_length=8),
        CachedAutoencoder(FACTS),
        {"text": CachedText("text", NULL)},
        seed=7,
        device=torch.device("cpu"),
        dropout_ratio={"text": ratio},
        condition_config=None,
        guidance=1.0,
        sample_posterior=False,
    )
    own = torch.ones(len(rows), 8, 16)
    names = [str(row) for row in rows]
    latents = torch.zeros(len(rows), 16, 1, 2, 2)
    shape = BucketShape("16px", 1, 16, 16)
    batch = Batch(epoch, 0, shape, rows, names, names, latents_BCTHW=latents, embeddings={"text": own})
    text = encode(batch).conditions["text"]
    assert all(torch.equal(row, NULL) or torch.equal(row, own[0]) for row in text)
    return text[:, 0, 0] < 0


def test_dropout_is_decided_row_by_row() -> None:
    """Batches cut or ordered differently drop the same rows; other epochs others; in the ratio asked for."""
    rows = list(range(3000))
    together = dropped(rows)
    share = together.float().mean().item()
    assert abs(share - 0.1) < 4 * math.sqrt(0.1 * 0.9 / len(rows))
    apart = torch.cat([dropped(rows[i : i + 500][::-1]).flip(0) for i in range(0, 3000, 500)])
    assert torch.equal(together, apart)
    assert not torch.equal(together, dropped(rows, epoch=1))
    assert not dropped(rows[:50], ratio=0.0).any() and dropped(rows[:50], ratio=1.0).all()
