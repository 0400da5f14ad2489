"""One transformer block, for any number of blocks at once.

All parameters of a block lie in one row of P numbers, so that the arena is a matrix of blocks, a
block's responsibility is a row norm and its optimizer step touches one row. `BlockLayout` says what
lies where.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from k1.config import ModelConfig

# The other fused kernel's backward pass is not reproducible on CUDA.
_BACKENDS = [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]


@dataclass(frozen=True)
class Layout:
    """Named pieces of a parameter row."""

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]

    @property
    def sizes(self) -> list[int]:
        """Numbers in each piece."""
        return [math.prod(shape) for shape in self.shapes]

    @property
    def total(self) -> int:
        """Numbers in a row."""
        return sum(self.sizes)

    def unpack(self, rows: Tensor) -> dict[str, Tensor]:
        """View rows [..., P] as named pieces [..., *shape].

        One split, so that the backward pass is one concatenation.
        """
        pieces = rows.split(self.sizes, dim=-1)
        lead = rows.shape[:-1]
        return {
            name: piece.unflatten(-1, shape) if len(shape) > 1 else piece.view(*lead, *shape)
            for name, piece, shape in zip(self.names, pieces, self.shapes, strict=True)
        }


def block_layout(model: ModelConfig) -> Layout:
    """Lay out a block: attention, feed-forward, and the router over its children."""
    d, f, k = model.embed, model.feed_forward, model.max_children
    fields: dict[str, tuple[int, ...]] = {
        "norm1.weight": (d,),
        "norm1.bias": (d,),
        "attention.qkv": (d, 3 * d),
        "attention.out": (d, d),
        "norm2.weight": (d,),
        "norm2.bias": (d,),
        "mlp.in": (d, f),
        "mlp.in_bias": (f,),
        "mlp.out": (f, d),
        "mlp.out_bias": (d,),
        "router.weight": (d, k),
        "router.bias": (k,),
    }
    return Layout(tuple(fields), tuple(fields.values()))


def shared_layout(model: ModelConfig, vocab_size: int) -> Layout:
    """Lay out the shared part: embedding, positions, final norm and head."""
    d = model.embed
    fields: dict[str, tuple[int, ...]] = {
        "embedding": (vocab_size, d),
        "position": (model.context, d),
        "norm.weight": (d,),
        "norm.bias": (d,),
        "head": (d, vocab_size),
    }
    return Layout(tuple(fields), tuple(fields.values()))


def initial_rows(layout: Layout, rows: int, generator: torch.Generator) -> Tensor:
    """Draw starting parameters [rows, P] on the CPU: normal(0.02), norms 1, biases and routers 0.

    Output projections are scaled down by sqrt(2) for the two residual branches of a block.
    """
    pieces = []
    for name, shape in zip(layout.names, layout.shapes, strict=True):
        size = math.prod(shape)
        if name.startswith("norm") and name.endswith("weight"):
            pieces.append(torch.ones(rows, size))
        elif len(shape) == 1 or name.startswith("router"):
            pieces.append(torch.zeros(rows, size))
        else:
            std = 0.02 / math.sqrt(2) if name in ("attention.out", "mlp.out") else 0.02
            pieces.append(torch.randn(rows, size, generator=generator) * std)
    return torch.cat(pieces, dim=1)


def _causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention over [sequences, heads, time, head width]."""
    if q.is_cuda:
        with sdpa_kernel(_BACKENDS):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)
    # On a CPU, narrow heads are 2-4 times faster as three plain products than in the fused kernel.
    time, width = q.shape[-2:]
    mask = torch.full((time, time), -torch.inf, dtype=q.dtype, device=q.device).triu(1)
    q, k, v_flat = (t.reshape(-1, time, width) for t in (q, k, v))
    scores = torch.baddbmm(mask, q, k.transpose(1, 2), alpha=width**-0.5)
    return torch.bmm(torch.softmax(scores, dim=-1), v_flat).view(v.shape)


def block_forward(p: dict[str, Tensor], x: Tensor, heads: int) -> Tensor:
    """Run blocks, each on its own input.

    Args:
        p: pieces of `block_layout`, each [blocks, ...].
        x: [blocks, batch, time, embed]; its dtype is the dtype of the arithmetic.
        heads: attention heads.

    Returns:
        [blocks, batch, time, embed].
    """
    blocks, batch, time, d = x.shape
    cast = x.dtype
    x = x.reshape(blocks, batch * time, d)
    h = F.layer_norm(x, (d,)) * p["norm1.weight"][:, None].to(cast)
    h = h + p["norm1.bias"][:, None].to(cast)
    qkv = torch.bmm(h, p["attention.qkv"].to(cast)).view(blocks * batch, time, 3, heads, d // heads)
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    a = _causal_attention(q, k, v).transpose(1, 2).reshape(blocks, batch * time, d)
    x = torch.baddbmm(x, a, p["attention.out"].to(cast))
    h = F.layer_norm(x, (d,)) * p["norm2.weight"][:, None].to(cast)
    h = h + p["norm2.bias"][:, None].to(cast)
    h = torch.baddbmm(p["mlp.in_bias"][:, None].to(cast), h, p["mlp.in"].to(cast))
    h = torch.bmm(F.gelu(h, approximate="tanh"), p["mlp.out"].to(cast))
    x = x + (h + p["mlp.out_bias"][:, None].to(cast))
    return x.view(blocks, batch, time, d)


def child_logits(p: dict[str, Tensor], y: Tensor) -> Tensor:
    """Learned routing logits of blocks over their children.

    Args:
        p: pieces of `block_layout`, each [blocks, ...].
        y: the blocks' outputs [blocks, tokens, embed].

    Returns:
        float32 [blocks, tokens, max_children].
    """
    h = F.layer_norm(y, (y.shape[-1],))
    return torch.bmm(h, p["router.weight"].to(y.dtype)).float() + p["router.bias"][:, None]
