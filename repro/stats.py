"""Is one system better than another, or is it chance?  Paired tests on per-query scores.

Two systems answer the same queries, so each query gives one difference.  The permutation test
asks how often differences this large arise if the sign of each one were a coin toss; the
bootstrap says how far the mean difference would move on another sample of such queries.  Holm's
correction keeps the error rate when several collections or arms are tested.  Runs that differ
only in their seed are averaged query by query first, since seeds are not new queries.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

Scores = Mapping[str, float]  # {query_id: score}
BATCH = 256  # resamples drawn at a time, which bounds memory; part of what a seed reproduces


class StatsError(ValueError):
    """Scores that cannot be compared, averaged or corrected."""


@dataclass(frozen=True)
class Comparison:
    """What `compare(a, b)` found; a positive difference means that b is better."""

    n: int  # queries
    mean_a: float
    mean_b: float
    difference: float  # mean of b - a over the queries
    low: float  # bounds of the 95 % interval of the difference
    high: float
    p: float  # two-sided


def _same_queries(a: Scores, b: Scores) -> None:
    if a.keys() != b.keys():
        apart = a.keys() ^ b.keys()
        example = min(apart)
        side = "first" if example in a else "second"
        raise StatsError(
            f"the two sides must score the same queries: {len(apart)} stand on one side only, "
            f"for example {example!r} (only on the {side})"
        )


def _values(scores: Scores, order: Sequence[str]) -> np.ndarray:
    values = np.array([scores[qid] for qid in order], dtype=np.float64)
    bad = np.flatnonzero(~np.isfinite(values))
    if bad.size:
        qid = order[bad[0]]
        raise StatsError(f"query {qid!r}: score is {scores[qid]!r}, expected a finite number")
    return values


def compare(a: Scores, b: Scores, seed: int = 0, resamples: int = 10_000) -> Comparison:
    """Paired comparison of two systems' per-query scores; the difference is b minus a.

    With d_q = b_q - a_q:
    - p: two-sided paired permutation test of mean(d) = 0.  The signs of the d_q are flipped at
      random (`scipy.stats.permutation_test`, `permutation_type="samples"`); exact, by trying all
      2^n patterns, if there are no more of them than `resamples`.
    - low, high: the 2.5th and 97.5th percentile of the mean over bootstrap samples of queries.
      Percentile and not BCa: BCa corrects for skew, of which a mean of paired differences has
      little, and it is undefined when many differences are equal, as with small test sets.

    The same seed gives the same numbers, whatever the order of the queries.  Raises StatsError if
    the query sets differ, there are fewer than two queries, or a score is not finite.
    """
    _same_queries(a, b)
    if len(a) < 2:
        raise StatsError(f"a paired test needs at least 2 queries, found {len(a)}")
    if resamples < 1:
        raise StatsError(f"resamples is {resamples}, expected at least 1")
    order = sorted(a)
    left, right = _values(a, order), _values(b, order)
    d = right - left
    for_test, for_interval = np.random.default_rng(seed).spawn(2)
    p = 1.0
    if np.any(d):
        test = stats.permutation_test(
            (d,), np.mean, permutation_type="samples", n_resamples=resamples, batch=BATCH, rng=for_test
        )
        p = float(test.pvalue)
    low = high = float(d[0])
    if np.ptp(d) > 0:
        interval = stats.bootstrap(
            (d,), np.mean, method="percentile", confidence_level=0.95,
            n_resamples=resamples, batch=BATCH, rng=for_interval,
        ).confidence_interval  # fmt: skip
        low, high = float(interval.low), float(interval.high)
    return Comparison(len(d), float(left.mean()), float(right.mean()), float(d.mean()), low, high, p)


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Holm-adjusted p of every test, in the order given; reject those <= .05 to err in 5 % of families.

    With the m values sorted upwards, adjusted p_(i) = max over j <= i of min(1, (m - j + 1) p_(j)).
    Raises StatsError for a p outside [0, 1].
    """
    for name, p in p_values.items():
        if not 0 <= p <= 1:
            raise StatsError(f"{name}: p is {p!r}, expected a number from 0 to 1")
    adjusted: dict[str, float] = {}
    largest = 0.0
    for place, name in enumerate(sorted(p_values, key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - place) * p_values[name]))
        adjusted[name] = largest
    return {name: adjusted[name] for name in p_values}


def average_seeds(runs: Sequence[Scores]) -> dict[str, float]:
    """Per-query mean over the seeds of one arm, ready for `compare`.

    Raises StatsError if there is no run, or if two runs do not score the same queries.
    """
    if not runs:
        raise StatsError("no run to average")
    for run in runs[1:]:
        _same_queries(runs[0], run)
    order = list(runs[0])
    averaged = np.mean([_values(run, order) for run in runs], axis=0)
    return dict(zip(order, averaged.tolist(), strict=True))


def seed_summary(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and standard deviation (divisor n - 1) over seeds; the deviation of one seed is None.

    Raises StatsError if there is no value or one is not finite.
    """
    array = np.asarray(values, dtype=np.float64)
    if array.size == 0 or not np.isfinite(array).all():
        raise StatsError(f"seed values are {list(values)!r}, expected at least one, all finite")
    return float(array.mean()), float(array.std(ddof=1)) if array.size > 1 else None
