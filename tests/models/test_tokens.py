"""Latents as tokens: recorded numbers of the published system, order and inverse."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from opensora_like.models.tokens import patchify, position_ids, unpatchify

GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.mark.parametrize("case, patch_size", [("pack/0", 2), ("pack/1", 1)])
def test_tokens_are_the_recorded_ones(case, patch_size):
    """Packing equals the published system's bit for bit, with and without patches."""
    tensors = load_file(GOLDEN / "opensora_maths_a.safetensors")
    assert torch.equal(patchify(tensors[f"{case}/x"], patch_size), tensors[f"{case}/packed"])


@pytest.mark.parametrize("case, patch_size", [("prepare_ids", 2), ("prepare_p1", 1), ("prepare_p2", 2)])
def test_positions_are_the_recorded_ones(case, patch_size):
    """Position ids equal the published system's, the same for every sample."""
    ids_BLA = load_file(GOLDEN / "opensora_maths_a.safetensors")[f"{case}/img_ids"]
    got = position_ids(3, 4 // patch_size, 6 // patch_size)
    assert torch.equal(got.expand(len(ids_BLA), -1, -1), ids_BLA.long())


def test_patchify_orders_and_inverts():
    """Features are (c, p, q), tokens (t, h, w); unpatchify undoes it bit for bit."""
    x = torch.arange(2 * 3 * 2 * 4 * 6).view(2, 3, 2, 4, 6)
    tokens = patchify(x, 2)
    ids = position_ids(2, 2, 3)
    for token, (t, h, w) in zip(tokens[1], ids.tolist(), strict=True):
        assert torch.equal(token, x[1, :, t, 2 * h : 2 * h + 2, 2 * w : 2 * w + 2].flatten())
    assert torch.equal(unpatchify(tokens, 2, num_frames=2, height=4, width=6), x)
