"""Rank passages for queries: exact search over embeddings, and BM25.

A bi-encoder ranks by exact search: every passage's embedding is compared with every query's, one
block of passages at a time, so that memory does not grow with the corpus.  BM25 is the baseline
that counts shared words.  Both return a run, `{query_id: {passage_id: score}}`, and both leave out
a query's own passage where a collection draws its queries from its corpus.
"""

import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from tqdm import tqdm

BLOCK = 4096  # passages encoded and compared at a time
QUERY_BLOCK = 1024  # queries compared at a time
SELF_HITS = ("drop", "keep")
Texts = Mapping[str, str]  # {id: text}


class EvaluateError(ValueError):
    """A search or an evaluation that cannot be done as asked."""


def check_k(k: int, n_passages: int) -> None:
    """Raise EvaluateError unless 1 <= k <= the number of passages."""
    if n_passages == 0:
        raise EvaluateError("the corpus is empty, expected at least one passage")
    if not 1 <= k <= n_passages:
        raise EvaluateError(f"top-k is {k}, expected a number from 1 to {n_passages}, the size of the corpus")


def _flip(bits: torch.Tensor) -> torch.Tensor:
    return torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


def _pack(scores: torch.Tensor, first: int) -> torch.Tensor:
    """Score and passage index in one integer (Q, n) whose order is: higher score, then lower index.

    The high half holds the bits of the 32-bit score, flipped for negative numbers so that integers
    sort as the numbers do; the low half counts the index down.  All keys differ, so `topk`, which
    promises no order among equal values, has no freedom left.
    """
    high = _flip((scores + 0.0).view(torch.int32)).long() << 32  # + 0.0 turns -0.0 into 0.0
    index = torch.arange(first, first + scores.shape[1], device=scores.device)
    return high | (0xFFFFFFFF - index)


