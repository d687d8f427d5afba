"""Is one system better than another?  `python -m repro.compare A.json B.json`, records of evaluate.

The difference is tested query by query: a paired permutation test (if the two systems were alike, a
coin could have decided which of them got which value of a query) and a bootstrap interval.
"""

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np

from repro.support.files import one_line, run_command


class Comparison(NamedTuple):
    """A mean difference with its 95 % interval, p, and the number of queries."""

    difference: float
    low: float
    high: float
    p: float
    queries: int


def compare(
    differences: Mapping[str, Mapping[str, float]], seed: int = 0, resamples: int = 10_000
) -> Comparison:
    """Paired comparison from {collection: {query: score of one system - score of the other}}.

    difference: mean over collections of the mean over queries.  p, two-sided: each query's sign is
    flipped by a coin; (count + 1) / (resamples + 1), count = samples at least as far from 0
    (stratified paired permutation test).  low, high: percentiles 2.5 and 97.5, queries drawn anew
    in collections (bootstrap).  The order of collections and of queries does not matter.  Raises
    ValueError for no collection, one with fewer than 2 queries, or a value that is not finite.
    """
    rows = []
    for _, found in sorted(differences.items()):
        rows.append(np.array([found[query] for query in sorted(found)], float))
    if not rows or not all(len(row) > 1 and np.isfinite(row).all() for row in rows):
        raise ValueError("expected a collection or more, each with 2 or more finite differences")
    rng = np.random.default_rng(seed)
    flipped = np.zeros(resamples)
    drawn = np.zeros(resamples)
    for row in rows:
        for part in np.array_split(np.arange(resamples), -(-resamples // 500)):  # for memory
            signs = rng.integers(0, 2, (len(part), len(row)), dtype=np.int8) * 2 - 1
            flipped[part] += signs @ row / len(row) / len(rows)
            chosen = rng.integers(0, len(row), signs.shape)
            drawn[part] += row[chosen].mean(axis=1) / len(rows)
    difference = fmean(row.mean() for row in rows)
    count = (np.abs(flipped) >= abs(difference) - 1e-12).sum()  # equal but for rounding is equal
    p = float((count + 1) / (resamples + 1))
    low, high = np.quantile(drawn, (0.025, 0.975)).tolist()
    return Comparison(difference, low, high, p, sum(map(len, rows)))


def holm(p_values: Mapping[Any, float]) -> dict[Any, float]:
    """Holm-adjusted p values: of m sorted ones, the i-th becomes the maximum over j <= i of
    min(1, (m - j + 1) p_j)."""
    order = sorted(p_values, key=p_values.__getitem__)
    scaled = [(len(order) - n) * p_values[name] for n, name in enumerate(order)]
    adjusted = np.maximum.accumulate(np.minimum(scaled, 1))
    return dict(zip(order, adjusted.tolist(), strict=True))


def read_values(path: Path, measure: str) -> tuple[str, dict[str, float]]:
    """(collection and split, {query: value}) of a record.  Raises ValueError if it is none."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        values = {query: float(row[measure]) for query, row in record["per_query"].items()}
        return f"{record['collection']} ({record['split']})", values
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(
            f"{path}: expected a record with {measure} per query, but {reason}"
        ) from error


def command(a: Path, b: Path, measure: str) -> None:
    """Compare two records and print one line."""
    collection, ours = read_values(a, measure)
    other, theirs = read_values(b, measure)
    if collection != other:
        raise ValueError(f"{a} is of {collection} and {b} of {other}: expected one collection")
    if ours.keys() != theirs.keys():
        raise ValueError(f"{a} and {b}: expected the same queries in both")
    found = compare({collection: {query: ours[query] - theirs[query] for query in ours}})
    interval = f"95 % interval {found.low:+.4f} to {found.high:+.4f}"
    print(
        f"{measure} of A - B on {one_line(collection)}: {found.difference:+.4f}, {interval}, ",
        end="",
    )
    print(f"p = {found.p:.4f}, {found.queries} queries")


def main(argv: list[str] | None = None) -> int:
    """The command line: 0, or 2 with one sentence on stderr."""
    parser = argparse.ArgumentParser(prog="python -m repro.compare", description=__doc__)
    add = parser.add_argument
    add("a", type=Path, metavar="A.json", help="what python -m repro.evaluate --out wrote")
    add(
        "b", type=Path, metavar="B.json", help="the same of another model; its values are taken off"
    )
    add("--measure", default="ndcg@10", help="one that both have")
    options = vars(parser.parse_args(argv))
    return run_command(lambda: command(**options))


if __name__ == "__main__":
    sys.exit(main())
