"""Tune, train and score every arm; what is recorded is not repeated."""

import copy
import subprocess
import sys
from dataclasses import asdict, dataclass, field
from itertools import chain, product
from pathlib import Path
from statistics import fmean
from typing import Any

from filelock import FileLock

from repro.data import Collection, as_collection, load_beir
from repro.encoder import BiEncoder
from repro.evaluate import evaluate_model
from repro.experiment.arms import (
    ABLATION_SEEDS,
    ABLATION_START,
    ABLATIONS,
    BATCH,
    BY_NAME,
    MAIN,
    REFERENCES,
    STARTS,
    Arm,
    Sources,
    arm_lists,
    load_sources,
)
from repro.experiment.claims import (
    COLLECTIONS,
    RESULTS,
    SCORE,
    add_run,
    key_of,
    read_records,
    read_tuning,
)
from repro.support.files import options, run_command, write_json
from repro.support.models import machine, pick_dtype
from repro.train import TrainConfig, start_temperature, train_encoder

DIGITS = 5
NAMES = [arm.name for arm in chain(REFERENCES, MAIN, *ABLATIONS.values())]


@dataclass
class Options:
    """Tune, train and score every arm; what is recorded is not repeated.

    A stopped command goes on when it is given again.  On two cores start it twice, with
    OMP_NUM_THREADS=1, `--share 1 2` and `--share 2 2`: each process takes every second arm, and a
    lock keeps the records whole.  Tuning is handed development data only.

    data: folder that holds the seven BEIR folders
    start: base, all-minilm-l6-v2; none: both
    arm: names of arms, as the results page has them; none: all
    share: two numbers I N, every N-th of these arms from the I-th on
    device: auto, cpu, cuda, mps; dtype: of arms that train whole
    """

    data: Path
    start: list[str] | None = field(default=None, metadata={"choices": STARTS})
    arm: list[str] | None = field(default=None, metadata={"choices": NAMES, "metavar": "ARM"})
    share: list[int] | None = None
    device: str = "cpu"
    dtype: str = "auto"


@dataclass
class Study:
    """What the runs of one start share."""

    start: str
    encoder: BiEncoder
    sources: Sources
    place: dict  # commit, machine, number format
    folder: Path = RESULTS


def commit() -> str:
    """The commit that the code stands at, with + behind it if files were changed since."""
    command = "git describe --always --abbrev=12 --dirty=+ --exclude=*"
    done = subprocess.run(command, shell=True, cwd=RESULTS, capture_output=True, text=True)
    return done.stdout.strip() or "unknown"


def open_study(start: str, wikiqa: Path, device: str, dtype: str) -> Study:
    """Load a start and the lists that its arms train on.

    A frozen transformer's vectors are computed here, in an order that no arm's draws change: they
    are kept in blocks of texts, and the next process then finds the same blocks.
    """
    encoder = BiEncoder.load(start, device)
    if encoder.frozen:
        dtype = "float32"  # of the vectors that are kept
    facts = machine(encoder.device, pick_dtype(dtype, encoder.device, encoding=True))
    place = {"commit": commit(), "dtype": facts.pop("dtype"), "machine": facts}
    sources = load_sources(wikiqa, STARTS[start].seeds)
    study = Study(start, encoder, sources, place)
    if not encoder.frozen:
        return study
    for corpus, _, _ in reversed(sources.development):
        encoder.mean_vectors(list(corpus.values()), "passage")
    for lists in (sources.authored, sources.same_questions):
        corpus, queries, _ = as_collection(lists)
        encoder.mean_vectors(list(queries.values()), "query")
        encoder.mean_vectors(list(corpus.values()), "passage")
    return study


def trained(study: Study, arm: Arm, lr: float, seed: int) -> tuple[BiEncoder, dict]:
    """A copy of the start, trained, and the settings that it was trained with."""
    encoder = copy.deepcopy(study.encoder)
    lists = arm_lists(arm, study.sources, seed)
    config = TrainConfig(
        loss=arm.loss,
        ties=arm.ties,
        label_temperature=arm.label_temperature,
        seed=seed,
        lr=lr,
        batch_size=BATCH,
        steps=STARTS[study.start].steps,
        dtype=study.place["dtype"],
    )
    if arm.multiple != 1:
        config.temperature = arm.multiple * start_temperature(encoder, lists, config)
    used, rows, minutes = train_encoder(encoder, lists, config)
    settings = {
        "queries": len(lists),
        "lr": lr,
        "steps": used.steps,
        "temperature": round(used.temperature, 6),
        "last_loss": round(rows[-1]["loss"], 6),
        "minutes": round(minutes, 3),
    }
    return encoder, asdict(arm) | settings


