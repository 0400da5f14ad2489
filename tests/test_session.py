"""A session of Phase 2: what is logged when, what a trial leaves behind, and how a run ends."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from k1.arena import LaneState
from k1.data import TextData
from k1env.actions import ActionError
from k1env.boundary import STAGE_2_BOUNDS
from k1env.gate import CHEAT, CONTROL, SHADOW, Comparison, TrialResult
from k1env.outcome import MemoryLedger, Outcome
from k1env.schedule import Task
from k1env.session import MAIN, SHADOW_LANE, Session
from k1env.settings import Settings
from tests.phase2_helpers import entry, index_of, kinds, quick

Start = Callable[..., Session]


@pytest.fixture
def start(data: TextData) -> Start:
    def begin(settings: Settings | None = None, seed: int = 0, **fields: Any) -> Session:
        made = Session(settings or quick(**fields), data, seed=seed)
        made.begin()
        return made

    return begin


def act(session: Session, label: str) -> Outcome:
    return session.act(index_of(session, label))


def rule_trials(
    session: Session, monkeypatch: pytest.MonkeyPatch, accepted: bool | Exception
) -> list[dict[str, Any]]:
    """Replace the gate's judgement, not its lanes; returns the arguments of every trial."""
    calls: list[dict[str, Any]] = []

    def run(main: int, shadow: int | None, change: Any, **more: Any) -> TrialResult:
        calls.append({"shadow": shadow, **more})
        if isinstance(accepted, Exception):
            raise accepted
        session.gate.adopted = {}
        for lane, arm in enumerate((CONTROL, CHEAT, SHADOW), start=2):
            if arm != SHADOW or shadow is not None:
                session.arena.copy_lane(SHADOW_LANE if arm == SHADOW else main, lane)
                if arm == CHEAT:
                    change(lane)
                session.engine.train(lane, lane + 1, session.settings.gate.horizon)
                session.gate.adopted[arm] = session.arena.read_lane(lane)
        measured = Comparison((0.1,) * 8, 0.1, 0.01, 1e-6, accepted)
        return TrialResult(accepted, "improves", measured, None, 8, 40)

    def trial(*arguments: Any, **more: Any) -> Task[TrialResult]:
        yield from ()
        return run(*arguments, **more)

    monkeypatch.setattr(session.gate, "trial", trial)
    return calls


class StopHere(Exception):
    pass


class Witness(MemoryLedger):
    """A ledger whose session is looked at before each entry."""

    def __init__(self) -> None:
        super().__init__()
        self.hashes: list[tuple[str, str, int]] = []
        self.session: Session | None = None
        self.fails_at = ""

    def append(self, kind: str, /, **data: Any) -> None:
        if self.session is not None:
            attempted = self.session.boundary.attempted
            self.hashes.append((kind, self.session.trainer.state_hash(), attempted))
        if kind == self.fails_at:
            raise StopHere
        super().append(kind, **data)


@pytest.mark.parametrize("label", ["no-op", "add under slot 0", "tune lr x2", "prune 50%", "stop"])
def test_the_intent_is_on_record_before_anything_happens(start: Start, label: str) -> None:
    session = start()
    session.ledger = ledger = Witness()
    ledger.session, ledger.fails_at = session, "intent"
    before = session.trainer.state_hash()
    with pytest.raises(StopHere):
        act(session, label)
    assert session.trainer.state_hash() == before
    assert session.boundary.attempted == session.decision == session.spent == 0
    ledger.fails_at = ""
    outcome = act(session, label)
    assert ledger.hashes[1] == ("intent", before, 0)
    assert kinds(session)[:2] == ["intent", "outcome"]
    intent, last = ledger.entries[0][1], ledger.entries[1][1]
    assert (intent["decision"], intent["action"]) == (0, index_of(session, label))
    assert intent["permitted"] == outcome.permitted and intent["stage"] == 1
    assert last["state_hash"] == session.trainer.state_hash()
    assert (last["verdict"], last["spent"]) == (outcome.verdict, session.spent)
    assert last["cursor"] == int(session.arena["data_cursor"][MAIN])
    json.dumps(ledger.entries, allow_nan=False)


