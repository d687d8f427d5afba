"""The page of results and its two figures, from the records alone."""

import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import pandas as pd

from repro import plots
from repro.compare import Comparison
from repro.experiment import claims
from repro.experiment.arms import (
    ABLATION_SEEDS,
    ABLATION_START,
    ABLATIONS,
    BY_NAME,
    FOUR,
    MAIN,
    REFERENCES,
    STARTS,
)
from repro.experiment.claims import COLLECTIONS, FAMILIES
from repro.support.files import run_command, write_text

README = Path(__file__).parents[2] / "README.md"
BLOCK = re.compile(r"(<!-- results -->\n).*?(<!-- /results -->)", re.S)
PROTOCOL, OLD = "739ec7c", "bebf54e"  # commits: the rule before its first run; the old records
ASKED = """Does training on graded synthetic lists with a Wasserstein loss do what the abstract
says? Five claims, two starts, two families: the released Gaussian W2 and the kit's 1-D W."""
LIMITS = """Limits: 1,260 lists by one writer, small encoders, seven small collections; the kit's
own prompts; `all-minilm-l6-v2` has learned from human labels."""
TUNING = """Four learning rates an arm; where the best lay at an edge, more beyond it, so that no
choice lies at an edge."""
WORDS = {
    "C1": "C1: graded lists with W beat InfoNCE on the same passages",
    "C2": "C2: training on them improves the start, without any real document",
    "C3": "C3: on other domains it beats InfoNCE on real data",
    "C4": "C4: adding real passages helps further",
    "C5": "C5: four levels beat two",
}
AXES = {"temperature": "multiple", "label temperature": "label_temperature", "queries": "queries"}
RULE = f"""A difference is the mean over collections of the mean paired difference in nDCG@10, seeds
averaged query by query. In brackets: its 95 % bootstrap interval, queries drawn anew within
collections. p is that of a stratified paired permutation test; for the five claims of a family
it is corrected by Holm. A claim *holds* if the corrected p is at most {claims.LEVEL} and the
difference above 0; it is *reversed* if that p is at most {claims.LEVEL} and the difference
below 0; else there is *no gain of .01* if the interval ends below +.01; else it is *undecided*.
The protocol was changed after seeing the first four collections, so the fresh three
({", ".join(claims.FRESH)}), which no earlier run had been scored on, also stand alone. Rule and
arms: commit {PROTOCOL}, before the first run. The records and verdicts of the protocol before
it are in commit {OLD}."""
AGAIN = """The seven folders lie in one folder, DATA; `cached_prompts/README.md` says how each is
built.

    python -m repro.experiment.run --data DATA
    python -m repro.experiment.report

A stopped run goes on. Records: `runs.jsonl` (a line a run), `per_query.csv.gz` (nDCG@10 of each
query), `tuning.json` (development data)."""


def shown(found: Comparison | None) -> str:
    """+.010 (.005 to .016), or nothing where nothing was measured."""
    if found is None:
        return ""
    text = f"{found.difference:+z.3f} ({found.low:z.3f} to {found.high:z.3f})"
    return text.replace("0.", ".")


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table in markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def judged_table(judged: Iterable[claims.Judged]) -> str:
    """Claims or rungs, a row each."""
    rows = []
    for row in judged:
        found = (shown(row.whole), f"{row.p:.4f}", row.verdict, shown(row.fresh))
        words = WORDS.get(row.label, row.label)
        rows.append((words, f"{row.better} over {row.than}", *found))
    return table(("what", "arms", "difference", "p", "verdict", "fresh three"), rows)


def claims_table(runs: pd.DataFrame, start: str) -> str:
    """The five claims of both families, with verdicts."""
    return judged_table(row for family in FAMILIES for row in claims.judge(runs, start, family))


def ladder_rows(runs: pd.DataFrame, start: str) -> dict[str, tuple[float, float, float]]:
    """{what a rung changes: (difference, low, high)}."""
    return {rung.label: rung.whole[:3] for rung in claims.ladder(runs, start)}


