"""The rule that judges the five claims, and the records it reads.

`runs.jsonl` has a line a run, `per_query.csv.gz` each query's nDCG@10, `tuning.json` the trials on
development data: ids and scores only.  Seeds are averaged query by query: a seed is no new query.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

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
    whole: Comparison | None
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


def arm_values(runs: pd.DataFrame, start: str, arm: str) -> pd.DataFrame:
    """The rows of one arm from one start."""
    return runs[runs["start"].isin(["", start]) & (runs["arm"] == arm)]


def means(runs: pd.DataFrame, start: str, arm: str) -> pd.DataFrame:
    """Mean nDCG@10 of an arm's runs: a row a seed, a column a collection."""
    found = arm_values(runs, start, arm)
    return found.pivot_table(index="seed", columns="collection", values=SCORE, aggfunc="mean")


def differences(
    runs: pd.DataFrame, start: str, better: str, than: str
) -> dict[str, dict[str, float]]:
    """{collection: {query: nDCG@10 of arm `better` minus arm `than`}}; {} if a side has no run.

    ValueError if the two did not answer the same queries.
    """
    sides = []
    for arm in (better, than):
        found = arm_values(runs, start, arm)
        sides.append(found.groupby(["collection", "query"])[SCORE].mean())
    ours, theirs = sides
    if ours.empty or theirs.empty:
        return {}
    if not ours.index.equals(theirs.index):
        raise ValueError(f"runs of {better} and {than} answered different queries")
    gap = ours - theirs
    return {name: gap[name].to_dict() for name in COLLECTIONS}


def judge_pair(
    runs: pd.DataFrame, start: str, better: str, than: str, names: Sequence[str] = COLLECTIONS
) -> list[Comparison | None]:
    """`compare` of two arms on some collections, and on the fresh of these; None without a run."""
    gap = differences(runs, start, better, than)
    found = []
    for some in (names, [name for name in names if name in FRESH]):
        found.append(compare({name: gap[name] for name in some}) if gap else None)
    return found


def judge(runs: pd.DataFrame, start: str, family: str) -> list[Judged]:
    """The five claims of a family: p is Holm-corrected over them (1 where nothing was measured)."""
    found, raw = [], {}
    for claim, better, than, names in claims_of(family):
        whole, fresh = judge_pair(runs, start, better, than, names)
        found.append((claim, better, than, whole, fresh))
        raw[claim] = whole.p if whole else 1.0
    corrected = holm(raw)
    rows = []
    for claim, *pair, whole, fresh in found:
        p = corrected[claim]
        rows.append(Judged(claim, *pair, whole, fresh, p, verdict(whole, p)))
    return rows


def ladder(runs: pd.DataFrame, start: str) -> list[Judged]:
    """The rungs from InfoNCE up that were measured, each with its difference; p not corrected."""
    rungs = []
    for than, better, label in LADDER:
        whole, fresh = judge_pair(runs, start, better, than)
        if whole:
            rungs.append(Judged(label, better, than, whole, fresh, whole.p, ""))
    return rungs


def read_runs(folder: str | Path) -> pd.DataFrame:
    """Each query's nDCG@10 in each run, a row each."""
    path = Path(folder, "per_query.csv.gz")
    if not path.exists():
        return pd.DataFrame(columns=COLUMNS)
    kinds = dict.fromkeys(COLUMNS, str) | {SCORE: float}
    return pd.read_csv(path, dtype=kinds, keep_default_na=False)


def read_records(folder: str | Path) -> list[dict[str, Any]]:
    """How each run was made: settings, machine, means; [] without `runs.jsonl`."""
    path = Path(folder, "runs.jsonl")
    return [row for _, row in read_jsonl(path)] if path.exists() else []


def key_of(record: Mapping[str, Any]) -> list[str]:
    """(start, arm, seed) as the table of queries has them."""
    return ["" if record[field] is None else str(record[field]) for field in KEY]


def add_run(
    folder: Path, record: dict[str, Any], values: Mapping[str, Mapping[str, float]]
) -> None:
    """Put a run among the records, {collection: {query: nDCG@10}} beside it; rows land first.

    Both files are written whole and sorted, so that the same runs give the same bytes.
    """
    wide = pd.DataFrame(values).rename_axis("query").reset_index()
    rows = wide.melt("query", var_name="collection", value_name=SCORE).dropna()
    rows[KEY] = key_of(record)
    runs = read_runs(folder)
    same = (runs[KEY] == key_of(record)).all(axis=1)  # left by a kill between the two files
    runs = pd.concat([runs[~same], rows])[COLUMNS].sort_values(COLUMNS)
    folder.mkdir(parents=True, exist_ok=True)
    scratch = folder / "per_query.csv.gz.tmp"
    runs.to_csv(
        scratch, index=False, float_format="%.5f", compression={"method": "gzip", "mtime": 0}
    )
    scratch.replace(folder / "per_query.csv.gz")
    records = sorted([*read_records(folder), record], key=key_of)
    lines = [json.dumps(one, sort_keys=True) + "\n" for one in records]
    write_text(folder / "runs.jsonl", "".join(lines))


def read_tuning(folder: str | Path) -> dict[str, dict[str, dict[str, float]]]:
    """{start: {arm: {learning rate: nDCG@10 on development data}}}, {} without `tuning.json`."""
    path = Path(folder, "tuning.json")
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
