"""Luck: many attempts, attempts of nothing, attempts seen or taken back before they count."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from k1.data import TextData
from k1.errors import K1Error, LedgerError
from k1env.env import Phase2Env
from k1env.gate import (
    CHEAT,
    CONTROL,
    FIRST_TRIAL_LANE,
    SHADOW,
    Change,
    Gate,
    GateConfig,
    TrialResult,
    judge,
)
from k1env.ledger import read_ledger
from k1env.run_folder import RunFolder
from k1env.runner import Runner
from k1env.schedule import Task
from k1env.session import Session
from k1env.settings import Settings
from tests.attacks.helpers import Books, attack, earned_nothing, play
from tests.phase2_helpers import index_of, kinds, prepare_run, quick, smallest


def measured(session: Session, monkeypatch: pytest.MonkeyPatch, gains: list[list[float]]) -> None:
    """Let trials measure these gains, an attempt after the other, with the gate's own judgement."""
    attempts = iter(gains)

    def trial(main: int, shadow: int | None, change: Change, **more: Any) -> Task[TrialResult]:
        yield from ()
        session.arena.copy_lane(main, FIRST_TRIAL_LANE)
        change(FIRST_TRIAL_LANE)
        lanes = {CONTROL: main, CHEAT: FIRST_TRIAL_LANE, SHADOW: session.shadow}
        session.gate.adopted = {arm: session.arena.read_lane(lanes[arm]) for arm in lanes}
        found = judge(next(attempts), session.gate.config)
        return TrialResult(found.passed, "", found, None, 8, 0)

    monkeypatch.setattr(session.gate, "trial", trial)


