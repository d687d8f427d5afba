"""Tune, train and score every arm, and keep one small record a run; nothing that is recorded is repeated.

    python -m repro.experiment.run --wikiqa FOLDER --data FOLDER... [--start NAME] [--group NAME...]

Start it as often as there are cores (OMP_NUM_THREADS=1 each): the processes share the work by lock files.
Tuning looks at development queries only: held-out authored lists, ranked among their passages, and WikiQA
train questions, ranked among their sentences and 2,000 others; half the weight each.
"""

import argparse
import copy
import random
import subprocess
import sys
import time
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock

from repro.checkpoints import cache_dir, machine, pick_dtype
from repro.data import as_collection, load_beir
from repro.encoder import BiEncoder
from repro.evaluate import evaluate_model
from repro.experiment.arms import ABLATIONS, AVERAGES, BATCH, MAIN, SPLIT_SEED, STARTS, Arm, Sources, draws
from repro.experiment.claims import RESULTS, read_runs, read_tuning, write_runs, write_tuning
from repro.files import ending, locked
from repro.train import TrainConfig, train_encoder

GROUPS = ("references", "main", *ABLATIONS)
DISTRACTORS, DIGITS = 2000, 5


@cache
def commit() -> str | None:
    """The commit of the code that runs, with a + if files have changed since; None outside a checkout."""
    git = [
        "git",
        "-C",
        str(Path(__file__).parent),
        "describe",
        "--always",
        "--abbrev=12",
        "--dirty=+",
        "--exclude=*",
    ]
    done = subprocess.run(git, capture_output=True, text=True)
    return done.stdout.strip() or None if done.returncode == 0 else None


