"""The page of results and its two figures, from the records alone."""

import re
import sys
from collections.abc import Iterable, Sequence
from itertools import chain
from operator import attrgetter
from pathlib import Path

import pandas as pd

from repro import plots
from repro.compare import Comparison
from repro.experiment import claims
from repro.experiment.arms import (
    ABLATION_SEEDS,
    ABLATION_START,
    ABLATIONS,
    BY_NAME,
    CHANGES,
    MAIN,
    REFERENCES,
    STARTS,
)
from repro.experiment.claims import COLLECTIONS, FAMILIES
from repro.support.files import run_command, write_text

README = Path(__file__).parents[2] / "README.md"
BLOCK = re.compile(r"(<!-- results -->\n).*?(<!-- /results -->)", re.S)
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
RULE = f"""A difference is the mean over collections of the mean paired difference in nDCG@10, seeds
averaged query by query. In brackets: its 95 % bootstrap interval, queries drawn anew within
collections. p is that of a stratified paired permutation test; for the five claims of a family
it is corrected by Holm. A claim *holds* if the corrected p is at most {claims.LEVEL} and the
difference above 0; it is *reversed* if that p is at most {claims.LEVEL} and the difference
below 0; else there is *no gain of .01* if the interval ends below +.01; else it is *undecided*.
The protocol was changed after seeing the first four collections, so the fresh three
({", ".join(claims.FRESH)}), which no earlier run had been scored on, also stand alone. Rule and
arms: commit 739ec7c, before the first run. The records and verdicts of the protocol before
it are in commit bebf54e."""
AGAIN = """The seven folders lie in one folder, DATA; `cached_prompts/README.md` says how each is
built.

    python -m repro.experiment.run --data DATA
    python -m repro.experiment.report

A stopped run goes on. Records: `runs.jsonl` (a line a run), `per_query.csv.gz` (nDCG@10 of each
query), `tuning.json` (development data)."""
MADE = "{commit} ({device} {processor}, {dtype}, torch {torch})"


def shown(found: Comparison | None) -> str:
    """+.010 (.005 to .016), or nothing where nothing was measured."""
    if found is None:
        return ""
    text = f"{found.difference:+z.3f} ({found.low:z.3f} to {found.high:z.3f})"
    return text.replace("0.", ".")


def table(head: Sequence[str], rows: Iterable[Sequence]) -> str:
    """A table in markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def grid(corner: str, cells: dict[str, dict]) -> str:
    """A table of {row: {number: text}}, a column a number."""
    frame = pd.DataFrame(cells).sort_index().fillna("")
    head = [corner, *(f"{number:g}" for number in frame.index)]
    return table(head, frame.T.itertuples())


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
    return judged_table(chain(*(claims.judge(runs, start, family) for family in FAMILIES)))


def ladder_rows(runs: pd.DataFrame, start: str) -> dict[str, tuple]:
    """{what a rung changes: (difference, low, high)}."""
    return {rung.label: rung.whole[:3] for rung in claims.ladder(runs, start)}


def spread(values: Iterable[float]) -> str:
    """Mean ± deviation over seeds."""
    mean, deviation = pd.Series(values).agg(["mean", "std"])
    return f"{mean:.3f} ± {deviation:.3f}".removesuffix(" ± nan")  # of one seed


def arm_means(runs: pd.DataFrame, start: str) -> dict[str, pd.DataFrame]:
    """{arm: mean nDCG@10, a row a seed, a column a collection} of the references and main arms."""
    frame = claims.means(runs, start, "arm", "seed", "collection").unstack()
    names = [arm.name for arm in REFERENCES + MAIN]
    return {name: frame.loc[name] for name in names if name in frame.index}


def means_table(runs: pd.DataFrame, start: str) -> str:
    """Arms by collections, nDCG@10."""
    rows = []
    for name, means in arm_means(runs, start).items():
        each = means[list(COLLECTIONS)].apply(spread)
        rows.append((name, len(means), spread(means.mean(axis=1)), *each))
    return table(("arm", "runs", "mean of seven", *COLLECTIONS), rows)


def curve(runs: pd.DataFrame, group: str) -> dict[str, dict]:
    """{loss: {value of what a group of ablations changes: [mean nDCG@10, one a seed]}}."""
    frame = claims.means(runs, ABLATION_START, "arm", "seed", "collection").unstack()
    means = frame.mean(axis=1)
    field, _, _, names = CHANGES[group]
    value = attrgetter(field)
    main = [BY_NAME[name] for name in names]
    curves = {}
    for arm in sorted(ABLATIONS[group] + main, key=value):
        if value(arm) and arm.name in means:  # the main arms' number of queries is 0: all
            points = curves.setdefault(arm.tuned_as or arm.name, {})
            points[value(arm)] = means[arm.name][:ABLATION_SEEDS].tolist()
    return curves


def curve_table(runs: pd.DataFrame, group: str) -> str:
    """A group of ablations: losses by values."""
    cells = {}
    for name, points in curve(runs, group).items():
        cells[name] = {value: spread(means) for value, means in points.items()}
    return grid(group, cells)


def tuning_table(trials: dict[str, dict]) -> str:
    """Development nDCG@10 of each learning rate; the best one bold."""
    cells = {}
    for arm, found in trials.items():
        cells[arm] = {float(rate): f"{value:.3f}" for rate, value in found.items()}
        best = max(found, key=found.get)
        cells[arm][float(best)] = f"**{found[best]:.3f}**"
    return grid("arm", cells)


def measured(runs: pd.DataFrame) -> list[str]:
    """The starts from which every main arm was run; a part of the arms gives no verdicts."""
    arms = runs.groupby("start")["arm"].agg(set)
    needed = {arm.name for arm in MAIN}
    return [start for start in STARTS if needed <= arms.get(start, set())]


def summary(runs: pd.DataFrame) -> str:
    """README's block, also the head of the page: five claims by start and family, the levels."""
    head = ["claim"]
    rows = {label: [words] for label, words in WORDS.items()}
    scores = "Mean nDCG@10, the last one of the best arm."
    for start in measured(runs):
        for family in FAMILIES:
            head.append(f"`{start}`, {family}")
            for row in claims.judge(runs, start, family):
                rows[row.label].append(f"{row.verdict}, {shown(row.whole)}")
        means = {name: found.mean(axis=None) for name, found in arm_means(runs, start).items()}
        best = max(means.keys() - {"BM25"}, key=means.get)
        levels = [f"{name} {means[name]:.3f}" for name in ("BM25", "start", best)]
        scores += f" From `{start}`: {', '.join(levels)}."
    return f"{table(head, rows.values())}\n\n{scores}"


