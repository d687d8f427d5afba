"""Exact search against a full sort, retrieval with a table of vectors, BM25 by hand, and the command line."""

import json
import math
import sys
import types

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from repro import evaluate, metrics, retrieval
from repro.evaluate import EvaluateError, bm25_run, evaluate_model, retrieve, search

CORPUS = {"p1": "one", "p2": "two", "p3": "three", "p4": "four", "p5": "five"}
QUERIES = {"q1": "ask one", "q2": "ask two", "q3": "never judged"}
QRELS = {"q1": {"p1": 3, "p2": 1}, "q2": {"p5": 2}}
VECTORS = {"one": [3, 0], "two": [2, 1], "three": [1, 2], "four": [0, 3], "five": [-1, 0],
           "ask one": [1, 0], "ask two": [0, 1], "never judged": [1, 1]}  # fmt: skip


class TableEncoder:
    """Looks vectors up; remembers what it was asked, so that tests can see block sizes and texts."""

    def __init__(self, table=VECTORS):
        self.table, self.calls = table, []

    def encode(self, texts, kind, batch_size=32, progress=False):
        self.calls.append((kind, list(texts)))
        return torch.tensor([self.table[text] for text in texts], dtype=torch.float32)


def full_sort(queries, passages, k):
    """All scores in 64 bits, sorted with a stable sort: equal scores stay in index order."""
    scores = queries.double().numpy() @ passages.double().numpy().T
    indices = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(scores, indices, 1), indices


@settings(max_examples=80, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 6), st.integers(1, 40), st.integers(1, 50), st.data())
def test_search_equals_a_full_sort_with_ties(seed, n_queries, n, block, data):
    k = data.draw(st.integers(1, n))
    generator = torch.Generator().manual_seed(seed)
    # small whole numbers: products are exact, ties are many, half of the scores are below zero
    queries = torch.randint(-2, 3, (n_queries, 3), generator=generator).float()
    passages = torch.randint(-2, 3, (n, 3), generator=generator).float()
    scores, indices = search(queries, passages, k, block=block)
    expected_scores, expected_indices = full_sort(queries, passages, k)
    assert scores.shape == indices.shape == (n_queries, k)
    assert np.array_equal(indices.numpy(), expected_indices)
    assert np.array_equal(scores.numpy(), expected_scores)


def test_search_on_real_numbers_and_many_queries():
    generator = torch.Generator().manual_seed(0)
    queries = torch.randn(retrieval.QUERY_BLOCK + 76, 16, generator=generator)
    passages = torch.randn(700, 16, generator=generator) * 10
    scores, indices = search(queries, passages, 20, block=256)
    expected, _ = full_sort(queries, passages, 20)
    assert np.allclose(scores.numpy(), expected, rtol=1e-5, atol=1e-4)
    own = torch.gather(queries @ passages.T, 1, indices)  # every score belongs to its index
    assert torch.allclose(scores, own, rtol=1e-5, atol=1e-4)
    assert all(len(set(row)) == 20 for row in indices.tolist())


def test_scores_come_back_bit_by_bit():
    values = torch.tensor([[1e30, 1e-30, 0.1, 0.0, -0.0, -0.1, -1e-30, -1e30, 1.1754944e-38, -3.4e38]])
    scores, indices = retrieval._unpack(retrieval._pack(values, 5))
    assert torch.equal(scores, values)
    assert indices.tolist() == [list(range(5, 15))]
    tie = retrieval._pack(torch.tensor([[-0.0, 0.0, -0.0]]), 0).topk(3).values
    assert retrieval._unpack(tie)[1].tolist() == [[0, 1, 2]]  # -0.0 and 0.0 are equal scores


def test_search_holds_one_block_of_scores(monkeypatch):
    shapes = []
    pack = retrieval._pack
    monkeypatch.setattr(retrieval, "_pack", lambda s, first: shapes.append(tuple(s.shape)) or pack(s, first))
    monkeypatch.setattr(retrieval, "QUERY_BLOCK", 4)
    search(torch.ones(10, 2), torch.ones(95, 2), 3, block=10)
    assert max(shapes) == (4, 10)
    assert len(shapes) == 3 * 10


