"""How much agents tell about domains: pure functions of weights and labels, without torch.

A row of weights belongs to one window of held-out text and says how much each agent had to do with
it; the label is the window's domain. `k1.specialisation.observe` defines the two kinds of weights.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Weights = npt.NDArray[np.float64]
"""[windows, agents], not negative."""
Labels = npt.NDArray[np.int64]
"""[windows], from 0."""


def domain_shares(weight: Weights, label: Labels, domains: int) -> Weights:
    """What share of each agent's load comes from each domain: [agents, domains].

    The load is the mean weight on a domain's windows, so domains count alike however many windows
    they have. An agent without any load has the same share of all.
    """
    load = np.stack([weight[label == d].mean(0) for d in range(domains)], axis=1)
    total = load.sum(1, keepdims=True)
    even = np.full_like(load, 1 / domains)
    return np.divide(load, total, out=even, where=total > 0)


def winners(weight: Weights) -> Labels:
    """The agent that each window goes to: that of the largest weight, the first of equals."""
    return np.asarray(weight.argmax(1), dtype=np.int64)


def contingency(agent: Labels, label: Labels, agents: int, domains: int) -> Weights:
    """Count windows by agent and domain: [agents, domains]."""
    table = np.zeros((agents, domains))
    np.add.at(table, (agent, label), 1.0)
    return table


def entropy(counts: npt.NDArray[np.float64], corrected: bool = True) -> float:
    """Entropy in bits of what counts were drawn from.

    Args:
        counts: how often each case was seen.
        corrected: add the correction of Miller 1955 and Madow, (cases seen - 1) / (2 n) nats, for
            the plain estimate is too low.
    """
    seen = counts[counts > 0]
    n = seen.sum()
    plain = -float((seen / n * np.log2(seen / n)).sum())
    return plain + corrected * (len(seen) - 1) / (2 * n) * float(np.log2(np.e))


def mutual_information(table: Weights, corrected: bool = True) -> float:
    """Bits that the agent tells about the domain, from counts [agents, domains].

    The plain estimate is too high by about (agents - 1) (domains - 1) / (2 n) nats, which the
    corrected entropies take off; so independent tables have about 0, and may be below it.
    """
    by_agent, by_domain = table.sum(1), table.sum(0)
    parts = (by_agent, by_domain, table.ravel())
    agent, domain, both = (entropy(part, corrected) for part in parts)
    return agent + domain - both


@dataclass(frozen=True)
class Tested:
    """A statistic beside its distribution when labels say nothing."""

    value: float
    p: float
    """Share of permutations, the given order among them, in which it is at least as large."""
    null_mean: float
    null_high: float
    """99 of 100 permutations stay below or at it."""


def permutation_test(
    statistic: Callable[[Labels], float],
    label: Labels,
    draws: int = 999,
    seed: int = 0,
    document: Labels | None = None,
) -> Tested:
    """Compare a statistic of labels with what it is for the same labels in random order.

    That is exact if documents are exchangeable when labels don't matter.

    Args:
        statistic: of labels.
        label: the true ones.
        draws: how many orders.
        seed: of the orders.
        document: number of each window's document, from 0 without a gap: its windows are alike,
            and keep a label in common. By default each is of a document of its own.
    """
    rng = np.random.default_rng(seed)
    value = statistic(label)
    if document is None:
        document = np.arange(len(label))
    _, first = np.unique(document, return_index=True)
    own = label[first]
    null = np.array([statistic(rng.permutation(own)[document]) for _ in range(draws)])
    at_least = int((null >= value - 1e-12).sum())
    p = (1 + at_least) / (1 + draws)
    high = float(np.quantile(null, 0.99, method="higher"))
    return Tested(value, p, float(null.mean()), high)


@dataclass(frozen=True)
class Information:
    """Whether agents specialise, for one kind of weights."""

    bits: Tested
    """Mutual information of the agent that a window goes to and its domain, corrected."""
    top_share: Tested
    """The largest share of one domain in one agent's load, over all agents and domains; its null
    takes the same maximum, so that many agents don't make it look good."""
    top_agent: int
    top_domain: int


def information(
    weight: Weights,
    label: Labels,
    domains: int,
    draws: int = 999,
    document: Labels | None = None,
) -> Information:
    """Test agents' weights against permuted labels, of documents if windows are of some."""
    agent = winners(weight)

    def bits(labels: Labels) -> float:
        return mutual_information(contingency(agent, labels, weight.shape[1], domains))

    def largest(labels: Labels) -> float:
        return float(domain_shares(weight, labels, domains).max())

    share = domain_shares(weight, label, domains)
    top_agent, top_domain = np.unravel_index(int(share.argmax()), share.shape)
    return Information(
        permutation_test(bits, label, draws, document=document),
        permutation_test(largest, label, draws, document=document),
        int(top_agent),
        int(top_domain),
    )


def routing_accuracy(
    agent: Labels, label: Labels, agents: int, domains: int, document: Labels | None = None
) -> float:
    """Share of windows whose domain the agent tells, each agent standing for one domain.

    Which one is found on the other half of the documents (those with odd numbers for those with
    even ones, and the other way round), so that agents in plenty don't help. By default each window
    is of a document of its own. An agent that was not seen there stands for the domain seen most.
    """
    right = 0
    if document is None:
        document = np.arange(len(label))
    for half in (0, 1):
        known = document % 2 == half
        table = contingency(agent[known], label[known], agents, domains)
        table += 1e-9 * table.sum(0)  # decides for agents without windows, and between equals
        right += int((table.argmax(1)[agent[~known]] == label[~known]).sum())
    return right / len(label)
