"""The learned controller's network: sets of any size, one logit for each named action."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from k1.config import Config
from k1.errors import ConfigError, K1Error
from k1env.actions import action_table
from k1env.instances import MOST_DOMAINS
from k1env.observation import observation_space
from policies.network import WHOLE_ACTIONS, ControllerNetwork, Layout, NetworkSizes

SIZES = NetworkSizes(slot=16, domain=8, whole=24, noop_bias=0.0, slot_bias=0.0)


def labels_of(preset: str) -> list[str]:
    return [action.label for action in action_table(Config.preset(preset).model)]


def network_of(preset: str, seed: int = 0, sizes: NetworkSizes = SIZES) -> ControllerNetwork:
    torch.manual_seed(seed)
    network = ControllerNetwork(Layout.of(labels_of(preset)), sizes)
    with torch.no_grad():
        for head in (network.actor.whole_head, network.actor.slot_head):
            head.weight.normal_()
        network.actor.root.normal_()
    return network


def observation(slots: int, alive: int, domains: int = MOST_DOMAINS, seen: int = 2) -> dict:
    """Three observations with blocks in the first slots, and with the first domains seen."""
    generator = np.random.default_rng(0)
    space = observation_space(slots, domains)
    rows = {
        name: torch.from_numpy(generator.uniform(-1, 1, (3, *box.shape)).astype(np.float32))
        for name, box in space.items()  # type: ignore[attr-defined]
    }
    agents, texts = rows["agents"].view(3, -1, 7), rows["domains"].view(3, -1, 4)
    agents[:, :, 0], texts[:, :, 1] = 1.0, 1.0
    agents[:, alive:], texts[:, seen:] = 0.0, 0.0
    return rows


def by_label(preset: str, logits: Tensor) -> dict[str, Tensor]:
    return dict(zip(labels_of(preset), logits.detach().unbind(-1), strict=True))


def test_the_same_weights_serve_trees_of_any_size() -> None:
    small, large = network_of("tiny", seed=1), network_of("cpu", seed=2)
    large.load_state_dict(small.state_dict())
    few, many = observation(15, alive=9), observation(65, alive=9, domains=6)
    many |= {name: few[name] for name in ("system", "hyper", "boundary")}
    many["agents"][:, : 7 * 9] = few["agents"][:, : 7 * 9]
    many["domains"][:, : 4 * 2] = few["domains"][:, : 4 * 2]
    (one, value), (other, same_value) = small(few), large(many)
    assert one.shape == (3, len(labels_of("tiny"))) and other.shape == (3, len(labels_of("cpu")))
    torch.testing.assert_close(value, same_value)
    left, right = by_label("tiny", one), by_label("cpu", other)
    with_blocks = {f"delete slot {s}" for s in range(1, 10)} | {"add under slot 0"}
    for label in with_blocks | set(WHOLE_ACTIONS):
        torch.testing.assert_close(left[label], right[label], msg=label)


def test_permuting_slots_permutes_their_logits() -> None:
    network, rows = network_of("tiny"), observation(15, alive=11)
    order = torch.randperm(14, generator=torch.Generator().manual_seed(0))
    moved = {**rows, "agents": rows["agents"].view(3, 14, 7)[:, order].reshape(3, -1)}
    (one, value), (other, same_value) = network(rows), network(moved)
    left, right = by_label("tiny", one), by_label("tiny", other)
    torch.testing.assert_close(value, same_value)
    for place, slot in enumerate(order.tolist()):
        for verb in ("delete slot", "add under slot"):
            if f"{verb} {slot + 1}" in left and f"{verb} {place + 1}" in right:
                torch.testing.assert_close(left[f"{verb} {slot + 1}"], right[f"{verb} {place + 1}"])
    for label in (*WHOLE_ACTIONS, "add under slot 0"):
        torch.testing.assert_close(left[label], right[label])
    deletions = torch.stack([left[f"delete slot {s}"] for s in range(1, 12)])
    assert deletions.std(0).min() > 0.01, "slots differ in what they hold"


def test_domains_are_a_set_too_and_those_not_seen_do_not_count() -> None:
    network, rows = network_of("tiny"), observation(15, alive=5, seen=3)
    texts = rows["domains"].view(3, 4, 4)
    swapped = {**rows, "domains": texts[:, [2, 0, 1, 3]].reshape(3, -1)}
    torch.testing.assert_close(network(rows), network(swapped))
    hidden, changed = texts.clone(), texts.clone()
    hidden[:, 3, 2] = 0.7
    changed[:, 1, 2] += 0.1
    torch.testing.assert_close(network(rows), network({**rows, "domains": hidden.flatten(1)}))
    assert not torch.equal(network(rows)[0], network({**rows, "domains": changed.flatten(1)})[0])


def test_every_action_has_a_logit_of_its_own() -> None:
    layout = Layout.of(labels_of("cpu"))
    assert layout.slots == 65 and len(set(layout.order)) == len(layout.order) == 148
    with pytest.raises(K1Error, match="no logit for the action 'dance'"):
        Layout.of(["no-op", "dance"])


def test_gradients_reach_every_weight() -> None:
    network, rows = network_of("tiny"), observation(15, alive=9)
    logits, values = network(rows)
    (logits.square().sum() + values.square().sum()).backward()
    without = [n for n, p in network.named_parameters() if p.grad is None or not p.grad.any()]
    assert without == []


def test_it_is_small_and_begins_with_a_liking_for_the_no_op() -> None:
    network = ControllerNetwork(Layout.of(labels_of("cpu")), NetworkSizes())
    size = sum(tensor.nbytes for tensor in network.state_dict().values())
    assert size < 400_000
    chances = torch.softmax(network.actor(observation(65, alive=40)), -1)
    assert chances[:, 0].min() > 0.6 and chances[:, 1:].max() < 0.02


def test_no_agents_and_no_domains_are_no_trouble() -> None:
    logits, values = network_of("tiny")(observation(15, alive=0, seen=0))
    assert torch.isfinite(logits).all() and torch.isfinite(values).all()


def test_sizes_are_checked() -> None:
    with pytest.raises(ConfigError, match=r"network\.whole = 0 is not possible"):
        replace(SIZES, whole=0)
