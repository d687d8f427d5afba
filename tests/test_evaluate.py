"""Search against a full sort, retrieval with a table of vectors, BM25 by hand, record and command."""

import json
import math
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from repro import evaluate, metrics
from repro.checkpoints import locked
from repro.encoder import BiEncoder
from repro.evaluate import bm25_run, evaluate_model, retrieve, search

CORPUS = {"p1": "one", "p2": "two", "p3": "three", "p4": "four", "p5": "five"}
QUERIES = {"q1": "ask one", "q2": "ask two", "q3": "never judged"}
QRELS = {"q1": {"p1": 3, "p2": 1}, "q2": {"p5": 2}}
VECTORS = [[3, 0], [2, 1], [1, 2], [0, 3], [-1, 0], [1, 0], [0, 1], [1, 1]]
TABLE = dict(zip([*CORPUS.values(), *QUERIES.values()], VECTORS, strict=True))

class TableEncoder:
    """Looks vectors up and remembers what it was asked."""
    def __init__(self, table=TABLE):
        self.table, self.calls, self.projection, self.model = table, [], None, torch.nn.Identity()
    def encode(self, texts, kind, batch_size=32, progress=False):
        self.calls.append((kind, list(texts)))
        return torch.tensor([self.table[text] for text in texts], dtype=torch.float32)

def full_sort(queries, passages, k):
    """Scores and indices by a stable sort of all scores in 64 bits: equal ones stay in index order."""
    scores = queries.double().numpy() @ passages.double().numpy().T
    indices = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(scores, indices, 1), indices

@settings(max_examples=150, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 6), st.integers(1, 40), st.integers(1, 50), st.data())
def test_search_equals_a_full_sort_with_ties(seed, n_queries, n, block, data):
    k, generator = data.draw(st.integers(1, n)), torch.Generator().manual_seed(seed)
    # small whole numbers: products are exact, ties are many, some of 0.0 and -0.0
    both = torch.randint(-2, 3, (n_queries + n, 2), generator=generator).float().split([n_queries, n])
    for found, expected in zip(search(*both, k, block), full_sort(*both, k), strict=True):
        assert np.array_equal(found, expected)

def test_search_compares_block_by_block(monkeypatch):
    both = torch.randn(730, 16, generator=torch.Generator().manual_seed(0)).split([30, 700])
    shapes, topk = set(), torch.Tensor.topk
    monkeypatch.setattr(evaluate, "QUERY_BLOCK", 7)
    monkeypatch.setattr(torch.Tensor, "topk", lambda s, *a, **kw: shapes.add(s.shape) or topk(s, *a, **kw))
    scores, indices = search(*both, 20, block=256)
    expected_scores, expected_indices = full_sort(*both, 20)
    assert np.array_equal(indices, expected_indices) and np.allclose(scores, expected_scores, atol=1e-5)
    assert shapes == {(7, 256), (2, 256), (7, 188), (2, 188)}  # never more scores than a block's

@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 3e38])  # 3e38: its scores are not finite
@pytest.mark.parametrize("side", [0, 1])
def test_search_refuses_what_is_not_finite_and_a_wrong_k(bad, side):
    both = [torch.ones(4, 2), torch.ones(4, 2)]
    for k in (0, -1, 5):
        with pytest.raises(ValueError, match="expected a number from 1 to 4"):
            search(*both, k)
    both[side][2] = bad
    with pytest.raises(ValueError, match="not a finite number"):
        search(*both, 1)

@pytest.mark.parametrize("block", [1, 2, 3, 100])
def test_retrieve_by_hand_in_blocks(block, monkeypatch):
    monkeypatch.setattr(evaluate, "search", partial(search, block=block))
    model = TableEncoder()
    run = retrieve(model, CORPUS, QUERIES, k=3)
    assert run["q1"] == {"p1": 3.0, "p2": 2.0, "p3": 1.0}
    assert list(run["q3"]) == ["p1", "p2", "p3"]  # four passages score 3; the earlier ones stay
    asked = [texts for kind, texts in model.calls if kind == "passage"]
    assert max(map(len, asked)) <= block and sum(asked, []) == list(CORPUS.values())

def test_a_query_does_not_find_itself_but_finds_another_text_under_its_id():
    texts = {"a": "Title my own  Text", "b": "My own text", "c": "other"}
    queries = {"a": "my own text", "b": "my own text", "c": "a question"}
    table = dict(zip([*texts.values(), "my own text", "a question"], [[3], [2], [1], [1], [-1]], strict=True))
    for k, expected in ((3, [["b", "c"], ["a", "c"], ["c", "b", "a"]]), (1, [["b"], ["a"], ["c"]])):
        run = retrieve(TableEncoder(table), texts, queries, k)
        assert [list(found) for found in run.values()] == expected
    assert list(bm25_run(texts, queries, k=3)["a"]) == ["b"]

def test_bm25_by_hand(capfd):
    def score(f, n_w, length):  # words: a = cat chase mice, b = cat cat, c = dog bark loudly dog, d = none
        return math.log(1 + (4 - n_w + 0.5) / (n_w + 0.5)) * f / (f + 0.9 * (0.6 + 0.4 * length / (9 / 4)))

    corpus = {"a": "Cats chase mice", "b": "The cat, the cat!", "c": "dogs bark loudly at dogs", "d": "the"}
    queries = {"q": "cats", "twice": "cat cat", "two": "dog mice", "none": "the", "new": "zebra"}
    run = bm25_run(corpus, queries, 4)
    assert run["q"] == pytest.approx({"b": score(2, 2, 2), "a": score(1, 2, 3)}) and [*run["q"]] == ["b", "a"]
    assert run["twice"] == pytest.approx({pid: 2 * value for pid, value in run["q"].items()})
    assert run["two"] == pytest.approx({"c": score(2, 1, 4), "a": score(1, 1, 3)})
    assert run["none"] == run["new"] == {}  # no shared word, nothing retrieved
    assert capfd.readouterr() == ("", "")  # no progress bars

