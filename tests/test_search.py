"""Search against a full sort, retrieval with a table of vectors, BM25 by hand."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from repro import search as room
from repro.search import bm25_run, retrieve, s_stem, search

CORPUS = {"p1": "one", "p2": "two", "p3": "three"}
TABLE = {"one": [3, 0], "two": [2, 1], "three": [1, 2], "ask": [1, 0]}


class TableEncoder:
    """Looks vectors up; `sizes` are the numbers of texts that it was given."""

    def __init__(self, table: dict) -> None:
        self.table = table
        self.sizes = []

    def encode(self, texts, kind):
        self.sizes.append(len(texts))
        return torch.tensor([self.table[text] for text in texts], dtype=torch.float32)


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 6), st.lists(st.integers(0, 9), min_size=1), st.integers(1, 50))
def test_search_of_a_matrix_and_of_blocks_equals_a_full_sort(n, sizes, k):
    generator = torch.Generator().manual_seed(k)
    vectors = torch.randint(-2, 3, (n + sum(sizes), 2), generator=generator).float()  # many ties
    expected = vectors[:n] @ vectors[n:].T
    for passages in (vectors[n:], vectors[n:].split(sizes)):
        scores, rows = search(vectors[:n], passages, k)
        assert torch.equal(scores, expected.sort(descending=True).values[:, :k])
        assert torch.equal(scores, expected.gather(1, rows))
        assert [len(set(row)) for row in rows.tolist()] == n * [min(k, sum(sizes))]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 3e38])  # 3e38: scores overflow
@pytest.mark.parametrize("side", [0, 1])
def test_what_is_not_finite_is_refused(bad, side):
    both = [torch.ones(4, 2), torch.ones(4, 2)]
    both[side][2] = bad
    with pytest.raises(ValueError, match="is not finite"):
        search(*both, 1)


@pytest.mark.parametrize("block", [1, 2, 100])
def test_retrieve_encodes_by_blocks(block, monkeypatch):
    monkeypatch.setattr(room, "BLOCK", block)
    model = TableEncoder(TABLE)
    assert retrieve(model, CORPUS, {"q": "ask"}, k=2) == {"q": {"p1": 3, "p2": 2}}
    assert max(model.sizes) <= block


OWN = {"a": "Title my own  Text", "b": "My own text", "c": "other"}
ASKED = {"a": "my own text", "b": "my own text", "c": "a question"}
FOUND = [(3, [["b", "c"], ["a", "c"], ["c", "b", "a"]]), (1, [["b"], ["a"], ["c"]])]


@pytest.mark.parametrize(("k", "expected"), FOUND)
def test_a_query_does_not_find_itself_but_finds_another_text_under_its_id(k, expected):
    vectors = [[3], [2], [1], [1], [-1]]
    texts = [*OWN.values(), "my own text", "a question"]
    model = TableEncoder(dict(zip(texts, vectors, strict=True)))
    run = retrieve(model, OWN, ASKED, k)
    assert [list(found) for found in run.values()] == expected


def test_bm25_does_not_find_the_query_either():
    assert list(bm25_run(OWN, ASKED, k=3)["a"]) == ["b"]


def bm25(f: int, n: int, length: int) -> float:
    """The score of a word f times in a passage, in n of 4 passages of 9 words together."""
    idf = math.log(1 + (4 - n + 0.5) / (n + 0.5))
    return idf * f / (f + 0.9 * (0.6 + 0.4 * length / (9 / 4)))


# the words: a = cat chase mice, b = cat cat, c = dog bark loudly dog, d = none
PASSAGES = {
    "a": "Cats chase mice",
    "b": "The cat, the cat!",
    "c": "dogs bark loudly at dogs",
    "d": "the",
}
BM25 = [
    ("cats", {"b": bm25(2, 2, 2), "a": bm25(1, 2, 3)}),
    ("cat cat", {"b": 2 * bm25(2, 2, 2), "a": 2 * bm25(1, 2, 3)}),
    ("dog mice", {"c": bm25(2, 1, 4), "a": bm25(1, 1, 3)}),
    ("the", {}),
    ("zebra", {}),
]


@pytest.mark.parametrize(("query", "expected"), BM25)
def test_bm25_by_hand(query, expected):
    found = bm25_run(PASSAGES, {"q": query}, 4)["q"]
    assert found == pytest.approx(expected)
    assert list(found) == list(expected)


LOST = [
    ({"p": "今天天气很好"}, {"q": "天气", "r": "很好"}, "2 of 2 queries share no word"),
    ({"p": "the", "x": ""}, {"q": "cat"}, "1 of 1 queries share no word"),
    ({"p": "a cat"}, {"q": "cat", "r": "dog"}, "1 of 2 queries share no word"),
    ({"p": "a cat"}, {"q": "cat"}, ""),
]


@pytest.mark.parametrize(("corpus", "queries", "message"), LOST)
def test_queries_without_a_word_of_the_corpus_are_counted(corpus, queries, message, capsys):
    bm25_run(corpus, queries, k=1)
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == bool(message)


STEMS = [
    ("queries", "query"),
    ("horses", "horse"),
    ("shoes", "shoe"),
    ("ties", "ties"),
    ("virus", "virus"),
    ("glass", "glass"),
    ("bees", "bee"),
    ("s", "s"),
]


@pytest.mark.parametrize(("word", "stem"), STEMS)
def test_the_s_stemmer(word, stem):
    assert s_stem(word) == stem
