"""A version of what has moved for each domain, kept apart; text finds its version by its bigrams.

Sparse steps leave most blocks as they are, to the last bit. So when a domain ends, what it moved
(a path or some, the root, the shared part) can be kept beside what was there before, and takes
little. The next domain goes on from there. At the end there are as many versions of the system as
domains, which have most blocks in common, and nothing has been overwritten. Whoever reads is told
nothing: each version has counts of the bigrams of its domain's text, and its part in a prediction
is its posterior probability by the bigrams of the document so far (`k1.evidence`).

Shapes: V versions, L lanes, D texts, N tokens of each, H buckets of bigrams and contexts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor

from k1.chunks import cut
from k1.config import Config
from k1.engine import Engine
from k1.evidence import UNIT, add_counts, likelihood_ratio
from k1.experiments.inferred import Believer, InferringLearner, Reading, reading_of
from k1.experiments.learner import Learner
from k1.experiments.ngrams import hash_ngrams, tables_for
from k1.experiments.reading import Passages
from k1.experiments.tree_learners import MaskedEngine
from k1.flops import step_flops
from k1.forward import Batch, Forest, RouterState, Text
from k1.rng import derive_seed
from k1.sampling import draw_windows


def posterior(ratios: Tensor, valid: Tensor, starts: Tensor, tau: float) -> Tensor:
    """Log probability of each version, by a document so far; without evidence all are alike.

    Args:
        ratios: float64 [V, L, D, N]: log-likelihood ratio of each token after its predecessor.
        valid: bool [D, N]: the token has a predecessor in its document.
        starts: bool [D, N]: a document begins at this token; one begins at the first anyway.
        tau: weight of the evidence.

    Returns:
        float64 [V, L, D, N], for what comes after each token.
    """
    summed = (ratios * valid).cumsum(-1)
    at = torch.arange(starts.shape[-1])
    begun = torch.where(starts, at, 0).cummax(-1).values.expand(summed.shape)
    # A document's first token has no evidence, so the sum there is that of what came before.
    return torch.log_softmax(tau * (summed - summed.gather(-1, begun)), dim=0)


class TracingEngine(Engine):
    """An engine that can be asked for a path without training."""

    def responsibilities(self, start: int, stop: int, batch: Batch, text: Text) -> Tensor:
        """Measure what each block of lanes start..stop has to do with the loss: [L, S]."""
        return self._probe(start, stop, batch, text)

    def culprits(self, measured: Tensor) -> list[int]:
        """Slot of each lane's first culprit, given its blocks' responsibilities [L, S]."""
        found: list[int] = self._select(0, self.arena.lanes, measured).culprits[:, 0].tolist()
        return found


class VersionsLearner(InferringLearner):
    """Keeps what each domain has moved apart, and mixes the versions' predictions."""

    def __init__(
        self,
        *args: Any,
        counted: int = 256,
        ngrams: int = 2,
        traced: int = 0,
        by_loss: bool = False,
        fresh: bool = False,
        chain: bool = False,
        **kwargs: Any,
    ) -> None:
        """Fill an arena.

        Args:
            *args: as for `Learner`.
            counted: batches of each domain's text that are counted for its version.
            ngrams: tokens of what is counted: 2 for bigrams.
            traced: batches of a later domain's text that its one path is traced by, before it is
                trained on; 0 lets every step find its own.
            by_loss: the version with the least loss so far is believed, whatever the bigrams say.
            fresh: each domain begins with a fresh system, not with the last version.
            chain: the tree is a single path, as long as a path of the experiment's tree.
            **kwargs: as for `Learner`.
        """
        self.counted, self.ngrams, self.traced = counted, ngrams, traced
        self.by_loss, self.from_fresh, self.chain = by_loss, fresh, chain
        self.kept: list[Forest] = []
        """Versions of the domains that have ended."""
        self.counts: list[Tensor] = []
        """int64 [L, H] of each domain so far."""
        self._sizes: list[list[int]] = []
        """Parameters that each domain has moved, by lane."""
        super().__init__(*args, **kwargs)

    def configure(self, phase: int) -> Config:
        """Return the settings of a phase, with the tree cut down to a path if that is asked for."""
        config = super().configure(phase)
        if not self.chain:
            return config
        path = (1,) * len(config.model.branching)
        return config.replace(model={"branching": path, "spare": 0.0, "spare_levels": 0})

    def begin(self, phase: int) -> None:
        """Meet a domain, and count its text."""
        if phase and self.from_fresh:
            for lane in range(self.lanes):
                self.fresh(lane)
        super().begin(phase)
        self._updates = self.arena["updates"].clone()
        self.counts.append(self._count())

    def make_engine(self) -> Engine:
        """Build an engine that may be held to a path."""
        engine = TracingEngine(self.arena, self.store, self.chunk)
        if not (self.traced and self.phase):
            return engine
        path = self._trace(engine)
        return MaskedEngine(self.arena, self.store, self.chunk, path, flat=True)

    def _trace(self, engine: TracingEngine) -> Tensor:
        """Find the path that is most responsible for the present domain's loss: bool [L, S]."""
        a = self.arena
        measured = torch.zeros(self.lanes, a.scratch + 1, device=a.device)
        for start, stop in cut(0, self.lanes, engine.chunk):
            for number in range(self.traced):
                drawn = self._draw(start, stop, number)
                measured[start:stop] += engine.responsibilities(start, stop, *drawn)
        dense = a.config.replace(update={"mode": "dense"})
        for lane, tree in enumerate(a.trees[: self.lanes]):
            self.flops[lane] += self.traced * step_flops(dense, a.vocab_size, len(tree.blocks), 0)
        open_ = torch.zeros(self.lanes, a.scratch + 1, dtype=torch.bool)
        for lane, culprit in enumerate(engine.culprits(measured)):
            open_[lane, a.trees[lane].path(culprit)] = True
        return open_.to(a.device)

    def end(self) -> None:
        """Keep what the domain has moved."""
        a = self.arena
        self.kept.append(_version(a.forest(0, self.lanes), torch.clone))
        blocks = (a["updates"] > self._updates).sum(1).tolist()
        each, common = a.block_layout.total, a.shared_layout.total
        whole = [len(tree.blocks) for tree in a.trees[: self.lanes]]
        moved = whole if not self.phase or self.from_fresh else blocks
        self._sizes.append([n * each + common for n in moved])

    def _count(self) -> Tensor:
        """Count some batches of the present domain's text: int64 [L, H]."""
        a, ev = self.arena, tables_for(self.ngrams, self.arena.config.evidence)
        table = ev.buckets + ev.context_buckets
        counts = torch.zeros(self.lanes, 1, 3, table, dtype=torch.int64, device=a.device)
        where = torch.zeros(self.lanes, 1, dtype=torch.int64, device=a.device)
        share = torch.ones(
            self.lanes, 1, a.config.train.batch * a.config.model.context, device=a.device
        )
        for number in range(self.counted):
            batch, _ = self._draw(0, self.lanes, number)
            found = hash_ngrams(batch.inputs, batch.starts, self.ngrams, ev)
            add_counts(counts, where, share, *found, ev)
        return counts.sum((1, 2))

    def _draw(self, start: int, stop: int, number: int) -> tuple[Batch, Text]:
        """Draw a batch of the present domain's text for lanes start..stop."""
        a = self.arena
        seeds = [derive_seed("versions", run.seed, self.phase) for run in self.runs[start:stop]]
        seed = torch.tensor(seeds, device=a.device)
        cursor, mix = torch.full_like(seed, number), a["mix"][start:stop]
        windows, kernels = a.config.train.batch, self.engine.backend.kernels
        return draw_windows(self.store, a.config, seed, cursor, mix, windows, kernels)

    def versions(self, start: int, stop: int) -> list[Forest]:
        """All versions of lanes start..stop, the present one last."""
        present, lanes = self.arena.forest(start, stop), itemgetter(slice(start, stop))
        done = [_version(kept, lanes) for kept in self.kept[: self.phase]]
        # Trees do not change, so the present index is that of all.
        return [
            *(replace(one, levels=present.levels, depth=present.depth) for one in done),
            present,
        ]

    def reading(self, start: int, stop: int) -> Reading:
        """Read with each version."""
        return reading_of(self.engine, self.versions(start, stop))

    def believer(self, start: int, stop: int) -> Believer:
        """Mix what the versions say, each by its posterior probability."""
        if self.by_loss:
            return super().believer(start, stop)
        ev = tables_for(self.ngrams, self.arena.config.evidence)
        own = torch.stack(self.counts).cpu()[:, start:stop].double() / UNIT
        ngrams, contexts = own.split([ev.buckets, ev.context_buckets], dim=-1)

        def believe(nats: Tensor, passages: Passages) -> Tensor:
            inputs, starts = passages.inputs.flatten(1).cpu(), passages.starts.flatten(1).cpu()
            bucket, context, valid = hash_ngrams(inputs, starts, self.ngrams, ev)
            both, before = ngrams[..., bucket], contexts[..., context]
            ratio = likelihood_ratio(both, before, both.sum(0), before.sum(0), ev)
            known = posterior(ratio.log(), valid, starts, ev.tau)
            return -torch.logsumexp(known - nats.double(), dim=0)

        return believe

    def parameters(self, lane: int) -> int:
        """Parameters of the first version, and of what each later domain has moved."""
        return sum(sizes[lane] for sizes in self._sizes) or Learner.parameters(self, lane)


def _version(forest: Forest, change: Callable[[Tensor], Tensor]) -> Forest:
    """Change every tensor of a forest that training changes."""
    router = RouterState(
        [change(t) for t in forest.router.log_prior], [change(t) for t in forest.router.counts]
    )
    return replace(forest, rows=change(forest.rows), shared=change(forest.shared), router=router)
