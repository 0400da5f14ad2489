"""Blocks with gradients, level after level: each level's inputs are sums of outputs above it.

Shapes: L lanes, R blocks of a level in each, M blocks in all, level by level, B windows, T tokens,
d = embed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from k1.block import Folded, block_forward, go_back, run_keeping


def run_chain(p: Folded, x: Tensor, links: list[Tensor], heads: int) -> list[Tensor]:
    """Run blocks on each other's outputs.

    Args:
        p: the weights of the M blocks.
        x: inputs of the first level's blocks, one a lane [L, B, T, d].
        links: of each further level [L, R, R_above]: what its inputs are of the outputs above.
        heads: attention heads.

    Returns:
        Outputs of each level [L, R, B, T, d].
    """
    if not x.is_cuda:
        return list(_Chain.apply(x, links, heads, *p.tensors()))
    ys: list[Tensor] = []
    for level, (start, stop) in enumerate(_cuts(x, links)):
        inputs = _hand_down(links[level - 1], ys[-1]) if level else x[:, None]
        y = block_forward(p.cut(start, stop), inputs.flatten(0, 1), heads)
        ys.append(y.view_as(inputs))
    return ys


def _cuts(x: Tensor, links: list[Tensor]) -> list[tuple[int, int]]:
    """Where each level's blocks lie among all."""
    cuts = [(0, len(x))]
    for link in links:
        cuts.append((cuts[-1][1], cuts[-1][1] + link.shape[0] * link.shape[1]))
    return cuts


def _hand_down(link: Tensor, y: Tensor) -> Tensor:
    """Inputs [L, R, ...] of a level from the outputs [L, R_above, ...] of that above."""
    return (link.to(y.dtype) @ y.flatten(2)).unflatten(2, y.shape[2:])


class _Chain(torch.autograd.Function):
    """All of it as one step of torch's graph on a CPU, where every further one costs much."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, links: list[Tensor], heads: int, *weights: Tensor
    ) -> tuple[Tensor, ...]:
        p, inputs = Folded(*weights), x[:, None]
        ys: list[Tensor] = []
        kept: list[list[Tensor]] = []
        for level, cut in enumerate(_cuts(x, links)):
            if level:
                inputs = _hand_down(links[level - 1], ys[-1])
            ys.append(torch.empty_like(inputs))
            flat = inputs.flatten(0, 1)
            kept.append([flat, *run_keeping(p.cut(*cut), flat, heads, ys[-1])])
        ctx.links, ctx.heads, ctx.each = links, heads, len(kept[0])
        ctx.save_for_backward(x, *weights, *[t for level in kept for t in level])
        return tuple(ys)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, *saved = ctx.saved_tensors
        p, kept, each = Folded(*saved[:7]), saved[7:], ctx.each
        by = Folded(*[torch.empty_like(t) for t in p.tensors()])
        cuts, below = _cuts(x, ctx.links), None
        for level in range(len(cuts) - 1, -1, -1):
            dy = grads[level]
            if below is not None:
                link = ctx.links[level].to(dy.dtype)
                dy = dy + (link.transpose(1, 2) @ below.flatten(2)).view_as(dy)
            inputs, *own = kept[level * each : (level + 1) * each]
            cut = cuts[level]
            below = go_back(
                p.cut(*cut), inputs, own, ctx.heads, dy.flatten(0, 1), by.cut(*cut)
            ).view_as(dy)
        assert below is not None
        return below[:, 0], None, None, *by.tensors()