def spread(values: Sequence[float]) -> str:
    """Mean ± deviation over seeds."""
    text = f"{fmean(values):.3f}"
    if len(values) > 1:
        text += f" ± {stdev(values):.3f}"
    return text


def arm_means(runs: pd.DataFrame, start: str) -> dict[str, pd.DataFrame]:
    """{arm: mean nDCG@10, a row a seed, a column a collection} of the references and main arms."""
    names = [arm.name for arm in (*REFERENCES, *MAIN)]
    found = {name: claims.means(runs, start, name) for name in names}
    return {name: means for name, means in found.items() if len(means)}


def means_table(runs: pd.DataFrame, start: str) -> str:
    """Arms by collections, nDCG@10."""
    rows = []
    for name, means in arm_means(runs, start).items():
        each = [spread(means[collection]) for collection in COLLECTIONS]
        rows.append((name, len(means), spread(means.mean(axis=1)), *each))
    return table(("arm", "runs", "mean of seven", *COLLECTIONS), rows)


def curve(runs: pd.DataFrame, group: str) -> dict[str, dict[float, list[float]]]:
    """{loss: {value of what a group of ablations changes: [mean nDCG@10, one a seed]}}."""
    curves: dict[str, dict[float, list[float]]] = {}
    for name in FOUR:
        arms = [arm for arm in ABLATIONS[group] if arm.tuned_as == name]
        if arms and group != "queries":
            arms.append(BY_NAME[name])  # where the setting is as in the main runs
        points = {}
        for arm in arms:
            means = claims.means(runs, ABLATION_START, arm.name)[:ABLATION_SEEDS]
            if len(means):
                points[getattr(arm, AXES[group])] = means.mean(axis=1).tolist()
        if points:
            curves[name] = dict(sorted(points.items()))
    return curves


def curve_table(runs: pd.DataFrame, group: str) -> str:
    """A group of ablations: losses by values."""
    curves = curve(runs, group)
    values = sorted({value for points in curves.values() for value in points})
    rows = []
    for name, points in curves.items():
        cells = [spread(points[value]) if value in points else "" for value in values]
        rows.append((name, *cells))
    return table((group, *(f"{value:g}" for value in values)), rows)


def tuning_table(trials: dict[str, dict[str, float]]) -> str:
    """Development nDCG@10 of each learning rate; the best one bold."""
    rates = sorted({rate for found in trials.values() for rate in found}, key=float)
    rows = []
    for arm, found in trials.items():
        cells = {rate: f"{value:.3f}" for rate, value in found.items()}
        best = max(found, key=found.get)
        cells[best] = f"**{cells[best]}**"
        rows.append((arm, *(cells.get(rate, "") for rate in rates)))
    return table(("arm", *rates), rows)


def measured(runs: pd.DataFrame) -> list[str]:
    """The starts that have runs."""
    return [start for start in STARTS if (runs["start"] == start).any()]


def findings(runs: pd.DataFrame) -> list[str]:
    """What came out, a sentence a start and family and one a ladder; no more than the tests say."""
    lines = []
    for start in STARTS:
        if start not in measured(runs):
            lines.append(f"From `{start}` nothing was run yet.")
            continue
        for family in FAMILIES:
            rows = claims.judge(runs, start, family)
            parts = [f"{row.label} {row.verdict} ({shown(row.whole)})" for row in rows]
            lines.append(f"From `{start}`, {family}: {'; '.join(parts)}.")
        parts = []
        for rung in claims.ladder(runs, start):
            word = "" if rung.p <= claims.LEVEL else "no difference shown, "
            parts.append(f"{rung.label} {word}{shown(rung.whole)}")
        lines.append(f"The ladder from `{start}`, p not corrected: {'; '.join(parts)}.")
    return lines


