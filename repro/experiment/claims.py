"""The records of the experiment, paired statistics on them, and the rule that judges the five claims.

`runs.jsonl` has a line a run, `per_query.csv.gz` each query's nDCG@10, `tuning.json` the trials on
development data: ids and scores only.  Seeds are averaged query by query: a seed is no new query.
"""

import contextlib
import csv
import gzip
import io
import json
from collections import namedtuple
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np

from repro.files import read_jsonl, read_lines, writing

RESULTS = Path(__file__).parent / "results"
CLAIMS = (  # is the first arm better than the second?  "InfoNCE" has the released synthetic binary recipe
    ("C1", "1-D W", "InfoNCE"),
    ("C2", "1-D W", "start"),
    ("C3", "1-D W", "InfoNCE, real"),
    ("C4", "1-D W, synthetic + real", "1-D W, same questions"),
    ("C5", "1-D W", "1-D W, 2 grades"),
)
IN_DOMAIN = ("dl19-pool", "wikiqa", "sample")  # web questions, as in the lists; C3 is judged on all others
NO_VOTE = ("sample",)  # one writer made it and the lists
LEVEL, WORTHWHILE = 0.05, 0.01
FIELDS = ("start", "group", "arm", "seed", "settings", "development", "minutes", "trained", "collections")
HEADER = "start,arm,seed,collection,query,ndcg@10"
Run = dict[str, Any]
Scores = Mapping[str, Mapping[str, float]]  # {collection: {query: score}}


class Comparison(NamedTuple):
    """A paired difference in nDCG@10, its 95 % interval, its two-sided p, and the number of queries."""

    difference: float
    low: float
    high: float
    p: float
    queries: int


Judged = namedtuple("Judged", "claim text comparison p verdict collections")  # see `judge`


