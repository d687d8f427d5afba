"""Rank the passages of a corpus for queries: exact search over embeddings, and BM25."""

import sys
from collections.abc import Iterable
from typing import Any

import bm25s
import numpy as np
from torch import Tensor, cat

from repro.data import Texts

Run = dict[str, dict[str, float]]  # {query id: {passage id: score}}
BLOCK = 8192  # passages compared at a time: for 1000 queries 33 MB of scores


def search(queries: Tensor, passages: Tensor | Iterable[Tensor], k: int) -> tuple[Tensor, Tensor]:
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
        if not scores.isfinite().all():
            raise ValueError("an embedding or a score is not finite; the model cannot be judged")
        top, rows = scores.topk(min(k, len(block)))
        best_rows = cat([best_rows, rows + seen], dim=1)
        seen += len(block)
        best, order = cat([best, top], dim=1).topk(min(k, seen))
        best_rows = best_rows.gather(1, order)
    return best, best_rows


def as_run(corpus: Texts, queries: Texts, found: Iterable[tuple[list, list]], k: int) -> Run:
    """A run of the best k of each query's (scores, row numbers), where no query finds itself.

    A query that is a passage (ArguAna) has its id, and its text, maybe behind a title; case and
    spaces do not count.
    """
    ids = list(corpus)
    run = {}
    for query, (scores, rows) in zip(queries, found, strict=True):
        best = {ids[row]: score for score, row in zip(scores, rows, strict=True)}
        asked = queries[query].casefold().split()
        passage = corpus.get(query, "").casefold().split()
        if passage[-len(asked) :] == asked:
            best.pop(query, None)
        run[query] = dict(list(best.items())[:k])
    return run


def retrieve(model: Any, corpus: Texts, queries: Texts, k: int, **options: Any) -> Run:
    """The best k passages of every query: by BM25 if `model` is "bm25", else by `model.encode`.

    The options, such as batch_size and progress, are for `encode`.
    """
    if model == "bm25":
        return bm25_run(corpus, queries, k)
    asked = model.encode(list(queries.values()), kind="query", **options)
    device = getattr(model, "device", "cpu")
    texts = list(corpus.values())
    blocks = (
        model.encode(texts[first : first + BLOCK], kind="passage", **options)
        for first in range(0, len(texts), BLOCK)
    )
    scores, rows = search(asked.to(device), blocks, k + 1)  # one more: a query may find itself
    found = zip(scores.tolist(), rows.tolist(), strict=True)
    return as_run(corpus, queries, found, k)


def s_stem(word: str) -> str:
    """Take the plural s off an English word, as Harman's S-stemmer (1991) does."""
    if word.endswith("ies") and not word.endswith(("eies", "aies")):
        return word[:-3] + "y" if len(word) > 4 else word
    if len(word) > 2 and word.endswith("s") and not word.endswith(("us", "ss")):
        return word[:-1]
    return word


def tokenise(texts: Texts) -> list[list[str]]:
    """The words of each text, as of English: lower case, two letters or more, no stop words."""
    return bm25s.tokenize(
        list(texts.values()),
        stopwords="en_plus",
        stemmer=lambda words: [s_stem(word) for word in words],
        return_ids=False,
        show_progress=False,
    )


def bm25_run(corpus: Texts, queries: Texts, k: int) -> Run:
    """The best k passages of every query by BM25 in Lucene's form, of those with a word of it.

        score(q, p) = sum over words w of q: ln(1 + (N - n_w + .5) / (n_w + .5)) f / (f + n_p)
        n_p = .9 (.6 + .4 l_p / l)

    n_w of N passages hold w; p holds it f times among l_p words, l on average.  The tokenizer, stop
    words and stemmer are English; queries without any word of the corpus are counted on stderr.
    """
    words = tokenise(corpus)
    vocabulary = set().union(*words)
    index = bm25s.BM25(method="lucene", k1=0.9, b=0.4)
    if vocabulary:
        index.index(words, show_progress=False)
    found = []
    for asked in tokenise(queries):
        if vocabulary.isdisjoint(asked):
            found.append(([], []))
            continue
        scores = index.get_scores(asked)
        best = np.argsort(-scores, kind="stable")[: k + 1]
        best = best[scores[best] > 0]
        found.append((scores[best].tolist(), best.tolist()))
    lost = found.count(([], []))
    if lost:
        message = f"{lost} of {len(queries)} queries share no word with the corpus"
        print(f"bm25, with an English tokenizer: {message}", file=sys.stderr)
    return as_run(corpus, queries, found, k)
