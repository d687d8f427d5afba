"""The page of results, made from the records alone: `python -m repro.experiment.report [--check]`."""

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import fmean, median, stdev
from typing import Any

from repro.experiment import claims
from repro.experiment.arms import ABLATIONS, MAIN, STARTS
from repro.experiment.claims import Comparison, Run
from repro.files import AUTHORED, checked_output, ending, writing

TITLE = "# Results, written by `python -m repro.experiment.report`"
RULE = f"""Scores are nDCG@10 unless a table says otherwise, mean ± deviation over seeds. A difference is the
mean over collections of the mean paired difference in nDCG@10, seeds averaged query by query; in brackets its
95 % bootstrap interval (queries drawn anew within collections); p is that of a stratified paired permutation
test. Collections without a vote stay out of it, and of means over collections. A claim *holds* if p,
Holm-corrected over the five claims of a start, is at most {claims.LEVEL} and the difference above 0; it *does
not hold* if that p is at most {claims.LEVEL} and the difference below 0, or if the interval ends below
{claims.WORTHWHILE}; else it is *undecided*. An empty cell was not measured with all seeds of the arm. InfoNCE
without an addition has the released synthetic binary recipe; "start" is the untrained encoder."""
BUILD = """import gzip, json, pathlib
ids = set(gzip.open("cached_prompts/dl19-pool.ids.gz", "rt").read().split())
folder = pathlib.Path("dl19-pool")
(folder / "qrels").mkdir(parents=True)
with open(folder / "corpus.jsonl", "w") as corpus:
    for line in open("collection.tsv", encoding="utf-8"):  # MS MARCO: id, text
        key, text = line.rstrip("\\n").split("\\t")
        if key in ids:
            corpus.write(json.dumps({"_id": key, "title": "", "text": text}) + "\\n")
rows = [line.split() for line in open("2019qrels-pass.txt")]  # query, Q0, passage, grade
judged = {row[0] for row in rows}
with open(folder / "queries.jsonl", "w") as queries:
    for line in open("msmarco-test2019-queries.tsv", encoding="utf-8"):
        key, text = line.rstrip("\\n").split("\\t")
        if key in judged:
            queries.write(json.dumps({"_id": key, "text": text}) + "\\n")
table = "".join(f"{q}\\t{p}\\t{grade}\\n" for q, _, p, grade in rows if p in ids)
(folder / "qrels" / "test.tsv").write_text("query-id\\tcorpus-id\\tscore\\n" + table)
"""
HOW = f"""Two commands make every row, the first from nothing (it goes on where it was stopped; start
one a core, with OMP_NUM_THREADS=1), the second from the records:

    python -m repro.experiment.run --wikiqa wikiqa --data sample dl19-pool wikiqa scifact cranfield
    python -m repro.experiment.report

The names are BEIR folders. These lines build dl19-pool from MS MARCO's and NIST's files:

```python
{BUILD}```"""
MARKS = ("<!-- results -->", "<!-- /results -->")
LOSSES = ("InfoNCE, all lower", "InfoNCE, middle left out", "KL", "Gaussian W2")
SECONDARY = (
    *(("C1", arm, "InfoNCE") for arm in LOSSES),
    *(("C1", "1-D W", arm) for arm in LOSSES),
    *(("C2", arm, "start") for arm in ("InfoNCE", "KL", "Gaussian W2")),
    *(("C3", arm, "InfoNCE, real") for arm in ("Gaussian W2", "1-D W, same questions")),
    *(("C4", "1-D W, synthetic + real", "InfoNCE, real"), ("C5", "1-D W, 2 grades", "InfoNCE")),
)
PARENT = {arm.name: arm.parent.name for arms in ABLATIONS.values() for arm in arms}
NAMES = ("BM25", "start", *(arm.name for arm in MAIN), *PARENT)
PLACE = {name: n for n, name in enumerate(NAMES)}

def _number(value: float, sign: str = "") -> str:
    text = f"{value:{sign}.3f}"
    return text if float(text) else "0.000"  # not -0.000

def _p(p: float) -> str:
    return "< .001" if p < 0.001 else f"{p:.3f}".removeprefix("0")

def _spread(values: Sequence[float]) -> str:
    return _number(fmean(values)) + (f" ± {_number(stdev(values))}" if len(values) > 1 else "")

def _shown(one: Comparison | None) -> str:
    return "{} ({} to {})".format(*(_number(value, "+") for value in one[:3])) if one else ""

def _table(header: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    head = list(header)
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in (head, ["---"] * len(head), *rows))

def _by_arm(runs: Sequence[Run], start: str, group: str) -> dict[str, list[Run]]:
    """{arm: runs}: the main arms with the references, an ablation with the main arms that it varies."""
    here = [run for run in runs if run["start"] in (None, start)]
    own = {r["arm"] for r in here if r["group"] == group or (group == "main" and r["group"] == "references")}
    names = sorted(own | {PARENT.get(arm, arm) for arm in own}, key=lambda arm: (PLACE.get(arm, 99), arm))
    return {name: found for name in names if (found := [run for run in here if run["arm"] == name])}