@pytest.mark.parametrize(("k", "n"), [(0, 5), (-1, 5), (6, 5), (1, 0)])
def test_search_refuses_a_wrong_k(k, n):
    with pytest.raises(ValueError, match="empty" if n == 0 else "from 1 to 5"):
        search(torch.ones(2, 3), torch.ones(n, 3), k)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_search_refuses_an_embedding_that_is_not_finite(bad):
    passages = torch.ones(4, 2)
    passages[2, 1] = bad
    with pytest.raises(EvaluateError, match="not a finite number"):
        search(torch.ones(1, 2), passages, 1)


def test_search_without_queries():
    scores, indices = search(torch.empty(0, 3), torch.ones(4, 3), 2)
    assert scores.shape == indices.shape == (0, 2)


def test_retrieve_by_hand():
    run = retrieve(TableEncoder(), CORPUS, QUERIES, k=3)
    assert run["q1"] == {"p1": 3.0, "p2": 2.0, "p3": 1.0}
    assert list(run["q2"]) == ["p4", "p3", "p2"]  # best first
    assert list(run["q3"]) == ["p1", "p2", "p3"]  # four passages score 3; the earlier ones stay


@pytest.mark.parametrize("block", [1, 2, 3, 100])
def test_retrieve_in_blocks_is_the_same_and_never_asks_for_more(block):
    model = TableEncoder()
    at_once = retrieve(TableEncoder(), CORPUS, QUERIES, k=4)
    assert retrieve(model, CORPUS, QUERIES, k=4, block=block) == at_once
    asked = [texts for kind, texts in model.calls if kind == "passage"]
    assert max(map(len, asked)) <= block
    assert sum(asked, []) == list(CORPUS.values())  # each passage once, in order
    assert [texts for kind, texts in model.calls if kind == "query"] == [list(QUERIES.values())]


def test_a_query_does_not_find_itself():
    table = {"Title my own  Text": [3, 0], "my own text": [3, 0], "other": [2, 0], "third": [1, 0],
             "asks": [1, 0]}  # fmt: skip
    corpus = {"a": "Title my own  Text", "b": "other", "c": "third"}
    queries = {"a": "my own text", "z": "asks"}
    run = retrieve(TableEncoder(table), corpus, queries, k=2)
    assert list(run["a"]) == ["b", "c"]  # itself left out, and the place filled
    assert list(run["z"]) == ["a", "b"]
    assert list(retrieve(TableEncoder(table), corpus, queries, k=2, self_hits="keep")["a"]) == ["a", "b"]
    assert list(retrieve(TableEncoder(table), corpus, queries, k=3)["a"]) == ["b", "c"]  # no more there are


def test_the_same_id_is_left_out_and_an_accident_is_said(capsys):
    table = {"wings": [2, 0], "heat": [1, 0], "a question": [1, 0]}
    corpus, queries = {"1": "wings", "2": "heat"}, {"1": "a question"}
    assert list(retrieve(TableEncoder(table), corpus, queries, k=2)["1"]) == ["2"]
    assert "note: 1 queries have the id of a passage with another text" in capsys.readouterr().err
    assert list(retrieve(TableEncoder(table), corpus, queries, k=2, self_hits="keep")["1"]) == ["1", "2"]
    assert capsys.readouterr().err == ""
    with pytest.raises(EvaluateError, match="self-hits is 'maybe'"):
        retrieve(TableEncoder(table), corpus, queries, k=2, self_hits="maybe")


def test_retrieve_refuses_what_it_cannot_do():
    with pytest.raises(EvaluateError, match="top-k is 6, expected a number from 1 to 5"):
        retrieve(TableEncoder(), CORPUS, QUERIES, k=6)
    with pytest.raises(EvaluateError, match="the corpus is empty"):
        retrieve(TableEncoder(), {}, QUERIES, k=1)
    assert retrieve(TableEncoder(), CORPUS, {}, k=1) == {}


