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
from functools import cached_property
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from k1.block import Layout, block_forward, child_logits, fold
from k1.config import Config
from k1.evidence import hash_bigrams, history_mask, kernel_fits, levels_evidence
from k1.frozen import Known, plain_norm, run_frozen
from k1.head import mean_cross_entropy, token_cross_entropy
from k1.kernels import AVAILABLE
from k1.large import run_alone, runs_alone
from k1.levels import LevelIndex
from k1.mixing import flat_index, mix, sibling_softmax, to_children

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
    """int64 [L, B, T]: bucket of each token with its predecessor."""
    context: Tensor
    """int64 [L, B, T]: bucket of the predecessor."""
    starts: Tensor
    """bool [L, B, T]: a document begins here."""
    valid: Tensor
    """bool [L, B, T]: there is a predecessor in the same document."""

    def head(self, windows: int) -> Text:
        """Return the first windows of each lane."""
        all_windows = self.bigram, self.context, self.starts, self.valid
        return Text(*[t[:, :windows].contiguous() for t in all_windows])

    @cached_property
    def mask(self) -> Tensor:
        """What `history_mask` says of the document boundaries."""
        return history_mask(self.starts)


def read_text(batch: Batch, config: Config) -> Text:
    """Hash a batch's bigrams and find its document boundaries."""
    bigram, context = hash_bigrams(batch.inputs, config.evidence)
    first = torch.arange(batch.inputs.shape[-1], device=batch.inputs.device) == 0
    return Text(bigram, context, batch.starts, ~batch.starts & ~first)


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
    """float32 [L, W] of each level, or [L, W, N] if tokens have priors of their own."""
    counts: list[Tensor]
    """int64 [L, W, 3, H] of each level."""


@dataclass(frozen=True)
class Forest:
    """Some lanes' trees with all their numbers, as views of the arena."""

    rows: Tensor
    """Every slot's parameters [L, S, P]."""
    shared: Tensor
    """The shared rows [L, Q]."""
    block_layout: Layout
    shared_layout: Layout
    levels: list[LevelIndex]
    router: RouterState
    config: Config
    depth: Tensor
    """int64 [L, S]: blocks on the way from the root to each block; 0 where there is none."""

    def weights(self) -> Weights:
        """View the parameters level by level."""
        levels = [self.rows[:, i.offset : i.offset + i.width] for i in self.levels]
        return Weights(levels, self.shared, self.block_layout, self.shared_layout)


@dataclass(frozen=True)
class Activations:
    """Everything a forward pass leaves behind."""

    y: list[Tensor]
    """Block outputs [L, W, N, d] of each level."""
    m: list[Tensor]
    """Mixed values [L, W, N, d] of each level."""
    prior: list[Tensor]
    """Log prior plus evidence of each level's blocks [L, W, N or 1]; entry 0 is unused."""
    share: list[Tensor]
    """float32 [L, W, N]: the weight of each level's blocks among their siblings; entry 0 is
    unused."""

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


def normed_output(pieces: dict[str, Tensor], hidden: Tensor) -> Tensor:
    """Take hidden values [L, N, d] through the final norm."""
    gain, shift = (pieces[f"norm.{name}"][:, None].to(hidden.dtype) for name in ("weight", "bias"))
    return torch.addcmul(shift, F.layer_norm(hidden, (hidden.shape[-1],)), gain)


