"""The network of the learned controller: agents and domains are sets, and each action has a logit.

One encoder is shared by all slots, another by all domains, and both sets are pooled, so the same
weights serve trees of any size. `add` and `delete` get their logits from the slot that they are
about, all other actions from what describes the whole. To permute slots is to permute their logits.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from k1.config import ModelConfig
from k1.errors import ConfigError, K1Error
from k1env.actions import action_table
from k1env.observation import (
    AGENT_FIELDS,
    BOUNDARY_FIELDS,
    DOMAIN_FIELDS,
    HYPER_FIELDS,
    SYSTEM_FIELDS,
)

WHOLE_ACTIONS = tuple(a.label for a in action_table(ModelConfig()) if a.slot < 0)
"""Labels of the actions that are about no slot; all configurations have the same."""
_OF_SLOT = re.compile(r"(add under|delete) slot (\d+)")
_ALIVE, _SEEN = AGENT_FIELDS.index("alive"), DOMAIN_FIELDS.index("seen")
_WHOLE_FIELDS = len(SYSTEM_FIELDS) + 2 * len(HYPER_FIELDS) + len(BOUNDARY_FIELDS)


MOST_WIDTH = 2**16
"""Of a layer; torch cannot count the weights of much wider ones."""
MOST_BIAS = 1e6


@dataclass(frozen=True)
class NetworkSizes:
    """Widths of the network, and what it prefers before it has learned anything."""

    slot: int = 48
    """Width of a slot's embedding."""
    domain: int = 32
    """Width of a domain's embedding."""
    whole: int = 96
    """Width of the vector that describes the whole."""
    noop_bias: float = 4.5
    """Logit that the no-op starts with. A trial costs many intervals, and most actions are trials:
    drawn uniformly, they would use the budget up before much is trained."""
    slot_bias: float = -2.0
    """Logit that each `add` and `delete` starts with, for there are as many as slots."""

    def __post_init__(self) -> None:
        """Refuse what is no width, and what is no logit."""
        for name in ("noop_bias", "slot_bias"):
            if not abs(getattr(self, name)) <= MOST_BIAS:
                raise ConfigError(f"network.{name} = {getattr(self, name)} is not possible")
        for name in ("slot", "domain", "whole"):
            if not 1 <= getattr(self, name) <= MOST_WIDTH:
                raise ConfigError(f"network.{name} = {getattr(self, name)} is not possible")


@dataclass(frozen=True)
class Layout:
    """Where each action of a table finds its logit."""

    slots: int
    """Slots of the configuration, the root's included."""
    order: tuple[int, ...]
    """For each action its place in [`WHOLE_ACTIONS`, add for each slot, delete for each slot]."""

    @staticmethod
    def of(actions: Sequence[str]) -> Layout:
        """Lay out a table of actions, by their labels.

        Raises:
            K1Error: if there is an action that the network has no logit for.
        """
        found = [_OF_SLOT.fullmatch(label) for label in actions]
        slots = 1 + max((int(match[2]) for match in found if match), default=0)
        base = {"add under": len(WHOLE_ACTIONS), "delete": len(WHOLE_ACTIONS) + slots}
        order = []
        for label, match in zip(actions, found, strict=True):
            if match:
                order.append(base[match[1]] + int(match[2]))
            elif label in WHOLE_ACTIONS:
                order.append(WHOLE_ACTIONS.index(label))
            else:
                raise K1Error(f"the controller's network has no logit for the action {label!r}")
        return Layout(slots, tuple(order))


def _layers(*widths: int) -> nn.Sequential:
    """Linear layers, each followed by tanh."""
    made: list[nn.Module] = []
    for wide, narrow in itertools.pairwise(widths):
        layer = nn.Linear(wide, narrow)
        nn.init.orthogonal_(layer.weight, math.sqrt(2))
        nn.init.zeros_(layer.bias)
        made += [layer, nn.Tanh()]
    return nn.Sequential(*made)


def _head(width: int, outputs: int, gain: float) -> nn.Linear:
    layer = nn.Linear(width, outputs)
    nn.init.orthogonal_(layer.weight, gain)
    nn.init.zeros_(layer.bias)
    return layer


