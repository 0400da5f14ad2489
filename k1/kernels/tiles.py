"""What the mixing kernels share: the size of their tiles, and the softmax over siblings."""

from __future__ import annotations

import triton
import triton.language as tl

_TILE = 2048
"""Numbers of a tile [tokens, embed] that one program holds: 16 a thread."""


def tile_sizes(tokens: int, embed: int, ranks: int) -> dict[str, int]:
    """Choose powers of two that cover the width and the ranks, and how many tokens fit with them.

    Args:
        tokens: tokens in all, N.
        embed: width of the residual stream, d.
        ranks: children per block, K.
    """
    wide = triton.next_power_of_2(embed)
    fit = min(triton.next_power_of_2(tokens), 64, _TILE // wide)
    return {
        "RANKS": ranks,
        "BLOCK_RANKS": max(2, triton.next_power_of_2(ranks)),
        "EMBED": embed,
        "BLOCK_EMBED": wide,
        "BLOCK_TOKENS": max(2, fit),
    }


@triton.jit
def sibling_weights(logits: tl.tensor, exists: tl.tensor) -> tl.tensor:
    """Softmax over axis 1 of [tokens, ranks] where a child exists [1, ranks].

    Without any child it is uniform over nothing: the callers read it at existing children only.
    """
    logits = tl.where(exists, logits, -3.0e38)
    odds = tl.exp(logits - tl.max(logits, axis=1)[:, None])
    return odds / tl.sum(odds, axis=1)[:, None]


@triton.jit
def column(tile: tl.tensor, at: tl.tensor) -> tl.tensor:
    """Pick a column of [tokens, ranks]; `at` is True in that column alone."""
    return tl.sum(tl.where(at[None, :], tile, 0.0), axis=1)
