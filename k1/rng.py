"""Counter-based random numbers: a pure function of (seed, stream, counter), on any device.

A lane's random state is therefore two integers. A fork copies them, a checkpoint stores them, a
batch of lanes draws the same numbers as each lane alone, and a CPU draws what a GPU draws. The
mixing function is the finaliser of SplitMix64 (Steele, Lea and Flood, "Fast splittable
pseudorandom number generators", OOPSLA 2014), in wrapping int64 arithmetic.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from k1.kernels import AVAILABLE

_GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15 as a signed 64-bit integer
_MIX_1 = -4658895280553007687  # 0xBF58476D1CE4E5B9
_MIX_2 = -7723592293110705685  # 0x94D049BB133111EB

STREAM_DATA = 1
STREAM_EXPLORE = 2
STREAM_DOMAIN = 3


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical right shift (torch's is arithmetic)."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def mix(x: Tensor) -> Tensor:
    """Scramble int64 values; a bijection, so distinct inputs stay distinct."""
    x = (x ^ _shift_right(x, 30)) * _MIX_1
    x = (x ^ _shift_right(x, 27)) * _MIX_2
    return x ^ _shift_right(x, 31)


def random_bits(seed: Tensor, stream: int, counter: Tensor, width: int) -> Tensor:
    """Draw 62-bit non-negative integers.

    Args:
        seed: int64 [lanes].
        stream: which use the numbers are for; streams are independent of one another.
        counter: int64 [lanes], for example the step.
        width: how many numbers to draw per lane.

    Returns:
        int64 [lanes, width].
    """
    if seed.is_cuda and AVAILABLE:
        from k1.kernels.random import random_bits_fused

        return random_bits_fused(seed, stream, counter, width)
    base = mix(mix(seed * _GOLDEN + stream) + counter * _GOLDEN)
    column = torch.arange(1, width + 1, device=seed.device, dtype=torch.int64) * _GOLDEN
    return _shift_right(mix(base[:, None] + column), 2)


def random_uniform(seed: Tensor, stream: int, counter: Tensor, width: int) -> Tensor:
    """Draw float32 numbers in [0, 1), shape [lanes, width]; arguments as `random_bits`."""
    if seed.is_cuda and AVAILABLE:
        from k1.kernels.random import random_uniform_fused

        return random_uniform_fused(seed, stream, counter, width)
    bits = random_bits(seed, stream, counter, width) >> 38  # 24 bits fill a float32 mantissa
    return bits.to(torch.float32) / float(1 << 24)


def derive_seed(*parts: float | str) -> int:
    """Make a 62-bit seed from any parts, the same on every machine."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 2