def test_an_action_outside_the_table_leaves_no_trace(start: Start) -> None:
    session = start()
    before, entries = session.snapshot()[1], len(kinds(session))
    for index in (-1, len(session.table)):
        with pytest.raises(ActionError):
            session.act(index)
    assert session.snapshot()[1] == before and len(kinds(session)) == entries


def test_the_start_is_logged(start: Start) -> None:
    session = start(seed=3)
    data = entry(session, "start")
    assert (data["seed"], data["agents"]) == (3, 6)
    assert data["state_hash"] == session.trainer.state_hash()
    assert data["data"] == session.data.fingerprint
    assert session.trainer.steps == session.settings.phase1_steps


# -- trials -------------------------------------------------------------------------------------


def same_lane(one: LaneState, other: LaneState, exact: bool = True) -> None:
    assert one.tree.to_dict() == other.tree.to_dict()
    for name, tensor in one.tensors.items():
        close = torch.allclose(tensor.double(), other.tensors[name].double(), atol=1e-6, rtol=1e-5)
        assert torch.equal(tensor, other.tensors[name]) if exact else close, name


def test_what_is_refused_leaves_the_control_as_if_it_had_trained_on(start: Start) -> None:
    """The twins' control is the main stream: bit for bit the lane kept, to rounding a no-op."""
    refused, plain = start(phase1_steps=20), start(phase1_steps=20)
    outcome = act(refused, "tune lr x0.1")
    act(plain, "no-op")
    assert outcome.refused and not outcome.applied and outcome.trial is not None
    same_lane(refused.arena.read_lane(MAIN), refused.gate.adopted[CONTROL])
    same_lane(refused.arena.read_lane(MAIN), plain.arena.read_lane(MAIN), exact=False)
    assert refused.arena.get_hyper(MAIN) == plain.arena.get_hyper(MAIN)
    assert (refused.boundary.attempted, refused.boundary.accepted) == (1, 0)
    assert refused.boundary.evidence == 10 / 11
    assert refused.boundary.bounds == STAGE_2_BOUNDS
    assert refused.spent == outcome.trial.lane_steps
    assert "cheat refused: stage 1" in outcome.verdict


