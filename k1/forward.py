"""The forward pass of whole trees, level by level, all lanes and blocks of a level at once.

Down the tree `y_child = block_child(y_parent)`; up the tree `m_leaf = y_leaf` and
`m_parent = sum over children of weight * m_child`; the output is `head(norm(m_root))`.

Shapes: L lanes, W blocks of a level (its width), B windows, T tokens, N = B * T, d = embed,
K = most children.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from k1.block import Layout, block_forward, child_logits
from k1.config import Config
from k1.evidence import hash_bigrams, history_mask, level_evidence
from k1.head import mean_cross_entropy, token_cross_entropy
from k1.mixing import Routing, mix, sibling_softmax, to_children
from k1.topology import LevelIndex

LN2 = math.log(2.0)


@dataclass(frozen=True)
class Batch:
    """Windows of text for several lanes."""

    inputs: Tensor
    """int64 [L, B, T]."""
    targets: Tensor
    """int64 [L, B, T]: the token after each input."""
    starts: Tensor
    """bool [L, B, T]: a document begins at this input."""
    domain: Tensor
    """int64 [L, B]: index of each window's domain."""

    def head(self, windows: int) -> Batch:
        """Return the first windows of each lane."""
        return self.map(lambda t: t[:, :windows])

    def map(self, function: Callable[[Tensor], Tensor]) -> Batch:
        """Apply a function to every tensor."""
        return Batch(
            function(self.inputs),
            function(self.targets),
            function(self.starts),
            function(self.domain),
        )


@dataclass(frozen=True)
class Text:
    """A batch as the routers see it."""

    bigram: Tensor
    context: Tensor
    mask: Tensor
    valid: Tensor


def read_text(batch: Batch, config: Config) -> Text:
    """Hash a batch's bigrams and find its document boundaries."""
    bigram, context = hash_bigrams(batch.inputs, config.evidence)
    first = torch.arange(batch.inputs.shape[-1], device=batch.inputs.device) == 0
    return Text(bigram, context, history_mask(batch.starts), ~batch.starts & ~first)


@dataclass(frozen=True)
class Weights:
    """The parameters of a forward pass."""

    levels: list[Tensor]
    """Rows of each level [L, W, P]."""
    shared: Tensor
    """The shared row [L, Q]."""
    block_layout: Layout
    shared_layout: Layout


@dataclass(frozen=True)
class RouterState:
    """What routing needs besides parameters."""

    log_prior: list[Tensor]
    """float32 [L, W] of each level."""
    counts: list[Tensor]
    """int64 [L, W, 3, H] of each level."""


@dataclass(frozen=True)
class Activations:
    """Everything a forward pass leaves behind."""

    y: list[Tensor]
    """Block outputs [L, W, N, d] of each level."""
    m: list[Tensor]
    """Mixed values [L, W, N, d] of each level."""
    prior: list[Tensor]
    """Log prior plus evidence of each level's blocks [L, W, N or 1]; entry 0 is unused."""
    routing: list[Routing]
    """Routing of each level's blocks over the next level."""

    @property
    def output(self) -> Tensor:
        """The root's mixed value [L, N, d]."""
        return self.m[0][:, 0]


def embed(pieces: dict[str, Tensor], inputs: Tensor) -> Tensor:
    """Embed tokens int64 [L, B, T] with the shared pieces: float32 [L, B, T, d]."""
    table = pieces["embedding"]
    lanes, vocab, d = table.shape
    index = inputs + torch.arange(lanes, device=inputs.device).view(-1, 1, 1) * vocab
    x = F.embedding(index, table.reshape(lanes * vocab, d))
    return x + pieces["position"][:, None, : inputs.shape[-1]]


