"""Tune, train and score every arm; what is recorded is not repeated.

A stopped command goes on when it is given again.  On two cores start it twice, with
OMP_NUM_THREADS=1, `--share 1 2` and `--share 2 2`: each process takes every second arm, and a lock
keeps the records whole.  Tuning is handed development data only.
"""

import argparse
import copy
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from filelock import FileLock

from repro.data import Collection, load_beir
from repro.encoder import BiEncoder
from repro.evaluate import evaluate_model
from repro.experiment import arms
from repro.experiment.arms import Arm, Sources
from repro.experiment.claims import (
    COLLECTIONS,
    RESULTS,
    Run,
    key_of,
    read_runs,
    read_tuning,
    write_runs,
)
from repro.support.files import run_command, write_json
from repro.support.models import machine, pick_device, pick_dtype
from repro.train import TrainConfig, start_temperature, train_encoder

DIGITS = 5
GROUPS = {"references": arms.REFERENCES, "tuning": arms.MAIN, "main": arms.MAIN, **arms.ABLATIONS}
Job = tuple[str, Arm, int | None]  # group, arm, seed


@dataclass
class Study:
    """What the runs of one start share."""

    start: str
    encoder: BiEncoder
    sources: Sources
    place: dict[str, Any]  # commit, machine, number format
    folder: Path


def records_lock(study: Study) -> FileLock:
    """Held while the records are read and written again."""
    return FileLock(study.folder / "records.lock")


def commit() -> str:
    """The commit that the code stands at, with + behind it if files were changed since."""
    command = ["git", "describe", "--always", "--abbrev=12", "--dirty=+", "--exclude=*"]
    try:
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    except OSError:  # there is no git
        return "unknown"
    return done.stdout.strip() or "unknown"


def keep_vectors(encoder: BiEncoder, sources: Sources) -> None:
    """Compute a frozen transformer's vectors in an order that no arm's draws change.

    They are kept in blocks of texts: the next process then finds the same blocks.
    """
    for corpus, _, _ in reversed(sources.development):
        encoder.mean_vectors(list(corpus.values()), "passage", progress=True)
    for lists in (sources.authored, sources.same_questions):
        encoder.mean_vectors([item.query for item in lists], "query", progress=True)
        passages = [text for item in lists for text in item.passages]
        encoder.mean_vectors(passages, "passage", progress=True)


def open_study(start: str, wikiqa: Path, device: str, dtype: str, folder: Path = RESULTS) -> Study:
    """Load a start and the lists that its arms train on."""
    encoder = BiEncoder.load(start, device, "float32")
    number_format = "float32"  # of the vectors that are kept where only a linear map trains
    if not encoder.frozen:
        number_format = str(pick_dtype(dtype, pick_device(device), encoding=True))
    place = {"commit": commit(), "machine": machine(encoder.device)}
    place["dtype"] = number_format.removeprefix("torch.")
    sources = arms.load_sources(wikiqa, arms.STARTS[start].seeds)
    if encoder.frozen:
        keep_vectors(encoder, sources)
    return Study(start, encoder, sources, place, folder)


def trained(study: Study, arm: Arm, lr: float, seed: int) -> tuple[BiEncoder, dict[str, Any]]:
    """A copy of the start, trained, and the settings that it was trained with."""
    encoder = copy.deepcopy(study.encoder)
    lists = arms.arm_lists(arm, study.sources, seed)
    config = TrainConfig(
        loss=arm.loss,
        ties=arm.ties,
        label_temperature=arm.label_temperature,
        seed=seed,
        lr=lr,
        batch_size=arms.BATCH,
        epochs=1,
        steps=arms.STARTS[study.start].steps,
        dtype=study.place["dtype"],
    )
    if arm.multiple != 1:
        config.temperature = arm.multiple * start_temperature(encoder, lists, config)
    used, rows, minutes = train_encoder(encoder, lists, config)
    settings = asdict(arm) | {"queries": len(lists), "lr": lr, "steps": used.steps}
    settings["temperature"] = round(used.temperature, 6)
    settings["last_loss"] = round(rows[-1]["loss"], 6)
    settings["minutes"] = round(minutes, 3)
    return encoder, settings


def development_ndcg(encoder: BiEncoder, development: Sequence[Collection]) -> float:
    """nDCG@10 on development data, the collections with equal weight."""
    found = []
    for collection in development:
        record = evaluate_model(encoder, *collection, measures=("ndcg@10",), top_k=10)
        found.append(record["metrics"]["ndcg@10"])
    return round(fmean(found), DIGITS)


def trial(study: Study, arm: Arm, rate: float) -> None:
    """Train with one learning rate and record what development data say of it."""
    encoder, _ = trained(study, arm, rate, seed=0)
    value = development_ndcg(encoder, study.sources.development)
    with records_lock(study):
        table = read_tuning(study.folder)
        table.setdefault(study.start, {}).setdefault(arm.name, {})[str(rate)] = value
        write_json(study.folder / "tuning.json", table)
    print(f"{study.start}, {arm.name}, rate {rate}: {value}", flush=True)