def test_progress_only_when_asked(capsys):
    retrieve(TableEncoder(), CORPUS, QUERIES, k=1, block=2)
    assert capsys.readouterr().err == ""
    retrieve(TableEncoder(), CORPUS, QUERIES, k=1, block=2, progress=True)
    assert "5/5" in capsys.readouterr().err


# --- BM25 ---

ANIMALS = {"a": "Cats chase mice", "b": "The cat, the cat!", "c": "dogs bark loudly at dogs", "d": "the"}


def bm25_by_hand(f, n_w, length, mean_length, n, k1=0.9, b=0.4):
    return math.log(1 + (n - n_w + 0.5) / (n_w + 0.5)) * f / (f + k1 * (1 - b + b * length / mean_length))


def test_bm25_by_hand(capfd):
    # words: a = cat chase mice, b = cat cat, c = dog bark loudly dog, d = none; 9 words in 4 passages
    average = 9 / 4
    queries = {"q": "cats", "twice": "cat cat", "two": "dog mice", "none": "the", "new": "zebra"}
    run = bm25_run(ANIMALS, queries, k=4)
    assert run["q"] == {
        "b": pytest.approx(bm25_by_hand(2, 2, 2, average, 4), rel=1e-6),
        "a": pytest.approx(bm25_by_hand(1, 2, 3, average, 4), rel=1e-6),
    }
    assert list(run["q"]) == ["b", "a"]
    assert run["twice"] == {pid: pytest.approx(2 * score, rel=1e-6) for pid, score in run["q"].items()}
    assert run["two"]["c"] == pytest.approx(bm25_by_hand(2, 1, 4, average, 4), rel=1e-6)
    assert run["two"]["a"] == pytest.approx(bm25_by_hand(1, 1, 3, average, 4), rel=1e-6)
    assert run["none"] == run["new"] == {}  # no shared word, nothing retrieved
    assert capfd.readouterr() == ("", "")  # no progress bars


def test_bm25_options_reach_the_formula():
    run = bm25_run(ANIMALS, {"q": "dog"}, k=1, k1=1.5, b=0.75)
    assert run["q"]["c"] == pytest.approx(bm25_by_hand(2, 1, 4, 9 / 4, 4, 1.5, 0.75), rel=1e-6)


def test_bm25_ties_keep_the_earlier_passage_and_k_is_a_limit():
    corpus = {f"p{i}": "river word" for i in range(30)} | {"x": "river river word"}
    assert list(bm25_run(corpus, {"q": "river"}, k=4)["q"]) == ["x", "p0", "p1", "p2"]


def test_bm25_leaves_out_the_query_itself_and_survives_empty_text():
    assert list(bm25_run(ANIMALS, {"a": "cats chase mice"}, k=1)["a"]) == ["b"]
    assert bm25_run({"a": "the", "b": ""}, {"q": "cat"}, k=2) == {"q": {}}
    with pytest.raises(EvaluateError, match="top-k is 5"):
        bm25_run(ANIMALS, {"q": "cat"}, k=5)
    assert bm25_run(ANIMALS, {}, k=1) == {}


@pytest.mark.parametrize(
    ("word", "stem"),
    [("queries", "query"), ("cats", "cat"), ("horses", "horse"), ("shoes", "shoe"), ("virus", "virus"),
     ("glass", "glass"), ("bees", "bee"), ("cat", "cat"), ("us", "us"), ("is", "is"), ("ties", "ties"),
     ("s", "s")],
)  # fmt: skip
def test_s_stem(word, stem):
    assert retrieval.s_stem(word) == stem


# --- one model on one collection ---


