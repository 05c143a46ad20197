"""A read-out names the truth of latents that hold it, and samples are compared with clips."""

from __future__ import annotations

import torch

from opensora_like.evaluation.proof_latents import Latents, ReadOut, nearness
from opensora_like.evaluation.shapes import ASPECTS
from opensora_like.evaluation.world import all_combinations


def latents(seed: int, num: int = 480) -> Latents:
    """One channel per name, on where it is the truth, under noise."""
    truths = (all_combinations() * (num // 48 + 1))[:num]
    names = sorted({(a, getattr(t, a)) for t in truths for a in ASPECTS})
    on = torch.tensor([[float(getattr(t, a) == name) for a, name in names] for t in truths])
    noise = torch.randn(num, len(names), 2, 2, 2, generator=torch.Generator().manual_seed(seed))
    return Latents(on[:, :, None, None, None] + 0.5 * noise, truths)


def test_a_read_out_names_what_is_there() -> None:
    """Right on other latents than it was fitted to; on those of shuffled truths it is right by chance."""
    read_out, fresh = ReadOut(latents(0), steps=200), latents(1)
    assert read_out.scores(fresh)["all_accuracy"] > 0.95
    order = torch.randperm(len(fresh.truths), generator=torch.Generator().manual_seed(2))
    mixed = read_out.scores(Latents(fresh.z_BCTHW[order], fresh.truths))
    assert 0.15 < mixed["colour_accuracy"] < 0.35 and 0.2 < mixed["shape_accuracy"] < 0.45


def test_nearness_tells_clips_from_noise() -> None:
    """1 for other clips, less the further away samples are."""
    known, fresh, other = (latents(seed).z_BCTHW for seed in range(3))
    shifts = [nearness(other + shift, fresh, known) for shift in (0.0, 0.5, 2.0)]
    assert 0.95 < shifts[0] < 1.05 and shifts[0] > shifts[1] > shifts[2]