def _head(pieces: dict[str, Tensor], hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Normed hidden values, and a head and a bias that hold the gain and shift of that norm.

    `(n(x) * gain + shift) @ head = n(x) @ (gain[:, None] * head) + shift @ head`: hidden values
    [L, N, d] -> [L, N, d], float32 [L, d, V], float32 [L, V].
    """
    gain, shift, head = pieces["norm.weight"], pieces["norm.bias"], pieces["head"]
    bias = torch.bmm(shift[:, None], head)[:, 0]
    return F.layer_norm(hidden, (hidden.shape[-1],)), gain[..., None] * head, bias


def token_losses(pieces: dict[str, Tensor], hidden: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy in nats of every token: hidden [L, N, d], targets [L, B, T] -> [L, N].

    Without a gradient; `lane_loss` has one.
    """
    return token_cross_entropy(*_head(pieces, hidden), targets.flatten(1))


def logits(weights: Weights, hidden: Tensor) -> Tensor:
    """Next-token logits [L, N, vocabulary] of mixed root values [L, N, d]."""
    h, head, bias = _head(weights.shared_layout.unpack(weights.shared), hidden)
    return torch.baddbmm(bias[:, None], h, head)


def run_level(weights: Weights, level: int, x: Tensor, heads: int) -> tuple[dict, Tensor]:
    """Run all blocks of a level on their inputs [L, W, B, T, d]; returns (pieces, outputs)."""
    lanes, width = x.shape[:2]
    pieces = weights.block_layout.unpack(weights.levels[level].flatten(0, 1))
    y = block_forward(pieces, x.flatten(0, 1), heads)
    return pieces, y.view(lanes, width, *y.shape[1:])


def learned_logits(pieces: dict[str, Tensor], y: Tensor) -> Tensor:
    """Routing logits [L, W, K, N] of blocks with outputs y [L, W, N, d]."""
    lanes, width = y.shape[:2]
    out = child_logits(pieces, y.flatten(0, 1))
    return out.transpose(1, 2).unflatten(0, (lanes, width))


def forward(
    weights: Weights,
    router: RouterState,
    levels: list[LevelIndex],
    batch: Batch,
    text: Text,
    config: Config,
) -> Activations:
    """Run whole trees. Keeps a graph if the weights require gradients."""
    kind, dtype = config.model.router, _dtype(config)
    _, b, t = batch.inputs.shape
    x = embed(weights.shared_layout.unpack(weights.shared), batch.inputs).to(dtype)[:, None]
    ys: list[Tensor] = []
    pieces: list[dict[str, Tensor]] = []
    for index in levels:
        if index.level:
            x = to_children(ys[-1].unflatten(2, (b, t)), levels[index.level - 1], index)
        own, y = run_level(weights, index.level, x, config.model.heads)
        pieces.append(own)
        ys.append(y.flatten(2, 3))
    m: list[Tensor] = [ys[-1]]
    routing: list[Routing] = []
    prior = [router.log_prior[0][..., None]]
    for parent, child in pairwise(levels):
        value = router.log_prior[child.level][..., None]
        if kind == "evidence":
            counts = router.counts[child.level]
            value = value + level_evidence(
                counts, parent, child, text.bigram, text.context, text.mask, config.evidence
            )
        prior.append(value)
    for parent, child in reversed(list(pairwise(levels))):
        y = ys[parent.level]
        learned = None if kind == "mean" else learned_logits(pieces[parent.level], y)
        route = sibling_softmax(prior[child.level], learned, parent, child)
        mixed = mix(m[0], route.by_child.to(dtype), parent, child)
        if parent.any_leaf:
            mixed = torch.where(parent.is_leaf[..., None, None], y, mixed)
        m.insert(0, mixed)
        routing.insert(0, route)
    return Activations(ys, m, prior, routing)


def _dtype(config: Config) -> torch.dtype:
    return torch.bfloat16 if config.train.precision == "bfloat16" else torch.float32


def lane_loss(weights: Weights, hidden: Tensor, batch: Batch) -> Tensor:
    """Mean cross-entropy per lane in nats per token [L]."""
    pieces = weights.shared_layout.unpack(weights.shared)
    return mean_cross_entropy(*_head(pieces, hidden), batch.targets.flatten(1))