def test_evaluate_model(tmp_path):
    model = TableEncoder()
    options = {"measures": ["ndcg@10", "mrr@10"], "run_file": tmp_path / "r"}
    record = evaluate_model(model, CORPUS, QUERIES, QRELS, **options)
    assert record["per_query"]["q1"] == {"ndcg@10": pytest.approx(1.0), "mrr@10": 1.0}
    # p1 and p5 both score 0 for q2; equal scores are ranked by id downwards, so p5 is fourth of five
    assert record["per_query"]["q2"] == {"ndcg@10": pytest.approx(1 / math.log2(5)), "mrr@10": 0.25}
    assert record["metrics"]["mrr@10"] == pytest.approx(0.625)
    assert record["counts"] == {"passages": 5, "queries": 2, "judgments": 3}
    assert (record["top_k"], record["device"], record["model"]) == (5, "cpu", "TableEncoder")
    assert {"torch", "transformers", "numpy"} <= record["versions"].keys()
    assert model.calls[0] == ("query", ["ask one", "ask two"])  # only the judged queries are asked
    saved = metrics.read_run(tmp_path / "r")
    assert metrics.evaluate(QRELS, saved, ["ndcg@10", "mrr@10"]) == record["per_query"]


def test_evaluate_model_says_when_top_k_limits_a_measure(capsys):
    evaluate_model(TableEncoder(), CORPUS, QUERIES, QRELS, top_k=2, measures=["ndcg@10", "mrr@2"])
    assert capsys.readouterr().err == "note: only 2 passages a query are kept, which limits ndcg@10\n"
    evaluate_model(TableEncoder(), CORPUS, QUERIES, QRELS)
    assert capsys.readouterr().err == ""


def test_evaluate_model_checks_before_it_encodes():
    model = TableEncoder()
    for options, message in [
        ({"top_k": 6}, "top-k is 6"),
        ({"measures": ["map"]}, "unknown measure 'map'"),
        ({"self_hits": "no"}, "self-hits"),
    ]:
        with pytest.raises(ValueError, match=message):
            evaluate_model(model, CORPUS, QUERIES, QRELS, **options)
    with pytest.raises(EvaluateError, match="1 judged queries have no text, for example 'q9'"):
        evaluate_model(model, CORPUS, QUERIES, {"q9": {"p1": 1}})
    with pytest.raises(EvaluateError, match="no judgments"):
        evaluate_model(model, CORPUS, QUERIES, {})
    with pytest.raises(EvaluateError, match="corpus is empty"):
        evaluate_model(model, {}, QUERIES, QRELS)
    assert model.calls == []


# --- the command line ---