def compare(differences: Scores, seed: int = 0, resamples: int = 10_000) -> Comparison:
    """Paired comparison from {collection: {query: score of one system - score of the other}}.

    difference: mean over collections of the mean over queries.  p, two-sided: each query's sign is flipped by
    a coin; (count + 1) / (resamples + 1), count = samples whose statistic lies at least as far from 0
    (stratified paired permutation test).  low, high: percentiles 2.5 and 97.5, queries drawn with
    replacement within collections (bootstrap).  The order of queries and collections does not matter.
    Raises ValueError for no collection, one with fewer than 2 queries, or a value that is not finite.
    """
    rows = [np.array([found[q] for q in sorted(found)], float) for _, found in sorted(differences.items())]
    if not rows or not all(len(row) > 1 and np.isfinite(row).all() for row in rows):
        raise ValueError("expected a collection or more, each with 2 or more finite differences")
    rng, flipped, drawn = np.random.default_rng(seed), np.zeros(resamples), np.zeros(resamples)
    for row in rows:
        for part in np.array_split(np.arange(resamples), -(-resamples // 500)):  # 500 at a time: memory
            signs = rng.integers(0, 2, (len(part), len(row)), dtype=np.int8) * 2 - 1
            flipped[part] += signs @ row / len(row) / len(rows)
            drawn[part] += row[rng.integers(0, len(row), signs.shape)].mean(axis=1) / len(rows)
    difference = fmean(row.mean() for row in rows)
    count = int((np.abs(flipped) >= abs(difference) - 1e-12).sum())  # equal up to rounding counts as equal
    low, high = np.quantile(drawn, (0.025, 0.975)).tolist()
    return Comparison(difference, low, high, (count + 1) / (resamples + 1), sum(map(len, rows)))


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Holm-adjusted p: of m sorted values, p_(i) becomes max over j <= i of min(1, (m - j + 1) p_(j))."""
    adjusted, largest = dict(p_values), 0.0
    for place, name in enumerate(sorted(p_values, key=p_values.__getitem__)):
        adjusted[name] = largest = max(largest, min(1.0, (len(p_values) - place) * p_values[name]))
    return adjusted


def differences(runs: Sequence[Run], start: str, better: str, than: str) -> dict[str, dict[str, float]]:
    """{collection: {query: nDCG@10 of arm `better` minus arm `than`}}, where every run of both was scored.

    {} if a side has no run.  Raises ValueError if two runs did not answer the same queries.
    """
    here = [r for r in runs if r["group"] in ("references", "main") and r["start"] in (None, start)]
    sides = [[run["per_query"] for run in here if run["arm"] == arm] for arm in (better, than)]
    found = {}
    for name in sorted(set.intersection(*map(set, sides[0] + sides[1]))) if all(sides) else ():
        queries = sides[0][0][name].keys()
        if any(scores[name].keys() != queries for scores in sides[0] + sides[1]):
            raise ValueError(f"{name}: the runs of {better} and {than} did not answer the same queries")
        mean = [{q: fmean(scores[name][q] for scores in side) for q in queries} for side in sides]
        found[name] = {q: mean[0][q] - mean[1][q] for q in queries}
    return found


def verdict(found: Comparison | None, p: float) -> str:
    """The rule of the design, on the corrected p; what fits first counts."""
    if found is None:
        return "not measured"
    if p <= LEVEL and found.difference > 0:
        return "holds"
    return "does not hold" if p <= LEVEL or found.high < WORTHWHILE else "undecided"


def judge(runs: Sequence[Run], start: str, pairs: Sequence[tuple[str, str, str]] = CLAIMS) -> list[Judged]:
    """A row a claim; `collections` has the comparison on each alone, `p` is Holm-corrected.

    A claim that is not measured (comparison None) stays in the family of the correction, with p = 1.
    """
    paired, rows = [], []
    for claim, better, than in pairs:
        out = IN_DOMAIN if claim == "C3" else NO_VOTE
        paired.append({c: d for c, d in differences(runs, start, better, than).items() if c not in out})
    found = [compare(d) if d else None for d in paired]
    corrected = holm({str(n): one.p if one else 1.0 for n, one in enumerate(found)}).values()
    for (claim, better, than), d, one, p in zip(pairs, paired, found, corrected, strict=True):
        text = f"{better} over {than}" + " (shifted collections)" * (claim == "C3")
        alone = {name: compare({name: d[name]}) for name in d}
        rows.append(Judged(claim, text, one, p, verdict(one, p), alone))
    return rows


def _key(run: Run) -> tuple[str, str, str]:
    return run["start"] or "", run["arm"], "" if run["seed"] is None else f"{run['seed']:d}"


@contextlib.contextmanager
def naming(where: str) -> Iterator[None]:
    """What is wrong with a record becomes one ValueError that names the place."""
    try:
        yield
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{where}: no proper record, {type(error).__name__}: {error}") from error


def read_runs(folder: str | Path) -> list[Run]:
    """The runs of a folder, each with run["per_query"][collection][query] = nDCG@10; [] without `runs.jsonl`.

    Rows of unknown runs are left out: a kill between the two files leaves such rows.  Raises ValueError
    naming file and line of a record that is none, or whose rows are not those of its means.
    """
    path, runs, unknown = Path(folder) / "runs.jsonl", {}, {"per_query": {}}
    for where, run in read_jsonl(path) if path.exists() else ():
        with naming(where):
            run["per_query"] = {name: {} for name in {field: run[field] for field in FIELDS}["collections"]}
            if runs.setdefault(_key(run), (where, run))[1] is not run:
                raise ValueError("an earlier line has the same start, arm and seed")
    for where, line in read_lines(path.with_name("per_query.csv.gz")) if runs else ():
        with naming(where):
            *key, name, query, value = next(csv.reader([line]))
            if line != HEADER:
                _, run = runs.get(tuple(key), ("", unknown))
                run["per_query"].get(name, {})[query] = float(value)
    for where, run in runs.values():
        for name, found in run["collections"].items():
            with naming(f"{where}, {name}"):
                values, mean = run["per_query"][name].values(), found["metrics"]["ndcg@10"]
                if len(values) != found["queries"] or not abs(fmean(values) - mean) < 1e-4:
                    raise ValueError("count or mean is not that of the rows in per_query.csv.gz")
    return [run for _, run in runs.values()]


def write_runs(folder: str | Path, runs: Sequence[Run]) -> None:
    """Write both files whole, sorted: the same runs, in whatever order, give the same bytes."""
    rows, lines = io.StringIO(), []
    table = csv.writer(rows, lineterminator="\n")
    for run in sorted(runs, key=_key):
        lines.append(json.dumps({k: run[k] for k in run if k != "per_query"}, sort_keys=True) + "\n")
        for name, scores in sorted(run["per_query"].items()):
            table.writerows((*_key(run), name, query, f"{scores[query]:.5f}") for query in sorted(scores))
    with writing(Path(folder) / "per_query.csv.gz") as sink:  # first: rows without a run do no harm
        sink.buffer.write(gzip.compress(f"{HEADER}\n{rows.getvalue()}".encode(), mtime=0))
    with writing(Path(folder) / "runs.jsonl") as sink:
        sink.writelines(lines)


def read_tuning(folder: str | Path) -> dict[str, dict[str, Any]]:
    """{start: {arm: {"best", "start", "trials"}}}, {} without `tuning.json`.  ValueError if it is no JSON."""
    path = Path(folder) / "tuning.json"
    with naming(str(path)):
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def write_tuning(folder: str | Path, tuning: Mapping[str, Any]) -> None:
    """Write `tuning.json` whole."""
    with writing(Path(folder) / "tuning.json") as sink:
        sink.write(json.dumps(tuning, indent=1, sort_keys=True) + "\n")
