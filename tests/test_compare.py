"""Paired statistics against scipy's, Holm by hand, the command."""

import json

import numpy as np
import pytest
from scipy import stats

from repro import compare as room
from repro.compare import compare, holm

NOISE = np.random.default_rng(3).normal(0.05, 0.2, 60)


def rows(values):
    return {f"q{n:03}": float(value) for n, value in enumerate(values)}


@pytest.mark.parametrize("sizes", [(3,), (4, 6), (2, 3, 5)])
def test_p_is_that_of_all_sign_patterns(sizes):
    rng = np.random.default_rng(sum(sizes))
    found = [rng.integers(-3, 5, size) / 10 for size in sizes]
    weighted = np.concatenate([d / len(d) / len(sizes) for d in found])
    exact = stats.permutation_test([weighted], np.sum, permutation_type="samples")  # all of them
    ours = compare(dict(enumerate(map(rows, found))))
    assert ours.p == pytest.approx(exact.pvalue, abs=0.02)


def test_the_interval_is_that_of_the_plain_bootstrap():
    found = compare({"c": rows(NOISE)})
    plain = stats.bootstrap([NOISE], np.mean, method="percentile", random_state=0)
    assert found[1:3] == pytest.approx(plain.confidence_interval, abs=0.004)


SURE = 1 / 10_000
KNOWN = [
    (
        {"c": rows([0.25] * 20)},
        (0.25, 0.25, 0.25, SURE, 20),
    ),
    (  # rounding is no difference
        {"c": rows([0.1 + 0.2 - 0.3, 0, 0])},
        (0, 0, 0, 1, 3),
    ),
    (  # collections weigh the same, and queries are drawn within each
        {"small": rows([0.3] * 20), "large": rows([0.1] * 50)},
        (0.2, 0.2, 0.2, SURE, 70),
    ),
]


@pytest.mark.parametrize("differences, expected", KNOWN)
def test_known_comparisons(differences, expected):
    assert compare(differences) == pytest.approx(expected)


@pytest.mark.parametrize("bad", [{}, {"c": {}}, {"c": {"q": 0.1}}, {"c": {"q": 1, "r": np.nan}}])
def test_too_few_or_no_finite_differences_are_refused(bad):
    with pytest.raises(ValueError, match="2 or more finite"):
        compare(bad)


def test_holm_by_hand():
    # .005 * 5, .01 * 4, .03 * 3, .04 * 2, .9 = .025, .04, .09, .08, .9, and .08 is raised to .09
    found = holm({"c": 0.03, "a": 0.01, "d": 0.005, "b": 0.04, "e": 0.9})
    assert found == pytest.approx({"d": 0.025, "a": 0.04, "c": 0.09, "b": 0.09, "e": 0.9})


def record(values, **fields):
    """The fields of a record that are read; `values` are nDCG@10 by query."""
    per_query = {query: {"ndcg@10": value} for query, value in values.items()}
    return json.dumps({"collection": "c", "split": "test", "per_query": per_query, **fields})


OURS = record({"q": 0.75, "r": 0.5})
INTERVAL = "of A - B on c (test): +0.2500, 95 % interval +0.2500 to +0.2500, p = "
BAD = "expected a record with ndcg@10"
COMPARED = [
    (record({"r": 0.25, "q": 0.5}), 0, INTERVAL),
    (record({"q": 1, "s": 1}), 2, "the same queries"),
    (record({"q": 1, "r": 1}, collection="d"), 2, "expected one collection"),
    (record({"q": 1, "r": 1}, split="dev"), 2, "expected one collection"),
    (record({}, per_query={"q": {"mrr@10": 1}}), 2, BAD),
    (record({"q": "x"}), 2, BAD),
    ("[]", 2, BAD),
    ("q1 Q0 p1 1 2.0 t", 2, BAD),
]


@pytest.mark.parametrize("theirs, code, message", COMPARED)
def test_the_command_says_one_line(tmp_path, capsys, theirs, code, message):
    (tmp_path / "a").write_text(OURS)
    (tmp_path / "b").write_text(theirs)
    assert room.main([f"{tmp_path}/a", f"{tmp_path}/b"]) == code
    said = "".join(capsys.readouterr())
    assert message in said
    assert said.count("\n") == 1