def summary(runs: pd.DataFrame) -> str:
    """README's block: the five claims by start and family, and the levels."""
    head, columns, levels = ["claim"], [], []
    for start in measured(runs):
        for family in FAMILIES:
            head.append(f"`{start}`, {family}")
            columns.append(claims.judge(runs, start, family))
        means = {name: fmean(found.mean(axis=1)) for name, found in arm_means(runs, start).items()}
        best = max(means.keys() - {"BM25"}, key=means.get)
        shown_levels = [f"{name} {means[name]:.3f}" for name in ("BM25", "start", best)]
        levels.append(f"From `{start}`: {', '.join(shown_levels)}.")
    rows = []
    for same in zip(*columns, strict=True):
        cells = [f"{row.verdict}, {shown(row.whole)}" for row in same]
        rows.append((WORDS[same[0].label], *cells))
    scores = "Mean nDCG@10, the last one of the best arm. " + " ".join(levels)
    return f"{table(head, rows)}\n\n{scores}\n"


def places(records: Sequence[dict[str, Any]]) -> str:
    """Which code made the runs, on which machine."""
    found = set()
    for record in records:
        machine, dtype = record["place"]["machine"], record["place"]["dtype"]
        where = f"{machine['device']} {machine['processor']}, {dtype}, torch {machine['torch']}"
        found.add(f"{record['place']['commit']} ({where})")
    return "; ".join(sorted(found))


def page(
    runs: pd.DataFrame, records: Sequence[dict[str, Any]], tuning: dict[str, dict[str, Any]]
) -> str:
    """The whole page."""
    parts = ["# Results", ASKED, *(f"- {line}" for line in findings(runs)), LIMITS]
    parts += ["## How a verdict is made", RULE]
    for start in measured(runs):
        parts += [f"## From `{start}`", claims_table(runs, start)]
        rungs = judged_table(claims.ladder(runs, start))
        parts += ["The ladder, a rung a row (p not corrected):", rungs]
        parts += ["Means, nDCG@10, ± deviation over seeds:", means_table(runs, start)]
    parts += ["![The ladder](ladder.png)", f"## Ablations, from `{ABLATION_START}`, three seeds"]
    parts += [curve_table(runs, group) for group in ABLATIONS if curve(runs, group)]
    parts += ["![nDCG@10 against the temperature](temperature.png)", "## Tuning"]
    for start, trials in tuning.items():
        parts += [f"From `{start}`, nDCG@10 on development data. {TUNING}", tuning_table(trials)]
    parts += [
        "## Again",
        AGAIN,
        f"Made by {places(records)}; +: some file, such as a record, had changed since.",
    ]
    return "\n\n".join(parts) + "\n"


def draw_ladder(runs: pd.DataFrame, path: Path) -> None:
    """The rungs of every start as differences with intervals."""
    rows: dict[str, dict[str, tuple[float, float, float]]] = {}
    for start in measured(runs):
        for label, found in ladder_rows(runs, start).items():
            rows.setdefault(label, {})[start] = found
    figure, (axis,) = plots.panels(1, 7.5, 3.0)
    plots.forest(axis, rows)
    title = "What each rung of the ladder changes (95 % interval)"
    plots.label(axis, title, "difference in nDCG@10 (0 to 1), mean of seven collections", "")
    figure.savefig(path, dpi=110, metadata={"Software": None})


def draw_temperature(runs: pd.DataFrame, path: Path) -> None:
    """Mean nDCG@10 against the multiple of the fitted temperature, a line a loss."""
    figure, (axis,) = plots.panels(1, 7.5, 3.6)
    plots.lines(axis, curve(runs, "temperature"))
    axis.set_xscale("log", base=2)
    title = "What a temperature beside the fitted one costs"
    plots.label(axis, title, "multiple of the fitted temperature", "nDCG@10, mean of seven")
    figure.savefig(path, dpi=110, metadata={"Software": None})


def main() -> int:
    """Write the page, its figures and README's block."""

    def work() -> None:
        folder = claims.RESULTS
        runs = claims.read_runs(folder)
        text = page(runs, claims.read_records(folder), claims.read_tuning(folder))
        draw_ladder(runs, folder / "ladder.png")
        draw_temperature(runs, folder / "temperature.png")
        write_text(folder / "README.md", text)
        readme = README.read_text(encoding="utf-8")
        write_text(README, BLOCK.sub(rf"\g<1>{summary(runs)}\g<2>", readme))

    return run_command(work)


if __name__ == "__main__":
    sys.exit(main())