class Study:
    """What the runs of one start share: its encoder, the lists, the collections, the records."""

    def __init__(self, start: str, args: argparse.Namespace) -> None:
        self.name, self.start, self.args = start, STARTS[start], args
        self.sources = Sources(args.wikiqa)
        self.data = {"sample" if path == "sample" else Path(path).resolve().name: path for path in args.data}
        if len(self.data) < len(args.data):
            raise ValueError(f"--data: two collections have the same name, {', '.join(args.data)}")
        self.collections = {
            name: load_beir(path) for name, path in self.data.items()
        }  # refused before any run
        native = self.start.freeze is not None and torch.ops.mkldnn._is_mkldnn_bf16_supported()
        self.dtype = args.dtype if args.dtype != "auto" else "bfloat16" if native else "float32"
        self.lock = FileLock(cache_dir() / "experiment.lock")

    @cached_property
    def encoder(self) -> BiEncoder:
        """The start, frozen as its arms freeze it."""
        encoder = BiEncoder.load(self.start.model, self.args.device, "float32")
        encoder.max_length = self.start.max_length or encoder.max_length
        depth = encoder.model.config.num_hidden_layers
        encoder.freeze(depth if self.start.freeze is None else self.start.freeze)
        if encoder.frozen_whole:  # file by file, so that the kept blocks are the same whatever an arm mixes
            for lists in self.sources.files:
                encoder.mean_vectors([item.query for item in lists], "query", progress=True)
                encoder.mean_vectors([p for item in lists for p in item.passages], "passage", progress=True)
            encoder.mean_vectors(
                list(load_beir(self.args.wikiqa, "train")[0].values()), "passage", progress=True
            )
        return encoder

    @cached_property
    def development(self) -> list[tuple]:
        """Two small collections (corpus, queries, qrels): held-out authored lists, WikiQA train questions."""
        corpus, queries, qrels = load_beir(self.args.wikiqa, "train")
        qrels = {query: qrels[query] for query in sorted(self.sources.questions)}
        judged = {passage for row in qrels.values() for passage in row}
        others = sorted(corpus.keys() - judged)
        judged |= set(random.Random(SPLIT_SEED).sample(others, min(DISTRACTORS, len(others))))
        return [
            as_collection(self.sources.held_out),
            ({key: corpus[key] for key in sorted(judged)}, queries, qrels),
        ]

    def trained(
        self, arm: Arm, settings: dict[str, Any], seed: int
    ) -> tuple[BiEncoder, dict[str, Any], float]:
        """A copy of the start, trained: (encoder, its settings, minutes)."""
        lists = self.sources.training_set(arm.lists, seed)
        common = {"loss": arm.loss, "seed": seed, "steps": self.start.steps, "batch_size": BATCH}
        common |= {"freeze": self.start.freeze, "dtype": self.dtype}
        encoder = copy.deepcopy(self.encoder)
        config = TrainConfig(**{**common, **settings, **arm.fixed})
        config, rows, minutes = train_encoder(encoder, lists, config)
        keys = ("loss", "steps", "batch_size", "lr", "temperature", "average", "ignore_between", *arm.space)
        told = {key: getattr(config, key) for key in keys}
        told |= {"lists": arm.lists, "queries": len(lists), "last_loss": round(rows[-1]["loss"], 6)}
        return encoder, told, round(minutes, 3)

    @torch.no_grad()
    def scorer(self, encoder: BiEncoder, share: float = 1.0) -> BiEncoder:
        """A copy in the number format of scoring, its weights `share` of the way from the start's."""
        encoder = copy.deepcopy(encoder)
        for now, then in zip(encoder.parameters(), self.encoder.parameters(), strict=True):
            now.copy_(torch.lerp(then, now, share) if share != 1 else now)
        encoder.model.to(pick_dtype(self.dtype))
        return encoder

    def development_ndcg(self, encoder: BiEncoder) -> float:
        """Mean of nDCG@10 on the two development collections."""
        scores = [
            evaluate_model(encoder, *each, measures=("ndcg@10",), top_k=10) for each in self.development
        ]
        return round(sum(score["metrics"]["ndcg@10"] for score in scores) / len(scores), DIGITS)

    def tuned(self, arm: Arm) -> dict[str, Any]:
        """The arm's best settings on the development queries; trials that are recorded are not repeated."""
        name = arm.settings_of or arm.name
        arm = next(each for each in MAIN if each.name == name)
        plan = draws(self.name, arm)
        with locked(cache_dir() / f"tune-{self.name}-{name}"):  # ValueError: another process is at it
            for settings in plan:
                trials = read_tuning(RESULTS).get(self.name, {}).get(name, {}).get("trials", [])
                if any(all(trial[key] == value for key, value in settings.items()) for trial in trials):
                    continue
                encoder, _, _ = self.trained(arm, settings, seed=0)
                scores = {share: self.development_ndcg(self.scorer(encoder, share)) for share in AVERAGES}
                print(f"{self.name}, {name}: {settings}: {scores}", flush=True)
                with self.lock:
                    table = read_tuning(RESULTS)
                    found = table.setdefault(self.name, {}).setdefault(name, {"best": {}, "trials": []})
                    found["trials"] += [{**settings, "average": a, "ndcg@10": v} for a, v in scores.items()]
                    best = max(found["trials"], key=lambda row: row["ndcg@10"])
                    found["best"] = {key: value for key, value in best.items() if key != "ndcg@10"}
                    found["start"] = found.get("start") or self.development_ndcg(self.scorer(self.encoder))
                    write_tuning(RESULTS, table)
        return read_tuning(RESULTS)[self.name][name]["best"]

    def is_parent(self, arm: Arm, best: dict[str, Any]) -> bool:
        """Whether an ablation is its main arm over again, in all settings."""
        parent = next(each for each in MAIN if each.name == arm.settings_of)
        settings = {"steps": self.start.steps, "batch_size": BATCH, **best, **parent.fixed}
        return arm.lists == parent.lists and {**settings, **arm.fixed} == settings

    def record(self, group: str, arm: Arm | str, seed: int | None) -> bool:
        """Make one run, or add the collections that its record lacks; whether there was anything to do."""
        name = arm if isinstance(arm, str) else arm.name
        key = {"start": None if name in ("BM25", "supervised") else self.name, "arm": name, "seed": seed}
        runs = read_runs(RESULTS)
        run = next((r for r in runs if all(r[k] == v for k, v in key.items())), None)
        missing = [c for c in self.data if run is None or c not in run["collections"]]
        if not missing:
            return False
        with locked(cache_dir() / f"run-{'-'.join(map(str, key.values()))}"):
            began, settings, development, minutes = time.monotonic(), {}, None, 0.0
            if isinstance(arm, Arm):
                best = self.tuned(arm)
                if arm.settings_of and self.is_parent(arm, best):
                    return False  # stored once, under the main arm's name
                encoder, settings, minutes = self.trained(arm, best, seed)
                model = self.scorer(encoder)
                development = self.development_ndcg(model)
            else:
                named = {"BM25": "bm25", "supervised": "all-minilm-l6-v2"}
                model = named[name] if name in named else self.scorer(self.encoder)
            place = {"commit": commit(), "machine": machine(self.args.device), "dtype": self.dtype}
            fresh = {**key, "group": group, "settings": settings, "development": development}
            run = run or {**fresh, "minutes": minutes, "trained": place, "collections": {}, "per_query": {}}
            for each in missing:
                corpus, queries, qrels = self.collections[each]
                found = evaluate_model(model, corpus, queries, qrels)
                metrics = {measure: round(value, DIGITS) for measure, value in found["metrics"].items()}
                run["collections"][each] = {
                    "metrics": metrics,
                    "passages": len(corpus),
                    "queries": len(qrels),
                    **place,
                }
                run["per_query"][each] = {
                    query: round(row["ndcg@10"], DIGITS) for query, row in found["per_query"].items()
                }
            with self.lock:
                runs = [r for r in read_runs(RESULTS) if any(r[k] != v for k, v in key.items())]
                write_runs(RESULTS, [*runs, run])
        shown = {each: values["metrics"]["ndcg@10"] for each, values in run["collections"].items()}
        print(
            f"{self.name}, {name}, seed {seed}: {shown} ({(time.monotonic() - began) / 60:.1f} min)",
            flush=True,
        )
        return True


