"""n-grams of any order, hashed: what versions are told apart by.

The tree's routers count bigrams (`k1.evidence`), and so do versions unless another order is asked
for. Shapes: any leading dimensions, then N tokens in the order of the text.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from k1.config import EvidenceConfig

WIDE = 1 << 16
"""Buckets from order 3 on: longer contexts are many, and collide where bigrams' do not."""


def tables_for(order: int, config: EvidenceConfig) -> EvidenceConfig:
    """Settings for n-grams of an order: those of a tree's bigrams up to order 2."""
    return config if order <= 2 else replace(config, buckets=WIDE, context_buckets=WIDE)


def hash_ngrams(
    tokens: Tensor, starts: Tensor, order: int, config: EvidenceConfig
) -> tuple[Tensor, Tensor, Tensor]:
    """Hash each token with the `order - 1` tokens before it.

    For order 2 buckets are those of `k1.evidence.hash_bigrams`.

    Args:
        tokens: int64 [..., N].
        starts: bool [..., N]: a document begins at this token; one begins at the first anyway.
        order: 1 or more.
        config: the numbers of buckets.

    Returns:
        Bucket of the n-gram and of its context, int64 [..., N], and bool [..., N]: the token is
        not its document's first, and all of its context is in the document.
    """
    position = torch.arange(tokens.shape[-1], device=tokens.device)
    begun = torch.where(starts, position, 0).cummax(-1).values
    before = torch.zeros_like(tokens)
    for back in range(order - 1, 0, -1):
        earlier = tokens.gather(-1, (position - back).clamp(min=0).expand(tokens.shape))
        before = (before * 0x01000193 + earlier) & 0x7FFFFFFF
    mixed = (before * 0x9E3779B1 + tokens * 0x85EBCA77) & 0x7FFFFFFF
    bucket = (mixed ^ (mixed >> 15)) & (config.buckets - 1)
    return bucket, before & (config.context_buckets - 1), position - begun >= max(1, order - 1)
