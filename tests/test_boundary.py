"""The boundary system against the design's table, its widening, and its promise on luck."""

import json
import math
from dataclasses import asdict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from k1.config import Config
from k1env import actions
from k1env.actions import Action, action_table
from k1env.boundary import (
    EVIDENCE_TO_ADVANCE,
    FAILURE_FACTOR,
    STAGE_2_BOUNDS,
    STAGE_3_BOUNDS,
    SUCCESS_FACTOR,
    SUCCESSES_TO_ADVANCE,
    Boundary,
    Bounds,
    Request,
    hard_limits,
)
from tests.phase2_helpers import boundary_at

TABLE = action_table(Config.preset("tiny").model)
FIRST = {action.kind: action for action in reversed(TABLE)}
TUNE = {name: next(a for a in TABLE if a.parameter == name) for name in ("lr", "cooldown", "top_k")}


def tune(name: str, value: float | None) -> Request:
    return Request(TUNE[name], value, 40)


def permitted(stage: int, request: Request) -> bool:
    return boundary_at(stage).rule(request).permitted


# -- the table ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "by_stage"),
    [
        (actions.NOOP, (True, True, True, True)),
        (actions.ADD, (True, True, True, True)),
        (actions.DELETE, (False, False, True, True)),
        (actions.PRUNE, (False, False, True, True)),
        (actions.STOP, (False, False, False, True)),
        (actions.BENCHMARK, (False, False, False, True)),
        (actions.GOAL, (False, False, False, True)),
    ],
)
def test_what_each_stage_permits(kind: str, by_stage: tuple[bool, ...]) -> None:
    for stage, wanted in enumerate(by_stage, start=1):
        assert permitted(stage, Request(FIRST[kind], None, 40)) is wanted, stage


RANGES = {
    2: {"lr": (1e-4, 1e-2), "cooldown": (5, 50), "top_k": (3, 10)},
    3: {"lr": (1e-5, 1e-1), "cooldown": (1, 100), "top_k": (1, 20)},
}


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("name", ["lr", "cooldown", "top_k"])
def test_tuning_within_bounds_ends_included(stage: int, name: str) -> None:
    low, high = RANGES[stage][name]
    for value in (low, high, math.sqrt(low * high)):
        assert permitted(stage, tune(name, value))
        assert not permitted(1, tune(name, value))
    for value in (math.nextafter(low, -1), math.nextafter(high, 9e9), -1, math.inf, -math.inf):
        assert not permitted(stage, tune(name, value))
    assert not permitted(stage, tune(name, math.nan))
    assert not permitted(stage, tune(name, None))


@pytest.mark.parametrize("kind", [actions.DELETE, actions.PRUNE])
def test_stage_3_keeps_ten_agents(kind: str) -> None:
    assert permitted(3, Request(FIRST[kind], None, 10))
    assert not permitted(3, Request(FIRST[kind], None, 9))
    assert permitted(4, Request(FIRST[kind], None, 4))


def test_the_rule_names_stage_and_limit() -> None:
    assert boundary_at(2).rule(tune("lr", 0.1)).rule == (
        "stage 2 (Parameter exploration) holds only lr in [0.0001, 0.01]"
    )
    assert "keeps at least 10 agents" in boundary_at(3).rule(Request(FIRST["prune"], None, 3)).rule


def test_bounds_refuse_nan() -> None:
    for bounds in (STAGE_2_BOUNDS, STAGE_3_BOUNDS, hard_limits(60)):
        for name in ("lr", "cooldown", "top_k"):
            assert not bounds.holds(name, math.nan)


def test_hard_limits_are_the_designs() -> None:
    hard = hard_limits(60)
    assert (hard.lr, hard.cooldown, hard.top_k) == ((1e-6, 0.3), (0, 500), (1, 60))
    assert hard.min_agents == 4


# -- counting -----------------------------------------------------------------------------------


def test_a_promotion_takes_the_successes_of_its_stage() -> None:
    boundary, inside = Boundary(hard_limits(60)), tune("lr", 1e-3)
    for stage, needed in enumerate((3, 5, 10), start=1):
        assert (boundary.stage, boundary.needed, boundary.evidence) == (stage, needed, 1.0)
        for _ in range(needed - 1):
            assert not boundary.record(True, inside, 7)
        assert boundary.record(True, inside, 8)
    assert boundary.stage == 4 and boundary.needed is None
    assert boundary.bounds == boundary.hard
    assert boundary.accepted == boundary.attempted == 18
    assert [entry["stage"] for entry in boundary.history] == [2, 3, 4]
    assert boundary.history[0] == {
        "stage": 2, "decision": 8, "attempted": 3, "accepted": 3, "evidence": 1000.0,
    }  # fmt: skip


