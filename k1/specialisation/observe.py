"""How much each agent has to do with a window, by two measures.

* **Responsibility**: the norm of the loss's gradient over the block's own parameters, on this
  window alone, as a share of the norms of all blocks of its level: hard text makes all of them
  large.
* **Routing**: the product of the routing weights on the way from the root to the block, averaged
  over tokens: the block's share in what the tree put out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from operator import itemgetter

import numpy as np
import torch
from torch import Tensor

from k1.attribution import responsibilities
from k1.engine import Engine
from k1.experiments.reading import Passages
from k1.forward import Batch, RouterState, read_text, token_losses
from k1.specialisation.information import Labels, Weights
from k1.topology import ROOT_SLOT, Topology

HeldOut = Batch | Passages
"""Held-out text of a domain: windows [1, B, T], each on its own, or documents read from their
start, window after window."""


@dataclass(frozen=True)
class Trace:
    """What became of some text in one lane."""

    nats: Tensor
    """float32 [N]: loss of each token."""
    responsibility: Tensor
    """float32 [S]: gradient norm of each block's own parameters; 0 where there is none."""
    routing: Tensor
    """float32 [S]: each block's share in the output; 1 for the root."""
    router: RouterState
    """Priors for text that goes on where the last window ends."""


def trace(engine: Engine, lane: int, batch: Batch, router: RouterState | None = None) -> Trace:
    """Run a lane on windows [1, B, T] and trace the error of their mean loss.

    Args:
        engine: has the lane.
        lane: which.
        batch: the windows.
        router: what routing begins with; by default what it begins documents with.
    """
    arena = engine.arena
    router = router or arena.router(lane, lane + 1)
    text = read_text(batch, arena.config)
    with torch.enable_grad():
        _, grads, _, done = engine.gradients(lane, lane + 1, batch, text, router)
    levels = arena.index(lane, lane + 1)
    routing = torch.zeros(arena.scratch + 1, device=arena.device)
    tokens = batch.inputs[0].numel()
    path = torch.ones(1, 1, tokens, device=arena.device)
    for index in levels:
        if index.level:
            path = path[0, index.parent[0]][None] * done.share[index.level].detach()
        routing[index.offset : index.offset + index.width] = path[0].mean(1)
    with torch.no_grad():
        forest = arena.forest(lane, lane + 1)
        pieces = forest.shared_layout.unpack(forest.shared)
        nats = token_losses(pieces, done.output.detach(), batch.targets)[0]
        prior = [p.expand(-1, -1, tokens)[..., -1:].detach() for p in done.prior]
    measured = responsibilities(grads, levels, arena.scratch + 1)[0]
    return Trace(nats, measured, routing, RouterState(prior, router.counts))


@dataclass(frozen=True)
class Observation:
    """How much agents had to do with windows of known domains."""

    slots: tuple[int, ...]
    """Slots of the agents, by which the columns below are ordered."""
    is_leaf: tuple[bool, ...]
    responsibility: Weights
    routing: Weights
    label: Labels
    document: Labels
    """Number of each window's document; windows that stand alone have one each."""
    domains: tuple[str, ...]
    tokens: Tensor
    """int64 [windows, T] on the CPU."""

    def leaves(self, weight: Weights) -> Weights:
        """The columns of leaves, which share every window among them."""
        return weight[:, np.array(self.is_leaf)]

    @property
    def leaf_slots(self) -> tuple[int, ...]:
        """Slots of the leaves."""
        return tuple(s for s, leaf in zip(self.slots, self.is_leaf, strict=True) if leaf)


def each_window(text: HeldOut) -> Iterator[tuple[Batch, bool]]:
    """Windows [1, 1, T] of a text, and whether each goes on where the last one has ended.

    Of a document they are those that are full.
    """
    if isinstance(text, Batch):
        for at in range(text.inputs.shape[1]):
            yield text.map(itemgetter((slice(None), slice(at, at + 1)))), False
        return
    for document in range(len(text.inputs)):
        for window in range(text.inputs.shape[1]):
            here = document, slice(window, window + 1)
            if not text.counts[here].all():
                break
            inputs, targets, starts = (
                t[here][None] for t in (text.inputs, text.targets, text.starts)
            )
            yield Batch(inputs, targets, starts, inputs[..., 0]), window > 0


def observe(engine: Engine, lane: int, texts: Mapping[str, HeldOut]) -> Observation:
    """Trace a lane on text of each domain, window by window.

    In documents, routing goes on with what it has gathered in the windows before.
    """
    tree = engine.arena.trees[lane]
    slots = tuple(sorted(slot for slot in tree.blocks if slot != ROOT_SLOT))
    columns = list(slots)
    responsible, routed, label, tokens = [], [], [], []
    document: list[int] = []
    for number, text in enumerate(texts.values()):
        router = None
        for batch, goes_on in each_window(text):
            found = trace(engine, lane, batch, router if goes_on else None)
            router = found.router
            responsible.append(found.responsibility[columns].cpu().double().numpy())
            routed.append(found.routing[columns].cpu().double().numpy())
            label.append(number)
            document.append(document[-1] + (not goes_on) if document else 0)
            tokens.append(batch.inputs[0, 0].cpu())
    return Observation(
        slots,
        tuple(tree.is_leaf(slot) for slot in slots),
        by_level(np.stack(responsible), tree, slots),
        np.stack(routed),
        np.array(label, dtype=np.int64),
        np.array(document, dtype=np.int64),
        tuple(texts),
        torch.stack(tokens),
    )


def by_level(norms: Weights, tree: Topology, slots: tuple[int, ...]) -> Weights:
    """Divide norms [windows, agents] by their sums over the blocks of a level."""
    level = np.array([tree.blocks[slot].level for slot in slots])
    shares = np.zeros_like(norms)
    for one in np.unique(level):
        own = norms[:, level == one]
        total = own.sum(1, keepdims=True)
        shares[:, level == one] = np.divide(own, total, out=np.zeros_like(own), where=total > 0)
    return shares
