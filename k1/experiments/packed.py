"""PackNet (Mallya and Lazebnik 2018): each domain gets weights of its own within one tree.

A domain trains all weights that are free; then the smallest of them are set to zero and free again,
layer by layer, and the rest is trained on. What a domain has kept never moves again, and later
domains use it. Of D domains each keeps a share of 1 / D, so their number has to be known; as in the
paper, gains, shifts and biases belong to the first domain, and each training begins with a fresh
optimizer. Embedding, positions and head are packed like the matrices of the blocks.

What a text is read with is inferred (`k1.experiments.inferred`).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from k1.arena import Arena
from k1.block import Layout
from k1.engine import Engine
from k1.experiments.constrained import ConstrainedEngine, Parts
from k1.experiments.inferred import InferringLearner, Reading, reading_of
from k1.forward import Batch, Forest, Text
from k1.records import StepResult
from k1.sampling import TokenStore

OPTIMIZER = ("first", "second", "count", "shared_first", "shared_second", "shared_count")
FREE = 0
"""Owner of weights that no domain has kept; domain p of the stream, from 0, is owner p + 1."""


class PackedEngine(ConstrainedEngine):
    """A dense engine that moves some weights alone; others stay bit for bit."""

    def __init__(self, arena: Arena, store: TokenStore, chunk: int | None, open_: Parts) -> None:
        """Bind an arena; `open_` holds a bool for each parameter: whether it may move."""
        super().__init__(arena, store, chunk)
        self.open = open_

    def constrain(self, start: int, stop: int, plain: Parts) -> Parts:
        """Drop the gradients of what stays: clipping is by what moves."""
        open_ = self.open.lanes(start, stop)
        return Parts(
            torch.where(open_.blocks, plain.blocks, 0.0),
            torch.where(open_.shared, plain.shared, 0.0),
        )

    def _full(self, start: int, stop: int, batch: Batch, text: Text) -> StepResult:
        here, open_ = (p.lanes(start, stop) for p in (Parts.weights(self.arena), self.open))
        before = here.clone()
        result = super()._full(start, stop, batch, text)
        for now, old, on in zip(here.tensors(), before.tensors(), open_.tensors(), strict=True):
            now.copy_(torch.where(on, now, old))  # weight decay moves what has no gradient
        return result


def largest(weight: Tensor, free: Tensor, share: float) -> Tensor:
    """Find the largest of a layer's free weights: as many as the share of those that are not zero.

    Args:
        weight: [S, n]: the layer in each block.
        free: bool [S, n].
        share: from 0 to 1.

    Returns:
        bool [S, n].
    """
    size = torch.where(free, weight.abs(), 0.0)
    wanted = ((size > 0).sum(1, keepdim=True) * share).round()
    order = size.argsort(dim=1, descending=True, stable=True)
    return order.argsort(dim=1) < wanted


class PackNetLearner(InferringLearner):
    """PackNet with an inferred mask."""

    def __init__(self, *args: Any, pruned_at: float = 2 / 3, **kwargs: Any) -> None:
        """Fill an arena.

        Args:
            *args: as for `Learner`.
            pruned_at: share of a phase after which weights are set free; the rest trains on.
            **kwargs: as for `Learner`.
        """
        self.pruned_at = pruned_at
        self.owner: Parts
        self.open: Parts
        super().__init__(*args, **kwargs)

    def make_engine(self) -> Engine:
        """Build an engine that moves what is open."""
        a = self.arena
        if not self.phase:
            self.owner, self.open = (
                Parts(*(torch.zeros_like(t, dtype=kind) for t in Parts.weights(a).tensors()))
                for kind in (torch.uint8, torch.bool)
            )
            for _, owner, shape in self._layers():
                if len(shape) == 1:
                    owner.fill_(1)
            self._set_open(free=True)
        return PackedEngine(a, self.store, self.chunk, self.open)

    def _layers(self) -> list[tuple[Tensor, Tensor, tuple[int, ...]]]:
        """All layers: weights and owners [L, S or 1, n], as views, and the shape of one."""
        a, found = self.arena, []
        layouts: tuple[Layout, ...] = (a.block_layout, a.shared_layout)
        tensors = zip(Parts.weights(a).tensors(), self.owner.tensors(), layouts, strict=True)
        for weight, owner, layout in tensors:
            pieces = (t.split(layout.sizes, dim=-1) for t in (weight, owner))
            for w, o, shape in zip(*pieces, layout.shapes, strict=True):
                w, o = (t if t.dim() == 3 else t[:, None] for t in (w, o))
                found.append((w, o, shape))
        return found

    def _set_open(self, *, free: bool) -> None:
        """Open what the present domain owns, and what is free if so, with a fresh optimizer."""
        for open_, owner in zip(self.open.tensors(), self.owner.tensors(), strict=True):
            torch.eq(owner, self.phase + 1, out=open_)
            if free:
                open_.logical_or_(owner == FREE)
        for name in OPTIMIZER:
            self.arena[name].zero_()

    def begin(self, phase: int) -> None:
        """Open what is free."""
        super().begin(phase)
        if phase:
            self._set_open(free=True)

    def train(self, done: int, steps: int, total: int) -> None:
        """Make some steps; on the way, the phase's weights may be chosen."""
        at = max(1, round(self.pruned_at * total))
        first = min(max(0, at - done), steps)
        if first:
            super().train(done, first, total)
            if done + first == at:
                self.prune()
        if steps > first:
            super().train(done + first, steps - first, total)

    def prune(self) -> None:
        """Keep the largest free weights for the present domain; the others are zero from now on."""
        share = 1 / (len(self.runs[0].order) - self.phase)
        for weight, owner, _ in self._layers():
            for lane in range(self.lanes):
                free = owner[lane] == FREE
                kept = largest(weight[lane], free, share)
                owner[lane].masked_fill_(kept, self.phase + 1)
                weight[lane].masked_fill_(free & ~kept, 0.0)
        self._set_open(free=False)

    def masked(self, start: int, stop: int, phase: int) -> Forest:
        """The trees as they are for the domain of a phase."""
        forest = self.arena.forest(start, stop)
        if phase == self.phase:
            return forest
        rows, shared = (
            torch.where((owner > FREE) & (owner <= phase + 1), weight, 0.0)
            for owner, weight in zip(
                self.owner.lanes(start, stop).tensors(), (forest.rows, forest.shared), strict=True
            )
        )
        return replace(forest, rows=rows, shared=shared)

    def reading(self, start: int, stop: int) -> Reading:
        """Read with the mask of each domain so far."""
        forests = [self.masked(start, stop, phase) for phase in range(self.phase + 1)]
        return reading_of(self.engine, forests)

    def moving(self, lane: int) -> float:
        """Share of the living parameters that are open."""
        alive = sorted(self.arena.trees[lane].blocks)
        open_ = int(self.open.blocks[lane, alive].sum() + self.open.shared[lane].sum())
        return open_ / self.parameters(lane)
