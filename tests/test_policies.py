"""The controllers, rule by rule, on observations and infos made by hand."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from k1.config import Config
from k1.durable import canonical_json
from k1.errors import K1Error
from k1env.actions import action_table
from policies import POLICIES, HeuristicPolicy, NoopPolicy, RandomPolicy, make_policy
from policies.heuristic import FIRST_WAIT, PROBES
from policies.simple import CheatPolicy, RandomLegalPolicy

LABELS = [action.label for action in action_table(Config.preset("tiny").model)]
TUNES = [label for label in LABELS if label.startswith("tune ")]


class Scene:
    """A run as a controller sees it; by default stage 1 with everything possible."""

    def __init__(self, policy: HeuristicPolicy | None = None) -> None:
        self.policy = policy or HeuristicPolicy(LABELS)
        self.decision, self.stage = 0, 1
        self.bits = {"a": 2.0}
        self.permitted = {"no-op", *[label for label in LABELS if label.startswith("add ")]}
        self.impossible: set[str] = set()
        self.criteria: list[str] = []
        self.rows = np.zeros((14, 7), np.float32)
        self.tried = self.credited = False

    def info(self) -> dict[str, Any]:
        possible = [label not in self.impossible for label in LABELS]
        allowed = [p and label in self.permitted for p, label in zip(possible, LABELS, strict=True)]
        return {
            "action_mask": np.array(possible, np.int8),
            "permitted_mask": np.array(allowed, np.int8),
            "stage": self.stage,
            "decision": self.decision,
            "bits_per_byte": self.bits,
            "seen": list(self.bits),
            "tried": self.tried,
            "credited": self.credited,
            "stop_criteria": self.criteria,
        }

    def act(self, policy: Any = None, fall: float = 0.1) -> str:
        """Ask for an action; afterwards the loss falls (no plateau), a cheat is refused."""
        policy = policy or self.policy
        label = LABELS[policy.act({"agents": self.rows.reshape(-1)}, self.info())]
        self.tried = label not in self.permitted
        self.credited = False
        self.decision += 1
        self.bits = {domain: bits - fall for domain, bits in self.bits.items()}
        return label


def calm() -> Scene:
    """A scene without anything to probe."""
    scene = Scene()
    scene.impossible = set(PROBES)
    return scene


# -- the rules ----------------------------------------------------------------------------------


def test_it_probes_in_the_order_of_its_record() -> None:
    scene = Scene()
    order = sorted(PROBES, key=lambda label: -PROBES[label])
    assert [scene.act() for _ in range(FIRST_WAIT + 1)] == order[: FIRST_WAIT + 1]
    assert scene.policy.reason == "probes a bound (record +0.7)"
    assert scene.act() == order[0], "its wait is over, and its record is the best still"


def test_a_refusal_makes_it_wait_twice_as_long_each_time() -> None:
    scene = Scene()
    scene.impossible = set(PROBES) - {"tune lr x2"}
    tried = [n for n in range(60) if scene.act() == "tune lr x2"]
    assert np.diff(tried).tolist() == [FIRST_WAIT + 1, 7, 13, 25]


def test_a_success_is_followed_up_at_once() -> None:
    scene = Scene()
    assert scene.act() == "tune lr x2"
    scene.credited = True
    assert scene.act() == "tune lr x2", "the same direction is the next candidate"
    assert scene.act() == "tune top_k x2", "and after a refusal it moves on"
    scene = Scene()
    scene.impossible = set(PROBES) - {"tune lr x2"}
    for _ in range(12):
        scene.act()
    scene.credited = scene.tried = True
    scene.policy._last = "tune lr x2"
    assert scene.act() == "tune lr x2"
    assert [scene.act() for _ in range(4)] == ["no-op"] * 3 + ["tune lr x2"], "the wait is short"


def test_it_never_probes_what_is_permitted_or_impossible() -> None:
    scene = Scene()
    scene.permitted |= {"tune lr x2"}
    scene.impossible = {"tune top_k x2"}
    assert scene.act() == "tune cooldown x0.5"


def test_it_grows_once_for_a_domain_that_stays_badly_served() -> None:
    scene = calm()
    scene.bits = {"a": 2.0, "b": 3.0}
    assert "add under slot 0" not in [scene.act(fall=0.0) for _ in range(8)], "not for good"
    scene = calm()
    scene.stage = 3
    scene.bits = {"a": 2.0, "b": 3.0}
    early = [scene.act(fall=0.0) for _ in range(4)]
    assert early == ["no-op"] * 4, "a new domain is given time"
    assert scene.act(fall=0.0) == "add under slot 0"
    assert "b is new and badly served (3.00 bits per byte)" in scene.policy.reason
    assert "add under slot 0" not in [scene.act(fall=0.0) for _ in range(4)]


def test_it_does_not_grow_where_all_goes_well() -> None:
    scene = calm()
    scene.bits = {"a": 2.0, "b": 2.1}
    assert "add under slot 0" not in [scene.act(fall=0.0) for _ in range(8)]
    scene = calm()
    for decision in range(8):
        scene.bits = {"a": 2.0, "b": 3.0 - 0.05 * decision}
        assert scene.act() != "add under slot 0", "it is still learning"


def plateau(scene: Scene, decisions: int = 3) -> Scene:
    for _ in range(decisions):
        scene.act(fall=0.0)
    return scene


def test_it_tunes_on_a_plateau_and_takes_back_what_did_not_help() -> None:
    scene = calm()
    scene.permitted |= set(TUNES)
    scene.impossible = set()
    assert [scene.act(fall=0.0) for _ in range(3)] == ["prune 10%", "prune 25%", "no-op"]
    assert scene.act(fall=-0.05) == "tune lr x0.5" and scene.policy.reason == "the loss is flat"
    assert scene.act(fall=-0.05) == "prune 10%", "it gives the change two decisions"
    assert scene.act(fall=0.0) == "tune lr x2"
    assert scene.policy.reason == "tune lr x0.5 did not help"


def test_it_keeps_what_helped_and_moves_on_to_the_next_parameter() -> None:
    scene = calm()
    scene.impossible = {label for label in PROBES if label not in TUNES}
    scene.permitted |= set(TUNES)
    plateau(scene)
    assert scene.act(fall=0.1) == "tune lr x0.5"
    assert [scene.act(fall=0.0) for _ in range(3)] == ["no-op"] * 3
    assert [scene.act(fall=0.0) for _ in range(7)] == [
        "tune top_k x2", "no-op", "tune cooldown x0.5", "no-op", "tune lr x2", "no-op",
        "tune lr x0.5",
    ]  # fmt: skip


def test_without_a_plateau_it_does_not_tune() -> None:
    scene = calm()
    scene.permitted |= set(TUNES)
    assert {scene.act(fall=0.05) for _ in range(8)} == {"no-op"}


def test_it_prunes_idle_agents_where_it_may() -> None:
    scene = calm()
    scene.impossible -= {"prune 10%"}
    scene.permitted |= {"prune 10%"}
    scene.rows[:6, 0] = scene.rows[2:6, 6] = 1.0  # six alive, four of them leaves
    scene.rows[:6, 3] = scene.rows[:6, 4] = 0.5
    assert plateau(scene).act(fall=0.0) == "no-op"
    scene.rows[5, 3:5] = 0.0
    assert scene.act(fall=0.0) == "prune 10%" and scene.policy.reason == "1 agents are idle"
    scene.rows[5, 4] = 0.5
    assert scene.act(fall=0.0) == "no-op", "it is updated"
    scene.rows[5, 4:7:2] = 0.0
    assert scene.act(fall=0.0) == "no-op", "it is no leaf"
    scene.rows[5, 6] = 1.0
    assert scene.act(fall=0.5) == "prune 10%"
    assert scene.act(fall=0.5) == "no-op", "the loss falls"


def test_at_stage_4_it_sets_its_yardsticks_and_stops_on_evidence() -> None:
    scene = calm()
    scene.stage, scene.permitted = 4, set(LABELS)
    wanted = ["benchmark: worst domain seen", "goal: lower the loss by 3 %", "no-op"]
    assert [scene.act() for _ in range(3)] == wanted
    scene.criteria = ["loss plateau", "own benchmark stable"]
    assert scene.act() == "no-op"
    scene.criteria.append("compute per gain at its best")
    assert scene.act() == "stop"
    assert scene.policy.reason == f"evidence for stopping: {', '.join(scene.criteria)}"
    scene.stage = 3
    assert scene.act() != "stop"


# -- memory -------------------------------------------------------------------------------------


def act_along(policy: HeuristicPolicy, scene: Scene, count: int) -> list[tuple[str, str]]:
    rng, chosen = np.random.default_rng(scene.decision), []
    for _ in range(count):
        fall = float(rng.choice([0.0, 0.0, 0.05, -0.02]))
        label = scene.act(policy, fall)
        scene.credited = scene.tried and bool(rng.random() < 0.3)
        if scene.decision == 12:
            scene.bits["b"] = 5.0
        chosen.append((label, policy.reason))
    return chosen


def twin_scenes(decisions: int) -> tuple[Scene, Scene]:
    made = []
    for _ in range(2):
        scene = Scene()
        scene.permitted |= set(TUNES[::2])
        act_along(scene.policy, scene, decisions)
        made.append(scene)
    return made[0], made[1]


@pytest.mark.parametrize("decisions", [0, 1, 5, 11, 12, 13, 25])
def test_a_memory_restored_from_json_goes_on_the_same(decisions: int) -> None:
    one, other = twin_scenes(decisions)
    stored = canonical_json(one.policy.state_dict())  # as in checkpoints: keys are sorted
    resumed = HeuristicPolicy(LABELS)
    resumed.load_state_dict(json.loads(stored))
    assert act_along(one.policy, one, 20) == act_along(resumed, other, 20)
    assert resumed.state_dict() == one.policy.state_dict()


def test_a_memory_is_a_copy() -> None:
    scene = Scene()
    scene.act()
    kept = scene.policy.state_dict()
    text = json.dumps(kept)
    for _ in range(5):
        scene.act()
    assert json.dumps(kept) == text
    again = HeuristicPolicy(LABELS)
    again.load_state_dict(kept)
    scene.act(again)
    assert json.dumps(kept) == text


def test_every_label_of_the_heuristic_is_in_the_table() -> None:
    from policies import heuristic

    named = {*PROBES, *heuristic.PLATEAU_MOVES, *heuristic.OPPOSITE, *heuristic.OPPOSITE.values()}
    assert named <= set(LABELS)
    assert set(heuristic.PLATEAU_MOVES) <= set(heuristic.OPPOSITE)


# -- the others ---------------------------------------------------------------------------------


def test_random_draws_from_what_is_possible_forbidden_included() -> None:
    scene = Scene()
    scene.impossible = set(LABELS) - {"no-op", "stop", "tune lr x2", "add under slot 0"}
    info = scene.info()
    policy = RandomPolicy(3)
    drawn = [LABELS[policy.act({}, info)] for _ in range(200)]
    assert set(drawn) == {"no-op", "stop", "tune lr x2", "add under slot 0"}
    assert min(drawn.count(label) for label in set(drawn)) > 25
    again, other = RandomPolicy(3), RandomPolicy(4)
    assert [LABELS[again.act({}, info)] for _ in range(200)] == drawn
    assert [LABELS[other.act({}, info)] for _ in range(200)] != drawn


def test_random_continues_from_json() -> None:
    info = Scene().info()
    one = RandomPolicy(3)
    for _ in range(7):
        one.act({}, info)
    other = RandomPolicy(99)
    other.load_state_dict(json.loads(json.dumps(one.state_dict())))
    assert [one.act({}, info) for _ in range(30)] == [other.act({}, info) for _ in range(30)]


def test_noop_does_nothing() -> None:
    policy = NoopPolicy()
    policy.load_state_dict(json.loads(json.dumps(policy.state_dict())))
    assert LABELS[policy.act({}, Scene().info())] == "no-op" and policy.reason


def test_policies_by_name() -> None:
    wanted = {
        "heuristic": HeuristicPolicy,
        "random": RandomPolicy,
        "random-legal": RandomLegalPolicy,
        "cheat": CheatPolicy,
        "noop": NoopPolicy,
    }
    untrained = [name for name in POLICIES if name != "ppo"]
    assert {name: type(make_policy(name, LABELS, seed=1)) for name in untrained} == wanted
    with pytest.raises(K1Error, match="unknown policy 'magic': choose one of heuristic"):
        make_policy("magic", LABELS)
    info = Scene().info()
    drawn = [make_policy("random", LABELS, seed=s).act({}, info) for s in range(12)]
    assert len(set(drawn)) > 1