def test_what_is_accepted_is_kept_counted_and_widens(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = start()
    rule_trials(session, monkeypatch, True)
    outcome = act(session, "tune lr x10")
    assert outcome.applied and outcome.credited and not outcome.refused
    same_lane(session.arena.read_lane(MAIN), session.gate.adopted[CHEAT])
    assert session.arena.get_hyper(MAIN)["lr"] == pytest.approx(0.01)
    act(session, "tune lr x10")
    assert session.arena.get_hyper(MAIN)["lr"] == pytest.approx(0.1)
    assert session.boundary.bounds.lr == (1e-4, 0.1)
    assert (session.boundary.accepted, session.boundary.evidence) == (2, 100.0)
    assert entry(session, "outcome")["evidence"] == 100.0
    outcome = act(session, "prune 10%")
    assert outcome.promoted and session.boundary.stage == 2
    assert session.boundary.bounds.min_agents == 5 and session.tree.agents == 5
    assert [e["credited"] for e in session.tries] == [True] * 3
    assert session.tries[2] == {
        "decision": 2, "action": index_of(session, "prune 10%"), "stage": 1, "credited": True,
        "applied": True,
    }  # fmt: skip
    assert session.summary()["stage_history"][-1]["stage"] == 2


def test_a_configuration_visited_before_earns_nothing(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = start()
    rule_trials(session, monkeypatch, True)
    act(session, "tune lr x0.5")
    again = act(session, "tune lr x2")
    assert again.applied and not again.credited and "earns nothing" in again.verdict
    assert session.arena.get_hyper(MAIN)["lr"] == pytest.approx(1e-3)
    assert (session.boundary.attempted, session.boundary.accepted) == (2, 1)
    assert session.boundary.evidence == pytest.approx(100 / 11)
    act(session, "add under slot 0")
    assert act(session, "tune lr x0.5").credited, "with another tree it is another configuration"


def test_every_attempt_has_a_seed_of_its_own(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    session = start()
    calls = rule_trials(session, monkeypatch, False)
    for _ in range(3):
        act(session, "tune lr x2")
    assert len({call["seed"] for call in calls}) == 3
    assert all(call["shadow"] is None and not call["stop"] for call in calls)
    act(session, "stop")
    assert calls[-1]["stop"]


def test_a_crash_in_a_trial_is_a_failure_and_the_run_goes_on(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    for error in (RuntimeError("out of memory\nat address 0x7f"), RuntimeError()):
        session, plain = start(), start()
        rule_trials(session, monkeypatch, error)
        outcome = act(session, "tune lr x10")
        act(plain, "no-op")
        assert outcome.refused and "crashed" in outcome.verdict and "\n" not in outcome.verdict
        assert (session.boundary.attempted, session.boundary.evidence) == (1, 10 / 11)
        assert session.trainer.state_hash() == plain.trainer.state_hash()
        assert session.spent == 2 and entry(session, "outcome")["trial"]["seeds_run"] == 0
        act(session, "no-op")
        assert session.decision == 2


def test_a_crash_half_way_through_a_trial_leaves_the_system_whole(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    session, plain = start(), start()
    count, change = 0, session.moves.change

    def dies_at_the_third(*arguments: Any) -> None:
        nonlocal count
        count += 1
        if count == 3:
            raise RuntimeError("dead")
        change(*arguments)

    monkeypatch.setattr(session.moves, "change", dies_at_the_third)
    monkeypatch.setattr(type(session.gate), "_hopeless", lambda *_: False)
    act(session, "tune lr x10")
    act(plain, "no-op")
    assert session.trainer.state_hash() == plain.trainer.state_hash()


# -- the shadow ---------------------------------------------------------------------------------


def test_a_change_of_ones_own_starts_a_shadow_and_a_success_drops_it(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    session, plain = start(), start()
    calls = rule_trials(session, monkeypatch, False)
    act(session, "no-op")
    assert not session.shadow_diverged
    act(session, "add under slot 0")
    act(session, "no-op")
    for _ in range(3):
        act(plain, "no-op")
    assert session.shadow_diverged and session.tree.agents == 9
    same_lane(session.arena.read_lane(SHADOW_LANE), plain.arena.read_lane(MAIN), exact=False)
    assert session.spent == 2 + 4 + 4, "the shadow's training is paid for"
    act(session, "tune lr x2")
    assert calls[-1]["shadow"] == SHADOW_LANE and session.shadow_diverged
    same_lane(session.arena.read_lane(SHADOW_LANE), session.gate.adopted[SHADOW])
    rule_trials(session, monkeypatch, True)
    act(session, "tune lr x2")
    assert not session.shadow_diverged
    calls = rule_trials(session, monkeypatch, True)
    act(session, "tune lr x2")
    assert calls[-1]["shadow"] is None


@pytest.mark.parametrize("label", ["tune lr x0.1", "stop"])
def test_a_refused_trial_keeps_the_shadow_in_step(start: Start, label: str) -> None:
    """Or it would be left behind, and beating it would mean nothing."""
    session = start(phase1_steps=20)
    act(session, "add under slot 0")
    assert act(session, label).refused
    assert session.arena.host_step[SHADOW_LANE] == session.trainer.steps == 24
    for name in ("step", "data_cursor", "data_seed"):
        assert session.arena[name][MAIN] == session.arena[name][SHADOW_LANE]


# -- the divergence guard -----------------------------------------------------------------------


@pytest.mark.parametrize("harm", ["nan", "far worse"])
def test_divergence_goes_back_weights_optimizer_and_all_but_the_data(
    start: Start, harm: str
) -> None:
    session = start(phase1_steps=40)
    best = session.guard.best
    assert best is not None
    session.arena["shared"][MAIN] *= math.nan if harm == "nan" else -20.0
    session.arena["first"][MAIN] += 1.0
    session.arena.set_hyper(MAIN, "lr", 0.2)
    outcome = act(session, "no-op")
    assert outcome.rolled_back and (session.guard.rollbacks, session.guard.in_a_row) == (1, 1)
    now = session.arena.read_lane(MAIN)
    for name, tensor in best.tensors.items():
        if name != "data_cursor":
            assert torch.equal(now.tensors[name], tensor), name
    assert now.tensors["data_cursor"] == best.tensors["data_cursor"] + 2
    assert all(math.isfinite(bits) for bits in session.bits.values())
    assert session.bits == session.bits_start and outcome.fall == 0.0
    assert entry(session, "outcome")["rolled_back"]
    act(session, "no-op")
    assert session.guard.in_a_row == 0 and session.guard.rollbacks == 1


def test_divergence_beyond_rollback_ends_the_run(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = start(max_rollbacks=2)
    train = session.engine.train

    def poison(low: int, high: int, *rest: Any) -> None:
        train(low, high, *rest)
        session.arena["shared"][low:high] = math.nan

    monkeypatch.setattr(session.engine, "train", poison)
    for number in range(3):
        assert not session.finished
        act(session, "no-op")
        assert session.guard.in_a_row == number + 1
    assert session.stop_reason == "divergence beyond rollback" and not session.out_of_budget
    assert kinds(session)[-1] == "end"
    json.dumps([session.ledger.entries, session.summary()], allow_nan=False)


def test_a_little_worse_is_no_divergence(start: Start) -> None:
    session = start()
    session.guard.best_loss = session.bits["alpha"] / 1.19
    assert not act(session, "no-op").rolled_back
    session.guard.best_loss = session.bits["alpha"] / 1.25
    assert act(session, "no-op").rolled_back


# -- the end ------------------------------------------------------------------------------------


def test_stopping_before_stage_4_is_tried(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    session = start()
    refused = act(session, "stop")
    assert refused.trial is not None and refused.refused and not session.finished
    calls = rule_trials(session, monkeypatch, True)
    outcome = act(session, "stop")
    assert outcome.stopped and outcome.credited and session.finished and calls[-1]["stop"]
    assert session.stop_reason == "the controller stopped (cheat)"
    assert kinds(session)[-2:] == ["outcome", "end"] and session.boundary.attempted == 2


def test_budget_and_decisions_end_a_run(start: Start) -> None:
    session = start(budget=5)
    for _ in range(3):
        assert not session.finished
        act(session, "no-op")
    assert session.stop_reason == "compute budget spent" and session.out_of_budget
    session = start(max_decisions=2)
    act(session, "no-op")
    assert not session.finished
    act(session, "no-op")
    assert session.stop_reason == "all decisions made" and session.out_of_budget


def test_the_stream_moves_from_domain_to_domain(start: Start) -> None:
    session = start(phase_decisions=2, replay=0.2)
    mixes, seen = [], []
    for _ in range(6):
        seen.append(session.seen)
        act(session, "no-op")
        mixes.append([round(x, 3) for x in session.arena["mix"][MAIN].tolist()])
    assert mixes[::2] == [[1, 0, 0], [0.2, 0.8, 0], [0.1, 0.1, 0.8]] and mixes[1::2] == mixes[::2]
    assert seen[::2] == [("alpha",), ("alpha", "beta"), ("alpha", "beta", "gamma")]
    act(session, "add under slot 0")
    assert torch.equal(session.arena["mix"][SHADOW_LANE], session.arena["mix"][MAIN])
    assert session.guard.phase == 2


def test_the_score_is_over_the_domains_seen(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    session = start(phase_decisions=1)
    calls = rule_trials(session, monkeypatch, False)
    for _ in range(3):
        act(session, "tune lr x2")
    assert [call["mix"] for call in calls] == [[1, 0, 0], [0.5, 0.5, 0], [1 / 3] * 3]


def test_compute_has_a_price(start: Start) -> None:
    session = start(settings=replace(quick(), gate=replace(quick().gate, compute_price=0.5)))
    assert session._price(MAIN) == pytest.approx(0.5)
    session.arena.copy_lane(MAIN, 2)
    session.moves.change(session.table[index_of(session, "add under slot 0")], 2)
    assert session._price(2) > session._price(MAIN)
