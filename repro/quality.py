"""How well do the grades of generated lists separate?  The grades are the training signal.

For each level this reports the passages' length, the share of the query's terms found in them, the
query likelihood under a local language model, and the similarity to the query under an encoder;
and for each of these measures how often a list is in the right order.  None of them is a judge:
a paraphrase has no common terms, and the models are small.  They show what a cache is made of, and
which cache separates its grades better.  Lists that contradict a measure can be left out (`--keep`).
"""

import argparse
import json
import random
import re
import statistics
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from repro.checkpoints import CheckpointError
from repro.files import DataError, read_jsonl, replacing
from repro.generators import GenerateError, load_generator
from repro.likelihood import agreement, query_likelihood
from repro.lists import GradedList, lists_from_jsonl
from repro.plots import levels_figure
from repro.prompts import topic

Scorer = Callable[[Sequence[tuple[str, str]]], list[float]]  # (query, passage) pairs -> one number each

LABELS = {
    "length": "length (words)",
    "overlap": "query terms in the passage (share)",
    "likelihood": "query likelihood (mean log p, nats)",
    "similarity": "encoder similarity (dot product)",
}


def words(text: str) -> list[str]:
    """Lower-case words of a text."""
    return re.findall(r"\w+(?:['’]\w+)?", text.lower())


def stem(word: str) -> str:
    """A word without its plural or verb ending, roughly: enough to match "ankles" with "ankle"."""
    return re.sub(r"(?<=\w{3})(ies|ing|es|ed|s|y|e)$", "", word)


def length(pairs: Sequence[tuple[str, str]]) -> list[float]:
    """Words in each passage."""
    return [float(len(words(passage))) for _, passage in pairs]


def overlap(pairs: Sequence[tuple[str, str]]) -> list[float]:
    """Share of the query's content words that the passage has, both without endings."""
    shares = []
    for query, passage in pairs:
        wanted = {stem(word) for word in words(topic(query))}
        there = {stem(word) for word in words(passage)}
        shares.append(len(wanted & there) / len(wanted) if wanted else 0.0)
    return shares


def similarity(encoder: Any, batch_size: int = 32) -> Scorer:
    """Dot product of query and passage under any object with `.encode(texts, kind=..., batch_size=...)`."""

    def score(pairs: Sequence[tuple[str, str]]) -> list[float]:
        queries = encoder.encode([query for query, _ in pairs], kind="query", batch_size=batch_size)
        passages = encoder.encode([passage for _, passage in pairs], kind="passage", batch_size=batch_size)
        return (queries * passages).sum(-1).tolist()

    return score


def measure(lists: Sequence[GradedList], scorers: dict[str, Scorer]) -> list[dict[str, dict[int, float]]]:
    """For each list {measure: {grade: value}}; a grade that several passages have gets their mean."""
    pairs = [(item.query, passage) for item in lists for passage in item.passages]
    results: list[dict[str, dict[int, float]]] = [{} for _ in lists]
    for name, scorer in scorers.items():
        values = iter(scorer(pairs))
        for item, result in zip(lists, results, strict=True):
            by_grade: dict[int, list[float]] = defaultdict(list)
            for grade in item.grades:
                by_grade[grade].append(next(values))
            result[name] = {
                grade: statistics.fmean(found) for grade, found in sorted(by_grade.items(), reverse=True)
            }
    return results


def report(results: Sequence[dict[str, dict[int, float]]]) -> dict[str, Any]:
    """Means and deviations per level, and the share of lists in order, for each measure.

    `in_order`: every level scores above the next; `top_first`: the best level scores highest;
    `ends`: the best level scores above the worst; `pairs`: share of the pairs of levels in order.
    A random score gives 1/24, 1/4, 1/2 and 1/2 for four levels.
    """
    measures: dict[str, Any] = {}
    for name in results[0] if results else ():
        by_level: dict[int, list[float]] = defaultdict(list)
        for result in results:
            for grade, value in result[name].items():
                by_level[grade].append(value)
        scores = [result[name] for result in results]
        order: dict[str, float] = {}
        if name != "length":
            top = [all(s[max(s)] > value for grade, value in s.items() if grade != max(s)) for s in scores]
            order = {
                "in_order": statistics.fmean(agreement(s) == 1 for s in scores),
                "top_first": statistics.fmean(top),
                "ends": statistics.fmean(s[max(s)] > s[min(s)] for s in scores),
                "pairs": statistics.fmean(agreement(s) for s in scores),
            }
        measures[name] = {
            "levels": {
                str(grade): {
                    "mean": round(statistics.fmean(found), 4),
                    "deviation": round(statistics.pstdev(found), 4),
                }
                for grade, found in sorted(by_level.items(), reverse=True)
            },
            **{key: round(value, 4) for key, value in order.items()},
        }
    return {"lists": len(results), "measures": measures}


def table(reports: dict[str, dict[str, Any]]) -> str:
    """The reports as plain text: one line a source and measure."""
    lines = []
    for source, content in reports.items():
        lines.append(
            f"{source}: {content['lists']} lists" + (f", {content['note']}" if "note" in content else "")
        )
        for name, found in content["measures"].items():
            levels = "  ".join(f"{grade}: {value['mean']:8.3f}" for grade, value in found["levels"].items())
            shares = "  ".join(
                f"{key} {found[key]:.2f}"
                for key in ("in_order", "top_first", "ends", "pairs")
                if key in found
            )
            lines.append(f"  {LABELS.get(name, name):36} {levels}   {shares}".rstrip())
    return "\n".join(lines)


