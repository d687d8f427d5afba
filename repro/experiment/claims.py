"""The rule that judges the five claims, and the records it reads.

`runs.jsonl` has a line a run, `per_query.csv.gz` each query's nDCG@10, `tuning.json` the trials on
development data: ids and scores only.  Seeds are averaged query by query: a seed is no new query.
"""

import csv
import gzip
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from repro.compare import Comparison, compare, holm
from repro.data import read_jsonl, read_lines
from repro.experiment.arms import LADDER
from repro.support.files import write_text

RESULTS = Path(__file__).parent / "results"
# Verdicts rest on all seven; the last three had been scored by no run when the protocol was fixed.
COLLECTIONS = ("dl19-pool", "wikiqa", "cranfield", "scifact", "dl23-sample", "npl", "csfcube")
FRESH = ("dl23-sample", "npl", "csfcube")
SHIFTED = ("cranfield", "scifact", "npl", "csfcube")  # unlike the lists, which are web questions
FAMILIES = ("Gaussian W2", "1-D W")  # the released loss, and the kit's
LEVEL, WORTHWHILE = 0.05, 0.01
HEADER = ("start", "arm", "seed", "collection", "query", "ndcg@10")
Run = dict[str, Any]


@dataclass(frozen=True)
class Judged:
    """One claim or rung: `better` over `than`, compared on all its collections and on the fresh."""

    label: str
    better: str
    than: str
    comparison: Comparison | None
    fresh: Comparison | None
    p: float  # corrected for a claim, as it is for a rung
    verdict: str


def claims_of(family: str) -> list[tuple[str, str, str, Sequence[str]]]:
    """(claim, arm, over which arm, on which collections) for a family's loss W."""
    return [
        ("C1", family, "InfoNCE", COLLECTIONS),
        ("C2", family, "start", COLLECTIONS),
        ("C3", family, "InfoNCE, real", SHIFTED),
        ("C4", f"{family}, synthetic + real", f"{family}, same questions", COLLECTIONS),
        ("C5", family, f"{family}, binary", COLLECTIONS),
    ]


def verdict(found: Comparison | None, p: float) -> str:
    """The rule, on the corrected p; what fits first counts."""
    if found is None:
        return "not measured"
    if p <= LEVEL and found.difference > 0:
        return "holds"
    if p <= LEVEL and found.difference < 0:
        return "reversed"
    if found.high < WORTHWHILE:
        return "no gain of .01"
    return "undecided"


def differences(
    runs: Sequence[Run], start: str, better: str, than: str, collections: Sequence[str]
) -> dict[str, dict[str, float]]:
    """{collection: {query: nDCG@10 of arm `better` minus arm `than`}}; {} if a side has no run.

    ValueError if two runs did not answer the same queries.
    """
    here = [run for run in runs if run["start"] in (None, start)]
    ours = [run["per_query"] for run in here if run["arm"] == better]
    theirs = [run["per_query"] for run in here if run["arm"] == than]
    if not ours or not theirs:
        return {}
    found = {}
    for name in collections:
        queries = ours[0][name].keys()
        if any(scores[name].keys() != queries for scores in ours + theirs):
            raise ValueError(f"{name}: runs of {better} and {than} answered different queries")
        found[name] = {
            query: fmean(run[name][query] for run in ours)
            - fmean(run[name][query] for run in theirs)
            for query in queries
        }
    return found


def _compared(
    runs: Sequence[Run], start: str, better: str, than: str, collections: Sequence[str]
) -> Comparison | None:
    found = differences(runs, start, better, than, collections)
    if not found:
        return None
    return compare(found)


def _fresh(collections: Sequence[str]) -> list[str]:
    return [name for name in collections if name in FRESH]


def judge(runs: Sequence[Run], start: str, family: str) -> list[Judged]:
    """The five claims of a family: p is Holm-corrected over them (1 where nothing was measured)."""
    rows = []
    for claim, better, than, names in claims_of(family):
        whole = _compared(runs, start, better, than, names)
        fresh = _compared(runs, start, better, than, _fresh(names))
        rows.append((claim, better, than, whole, fresh))
    raw = {row[0]: 1.0 for row in rows}
    raw |= {row[0]: row[3].p for row in rows if row[3] is not None}
    corrected = holm(raw)
    return [Judged(*row, corrected[row[0]], verdict(row[3], corrected[row[0]])) for row in rows]


def ladder(runs: Sequence[Run], start: str) -> list[Judged]:
    """The rungs from InfoNCE up, each with its paired difference; p is not corrected."""
    rungs = []
    for than, better, label in LADDER:
        whole = _compared(runs, start, better, than, COLLECTIONS)
        fresh = _compared(runs, start, better, than, FRESH)
        p = 1.0
        if whole is not None:
            p = whole.p
        rungs.append(Judged(label, better, than, whole, fresh, p, ""))
    return rungs


def key_of(run: Mapping[str, Any]) -> tuple[str, str, str]:
    """(start, arm, seed) of a run or of a row of its queries, as text; a reference lacks some."""
    seed = run["seed"]
    if seed is None:
        seed = ""
    return run["start"] or "", run["arm"], str(seed)


def read_runs(folder: str | Path) -> list[Run]:
    """The runs of a folder, each with run["per_query"][collection][query] = nDCG@10.

    Rows of unknown runs, which a kill between the two files leaves, are left out.  ValueError for
    a record whose rows are not those of its means.
    """
    path = Path(folder) / "runs.jsonl"
    if not path.exists():
        return []
    runs = {}
    for _, run in read_jsonl(path):
        run["per_query"] = {name: {} for name in run["collections"]}
        runs[key_of(run)] = run
    table = [line for _, line in read_lines(path.with_name("per_query.csv.gz"))]
    for row in csv.DictReader(table):
        run = runs.get(key_of(row))
        if run is not None:
            run["per_query"][row["collection"]][row["query"]] = float(row["ndcg@10"])
    for run in runs.values():
        for name, found in run["collections"].items():
            values = list(run["per_query"][name].values())
            right = len(values) == found["queries"]
            if not right or abs(fmean(values) - found["metrics"]["ndcg@10"]) > 1e-4:
                raise ValueError(f"{path}: {key_of(run)}, {name}: rows and mean do not agree")
    return list(runs.values())


def write_runs(folder: str | Path, runs: Sequence[Run]) -> None:
    """Write both files whole and sorted, so that the same runs give the same bytes; rows first."""
    rows = io.StringIO()
    table = csv.writer(rows, lineterminator="\n")
    table.writerow(HEADER)
    lines = []
    for run in sorted(runs, key=key_of):
        for name, queries in sorted(run["per_query"].items()):
            for query, value in sorted(queries.items()):
                table.writerow([*key_of(run), name, query, f"{value:.5f}"])
        record = {field: value for field, value in run.items() if field != "per_query"}
        lines.append(json.dumps(record, sort_keys=True) + "\n")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    scratch = folder / "per_query.csv.gz.tmp"
    scratch.write_bytes(gzip.compress(rows.getvalue().encode(), mtime=0))
    scratch.replace(folder / "per_query.csv.gz")
    write_text(folder / "runs.jsonl", "".join(lines))


def read_tuning(folder: str | Path) -> dict[str, dict[str, dict[str, float]]]:
    """{start: {arm: {learning rate: nDCG@10 on development data}}}, {} without `tuning.json`."""
    path = Path(folder) / "tuning.json"
    if not path.exists():
        return {}
    return json.loads(path.read_text(encoding="utf-8"))
