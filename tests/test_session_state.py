"""Stage 4, and snapshots: the whole of a session comes back and goes on as it would have."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch

from k1.data import TextData
from k1.durable import canonical_json
from k1.errors import CheckpointError
from k1env.autonomy import (
    BEST_COMPUTE,
    NO_STRUCTURE,
    PLATEAU,
    STABLE_BENCHMARK,
    Autonomy,
    Benchmark,
    Goal,
)
from k1env.session import MAIN, Session
from tests.phase2_helpers import index_of, kinds, quick

Start = Callable[..., Session]
BENCHMARK, GOAL = "benchmark: mean of all domains seen", "goal: lower the loss by 1 %"


@pytest.fixture
def start(data: TextData) -> Start:
    def begin(seed: int = 0, stage: int = 1, **fields: Any) -> Session:
        made = Session(quick(**fields), data, seed=seed)
        made.begin()
        made.boundary.stage = stage
        if stage == 4:
            made.boundary.bounds = made.boundary.hard
        return made

    return begin


def act(session: Session, *labels: str) -> None:
    for label in labels:
        session.act(index_of(session, label))


# -- stage 4 ------------------------------------------------------------------------------------


def test_stage_4_does_what_it_is_told_without_trials(start: Start) -> None:
    session = start(stage=4)
    act(session, "tune lr x10", "prune 25%", "tune cooldown x0.1", BENCHMARK, GOAL)
    assert session.boundary.attempted == 0 and session.tries == []
    assert session.arena.get_hyper(MAIN)["lr"] == pytest.approx(0.01)
    assert session.tree.agents == 5
    assert all(data["permitted"] for kind, data in session.ledger.entries if kind == "intent")
    act(session, "prune 50%")
    assert session.last is not None and session.last.impossible is not None
    assert session.tree.agents == 5, "the hard limits hold at every stage"


def test_own_benchmarks_and_goals_are_kept_and_reported(start: Start) -> None:
    session = start(stage=4)
    act(session, BENCHMARK, GOAL, "no-op")
    (benchmark,), (goal,) = session.autonomy.benchmarks, session.autonomy.goals
    assert benchmark.created == 0 and len(benchmark.values) == 3
    assert benchmark.values[-1] == session.bits["alpha"]
    assert goal.created == 1 and goal.target == pytest.approx(goal.start * 0.99)
    summary = session.summary()
    assert summary["benchmarks"][0]["name"] == "mean of all domains seen"
    assert summary["goals"][0]["name"] == "lower the loss by 1 %"
    early = start(stage=3)
    act(early, BENCHMARK)
    assert early.last is not None and early.last.impossible and not early.autonomy.benchmarks


def test_own_benchmarks_steer_neither_gate_nor_training(start: Start) -> None:
    one, other = start(stage=4), start(stage=4)
    act(one, BENCHMARK, GOAL, "no-op")
    act(other, "no-op", "no-op", "no-op")
    assert one.trainer.state_hash() == other.trainer.state_hash()
    assert one.bits == other.bits and one.spent == other.spent


def test_stopping_at_stage_4_names_the_criteria(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = start(stage=4)
    act(session, "stop")
    assert session.finished and session.stop_reason == "the controller stopped"
    assert session.stop_criteria == [] and session.boundary.attempted == 0
    assert session.last is not None and session.last.verdict == "stopped: no criterion held"
    session = start(stage=4)
    monkeypatch.setattr(Autonomy, "stop_criteria", lambda *_: [PLATEAU, NO_STRUCTURE])
    act(session, "stop")
    assert session.summary()["stop_criteria"] == [PLATEAU, NO_STRUCTURE]
    assert kinds(session)[-1] == "end"


def watched(losses: list[float], spent: int = 10, goal: int | None = None) -> Autonomy:
    made = Autonomy()
    if goal is not None:
        made.goals.append(Goal(goal, 0, 2.0))
    for decision, loss in enumerate(losses):
        made.observe(decision, {"a": loss}, ("a",), spent)
    return made


def test_a_plateau_is_no_progress_over_the_chosen_patience() -> None:
    flat = [2.0, 1.9, 1.8, *[1.8] * 5]
    assert PLATEAU in watched(flat).stop_criteria(8)
    assert PLATEAU not in watched(flat[:-1]).stop_criteria(7)
    assert PLATEAU not in watched([*flat, 1.7]).stop_criteria(9)
    assert PLATEAU in watched(flat[:6], goal=0).stop_criteria(6), "a patience of 3"
    assert PLATEAU not in watched(flat, goal=2).stop_criteria(8), "a patience of 10"


def test_structure_counts_only_where_it_was_tried() -> None:
    made = watched([2.0] * 12)
    assert NO_STRUCTURE not in made.stop_criteria(12)
    made.structural_tries = [4]
    assert NO_STRUCTURE in made.stop_criteria(12)
    assert NO_STRUCTURE not in made.stop_criteria(15), "that was long ago"
    made.last_structural_gain = 4
    assert NO_STRUCTURE not in made.stop_criteria(12)


def test_a_stable_benchmark_and_the_best_of_compute() -> None:
    made = Autonomy(benchmarks=[Benchmark(0, 0)])
    for decision in range(5):
        made.observe(decision, {"a": 2.0 - 0.0001 * decision}, ("a",), 10)
        assert (STABLE_BENCHMARK in made.stop_criteria(decision)) == (decision == 4)
    made.observe(5, {"a": 1.9}, ("a",), 10)
    assert STABLE_BENCHMARK not in made.stop_criteria(6)
    slowing = [4.0, 3.0, 2.5, 2.2, 2.1, 2.05, 2.04, 2.03, 2.02, 2.01, 2.0]
    assert BEST_COMPUTE in watched(slowing).stop_criteria(11)
    assert BEST_COMPUTE not in watched(slowing[:10]).stop_criteria(10)
    assert BEST_COMPUTE not in watched([4 - 0.01 * i**1.5 for i in range(11)]).stop_criteria(11)


def test_a_new_domain_starts_the_record_anew() -> None:
    made = watched([2.0] * 8)
    made.observe(8, {"a": 2.0, "b": 4.0}, ("a", "b"), 10)
    assert made.losses == [3.0] and PLATEAU not in made.stop_criteria(9)


def test_benchmarks_measure_what_they_say() -> None:
    bits = {"a": 1.0, "b": 3.0, "c": 2.0}
    assert [Benchmark(t, 0).measure(bits, ("a", "b", "c")) for t in range(3)] == [2.0, 3.0, 2.0]
    goal = Goal(1, 0, 2.0)
    assert goal.target == pytest.approx(1.94) and goal.patience == 5
    made = Autonomy(goals=[goal])
    made.observe(3, {"a": 1.95}, ("a",), 1)
    assert goal.reached is None
    made.observe(4, {"a": 1.94}, ("a",), 1)
    made.observe(5, {"a": 1.0}, ("a",), 1)
    assert goal.reached == 4


def test_a_cheat_that_does_not_last_earns_nothing(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The guard has the last word: what it takes back was no improvement."""
    session = start()
    monkeypatch.setattr(session.gate, "config", quick(gate={"margin": -1.0}).gate)
    monkeypatch.setattr(type(session.gate), "_hopeless", lambda *_: False)
    session.guard.best_loss = 0.1
    session.visited.clear()
    act(session, "tune lr x2")
    last = session.last
    assert last is not None and last.trial is not None and last.trial.accepted
    assert last.rolled_back and not last.credited and "rolled back" in last.verdict
    assert session.arena.get_hyper(MAIN)["lr"] == pytest.approx(1e-3)
    assert (session.boundary.attempted, session.boundary.accepted) == (1, 0)
    assert session.boundary.evidence == 10 / 11


