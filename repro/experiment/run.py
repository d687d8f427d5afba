"""Tune, train and score every arm; what is recorded is not repeated.

A stopped command goes on when it is given again.  On two cores start it twice, with
OMP_NUM_THREADS=1, `--share 1 2` and `--share 2 2`: each process takes every second arm, and a lock
keeps the records whole.  Tuning is handed development data only.
"""

import argparse
import copy
import shlex
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from filelock import FileLock

from repro.data import Collection, as_collection, load_beir
from repro.encoder import BiEncoder
from repro.evaluate import evaluate_model
from repro.experiment import arms, claims
from repro.experiment.arms import Arm, Sources
from repro.support.files import run_command, write_json
from repro.support.models import machine, pick_dtype
from repro.train import TrainConfig, start_temperature, train_encoder

DIGITS = 5
Job = tuple[Arm, int | None]  # and its seed


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
    command = f"git -C {shlex.quote(str(Path(__file__).parent))} describe --always --abbrev=12"
    status, text = subprocess.getstatusoutput(f"{command} --dirty=+ --exclude='*'")
    return "unknown" if status else text  # there may be no git


def keep_vectors(encoder: BiEncoder, sources: Sources) -> None:
    """Compute a frozen transformer's vectors in an order that no arm's draws change.

    They are kept in blocks of texts: the next process then finds the same blocks.
    """
    for corpus, _, _ in reversed(sources.development):
        encoder.mean_vectors(list(corpus.values()), "passage", progress=True)
    for lists in (sources.authored, sources.same_questions):
        corpus, queries, _ = as_collection(lists)
        encoder.mean_vectors(list(queries.values()), "query", progress=True)
        encoder.mean_vectors(list(corpus.values()), "passage", progress=True)


def open_study(
    start: str, wikiqa: Path, device: str, dtype: str, folder: Path = claims.RESULTS
) -> Study:
    """Load a start and the lists that its arms train on."""
    encoder = BiEncoder.load(start, device, "float32")
    if encoder.frozen:
        dtype = "float32"  # of the vectors that are kept
    number_format = str(pick_dtype(dtype, encoder.device, encoding=True))
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
    return encoder, {
        **asdict(arm),
        "queries": len(lists),
        "lr": lr,
        "steps": used.steps,
        "temperature": round(used.temperature, 6),
        "last_loss": round(rows[-1]["loss"], 6),
        "minutes": round(minutes, 3),
    }


def development_ndcg(encoder: BiEncoder, development: list[Collection]) -> float:
    """nDCG@10 on development data, the collections with equal weight."""
    found = [evaluate_model(encoder, *collection, top_k=10) for collection in development]
    return round(fmean(record["metrics"][claims.SCORE] for record in found), DIGITS)


def trial(study: Study, arm: Arm, rate: float) -> None:
    """Train with one learning rate and record what development data say of it."""
    encoder, _ = trained(study, arm, rate, seed=0)
    value = development_ndcg(encoder, study.sources.development)
    with records_lock(study):
        table = claims.read_tuning(study.folder)
        table.setdefault(study.start, {}).setdefault(arm.name, {})[str(rate)] = value
        write_json(study.folder / "tuning.json", table)
    print(f"{study.start}, {arm.name}, rate {rate}: {value}", flush=True)


def tune(study: Study, arm: Arm) -> float:
    """The learning rate that development data prefer; one at an edge is tried beyond, in twos."""
    rates = list(arms.STARTS[study.start].rates)
    best = rates[0]
    while len(rates) > 1:
        known = claims.read_tuning(study.folder).get(study.start, {}).get(arm.name, {})
        missing = [rate for rate in rates if str(rate) not in known]
        if missing:
            trial(study, arm, missing[0])
            continue
        best = max(rates, key=lambda rate: known[str(rate)])
        if min(rates) < best < max(rates):
            break
        rates.append(best / 2 if best == min(rates) else best * 2)
    return best


