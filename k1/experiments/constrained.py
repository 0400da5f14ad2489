"""Dense methods that change the gradient so that earlier domains keep theirs: EWC, SI, A-GEM.

Elastic weight consolidation: Kirkpatrick et al. 2017; its quadratic penalties, one for each domain,
add up to one (Huszár 2018). Synaptic intelligence: Zenke, Poole and Ganguli 2017. A-GEM: Chaudhry
et al. 2019. All of them are told when a domain ends, and nothing else.

Shapes: L lanes, S slots with the scratch row, P parameters of a block, Q of the shared part.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from k1.arena import Arena
from k1.engine import Engine
from k1.experiments.learner import Learner
from k1.flops import step_flops
from k1.forward import Batch, Text
from k1.records import FullGradients, StepResult
from k1.rng import derive_seed
from k1.sampling import TokenStore, draw_windows


@dataclass(frozen=True)
class Parts:
    """A number for each parameter of some lanes."""

    blocks: Tensor
    """[L, S, P]."""
    shared: Tensor
    """[L, Q]."""

    @classmethod
    def zeros(cls, arena: Arena) -> Parts:
        """One for every parameter of an arena."""
        return cls(torch.zeros_like(arena["weight"]), torch.zeros_like(arena["shared"]))

    @classmethod
    def weights(cls, arena: Arena) -> Parts:
        """The parameters themselves."""
        return cls(arena["weight"], arena["shared"])

    def lanes(self, start: int, stop: int) -> Parts:
        """View some lanes."""
        return Parts(self.blocks[start:stop], self.shared[start:stop])

    def clone(self) -> Parts:
        """Copy them."""
        return Parts(self.blocks.clone(), self.shared.clone())

    def tensors(self) -> tuple[Tensor, Tensor]:
        """Both tensors."""
        return self.blocks, self.shared

    def add_(self, blocks: Tensor, shared: Tensor) -> None:
        """Add to them, in place."""
        self.blocks.add_(blocks)
        self.shared.add_(shared)

    def dot(self, other: Parts) -> Tensor:
        """Scalar product of each lane: [L]."""
        blocks = (self.blocks * other.blocks).flatten(1).sum(1)
        return blocks + (self.shared * other.shared).sum(1)

    def plus(self, other: Parts, factor: Tensor) -> Parts:
        """Add another times a factor [L]."""
        blocks = torch.addcmul(self.blocks, other.blocks, factor[:, None, None])
        return Parts(blocks, torch.addcmul(self.shared, other.shared, factor[:, None]))


class ConstrainedEngine(Engine):
    """A dense engine whose gradients are changed before they are clipped and used."""

    def plain_gradients(
        self, start: int, stop: int, batch: Batch, text: Text
    ) -> tuple[FullGradients, Parts]:
        """The gradients of a batch as they are, and the same slot by slot."""
        full = super()._all_gradients(start, stop, batch, text)
        lanes, slots, size = self.arena["weight"][start:stop].shape
        blocks = full.by_shared.new_zeros(lanes * slots, size)
        for row, grad in full.by_row:
            blocks[row] = grad.to(blocks.dtype)
        blocks = blocks.view(lanes, slots, size)
        blocks[:, -1] = 0
        return full, Parts(blocks, full.by_shared.float())

    def _all_gradients(self, start: int, stop: int, batch: Batch, text: Text) -> FullGradients:
        full, plain = self.plain_gradients(start, stop, batch, text)
        found = self.constrain(start, stop, plain)
        norms = torch.linalg.vector_norm(found.blocks, dim=-1)
        rows = found.blocks.flatten(0, 1)
        everyone = torch.arange(len(rows), device=rows.device)
        return replace(
            full, measured=norms, by_row=[(everyone, rows)], by_shared=found.shared.contiguous()
        )

    def constrain(self, start: int, stop: int, plain: Parts) -> Parts:
        """Change the gradients of lanes start..stop; by default they stay as they are."""
        return plain


class Ties:
    """The penalty `strength / 2 * sum over domains of F (theta - theta_domain) ** 2`.

    That sum is a quadratic in theta, so the sums of F and of F * theta_domain are all it takes.
    """

    def __init__(self, arena: Arena, strength: Tensor) -> None:
        """Begin without a domain; lanes have a strength each: float32 [L]."""
        self._arena, self.strength = arena, strength
        self.importance, self.pull = Parts.zeros(arena), Parts.zeros(arena)

    def consolidate(self, importance: Parts) -> None:
        """Tie the weights to where they are now, each by its importance."""
        here = Parts.weights(self._arena)
        self.importance.add_(*importance.tensors())
        self.pull.add_(importance.blocks * here.blocks, importance.shared * here.shared)

    def force(self, start: int, stop: int) -> Parts:
        """The gradient of the penalty in lanes start..stop."""
        row = torch.arange((stop - start) * (self._arena.scratch + 1), device=self.strength.device)
        blocks, shared = self.force_on(start, stop, row)
        return Parts(blocks.view_as(self.importance.blocks[start:stop]), shared)

    def force_on(self, start: int, stop: int, row: Tensor) -> tuple[Tensor, Tensor]:
        """The same on some blocks, and on the shared part.

        Args:
            start: first lane.
            stop: one past the last lane.
            row: int64 [M]: rows [L * S] of blocks in these lanes.

        Returns:
            [M, P] and [L, Q].
        """
        parts = Parts.weights(self._arena), self.importance, self.pull
        weight, importance, pull = (part.lanes(start, stop) for part in parts)
        strength, slots = self.strength[start:stop], self._arena.scratch + 1
        here, held, at = (p.blocks.flatten(0, 1)[row] for p in (weight, importance, pull))
        blocks = (held * here - at) * strength[row // slots][:, None]
        shared = (importance.shared * weight.shared - pull.shared) * strength[:, None]
        return blocks, shared


class PenaltyEngine(ConstrainedEngine):
    """Adds the force of ties."""

    def __init__(
        self, arena: Arena, store: TokenStore, chunk: int | None, strength: Tensor
    ) -> None:
        """Bind an arena whose lanes have a strength each: float32 [L]."""
        super().__init__(arena, store, chunk)
        self.ties = Ties(arena, strength)

    def constrain(self, start: int, stop: int, plain: Parts) -> Parts:
        """Add the force."""
        force = self.ties.force(start, stop)
        return Parts(plain.blocks + force.blocks, plain.shared + force.shared)


class PathIntegralEngine(PenaltyEngine):
    """Synaptic intelligence: sums up by how much each weight's moves have lowered the loss."""

    def __init__(self, *args: Any) -> None:
        """Bind an arena; arguments as for `PenaltyEngine`."""
        super().__init__(*args)
        self.credit = Parts.zeros(self.arena)
        self.began = Parts.weights(self.arena).clone()
        self._plain = Parts.zeros(self.arena)

    def constrain(self, start: int, stop: int, plain: Parts) -> Parts:
        """Remember the loss's own gradient, and add the penalty's."""
        for kept, new in zip(
            self._plain.lanes(start, stop).tensors(), plain.tensors(), strict=True
        ):
            kept.copy_(new)
        return super().constrain(start, stop, plain)

    def _full(self, start: int, stop: int, batch: Batch, text: Text) -> StepResult:
        here = Parts.weights(self.arena).lanes(start, stop)
        before = here.clone()
        result = super()._full(start, stop, batch, text)
        for credit, gradient, after, old in zip(
            self.credit.lanes(start, stop).tensors(),
            self._plain.lanes(start, stop).tensors(),
            here.tensors(),
            before.tensors(),
            strict=True,
        ):
            step = torch.where(after == old, 0.0, gradient * (after - old))  # NaN if skipped
            credit.sub_(step)
        return result

    def settle(self, damping: float) -> None:
        """Turn the credit of the domain that ends into importance, and begin to sum up anew."""
        here = Parts.weights(self.arena)
        importance = Parts(
            *(
                credit.clamp(min=0) / ((now - then).square() + damping)
                for credit, now, then in zip(
                    self.credit.tensors(), here.tensors(), self.began.tensors(), strict=True
                )
            )
        )
        # Its penalty has one anchor, where the last domain ended, under all importance so far.
        ties = self.ties
        ties.importance.add_(*importance.tensors())
        for pull, all_importance, now in zip(
            ties.pull.tensors(), ties.importance.tensors(), here.tensors(), strict=True
        ):
            pull.copy_(all_importance * now)
        for credit, then, now in zip(
            self.credit.tensors(), self.began.tensors(), here.tensors(), strict=True
        ):
            credit.zero_()
            then.copy_(now)