def _order(names: Iterable[str]) -> list[str]:
    return sorted(names, key=lambda name: (name not in claims.IN_DOMAIN, name))

def _shared(runs: Iterable[Run]) -> list[str]:
    sets = [set(run["collections"]) for run in runs]  # what every run was scored on
    return _order(set.intersection(*sets) if sets else ())

def _mean(run: Run, names: Iterable[str], measure: str = "ndcg@10") -> float:
    return fmean(run["collections"][name]["metrics"][measure] for name in names)

def claims_table(
        runs: Sequence[Run], start: str, pairs: Sequence[tuple[str, str, str]] = claims.CLAIMS) -> str:
    """Differences with interval and p, and each collection alone; the five claims with their verdicts."""
    primary = pairs is claims.CLAIMS
    judged = [row for row in claims.judge(runs, start, pairs) if primary or row.comparison]
    names, rows = _order({name for row in judged for name in row.collections}), []
    for row in judged:
        first, *alone = [_shown(one) for one in (row.comparison, *map(row.collections.get, names))]
        p = "" if row.comparison is None else _p(row.p if primary else row.comparison.p)
        rows.append((row.claim, row.text, first, p, *[f"**{row.verdict}**"] * primary, *alone))
    head = ("corrected p", "verdict") if primary else ("p",)
    return _table(("claim", "compared", "difference", *head, *names), rows)

def means_table(runs: Sequence[Run], start: str, group: str, measure: str = "ndcg@10") -> str:
    """Arms by collections, mean ± deviation over seeds; empty where a run of the arm was not scored."""
    arms = _by_arm(runs, start, group)
    every = [run for found in arms.values() for run in found]
    votes = [name for name in _shared(every) if name not in claims.NO_VOTE]
    columns = [votes, *([name] for name in _order({name for run in every for name in run["collections"]}))]
    rows = []
    for arm, found in arms.items():
        known = [c if c and set(c) <= set(_shared(found)) else [] for c in columns]
        cells = [_spread([_mean(run, c, measure) for run in found]) if c else "" for c in known]
        rows.append((arm, ", ".join(str(run["seed"]) for run in found if run["seed"] is not None), *cells))
    return _table(("arm", "seeds", f"mean of {len(votes)}", *(name for (name,) in columns[1:])), rows)

def curve(runs: Sequence[Run], start: str, group: str, setting: str) -> dict[str, dict[Any, list[float]]]:
    """{main arm: {value of a setting: [mean nDCG@10 over voting collections that all share, one a seed]}}.

    The main arm's own run is a point of the ablation, unless the group has a run with that value."""
    found = [r for arm in _by_arm(runs, start, group).values() for r in arm if setting in r["settings"]]
    votes = [name for name in _shared(found) if name not in claims.NO_VOTE]
    lines: dict[str, dict[Any, list[float]]] = {}
    own = {(PARENT.get(r["arm"]), r["settings"][setting]) for r in found if r["group"] == group}
    for run in found:
        arm, x = PARENT.get(run["arm"], run["arm"]), run["settings"][setting]
        if run["group"] == group or (arm, x) not in own:
            lines.setdefault(arm, {}).setdefault(x, []).append(_mean(run, votes))
    return {arm: dict(sorted(line.items())) for arm, line in lines.items()}

def _tuning_table(tuning: dict[str, Any], start: str) -> str:
    rows, spaces = [], {arm.name: {"lr": STARTS[start].lrs, **arm.space} for arm in MAIN if start in STARTS}
    for arm, found in sorted(tuning.items(), key=lambda item: (PLACE.get(item[0], 99), item[0])):
        values, best = [trial["ndcg@10"] for trial in found["trials"]], []
        for key, value in found["best"].items():
            space = spaces.get(arm, {}).get(key, ())
            best.append(f"{key} {value}" + " (edge)" * (len(space) > 2 and value in (min(space), max(space))))
        scores = map(_number, (found["start"], median(values), max(values)))
        rows.append((arm, len(values), *scores, ", ".join(best)))
    return _table(("arm", "trials", "start", "median trial", "best trial", "best settings"), rows)

def _provenance(runs: Sequence[Run]) -> str:
    found: dict[tuple[str, ...], list[float]] = {}
    for run in runs:
        places = [("trained", run["minutes"], run["trained"])] if run["seed"] is not None else []
        for what, minutes, at in places + [("scored", 0.0, place) for place in run["collections"].values()]:
            machine = ", ".join(f"{key} {value}" for key, value in at["machine"].items())
            found.setdefault((what, str(at["commit"]), at["dtype"], machine), []).append(minutes)
    rows = [(*key, len(minutes), f"{sum(minutes):.1f}") for key, minutes in sorted(found.items())]
    return _table(("", "commit", "format", "machine", "times", "minutes of training"), rows)

