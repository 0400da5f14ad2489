"""Blocks forward only on a CPU, where memory that is used again is worth more than long loops.

The norm before attention has its gain and shift folded away, so it depends on nothing but the
input: siblings, and their parent's router, share it.

Shapes: n blocks, S inputs, N tokens of each, d = embed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from k1.block import Folded, by_head, causal_mask

_CACHE_BYTES = 2**21
"""Size of the largest intermediate value of the blocks that run together."""


@dataclass(frozen=True)
class Known:
    """Blocks of a level that need not run."""

    at: Tensor
    """int64 [blocks]: their places in the flattened level, ascending."""
    y: Tensor
    """[blocks, N, d]: their outputs."""


def plain_norm(x: Tensor) -> Tensor:
    """Layer norm without gain and shift: with ones and zeros torch takes a faster way to it."""
    width = x.shape[-1]
    return F.layer_norm(x, (width,), *_ones_and_zeros(width, x.dtype))


@lru_cache(maxsize=16)
def _ones_and_zeros(width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    with torch.inference_mode(False):  # whoever asks first, they are good for gradients later
        return torch.ones(width, dtype=dtype), torch.zeros(width, dtype=dtype)


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
    widest = max(3 * d, f, time)
    step = min(blocks, max(1, _CACHE_BYTES // (tokens * widest * above.element_size())))
    # What is no longer needed makes room for what comes next while the cache still holds it.
    narrow, wide = above.new_empty(step * tokens * d), above.new_empty(step * tokens * widest)
    scores = above.new_empty(step * tokens * time)
    mask = causal_mask(time, above.dtype)
    for some in _runs(blocks, done, step):
        n, w = some.stop - some.start, p.cut(some.start, some.stop)
        source, out = parent[some], y[some]
        inputs = a = narrow[: n * tokens * d].view(n, tokens, d)
        qkv = wide[: n * tokens * 3 * d].view(n, tokens, 3 * d)
        h = wide[: n * tokens * f].view(n, tokens, f)
        torch.index_select(normed, 0, source, out=inputs)
        torch.baddbmm(w.qkv_bias[:, None], inputs, w.qkv, out=qkv)
        _attend(qkv.view(-1, time, 3 * d), heads, mask, scores, a.view(-1, time, d))
        torch.index_select(above, 0, source, out=out)
        out.baddbmm_(a, w.out)
        torch.baddbmm(w.mlp_in_bias[:, None], plain_norm(out), w.mlp_in, out=h)
        out.add_(w.mlp_out_bias[:, None]).baddbmm_(torch.ops.aten.gelu_(h), w.mlp_out)
    return y


def _runs(blocks: int, done: list[int], step: int) -> Iterator[slice]:
    """Cut the blocks that are not done into runs of neighbours, `step` at most."""
    first = 0
    for stop in [*sorted(done), blocks]:
        for start in range(first, stop, step):
            yield slice(start, min(stop, start + step))
        first = stop + 1


def _attend(qkv: Tensor, heads: int, mask: Tensor, room: Tensor, out: Tensor) -> None:
    """Causal attention [sequences, time, 3 * embed] -> [sequences, time, embed].

    The first half of the queries sees the first half of the keys only: a quarter of the work less.
    `mask` [time, time] is -inf above the diagonal. `room` has space for sequences * time * time
    numbers.
    """
    sequences, time, d = out.shape
    half, scale = (time + 1) // 2, (d // heads) ** -0.5
    rest = time - half
    upper_mask, lower_mask = mask[:half, :half], mask[half:, half:]
    # Both views lie at the start of the room: what is used again is still in the cache.
    upper = room[: sequences * half * half].view(sequences, half, half)
    lower = room[: sequences * rest * time].view(sequences, rest, time)
    uppers, lowers = [], []
    for q, k, v in by_head(qkv, heads):
        keys = k.transpose(1, 2)
        upper.baddbmm_(q[:, :half], keys[..., :half], beta=0, alpha=scale).add_(upper_mask)
        torch.softmax(upper, dim=-1, out=upper)
        uppers.append(torch.bmm(upper, v[:, :half]))
        lower.baddbmm_(q[:, half:], keys, beta=0, alpha=scale)
        lower[..., half:].add_(lower_mask)
        torch.softmax(lower, dim=-1, out=lower)
        lowers.append(torch.bmm(lower, v))
    torch.cat(uppers, dim=-1, out=out[:, :half])
    torch.cat(lowers, dim=-1, out=out[:, half:])