def test_bm25_ties_empty_texts_and_stems():
    corpus = {f"p{i}": "river word" for i in range(30)} | {"x": "river river word"}
    assert list(bm25_run(corpus, {"q": "river"}, k=4)["q"]) == ["x", "p0", "p1", "p2"]
    assert bm25_run({"a": "the", "b": ""}, {"q": "cat"}, k=2) == {"q": {}}
    words = "queries cats horses shoes virus glass bees us ties s".split()
    assert list(map(evaluate.s_stem, words)) == "query cat horse shoe virus glass bee us ties s".split()

@pytest.fixture
def loaded(tmp_path, monkeypatch):
    """The small collection and a table encoder behind the command; which models were loaded."""
    asked, more = [], {"space": {"p 1": "one"}}  # collection "space" has one passage more
    monkeypatch.chdir(tmp_path)
    Path("tiny").mkdir()
    Path("other").write_text("not ours\n")
    monkeypatch.setattr(BiEncoder, "load", lambda *args, **_: asked.append(args) or TableEncoder())
    monkeypatch.setattr(evaluate, "load_beir", lambda d, split: (CORPUS | more.get(d, {}), QUERIES, QRELS))
    return asked

def test_the_record_of_the_command(loaded, tmp_path, capsys):
    out, link = Path("new/r.json"), Path("link.json")
    link.symlink_to(out)
    command = f"--data {tmp_path}/tiny --model {tmp_path}/tiny/ --device cpu --run r".split()
    for target in (link, out):  # the second time over its own files
        assert evaluate.main([*command, "--out", str(target)]) == 0
    record = json.loads(out.read_text())
    assert link.is_symlink() and str(tmp_path) not in out.read_text()  # no machine path
    expected = {"split": "test", "model": "tiny", "device": "cpu", "dtype": "float32", "top_k": 5}
    assert record == record | expected and next(iter(record.items())) == ("collection", "tiny")
    assert record["counts"] == {"passages": 5, "queries": 2, "judgments": 3}
    # p1 and p5 both score 0 for q2; equal scores are ranked by id downwards, so p5 is fourth of five
    assert record["per_query"]["q2"] == {"ndcg@10": 1 / math.log2(5), "mrr@10": 0.25, "recall@100": 1}
    assert record["metrics"] == metrics.mean(record["per_query"])
    assert Path("r").read_text().splitlines()[0] == "q1 Q0 p1 1 3.0 tiny"
    assert "5 passages, 2 queries, 3 judgments" in capsys.readouterr().out
    assert evaluate.main([*command[:-1], "/dev/null", "--out", "/dev/null", "--top-k", "4"]) == 0
    assert evaluate.main(["--model", "bm25", "--run", "r"]) == 2  # another model's
    with locked("new/r.json"):  # another process is writing it
        assert evaluate.main([*command, "--out", str(out)]) == 2
    assert Path("/dev/null").is_char_device() and "recall@100: only the best 4" in capsys.readouterr().err

@pytest.mark.parametrize(("options", "message"), [
    ("--top-k 6", "top-k is 6, expected 1 to 5"), ("--top-k 0 --out new/x", "top-k is 0"),
    ("--dtype int32", "unknown dtype 'int32'"), ("--model bm25 --device abacus", "'abacus' is not usable"),
    ("--measures map@3", "unknown measure 'map@3'"), ("--batch-size 0", "batch-size is 0"),
    ("--run new --out new", "--out and --run name the same file"), ("--run tiny", "is a folder"),
    ("--run other/r.trec", "cannot be written"), ("--run other", "was not written by this command"),
    ("--out other", "was not written by this command"),
    ("--run new --data space", "id 'p 1' is empty or holds white space")])
def test_errors_come_before_the_model(loaded, capsys, options, message):
    assert evaluate.main(["--data", "tiny", *options.split()]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1
    assert loaded == [] and Path("other").read_text() == "not ours\n"
    assert sorted(path.name for path in Path(".").iterdir()) == ["other", "tiny"]

def test_only_judged_queries_are_asked_after_all_checks():
    model = TableEncoder()
    for qrels, message in (({"q9": {"p1": 1}}, "judged query 'q9' has no text"), ({}, "no judgments")):
        with pytest.raises(ValueError, match=message):
            evaluate_model(model, CORPUS, QUERIES, qrels)
    evaluate_model(model, CORPUS, QUERIES, QRELS)
    assert model.calls[0] == ("query", ["ask one", "ask two"])

def test_kept_vectors_change_no_score_and_serve_the_next_model(tiny_llama, tmp_path, monkeypatch):
    encoder, score = BiEncoder.load(tiny_llama, device="cpu"), partial(evaluate_model, device="cpu")
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda: False)
    plain = {}
    for name in ("first", "second"):
        encoder.projection = torch.nn.Parameter(torch.randn(8, 16))
        encoder.save(tmp_path / name)
        plain[name] = score(tmp_path / name, CORPUS, QUERIES, QRELS, cache=False)["per_query"]
    assert score(str(tmp_path / "first"), CORPUS, QUERIES, QRELS)["per_query"] == plain["first"]
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    for cache, dtype in ((False, "bfloat16"), (True, "float32")):  # what is kept is exact
        assert score(tmp_path / "first", CORPUS, QUERIES, QRELS, cache=cache)["dtype"] == dtype
    monkeypatch.setattr(BiEncoder, "_mean", lambda *_: pytest.fail("computed again"))
    assert score(str(tmp_path / "second"), CORPUS, QUERIES, QRELS)["per_query"] == plain["second"]