def _pooled(embedded: Tensor, mask: Tensor) -> Tensor:
    """Mean and maximum [B, 2 W] over the members of a set [B, N, W] that a mask [B, N] names."""
    inside = mask[..., None]
    total = torch.where(inside, embedded, 0.0).sum(1)
    mean = total / inside.sum(1).clamp(min=1)
    largest = torch.where(inside, embedded, -1.0).amax(1)  # tanh stays above
    return torch.cat([mean, largest], dim=-1)


class Encoder(nn.Module):
    """An observation as the embeddings of its slots and a vector about the whole."""

    def __init__(self, sizes: NetworkSizes) -> None:
        """Make the layers."""
        super().__init__()
        self.slot = _layers(len(AGENT_FIELDS), sizes.slot, sizes.slot)
        self.domain = _layers(len(DOMAIN_FIELDS), sizes.domain, sizes.domain)
        pooled = 2 * sizes.slot + 2 * sizes.domain
        self.whole = _layers(_WHOLE_FIELDS + pooled, sizes.whole, sizes.whole)

    def forward(self, observation: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Encode observations; returns slots [B, S - 1, slot] and the whole [B, whole]."""
        agents = observation["agents"].unflatten(-1, (-1, len(AGENT_FIELDS)))
        domains = observation["domains"].unflatten(-1, (-1, len(DOMAIN_FIELDS)))
        slots = self.slot(agents)
        parts = [
            *(observation[name] for name in ("system", "hyper", "boundary")),
            _pooled(slots, agents[..., _ALIVE] > 0),
            _pooled(self.domain(domains), domains[..., _SEEN] > 0),
        ]
        return slots, self.whole(torch.cat(parts, dim=-1))


class Actor(nn.Module):
    """Logits of all actions."""

    order: Tensor

    def __init__(self, layout: Layout, sizes: NetworkSizes) -> None:
        """Make the layers."""
        super().__init__()
        self.encoder = Encoder(sizes)
        self.root = nn.Parameter(torch.zeros(sizes.slot))
        self.in_context = _layers(sizes.slot + sizes.whole, sizes.slot)
        self.whole_head = _head(sizes.whole, len(WHOLE_ACTIONS), 0.01)
        self.slot_head = _head(sizes.slot, 2, 0.01)
        with torch.no_grad():
            self.whole_head.bias[WHOLE_ACTIONS.index("no-op")] = sizes.noop_bias
            self.slot_head.bias.fill_(sizes.slot_bias)
        # It depends on the configuration, so it is no part of the weights.
        self.register_buffer("order", torch.tensor(layout.order), persistent=False)

    def forward(self, observation: Mapping[str, Tensor]) -> Tensor:
        """Compute logits [B, actions]."""
        slots, whole = self.encoder(observation)
        slots = torch.cat([self.root.expand(len(slots), 1, -1), slots], dim=1)
        around = whole[:, None].expand(-1, slots.shape[1], -1)
        add, delete = self.slot_head(self.in_context(torch.cat([slots, around], -1))).unbind(-1)
        logits = torch.cat([self.whole_head(whole), add, delete], dim=-1)
        return logits.index_select(1, self.order)


class Critic(nn.Module):
    """The value of an observation."""

    def __init__(self, sizes: NetworkSizes) -> None:
        """Make the layers."""
        super().__init__()
        self.encoder = Encoder(sizes)
        self.head = _head(sizes.whole, 1, 1.0)

    def forward(self, observation: Mapping[str, Tensor]) -> Tensor:
        """Compute values [B, 1]."""
        values: Tensor = self.head(self.encoder(observation)[1])
        return values


class ControllerNetwork(nn.Module):
    """Actor and critic, which share no weights: neither's loss can drown the other's."""

    def __init__(self, layout: Layout, sizes: NetworkSizes) -> None:
        """Make both for a layout of actions."""
        super().__init__()
        self.actor, self.critic = Actor(layout, sizes), Critic(sizes)

    def forward(self, observation: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Compute logits [B, actions] and values [B, 1]."""
        return self.actor(observation), self.critic(observation)
