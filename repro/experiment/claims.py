"""The rule that judges the five claims, the ladder, and the records that both read.

`runs.jsonl` has a line a run, `per_query.csv.gz` each query's nDCG@10, `tuning.json` the trials on
development data: ids and scores only.  Seeds are averaged query by query: a seed is no new query.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from repro.compare import Comparison, compare, holm
from repro.data import read_jsonl
from repro.support.files import write_text

RESULTS = Path(__file__).parent / "results"
# Verdicts rest on all seven; the last three had been scored by no run when the protocol was fixed.
COLLECTIONS = ("dl19-pool", "wikiqa", "cranfield", "scifact", "dl23-sample", "npl", "csfcube")
FRESH = COLLECTIONS[4:]
SHIFTED = ("cranfield", "scifact", "npl", "csfcube")  # unlike the lists, which are web questions
FAMILIES = ("Gaussian W2", "1-D W")  # the released loss, and the kit's
# Each rung changes one thing: (what changes, arm above, arm below).
LADDER = (
    ("soft target", "KL, binary", "InfoNCE"),
    ("levels", "KL", "KL, binary"),
    ("loss: Gaussian W2", "Gaussian W2", "KL"),
    ("loss: 1-D W", "1-D W", "KL"),
)
LEVEL = 0.05
KEY = ["start", "arm", "seed"]  # of a run; BM25 has no start, an arm that is not trained no seed
SCORE = "ndcg@10"
COLUMNS = [*KEY, "collection", "query", SCORE]


@dataclass
class Judged:
    """One claim or rung: `better` over `than`, on all its collections and on the fresh ones."""

    label: str
    better: str
    than: str
    names: tuple = COLLECTIONS  # of collections
    whole: Comparison | None = None  # these are filled in by `compare_arms`
    fresh: Comparison | None = None
    p: float = 1.0  # corrected for a claim, as it is for a rung
    verdict: str = ""  # of a claim


def verdict(found: Comparison, p: float) -> str:
    """The rule, on the corrected p; what fits first counts."""
    if p <= LEVEL and found.difference > 0:
        return "holds"
    if p <= LEVEL:
        return "reversed"
    if found.high < 0.01:
        return "no gain of .01"
    return "undecided"


def mean_scores(runs: pd.DataFrame, start: str, unit: str) -> pd.Series:
    """Mean nDCG@10 by arm, collection and `unit`, "query" or "seed", of the arms from a start."""
    mine = runs["start"].isin(["", start])
    return runs[mine].groupby(["arm", "collection", unit])[SCORE].mean()


def compare_arms(runs: pd.DataFrame, start: str, rows: list) -> None:
    """Fill in what `compare` finds, on the collections that `runs` has; both arms must be there.

    ValueError if two arms did not answer the same queries.
    """
    scores = mean_scores(runs, start, "query")
    for row in rows:
        # Not a number for a query of one side alone, which `compare` refuses.
        gap = scores[row.better] - scores[row.than]
        gaps = {name: gap[name].to_dict() for name in row.names if name in gap}
        row.whole = compare(gaps)
        row.fresh = compare({name: gaps[name] for name in gaps if name in FRESH})
        row.p = row.whole.p


def judge(runs: pd.DataFrame, start: str, family: str) -> list:
    """The five claims for a family's loss W, with verdicts; p is Holm-corrected over the five."""
    rows = [
        Judged("C1", family, "InfoNCE"),
        Judged("C2", family, "start"),
        Judged("C3", family, "InfoNCE, real", SHIFTED),
        Judged("C4", f"{family}, synthetic + real", f"{family}, same questions"),
        Judged("C5", family, f"{family}, binary"),
    ]
    compare_arms(runs, start, rows)
    corrected = holm({row.label: row.p for row in rows})
    for row in rows:
        row.p = corrected[row.label]
        row.verdict = verdict(row.whole, row.p)
    return rows


def ladder(runs: pd.DataFrame, start: str) -> list:
    """The rungs from InfoNCE up, each with its difference; p not corrected."""
    rungs = [Judged(*rung) for rung in LADDER]
    compare_arms(runs, start, rungs)
    return rungs


def read_runs(folder: Path) -> pd.DataFrame:
    """Each query's nDCG@10 in each run, a row each."""
    path = folder / "per_query.csv.gz"
    if not path.exists():
        return pd.DataFrame(columns=COLUMNS)
    return pd.read_csv(path, dtype=str, keep_default_na=False).astype({SCORE: float})


def read_records(folder: Path) -> list:
    """How each run was made: settings, machine, means; [] without `runs.jsonl`."""
    path = folder / "runs.jsonl"
    return [row for _, row in read_jsonl(path)] if path.exists() else []


def key_of(record: dict) -> list:
    """(start, arm, seed) as the table of queries has them."""
    return [str(record[field]).replace("None", "") for field in KEY]


def add_run(folder: Path, record: dict, rows: list) -> None:
    """Put a run among the records, its rows of COLUMNS beside it; rows land first.

    Both files are written whole and sorted, so that the same runs give the same bytes.
    """
    runs = pd.concat([read_runs(folder), pd.DataFrame(rows, columns=COLUMNS)])
    # A kill between the two files leaves rows without a record: the new ones take their place.
    runs = runs.drop_duplicates(COLUMNS[:-1], keep="last").sort_values(COLUMNS)
    scratch = folder / "per_query.csv.gz.tmp"
    runs.to_csv(
        scratch, index=False, float_format="%.5f", compression={"method": "gzip", "mtime": 0}
    )
    scratch.replace(folder / "per_query.csv.gz")
    records = sorted(read_records(folder) + [record], key=key_of)
    write_text(
        folder / "runs.jsonl", "".join(json.dumps(one, sort_keys=True) + "\n" for one in records)
    )


def read_tuning(folder: Path) -> dict:
    """{start: {arm: {learning rate: nDCG@10 on development data}}}, {} without `tuning.json`."""
    path = folder / "tuning.json"
    return json.loads(path.read_bytes()) if path.exists() else {}
