"""Blocks with gradients, level after level: each level's inputs are sums of outputs above it.

Shapes: L lanes, R blocks of a level in each, M blocks in all, level by level, B windows, T tokens,
d = embed.
"""

from __future__ import annotations

from torch import Tensor

from k1.block import Folded, block_forward


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
