"""What is trained: the starts, the arms, the ablations, the lists that arms train on.

All arms of a start begin at the same encoder, see batches of the same size, and are trained at the
temperature that `fit_temperature` finds on their own lists before training.
"""

import random
from dataclasses import dataclass, replace

from repro.data import AUTHORED, Lists, Place, as_collection, load_beir, load_lists, split_lists
from repro.recipes import combine, real_lists, recipe

QUESTIONS = 150  # of WikiQA's, in the development data


@dataclass
class Start:
    """Where arms begin, and what all of them share there."""

    rates: tuple  # learning rates that development data choose from
    seeds: int
    steps: int | None  # None: one epoch


STARTS = {
    "base": Start(rates=(1e-4, 2e-4, 4e-4, 8e-4), seeds=5, steps=350),
    "all-minilm-l6-v2": Start(rates=(1e-5,), seeds=3, steps=None),  # as released
}


@dataclass
class Arm:
    """One way of training: the lists, the loss, and what an ablation changes."""

    name: str
    loss: str = ""
    lists: str = "graded"  # graded, binary, real, same questions, synthetic + real
    ties: str = "spread"
    label_temperature: float = 1.0
    multiple: float = 1.0  # of the fitted temperature
    queries: int = 0  # 0: all
    tuned_as: str = ""  # the main arm whose learning rate an ablation takes


MAIN = [
    Arm("InfoNCE", "infonce", "binary"),  # released synthetic binary
    Arm("KL, binary", "kl", "binary"),
    Arm("KL", "kl"),
    Arm("Gaussian W2", "wasserstein_gaussian"),  # released synthetic multi-level
    Arm("1-D W", "wasserstein_1d"),
    Arm("Gaussian W2, binary", "wasserstein_gaussian", "binary"),
    Arm("1-D W, binary", "wasserstein_1d", "binary"),
    Arm("1-D W, ties merged", "wasserstein_1d", ties="merged"),
    Arm("InfoNCE, real", "infonce", "real"),  # released real binary
    Arm("Gaussian W2, same questions", "wasserstein_gaussian", "same questions"),
    Arm("1-D W, same questions", "wasserstein_1d", "same questions"),
    Arm("Gaussian W2, synthetic + real", "wasserstein_gaussian", "synthetic + real"),  # released
    Arm("1-D W, synthetic + real", "wasserstein_1d", "synthetic + real"),
]
REFERENCES = [Arm("start"), Arm("BM25")]  # nothing is trained
BY_NAME = {arm.name: arm for arm in MAIN}
FOUR = ("InfoNCE", "KL", "Gaussian W2", "1-D W")
ABLATION_SEEDS, ABLATION_START = 3, "base"
# {group: (the field that it changes, how it calls a changed arm, the values, the main arms)}.  The
# value 1 is that of a main arm itself.
CHANGES = {
    "temperature": ("multiple", "{}, {:g} x temperature", (0.25, 0.5, 1.0, 2.0, 4.0), FOUR),
    "label temperature": (
        "label_temperature",
        "{}, label temperature {:g}",
        (0.3, 0.5, 1.0, 2.0),
        FOUR[1:],  # InfoNCE has none
    ),
    "queries": ("queries", "{}, {} queries", (100, 300, 1000), FOUR),
}
ABLATIONS = []  # main arms with one field changed and their learning rate kept
for field, words, values, names in CHANGES.values():
    for value in values:
        for name in names:
            if value != 1:
                change = {"name": words.format(name, value), "tuned_as": name, field: value}
                ABLATIONS.append(replace(BY_NAME[name], **change))


@dataclass
class Sources:
    """The lists that arms train on, and the development data.  No test split is in here."""

    authored: Lists
    same_questions: Lists
    real: list  # of lists, by seed: one annotated positive and two others are drawn
    development: list  # of collections


def load_sources(wikiqa: Place, seeds: int) -> Sources:
    """Read the kit's lists and WikiQA's train split.

    Development data: held-out authored lists, and WikiQA train questions, which no arm trains on,
    over all its sentences.
    """
    authored, held_out = split_lists(load_lists(AUTHORED), 0.1, seed=0)
    same_questions = load_lists(AUTHORED.with_name("wikiqa-graded.jsonl"), wikiqa)
    by_seed = [real_lists(wikiqa, seed=seed) for seed in range(seeds)]
    free = {item.id for item in by_seed[0]} - {item.id for item in same_questions}
    questions = random.Random(0).sample(sorted(free), QUESTIONS)
    corpus, queries, qrels = load_beir(wikiqa, "train")
    judged = {question: qrels[question] for question in sorted(questions)}
    real = [[item for item in lists if item.id not in judged] for lists in by_seed]
    development = [as_collection(held_out), (corpus, queries, judged)]
    return Sources(authored, same_questions, real, development)


def arm_lists(arm: Arm, sources: Sources, seed: int) -> Lists:
    """The lists of an arm in one run; what a recipe draws, it draws with the run's seed."""
    match arm.lists:
        case "real":
            return sources.real[seed]
        case "same questions":
            return sources.same_questions
        case "synthetic + real":
            return combine(sources.same_questions, sources.real[seed])
    lists = sources.authored
    if arm.queries:
        lists = random.Random(seed).sample(lists, arm.queries)
    return recipe(lists, arm.lists, seed)
