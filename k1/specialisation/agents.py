"""A study of one system: which agents are specialists, of what, and does it matter?"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from k1.data.tokenizer import Tokenizer
from k1.engine import Engine
from k1.specialisation.ablation import harm, way_for
from k1.specialisation.information import (
    Information,
    Weights,
    domain_shares,
    information,
    routing_accuracy,
    winners,
)
from k1.specialisation.names import Nickname, nicknames
from k1.specialisation.ngrams import BigramClassifier
from k1.specialisation.observe import HeldOut, Observation, each_window, observe

MEASURES = ("routing", "responsibility")
WINDOWS = 96
"""Windows of each domain that are enough to tell domains' shares apart to a few per cent."""


@dataclass(frozen=True)
class Agent:
    """What one agent is there for."""

    id: int
    name: str
    is_leaf: bool
    nickname: Nickname
    """From what it is responsible for."""
    weight: dict[str, float]
    """By measure: its mean weight among the blocks of its level (responsibility) or in the output
    (routing), every domain counting alike."""
    shares: dict[str, dict[str, float]]
    """By measure and domain: how much of that comes from the domain."""
    harm: dict[str, float]
    """By domain: bits per byte lost without it."""
    ablation: str
    """How it was taken away: "removed" or "bypassed"."""


@dataclass(frozen=True)
class Study:
    """What there is to know about a system's specialists, on held-out text."""

    domains: tuple[str, ...]
    windows: int
    agents: tuple[Agent, ...]
    leaves: tuple[int, ...]
    """Ids of the leaves, which the indices in `information` count."""
    information: dict[str, Information]
    """By measure, over leaves."""
    accuracy: dict[str, float]
    """Share of windows whose domain is told by: the leaf that has the most of it by either
    measure, a classifier by bigrams, and chance."""


def study(
    engine: Engine,
    lane: int,
    texts: Mapping[str, HeldOut],
    tokenizer: Tokenizer,
    draws: int = 999,
) -> Study:
    """Study a lane on held-out text of each domain, in the order of the store.

    Args:
        engine: has the lane.
        lane: which.
        texts: windows, or documents, of every domain.
        tokenizer: turns tokens into text.
        draws: permutations of the labels.
    """
    seen = observe(engine, lane, texts)
    tree, domains = engine.arena.trees[lane], len(seen.domains)
    weights = {"routing": seen.routing, "responsibility": seen.responsibility}
    shares = {name: domain_shares(w, seen.label, domains) for name, w in weights.items()}
    called = nicknames([tokenizer.decode(row) for row in seen.tokens], seen.responsibility)
    lost = harm(engine, lane, seen.slots, texts)
    agents = []
    for number, slot in enumerate(seen.slots):
        by_domain = {
            name: dict(zip(seen.domains, share[number].tolist(), strict=True))
            for name, share in shares.items()
        }
        agents.append(
            Agent(
                tree.blocks[slot].id,
                tree.name(slot),
                tree.is_leaf(slot),
                called[number],
                {name: float(_even(w, seen)[number]) for name, w in weights.items()},
                by_domain,
                lost[slot],
                way_for(engine, lane, slot),
            )
        )
    return Study(
        seen.domains,
        len(seen.label),
        tuple(agents),
        tuple(tree.blocks[slot].id for slot in seen.leaf_slots),
        {
            name: information(seen.leaves(w), seen.label, domains, draws, seen.document)
            for name, w in weights.items()
        },
        _accuracy(engine, texts, seen, weights),
    )


def _even(weight: Weights, seen: Observation) -> Weights:
    """Mean weight of each agent, every domain counting alike: [agents]."""
    by_domain = [weight[seen.label == d].mean(0) for d in range(len(seen.domains))]
    return np.asarray(np.mean(by_domain, axis=0))


def _accuracy(
    engine: Engine, texts: Mapping[str, HeldOut], seen: Observation, weights: dict[str, Weights]
) -> dict[str, float]:
    """How often the domain is told right."""
    domains = len(seen.domains)
    found = {
        name: routing_accuracy(
            winners(seen.leaves(w)), seen.label, len(seen.leaf_slots), domains, seen.document
        )
        for name, w in weights.items()
    }
    classifier = BigramClassifier.fit(engine.store, engine.arena.config.evidence)
    right = sum(
        int((classifier.classify(batch) == engine.store.domains.index(domain)).sum())
        for domain, text in texts.items()
        for batch, _ in each_window(text)
    )
    return {**found, "bigrams": right / len(seen.label), "chance": 1 / domains}