class ProjectedEngine(ConstrainedEngine):
    """A-GEM: a gradient that would raise the loss of earlier text is projected first."""

    def __init__(self, arena: Arena, store: TokenStore, chunk: int | None, seeds: Tensor) -> None:
        """Bind an arena.

        Args:
            arena: the lanes.
            store: the text.
            chunk: as for `Engine`.
            seeds: int64 [L]: which earlier text is drawn.
        """
        super().__init__(arena, store, chunk)
        self.seeds = seeds
        self.memory = torch.zeros_like(arena["mix"])
        """Share of each domain in the earlier text [L, domains]; nothing for no text."""

    def constrain(self, start: int, stop: int, plain: Parts) -> Parts:
        """Project the gradients."""
        a, lanes = self.arena, slice(start, stop)
        seed, cursor, memory = self.seeds[lanes], a["data_cursor"][lanes], self.memory[lanes]
        windows, kernels = a.config.train.batch, self.backend.kernels
        drawn = draw_windows(self.store, a.config, seed, cursor, memory, windows, kernels)
        _, earlier = self.plain_gradients(start, stop, *drawn)
        return project(plain, earlier, self.memory[lanes].sum(1) > 0)


def project(plain: Parts, earlier: Parts, on: Tensor) -> Parts:
    """Take from gradients what points against others, in lanes that are on (bool [L])."""
    along, square = plain.dot(earlier), earlier.dot(earlier)
    factor = torch.where(on & (along < 0), -along / square.clamp(min=1e-30), 0.0)
    return plain.plus(earlier, factor)