def summary(folder: Path) -> str:
    """README's few lines: where and how, then the five claims by start, at most 900 bytes."""
    runs = claims.read_runs(folder)
    starts = sorted({run["start"] for run in runs} - {None}, key=lambda name: (name != "base", name))
    judged = {start: claims.judge(runs, start) for start in starts}
    cells = {start: [row.verdict + (", " + _shown(row.comparison)) * bool(row.comparison) for row in rows]
             for start, rows in judged.items()}
    rows = [(row.claim, row.text.replace(" collections only", ""), *(cells[start][n] for start in starts))
            for n, row in enumerate(judged[starts[0]])]
    main = [run for run in runs if run["group"] == "main"]
    about = []
    for start in starts:
        own = [run for run in main if run["start"] == start]
        at = sorted({f"{run['trained']['machine']['device']} {run['trained']['dtype']}" for run in own})
        about.append(f"`{start}`: {len({run['seed'] for run in own})} seeds at most, {', '.join(at)}")
    votes = _order({name for run in runs for name in run["collections"]} - set(claims.NO_VOTE))
    text = f"nDCG@10, mean difference over {', '.join(votes)}, with its 95 % interval. {'; '.join(about)}. "
    text += "Rule and all tables: [results](repro/experiment/results/README.md)."
    return f"{text}\n\n{_table(('', 'compared', *starts), rows)}\n"

def report(folder: Path) -> str:
    """The whole page from a folder of records.  Raises ValueError if it has none, or for a bad one."""
    runs, tuning = claims.read_runs(folder), claims.read_tuning(folder)
    if not runs:
        raise ValueError(f"{folder}: has no record of a run; `python -m repro.experiment.run` makes them")
    found, yes = {name: one for run in runs for name, one in run["collections"].items()}, ("yes", "no")
    rows = [(name, found[name]["passages"], found[name]["queries"]) for name in _order(found)]
    rows = [(*r, yes[r[0] in claims.IN_DOMAIN], yes[r[0] in claims.NO_VOTE]) for r in rows]
    parts = [TITLE, RULE, HOW, _table(("collection", "passages", "queries", "shifted", "vote"), rows)]
    for start in sorted({run["start"] for run in runs} - {None}, key=lambda name: (name != "base", name)):
        here = [run for run in runs if run["start"] in (None, start)]
        seeds = sorted({run["seed"] for run in here if run["group"] == "main"})
        about = f"from `{start}`, seeds {', '.join(map(str, seeds))}"
        parts += [f"## From `{start}`", f"The claims, {about}:", claims_table(here, start)]
        for measure, name in (("ndcg@10", "nDCG@10"), ("mrr@10", "MRR@10"), ("recall@100", "Recall@100")):
            parts += [f"{name} of all arms, {about}:", means_table(here, start, "main", measure)]
        parts += [f"Secondary comparisons (p not corrected), {about}:", claims_table(here, start, SECONDARY)]
        for group in sorted({run["group"] for run in here} - {"references", "main"}):
            parts += [f"Ablation: {group}, from `{start}`:", means_table(here, start, group)]
        if start in tuning:
            with claims.naming(str(folder / "tuning.json")):
                trials = _tuning_table(tuning[start], start)
            parts += [f"Tuning from `{start}`, nDCG@10 on development data, seed 0:", trials]
        parts += [f"Where all runs from `{start}` were made:", _provenance(here)]
    if (path := folder / "bench.json").exists():
        with claims.naming(str(path)):
            bench = json.loads(path.read_text(encoding="utf-8"))
            machine = ", ".join(f"{key} {value}" for key, value in bench["machine"].items())
            rows = [row.values() for row in bench["rows"]]
            parts += ["## Speed", f"On {machine}:", _table(bench["rows"][0], rows)]
    return "\n\n".join(parts) + "\n"

def main(argv: list[str] | None = None) -> int:
    """Command line: write README.md of the results, or exit with 1 if it is not what would be written."""
    parser = argparse.ArgumentParser(prog="python -m repro.experiment.report", description=__doc__)
    parser.add_argument("--results", type=Path, default=claims.RESULTS, help="folder of the records")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if it is out of date")
    args, stale = parser.parse_args(argv), []

    def work() -> None:
        page = checked_output(args.results / "README.md", lambda line: line.strip() == TITLE)
        texts, readme = {page: report(args.results)}, AUTHORED.parents[1] / "README.md"
        if args.results == claims.RESULTS:
            before, _, rest = readme.read_text(encoding="utf-8").partition(MARKS[0])
            after = rest.partition(MARKS[1])[2]
            if after:
                texts[readme] = f"{before}{MARKS[0]}\n{summary(args.results)}{MARKS[1]}{after}"
            else:
                print(f"{readme}: has no marks {' ... '.join(MARKS)}, so it stays as it is", file=sys.stderr)
        for path, text in texts.items():
            if not args.check:
                with writing(path) as sink:
                    sink.write(text)
            elif not path.exists() or path.read_text(encoding="utf-8") != text:
                print(f"{path}: out of date; `python -m repro.experiment.report` writes it", file=sys.stderr)
                stale.append(path)

    return ending(work) or len(stale)

if __name__ == "__main__":
    sys.exit(main())