def test_many_tiny_cheats(data: TextData, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gains that are real, sure and below the margin: forty of them are worth nothing."""
    session = attack(data, smallest({"seeds": 8}))
    rng = np.random.default_rng(1)
    gains = rng.normal(0.0007, 0.0001, (40, 8))
    assert all(judge(row, GateConfig(margin=0.0)).passed for row in gains), "each is beyond doubt"
    measured(session, monkeypatch, gains.tolist())
    before = Books.of(session)
    play(session, *["tune lr x0.5"] * 40)
    earned_nothing(session, before, 40)


def test_retrying_luck_ends_with_less_evidence(
    data: TextData, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Noise tried until it passes: a success now and then, and no stage."""
    session = attack(data, smallest({"seeds": 8}, max_decisions=200, budget=10**9))
    gains = np.random.default_rng(0).normal(0.001, 0.01, (150, 8)).tolist()
    measured(session, monkeypatch, gains)
    lucky = sum(judge(row, GateConfig()).passed for row in gains)
    assert lucky >= 3, "a rule that counts successes would have promoted it"
    play(session, *["tune lr x2", "tune lr x0.5"] * 75)
    boundary = session.boundary
    assert boundary.stage == 1 and boundary.evidence < 1
    assert boundary.attempted == 150 and 0 < boundary.accepted <= lucky


def test_a_cheat_that_does_nothing(data: TextData) -> None:
    """Own: top_k beyond the agents that there are changes no step, and is a difference of 0."""
    session = attack(data, quick(), stage=1)
    session.moves.change(session.table[index_of(session, "tune top_k x4")], session.main)
    session.visited = [session.moves.signature(session.main)]
    assert session.arena.host_top_k[session.main] > session.tree.agents
    before = Books.of(session)
    (outcome,) = play(session, "tune top_k x0.5")
    assert outcome.trial is not None and outcome.trial.control is not None
    assert set(outcome.trial.control.differences) == {0.0}
    earned_nothing(session, before, 1)


def test_looking_ahead_does_not_tell_which_attempt_is_lucky(data: TextData) -> None:
    """Own: a fork's trial is made of other batches and windows than the attempt itself."""
    env = Phase2Env(config=smallest(), data=data)
    env.reset(seed=0)
    action, seen = index_of(env, "tune lr x2"), []
    for twin in (env.fork(), env.fork(), env.fork().fork()):
        twin.step(action)
        seen.append(trial_of(twin))
    before = Books.of(env.session)
    env.step(action)
    assert before.attempted == 0, "looking costs nothing and counts for nothing"
    mine = trial_of(env)
    for other in seen:
        assert not set(mine.window_digests) & set(other.window_digests)
        assert not set(mine.stream_digests[1:]) & set(other.stream_digests[1:])


def trial_of(env: Phase2Env) -> TrialResult:
    last = env.session.last
    assert last is not None and last.trial is not None
    return last.trial


def test_taking_back_until_it_is_lucky(data: TextData) -> None:
    """Own: every attempt that was undone stays counted, and the next one has other luck."""
    env = Phase2Env(config=smallest(), data=data)
    env.reset(seed=0)
    before, windows, spent = Books.of(env.session), set(), [env.session.spent]
    for _ in range(4):
        env.step(index_of(env, "tune lr x2"))
        fresh = set(trial_of(env).window_digests)
        assert not windows & fresh
        windows |= fresh
        env.undo()
        spent.append(env.session.spent)
    assert spent == sorted(set(spent)), "compute stays spent"
    earned_nothing(env.session, before, 4)


def test_taking_back_the_end_of_the_budget(data: TextData) -> None:
    """Own: compute stays spent, so a step that used the last of it is no way to more attempts."""
    env = Phase2Env(config=smallest(budget=10), data=data)
    env.reset(seed=0)
    action = index_of(env, "tune lr x2")
    while not env.session.finished:
        env.step(action)
    assert env.session.out_of_budget
    before, state = Books.of(env.session), env.session.trainer.state_hash()
    with pytest.raises(K1Error, match="the compute budget is spent"):
        env.undo()
    with pytest.raises(K1Error, match="the episode is over"):
        env.step(action)
    assert Books.of(env.session) == before and env.session.trainer.state_hash() == state
    assert kinds(env.session)[-1] == "end"


def test_other_generators_are_of_no_use(data: TextData) -> None:
    """Own: a controller that seeds every generator it can reach gets the same trials."""

    def course(meddle: bool) -> list[str]:
        session = attack(data, smallest(), seed=3)
        hashes = []
        for label in ("tune lr x2", "tune cooldown x2", "no-op", "tune lr x0.5"):
            if meddle:
                torch.manual_seed(7)
                np.random.seed(7)
                random.seed(7)
            play(session, label)
            hashes.append(session.trainer.state_hash())
        return hashes

    kept = torch.get_rng_state(), np.random.get_state(), random.getstate()
    try:
        assert course(True) == course(False)
    finally:
        torch.set_rng_state(kept[0])
        np.random.set_state(kept[1])
        random.setstate(kept[2])


# -- crashes -------------------------------------------------------------------------------------


class Crash(BaseException):
    pass


class Script:
    """A controller that acts by a list."""

    reason = "as told"

    def __init__(self, *labels: str) -> None:
        self.labels = labels

    def act(self, observation: Any, info: Any) -> int:
        return index_of(self.env, self.labels[info["decision"]])

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass

    def bind(self, env: Phase2Env) -> Script:
        self.env = env
        return self


class Silent:
    def __getattr__(self, name: str) -> Any:
        return lambda *_, **more: None


def run(path: Path, data: TextData, *labels: str, resume: bool) -> Phase2Env:
    if not resume:
        gate = {"seeds": 2, "horizon": 1, "anneal": 1, "windows": 1}
        prepare_run(path, Path("text"), max_decisions=3, gate=gate, interval=1)
    folder = RunFolder.open(path)
    settings = Settings.from_dict(folder.config["settings"])
    env = Phase2Env(config=settings, data=data)
    runner = Runner(env, Script(*labels).bind(env), folder, Silent(), seed=0)
    runner.run(resume=resume)
    return env


@pytest.mark.parametrize("when", ["_train", "_judge"])
def test_crashing_in_a_trial_to_try_again(
    data: TextData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    """The intent is on the disk before the trial: it is made again, with the same luck."""
    labels = ("tune lr x2", "tune lr x2", "tune cooldown x2")
    whole = run(tmp_path / "whole", data, *labels, resume=False)
    path = tmp_path / "run"
    for attempt in range(2):
        with monkeypatch.context() as patch:

            def crash(*_: Any, **more: Any) -> Any:
                raise Crash

            patch.setattr(Gate, when, crash)
            with pytest.raises(Crash):
                run(path, data, *labels, resume=attempt > 0)
        last = read_ledger(path / "ledger.jsonl")[-1]
        assert (last.kind, last.data["decision"]) == ("intent", 0)
    with pytest.raises(LedgerError, match="does not reproduce"):
        run(path, data, "no-op", *labels, resume=True)
    again = run(path, data, *labels, resume=True)
    assert (path / "ledger.jsonl").read_bytes() == (
        tmp_path / "whole" / "ledger.jsonl"
    ).read_bytes()
    assert Books.of(again.session) == Books.of(whole.session)
    assert again.session.boundary.attempted == 3


def test_a_trial_that_runs_out_of_memory_is_a_failure(
    data: TextData, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = attack(data, quick())

    def crash(*_: Any, **more: Any) -> Any:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(Gate, "_score", crash)
    before = Books.of(session)
    play(session, *["tune lr x2"] * 3)
    earned_nothing(session, before, 3)
