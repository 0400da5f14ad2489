"""Rules and error rates, against closed forms, simulations and the gate itself."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from k1env.boundary import SUCCESSES_TO_ADVANCE
from k1env.gate import GateConfig
from k1env.odds import (
    clopper_pearson,
    counted_promotions,
    power,
    promotion_probability,
    promotions,
)
from k1env.verdicts import NAIVE, Evidence, gate_ruling, regroup, shifted

# -- intervals -----------------------------------------------------------------------------------


@pytest.mark.parametrize("tries", [1, 10, 368])
def test_the_interval_of_none_and_of_all(tries: int) -> None:
    edge = 0.025 ** (1 / tries)
    assert clopper_pearson(0, tries) == (0.0, pytest.approx(1 - edge))
    assert clopper_pearson(tries, tries) == (pytest.approx(edge), 1.0)


def test_how_many_trials_without_an_acceptance_show_one_percent() -> None:
    assert clopper_pearson(0, 368)[1] <= 0.01 < clopper_pearson(0, 367)[1]


def test_the_interval_holds_the_truth_as_often_as_it_says() -> None:
    for rate in (0.01, 0.1, 0.37):
        covered = 0.0
        for hits in range(31):
            low, high = clopper_pearson(hits, 30)
            covered += stats.binom.pmf(hits, 30, rate) * (low <= rate <= high)
        assert 0.95 <= covered < 1


def test_ends_of_an_interval_are_where_the_tails_are() -> None:
    low, high = clopper_pearson(3, 40, confidence=0.9)
    assert stats.binom.sf(2, 40, low) == pytest.approx(0.05)
    assert stats.binom.cdf(3, 40, high) == pytest.approx(0.05)


def test_nothing_tried_is_nothing_known() -> None:
    assert clopper_pearson(0, 0) == (0.0, 1.0)
    with pytest.raises(ValueError, match="3 of 2"):
        clopper_pearson(3, 2)


# -- power ---------------------------------------------------------------------------------------


def test_at_the_margin_the_power_is_the_level() -> None:
    for seeds in (4, 8, 16):
        assert power(0.001, 0.003, seeds, 0.001, 0.01) == pytest.approx(0.01)


def test_the_power_is_what_a_simulation_finds() -> None:
    rng, config = np.random.default_rng(0), GateConfig(early=8)
    gains = rng.normal(0.003, 0.0015, (2_000, 8))
    found = np.mean([gate_ruling(row, config)[0] for row in gains])
    wanted = power(0.003, 0.0015, 8, config.margin, config.alpha)
    assert 0.4 < wanted < 0.9
    assert found == pytest.approx(wanted, abs=4 * math.sqrt(wanted * (1 - wanted) / 2_000))


def test_power_grows_with_the_effect_and_the_seeds() -> None:
    by_effect = [power(e, 0.002, 8, 0.001, 0.01) for e in (0.0, 0.001, 0.002, 0.005)]
    by_seeds = [power(0.003, 0.002, n, 0.001, 0.01) for n in (4, 8, 16)]
    assert by_effect == sorted(by_effect) and by_seeds == sorted(by_seeds)


# -- promotions ----------------------------------------------------------------------------------


def test_counting_alone_is_a_binomial() -> None:
    for needed in SUCCESSES_TO_ADVANCE:
        found = promotion_probability(0.02, 300, needed, evidence=False)
        assert found == pytest.approx(stats.binom.sf(needed - 1, 300, 0.02))


def test_the_shortest_way_is_successes_only() -> None:
    assert promotion_probability(0.3, 3, 3) == pytest.approx(0.3**3)
    assert promotion_probability(0.3, 2, 3) == 0.0


def test_ville_holds_for_any_number_of_attempts() -> None:
    for needed in SUCCESSES_TO_ADVANCE:
        assert promotion_probability(0.01, 2_000, needed) <= 0.01
    assert promotion_probability(0.2, 2_000, 3) > 0.9


def test_the_odds_are_those_of_the_boundary() -> None:
    luck = np.random.default_rng(4).random((1_500, 40)) < 0.08
    found = np.mean([promotions(life.tolist()) > 0 for life in luck])
    wanted = promotion_probability(0.08, 40, 3)
    assert found == pytest.approx(wanted, abs=4 * math.sqrt(wanted * (1 - wanted) / 1_500))
    assert 0.1 < wanted < 0.9


def test_promotions_with_and_without_evidence() -> None:
    assert promotions([True] * 18) == counted_promotions([True] * 18) == 3
    rare = ([False] * 49 + [True]) * 40
    assert promotions(rare) == 0 and counted_promotions(rare) == 3
    assert counted_promotions([True] * 7) == 1


# -- rules ---------------------------------------------------------------------------------------

GOOD = (0.010, 0.012, 0.008, 0.011, 0.009, 0.013, 0.007, 0.010)


@pytest.mark.parametrize(
    ("gains", "ruling"),
    [
        (GOOD, (True, 8)),
        ((), (False, 2)),
        ((0.0,) * 8, (False, 2)),
        ((-0.01, 0.02, *GOOD[2:]), (False, 8)),
        ((0.0005, 0.0001, 0.0001, 0.0002, *GOOD[4:]), (False, 4)),
    ],
)
def test_the_gates_ruling_ends_as_early_as_the_gate(
    gains: tuple[float, ...], ruling: tuple[bool, int]
) -> None:
    assert gate_ruling(gains, GateConfig()) == ruling


@pytest.mark.parametrize(
    ("seen", "by"),
    [
        (Evidence((0.0,) * 8, True), {"validation got better"}),
        (Evidence((), False), set()),
        (Evidence((0.01, *[-0.02] * 7), False), {"one seed: loss lower"}),
        (Evidence((-0.01, *[0.02, 0.03] * 3, -0.05), False), {"mean of seeds better"}),
        (Evidence((-0.0001, *[0.0005, 0.0006] * 3, 0.0004), False),
         {"mean of seeds better", "p <= 0.05, no margin"}),
        (Evidence(GOOD, True), set(NAIVE)),
    ],
)  # fmt: skip
def test_what_naive_rules_accept(seen: Evidence, by: set[str]) -> None:
    assert {name for name, rule in NAIVE.items() if rule(seen)} == by


def test_differences_are_regrouped_and_shifted() -> None:
    assert regroup([1.0, 2.0, 3.0, 4.0, 5.0], 2) == [(1.0, 2.0), (3.0, 4.0)]
    moved = shifted(GOOD, 0.002)
    assert np.mean(moved) == pytest.approx(0.002) and np.std(moved) == pytest.approx(np.std(GOOD))
