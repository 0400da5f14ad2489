"""One transformer block per program group: whole sequences stay on the chip.

A program holds `rows` consecutive tokens (one sequence, several short ones, or a part of a long
one) of one block and takes them through norm, attention, feed-forward and residuals without
writing anything between. The weights come from the L2 cache, in which the programs of one block
find them. With gradients the kernel keeps what the backward pass (`k1.kernels.backward`) needs.

Shapes: S blocks, N tokens of each (whole sequences of T), d = embed, f = feed_forward.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from k1.block import Folded

_EPS = tl.constexpr(1e-5)


@triton.jit
def _normed(x, D: tl.constexpr):
    """Layer norm without gain: the normed rows [M, D] and 1 / standard deviation [M]."""
    centred = x - (tl.sum(x, 1) / D)[:, None]
    inverse = tl.rsqrt(tl.sum(centred * centred, 1) / D + _EPS)
    return centred * inverse[:, None], inverse


@triton.jit
def gelu_root(x):
    """Root of the normal distribution function, of which x times the square is a gelu, to 5e-6.

    The function is 1 / (1 + 2^p(x)) with an odd polynomial p, fitted to it: this takes a third of
    the instructions of `tl.erf`, which would be the larger part of a block's.
    """
    square = x * x
    power = -3.2289928e-06 * square + 8.8238116e-05
    power = power * square + 0.00036027447
    power = power * square - 0.10522669
    power = power * square - 2.3020454
    return tl.rsqrt(1.0 + tl.exp2(power * x))


@triton.jit
def _gelu(x):
    root = gelu_root(x)
    return x * root * root


@triton.jit
def dot(a, b):
    """Multiply; float32 without rounding to TF32."""
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def _tile(weights, row, column, width: tl.constexpr, R: tl.constexpr, C: tl.constexpr):
    """R x C numbers of weights [rows, width]: a tensor descriptor, or a pointer."""
    if isinstance(weights, tl.tensor):
        at = (row + tl.arange(0, R)).to(tl.int64)[:, None] * width
        tile = tl.load(weights + at + (column + tl.arange(0, C))[None, :])
    else:
        tile = weights.load([row, column])
    return tile


@triton.jit
def _project(h, weights, first, bias, column, D: tl.constexpr, W: tl.constexpr):
    """Multiply h [M, D] by W columns of weights [D, 3 * D] from `column` on; add the bias."""
    tile = _tile(weights, first, column, 3 * D, D, W)
    shift = tl.load(bias + column + tl.arange(0, W))
    return (dot(h, tile) + shift[None, :].to(tl.float32)).to(h.dtype)


@triton.jit
def _forward(
    x_ptr, source_ptr, weight_ptr, keep_ptr, target_ptr, y_ptr,
    qkv, qkv_bias_ptr, out, mlp_in, in_bias_ptr, mlp_out, back_bias_ptr,
    n1_ptr, inverse_1_ptr, kept_ptr, o_ptr, n2_ptr, inverse_2_ptr, u_ptr,
    N, scale,
    T: tl.constexpr, D: tl.constexpr, H: tl.constexpr, F: tl.constexpr,
    M: tl.constexpr, C: tl.constexpr, AT_ONCE: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    pieces = tl.cdiv(N, M)
    block = (tl.program_id(0) // pieces).to(tl.int64)
    source = tl.load(source_ptr + block)
    first = tl.program_id(0) % pieces * M
    row, d = first + tl.arange(0, M), tl.arange(0, D)
    inside = (row < N)[:, None]
    here = row[:, None] * D + d[None, :]
    target = block if target_ptr is None else tl.load(target_ptr + block)
    own = target * N * D + here
    if source < 0:
        nothing = tl.zeros((M, D), y_ptr.dtype.element_ty)
        tl.store(y_ptr + own, nothing, mask=inside & (target >= 0))
        return
    x_base = x_ptr + source * N * D
    weight = tl.load(weight_ptr + block)
    qkv_bias_ptr += weight * 3 * D
    in_bias_ptr += weight * F
    back_bias_ptr += weight * D
    at, at_hidden = (weight * D).to(tl.int32), (weight * F).to(tl.int32)
    kind = qkv_bias_ptr.dtype.element_ty
    HD: tl.constexpr = D // H
    keep = tl.load(keep_ptr + weight) if KEEP else -1
    place = keep * N + row
    x = tl.load(x_base + here, mask=inside, other=0.0).to(tl.float32)
    normed, inverse = _normed(x, D)
    h = normed.to(kind)
    if KEEP and keep >= 0:
        tl.store(n1_ptr + place[:, None] * D + d[None, :], h, mask=inside)
        tl.store(inverse_1_ptr + place, inverse, mask=row < N)
    if AT_ONCE:
        # All heads at once: one product per projection, one batched product per attention step.
        if D < 128:
            # Triton 3.6 compiles the loop below, for narrow blocks alone, to wrong results.
            q = _project(h, qkv, at, qkv_bias_ptr, 0, D, D)
            k = _project(h, qkv, at, qkv_bias_ptr, D, D, D)
            v = _project(h, qkv, at, qkv_bias_ptr, 2 * D, D, D)
        else:
            # The loop ends with all three; written without one they take more registers.
            q, k = tl.zeros((M, D), kind), tl.zeros((M, D), kind)
            v = q
            for column in range(0, 3 * D, D):
                q = k
                k = v
                v = _project(h, qkv, at, qkv_bias_ptr, column, D, D)
        if KEEP and keep >= 0:
            wide = place[:, None] * (3 * D) + d[None, :]
            tl.store(kept_ptr + wide, q, mask=inside)
            tl.store(kept_ptr + wide + D, k, mask=inside)
            tl.store(kept_ptr + wide + 2 * D, v, mask=inside)
        q = tl.permute(tl.reshape(q, (M, H, HD)), (1, 0, 2))
        k = tl.permute(tl.reshape(k, (M, H, HD)), (1, 2, 0))
        v = tl.permute(tl.reshape(v, (M, H, HD)), (1, 0, 2))
        seen = (row[:, None] // T == row[None, :] // T) & (row[None, :] <= row[:, None])
        score = tl.where(seen[None], dot(q, k), -1e30)
        power = tl.exp2(score * scale - (tl.max(score, 2) * scale)[:, :, None])
        o = dot(power.to(kind), v) / tl.sum(power, 2)[:, :, None]
        o = tl.reshape(tl.permute(o, (1, 0, 2)), (M, D)).to(kind)
        if KEEP and keep >= 0:
            tl.store(o_ptr + place[:, None] * D + d[None, :], o, mask=inside)
        x += dot(o, _tile(out, at, 0, D, D, D))
    else:
        # Head by head, and in a long sequence earlier rows are normed and projected again, a chunk
        # at a time.
        LONG: tl.constexpr = T if T > M else M
        hd = tl.arange(0, HD)
        for i in tl.static_range(H):
            q = _project(h, qkv, at, qkv_bias_ptr, i * HD, D, HD)
            if KEEP and keep >= 0:
                tl.store(kept_ptr + place[:, None] * (3 * D) + i * HD + hd[None, :], q, mask=inside)
            o = tl.zeros((M, HD), tl.float32)
            most = tl.full((M,), -1e30, tl.float32)
            total = tl.zeros((M,), tl.float32)
            for chunk in range(LONG // M):
                base = first // LONG * LONG + chunk * M
                if base <= first:
                    key = base + tl.arange(0, M)
                    earlier = x_base + key[:, None] * D + d[None, :]
                    past = tl.load(earlier, mask=(key < N)[:, None], other=0.0).to(tl.float32)
                    past, _ = _normed(past, D)
                    past = past.to(kind)
                    k = _project(past, qkv, at, qkv_bias_ptr, D + i * HD, D, HD)
                    v = _project(past, qkv, at, qkv_bias_ptr, 2 * D + i * HD, D, HD)
                    if KEEP and keep >= 0:
                        wide = (keep * N + key)[:, None] * (3 * D) + i * HD + hd[None, :]
                        mine = ((key >= first) & (key < N))[:, None]
                        tl.store(kept_ptr + wide + D, k, mask=mine)
                        tl.store(kept_ptr + wide + 2 * D, v, mask=mine)
                    score = dot(q, tl.trans(k)) * scale
                    seen = (row[:, None] // T == key[None, :] // T) & (key[None, :] <= row[:, None])
                    score = tl.where(seen, score, -1e30)
                    larger = tl.maximum(most, tl.max(score, 1))
                    power = tl.exp2(score - larger[:, None])
                    shrink = tl.exp2(most - larger)
                    total = total * shrink + tl.sum(power, 1)
                    o = o * shrink[:, None] + dot(power.to(kind), v)
                    most = larger
            o = (o / total[:, None]).to(kind)
            if KEEP and keep >= 0:
                tl.store(o_ptr + place[:, None] * D + i * HD + hd[None, :], o, mask=inside)
            x += dot(o, _tile(out, at + i * HD, 0, D, HD, D))
    normed, inverse = _normed(x, D)
    h = normed.to(kind)
    if KEEP and keep >= 0:
        tl.store(n2_ptr + place[:, None] * D + d[None, :], h, mask=inside)
        tl.store(inverse_2_ptr + place, inverse, mask=row < N)
    x += tl.load(back_bias_ptr + d)[None, :].to(tl.float32)
    for column in range(0, F, C):
        c = column + tl.arange(0, C)
        u = dot(h, _tile(mlp_in, at, column, F, D, C))
        u += tl.load(in_bias_ptr + c)[None, :].to(tl.float32)
        if KEEP and keep >= 0:
            tl.store(u_ptr + place[:, None] * F + c[None, :], u.to(kind), mask=inside)
        x += dot(_gelu(u).to(kind), _tile(mlp_out, at_hidden + column, 0, D, C, D))
    tl.store(y_ptr + own, x.to(y_ptr.dtype.element_ty), mask=inside & (target >= 0))


_ROWS = 64
"""Tokens that a program of the forward kernel holds. Twice as many are no faster, and some such
variants were compiled to wrong results (Triton 3.6, H200)."""
_COLUMNS = 64
"""Hidden values of the feed-forward that it holds at once."""
_WIDEST = 128
"""Widest block whose heads' weights all fit on the chip."""