def made(study: Study, arm: Arm, seed: int | None) -> tuple[Any, dict[str, Any]]:
    """What an arm is scored with, and its settings: BM25, the start, or a trained copy of it."""
    if arm.name == "BM25":
        return "bm25", {}
    encoder, settings = copy.deepcopy(study.encoder), {}
    if arm.name != "start":
        lr = tune(study, arms.BY_NAME[arm.tuned_as or arm.name])
        encoder, settings = trained(study, arm, lr, seed)
    if not encoder.frozen:
        encoder.model.to(pick_dtype(study.place["dtype"]))
    return encoder, settings


def do(study: Study, job: Job, collections: dict[str, Collection]) -> None:
    """Do one job, unless its record is there."""
    arm, seed = job
    record = {"start": study.start, "arm": arm.name, "seed": seed}
    if arm.name == "BM25":
        record["start"] = None  # it belongs to no start
    if any(
        claims.key_of(one) == claims.key_of(record) for one in claims.read_records(study.folder)
    ):
        return
    model, settings = made(study, arm, seed)
    record |= {"settings": settings, "place": study.place, "collections": {}}
    values = {}
    for name, collection in collections.items():
        found = evaluate_model(model, *collection)
        metrics = {measure: round(value, DIGITS) for measure, value in found["metrics"].items()}
        record["collections"][name] = {"metrics": metrics, **found["counts"]}
        values[name] = {query: row[claims.SCORE] for query, row in found["per_query"].items()}
    with records_lock(study):
        claims.add_run(study.folder, record, values)
    print(*claims.key_of(record), record["collections"], flush=True)


def jobs(start: str) -> list[Job]:
    """All jobs of a start, the seeds outside, so that a stopped study has whole rounds of arms."""
    found = [(arm, None) for arm in arms.REFERENCES]
    for seed in range(arms.STARTS[start].seeds):
        found += [(arm, seed) for arm in arms.MAIN]
    if start == arms.ABLATION_START:
        for seed in range(arms.ABLATION_SEEDS):
            for group in arms.ABLATIONS.values():
                found += [(arm, seed) for arm in group]
    return found


def load_collections(folder: Path) -> dict[str, Collection]:
    """The seven test collections out of one folder.  ValueError naming one that is missing."""
    for name in claims.COLLECTIONS:
        if not (folder / name).is_dir():
            raise ValueError(f"{folder}: expected a BEIR folder {name!r} in it, found none")
    return {name: load_beir(folder / name) for name in claims.COLLECTIONS}


def work(args: argparse.Namespace) -> None:
    """Do what has no record."""
    first, count = args.share
    if not 1 <= first <= count:
        raise ValueError(f"--share: expected I from 1 to N, got {first} {count}")
    collections = load_collections(args.data)
    for start in args.start:
        mine = args.arm[first - 1 :: count]
        study = open_study(start, args.data / "wikiqa", args.device, args.dtype)
        for job in jobs(start):
            if job[0].name in mine:
                do(study, job, collections)


def main(argv: list[str] | None = None) -> int:
    """Command line; see --help."""
    parser = argparse.ArgumentParser("python -m repro.experiment.run", description=__doc__)
    names = list(dict.fromkeys(arm.name for arm, _ in jobs(arms.ABLATION_START)))
    add = parser.add_argument
    add("--data", type=Path, required=True, help="folder that holds the seven BEIR folders")
    add("--start", nargs="+", choices=arms.STARTS, default=list(arms.STARTS))
    add("--arm", nargs="+", choices=names, metavar="ARM", default=names, help="only these arms")
    add("--share", nargs=2, type=int, default=(1, 1), metavar=("I", "N"), help="every N-th arm")
    add("--device", default="cpu")
    add("--dtype", default="auto", help="of arms that train whole")
    args = parser.parse_args(argv)
    return run_command(lambda: work(args))


if __name__ == "__main__":
    sys.exit(main())