def test_successes_without_evidence_promote_nobody() -> None:
    boundary, inside = Boundary(hard_limits(60)), tune("lr", 1e-3)
    for _ in range(60):
        boundary.record(False, inside, 0)
    results = [boundary.record(True, inside, 0) for _ in range(5)]
    wanted = [60 * math.log(10 / 11) + n * math.log(10) >= math.log(100) for n in range(1, 6)]
    assert results == [n >= 3 and ok for n, ok in enumerate(wanted, 1)] == [False] * 4 + [True]
    assert boundary.stage == 2


def test_evidence_without_successes_promotes_nobody() -> None:
    boundary = Boundary(hard_limits(60))
    assert not boundary.record(True, tune("lr", 1e-3), 0)
    assert not boundary.record(True, tune("lr", 1e-3), 0)
    assert boundary.evidence == EVIDENCE_TO_ADVANCE and boundary.stage == 1


def test_the_factors_make_a_fair_game() -> None:
    expected = 0.01 * SUCCESS_FACTOR + 0.99 * FAILURE_FACTOR
    assert expected == pytest.approx(1)
    boundary = Boundary(hard_limits(60))
    boundary.record(False, tune("lr", 1e-3), 0)
    assert boundary.evidence == 10 / 11
    assert (boundary.attempted, boundary.accepted, boundary.successes) == (1, 0, 0)
    boundary.record(True, tune("lr", 1e-3), 0)
    assert boundary.evidence == pytest.approx(100 / 11)


def test_luck_rarely_promotes_however_long_it_tries() -> None:
    """Ville: a policy whose cheats pass by chance alone (1 %) is promoted in 1 % of lives."""
    lives, attempts = 4_000, 3_000
    luck = np.random.default_rng(5).random((lives, attempts)) < 0.01
    successes = luck.cumsum(1)
    log_evidence = np.where(luck, math.log(SUCCESS_FACTOR), math.log(FAILURE_FACTOR)).cumsum(1)
    enough = log_evidence >= math.log(EVIDENCE_TO_ADVANCE) - 1e-9
    for needed in SUCCESSES_TO_ADVANCE:
        promoted = (luck & enough & (successes >= needed)).any(1).mean()
        assert promoted <= 0.01 + 3 * math.sqrt(0.01 * 0.99 / lives)
        naive = (successes >= needed).any(1).mean()
        assert naive > 0.99, "without evidence, luck alone is enough"


def test_the_vectorised_rule_is_the_rule() -> None:
    """Checks the simulation above against the boundary itself, in 300 short lives."""
    luck = np.random.default_rng(6).random((300, 30)) < 0.15
    for life in luck:
        boundary, log_evidence, count = Boundary(hard_limits(60)), 0.0, 0
        for success in life:
            log_evidence += math.log(SUCCESS_FACTOR if success else FAILURE_FACTOR)
            count += int(success)
            wanted = bool(success) and bool(count >= 3 and log_evidence >= math.log(100) - 1e-9)
            assert boundary.record(bool(success), tune("lr", 1e-3), 0) is wanted
            if wanted:
                break


# -- widening -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value", "wider"),
    [
        ("lr", 0.02, (1e-4, 0.1)),
        ("lr", 0.1, (1e-4, 0.1)),
        ("lr", 0.11, (1e-4, 0.3)),
        ("lr", 5e-5, (1e-5, 1e-2)),
        ("lr", 1e-6, (1e-6, 1e-2)),
        ("cooldown", 60, (5, 100)),
        ("cooldown", 500, (5, 500)),
        ("cooldown", 2, (2, 50)),
        ("cooldown", 0, (0, 50)),
        ("top_k", 12, (3, 20)),
        ("top_k", 60, (3, 60)),
        ("top_k", 1, (1, 10)),
        ("lr", 1e-3, (1e-4, 1e-2)),
    ],
)
def test_a_success_widens_the_bound_that_it_passed(
    name: str, value: float, wider: tuple[float, float]
) -> None:
    boundary = boundary_at(2)
    before = asdict(boundary.bounds)
    boundary.record(False, tune(name, value), 0)
    assert asdict(boundary.bounds) == before
    boundary.record(True, tune(name, value), 0)
    assert boundary.bounds.range(name) == pytest.approx(wider)
    assert boundary.rule(tune(name, value)).permitted
    others = {key: old for key, old in before.items() if key != name}
    assert {key: asdict(boundary.bounds)[key] for key in others} == others