def attempts(path: str | Path) -> tuple[int, int, int] | None:
    """(queries with passages, at the first attempt, all queries) of a cache; None for plain lists."""
    good: dict[str, bool] = {}
    first: set[str] = set()
    for _, row in read_jsonl(path):
        if "passages" not in row or "attempt" not in row:
            return None
        good[row["id"]] = good.get(row["id"], False) or row["passages"] is not None
        if row["attempt"] == 0 and row["passages"] is not None:
            first.add(row["id"])
    return sum(good.values()), len(first), len(good)


def build_parser() -> argparse.ArgumentParser:
    """The command line of `python -m repro.quality`."""
    parser = argparse.ArgumentParser(
        prog="python -m repro.quality", description="Report how well the grades of generated lists separate."
    )
    add = parser.add_argument
    add(
        "--lists",
        nargs="+",
        required=True,
        metavar="[NAME=]FILE",
        help="cache files or graded lists, and their names in the report",
    )
    add("--out", help="write the report as JSON")
    add("--figure", help="write the figure (png, svg or pdf)")
    add("--keep", help="write the lists that pass to this file; needs --by")
    add(
        "--by",
        choices=("overlap", "likelihood", "similarity"),
        default="likelihood",
        help="the measure that decides what is kept (default %(default)s)",
    )
    add("--share", type=float, default=0.5, help="keep lists with at least this share of pairs in order")
    add("--limit", type=int, help="only so many lists a source, drawn with the seed")
    add("--common", action="store_true", help="only the queries that every source with any lists has")
    add("--seed", type=int, default=0)
    add("--model", default="smollm2-135m", help="language model for the likelihood, or none")
    add("--encoder", default="base", help="encoder for the similarity, or none (default %(default)s)")
    add("--batch-size", type=int, default=16)
    add("--device", default="auto")
    add("--dtype", default="auto")
    return parser


def sources(arguments: argparse.Namespace) -> tuple[dict[str, list[GradedList]], dict[str, str]]:
    """({name: lists}, {name: note}) of the files named; `authored` is split into its versions."""
    found: dict[str, list[GradedList]] = {}
    notes: dict[str, str] = {}
    read = []
    for text in arguments.lists:
        path = text.rpartition("=")[2]
        counts = attempts(path)  # a plan may fail throughout
        read.append((text, counts, lists_from_jsonl(path) if counts is None or counts[0] else []))
    if arguments.common:
        common = set.intersection(*({item.query.lower() for item in lists} for _, _, lists in read if lists))
        if not common:
            raise DataError("--common: expected queries that all sources have, found none")
        read = [(text, counts, [x for x in lists if x.query.lower() in common]) for text, counts, lists in read]
    for text, counts, lists in read:
        name, _, path = text.rpartition("=")
        name = name or Path(path).name.removesuffix(".gz").removesuffix(".jsonl")
        versions: dict[str, list[GradedList]] = defaultdict(list)
        for item in lists:
            versions[f"{name} {item.id.split('-')[0]}" if name == "authored" else name].append(item)
        for version, items in versions.items():
            if version in found:
                raise DataError(f"{path}: the name {version!r} is used twice; write --lists NAME={path}")
            if arguments.limit and arguments.limit < len(items):
                items = random.Random(arguments.seed).sample(items, arguments.limit)
            found[version] = items
        if name != "authored" and counts:
            notes[name] = "{0} of {2} queries have passages, {1} at the first attempt".format(*counts)
        if not lists:
            found[name] = []
    return found, notes


def run_command(arguments: argparse.Namespace) -> None:
    """Do what the command line says.  Raises the kit's errors."""
    found, notes = sources(arguments)
    scorers: dict[str, Scorer] = {"length": length, "overlap": overlap}
    if arguments.model != "none":
        generator = load_generator(arguments.model, arguments.device, arguments.dtype, plain=True)
        scorers["likelihood"] = lambda pairs: query_likelihood(
            generator, pairs, arguments.batch_size, progress=True
        )
    if arguments.encoder != "none":
        from repro.encoder import BiEncoder  # only here: the report works without any encoder

        scorers["similarity"] = similarity(
            BiEncoder.load(arguments.encoder, arguments.device, arguments.dtype)
        )
    if arguments.keep and arguments.by not in scorers:
        raise DataError(f"--by {arguments.by}: is not measured in this run")
    reports, kept = {}, []
    for name, lists in found.items():
        results = measure(lists, scorers)
        reports[name] = report(results) | ({"note": notes[name]} if name in notes else {})
        passing = [
            item
            for item, r in zip(lists, results, strict=True)
            if agreement(r.get(arguments.by, {})) >= arguments.share
        ]
        kept += passing
        if arguments.keep:
            print(f"{name}: kept {len(passing)} of {len(lists)} lists", file=sys.stderr)
    print(table(reports))
    if arguments.out:
        settings = {key: getattr(arguments, key) for key in ("limit", "common", "seed", "model", "encoder")}
        text = json.dumps({"settings": settings, "reports": reports}, indent=1)
        with replacing(arguments.out) as sink:
            sink.write(text + "\n")
    if arguments.figure:
        Path(arguments.figure).parent.mkdir(parents=True, exist_ok=True)
        levels_figure(reports, LABELS).savefig(arguments.figure, dpi=110)
    if arguments.keep:
        rows = [
            {
                "id": item.id,
                "query": item.query,
                "passages": {str(g): p for g, p in zip(item.grades, item.passages, strict=True)},
            }
            for item in kept
        ]
        with replacing(arguments.keep) as sink:
            sink.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def main(argv: list[str] | None = None) -> int:
    """Command line of the module; see --help."""
    arguments = build_parser().parse_args(argv)
    try:
        run_command(arguments)
    except (DataError, CheckpointError, GenerateError, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
