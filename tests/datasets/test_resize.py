"""Pixels: the definition of PSNR; sizes and 8 bits are tested where clips are read."""

from __future__ import annotations

import math

import pytest
import torch

from opensora_like.datasets.resize import psnr


def test_psnr_is_that_of_its_definition():
    """Peak to peak over the root mean square error, in dB; none where there is no error, and clipped as pixels are."""
    video = torch.rand(3, 2, 4, 4, generator=torch.Generator().manual_seed(0)) * 1.8 - 0.9
    assert psnr(video, video) == math.inf
    for error in (0.1, 0.01):
        assert psnr(video + error, video) == pytest.approx(20 * math.log10(2 / error), abs=1e-3)
    ones = torch.ones(3, 1, 2, 2)
    assert psnr(5 * ones, ones) == math.inf
