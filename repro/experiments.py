"""Run every arm with every seed, score each on every collection, and keep one small record a run.

    python -m repro.experiments --data sample ../data/scifact --real ../data/wikiqa --real-graded graded.jsonl

All arms start from the same encoder with the same frozen layers, whose output is computed once and kept
(`repro.states`).  Each group of arms has a folder of records; what is finished is never repeated, so
the same command goes on after a kill, and a collection named later is added to the records.  Records
hold ids and scores, no text of any collection.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaModel

from repro.arms import ABLATIONS, LARGEST, MAIN, SEEDS, Arm, ListSet, list_sets
from repro.checkpoints import cache_dir, load_pretrained, pick_device
from repro.data import load_beir
from repro.encoder import AUTHORED, BASE_CHECKPOINT, BiEncoder
from repro.evaluate import evaluate_model
from repro.files import replacing
from repro.lists import load_lists
from repro.metrics import MEASURES
from repro.runs import machine
from repro.states import FromStates, StateBank
from repro.tune import development_ndcg, settings_of, train_arm, tune

RESULTS = Path(__file__).parent / "results"
REFERENCES = {"BM25": "bm25", "base": "base", "supervised": "all-minilm-l6-v2"}
GROUPS = ("references", "main", *ABLATIONS)
DIGITS = 5  # of per-query values in the records


def random_encoder(seed: int, device: str) -> BiEncoder:
    """A small transformer with random weights, all of it trainable: two layers, 128 wide, the built-in tokenizer."""
    torch.manual_seed(seed)
    tokenizer = load_pretrained(BASE_CHECKPOINT, AutoTokenizer)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=256, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=256,
    )  # fmt: skip
    return BiEncoder(LlamaModel(config), tokenizer, normalise=True).to(pick_device(device)).eval()


def commit() -> str | None:
    """The commit of the code that runs, with a + if files have changed since; None outside a git checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--abbrev=12", "--dirty=+", "--exclude=*"]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stdout.strip() or None if done.returncode == 0 else None


def read_json(path: Path) -> dict[str, Any]:
    """The object in a file, or {} if there is no such file."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def write_record(path: Path, record: dict[str, Any]) -> None:
    """One line a field, and one a collection; the file appears whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    collections = ",\n".join(f"  {json.dumps(k)}: {json.dumps(v)}" for k, v in record.get("collections", {}).items())
    lines = [f" {json.dumps(key)}: {json.dumps(value)}" for key, value in record.items() if key != "collections"]
    with replacing(path) as sink:
        sink.write("{\n" + ",\n".join([*lines, ' "collections": {\n' + collections + "\n }"]) + "\n}\n")


