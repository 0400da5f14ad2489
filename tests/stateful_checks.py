"""Promises of an environment, as checks of its state and of its ledger.

What a check expects is worked out here, from the tree's own record or from the ledger, and not by
the code that it checks. `tests.stateful_player` plays an environment under these checks.
"""

from __future__ import annotations

import hashlib
import itertools
import random
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from scipy import stats

from k1.durable import canonical_json
from k1env.boundary import Boundary, Bounds
from k1env.env import Phase2Env
from k1env.ledger import Entry, Ledger

HARD = {"lr": (1e-6, 0.3), "cooldown": (0, 500)}
NEEDED, FEWEST = (3, 5, 10), 4


class Broken(AssertionError):
    """A promise that was not kept, by its name."""

    def __init__(self, promise: str, detail: object = "") -> None:
        super().__init__(f"{promise}: {detail}")
        self.promise = promise


def hold(promise: str, kept: bool, detail: object = "") -> None:
    if not kept:
        raise Broken(promise, detail)


def short(value: float) -> float:
    """A hyper-parameter without the rounding of float32."""
    return float(f"{value:.6g}")


def freeze(value: Any) -> Any:
    """A deep copy that compares bit by bit."""
    if isinstance(value, dict):
        return {key: freeze(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [freeze(item) for item in value]
    if isinstance(value, torch.Tensor):
        value = value.numpy()
    if isinstance(value, np.ndarray):
        return str(value.dtype), value.tobytes()
    return type(value).__name__, repr(value)


def generators(env: Phase2Env) -> Any:
    """States of all random generators that a step could draw from."""
    own = env._np_random and env._np_random.bit_generator.state
    world = torch.get_rng_state().numpy().tobytes(), random.getstate(), np.random.get_state()
    return freeze([own, *world])


def fingerprint(env: Phase2Env) -> str:
    """Hash of everything that a step could change."""
    session, ledger = env.session, env.ledger
    assert isinstance(ledger, Ledger)
    tensors, state = session.snapshot()
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode() + tensors[name].numpy().tobytes())
    rest = [state, session.seed, session.salt, ledger.index, ledger.head, repr(generators(env))]
    digest.update(canonical_json(rest).encode())
    return digest.hexdigest()


# -- the state by itself -------------------------------------------------------------------------


def check_tree(tree: Any) -> None:
    """Connected, acyclic, within capacity, router ranks unique."""
    offsets = list(itertools.accumulate(tree.capacity, initial=0))
    blocks = {row[0]: row for row in tree.to_dict()["blocks"]}
    hold("tree", blocks.get(0, [0, 0, None])[2] == -1, "the root is gone")
    ids = [row[1] for row in blocks.values()]
    hold("tree", len(set(ids)) == len(ids) and max(ids) < tree.next_id, "ids are not unique")
    ranks = [(row[2], row[3]) for row in blocks.values()]
    hold("tree", len(set(ranks)) == len(ranks), "two siblings have one router column")
    for slot, _, parent, rank, level, _ in blocks.values():
        hold("tree", offsets[level] <= slot < offsets[level + 1], f"slot {slot}, level {level}")
        hold("tree", 0 <= rank < tree.max_children, f"rank {rank}")
        if slot:
            hold("tree", parent in blocks, f"slot {slot} is cut off")
            hold("tree", blocks[parent][4] == level - 1, f"slot {slot} is not below its parent")


def check_lane(env: Phase2Env, lane: int) -> None:
    """A lane that is in use: its tree, its numbers, its hyper-parameters."""
    arena = env.session.arena
    check_tree(arena.trees[lane])
    for name, tensor in arena.state.items():
        if tensor.is_floating_point():
            hold("finite", bool(torch.isfinite(tensor[lane]).all()), f"{name} of lane {lane}")
    hyper, capacity = arena.get_hyper(lane), arena.scratch - 1
    for name, (low, high) in {**HARD, "top_k": (1, capacity)}.items():
        hold("hard limits", low <= short(hyper[name]) <= high, f"{name} = {hyper[name]}")
        hold("hard limits", hyper[name] == arena[name][lane].item(), f"{name} differs on device")
    agents = arena.trees[lane].agents
    hold("hard limits", FEWEST <= agents <= capacity, f"{agents} agents")


def check_bounds(bounds: Bounds, capacity: int, before: Bounds | None = None) -> None:
    """Inside the hard limits, and never narrower than before."""
    for name, (least, most) in {**HARD, "top_k": (1, capacity)}.items():
        low, high = bounds.range(name)
        hold("bounds", least <= low <= high <= most, f"{name} in [{low}, {high}]")
        if before is not None:
            was_low, was_high = before.range(name)
            hold("bounds", low <= was_low and was_high <= high, f"{name} has narrowed")
    hold("bounds", bounds.min_agents >= FEWEST, f"min_agents = {bounds.min_agents}")
    hold("bounds", before is None or bounds.min_agents <= before.min_agents, "agents narrowed")


def permits(stage: int, bounds: Bounds, action: Any, value: float, agents_after: int) -> bool:
    """The table of stages, once more."""
    if stage == 4 or action.kind in ("noop", "add"):
        return True
    if action.kind == "tune":
        low, high = bounds.range(action.parameter)
        return stage > 1 and low <= value <= high
    return stage == 3 and action.kind in ("delete", "prune") and agents_after >= bounds.min_agents


# -- the ledger ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Count:
    """What the boundary counts, worked out from verdicts."""

    stage: int = 1
    successes: int = 0
    attempted: int = 0
    accepted: int = 0
    evidence: float = 1.0

    @staticmethod
    def of(b: Boundary) -> Count:
        return Count(b.stage, b.successes, b.attempted, b.accepted, b.evidence)

    def after(self, credited: bool) -> Count:
        evidence = self.evidence * (10.0 if credited else 10.0 / 11.0)
        more = int(credited)
        new = Count(
            self.stage, self.successes + more, self.attempted + 1, self.accepted + more, evidence
        )
        enough = self.stage < 4 and new.successes >= NEEDED[self.stage - 1] and evidence >= 100
        if credited and enough:
            return replace(new, stage=self.stage + 1, successes=0, evidence=1.0)
        return new


def recount(base: Count, entries: list[Entry]) -> Count:
    """Count a ledger's verdicts; an attempt that was undone is a failure."""
    now = before = base
    tried = False
    for entry in entries:
        if entry.kind == "outcome":
            before, tried = now, entry.data["trial"] is not None
            now = before.after(entry.data["credited"]) if tried else before
        elif entry.kind == "undo":
            now = before.after(False) if tried else before
    return now


def check_verdict(data: dict[str, Any], config: Any, stop: bool) -> None:
    """An accepted trial has the figures that it takes, and only accepted ones are credited."""
    trial = data["trial"]
    if trial is None:
        hold("credits", not data["credited"] and not data["promoted"], "credited without a trial")
        return
    hold("credits", not data["credited"] or (trial["accepted"] and data["applied"]), data)
    hold("credits", not data["credited"] or not data["rolled_back"], "credited, but rolled back")
    if not trial["accepted"]:
        return
    arms = [trial["control"]] + ([trial["shadow"]] if trial["shadow"] is not None else [])
    for arm in arms:
        gains = arm["differences"]
        hold("verdict", len(gains) == config.seeds and np.std(gains) > 0, gains)
        side = "less" if stop else "greater"
        p = stats.ttest_1samp(gains, popmean=config.margin, alternative=side).pvalue
        hold("verdict", bool(p <= config.alpha), f"p = {p}")
    for name in ("stream_digests", "window_digests"):
        hold("verdict", len(set(trial[name])) == config.seeds, f"{name} are not distinct")
