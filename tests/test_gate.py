"""The gate: twins see the same, nothing leaks, luck does not pass, and real gains do."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from scipy import stats

from k1 import edits
from k1.data import TextData
from k1.rng import derive_seed
from k1env.gate import (
    CHEAT,
    CONTROL,
    NOT_FINITE,
    Gate,
    GateConfig,
    TrialResult,
    compare,
)
from k1env.session import MAIN, SHADOW_LANE, Session
from tests.phase2_helpers import QUICK_GATE, fake, quick, seen_windows

Change = Callable[[int], None]
MIX = (1.0, 0.0, 0.0)


@pytest.fixture(scope="module")
def base(data: TextData) -> Session:
    """A session whose shadow is another system: the same one, 3 steps later."""
    made = Session(quick(phase1_steps=30), data, seed=2)
    made.begin()
    made.arena.copy_lane(MAIN, SHADOW_LANE)
    made.engine.train(SHADOW_LANE, SHADOW_LANE + 1, 3)
    made.arena["data_cursor"][SHADOW_LANE] = made.arena["data_cursor"][MAIN]
    return made


def trial(
    base: Session, change: Change, *, shadow: bool = False, seed: int = 0, **more: Any
) -> TrialResult:
    arguments: dict[str, Any] = {"mix": MIX, "price": lambda lane: 0.0, **more}
    return base.gate.run(MAIN, SHADOW_LANE if shadow else None, change, seed=seed, **arguments)


def nothing(lane: int) -> None:
    pass


def faster(base: Session, factor: float = 300.0) -> Change:
    """A big help where the learning rate is far too low."""
    return lambda lane: base.arena.set_hyper(lane, "lr", base.arena.get_hyper(lane)["lr"] * factor)


def wreck(base: Session) -> Change:
    def change(lane: int) -> None:
        base.arena["shared"][lane] *= -5.0

    return change


@pytest.fixture
def slow(base: Session) -> Session:
    """The session with a learning rate at which nothing is learnt."""
    base.arena.set_hyper(MAIN, "lr", 1e-6)
    base.gate.config = replace(QUICK_GATE, horizon=8, windows=16)
    yield base
    base.arena.set_hyper(MAIN, "lr", 1e-3)
    base.gate.config = QUICK_GATE


# -- doing nothing ------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_doing_nothing_gains_exactly_nothing(base: Session, seed: int) -> None:
    result = trial(base, nothing, seed=seed)
    assert not result.accepted and result.seeds_run == 2
    assert result.control is not None
    assert result.control.differences == (0.0, 0.0)
    assert (result.control.mean, result.control.std, result.control.p_value) == (0.0, 0.0, 1.0)


def test_doing_nothing_for_all_seeds_is_refused_too(
    base: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Gate, "_hopeless", lambda *_: False)
    result = trial(base, nothing, shadow=True)
    assert not result.accepted and result.seeds_run == 8
    assert result.control is not None and result.control.differences == (0.0,) * 8


@pytest.mark.parametrize("label", ["nothing", "faster", "wreck", "add", "crash"])
@pytest.mark.parametrize("shadow", [False, True])
def test_a_trial_touches_neither_parent_nor_shadow(base: Session, label: str, shadow: bool) -> None:
    def add(lane: int) -> None:
        edits.add_agent(base.arena, lane, 0)

    def crash(lane: int) -> None:
        edits.add_agent(base.arena, lane, 0)
        raise RuntimeError("out of memory")

    change = {"nothing": nothing, "faster": faster(base, 3.0), "wreck": wreck(base), "add": add,
              "crash": crash}[label]  # fmt: skip
    before = [base.arena.hash_lane(lane) for lane in (MAIN, SHADOW_LANE)]
    if label == "crash":
        with pytest.raises(RuntimeError):
            trial(base, change, shadow=shadow)
        assert base.gate.adopted == {}
    else:
        trial(base, change, shadow=shadow)
    assert [base.arena.hash_lane(lane) for lane in (MAIN, SHADOW_LANE)] == before


# -- what the twins see -------------------------------------------------------------------------


def test_twins_see_the_same_batches_and_seeds_others(
    base: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = seen_windows(base, monkeypatch)
    monkeypatch.setattr(Gate, "_hopeless", lambda *_: False)
    result = trial(base, faster(base, 1.01), shadow=True)
    first, streams = base.gate.first, []
    for twin in (0, 1):
        control, cheat, shadow = (record["train"][first + 2 * arm + twin] for arm in range(3))
        assert len(control) == 4 * 4, "four groups of four steps"
        assert control == cheat
        assert control == shadow
        streams += [tuple(control[i : i + 4]) for i in range(0, 16, 4)]
    assert len(set(streams)) == result.seeds_run == 8, "each seed has batches of its own"
    assert len(set(result.stream_digests)) == len(set(result.window_digests)) == 8
    flat = [window for rows in record["gate"].values() for window in rows]
    assert len(set(flat)) == 8, "fresh windows to score each seed on"


def test_another_attempt_is_scored_on_other_windows(base: Session) -> None:
    results = [trial(base, nothing, seed=seed) for seed in (1, 1, 2)]
    one, same, other = (result.window_digests for result in results)
    assert one == same and not set(one) & set(other)
    one, same, other = (result.stream_digests for result in results)
    assert one == same and not set(one[1:]) & set(other[1:])
    assert one[0] == other[0], "the first twins go on with the main stream"


def test_the_first_twins_go_on_with_the_main_stream(base: Session) -> None:
    arena = base.arena
    arena.copy_lane(MAIN, 2, 3)
    base.engine.train(2, 4, QUICK_GATE.horizon)
    wanted = arena.read_lane(2)
    trial(base, faster(base, 3.0))
    kept = base.gate.adopted[CONTROL]
    for name, tensor in wanted.tensors.items():
        assert torch.allclose(kept.tensors[name].double(), tensor.double(), atol=1e-6), name
    assert float(kept.tensors["lr_factor"]) == 1.0, "kept as it was before annealing"
    assert kept.tree.to_dict() == wanted.tree.to_dict()


@pytest.mark.parametrize(
    ("stuck", "reason"), [("trial", "trained on the same batches"), ("gate", "the same windows")]
)
def test_equal_batches_in_two_seeds_are_refused(
    slow: Session, monkeypatch: pytest.MonkeyPatch, stuck: str, reason: str
) -> None:
    """Training batches and windows are checked apart: other windows excuse no equal batches."""

    def derive(purpose: str, *rest: Any) -> int:
        return 5 if purpose == stuck else derive_seed(purpose, *rest)

    monkeypatch.setattr("k1env.gate.derive_seed", derive)
    result = trial(slow, faster(slow))
    assert not result.accepted and reason in result.reason
    assert result.control is not None and result.control.passed


# -- what helps and what harms ------------------------------------------------------------------


def test_a_real_help_is_accepted(slow: Session) -> None:
    result = trial(slow, faster(slow))
    assert result.accepted and result.reason == "improves" and result.seeds_run == 8
    assert result.control is not None and result.control.mean > 0.001
    assert result.control.p_value <= 0.01
    assert result.lane_steps == 8 * 2 * (8 + 2)
    assert slow.gate.adopted[CHEAT].tensors["lr"] == pytest.approx(3e-4)


def test_a_real_harm_ends_after_two_seeds(base: Session) -> None:
    result = trial(base, wreck(base))
    assert not result.accepted and result.seeds_run == 2
    assert result.reason == "no sufficient gain in the first 2 seeds"
    assert result.control is not None and result.control.mean < 0
    assert result.lane_steps == 2 * 2 * (2 + 2)


def test_going_on_is_worth_it_so_stopping_is_refused(slow: Session) -> None:
    slow.arena.set_hyper(MAIN, "lr", 3e-3)
    result = trial(slow, nothing, stop=True)
    assert not result.accepted and result.control is not None and result.control.mean > 0.001
    assert result.lane_steps == result.seeds_run * (8 + 2 * 2)


def test_where_nothing_is_learnt_any_more_stopping_is_accepted(slow: Session) -> None:
    result = trial(slow, nothing, stop=True)
    assert result.accepted and result.reason == "going on gains less than the margin"
    kept = slow.gate.adopted[CHEAT]
    assert int(kept.tensors["step"]) == slow.trainer.steps, "a stopped system trains no further"


def test_a_loss_that_is_not_finite_is_refused(base: Session) -> None:
    def poison(lane: int) -> None:
        base.arena["shared"][lane] = math.nan

    result = trial(base, poison, shadow=True)
    assert not result.accepted and result.reason == "a loss was not finite"
    assert result.control == NOT_FINITE and result.seeds_run == 2
    json.dumps(result.to_dict(), allow_nan=False)


# -- the comparison -----------------------------------------------------------------------------

OTHER = [2.00, 2.10, 1.95, 2.05, 2.02, 1.99, 2.07, 2.01]


def scaled(*gains: float) -> list[float]:
    return [o * (1 - g) for o, g in zip(OTHER, gains, strict=True)]


GAINS = (0.010, 0.012, 0.008, 0.011, 0.009, 0.013, 0.007, 0.010)


def test_the_comparison_is_a_one_sided_t_test_against_the_margin() -> None:
    config = GateConfig()
    result = compare(OTHER, scaled(*GAINS), config)
    assert result.differences == pytest.approx(GAINS)
    test = stats.ttest_1samp(result.differences, popmean=0.001, alternative="greater")
    assert result.p_value == pytest.approx(test.pvalue, rel=1e-12)
    mean = sum(GAINS) / 8
    std = math.sqrt(sum((g - mean) ** 2 for g in GAINS) / 7)
    t = (mean - 0.001) / (std / math.sqrt(8))
    assert result.p_value == pytest.approx(stats.t.sf(t, 7), rel=1e-6)
    assert (result.mean, result.std) == (pytest.approx(mean), pytest.approx(std))
    assert result.passed
    worse = compare(OTHER, scaled(*(-g for g in GAINS)), config)
    assert worse.p_value > 0.99 and not worse.passed


@pytest.mark.parametrize(("shift", "passed"), [(-0.0091, False), (-0.008, False), (0.0, True)])
def test_the_margin_has_to_be_exceeded(shift: float, passed: bool) -> None:
    """Gains of +0.09 % and +0.2 %, then 1 %, with the same spread."""
    result = compare(OTHER, scaled(*(g + shift for g in GAINS)), GateConfig())
    assert result.mean > 0 and result.passed is passed
    generous = compare(OTHER, scaled(*(g + shift for g in GAINS)), GateConfig(margin=-0.01))
    assert generous.passed, "only the margin stood in the way"


def test_alpha_decides() -> None:
    gains = (0.01, 0.012, -0.004, 0.013, 0.002, 0.011, 0.0, 0.009)
    result = compare(OTHER, scaled(*gains), GateConfig())
    assert 0.01 < result.p_value < 0.05 and not result.passed
    assert compare(OTHER, scaled(*gains), GateConfig(alpha=0.05)).passed


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("side", [0, 1])
def test_what_is_not_finite_never_passes(bad: float, side: int) -> None:
    pair = [list(OTHER), scaled(*GAINS)]
    pair[side][3] = bad
    for stop in (False, True):
        assert compare(*pair, GateConfig(), stop=stop) == NOT_FINITE


def test_without_spread_nothing_passes() -> None:
    result = compare([2.0] * 8, [1.0] * 8, GateConfig())
    assert (result.mean, result.std, result.p_value, result.passed) == (0.5, 0.0, 1.0, False)


def test_fewer_seeds_than_agreed_never_pass() -> None:
    few = compare(OTHER[:6], scaled(*GAINS)[:6], GateConfig())
    assert few.p_value < 0.01 and not few.passed
    assert compare(OTHER[:6], scaled(*GAINS)[:6], GateConfig(seeds=6)).passed
    one = compare(OTHER[:1], scaled(*GAINS)[:1], GateConfig(seeds=1))
    assert not one.passed and one.p_value == 1.0


def test_stopping_is_tested_the_other_way_round() -> None:
    """`other` trained on, `cheat` stopped: passed if going on gains less than the margin."""
    useless = [0.0001, -0.0002, 0.0002, 0.0, -0.0001, 0.0001, -0.0002, 0.0]
    stopped = list(OTHER)
    went_on = [c * (1 - g) for c, g in zip(stopped, useless, strict=True)]
    result = compare(went_on, stopped, GateConfig(), stop=True)
    assert result.differences == pytest.approx(useless)
    test = stats.ttest_1samp(result.differences, popmean=0.001, alternative="less")
    assert result.p_value == pytest.approx(test.pvalue) and result.passed
    useful = [c * (1 - g) for c, g in zip(stopped, GAINS, strict=True)]
    assert not compare(useful, stopped, GateConfig(), stop=True).passed
    assert not compare(went_on, stopped, GateConfig()).passed


# -- scores that are made up --------------------------------------------------------------------


def test_the_shadow_has_to_be_beaten_too(base: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    good = scaled(*GAINS)
    fake(base, monkeypatch, control=OTHER, cheat=good, shadow=OTHER)
    assert trial(base, nothing, shadow=True).accepted
    barely = [g * (1 + d) for g, d in zip(good, (1e-3, 2e-3, 5e-4) * 3, strict=False)]
    fake(base, monkeypatch, control=OTHER, cheat=good, shadow=barely)
    result = trial(base, nothing, shadow=True)
    assert not result.accepted and "but not the shadow" in result.reason
    assert result.control is not None and result.control.passed
    assert result.shadow is not None and not result.shadow.passed and result.shadow.mean > 0
    fake(base, monkeypatch, control=OTHER, cheat=good, shadow=[g * 0.99 for g in good])
    assert trial(base, nothing, shadow=True).seeds_run == 2
    fake(base, monkeypatch, control=OTHER, cheat=good)
    assert trial(base, nothing).accepted, "no shadow, nothing to beat"


@pytest.mark.parametrize(
    ("gains", "seeds"),
    [
        ((-0.01,) * 8, 2),
        ((0.0, -0.01, *GAINS[2:]), 2),
        ((-0.01, 0.02, *GAINS[2:]), 8),
        ((0.0005, 0.0001, 0.0001, 0.0002, *GAINS[4:]), 4),
        ((0.02, 0.01, -0.02, -0.01, *GAINS[4:]), 4),
        ((0.004, 0.003, 0.001, 0.002, -0.02, -0.01, *GAINS[6:]), 6),
        (GAINS, 8),
    ],
)
def test_when_a_trial_ends_early(
    base: Session, monkeypatch: pytest.MonkeyPatch, gains: tuple[float, ...], seeds: int
) -> None:
    sizes = fake(base, monkeypatch, control=OTHER, cheat=scaled(*gains))
    result = trial(base, nothing)
    assert result.seeds_run == seeds == sum(sizes)
    assert result.accepted == (gains == GAINS)
    assert result.accepted or seeds == 8 or result.reason.startswith("no sufficient gain")


def test_an_early_end_of_stopping(base: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    useless = [c * (1 - g) for c, g in zip(OTHER, (1e-4, -2e-4, 0.0, 1e-4) * 2, strict=True)]
    fake(base, monkeypatch, control=useless, shadow=useless, cheat=OTHER)
    result = trial(base, nothing, stop=True, shadow=True)
    assert result.accepted and result.shadow is not None and result.shadow.passed
    fake(base, monkeypatch, control=useless, shadow=scaled(*GAINS), cheat=OTHER)
    assert not trial(base, nothing, stop=True, shadow=True).accepted, "a freeze earns nothing"
    fake(base, monkeypatch, control=scaled(*GAINS), cheat=OTHER)
    assert trial(base, nothing, stop=True).seeds_run == 2


def test_the_price_is_part_of_the_loss(base: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    first = base.gate.first
    fake(base, monkeypatch, control=OTHER, cheat=scaled(*GAINS))
    dear = trial(base, nothing, price=lambda lane: 0.5 if lane >= first + 2 else 0.1)
    assert not dear.accepted and dear.seeds_run == 2
    wanted = [(o + 0.1 - c - 0.5) / (o + 0.1) for o, c in zip(OTHER, scaled(*GAINS), strict=True)]
    assert dear.control is not None and dear.control.differences == pytest.approx(wanted[:2])
    fake(base, monkeypatch, control=OTHER, cheat=OTHER)
    cheap = trial(base, nothing, price=lambda lane: 0.01 if lane >= first + 2 else 0.1)
    assert cheap.accepted, "the same loss for less compute is a gain"


def test_results_survive_json(base: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    for arms in ({"shadow": OTHER}, {}):
        fake(base, monkeypatch, control=OTHER, cheat=scaled(*GAINS), **arms)
        result = trial(base, nothing, shadow=bool(arms))
        assert TrialResult.from_dict(json.loads(json.dumps(result.to_dict()))) == result
        assert result.accepted and (result.shadow is not None) == bool(arms)


def test_the_error_rates_are_the_designs() -> None:
    config = GateConfig()
    assert (config.seeds, config.horizon, config.anneal) == (8, 60, 30)
    assert (config.margin, config.alpha, config.early) == (0.001, 0.01, 2)
    assert Gate.lanes_needed(config) == 6
    assert Gate.lanes_needed(replace(config, group=5)) == 15


def test_annealing_lets_the_learning_rate_fall_to_zero(
    base: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[int, int, list[float]]] = []

    def train(start: int, stop: int, steps: int, factor: Any = None) -> None:
        factors = [factor(i) for i in range(steps)] if factor else [1.0] * steps
        calls.extend((lane, steps, factors) for lane in range(start, stop))

    monkeypatch.setattr(base.engine, "train", train)
    base.gate.config = replace(QUICK_GATE, anneal=4)
    trial(base, nothing)
    base.gate.config = QUICK_GATE
    lanes = range(base.gate.first, base.gate.first + 4)
    assert sorted(calls) == sorted(
        (lane, steps, factors)
        for lane in lanes
        for steps, factors in ((2, [1.0, 1.0]), (4, [1.0, 0.75, 0.5, 0.25]))
    )