class Bench:
    """What the runs share: list sets, collections, the start, its banks, the tuned settings."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.results = args, args.results
        self.sets: dict[str, ListSet] = list_sets(args.authored, args.generated, args.real, args.real_graded)
        self.data = {("sample" if data == "sample" else Path(data).resolve().name if Path(data).is_dir() else data): data for data in args.data}
        self.loaded: dict[str, Any] = {}
        self.starts: dict[Any, tuple[BiEncoder, StateBank]] = {}

    def collection(self, name: str) -> Any:
        """(corpus, queries, qrels), read once."""
        if name not in self.loaded:
            self.loaded[name] = load_beir(self.data[name], self.args.split)
        return self.loaded[name]

    def start(self, settings: dict[str, Any], seed: int) -> tuple[BiEncoder, StateBank]:
        """The encoder that a run starts from, frozen, and its bank; shared by all runs with the same start."""
        if settings.get("model") == "random":
            encoder = random_encoder(seed, self.args.device)
            return encoder, StateBank(encoder)
        freeze = settings.get("freeze")
        if freeze not in self.starts:
            encoder = BiEncoder.load(self.args.model, self.args.device, "float32")
            encoder.freeze(encoder.model.config.num_hidden_layers if freeze is None else freeze)
            bank = StateBank(encoder, cache_dir() / "pooled", self.args.state_gb)
            if encoder.all_frozen:
                self.add_sources(bank)
            self.starts[freeze] = encoder, bank
        return self.starts[freeze]

    def add_sources(self, bank: StateBank) -> None:
        """Add all training texts, source by source in file order: list sets mix them anew, and the kept blocks should not."""
        for path in filter(None, (self.args.authored, self.args.generated, self.args.real_graded)):
            lists = load_lists([path])
            bank.add([item.query for item in lists], "query")
            bank.add([passage for item in lists for passage in item.passages], "passage")
        if self.args.real:
            corpus, queries, _ = load_beir(self.args.real, "train")
            bank.add(list(queries.values()), "query")
            bank.add(list(corpus.values()), "passage")

    def names(self, group: str) -> list[str]:
        """The collections that a group is scored on: those asked for, up to the group's largest size."""
        return [name for name in self.data if group not in LARGEST or len(self.collection(name)[0]) <= LARGEST[group]]

    def score(self, path: Path, record: dict[str, Any], model: Any, bank: StateBank | None) -> None:
        """Add the collections that the record lacks, writing it after each."""
        record.setdefault("collections", {})
        for name in self.names(record["group"]):
            if name in record["collections"]:
                continue
            corpus, queries, qrels = self.collection(name)
            if bank is not None:
                bank.add(list(queries.values()), "query")
                bank.add(list(corpus.values()), "passage")
            scorer = model if bank is None else FromStates(model, bank)
            found = evaluate_model(scorer, corpus, queries, qrels, device=self.args.device, progress=bank is None)
            per_query = {qid: [round(row[m], DIGITS) for m in MEASURES] for qid, row in found["per_query"].items()}
            rounded = {measure: round(value, DIGITS) for measure, value in found["metrics"].items()}
            record["collections"][name] = {"metrics": rounded, "passages": len(corpus), "per_query": per_query}
            write_record(path, record)
            print(f"{path.parent.name}/{path.stem}: {name} nDCG@10 {found['metrics']['ndcg@10']:.4f}", flush=True)

    def is_complete(self, group: str, record: dict[str, Any]) -> bool:
        """Whether a record holds every collection that its group is scored on."""
        return set(self.names(group)) <= set(record.get("collections", {}))

    def tuned(self, arm: Arm) -> dict[str, Any]:
        """The arm's settings from tuning.json; found and written there if they are not."""
        path = self.results / "tuning.json"
        table = read_json(path)
        name = arm.settings_of or arm.name
        if name not in table:
            if arm.settings_of:
                raise ValueError(f"{path}: expected the settings of {name!r}, found none; run --group main first")
            start, bank = self.start({}, 0)
            table[name] = tune(arm, self.sets[arm.lists], start, bank)
            with replacing(path) as sink:
                sink.write(json.dumps(table, indent=1) + "\n")
        return table[name]["best"]

    def run(self, group: str, arm: Arm, seed: int) -> None:
        """Train and score one arm with one seed, unless its record is complete."""
        path = self.results / group.replace(" ", "-") / f"{arm.name.replace(', ', '--').replace(' ', '-')}-seed{seed}.json"
        record = read_json(path)
        if self.is_complete(group, record):
            return
        settings = settings_of(arm, self.tuned(arm))
        start, bank = self.start(settings, seed)
        encoder, told = train_arm(arm, settings, self.sets[arm.lists], seed, start, bank)
        if not record:
            told["development"] = round(development_ndcg(encoder, self.sets[arm.lists], bank), DIGITS)
            record = {"group": group, "arm": arm.name, "seed": seed, "measures": list(MEASURES), "training": told}
            record |= {"machine": machine(encoder.device), "commit": commit()}
        self.score(path, record, encoder, bank)
        if self.args.keep_models and not (kept := self.args.keep_models / path.parent.name / path.stem).exists():
            encoder.save(kept)

    def reference(self, name: str) -> None:
        """Score BM25, the start or the supervised encoder."""
        path = self.results / "references" / f"{name}.json"
        record = read_json(path)
        if self.is_complete("references", record):
            return
        model, bank = (*self.start({}, 0),) if name == "base" else (REFERENCES[name], None)
        if not record:
            told = {"model": self.args.model if name == "base" else REFERENCES[name]}
            record = {"group": "references", "arm": name, "seed": None, "measures": list(MEASURES), "training": told}
            record |= {"machine": machine(pick_device(self.args.device)), "commit": commit()}
        self.score(path, record, model, bank)


def arms_of(group: str, wanted: Sequence[str] | None, sets: dict[str, ListSet]) -> list[Arm]:
    """The arms of a group that were asked for and whose lists there are; the others are named on stderr."""
    arms = [arm for arm in (MAIN if group == "main" else ABLATIONS[group]) if not wanted or arm.name in wanted]
    if lacking := [arm.name for arm in arms if arm.lists not in sets]:
        print(f"{group}: left out for want of --real, --real-graded or --generated: {'; '.join(lacking)}", file=sys.stderr)
    return [arm for arm in arms if arm.lists in sets]


def main(argv: list[str] | None = None) -> int:
    """Command line: run what has no complete record."""
    parser = argparse.ArgumentParser(prog="python -m repro.experiments", description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("--group", nargs="+", choices=GROUPS, default=list(GROUPS), metavar="GROUP", help=f"{', '.join(GROUPS)} (default: all)")
    add("--arms", nargs="+", metavar="NAME", help="only these arms of the groups")
    add("--data", nargs="+", default=["sample"], metavar="FOLDER_OR_ID", help="test collections")
    add("--split", default="test", help="their judgments (default: test)")
    add("--seeds", nargs="+", type=int, metavar="SEED", help="default: as many as the group has in `repro.arms`, from 0")
    add("--authored", default=str(AUTHORED), metavar="FILE", help="graded lists to train on (default: the kit's)")
    add("--generated", default=str(AUTHORED.with_name("smollm2-135m.jsonl")), metavar="FILE", help="the local model's lists")
    add("--real", metavar="FOLDER_OR_ID", help="a collection with train judgments")
    add("--real-graded", metavar="FILE", help="synthetic lists for (some of) its train queries")
    add("--model", default="base", help="the start of all arms (default: base)")
    add("--device", default="auto")
    add("--state-gb", type=float, default=8.0, help="memory for token states where not all layers are frozen")
    add("--keep-models", type=Path, metavar="FOLDER", help="save the trained encoders there (200 MB each)")
    add("--results", type=Path, default=RESULTS, help="where the records go")
    args = parser.parse_args(argv)
    try:
        bench = Bench(args)
        args.results.mkdir(parents=True, exist_ok=True)
        for group in args.group:
            if group == "references":
                for name in REFERENCES:
                    bench.reference(name)
                continue
            for arm in arms_of(group, args.arms, bench.sets):
                for seed in args.seeds or range(SEEDS.get(group, 3)):
                    bench.run(group, arm, seed)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
