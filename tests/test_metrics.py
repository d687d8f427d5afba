"""nDCG, MRR and recall against trec_eval (pytrec_eval-terrier) and cases worked by hand; run files."""

import math
import random

import numpy as np
import pytest
import pytrec_eval
from hypothesis import given, settings
from hypothesis import strategies as st

from repro import metrics
from repro.metrics import MetricError, evaluate

QRELS = """\
q1 0 a 3
q1 0 b 0
q1 0 c 1
q1 0 d 2
q2 0 a 1
q3 0 b 0
q4 0 b 2
"""
RUN = """\
q1 Q0 b 1 9.0 t
q1 Q0 d 2 8.0 t
q1 Q0 x 3 7.0 t
q1 Q0 a 4 6.0 t
q2 Q0 a 1 1.0 t
q3 Q0 b 1 1.0 t
q5 Q0 a 1 1.0 t
"""


def qrels_of(text):
    qrels = {}
    for line in text.splitlines():
        qid, _, pid, grade = line.split()
        qrels.setdefault(qid, {})[pid] = int(grade)
    return qrels


def run_of(text, tmp_path):
    (tmp_path / "inline.trec").write_text(text, encoding="utf-8")
    return metrics.read_run(tmp_path / "inline.trec")


def trec_cut(scores, k):
    """The first k in trec_eval's order, found without the module under test: trec_eval has no MRR cut-off."""
    order = sorted(scores, key=lambda pid: pid.encode("utf-8"), reverse=True)
    order.sort(key=lambda pid: np.float32(scores[pid]), reverse=True)  # stable, so ids decide ties
    return {pid: scores[pid] for pid in order[:k]}


def trec_eval(qrels, run, k):
    """nDCG@k, MRR@k and Recall@k of trec_eval itself, 0 for the queries that it leaves out."""
    full = pytrec_eval.RelevanceEvaluator(qrels, {f"ndcg_cut.{k}", f"recall.{k}"}).evaluate(run)
    cut = {qid: trec_cut(scores, k) for qid, scores in run.items()}
    first = pytrec_eval.RelevanceEvaluator(qrels, {"recip_rank"}).evaluate(cut)
    return {
        qid: {
            f"ndcg@{k}": full.get(qid, {}).get(f"ndcg_cut_{k}", 0.0),
            f"mrr@{k}": first.get(qid, {}).get("recip_rank", 0.0),
            f"recall@{k}": full.get(qid, {}).get(f"recall_{k}", 0.0),
        }
        for qid in qrels
    }


def assert_equal_to_trec_eval(qrels, run, k):
    expected = trec_eval(qrels, run, k)
    found = evaluate(qrels, run, (f"ndcg@{k}", f"mrr@{k}", f"recall@{k}"))
    assert found.keys() == expected.keys()
    for qid, row in expected.items():
        assert found[qid] == pytest.approx(row, abs=1e-6), qid


def test_worked_by_hand(tmp_path):
    wanted = ("ndcg@3", "ndcg@10", "ndcg_exp@10", "mrr@10", "recall@2")
    found = evaluate(qrels_of(QRELS), run_of(RUN, tmp_path), wanted)
    log = math.log2
    ideal = 3 + 2 / log(3) + 1 / log(4)
    assert found["q1"]["ndcg@10"] == pytest.approx((2 / log(3) + 3 / log(5)) / ideal)
    assert found["q1"]["ndcg@3"] == pytest.approx((2 / log(3)) / ideal)
    ideal_exp = 7 + 3 / log(3) + 1 / log(4)
    assert found["q1"]["ndcg_exp@10"] == pytest.approx((3 / log(3) + 7 / log(5)) / ideal_exp)
    assert found["q1"]["mrr@10"] == 0.5
    assert found["q1"]["recall@2"] == pytest.approx(1 / 3)
    assert set(found["q2"].values()) == {1.0}
    assert set(found["q3"].values()) == {0.0}  # nothing relevant
    assert set(found["q4"].values()) == {0.0}  # judged, missing from the run
    assert "q5" not in found  # in the run, not judged


def test_inline_files_equal_trec_eval(tmp_path):
    for k in (1, 2, 3, 10):
        assert_equal_to_trec_eval(qrels_of(QRELS), run_of(RUN, tmp_path), k)