def why_not(embed: int, feed_forward: int, heads: int, time: int) -> str | None:
    """Say why the kernels do not fit these sizes, or None if they do."""
    if embed not in (64, 128, 256):
        return f"embed {embed} is not 64, 128 or 256"
    if embed // heads not in (16, 32, 64, 128):
        return f"heads are {embed // heads} wide, not 16, 32, 64 or 128"
    if feed_forward % 64:
        return f"feed_forward {feed_forward} is no multiple of 64"
    if time not in (16, 32, 64, 128, 256):
        return f"windows of {time} tokens are not 16, 32, 64, 128 or 256 long"
    return None


def _tiles(weights: Tensor, rows: int, columns: int) -> TensorDescriptor | Tensor:
    """Blocks' weights as the hardware's copy engine fetches them: a tile with one instruction.

    Not those of narrow blocks: Triton 3.6 compiled them to wrong results.
    """
    if max(rows, columns) < _WIDEST:
        return weights
    return TensorDescriptor.from_tensor(weights.flatten(0, 1), [rows, columns])


@dataclass(frozen=True)
class Kept:
    """What the backward pass of R blocks needs of their forward pass."""

    normed_1: Tensor
    """[R, N, d]: input of the attention projections."""
    inverse_1: Tensor
    """float32 [R, N]: 1 / standard deviation of the first norm."""
    qkv: Tensor
    """[R, N, 3 * d]."""
    attended: Tensor
    """[R, N, d]."""
    normed_2: Tensor
    """[R, N, d]."""
    inverse_2: Tensor
    """float32 [R, N]."""
    hidden: Tensor
    """[R, N, f]: before the gelu."""

    @staticmethod
    def empty(blocks: int, tokens: int, d: int, f: int, like: Tensor) -> Kept:
        """Make room for R blocks; `like` gives dtype and device."""

        def room(*shape: int, dtype: torch.dtype = like.dtype) -> Tensor:
            return torch.empty(blocks, tokens, *shape, dtype=dtype, device=like.device)

        single = torch.float32
        first = room(d), room(dtype=single), room(3 * d), room(d)
        return Kept(*first, room(d), room(dtype=single), room(f))

    def rows(self, start: int, stop: int) -> Kept:
        """View some of the blocks."""
        return Kept(*[t[start:stop] for t in vars(self).values()])


