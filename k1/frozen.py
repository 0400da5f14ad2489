"""Blocks forward only on a CPU, where memory that is used again is worth more than long loops.

The norm before attention has its gain and shift folded away, so it depends on nothing but the
input: siblings, and their parent's router, share it.

Shapes: n blocks, S inputs, N tokens of each, d = embed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from k1.block import Folded, attend

_CACHE_BYTES = 5 * 2**18
"""Size of the largest intermediate value of the blocks that run together."""


@dataclass(frozen=True)
class Known:
    """Blocks of a level that need not run."""

    at: Tensor
    """int64 [blocks]: their places in the flattened level."""
    y: Tensor
    """[blocks, N, d]: their outputs."""


def run_frozen(
    p: Folded,
    above: Tensor,
    normed: Tensor,
    parent: Tensor,
    time: int,
    heads: int,
    known: Known | None = None,
) -> Tensor:
    """Run the blocks of a level without a graph.

    Args:
        p: the weights of n blocks.
        above: the inputs [S, N, d].
        normed: the same after the norm without gain and shift.
        parent: int64 [n]: each block's input.
        time: tokens of a window.
        heads: attention heads.
        known: blocks that need not run.

    Returns:
        [n, N, d].
    """
    blocks, tokens, d, f = len(parent), *above.shape[1:], p.mlp_in.shape[2]
    y = above.new_empty(blocks, tokens, d)
    done: list[int] = []
    if known is not None:
        y.index_copy_(0, known.at, known.y)
        done = known.at.tolist()
    widest = tokens * max(3 * d, f, time) * above.element_size()
    step = min(blocks, max(1, _CACHE_BYTES // widest))
    mask = torch.full((time, time), -torch.inf, dtype=above.dtype).triu(1)
    inputs, a = above.new_empty(2, step, tokens, d)
    qkv, h = above.new_empty(step, tokens, 3 * d), above.new_empty(step, tokens, f)
    scores = above.new_empty(step * tokens // time, time, time)
    for some in _runs(blocks, done, step):
        n, w = some.stop - some.start, p.cut(some.start, some.stop)
        source, out = parent[some], y[some]
        torch.index_select(normed, 0, source, out=inputs[:n])
        torch.baddbmm(w.qkv_bias[:, None], inputs[:n], w.qkv, out=qkv[:n])
        windows = n * tokens // time
        attend(
            qkv[:n].view(windows, time, 3 * d),
            heads,
            mask,
            [scores[:windows]] * heads,
            a[:n].view(windows, time, d),
        )
        torch.index_select(above, 0, source, out=out)
        out.baddbmm_(a[:n], w.out)
        torch.baddbmm(w.mlp_in_bias[:, None], F.layer_norm(out, (d,)), w.mlp_in, out=h[:n])
        out.add_(w.mlp_out_bias[:, None]).baddbmm_(torch.ops.aten.gelu_(h[:n]), w.mlp_out)
    return y


def _runs(blocks: int, done: list[int], step: int) -> Iterator[slice]:
    """Cut the blocks that are not done into runs of neighbours, `step` at most."""
    first = 0
    for stop in [*sorted(done), blocks]:
        for start in range(first, stop, step):
            yield slice(start, min(stop, start + step))
        first = stop + 1
