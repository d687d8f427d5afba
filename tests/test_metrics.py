"""nDCG, MRR and recall against trec_eval itself (pytrec_eval-terrier) and cases worked by hand; run files."""

import math

import numpy as np
import pytest
import pytrec_eval
from hypothesis import given, settings
from hypothesis import strategies as st

from repro import metrics
from repro.metrics import evaluate

QRELS = "q1 0 a 3\nq1 0 b 0\nq1 0 c 1\nq1 0 d 2\nq2 0 a 1\nq3 0 b 0\nq4 0 b 2\n"
RUN = "q1 Q0 b 1 9 t\nq1 Q0 d 2 8 t\nq1 Q0 x 3 7 t\nq1 Q0 a 4 6 t\nq2 Q0 a 1 1 t\nq3 Q0 b 1 1 t\nq5 0 a 1 1 t"

def table(text, place, kind):
    """A TREC text as {query: {passage: value}}; the value stands in column `place`."""
    found = {}
    for fields in map(str.split, text.splitlines()):
        found.setdefault(fields[0], {})[fields[2]] = kind(fields[place])
    return found

def trec_eval(qrels, run, k):
    """nDCG@k, MRR@k and recall@k of trec_eval, 0 for the queries that it leaves out."""
    cut = {}  # trec_eval has no MRR with a cut-off: its first k, found without the module under test
    for qid, scores in run.items():
        order = sorted(scores, key=lambda pid: pid.encode("utf-8"), reverse=True)
        order.sort(key=lambda pid, scores=scores: np.float32(scores[pid]), reverse=True)
        cut[qid] = {pid: scores[pid] for pid in order[:k]}
    rows = {qid: {} for qid in qrels}
    names = ("ndcg", f"ndcg_cut.{k}", run), ("mrr", "recip_rank", cut), ("recall", f"recall.{k}", run)
    for ours, theirs, ranked in names:
        found = pytrec_eval.RelevanceEvaluator(qrels, {theirs}).evaluate(ranked)
        for qid, row in rows.items():
            row[f"{ours}@{k}"] = found.get(qid, {}).get(theirs.replace(".", "_"), 0.0)
    return rows

def assert_equal_to_trec_eval(qrels, run, k):
    expected = trec_eval(qrels, run, k)
    found = evaluate(qrels, run, (f"ndcg@{k}", f"mrr@{k}", f"recall@{k}"))
    assert found.keys() == expected.keys()
    for qid, row in expected.items():
        assert found[qid] == pytest.approx(row, abs=1e-6), qid

def test_worked_by_hand():
    qrels, run, log = table(QRELS, 3, int), table(RUN, 4, float), math.log2
    found = evaluate(qrels, run, ("ndcg@3", "ndcg@10", "ndcg_exp@10", "mrr@10", "mrr@1", "recall@2"))
    ideal, ideal_exp = 3 + 2 / log(3) + 1 / log(4), 7 + 3 / log(3) + 1 / log(4)
    expected = [2 / log(3), 2 / log(3) + 3 / log(5)] / np.float64(ideal)
    expected = [*expected, (3 / log(3) + 7 / log(5)) / ideal_exp, 1 / 2, 0, 1 / 3]
    assert list(found["q1"].values()) == pytest.approx(expected)
    assert set(found["q2"].values()) == {1.0} and set(found["q3"].values()) == {0.0}  # q3: nothing relevant
    assert set(found["q4"].values()) == {0.0} and "q5" not in found  # q4: not in the run; q5: not judged
    for k in (1, 2, 3, 10):
        assert_equal_to_trec_eval(qrels, run, k)

@pytest.mark.parametrize(("scores", "order"), [
    ({"doc10": 0.5, "doc9": 0.5}, ["doc9", "doc10"]),  # equal scores: the larger id first
    ({"a": 1.0 + 1e-12, "b": 1.0}, ["b", "a"]),  # different in 64 bits, equal in 32
    (dict.fromkeys(["z", "é", "\U0001f600", "\uffee"], 0.0), ["\U0001f600", "\uffee", "é", "z"]),
    ({"a": 0.0, "b": -0.0, "c": -1}, ["b", "a", "c"])])
def test_order_is_that_of_trec_eval(scores, order):
    assert metrics.rank(scores) == order
    for relevant in scores:
        assert_equal_to_trec_eval({"q": {relevant: 2}}, {"q": scores}, 1)

ids = st.text(st.characters(codec="utf-8", exclude_categories=["Cs", "Cc"]), min_size=1, max_size=3)
scores = st.one_of(st.integers(-2, 2).map(float), st.floats(-1e30, 1e30, width=64))
judgments = st.dictionaries(ids, st.integers(0, 4), min_size=1, max_size=12)

@settings(max_examples=200, deadline=None)
@given(st.dictionaries(ids, judgments, min_size=1, max_size=4), st.data(), st.sampled_from([1, 2, 5, 10, 99]))
def test_random_runs_with_ties_equal_trec_eval(qrels, data, k):
    pool = st.sampled_from(sorted({pid for judged in qrels.values() for pid in judged})) | ids
    ranked = st.dictionaries(pool, scores, min_size=1, max_size=15)
    run = data.draw(st.dictionaries(st.sampled_from(sorted(qrels)) | ids, ranked, max_size=5))
    assert_equal_to_trec_eval(qrels, run, k)

def test_bad_measure_score_or_grade_is_named():
    for measure in ("ndcg", "ndcg@0", "map@10", "NDCG@10", "mrr@1_0", ""):
        with pytest.raises(ValueError, match="unknown measure"):
            evaluate({}, {}, [measure])
    for score in (math.nan, math.inf, -math.inf, 1e300, "1.0", None):
        with pytest.raises(ValueError, match="query q, passage a: score"):
            evaluate({"q": {"a": 1}}, {"q": {"b": 1.0, "a": score}})
    for grade in (-1, 1.0, 0.5, "1", None, math.nan):
        with pytest.raises(ValueError, match="query q, passage a: grade"):
            evaluate({"q": {"b": 0, "a": grade}}, {})

def test_numpy_numbers_are_taken_and_means_are_means():
    row = evaluate({"q": {"a": np.int64(2)}}, {"q": {"a": np.float32(0.5)}})["q"]
    assert row == {"ndcg@10": 1.0, "mrr@10": 1.0, "recall@100": 1.0}
    assert metrics.mean({"q": {"m": 1.0, "n": 0.0}, "r": {"m": 0.5, "n": 0.0}}) == {"m": 0.75, "n": 0.0}
    with pytest.raises(ValueError, match="no judged query"):
        metrics.mean({})

def test_run_file(tmp_path):
    run = {"q_1": {"p1": 0.1, "p2": 1 / 3, "é": -2.5e-30}, "中": {"a\u00a0b": 7.0}}
    metrics.write_run(run, tmp_path / "r", "tag")
    text = (tmp_path / "r").read_bytes().decode("utf-8")
    assert text.splitlines()[0] == f"q_1 Q0 p2 1 {1 / 3!r} tag"  # best first
    rows = [line.split(" ") for line in text.removesuffix("\n").split("\n")]
    assert [row[3] for row in rows] == ["1", "2", "3", "1"]
    read = [(qid, pid, float(score)) for qid, _, pid, _, score, _ in rows]
    assert sorted(read) == sorted((q, p, score) for q, found in run.items() for p, score in found.items())
