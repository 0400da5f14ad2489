"""The action table: fixed by the configuration, and what each action asks for."""

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from k1.config import Config, ModelConfig
from k1.data import TextData
from k1env import actions
from k1env.actions import TUNE_FACTORS, Action, ActionError, action_table, tuned_value
from k1env.boundary import Boundary, hard_limits
from k1env.session import MAIN, Session
from tests.phase2_helpers import index_of, quick

TINY = Config.preset("tiny").model


def kind_count(table: tuple[Action, ...], kind: str) -> int:
    return sum(action.kind == kind for action in table)


@pytest.mark.parametrize(
    "model", [TINY, ModelConfig(), ModelConfig(branching=(3,), spare_levels=2)]
)
def test_the_table_has_every_place_and_every_size(model: ModelConfig) -> None:
    table, slots = action_table(model), sum(model.level_capacity)
    assert [action.index for action in table] == list(range(len(table)))
    assert table[0].kind == actions.NOOP
    assert kind_count(table, actions.ADD) == slots - model.level_capacity[-1]
    assert {a.slot for a in table if a.kind == actions.DELETE} == set(range(1, slots))
    assert [a.value for a in table if a.kind == actions.PRUNE] == [0.1, 0.25, 0.5]
    for parameter in ("lr", "cooldown", "top_k"):
        factors = [a.value for a in table if a.parameter == parameter]
        assert len(factors) == 4 and sum(f < 1 for f in factors) == 2
    assert kind_count(table, actions.STOP) == 1
    assert kind_count(table, actions.BENCHMARK) == kind_count(table, actions.GOAL) == 3
    assert len({action.label for action in table}) == len(table)
    assert action_table(replace(model, embed=8)) == table


def test_what_is_structural() -> None:
    table = action_table(TINY)
    assert {a.kind for a in table if a.structural} == {actions.ADD, actions.DELETE, actions.PRUNE}


@pytest.mark.parametrize(
    ("parameter", "now", "factor", "wanted"),
    [
        ("lr", 0.01, 10.0, 0.1),
        ("lr", 0.001, 0.1, 0.0001),
        ("cooldown", 5, 2.0, 10),
        ("cooldown", 5, 0.5, 2),
        ("cooldown", 5, 0.1, 0),
        ("cooldown", 1, 0.5, 0),
        ("cooldown", 0, 2.0, 2),
        ("cooldown", 0, 0.5, -1),
        ("top_k", 3, 2.0, 6),
        ("top_k", 3, 4.0, 12),
        ("top_k", 3, 0.5, 1),
        ("top_k", 1, 0.5, 0),
    ],
)
def test_tuned_values(parameter: str, now: float, factor: float, wanted: float) -> None:
    assert tuned_value(parameter, now, factor) == wanted


@given(st.sampled_from(("cooldown", "top_k")), st.integers(0, 500), st.data())
def test_whole_numbers_stay_whole_and_always_move(
    parameter: str, now: int, draw: st.DataObject
) -> None:
    factor = draw.draw(st.sampled_from(TUNE_FACTORS[parameter]))
    value = tuned_value(parameter, now, factor)
    assert value == int(value)
    assert value > now if factor > 1 else value < now


@given(st.sampled_from((2.0, 10.0)), st.floats(1e-6, 0.03))
def test_the_learning_rate_comes_back(factor: float, now: float) -> None:
    now = float(f"{now:.6g}")
    up = tuned_value("lr", now, factor)
    assert tuned_value("lr", up, 1 / factor) == pytest.approx(now, rel=1e-5)
    assert tuned_value("lr", tuned_value("lr", 1e-3, 10.0), 0.1) == 1e-3


@pytest.fixture
def session(data: TextData) -> Session:
    made = Session(quick(phase1_steps=0), data, seed=1)
    made.begin()
    return made


@pytest.mark.parametrize("index", [-1, 48, 10**9])
def test_an_index_outside_the_table_is_refused(session: Session, index: int) -> None:
    with pytest.raises(ActionError, match="is not in the table: choose 0 to 47"):
        session.moves.look_up(index)


def test_a_request_tells_the_agents_that_would_be_left(session: Session) -> None:
    def left(label: str) -> int:
        return session.moves.request(session.table[index_of(session, label)]).agents_after

    assert session.tree.agents == 6
    node = session.tree.children(0)[0]
    leaf = session.tree.children(node)[0]
    assert left(f"delete slot {node}") == 3
    assert left(f"delete slot {leaf}") == 5
    assert [left(f"prune {p}%") for p in (10, 25, 50)] == [5, 5, 3]


def test_every_possible_change_does_what_its_request_says(session: Session) -> None:
    tried = 0
    for action in session.table:
        if session.moves.why_impossible(action, session.boundary) is not None:
            continue
        request = session.moves.request(action)
        session.arena.copy_lane(MAIN, 2)
        session.moves.change(action, 2)
        agents = session.arena.trees[2].agents
        if action.kind in (actions.DELETE, actions.PRUNE):
            assert agents == request.agents_after
        elif action.kind == actions.ADD:
            assert agents > session.tree.agents
        elif action.kind == actions.TUNE:
            value = session.arena.get_hyper(2)[action.parameter]
            assert value == pytest.approx(request.value, rel=1e-6)
        else:
            assert session.arena.hash_lane(2) == session.arena.hash_lane(MAIN)
        tried += 1
    assert tried > 20


def test_what_is_impossible_at_every_stage(session: Session) -> None:
    def reason(label: str, stage: int = 4) -> str | None:
        boundary = Boundary(hard_limits(14), stage=stage, bounds=hard_limits(14))
        return session.moves.why_impossible(session.table[index_of(session, label)], boundary)

    assert reason("prune 50%") == "the hard limit keeps at least 4 agents"
    assert reason("prune 25%") is None
    assert reason("add under slot 4") == "slot 4 holds no block"
    assert reason("delete slot 14") == "slot 14 holds no block"
    assert reason("goal: lower the loss by 1 %") is None
    assert reason("goal: lower the loss by 1 %", 3) == reason("benchmark: newest domain", 1)
    for name, value, label in (
        ("lr", 0.2, "tune lr x2"),
        ("lr", 1e-6, "tune lr x0.5"),
        ("cooldown", 300, "tune cooldown x2"),
        ("cooldown", 0, "tune cooldown x0.1"),
        ("top_k", 8, "tune top_k x2"),
        ("top_k", 1, "tune top_k x0.25"),
        ("lr", math.nan, "tune lr x2"),
    ):
        session.arena.set_hyper(MAIN, name, value)
        assert "the hard limit holds" in (reason(label) or ""), label


def test_names_are_for_people(session: Session) -> None:
    table, node = session.table, session.tree.children(0)[0]
    leaf = session.tree.children(node)[1]
    assert session.moves.name(table[index_of(session, "add under slot 0")]) == "add under Root"
    wanted = f"delete {session.tree.name(leaf)}"
    assert session.moves.name(table[index_of(session, f"delete slot {leaf}")]) == wanted
    assert session.moves.name(table[index_of(session, "tune lr x2")]) == "tune lr x2"