def token_losses(pieces: dict[str, Tensor], hidden: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy in nats of every token: hidden [L, N, d], targets [L, B, T] -> [L, N].

    Without a gradient; `lane_loss` has one.
    """
    hidden = normed_output(pieces, hidden)
    return token_cross_entropy(hidden, pieces["head"], targets.flatten(1))


def logits(weights: Weights, hidden: Tensor) -> Tensor:
    """Next-token logits [L, N, vocabulary] of mixed root values [L, N, d]."""
    pieces = weights.shared_layout.unpack(weights.shared)
    return torch.bmm(normed_output(pieces, hidden), pieces["head"])


def run_level(pieces: dict[str, Tensor], x: Tensor, config: Config) -> Tensor:
    """Run all blocks of a level on their inputs [L, W, B, T, d]; returns outputs [L, W, N, d].

    Args:
        pieces: of `block_layout`, each [L * W, ...].
        x: the inputs, in the dtype of the arithmetic.
        config: the sizes.
    """
    y = block_forward(fold(pieces, x.dtype), x.flatten(0, 1), config.model.heads)
    return y.view(*x.shape[:2], -1, x.shape[-1])


def learned_logits(pieces: dict[str, Tensor], y: Tensor, normed: Tensor | None = None) -> Tensor:
    """Routing logits [L, W, K, N] of blocks with outputs y [L, W, N, d].

    `normed`, the same after a norm [L * W, N, d], is worked out if it is not given.
    """
    lanes, width = y.shape[:2]
    if normed is None:
        normed = F.layer_norm(y.flatten(0, 1), (y.shape[-1],))
    out = child_logits(pieces, normed)
    return out.transpose(1, 2).unflatten(0, (lanes, width))


def forward(
    weights: Weights,
    router: RouterState,
    levels: list[LevelIndex],
    batch: Batch,
    text: Text,
    config: Config,
    known: list[Known] | None = None,
) -> Activations:
    """Run whole trees. Keeps a graph if the weights require gradients.

    Args:
        weights: the parameters.
        router: what routing needs besides.
        levels: the trees.
        batch: the windows.
        text: the same as the routers see them.
        config: the sizes.
        known: of each level, blocks that need not run. On a CPU, without a graph.
    """
    pieces = [
        weights.block_layout.unpack(weights.levels[index.level].flatten(0, 1)) for index in levels
    ]
    x = embed(weights.shared_layout.unpack(weights.shared), batch.inputs).to(arithmetic(config))
    ys, normed = _run_levels(pieces, x[:, None], levels, config, known)
    kernels = x.is_cuda and AVAILABLE and not torch.is_grad_enabled()
    prior = priors(router, levels, text, config, kernels)
    m: list[Tensor] = [ys[-1]]
    share: list[Tensor] = []
    for parent, child in reversed(list(pairwise(levels))):
        y, below = ys[parent.level], prior[child.level]
        own = pieces[parent.level] if config.model.router != "mean" else None
        if kernels:
            mixed, weight = _mix_by_kernel(y, m[0], below, own, parent, child)
        else:
            mixed, weight = _mix(y, m[0], below, own, normed[child.level], parent, child)
        m.insert(0, mixed)
        share.insert(0, weight)
    return Activations(ys, m, prior, [prior[0], *share])


def _run_levels(
    pieces: list[dict[str, Tensor]],
    x: Tensor,
    levels: list[LevelIndex],
    config: Config,
    known: list[Known] | None,
) -> tuple[list[Tensor], list[Tensor | None]]:
    """Run all blocks: outputs [L, W, N, d] of each level, and their inputs' norms where at hand.

    The norm of a level's inputs [L * W_above, N, d] is that of the outputs of the level above.
    """
    time, heads = x.shape[3], config.model.heads
    ys: list[Tensor] = []
    normed: list[Tensor | None] = []
    above = x.flatten(2, 3)
    frozen = not torch.is_grad_enabled() and not x.is_cuda
    alone = runs_alone(above, config)
    for index in levels:
        own, norm = pieces[index.level], None
        if frozen:
            there = known[index.level] if known else None
            if there is not None and len(there.at) == len(index.row):
                y = there.y
            else:
                inputs = above.flatten(0, 1)
                norm = plain_norm(inputs)
                source = flat_index(index.parent, above.shape[1])
                y = run_frozen(fold(own, x.dtype), inputs, norm, source, time, heads, there)
            above = y.view(-1, index.width, *y.shape[1:])
        elif alone:
            above = run_alone(own, above, index, time, heads)
        else:
            windows = above.unflatten(2, x.shape[2:4])
            if index.level:
                windows = to_children(windows, levels[index.level - 1], index)
            above = run_level(own, windows, config)
        ys.append(above)
        normed.append(norm)
    return ys, normed


def _mix(
    y: Tensor,
    m: Tensor,
    prior: Tensor,
    pieces: dict[str, Tensor] | None,
    normed: Tensor | None,
    parent: LevelIndex,
    child: LevelIndex,
) -> tuple[Tensor, Tensor]:
    """Mixed values of a level's blocks, and their children's weights; a router if it is learned."""
    learned = None if pieces is None else learned_logits(pieces, y, normed)
    weight = sibling_softmax(prior, learned, parent, child)
    mixed = mix(m, weight.to(y.dtype), parent, child)
    if parent.any_leaf:
        mixed = torch.where(parent.is_leaf[..., None, None], y, mixed)
    return mixed, weight


def _mix_by_kernel(
    y: Tensor,
    m: Tensor,
    prior: Tensor,
    pieces: dict[str, Tensor] | None,
    parent: LevelIndex,
    child: LevelIndex,
) -> tuple[Tensor, Tensor]:
    """Do the same as `_mix` on CUDA, without a graph."""
    from k1.kernels.mix import mix_frozen

    weight = torch.zeros(*child.alive.shape, y.shape[2], device=y.device)
    shape = parent.alive.shape
    router = [
        None if pieces is None else pieces[name].unflatten(0, shape)
        for name in ("router.weight", "router.bias")
    ]
    return mix_frozen(y, m, prior, router[0], router[1], weight, parent, child), weight


def priors(
    router: RouterState, levels: list[LevelIndex], text: Text, config: Config, fused: bool = False
) -> list[Tensor]:
    """Log prior plus evidence of each level's blocks [L, W, N or 1]; entry 0 is unused.

    The kernel for the evidence is used if `fused`, and if it takes windows of this length.
    """
    own = router.log_prior[: len(levels)]
    result = [prior if prior.dim() == 3 else prior[..., None] for prior in own]
    if config.model.router != "evidence" or len(levels) == 1:
        return result
    ev = config.evidence
    if fused and kernel_fits(text.bigram.shape[-1]):
        from k1.kernels.evidence import level_evidence_fused

        values = [
            level_evidence_fused(
                router.counts[child.level],
                parent,
                child,
                text.bigram,
                text.context,
                text.starts,
                ev,
            )
            for parent, child in pairwise(levels)
        ]
    else:
        counts = router.counts[1 : len(levels)]
        values = levels_evidence(counts, levels[1:], text.bigram, text.context, text.mask, ev)
    return [result[0], *[prior + value for prior, value in zip(result[1:], values, strict=True)]]


def arithmetic(config: Config) -> torch.dtype:
    """Dtype of the blocks' arithmetic."""
    return torch.bfloat16 if config.train.precision == "bfloat16" else torch.float32


def lane_loss(weights: Weights, hidden: Tensor, batch: Batch) -> Tensor:
    """Mean cross-entropy per lane in nats per token [L]."""
    pieces = weights.shared_layout.unpack(weights.shared)
    hidden = normed_output(pieces, hidden)
    return mean_cross_entropy(hidden, pieces["head"], batch.targets.flatten(1))
