"""The page of results, and README's table of verdicts, from the records alone."""

import argparse
import json
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import fmean, stdev

from repro.checkpoints import ending, one_line, writing
from repro.experiment import claims
from repro.experiment.arms import ABLATIONS, MAIN, STARTS
from repro.experiment.claims import CLAIMS, NO_VOTE, Run
from repro.metrics import MEASURES

README, TITLE = Path(__file__).parents[2] / "README.md", "# Results, by `python -m repro.experiment.report`"
BLOCK = re.compile(r"(<!-- results -->\n).*?(<!-- /results -->)", re.S)
RULE = f"""Scores are nDCG@10 unless a table says otherwise, mean ± deviation over seeds. A difference is the
mean over collections of the mean paired difference in nDCG@10, seeds averaged query by query; in brackets its
95 % bootstrap interval (queries drawn anew within collections); p is that of a stratified paired permutation
test. A collection without a vote ({", ".join(NO_VOTE)}) stays out of it, and of means over collections. A
claim *holds* if p, Holm-corrected over the five claims of a start, is at most {claims.LEVEL} and the
difference above 0; it *does not hold* if that p is at most {claims.LEVEL} and the difference below 0, or if
the interval ends below {claims.WORTHWHILE}; else it is *undecided*. Empty: a seed was not run. "InfoNCE" is
the released binary recipe; "all lower" has negatives 2, 1, 0, "middle left out" 0; "start" is untrained."""
HOW = """Two commands make every row, from nothing (start one for each core with OMP_NUM_THREADS=1; a stopped
one goes on) and from the records; `--start base --data sample` adds that column. The names are BEIR folders;
wikiqa has the ids of wikiqa-graded.jsonl; `cached_prompts/README.md` says how to build dl19-pool.
```
python -m repro.experiment.run --wikiqa wikiqa --data dl19-pool wikiqa scifact cranfield
python -m repro.experiment.report
```"""
LOSSES = ("InfoNCE, all lower", "InfoNCE, middle left out", "KL", "Gaussian W2")
SECONDARY = (*(("C1", arm, "InfoNCE") for arm in LOSSES), *(("C1", "1-D W", arm) for arm in LOSSES),
             *(("C2", arm, "start") for arm in ("InfoNCE", "KL", "Gaussian W2")),
             *(("C3", arm, "InfoNCE, real") for arm in ("Gaussian W2", "1-D W, same questions")),
             ("C4", "1-D W, synthetic + real", "InfoNCE, real"), ("C5", "1-D W, 2 grades", "InfoNCE"))
PARENT = {arm.name: arm.parent.name for arms in ABLATIONS.values() for arm in arms}
NAMES = ["BM25", "start", *(arm.name for arm in MAIN), *PARENT]

def _shown(one: claims.Comparison | None) -> str:
    return "{:+z.3f} ({:z.3f} to {:z.3f})".format(*one).replace("0.", ".") if one else ""

def _table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    return "\n".join(f"| {' | '.join(map(str, row))} |" for row in (head, ["---"] * len(head), *rows))

def _order(names: Iterable[str]) -> list[str]:
    return sorted(names, key=lambda name: (name not in claims.IN_DOMAIN, name))

def _mean(run: Run, names: Iterable[str], measure: str = "ndcg@10") -> float:
    return fmean(run["collections"][name]["metrics"][measure] for name in names)

def _by_arm(runs: Sequence[Run], start: str, group: str) -> tuple[dict[str, list[Run]], list[str], list[str]]:
    """{arm: runs} of a group and its references or main arms; all collections; those shared, with a vote."""
    here = [run for run in runs if run["start"] in (None, start)]
    own = {r["arm"] for r in here if group == ("main" if r["group"] == "references" else r["group"])}
    names = sorted(own | {PARENT.get(arm, arm) for arm in own}, key=NAMES.index)
    arms = {name: found for name in names if (found := [run for run in here if run["arm"] == name])}
    scored = [set(run["collections"]) for found in arms.values() for run in found]
    return arms, _order(set().union(*scored)), _order(set.intersection(*scored or [set()]) - {*NO_VOTE})

def claims_table(runs: Sequence[Run], start: str, pairs: Sequence[tuple[str, str, str]] = CLAIMS) -> str:
    """Differences with interval and p, and each collection alone; the five claims with their verdicts."""
    primary, judged = pairs is CLAIMS, claims.judge(runs, start, pairs)
    names = _order({name for row in judged for name in row.collections})
    rows = [(r.claim, r.text, _shown(r.comparison), f"{r.comparison.p:.4f}" if r.comparison else "",
             *(f"{r.p:.4f}", f"**{r.verdict}**") * primary, *(_shown(r.collections.get(c)) for c in names))
            for r in judged if primary or r.comparison]
    return _table(("claim", "arms", "difference", "p", *("corrected p", "verdict") * primary, *names), rows)

def means_table(runs: Sequence[Run], start: str, group: str, measure: str = "ndcg@10") -> str:
    """Arms by collections, mean ± deviation over seeds; empty where a run of the arm was not scored."""
    (arms, names, votes), rows = _by_arm(runs, start, group), []
    for arm, found in arms.items():
        cells = [arm, sum(run["seed"] is not None for run in found)]
        for column in (votes, *([name] for name in names)):
            whole = column and all(run["collections"].keys() >= {*column} for run in found)
            values = [_mean(run, column, measure) for run in found] if whole else []
            cells.append(" ± ".join(f"{of(values):.3f}" for of in (fmean, stdev)[: len(values)]))
        rows.append(cells)
    return _table(("arm", "seeds", f"mean of {len(votes)}", *names), rows)