def test_ties_go_to_the_larger_id():
    qrels = {"q": {"doc10": 1, "doc9": 0}}
    assert evaluate(qrels, {"q": {"doc10": 0.5, "doc9": 0.5}}, ["mrr@10"])["q"]["mrr@10"] == 0.5
    qrels = {"q": {"doc10": 0, "doc9": 1}}
    assert evaluate(qrels, {"q": {"doc10": 0.5, "doc9": 0.5}}, ["mrr@10"])["q"]["mrr@10"] == 1.0


def test_scores_are_compared_as_32_bit_numbers():
    run = {"q": {"a": 1.0 + 1e-12, "b": 1.0}}  # different in 64 bits, a tie in 32, so b comes first
    assert metrics.rank(run["q"]) == ["b", "a"]
    for relevant in "ab":
        assert_equal_to_trec_eval({"q": {relevant: 1}}, run, 1)


def test_unicode_ids_sort_as_trec_eval_sorts_bytes():
    ids = ["z", "é", "中", "\U0001f600", "\uffee", "a b"]
    for relevant in ids:
        assert_equal_to_trec_eval({"ü": {relevant: 2}}, {"ü": dict.fromkeys(ids, 0.25)}, 3)


def test_large_random_runs_equal_trec_eval():
    rng = random.Random(5)
    ids = [f"p{i}" for i in range(300)]
    qrels = {f"q{i}": {p: rng.randint(0, 4) for p in rng.sample(ids, 60)} for i in range(30)}
    run = {f"q{i}": {p: rng.choice([rng.gauss(0, 3), rng.randint(-3, 3)]) + 0.0 for p in rng.sample(ids, 200)}
           for i in range(5, 35)}  # fmt: skip
    for k in (1, 5, 10, 100, 1000):
        assert_equal_to_trec_eval(qrels, run, k)


ids = st.text(st.characters(codec="utf-8", exclude_categories=["Cs", "Cc"]), min_size=1, max_size=3)
scores = st.one_of(st.integers(-2, 2).map(float), st.floats(-1e30, 1e30, width=64))


judgments = st.dictionaries(ids, st.integers(0, 4), min_size=1, max_size=12)


@settings(max_examples=200, deadline=None)
@given(
    qrels=st.dictionaries(ids, judgments, min_size=1, max_size=4),
    data=st.data(),
    k=st.sampled_from([1, 2, 3, 5, 10, 100]),
)
def test_random_runs_equal_trec_eval(qrels, data, k):
    pool = st.sampled_from(sorted({pid for judged in qrels.values() for pid in judged})) | ids
    queries = st.sampled_from(sorted(qrels)) | ids
    ranked = st.dictionaries(pool, scores, min_size=1, max_size=15)
    run = data.draw(st.dictionaries(queries, ranked, max_size=5))
    assert_equal_to_trec_eval(qrels, run, k)


@given(st.lists(st.integers(0, 4), min_size=1, max_size=12), st.randoms())
def test_the_ideal_order_scores_one_and_no_order_scores_more(grades, shuffler):
    judged = {f"p{i}": grade for i, grade in enumerate(grades)}
    order = sorted(judged, key=judged.get, reverse=True)
    wanted = ("ndcg@5", "ndcg_exp@5", "mrr@5", "recall@12")
    best = evaluate({"q": judged}, {"q": {p: -i for i, p in enumerate(order)}}, wanted)["q"]
    assert all(value == pytest.approx(1.0 if any(grades) else 0.0) for value in best.values())
    shuffler.shuffle(order)
    other = evaluate({"q": judged}, {"q": {p: -i for i, p in enumerate(order)}}, wanted)["q"]
    assert all(0 <= other[m] <= best[m] + 1e-12 for m in wanted)


@pytest.mark.parametrize("measure", ["ndcg", "ndcg@0", "map@10", "ndcg@1.5", "NDCG@10", "mrr@1 ", ""])
def test_unknown_measure(measure):
    with pytest.raises(MetricError, match="unknown measure"):
        evaluate({"q": {"a": 1}}, {}, [measure])


@pytest.mark.parametrize("score", [math.nan, math.inf, -math.inf, 1e300, "1.0", None])
def test_bad_score_is_named(score):
    with pytest.raises(MetricError, match="query q, passage a: score"):
        evaluate({"q": {"a": 1}}, {"q": {"a": score}})


