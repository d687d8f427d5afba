"""Search against a full sort, retrieval with a table of vectors, BM25 by hand."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from repro import search as room
from repro.search import retrieve, s_stem, search


class Table(dict):
    """A model that looks vectors up."""

    def encode(self, texts, kind):
        assert len(texts) <= room.BLOCK
        return torch.tensor([self[text] for text in texts])


@settings(deadline=None)
@given(st.integers(1, 6), st.lists(st.integers(0, 9), min_size=1), st.integers(1, 50))
def test_search_of_a_matrix_and_of_blocks_equals_a_full_sort(n, sizes, k):
    torch.manual_seed(k)
    vectors = torch.randint(-2, 3, (n + sum(sizes), 2)).float()  # many ties
    queries, passages = vectors.split([n, sum(sizes)])
    expected = queries @ passages.T
    for given_as in (passages, passages.split(sizes)):
        scores, rows = search(queries, given_as, k)
        assert torch.equal(scores, expected.sort(descending=True).values[:, :k])
        assert torch.equal(scores, expected.gather(1, rows))
        assert rows.sort().values.diff().all()  # no passage twice


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 3e38])  # 3e38: scores overflow
@pytest.mark.parametrize("side", [0, 1])
def test_what_is_not_finite_is_refused(bad, side):
    both = torch.ones(2, 4, 2)
    both[side, 2] = bad
    with pytest.raises(ValueError, match="is not finite"):
        search(*both, 1)


@pytest.mark.parametrize("block", [1, 2, 100])
def test_retrieve_encodes_by_blocks(block, monkeypatch):
    monkeypatch.setattr(room, "BLOCK", block)
    model = Table(one=[3, 0], two=[2, 1], three=[1, 2], ask=[1, 0])
    corpus = {"p1": "one", "p2": "two", "p3": "three"}
    assert retrieve(model, corpus, {"q": "ask"}, k=2) == {"q": {"p1": 3, "p2": 2}}


OWN = {"a": "Title my own  Text", "b": "My own text", "c": "other"}
ASKED = {"a": "my own text", "b": "my own text", "c": "a question"}


def test_a_query_does_not_find_itself_but_finds_another_text_under_its_id():
    model = Table({"Title my own  Text": [3], "My own text": [2], "other": [1]})
    model |= {"my own text": [1], "a question": [-1]}
    run = retrieve(model, OWN, ASKED, k=2)
    assert [list(found) for found in run.values()] == [["b", "c"], ["a", "c"], ["c", "b"]]


def test_bm25_does_not_find_the_query_either():
    assert list(retrieve("bm25", OWN, ASKED, k=3)["a"]) == ["b"]


def bm25(f, n, length):
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


@pytest.mark.parametrize("query, expected", BM25)
def test_bm25_by_hand(query, expected):
    found = retrieve("bm25", PASSAGES, {"q": query}, 4)["q"]
    assert found == pytest.approx(expected)
    assert list(found) == list(expected)


LOST = [
    ({"p": "今天天气很好"}, {"q": "天气", "r": "很好"}, "2 of 2 queries share no word"),
    ({"p": "a cat"}, {"q": "cat", "r": "dog"}, "1 of 2 queries share no word"),
    ({"p": "a cat"}, {"q": "cat"}, ""),
]


@pytest.mark.parametrize("corpus, queries, message", LOST)
def test_queries_without_a_word_of_the_corpus_are_counted(corpus, queries, message, capsys):
    retrieve("bm25", corpus, queries, k=1)
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == bool(message)


def test_a_corpus_without_words_is_refused():
    with pytest.raises(ValueError, match="the corpus has no words"):
        retrieve("bm25", {"p": "the", "x": ""}, {"q": "cat"}, k=1)


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


@pytest.mark.parametrize("word, stem", STEMS)
def test_the_s_stemmer(word, stem):
    assert s_stem(word) == stem
