"""Folding the norms' gains and shifts into the projections behind them: `k1.block.fold`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from k1.block import Folded, Layout

_COLUMNS = 64


@triton.jit
def _fold(
    rows_ptr, row_size, at_gain, at_shift, at_weight, at_bias, out_ptr, bias_ptr,
    C: tl.constexpr, D: tl.constexpr, BIAS: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0).to(tl.int64)
    row = rows_ptr + block * row_size
    d, c = tl.arange(0, D), tl.program_id(1) * W + tl.arange(0, W)
    inside = c < C
    place = d[:, None] * C + c[None, :]
    weight = tl.load(row + at_weight + place, mask=inside[None, :], other=0.0)
    gain, shift = tl.load(row + at_gain + d), tl.load(row + at_shift + d)
    bias = tl.sum(weight * shift[:, None], 0)
    if BIAS:
        bias += tl.load(row + at_bias + c, mask=inside, other=0.0)
    folded = (weight * gain[:, None]).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + block * D * C + place, folded, mask=inside[None, :])
    tl.store(bias_ptr + block * C + c, bias.to(bias_ptr.dtype.element_ty), mask=inside)


def fold_fused(rows: Tensor, layout: Layout, dtype: torch.dtype) -> Folded:
    """Fold blocks given as rows [blocks, P], each contiguous, of a block layout."""
    blocks = len(rows)
    at = dict(zip(layout.names, layout.starts, strict=True))
    shape = dict(zip(layout.names, layout.shapes, strict=True))

    def normed(norm: str, name: str, bias: str | None) -> tuple[Tensor, Tensor]:
        d, columns = shape[name]
        out = torch.empty(blocks, d, columns, dtype=dtype, device=rows.device)
        out_bias = torch.empty(blocks, columns, dtype=dtype, device=rows.device)
        _fold[(blocks, triton.cdiv(columns, _COLUMNS))](
            rows, rows.stride(0), at[f"{norm}.weight"], at[f"{norm}.bias"], at[name],
            at[bias] if bias else 0, out, out_bias,
            C=columns, D=d, BIAS=bias is not None, W=_COLUMNS,
        )  # fmt: skip
        return out, out_bias

    def cast(name: str) -> Tensor:
        size = layout.sizes[layout.names.index(name)]
        piece = rows[:, at[name] : at[name] + size].to(dtype, memory_format=torch.contiguous_format)
        return piece.contiguous().view(blocks, *shape[name])

    qkv, qkv_bias = normed("norm1", "attention.qkv", None)
    mlp_in, in_bias = normed("norm2", "mlp.in", "mlp.in_bias")
    return Folded(
        qkv, qkv_bias, cast("attention.out"), mlp_in, in_bias, cast("mlp.out"), cast("mlp.out_bias")
    )