def trial(study: Study, arm: Arm, rate: float) -> float:
    """nDCG@10 on development data, collections with equal weight, after training with one rate.

    What is recorded is not trained again.
    """
    known = read_tuning(study.folder).get(study.start, {}).get(arm.name, {})
    if str(rate) in known:
        return known[str(rate)]
    encoder, _ = trained(study, arm, rate, seed=0)
    found = []
    for collection in study.sources.development:
        record = evaluate_model(encoder, *collection, measures=(SCORE,), top_k=10)
        found.append(record["metrics"][SCORE])
    value = round(fmean(found), DIGITS)
    with FileLock(study.folder / "records.lock"):
        table = read_tuning(study.folder)
        table.setdefault(study.start, {}).setdefault(arm.name, {})[str(rate)] = value
        write_json(study.folder / "tuning.json", table)
    print(study.start, arm.name, rate, value)
    return value


def tune(study: Study, arm: Arm) -> float:
    """The learning rate that development data prefer; one at an edge is tried beyond, in twos."""
    rates = STARTS[study.start].rates
    if len(rates) == 1:
        return rates[0]
    values = {}
    while True:
        for rate in rates:
            values[rate] = trial(study, arm, rate)
        best = max(values, key=values.get)
        if min(values) < best < max(values):
            return best
        rates = (best / 2, best * 2)


def made(study: Study, arm: Arm, seed: int | None) -> tuple[Any, dict]:
    """What an arm is scored with, and its settings: BM25, the start, or a trained copy of it."""
    if arm.name == "BM25":
        return "bm25", {}
    if arm.name == "start":
        encoder, settings = copy.deepcopy(study.encoder), {}
    else:
        lr = tune(study, BY_NAME[arm.tuned_as or arm.name])
        encoder, settings = trained(study, arm, lr, seed)
    encoder.model.to(pick_dtype(study.place["dtype"]))
    return encoder, settings


def do(study: Study, collections: dict[str, Collection], arm: Arm, seed: int | None) -> None:
    """Do one run, unless its record is there."""
    record = {"start": study.start, "arm": arm.name, "seed": seed, "place": study.place}
    if arm.name == "BM25":
        record["start"] = None  # it belongs to no start
    key = key_of(record)
    if key in map(key_of, read_records(study.folder)):
        return
    model, record["settings"] = made(study, arm, seed)
    record["collections"], rows = {}, []
    for name, collection in collections.items():
        found = evaluate_model(model, *collection)
        metrics = {measure: round(value, DIGITS) for measure, value in found["metrics"].items()}
        record["collections"][name] = {"metrics": metrics, **found["counts"]}
        rows += [(*key, name, query, row[SCORE]) for query, row in found["per_query"].items()]
    with FileLock(study.folder / "records.lock"):
        add_run(study.folder, record, rows)
    print(*key, record["collections"])


def jobs(start: str) -> list[tuple]:
    """(seed, arm), the seeds outside, so that a stopped study has whole rounds of arms."""
    found = [*product([None], REFERENCES), *product(range(STARTS[start].seeds), MAIN)]
    if start == ABLATION_START:
        found += product(range(ABLATION_SEEDS), chain(*ABLATIONS.values()))
    return found


def command(asked: Options) -> None:
    """Do what has no record."""
    share = asked.share or [1, 1]
    if len(share) != 2 or not 1 <= share[0] <= share[1]:
        raise ValueError(f"--share: expected I N with I from 1 to N, found {share}")
    mine = (asked.arm or NAMES)[share[0] - 1 :: share[1]]
    data = asked.data.resolve()  # a whole path is no id of the hub
    collections = {name: load_beir(data / name) for name in COLLECTIONS}
    for start in asked.start or STARTS:
        study = open_study(start, data / "wikiqa", asked.device, asked.dtype)
        for seed, arm in jobs(start):
            if arm.name in mine:
                do(study, collections, arm, seed)


def main(argv: list[str] | None = None) -> int:
    """Command line; see --help."""
    return run_command(lambda: command(*options("repro.experiment.run", argv, Options)))


if __name__ == "__main__":
    sys.exit(main())
