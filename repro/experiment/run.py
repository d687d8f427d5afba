"""Tune, train and score every arm, and keep one record a run; nothing that is recorded is
repeated.

A stopped command goes on when it is given again.  On two cores start it twice, with
OMP_NUM_THREADS=1 and `--share 1/2` and `--share 2/2`: each process takes every second arm, and a
lock around the records keeps them whole.  Tuning is handed development data only; test
collections come later.
"""

import argparse
import copy
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from filelock import FileLock

from repro.data import Collection, load_beir
from repro.encoder import BiEncoder
from repro.evaluate import evaluate_model
from repro.experiment.arms import (
    ABLATION_SEEDS,
    ABLATION_START,
    ABLATIONS,
    BATCH,
    MAIN,
    STARTS,
    Arm,
    Sources,
    arm_lists,
    load_sources,
)
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
GROUPS = ("references", "tuning", "main", *ABLATIONS)


@dataclass(frozen=True)
class Job:
    """One thing to do: a reference (an arm's name), the tuning of an arm, or a run of it."""

    group: str
    arm: Arm | str
    seed: int | None

    @property
    def name(self) -> str:
        if isinstance(self.arm, str):
            return self.arm
        return self.arm.name


@dataclass
class Study:
    """What the runs of one start share."""

    start: str
    encoder: BiEncoder
    sources: Sources
    place: dict[str, Any]  # commit, machine, number format
    folder: Path

    @property
    def lock(self) -> FileLock:
        return FileLock(self.folder / "records.lock")


def commit() -> str:
    """The commit that the code stands at, with + behind it if files were changed since."""
    command = ["git", "describe", "--always", "--abbrev=12", "--dirty=+", "--exclude=*"]
    try:
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    except OSError:
        return "unknown"
    return done.stdout.strip() or "unknown"


def open_study(start: str, wikiqa: Path, device: str, dtype: str, folder: Path = RESULTS) -> Study:
    """Load a start and the lists that its arms train on."""
    encoder = BiEncoder.load(start, device, "float32")
    number_format = "float32"  # whose vectors are kept, where only a linear map trains
    if not encoder.frozen:
        number_format = str(pick_dtype(dtype, pick_device(device), encoding=True))
    sources = load_sources(wikiqa, STARTS[start].seeds)
    place = {
        "commit": commit(),
        "machine": machine(encoder.device),
        "dtype": number_format.removeprefix("torch."),
    }
    return Study(start, encoder, sources, place, folder)


def trained(
    study: Study, arm: Arm, lr: float, seed: int
) -> tuple[BiEncoder, dict[str, Any], float]:
    """A copy of the start, trained: (encoder, its settings, minutes)."""
    encoder = copy.deepcopy(study.encoder)
    lists = arm_lists(arm, study.sources, seed)
    steps = STARTS[study.start].steps
    config = TrainConfig(
        loss=arm.loss,
        ties=arm.ties,
        label_temperature=arm.label_temperature,
        seed=seed,
        lr=lr,
        batch_size=BATCH,
        steps=steps,
        epochs=1 if steps is None else None,
        dtype=study.place["dtype"],
    )
    if arm.multiple != 1:
        config.temperature = arm.multiple * start_temperature(encoder, lists, config)
    used, rows, minutes = train_encoder(encoder, lists, config)
    settings = {
        "loss": arm.loss,
        "lists": arm.lists,
        "ties": arm.ties,
        "queries": len(lists),
        "temperature": round(used.temperature, 6),
        "multiple": arm.multiple,
        "label_temperature": arm.label_temperature,
        "lr": lr,
        "steps": used.steps,
        "last_loss": round(rows[-1]["loss"], 6),
    }
    return encoder, settings, round(minutes, 3)


def scorer(study: Study, encoder: BiEncoder) -> BiEncoder:
    """The encoder in the number format of scoring."""
    if not encoder.frozen:
        encoder.model.to(pick_dtype(study.place["dtype"]))
    return encoder


def tune(study: Study, arm: Arm) -> float:
    """The learning rate that development data prefer; trials that are recorded are not
    repeated."""
    rates = STARTS[study.start].rates
    if len(rates) == 1:
        return rates[0]
    for rate in rates:
        known = read_tuning(study.folder).get(study.start, {}).get(arm.name, {})
        if str(rate) in known:
            continue
        encoder, _, _ = trained(study, arm, rate, seed=0)
        scores = [development_ndcg(encoder, data) for data in study.sources.development]
        with study.lock:
            table = read_tuning(study.folder)
            trials = table.setdefault(study.start, {}).setdefault(arm.name, {})
            trials[str(rate)] = round(fmean(scores), DIGITS)
            write_json(study.folder / "tuning.json", table)
        print(f"{study.start}, {arm.name}, rate {rate}: {scores}", flush=True)
    trials = read_tuning(study.folder)[study.start][arm.name]
    return max(rates, key=lambda rate: trials[str(rate)])


def development_ndcg(encoder: BiEncoder, data: Collection) -> float:
    """nDCG@10 on one of the two development collections, which have equal weight."""
    found = evaluate_model(encoder, *data, measures=("ndcg@10",), top_k=10)
    return found["metrics"]["ndcg@10"]


