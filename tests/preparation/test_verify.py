"""What is printed of comparisons with the sources."""

from __future__ import annotations

import math

import torch

from opensora_like.preparation.verify import Verified, report

PAIR = torch.zeros(3, 1, 16, 32)


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
