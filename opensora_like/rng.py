"""Counter-based randomness: every draw is a function of (run seed, purpose, counters), never of a process.

A draw that belongs to a sample names the epoch and the row, so it does not depend on the number of
processes, on workers, on prefetching or on where a run was resumed.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch


_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
ROUNDS = 6  # of `bijection`; with 4, chi-squared tests of two epochs' orders still fail


def seed_of(run_seed: int, purpose: str, *counters: int) -> int:
    """A 63-bit seed for one draw.

    Args:
        purpose: names the use ("crop", "noise", ...); draws for different purposes are independent.
        *counters: for a sample: epoch, row.
    """
    text = "/".join([purpose, str(int(run_seed)), *(str(int(c)) for c in counters)])
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def generator(run_seed: int, purpose: str, *counters: int, device: str | torch.device = "cpu") -> torch.Generator:
    """A torch generator seeded for one draw; cheap enough to make one per sample."""
    import torch

    return torch.Generator(device).manual_seed(seed_of(run_seed, purpose, *counters))


def numpy_generator(run_seed: int, purpose: str, *counters: int) -> np.random.Generator:
    """A numpy generator for one draw (a permutation, a choice)."""
    return np.random.Generator(np.random.Philox(key=seed_of(run_seed, purpose, *counters)))


def uniform(run_seed: int, purpose: str, epoch: int, rows: np.ndarray) -> np.ndarray:
    """One number in [0, 1) per row, each a function of (run seed, purpose, epoch, row) alone.

    Args:
        rows: integers [N], any order; the same row always gets the same number.

    Returns: float64 [N].

    Source: the mixing function of SplitMix64 (Steele, Lea, Flood 2014).
    """
    start = np.uint64(seed_of(run_seed, purpose, epoch))
    z = np.asarray(rows).astype(np.uint64)
    with np.errstate(over="ignore"):  # arithmetic modulo 2^64 is what is meant
        z *= _GOLDEN
        z += start
    z = _mixed(z)
    return (z >> np.uint64(11)) * 2.0**-53


def bijection(index: np.ndarray, num: int, key: int) -> np.ndarray:
    """Where a random permutation of 0 to num - 1 takes `index`, without laying the permutation out.

    Made for many numbers; of few, not every permutation can come out.

    Args:
        index: integers [N] from 0 to num - 1. key: from `seed_of`.

    Returns: int64 [N].

    Source: cycle walking (Black, Rogaway 2002, section 3) over a keyed mixing of bits.
    """
    bits = max(1, (int(num) - 1).bit_length())
    keys = _mixed(np.uint64(key) + np.arange(1, 2 * ROUNDS + 1, dtype=np.uint64) * _GOLDEN).reshape(ROUNDS, 2)
    keys[:, 0] |= np.uint64(1)  # multiplying by what is odd can be undone
    limit, mask, shift = np.uint64(num), np.uint64((1 << bits) - 1), np.uint64((bits + 1) // 2)

    def mixed(x: np.ndarray) -> np.ndarray:
        for factor, addend in keys:
            x *= factor
            x += addend
            x &= mask
            x ^= x >> shift
        return x

    with np.errstate(over="ignore"):
        found = mixed(np.asarray(index).astype(np.uint64))
        while len(beyond := np.flatnonzero(found >= limit)):
            found[beyond] = mixed(found[beyond])
    return found.view(np.int64)


def _mixed(z: np.ndarray) -> np.ndarray:
    """The mixing function of SplitMix64, in place."""
    with np.errstate(over="ignore"):
        z ^= z >> np.uint64(30)
        z *= np.uint64(0xBF58476D1CE4E5B9)
        z ^= z >> np.uint64(27)
        z *= np.uint64(0x94D049BB133111EB)
        z ^= z >> np.uint64(31)
    return z
