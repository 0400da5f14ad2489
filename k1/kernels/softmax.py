"""Cross-entropy of rows of logits, and its gradient written over them.

One program has one row: in registers if the row is short enough, else block by block with a running
maximum and a running sum, and once more to write the gradient.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

_LONGEST = 20480
"""Numbers of a row that a program holds in registers."""
_BLOCK = 4096


@triton.jit
def _cross_entropy_row(
    logits,
    targets,
    losses,
    VOCAB: tl.constexpr,
    GRADIENT: tl.constexpr,
    FIRST: tl.constexpr,
    REST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    logits += row * VOCAB
    target = tl.load(targets + row)

    if FIRST > 0:
        # The row as two powers of two, which waste fewer registers than one.
        left, right = tl.arange(0, FIRST), FIRST + tl.arange(0, REST)
        there = tl.load(logits + target).to(tl.float32)
        p = tl.load(logits + left).to(tl.float32)
        q = tl.load(logits + right, mask=right < VOCAB, other=float("-inf")).to(tl.float32)
        most = tl.maximum(tl.max(p, axis=0), tl.max(q, axis=0))
        p, q = tl.exp(p - most), tl.exp(q - most)
        norm = tl.sum(p, axis=0) + tl.sum(q, axis=0)
        tl.store(losses + row, tl.log(norm) + most - there)
        if GRADIENT:
            # The gradient at the target replaces what another thread may still have to read.
            tl.debug_barrier()
            p = p / norm - tl.where(left == target, 1.0, 0.0)
            q = q / norm - tl.where(right == target, 1.0, 0.0)
            tl.store(logits + left, p.to(logits.dtype.element_ty))
            tl.store(logits + right, q.to(logits.dtype.element_ty), mask=right < VOCAB)
        return

    columns = tl.arange(0, BLOCK)
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
    first = 1 << (vocab.bit_length() - 1)
    fits = vocab <= _LONGEST
    _cross_entropy_row[(lanes * tokens,)](
        logits,
        targets,
        losses,
        VOCAB=vocab,
        GRADIENT=gradient,
        FIRST=first if fits else 0,
        REST=max(2, triton.next_power_of_2(vocab - first)) if fits else 2,
        BLOCK=_BLOCK,
        num_warps=min(8, max(1, vocab // 512)),
    )
