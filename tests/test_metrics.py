"""nDCG, MRR and recall against trec_eval itself (pytrec_eval-terrier) and by hand; run files."""

import math
from math import log2

import numpy as np
import pytest
import pytrec_eval
from hypothesis import given, settings
from hypothesis import strategies as st

from repro import metrics
from repro.metrics import evaluate

QRELS = {"q": {"a": np.int64(3), "b": 0, "c": 1, "d": 2}, "none": {"b": 0}, "lost": {"b": 2}}
RUN = {"q": {"b": np.float32(9), "d": 8, "x": 7, "a": 6}, "none": {"b": 1}, "new": {"b": 1}}


def assert_equal_to_trec_eval(qrels, run, k):
    """Compare all judged queries; trec_eval leaves out those that a run lacks, and cuts no MRR."""
    complete = dict.fromkeys(qrels, {"unjudged": 0.0}) | run
    names = {f"ndcg_cut.{k}", f"recall.{k}", f"success.{k}", "recip_rank"}
    theirs = pytrec_eval.RelevanceEvaluator(qrels, names).evaluate(complete)
    ours = evaluate(qrels, run, (f"ndcg@{k}", f"mrr@{k}", f"recall@{k}"))
    for query in qrels:
        row = theirs[query]
        mrr = row["recip_rank"] * row[f"success_{k}"]
        expected = [row[f"ndcg_cut_{k}"], mrr, row[f"recall_{k}"]]
        assert list(ours[query].values()) == pytest.approx(expected, abs=1e-6), query


BY_HAND = [
    ("ndcg@10", (2 / log2(3) + 3 / log2(5)) / (3 + 2 / log2(3) + 1 / log2(4))),
    ("ndcg_exp@3", (3 / log2(3)) / (7 + 3 / log2(3) + 1 / log2(4))),
    ("mrr@10", 1 / 2),
    ("mrr@1", 0),
    ("recall@2", 1 / 3),
]


@pytest.mark.parametrize("measure, value", BY_HAND)
def test_worked_by_hand(measure, value):
    """Query `none` has nothing relevant, `lost` is not in the run, `new` is not judged."""
    found = evaluate(QRELS, RUN, [measure])
    assert found.pop("q") == {measure: pytest.approx(value)}
    assert found == {"none": {measure: 0}, "lost": {measure: 0}}


ORDERS = [
    ({"doc10": 0.5, "doc9": 0.5}, ["doc9", "doc10"]),  # equal scores: the larger id first
    ({"a": 1.0 + 1e-12, "b": 1.0}, ["b", "a"]),  # different in 64 bits, equal in 32
    ({"z": 0.0, "\U0001f600": 0.0, "\uffee": 0.0}, ["\U0001f600", "\uffee", "z"]),
    ({"a": 0.0, "b": -0.0, "c": -1}, ["b", "a", "c"]),
]


@pytest.mark.parametrize("scores, order", ORDERS)
def test_order_is_that_of_trec_eval(scores, order):
    assert metrics.rank(scores) == order
    for relevant in scores:
        assert_equal_to_trec_eval({"q": {relevant: 2}}, {"q": scores}, 1)


ids = st.text("aBé\uffee\U0001f600", min_size=1, max_size=2)
scores = st.integers(-2, 2).map(float) | st.floats(-1e30, 1e30, width=64)
rows = st.dictionaries(ids, st.integers(0, 4), min_size=1)
ranked = st.dictionaries(ids, scores, min_size=1)


@settings(deadline=None)
@given(
    st.dictionaries(ids, rows, min_size=1, max_size=4),
    st.dictionaries(ids, ranked, max_size=6),
    st.integers(1, 20),
)
def test_random_runs_with_ties_equal_trec_eval(qrels, run, k):
    assert_equal_to_trec_eval(qrels, run, k)


@pytest.mark.parametrize(
    "measure", ["ndcg", "ndcg@0", "map@10", "NDCG@10", "mrr@1_0", "mrr@5 ", ""]
)
def test_an_unknown_measure_is_named(measure):
    with pytest.raises(ValueError, match=f"unknown measure '{measure}'"):
        evaluate({}, {}, [measure])


@pytest.mark.parametrize("score", [math.nan, math.inf, -math.inf, 1e39])
def test_a_score_that_is_not_finite_in_32_bits_is_refused(score):
    with pytest.raises(ValueError, match="passage a: score .* is not finite in 32 bits"):
        metrics.rank({"b": 1.0, "a": score})


GRADES = [
    (-1, "ndcg@10"),
    (1.0, "ndcg@10"),
    ("1", "mrr@10"),
    (None, "recall@1"),
    (10**9, "ndcg@10"),
    (10**400, "mrr@10"),
    (1000, "ndcg_exp@10"),
]


@pytest.mark.parametrize("grade, measure", GRADES)
def test_a_grade_that_a_measure_cannot_take_is_named(grade, measure):
    with pytest.raises(ValueError, match=f"query q, passage a: grade {grade!r} is no whole number"):
        metrics.check_qrels({"q": {"b": 0, "a": grade}}, ["mrr@1", measure])


def test_the_largest_grades_do_not_overflow():
    found = evaluate({"q": {"a": 999, "b": 999}}, {"q": {"a": 2, "b": 1}}, ["ndcg_exp@9"])
    assert found == {"q": {"ndcg_exp@9": 1}}


def test_mean_is_over_the_queries():
    assert metrics.mean({"q": {"m": 1, "n": 0}, "r": {"m": 0.5, "n": 0}}) == {"m": 0.75, "n": 0}


def test_a_run_file_is_best_first_and_its_scores_read_back_exactly(tmp_path):
    metrics.write_run({"中": {"p1": 0.1, "a\u00a0b": 1 / 3, "é": -2.5e-30}}, tmp_path / "r", "t")
    text = (tmp_path / "r").read_text(encoding="utf-8")
    assert text == f"中 Q0 a\u00a0b 1 {1 / 3!r} t\n中 Q0 p1 2 0.1 t\n中 Q0 é 3 -2.5e-30 t\n"


@pytest.mark.parametrize("bad", ["", "a b", "a\tb", "a\n"])
def test_an_id_that_a_run_file_cannot_carry_is_refused(tmp_path, bad):
    for run in ({bad: {}}, {"q": {bad: 1.0}}):
        with pytest.raises(ValueError, match="is empty or holds white space"):
            metrics.write_run(run, tmp_path / "r", "tag")
