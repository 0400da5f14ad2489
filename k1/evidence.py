"""Evidence routing: what text a child was held responsible for, as counts of hashed bigrams.

Counts are statistics, not parameters: they add up, so a merge is a sum, a split a division and a
fork a copy. They are kept as integers in units of 1/256 token, which makes all of that exact and
independent of the order of addition.

The probability that a child gives to a token is a hierarchical estimate (MacKay and Peto, "A
hierarchical Dirichlet language model", 1995): its own counts, smoothed towards the counts that all
siblings have together. A child without a history is therefore as likely as its siblings' average,
not less likely, and children with the same history are told apart by nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor

from k1.config import EvidenceConfig
from k1.levels import LevelIndex

UNIT = 256
"""Integer steps per counted token."""
LONGEST_FUSED = 256
"""Tokens of a window that `k1.kernels.evidence` takes, at most."""
OLD, PREVIOUS, CURRENT = 0, 1, 2
"""The three ages of counts: before the recent window, its first half, its second half."""


def hash_bigrams(tokens: Tensor, config: EvidenceConfig) -> tuple[Tensor, Tensor]:
    """Hash each token with its predecessor.

    Args:
        tokens: int64 [L, B, T].
        config: the numbers of buckets.

    Returns:
        Bigram bucket and context bucket, int64 [L, B, T]. Position 0 has no predecessor in the
        window; it is hashed with itself and has to be left out by a mask.
    """
    before = torch.cat([tokens[..., :1], tokens[..., :-1]], dim=-1)
    mixed = (before * 0x9E3779B1 + tokens * 0x85EBCA77) & 0x7FFFFFFF
    return (mixed ^ (mixed >> 15)) & (config.buckets - 1), before & (config.context_buckets - 1)


def history_mask(starts: Tensor) -> Tensor:
    """Mark which earlier positions belong to the same document.

    Args:
        starts: bool [L, B, T], True where a document begins.

    Returns:
        float32 [L, B, T, T]: entry (t, s) is 1 if s <= t, both are in one document, and s has a
        predecessor in it.
    """
    time = starts.shape[-1]
    document = starts.long().cumsum(-1)
    same = document[..., :, None] == document[..., None, :]
    causal = torch.ones(time, time, dtype=torch.bool, device=starts.device).tril()
    has_predecessor = ~starts
    has_predecessor = has_predecessor & (torch.arange(time, device=starts.device) > 0)
    return (same & causal & has_predecessor[..., None, :]).float()


def levels_evidence(
    counts: list[Tensor],
    children: list[LevelIndex],
    bigram: Tensor,
    context: Tensor,
    mask: Tensor,
    config: EvidenceConfig,
) -> list[Tensor]:
    """Sum the log-likelihood of each child's statistics over the text so far.

    Args:
        counts: int64 [L, W, 3, buckets + context_buckets] of each level of children.
        children: these levels; they go through together, for small operations cost their number.
        bigram: int64 [L, B, T] from `hash_bigrams`.
        context: int64 [L, B, T] from `hash_bigrams`.
        mask: float32 [L, B, T, T] from `history_mask`.
        config: strength of smoothing and tau.

    Returns:
        float32 [L, W, B * T] of each level.
    """
    n, tokens = config.buckets, bigram[0].numel()
    # One look-up and one pooling for both: their results lie side by side, bigrams first.
    bucket = torch.cat([bigram.flatten(1), context.flatten(1) + n], dim=1)
    table = n + config.context_buckets
    ages = torch.arange(0, 3 * table, table, device=bucket.device)
    index = (bucket[:, None] + ages[:, None]).flatten(1)[:, None]
    found = [c.flatten(2).gather(2, index.expand(-1, c.shape[1], -1)) for c in counts]
    widths = [c.shape[1] for c in counts]
    level = torch.cat(found, dim=1).unflatten(2, (3, -1)).sum(2)
    alive = torch.cat([child.alive for child in children], dim=1)
    own = level.double().mul_(alive[..., None] / UNIT)
    # Whose child each is, over all levels: siblings are those with the same parent.
    apart = [child.parent - i * sum(widths) for i, child in enumerate(children)]
    parent = torch.cat(apart, dim=1)
    # Exact in float64, so other levels and lanes cannot change a sum by their number.
    pooled = ((parent[:, None] == parent[..., None]).double() @ own).float()
    own = own.float()
    (both, before), (all_both, all_before) = own.split(tokens, 2), pooled.split(tokens, 2)
    ratio = likelihood_ratio(both, before, all_both, all_before, config)
    log_ratio = ratio.log_().unflatten(2, bigram.shape[1:])
    # A product with the mask, not cumsum: documents reset it, and it is reproducible on CUDA.
    total = torch.matmul(log_ratio.transpose(1, 2), mask.transpose(2, 3))
    return list(total.transpose(1, 2).flatten(2).mul_(config.tau).split(widths, dim=1))


def likelihood_ratio(
    both: Tensor, before: Tensor, all_both: Tensor, all_before: Tensor, config: EvidenceConfig
) -> Tensor:
    """How much likelier each child's statistics make a token than those of all siblings together.

    Args:
        both: counts of the bigrams, of each child.
        before: counts of their first tokens.
        all_both: the same of all siblings together.
        all_before: the same of the first tokens.
        config: strength of smoothing and the number of buckets.
    """
    # The pooled estimate is itself smoothed to a constant, which cancels among siblings.
    prior = (all_both + config.strength / config.buckets) / (all_before + config.strength)
    return (both / prior).add_(config.strength).div_(before + config.strength)


def add_counts(
    counts: Tensor,
    slots: Tensor,
    share: Tensor,
    bigram: Tensor,
    context: Tensor,
    valid: Tensor,
    config: EvidenceConfig,
) -> None:
    """Count a batch for the blocks that were held responsible for it, in place.

    Args:
        counts: int64 [L, S, 3, buckets + context_buckets].
        slots: int64 [L, P], distinct but for the scratch slot, whose share is 0.
        share: float32 [L, P, N]: routing weight of each block at each token; 0 counts nothing.
        bigram: int64 [L, B, T].
        context: int64 [L, B, T].
        valid: bool [L, B, T]: positions that have a predecessor in their document.
        config: the numbers of buckets.
    """
    lanes, picked, _ = share.shape
    weight = (share * valid.flatten(1)[:, None] * UNIT).round().long()
    bucket = torch.cat([bigram.flatten(1), context.flatten(1) + config.buckets], dim=1)
    batch = counts.new_zeros(lanes, picked, counts.shape[-1])
    batch.scatter_add_(2, bucket[:, None].expand(-1, picked, -1), weight.repeat(1, 1, 2))
    lane = torch.arange(lanes, device=counts.device)[:, None].expand(-1, picked)
    counts[lane, slots, CURRENT] += batch


def rotate(counts: Tensor) -> None:
    """Start a new half of the recent window, in place: [..., 3, buckets]."""
    counts[..., OLD, :] += counts[..., PREVIOUS, :]
    counts[..., PREVIOUS, :] = counts[..., CURRENT, :]
    counts[..., CURRENT, :] = 0


def kernel_fits(time: int) -> bool:
    """Whether `k1.kernels.evidence` takes windows of so many tokens."""
    return time <= LONGEST_FUSED and time & (time - 1) == 0
