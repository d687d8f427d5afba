"""Score a ranking against graded judgments: nDCG@k, MRR@k, Recall@k, written out in a few lines.

A judgment table (`qrels`) says how relevant a passage is to a query, as a grade 0, 1, 2, ...
A `run` says which score a system gave to which passage.  Both are nested dicts of strings.
The values equal trec_eval's, the program that the field's published numbers come from; the
tests compare them with it on random runs.  The last part of the module writes and reads run files.
"""

import math
import numbers
import re
import struct
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from repro.files import replacing

Qrels = Mapping[str, Mapping[str, int]]  # {query_id: {passage_id: grade}}
Run = Mapping[str, Mapping[str, float]]  # {query_id: {passage_id: score}}
PerQuery = dict[str, dict[str, float]]  # {query_id: {measure: value}}

MEASURES = ("ndcg@10", "mrr@10", "recall@100")
NO_SPACE = re.compile(r"[^ \t\r\n\v\f]+")


class MetricError(ValueError):
    """A measure, score, grade or run file that cannot be used."""


def as_float32(score: float, where: str) -> float:
    """The score rounded to 32 bits, as trec_eval stores it; MetricError if it is not a finite number."""
    if not isinstance(score, numbers.Real) or not math.isfinite(value := float(score)):
        raise MetricError(f"{where}: score is {score!r}, expected a finite number")
    try:
        return struct.unpack("<f", struct.pack("<f", value))[0]
    except OverflowError:
        raise MetricError(f"{where}: score is {score!r}, too large for a 32-bit number") from None


def rank(scores: Mapping[str, float], where: str = "run") -> list[str]:
    """Passage ids, best first, in trec_eval's order.

    That order is: score descending, compared as 32-bit floats; among equal scores, passage id
    descending in string order.  Raises MetricError for a score that is not a finite number.
    """
    rounded = [(as_float32(score, f"{where}, passage {pid}"), pid) for pid, score in scores.items()]
    return [pid for _, pid in sorted(rounded, reverse=True)]


def dcg(gains: Iterable[float]) -> float:
    """Discounted cumulative gain: sum over ranks r = 1, 2, ... of gain_r / log2(r + 1)."""
    return sum(gain / math.log2(place + 1) for place, gain in enumerate(gains, start=1))


def _normalised(gains: list[float], ideal: list[float], k: int) -> float:
    best = dcg(sorted(ideal, reverse=True)[:k])
    return dcg(gains[:k]) / best if best else 0.0


def ndcg(found: list[int], judged: list[int], k: int) -> float:
    """nDCG@k with linear gain: DCG of the first k grades / DCG of the best possible order."""
    return _normalised(list(found), list(judged), k)


def ndcg_exp(found: list[int], judged: list[int], k: int) -> float:
    """nDCG@k with exponential gain 2^grade - 1, which weighs the top grades more."""
    return _normalised([2.0**y - 1 for y in found], [2.0**y - 1 for y in judged], k)


def mrr(found: list[int], judged: list[int], k: int) -> float:
    """1 / rank of the first relevant passage (grade >= 1) within the first k; 0 if there is none."""
    return next((1 / place for place, grade in enumerate(found[:k], start=1) if grade >= 1), 0.0)


def recall(found: list[int], judged: list[int], k: int) -> float:
    """Share of all relevant passages (grade >= 1) that stand within the first k."""
    relevant = sum(grade >= 1 for grade in judged)
    return sum(grade >= 1 for grade in found[:k]) / relevant if relevant else 0.0


FUNCTIONS: dict[str, Callable[[list[int], list[int], int], float]] = {
    "ndcg": ndcg,
    "ndcg_exp": ndcg_exp,
    "mrr": mrr,
    "recall": recall,
}


