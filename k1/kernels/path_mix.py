"""The mixing of path blocks with gradients: one kernel forward, one backward.

The derivative with respect to the children that are beside the paths is not that of their values,
which are constants, but the identity for the parent's output that they were computed from
(`k1.path` says why).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from k1.kernels.tiles import column, sibling_weights, tile_sizes

# Sizes that a change of the tree changes: a special case of each would be compiled again.
_FLEXIBLE = ["rows", "rows_below", "width_child"]


def own_rows(children: Tensor, exists: Tensor, position: Tensor, in_parent: Tensor) -> Tensor:
    """Find which children are themselves path blocks.

    Args:
        children: int64 [L, R, K]: positions of the path blocks' children in the level below.
        exists: bool [L, R, K].
        position: int64 [L, Q]: positions of the path blocks of the level below.
        in_parent: float32 [L, Q, R]: one-hot, whose child each of them is; zero where padded.

    Returns:
        int64 [L, R, K]: the row of the level below, -1 for a child that is not on a path.
    """
    row = torch.arange(1, position.shape[1] + 1, device=position.device)
    below = in_parent.transpose(1, 2)[:, :, None] > 0
    found = (children[..., None] == position[:, None, None]) & exists[..., None] & below
    return (found * row).amax(-1) - 1


@triton.jit
def _shares(
    learned: tl.tensor,
    prior: tl.tensor,
    children: tl.tensor,
    exists: tl.tensor,
    n: tl.tensor,
    tokens: tl.tensor,
    learned_token: tl.tensor,
    learned_rank: tl.tensor,
    prior_child: tl.tensor,
    prior_token: tl.tensor,
    LEARNED: tl.constexpr,
    RANKS: tl.constexpr,
    BLOCK_RANKS: tl.constexpr,
) -> tl.tensor:
    """Routing weights [tokens, ranks] of one path block."""
    k = tl.arange(0, BLOCK_RANKS)
    child = tl.load(children + k, mask=k < RANKS, other=0)
    there = tl.load(exists + k, mask=k < RANKS, other=0) != 0
    mask = (n[:, None] < tokens) & there[None, :]
    logits = tl.load(
        prior + child[None, :] * prior_child + n[:, None] * prior_token, mask=mask, other=0.0
    )
    if LEARNED:
        logits += tl.load(
            learned + k[None, :] * learned_rank + n[:, None] * learned_token, mask=mask, other=0.0
        )
    return sibling_weights(logits, there[None, :])


@triton.jit(do_not_specialize=_FLEXIBLE)
def _forward(
    y: tl.tensor,
    below: tl.tensor,
    learned: tl.tensor,
    prior: tl.tensor,
    constant: tl.tensor,
    children: tl.tensor,
    exists: tl.tensor,
    own: tl.tensor,
    is_leaf: tl.tensor,
    out: tl.tensor,
    tokens: tl.tensor,
    token_blocks: tl.tensor,
    rows: tl.tensor,
    rows_below: tl.tensor,
    width_child: tl.tensor,
    learned_lane: tl.tensor,
    learned_row: tl.tensor,
    learned_rank: tl.tensor,
    learned_token: tl.tensor,
    prior_lane: tl.tensor,
    prior_child: tl.tensor,
    prior_token: tl.tensor,
    LEARNED: tl.constexpr,
    RANKS: tl.constexpr,
    BLOCK_RANKS: tl.constexpr,
    EMBED: tl.constexpr,
    BLOCK_EMBED: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
) -> None:
    """One path block of one lane, and a block of tokens."""
    program = tl.program_id(0)
    row = (program // token_blocks).to(tl.int64)
    lane = row // rows
    n = (program % token_blocks) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    e = tl.arange(0, BLOCK_EMBED)
    k = tl.arange(0, BLOCK_RANKS)
    inside = (n[:, None] < tokens) & (e[None, :] < EMBED)
    place = n[:, None] * EMBED + e[None, :]
    share = _shares(
        learned + lane * learned_lane + (row % rows) * learned_row,
        prior + lane * prior_lane,
        children + row * RANKS,
        exists + row * RANKS,
        n,
        tokens,
        learned_token,
        learned_rank,
        prior_child,
        prior_token,
        LEARNED,
        RANKS,
        BLOCK_RANKS,
    )
    leaf = tl.load(is_leaf + row) != 0
    mixed = tl.load(y + row * tokens * EMBED + place, mask=inside & leaf, other=0.0).to(tl.float32)
    for rank in tl.static_range(RANKS):
        here = tl.load(exists + row * RANKS + rank) != 0
        q = tl.load(own + row * RANKS + rank)
        beside = lane * width_child + tl.load(children + row * RANKS + rank)
        on_path = lane * rows_below + tl.maximum(q, 0)
        # One of the two is masked off, and a masked load reads nothing.
        value = tl.load(
            constant + beside * tokens * EMBED + place, mask=inside & here & (q < 0), other=0.0
        ).to(tl.float32)
        value += tl.load(
            below + on_path * tokens * EMBED + place, mask=inside & here & (q >= 0), other=0.0
        ).to(tl.float32)
        mixed += column(share, k == rank)[:, None] * value
    tl.store(out + row * tokens * EMBED + place, mixed.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=_FLEXIBLE)
def _backward(
    grad: tl.tensor,
    below: tl.tensor,
    learned: tl.tensor,
    prior: tl.tensor,
    constant: tl.tensor,
    children: tl.tensor,
    exists: tl.tensor,
    own: tl.tensor,
    is_leaf: tl.tensor,
    grad_y: tl.tensor,
    grad_below: tl.tensor,
    grad_learned: tl.tensor,
    tokens: tl.tensor,
    token_blocks: tl.tensor,
    rows: tl.tensor,
    rows_below: tl.tensor,
    width_child: tl.tensor,
    learned_lane: tl.tensor,
    learned_row: tl.tensor,
    learned_rank: tl.tensor,
    learned_token: tl.tensor,
    prior_lane: tl.tensor,
    prior_child: tl.tensor,
    prior_token: tl.tensor,
    LEARNED: tl.constexpr,
    FROZEN: tl.constexpr,
    LEARNED_RANKS: tl.constexpr,
    RANKS: tl.constexpr,
    BLOCK_RANKS: tl.constexpr,
    EMBED: tl.constexpr,
    BLOCK_EMBED: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
) -> None:
    """One path block of one lane, and a block of tokens."""
    program = tl.program_id(0)
    row = (program // token_blocks).to(tl.int64)
    lane = row // rows
    n = (program % token_blocks) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    e = tl.arange(0, BLOCK_EMBED)
    k = tl.arange(0, BLOCK_RANKS)
    inside = (n[:, None] < tokens) & (e[None, :] < EMBED)
    place = n[:, None] * EMBED + e[None, :]
    share = _shares(
        learned + lane * learned_lane + (row % rows) * learned_row,
        prior + lane * prior_lane,
        children + row * RANKS,
        exists + row * RANKS,
        n,
        tokens,
        learned_token,
        learned_rank,
        prior_child,
        prior_token,
        LEARNED,
        RANKS,
        BLOCK_RANKS,
    )
    leaf = tl.load(is_leaf + row) != 0
    d_out = tl.load(grad + row * tokens * EMBED + place, mask=inside, other=0.0).to(tl.float32)
    d_share = tl.zeros((BLOCK_TOKENS, BLOCK_RANKS), dtype=tl.float32)
    straight = tl.zeros((BLOCK_TOKENS,), dtype=tl.float32)
    for rank in tl.static_range(RANKS):
        here = tl.load(exists + row * RANKS + rank) != 0
        q = tl.load(own + row * RANKS + rank)
        beside = here & (q < 0)
        on_path = here & (q >= 0)
        by_rank = column(share, k == rank)
        straight += tl.where(beside, by_rank, 0.0)
        row_below = lane * rows_below + tl.maximum(q, 0)
        tl.store(
            grad_below + row_below * tokens * EMBED + place,
            (by_rank[:, None] * d_out).to(grad_below.dtype.element_ty),
            mask=inside & on_path,
        )
        if LEARNED:
            child = lane * width_child + tl.load(children + row * RANKS + rank)
            constant_there = here if FROZEN else beside
            value = tl.load(
                constant + child * tokens * EMBED + place, mask=inside & constant_there, other=0.0
            ).to(tl.float32)
            if not FROZEN:
                value += tl.load(
                    below + row_below * tokens * EMBED + place, mask=inside & on_path, other=0.0
                ).to(tl.float32)
            product = tl.sum(d_out * value, axis=1)
            d_share += tl.where((k == rank)[None, :], product[:, None], 0.0)
    straight = tl.where(leaf, 1.0, straight)
    tl.store(
        grad_y + row * tokens * EMBED + place,
        (straight[:, None] * d_out).to(grad_y.dtype.element_ty),
        mask=inside,
    )
    if LEARNED:
        mean = tl.sum(share * d_share, axis=1)
        d_logits = share * (d_share - mean[:, None])
        target = grad_learned + lane * learned_lane + (row % rows) * learned_row
        for rank in tl.static_range(LEARNED_RANKS):
            # A router may have more ranks than any block has children: column() is zero there.
            place_rank = target + rank * learned_rank + n * learned_token
            tl.store(place_rank, column(d_logits, k == rank), mask=n < tokens)


class _PathMix(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        y: Tensor,
        below: Tensor,
        learned: Tensor | None,
        prior: Tensor,
        constant: Tensor,
        children: Tensor,
        exists: Tensor,
        own: Tensor,
        is_leaf: Tensor,
    ) -> Tensor:
        y, below, constant = y.contiguous(), below.contiguous(), constant.contiguous()
        index = tuple(t.contiguous() for t in (children, exists, own, is_leaf))
        prior = prior.expand(-1, -1, y.shape[2])
        ctx.save_for_backward(below, learned, prior, constant, *index)
        out = torch.empty_like(y)
        grid, numbers, sizes = _launch(y, below, learned, prior, constant, children)
        logits = prior if learned is None else learned
        _forward[grid](y, below, logits, prior, constant, *index, out, *numbers, **sizes)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        below, learned, prior, constant, *index = ctx.saved_tensors
        grad = grads[0].contiguous()
        by_input = _gradients(grad, below, learned, prior, constant, index, frozen=False)
        return *by_input, None, None, None, None, None, None


def path_mix_backward(
    grad: Tensor,
    rows_below: int,
    learned: Tensor | None,
    prior: Tensor,
    mixed: Tensor,
    children: Tensor,
    exists: Tensor,
    own: Tensor,
    is_leaf: Tensor,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Gradients of `path_mix` where `constant` holds the values of all children.

    Args:
        grad: gradient [L, R, N, d] of what was mixed, contiguous.
        rows_below: Q, path blocks in the level below.
        learned: as in `path_mix`.
        prior: as in `path_mix`.
        mixed: values [L, W_child, N, d] of the level below, contiguous.
        children: as in `path_mix`.
        exists: as in `path_mix`.
        own: as in `path_mix`.
        is_leaf: as in `path_mix`.

    Returns:
        Gradients of `y`, of `below` [L, Q, N, d] and of `learned`.
    """
    lanes, _, tokens, d = grad.shape
    # Only its shape matters: the values are read from `mixed`.
    below = grad.new_empty(1, 1, 1, 1).expand(lanes, rows_below, tokens, d)
    prior = prior.expand(-1, -1, tokens)
    index = tuple(t.contiguous() for t in (children, exists, own, is_leaf))
    return _gradients(grad, below, learned, prior, mixed, index, frozen=True)


