"""The mixing and the sums over children of path blocks, backward.

The derivative with respect to the children that are beside the paths is not that of their values,
which are constants, but the identity for the parent's output that they were computed from
(`k1.path` says why).
"""

from __future__ import annotations

import typing

import triton
import triton.language as tl
from torch import Tensor

from k1.block import Layout
from k1.kernels.select import PathTable
from k1.kernels.tiles import column, sibling_weights, tile_sizes
from k1.levels import LevelIndex

# Sizes that a change of the tree changes: a special case of each would be compiled again.
_FLEXIBLE = ["first", "width", "width_child", "offset", "offset_child"]
_AHEAD = 8
"""So many children's tiles a program asks for at once: they take 8 registers each."""


@triton.jit
def _open(row_ptr, first, slots, offset, width, token_blocks, BLOCK_TOKENS: tl.constexpr):
    """What a program works on: table entry, lane, place in the level (-1 if padded), tokens."""
    program = tl.program_id(0)
    entry = first + (program // token_blocks).to(tl.int64)
    row = tl.load(row_ptr + entry)
    lane, slot = row // slots, row % slots
    here = tl.where(slot == slots - 1, -1, lane * width + slot - offset)
    return entry, lane, here, (program % token_blocks) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)


@triton.jit
def _children(children, has_child, place, RANKS: tl.constexpr):
    """What is known of each child of a block: is there one, its position, its table entry or -1."""
    exists: typing.Any = ()
    position: typing.Any = ()
    below: typing.Any = ()
    for rank in tl.static_range(RANKS):
        exists += (tl.load(has_child + rank) != 0,)
        position += (tl.load(children + rank),)
    for rank in tl.static_range(RANKS):
        below += (tl.load(place + position[rank], mask=exists[rank], other=-1),)
    return exists, position, below


@triton.jit
def _router(weights, e, EMBED: tl.constexpr, ROUTER: tl.constexpr, RANKS: tl.constexpr):
    """Router weights of a block: a vector for each rank."""
    found: typing.Any = ()
    for rank in tl.static_range(RANKS):
        found += (tl.load(weights + e * ROUTER + rank, mask=e < EMBED, other=0.0),)
    return found


