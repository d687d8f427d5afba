"""nDCG@k, MRR@k and recall@k with trec_eval's values.

Each measure is a function of one query: `found`, the grades of its ranked passages, best rank
first, and `judged`, the grades of all its judged passages.
"""

import re
from collections.abc import Callable, Collection, Iterable
from ctypes import c_float
from functools import partial
from math import isfinite, log2
from numbers import Integral
from statistics import fmean

from repro.support.files import Place, write_text

Qrels = dict  # {query id: {passage id: grade 0, 1, 2, ...}}
Run = dict  # {query id: {passage id: score}}
MEASURES = ["ndcg@10", "mrr@10", "recall@100"]


def rank(scores: dict) -> list[str]:
    """Passage ids, best first, in trec_eval's order.

    That is by score, rounded to a 32-bit float; of equal scores, the larger passage id comes first.
    Raises ValueError for a score that is not finite in 32 bits.
    """
    keys = {}
    for passage, score in scores.items():
        rounded = c_float(score).value
        if not isfinite(rounded):
            raise ValueError(f"run, passage {passage}: score {score!r} is not finite in 32 bits")
        keys[passage] = (rounded, passage)
    return sorted(keys, key=keys.get, reverse=True)


def dcg(gains: Iterable) -> float:
    """Discounted cumulative gain: the sum over ranks r = 1, 2, ... of gain_r / log2(r + 1)."""
    return sum(gain / log2(r + 1) for r, gain in enumerate(gains, 1))


def ndcg(found: list, judged: Collection, k: int, gain: Callable = float) -> float:
    """nDCG@k = DCG@k / DCG@k of the best order, with gain = grade; 0 if no grade is above 0.

    Järvelin & Kekäläinen 2002, "Cumulated gain-based evaluation of IR techniques".
    """
    best = dcg(map(gain, sorted(judged, reverse=True)[:k]))
    return dcg(map(gain, found[:k])) / best if best else 0.0


def mrr(found: list, judged: Collection, k: int) -> float:
    """1 / rank of the first relevant passage (grade >= 1) within the first k; 0 without one."""
    for r, grade in enumerate(found[:k], 1):
        if grade >= 1:
            return 1 / r
    return 0.0


def recall(found: list, judged: Collection, k: int) -> float:
    """Relevant passages (grade >= 1) within the first k / all relevant ones; 0 without any."""
    hits = sum(grade >= 1 for grade in found[:k])
    relevant = sum(grade >= 1 for grade in judged)
    return hits / max(1, relevant)


ndcg_exp = partial(ndcg, gain=lambda grade: 2.0**grade - 1)  # weighs the top grades more
FUNCTIONS = {"ndcg": ndcg, "ndcg_exp": ndcg_exp, "mrr": mrr, "recall": recall}


def parse_measure(measure: str) -> tuple:
    """(ndcg, 10) of "ndcg@10".  Raises ValueError for an unknown measure."""
    found = re.fullmatch("(ndcg|ndcg_exp|mrr|recall)@([1-9][0-9]*)", measure)
    if not found:
        raise ValueError(
            f"unknown measure {measure!r}: expected ndcg@k, ndcg_exp@k, mrr@k, recall@k; k >= 1"
        )
    return FUNCTIONS[found[1]], int(found[2])


def check_qrels(qrels: Qrels, measures: Iterable = MEASURES) -> None:
    """Raise ValueError for an unknown measure, and for a grade that a measure cannot take.

    A grade is a whole number below 1,000,000,000, and below 1000 for ndcg_exp: 2**1024 overflows.
    """
    functions = [parse_measure(measure)[0] for measure in measures]
    limit = 1000 if ndcg_exp in functions else 10**9
    for query, judged in qrels.items():
        for passage, grade in judged.items():
            if not (isinstance(grade, Integral) and 0 <= grade < limit):
                raise ValueError(
                    f"qrels, query {query}, passage {passage}: grade {grade!r} is no whole "
                    f"number from 0 to {limit - 1}, as the measures can take"
                )


def evaluate(qrels: Qrels, run: Run, measures: Iterable = MEASURES) -> dict:
    """{query id: {measure: value}} of every judged query, in [0, 1].

    A judged query that the run lacks scores 0, a judged passage that it lacks is not found, and an
    unjudged passage has grade 0.  Raises ValueError as `check_qrels` and `rank` do.
    """
    wanted = {measure: parse_measure(measure) for measure in measures}
    check_qrels(qrels, wanted)
    values = {}
    for query, judged in qrels.items():
        found = [judged.get(passage, 0) for passage in rank(run.get(query, {}))]
        values[query] = {
            measure: function(found, judged.values(), k)
            for measure, (function, k) in wanted.items()
        }
    return values


def mean(values: dict) -> dict:
    """The mean of every measure over the queries.  Raises ValueError if there is no query."""
    rows = list(values.values())
    if not rows:
        raise ValueError("no judged query to average over")
    return {measure: fmean(row[measure] for row in rows) for measure in rows[0]}


def check_ids(ids: Iterable, file: Place) -> None:
    """Raise ValueError for an id that is empty or holds white space: a TREC run has no quoting."""
    for name in ids:
        if not re.fullmatch(r"[^ \t\r\n\v\f]+", name):
            raise ValueError(
                f"{file}: id {name!r} is empty or holds white space, as no TREC run may"
            )


def write_run(run: Run, file: Place, tag: str) -> None:
    """Write a TREC run, `query Q0 passage rank score tag`, best first; scores read back exactly."""
    check_ids([tag, *run], file)
    lines = []
    for query, scores in run.items():
        check_ids(scores, file)
        for place, passage in enumerate(rank(scores), 1):
            lines.append(f"{query} Q0 {passage} {place} {float(scores[passage])!r} {tag}\n")
    write_text(file, "".join(lines))
