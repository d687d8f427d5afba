"""Choose each arm's settings on held-out training queries: the same number of trials for every arm.

A trial trains the arm once and ranks the development queries' own passages among those of all other
queries, training ones included; nDCG@10 over the grades decides.  No test collection is looked at.
Half of the trials are drawn from the arm's grid, the others move from the best one to its neighbours; a
grid that is smaller than the number of trials is tried whole.
"""

import copy
import itertools
import random
import time
from dataclasses import replace
from typing import Any

from tqdm import tqdm

from repro.arms import BATCH, STEPS, Arm, ListSet
from repro.encoder import BiEncoder
from repro.evaluate import evaluate_model
from repro.lists import as_collection
from repro.recipe import TrainConfig, chosen_settings
from repro.states import FromStates, StateBank
from repro.train import fit, make_optimiser

TRIALS, TRIAL_SEED = 32, 0


def settings_of(arm: Arm, tuned: dict[str, Any]) -> dict[str, Any]:
    """The TrainConfig fields of an arm: what tuning chose, overridden by what the arm fixes."""
    return {**tuned, **arm.fixed}


def train_arm(arm: Arm, settings: dict[str, Any], lists: ListSet, seed: int, start: BiEncoder, bank: StateBank) -> tuple[BiEncoder, dict]:
    """Train a copy of `start` (frozen as it is) on the arm's lists: (encoder, what a record says about it)."""
    known = {key: value for key, value in settings.items() if key != "model"}
    config = TrainConfig(**{"lists": (arm.lists,), "loss": arm.loss, "seed": seed, "steps": STEPS, "batch_size": BATCH, **known})
    config = replace(config, freeze=start.frozen)
    bank.add([item.query for item in lists.train], "query")
    bank.add([passage for item in lists.train for passage in item.passages], "passage")
    encoder = copy.deepcopy(start).train()
    chosen = chosen_settings(config, encoder, len(lists.train))
    began = time.monotonic()
    losses = [row["loss"] for row in fit(encoder, lists.train, bank, config, chosen, make_optimiser(encoder, config, chosen["lr"]))]
    told = {"lists": arm.lists, "loss": arm.loss, "queries": len(lists.train), **known, **chosen}
    return encoder.eval(), told | {"last_loss": round(losses[-1], 6), "minutes": round((time.monotonic() - began) / 60, 3)}


def development_ndcg(encoder: BiEncoder, lists: ListSet, bank: StateBank) -> float:
    """nDCG@10 of the held-out queries over their own passages, mixed with those of all queries of the set."""
    everything = [*lists.held_out, *lists.train]
    bank.add([item.query for item in lists.held_out], "query")
    bank.add([passage for item in everything for passage in item.passages], "passage")
    corpus, queries, qrels = as_collection(everything)
    judged = {item.id: qrels[item.id] for item in lists.held_out}
    return evaluate_model(FromStates(encoder, bank), corpus, queries, judged, measures=("ndcg@10",), top_k=10)["metrics"]["ndcg@10"]


def next_trial(arm: Arm, rows: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The settings to try after those in `rows` (each with its "ndcg@10"); None if the grid is exhausted.

    The first half of the trials is drawn at random, the same for every call; then one setting of the best
    trial so far is moved to a neighbouring value.  Where all neighbours are known, the draw goes on.
    """
    grid = [dict(zip(arm.space, values, strict=True)) for values in itertools.product(*arm.space.values())]
    drawn = random.Random(f"{TRIAL_SEED}/{arm.name}").sample(grid, len(grid))
    known = [{key: row[key] for key in arm.space} for row in rows]
    if 2 * len(rows) >= TRIALS:
        best = max(rows, key=lambda row: row["ndcg@10"])

        def steps(settings: dict[str, Any]) -> list[int]:
            return [abs(values.index(settings[key]) - values.index(best[key])) for key, values in arm.space.items()]

        near = [settings for settings in drawn if sum(steps(settings)) == 1 and settings not in known]
        if near:
            return near[0]
    return next((settings for settings in drawn if settings not in known), None)


def tune(arm: Arm, lists: ListSet, start: BiEncoder, bank: StateBank, progress: bool = True) -> dict[str, Any]:
    """{"best": settings, "start": nDCG of the start, "trials": [settings with their nDCG, ...]}; ties go to the earlier trial."""
    rows: list[dict[str, Any]] = []
    for _ in tqdm(range(TRIALS), desc=f"tune {arm.name}", unit="trial", disable=not progress):
        if (settings := next_trial(arm, rows)) is None:
            break
        encoder, _ = train_arm(arm, settings, lists, TRIAL_SEED, start, bank)
        rows.append({**settings, "ndcg@10": round(development_ndcg(encoder, lists, bank), 5)})
    best = max(rows, key=lambda row: row["ndcg@10"])
    start_ndcg = round(development_ndcg(start, lists, bank), 5)
    return {"best": {key: best[key] for key in arm.space}, "start": start_ndcg, "trials": rows}
