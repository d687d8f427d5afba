"""Significance tests against brute force over all sign patterns, hand-worked cases and definitions."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats as scipy_stats

from repro.stats import Comparison, StatsError, average_seeds, compare, holm, seed_summary


def per_query(values):
    return {f"q{i}": float(v) for i, v in enumerate(values)}


def all_sign_patterns(d):
    """Two-sided p by trying every pattern: the share of patterns with a mean at least as far from 0."""
    means = [abs(np.mean(np.array(signs) * d)) for signs in itertools.product((1, -1), repeat=len(d))]
    return np.mean([m >= abs(np.mean(d)) - 1e-12 for m in means])


def test_three_queries_by_hand():
    found = compare(per_query([0, 0, 0]), per_query([0.1, 0.2, 0.3]), seed=1)
    assert found.difference == pytest.approx(0.2)  # b - a: positive where b is better
    assert (found.mean_a, found.mean_b, found.n) == (0.0, pytest.approx(0.2), 3)
    assert found.p == pytest.approx(2 / 8)  # of the 8 patterns only +++ and --- are as far out
    assert 0.1 <= found.low < 0.2 < found.high <= 0.3


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(-4, 4), min_size=2, max_size=8))
def test_small_sets_are_exact(differences):
    d = np.array(differences) / 8
    found = compare(per_query(np.zeros(len(d))), per_query(d), resamples=1000)
    assert found.p == pytest.approx(all_sign_patterns(d))
    assert found.difference == pytest.approx(d.mean())
    assert found.low <= found.difference + 1e-12
    assert found.high >= found.difference - 1e-12


def test_large_sets_agree_with_the_normal_approximations():
    rng = np.random.default_rng(0)
    a, b = rng.uniform(0, 1, 200), rng.uniform(0, 1, 200)
    b = np.clip(b + 0.05, 0, 1)
    found = compare(per_query(a), per_query(b), seed=3)
    error = (b - a).std(ddof=1) / math.sqrt(200)
    assert found.p == pytest.approx(scipy_stats.ttest_rel(b, a).pvalue, abs=0.02)
    assert found.low == pytest.approx((b - a).mean() - 1.96 * error, abs=0.15 * error)
    assert found.high == pytest.approx((b - a).mean() + 1.96 * error, abs=0.15 * error)


def test_pairing_is_used():
    rng = np.random.default_rng(1)
    hardness = rng.uniform(0, 1, 40)
    found = compare(per_query(hardness), per_query(hardness + rng.uniform(0, 0.02, 40)), seed=0)
    assert found.p < 0.001  # unpaired, this difference drowns in the spread of the queries
    assert scipy_stats.ttest_ind(hardness, hardness + 0.01).pvalue > 0.5


def test_swapping_the_sides_turns_the_sign():
    rng = np.random.default_rng(2)
    a, b = per_query(rng.uniform(0, 1, 50)), per_query(rng.uniform(0, 1, 50))
    forth, back = compare(a, b, seed=5), compare(b, a, seed=5)
    assert back.difference == -forth.difference
    assert (back.low, back.high) == pytest.approx((-forth.high, -forth.low), abs=0.01)
    assert back.p == pytest.approx(forth.p, abs=0.03)


def test_a_true_null_is_rejected_at_the_nominal_rate():
    rng = np.random.default_rng(4)
    p = [compare(per_query(rng.normal(size=12)), per_query(rng.normal(size=12)), seed=i, resamples=200).p
         for i in range(150)]  # fmt: skip
    assert np.mean(np.array(p) <= 0.05) < 0.12
    assert 0.4 < np.mean(p) < 0.65


def test_same_seed_same_numbers_whatever_the_order():
    rng = np.random.default_rng(6)
    a, b = per_query(rng.uniform(0, 1, 60)), per_query(rng.uniform(0, 1, 60))
    again = {qid: b[qid] for qid in reversed(b)}
    assert compare(a, b, seed=1, resamples=500) == compare(a, again, seed=1, resamples=500)
    assert compare(a, b, seed=1, resamples=500) != compare(a, b, seed=2, resamples=500)


@pytest.mark.filterwarnings("error")
def test_equal_differences_give_no_nan():
    a = per_query([0.1, 0.5, 0.9, 0.3])
    assert compare(a, a) == Comparison(4, pytest.approx(0.45), pytest.approx(0.45), 0.0, 0.0, 0.0, 1.0)
    shifted = compare(per_query([0.0] * 12), per_query([0.25] * 12))
    assert (shifted.low, shifted.difference, shifted.high) == (0.25, 0.25, 0.25)
    assert shifted.p == pytest.approx(2 / 2**12)


def test_rounding_noise_is_no_difference():
    a = per_query([0.1 + 0.2, 0.7, 0.4])
    b = per_query([0.3, 0.7, 0.4])  # 0.1 + 0.2 is 0.30000000000000004
    assert compare(a, b).p == 1.0


def test_bad_scores():
    with pytest.raises(StatsError, match="3 stand on one side only, for example 'q1' .only on the first"):
        compare({"q0": 1.0, "q1": 1.0, "q2": 1.0}, {"q0": 1.0, "q9": 0.0})
    with pytest.raises(StatsError, match="at least 2 queries, found 1"):
        compare({"q": 1.0}, {"q": 0.0})
    with pytest.raises(StatsError, match="at least 2 queries, found 0"):
        compare({}, {})
    with pytest.raises(StatsError, match="query 'q1': score is nan"):
        compare({"q0": 1.0, "q1": math.nan}, {"q0": 1.0, "q1": 0.0})
    with pytest.raises(StatsError, match="resamples is 0"):
        compare({"q0": 1.0, "q1": 0.0}, {"q0": 1.0, "q1": 0.0}, resamples=0)


def test_holm_by_hand():
    found = holm({"c": 0.03, "a": 0.01, "d": 0.005, "b": 0.04})
    # sorted: .005*4, .01*3, .03*2, .04*1 = .02, .03, .06, .04, and .04 is raised to .06
    assert found == pytest.approx({"c": 0.06, "a": 0.03, "d": 0.02, "b": 0.06})
    assert list(found) == ["c", "a", "d", "b"]
    assert holm({"x": 0.5, "y": 0.9}) == {"x": 1.0, "y": 1.0}
    assert holm({"x": 0.2}) == {"x": 0.2}
    assert holm({}) == {}


@given(st.lists(st.one_of(st.floats(0, 1), st.sampled_from([0.01, 0.02, 0.05])), min_size=1, max_size=8))
def test_holm_equals_its_definition(values):
    p = {f"t{i}": v for i, v in enumerate(values)}
    ordered = sorted(values)
    adjusted = [
        max(min(1.0, (len(ordered) - j) * ordered[j]) for j in range(i + 1)) for i in range(len(ordered))
    ]
    found = holm(p)
    assert sorted(found.values()) == pytest.approx(adjusted)
    for x, y in itertools.combinations(p, 2):  # monotone, and equal p give equal results
        assert (p[x] < p[y]) <= (found[x] <= found[y])
        assert (p[x] == p[y]) <= (found[x] == pytest.approx(found[y]))
    assert all(found[name] >= p[name] for name in p)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8), st.sampled_from([0.01, 0.05, 0.1, 0.3]))
def test_holm_rejects_what_the_step_down_procedure_rejects(values, alpha):
    rejected = set()
    for place, i in enumerate(sorted(range(len(values)), key=values.__getitem__)):
        if (len(values) - place) * values[i] > alpha:
            break
        rejected.add(f"t{i}")
    found = holm({f"t{i}": v for i, v in enumerate(values)})
    assert {name for name, p in found.items() if p <= alpha} == rejected


@pytest.mark.parametrize("p", [-0.1, 1.1, math.nan])
def test_holm_refuses_what_is_no_probability(p):
    with pytest.raises(StatsError, match="bad: p is"):
        holm({"fine": 0.5, "bad": p})


def test_average_seeds():
    assert average_seeds([{"q": 0.2, "r": 1.0}, {"r": 0.0, "q": 0.4}]) == pytest.approx({"q": 0.3, "r": 0.5})
    assert average_seeds([{"q": 0.25}]) == {"q": 0.25}
    with pytest.raises(StatsError, match="1 stand on one side only, for example 'r' .only on the second"):
        average_seeds([{"q": 1.0}, {"q": 1.0, "r": 0.0}])
    with pytest.raises(StatsError, match="no run"):
        average_seeds([])


def test_seed_summary():
    assert seed_summary([0.1, 0.2, 0.3]) == (pytest.approx(0.2), pytest.approx(0.1))
    assert seed_summary([0.5]) == (0.5, None)
    for bad in ([], [0.1, math.nan]):
        with pytest.raises(StatsError, match="at least one, all finite"):
            seed_summary(bad)