def strengths(learner: Learner) -> Tensor:
    """Strength of each run's penalty: float32 [L]."""
    found = [run.strength for run in learner.runs]
    return torch.tensor(found, dtype=torch.float32, device=learner.arena.device)


def fisher(learner: Learner, engine: ConstrainedEngine, sequences: int) -> Parts:
    """Mean over windows of the squared gradient of a window's mean loss, on the present domain.

    Args:
        learner: whose systems, and who pays for it.
        engine: works out gradients on the learner's arena.
        sequences: how many windows.
    """
    a, total = learner.arena, Parts.zeros(learner.arena)
    seeds = [derive_seed("fisher", run.seed, learner.phase) for run in learner.runs]
    seed = torch.tensor(seeds, device=a.device)
    for number in range(sequences):
        cursor, kernels = torch.full_like(seed, number), engine.backend.kernels
        drawn = draw_windows(learner.store, a.config, seed, cursor, a["mix"], 1, kernels)
        _, found = engine.plain_gradients(0, learner.lanes, *drawn)
        total.add_(*(part.square() / sequences for part in found.tensors()))
    dense = a.config.replace(update={"mode": "dense"})
    for lane, tree in enumerate(a.trees):
        step = step_flops(dense, a.vocab_size, len(tree.blocks), 0)
        learner.flops[lane] += sequences / a.config.train.batch * step
    return total


class _PenaltyLearner(Learner):
    """What EWC and SI share: an engine that lasts, and a strength for each run."""

    kind: type[PenaltyEngine]
    engine: PenaltyEngine

    def make_engine(self) -> Engine:
        """Build the engine once: what it has gathered stays."""
        if self.phase:
            return self.engine
        return self.kind(self.arena, self.store, self.chunk, strengths(self))


class EwcLearner(_PenaltyLearner):
    """Elastic weight consolidation with the empirical Fisher of single windows."""

    kind = PenaltyEngine

    def __init__(self, *args: Any, sequences: int = 64, **kwargs: Any) -> None:
        """Fill an arena.

        Args:
            *args: as for `Learner`.
            sequences: windows whose squared gradients are averaged.
            **kwargs: as for `Learner`.
        """
        self.sequences = sequences
        super().__init__(*args, **kwargs)

    def end(self) -> None:
        """Tie the weights down by the Fisher information of the domain that ends."""
        self.engine.ties.consolidate(fisher(self, self.engine, self.sequences))


class SiLearner(_PenaltyLearner):
    """Synaptic intelligence."""

    kind = PathIntegralEngine
    engine: PathIntegralEngine

    def __init__(self, *args: Any, damping: float = 1e-3, **kwargs: Any) -> None:
        """Fill an arena.

        Args:
            *args: as for `Learner`.
            damping: added to the squared way of a weight, by which its credit is divided.
            **kwargs: as for `Learner`.
        """
        self.damping = damping
        super().__init__(*args, **kwargs)

    def end(self) -> None:
        """Tie the weights down by what they did for the domain that ends."""
        self.engine.settle(self.damping)


class AGemLearner(Learner):
    """A-GEM. All earlier text is kept, so its memory is the largest there can be."""

    engine: ProjectedEngine

    @property
    def overhead(self) -> float:
        """A second gradient with each step that has earlier text; the first phase draws none."""
        return 2.0 if self.phase else 1.0

    def make_engine(self) -> Engine:
        """Build an engine; in the first phase an ordinary one."""
        if not self.phase:
            return super().make_engine()
        seeds = [derive_seed("memory", run.seed) for run in self.runs]
        made = ProjectedEngine(
            self.arena, self.store, self.chunk, torch.tensor(seeds, device=self.arena.device)
        )
        for lane, run in enumerate(self.runs):
            for domain in run.order[: self.phase]:
                made.memory[lane, self.store.domains.index(domain)] = 1 / self.phase
        return made
