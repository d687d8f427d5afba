"""The paper's five claims as comparisons between arms, and the rule that judges them.

The rule was fixed before any test result was looked at; two comparisons came later (C3 on the same
questions, C4 with all real lists).  Each comparison gives one paired difference in nDCG@10 a
collection (seeds averaged query by query), tested by permutation and Holm-corrected over the claim's
collections.  A comparison `holds` if at least half of the collections are significantly better and none
is significantly worse; `does not hold` if none is significantly better and one is significantly worse,
or if every interval lies below a gain of .02; it is `mixed` if some are better and some worse, and
`undecided here` otherwise.  The kit's sample has no vote: the same writer made it and the lists.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from repro.stats import Comparison, average_seeds, compare, holm

LEVEL, WORTHWHILE = 0.05, 0.02
NO_VOTE = ("sample",)
Record = dict[str, Any]


@dataclass(frozen=True)
class Claim:
    """One comparison that bears on a claim: is `better` better than `than`?  Each side is (group, arm)."""

    claim: str
    text: str
    better: tuple[str, str]
    than: tuple[str, str]
    shift_only: bool = False  # only collections from another domain than the training data


BASE, INFO = ("references", "base"), ("main", "InfoNCE")
CLAIMS = (
    Claim("C1", "graded + Wasserstein beats InfoNCE on the same passages (1-D)", ("main", "1-D W"), INFO),
    Claim("C1", "the same, with the paper's Gaussian form", ("main", "Gaussian W2"), INFO),
    Claim("C1", "the same, with KL instead of Wasserstein", ("main", "KL"), INFO),
    Claim("C2", "it improves the self-supervised start (1-D)", ("main", "1-D W"), BASE),
    Claim("C2", "the same, with the Gaussian form", ("main", "Gaussian W2"), BASE),
    Claim("C2", "for comparison: InfoNCE on the same passages", INFO, BASE),
    Claim("C3", "it is more robust to shift than InfoNCE on real data (1-D)", ("main", "1-D W"), ("main", "InfoNCE, real"), shift_only=True),
    Claim("C3", "the same, with the Gaussian form", ("main", "Gaussian W2"), ("main", "InfoNCE, real"), shift_only=True),
    Claim("C3", "synthetic against real lists for the very same questions (1-D)", ("same questions", "1-D W, for the same questions"), ("same questions", "InfoNCE, real, for the same questions"), shift_only=True),
    Claim("C4", "real passages next to the synthetic ones help (1-D)", ("main", "1-D W, more lists + real"), ("main", "1-D W, more lists")),
    Claim("C4", "the same, and the real lists of questions without synthetic ones", ("main", "1-D W, more lists + all real"), ("main", "1-D W, more lists")),
    Claim("C5", "four levels beat positive and rest (1-D)", ("levels", "1-D W, 4 levels"), ("levels", "1-D W, 2 levels")),
    Claim("C5", "the same, with the Gaussian form", ("levels", "Gaussian W2, 4 levels"), ("levels", "Gaussian W2, 2 levels")),
    Claim("C5", "four levels beat lists of best and worst only (1-D)", ("levels", "1-D W, 4 levels"), ("levels", "1-D W, best and worst only")),
)  # fmt: skip
IN_DOMAIN = ("dl19-pool", "wikiqa", "sample")  # web questions, as in the training lists; all else counts as shift


def per_query(records: Sequence[Record], side: tuple[str, str], collection: str, measure: str = "ndcg@10") -> dict[str, float] | None:
    """{query id: value} of one (group, arm) on a collection, averaged over its seeds; None without a record."""
    rows = [r for r in records if (r["group"], r["arm"]) == side and collection in r["collections"]]
    if not rows:
        return None
    place = rows[0]["measures"].index(measure)
    return average_seeds([{qid: values[place] for qid, values in r["collections"][collection]["per_query"].items()} for r in rows])


def collections_of(records: Sequence[Record]) -> list[str]:
    """All collections that occur, in-domain ones first."""
    names = {name for record in records for name in record["collections"]}
    return sorted(names, key=lambda name: (IN_DOMAIN.index(name) if name in IN_DOMAIN else len(IN_DOMAIN), name))


def differences(
    records: Sequence[Record], better: tuple[str, str], than: tuple[str, str], collections: Sequence[str], measure: str = "ndcg@10"
) -> dict[str, tuple[Comparison, float]]:
    """{collection: (comparison, Holm-adjusted p)} wherever both sides have been scored."""
    tests = {}
    for name in collections:
        a, b = per_query(records, than, name, measure), per_query(records, better, name, measure)
        if a is not None and b is not None:
            tests[name] = compare(a, b)
    adjusted = holm({name: test.p for name, test in tests.items()})
    return {name: (test, adjusted[name]) for name, test in tests.items()}


def verdict(found: Mapping[str, tuple[Comparison, float]]) -> str:
    """The rule of this module, applied to the collections that vote."""
    votes = {name: pair for name, pair in found.items() if name not in NO_VOTE}
    if not votes:
        return "not measured"
    better = sum(p <= LEVEL and test.difference > 0 for test, p in votes.values())
    worse = sum(p <= LEVEL and test.difference < 0 for test, p in votes.values())
    if better and worse:
        return "mixed"
    if 2 * better >= len(votes):
        return "holds"
    if not better and (worse or all(test.high < WORTHWHILE for test, _ in votes.values())):
        return "does not hold"
    return "undecided here"


def judge(records: Sequence[Record]) -> list[tuple[Claim, dict[str, tuple[Comparison, float]], str]]:
    """(claim, {collection: (comparison, adjusted p)}, verdict) of every comparison, in order."""
    rows = []
    for claim in CLAIMS:
        names = [n for n in collections_of(records) if not (claim.shift_only and n in IN_DOMAIN)]
        # The correction is over the collections that vote; the sample is tested on its own.
        voting = differences(records, claim.better, claim.than, [n for n in names if n not in NO_VOTE])
        others = differences(records, claim.better, claim.than, [n for n in names if n in NO_VOTE])
        found = {name: (voting | others)[name] for name in names if name in voting | others}
        rows.append((claim, found, verdict(found)))
    return rows
