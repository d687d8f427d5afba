"""What is compared: the starts, the arms, the lists they train on, the ablations.  Names and numbers only.

All arms of a start begin at the same encoder, see batches of the same size, take the same number of steps,
and get the same number of tuning trials, drawn with a seed from their own space.
"""

import itertools
import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from repro.data import AUTHORED, GradedList, combine, load_lists, real_lists, recipe, split_lists

BATCH, SPLIT_SEED, HELD_OUT, QUESTIONS = 16, 0, 0.1, 150  # held out: of authored lists, and of WikiQA

@dataclass(frozen=True)
class Start:
    """Where arms begin (an encoder's name is the key in STARTS), and what all of them share there."""
    steps: int
    trials: int  # trainings an arm, each scored at every share of AVERAGES
    seeds: int
    lrs: tuple[float, ...]
    temperatures: tuple[float, ...]
    freeze: int | None  # None: all layers, under a linear map; 0: the embeddings
    max_length: int | None = None  # tokens a text, in training and scoring

STARTS = {  # 350 steps of a linear map are five passes over the lists (seconds), 70 of a whole encoder one
    "base": Start(350, 16, 5, (1e-4, 2e-4, 4e-4, 8e-4), (0.03, 0.05, 0.1, 0.2), freeze=None),
    "all-minilm-l6-v2": Start(70, 4, 3, (5e-6, 1e-5, 2e-5), (0.03, 0.05, 0.1), freeze=0, max_length=128)}
AVERAGES = (0.3, 0.6, 1.0)  # shares of the way from the start's weights to the trained ones, for every arm
GRADED = {"label_temperature": (0.2, 0.3, 0.5, 1.0), "target": ("all", "own")}
LINE = {**GRADED, "order": (1, 2), "axis": ("grade", "gain")}

@dataclass(frozen=True)
class Arm:
    """One way of training: which lists (`training_set`), which loss, what is tuned, what is fixed."""
    name: str
    lists: str
    loss: str
    space: Mapping[str, tuple] = field(default_factory=dict)
    fixed: Mapping[str, Any] = field(default_factory=dict)
    parent: "Arm | None" = None  # an ablation: it has the tuned settings of this arm

MAIN = (  # in the order in which a start that takes hours is worked through
    Arm("InfoNCE", "binary", "infonce"),  # the released synthetic binary recipe
    Arm("1-D W", "graded", "wasserstein_1d", LINE),
    Arm("1-D W, 2 grades", "merged", "wasserstein_1d", LINE),
    Arm("InfoNCE, real", "real", "infonce"),  # the released real binary recipe, on WikiQA
    Arm("1-D W, same questions", "same questions", "wasserstein_1d", LINE),
    Arm("1-D W, synthetic + real", "synthetic + real", "wasserstein_1d", LINE),  # the released mixed recipe
    Arm("Gaussian W2", "graded", "wasserstein_gaussian", GRADED),  # the released multi-level recipe
    Arm("KL", "graded", "kl", GRADED),
    Arm("InfoNCE, all lower", "graded", "infonce"),
    Arm("InfoNCE, middle left out", "graded", "infonce", fixed={"ignore_between": True}))

def variant(name: str, suffix: str, lists: str | None = None, **fixed: Any) -> Arm:
    """An ablation of a main arm: its tuned settings, with other lists or some of them changed."""
    arm = next(arm for arm in MAIN if arm.name == name)
    return Arm(f"{name}, {suffix}", lists or arm.lists, arm.loss, arm.space, {**arm.fixed, **fixed}, arm)

CORE, THREE = ("InfoNCE", "Gaussian W2", "1-D W"), ("KL", "Gaussian W2", "1-D W")
ABLATIONS: dict[str, list[Arm]] = {
    "label temperature": [variant(name, f"label temperature {u:g}", label_temperature=u)
                          for name in THREE for u in (0.1, 0.2, 0.3, 0.5, 1.0)],
    "order and axis": [variant("1-D W", f"order {p}, {x} axis", order=p, axis=x)
                       for x in ("grade", "gain") for p in (1, 2)],
    "target": [variant(name, f"target {t}", target=t) for name in THREE for t in ("all", "own")],
    "batch, equal updates": [variant(n, f"batch {b}", batch_size=b) for n in CORE for b in (4, 16, 64)],
    "batch, equal lists": [variant(n, f"batch {b}, equal lists", batch_size=b, steps=350 * 16 // b)
                           for n in CORE for b in (4, 16, 64)],
    "queries": [variant(n, f"{q} queries", f"{q} queries" + ", binary" * (n == "InfoNCE"))
                for n in CORE for q in (100, 300, 1000)],
    "generator": [variant(n, f"by {g}", g) for n in CORE[1:] for g in ("authored", "smollm2")],
    "best and worst": [variant("1-D W", "best and worst passage", "ends")]}
ABLATED = {"base": (*ABLATIONS,), "all-minilm-l6-v2": ("order and axis",)}  # there a run takes ten minutes

def draws(start: str, arm: Arm) -> list[dict[str, Any]]:
    """What tuning tries for an arm, the same in every call: a seeded Latin hypercube, nothing in it twice."""
    rng, count = random.Random(f"{start}/{arm.name}"), STARTS[start].trials
    space = {"lr": STARTS[start].lrs, "temperature": STARTS[start].temperatures, **arm.space}
    columns = []
    for values in space.values():
        order = rng.sample(values, len(values))
        columns.append(rng.sample([order[n % len(order)] for n in range(count)], count))
    grid, rows = list(itertools.product(*space.values())), []
    spare = iter(rng.sample(grid, len(grid)))
    for row in zip(*columns, strict=True):
        rows.append(row if row not in rows else next(other for other in spare if other not in rows))
    return [dict(zip(space, row, strict=True)) for row in rows]

class Sources:
    """The lists that arms train on, and the queries that tuning is judged on; `wikiqa` has a train split."""

    def __init__(self, wikiqa: str) -> None:
        self.wikiqa, names = wikiqa, ("authored", "wikiqa-graded", "smollm2-135m")
        self.files = [load_lists([AUTHORED.with_name(f"{name}.jsonl")], wikiqa) for name in names]
        (every, graded, _), small = self.files, {item.query.lower(): item for item in self.files[2]}
        self.authored, self.held_out = split_lists(every, HELD_OUT, SPLIT_SEED)
        both = [item for item in self.authored if item.query.lower() in small]  # for the same queries
        self.named = {"same questions": graded, "authored": both}
        self.named["smollm2"] = [small[item.query.lower()] for item in both]
        free = sorted({item.id for item in real_lists(wikiqa)} - {item.id for item in graded})
        self.questions = set(random.Random(SPLIT_SEED).sample(free, min(QUESTIONS, len(free) // 2)))

    def training_set(self, name: str, seed: int) -> list[GradedList]:
        """The lists of a name that an `Arm` gives; what a recipe draws, it draws with the run's seed."""
        if name in self.named:
            return self.named[name]
        if name not in ("real", "synthetic + real"):
            count, part, kind = name.partition(" queries")
            some = random.Random(seed).sample(self.authored, int(count)) if part else self.authored
            return recipe(some, kind.strip(", ") or "graded" if part else name, seed)
        real = [item for item in real_lists(self.wikiqa, seed=seed) if item.id not in self.questions]  # k = 3
        return real if name == "real" else combine(self.named["same questions"], real)
