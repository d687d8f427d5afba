"""Turn the run records into the tables of the README: `python -m repro.report --readme README.md`.

Reads `repro/results/GROUP/*.json` and `tuning.json`, averages seeds query by query, tests differences
(`stats`), judges the claims (`claims`), and writes Markdown.  With `--readme` the block between the two
`results` marks of that file is replaced; nothing is typed by hand.
"""

import argparse
import json
import statistics
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from repro.arms import ABLATIONS, MAIN
from repro.claims import NO_VOTE, Record, collections_of, differences, judge
from repro.files import replacing
from repro.stats import Comparison, seed_summary

RESULTS = Path(__file__).parent / "results"
BEGIN, END = "<!-- results: written by `python -m repro.report --readme README.md` -->", "<!-- end of results -->"
FIXED = ("BM25", "base", "supervised")  # nothing of them is drawn: one run each


class ReportError(ValueError):
    """Records that are missing or cannot be read."""


def read_records(folder: Path) -> list[Record]:
    """All run records below `folder`, ordered by group, arm and seed.  ReportError names a bad file."""
    records = []
    for path in sorted(folder.glob("*/*.json")):
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            {record[key] for key in ("group", "arm", "seed")}
            [values["per_query"] for values in record["collections"].values()]
            records.append(record)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ReportError(f"{path}: expected a run record, but {type(error).__name__}: {error}") from error
    if not records:
        raise ReportError(f"{folder}: expected run records, found none; `python -m repro.experiments` makes them")
    return records


def arms_of(records: Sequence[Record], group: str) -> list[str]:
    """The arms of a group, in the order in which `repro.arms` names them; unknown ones last."""
    known = {"references": list(FIXED), "main": [a.name for a in MAIN]} | {g: [a.name for a in arms] for g, arms in ABLATIONS.items()}
    order = known.get(group, [])
    found = {record["arm"] for record in records if record["group"] == group}
    return sorted(found, key=lambda arm: (order.index(arm) if arm in order else len(order), arm))


def shown(test: Comparison, p: float) -> str:
    """A difference with its interval and p, for one cell; bold if p <= .05."""
    text = f"{test.difference:+.3f} ({test.low:+.3f} to {test.high:+.3f}, p {p:.2g})"
    return f"**{text}**" if p <= 0.05 else text


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(header) + " |", "| " + " | ".join("---" for _ in header) + " |"]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def claims_table(records: Sequence[Record]) -> str:
    """Claim, comparison, difference on each collection, verdict."""
    names = collections_of(records)
    rows = []
    for claim, found, result in judge(records):
        sides = f"{claim.text}: *{claim.better[1]}* against *{claim.than[1]}*"
        rows.append([claim.claim, sides, *(shown(*found[n]) if n in found else "" for n in names), f"**{result}**"])
    return markdown(["claim", "what was compared (nDCG@10)", *names, "verdict"], rows)


def means_table(records: Sequence[Record], groups: Sequence[str], measure: str = "ndcg@10") -> str:
    """Arms by collections: mean over queries and seeds, and the deviation over seeds."""
    names = collections_of([r for r in records if r["group"] in groups])
    rows = []
    for group in groups:
        for arm in arms_of(records, group):
            runs = [r for r in records if (r["group"], r["arm"]) == (group, arm)]
            cells = []
            for name in names:
                values = [r["collections"][name]["metrics"][measure] for r in runs if name in r["collections"]]
                mean, deviation = seed_summary(values) if values else (None, None)
                cells.append("" if mean is None else f"{mean:.3f}" + (f" ± {deviation:.3f}" if deviation is not None else ""))
            rows.append([arm, *cells])
    return markdown([measure, *names], rows)


def differences_table(records: Sequence[Record], reference: tuple[str, str]) -> str:
    """Every main arm against one arm: difference, interval, p (Holm over the collections)."""
    names = collections_of(records)
    rows = []
    for group in ("references", "main"):
        for arm in arms_of(records, group):
            if (group, arm) != reference:
                found = differences(records, (group, arm), reference, names)
                rows.append([arm, *(shown(*found[n]) if n in found else "" for n in names)])
    return markdown([f"nDCG@10 minus that of {reference[1]}", *names], rows)