def score(study: Study, run: Run, model: Any, collections: dict[str, Collection]) -> None:
    """Rank and score every collection, and put the run among the records."""
    for name, (corpus, queries, qrels) in collections.items():
        found = evaluate_model(model, corpus, queries, qrels)
        metrics = {measure: round(value, DIGITS) for measure, value in found["metrics"].items()}
        counts = {"passages": len(corpus), "queries": len(qrels)}
        run["collections"][name] = {"metrics": metrics, **counts}
        per_query = found["per_query"].items()
        run["per_query"][name] = {query: row["ndcg@10"] for query, row in per_query}
    with study.lock:
        others = [one for one in read_runs(study.folder) if key_of(one) != key_of(run)]
        write_runs(study.folder, [*others, run])
    means = {name: one["metrics"]["ndcg@10"] for name, one in run["collections"].items()}
    print(f"{key_of(run)}: {means}", flush=True)


def do(study: Study, job: Job, collections: dict[str, Collection]) -> None:
    """Do one job, unless its record is there."""
    if job.group == "tuning":
        tune(study, job.arm)
        return
    start = study.start
    if job.name == "BM25":
        start = None  # it belongs to no start
    run = {"start": start, "group": job.group, "arm": job.name, "seed": job.seed}
    if any(key_of(one) == key_of(run) for one in read_runs(study.folder)):
        return
    run |= {"settings": {}, "minutes": 0.0, "place": study.place}
    run |= {"collections": {}, "per_query": {}}
    if job.name == "BM25":
        model = "bm25"
    elif job.name == "start":
        model = scorer(study, copy.deepcopy(study.encoder))
    else:
        tuned = next(arm for arm in MAIN if arm.name == (job.arm.tuned_as or job.name))
        lr = tune(study, tuned)
        model, run["settings"], run["minutes"] = trained(study, job.arm, lr, job.seed)
        model = scorer(study, model)
    score(study, run, model, collections)


def jobs(start: str, groups: Sequence[str], names: Sequence[str] | None = None) -> list[Job]:
    """All jobs of a start, the seeds outside, so that a stopped study has whole rounds of
    arms."""
    found = []
    if "references" in groups:
        found += [Job("references", name, None) for name in ("start", "BM25")]
    if "tuning" in groups and len(STARTS[start].rates) > 1:
        found += [Job("tuning", arm, None) for arm in MAIN]
    if "main" in groups:
        seeds = range(STARTS[start].seeds)
        found += [Job("main", arm, seed) for seed in seeds for arm in MAIN]
    if start == ABLATION_START:
        for group, arms in ABLATIONS.items():
            if group in groups:
                seeds = range(ABLATION_SEEDS)
                found += [Job(group, arm, seed) for seed in seeds for arm in arms]
    if names:
        return [job for job in found if job.name in names]
    return found


def load_collections(folder: str | Path) -> dict[str, Collection]:
    """The seven test collections out of one folder.  ValueError naming the first that is
    missing."""
    places = {name: Path(folder) / name for name in COLLECTIONS}
    for name, place in places.items():
        if not place.is_dir():
            raise ValueError(f"{folder}: expected a BEIR folder {name!r} in it, found none")
    return {name: load_beir(place) for name, place in places.items()}


def share_of(text: str) -> tuple[int, int]:
    """(I, N) of a share "I/N", 1 <= I <= N.  ValueError for anything else."""
    first, _, count = text.partition("/")
    if not (first.isdecimal() and count.isdecimal() and 1 <= int(first) <= int(count)):
        raise ValueError(f"--share: expected I/N with I from 1 to N, got {text!r}")
    return int(first), int(count)


def main(argv: list[str] | None = None) -> int:
    """Command line: do what has no record."""
    arms = [arm.name for group in (MAIN, *ABLATIONS.values()) for arm in group]
    parser = argparse.ArgumentParser("python -m repro.experiment.run", description=__doc__)
    parser.add_argument("--data", required=True, help="folder that holds the seven BEIR folders")
    parser.add_argument("--start", nargs="+", choices=STARTS, default=list(STARTS))
    parser.add_argument("--group", nargs="+", choices=GROUPS, default=GROUPS)
    parser.add_argument("--arm", nargs="+", choices=arms, metavar="ARM", help="only these arms")
    parser.add_argument("--share", default="1/1", help="I/N: every N-th arm, from the I-th on")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="auto", help="of arms that train whole")
    args = parser.parse_args(argv)

    def work() -> None:
        first, count = share_of(args.share)
        collections = load_collections(args.data)
        for start in args.start:
            todo = jobs(start, args.group, args.arm)
            names = list(dict.fromkeys(job.name for job in todo))
            mine = names[first - 1 :: count]
            study = open_study(start, Path(args.data) / "wikiqa", args.device, args.dtype)
            for job in todo:
                if job.name in mine:
                    do(study, job, collections)

    return run_command(work)


if __name__ == "__main__":
    sys.exit(main())