def run_blocks(
    folded: Folded,
    x: Tensor,
    source: Tensor,
    weight: Tensor,
    time: int,
    heads: int,
    kept: Kept | None = None,
    keep: Tensor | None = None,
    out: Tensor | None = None,
    target: Tensor | None = None,
) -> Tensor:
    """Run S blocks, each on the input and with the weights that it names.

    Args:
        folded: weights of any number of blocks, contiguous.
        x: inputs [P, N, d], contiguous.
        source: int64 [S]: which input each block reads; -1 for a dead one, which gives zeros.
        weight: int64 [S]: which weights each block has.
        time: T.
        heads: attention heads.
        kept: room for the values that a backward pass needs.
        keep: int64, one for each of the weights: where in `kept` the values of a block with these
            weights go; -1 for nowhere.
        out: where results go instead of a new tensor.
        target: int64 [S]: which row of `out` each block writes, by default its own; -1 for none.

    Returns:
        [S, N, d] in the dtype of x, or `out`.
    """
    blocks, (_, tokens, d) = len(source), x.shape
    if out is None:
        out = torch.empty(blocks, tokens, d, dtype=x.dtype, device=x.device)
    at_once = time <= _ROWS and d <= _WIDEST
    width = d if at_once else d // heads
    _forward[(triton.cdiv(tokens, _ROWS) * blocks,)](
        x, source, weight, source if keep is None else keep, target, out,
        _tiles(folded.qkv, d, width), folded.qkv_bias, _tiles(folded.out, width, d),
        _tiles(folded.mlp_in, d, _COLUMNS), folded.mlp_in_bias,
        _tiles(folded.mlp_out, _COLUMNS, d), folded.mlp_out_bias,
        *([out] * 7 if kept is None else vars(kept).values()),
        tokens, math.log2(math.e) * (d // heads) ** -0.5,
        T=time, D=d, H=heads, F=folded.mlp_in.shape[-1], M=_ROWS, C=_COLUMNS, AT_ONCE=at_once,
        KEEP=kept is not None, num_warps=4, num_stages=2,
    )  # fmt: skip
    return out
