"""AdamW on chosen rows, in place: `k1.optimizer.adamw` without gathering and scattering the rows.

Which rows move, how fast, and by which bias corrections is given (`k1.kernels.update` plans it).
Rows that do not move are neither read nor written.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from k1.config import OptimizerConfig

_BLOCK = 1024


@dataclass(frozen=True)
class Moves:
    """What each row of a state does in a step."""

    on: Tensor
    """bool [R]: it moves."""
    terms: Tensor
    """float32 [R, 4]: learning rate (displacement scale included), factor of the gradient, bias
    corrections of the first and of the second moment; anything where a row is not on."""

    @staticmethod
    def empty(rows: int, device: torch.device) -> Moves:
        """Make room for the moves of a number of rows."""
        on = torch.empty(rows, dtype=torch.bool, device=device)
        return Moves(on, torch.empty(rows, 4, device=device))


@triton.jit
def _move_rows(
    weight,
    first,
    second,
    slots,
    grad,
    on,
    terms,
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
    row = (tl.program_id(0) // parts).to(tl.int64)
    slot = row
    if slots is not None:
        slot = tl.load(slots + row)
    if tl.load(on + slot) == 0:
        return
    at = tl.program_id(0) % parts * BLOCK + tl.arange(0, BLOCK)
    mask = at < size
    here = slot * slot_stride + at
    there = row * grad_stride + at
    terms += 4 * slot
    speed = tl.load(terms)
    factor = tl.load(terms + 1)

    g = tl.load(grad + there, mask=mask, other=0.0).to(tl.float32) * factor
    w = tl.load(weight + here, mask=mask, other=0.0)
    m = tl.load(first + here, mask=mask, other=0.0)
    v = tl.load(second + here, mask=mask, other=0.0)

    # From the nearer end, as torch interpolates: a beta of 0 then gives the gradient itself.
    m = m + (1.0 - BETA1) * (g - m) if BETA1 > 0.5 else g - BETA1 * (g - m)
    v = v * BETA2 + g * g * (1.0 - BETA2)
    step = tl.div_rn(m, tl.load(terms + 2))
    root = tl.sqrt_rn(tl.div_rn(v, tl.load(terms + 3)))
    step = tl.div_rn(step, root + EPS)
    w = w * (1.0 - speed * DECAY) - speed * step

    tl.store(weight + here, w, mask=mask)
    tl.store(first + here, m, mask=mask)
    tl.store(second + here, v, mask=mask)


def move_rows(
    weight: Tensor,
    first: Tensor,
    second: Tensor,
    row: Tensor | None,
    grad: Tensor,
    moves: Moves,
    config: OptimizerConfig,
) -> None:
    """Make one AdamW step, in place, of the rows that are on; others stay bit for bit.

    Args:
        weight: float32 [R, P], each row contiguous; strided as the moments are.
        first: first moments, like `weight`.
        second: second moments, like `weight`.
        row: int64 [M]: which rows have gradients; those that are on differ from each other. None
            for all, in order.
        grad: float32 or bfloat16 [M, P], each row contiguous.
        moves: of all rows.
        config: the decay rates and the weight decay.
    """
    rows, size = grad.shape
    if not weight.stride() == first.stride() == second.stride():
        raise ValueError("weight, first and second are not strided alike")
    if not weight.stride(1) == grad.stride(1) == 1:
        raise ValueError("rows must be contiguous")
    if row is not None:
        row = row.contiguous()
    parts = triton.cdiv(size, _BLOCK)
    _move_rows[(rows * parts,)](
        weight, first, second, row, grad, moves.on, moves.terms,
        size, parts, weight.stride(0), grad.stride(0),
        BETA1=config.beta1, BETA2=config.beta2, EPS=config.eps, DECAY=config.weight_decay,
        BLOCK=_BLOCK, num_warps=4,
    )  # fmt: skip