@pytest.mark.parametrize(("left", "fewest"), [(12, 10), (10, 10), (9, 5), (5, 5), (4, 4)])
def test_a_success_halves_the_fewest_agents(left: int, fewest: int) -> None:
    boundary = boundary_at(3)
    boundary.record(True, Request(FIRST[actions.PRUNE], None, left), 0)
    assert boundary.bounds.min_agents == fewest
    boundary.record(True, Request(FIRST[actions.DELETE], None, 4), 0)
    assert boundary.bounds.min_agents == 4


def test_what_was_widened_stays_wide_when_a_stage_opens() -> None:
    boundary = Boundary(hard_limits(60))
    for request in (tune("lr", 0.05), tune("cooldown", 400), tune("top_k", 30)):
        boundary.record(True, request, 0)
    assert boundary.stage == 2 and boundary.rule(tune("lr", 0.05)).permitted
    for _ in range(5):
        boundary.record(True, tune("lr", 0.25), 0)
    assert boundary.stage == 3
    assert boundary.bounds.lr == (1e-5, 0.3)
    assert boundary.bounds.cooldown == (1, 400) and boundary.bounds.top_k == (1, 40)


def requests() -> st.SearchStrategy[Request]:
    values = st.floats(-1, 1e4, allow_nan=False) | st.just(math.nan) | st.none()
    tuning = st.builds(Request, st.sampled_from(sorted(TUNE.values(), key=lambda a: a.index)),
                       values, st.integers(0, 60))  # fmt: skip
    cuts = st.builds(Request, st.sampled_from([FIRST["delete"], FIRST["prune"], FIRST["stop"]]),
                     st.none(), st.integers(-5, 60))  # fmt: skip
    return tuning | cuts


def inside(bounds: Bounds, outer: Bounds) -> bool:
    return bounds.min_agents >= outer.min_agents and all(
        outer.range(n)[0] <= bounds.range(n)[0] <= bounds.range(n)[1] <= outer.range(n)[1]
        for n in ("lr", "cooldown", "top_k")
    )


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.tuples(st.booleans(), requests()), max_size=60),
    st.sampled_from((60, 40, 14, 6)),
)
def test_no_sequence_of_records_breaks_a_promise(
    steps: list[tuple[bool, Request]], capacity: int
) -> None:
    boundary = Boundary(hard_limits(capacity))
    for number, (success, request) in enumerate(steps, start=1):
        before, stage = boundary.bounds, boundary.stage
        promoted = boundary.record(success, request, number)
        assert boundary.attempted == number
        assert boundary.accepted == sum(ok for ok, _ in steps[:number])
        assert inside(boundary.bounds, hard_limits(capacity)), "never past the hard limits"
        assert inside(before, boundary.bounds), "bounds never narrow"
        assert success or boundary.bounds == before
        assert boundary.stage == stage + promoted
        assert boundary.evidence > 0
        again = Boundary.from_dict(json.loads(json.dumps(boundary.to_dict())))
        assert again == boundary


@pytest.mark.parametrize("value", [1e-7, 0.31, math.nan])
def test_hard_limits_are_hard_at_stage_4(value: float) -> None:
    boundary = boundary_at(4)
    assert not boundary.hard.holds("lr", value)
    assert not boundary.bounds.holds("lr", value)


def test_a_copy_is_independent() -> None:
    boundary = boundary_at(2)
    saved = boundary.to_dict()
    copy = Boundary.from_dict(saved)
    assert copy == boundary
    for _ in range(5):
        copy.record(True, tune("lr", 0.05), 3)
    assert boundary_at(2) == boundary == Boundary.from_dict(saved)
    assert copy.stage == 3


def test_every_kind_of_action_has_a_rule() -> None:
    def request(action: Action) -> Request:
        return Request(action, 1e-3 if action.parameter else None, 40)

    for stage in (1, 2, 3, 4):
        for action in TABLE:
            ruling = boundary_at(stage).rule(request(action))
            assert ruling.rule.startswith(f"stage {stage} (")