def jobs(args: argparse.Namespace, start: str) -> list[tuple[str, Any, int | None]]:
    """(group, arm, seed) of all runs of a start; the arms inside, so that they have equally many seeds."""
    wanted: list[tuple[str, Any, int | None]] = []
    if "references" in args.group:
        wanted += [("references", "start", None)]
        wanted += [("references", name, None) for name in ("BM25", "supervised") if start == "base"]
    for group in args.group:
        arms = MAIN if group == "main" else ABLATIONS.get(group, ()) if start == "base" else ()
        seeds = STARTS[start].seeds if group == "main" else 3
        wanted += [
            (group, arm, seed)
            for seed in range(seeds)
            for arm in arms
            if not args.arm or arm.name in args.arm
        ]
    return wanted


def main(argv: list[str] | None = None) -> int:
    """Command line: run what has no complete record."""
    parser = argparse.ArgumentParser(
        prog="python -m repro.experiment.run", description=__doc__.split("\n\n")[0]
    )
    known = [arm.name for arms in (MAIN, *ABLATIONS.values()) for arm in arms]
    add = parser.add_argument
    add("--wikiqa", required=True, help="WikiQA in BEIR layout, with qrels/train.tsv")
    add("--data", nargs="+", default=["sample"], help="test collections: BEIR folders, hub ids, or sample")
    add("--start", nargs="+", choices=STARTS, default=list(STARTS))
    add("--group", nargs="+", choices=GROUPS, default=list(GROUPS))
    add("--arm", nargs="+", choices=known, metavar="ARM", help="only these arms")
    add("--device", default="cpu")
    add("--dtype", default="auto", help="of the arms that train whole (default: bfloat16 where it is native)")
    args = parser.parse_args(argv)

    def work() -> None:
        for start in args.start:
            study, left = Study(start, args), jobs(args, start)
            while left:
                later = []
                for job in left:
                    try:
                        study.record(*job)
                    except ValueError as error:
                        if "another process is writing" not in str(error):
                            raise
                        later.append(job)
                if later == left:
                    time.sleep(20)  # another process has all that is left under way
                left = later

    return ending(work)


if __name__ == "__main__":
    sys.exit(main())