@pytest.mark.parametrize("grade", [-1, 1.0, 0.5, "1", None, math.nan])
def test_bad_grade_is_named(grade):
    with pytest.raises(MetricError, match="query q, passage a: grade"):
        evaluate({"q": {"a": grade}}, {})


def test_numpy_scores_and_grades_are_taken():
    row = evaluate({"q": {"a": np.int64(2)}}, {"q": {"a": np.float32(0.5)}})["q"]
    assert row == {"ndcg@10": 1.0, "mrr@10": 1.0, "recall@100": 1.0}


def test_mean():
    assert metrics.mean({"q": {"m": 1.0, "n": 0.0}, "r": {"m": 0.5, "n": 0.0}}) == {"m": 0.75, "n": 0.0}
    with pytest.raises(MetricError, match="no judged query"):
        metrics.mean({})


def test_run_file_round_trip(tmp_path):
    run = {"q_1": {"p1": 0.1, "p2": 1 / 3, "é": -2.5e-30}, "中": {"a\u00a0b": 7.0}}
    file = tmp_path / "run.trec"
    file.write_text("old", encoding="utf-8")
    with open(file, encoding="utf-8") as open_before:
        metrics.write_run(run, file, "tag")
        assert open_before.read() == "old"  # the new file took the old one's place, whole
    assert metrics.read_run(file) == run
    first = file.read_text(encoding="utf-8").splitlines()[0]
    assert first == f"q_1 Q0 p2 1 {1 / 3!r} tag"  # best first
    assert [p.name for p in tmp_path.iterdir()] == ["run.trec"]  # no scratch file left
    (tmp_path / "other").write_text("")
    assert file.stat().st_mode == (tmp_path / "other").stat().st_mode  # the mode of any new file


@settings(max_examples=50, deadline=None)
@given(
    st.dictionaries(
        st.text("aé中-", min_size=1), st.dictionaries(st.text("bü_", min_size=1), scores, min_size=1)
    )
)
def test_any_run_survives_the_file(tmp_path_factory, run):
    file = tmp_path_factory.mktemp("run") / "r"
    metrics.write_run(run, file, "t")
    assert metrics.read_run(file) == run


@pytest.mark.parametrize(
    ("run", "tag", "field"),
    [
        ({"q": {"a b": 1.0}}, "t", "passage 'a b'"),
        ({"q\n": {"a": 1.0}}, "t", "query"),
        ({"q": {"a": 1.0}}, "my tag", "tag 'my tag'"),
        ({"q": {"": 1.0}}, "t", "passage ''"),
        ({"q": {"a": math.nan}}, "t", "query q, passage a: score"),
    ],
)
def test_a_refused_run_leaves_the_old_file(tmp_path, run, tag, field):
    file = tmp_path / "run.trec"
    file.write_text("old", encoding="utf-8")
    with pytest.raises(MetricError, match=field):
        metrics.write_run({"fine": {"a": 1.0}, **run}, file, tag)
    assert file.read_text(encoding="utf-8") == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["run.trec"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"q Q0 a 1 0.5", "2: expected 6 fields .* found 5"),
        (b"q Q0 a 1 0.5 t extra", "2: expected 6 fields .* found 7"),
        (b"q Q0 a one 0.5 t", "2: field rank is 'one'"),
        (b"q Q0 a 1 half t", "2: field score is 'half'"),
        (b"q Q0 a 1 nan t", "2: field score"),
        (b"q Q0 a 1 1e99 t", "2: field score.*32-bit"),
        (b"q Q0 p 1 0.5 t", "2: field passage is 'p', already ranked for query q"),
        (b"q Q0 \xff 1 0.5 t", "2: line is not UTF-8"),
    ],
)
def test_bad_run_line_is_named(tmp_path, line, message):
    file = tmp_path / "bad.trec"
    file.write_bytes(b"q Q0 p 1 0.75 t\n" + line + b"\n")
    with pytest.raises(MetricError, match=r"bad\.trec:" + message):
        metrics.read_run(file)


def test_reader_takes_tabs_blank_lines_and_crlf(tmp_path):
    (tmp_path / "r").write_bytes(b"q\tQ0\ta\t1\t2\tt\r\n\r\n  q Q0  b 2 1.5 t\n")
    assert metrics.read_run(tmp_path / "r") == {"q": {"a": 2.0, "b": 1.5}}
