"""Growth with the common parts tied down: what all domains share may move where none needs it.

A grown node alone cannot make up for a root, an embedding and a head that stay as the first domain
left them; and moved freely, they are what forgets. So they move under the penalty of elastic weight
consolidation (`k1.experiments.constrained`), while the node, which is new, is tied by nothing.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import Tensor

from k1.arena import Arena
from k1.engine import Engine
from k1.experiments.constrained import ConstrainedEngine, Ties, fisher, strengths
from k1.experiments.tree_learners import GrownLearner, MaskedEngine
from k1.path import Gradients, PathPass
from k1.sampling import TokenStore

if TYPE_CHECKING:
    from k1.kernels.tree import TreePass


class GuardedEngine(MaskedEngine):
    """A sparse engine that adds the force of ties to what a path moves."""

    def __init__(
        self, arena: Arena, store: TokenStore, chunk: int | None, open_: Tensor, ties: Ties
    ) -> None:
        """Bind an arena; arguments as for `MaskedEngine`, and the ties."""
        super().__init__(arena, store, chunk, open_, flat=False)
        self.ties = ties

    def _path_gradients(self, start: int, stop: int, done: PathPass | TreePass) -> Gradients:
        found = super()._path_gradients(start, stop, done)
        force, on_shared = self.ties.force_on(start, stop, done.row)
        by_row = found.by_row + force
        return replace(
            found,
            by_row=by_row,
            squares=by_row.square().sum(1),
            by_shared=found.by_shared + on_shared,
        )


class GuardedLearner(GrownLearner):
    """A node grows for a domain and moves freely; the root and the shared part are tied."""

    def __init__(self, *args: Any, sequences: int = 64, **kwargs: Any) -> None:
        """Fill an arena.

        Args:
            *args: as for `Learner`.
            sequences: windows that the importance of weights is measured on.
            **kwargs: as for `GrownLearner`.
        """
        self.sequences = sequences
        super().__init__(*args, own_only=True, **kwargs)
        self.ties = Ties(self.arena, strengths(self))

    def make_engine(self) -> Engine:
        """Build an ordinary engine for the first domain, a guarded one for those after it."""
        if not self.phase:
            return super().make_engine()
        return GuardedEngine(self.arena, self.store, self.chunk, self.own(), self.ties)

    def end(self) -> None:
        """Tie down what the domain that ends needs."""
        engine = ConstrainedEngine(self.arena, self.store, self.chunk)
        self.ties.consolidate(fisher(self, engine, self.sequences))
