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
from typing import Any

import numpy as np

from repro.checkpoints import writing
from repro.data import read_jsonl, read_lines

RESULTS = Path(__file__).parent / "results"
CLAIMS = (("C1", "1-D W", "InfoNCE"), ("C2", "1-D W", "start"), ("C3", "1-D W", "InfoNCE, real"),
          ("C4", "1-D W, synthetic + real", "1-D W, same questions"), ("C5", "1-D W", "1-D W, 2 grades"))
IN_DOMAIN = ("dl19-pool", "wikiqa", "sample")  # web questions, as in the lists; C3 is judged on all others
NO_VOTE = ("sample",)  # one writer made it and the lists
LEVEL, WORTHWHILE = 0.05, 0.01
FIELDS = ("start", "group", "arm", "seed", "settings", "minutes", "trained", "collections")
HEADER = "start,arm,seed,collection,query,ndcg@10"
Run = dict[str, Any]
Comparison = namedtuple("Comparison", "difference low high p queries")  # low, high: a 95 % interval
Judged = namedtuple("Judged", "claim text comparison p verdict collections")

def compare(differences: Mapping[str, Mapping[str, float]], seed=0, resamples=10_000) -> Comparison:
    """Paired comparison from {collection: {query: score of one system - score of the other}}, in any order.
    difference: mean over collections of the mean over queries.  p, two-sided: each query's sign is flipped by
    a coin; (count + 1) / (resamples + 1), count = samples at least as far from 0 (stratified paired
    permutation test).  low, high: percentiles 2.5 and 97.5, queries drawn anew in collections (bootstrap).
    Raises ValueError for no collection, one with fewer than 2 queries, or a value that is not finite."""
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
    p = (1 + (np.abs(flipped) >= abs(difference) - 1e-12).sum()) / (resamples + 1)  # equal but for rounding
    return Comparison(difference, *np.quantile(drawn, (0.025, 0.975)).tolist(), float(p), sum(map(len, rows)))

def holm(p_values: Mapping[Any, float]) -> dict[Any, float]:
    """Holm-adjusted p: of m sorted values, p_(i) becomes max over j <= i of min(1, (m - j + 1) p_(j))."""
    order = sorted(p_values, key=p_values.__getitem__)
    scaled = [(len(order) - n) * p_values[name] for n, name in enumerate(order)]
    return dict(zip(order, np.maximum.accumulate(np.minimum(scaled, 1)).tolist(), strict=True))

def differences(runs: Sequence[Run], start: str, better: str, than: str) -> dict[str, dict[str, float]]:
    """{collection: {query: nDCG@10 of arm `better` minus arm `than`}}, where every run of both was scored.
    {} if a side has no run.  Raises ValueError if two runs did not answer the same queries."""
    here = [r for r in runs if r["group"] in ("references", "main") and r["start"] in (None, start)]
    ours, theirs = ([r["per_query"] for r in here if r["arm"] == arm] for arm in (better, than))
    both, out = ours + theirs, {}
    for name in sorted(set.intersection(*map(set, both))) if ours and theirs else ():
        queries = both[0][name].keys()
        if any(scores[name].keys() != queries for scores in both):
            raise ValueError(f"{name}: the runs of {better} and {than} did not answer the same queries")
        out[name] = {q: fmean(r[name][q] for r in ours) - fmean(r[name][q] for r in theirs) for q in queries}
    return out

def verdict(found: Comparison | None, p: float) -> str:
    """The rule of the design, on the corrected p; what fits first counts."""
    if found is None or (p <= LEVEL and found.difference > 0):
        return "holds" if found else "not measured"
    return "does not hold" if p <= LEVEL or found.high < WORTHWHILE else "undecided"

def judge(runs: Sequence[Run], start: str, pairs: Sequence[tuple[str, str, str]] = CLAIMS) -> list[Judged]:
    """A row a claim: p is Holm-corrected (1 where not measured), `collections` compares on each alone."""
    rows = []
    for claim, better, than in pairs:
        out = IN_DOMAIN if claim == "C3" else NO_VOTE
        d = {name: x for name, x in differences(runs, start, better, than).items() if name not in out}
        text = f"{better} over {than}" + " (shifted collections)" * (claim == "C3")
        rows.append((claim, text, compare(d) if d else None, {name: compare({name: d[name]}) for name in d}))
    p = holm({n: one.p if one else 1.0 for n, (_, _, one, _) in enumerate(rows)})
    return [Judged(*row[:3], p[n], verdict(row[2], p[n]), row[3]) for n, row in enumerate(rows)]

def _key(run: Run) -> tuple[str, str, str]:
    return run["start"] or "", run["arm"], "" if run["seed"] is None else f"{run['seed']:d}"

@contextlib.contextmanager
def naming(where: object) -> Iterator[None]:
    """What is wrong with a record becomes one ValueError that names the place."""
    try:
        yield
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{where}: no proper record, {type(error).__name__}: {error}") from error

def read_runs(folder: str | Path) -> list[Run]:
    """The runs of a folder, each with run["per_query"][collection][query] = nDCG@10; [] without `runs.jsonl`.
    Rows of unknown runs, which a kill between the two files leaves, are left out.  Raises ValueError naming
    file and line of a record that is none, or whose rows are not those of its means."""
    path, runs, unknown = Path(folder) / "runs.jsonl", {}, ("", {"per_query": {}})
    for where, run in read_jsonl(path) if path.exists() else ():
        with naming(where):
            run["per_query"] = {name: {} for name in {field: run[field] for field in FIELDS}["collections"]}
            if runs.setdefault(_key(run), (where, run))[1] is not run:
                raise ValueError("an earlier line has the same start, arm and seed")
    for where, line in read_lines(path.with_name("per_query.csv.gz")) if runs else ():
        with naming(where):
            *key, name, query, value = next(csv.reader([line]))
            if line != HEADER:
                runs.get(tuple(key), unknown)[1]["per_query"].get(name, {})[query] = float(value)
    for where, run in runs.values():
        for name, found in run["collections"].items():
            with naming(f"{where}, {name}"):
                values, mean = run["per_query"][name].values(), found["metrics"]["ndcg@10"]
                if len(values) != found["queries"] or not abs(fmean(values) - mean) < 1e-4:
                    raise ValueError("count or mean is not that of the rows in per_query.csv.gz")
    return [run for _, run in runs.values()]

def write_runs(folder: str | Path, runs: Sequence[Run]) -> None:
    """Write both files whole, sorted: the same runs in any order give the same bytes.  Rows land first."""
    table = csv.writer(rows := io.StringIO(), lineterminator="\n")
    with writing(Path(folder) / "runs.jsonl") as out, writing(Path(folder) / "per_query.csv.gz") as sink:
        for run in sorted(runs, key=_key):
            out.write(json.dumps({k: run[k] for k in run if k != "per_query"}, sort_keys=True) + "\n")
            for name, scores in sorted(run["per_query"].items()):
                table.writerows((*_key(run), name, query, f"{scores[query]:.5f}") for query in sorted(scores))
        sink.buffer.write(gzip.compress(f"{HEADER}\n{rows.getvalue()}".encode(), mtime=0))

def read_tuning(folder: str | Path) -> dict[str, dict[str, Any]]:
    """{start: {arm: {"best", "start", "trials"}}}, {} without `tuning.json`.  ValueError if it is no JSON."""
    path = Path(folder) / "tuning.json"
    with naming(path):
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
