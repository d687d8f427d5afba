"""nDCG@k, MRR@k and recall@k with trec_eval's values, from the grades of a query's ranked passages (`found`,
best rank first) and of all its judged ones (`judged`)."""

import math
import operator
import re
from array import array
from collections.abc import Callable, Collection, Iterable, Mapping
from functools import partial
from numbers import Integral, Real
from pathlib import Path

from repro.checkpoints import writing

Qrels = Mapping[str, Mapping[str, int]]  # {query id: {passage id: grade 0, 1, 2, ...}}
Run = Mapping[str, Mapping[str, float]]  # {query id: {passage id: score}}
MEASURES = ("ndcg@10", "mrr@10", "recall@100")

def rank(scores: Mapping[str, float], where: str = "run") -> list[str]:
    """Passage ids, best first, in trec_eval's order: score descending, compared as 32-bit floats; among
    equal scores, passage id descending.  ValueError for a score that is not finite in 32 bits."""
    try:
        rounded = array("f", scores.values())
    except TypeError:
        rounded = array("f", (s if isinstance(s, Real) else math.nan for s in scores.values()))
    if not all(map(math.isfinite, rounded)):
        bad = next(pid for pid, score in zip(scores, rounded, strict=True) if not math.isfinite(score))
        raise ValueError(f"{where}, passage {bad}: score {scores[bad]!r} is not finite in 32 bits")
    if all(map(operator.gt, rounded, rounded[1:])):  # as a search returns them, mostly
        return list(scores)
    return [pid for _, pid in sorted(zip(rounded, scores, strict=True), reverse=True)]

def dcg(gains: Iterable[float]) -> float:
    """Discounted cumulative gain: the sum over ranks r = 1, 2, ... of gain_r / log2(r + 1)."""
    return sum(gain / math.log2(r + 1) for r, gain in enumerate(gains, start=1))

def ndcg(found: list[int], judged: Collection[int], k: int, gain: Callable[[int], float] = float) -> float:
    """nDCG@k = DCG@k / DCG@k of the best possible order, with gain = grade; 0 if no grade is above 0."""
    best = dcg(map(gain, sorted(judged, reverse=True)[:k]))
    return dcg(map(gain, found[:k])) / best if best else 0.0

def mrr(found: list[int], judged: Collection[int], k: int) -> float:
    """1 / rank of the first relevant passage (grade >= 1) within the first k; 0 if there is none."""
    return next((1 / r for r, grade in enumerate(found[:k], start=1) if grade >= 1), 0.0)

def recall(found: list[int], judged: Collection[int], k: int) -> float:
    """Relevant passages (grade >= 1) within the first k / all relevant passages; 0 if there are none."""
    return sum(grade >= 1 for grade in found[:k]) / max(1, sum(grade >= 1 for grade in judged))

ndcg_exp = partial(ndcg, gain=lambda grade: 2.0**grade - 1)  # weighs the top grades more
FUNCTIONS = {"ndcg": ndcg, "ndcg_exp": ndcg_exp, "mrr": mrr, "recall": recall}

def evaluate(qrels: Qrels, run: Run, measures: Iterable[str] = MEASURES) -> dict[str, dict[str, float]]:
    """Every measure ("NAME@k") of every judged query: `{query id: {measure: value}}`, values in [0, 1].
    A judged query that the run lacks scores 0; an unjudged passage has grade 0.  ValueError for an unknown
    measure, a bad score, or a grade that is not a whole number >= 0."""
    wanted, values = {measure: measure.partition("@")[::2] for measure in measures}, {}
    for measure, (name, k) in wanted.items():
        if name not in FUNCTIONS or not re.fullmatch("[1-9][0-9]{0,8}", k):
            raise ValueError(f"unknown measure {measure!r}: expected {'@k, '.join(FUNCTIONS)}@k, with k >= 1")
    for qid, judged in qrels.items():
        for pid, y in judged.items():
            if type(y) is not int and not isinstance(y, Integral) or y < 0:  # the second check is slow
                raise ValueError(f"qrels, query {qid}, passage {pid}: grade {y!r} is not a whole number >= 0")
        found = [judged.get(pid, 0) for pid in rank(run.get(qid, {}), f"run, query {qid}")]
        values[qid] = {m: FUNCTIONS[name](found, judged.values(), int(k)) for m, (name, k) in wanted.items()}
    return values

def mean(per_query: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """The mean of every measure over the queries.  ValueError if there is no query."""
    if not (rows := list(per_query.values())):
        raise ValueError("no judged query to average over")
    return {measure: math.fsum(row[measure] for row in rows) / len(rows) for measure in rows[0]}

def write_run(run: Run, file: str | Path, tag: str) -> None:
    """Write a TREC run, `query Q0 passage rank score tag`, best first; the scores read back exactly."""
    check_ids([tag, *run, *(pid for scores in run.values() for pid in scores)], file)
    with writing(file) as sink:
        for qid, scores in run.items():
            for place, pid in enumerate(rank(scores, f"run, query {qid}"), start=1):
                sink.write(f"{qid} Q0 {pid} {place} {float(scores[pid])!r} {tag}\n")

def check_ids(ids: Iterable[str], file: str | Path) -> None:
    """ValueError for an id that is empty or holds white space: a TREC run has no quoting."""
    if bad := [name for name in ids if not re.fullmatch(r"[^ \t\r\n\v\f]+", name)]:
        raise ValueError(f"{file}: id {bad[0]!r} is empty or holds white space; a TREC run cannot carry it")
