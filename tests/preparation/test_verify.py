"""PSNR: the definition, for pixels in [-1, 1]."""

from __future__ import annotations

import math

import pytest
import torch

from opensora_like.preparation.verify import Verified, psnr, report

PAIR = torch.zeros(3, 1, 16, 32)


def test_psnr_is_that_of_its_definition():
    """Peak to peak over the root mean square error, in dB; none where there is no error, and clipped as pixels are."""
    video = torch.rand(3, 2, 4, 4, generator=torch.Generator().manual_seed(0)) * 1.8 - 0.9
    assert psnr(video, video) == math.inf
    for error in (0.1, 0.01):
        assert psnr(video + error, video) == pytest.approx(20 * math.log10(2 / error), abs=1e-3)
    ones = torch.ones(3, 1, 2, 2)
    assert psnr(5 * ones, ones) == math.inf


def test_report_tells_each_and_the_mean(capsys):
    """A line per sample, then the mean of those that differ and how many do not."""
    report(iter([Verified("a", 20.0, PAIR), Verified("b", 30.0, PAIR), Verified("c", math.inf, PAIR)]))
    told = capsys.readouterr().out.splitlines()
    assert told[0] == "verify a: PSNR 20.00 dB" and told[2] == "verify c: PSNR inf dB"
    assert told[3] == "verify: 3 samples decoded, mean PSNR 25.00 dB, 1 of them exact"
    report(iter([Verified("c", math.inf, PAIR)]))
    assert capsys.readouterr().out.endswith("verify: 1 samples decoded, no difference\n")
    report(iter([]))
    assert capsys.readouterr().out == "verify: nothing could be compared\n"
