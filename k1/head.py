"""Linear cross-entropy in chunks: the logits of a whole batch never exist at once.

A chunk is some lanes, or a part of the tokens of one lane. Its logits are turned into their own
gradient in place, which goes into the gradients of hidden values and head at once; all that
the backward pass has left to do is to multiply them by what comes in. How a lane's tokens are cut
depends on their number and on the vocabulary, never on the other lanes.

Shapes: L lanes, N tokens of a lane, n tokens of a chunk, d = embed, V = vocabulary.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from k1.kernels import AVAILABLE

# Large chunks make efficient products, small ones save memory.
_CHUNK_BYTES = {"cuda": 384 * 2**20, "cpu": 8 * 2**20}


def mean_cross_entropy(hidden: Tensor, head: Tensor, targets: Tensor) -> Tensor:
    """Mean over tokens of the cross-entropy of `hidden @ head`, in nats, of each lane.

    Differentiable once, by all but the targets. Targets are not checked.

    Args:
        hidden: [L, N, d]; its dtype is the dtype of the arithmetic.
        head: [L, d, V], float32 or of the dtype of `hidden`.
        targets: int64 [L, N], from 0 to V - 1.

    Returns:
        float32 [L] (float64 for float64 arithmetic).
    """
    if torch.is_grad_enabled():
        loss: Tensor = _MeanCrossEntropy.apply(hidden, head, targets)
        return loss
    return token_cross_entropy(hidden, head, targets).mean(1)


@torch.no_grad()
def token_cross_entropy(hidden: Tensor, head: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy in nats of every token, without a gradient.

    Args:
        hidden: [L, N, d]; its dtype is the dtype of the arithmetic.
        head: [L, d, V], float32 or of the dtype of `hidden`.
        targets: int64 [L, N], from 0 to V - 1.

    Returns:
        float32 [L, N] (float64 for float64 arithmetic).
    """
    return cross_entropy_gradients(hidden, head, targets, False, False)[0]