def curves(records: Sequence[Record], group: str, setting: str, measure: str = "ndcg@10") -> dict[str, dict[str, dict[float, float]]]:
    """{main arm: {collection: {value of a setting: mean}}} of an ablation, for `plots.lines_figure`."""
    values: dict[tuple[str, str, float], list[float]] = defaultdict(list)
    for record in records:
        if record["group"] == group:
            for name, found in record["collections"].items():
                values[record["arm"].rpartition(", ")[0], name, record["training"][setting]].append(found["metrics"][measure])
    table: dict[str, dict[str, dict[float, float]]] = defaultdict(lambda: defaultdict(dict))
    for (arm, name, x), found in values.items():
        table[arm][name][x] = statistics.fmean(found)
    order = [arm.name for arm in MAIN if arm.name in table]
    return {arm: {name: table[arm][name] for name in collections_of(records) if name in table[arm]} for arm in order}


def tuning_table(tuning: dict[str, Any]) -> str:
    """What tuning chose for each arm, on the development queries."""
    rows = []
    for arm, found in tuning.items():
        best = ", ".join(f"{key} {value}" for key, value in found["best"].items())
        values = [trial["ndcg@10"] for trial in found["trials"]]
        rows.append([arm, str(len(values)), f"{found['start']:.3f}", f"{statistics.median(values):.3f}", f"{max(values):.3f}", best])
    return markdown(["arm", "trials", "nDCG@10 of the start", "median trial", "best trial", "its settings"], rows)


def provenance(records: Sequence[Record]) -> str:
    """Seeds, steps, machine, versions, minutes and sizes of what the tables show."""
    trained = [r for r in records if r["seed"] is not None] or list(records)
    machines = {", ".join(f"{key} {value}" for key, value in r["machine"].items()) for r in trained}
    seeds = sorted({r["seed"] for r in trained if r["seed"] is not None})
    minutes = sum(r["training"].get("minutes", 0) for r in trained)
    sizes = {
        name: f"{name}: {values['passages']} passages, {len(values['per_query'])} queries"
        for record in records for name, values in record["collections"].items()
    }  # fmt: skip
    commits = sorted({str(r["commit"]) for r in records})
    return (
        f"{len(trained)} trained models, seeds {', '.join(map(str, seeds))}, {minutes:.0f} minutes of training in all (scoring and "
        f"frozen layers not counted). {'; '.join(sizes[n] for n in collections_of(records))}. Machine: {'; '.join(sorted(machines))}. "
        f"Code: commit {', '.join(commits)} (+ means with uncommitted changes). Differences: paired over queries, seeds averaged; in "
        f"brackets the 95 % bootstrap interval and p of the permutation test, Holm-corrected over collections; bold is p <= .05. "
        f"{', '.join(NO_VOTE)} has no vote in a verdict."
    )


def report(records: Sequence[Record], tuning: dict[str, Any]) -> str:
    """The README's results block."""
    main, parts = ("references", "main"), []
    parts += ["**The claims.**", claims_table(records), "**All arms, nDCG@10** (mean, ± deviation over seeds).", means_table(records, main)]
    parts += [provenance(records)]
    parts += ["<details><summary>Differences to InfoNCE, to the start and to BM25</summary>"]
    parts += [differences_table(records, side) for side in (("main", "InfoNCE"), ("references", "base"), ("references", "BM25"))]
    parts += ["</details>", "<details><summary>MRR@10 and Recall@100</summary>"]
    parts += [means_table(records, main, measure) for measure in ("mrr@10", "recall@100")]
    parts += ["</details>", "<details><summary>What tuning chose</summary>", tuning_table(tuning), "</details>"] if tuning else ["</details>"]
    for group in dict.fromkeys(r["group"] for r in records):
        if group not in main:
            parts += [f"<details><summary>Ablation: {group}</summary>", means_table(records, (group,)), "</details>"]
    return "\n\n".join(parts)


def write_readme(path: Path, text: str) -> None:
    """Replace what stands between the two marks of a Markdown file.  ReportError if it has no marks."""
    content = path.read_text(encoding="utf-8")
    if BEGIN not in content or END not in content:
        raise ReportError(f"{path}: expected the marks {BEGIN!r} and {END!r}")
    before, after = content.split(BEGIN)[0], content.split(END)[1]
    with replacing(path) as sink:
        sink.write(f"{before}{BEGIN}\n{text}\n{END}{after}")


def read_tuning(folder: Path) -> dict[str, Any]:
    """The trials of every arm, {} if none have been run."""
    path = folder / "tuning.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def main(argv: list[str] | None = None) -> int:
    """Command line: print the tables, or write them into a README."""
    parser = argparse.ArgumentParser(prog="python -m repro.report", description=__doc__.split("\n\n")[0])
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of run records")
    parser.add_argument("--readme", type=Path, help="Markdown file whose results block is replaced")
    args = parser.parse_args(argv)
    try:
        text = report(read_records(args.results), read_tuning(args.results))
        if args.readme:
            write_readme(args.readme, text)
        else:
            print(text)
    except (ValueError, KeyError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
