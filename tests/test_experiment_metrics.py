"""Metrics of forgetting and statistics over seeds, against figures worked out by hand."""

import math

import numpy as np
import pytest
from scipy import stats

from k1.experiments import metrics
from k1.experiments.significance import holm, interval, paired_p

R = np.array([[8.0, 8.0, 8.0], [2.0, 5.0, 6.0], [3.0, 1.0, 4.0], [2.5, 2.0, 1.0]])
"""Learnt: 2, 1, 1. The first domain recovers in the last phase, the second loses 1 bit."""
CURVE = [(0, (4.0, 9.0, 9.0)), (1, (3.5, 2.0, 9.0)), (1, (3.0, 1.0, 9.0)), (2, (2.5, 2.0, 1.0))]


def test_what_is_learnt_is_read_below_the_diagonal():
    assert metrics.learnt(R).tolist() == [2, 1, 1]
    assert metrics.new_domain_bits(R) == 1
    assert metrics.final_bits(R) == pytest.approx(5.5 / 3)


def test_forgetting_is_against_the_best_before_the_last_phase():
    assert metrics.forgetting(R).tolist() == [0.5, 1.0]
    assert metrics.average_forgetting(R) == 0.75
    better_later = R.copy()
    better_later[2, 0] = 1.5
    assert metrics.forgetting(better_later).tolist() == [1.0, 1.0]


def test_forgetting_in_per_cent_of_bits_and_of_perplexity():
    assert metrics.forgetting_percent(R) == pytest.approx((25 + 100) / 2)
    expected = 100 * ((2**0.5 - 1) + (2**1.0 - 1)) / 2
    assert metrics.forgetting_perplexity_percent(R) == pytest.approx(expected)


def test_transfers_are_bits_saved():
    assert metrics.backward_transfer(R) == pytest.approx(((2 - 2.5) + (1 - 2)) / 2)
    assert metrics.forward_transfer(R) == pytest.approx(((8 - 5) + (8 - 4)) / 2)


def test_retention_is_the_share_of_what_was_learnt():
    assert metrics.retention(R) == pytest.approx(((8 - 2.5) / 6 + (8 - 2) / 7) / 2)


def test_the_mean_over_the_stream_counts_domains_met_so_far():
    assert metrics.average_anytime(CURVE) == pytest.approx((4 + 2.75 + 2 + 5.5 / 3) / 4)


def test_the_gap_is_the_worst_loss_since_a_phase_began():
    assert metrics.stability_gap(R, CURVE) == 1.5  # 3.5 in phase 1 after 2
    assert metrics.stability_gap(R, [(2, (3.0, 1.0, 1.0))]) == 0
    assert metrics.stability_gap(R, [*CURVE, (2, (3.1, 4.0, 1.0))]) == 3.0


def test_a_matrix_has_a_row_more_than_columns_and_keeps_what_diverged():
    assert math.isnan(metrics.as_matrix([[1.0], [None]])[1, 0])
    with pytest.raises(ValueError, match=r"\(2, 2\)"):
        metrics.as_matrix([[1.0, 2.0], [1.0, 2.0]])


def test_the_frontier_holds_what_nothing_beats():
    points = [(1.0, 9.0), (2.0, 5.0), (2.5, 6.0), (3.0, 1.0), (1.5, math.nan), (0.5, math.inf)]
    assert metrics.frontier(points) == [(1.0, 9.0), (2.0, 5.0), (3.0, 1.0)]


@pytest.mark.parametrize(
    ("cost", "harm"), [(0.9, None), (1.0, 9.0), (1.25, 8.0), (2.5, 3.0), (3.0, 1.0), (7.0, 1.0)]
)
def test_harm_is_read_on_lines_between_points(cost: float, harm: float | None):
    points = [(3.0, 1.0), (1.0, 9.0), (2.0, 5.0)]
    assert metrics.harm_at(points, cost) == (None if harm is None else pytest.approx(harm))
    assert metrics.harm_at([], cost) is None


def test_an_interval_is_that_of_student():
    values = [1.0, 2.0, 4.0]
    found = interval(values)
    low, high = stats.t.interval(0.95, 2, np.mean(values), stats.sem(values))
    assert found.mean == pytest.approx(7 / 3)
    assert found.half == pytest.approx((high - low) / 2)
    assert interval([3.0]).show() == "3.000" and found.show(1) == "2.3 ± 3.8"


def test_pairs_are_tested_as_scipy_does():
    a, b = [1.0, 2.0, 3.5], [1.5, 2.2, 3.6]
    assert paired_p(a, b) == pytest.approx(stats.ttest_rel(a, b).pvalue)
    assert paired_p(a, a) == 1.0 and paired_p([1.0, 2.0], [0.5, 1.5]) == 0.0
    assert math.isnan(paired_p([1.0], [2.0]))
    with pytest.raises(ValueError, match="zip"):
        paired_p([1.0], [1.0, 2.0])


def test_holm_steps_down():
    found = holm({"a": 0.04, "b": 0.01, "c": 0.03, "d": math.nan})
    assert found["b"] == pytest.approx(0.03)
    assert found["c"] == found["a"] == pytest.approx(0.06)  # never less than one before
    assert math.isnan(found["d"])
    assert holm({"a": 0.9, "b": 0.8}) == {"a": 1.0, "b": 1.0}
