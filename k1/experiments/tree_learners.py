"""Learners that do something about the tree: one leaf for a domain, growth, trees of their own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from k1.arena import Arena
from k1.attribution import Selection
from k1.edits import add_agent
from k1.engine import Engine
from k1.evidence import add_counts, rotate
from k1.experiments.learner import Learner
from k1.experiments.stream import Views
from k1.rng import derive_seed
from k1.sampling import TokenStore, draw_windows
from k1.topology import ROOT_SLOT


class MaskedEngine(Engine):
    """The drill-down sees some blocks alone: the others' responsibility is taken for nothing."""

    def __init__(
        self, arena: Arena, store: TokenStore, chunk: int | None, open_: Tensor, *, flat: bool
    ) -> None:
        """Bind an arena.

        Args:
            arena: the lanes.
            store: the text.
            chunk: as for `Engine`.
            open_: bool [L, S]: who may be found.
            flat: take all who may be found for equally responsible.
        """
        super().__init__(arena, store, chunk)
        self.open, self.flat = open_, flat

    def _select(self, start: int, stop: int, measured: Tensor) -> Selection:
        open_ = self.open[start:stop]
        seen = open_.to(measured.dtype) if self.flat else torch.where(open_, measured, 0.0)
        return super()._select(start, stop, seen)


class FixedLeafLearner(Learner):
    """One leaf for each domain, drawn by the seed."""

    def make_engine(self) -> Engine:
        """Build an engine that finds the path to the phase's leaf."""
        open_ = torch.zeros(self.lanes, self.arena.scratch + 1, dtype=torch.bool)
        for lane in range(self.lanes):
            open_[lane, self.arena.trees[lane].path(self.leaf(lane))] = True
        return MaskedEngine(
            self.arena, self.store, self.chunk, open_.to(self.arena.device), flat=True
        )

    def leaf(self, lane: int) -> int:
        """Slot of the leaf of the present domain: domains have different ones if they can."""
        tree = self.arena.trees[lane]
        leaves = sorted(slot for slot in tree.blocks if tree.is_leaf(slot))
        generator = torch.Generator().manual_seed(derive_seed("leaf", self.runs[lane].seed))
        order = torch.randperm(len(leaves), generator=generator).tolist()
        return leaves[order[self.phase % len(leaves)]]


class OneCounterEngine(Engine):
    """Adam's bias correction by the lane's steps, as an ordinary optimizer would have it."""

    def _update(self, start: int, stop: int, selection: Selection) -> Any:
        steps = self.arena["step"][start:stop, None]
        self.arena["count"][start:stop] = steps.expand(-1, self.arena.scratch + 1)
        return super()._update(start, stop, selection)


class OneCounterLearner(Learner):
    """One Adam counter for all blocks of a system."""

    def make_engine(self) -> Engine:
        """Build that engine."""
        return OneCounterEngine(self.arena, self.store, self.chunk)


class GrownLearner(Learner):
    """When a domain comes, the most responsible child of the root is split for it.

    All counts that there are then belong to the old text; the new node's are those of the first
    batches of the new text, which are counted before they are trained on.
    """

    def __init__(
        self, *args: Any, counted: int = 64, own_only: bool = False, **kwargs: Any
    ) -> None:
        """Fill an arena.

        Args:
            *args: as for `Learner`.
            counted: batches of the new text that are counted for the new node.
            own_only: the node that was grown for a domain moves then, all of it, and nothing else.
            **kwargs: as for `Learner`.
        """
        self.counted, self.own_only = counted, own_only
        self.grown: dict[int, int] = {}
        """Slot of the node that was grown last, by lane."""
        super().__init__(*args, **kwargs)

    def begin(self, phase: int) -> None:
        """Grow a node for the domain that comes."""
        if phase:
            self.phase = phase
            for lane in range(self.lanes):
                self.grown[lane] = self._grow(lane)
        super().begin(phase)
        if phase and self.own_only:
            for lane, slot in self.grown.items():
                self.arena.set_hyper(lane, "top_k", len(self.arena.trees[lane].subtree(slot)))

    def make_engine(self) -> Engine:
        """Build an engine that may be held to the new node."""
        if not (self.own_only and self.phase):
            return super().make_engine()
        return MaskedEngine(self.arena, self.store, self.chunk, self.own(), flat=False)

    def own(self) -> Tensor:
        """The blocks of each lane's newest node: bool [L, S]."""
        open_ = torch.zeros(self.lanes, self.arena.scratch + 1, dtype=torch.bool)
        for lane, slot in self.grown.items():
            open_[lane, self.arena.trees[lane].subtree(slot)] = True
        return open_.to(self.arena.device)

    def _grow(self, lane: int) -> int:
        """Split a child of the root; returns the new node's slot."""
        a = self.arena
        for _ in range(2):  # nothing is recent any more
            rotate(a["evidence"][lane])
        slot = add_agent(a, lane, ROOT_SLOT)
        if a.config.model.router == "evidence":
            self._count(lane, slot)
        return slot

    def _count(self, lane: int, slot: int) -> None:
        """Count the first batches that the phase trains on for a block."""
        a, run = self.arena, self.runs[lane]
        shares = self.mix(run.order)
        row = [shares.get(domain, 0.0) for domain in self.store.domains]
        mix = torch.tensor([row], device=a.device)
        seed = torch.tensor([derive_seed("grow", run.seed, self.phase)], device=a.device)
        where = torch.tensor([[slot]], device=a.device)
        windows = a.config.train.batch
        share = torch.ones(1, 1, windows * a.config.model.context, device=a.device)
        for number in range(self.counted):
            cursor = torch.tensor([number], device=a.device)
            kernels = self.engine.backend.kernels
            _, text = draw_windows(self.store, a.config, seed, cursor, mix, windows, kernels)
            counts = a["evidence"][lane : lane + 1]
            ev = a.config.evidence
            add_counts(counts, where, share, text.bigram, text.context, text.valid, ev)


class SeparateLearner(Learner):
    """A fresh tree for each domain; whoever reads a domain is told which is its tree."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """Fill an arena with the trees of the first domains."""
        super().__init__(*args, **kwargs)
        self._known: dict[str, list[list[float]]] = {}
        """By view and phase: what the tree of that phase made of its own domain."""

    def begin(self, phase: int) -> None:
        """Begin the next tree."""
        if phase:
            for lane in range(self.lanes):
                self.fresh(lane)
        super().begin(phase)

    def measure(self, views: Views, view: str) -> list[list[float]]:
        """Measure the present tree; earlier domains are read by their own, which stand still."""
        found = super().measure(views, view)
        known = self._known.setdefault(view, [])
        del known[self.phase :]
        for lane in range(self.lanes):
            for phase, bits in enumerate(known):
                found[lane][phase] = bits[lane]
        known.append([row[self.phase] for row in found])
        return found

    def parameters(self, lane: int) -> int:
        """Parameters of all trees so far."""
        return (self.phase + 1) * super().parameters(lane)
