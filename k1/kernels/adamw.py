"""AdamW on chosen rows, in place: `k1.optimizer.adamw` without gathering and scattering the rows.

Two launches. The first, one program per row, raises the step counts and works out the bias
corrections; the second, one program per block of a row, moves the numbers. Rows that are off are
neither read nor written.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from k1.config import OptimizerConfig

_BLOCK = 1024


@triton.jit
def _count_steps(
    count,
    slots,
    on,
    corrections,
    BETA1: tl.constexpr,
    BETA2: tl.constexpr,
):
    row = tl.program_id(0)
    active = tl.load(on + row) != 0
    count += tl.load(slots + row)
    steps = tl.load(count, mask=active, other=0) + 1
    tl.store(count, steps, mask=active)

    # Powers by squaring, in float64: in float32 they would be off by a millionth for small counts.
    power1 = tl.full((), 1.0, tl.float64)
    power2 = tl.full((), 1.0, tl.float64)
    base1 = tl.full((), BETA1, tl.float64)
    base2 = tl.full((), BETA2, tl.float64)
    for _ in range(0, 32):
        odd = (steps & 1) == 1
        power1 = tl.where(odd, power1 * base1, power1)
        power2 = tl.where(odd, power2 * base2, power2)
        base1 = base1 * base1
        base2 = base2 * base2
        steps = steps >> 1
    tl.store(corrections + 2 * row, (1.0 - power1).to(tl.float32))
    tl.store(corrections + 2 * row + 1, (1.0 - power2).to(tl.float32))


@triton.jit
def _move_rows(
    weight,
    first,
    second,
    slots,
    grad,
    rate,
    on,
    factor,
    corrections,
    size,
    parts,
    slot_stride,
    grad_stride,
    BETA1: tl.constexpr,
    BETA2: tl.constexpr,
    EPS: tl.constexpr,
    DECAY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0) // parts
    at = tl.program_id(0) % parts * BLOCK + tl.arange(0, BLOCK)
    mask = (at < size) & (tl.load(on + row) != 0)
    here = tl.load(slots + row) * slot_stride + at
    there = row.to(tl.int64) * grad_stride + at

    g = tl.load(grad + there, mask=mask, other=0.0).to(tl.float32) * tl.load(factor + row)
    w = tl.load(weight + here, mask=mask, other=0.0)
    m = tl.load(first + here, mask=mask, other=0.0)
    v = tl.load(second + here, mask=mask, other=0.0)
    speed = tl.load(rate + row)

    # From the nearer end, as torch interpolates: a beta of 0 then gives the gradient itself.
    m = m + (1.0 - BETA1) * (g - m) if BETA1 > 0.5 else g - BETA1 * (g - m)
    v = v * BETA2 + g * g * (1.0 - BETA2)
    step = tl.div_rn(m, tl.load(corrections + 2 * row))
    root = tl.sqrt_rn(tl.div_rn(v, tl.load(corrections + 2 * row + 1)))
    step = tl.div_rn(step, root + EPS)
    w = w * (1.0 - speed * DECAY) - speed * step

    tl.store(weight + here, w, mask=mask)
    tl.store(first + here, m, mask=mask)
    tl.store(second + here, v, mask=mask)


def adamw_rows(
    weight: Tensor,
    first: Tensor,
    second: Tensor,
    count: Tensor,
    row: Tensor,
    grad: Tensor,
    rate: Tensor,
    on: Tensor,
    factor: Tensor,
    config: OptimizerConfig,
) -> None:
    """Make one AdamW step, in place, of the rows that are on; others stay bit for bit.

    Args:
        weight: float32 [S, P], each row contiguous; strided as the moments are.
        first: first moments, like `weight`.
        second: second moments, like `weight`.
        count: int64 [S]: steps that each row has made.
        row: int64 [M]: which rows; those that are on differ from each other.
        grad: float32 or bfloat16 [M, P], each row contiguous.
        rate: float32 [M]: learning rate of each row, displacement scale included.
        on: bool [M].
        factor: float32 [M]: what each gradient is multiplied by.
        config: the decay rates and the weight decay.
    """
    rows, size = grad.shape
    if not weight.stride() == first.stride() == second.stride():
        raise ValueError("weight, first and second are not strided alike")
    if not weight.stride(1) == grad.stride(1) == count.stride(0) == 1:
        raise ValueError("rows and counts must be contiguous")
    row, rate, on, factor = (t.contiguous() for t in (row, rate, on, factor))
    corrections = torch.empty(rows, 2, dtype=torch.float32, device=weight.device)
    betas = {"BETA1": config.beta1, "BETA2": config.beta2}
    _count_steps[(rows,)](count, row, on, corrections, **betas, num_warps=1)
    parts = triton.cdiv(size, _BLOCK)
    _move_rows[(rows * parts,)](
        weight, first, second, row, grad, rate, on, factor, corrections,
        size, parts, weight.stride(0), grad.stride(0),
        **betas, EPS=config.eps, DECAY=config.weight_decay, BLOCK=_BLOCK, num_warps=4,
    )  # fmt: skip
