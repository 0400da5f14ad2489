"""Counter-based random numbers in one launch: what `k1.rng` computes."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_GOLDEN = tl.constexpr(-7046029254386353131)
_MIX_1 = tl.constexpr(-4658895280553007687)
_MIX_2 = tl.constexpr(-7723592293110705685)


@triton.jit
def _mix(x):
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * _MIX_1
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * _MIX_2
    return x ^ ((x >> 31) & 0x1FFFFFFFF)


@triton.jit
def draw_bits(seed, stream, counter, column):
    """Number `column` (int64, from 0) of `k1.rng.random_bits`."""
    base = _mix(_mix(seed * _GOLDEN + stream) + counter * _GOLDEN)
    return (_mix(base + (column + 1) * _GOLDEN) >> 2) & 0x3FFFFFFFFFFFFFFF


@triton.jit
def as_uniform(bits):
    """Bits as the float32 numbers of `k1.rng.random_uniform`; every operation is exact."""
    return (bits >> 38).to(tl.float32) * (1.0 / (1 << 24))


@triton.jit
def _random(
    seed_ptr, counter_ptr, out_ptr, stream, width,
    UNIFORM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    lane = tl.program_id(1)
    column = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    value = draw_bits(tl.load(seed_ptr + lane), stream, tl.load(counter_ptr + lane), column)
    if UNIFORM:
        value = as_uniform(value)
    tl.store(out_ptr + lane.to(tl.int64) * width + column, value, mask=column < width)


def _launch(seed: Tensor, stream: int, counter: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    lanes = len(seed)
    out = torch.empty(lanes, width, dtype=dtype, device=seed.device)
    block = min(1024, triton.next_power_of_2(width))
    _random[triton.cdiv(width, block), lanes](
        seed.contiguous(), counter.contiguous(), out, stream, width,
        UNIFORM=dtype == torch.float32, BLOCK=block,
    )  # fmt: skip
    return out


def random_bits_fused(seed: Tensor, stream: int, counter: Tensor, width: int) -> Tensor:
    """Draw 62-bit integers [lanes, width]; arguments as `k1.rng.random_bits`."""
    return _launch(seed, stream, counter, width, torch.int64)


def random_uniform_fused(seed: Tensor, stream: int, counter: Tensor, width: int) -> Tensor:
    """Draw float32 numbers in [0, 1) [lanes, width]; arguments as `k1.rng.random_uniform`."""
    return _launch(seed, stream, counter, width, torch.float32)
