"""A level's children mixed by their routing weights, without gradients, in one pass."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from k1.kernels.tiles import column, sibling_weights, tile_sizes
from k1.levels import LevelIndex


# Sizes that a change of the tree changes: a special case of each would be compiled again.
@triton.jit(do_not_specialize=["width", "width_child"])
def _mix_frozen(
    y: tl.tensor,
    m: tl.tensor,
    prior: tl.tensor,
    weight: tl.tensor,
    bias: tl.tensor,
    children: tl.tensor,
    has_child: tl.tensor,
    is_leaf: tl.tensor,
    out: tl.tensor,
    by_child: tl.tensor,
    tokens: tl.tensor,
    token_blocks: tl.tensor,
    width: tl.tensor,
    width_child: tl.tensor,
    prior_lane: tl.tensor,
    prior_child: tl.tensor,
    prior_token: tl.tensor,
    weight_lane: tl.tensor,
    weight_parent: tl.tensor,
    weight_embed: tl.tensor,
    weight_rank: tl.tensor,
    bias_lane: tl.tensor,
    bias_parent: tl.tensor,
    bias_rank: tl.tensor,
    LEARNED: tl.constexpr,
    RANKS: tl.constexpr,
    BLOCK_RANKS: tl.constexpr,
    EMBED: tl.constexpr,
    BLOCK_EMBED: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
) -> None:
    """One parent of one lane, and a block of tokens."""
    program = tl.program_id(0)
    row = (program // token_blocks).to(tl.int64)
    lane = row // width
    n = (program % token_blocks) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    e = tl.arange(0, BLOCK_EMBED)
    k = tl.arange(0, BLOCK_RANKS)
    inside = (n[:, None] < tokens) & (e[None, :] < EMBED)
    place = n[:, None] * EMBED + e[None, :]
    leaf = tl.load(is_leaf + row) != 0
    if leaf:
        only = tl.load(y + row * tokens * EMBED + place, mask=inside, other=0.0)
        tl.store(out + row * tokens * EMBED + place, only, mask=inside)
        return

    child = tl.load(children + row * RANKS + k, mask=k < RANKS, other=0)
    exists = tl.load(has_child + row * RANKS + k, mask=k < RANKS, other=0) != 0
    logits = tl.load(
        prior + lane * prior_lane + child[None, :] * prior_child + n[:, None] * prior_token,
        mask=(n[:, None] < tokens) & exists[None, :],
        other=0.0,
    )
    if LEARNED:
        own = tl.load(y + row * tokens * EMBED + place, mask=inside, other=0.0).to(tl.float32)
        centred = tl.where(inside, own - (tl.sum(own, axis=1) / EMBED)[:, None], 0.0)
        variance = tl.sum(centred * centred, axis=1) / EMBED
        h = centred * tl.rsqrt(variance + 1e-5)[:, None]
        at_weight = weight + lane * weight_lane + (row % width) * weight_parent
        at_bias = bias + lane * bias_lane + (row % width) * bias_parent
        for rank in tl.static_range(RANKS):
            w = tl.load(
                at_weight + e * weight_embed + rank * weight_rank, mask=e < EMBED, other=0.0
            ).to(tl.float32)
            learned = tl.sum(h * w[None, :], axis=1) + tl.load(at_bias + rank * bias_rank)
            logits += tl.where((k == rank)[None, :], learned[:, None], 0.0)
    share = sibling_weights(logits, exists[None, :])

    mixed = tl.zeros((BLOCK_TOKENS, BLOCK_EMBED), dtype=tl.float32)
    for rank in tl.static_range(RANKS):
        here = tl.load(has_child + row * RANKS + rank) != 0
        source = lane * width_child + tl.load(children + row * RANKS + rank)
        value = tl.load(m + source * tokens * EMBED + place, mask=inside & here, other=0.0)
        by_rank = column(share, k == rank)
        mixed += by_rank[:, None] * value.to(tl.float32)
        tl.store(by_child + source * tokens + n, by_rank, mask=(n < tokens) & here)
    tl.store(out + row * tokens * EMBED + place, mixed.to(out.dtype.element_ty), mask=inside)


def mix_frozen(
    y: Tensor,
    m: Tensor,
    prior: Tensor,
    router_weight: Tensor | None,
    router_bias: Tensor | None,
    share: Tensor,
    parent: LevelIndex,
    child: LevelIndex,
) -> Tensor:
    """Route and mix one level: `sibling_softmax` and `mix`, a leaf keeping its own output.

    Args:
        y: the parents' outputs [L, W_parent, N, d].
        m: the children's mixed values [L, W_child, N, d], in the dtype of `y`.
        prior: float32 [L, W_child, N] or [L, W_child, 1]: log prior plus evidence.
        router_weight: float32 [L, W_parent, d, max_children], or None for no learned part.
        router_bias: float32 [L, W_parent, max_children], or None with `router_weight`.
        share: float32 [L, W_child, N], contiguous; the weight of each child among its siblings is
            written there, nothing where dead.
        parent: the parents' level.
        child: the children's level.

    Returns:
        The parents' mixed values [L, W_parent, N, d].
    """
    lanes, width, tokens, d = y.shape
    y, m = y.contiguous(), m.contiguous()
    prior = prior.expand(-1, -1, tokens)
    out = torch.empty_like(y)
    learned = router_weight is not None and router_bias is not None
    sizes = tile_sizes(tokens, d, parent.children.shape[-1])
    blocks = triton.cdiv(tokens, sizes["BLOCK_TOKENS"])
    _mix_frozen[(lanes * width * blocks,)](
        y,
        m,
        prior,
        router_weight if learned else prior,
        router_bias if learned else prior,
        parent.children,
        parent.has_child,
        parent.is_leaf,
        out,
        share,
        tokens,
        blocks,
        width,
        child.width,
        *prior.stride(),
        *(router_weight.stride() if router_weight is not None else (0, 0, 0, 0)),
        *(router_bias.stride() if router_bias is not None else (0, 0, 0)),
        LEARNED=learned,
        **sizes,
    )
    return out
