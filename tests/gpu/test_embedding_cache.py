"""On a GPU: captions' embeddings are kept in page-locked memory, and the host waits for no copy."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from opensora_like.models.embedding_cache import EmbeddingCache

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def test_embeddings_are_kept_and_come_back_without_a_wait() -> None:
    """More captions than there is room for, so that memory is given back and used again while copies are under way."""

    def run(texts: Sequence[str]) -> torch.Tensor:
        return torch.stack([torch.full((512, 512), float(len(text)), device="cuda") for text in texts])

    cache, device = EmbeddingCache(3, keep_on_cpu=True), torch.device("cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = []
        for number in range(1, 40):
            torch.cuda._sleep(1_000_000)  # or each copy is done before the next is asked for
            found.append(cache.look_up(["", "x" * number, "x"], 512, run, chunk_size=1, device=device))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert [[e[0, 0].item() for e in batch] for batch in found] == [[0.0, float(n), 1.0] for n in range(1, 40)]
