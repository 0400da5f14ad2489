"""Counter-based random numbers in one launch: what `k1.rng.random_bits` computes."""

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
def _random_bits(seed_ptr, counter_ptr, out_ptr, stream, width, BLOCK: tl.constexpr):
    lane = tl.program_id(1)
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    seed, counter = tl.load(seed_ptr + lane), tl.load(counter_ptr + lane)
    base = _mix(_mix(seed * _GOLDEN + stream) + counter * _GOLDEN)
    bits = _mix(base + (column.to(tl.int64) + 1) * _GOLDEN)
    bits = (bits >> 2) & 0x3FFFFFFFFFFFFFFF
    tl.store(out_ptr + lane.to(tl.int64) * width + column, bits, mask=column < width)


def random_bits_fused(seed: Tensor, stream: int, counter: Tensor, width: int) -> Tensor:
    """Draw 62-bit integers [lanes, width]; arguments as `k1.rng.random_bits`."""
    lanes = len(seed)
    out = torch.empty(lanes, width, dtype=torch.int64, device=seed.device)
    block = min(1024, triton.next_power_of_2(width))
    grid = triton.cdiv(width, block), lanes
    _random_bits[grid](seed.contiguous(), counter.contiguous(), out, stream, width, BLOCK=block)
    return out
