"""Is one system better than another?  `python -m repro.compare A.json B.json`, records of evaluate.

The difference is tested query by query: a paired permutation test (if the two systems were alike, a
coin could have decided which of them got which value of a query) and a bootstrap interval.
"""

import json
from argparse import ArgumentParser
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy.stats import bootstrap

from repro.support.files import naming, one_line, run_command

SAMPLES = 9_999  # which scipy's bootstrap draws too


class Comparison(NamedTuple):
    """A mean difference with its 95 % interval, p, and the number of queries."""

    difference: float
    low: float
    high: float
    p: float
    queries: int


def mean_of_means(*rows: np.ndarray, axis: int = -1) -> np.ndarray:
    """Rows (..., n) of each collection -> (...,): every collection weighs the same."""
    return sum(row.mean(axis) for row in rows) / len(rows)


def compare(differences: dict, seed: int = 0) -> Comparison:
    """Paired comparison from {collection: {query: score of one system - score of the other}}.

    difference: mean over collections of the mean over queries.  p, two-sided: each query's sign is
    flipped by a coin; (count + 1) / (9,999 + 1), count = samples at least as far from 0
    (stratified paired permutation test).  low, high: percentiles 2.5 and 97.5, queries drawn anew
    in collections (bootstrap; Efron & Tibshirani 1993).  The order of collections and of queries
    does not matter.  Raises ValueError for no collection, one with fewer than 2 queries, or a value
    that is not finite.
    """
    rows = [np.sort(list(found.values())) for _, found in sorted(differences.items())]
    if min(map(len, rows), default=0) < 2 or not np.isfinite(mean_of_means(*rows)):
        raise ValueError("expected a collection or more, each with 2 or more finite differences")
    difference = float(mean_of_means(*rows))
    shares = np.concatenate([row / len(row) / len(rows) for row in rows])  # they add up to it
    rng = np.random.default_rng(seed)
    sums = [difference]  # what was found is a sample too
    for _ in range(SAMPLES):
        signs = rng.choice((-1, 1), len(shares))
        sums.append(shares @ signs)
    as_far = np.abs(sums) >= abs(difference) - 1e-12  # equal but for rounding is equal
    # So many at a time, for memory.
    drawn = bootstrap(rows, mean_of_means, method="percentile", batch=500, rng=rng)
    low, high = map(float, drawn.confidence_interval)
    return Comparison(difference, low, high, float(as_far.mean()), len(shares))


def holm(p_values: dict) -> dict:
    """Holm-adjusted p values (1979): of m sorted ones, the i-th becomes the maximum over j <= i of
    min(1, (m - j + 1) p_j)."""
    p = pd.Series(p_values).sort_values()
    scaled = p * np.arange(len(p), 0, -1)
    return scaled.clip(upper=1).cummax().to_dict()


def read_values(path: Path, measure: str) -> tuple:
    """(collection and split, {query: value}) of a record.  Raises ValueError if it is none."""
    with naming(f"{path}: expected a record with {measure} per query"):
        record = json.loads(path.read_bytes())
        values = {query: float(row[measure]) for query, row in record["per_query"].items()}
        return f"{record['collection']} ({record['split']})", values


def command(a: Path, b: Path, measure: str) -> None:
    """Compare two records and print one line."""
    collection, ours = read_values(a, measure)
    other, theirs = read_values(b, measure)
    if (collection, ours.keys()) != (other, theirs.keys()):
        raise ValueError(
            f"{a} is of {collection}, {b} of {other}: expected one collection, the same queries"
        )
    gaps = {query: ours[query] - theirs[query] for query in ours}
    difference, low, high, p, queries = compare({collection: gaps})
    print(
        f"{measure} of A - B on {one_line(collection)}: {difference:+.4f}, "
        f"95 % interval {low:+.4f} to {high:+.4f}, p = {p:.4f}, {queries} queries"
    )


def main(argv: list[str] | None = None) -> int:
    """The command line: 0, or 2 with one sentence on stderr."""
    parser = ArgumentParser("python -m repro.compare", description=__doc__)
    parser.add_argument("record", nargs=2, type=Path, help="of evaluate --out: A, B, of A - B")
    parser.add_argument("--measure", default="ndcg@10", help="one that both have")
    asked = parser.parse_args(argv)
    return run_command(lambda: command(*asked.record, asked.measure))


if __name__ == "__main__":
    raise SystemExit(main())
