"""Cross-entropy of rows of logits, and its gradient written over them.

One program has one row: in registers if the row is short enough, else block by block with a running
maximum and a running sum, and once more to write the gradient.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_LARGEST_BLOCK = 16384
_COLUMNS_PER_WARP = 2048


@triton.jit
def _cross_entropy_row(
    logits,
    targets,
    losses,
    VOCAB: tl.constexpr,
    GRADIENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    logits += row * VOCAB
    target = tl.load(targets + row)
    columns = tl.arange(0, BLOCK)

    if VOCAB <= BLOCK:
        inside = columns < VOCAB
        x = tl.load(logits + columns, mask=inside, other=float("-inf")).to(tl.float32)
        odds = tl.exp(x - tl.max(x, axis=0))
        total = tl.sum(odds, axis=0)
        hit = columns == target
        tl.store(losses + row, tl.log(total) + tl.max(x, axis=0) - tl.sum(tl.where(hit, x, 0.0)))
        if GRADIENT:
            gradient = odds / total - tl.where(hit, 1.0, 0.0)
            tl.store(logits + columns, gradient.to(logits.dtype.element_ty), mask=inside)
        return

    # A finite start, so that a block without anything in it is no difference of infinities.
    top = tl.full((), -3.0e38, tl.float32)
    total = tl.full((), 0.0, tl.float32)
    picked = tl.full((), 0.0, tl.float32)
    for start in range(0, VOCAB, BLOCK):
        at = start + columns
        inside = at < VOCAB
        x = tl.load(logits + at, mask=inside, other=0.0).to(tl.float32)
        picked += tl.sum(tl.where(at == target, x, 0.0), axis=0)
        x = tl.where(inside, x, float("-inf"))
        higher = tl.maximum(top, tl.max(x, axis=0))
        total = total * tl.exp(top - higher) + tl.sum(tl.exp(x - higher), axis=0)
        top = higher
    normaliser = top + tl.log(total)
    tl.store(losses + row, normaliser - picked)

    if GRADIENT:
        # Whoever writes a number below need not be who read it above.
        tl.debug_barrier()
        for start in range(0, VOCAB, BLOCK):
            at = start + columns
            inside = at < VOCAB
            x = tl.load(logits + at, mask=inside, other=0.0).to(tl.float32)
            gradient = tl.exp(x - normaliser) - tl.where(at == target, 1.0, 0.0)
            tl.store(logits + at, gradient.to(logits.dtype.element_ty), mask=inside)


def cross_entropy_rows(logits: Tensor, targets: Tensor, losses: Tensor, gradient: bool) -> None:
    """Write the loss of every row and, over its logits, the gradient of that loss by them.

    The arithmetic is float32. A NaN stays in its row.

    Args:
        logits: float32 or bfloat16 [L, n, V], contiguous.
        targets: int64 [L, n], contiguous, from 0 to V - 1.
        losses: float32 [L, n], contiguous; written: nats.
        gradient: whether to write it; without, the logits stay as they are.
    """
    lanes, tokens, vocab = logits.shape
    block = min(_LARGEST_BLOCK, max(128, triton.next_power_of_2(vocab)))
    with torch.cuda.device_of(logits):
        _cross_entropy_row[(lanes * tokens,)](
            logits,
            targets,
            losses,
            VOCAB=vocab,
            GRADIENT=gradient,
            BLOCK=block,
            num_warps=max(1, block // _COLUMNS_PER_WARP),
        )