def page(runs: pd.DataFrame, records: list[dict], tuning: dict) -> str:
    """The whole page."""
    done = f"All arms were run from {', '.join(measured(runs))}, of the starts {', '.join(STARTS)}."
    parts = ["# Results", ASKED, done, summary(runs), LIMITS, "## How a verdict is made", RULE]
    for start in measured(runs):
        parts += [f"## From `{start}`", claims_table(runs, start)]
        rungs = judged_table(claims.ladder(runs, start))
        parts += ["The ladder, a rung a row (p not corrected):", rungs]
        parts += ["Means, nDCG@10, ± deviation over seeds:", means_table(runs, start)]
    parts += ["![The ladder](ladder.png)", f"## Ablations, from `{ABLATION_START}`, three seeds"]
    parts += [curve_table(runs, group) for group in CHANGES]
    parts += ["![nDCG@10 against the temperature](temperature.png)", "## Tuning"]
    for start, trials in tuning.items():
        parts += [f"From `{start}`, nDCG@10 on development data. {TUNING}", tuning_table(trials)]
    places = [record["place"] for record in records]
    made = sorted({MADE.format(**place, **place["machine"]) for place in places})
    text = f"Made by {'; '.join(made)}; +: some file, such as a record, had changed since."
    return "\n\n".join([*parts, "## Again", AGAIN, text]) + "\n"


def draw(runs: pd.DataFrame, folder: Path) -> None:
    """ladder.png: what each rung changes.  temperature.png: nDCG@10 against the temperature."""
    rows = {}
    for start in measured(runs):
        for label, found in ladder_rows(runs, start).items():
            rows.setdefault(label, {})[start] = found
    figure, (axis,) = plots.panels(1, 7.5, 3.0)
    plots.forest(axis, rows)
    title = "What each rung of the ladder changes (95 % interval)"
    plots.label(axis, title, "difference in nDCG@10 (0 to 1), mean of seven collections", "")
    figure.savefig(folder / "ladder.png", dpi=110)
    figure, (axis,) = plots.panels(1, 7.5, 3.6)
    plots.lines(axis, curve(runs, "temperature"))
    axis.set_xscale("log", base=2)
    title = "What a temperature beside the fitted one costs"
    plots.label(axis, title, "multiple of the fitted temperature", "nDCG@10, mean of seven")
    figure.savefig(folder / "temperature.png", dpi=110)


def write() -> None:
    """Write the page, its figures and README's block."""
    folder = claims.RESULTS
    runs = claims.read_runs(folder)
    text = page(runs, claims.read_records(folder), claims.read_tuning(folder))
    draw(runs, folder)
    write_text(folder / "README.md", text)
    readme = README.read_text(encoding="utf-8")
    write_text(README, BLOCK.sub(rf"\g<1>{summary(runs)}\n\g<2>", readme))


if __name__ == "__main__":
    sys.exit(run_command(write))
