"""Gradients of blocks' parameter rows, given what their products are made of: two launches.

All weight gradients of a block are products A^T B over its tokens. The first kernel computes all
of them, for all blocks, tile by tile: its programs share the tokens out between them and leave
partial sums. The second adds those up, takes the gradients through the folding of the norms
(`k1.block.fold`), and writes each where it lies in the block's row.

Shapes: M blocks, N tokens of each, d = embed, f = feed_forward, K = most children of a block.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from k1.block import Layout
from k1.kernels.backward import Factors
from k1.kernels.block import Kept

_BLOCK_TOKENS = 64
"""Tokens of one step of a program's loop."""
_LEAST_STEPS = 8
"""Fewer are not worth the sum that a program leaves."""
_MOST_SPLITS = 32
_SUM_STEPS = 4
"""Steps that read as much memory as it takes to write and read a partial sum."""
_ONES = tl.constexpr(16)
"""Columns of ones that column sums are a product with: the fewest that tensor cores take."""
_NARROWEST = 64
"""Least width of a tile: that of the smallest product of Hopper's tensor cores, so that all read
what they multiply in the same way (`_multiply` says why)."""
_ROOM = {64: 528, 128: 264}
"""Programs that an H200 holds at once, by the width of their tiles."""


@triton.jit
def _multiply(
    a_ptr, b_ptr, out_ptr, sums_ptr, first, tokens, row, column, height, width, has_sums,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, WHOLE: tl.constexpr,
    STEPS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A tile [ROWS, COLUMNS] of A^T B [height, width] from (row, column) on, and column sums of B.

    Over STEPS * BLOCK tokens of A [tokens, height] and B [tokens, width] from `first` on. The sums
    are stored with the first row of tiles. `WHOLE`: the tile does not go over the edge.
    """
    n = tl.arange(0, BLOCK)
    r, c = row + tl.arange(0, ROWS), column + tl.arange(0, COLUMNS)
    a_at, b_at = n[:, None] * height + r[None, :], n[:, None] * width + c[None, :]
    a_ptr += first.to(tl.int64) * height
    b_ptr += first.to(tl.int64) * width
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    ones = tl.full((BLOCK, _ONES), 1.0, a_ptr.dtype.element_ty)
    sums = tl.zeros((COLUMNS, _ONES), tl.float32)
    for step in range(STEPS):
        inside = (first + step * BLOCK + n < tokens)[:, None]
        if WHOLE:
            a = tl.load(a_ptr + a_at, mask=inside, other=0.0)
            b = tl.load(b_ptr + b_at, mask=inside, other=0.0)
        else:
            a = tl.load(a_ptr + a_at, mask=inside & (r < height)[None, :], other=0.0)
            b = tl.load(b_ptr + b_at, mask=inside & (c < width)[None, :], other=0.0)
        total = tl.dot(tl.trans(a), b, total, input_precision="ieee")
        # A product too: were b also read into registers, Triton 3.6 would give it one buffer less
        # and overwrite what the product still under way reads.
        sums = tl.dot(tl.trans(b), ones, sums, input_precision="ieee")
        a_ptr += BLOCK * height
        b_ptr += BLOCK * width
    within = c < width
    there = (r < height)[:, None] & within[None, :]
    tl.store(out_ptr + r[:, None] * width + c[None, :], total, mask=there)
    sums = tl.sum(tl.where((tl.arange(0, _ONES) == 0)[None, :], sums, 0.0), 1)
    tl.store(sums_ptr + c, sums, mask=within & has_sums & (row == 0))


@triton.jit(do_not_specialize=["slots", "inner"])
def _products(
    normed_1, by_qkv, attended, by_middle, normed_2, by_hidden, act, dy, normed, by_logits,
    row_ptr, parts_ptr, tokens, slots, inner,
    at_qkv, at_qkv_bias, at_out, at_in, at_in_bias, at_back, at_back_bias, at_router,
    at_router_bias,
    D: tl.constexpr, F: tl.constexpr, RANKS: tl.constexpr, BLOCK_RANKS: tl.constexpr,
    SIZE: tl.constexpr, W: tl.constexpr, STEPS: tl.constexpr, TILES: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One tile of one of a block's products, over a part of the tokens."""
    entry, tile = (tl.program_id(0) // TILES).to(tl.int64), tl.program_id(0) % TILES
    split = tl.program_id(1)
    if tl.load(row_ptr + entry) % slots == slots - 1:
        return
    DEEP: tl.constexpr = D // W
    WIDE: tl.constexpr = (F + W - 1) // W
    IN: tl.constexpr = 3 * DEEP * DEEP
    BACK: tl.constexpr = IN + DEEP * WIDE
    OUT: tl.constexpr = BACK + WIDE * DEEP
    ROUTER: tl.constexpr = OUT + DEEP * DEEP
    first = split * (STEPS * BLOCK)
    parts_ptr += (split * (tl.num_programs(0) // TILES) + entry) * SIZE
    if tile < ROUTER:
        is_in, is_back, is_out = tile >= IN, tile >= BACK, tile >= OUT
        a_ptr = tl.where(is_in, normed_2, normed_1)
        a_ptr = tl.where(is_out, attended, tl.where(is_back, act, a_ptr))
        b_ptr = tl.where(is_in, by_hidden, by_qkv)
        b_ptr = tl.where(is_out, by_middle, tl.where(is_back, dy, b_ptr))
        height = tl.where(is_back & (tile < OUT), F, D)
        width = tl.where(is_in, tl.where(is_back, D, F), 3 * D)
        across = tl.where(is_in, tl.where(is_back, DEEP, WIDE), 3 * DEEP)
        at = tl.where(is_in, at_in, at_qkv)
        at = tl.where(is_out, at_out, tl.where(is_back, at_back, at))
        at_sums = tl.where(is_in, at_in_bias, at_qkv_bias)
        at_sums = tl.where(is_back, at_back_bias, at_sums)
        start = tl.where(is_in, IN, 0)
        within = tile - tl.where(is_out, OUT, tl.where(is_back, BACK, start))
        _multiply(
            a_ptr + entry * tokens * height, b_ptr + entry * tokens * width,
            parts_ptr + at, parts_ptr + at_sums, first, tokens,
            within // across * W, within % across * W, height, width, tile < OUT,
            W, W, F % W == 0, STEPS, BLOCK,
        )  # fmt: skip
    elif entry < inner:
        _multiply(
            normed + entry * tokens * D, by_logits + entry * tokens * RANKS,
            parts_ptr + at_router, parts_ptr + at_router_bias, first, tokens,
            (tile - ROUTER) * W, 0, D, RANKS, True,
            W, BLOCK_RANKS, RANKS == BLOCK_RANKS, STEPS, BLOCK,
        )  # fmt: skip


@triton.jit
def _total(parts_ptr, place, inside, splits, step, S: tl.constexpr):
    """Add up the partial sums at some places [...] of a block's parts."""
    total = tl.load(parts_ptr + place, mask=inside, other=0.0)
    for split in tl.static_range(1, S):
        part = tl.load(parts_ptr + split * step + place, mask=inside & (split < splits), other=0.0)
        total += part
    return total


@triton.jit
def _unfold(
    parts_ptr, splits, step, raw_ptr, out_ptr, first, at_weight, at_gain, at_shift, at_bias,
    C: tl.constexpr, S: tl.constexpr, R: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """R rows of a projection [d, C] behind a norm, and the norm's gain and shift; sum of squares.

    `at_bias`: where the sums of the projection's bias gradient are among the parts.
    """
    r = first + tl.arange(0, R)
    gain, shift = tl.load(raw_ptr + at_gain + r), tl.load(raw_ptr + at_shift + r)
    by_gain, by_shift = tl.zeros((R,), tl.float32), tl.zeros((R,), tl.float32)
    squares = tl.zeros((R,), tl.float32)
    for column in range(0, C, W):
        c = column + tl.arange(0, W)
        place = at_weight + r[:, None] * C + c[None, :]
        product = _total(parts_ptr, place, place >= 0, splits, step, S)
        sums = _total(parts_ptr, at_bias + c, c >= 0, splits, step, S)[None, :]
        raw = tl.load(raw_ptr + place)
        value = gain[:, None] * product + shift[:, None] * sums
        tl.store(out_ptr + place, value)
        by_gain += tl.sum(product * raw, 1)
        by_shift += tl.sum(sums * raw, 1)
        squares += tl.sum(value * value, 1)
    tl.store(out_ptr + at_gain + r, by_gain)
    tl.store(out_ptr + at_shift + r, by_shift)
    return tl.sum(squares + by_gain * by_gain + by_shift * by_shift, 0)


@triton.jit(do_not_specialize=["slots", "inner", "splits"])
def _finish(
    parts_ptr, rows_ptr, row_ptr, out_ptr, squares_ptr, slots, inner, splits,
    at_gain_1, at_shift_1, at_qkv, at_qkv_bias, at_out, at_gain_2, at_shift_2, at_in, at_in_bias,
    at_router,
    D: tl.constexpr, F: tl.constexpr, P: tl.constexpr, SIZE: tl.constexpr,
    S: tl.constexpr, R: tl.constexpr, W: tl.constexpr, E: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Part of a block's row, and the sum of its squares."""
    entry, part = (tl.program_id(0) // PARTS).to(tl.int64), tl.program_id(0) % PARTS
    row = tl.load(row_ptr + entry)
    if row % slots == slots - 1:
        return
    SHARE: tl.constexpr = D // R
    PLAIN: tl.constexpr = 2 * SHARE + (D * D + E - 1) // E
    step = (tl.num_programs(0) // PARTS).to(tl.int64) * SIZE
    parts_ptr += entry * SIZE
    raw_ptr = rows_ptr + row * P
    out_ptr += entry * P
    squares_ptr += entry * PARTS + part
    if part < SHARE:
        square = _unfold(
            parts_ptr, splits, step, raw_ptr, out_ptr, part * R,
            at_qkv, at_gain_1, at_shift_1, at_qkv_bias, 3 * D, S, R, W,
        )  # fmt: skip
        tl.store(squares_ptr, square)
    elif part < 2 * SHARE:
        square = _unfold(
            parts_ptr, splits, step, raw_ptr, out_ptr, (part - SHARE) * R,
            at_in, at_gain_2, at_shift_2, at_in_bias, F, S, R, W,
        )  # fmt: skip
        tl.store(squares_ptr, square)
    else:
        # What was not folded: attention.out, and all from mlp.in_bias on.
        is_out = part < PLAIN
        begin = tl.where(is_out, at_out, at_in_bias)
        place = begin + (part - tl.where(is_out, 2 * SHARE, PLAIN)) * E + tl.arange(0, E)
        inside = place < tl.where(is_out, at_out + D * D, P)
        routes = (place < at_router) | (entry < inner)
        value = _total(parts_ptr, place, inside & routes, splits, step, S)
        tl.store(out_ptr + place, value, mask=inside)
        tl.store(squares_ptr, tl.sum(value * value, 0))


def count_steps(programs: int, tokens: int, room: int) -> int:
    """How many steps of a program's loop over its part of the tokens let all end soonest.

    Each number is compiled by itself, so few are in question: those of three binary digits.

    Args:
        programs: that there are without a split, all of one size.
        tokens: N.
        room: how many programs run at once.
    """
    whole = triton.cdiv(tokens, _BLOCK_TOKENS)
    least = min(whole, max(_LEAST_STEPS, triton.cdiv(whole, _MOST_SPLITS)))

    def rounds(steps: int) -> int:
        return triton.cdiv(programs * triton.cdiv(whole, steps), room) * (steps + _SUM_STEPS)

    coarse = (digits << zeros for zeros in range(whole.bit_length()) for digits in range(4, 8))
    choice = sorted({1, 2, 3, *coarse})
    last = next(steps for steps in choice if steps >= whole)
    return min((steps for steps in choice if least <= steps <= last), key=rounds)


def row_gradients(
    kept: Kept,
    factors: Factors,
    dy: Tensor,
    router: tuple[Tensor, Tensor] | None,
    rows: Tensor,
    row: Tensor,
    slots: int,
    inner: int,
    layout: Layout,
) -> tuple[Tensor, Tensor]:
    """Gradients of blocks' parameter rows, after `backward_inputs`.

    Args:
        kept: what the forward pass kept.
        factors: what `backward_inputs` wrote.
        dy: gradients of the blocks' outputs [M, N, d], contiguous.
        router: None for the `mean` router, else the normed outputs [M, N, d] and the gradients of
            the routing logits [M, N, K], contiguous.
        rows: float32: the arena's rows [L * S, P], contiguous.
        row: int64 [M]: which of them each block is.
        slots: S; the last slot of a lane is its scratch slot, and blocks there are skipped.
        inner: how many blocks, from the first on, may route to children; the gradients of the
            others' routers are zero.
        layout: of the rows.

    Returns:
        Gradients float32 [M, P], and the sum of squares of each, float32 [M]. Skipped blocks have
        anything for a gradient.
    """
    blocks, tokens, d = dy.shape
    f, total, width = kept.hidden.shape[-1], layout.total, min(d, 128)
    at = dict(zip(layout.names, layout.starts, strict=True))
    ranks = layout.shapes[layout.names.index("router.bias")][0]
    deep, wide = d // width, triton.cdiv(f, width)
    tiles = 4 * deep * deep + 2 * deep * wide
    if router is None:
        inner = 0
    normed, by_logits = router or (dy, dy)
    routing = deep * bool(inner)
    steps = count_steps(blocks * tiles + inner * routing, tokens, _ROOM[width])
    splits = triton.cdiv(tokens, steps * _BLOCK_TOKENS)
    # A row's parts lie as in the row; the bias that the folding adds to qkv comes behind them.
    at_qkv_bias = triton.cdiv(total, 16) * 16
    size = at_qkv_bias + 3 * d
    parts = torch.empty(splits, blocks, size, dtype=torch.float32, device=dy.device)
    _products[(blocks * (tiles + routing), splits)](
        kept.normed_1, factors.by_qkv, kept.attended, factors.by_middle, kept.normed_2,
        factors.by_hidden, factors.act, dy, normed, by_logits,
        row, parts, tokens, slots, inner,
        at["attention.qkv"], at_qkv_bias, at["attention.out"], at["mlp.in"], at["mlp.in_bias"],
        at["mlp.out"], at["mlp.out_bias"], at["router.weight"], at["router.bias"],
        D=d, F=f, RANKS=ranks, BLOCK_RANKS=max(_NARROWEST, triton.next_power_of_2(ranks)),
        SIZE=size, W=width, STEPS=steps, TILES=tiles + routing, BLOCK=_BLOCK_TOKENS,
        num_warps=width // 16, num_stages=3,
    )  # fmt: skip
    room = triton.next_power_of_2(splits)
    columns = 64 if d % 128 or f % 128 else 128
    share, chunk = min(max(1, 32 // room), 2048 // columns), 4096 // room
    programs = 2 * d // share + triton.cdiv(d * d, chunk)
    programs += triton.cdiv(total - at["mlp.in_bias"], chunk)
    by_row = torch.empty(blocks, total, dtype=torch.float32, device=dy.device)
    squares = torch.empty(blocks, programs, dtype=torch.float32, device=dy.device)
    _finish[(blocks * programs,)](
        parts, rows, row, by_row, squares, slots, inner, splits,
        at["norm1.weight"], at["norm1.bias"], at["attention.qkv"], at_qkv_bias,
        at["attention.out"], at["norm2.weight"], at["norm2.bias"], at["mlp.in"],
        at["mlp.in_bias"], at["router.weight"],
        D=d, F=f, P=total, SIZE=size, S=room, R=share, W=columns, E=chunk, PARTS=programs,
    )  # fmt: skip
    return by_row, squares.sum(1)