def _unpack(keys: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return _flip((keys >> 32).int()).view(torch.float32), 0xFFFFFFFF - (keys & 0xFFFFFFFF)


def _best(
    keys: torch.Tensor, queries: torch.Tensor, passages: torch.Tensor, first: int, k: int
) -> torch.Tensor:
    """Merge one block of passages (n, d) into the best k keys so far of every query: (Q, <= k), twice."""
    merged = []
    for rows in range(0, len(queries), QUERY_BLOCK):
        scores = queries[rows : rows + QUERY_BLOCK] @ passages.T
        if not torch.isfinite(scores).all():
            raise EvaluateError("an embedding or score is not a finite number; the model cannot be evaluated")
        if scores.device.type not in ("cpu", "cuda"):
            scores = scores.cpu()  # other accelerators do not all sort 64-bit integers
        candidates = torch.cat([keys[rows : rows + QUERY_BLOCK], _pack(scores, first).to(keys.device)], dim=1)
        merged.append(candidates.topk(min(k, candidates.shape[1]), dim=1).values)
    return torch.cat(merged)


def _no_keys(queries: torch.Tensor) -> torch.Tensor:
    device = queries.device if queries.device.type == "cuda" else "cpu"
    return torch.empty(len(queries), 0, dtype=torch.int64, device=device)


def search(
    query_embeddings: torch.Tensor, passage_embeddings: torch.Tensor, k: int, block: int = BLOCK
) -> tuple[torch.Tensor, torch.Tensor]:
    """The k best passages of every query by dot product, exactly: scores (Q, k), indices (Q, k), best first.

    Takes embeddings (Q, d) and (N, d); works on `block` passages at a time, so it never holds the
    (Q, N) score matrix.  Scores are float32; among equal scores the lower index comes first.
    Raises EvaluateError (a ValueError) if k < 1, k > N, or an embedding is not finite.
    """
    check_k(k, len(passage_embeddings))
    queries = query_embeddings.float()
    if len(queries) == 0:
        return torch.empty(0, k), torch.empty(0, k, dtype=torch.int64)
    keys = _no_keys(queries)
    for first in range(0, len(passage_embeddings), block):
        passages = passage_embeddings[first : first + block].to(queries.device).float()
        keys = _best(keys, queries, passages, first, k)
    scores, indices = _unpack(keys)
    return scores.cpu(), indices.cpu()


def own_passages(corpus: Texts, queries: Texts, rule: str = "drop") -> set[str]:
    """Ids of the queries that are passages of the corpus too, to be left out of their own results.

    In ArguAna and Quora the query is a passage, under the same id, and would always find itself, so
    `drop` leaves out the passage with the query's id, as BEIR's code does.  Ids may also agree by
    accident (in Cranfield both count from 1): if the query's text is not in that passage, stderr
    says how many such passages are left out, and `keep` keeps them.
    """
    if rule not in SELF_HITS:
        raise EvaluateError(f"self-hits is {rule!r}, expected one of {', '.join(SELF_HITS)}")
    same_id = {qid for qid in queries if qid in corpus} if rule == "drop" else set()
    plain = {qid: [" ".join(t[qid].casefold().split()) for t in (queries, corpus)] for qid in same_id}
    if by_accident := sum(query not in passage for query, passage in plain.values()):
        print(
            f"note: {by_accident} queries have the id of a passage with another text, which is left out of "
            "their results (BEIR's rule); --self-hits keep keeps it",
            file=sys.stderr,
        )
    return same_id


def _as_run(
    rows: Iterable[tuple[str, Sequence[float], Sequence[int]]],
    passage_ids: Sequence[str],
    own: set[str],
    k: int,
) -> dict[str, dict[str, float]]:
    run = {}
    for qid, scores, indices in rows:
        hits = {passage_ids[i]: score for score, i in zip(scores, indices, strict=True)}
        if qid in own:
            hits.pop(qid, None)
        run[qid] = dict(list(hits.items())[:k])
    return run


def device_of(model: Any) -> torch.device:
    """The device a model computes on: its `device`, or the CPU if it does not say."""
    return torch.device(getattr(model, "device", "cpu"))


def retrieve(
    model: Any,
    corpus: Texts,
    queries: Texts,
    k: int,
    batch_size: int = 32,
    block: int = BLOCK,
    self_hits: str = "drop",
    progress: bool = False,
) -> dict[str, dict[str, float]]:
    """Rank the corpus for every query with `model.encode`: `{query_id: {passage_id: score}}`, best k each.

    The corpus is encoded one block at a time and only the best k are kept, so memory holds the
    query embeddings, one block and the results.  A query's own passage is left out
    (`own_passages`).  Among equal scores, the earlier passage of the corpus is kept.  Raises
    EvaluateError if the corpus is empty, or k is below 1 or above its size.
    """
    check_k(k, len(corpus))
    if not queries:
        return {}
    own = own_passages(corpus, queries, self_hits)
    depth = min(k + bool(own), len(corpus))
    device = device_of(model)
    passage_ids = list(corpus)
    encoded = model.encode(list(queries.values()), kind="query", batch_size=batch_size, progress=False)
    query_embeddings = encoded.float().to(device)
    keys = _no_keys(query_embeddings)
    several = len(corpus) > block
    with tqdm(total=len(corpus), unit="passage", desc="search", disable=not (progress and several)) as bar:
        for first in range(0, len(corpus), block):
            texts = [corpus[pid] for pid in passage_ids[first : first + block]]
            embeddings = model.encode(
                texts, kind="passage", batch_size=batch_size, progress=progress and not several
            )
            keys = _best(keys, query_embeddings, embeddings.float().to(device), first, depth)
            bar.update(len(texts))
    scores, indices = _unpack(keys)
    return _as_run(zip(queries, scores.tolist(), indices.tolist(), strict=True), passage_ids, own, k)


def s_stem(word: str) -> str:
    """Take the plural s off an English word (Harman's S-stemmer, 1991): the first matching rule decides."""
    if word.endswith("ies") and not word.endswith(("eies", "aies")):
        return word[:-3] + "y" if len(word) > 4 else word
    if word.endswith("es") and not word.endswith(("aes", "ees", "oes")):
        return word[:-1]
    if word.endswith("s") and not word.endswith(("us", "ss")) and len(word) > 2:
        return word[:-1]
    return word


def bm25_tokens(texts: Sequence[str]) -> list[list[str]]:
    """Lower-cased words of two letters or more, without English stop words, plural s taken off."""
    import bm25s

    return bm25s.tokenize(
        list(texts),
        stopwords="en_plus",
        stemmer=lambda words: [s_stem(word) for word in words],
        return_ids=False,
        show_progress=False,
    )


def bm25_run(
    corpus: Texts, queries: Texts, k: int, k1: float = 0.9, b: float = 0.4, self_hits: str = "drop"
) -> dict[str, dict[str, float]]:
    """Rank by BM25 (bm25s, the Lucene variant): `{query_id: {passage_id: score}}`, at most k each.

    score(q, p) = sum over the words w of q of
        ln(1 + (N - n_w + .5) / (n_w + .5)) * f / (f + k1 (1 - b + b l_p / l)),
    with N the number of passages, f the count of w in p, n_w the number of passages with w, l_p the
    passage's length in words and l the mean length.  A passage that shares no word with the query
    is not retrieved; among equal scores, the earlier passage of the corpus is kept.

    Words are `bm25_tokens`: bm25s's pattern and its longer English stop list (`en_plus`), then the
    S-stemmer.  `python -m repro.evaluate --model bm25` measures nDCG@10 of .480 on the judged pool of
    TREC Deep Learning 2019 (22,917 passages), .667 on SciFact, .353 on Cranfield.
    Raises EvaluateError as `retrieve` does.
    """
    import bm25s

    check_k(k, len(corpus))
    own = own_passages(corpus, queries, self_hits)
    depth = min(k + bool(own), len(corpus))
    words = bm25_tokens(list(corpus.values()))
    rows: list[tuple[str, Sequence[float], Sequence[int]]] = [(qid, [], []) for qid in queries]
    if any(words):
        index = bm25s.BM25(method="lucene", k1=k1, b=b)
        index.index(words, show_progress=False)
        asked = zip(queries, bm25_tokens(list(queries.values())), strict=True)
        rows = [(qid, *_bm25_best(index, query, depth)) for qid, query in asked]
    return _as_run(rows, list(corpus), own, k)


def _bm25_best(index: Any, words: list[str], k: int) -> tuple[list[float], list[int]]:
    if not words:  # a query of stop words only
        return [], []
    scores, indices = _unpack(_pack(torch.from_numpy(index.get_scores(words))[None], 0).topk(k).values)
    matched = scores[0] > 0
    return scores[0][matched].tolist(), indices[0][matched].tolist()
