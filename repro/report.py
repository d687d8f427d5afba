"""Turn the run records into the tables of the README: `python -m repro.report --readme README.md`.

Reads `repro/results/COLLECTION/*.json`, averages seeds query by query, compares every arm with
InfoNCE by the paired permutation test, corrects over collections (Holm), and writes Markdown.  With
`--readme` the block between the two `results` marks of that file is replaced; nothing is typed by
hand.
"""

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from repro.files import replacing
from repro.stats import average_seeds, compare, holm, seed_summary

RESULTS = Path(__file__).parent / "results"
BEGIN, END = "<!-- results: written by `python -m repro.report --readme README.md` -->", "<!-- end of results -->"
Records = dict[str, dict[str, list[dict[str, Any]]]]  # {collection: {arm: one record a seed}}


class ReportError(ValueError):
    """Records that are missing or cannot be read."""


def read_records(folder: Path) -> Records:
    """All records below `folder`, by collection and arm, seeds in order.  ReportError names a bad file."""
    records: Records = defaultdict(lambda: defaultdict(list))
    for path in sorted(folder.glob("*/*.json")):
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            records[record["collection"]][record["arm"]].append(record)
        except (OSError, ValueError, KeyError) as error:
            raise ReportError(f"{path}: expected a run record, but {type(error).__name__}: {error}") from error
    if not records:
        raise ReportError(f"{folder}: expected run records, found none; `python -m repro.experiments` makes them")
    return records


def per_query(records: list[dict[str, Any]], measure: str) -> dict[str, float]:
    """{query id: value}, averaged over the seeds of one arm."""
    return average_seeds([{query: row[measure] for query, row in r["per_query"].items()} for r in records])


def table(records: Records, measure: str = "ndcg@10", reference: str = "InfoNCE") -> str:
    """A Markdown table: arms by collections, mean +- seed deviation, and the difference to the reference arm."""
    collections = sorted(records, key=lambda name: (name != "sample", name))
    order = ["bm25", "base", reference]
    arms = order + sorted({arm for name in collections for arm in records[name]} - set(order))
    tests, p_values = {}, {}
    for name in collections:
        for arm in arms:
            if arm != reference and arm in records[name] and reference in records[name]:
                sides = (per_query(records[name][key], measure) for key in (reference, arm))
                tests[name, arm] = compare(*sides)
    for arm in arms:  # one family for each arm: its collections
        p_values |= {key: p for key, p in holm({key: t.p for key, t in tests.items() if key[1] == arm}).items()}
    lines = [f"| {measure} | " + " | ".join(collections) + " |", "| --- |" + " --- |" * len(collections)]
    for arm in arms:
        cells = []
        for name in collections:
            if arm not in records[name]:
                cells.append("")
                continue
            mean, deviation = seed_summary([r["metrics"][measure] for r in records[name][arm]])
            cell = f"{mean:.3f}" + (f" ± {deviation:.3f}" if deviation is not None and arm not in ("bm25", "base") else "")
            if (name, arm) in tests:
                t = tests[name, arm]
                cell += f" ({t.difference:+.3f}, {t.low:+.3f} to {t.high:+.3f}, p {p_values[name, arm]:.2g})"
            cells.append(cell)
        lines.append(f"| {arm} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def provenance(records: Records, reference: str = "InfoNCE") -> str:
    """One sentence: seeds, machine, versions and minutes of what the table shows."""
    trained = [r for arms in records.values() for arm, rows in arms.items() if arm not in ("bm25", "base") for r in rows]
    seeds = sorted({r["seed"] for r in trained})
    one = (trained or [r for arms in records.values() for rows in arms.values() for r in rows])[0]
    versions = ", ".join(f"{name} {version}" for name, version in one["versions"].items())
    counts = "; ".join(
        f"{name}: {rows['counts']['passages']} passages, {rows['counts']['queries']} queries"
        for name, rows in ((name, next(iter(arms.values()))[0]) for name, arms in records.items())
    )
    training = next((r["training"] for r in trained if r.get("training")), None)
    how = ""
    if training:
        chosen = training["chosen"]
        how = (
            f"Training: {training['queries']} lists, {training['steps']} steps of {training['settings']['batch_size']}, "
            f"{chosen['freeze']} layers frozen, learning rate {chosen['lr']:g}, temperature {chosen['temperature']:g}, "
            f"about {training['minutes']:.0f} minutes an arm. "
        )
    machine = f"{one['machine']['platform']}, {one['machine']['cpus']} cores, {one['device']}"
    return (
        f"{how}Seeds: {', '.join(map(str, seeds))}. {machine}; {versions}. {counts}. In brackets: difference to "
        f"{reference}, its 95 % bootstrap interval over queries, and p of the paired permutation test, Holm-corrected "
        "over collections."
    )


def write_readme(path: Path, text: str) -> None:
    """Replace what stands between the two marks of a Markdown file.  ReportError if it has no marks."""
    content = path.read_text(encoding="utf-8")
    if BEGIN not in content or END not in content:
        raise ReportError(f"{path}: expected the marks {BEGIN!r} and {END!r}")
    before, after = content.split(BEGIN)[0], content.split(END)[1]
    with replacing(path) as sink:
        sink.write(f"{before}{BEGIN}\n{text}\n{END}{after}")


def main(argv: list[str] | None = None) -> int:
    """Command line: print the tables, or write them into a README."""
    parser = argparse.ArgumentParser(prog="python -m repro.report", description=__doc__.split("\n\n")[0])
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of run records")
    parser.add_argument("--readme", type=Path, help="Markdown file whose results block is replaced")
    parser.add_argument("--measure", default="ndcg@10")
    args = parser.parse_args(argv)
    try:
        records = read_records(args.results)
        text = f"{table(records, args.measure)}\n\n{provenance(records)}"
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
