"""One transformer block backward, from the gradient of its output to that of its input.

Four launches: through the feed-forward's second projection and the gelu; through its first one,
the norm before that and attention's output projection; through attention; through attention's
input projections and their norm. What follows a matrix product is done to it in registers, with
values that were asked for before the product, so that one wait for memory serves both.

Shapes: R blocks, N tokens of each (whole sequences of T), d = embed, f = feed_forward.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from k1.block import Folded, fused_attention
from k1.kernels.block import Kept, dot, gelu_root

_DENSITY = tl.constexpr(0.3989422804014327)  # 1 / sqrt(2 pi)
_FALL = tl.constexpr(-0.7213475204444817)  # -log2(e) / 2


@triton.jit
def _open(first, tokens, M: tl.constexpr):
    """A program's rows: the block and the number of the first, and which of the M there are."""
    tiles = tl.cdiv(tokens, M)
    block = (first // tiles).to(tl.int64)
    start = first % tiles * M
    return block, block * tokens + start, start + tl.arange(0, M) < tokens


@triton.jit
def _padded(row_ptr, slots, block):
    """Whether a block is in its lane's scratch row: there is none, and nothing to do."""
    return tl.load(row_ptr + block) % slots == slots - 1


@triton.jit
def _multiply(
    a_ptr, b_ptr, inside, K: tl.constexpr, M: tl.constexpr, N: tl.constexpr, STEP: tl.constexpr
):
    """Multiply A [M, K], of which some rows are there, by the transpose of B [N, K]."""
    k = tl.arange(0, STEP)
    a_ptr += tl.arange(0, M)[:, None] * K + k[None, :]
    b_ptr += tl.arange(0, N)[:, None] * K + k[None, :]
    total = tl.zeros((M, N), tl.float32)
    for _ in range(0, K, STEP):
        a = tl.load(a_ptr, mask=inside[:, None], other=0.0)
        b = tl.load(b_ptr)
        total = tl.dot(a, tl.trans(b), total, input_precision="ieee")
        a_ptr += STEP
        b_ptr += STEP
    return total


@triton.jit
def _through_gelu(
    dy_ptr, weight_ptr, u_ptr, du_ptr, act_ptr, row_ptr, slots, tokens,
    D: tl.constexpr, F: tl.constexpr, M: tl.constexpr, C: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """M rows and C columns of a gelu's values, and of the gradient of what it was applied to.

    The gradient of the values is that of the output [N, D] times the transpose of the weights
    [F, D].
    """
    across: tl.constexpr = F // C
    column = tl.program_id(0) % across * C
    block, row, inside = _open(tl.program_id(0) // across, tokens, M)
    if _padded(row_ptr, slots, block):
        return
    here = row * F + column + tl.arange(0, M)[:, None] * F + tl.arange(0, C)[None, :]
    weight_ptr += (block * F + column) * D
    u = tl.load(u_ptr + here, mask=inside[:, None], other=0.0)
    grad = _multiply(dy_ptr + row * D, weight_ptr, inside, D, M, C, STEP)
    u = u.to(tl.float32)
    root = gelu_root(u)
    below = root * root
    grad *= below + u * _DENSITY * tl.exp2(u * u * _FALL)
    kind = du_ptr.dtype.element_ty
    tl.store(du_ptr + here, grad.to(kind), mask=inside[:, None])
    tl.store(act_ptr + here, (u * below).to(kind), mask=inside[:, None])


@triton.jit
def _through_norm(
    grad_ptr, weight_ptr, normed_ptr, inverse_ptr, beside_ptr, out_ptr, next_ptr, next_out_ptr,
    row_ptr, slots, tokens,
    K: tl.constexpr, D: tl.constexpr, M: tl.constexpr, STEP: tl.constexpr, NEXT: tl.constexpr,
):  # fmt: skip
    """M rows of the gradient of what a layer norm was applied to, with that of the residual.

    The gradient of the normed values is the product of one [N, K] and the transpose of the
    weights [D, K]. With NEXT, the result goes on through the transpose of one more projection's
    weights [D, D]; without, the last two pointers are not used.
    """
    block, row, inside = _open(tl.program_id(0), tokens, M)
    if _padded(row_ptr, slots, block):
        return
    m = tl.arange(0, M)
    here = row * D + m[:, None] * D + tl.arange(0, D)[None, :]
    normed = tl.load(normed_ptr + here, mask=inside[:, None], other=0.0)
    beside = tl.load(beside_ptr + here, mask=inside[:, None], other=0.0)
    inverse = tl.load(inverse_ptr + row + m, mask=inside, other=0.0)
    grad = _multiply(grad_ptr + row * K, weight_ptr + block * D * K, inside, K, M, D, STEP)
    normed = normed.to(tl.float32)
    along = tl.sum(grad * normed, 1) / D
    grad = grad - (tl.sum(grad, 1) / D)[:, None] - normed * along[:, None]
    out = (beside.to(tl.float32) + inverse[:, None] * grad).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + here, out, mask=inside[:, None])
    if NEXT:
        c, d = tl.arange(0, STEP), tl.arange(0, D)
        next_ptr += block * D * D + c[:, None] * D + d[None, :]
        next_out_ptr += row * D + m[:, None] * D + c[None, :]
        for column in range(0, D, STEP):
            weights = tl.load(next_ptr + column * D)
            onward = dot(out, tl.trans(weights)).to(out.dtype)
            tl.store(next_out_ptr + column, onward, mask=inside[:, None])


@triton.jit
def _attention_backward(
    qkv_ptr, o_ptr, do_ptr, dqkv_ptr, row_ptr, slots, sequences, scale,
    T: tl.constexpr, D: tl.constexpr, HD: tl.constexpr,
):  # fmt: skip
    """One head of one sequence."""
    if _padded(row_ptr, slots, tl.program_id(0) // sequences):
        return
    t, hd = tl.arange(0, T), tl.program_id(1) * HD + tl.arange(0, HD)
    row = tl.program_id(0).to(tl.int64) * T + t
    wide = row[:, None] * (3 * D) + hd[None, :]
    narrow = row[:, None] * D + hd[None, :]
    q, k = tl.load(qkv_ptr + wide), tl.load(qkv_ptr + wide + D)
    v, do = tl.load(qkv_ptr + wide + 2 * D), tl.load(do_ptr + narrow)
    o = tl.load(o_ptr + narrow)
    score = tl.where(t[None, :] <= t[:, None], dot(q, tl.trans(k)) * scale, -1e30)
    power = tl.exp(score - tl.max(score, 1)[:, None])
    power = power / tl.sum(power, 1)[:, None]
    along = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
    dv = dot(tl.trans(power.to(v.dtype)), do)
    dscore = power * (dot(do, tl.trans(v)) - along[:, None]) * scale
    dscore = dscore.to(q.dtype)
    tl.store(dqkv_ptr + wide, dot(dscore, k).to(q.dtype))
    tl.store(dqkv_ptr + wide + D, dot(tl.trans(dscore), q).to(q.dtype))
    tl.store(dqkv_ptr + wide + 2 * D, dv.to(q.dtype))


_LONGEST_ATTENTION = 128
"""The kernel for the attention gradient holds a sequence's scores on the chip; PyTorch's, which
runs for longer ones, does not."""
_GELU_TILE = (128, 64)
"""Rows and columns of a program that ends with a gelu: two run at once."""
_NORM_ROWS = 64
"""Rows of a program that ends with a norm, for which it has whole rows: up to d 128, two or more
run at once."""
_STEP = 64
"""Of a product's inner dimension, in one step of a program's loop."""


@dataclass(frozen=True)
class Factors:
    """What R blocks' weight gradients are products of, beside what was kept."""

    by_qkv: Tensor
    """[R, N, 3 * d]: gradient of the projections."""
    by_middle: Tensor
    """[R, N, d]: gradient between attention and feed-forward."""
    by_hidden: Tensor
    """[R, N, f]: gradient before the gelu."""
    act: Tensor
    """[R, N, f]: the gelu's values."""

    @staticmethod
    def empty(kept: Kept) -> Factors:
        """Make room for the blocks of `kept`."""
        return Factors(*map(torch.empty_like, (kept.qkv, kept.attended, kept.hidden, kept.hidden)))

    def rows(self, start: int, stop: int) -> Factors:
        """View some of the blocks."""
        return Factors(*[t[start:stop] for t in vars(self).values()])


def backward_inputs(
    folded: Folded,
    kept: Kept,
    dy: Tensor,
    factors: Factors,
    dx: Tensor,
    time: int,
    heads: int,
    where: tuple[Tensor, int],
) -> None:
    """Write the gradients of R blocks' inputs, given those of their outputs.

    Args:
        folded: the weights of these blocks, contiguous (the biases are not used).
        kept: what the forward pass kept.
        dy: [R, N, d], contiguous.
        factors: written: what `k1.kernels.weights` needs.
        dx: [R, N, d], contiguous; written.
        time: T.
        heads: attention heads.
        where: int64 [R], in which row of the arena each block is, and how many rows a lane has;
            the last one of a lane is no block, and nothing is written for it.
    """
    (blocks, tokens, d), f = dy.shape, folded.mlp_in.shape[-1]
    rows, columns = _GELU_TILE
    _through_gelu[(blocks * triton.cdiv(tokens, rows) * (f // columns),)](
        dy, folded.mlp_out, kept.hidden, factors.by_hidden, factors.act, *where, tokens,
        D=d, F=f, M=rows, C=columns, STEP=_STEP, num_warps=8, num_stages=3,
    )  # fmt: skip
    grid = (blocks * triton.cdiv(tokens, _NORM_ROWS),)
    sizes = {"D": d, "M": _NORM_ROWS, "STEP": _STEP}
    sizes |= {"num_warps": 4 if d == 64 else 8, "num_stages": 3}
    do = torch.empty_like(dy)
    _through_norm[grid](
        factors.by_hidden, folded.mlp_in, kept.normed_2, kept.inverse_2, dy, factors.by_middle,
        folded.out, do, *where, tokens, K=f, NEXT=True, **sizes,
    )  # fmt: skip
    if time <= _LONGEST_ATTENTION:
        _attention_backward[(blocks * tokens // time, heads)](
            kept.qkv, kept.attended, do, factors.by_qkv, *where, tokens // time,
            (d // heads) ** -0.5,
            T=time, D=d, HD=d // heads, num_warps=4 if time <= 64 else 8,
        )  # fmt: skip
    else:
        qkv = kept.qkv.view(-1, time, 3 * d).detach().requires_grad_()
        with torch.enable_grad():
            attended = fused_attention(qkv, heads)
        (grad,) = torch.autograd.grad(attended, qkv, do.view(-1, time, d))
        factors.by_qkv.copy_(grad.view_as(factors.by_qkv))
    _through_norm[grid](
        factors.by_qkv, folded.qkv, kept.normed_1, kept.inverse_1, factors.by_middle, dx,
        folded.out, do, *where, tokens, K=3 * d, NEXT=False, **sizes,
    )  # fmt: skip