def parse_measure(measure: str) -> tuple[str, int]:
    """Split `"ndcg@10"` into `("ndcg", 10)`.  Raises MetricError for an unknown name or cut-off."""
    match = re.fullmatch(r"([a-z_]+)@([1-9][0-9]*)", measure)
    if not match or match[1] not in FUNCTIONS:
        names = ", ".join(f"{name}@k" for name in FUNCTIONS)
        raise MetricError(f"unknown measure {measure!r}: expected one of {names} with k >= 1")
    return match[1], int(match[2])


def evaluate(qrels: Qrels, run: Run, measures: Iterable[str] = MEASURES) -> PerQuery:
    """Every measure for every judged query: `{query_id: {measure: value}}`, values in [0, 1].

    A judged query that the run does not hold scores 0; a query of the run without judgments is
    ignored; an unjudged passage counts as grade 0.  Raises MetricError for an unknown measure, a
    score that is not finite, or a grade that is not a whole number >= 0.
    """
    wanted = {measure: parse_measure(measure) for measure in measures}
    values: PerQuery = {}
    for qid, judgments in qrels.items():
        for pid, grade in judgments.items():
            if not isinstance(grade, numbers.Integral) or grade < 0:
                raise MetricError(
                    f"qrels, query {qid}, passage {pid}: grade is {grade!r}, expected a whole number >= 0"
                )
        judged = list(judgments.values())
        found = [judgments.get(pid, 0) for pid in rank(run.get(qid, {}), f"run, query {qid}")]
        values[qid] = {name: FUNCTIONS[kind](found, judged, k) for name, (kind, k) in wanted.items()}
    return values


def mean(per_query: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """The mean of every measure over the queries.  Raises MetricError if there is no query."""
    if not per_query:
        raise MetricError("no judged query to average over")
    rows = list(per_query.values())
    return {measure: math.fsum(row[measure] for row in rows) / len(rows) for measure in rows[0]}


def write_run(run: Run, file: str | Path, tag: str) -> None:
    """Write a TREC run file: `query Q0 passage rank score tag`, a line each, in trec_eval's order.

    The file appears whole or not at all.  Scores are written so that reading gives them back
    exactly.  Raises MetricError for an id or tag that is empty or holds white space, since the
    format has no quoting.
    """

    def checked(field: str, value: str) -> str:
        if not NO_SPACE.fullmatch(value):
            raise MetricError(
                f"{file}: {field} {value!r} is empty or holds white space, which a TREC run cannot carry"
            )
        return value

    checked("tag", tag)
    with replacing(file) as sink:
        for qid, scores in run.items():
            checked("query", qid)
            for place, pid in enumerate(rank(scores, f"run, query {qid}"), start=1):
                sink.write(f"{qid} Q0 {checked('passage', pid)} {place} {float(scores[pid])!r} {tag}\n")


def read_run(file: str | Path) -> dict[str, dict[str, float]]:
    """Read a TREC run file.  The order of lines and the rank field are not used, as in trec_eval.

    Raises MetricError naming file, line and field of the first bad line.
    """
    run: dict[str, dict[str, float]] = {}
    with open(file, "rb") as lines:
        for number, raw in enumerate(lines, start=1):
            where = f"{file}:{number}"
            try:
                fields = re.split(r"[ \t]+", raw.decode("utf-8").strip(" \t\r\n"))
            except UnicodeDecodeError:
                raise MetricError(f"{where}: line is not UTF-8 text") from None
            if fields == [""]:
                continue
            if len(fields) != 6:
                raise MetricError(
                    f"{where}: expected 6 fields (query Q0 passage rank score tag), found {len(fields)}"
                )
            qid, _, pid, place, score, _ = fields
            if not re.fullmatch(r"[0-9]+", place):
                raise MetricError(f"{where}: field rank is {place!r}, expected a whole number")
            try:
                value = float(score)
            except ValueError:
                raise MetricError(f"{where}: field score is {score!r}, expected a number") from None
            as_float32(value, f"{where}: field score")
            if pid in run.setdefault(qid, {}):
                raise MetricError(f"{where}: field passage is {pid!r}, already ranked for query {qid}")
            run[qid][pid] = value
    return run
