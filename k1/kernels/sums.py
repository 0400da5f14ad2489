"""Sums over rows, in float32 and always in the same order."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

_TILE = {"C": 32, "R": 128}
"""Columns of a program, and rows that it adds at a time."""


@triton.jit
def _sum_rows(
    x_ptr, out_ptr, columns, size, out_lane,
    ROWS: tl.constexpr, C: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    lane, c = tl.program_id(1).to(tl.int64), tl.program_id(0) * C + tl.arange(0, C)
    x_ptr += lane * ROWS * columns
    total = tl.zeros((R, C), tl.float32)
    for first in range(0, ROWS, R):
        r = first + tl.arange(0, R)
        inside = (r < ROWS)[:, None] & (c < columns)[None, :]
        at = r.to(tl.int64)[:, None] * columns + c[None, :]
        total += tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + lane * out_lane + c, tl.sum(total, 0), mask=c < size)


def sum_rows(x: Tensor, out: Tensor) -> None:
    """Write the sums of x [L, R, C], contiguous, over its R rows.

    Args:
        x: float32 or bfloat16.
        out: float32 [L, at least C], each row contiguous; zeros go behind the C sums.
    """
    lanes, rows, columns = x.shape
    grid = triton.cdiv(out.shape[1], _TILE["C"]), lanes
    _sum_rows[grid](x, out, columns, out.shape[1], out.stride(0), ROWS=rows, **_TILE)
