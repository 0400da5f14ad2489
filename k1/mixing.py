"""Moving activations between tree levels, and the routing weights among siblings.

`to_children` and `to_parents` are transposes of each other, and each is a gather whose backward
pass is the other: no scatter, so no atomics, and the same bits on every run.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from k1.levels import LevelIndex


def flat_index(index: Tensor, width: int) -> Tensor:
    """Turn positions within a lane [L, ...] into positions in the flattened [L * width]."""
    if index.shape[0] == 1:
        return index.reshape(-1)
    lane = torch.arange(index.shape[0], device=index.device) * width
    return (index + lane.view(-1, *[1] * (index.dim() - 1))).reshape(-1)


def _differentiable(tensor: Tensor) -> bool:
    """Whether a graph is wanted; without one, calling torch's machinery for it costs time."""
    return torch.is_grad_enabled() and tensor.requires_grad


def _spread(y: Tensor, child: LevelIndex) -> Tensor:
    lanes, width = y.shape[:2]
    return (
        y.flatten(0, 1)
        .index_select(0, flat_index(child.parent, width))
        .view(lanes, -1, *y.shape[2:])
    )


def _collect(x: Tensor, parent: LevelIndex) -> Tensor:
    lanes, width = x.shape[:2]
    flat, total = x.flatten(0, 1), None
    for k in range(parent.children.shape[-1]):
        picked = flat.index_select(0, flat_index(parent.children[..., k], width))
        picked = picked.view(lanes, -1, *x.shape[2:])
        if k >= parent.full_ranks:
            on = parent.has_child[..., k].view(lanes, -1, *[1] * (x.dim() - 2))
            picked = picked.masked_fill_(~on, 0)
        total = picked if total is None else total.add_(picked)
    assert total is not None
    return total


class _ToChildren(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, parent: LevelIndex, child: LevelIndex) -> Tensor:
        ctx.parent = parent
        return _spread(y, child)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return _collect(grads[0], ctx.parent), None, None


class _ToParents(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, parent: LevelIndex, child: LevelIndex) -> Tensor:
        ctx.child = child
        return _collect(x, parent)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        alive = ctx.child.alive
        spread = _spread(grads[0], ctx.child)
        return spread * alive.view(*alive.shape, *[1] * (spread.dim() - 2)), None, None


class _Mix(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, m: Tensor, weight: Tensor, parent: LevelIndex, child: LevelIndex
    ) -> Tensor:
        ctx.save_for_backward(m, weight)
        ctx.child = child
        lanes, width = m.shape[:2]
        flat, flat_weight = m.flatten(0, 1), weight.flatten(0, 1)
        total = m.new_zeros(lanes * parent.width, *m.shape[2:])
        for k in range(parent.children.shape[-1]):
            index = flat_index(parent.children[..., k], width)
            share = flat_weight.index_select(0, index)
            if k >= parent.full_ranks:
                share = share.masked_fill_(~parent.has_child[..., k].reshape(-1, 1), 0)
            total.addcmul_(flat.index_select(0, index), share[..., None])
        return total.view(lanes, parent.width, *m.shape[2:])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        m, weight = ctx.saved_tensors
        alive = ctx.child.alive[..., None]
        spread = _spread(grads[0], ctx.child)
        by_weight = (spread * m).sum(-1) * alive
        return spread * (weight * alive)[..., None], by_weight, None, None


def mix(m: Tensor, weight: Tensor, parent: LevelIndex, child: LevelIndex) -> Tensor:
    """Average the children's values by their weights.

    Args:
        m: [L, W_child, N, d].
        weight: [L, W_child, N], in the dtype of `m`.
        parent: the parents' level.
        child: the children's level.

    Returns:
        [L, W_parent, N, d], zero for a parent without children.
    """
    out: Tensor = _Mix.apply(m, weight, parent, child)
    return out


def to_children(y: Tensor, parent: LevelIndex, child: LevelIndex) -> Tensor:
    """Hand every child its parent's value: [L, W_parent, ...] -> [L, W_child, ...]."""
    if not _differentiable(y):
        return _spread(y, child)
    out: Tensor = _ToChildren.apply(y, parent, child)
    return out


def to_parents(x: Tensor, parent: LevelIndex, child: LevelIndex) -> Tensor:
    """Sum values over the children of every parent: [L, W_child, ...] -> [L, W_parent, ...].

    A parent without children gets zero.
    """
    if not _differentiable(x):
        return _collect(x, parent)
    out: Tensor = _ToParents.apply(x, parent, child)
    return out


def sibling_softmax(
    prior: Tensor, learned: Tensor | None, parent: LevelIndex, child: LevelIndex
) -> Tensor:
    """Routing weight of each child among its siblings: float32 [L, W_child, N], 0 where dead.

    Args:
        prior: float32 [L, W_child, N] or [L, W_child, 1]: log prior plus evidence of each child.
        learned: float32 [L, W_parent, K', N] logits by rank (K' >= K), or None.
        parent: the parents' level.
        child: the children's level.
    """
    lanes, width, ranks = parent.children.shape
    index = flat_index(parent.children.flatten(1), prior.shape[1])
    logits = prior.flatten(0, 1).index_select(0, index).view(lanes, width, ranks, -1)
    if learned is not None:
        logits = logits + learned[:, :, :ranks]
    if parent.full_ranks < ranks:
        lowest = torch.finfo(logits.dtype).min
        logits = logits.masked_fill(~parent.has_child[..., None], lowest)
    by_parent = torch.softmax(logits, dim=2)
    column = flat_index(child.parent * ranks + child.rank, width * ranks)
    by_child = by_parent.flatten(0, 2).index_select(0, column).view(lanes, child.width, -1)
    return by_child * child.alive[..., None]