def curve(runs: Sequence[Run], start: str, group: str, setting: str) -> dict[str, dict]:
    """{main arm: {value of a setting: [mean nDCG@10 over voting collections that all share, one a seed]}}."""
    (arms, _, votes), lines = _by_arm(runs, start, group), {}
    for arm, found in reversed(arms.items()):  # an ablation before its main arm, a point where it has none
        if votes and setting in found[0]["settings"]:
            line = lines.setdefault(PARENT.get(arm, arm), {})
            line.setdefault(found[0]["settings"][setting], [_mean(run, votes) for run in found])
    return {arm: dict(sorted(lines[arm].items())) for arm in sorted(lines, key=NAMES.index)}

def summary(runs: Sequence[Run]) -> str:
    """README's block, at most 900 bytes: what was measured, in one line, and the five claims by start."""
    rows, seeds = [], {}
    for same in zip(*(claims.judge(runs, start) for start in STARTS), strict=True):
        cells = [one.verdict + (f", {_shown(one.comparison)}" if one.comparison else "") for one in same]
        rows.append((f"{same[0].claim}: {same[0].text}", *cells))
    for run in (run for run in runs if run["group"] == "main"):
        place = "{start}: {trained[dtype]}, {trained[machine][device]} {trained[machine][processor]}, seeds"
        seeds.setdefault(place.format(**run), {}).setdefault(run["arm"], []).append(run["seed"])
    names = ", ".join(_order({name for run in runs for name in run["collections"]} - {*NO_VOTE}))
    for place, arms in seeds.items():  # the arms of an unfinished start may have unequally many
        seeds[place] = " or ".join(sorted({" ".join(map(str, sorted(found))) for found in arms.values()}))
    table, about = _table(("", *STARTS), rows), f"{names}. " + "; ".join(map(" ".join, sorted(seeds.items())))
    text = f"nDCG@10 difference, 95 % interval (“does not hold”: ends below {claims.WORTHWHILE}), on {about}."
    return f"{one_line(text, 897 - len(table.encode()))}\n\n{table}\n"

def report(runs: Sequence[Run], tuning: dict[str, dict]) -> str:
    """The whole page, from what `claims.read_runs` and `claims.read_tuning` return."""
    scored = {name: one for run in runs for name, one in run["collections"].items()}
    rows = [(name, scored[name]["passages"], scored[name]["queries"]) for name in _order(scored)]
    parts = [TITLE, RULE, HOW, _table(("collection", "passages", "queries"), rows)]
    for start in (start for start in STARTS if any(run["start"] == start for run in runs)):
        code = ", ".join(sorted({str(run["trained"]["commit"]) for run in runs if run["start"] == start}))
        parts += [f"## From `{start}`", f"Trained by {code} (+: with uncommitted changes). The claims:"]
        parts += [claims_table(runs, start), "Secondary, p not corrected, no verdict:"]
        parts += [claims_table(runs, start, SECONDARY)]
        for group, measure in [("main", each) for each in MEASURES] + [(one, "ndcg@10") for one in ABLATIONS]:
            if any((run["start"], run["group"]) == (start, group) for run in runs):
                parts += [f"{group}, {measure}, from `{start}`:", means_table(runs, start, group, measure)]
        rows = []
        for arm in sorted(tuning.get(start, ()), key=NAMES.index):
            found, shown = tuning[start][arm], []
            for key, value in found["best"].items():
                tried = {trial[key] for trial in found["trials"]}
                edge = len(tried) > 2 and value in (min(tried), max(tried))
                shown.append(f"{key} {value}" + " (edge)" * edge)
            scores = f"{found['start']:.3f}", f"{max(trial['ndcg@10'] for trial in found['trials']):.3f}"
            rows.append((arm, len(found["trials"]), *scores, ", ".join(shown)))
        parts += ["Tuning, on WikiQA's questions over all its sentences, and on held-out lists:"]
        parts += [_table(("arm", "trials", "start", "best", "with"), rows)]
    if (path := claims.RESULTS / "bench.json").exists():
        at, rows = map(json.loads(path.read_text(encoding="utf-8")).get, ("machine", "rows"))
        where = ", ".join(f"{key} {value}" for key, value in at.items())
        parts += [f"## Speed\n\nBy `tests/bench/bench.py --data dl19-pool`, medians of turns; {where}:",
                  _table(rows[0], map(dict.values, rows))]
    return "\n\n".join(parts) + "\n"

def main(argv: list[str] | None = None) -> int:
    """Command line: write both pages, or with --check end with an error if one is out of date."""
    parser = argparse.ArgumentParser("python -m repro.experiment.report", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; fail if a page is out of date")
    check = parser.parse_args(argv).check

    def work() -> None:
        runs, readme = claims.read_runs(claims.RESULTS), README.read_text(encoding="utf-8")
        with claims.naming(claims.RESULTS):
            texts = {claims.RESULTS / "README.md": report(runs, claims.read_tuning(claims.RESULTS))}
            texts[README], count = BLOCK.subn(lambda marks: marks[1] + summary(runs) + marks[2], readme)
        if not count:
            print(f"{README}: without <!-- results --> and <!-- /results --> it stays", file=sys.stderr)
        for path, text in texts.items():
            if not check:
                with writing(path) as sink:
                    sink.write(text)
            elif not path.exists() or path.read_text(encoding="utf-8") != text:
                raise ValueError(f"{path}: out of date; `python -m repro.experiment.report` writes it")
    return ending(work)

if __name__ == "__main__":
    sys.exit(main())
