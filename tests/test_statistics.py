"""Statistics of comparisons, against closed forms and on simulated data."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from policies.comparison import Cells, anytime, compare, compare_all, curve, final, final_seen
from policies.episode import SHARES
from policies.report import markdown, text_of
from policies.statistics import (
    Estimate,
    interquartile_estimate,
    interquartile_mean,
    mean_estimate,
    paired_difference,
    probability_of_improvement,
)
from tests.evaluation_helpers import record

# -- aggregates ----------------------------------------------------------------------------------


def test_the_interquartile_mean_of_known_numbers() -> None:
    assert interquartile_mean([1, 2, 3, 4]) == 2.5
    assert interquartile_mean([9, 1, -50, 3, 2, 1000, 4, 5]) == (2 + 3 + 4 + 5) / 4
    assert interquartile_mean([5.0]) == 5.0
    assert interquartile_mean([1, 2, 6]) == 3.0, "too few to cut any off"


def test_the_interquartile_mean_of_a_normal_distribution_is_its_mean() -> None:
    draws = np.random.default_rng(0).normal(3.0, 2.0, 200_000)
    assert interquartile_mean(draws) == pytest.approx(3.0, abs=0.03)


def test_strata_are_resampled_within_themselves() -> None:
    """Worlds that differ much and seeds that do not: the interval knows that worlds are fixed."""
    sample = [[10.0 * world + 0.01 * seed for seed in range(5)] for world in range(8)]
    found = interquartile_estimate(sample)
    assert found.low < found.value < found.high
    assert found.high - found.low < 0.03
    mixed = interquartile_estimate([[x] for world in sample for x in world])
    assert mixed.high - mixed.low > 5, "with one seed in each, worlds are resampled"


def test_a_single_value_has_no_interval() -> None:
    for found in (interquartile_estimate([[2.0]]), mean_estimate([[2.0]])):
        assert found.value == 2.0
        assert math.isnan(found.low) and math.isnan(found.high)
        assert found.to_list() == [2.0, None, None]


@pytest.mark.parametrize("aggregate", ["iqm", "mean"])
def test_intervals_cover_what_they_should(aggregate: str) -> None:
    generator, runs = np.random.default_rng(1), 150
    held = 0
    for seed in range(runs):
        if aggregate == "iqm":  # worlds are fixed, at -3 to 3: the middle half's mean is 0
            centres = np.linspace(-3, 3, 7)[:, None]
            sample = centres + generator.normal(0, 0.5, (7, 20))
            found = interquartile_estimate(sample.tolist(), seed)
        else:  # worlds are drawn
            sample = generator.normal(0, 1, (24, 1)) + generator.normal(0, 0.5, (24, 3))
            found = mean_estimate(sample.tolist(), seed)
        held += found.low <= 0 <= found.high
    # 95 % of 150, within four standard deviations below.
    assert 0.95 - 4 * math.sqrt(0.95 * 0.05 / runs) <= held / runs <= 0.995


def test_the_mean_interval_agrees_with_the_t_interval() -> None:
    values = np.random.default_rng(3).normal(1.0, 2.0, 60)
    found = mean_estimate([[x] for x in values])
    half = stats.t.ppf(0.975, 59) * values.std(ddof=1) / math.sqrt(60)
    assert found.value == pytest.approx(values.mean())
    assert found.high - found.value == pytest.approx(half, rel=0.15)
    assert found.value - found.low == pytest.approx(half, rel=0.15)


def test_the_same_seed_gives_the_same_interval() -> None:
    sample = [[1.0, 2.0, 4.0], [3.0, 3.5, 9.0]]
    assert interquartile_estimate(sample) == interquartile_estimate(sample)
    assert mean_estimate(sample) == mean_estimate(sample)
    assert interquartile_estimate(sample, 1) != interquartile_estimate(sample, 2)


# -- pairs ---------------------------------------------------------------------------------------


def test_pairing_takes_out_what_pairs_have_in_common() -> None:
    generator = np.random.default_rng(0)
    common = generator.normal(0, 10, (12, 4))
    mine = common + 0.1 + generator.normal(0, 0.01, (12, 4))
    found = paired_difference(mine.tolist(), common.tolist())
    assert found.value == pytest.approx(0.1, abs=0.01)
    assert 0.09 < found.low < found.high < 0.11
    shuffled = paired_difference(mine.tolist(), common[::-1].tolist())
    assert shuffled.high - shuffled.low > 1, "other partners, other answer"


def test_a_difference_weighs_every_world_alike() -> None:
    found = paired_difference([[1.0, 1.0, 1.0], [5.0]], [[0.0, 0.0, 0.0], [0.0]])
    assert found.value == 3.0


def test_no_difference_is_zero_with_certainty() -> None:
    sample = [[1.0, 2.0], [3.0, 4.0]]
    assert paired_difference(sample, sample) == Estimate(0.0, 0.0, 0.0)
    assert probability_of_improvement(sample, sample).value == 0.5


def test_samples_that_do_not_pair_are_refused() -> None:
    with pytest.raises(ValueError):
        paired_difference([[1.0, 2.0]], [[1.0]])
    with pytest.raises(ValueError):
        probability_of_improvement([[1.0]], [[1.0], [2.0]])


def test_the_probability_of_improvement_counts_pairs() -> None:
    found = probability_of_improvement([[1.0, 4.0], [0.0, 0.0]], [[2.0, 3.0], [0.0, 1.0]])
    assert found.value == pytest.approx((0.5 + 0.75) / 2)
    far = probability_of_improvement([[0.0], [0.0]], [[1.0], [1.0]])
    assert far == Estimate(1.0, 1.0, 1.0)


# -- measures and tables -------------------------------------------------------------------------


def test_measures_of_an_episode() -> None:
    falling = [4.0 - 2.0 * share for share in SHARES]
    made = record("p", "w", 0, 0.0, 0.0)
    made["bits"] = {"d0": falling, "d1": [8.0] * 11}
    made["brought"] = [1] * 5 + [2] * 6
    made["seen"] = 1
    assert curve(made)[:2] == pytest.approx([4.0, 3.8])
    assert final(made) == pytest.approx((2.0 + 8.0) / 2)
    assert final_seen(made) == pytest.approx(2.0)
    flat = record("p", "w", 0, 3.0)
    assert anytime(flat) == pytest.approx(3.0)
    only = {**made, "brought": [1] * 11}
    assert anytime(only) == pytest.approx(3.0)


def test_only_cells_that_all_have_finished_count() -> None:
    rows = [record(p, w, s, 1.0) for p in "ab" for w in ("u", "v") for s in (0, 1)]
    rows = [r for r in rows if (r["policy"], r["world"], r["seed"]) != ("b", "v", 1)]
    cells = Cells.of(rows)
    assert cells.count == 3
    assert [len(world) for world in cells.sample("a", final)] == [2, 1]


def test_a_comparison_pairs_by_world_and_seed_whatever_the_order() -> None:
    rows = [record("a", f"w{w}", s, w + 0.1 * s) for w in range(3) for s in range(2)]
    rows += [record("b", f"w{w}", s, w + 0.1 * s + 1) for w in (2, 0, 1) for s in (1, 0)]
    found = compare(Cells.of(rows), "b", "a")
    assert found["final"] == pytest.approx([1.0, 1.0, 1.0])
    assert found["final_improves"][0] == 0.0
    assert found["return"] == [0.0, 0.0, 0.0]


def test_a_reference_or_every_pair() -> None:
    rows = [record(p, w, 0, 1.0 + i) for i, p in enumerate("abc") for w in ("u", "v")]
    rows[4] = {**rows[4], "return": None}
    one = compare_all(rows, "b")
    assert set(one["against"]) == {"b"} and set(one["against"]["b"]) == {"a", "c"}
    assert one["against"]["b"]["c"]["return"] is None
    assert one["policies"]["c"]["return"] is None
    assert set(compare_all(rows, "b", every_pair=True)["against"]) == {"a", "b", "c"}
    assert compare_all(rows, None)["against"] == {}
    assert compare_all(rows[:1] + rows[4:5], "a")["episodes"] == 1
    assert compare_all([rows[0], rows[3]], "a")["policies"] == {}, "no cell in common"


def test_tables_hold_every_policy_and_mark_the_privileged() -> None:
    rows = [record(p, w, s, 2.0) for p in ("noop", "pbt") for w in ("u", "v") for s in (0, 1)]
    text = markdown(compare_all(rows, "noop"), ["How it was made."])
    assert "- How it was made." in text
    assert "| noop | 2.000 [2.000, 2.000] |" in text
    assert "| pbt* | +0.0000 [+0.0000, +0.0000] | 0.50 [0.50, 0.50] |" in text
    assert text_of([1.0, None, None]) == "1.000"
    assert text_of(None) == "-"
