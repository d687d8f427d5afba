"""What is compared: the arms, the lists they train on, and the ablations.  Names and numbers only; nothing runs here.

All arms start from the same encoder, see the same queries in batches of the same size, take the same
number of steps, and were tuned with the same number of trials (`repro.tune`) on queries that are held
out from training.  Where an arm needs data that was not given, it is left out, and that is said.
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from repro.lists import GradedList, as_real, combine, cut, lists_from_beir, load_lists, relabel, split_lists

STEPS, BATCH = 350, 16  # five passes over the authored lists that are not held out
SHARE_HELD_OUT, SPLIT_SEED = 0.1, 0

BOTH = {"lr": (1e-4, 2e-4, 4e-4, 8e-4), "temperature": (0.03, 0.05, 0.1, 0.2)}
GRADED = BOTH | {"label_temperature": (0.2, 0.3, 0.5, 1.0)}
LINE = GRADED | {"order": (1, 2), "axis": ("grade", "gain")}


@dataclass(frozen=True)
class Arm:
    """One way of training: which lists, which loss, what is tuned, and what is fixed."""

    name: str
    lists: str  # a key of what `list_sets` returns
    loss: str
    space: Mapping[str, tuple] = field(default_factory=lambda: BOTH)
    fixed: Mapping[str, Any] = field(default_factory=dict)
    settings_of: str | None = None  # take the tuned settings of this arm instead of an own search


MAIN = (
    Arm("InfoNCE", "synthetic", "infonce"),
    Arm("KL", "synthetic", "kl", GRADED),
    Arm("Gaussian W2", "synthetic", "wasserstein_gaussian", GRADED),
    Arm("1-D W", "synthetic", "wasserstein_1d", LINE),
    Arm("InfoNCE, real", "real", "infonce"),
    Arm("InfoNCE, more lists", "synthetic+", "infonce"),
    Arm("1-D W, more lists", "synthetic+", "wasserstein_1d", LINE),
    Arm("1-D W, more lists + real", "synthetic+real", "wasserstein_1d", LINE),
    Arm("1-D W, more lists + all real", "synthetic+all real", "wasserstein_1d", LINE),
)
PARENTS = {arm.name: arm for arm in MAIN}


def variant(parent: str, suffix: str, lists: str | None = None, **fixed: Any) -> Arm:
    """An ablation of a main arm: its tuned settings, with other lists or some of them changed."""
    arm = PARENTS[parent]
    return Arm(f"{parent}, {suffix}", lists or arm.lists, arm.loss, arm.space, fixed, parent)


GRADED_ARMS = ("KL", "Gaussian W2", "1-D W")
CORE = ("InfoNCE", "Gaussian W2", "1-D W")
ABLATIONS: dict[str, tuple[Arm, ...]] = {
    "levels": tuple(variant(a, f"{n} levels", f"{n} levels") for a in GRADED_ARMS for n in (4, 3, 2))
    + tuple(variant(a, "best and worst only", "best and worst") for a in GRADED_ARMS),
    "queries": tuple(variant(a, f"{n} queries", f"{n} queries") for a in CORE for n in (100, 300, 1000)),
    "label temperature": tuple(variant(a, f"at {u:g}", label_temperature=u) for a in GRADED_ARMS for u in (0.1, 0.2, 0.3, 0.5, 1.0)),
    "batch": tuple(variant(a, f"{b} lists a batch", batch_size=b, steps=STEPS * BATCH // b) for a in CORE for b in (4, 16, 64)),
    "line": tuple(variant("1-D W", f"order {p}, {x} axis", order=p, axis=x) for x in ("grade", "gain") for p in (1, 2)),
    "generator": tuple(variant(a, name, name) for a in CORE for name in ("authored", "local model")),
    "same questions": (
        variant("InfoNCE, real", "for the same questions", "real, same"),
        variant("InfoNCE", "for the same questions", "synthetic, same"),
        variant("Gaussian W2", "for the same questions", "synthetic, same"),
        variant("1-D W", "for the same questions", "synthetic, same"),
    ),
    "start": tuple(variant(a, "from a random encoder", "synthetic", model="random", lr=1e-3) for a in ("InfoNCE", "KL", "Gaussian W2", "1-D W")),
    # Two passes over the lists: a step that trains layers takes a hundred times as long as one of the projection.
    # At the projection's rates a layer loses what it had, so this one is lower.
    "depth": tuple(variant(a, "upper layer too", freeze=5, lr=5e-5, steps=140) for a in CORE)
    + tuple(variant(a, "projection only", steps=140) for a in CORE),
}

SEEDS = {"main": 5, "start": 2, "depth": 1}  # runs an arm, where not 3: what trains layers costs minutes, not seconds
LARGEST = {"start": 1_000, "depth": 2_000}  # likewise: only collections of up to so many passages


@dataclass(frozen=True)
class ListSet:
    """Training lists, and the development split: lists of held-out queries, never trained on."""

    train: list[GradedList]
    held_out: list[GradedList]


def _split(lists: Sequence[GradedList]) -> ListSet:
    return ListSet(*split_lists(lists, SHARE_HELD_OUT, SPLIT_SEED))


def _changed(source: ListSet, change: Any) -> ListSet:
    return ListSet([change(item) for item in source.train], source.held_out)  # judged as before, whatever it trains on


def _best_and_worst(item: GradedList) -> GradedList:
    """Only the passages of the highest and the lowest grade: what a positive/negative prompt would give."""
    ends = [0, len(item.grades) - 1]  # lists are ordered best first
    return replace(item, passages=[item.passages[j] for j in ends], grades=[item.grades[j] for j in ends])


def list_sets(authored: str, generated: str | None = None, real: str | None = None, real_graded: str | None = None) -> dict[str, ListSet]:
    """All list sets that the given data allow, by name.

    authored, generated: caches; real: a BEIR folder or hub id with train judgments; real_graded:
    synthetic lists for (some of) the queries of `real`.  Merged levels keep the top grade at 3, so that
    the target stays as sharp: 4 levels 3 2 1 0, 3 levels 3 1 1 0, 2 levels 3 0 0 0.  The development
    split is a tenth of the queries of each source.  "synthetic+" is authored and real_graded;
    "synthetic+real" is the same with up to three real passages (positive 3, other 1) in each list
    whose query has them, k = 7 as in the paper.  "synthetic+all real" has the real lists of the other
    questions too, k = 3.  "synthetic, same" and "real, same" are lists of both
    kinds for the very same questions.
    """
    base = _split(load_lists([authored]))
    sets = {"synthetic": base, "4 levels": base}
    sets["3 levels"] = _changed(base, lambda item: relabel(item, {2: 1}))
    sets["2 levels"] = _changed(base, lambda item: relabel(item, {2: 0, 1: 0}))
    sets["best and worst"] = _changed(base, _best_and_worst)
    for count in (100, 300, 1000):
        sets[f"{count} queries"] = ListSet(random.Random(SPLIT_SEED).sample(base.train, min(count, len(base.train))), base.held_out)
    if generated:
        theirs = {item.query.lower(): item for item in load_lists([generated])}
        ours = [item for item in base.train if item.query.lower() in theirs]
        sets["authored"] = ListSet(ours, base.held_out)
        sets["local model"] = ListSet([theirs[item.query.lower()] for item in ours], base.held_out)
    if real:
        rng = random.Random(SPLIT_SEED)
        whole = _split([as_real(item) for item in lists_from_beir(real)])
        sets["real"] = ListSet([cut(item, 4, rng) for item in whole.train], whole.held_out)
    if real and real_graded:
        held = {item.query.lower() for item in whole.held_out}
        graded = load_lists([real_graded])
        kept, left_out = ([item for item in graded if (item.query.lower() in held) == out] for out in (False, True))
        more = ListSet(base.train + kept, base.held_out + left_out)
        asked = {item.query.lower() for item in graded}
        pages = [cut(item, 3, rng) for item in whole.train if item.query.lower() in asked]
        sets["synthetic+"] = more
        by_query = {item.query.lower(): item for item in sets["real"].train}
        both = [item for item in kept if item.query.lower() in by_query]
        sets["synthetic, same"] = ListSet(both, more.held_out)
        sets["real, same"] = ListSet([by_query[item.query.lower()] for item in both], whole.held_out)
        sets["synthetic+real"] = ListSet(combine(more.train, pages), more.held_out)
        all_pages = [cut(item, 3, rng) for item in whole.train]
        sets["synthetic+all real"] = ListSet(combine(more.train, all_pages), more.held_out)
    return sets
