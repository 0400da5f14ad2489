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

_CACHE_BYTES = 3 * 2**19
"""Size of a frozen block's largest intermediate value, all blocks of a pass together, on a CPU:
what stays in the cache, and in memory that is used again for the next blocks."""


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

    def pack(self, pieces: dict[str, Tensor]) -> Tensor:
        """Join named pieces [..., *shape] to rows [..., P]."""
        lead = len(pieces[self.names[0]].shape) - len(self.shapes[0])
        return torch.cat([pieces[name].flatten(lead) for name in self.names], dim=-1)

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


def _causal_attention(qkv: Tensor, heads: int) -> Tensor:
    """Causal attention: [sequences, time, 3 * embed] -> [sequences, time, embed]."""
    sequences, time, width = qkv.shape
    d = width // 3
    if qkv.is_cuda:
        q, k, v = qkv.view(sequences, time, 3, heads, d // heads).permute(2, 0, 3, 1, 4).unbind(0)
        with sdpa_kernel(_BACKENDS):
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return out.transpose(1, 2).reshape(sequences, time, d)
    # On a CPU, narrow heads are 2-4 times faster as plain products than in the fused kernel; head
    # by head, they read the projections in place.
    mask = torch.full((time, time), -torch.inf, dtype=qkv.dtype).triu(1)
    q, k, v = (part.split(d // heads, dim=-1) for part in qkv.split(d, dim=-1))
    outs = []
    for q_h, k_h, v_h in zip(q, k, v, strict=True):
        scores = torch.baddbmm(mask, q_h, k_h.transpose(1, 2), alpha=(d // heads) ** -0.5)
        place = None if torch.is_grad_enabled() else scores
        outs.append(torch.bmm(torch.softmax(scores, dim=-1, out=place), v_h))
    return outs[0] if heads == 1 else torch.cat(outs, dim=-1)


@dataclass(frozen=True)
class Folded:
    """Blocks as products: each norm's gain and shift are folded into the projection behind it.

    `(n(x) * gain + shift) @ weight = n(x) @ (gain[:, None] * weight) + shift @ weight`: the same
    function with two passes over the activations fewer. All in the dtype of the arithmetic.
    """

    qkv: Tensor
    """[blocks, d, 3 * d]."""
    qkv_bias: Tensor
    """[blocks, 3 * d]."""
    out: Tensor
    """[blocks, d, d]."""
    mlp_in: Tensor
    """[blocks, d, f]."""
    mlp_in_bias: Tensor
    """[blocks, f]."""
    mlp_out: Tensor
    """[blocks, f, d]."""
    mlp_out_bias: Tensor
    """[blocks, d]."""

    def tensors(self) -> tuple[Tensor, ...]:
        """All of them in order."""
        return tuple(vars(self).values())


def fold(p: dict[str, Tensor], dtype: torch.dtype) -> Folded:
    """Fold the norms of blocks, given as pieces of `block_layout`, each [blocks, ...]."""
    gain_1, gain_2 = p["norm1.weight"][..., None], p["norm2.weight"][..., None]
    qkv, mlp_in = p["attention.qkv"], p["mlp.in"]
    qkv_bias = torch.bmm(p["norm1.bias"][:, None], qkv)
    in_bias = torch.baddbmm(p["mlp.in_bias"][:, None], p["norm2.bias"][:, None], mlp_in)
    return Folded(
        (gain_1 * qkv).to(dtype),
        qkv_bias[:, 0].to(dtype),
        p["attention.out"].to(dtype),
        (gain_2 * mlp_in).to(dtype),
        in_bias[:, 0].to(dtype),
        p["mlp.out"].to(dtype),
        p["mlp.out_bias"].to(dtype),
    )


def unfold(p: dict[str, Tensor], grad: Folded) -> dict[str, Tensor]:
    """Gradients of the pieces that `fold` was given, from those of its result, in float32."""
    g = Folded(*[t.float() for t in grad.tensors()])
    qkv, mlp_in = p["attention.qkv"], p["mlp.in"]
    return {
        "norm1.weight": (g.qkv * qkv).sum(-1),
        "norm1.bias": torch.bmm(qkv, g.qkv_bias[..., None])[..., 0],
        "attention.qkv": torch.addcmul(
            p["norm1.bias"][..., None] * g.qkv_bias[:, None], p["norm1.weight"][..., None], g.qkv
        ),
        "attention.out": g.out,
        "norm2.weight": (g.mlp_in * mlp_in).sum(-1),
        "norm2.bias": torch.bmm(mlp_in, g.mlp_in_bias[..., None])[..., 0],
        "mlp.in": torch.addcmul(
            p["norm2.bias"][..., None] * g.mlp_in_bias[:, None],
            p["norm2.weight"][..., None],
            g.mlp_in,
        ),
        "mlp.in_bias": g.mlp_in_bias,
        "mlp.out": g.mlp_out,
        "mlp.out_bias": g.mlp_out_bias,
    }


def block_forward(p: Folded, x: Tensor, heads: int) -> Tensor:
    """Run blocks, each on its own input.

    `x = x + attention(norm1(x)) @ out`, then
    `x = x + gelu(norm2(x) @ in + in_bias) @ out + out_bias`.

    Args:
        p: the blocks' weights.
        x: [blocks, batch, time, embed]; its dtype is the dtype of the arithmetic.
        heads: attention heads.

    Returns:
        [blocks, batch, time, embed].
    """
    blocks, batch, time, d = x.shape
    if not (x.is_cuda or torch.is_grad_enabled()):
        return _frozen_forward(p, x, heads)
    x = x.reshape(blocks, batch * time, d)
    qkv = torch.baddbmm(p.qkv_bias[:, None], F.layer_norm(x, (d,)), p.qkv)
    a = _causal_attention(qkv.view(blocks * batch, time, 3 * d), heads)
    x = torch.baddbmm(x, a.view(blocks, batch * time, d), p.out)
    h = torch.baddbmm(p.mlp_in_bias[:, None], F.layer_norm(x, (d,)), p.mlp_in)
    x = x + p.mlp_out_bias[:, None]
    x = torch.baddbmm(x, F.gelu(h), p.mlp_out)
    return x.view(blocks, batch, time, d)


def _frozen_forward(p: Folded, x: Tensor, heads: int) -> Tensor:
    """Run blocks without a graph on a CPU: a few at a time, in place where that can be.

    The same products of the same numbers as in `block_forward`, so the same bits.
    """
    blocks, batch, time, d = x.shape
    out = x.new_empty(x.shape)
    widest = batch * time * max(p.qkv.shape[2], p.mlp_in.shape[2], time) * x.element_size()
    step = max(1, _CACHE_BYTES // widest)
    for first in range(0, blocks, step):
        some = slice(first, first + step)
        own = Folded(*[t[some] for t in p.tensors()])
        before, y = (t[some].reshape(-1, batch * time, d) for t in (x, out))
        qkv = torch.baddbmm(own.qkv_bias[:, None], F.layer_norm(before, (d,)), own.qkv)
        a = _causal_attention(qkv.view(-1, time, 3 * d), heads)
        torch.baddbmm(before, a.view(before.shape), own.out, out=y)
        h = torch.baddbmm(own.mlp_in_bias[:, None], F.layer_norm(y, (d,)), own.mlp_in)
        torch._C._nn.gelu(h, out=h)
        y.add_(own.mlp_out_bias[:, None]).baddbmm_(h, own.mlp_out)
    return out


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