@triton.jit(do_not_specialize=_FLEXIBLE)
def _mix_backward(
    grad, y, mixed, prior, weights, normed, by_logits, row_ptr, place_ptr,
    children, has_child, is_leaf,
    first, slots, offset, offset_child, width, width_child, tokens, token_blocks,
    row_size, at_weight, at_bias, prior_lane, prior_child, prior_token,
    LEARNED: tl.constexpr, ROUTER: tl.constexpr, RANKS: tl.constexpr, BLOCK_RANKS: tl.constexpr,
    AHEAD: tl.constexpr, EMBED: tl.constexpr, BLOCK_EMBED: tl.constexpr, BLOCK_TOKENS: tl.constexpr,
):  # fmt: skip
    entry, lane, here, n = _open(row_ptr, first, slots, offset, width, token_blocks, BLOCK_TOKENS)
    e, k = tl.arange(0, BLOCK_EMBED), tl.arange(0, BLOCK_RANKS)
    inside = (n[:, None] < tokens) & (e[None, :] < EMBED)
    tile = n[:, None] * EMBED + e[None, :]
    if here < 0:
        return
    if tl.load(is_leaf + here) != 0:
        # Its gradient is its own already, and its router routes nothing.
        if LEARNED:
            zero = tl.zeros((BLOCK_TOKENS, BLOCK_EMBED), normed.dtype.element_ty)
            tl.store(normed + entry * tokens * EMBED + tile, zero, mask=inside)
            for rank in tl.static_range(ROUTER):
                none = tl.zeros((BLOCK_TOKENS,), by_logits.dtype.element_ty)
                tl.store(by_logits + (entry * tokens + n) * ROUTER + rank, none, mask=n < tokens)
        return
    # All is loaded before anything is stored or passed between threads: no load overtakes a store
    # or a barrier, and waiting for one child after the other took most of the time.
    child = tl.load(children + here * RANKS + k, mask=k < RANKS, other=0)
    there = tl.load(has_child + here * RANKS + k, mask=k < RANKS, other=0) != 0
    logits = tl.load(
        prior + lane * prior_lane + child[None, :] * prior_child + n[:, None] * prior_token,
        mask=(n[:, None] < tokens) & there[None, :],
        other=0.0,
    )
    g = tl.load(grad + entry * tokens * EMBED + tile, mask=inside, other=0.0).to(tl.float32)
    exists, position, below = _children(
        children + here * RANKS, has_child + here * RANKS,
        place_ptr + lane * slots + offset_child, RANKS,
    )  # fmt: skip
    h = tl.zeros((BLOCK_TOKENS, BLOCK_EMBED), tl.float32)
    inverse = tl.zeros((BLOCK_TOKENS,), tl.float32)
    by_share = tl.zeros((BLOCK_TOKENS, BLOCK_RANKS), tl.float32)
    router = weights + tl.load(row_ptr + entry) * row_size
    if LEARNED:
        own = tl.load(y + here * tokens * EMBED + tile, mask=inside, other=0.0).to(tl.float32)
        to_rank = _router(router + at_weight, e, EMBED, ROUTER, RANKS)
        bias: typing.Any = ()
        for rank in tl.static_range(RANKS):
            bias += (tl.load(router + at_bias + rank),)
        for begin in tl.static_range(0, RANKS, AHEAD):
            values: typing.Any = ()
            for rank in tl.static_range(begin, begin + AHEAD):
                if rank < RANKS:
                    at = mixed + (lane * width_child + position[rank]) * tokens * EMBED + tile
                    values += (tl.load(at, mask=inside & exists[rank], other=0.0),)
            for rank in tl.static_range(begin, begin + AHEAD):
                if rank < RANKS:
                    product = tl.sum(g * values[rank - begin].to(tl.float32), axis=1)
                    by_share += tl.where((k == rank)[None, :], product[:, None], 0.0)
        centred = tl.where(inside, own - (tl.sum(own, axis=1) / EMBED)[:, None], 0.0)
        inverse = tl.rsqrt(tl.sum(centred * centred, axis=1) / EMBED + 1e-5)
        h = centred * inverse[:, None]
        for rank in tl.static_range(RANKS):
            learned = tl.sum(h * to_rank[rank][None, :], axis=1) + bias[rank]
            logits += tl.where((k == rank)[None, :], learned[:, None], 0.0)
    share = sibling_weights(logits, there[None, :])

    straight = tl.zeros((BLOCK_TOKENS,), tl.float32)
    for rank in tl.static_range(RANKS):
        part = column(share, k == rank)
        straight += tl.where(exists[rank] & (below[rank] < 0), part, 0.0)
        if below[rank] >= 0:
            tl.store(
                grad + below[rank] * tokens * EMBED + tile,
                (part[:, None] * g).to(grad.dtype.element_ty),
                mask=inside,
            )
    by_y = straight[:, None] * g
    if LEARNED:
        by_logit = share * (by_share - tl.sum(share * by_share, axis=1)[:, None])
        by_logit = tl.where(there[None, :], by_logit, 0.0)
        by_h = tl.zeros((BLOCK_TOKENS, BLOCK_EMBED), tl.float32)
        # Once more: held from the first time until here, they would take too many registers.
        to_rank = _router(router + at_weight, e, EMBED, ROUTER, RANKS)
        for rank in tl.static_range(ROUTER):
            # A router may have more ranks than any block has children, whose parts are zero.
            part = tl.zeros((BLOCK_TOKENS,), tl.float32)
            if rank < RANKS:
                part = column(by_logit, k == rank)
                by_h += part[:, None] * to_rank[rank][None, :]
            tl.store(
                by_logits + (entry * tokens + n) * ROUTER + rank,
                part.to(by_logits.dtype.element_ty),
                mask=n < tokens,
            )
        tl.store(normed + entry * tokens * EMBED + tile, h.to(normed.dtype.element_ty), mask=inside)
        along = tl.sum(by_h * h, axis=1) / EMBED
        by_h -= (tl.sum(by_h, axis=1) / EMBED)[:, None] + h * along[:, None]
        by_y += inverse[:, None] * by_h
    tl.store(grad + entry * tokens * EMBED + tile, by_y.to(grad.dtype.element_ty), mask=inside)


