"""Tune, train and score every arm; what is recorded is not repeated."""

import copy
import subprocess
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from statistics import fmean

from filelock import FileLock

from repro.data import as_collection, load_beir
from repro.encoder import BiEncoder
from repro.evaluate import evaluate_model
from repro.experiment.arms import (
    ABLATION_SEEDS,
    ABLATION_START,
    ABLATIONS,
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
from repro.support.files import command_line, write_json
from repro.support.models import machine, pick_dtype
from repro.train import TrainConfig, start_temperature, train_encoder

NAMES = [arm.name for arm in REFERENCES + MAIN + ABLATIONS]


@dataclass
class Options:
    """Tune, train and score every arm; what is recorded is not repeated.

    A stopped command goes on when it is given again.  On two cores start it twice, with
    OMP_NUM_THREADS=1 and other arms: a lock keeps the records whole.  Tuning is handed development
    data only.

    data: folder that holds the seven BEIR folders
    start: base, all-minilm-l6-v2; none: both
    arm: names of arms, as the results page has them; none: all
    device: auto, cpu, cuda, mps; dtype: of arms that train whole
    """

    data: Path
    start: list[str] | None = field(default=None, metadata={"choices": STARTS})
    arm: list[str] | None = field(default=None, metadata={"choices": NAMES, "metavar": "ARM"})
    device: str = "cpu"
    dtype: str = "auto"


@dataclass
class Study:
    """What the runs of one start share."""

    start: str
    encoder: BiEncoder
    sources: Sources
    collections: dict  # {name: (corpus, queries, qrels)}
    place: dict  # commit, machine, number format


def open_study(start: str, asked: Options) -> Study:
    """Load a start, the collections, and the lists that arms train on.

    A frozen transformer's vectors are computed here, in an order that no arm's draws change: they
    are kept in blocks of texts, and the next process then finds the same blocks.
    """
    data = asked.data.resolve()  # a whole path is no id of the hub
    collections = {name: load_beir(data / name) for name in COLLECTIONS}
    sources = load_sources(data / "wikiqa", STARTS[start].seeds)
    encoder = BiEncoder.load(start, asked.device)
    dtype = asked.dtype
    if encoder.frozen:
        dtype = "float32"  # of the vectors that are kept
        for corpus, queries, qrels in (
            *sources.development,
            as_collection(sources.authored),
            as_collection(sources.same_questions),
        ):
            encoder.mean_vectors([queries[query] for query in qrels], "query")
            encoder.mean_vectors(list(corpus.values()), "passage")
    failed, commit = subprocess.getstatusoutput(  # + behind it: files were changed since
        f'git -C "{RESULTS}" describe --always --abbrev=12 --dirty=+ --exclude=*'
    )
    if failed:
        commit = "unknown"
    facts = machine(encoder.device, pick_dtype(dtype, encoder.device, encoding=True))
    place = {"commit": commit, "dtype": facts.pop("dtype"), "machine": facts}
    return Study(start, encoder, sources, collections, place)


def trained(study: Study, arm: Arm, lr: float, seed: int) -> tuple:
    """A copy of the start, trained, and the settings that it was trained with."""
    encoder = copy.deepcopy(study.encoder)
    lists = arm_lists(arm, study.sources, seed)
    config = TrainConfig(
        loss=arm.loss,
        ties=arm.ties,
        label_temperature=arm.label_temperature,
        seed=seed,
        lr=lr,
        batch_size=16,
        steps=STARTS[study.start].steps,
        dtype=study.place["dtype"],
    )
    if arm.multiple != 1:
        config.temperature = arm.multiple * start_temperature(encoder, lists, config)
    used, rows, minutes = train_encoder(encoder, lists, config)
    return encoder, vars(arm) | {
        "queries": len(lists),
        "lr": lr,
        "steps": used.steps,
        "temperature": round(used.temperature, 6),
        "last_loss": round(rows[-1]["loss"], 6),
        "minutes": round(minutes, 3),
    }


def trial(study: Study, arm: Arm, rate: float) -> float:
    """nDCG@10 on development data, collections with equal weight, after training with one rate.

    What is recorded is not trained again.
    """
    key = str(rate)
    with suppress(KeyError):
        return read_tuning(RESULTS)[study.start][arm.name][key]
    encoder, _ = trained(study, arm, rate, seed=0)
    found = [
        evaluate_model(encoder, *collection)["metrics"][SCORE]
        for collection in study.sources.development
    ]
    value = round(fmean(found), 5)
    with FileLock(RESULTS / "records.lock"):
        table = read_tuning(RESULTS)
        table.setdefault(study.start, {}).setdefault(arm.name, {})[key] = value
        write_json(RESULTS / "tuning.json", table)
    print(study.start, arm.name, rate, value)
    return value


def tune(study: Study, arm: Arm) -> float:
    """The learning rate that development data prefer; one at an edge is tried beyond, in twos."""
    rates = STARTS[study.start].rates
    values = {}
    while len(rates) > 1:
        for rate in rates:
            values[rate] = trial(study, arm, rate)
        best = max(values, key=values.get)
        if min(values) < best < max(values):
            return best
        rates = (best / 2, best * 2)
    return rates[0]


def do(study: Study, arm: Arm, seed: int | None) -> None:
    """Do one run, unless its record is there."""
    record = {
        "start": study.start,
        "arm": arm.name,
        "seed": seed,
        "place": study.place,
        "settings": {},
        "collections": {},
    }
    if arm.name == "BM25":
        record["start"] = None  # it belongs to no start
    key = key_of(record)
    if key in map(key_of, read_records(RESULTS)):
        return
    model = copy.deepcopy(study.encoder)
    if arm.loss:
        lr = tune(study, BY_NAME[arm.tuned_as or arm.name])
        model, record["settings"] = trained(study, arm, lr, seed)
    model.model.to(pick_dtype(study.place["dtype"]))
    if arm.name == "BM25":
        model = "bm25"
    rows = []
    for name, collection in study.collections.items():
        found = evaluate_model(model, *collection)
        metrics = {measure: round(value, 5) for measure, value in found["metrics"].items()}
        record["collections"][name] = {"metrics": metrics, **found["counts"]}
        rows += [(*key, name, query, row[SCORE]) for query, row in found["per_query"].items()]
    with FileLock(RESULTS / "records.lock"):
        add_run(RESULTS, record, rows)
    print(*key, record["collections"])


def command(asked: Options) -> None:
    """Do what has no record; seeds outside, so that a stopped study has whole rounds of arms."""
    for start in asked.start or STARTS:
        study = open_study(start, asked)
        jobs = [*product([None], REFERENCES), *product(range(STARTS[start].seeds), MAIN)]
        if start == ABLATION_START:
            jobs += product(range(ABLATION_SEEDS), ABLATIONS)
        for seed, arm in jobs:
            if arm.name in (asked.arm or NAMES):
                do(study, arm, seed)


main = command_line(command, Options)

if __name__ == "__main__":
    raise SystemExit(main())
