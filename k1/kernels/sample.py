"""Windows of text drawn and read for the routers in one launch.

What is computed, and why, is in `k1.sampling` and `k1.evidence`; the numbers are the same.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from k1.config import EvidenceConfig
from k1.data import POOLS
from k1.forward import Batch, Text
from k1.kernels.random import as_uniform, draw_bits
from k1.rng import STREAM_DATA, STREAM_DOMAIN
from k1.sampling import GOLDEN_RATIO, TokenStore

_GOLDEN_RATIO = tl.constexpr(GOLDEN_RATIO)
_STREAM_DATA = tl.constexpr(STREAM_DATA)
_STREAM_DOMAIN = tl.constexpr(STREAM_DOMAIN)


@triton.jit
def _sample(
    token_ptr, begins_ptr, extent_ptr, seed_ptr, counter_ptr, mix_ptr,
    input_ptr, target_ptr, bigram_ptr, context_ptr, start_ptr, valid_ptr, domain_ptr,
    DOMAINS: tl.constexpr, BUCKETS: tl.constexpr, CONTEXT_BUCKETS: tl.constexpr,
    TIME: tl.constexpr, BLOCK_TIME: tl.constexpr,
):  # fmt: skip
    """One window of one lane."""
    window, lane = tl.program_id(0), tl.program_id(1)
    row = lane.to(tl.int64) * tl.num_programs(0) + window
    seed, counter = tl.load(seed_ptr + lane), tl.load(counter_ptr + lane)

    first = as_uniform(draw_bits(seed, _STREAM_DOMAIN, counter, 0))
    u = first + window.to(tl.float32) * _GOLDEN_RATIO
    u -= tl.floor(u)
    domain = tl.zeros((), tl.int64)
    edge = tl.zeros((), tl.float64)
    for d in range(DOMAINS - 1):
        edge += tl.load(mix_ptr + lane * DOMAINS + d).to(tl.float64)
        domain += (u >= edge.to(tl.float32)).to(tl.int64)
    tl.store(domain_ptr + row, domain)

    begin = tl.load(extent_ptr + domain * 2)
    length = tl.load(extent_ptr + domain * 2 + 1)
    begin += draw_bits(seed, _STREAM_DATA, counter, window.to(tl.int64)) % (length - TIME)

    t = tl.arange(0, BLOCK_TIME)
    inside = t < TIME
    here = begin + t
    token = tl.load(token_ptr + here, mask=inside, other=0).to(tl.int64)
    after = tl.load(token_ptr + here + 1, mask=inside, other=0).to(tl.int64)
    # The first token of a window has no predecessor there, and is hashed with itself.
    before = tl.load(token_ptr + begin + tl.maximum(t - 1, 0), mask=inside, other=0).to(tl.int64)
    starts = tl.load(begins_ptr + here, mask=inside, other=0) != 0
    mixed = (before * 0x9E3779B1 + token * 0x85EBCA77) & 0x7FFFFFFF

    at = row * TIME + t
    tl.store(input_ptr + at, token, mask=inside)
    tl.store(target_ptr + at, after, mask=inside)
    tl.store(bigram_ptr + at, (mixed ^ (mixed >> 15)) & (BUCKETS - 1), mask=inside)
    tl.store(context_ptr + at, before & (CONTEXT_BUCKETS - 1), mask=inside)
    tl.store(start_ptr + at, starts, mask=inside)
    tl.store(valid_ptr + at, (starts == 0) & (t > 0), mask=inside)


def sample_fused(
    store: TokenStore,
    pool: str,
    seed: Tensor,
    counter: Tensor,
    mix: Tensor,
    windows: int,
    evidence: EvidenceConfig,
) -> tuple[Batch, Text]:
    """Draw random windows as `TokenStore.sample` does, and read them as `k1.forward.read_text`.

    Args:
        store: the text.
        pool: one of `POOLS`.
        seed: int64 [L].
        counter: int64 [L]: the batch's number in the lane's stream.
        mix: float32 [L, domains]: share of each domain.
        windows: windows per lane.
        evidence: the numbers of buckets.
    """
    lanes, domains = mix.shape
    shape, device = (lanes, windows, store.context), mix.device
    inputs, targets, bigram, context = torch.empty(4, *shape, dtype=torch.int64, device=device)
    starts, valid = torch.empty(2, *shape, dtype=torch.bool, device=device)
    domain = torch.empty(lanes, windows, dtype=torch.int64, device=device)
    block = triton.next_power_of_2(store.context)
    _sample[windows, lanes](
        store.tokens, store.starts, store.extent_on_device[POOLS.index(pool)],
        seed.contiguous(), counter.contiguous(), mix.contiguous(),
        inputs, targets, bigram, context, starts, valid, domain,
        DOMAINS=domains, BUCKETS=evidence.buckets, CONTEXT_BUCKETS=evidence.context_buckets,
        TIME=store.context, BLOCK_TIME=block, num_warps=1 if block <= 64 else 4,
        # A fused product and sum would round once, where the plain code rounds twice.
        enable_fp_fusion=False,
    )  # fmt: skip
    return Batch(inputs, targets, starts, domain), Text(bigram, context, starts, valid)
