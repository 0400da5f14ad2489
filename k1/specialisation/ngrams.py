"""What bigrams tell: why text went to a child, and a classifier of domains to compare routers with.

The estimate is that of `k1.evidence`: counts smoothed towards those of all competitors together.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from k1.arena import Arena
from k1.config import EvidenceConfig
from k1.data import POOLS
from k1.evidence import UNIT, hash_bigrams
from k1.forward import Batch, read_text
from k1.sampling import TokenStore
from k1.specialisation.information import Labels

_CHUNK = 2**20
"""Tokens that are hashed at a time."""


def log_ratios(counts: Tensor, bigram: Tensor, context: Tensor, config: EvidenceConfig) -> Tensor:
    """Log-likelihood ratios of bigrams under each competitor's counts against all counts.

    Args:
        counts: float64 [C, buckets + context_buckets], in tokens.
        bigram: int64 [N], buckets.
        context: int64 [N], buckets.
        config: sizes and smoothing.

    Returns:
        float64 [C, N], in nats.
    """
    both, before = counts[:, bigram], counts[:, config.buckets + context]
    all_both, all_before = both.sum(0), before.sum(0)
    prior = (all_both + config.strength / config.buckets) / (all_before + config.strength)
    return ((both / prior + config.strength) / (before + config.strength)).log()


class BigramClassifier:
    """Naive Bayes over hashed bigrams: which domain is a window of?"""

    def __init__(self, counts: Tensor, config: EvidenceConfig) -> None:
        """Take counts of each domain, float64 [D, buckets + context_buckets]."""
        self.counts, self.config = counts, config

    @classmethod
    def fit(cls, store: TokenStore, config: EvidenceConfig) -> BigramClassifier:
        """Count the training text of each domain."""
        size = config.buckets + config.context_buckets
        counts = torch.zeros(len(store.domains), size, dtype=torch.float64)
        for number in range(len(store.domains)):
            first, length = store.extent[POOLS.index("train"), number].tolist()
            for at in range(first, first + length - 1, _CHUNK):
                stop = min(at + _CHUNK + 1, first + length)  # pairs across chunks count too
                tokens = store.tokens[at:stop].long()[None, None]
                bigram, context = hash_bigrams(tokens, config)
                inside = ~store.starts[at:stop]
                inside[0] = False
                for bucket, start in ((bigram, 0), (context, config.buckets)):
                    found = torch.bincount(bucket[0, 0][inside] + start, minlength=size)
                    counts[number] += found.cpu()
        return cls(counts, config)

    def scores(self, windows: Batch) -> Tensor:
        """Log-likelihood ratio of each domain for windows [1, B, T]: float64 [B, D]."""
        own = windows.map(Tensor.cpu)
        bigram, context = hash_bigrams(own.inputs, self.config)
        valid = ~own.starts & (torch.arange(own.inputs.shape[-1]) > 0)
        ratios = log_ratios(self.counts, bigram.flatten(), context.flatten(), self.config)
        return (ratios * valid.flatten()).unflatten(1, own.inputs.shape[1:]).sum(2).T

    def classify(self, windows: Batch) -> Labels:
        """The likeliest domain of each window."""
        return np.asarray(self.scores(windows).argmax(1).numpy(), dtype=np.int64)


@dataclass(frozen=True)
class Reason:
    """A bigram that spoke for a block."""

    tokens: tuple[int, int]
    times: int
    nats: float
    """Log-likelihood ratio of all its occurrences, against the siblings' common statistics, summed
    over the levels of the path; `tau` is not in it."""


def reasons(arena: Arena, lane: int, slot: int, batch: Batch, most: int = 3) -> list[Reason]:
    """Why windows went to a block: the bigrams with the largest log-likelihood ratios for its path.

    Args:
        arena: has the lane.
        lane: which.
        slot: the block's.
        batch: the windows [1, B, T].
        most: how many to name; each speaks for the block.

    Returns:
        The bigrams; none where the router keeps no statistics.
    """
    inputs = batch.inputs.cpu()
    before = torch.cat([inputs[..., :1], inputs[..., :-1]], dim=-1).flatten()
    nats: Counter[tuple[int, int]] = Counter()
    times: Counter[tuple[int, int]] = Counter()
    pairs = zip(before.tolist(), inputs.flatten().tolist(), strict=True)
    ratios = path_ratios(arena, lane, slot, batch)
    for pair, value, counts in zip(pairs, *(t.tolist() for t in ratios), strict=True):
        if counts:
            nats[pair] += value
            times[pair] += 1
    best = sorted(nats, key=lambda pair: (-nats[pair], pair))[:most]
    return [Reason(p, times[p], nats[p]) for p in best if nats[p] > 0]


def path_ratios(arena: Arena, lane: int, slot: int, batch: Batch) -> tuple[Tensor, Tensor]:
    """Log-likelihood ratios of windows' bigrams for a block and its ancestors, summed.

    Returns:
        float64 [N] in nats, 0 where there is no bigram or the router keeps no statistics; and
        bool [N]: there is a bigram.
    """
    text = read_text(batch.map(Tensor.cpu), arena.config)
    bigram, context, valid = (t.flatten() for t in (text.bigram, text.context, text.valid))
    total = torch.zeros(len(bigram), dtype=torch.float64)
    if arena.config.model.router != "evidence":
        return total, valid
    tree = arena.trees[lane]
    for on_path in tree.path(slot)[1:]:
        siblings = tree.children(tree.blocks[on_path].parent)
        counts = arena["evidence"][lane, siblings].sum(1).cpu().double() / UNIT
        ratios = log_ratios(counts, bigram, context, arena.config.evidence)
        total += ratios[siblings.index(on_path)]
    return total * valid, valid
