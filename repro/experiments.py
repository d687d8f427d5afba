"""Train every arm with every seed, score each on every collection, and keep one small record a run.

    python -m repro.experiments --data sample ../data/scifact --seeds 0 1 2 --results repro/results

All arms start from the same encoder with the same frozen layers, so those layers run once for the
training lists and once for each collection; the arms share their states in memory.  That is what
makes the table affordable on two cores.  Finished runs and finished records are never repeated:
the same command goes on after a kill.  Records hold ids and scores, no text of any collection.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from repro.data import load_beir
from repro.encoder import AUTHORED, BiEncoder
from repro.evaluate import evaluate_model
from repro.runs import write_json
from repro.train import TokenSource, TrainConfig, default_freeze, token_source, train, training_lists

# What differs between the arms; everything else is TrainConfig's default.
ARMS: dict[str, dict[str, Any]] = {
    "InfoNCE": {"loss": "infonce"},
    "KL": {"loss": "kl"},
    "Gaussian W2": {"loss": "wasserstein_gaussian"},
    "1-D W1": {"loss": "wasserstein_1d"},
}


class FromStates:
    """An encoder that looks its texts' frozen states up instead of computing them; `evaluate_model` takes it."""

    def __init__(self, encoder: BiEncoder, tokens: TokenSource):
        self.encoder, self.tokens, self.device = encoder, tokens, encoder.device

    def encode(self, texts: Sequence[str], kind: str = "passage", batch_size: int = 32, progress: bool = False) -> Tensor:
        """`BiEncoder.encode` on texts that the token source knows."""
        return self.encoder.encode_tokens(self.tokens(list(texts), kind), batch_size, progress)


def train_arms(
    arms: Mapping[str, dict[str, Any]], seeds: Sequence[int], runs: Path, common: TrainConfig
) -> dict[tuple[str, int], Path]:
    """One finished model folder for each (arm, seed); the frozen states of the lists are computed once.

    `common` holds what the arms share: lists, start, epochs and the like.
    """
    training = training_lists(common)
    tokens: TokenSource | None = None
    folders = {}
    for seed in seeds:
        for arm, options in arms.items():
            folder = folders[arm, seed] = runs / f"{arm.replace(' ', '-')}-seed{seed}"
            if tokens is None and not folder.exists():
                start = BiEncoder.load(common.model, common.device)
                start.freeze(default_freeze(common))
                texts = [item.query for item in training], [passage for item in training for passage in item.passages]
                tokens = token_source(start, *texts, common.state_gb)
            record = train(replace(common, out=str(folder), seed=seed, **options), training, tokens)
            print(f"{arm}, seed {seed}: {record['steps']} steps in {record['minutes']:.1f} minutes", flush=True)
    return folders


def training_of(model: str) -> dict[str, Any] | None:
    """What a record says about how its model was trained: settings, steps, minutes; None if it was not."""
    path = Path(model) / "train.json"
    if not path.is_file():
        return None
    run = json.loads(path.read_text(encoding="utf-8"))
    settings = {key: value for key, value in run["settings"].items() if key not in ("lists", "model", "real")}
    return {"settings": settings} | {key: run[key] for key in ("chosen", "queries", "lists_sha256", "steps", "minutes")}


def score_collection(
    data: str, folders: Mapping[tuple[str, int], Path], results: Path, common: TrainConfig, state_gb: float = 16.0
) -> None:
    """Score BM25, the start and every trained model on one collection; write the records that are missing.

    The lower layers are equal in all of them, so they run once over the collection (`state_gb` of
    memory at most: 4 GB hold 1.7 million tokens of the built-in encoder).
    """
    name = Path(data).resolve().name if Path(data).is_dir() else data.replace("/", "-")
    wanted: dict[str, tuple[str, int | None, str]] = {"bm25": ("bm25", None, "bm25"), "base": ("base", None, common.model)}
    for (arm, seed), folder in folders.items():
        wanted[folder.name] = (arm, seed, str(folder))
    missing = {key: what for key, what in wanted.items() if not (results / name / f"{key}.json").exists()}
    if not missing:
        print(f"{name}: all {len(wanted)} records are there", flush=True)
        return
    corpus, queries, qrels = load_beir(data)
    tokens: TokenSource | None = None
    (results / name).mkdir(parents=True, exist_ok=True)
    for key, (arm, seed, model) in missing.items():
        scorer: Any = model
        if model != "bm25":
            encoder = BiEncoder.load(model, common.device)
            encoder.freeze(default_freeze(common))
            if tokens is None:
                tokens = token_source(encoder, list(queries.values()), list(corpus.values()), state_gb)
            scorer = FromStates(encoder, tokens)
        record = {"collection": name, "arm": arm, "seed": seed, **evaluate_model(scorer, corpus, queries, qrels, progress=True)}
        write_json(results / name / f"{key}.json", record | {"model": key, "training": training_of(model)})
        print(f"{name}, {key}: nDCG@10 {record['metrics']['ndcg@10']:.4f}", flush=True)


def main(argv: list[str] | None = None) -> int:
    """Command line: train what is not trained, then score what is not scored."""
    parser = argparse.ArgumentParser(prog="python -m repro.experiments", description=__doc__.split("\n\n")[0])
    parser.add_argument("--data", nargs="+", default=["sample"], metavar="FOLDER_OR_ID", help="collections to score on")
    parser.add_argument("--lists", nargs="+", default=[str(AUTHORED)], metavar="FILE", help="training lists")
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS), metavar="ARM", help=", ".join(ARMS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=TrainConfig.epochs)
    parser.add_argument("--model", default=TrainConfig.model, help="the start of all arms (default: base)")
    parser.add_argument("--freeze", type=int, help="lower layers that stay fixed (default: as in repro.train)")
    parser.add_argument("--lr", type=float, help="peak learning rate of all arms (default: as in repro.train)")
    parser.add_argument("--batch-size", type=int, default=TrainConfig.batch_size, help="lists in one loss")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="where the trained models go")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results", help="where the records go")
    args = parser.parse_args(argv)
    common = TrainConfig(
        lists=list(args.lists), model=args.model, epochs=args.epochs, freeze=args.freeze, lr=args.lr,
        batch_size=args.batch_size, device=args.device,
    )  # fmt: skip
    try:
        folders = train_arms({arm: ARMS[arm] for arm in args.arms}, args.seeds, args.runs, common)
        for data in args.data:
            score_collection(data, folders, args.results, common)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
