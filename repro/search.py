"""Rank the passages of a corpus for queries: exact search over embeddings, and BM25."""

import re
import sys
from collections.abc import Iterable
from typing import Any

import bm25s
import numpy as np
from torch import Tensor, cat

from repro.data import Texts, plain_query

BLOCK = 8192  # passages compared at a time: for 1000 queries 33 MB of scores


def search(queries: Tensor, passages: Tensor | Iterable, k: int) -> tuple:
    """The k best passages of every query by dot product, exactly: scores and row numbers.

    `queries` is (Q, d), `passages` is (N, d) or blocks of its rows in order; both results are
    (Q, min(k, N)), best first.  Equal scores come in any order.  Raises ValueError where an
    embedding or a score is not finite.
    """
    if isinstance(passages, Tensor):
        passages = passages.split(BLOCK)
    queries = queries.float()
    best = queries[:, :0]  # scores, of all blocks so far
    best_rows = best.long()
    seen = 0
    for block in passages:
        scores = queries @ block.to(queries).T  # (Q, rows of the block)
        if not scores.sum().isfinite():  # a tenth of the time of a look at each score
            raise ValueError("an embedding or a score is not finite; the model cannot be judged")
        top, rows = scores.topk(min(k, len(block)))
        best_rows = cat([best_rows, rows + seen], 1)
        seen += len(block)
        best, order = cat([best, top], 1).topk(min(k, seen))
        best_rows = best_rows.gather(1, order)
    return best, best_rows


def s_stem(word: str) -> str:
    """Take the plural s off an English word, as Harman's S-stemmer (1991) does."""
    if re.search("(?<![ea])ies$", word):
        return re.sub("(?<=..)ies$", "y", word)  # not "ties"
    return re.sub("(?<=.[^us])s$", "", word)


def tokenise(texts: list) -> list:
    """The words of each text, as of English: lower case, two letters or more, no stop words."""
    return bm25s.tokenize(
        texts,
        stopwords="en_plus",
        stemmer=lambda words: [s_stem(word) for word in words],
        return_ids=False,
        show_progress=False,
    )


def bm25(passages: list, queries: list, k: int) -> list:
    """(row, score) of up to k passages for each query, by BM25 in Lucene's form (Robertson 1994).

        score(q, p) = sum over words w of q: ln(1 + (N - n_w + .5) / (n_w + .5)) f / (f + n_p)
        n_p = .9 (.6 + .4 l_p / l)

    n_w of N passages hold w; p holds it f times among l_p words, l on average.  A passage without
    any word of the query is not found.  The tokenizer, stop words and stemmer are English; queries
    without any word of the corpus are counted on stderr.  ValueError for a corpus without words.
    """
    words = tokenise(passages)
    if not any(words):
        raise ValueError("bm25, with an English tokenizer: the corpus has no words")
    index = bm25s.BM25(method="lucene", k1=0.9, b=0.4)
    index.index(words, show_progress=False)
    found = []
    for asked in tokenise(queries):
        scores = index.get_scores_from_ids(index.get_tokens_ids(asked))
        best = np.argsort(-scores, kind="stable")[:k]
        found.append([(row, float(scores[row])) for row in best if scores[row] > 0])
    lost = found.count([])
    if lost:
        print(
            f"bm25 (English): {lost} of {len(queries)} queries share no word with the corpus",
            file=sys.stderr,
        )
    return found


def retrieve(model: Any, corpus: Texts, queries: Texts, k: int, **options: Any) -> dict:
    """{query id: {passage id: score}} of the best k: by BM25 for "bm25", else by `model.encode`.

    The options, such as batch_size and progress, are for `encode`.  No query finds itself: one that
    is a passage (ArguAna) has its id, and its text, maybe behind a title; case and spaces do not
    count.
    """
    ids = list(corpus)
    passages = list(corpus.values())
    asked = list(queries.values())
    if model == "bm25":
        found = bm25(passages, asked, k + 1)  # one more: a query may find itself
    else:
        vectors = model.encode(asked, kind="query", **options)
        blocks = (
            model.encode(passages[first : first + BLOCK], kind="passage", **options)
            for first in range(0, len(passages), BLOCK)
        )
        scores, rows = search(vectors.to(getattr(model, "device", "cpu")), blocks, k + 1)
        found = map(zip, rows.tolist(), scores.tolist())
    run = {}
    for (query, text), pairs in zip(queries.items(), found, strict=True):
        best = {ids[row]: score for row, score in pairs}
        passage = plain_query(corpus.get(query, ""))
        if f" {passage}".endswith(f" {plain_query(text)}"):
            best.pop(query, None)
        run[query] = dict(list(best.items())[:k])
    return run
