"""Embedding of tokens with their positions, and the gradient of the table of embeddings.

The gradient of a token's row is a sum over the places where it occurs. These are brought together
by a stable sort, which depends on the batch alone and so can run long before the gradient is
there; then every row of the table is written once, by one program, in an order that never varies.

Shapes: L lanes, B windows, T tokens of a window, N = B * T, V = vocabulary, d = embed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

_ROWS = 16
_LATER = tl.constexpr(2**31 - 1)


@triton.jit
def _embed(
    token_ptr, table_ptr, position_ptr, out_ptr, N, token_lane, token_window, token_time,
    shared_lane, T: tl.constexpr, D: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    lane, n = tl.program_id(1).to(tl.int64), tl.program_id(0) * R + tl.arange(0, R)
    d, inside = tl.arange(0, D)[None, :], n < N
    time = n % T
    token = tl.load(
        token_ptr + lane * token_lane + n // T * token_window + time * token_time,
        mask=inside, other=0,
    )  # fmt: skip
    x = tl.load(table_ptr + lane * shared_lane + token[:, None] * D + d)
    x += tl.load(position_ptr + lane * shared_lane + time[:, None] * D + d)
    at = (lane * N + n)[:, None] * D + d
    tl.store(out_ptr + at, x.to(out_ptr.dtype.element_ty), mask=inside[:, None])


def embed_tokens(table: Tensor, position: Tensor, inputs: Tensor, out: Tensor) -> None:
    """Write `table[token] + position`, added in float32 and rounded once.

    Args:
        table: float32 [L, V, d], a view of shared rows.
        position: float32 [L, at least T, d], a view of the same rows.
        inputs: int64 [L, B, T], from 0 to V - 1.
        out: [L, N, d], contiguous; written.
    """
    lanes, windows, time = inputs.shape
    tokens = windows * time
    _embed[(triton.cdiv(tokens, _ROWS), lanes)](
        inputs, table, position, out, tokens, *inputs.stride(), table.stride(0),
        T=time, D=table.shape[2], R=_ROWS,
    )  # fmt: skip


@dataclass(frozen=True)
class TokenOrder:
    """The tokens of a batch, sorted by lane and id; equal ones in the order of the batch."""

    key: Tensor
    """int32 [L * N]: lane * V + id."""
    place: Tensor
    """int64 [L * N]: where each stands in the flattened batch."""
    start: Tensor
    """int32 [L * groups + 1]: where each group of ids begins, lane by lane, and the end."""
    ids: int
    """Ids of a group. The last group of a lane may have fewer."""


@triton.jit
def _find_starts(
    key_ptr, start_ptr, size, vocab, groups, count,
    IDS: tl.constexpr, STEPS: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """Count the keys below each group's first, by bisection."""
    group = tl.program_id(0) * W + tl.arange(0, W)
    first = group // groups * vocab + group % groups * IDS
    below = tl.zeros((W,), tl.int32)
    for step in tl.static_range(STEPS):
        more = below + (1 << (STEPS - 1 - step))
        key = tl.load(key_ptr + more - 1, mask=more <= size, other=_LATER)
        below = tl.where(key < first, more, below)
    tl.store(start_ptr + group, below, mask=group < count)


def order_tokens(inputs: Tensor, vocab: int) -> TokenOrder:
    """Sort the tokens int64 [L, B, T] of lanes with less than 2^31 embeddings in all."""
    lanes = len(inputs)
    lane = torch.arange(lanes, device=inputs.device).view(-1, 1, 1)
    unsorted = torch.add(inputs, lane, alpha=vocab).to(torch.int32)
    key, place = torch.sort(unsorted.flatten(), stable=True)
    # A small vocabulary has frequent tokens, which should not meet in one program. A product has 16
    # rows in any case. What order sums have must not depend on the number of lanes.
    ids = min(16, triton.next_power_of_2(max(1, vocab // 64)))
    groups = triton.cdiv(vocab, ids)
    start = torch.empty(lanes * groups + 1, dtype=torch.int32, device=inputs.device)
    _find_starts[(triton.cdiv(len(start), 256),)](
        key, start, len(key), vocab, groups, len(start),
        IDS=ids, STEPS=len(key).bit_length(), W=256,
    )  # fmt: skip
    return TokenOrder(key, place, start, ids)


@triton.jit
def _take(grad_ptr, key_ptr, place_ptr, at, end, D: tl.constexpr, R: tl.constexpr):
    """Keys and gradients of the next R tokens; -1 and zeros behind the end."""
    here = at + tl.arange(0, R)
    inside = here < end
    key = tl.load(key_ptr + here, mask=inside, other=-1)
    place = tl.load(place_ptr + here, mask=inside, other=0)
    tile = grad_ptr + place[:, None] * D + tl.arange(0, D)[None, :]
    return key, tl.load(tile, mask=inside[:, None], other=0.0)


@triton.jit
def _by_token(
    grad_ptr, key_ptr, place_ptr, start_ptr, out_ptr, vocab, out_lane,
    D: tl.constexpr, IDS: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """The rows of one group of ids: a product of which tokens they are with the gradients."""
    lane, group = tl.program_id(1), tl.program_id(0)
    begin = start_ptr + lane * tl.num_programs(0) + group
    at, end = tl.load(begin), tl.load(begin + 1)
    i, d = tl.arange(0, 16), tl.arange(0, D)
    token = group * IDS + i
    wanted = lane * vocab + token
    total = tl.zeros((16, D), tl.float32)
    key, tile = _take(grad_ptr, key_ptr, place_ptr, at, end, D, R)
    while at < end:
        # The next are on their way while these are added.
        at += R
        next_key, next_tile = _take(grad_ptr, key_ptr, place_ptr, at, end, D, R)
        is_it = (wanted[:, None] == key[None, :]).to(tile.dtype)
        total = tl.dot(is_it, tile, total, input_precision="ieee")
        key, tile = next_key, next_tile
    out_ptr += lane.to(tl.int64) * out_lane
    own = (i < IDS) & (token < vocab)
    tl.store(out_ptr + token[:, None] * D + d[None, :], total, mask=own[:, None])


def embedding_gradient(order: TokenOrder, grad: Tensor, out: Tensor) -> None:
    """Write the gradient of the whole table; zeros where a token does not occur.

    Args:
        order: of the batch.
        grad: gradients of the embedded tokens [L, N, d], contiguous.
        out: float32 [L, V, d], each lane contiguous.
    """
    lanes, vocab, d = out.shape
    _by_token[(triton.cdiv(vocab, order.ids), lanes)](
        grad, order.key, order.place, order.start, out, vocab, out.stride(0),
        D=d, IDS=order.ids, R=64, num_warps=4,
    )  # fmt: skip
