"""Gradients that are not finite, rates that are too high, text that is rubbish: what becomes of it.

`tests/test_update.py` has one step in every mode, `tests/test_session.py` the guard by itself; here
are whole decisions and whole runs.
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from k1.data import TextData
from k1.errors import K1Error
from k1.forward import Batch
from k1.path import Gradients
from k1.path_cpu import CpuPathPass
from k1env.env import Phase2Env
from k1env.gate import CHEAT, CONTROL, SHADOW, Comparison, TrialResult
from k1env.ledger import Ledger, read_ledger
from k1env.plain_log import PlainLog, final_report
from k1env.session import MAIN, SHADOW_LANE, Session
from k1env.vector import Phase2VectorEnv
from tests.phase2_helpers import index_of, quick
from tests.vector_helpers import same

Start = Callable[..., Session]
LEARNED: dict[str, Any] = {"phase1_steps": 100, "phase1_lr": 1e-2, "interval": 6}
"""Enough of Phase 1 for something to be lost."""
STREAM = {"step", "skipped", "data_cursor", "mix", "responsibility", "mean_responsibility"}
"""What goes on in a step that is skipped: counters, the data, and what a healthy probe measured."""


@pytest.fixture
def start(data: TextData) -> Start:
    def begin(seed: int = 0, **fields: Any) -> Session:
        made = Session(quick(**{"phase1_steps": 12, "interval": 4, **fields}), data, seed=seed)
        made.begin()
        return made

    return begin


def act(session: Session, label: str = "no-op") -> Any:
    return session.act(index_of(session, label))


def spoil_gradients(patch: pytest.MonkeyPatch, where: str, bad: float) -> None:
    """Let every gradient of a path have one number that is not finite."""
    original = CpuPathPass.gradients

    def gradients(self: CpuPathPass) -> Gradients:
        found = original(self)
        rows, shared = found.by_row.clone(), found.by_shared.clone()
        (rows if where == "block" else shared)[0, 0] = bad
        return Gradients(found.loss, rows, rows.square().sum(1), shared)

    patch.setattr(CpuPathPass, "gradients", gradients)


def spoil_text(session: Session, patch: pytest.MonkeyPatch, kind: str) -> None:
    """Let training read rubbish in place of its text."""
    original = session.engine.store.sample
    vocabulary = session.data.vocab_size

    def sample(pool: str, *rest: Any) -> Batch:
        batch = original(pool, *rest)
        if pool != "train":
            return batch
        generator = torch.Generator().manual_seed(0)
        shape = batch.inputs.shape
        text = torch.randint(vocabulary, (*shape[:-1], shape[-1] + 1), generator=generator)
        text = text if kind == "random bytes" else torch.full_like(text, 7)
        return replace(batch, inputs=text[..., :-1], targets=text[..., 1:])

    patch.setattr(session.engine.store, "sample", sample)


def ends_well(session: Session, decisions: int = 100) -> None:
    """Play on to the end; the state stays sound and all that is on record can be written."""
    while not session.finished and decisions:
        act(session)
        decisions -= 1
        for name, tensor in session.arena.state.items():
            assert not tensor.is_floating_point() or bool(torch.isfinite(tensor[MAIN]).all()), name
        assert all(math.isfinite(bits) for bits in session.bits.values())
    assert session.finished and session.stop_reason
    json.dumps([session.ledger.entries, session.summary()], allow_nan=False)  # type: ignore[attr-defined]


# -- gradients -----------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["block", "shared"])
def test_a_bad_gradient_is_skipped_counted_and_shown(
    start: Start, monkeypatch: pytest.MonkeyPatch, where: str, bad: float
) -> None:
    session, stream = start(), io.StringIO()
    log = PlainLog(stream)
    log.start(session)
    before, bits = session.arena.read_lane(MAIN).tensors, session.bits
    with monkeypatch.context() as patch:
        spoil_gradients(patch, where, bad)
        outcome = act(session)
    log.outcome(outcome)
    after = session.arena.read_lane(MAIN).tensors
    changed = {name for name in after if not torch.equal(after[name], before[name])}
    assert {"step", "skipped", "data_cursor"} <= changed <= STREAM
    assert int(after["data_cursor"] - before["data_cursor"]) == 4, "the data has moved on"
    assert not outcome.rolled_back and session.bits == bits
    assert session.summary()["skipped_steps"] == 4 and session.trainer.steps == 16
    assert "4 of 16 steps skipped" in stream.getvalue()
    assert "4 steps skipped, 0 rollbacks" in final_report(session.summary())
    act(session)
    assert session.summary()["skipped_steps"] == 4 and session.bits != bits, "it learns again"


def test_a_controller_sees_skipped_steps(data: TextData, monkeypatch: pytest.MonkeyPatch) -> None:
    env = Phase2Env(config=quick(), data=data)
    env.reset(seed=0)
    spoil_gradients(monkeypatch, "block", math.nan)
    observation, reward, *_ = env.step(0)
    assert observation["system"][3] == np.float32(2 / 6) and math.isfinite(reward)


def test_a_run_of_bad_gradients_ends_and_says_so(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = start(max_decisions=5)
    weights = session.arena["weight"][MAIN].clone()
    spoil_gradients(monkeypatch, "block", math.nan)
    ends_well(session)
    summary = session.summary()
    assert summary["skipped_steps"] == 20 and summary["stop_reason"] == "all decisions made"
    assert torch.equal(session.arena["weight"][MAIN], weights)
    assert summary["bits_per_byte_end"] == summary["bits_per_byte_start"]


def test_a_lane_that_diverges_is_alone_with_it(data: TextData) -> None:
    together = Phase2VectorEnv(2, config=quick(), data=data)
    alone = Phase2Env(config=quick(), data=data)
    together.reset(seed=[4, 5])
    alone.reset(seed=5)
    for turn in range(3):
        sick = together.envs[0].session
        sick.arena["shared"][sick.main] = math.nan
        results = together.step_each([0, index_of(alone, "tune lr x0.1") if turn else 0])
        single = alone.step(index_of(alone, "tune lr x0.1") if turn else 0)
        assert same(results[1].observation, single[0]) and results[1].reward == single[1]
        assert sick.guard.rollbacks == turn + 1


# -- rates and text ------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["dense", "exact", "sparse"])
def test_a_start_at_the_hardest_rate_ends_and_says_why(start: Start, mode: str) -> None:
    """A rollback cannot help: the best state has the same rate."""
    system = quick().system.replace(
        train={"lr": 0.3, "top_k": 6, "cooldown": 0, "eval_windows": 2}, update={"mode": mode}
    )
    session = start(system=system, **LEARNED)
    ends_well(session)
    assert session.stop_reason == "divergence beyond rollback" and session.guard.rollbacks == 4
    assert session.bits == session.bits_start, "what is left is the best state"


def test_a_rate_raised_to_the_limit_goes_back_with_the_weights(start: Start) -> None:
    session = start(max_decisions=6, **LEARNED)
    session.boundary.stage, session.boundary.bounds = 4, session.boundary.hard
    session.arena.set_hyper(MAIN, "lr", 0.03)
    session.guard.remember(session.arena.read_lane(MAIN), 0.999 * session.bits["alpha"])
    outcome = act(session, "tune lr x10")
    assert outcome.applied and outcome.rolled_back
    assert session.arena.get_hyper(MAIN)["lr"] == pytest.approx(0.03)
    ends_well(session)


def test_every_rollback_is_on_record(start: Start) -> None:
    system = quick().system.replace(train={"lr": 0.3, "eval_windows": 2})
    session, stream = start(system=system, **LEARNED), io.StringIO()
    log = PlainLog(stream)
    log.start(session)
    while not session.finished:
        log.outcome(act(session))
    entries = session.ledger.entries  # type: ignore[attr-defined]
    logged = [data["rolled_back"] for kind, data in entries if kind == "outcome"]
    count = session.guard.rollbacks
    assert sum(logged) == count == session.summary()["rollbacks"] > 0
    assert stream.getvalue().count("rolled back to the best state, for the loss diverged") == count
    assert f"{count} rollbacks" in final_report(session.summary())
    cursors = [data["cursor"] for kind, data in entries if kind == "outcome"]
    assert len(set(cursors)) == len(cursors), "no batch is met twice"


@pytest.mark.parametrize("kind", ["random bytes", "one byte"])
def test_rubbish_text_is_rolled_back_and_left_behind(
    start: Start, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    system = quick().system.replace(train={"lr": 0.1, "eval_windows": 4})
    session = start(system=system, max_decisions=6, **LEARNED)
    best, bits = session.guard.best, session.bits
    assert best is not None
    with monkeypatch.context() as patch:
        spoil_text(session, patch, kind)
        outcome = act(session)
    assert outcome.rolled_back and session.bits == bits
    now = session.arena.read_lane(MAIN).tensors
    for name in ("weight", "first", "second", "count", "shared_first", "evidence", "step"):
        assert torch.equal(now[name], best.tensors[name]), name
    assert int(now["data_cursor"] - best.tensors["data_cursor"]) == 6
    session.arena.set_hyper(MAIN, "lr", 1e-3)
    ends_well(session)
    assert session.guard.rollbacks == 1 and session.stop_reason == "all decisions made"


def test_text_that_stays_rubbish_ends_the_run_with_the_reason(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    system = quick().system.replace(train={"lr": 0.1, "eval_windows": 4})
    session = start(system=system, max_rollbacks=2, **LEARNED)
    spoil_text(session, monkeypatch, "one byte")
    ends_well(session)
    assert session.stop_reason == "divergence beyond rollback" and session.guard.in_a_row == 3
    best = session.guard.best
    assert best is not None
    assert torch.equal(session.arena["weight"][MAIN], best.tensors["weight"]), "the best is left"


def test_a_phase_1_that_diverged_is_no_start(data: TextData, tmp_path: Path) -> None:
    ledger = Ledger.create(tmp_path / "ledger.jsonl")
    env = Phase2Env(config=quick(phase1_lr=1e30), data=data, ledger=ledger)
    with pytest.raises(K1Error, match="not finite; lower phase1_lr, or start from another"):
        env.reset(seed=0)
    assert read_ledger(ledger.path) == []
    with pytest.raises(K1Error, match="call reset"):
        env.step(0)


# -- trials --------------------------------------------------------------------------------------


def accept(session: Session, patch: pytest.MonkeyPatch) -> None:
    """Let the next trial accept a cheat that wrecks the system."""

    def trial(main: int, shadow: int | None, change: Any, **_: Any) -> Any:
        yield from ()
        arena, steps = session.arena, session.settings.gate.horizon
        session.gate.adopted = {}
        for lane, arm in enumerate((CONTROL, CHEAT, SHADOW), start=2):
            if arm != SHADOW or shadow is not None:
                arena.copy_lane(SHADOW_LANE if arm == SHADOW else main, lane)
                session.engine.train(lane, lane + 1, steps)
                if arm == CHEAT:
                    arena["shared"][lane] *= -20.0
                session.gate.adopted[arm] = arena.read_lane(lane)
        measured = Comparison((0.1,) * 8, 0.1, 0.01, 1e-6, True)
        return TrialResult(True, "improves", measured, None, 8, 40)

    patch.setattr(session.gate, "trial", trial)


def test_a_cheat_that_was_rolled_back_still_has_its_shadow(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or a controller could shed it, and be paid for mending what it had broken itself."""
    session = start()
    act(session, "add under slot 0")
    with monkeypatch.context() as patch:
        accept(session, patch)
        outcome = act(session, "tune lr x2")
    assert outcome.applied and outcome.rolled_back and not outcome.credited
    assert session.shadow_diverged
    for name in ("data_seed", "data_cursor"):
        assert session.arena[name][MAIN] == session.arena[name][SHADOW_LANE]
    honest = act(session, "tune lr x0.1")
    assert honest.trial is not None and honest.trial.shadow is not None, "it is asked again"


def test_without_a_change_of_ones_own_a_rollback_makes_no_shadow(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = start()
    accept(session, monkeypatch)
    assert act(session, "tune lr x2").rolled_back and not session.shadow_diverged