# -- snapshots ----------------------------------------------------------------------------------

BEFORE = ("no-op", "add under slot 0", "tune lr x0.1", "no-op")
AFTER = ("tune lr x2", "add under slot 0", "no-op", "prune 10%")


def as_stored(session: Session) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """A snapshot after its way through a file."""
    tensors, state = session.snapshot()
    stored: dict[str, Any] = json.loads(canonical_json(state))
    return {name: tensor.clone() for name, tensor in tensors.items()}, stored


@pytest.mark.parametrize("stage", [1, 4])
def test_a_restored_session_goes_on_as_the_original(start: Start, stage: int) -> None:
    before = (*BEFORE, *((BENCHMARK, GOAL) if stage == 4 else ()))
    original = start(stage=stage, phase_decisions=3)
    act(original, *before)
    saved = as_stored(original)
    fresh = Session(original.settings, original.data, seed=0)
    fresh.restore(*saved)
    assert fresh.trainer.state_hash() == original.trainer.state_hash()
    assert fresh.snapshot()[1] == original.snapshot()[1]
    count = len(original.ledger.entries)
    act(original, *AFTER)
    act(fresh, *AFTER)
    assert fresh.ledger.entries == original.ledger.entries[count:]
    assert fresh.summary() == original.summary()
    assert fresh.snapshot()[1] == original.snapshot()[1]


def test_a_snapshot_can_be_restored_again_and_again(start: Start) -> None:
    session = start(stage=4)
    act(session, BENCHMARK, "add under slot 0", "no-op")
    saved = session.snapshot()
    wanted = json.dumps(saved[1])
    results = []
    for _ in range(3):
        session.restore(*saved)
        act(session, "tune lr x2", "add under slot 0", GOAL, "prune 10%")
        results.append(json.dumps([session.summary(), session.snapshot()[1]]))
    assert json.dumps(saved[1]) == wanted, "what happens later does not leak into a snapshot"
    assert results[0] == results[1] == results[2]


def test_a_rollback_works_after_a_restore(start: Start) -> None:
    original = start(phase1_steps=20)
    act(original, "no-op")
    saved = as_stored(original)
    sessions = [original, Session(original.settings, original.data, seed=0)]
    sessions[1].restore(*saved)
    for session in sessions:
        session.arena["shared"][MAIN] = float("nan")
        act(session, "no-op")
        assert session.last is not None and session.last.rolled_back
    assert sessions[0].trainer.state_hash() == sessions[1].trainer.state_hash()


def test_a_snapshot_of_other_sizes_or_another_version_is_refused(start: Start) -> None:
    session = start()
    tensors, state = session.snapshot()
    for lost in ("boundary", "guard", "tries", "bits"):
        partial = {key: value for key, value in state.items() if key != lost}
        with pytest.raises(CheckpointError, match=f"another version.*'{lost}'"):
            session.restore(tensors, partial)
    wrong = {**tensors, "main.weight": tensors["main.weight"][:, :-1]}
    with pytest.raises(CheckpointError, match="does not fit"):
        session.restore(wrong, state)


def test_the_same_seed_gives_the_same_run(start: Start) -> None:
    one, same, other = start(seed=5), start(seed=5), start(seed=6)
    for session in (one, same, other):
        act(session, "tune lr x2", "add under slot 0")
    assert one.ledger.entries == same.ledger.entries and one.summary() == same.summary()
    assert one.trainer.state_hash() != other.trainer.state_hash()
