"""Tune, train and score every arm, and keep one small record a run; nothing that is recorded is repeated.

Start it as often as there are cores (OMP_NUM_THREADS=1 each): the processes share the work by lock files.
Tuning looks at development queries only.
"""

import argparse
import copy
import subprocess
import sys
import time
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from filelock import FileLock, Timeout

from repro.checkpoints import ending, machine, pick_device, pick_dtype, write_json
from repro.data import as_collection, load_beir
from repro.encoder import BiEncoder
from repro.evaluate import evaluate_model
from repro.experiment.arms import ABLATED, ABLATIONS, AVERAGES, BATCH, MAIN, STARTS, Arm, Sources, draws
from repro.experiment.claims import RESULTS, read_runs, read_tuning, write_runs
from repro.train import TrainConfig, train_encoder

DIGITS, REFERENCES = 5, {"BM25": "bm25"}  # of no start

class Study:
    """What the runs of one start share: its encoder, the lists, the collections, the records."""
    def __init__(self, start: str, args: argparse.Namespace) -> None:
        self.name, self.start, self.args = start, STARTS[start], args
        self.collections = {Path(path).resolve().name: load_beir(path) for path in args.data}
        if len(self.collections) < len(args.data):
            raise ValueError(f"--data: two collections have the same name, {', '.join(args.data)}")
        self.sources = Sources(args.wikiqa)
        dtype = str(pick_dtype(args.dtype, pick_device(args.device), self.start.freeze is not None))[6:]
        git = "git describe --always --abbrev=12 --dirty=+ --exclude='*'"  # in a shell: there may be no git
        done = subprocess.run(git, shell=True, cwd=Path(__file__).parent, capture_output=True, text=True)
        self.place = {"commit": done.stdout.strip() or None, "machine": machine(args.device), "dtype": dtype}
        self.records = FileLock(RESULTS / "records.lock")  # waits; the locks of runs do not

    @cached_property
    def encoder(self) -> BiEncoder:
        """The start, frozen as its arms freeze it."""
        encoder = BiEncoder.load(self.name, self.args.device, "float32")
        encoder.max_length = self.start.max_length or encoder.max_length
        layers = self.start.freeze
        encoder.freeze(encoder.model.config.num_hidden_layers if layers is None else layers)
        if encoder.frozen_whole:  # file by file, so that the kept blocks are the same whatever an arm mixes
            for lists in self.sources.files:
                encoder.mean_vectors([item.query for item in lists], "query", progress=True)
                encoder.mean_vectors([p for item in lists for p in item.passages], "passage", progress=True)
            encoder.mean_vectors([*self.development[1][0].values()], "passage", progress=True)
        return encoder

    @cached_property
    def development(self) -> list[tuple]:
        """(corpus, queries, qrels): held-out authored lists; WikiQA train questions over all sentences."""
        corpus, queries, qrels = load_beir(self.args.wikiqa, "train")
        qrels = {query: qrels[query] for query in sorted(self.sources.questions)}
        return [as_collection(self.sources.held_out), (corpus, queries, qrels)]

    def trained(self, arm: Arm, settings: dict[str, Any], seed: int) -> tuple[BiEncoder, dict, float]:
        """A copy of the start, trained: (encoder, its settings, minutes)."""
        lists, encoder = self.sources.training_set(arm.lists, seed), copy.deepcopy(self.encoder)
        values = {"steps": self.start.steps, "batch_size": BATCH, "freeze": self.start.freeze, **settings}
        config = TrainConfig(loss=arm.loss, seed=seed, dtype=self.place["dtype"], **{**values, **arm.fixed})
        config, rows, minutes = train_encoder(encoder, lists, config)
        keys = ("loss", "steps", "batch_size", "lr", "temperature", "average", "ignore_between", *arm.space)
        used = {"lists": arm.lists, "queries": len(lists), "last_loss": round(rows[-1]["loss"], 6)}
        return encoder, {key: getattr(config, key) for key in keys} | used, round(minutes, 3)

    @torch.no_grad()
    def scorer(self, encoder: BiEncoder, share: float = 1.0) -> BiEncoder:
        """A copy in the number format of scoring, its weights `share` of the way from the start's."""
        encoder = copy.deepcopy(encoder)
        for now, then in zip(encoder.parameters(), self.encoder.parameters(), strict=True):
            now.copy_(torch.lerp(then, now, share))
        if not encoder.frozen_whole:  # whose kept vectors are float32
            encoder.model.to(pick_dtype(self.place["dtype"]))
        return encoder

    def development_ndcg(self, encoder: BiEncoder) -> float:
        """nDCG@10 on development data: held-out authored lists and WikiQA questions, half the weight each."""
        found = [evaluate_model(encoder, *each, measures=("ndcg@10",), top_k=10) for each in self.development]
        return round(fmean(each["metrics"]["ndcg@10"] for each in found), DIGITS)

    def tuned(self, arm: Arm) -> dict[str, Any]:
        """The arm's best settings on the development queries; trials that are recorded are not repeated."""
        with FileLock(RESULTS / f".tune-{self.name}-{arm.name}.lock", timeout=0):
            for settings in draws(self.name, arm):
                trials = read_tuning(RESULTS).get(self.name, {}).get(arm.name, {}).get("trials", [])
                if any(settings.items() <= trial.items() for trial in trials):
                    continue
                encoder, _, _ = self.trained(arm, settings, seed=0)
                scores = {share: self.development_ndcg(self.scorer(encoder, share)) for share in AVERAGES}
                print(f"{self.name}, {arm.name}: {settings}: {scores}", flush=True)
                with self.records:
                    table = read_tuning(RESULTS)
                    found = table.setdefault(self.name, {}).setdefault(arm.name, {"trials": []})
                    found["trials"] += [{**settings, "average": a, "ndcg@10": v} for a, v in scores.items()]
                    best = max(found["trials"], key=lambda row: row["ndcg@10"])
                    found["best"] = {key: value for key, value in best.items() if key != "ndcg@10"}
                    known = (one["start"] for one in table[self.name].values() if "start" in one)
                    found["start"] = next(known, None) or self.development_ndcg(self.scorer(self.encoder))
                    write_json(RESULTS / "tuning.json", table)
        return read_tuning(RESULTS)[self.name][arm.name]["best"]

    def same(self, run: dict[str, Any], setting: str, then: Any, now: Any) -> None:
        """ValueError if a record that gets a new collection was made in another way."""
        if then != now:
            where = f"the record of {run['arm']}, seed {run['seed']}, from {self.name}"
            raise ValueError(f"{where} has {setting} {then!r}, this run {now!r}; delete its line to repeat")

    def record(self, group: str, arm: Arm | str, seed: int | None) -> None:
        """Make one run, or add the collections that its record lacks.  Timeout: another process is at it."""
        name = arm if isinstance(arm, str) else arm.name
        key = {"start": None if name in REFERENCES else self.name, "arm": name, "seed": seed}
        with FileLock(RESULTS / f".run-{key['start']}-{name}-{seed}.lock", timeout=0):
            run = next((r for r in read_runs(RESULTS) if key.items() <= r.items()), key | {"collections": {}})
            if not (missing := self.collections.keys() - run["collections"].keys()):
                return
            settings, minutes, then = {}, 0.0, run.get("settings", {})
            self.same(run, "dtype", run.get("trained", self.place)["dtype"], self.place["dtype"])
            if isinstance(arm, str):
                model = REFERENCES.get(name) or self.scorer(self.encoder)
            else:
                best, same = self.tuned(arm.parent or arm), {"steps": self.start.steps, "batch_size": BATCH}
                if arm.parent and arm.lists == arm.parent.lists and (
                        arm.fixed.items() <= {**same, **best, **arm.parent.fixed}.items()):
                    return  # its main arm over again in all settings: stored once, under that name
                for setting, value in {**best, **arm.fixed}.items():
                    self.same(run, setting, then.get(setting, value), value)
                encoder, settings, minutes = self.trained(arm, best, seed)
                model = self.scorer(encoder)
            run = {"group": group, "settings": settings, "minutes": minutes, "trained": self.place,
                   "per_query": {}, **run}
            for each in sorted(missing):
                corpus, queries, qrels = self.collections[each]
                found = evaluate_model(model, corpus, queries, qrels)
                metrics = {measure: round(value, DIGITS) for measure, value in found["metrics"].items()}
                counts = {"passages": len(corpus), "queries": len(qrels)}
                run["collections"][each] = {"metrics": metrics, **counts, **self.place}
                run["per_query"][each] = {query: row["ndcg@10"] for query, row in found["per_query"].items()}
                print(f"{self.name}, {name}, seed {seed}: {each} {metrics}", flush=True)
            with self.records:
                write_runs(RESULTS, [*(r for r in read_runs(RESULTS) if not key.items() <= r.items()), run])