def tune(study: Study, arm: Arm) -> float:
    """The learning rate that development data prefer; one at an edge is tried beyond, in twos."""
    rates = list(arms.STARTS[study.start].rates)
    if len(rates) == 1:
        return rates[0]
    while True:
        known = read_tuning(study.folder).get(study.start, {}).get(arm.name, {})
        missing = [rate for rate in rates if str(rate) not in known]
        if missing:
            trial(study, arm, missing[0])
            continue
        best = max(rates, key=lambda rate: known[str(rate)])
        if min(rates) < best < max(rates):
            return best
        rates.append(best / 2 if best == min(rates) else best * 2)


def made(study: Study, arm: Arm, seed: int | None) -> tuple[Any, dict[str, Any]]:
    """What an arm is scored with, and its settings: BM25, the start, or a trained copy of it."""
    if arm.name == "BM25":
        return "bm25", {}
    if arm.name == "start":
        encoder, settings = copy.deepcopy(study.encoder), {}
    else:
        lr = tune(study, arms.BY_NAME[arm.tuned_as or arm.name])
        encoder, settings = trained(study, arm, lr, seed)
    if not encoder.frozen:
        encoder.model.to(pick_dtype(study.place["dtype"]))
    return encoder, settings


def score(run: Run, model: Any, collections: dict[str, Collection]) -> None:
    """Rank and score every collection into the run."""
    for name, (corpus, queries, qrels) in collections.items():
        found = evaluate_model(model, corpus, queries, qrels)
        metrics = {measure: round(value, DIGITS) for measure, value in found["metrics"].items()}
        counts = {"passages": len(corpus), "queries": len(qrels)}
        run["collections"][name] = {"metrics": metrics, **counts}
        per_query = found["per_query"].items()
        run["per_query"][name] = {query: row["ndcg@10"] for query, row in per_query}


def do(study: Study, job: Job, collections: dict[str, Collection]) -> None:
    """Do one job, unless its record is there."""
    group, arm, seed = job
    if group == "tuning":
        tune(study, arm)
        return
    run = {"start": study.start, "group": group, "arm": arm.name, "seed": seed}
    if arm.name == "BM25":
        run["start"] = None  # it belongs to no start
    if any(key_of(one) == key_of(run) for one in read_runs(study.folder)):
        return
    model, settings = made(study, arm, seed)
    run |= {"settings": settings, "place": study.place, "collections": {}, "per_query": {}}
    score(run, model, collections)
    with records_lock(study):
        write_runs(study.folder, [*read_runs(study.folder), run])
    means = {name: one["metrics"]["ndcg@10"] for name, one in run["collections"].items()}
    print(f"{key_of(run)}: {means}", flush=True)


def jobs(start: str, groups: Sequence[str], names: Sequence[str] | None = None) -> list[Job]:
    """All jobs of a start, the seeds outside, so that a stopped study has whole rounds of arms."""
    found = []
    for group in groups:
        seeds = range(arms.ABLATION_SEEDS)
        if group in ("references", "tuning"):
            seeds = [None]
        elif group == "main":
            seeds = range(arms.STARTS[start].seeds)
        elif start != arms.ABLATION_START:
            seeds = []
        for seed in seeds:
            found += [(group, arm, seed) for arm in GROUPS[group]]
    if names:
        return [job for job in found if job[1].name in names]
    return found


def load_collections(folder: str | Path) -> dict[str, Collection]:
    """The seven test collections out of one folder.  ValueError naming one that is missing."""
    for name in COLLECTIONS:
        if not Path(folder, name).is_dir():
            raise ValueError(f"{folder}: expected a BEIR folder {name!r} in it, found none")
    return {name: load_beir(Path(folder, name)) for name in COLLECTIONS}


def main(argv: list[str] | None = None) -> int:
    """Command line: do what has no record."""
    parser = argparse.ArgumentParser("python -m repro.experiment.run", description=__doc__)
    names = [arm.name for group in GROUPS.values() for arm in group]
    add = parser.add_argument
    add("--data", required=True, help="folder that holds the seven BEIR folders")
    add("--start", nargs="+", choices=arms.STARTS, default=list(arms.STARTS))
    add("--group", nargs="+", choices=GROUPS, default=list(GROUPS))
    add("--arm", nargs="+", choices=names, metavar="ARM", help="only these arms")
    add("--share", nargs=2, type=int, default=(1, 1), metavar=("I", "N"), help="every N-th arm")
    add("--device", default="cpu")
    add("--dtype", default="auto", help="of arms that train whole")
    args = parser.parse_args(argv)

    def work() -> None:
        first, count = args.share
        if not 1 <= first <= count:
            raise ValueError(f"--share: expected I from 1 to N, got {first} {count}")
        collections = load_collections(args.data)
        for start in args.start:
            todo = jobs(start, args.group, args.arm)
            mine = list(dict.fromkeys(arm.name for _, arm, _ in todo))[first - 1 :: count]
            study = open_study(start, Path(args.data, "wikiqa"), args.device, args.dtype)
            for job in todo:
                if job[1].name in mine:
                    do(study, job, collections)

    return run_command(work)


if __name__ == "__main__":
    sys.exit(main())
