"""Progressive networks (Rusu et al. 2016): a tree of its own for each domain, fed by earlier ones.

A column is a tree with its shared part. Earlier columns stand still; what their blocks make of the
text goes into the newest one at the same places: to the output of each block that has children, and
to the mixture of all of them, which the head reads, is added the normed output of the same block of
each earlier column times a matrix that is learnt. Differences from the paper: these adapters are a
norm and one matrix, without a hidden layer, and they begin at zero, so that a column begins as a
tree alone; and a column's trees mix all their blocks' outputs, as trees do here.

Which column reads a text is inferred (`k1.experiments.inferred`).

Shapes: L lanes, Q earlier columns, A places that adapters feed (slots above the leaves, and the
output), W blocks of a level, N tokens, d = embed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from k1.arena import Arena
from k1.engine import Engine
from k1.experiments.inferred import InferringLearner, Reading
from k1.experiments.learner import Learner
from k1.flops import block_flops_per_token
from k1.forward import (
    Activations,
    Batch,
    Forest,
    Text,
    arithmetic,
    embed,
    lane_loss,
    learned_logits,
    run_level,
    token_losses,
)
from k1.mixing import mix, sibling_softmax, to_children
from k1.optimizer import Rows, adamw, clip_factor
from k1.path import as_leaf
from k1.records import FullGradients, StepResult
from k1.sampling import TokenStore
from k1.update import learning_rate


@dataclass(frozen=True)
class Column:
    """Trees of some lanes, and what feeds them."""

    forest: Forest
    lateral: Tensor
    """Adapters from each earlier column [L, Q, A, d, d]."""

    def lanes(self, start: int, stop: int, like: Forest) -> Column:
        """View some lanes; `like` is a forest of these."""
        rows, shared = self.forest.rows[start:stop], self.forest.shared[start:stop]
        return Column(replace(like, rows=rows, shared=shared), self.lateral[start:stop])


def run_column(column: Column, batch: Batch, earlier: Sequence[Activations]) -> Activations:
    """Run a column; `earlier` is what the earlier ones made of the batch, in their order."""
    forest, config = column.forest, column.forest.config
    weights, levels = forest.weights(), forest.levels
    pieces = [forest.block_layout.unpack(rows.flatten(0, 1)) for rows in weights.levels]
    x = embed(forest.shared_layout.unpack(forest.shared), batch.inputs).to(arithmetic(config))
    y = run_level(pieces[0], x[:, None], config)
    ys = []
    for index in levels:
        if index.level:
            windows = y.unflatten(2, batch.inputs.shape[1:])
            windows = to_children(windows, levels[index.level - 1], index)
            y = run_level(pieces[index.level], windows, config)
        if index is not levels[-1]:
            places = slice(index.offset, index.offset + index.width)
            y = y + from_earlier(column.lateral[:, :, places], [e.y[index.level] for e in earlier])
        ys.append(y)
    m, shares = [y], list[Tensor]()
    for parent, child in reversed(list(pairwise(levels))):
        learned = learned_logits(pieces[parent.level], ys[parent.level])
        prior = forest.router.log_prior[child.level][..., None]
        share = sibling_softmax(prior, learned, parent, child)
        mixed = mix(m[0], share.to(y.dtype), parent, child)
        if parent.any_leaf:
            mixed = torch.where(parent.is_leaf[..., None, None], ys[parent.level], mixed)
        m.insert(0, mixed)
        shares.insert(0, share)
    m[0] = m[0] + from_earlier(column.lateral[:, :, -1:], [e.m[0] for e in earlier])
    return Activations(ys, m, [], shares)


def from_earlier(lateral: Tensor, earlier: Sequence[Tensor]) -> Tensor | float:
    """What goes from outputs [L, W, N, d] of earlier columns' blocks into the same blocks of one.

    Args:
        lateral: adapters [L, Q, W, d, d].
        earlier: the outputs of each of the Q columns.
    """
    fed = [
        F.layer_norm(y, y.shape[-1:]) @ lateral[:, number].to(y.dtype)
        for number, y in enumerate(earlier)
    ]
    return sum(fed[1:], fed[0]) if fed else 0.0


def run_columns(columns: Sequence[Column], batch: Batch) -> list[Activations]:
    """Run columns, each fed by those before it."""
    done: list[Activations] = []
    for column in columns:
        done.append(run_column(column, batch, done))
    return done


class ProgressiveEngine(Engine):
    """Trains the newest column."""

    def __init__(
        self, arena: Arena, store: TokenStore, chunk: int | None, earlier: Sequence[Column]
    ) -> None:
        """Bind an arena, which holds the newest column, and earlier ones, which stay."""
        super().__init__(arena, store, chunk, fused=False)
        self.earlier = list(earlier)
        d, places = arena.config.model.embed, arena.index(0, arena.lanes)[-1].offset + 1
        self.lateral, self._first, self._second, self._gradient = (
            torch.zeros(arena.lanes, len(self.earlier), places, d, d, device=arena.device)
            for _ in range(4)
        )
        self._steps = torch.zeros(self.lateral.shape[:3], dtype=torch.int64, device=arena.device)

    def columns(self, start: int, stop: int) -> list[Column]:
        """All columns of lanes start..stop, the newest last."""
        forest = self.arena.forest(start, stop)
        done = [column.lanes(start, stop, forest) for column in self.earlier]
        return [*done, Column(forest, self.lateral[start:stop])]

    def _all_gradients(self, start: int, stop: int, batch: Batch, text: Text) -> FullGradients:
        a, (*earlier, newest) = self.arena, self.columns(start, stop)
        with torch.no_grad():
            fed = run_columns(earlier, batch)
        forest = newest.forest
        rows, shared, lateral = map(as_leaf, (forest.rows, forest.shared, newest.lateral))
        learning = Column(replace(forest, rows=rows, shared=shared), lateral)
        done = run_column(learning, batch, fed)
        loss = lane_loss(learning.forest.weights(), done.output, batch)
        by_row, by_shared, by_lateral = torch.autograd.grad(
            loss.sum(), [rows, shared, lateral], allow_unused=True, materialize_grads=True
        )
        self._gradient[start:stop] = by_lateral
        measured = torch.linalg.vector_norm(by_row, dim=-1)
        everyone = torch.arange(by_row.shape[0] * by_row.shape[1], device=a.device)
        flat = [(everyone, by_row.flatten(0, 1))]
        return FullGradients(loss.detach(), measured, flat, by_shared, done)

    def _full(self, start: int, stop: int, batch: Batch, text: Text) -> StepResult:
        result = super()._full(start, stop, batch, text)
        self._move_lateral(slice(start, stop), result.fine)
        return result

    def _move_lateral(self, lanes: slice, fine: Tensor) -> None:
        """Make the optimizer step of adapters; they are clipped by their own norm."""
        optimizer = self.arena.config.optimizer
        gradient = self._gradient[lanes].flatten(3)
        square = gradient.square().sum((1, 2, 3))
        on = (fine & torch.isfinite(square))[:, None, None].expand(gradient.shape[:3])
        state = self.lateral, self._first, self._second
        weight, first, second = (t[lanes].flatten(3) for t in state)
        factor = clip_factor(square, optimizer.clip)[:, None, None]
        rate = learning_rate(self.arena, lanes)[:, None, None]
        old = Rows(weight, first, second, self._steps[lanes])
        new = adamw(old, gradient * factor[..., None], rate.expand_as(on), on, optimizer)
        for target, value in zip(vars(old).values(), vars(new).values(), strict=True):
            target.copy_(value)


class ProgressiveLearner(InferringLearner):
    """A column for each domain, fed by earlier ones; which of them reads a text is inferred."""

    engine: ProgressiveEngine

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Fill an arena with the first columns."""
        self.earlier: list[Column] = []
        super().__init__(*args, **kwargs)

    def make_engine(self) -> Engine:
        """Build an engine for the present column."""
        return ProgressiveEngine(self.arena, self.store, self.chunk, self.earlier)

    def begin(self, phase: int) -> None:
        """Put the last column away, and begin a fresh one."""
        if phase:
            (*_, last) = self.engine.columns(0, self.lanes)
            rows, shared = last.forest.rows.clone(), last.forest.shared.clone()
            self.earlier.append(
                Column(replace(last.forest, rows=rows, shared=shared), last.lateral)
            )
            for lane in range(self.lanes):
                self.fresh(lane)
        super().begin(phase)

    def reading(self, start: int, stop: int) -> Reading:
        """Read with each column."""
        columns = self.engine.columns(start, stop)
        heads = [c.forest.shared_layout.unpack(c.forest.shared) for c in columns]

        def read(batch: Batch) -> Tensor:
            done = run_columns(columns, batch)
            pairs = zip(heads, done, strict=True)
            return torch.stack([token_losses(h, d.output, batch.targets) for h, d in pairs])

        return read

    @property
    def adapters(self) -> int:
        """Adapters that one column gets from another, by the places that are in use."""
        tree = self.arena.trees[0]
        return sum(not tree.is_leaf(slot) for slot in tree.blocks) + 1

    def parameters(self, lane: int) -> int:
        """Parameters of all columns so far and of all adapters between them."""
        pairs = self.phase * (self.phase + 1) // 2
        adapters = pairs * self.adapters * self.arena.config.model.embed**2
        return (self.phase + 1) * super().parameters(lane) + adapters

    def moving(self, lane: int) -> float:
        """Share of all columns' parameters that the newest one and its adapters are."""
        own = Learner.parameters(self, lane)
        own += self.phase * self.adapters * self.arena.config.model.embed**2
        return own / self.parameters(lane)

    def step_flops(self, lane: int = 0, updated: float | None = None) -> float:
        """A dense step of the newest column, earlier ones forward, and the adapters of all."""
        a, config = self.arena, self.arena.config
        tokens = config.train.batch * config.model.context
        blocks = len(a.trees[lane].blocks)
        forward = self.phase * blocks * block_flops_per_token(config)
        # Back through an adapter is one product, not two: what feeds it needs no gradient.
        pairs = 2 * self.phase + self.phase * (self.phase - 1) / 2
        forward += pairs * self.adapters * 2 * config.model.embed**2
        return super().step_flops(lane, updated) + tokens * forward
