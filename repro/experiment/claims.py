"""The rule that judges the five claims, and the records it reads.

`runs.jsonl` has a line a run, `per_query.csv.gz` each query's nDCG@10, `tuning.json` the trials on
development data: ids and scores only.  Seeds are averaged query by query: a seed is no new query.
"""

import json
from pathlib import Path
from typing import NamedTuple

import pandas as pd

from repro.compare import Comparison, compare, holm
from repro.data import read_jsonl
from repro.experiment.arms import LADDER
from repro.support.files import write_text

RESULTS = Path(__file__).parent / "results"
# Verdicts rest on all seven; the last three had been scored by no run when the protocol was fixed.
COLLECTIONS = ("dl19-pool", "wikiqa", "cranfield", "scifact", "dl23-sample", "npl", "csfcube")
FRESH = ("dl23-sample", "npl", "csfcube")
SHIFTED = ("cranfield", "scifact", "npl", "csfcube")  # unlike the lists, which are web questions
FAMILIES = ("Gaussian W2", "1-D W")  # the released loss, and the kit's
LEVEL, WORTHWHILE = 0.05, 0.01
KEY = ["start", "arm", "seed"]  # of a run; BM25 has no start, an arm that is not trained no seed
SCORE = "ndcg@10"
COLUMNS = [*KEY, "collection", "query", SCORE]


class Judged(NamedTuple):
    """One claim or rung: `better` over `than`, on all its collections and on the fresh ones."""

    label: str
    better: str
    than: str
    whole: Comparison | None = None  # without runs
    fresh: Comparison | None = None
    p: float = 1.0  # corrected for a claim, as it is for a rung
    verdict: str = ""  # of a claim


def claims_of(family: str) -> list[tuple]:
    """(claim, arm, over which arm, and on which collections if not all) for a family's loss W."""
    return [
        ("C1", family, "InfoNCE"),
        ("C2", family, "start"),
        ("C3", family, "InfoNCE, real", SHIFTED),
        ("C4", f"{family}, synthetic + real", f"{family}, same questions"),
        ("C5", family, f"{family}, binary"),
    ]


def verdict(found: Comparison | None, p: float) -> str:
    """The rule, on the corrected p; what fits first counts."""
    if found is None:
        return "not measured"
    if p <= LEVEL and found.difference > 0:
        return "holds"
    if p <= LEVEL:
        return "reversed"
    if found.high < WORTHWHILE:
        return "no gain of .01"
    return "undecided"


def means(runs: pd.DataFrame, start: str, *by: str) -> pd.Series:
    """Mean nDCG@10 of the arms from a start: a value for each combination in the columns `by`."""
    return runs[runs["start"].isin(["", start])].groupby(list(by))[SCORE].mean()


def judge_pair(
    scores: pd.Series, label: str, better: str, than: str, names: tuple[str, ...] = COLLECTIONS
) -> Judged:
    """`compare` of two arms on the collections `names`; scores by arm, collection, query.

    ValueError if the two did not answer the same queries.
    """
    ours, theirs = scores.get(better), scores.get(than)
    if ours is None or theirs is None:
        return Judged(label, better, than)
    gap = ours - theirs  # not a number for a query of one side alone, which compare refuses
    gaps = {name: gap[name].to_dict() for name in names}
    whole = compare(gaps)
    fresh = compare({name: gaps[name] for name in names if name in FRESH})
    return Judged(label, better, than, whole, fresh, whole.p)


def judge(runs: pd.DataFrame, start: str, family: str) -> list[Judged]:
    """The five claims of a family: p is Holm-corrected over them (1 where nothing was measured)."""
    scores = means(runs, start, "arm", "collection", "query")
    rows = [judge_pair(scores, *claim) for claim in claims_of(family)]
    corrected = holm({row.label: row.p for row in rows})
    judged = []
    for row in rows:
        p = corrected[row.label]
        judged.append(Judged(*row[:5], p, verdict(row.whole, p)))
    return judged


def ladder(runs: pd.DataFrame, start: str) -> list[Judged]:
    """The rungs from InfoNCE up that were measured, each with its difference; p not corrected."""
    scores = means(runs, start, "arm", "collection", "query")
    rungs = [judge_pair(scores, label, better, than) for than, better, label in LADDER]
    return [rung for rung in rungs if rung.whole]


def read_runs(folder: Path) -> pd.DataFrame:
    """Each query's nDCG@10 in each run, a row each."""
    path = folder / "per_query.csv.gz"
    if not path.exists():
        return pd.DataFrame(columns=COLUMNS)
    kinds = dict.fromkeys(COLUMNS, str) | {SCORE: float}
    return pd.read_csv(path, dtype=kinds, keep_default_na=False)


def read_records(folder: Path) -> list[dict]:
    """How each run was made: settings, machine, means; [] without `runs.jsonl`."""
    path = folder / "runs.jsonl"
    return [row for _, row in read_jsonl(path)] if path.exists() else []


def key_of(record: dict) -> list[str]:
    """(start, arm, seed) as the table of queries has them."""
    return ["" if record[field] is None else str(record[field]) for field in KEY]


def add_run(folder: Path, record: dict, rows: list[tuple]) -> None:
    """Put a run among the records, its rows of COLUMNS beside it; rows land first.

    Both files are written whole and sorted, so that the same runs give the same bytes.
    """
    runs = pd.concat([read_runs(folder), pd.DataFrame(rows, columns=COLUMNS)])
    # A kill between the two files leaves rows without a record: the new ones take their place.
    runs = runs.drop_duplicates(COLUMNS[:-1], keep="last").sort_values(COLUMNS)
    scratch = folder / "per_query.csv.gz.tmp"
    how = {"method": "gzip", "mtime": 0}
    runs.to_csv(scratch, index=False, float_format="%.5f", compression=how)
    scratch.replace(folder / "per_query.csv.gz")
    records = sorted([*read_records(folder), record], key=key_of)
    lines = [json.dumps(one, sort_keys=True) + "\n" for one in records]
    write_text(folder / "runs.jsonl", "".join(lines))


def read_tuning(folder: Path) -> dict:
    """{start: {arm: {learning rate: nDCG@10 on development data}}}, {} without `tuning.json`."""
    path = folder / "tuning.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
