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
    rows,
    count_lane,
    BETA1: tl.constexpr,
    BETA2: tl.constexpr,
):
    row = tl.program_id(0)
    active = tl.load(on + row) != 0
    count += (row // rows).to(tl.int64) * count_lane + tl.load(slots + row)
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
    rows,
    size,
    lane_stride,
    slot_stride,
    grad_lane_stride,
    grad_row_stride,
    BETA1: tl.constexpr,
    BETA2: tl.constexpr,
    EPS: tl.constexpr,
    DECAY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0)
    lane = (row // rows).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = (at < size) & (tl.load(on + row) != 0)
    here = lane * lane_stride + tl.load(slots + row) * slot_stride + at
    there = lane * grad_lane_stride + (row % rows).to(tl.int64) * grad_row_stride + at

    g = tl.load(grad + there, mask=mask, other=0.0).to(tl.float32) * tl.load(factor + lane)
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
    slots: Tensor,
    grad: Tensor,
    rate: Tensor,
    on: Tensor,
    factor: Tensor,
    config: OptimizerConfig,
) -> None:
    """Make one AdamW step, in place, of the rows that are on; others stay bit for bit.

    Args:
        weight: float32 [L, S, P], each row contiguous; strided as the moments are.
        first: first moments, like `weight`.
        second: second moments, like `weight`.
        count: int64 [L, S]: steps that each row has made.
        slots: int64 [L, R]: the rows; those that are on differ from each other within a lane.
        grad: float32 or bfloat16 [L, R, P], each row contiguous.
        rate: float32 [L, R]: learning rate of each row, displacement scale included.
        on: bool [L, R].
        factor: float32 [L]: what the gradients are multiplied by.
        config: the decay rates and the weight decay.
    """
    lanes, rows, size = grad.shape
    if not weight.stride() == first.stride() == second.stride():
        raise ValueError("weight, first and second are not strided alike")
    if not weight.stride(2) == grad.stride(2) == count.stride(1) == 1:
        raise ValueError("rows and counts must be contiguous")
    slots, rate, on, factor = (t.contiguous() for t in (slots, rate, on, factor))
    corrections = torch.empty(lanes, rows, 2, dtype=torch.float32, device=weight.device)
    with torch.cuda.device_of(weight):
        _count_steps[(lanes * rows,)](
            count,
            slots,
            on,
            corrections,
            rows,
            count.stride(0),
            BETA1=config.beta1,
            BETA2=config.beta2,
            num_warps=1,
        )
        _move_rows[(lanes * rows, triton.cdiv(size, _BLOCK))](
            weight,
            first,
            second,
            slots,
            grad,
            rate,
            on,
            factor,
            corrections,
            rows,
            size,
            weight.stride(0),
            weight.stride(1),
            grad.stride(0),
            grad.stride(1),
            BETA1=config.beta1,
            BETA2=config.beta2,
            EPS=config.eps,
            DECAY=config.weight_decay,
            BLOCK=_BLOCK,
            num_warps=4,
        )


def adamw_shared(
    weight: Tensor,
    first: Tensor,
    second: Tensor,
    count: Tensor,
    grad: Tensor,
    rate: Tensor,
    on: Tensor,
    factor: Tensor,
    config: OptimizerConfig,
) -> None:
    """Make one AdamW step, in place, of the shared rows of the lanes that are on.

    Args:
        weight: float32 [L, Q]; strided as the moments are.
        first: first moments, like `weight`.
        second: second moments, like `weight`.
        count: int64 [L].
        grad: float32 or bfloat16 [L, Q].
        rate: float32 [L].
        on: bool [L].
        factor: float32 [L].
        config: the decay rates and the weight decay.
    """
    adamw_rows(
        weight[:, None],
        first[:, None],
        second[:, None],
        count[:, None],
        torch.zeros_like(count)[:, None],
        grad[:, None],
        rate[:, None],
        on[:, None],
        factor,
        config,
    )