def mix_backward(
    table: PathTable,
    grad: Tensor,
    y: Tensor,
    mixed: Tensor,
    prior: Tensor,
    rows: Tensor,
    layout: Layout,
    router: tuple[Tensor, Tensor] | None,
    parent: LevelIndex,
    child: LevelIndex,
) -> None:
    """Turn gradients of a level's mixed values into those of its blocks and of the level below.

    Args:
        table: the path blocks.
        grad: [M, N, d]: gradients of the path blocks' mixed values; this level's are replaced by
            those of the blocks' own outputs, and the next level's are written.
        y: outputs of the level's blocks [L, W_parent, N, d].
        mixed: mixed values of the level below [L, W_child, N, d].
        prior: float32 [L, W_child, N] or [L, W_child, 1].
        rows: arena rows [L * S, P].
        layout: what lies where in a row.
        router: None for the `mean` router, else what gradients of routers need is written there:
            the normed outputs [M, N, d] and the gradients of the logits [M, N, max_children].
        parent: the level.
        child: the level below.
    """
    _, tokens, d = grad.shape
    cut, slots = table.cut(parent.level), len(rows) // table.lanes
    sizes = tile_sizes(tokens, d, parent.children.shape[-1])
    blocks = triton.cdiv(tokens, sizes["BLOCK_TOKENS"])
    normed, by_logits = router or (grad, grad)
    at = dict(zip(layout.names, layout.starts, strict=True))
    _mix_backward[((cut.stop - cut.start) * blocks,)](
        grad, y, mixed, prior, rows, normed, by_logits, table.row, table.place,
        parent.children, parent.has_child, parent.is_leaf,
        cut.start, slots, parent.offset, child.offset, parent.width, child.width, tokens, blocks,
        rows.shape[1], at["router.weight"], at["router.bias"],
        *prior.expand(-1, -1, tokens).stride(),
        AHEAD=_AHEAD, LEARNED=router is not None, ROUTER=by_logits.shape[-1] if router else 1,
        **sizes,
    )  # fmt: skip


@triton.jit(do_not_specialize=_FLEXIBLE)
def _add_children(
    grad, dx, row_ptr, place_ptr, children, has_child,
    first, slots, offset, offset_child, width, tokens, token_blocks,
    RANKS: tl.constexpr, BLOCK_RANKS: tl.constexpr,
    EMBED: tl.constexpr, BLOCK_EMBED: tl.constexpr, BLOCK_TOKENS: tl.constexpr,
):  # fmt: skip
    entry, lane, here, n = _open(row_ptr, first, slots, offset, width, token_blocks, BLOCK_TOKENS)
    if here < 0:
        return
    e = tl.arange(0, BLOCK_EMBED)
    inside = (n[:, None] < tokens) & (e[None, :] < EMBED)
    tile = n[:, None] * EMBED + e[None, :]
    _, _, below = _children(
        children + here * RANKS, has_child + here * RANKS,
        place_ptr + lane * slots + offset_child, RANKS,
    )  # fmt: skip
    total = tl.load(grad + entry * tokens * EMBED + tile, mask=inside, other=0.0).to(tl.float32)
    for rank in tl.static_range(RANKS):
        value = tl.load(
            dx + below[rank] * tokens * EMBED + tile,
            mask=inside & (below[rank] >= 0),
            other=0.0,
        )
        total += value.to(tl.float32)
    tl.store(grad + entry * tokens * EMBED + tile, total.to(grad.dtype.element_ty), mask=inside)


def add_children(
    table: PathTable, grad: Tensor, dx: Tensor, slots: int, parent: LevelIndex, child: LevelIndex
) -> None:
    """Add the gradients of the inputs of a level's path blocks to those of their parents' outputs.

    Args:
        table: the path blocks.
        grad: [M, N, d]: gradients of outputs; those of the parents' level are added to.
        dx: [M, N, d]: gradients of inputs.
        slots: S.
        parent: the parents' level.
        child: the children's level.
    """
    _, tokens, d = grad.shape
    cut = table.cut(parent.level)
    sizes = tile_sizes(tokens, d, parent.children.shape[-1])
    blocks = triton.cdiv(tokens, sizes["BLOCK_TOKENS"])
    _add_children[((cut.stop - cut.start) * blocks,)](
        grad, dx, table.row, table.place, parent.children, parent.has_child,
        cut.start, slots, parent.offset, child.offset, parent.width, tokens, blocks, **sizes,
    )  # fmt: skip