@pytest.fixture
def folder(tmp_path):
    """A small collection in BEIR layout."""
    (tmp_path / "tiny" / "qrels").mkdir(parents=True)
    for name, texts in (("corpus", CORPUS), ("queries", QUERIES)):
        lines = [json.dumps({"_id": i, "title": "", "text": text}) + "\n" for i, text in texts.items()]
        (tmp_path / "tiny" / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    rows = [f"{q}\t{p}\t{grade}\n" for q, judged in QRELS.items() for p, grade in judged.items()]
    header = "query-id\tcorpus-id\tscore\n"
    (tmp_path / "tiny" / "qrels" / "test.tsv").write_text(header + "".join(rows), encoding="utf-8")
    return tmp_path / "tiny"


@pytest.fixture
def loaded(monkeypatch):
    """Put a table encoder where the command line loads its model from; returns what was asked for."""
    asked = []

    def load(name, device="auto", dtype="auto"):
        asked.append((name, device, dtype))
        return TableEncoder()

    stub = types.SimpleNamespace(BiEncoder=types.SimpleNamespace(load=load))
    monkeypatch.setitem(sys.modules, "repro.encoder", stub)
    return asked


def test_command_line(folder, loaded, tmp_path, capsys):
    out, run = tmp_path / "new" / "deep" / "r.json", tmp_path / "r.trec"
    files = ["--data", str(folder), "--out", str(out), "--run", str(run)]
    assert evaluate.main([*files, "--device", "cpu", "--no-cache"]) == 0
    assert loaded == [("base", "cpu", "auto")]
    record = json.loads(out.read_text(encoding="utf-8"))
    assert (record["collection"], record["split"], record["model"]) == ("tiny", "test", "base")
    assert record["per_query"].keys() == {"q1", "q2"}
    assert record["metrics"] == metrics.mean(metrics.evaluate(QRELS, metrics.read_run(run)))
    assert str(tmp_path) not in out.read_text(encoding="utf-8")  # no machine paths in records
    printed = capsys.readouterr().out
    assert "5 passages, 2 queries, 3 judgments" in printed
    assert f"ndcg@10     {record['metrics']['ndcg@10']:.4f}" in printed
    assert [p.name for p in out.parent.iterdir()] == ["r.json"]


def test_command_line_bm25_on_the_sample(capsys):
    assert evaluate.main(["--model", "bm25", "--measures", "ndcg@5"]) == 0
    printed = capsys.readouterr().out
    assert "collection  sample (test)" in printed
    assert 0.1 < float(printed.split("ndcg@5")[1]) < 1.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--top-k", "6"], "top-k is 6, expected a number from 1 to 5"),
        (["--top-k", "0"], "top-k is 0"),
        (["--measures", "map@3"], "unknown measure 'map@3'"),
        (["--batch-size", "0"], "batch-size is 0"),
        (["--run", "OUT"], "--out and --run name the same file"),
        (["--split", "dev"], "dev"),
        (["--data", "no such folder"], "no such folder"),
        (["--run", "FOLDER"], "cannot be written: it is a folder"),
        (["--run", "FOLDER/corpus.jsonl/r.trec"], "cannot be written"),
    ],
)
def test_command_line_errors_come_before_the_model(folder, loaded, tmp_path, capsys, options, message):
    out = tmp_path / "out.json"
    out.write_text("old", encoding="utf-8")
    options = [o.replace("OUT", str(out)).replace("FOLDER", str(folder)) for o in options]
    assert evaluate.main(["--data", str(folder), "--out", str(out), *options]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert error.count("\n") == 1
    assert loaded == []
    assert out.read_text(encoding="utf-8") == "old"


def test_command_line_unknown_model(folder, monkeypatch, tmp_path, capsys):
    def load(name, **_):
        raise ValueError(f"unknown model {name!r}")

    stub = types.SimpleNamespace(BiEncoder=types.SimpleNamespace(load=load))
    monkeypatch.setitem(sys.modules, "repro.encoder", stub)
    assert evaluate.main(["--model", "nobody", "--data", str(folder), "--out", str(tmp_path / "o.json")]) == 2
    assert capsys.readouterr().err == "error: unknown model 'nobody'\n"
    assert not (tmp_path / "o.json").exists()


def test_help_says_what_it_does(capsys):
    with pytest.raises(SystemExit, match="0"):
        evaluate.main(["--help"])
    assert "Ranks the collection's passages" in capsys.readouterr().out


def test_cached_vectors_change_no_score_and_serve_the_next_model(tiny_llama, tmp_path, monkeypatch):
    from test_encoder import weighted

    from repro.encoder import BiEncoder

    first = weighted(tiny_llama, projected=True)
    first.save(tmp_path / "first")
    first.projection.data.neg_()[0] *= 3
    first.save(tmp_path / "second")
    plain = [evaluate_model(str(tmp_path / name), CORPUS, QUERIES, QRELS, device="cpu") for name in ("first", "second")]
    once = evaluate_model(str(tmp_path / "first"), CORPUS, QUERIES, QRELS, device="cpu", cache=tmp_path / "cache")
    monkeypatch.setattr(BiEncoder, "keep_states", lambda *args, **kwargs: pytest.fail("computed again"))
    again = evaluate_model(str(tmp_path / "second"), CORPUS, QUERIES, QRELS, device="cpu", cache=tmp_path / "cache")
    assert once["per_query"] == plain[0]["per_query"] and again["per_query"] == plain[1]["per_query"]
    assert once["device"] == "cpu" and list((tmp_path / "cache").iterdir())