@torch.no_grad()
def cross_entropy_gradients(
    hidden: Tensor,
    head: Tensor,
    targets: Tensor,
    for_hidden: bool = True,
    for_head: bool = True,
    scale: float = 1.0,
    by_head: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Cross-entropy of every token, and the gradients of a multiple of their sum.

    Args:
        hidden: [L, N, d]; its dtype is the dtype of the arithmetic.
        head: [L, d, V], float32 or of the dtype of `hidden`.
        targets: int64 [L, N], from 0 to V - 1.
        for_hidden: whether the gradient by the hidden values is wanted.
        for_head: whether the gradient by the head is wanted.
        scale: what the gradients, not the losses, are multiplied by.
        by_head: where the gradient by the head goes instead of a new tensor, each lane contiguous.

    Returns:
        Losses float32 [L, N] in nats, and the gradients: by `hidden` in its dtype, by `head` in
        float32 (float64 for float64 arithmetic).
    """
    wide = _wide(hidden.dtype)
    weight = head.to(hidden.dtype)
    losses = hidden.new_empty(targets.shape, dtype=wide)
    d_hidden = hidden.new_empty(hidden.shape) if for_hidden else None
    d_head = None
    if for_head:
        d_head = head.new_empty(head.shape, dtype=wide) if by_head is None else by_head
    for lanes, tokens in _chunks(hidden, head.shape[2]):
        part, own = _cut(hidden, lanes, tokens), _cut(weight, lanes)
        wanted, out = _cut(targets, lanes, tokens), _cut(losses, lanes, tokens)
        d_logits = _losses(part, own, wanted, out, gradient=for_hidden or for_head)
        if d_hidden is not None:
            # A factor within a product costs nothing.
            by_part = _cut(d_hidden, lanes, tokens)
            by_part.baddbmm_(d_logits, own.transpose(1, 2), beta=0, alpha=scale)
        if d_head is not None:
            first = tokens.start == 0
            _product(_cut(d_head, lanes), part.transpose(1, 2), d_logits, scale, add=not first)
        del d_logits  # or it would be held while the next are made
    return losses, d_hidden, d_head


class _MeanCrossEntropy(torch.autograd.Function):
    """Losses and, in the same pass, the gradients of their mean that will be wanted."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Tensor, targets: Tensor) -> Tensor:
        for_hidden, for_head = ctx.needs_input_grad[:2]
        losses, d_hidden, d_head = cross_entropy_gradients(
            hidden, head, targets, for_hidden, for_head, 1 / targets.shape[1]
        )
        ctx.save_for_backward(d_hidden, d_head)
        ctx.head_dtype = head.dtype
        return losses.mean(1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        each = grad[:, None, None]
        d_hidden, d_head = ctx.saved_tensors
        if d_hidden is not None:
            d_hidden = d_hidden * each.to(d_hidden.dtype)
        if d_head is not None:
            d_head = (d_head * each).to(ctx.head_dtype)
        return d_hidden, d_head, None


def _wide(dtype: torch.dtype) -> torch.dtype:
    """Dtype of losses and sums: float32, or wider if the arithmetic is."""
    return torch.promote_types(dtype, torch.float32)


def _chunks(hidden: Tensor, vocab: int) -> list[tuple[slice, slice]]:
    """Cut lanes and tokens into chunks whose logits take `_CHUNK_BYTES` at most.

    Whole lanes together where at least one fits, else one lane at a time in equal parts.
    """
    lanes, tokens, _ = hidden.shape
    limit = max(1, _CHUNK_BYTES[hidden.device.type] // (vocab * hidden.element_size()))
    size = math.ceil(tokens / math.ceil(tokens / limit))
    together = max(1, limit // tokens)
    return [
        (slice(lane, min(lanes, lane + together)), slice(token, min(tokens, token + size)))
        for lane in range(0, lanes, together)
        for token in range(0, tokens, size)
    ]


def _cut(tensor: Tensor, lanes: slice, tokens: slice | None = None) -> Tensor:
    """View some lanes, and some of their tokens; the tensor itself if that is all of it."""
    if lanes.stop - lanes.start < tensor.shape[0]:
        tensor = tensor[lanes]
    if tokens is not None and tokens.stop - tokens.start < tensor.shape[1]:
        tensor = tensor[:, tokens]
    return tensor


def _losses(
    hidden: Tensor, head: Tensor, targets: Tensor, losses: Tensor, gradient: bool
) -> Tensor:
    """Write the losses of a chunk and return the gradient of their sum by its logits.

    Args:
        hidden: [lanes, n, d].
        head: [lanes, d, V], of the dtype of `hidden`.
        targets: int64 [lanes, n].
        losses: [lanes, n]; written.
        gradient: whether the gradient is wanted; without, what is returned means nothing.

    Returns:
        [lanes, n, V] of the dtype of `hidden`.
    """
    if hidden.is_cuda and AVAILABLE:
        from k1.kernels.softmax import cross_entropy_rows

        logits = torch.bmm(hidden, head)
        cross_entropy_rows(logits, targets.contiguous(), losses, gradient)
        return logits
    index = targets[..., None]
    logits = torch.bmm(hidden, head).to(losses.dtype)
    if not gradient:
        torch.neg(torch.log_softmax(logits, 2).gather(2, index), out=losses[..., None])
        return logits
    picked = logits.gather(2, index)
    highest = logits.amax(2, keepdim=True)
    # Torch's exponential is slow on a CPU beside its softmax, so the normaliser is had from that:
    # the largest probability is at least 1 / V, so its logarithm is exact enough.
    torch.softmax(logits, 2, out=logits)
    normaliser = highest - logits.amax(2, keepdim=True).log_()
    torch.sub(normaliser, picked, out=losses[..., None])
    return logits.scatter_(2, index, -1.0, reduce="add").to(hidden.dtype)


def _product(out: Tensor, left: Tensor, right: Tensor, scale: float, add: bool) -> None:
    """Write a multiple of a batched product to `out`, or add it, summing in the dtype of `out`."""
    beta = int(add)
    if out.is_cuda and out.dtype != left.dtype:
        torch.baddbmm(out, left, right, out_dtype=out.dtype, beta=beta, alpha=scale, out=out)
    else:
        out.baddbmm_(left.to(out.dtype), right.to(out.dtype), beta=beta, alpha=scale)