def jobs(args: argparse.Namespace, start: str) -> list[tuple[str, Any, int | None]]:
    """(group, arm, seed) of all runs of a start; the arms inside, so that they have equally many seeds."""
    wanted = [("references", name, None) for name in ("start", *REFERENCES) if "references" in args.group]
    for group in args.group:
        arms = MAIN if group == "main" else ABLATIONS[group] if group in ABLATED.get(start, ()) else ()
        seeds = range(STARTS[start].seeds if group == "main" else 3)
        wanted += [(group, arm, n) for n in seeds for arm in arms if not args.arm or arm.name in args.arm]
    return wanted

def main(argv: list[str] | None = None) -> int:
    """Command line: run what has no complete record."""
    parser = argparse.ArgumentParser("python -m repro.experiment.run", description=__doc__.split("\n\n")[0])
    groups, add = ("references", "main", *ABLATIONS), parser.add_argument
    known = [arm.name for arms in (MAIN, *ABLATIONS.values()) for arm in arms]
    add("--wikiqa", required=True, help="WikiQA in BEIR layout, with qrels/train.tsv")
    add("--data", nargs="+", default=["sample"], help="test collections: BEIR folders, hub ids, or sample")
    add("--start", nargs="+", choices=STARTS, default=list(STARTS))
    add("--group", nargs="+", choices=groups, default=groups)
    add("--arm", nargs="+", choices=known, metavar="ARM", help="only these arms")
    add("--device", default="cpu")
    add("--dtype", default="auto", help="of the arms that train whole (default: bfloat16 where it is native)")
    args = parser.parse_args(argv)
    if not any(jobs(args, start) for start in args.start):
        parser.error(f"--group and --arm leave no run of {' or '.join(args.start)}")
    def work() -> None:
        for start in args.start:
            study, left = Study(start, args), jobs(args, start)
            while left:
                for job in left[:]:
                    with suppress(Timeout):  # another process is at it: look again later
                        study.record(*job)
                        left.remove(job)
                time.sleep(20 if left else 0)
    return ending(work)

if __name__ == "__main__":
    sys.exit(main())
