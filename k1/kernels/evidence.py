"""Evidence of a level's children in one kernel, and counting straight into the tables.

What is computed, and why, is in `k1.evidence`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from k1.config import EvidenceConfig
from k1.evidence import CURRENT, UNIT
from k1.levels import LevelIndex

if TYPE_CHECKING:
    from k1.forward import Text


# Sizes that a change of the tree changes: a special case of each would be compiled again.
@triton.jit(do_not_specialize=["width", "width_child"])
def _level_evidence(
    counts: tl.tensor,
    bigram: tl.tensor,
    context: tl.tensor,
    starts: tl.tensor,
    children: tl.tensor,
    has_child: tl.tensor,
    out: tl.tensor,
    windows: tl.tensor,
    width: tl.tensor,
    width_child: tl.tensor,
    counts_lane: tl.tensor,
    counts_child: tl.tensor,
    counts_age: tl.tensor,
    strength: float,
    tau: float,
    BUCKETS: tl.constexpr,
    UNITS: tl.constexpr,
    RANKS: tl.constexpr,
    BLOCK_RANKS: tl.constexpr,
    TIME: tl.constexpr,
    BLOCK_TIME: tl.constexpr,
) -> None:
    """One parent of one lane, and one window of text, for all of its children."""
    program = tl.program_id(0)
    row = (program // windows).to(tl.int64)
    lane, window = row // width, program % windows
    s = tl.arange(0, TIME)
    k = tl.arange(0, BLOCK_RANKS)
    text = (lane * windows + window) * TIME + s
    begins = tl.load(starts + text) != 0
    pair = tl.load(bigram + text)
    before = tl.load(context + text) + BUCKETS

    exists = tl.load(has_child + row * RANKS + k, mask=k < RANKS, other=0) != 0
    if tl.max(exists.to(tl.int32), 0) == 0:
        return
    child = tl.load(children + row * RANKS + k, mask=k < RANKS, other=0)
    table = counts + lane * counts_lane + child[:, None] * counts_child
    mask = exists[:, None] & (s[None, :] >= 0)
    n_pair = tl.zeros((BLOCK_RANKS, TIME), dtype=tl.int64)
    n_before = tl.zeros((BLOCK_RANKS, TIME), dtype=tl.int64)
    for age in tl.static_range(3):
        n_pair += tl.load(table + age * counts_age + pair[None, :], mask=mask, other=0)
        n_before += tl.load(table + age * counts_age + before[None, :], mask=mask, other=0)
    all_pair = tl.sum(n_pair, axis=0).to(tl.float32) * (1.0 / UNITS)
    all_before = tl.sum(n_before, axis=0).to(tl.float32) * (1.0 / UNITS)
    pooled = tl.div_rn(all_pair + strength * (1.0 / BUCKETS), all_before + strength)
    pooled = tl.broadcast_to(pooled[None, :], (BLOCK_RANKS, TIME))
    own_pair = n_pair.to(tl.float32) * (1.0 / UNITS)
    own_before = n_before.to(tl.float32) * (1.0 / UNITS)
    # (own_pair + strength * pooled) / (own_before + strength) / pooled, and exactly 1 for a child
    # without a history.
    log_ratio = tl.log(tl.div_rn(tl.div_rn(own_pair, pooled) + strength, own_before + strength))

    for first in range(0, TIME, BLOCK_TIME):
        t = first + tl.arange(0, BLOCK_TIME)
        past = s[None, :] <= t[:, None]
        # Where the document of each position begins, or the window: that token has no predecessor.
        begin = tl.max(tl.where(past & begins[None, :], s[None, :], 0), axis=1)
        counted = past & (s[None, :] > begin[:, None])
        for rank in tl.static_range(RANKS):
            here = tl.load(has_child + row * RANKS + rank) != 0
            target = lane * width_child + tl.load(children + row * RANKS + rank)
            ratio = tl.sum(tl.where((k == rank)[:, None], log_ratio, 0.0), axis=0)
            total = tl.sum(tl.where(counted, ratio[None, :], 0.0), axis=1)
            at = out + (target * windows + window) * TIME + t
            tl.store(at, total * tau, mask=here & (t < TIME))


def level_evidence_fused(
    counts: Tensor,
    parent: LevelIndex,
    child: LevelIndex,
    bigram: Tensor,
    context: Tensor,
    starts: Tensor,
    config: EvidenceConfig,
) -> Tensor:
    """Sum the log-likelihood of each child's statistics over the text so far.

    The same as `k1.evidence.levels_evidence`, for windows that `k1.evidence.kernel_fits`.

    Args:
        counts: int64 [L, W_child, 3, buckets + context_buckets].
        parent: the parents' level.
        child: the children's level.
        bigram: int64 [L, B, T] from `hash_bigrams`.
        context: int64 [L, B, T] from `hash_bigrams`.
        starts: bool [L, B, T], True where a document begins.
        config: strength of smoothing and tau.

    Returns:
        float32 [L, W_child, B * T], 0 where dead.
    """
    lanes, windows, time = bigram.shape
    ranks = parent.children.shape[-1]
    out = torch.zeros(lanes, child.width, windows * time, device=counts.device)
    _level_evidence[(lanes * parent.width * windows,)](
        counts,
        bigram.contiguous(),
        context.contiguous(),
        starts.contiguous(),
        parent.children,
        parent.has_child,
        out,
        windows,
        parent.width,
        child.width,
        *counts.stride()[:3],
        config.strength,
        config.tau,
        BUCKETS=config.buckets,
        UNITS=UNIT,
        RANKS=ranks,
        BLOCK_RANKS=max(2, triton.next_power_of_2(ranks)),
        TIME=time,
        BLOCK_TIME=min(time, max(2, 4096 // time)),
    )
    return out


@triton.jit
def _add_counts(
    counts: tl.tensor,
    shares: tl.tuple,
    widths: tl.tuple,
    rows: tl.tensor,
    scale: tl.tensor,
    fine: tl.tensor,
    bigram: tl.tensor,
    context: tl.tensor,
    valid: tl.tensor,
    slots: tl.tensor,
    tokens: tl.tensor,
    token_blocks: tl.tensor,
    counts_lane: tl.tensor,
    counts_slot: tl.tensor,
    counts_age: tl.tensor,
    OFFSETS: tl.constexpr,
    BUCKETS: tl.constexpr,
    UNITS: tl.constexpr,
    AGE: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
) -> None:
    """One slot of one lane, and a block of tokens."""
    program = tl.program_id(0)
    row = (program // token_blocks).to(tl.int64)
    if rows is not None:
        row = tl.load(rows + row)
    lane, slot = row // slots, row % slots
    if (tl.load(scale + row) > 0) & (tl.load(fine + lane) != 0):
        n = (program % token_blocks) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
        inside = n < tokens
        exact = tl.zeros((BLOCK_TOKENS,), tl.float32)
        for level in tl.static_range(len(OFFSETS)):
            place = slot - OFFSETS[level]
            width = tl.full((), widths[level], tl.int32)
            own = (place >= 0) & (place < width)
            at = shares[level] + (lane * width + place) * tokens + n
            exact += tl.load(at, mask=inside & own, other=0.0)
        exact *= UNITS
        # To the nearest integer, ties to even, as torch.round. Shares are not negative.
        weight = exact.to(tl.int64)
        rest = exact - weight.to(tl.float32)
        weight += ((rest > 0.5) | ((rest == 0.5) & (weight % 2 == 1))).to(tl.int64)
        known = tl.load(valid + lane * tokens + n, mask=inside, other=0) != 0
        counted = inside & known & (weight > 0)
        table = counts + lane * counts_lane + slot * counts_slot + AGE * counts_age
        pair = tl.load(bigram + lane * tokens + n, mask=counted, other=0)
        before = tl.load(context + lane * tokens + n, mask=counted, other=0)
        # Integers: the order of addition changes nothing.
        tl.atomic_add(table + pair, weight, mask=counted, sem="relaxed")
        tl.atomic_add(table + BUCKETS + before, weight, mask=counted, sem="relaxed")


def count_fused(
    counts: Tensor,
    levels: list[LevelIndex],
    shares: list[Tensor],
    scale: Tensor,
    fine: Tensor,
    text: Text,
    config: EvidenceConfig,
    row: Tensor | None = None,
) -> None:
    """Count a batch for the blocks that were held responsible for it, in place, in one launch.

    The same as `k1.evidence.add_counts` level by level, without temporaries.

    Args:
        counts: int64 [L, S, 3, buckets + context_buckets].
        levels: where the levels below the root lie.
        shares: float32 [L, W, N] for each of them: routing weight of each block at each token, not
            negative.
        scale: float32 [L, S]: a block at 0 counts nothing, whatever its share.
        fine: bool [L]: a lane that is not counts nothing.
        text: the batch as the routers see it.
        config: the numbers of buckets.
        row: int64 [M]: the only rows [L * S] in question, each once but for scratch rows.
    """
    (lanes, slots), tokens = scale.shape, shares[0].shape[2]
    size = min(256, triton.next_power_of_2(tokens))
    blocks = triton.cdiv(tokens, size)
    _add_counts[((lanes * slots if row is None else len(row)) * blocks,)](
        counts,
        tuple(share.detach().contiguous() for share in shares),
        # Integers in a tuple would be compiled anew when a tree grows; floats are not.
        tuple(float(index.width) for index in levels),
        row,
        scale.contiguous(),
        fine,
        text.bigram.contiguous(),
        text.context.contiguous(),
        text.valid.contiguous(),
        slots,
        tokens,
        blocks,
        *counts.stride()[:3],
        OFFSETS=tuple(index.offset for index in levels),
        BUCKETS=config.buckets,
        UNITS=UNIT,
        AGE=CURRENT,
        BLOCK_TOKENS=size,
    )
