"""The update of a step in four launches: `k1.update` for CUDA.

Squares of the shared gradients by parts; a plan, one program for each lane, that works out what
every row does; then AdamW on the shared rows and on the blocks' rows.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from k1.arena import Arena
from k1.attribution import Selection
from k1.graphs import Side
from k1.kernels.adamw import Moves, move_rows
from k1.kernels.select import warps_for
from k1.path import Gradients, PathPass
from k1.records import FullGradients
from k1.update import ROWS, SHARED_ROWS

if TYPE_CHECKING:
    from k1.kernels.tree import TreePass

_BLOCK = 4096


@triton.jit
def _square_parts(grad, out, size, parts, stride, BLOCK: tl.constexpr):
    program = tl.program_id(0)
    at = program % parts * BLOCK + tl.arange(0, BLOCK)
    lane = (program // parts).to(tl.int64)
    value = tl.load(grad + lane * stride + at, mask=at < size, other=0.0)
    tl.store(out + program, tl.sum(value * value))


def square_parts(grad: Tensor) -> Tensor:
    """Sum the squares of each row of [L, Q], a part of it at a time: float32 [L, parts]."""
    lanes, size = grad.shape
    if grad.stride(1) != 1:
        raise ValueError("rows must be contiguous")
    out = torch.empty(lanes, triton.cdiv(size, _BLOCK), device=grad.device)
    _square_parts[(out.numel(),)](
        grad, out, size, out.shape[1], grad.stride(0), BLOCK=_BLOCK, num_warps=4
    )
    return out


@triton.jit
def _factor(squares, LIMIT: tl.constexpr):
    """`k1.optimizer.clip_factor` of one lane."""
    factor = tl.full((), 1.0, tl.float32)
    if LIMIT > 0:
        limit = tl.full((), LIMIT, tl.float32)
        factor = tl.minimum(tl.div_rn(limit, tl.sqrt_rn(squares) + 1e-6), factor)
    return factor


@triton.jit
def _correction(steps, BETA: tl.constexpr):
    """Bias correction 1 - BETA ** steps, for int64 steps below 2 ** 32."""
    # By squaring, in float64: in float32 it would be off by a millionth for small counts.
    power = tl.full(steps.shape, 1.0, tl.float64)
    base = tl.full((), BETA, tl.float64)
    for _ in range(0, 32):
        power = tl.where((steps & 1) == 1, power * base, power)
        base = base * base
        steps = steps >> 1
    return (1.0 - power).to(tl.float32)


@triton.jit
def _store_moves(
    on_ptr, terms_ptr, count_ptr, at, inside, on, rate, factor,
    BETA1: tl.constexpr, BETA2: tl.constexpr,
):  # fmt: skip
    """Write what rows `at` do, and count the step of those that move."""
    count = tl.load(count_ptr + at, mask=inside, other=0) + 1
    tl.store(count_ptr + at, count, mask=inside & on)
    tl.store(on_ptr + at, on, mask=inside)
    terms_ptr += 4 * at
    tl.store(terms_ptr, rate, mask=inside)
    tl.store(terms_ptr + 1, factor, mask=inside)
    tl.store(terms_ptr + 2, _correction(count, BETA1), mask=inside)
    tl.store(terms_ptr + 3, _correction(count, BETA2), mask=inside)


@triton.jit
def _plan(
    squares_ptr, place_ptr, scale_ptr, culprit_ptr, part_ptr, sharer_ptr, before_ptr,
    step_ptr, lr_ptr, lr_factor_ptr, count_ptr, shared_count_ptr,
    fine_ptr, on_ptr, terms_ptr, shared_on_ptr, shared_terms_ptr,
    S, PARTS: tl.constexpr, PICKS: tl.constexpr, LIMIT: tl.constexpr, WARMUP: tl.constexpr,
    SHARED_SCALE: tl.constexpr, BETA1: tl.constexpr, BETA2: tl.constexpr,
    SP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    lane = tl.program_id(0).to(tl.int64)
    s = tl.arange(0, SP)
    inside = s < S
    here = lane * S + s
    scale = tl.load(scale_ptr + here, mask=inside, other=0.0)
    moved = scale > 0
    at = here
    if place_ptr is not None:
        at = tl.load(place_ptr + here, mask=inside, other=-1)
        moved = moved & (at >= 0)
    # Masked, not multiplied: a block that stays may have any gradient.
    squares = tl.load(squares_ptr + at, mask=moved, other=0.0)
    total = tl.sum(squares)
    if part_ptr is not None:
        shared = tl.zeros((BLOCK,), tl.float32)
        for first in range(0, PARTS, BLOCK):
            p = first + tl.arange(0, BLOCK)
            shared += tl.load(part_ptr + lane * PARTS + p, mask=p < PARTS, other=0.0)
        shares = lane >= 0
        if sharer_ptr is not None:
            shares = tl.load(sharer_ptr + lane) != 0
        total += tl.where(shares, tl.sum(shared), 0.0)
    fine = total < float("inf")  # NaN is not
    if before_ptr is not None:
        fine = fine & (tl.load(before_ptr + lane) != 0)
    tl.store(fine_ptr + lane, fine)

    step = (tl.load(step_ptr + lane) + 1).to(tl.float32)
    rise = tl.minimum(tl.div_rn(step, tl.full((), WARMUP, tl.float32)), 1.0)
    rate = tl.load(lr_ptr + lane) * tl.load(lr_factor_ptr + lane) * rise
    if shared_on_ptr is not None:
        on = fine & shares
        _store_moves(
            shared_on_ptr, shared_terms_ptr, shared_count_ptr, lane, lane >= 0, on,
            rate * SHARED_SCALE, _factor(total, LIMIT), BETA1, BETA2,
        )  # fmt: skip
    if culprit_ptr is not None:
        hit = tl.zeros((SP,), tl.int1)
        for pick in range(PICKS):
            hit = hit | (s == tl.load(culprit_ptr + lane * PICKS + pick))
        moved = moved & hit
        total = tl.sum(tl.where(moved, squares, 0.0))
    _store_moves(
        on_ptr, terms_ptr, count_ptr, here, inside, tl.where(fine, moved, False),
        rate * scale, _factor(total, LIMIT), BETA1, BETA2,
    )  # fmt: skip


class FusedUpdate:
    """One step's update of lanes start..stop; what it does is in `k1.update.Update`."""

    def __init__(
        self,
        arena: Arena,
        start: int,
        stop: int,
        selection: Selection,
        sharers: Tensor | None,
        side: Side,
    ) -> None:
        """Begin an update; arguments as `k1.update.Update`, and a stream for the shared rows.

        Whoever calls joins it.
        """
        self._side = side
        self._arena, self._lanes, self._selection = arena, slice(start, stop), selection
        self._sharers = sharers
        self._fine: Tensor | None = None

    def full(self, full: FullGradients) -> Tensor:
        """Move what is selected by the gradients of all blocks, as `k1.update.Update.full`."""
        return self._run(full.measured.square(), None, full.by_row, full.by_shared, True)

    def path(self, done: PathPass | TreePass, found: Gradients, last: bool) -> Tensor:
        """Move path blocks by their gradients; as `Update.path`."""
        by_row = [(done.row, found.by_row)]
        return self._run(found.squares, done.place, by_row, found.by_shared, last)

    def _run(
        self,
        squares: Tensor,
        place: Tensor | None,
        by_row: list[tuple[Tensor, Tensor]],
        by_shared: Tensor,
        last: bool,
    ) -> Tensor:
        """Plan the moves and make them; squares are by slot, or stand where `place` says."""
        config = self._arena.config
        parts = square_parts(by_shared) if config.update.shared_scale > 0 else None
        blocks, shares = self._plan(squares, place, parts, last)
        if shares is not None:
            weight, first, second = (self._arena[name][self._lanes] for name in SHARED_ROWS[:3])
            self._side.keep(by_shared, shares)
            with self._side.fork():
                move_rows(weight, first, second, None, by_shared, shares, config.optimizer)
        state = (self._arena[name][self._lanes].flatten(0, 1) for name in ROWS[:3])
        weight, first, second = state
        for row, grad in by_row:
            move_rows(weight, first, second, row, grad, blocks, config.optimizer)
        assert self._fine is not None
        return self._fine

    def _plan(
        self, squares: Tensor, place: Tensor | None, parts: Tensor | None, last: bool
    ) -> tuple[Moves, Moves | None]:
        """Plan the moves of all blocks [L * S] and, if they move, of the shared rows [L]."""
        a, config = self._arena, self._arena.config
        scale = self._selection.scale.contiguous()
        culprits = None if last else self._selection.culprits.contiguous()
        lanes, slots = scale.shape
        blocks = Moves.empty(lanes * slots, a.device)
        shares = Moves.empty(lanes, a.device) if last and parts is not None else None
        before, self._fine = self._fine, torch.empty(lanes, dtype=torch.bool, device=a.device)
        names = ("step", "lr", "lr_factor", "count", "shared_count")
        _plan[(lanes,)](
            squares, place, scale, culprits, parts, self._sharers, before,
            *[a[name][self._lanes] for name in names], self._fine, blocks.on, blocks.terms,
            shares and shares.on, shares and shares.terms,
            slots, PARTS=0 if parts is None else parts.shape[1],
            PICKS=0 if culprits is None else culprits.shape[1], LIMIT=config.optimizer.clip,
            WARMUP=max(1, config.optimizer.warmup), SHARED_SCALE=config.update.shared_scale,
            BETA1=config.optimizer.beta1, BETA2=config.optimizer.beta2,
            SP=triton.next_power_of_2(slots), BLOCK=512, num_warps=warps_for(slots),
        )  # fmt: skip
        return blocks, shares