def _gradients(
    grad: Tensor,
    below: Tensor,
    learned: Tensor | None,
    prior: Tensor,
    constant: Tensor,
    index: Sequence[Tensor],
    frozen: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    grad_y = torch.empty_like(grad)
    # Rows that pad the level below belong to no block of this one: nothing is written there.
    grad_below = grad.new_zeros(below.shape)
    grad_learned = None
    if learned is not None:
        grad_learned = torch.empty_strided(
            learned.shape, learned.stride(), dtype=learned.dtype, device=learned.device
        )
    grid, numbers, sizes = _launch(grad, below, learned, prior, constant, index[0])
    _backward[grid](
        grad,
        below,
        prior if learned is None else learned,
        prior,
        constant,
        *index,
        grad_y,
        grad_below,
        grad_y if grad_learned is None else grad_learned,
        *numbers,
        FROZEN=frozen,
        LEARNED_RANKS=0 if learned is None else learned.shape[2],
        **sizes,
    )
    return grad_y, grad_below, grad_learned


def _launch(
    y: Tensor,
    below: Tensor,
    learned: Tensor | None,
    prior: Tensor,
    constant: Tensor,
    children: Tensor,
) -> tuple[tuple[int], tuple[int, ...], dict[str, Any]]:
    """Grid, integer arguments and constants, the same in both directions."""
    lanes, rows, tokens, d = y.shape
    sizes = tile_sizes(tokens, d, children.shape[-1])
    blocks = triton.cdiv(tokens, sizes["BLOCK_TOKENS"])
    strides = (0, 0, 0, 0) if learned is None else learned.stride()
    numbers = (
        tokens,
        blocks,
        rows,
        below.shape[1],
        constant.shape[1],
        *strides,
        *prior.stride(),
    )
    return (lanes * rows * blocks,), numbers, {"LEARNED": learned is not None, **sizes}


def path_mix(
    y: Tensor,
    below: Tensor,
    learned: Tensor | None,
    prior: Tensor,
    constant: Tensor,
    children: Tensor,
    exists: Tensor,
    own: Tensor,
    is_leaf: Tensor,
) -> Tensor:
    """Mix a level's path blocks: recomputed children with a graph, the others frozen.

    Args:
        y: outputs [L, R, N, d] of the path blocks.
        below: mixed values [L, Q, N, d] of the path blocks of the level below.
        learned: float32 [L, R, K', N] routing logits by rank (K' >= K), or None.
        prior: float32 [L, W_child, N] or [L, W_child, 1]; gets no gradient.
        constant: frozen mixed values [L, W_child, N, d] of the level below; gets no gradient.
        children: int64 [L, R, K]: positions in the level below.
        exists: bool [L, R, K].
        own: int64 [L, R, K] from `own_rows`.
        is_leaf: bool [L, R]; a leaf keeps its own output.

    Returns:
        [L, R, N, d]; zero for a row that is no leaf and has no children.
    """
    out: Tensor = _PathMix.apply(y, below, learned, prior, constant, children, exists, own, is_leaf)
    return out
