"""One transformer block, for any number of blocks at once.

All parameters of a block lie in one row of P numbers, so that the arena is a matrix of blocks, a
block's responsibility is a row norm and its optimizer step touches one row. `BlockLayout` says what
lies where.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.attention import SDPBackend, sdpa_kernel

from k1.config import ModelConfig

# The other fused kernel's backward pass is not reproducible on CUDA.
_BACKENDS = [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]

_EPS = 1e-5
"""Added to the variance in norms: `F.layer_norm`'s own."""


@dataclass(frozen=True)
class Layout:
    """Named pieces of a parameter row."""

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]

    @cached_property
    def sizes(self) -> list[int]:
        """Numbers in each piece."""
        return [math.prod(shape) for shape in self.shapes]

    @property
    def starts(self) -> list[int]:
        """Where each piece begins in a row."""
        return [sum(self.sizes[:i]) for i in range(len(self.sizes))]

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
            name: piece.view(*lead, *shape) if len(shape) > 1 else piece
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


def fused_attention(qkv: Tensor, heads: int) -> Tensor:
    """Causal attention on CUDA: [sequences, time, 3 * embed] -> [sequences, time, embed]."""
    sequences, time, width = qkv.shape
    d = width // 3
    q, k, v = qkv.view(sequences, time, 3, heads, d // heads).permute(2, 0, 3, 1, 4).unbind(0)
    with sdpa_kernel(_BACKENDS):
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    return out.transpose(1, 2).reshape(sequences, time, d)


@lru_cache(maxsize=16)
def causal_mask(time: int, dtype: torch.dtype) -> Tensor:
    """On a CPU, -inf above the diagonal: [time, time]; the same tensor every time."""
    with torch.inference_mode(False):  # whoever asks first, it is good for gradients later
        return torch.full((time, time), -torch.inf, dtype=dtype).triu(1)


def by_head(qkv: Tensor, heads: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Queries, keys and values of each head [sequences, time, embed / heads], where they lie."""
    pieces = qkv.split(qkv.shape[-1] // (3 * heads), dim=-1)
    return zip(pieces[:heads], pieces[heads : 2 * heads], pieces[2 * heads :], strict=True)


def attend(qkv: Tensor, heads: int, mask: Tensor, weights: list[Tensor], out: Tensor) -> None:
    """Causal attention on a CPU, written to `out` [sequences, time, embed].

    Narrow heads are 2-4 times faster as plain products than in torch's fused kernel; head by head,
    they read the projections in place.

    Args:
        qkv: [sequences, time, 3 * embed].
        heads: attention heads.
        mask: [time, time]: -inf above the diagonal.
        weights: for each head, where its weights [sequences, time, time] go.
        out: the result.
    """
    outs = []
    for (q, k, v), scores in zip(by_head(qkv, heads), weights, strict=True):
        torch.baddbmm(mask, q, k.transpose(1, 2), alpha=q.shape[-1] ** -0.5, out=scores)
        outs.append(torch.bmm(torch.softmax(scores, dim=-1, out=scores), v))
    torch.cat(outs, dim=-1, out=out)


def _attention_backward(qkv: Tensor, weights: Iterable[Tensor], grad: Tensor, heads: int) -> Tensor:
    """Gradient of the projections [sequences, time, 3 * embed] from that of `_attention`."""
    by_q, by_k, by_v = [], [], []
    width = grad.shape[-1] // heads
    parts = zip(by_head(qkv, heads), weights, grad.split(width, dim=-1), strict=True)
    for (q, k, v), weight, out in parts:
        by_weight = torch.bmm(out, v.transpose(1, 2))
        scores = torch._softmax_backward_data(by_weight, weight, -1, weight.dtype)
        by_q.append(torch.bmm(scores, k))
        by_k.append(torch.bmm(scores.transpose(1, 2), q))
        by_v.append(torch.bmm(weight.transpose(1, 2), out))
    by_qkv = torch.cat([*by_q, *by_k, *by_v], dim=-1)
    by_qkv[..., : 2 * grad.shape[-1]].mul_(width**-0.5)
    return by_qkv


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

    def cut(self, start: int, stop: int) -> Folded:
        """View some of the blocks."""
        return Folded(*[t[start:stop] for t in self.tensors()])


def fold(p: dict[str, Tensor], dtype: torch.dtype) -> Folded:
    """Fold the norms of blocks, given as pieces of `block_layout`, each [blocks, ...]."""
    gain_1, gain_2 = p["norm1.weight"][..., None], p["norm2.weight"][..., None]
    qkv, mlp_in = p["attention.qkv"], p["mlp.in"]
    qkv_bias = torch.bmm(p["norm1.bias"][:, None], qkv)[:, 0]
    in_bias = p["mlp.in_bias"] + torch.bmm(p["norm2.bias"][:, None], mlp_in)[:, 0]
    return Folded(
        (gain_1 * qkv).to(dtype),
        qkv_bias.to(dtype),
        p["attention.out"].to(dtype),
        (gain_2 * mlp_in).to(dtype),
        in_bias.to(dtype),
        p["mlp.out"].to(dtype),
        p["mlp.out_bias"].to(dtype),
    )


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
    if x.is_cuda:
        x = x.reshape(blocks, batch * time, d)
        qkv = torch.baddbmm(p.qkv_bias[:, None], F.layer_norm(x, (d,)), p.qkv)
        a = fused_attention(qkv.view(blocks * batch, time, 3 * d), heads)
        x = torch.baddbmm(x, a.view(blocks, batch * time, d), p.out)
        h = torch.baddbmm(p.mlp_in_bias[:, None], F.layer_norm(x, (d,)), p.mlp_in)
        x = x + p.mlp_out_bias[:, None]
        x = torch.baddbmm(x, F.gelu(h), p.mlp_out)
        return x.view(blocks, batch, time, d)
    out: Tensor = _Blocks.apply(x, heads, *p.tensors())
    return out


def norm_keeping(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Layer norm without gain and shift [..., d], and the moments that `norm_back` needs."""
    return torch.native_layer_norm(x, x.shape[-1:], None, None, _EPS)


def norm_back(by_normed: Tensor, x: Tensor, mean: Tensor, rstd: Tensor) -> Tensor:
    """Gradient of the input x of a norm, given that of its result."""
    which = [True, False, False]
    by_x: Tensor = torch.ops.aten.native_layer_norm_backward(
        by_normed, x, x.shape[-1:], mean, rstd, None, None, which
    )[0]
    return by_x


def run_keeping(p: Folded, x: Tensor, heads: int, y: Tensor) -> list[Tensor]:
    """Write the outputs of blocks to `y` on a CPU; return what `go_back` needs."""
    blocks, batch, time, d = x.shape
    x, y = (t.reshape(blocks, batch * time, d) for t in (x, y))
    normed, *moments = norm_keeping(x)
    qkv = torch.baddbmm(p.qkv_bias[:, None], normed, p.qkv).view(blocks * batch, time, 3 * d)
    mask = causal_mask(time, x.dtype)
    weights = [x.new_empty(blocks * batch, time, time) for _ in range(heads)]
    a = x.new_empty(blocks, batch * time, d)
    attend(qkv, heads, mask, weights, a.view(blocks * batch, time, d))
    middle = torch.baddbmm(x, a, p.out)
    normed_2, *moments_2 = norm_keeping(middle)
    h = torch.baddbmm(p.mlp_in_bias[:, None], normed_2, p.mlp_in)
    active = F.gelu(h)
    torch.add(middle, p.mlp_out_bias[:, None], out=y).baddbmm_(active, p.mlp_out)
    return [normed, *moments, qkv, a, middle, normed_2, *moments_2, h, active, *weights]


def go_back(
    p: Folded, x: Tensor, kept: Sequence[Tensor], heads: int, dy: Tensor, by: Folded
) -> Tensor:
    """Go back through blocks on a CPU.

    Args:
        p: the blocks' weights.
        x: their inputs [blocks, batch, time, embed].
        kept: what `run_keeping` returned.
        heads: attention heads.
        dy: the gradient of their outputs, of the same shape.
        by: where the gradients of the weights go.

    Returns:
        The gradient of the inputs, of the same shape.
    """
    normed, mean, rstd, qkv, a, middle, normed_2, mean_2, rstd_2, h, active, *weights = kept
    flat, d = a.shape, x.shape[-1]
    dy = dy.reshape(flat)

    def back(rows: Tensor, weight: Tensor, out: Tensor, by_weight: Tensor) -> Tensor:
        torch.bmm(rows.transpose(1, 2), out, out=by_weight)
        return torch.bmm(out, weight.transpose(1, 2))

    torch.sum(dy, 1, out=by.mlp_out_bias)
    by_h = torch.ops.aten.gelu_backward(back(active, p.mlp_out, dy, by.mlp_out), h)
    torch.sum(by_h, 1, out=by.mlp_in_bias)
    by_normed = back(normed_2, p.mlp_in, by_h, by.mlp_in)
    by_middle = norm_back(by_normed, middle, mean_2, rstd_2).add_(dy)
    by_a = back(a, p.out, by_middle, by.out)
    by_qkv = _attention_backward(qkv, weights, by_a.view(qkv.shape[0], -1, d), heads)
    by_qkv = by_qkv.view(*flat[:2], -1)
    torch.sum(by_qkv, 1, out=by.qkv_bias)
    by_normed = back(normed, p.qkv, by_qkv, by.qkv)
    return norm_back(by_normed, x.reshape(flat), mean, rstd).add_(by_middle).view_as(x)


class _Blocks(torch.autograd.Function):
    """Blocks with gradients on a CPU: written out, for torch's own graph costs much there."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, heads: int, *weights: Tensor) -> Tensor:
        y = x.new_empty(x.shape)
        kept = run_keeping(Folded(*weights), x, heads, y)
        ctx.heads = heads
        ctx.save_for_backward(x, *weights, *kept)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, *saved = ctx.saved_tensors
        p = Folded(*saved[:7])
        by = Folded(*[torch.empty_like(t) for t in p.tensors()])
        return go_back(p, x, saved[7:], ctx.heads, grad, by), None, *by.tensors()


def child_logits(p: dict[str, Tensor], normed: Tensor) -> Tensor:
    """Learned routing logits of blocks over their children.

    Args:
        p: pieces of `block_layout`, each [blocks, ...].
        normed: the blocks' outputs [blocks, tokens, embed] after a norm without gain and shift.

    Returns:
        float32 [blocks, tokens, max_children].
    """
    weight = p["router.weight"].to(normed.dtype)
    return torch.bmm(normed, weight).float() + p["router.bias"][:, None]
