"""Folding the norms' gains and shifts into the projections behind them: `k1.block.fold`.

One launch reads every number of a block that takes part once, and writes it once.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from k1.block import Folded, Layout

_WIDTH = 32
"""Columns of a projection that a program folds; `why_not` in `k1.kernels.block` asks for more."""


@triton.jit
def _scale(
    row, at_gain, at_shift, at_weight, at_bias, out_ptr, bias_ptr, tile,
    C: tl.constexpr, D: tl.constexpr, BIAS: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """Fold a norm into W columns of the weight [D, C] behind it, and into their biases."""
    d, c = tl.arange(0, D), tile * W + tl.arange(0, W)
    place = d[:, None] * C + c[None, :]
    weight = tl.load(row + at_weight + place)
    gain, shift = tl.load(row + at_gain + d), tl.load(row + at_shift + d)
    bias = tl.sum(weight * shift[:, None], 0)
    if BIAS:
        bias += tl.load(row + at_bias + c)
    tl.store(out_ptr + place, (weight * gain[:, None]).to(out_ptr.dtype.element_ty))
    tl.store(bias_ptr + c, bias.to(bias_ptr.dtype.element_ty))


@triton.jit
def _cast(source_ptr, out_ptr, first, SIZE: tl.constexpr):
    at = first + tl.arange(0, SIZE)
    tl.store(out_ptr + at, tl.load(source_ptr + at).to(out_ptr.dtype.element_ty))


@triton.jit
def _fold(
    rows_ptr, row_ptr, depth_ptr, row_units,
    at_gain_1, at_shift_1, at_qkv, at_out, at_gain_2, at_shift_2, at_in, at_in_bias,
    at_back, at_back_bias,
    qkv_ptr, qkv_bias_ptr, out_ptr, in_ptr, in_bias_ptr, back_ptr, back_bias_ptr,
    D: tl.constexpr, F: tl.constexpr, INDEXED: tl.constexpr, SPARSE: tl.constexpr,
    UNIT: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """D * W numbers of one block: columns of the folded projections, then of the others, flat."""
    QKV: tl.constexpr = 3 * D // W
    IN: tl.constexpr = F // W
    OUT: tl.constexpr = D // W
    program = tl.program_id(0)
    block = (program // (QKV + IN + OUT + IN)).to(tl.int64)
    tile = program % (QKV + IN + OUT + IN)
    own = tl.load(row_ptr + block) if INDEXED else block
    if SPARSE:  # noqa: SIM102 (without depths the inner one is not compiled)
        if tl.load(depth_ptr + own) == 0:
            return
    row = rows_ptr + own * row_units * UNIT
    if tile < QKV:
        _scale(
            row, at_gain_1, at_shift_1, at_qkv, 0,
            qkv_ptr + block * (3 * D * D), qkv_bias_ptr + block * (3 * D), tile, 3 * D, D, False, W,
        )  # fmt: skip
    elif tile < QKV + IN:
        _scale(
            row, at_gain_2, at_shift_2, at_in, at_in_bias,
            in_ptr + block * (D * F), in_bias_ptr + block * F, tile - QKV, F, D, True, W,
        )  # fmt: skip
    elif tile < QKV + IN + OUT:
        first = (tile - QKV - IN) * (D * W)
        _cast(row + at_out, out_ptr + block * (D * D), first, D * W)
    else:
        part = tile - QKV - IN - OUT
        _cast(row + at_back, back_ptr + block * (D * F), part * (D * W), D * W)
        if part == 0:
            _cast(row + at_back_bias, back_bias_ptr + block * D, 0, D)


def fold_fused(
    rows: Tensor,
    layout: Layout,
    dtype: torch.dtype,
    row: Tensor | None = None,
    depth: Tensor | None = None,
) -> Folded:
    """Fold blocks of a block layout.

    Args:
        rows: float32 [S, P], each row contiguous.
        layout: of the rows.
        dtype: of the result.
        row: int64 [M]: which of the rows to fold, in this order; all of them by default.
        depth: int64 [S]: 0 for rows that hold no block; these are passed over.

    Returns:
        The weights of M (or S) blocks, contiguous; anything where there is no block.
    """
    at = dict(zip(layout.names, layout.starts, strict=True))
    d, f = layout.shapes[layout.names.index("mlp.in")]
    blocks = len(rows if row is None else row)

    def room(*shape: int) -> Tensor:
        return torch.empty(blocks, *shape, dtype=dtype, device=rows.device)

    folded = Folded(room(d, 3 * d), room(3 * d), room(d, d), room(d, f), room(f), room(f, d),
                    room(d))  # fmt: skip
    # The compiler sees that rows begin at multiples of what it can load at once.
    unit = math.gcd(rows.stride(0), 4)
    _fold[(blocks * (4 * d + 2 * f) // _WIDTH,)](
        rows, rows if row is None else row, rows if depth is None else depth,
        rows.stride(0) // unit,
        at["norm1.weight"], at["norm1.bias"], at["attention.qkv"], at["attention.out"],
        at["norm2.weight"], at["norm2.bias"], at["mlp.in"], at["mlp.in_bias"], at["mlp.out"],
        at["mlp.out_bias"], *folded.tensors(),
        D=d, F=f, INDEXED=row is not None, SPARSE=depth is not None, UNIT=unit, W=_WIDTH,
    )  # fmt: skip
    return folded
