"""Score one model on one collection: `python -m repro.evaluate --model NAME --data COLLECTION`.

Ranks the collection's passages for its judged queries, with a bi-encoder or with BM25, and compares
the ranking with the judgments.  The result is one JSON record: means, per-query values (which the
significance tests in `stats` need), and what is needed to run it again.
"""

import argparse
import json
import os
import platform
import re
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from repro import metrics
from repro.checkpoints import cache_dir
from repro.data import load_beir
from repro.files import replacing
from repro.retrieval import SELF_HITS, EvaluateError, Texts, bm25_run, check_k, device_of, retrieve, search

CACHED = 100_000  # passages: at 2.3 kB each, 230 MB on disk

__all__ = ["EvaluateError", "bm25_run", "evaluate_model", "main", "retrieve", "search"]


def evaluate_model(
    model: Any,
    corpus: Texts,
    queries: Texts,
    qrels: metrics.Qrels,
    *,
    measures: Sequence[str] = metrics.MEASURES,
    top_k: int | None = None,
    batch_size: int = 32,
    device: str = "auto",
    dtype: str = "auto",
    self_hits: str = "drop",
    run_file: str | Path | None = None,
    cache: Path | None = None,
    progress: bool = False,
) -> dict[str, Any]:
    """Rank and score one model on one collection, and return the record that the command line writes.

    `model` is `"bm25"`, a name or folder for `BiEncoder.load`, or an object with `encode`.  Only
    the judged queries are asked.  `top_k` is how many passages are kept a query; None means 1000,
    or the whole corpus if it is smaller.  `run_file` also gets the ranking, as a TREC run.  `cache` is a
    folder for the mean vectors that a named encoder's transformer makes (`states`): another model with
    the same transformer, a trained projection say, then reads them instead of computing.
    Raises EvaluateError, or a MetricError for an unknown measure, before anything is encoded.
    """
    top_k = min(1000, len(corpus)) if top_k is None else top_k
    check_k(top_k, len(corpus))
    cut = [m for m in measures if metrics.parse_measure(m)[1] > top_k and top_k < len(corpus)]
    if cut:
        print(f"note: only {top_k} passages a query are kept, which limits {', '.join(cut)}", file=sys.stderr)
    if unknown := [qid for qid in qrels if qid not in queries]:
        raise EvaluateError(f"{len(unknown)} judged queries have no text, for example {unknown[0]!r}")
    if not qrels:
        raise EvaluateError("there are no judgments, so there is nothing to score")
    asked = {qid: queries[qid] for qid in qrels}
    name = model if isinstance(model, str) else type(model).__name__
    versions = ["torch", "transformers", "numpy"] + (["bm25s"] if name == "bm25" else [])
    if name != "bm25" and isinstance(model, str):
        from repro.encoder import BiEncoder

        model = BiEncoder.load(model, device=device, dtype=dtype)
        if cache is not None:
            from repro.states import FromStates, StateBank

            model.frozen = model.model.config.num_hidden_layers  # nothing trains here
            model = FromStates(model, StateBank(model, cache, progress=progress))
    start = time.perf_counter()
    if name == "bm25":
        run = bm25_run(corpus, asked, top_k, self_hits=self_hits)
    else:
        run = retrieve(model, corpus, asked, top_k, batch_size, self_hits=self_hits, progress=progress)
    seconds = time.perf_counter() - start
    per_query = metrics.evaluate(qrels, run, measures)
    if run_file is not None:
        metrics.write_run(run, run_file, tag=re.sub(r"\s+", "_", name))
    return {
        "model": name,
        "metrics": metrics.mean(per_query),
        "top_k": top_k,
        "counts": {
            "passages": len(corpus),
            "queries": len(qrels),
            "judgments": sum(len(judgments) for judgments in qrels.values()),
        },
        "seconds": round(seconds, 2),
        "device": "cpu" if name == "bm25" else str(device_of(model)),
        "machine": {"platform": platform.machine(), "cpus": os.cpu_count()},
        "versions": {package: version(package) for package in versions},
        "per_query": per_query,
    }


def check_writable(file: Path) -> None:
    """Make sure, before the long part, that `file` can be written: its folder is made if need be."""
    try:
        if file.is_dir():
            raise IsADirectoryError(None, "it is a folder, expected a file name")
        file.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=file.parent).close()
    except OSError as error:
        raise EvaluateError(f"{file}: cannot be written: {error.strerror}") from error


def table(record: dict[str, Any]) -> str:
    """A record's means as a few lines of plain text."""
    counts = record["counts"]
    lines = [
        f"collection  {record['collection']} ({record['split']}): {counts['passages']} passages, "
        f"{counts['queries']} queries, {counts['judgments']} judgments",
        f"model       {record['model']} ({record['device']}, {record['seconds']:.1f} s)",
        *(f"{measure:<12}{value:.4f}" for measure, value in record["metrics"].items()),
    ]
    return "\n".join(lines)


def parser() -> argparse.ArgumentParser:
    """The command line's options."""
    p = argparse.ArgumentParser(prog="python -m repro.evaluate", description=__doc__.split("\n\n")[1])
    p.add_argument("--model", default="base", help="bm25, base, a model folder or a hub id (default: base)")
    p.add_argument("--data", default="sample", help="sample, a BEIR folder or a hub id (default: sample)")
    p.add_argument("--split", default="test", help="which judgments to use (default: test)")
    p.add_argument("--out", type=Path, metavar="FILE.json", help="write the record here")
    p.add_argument("--run", type=Path, metavar="FILE.trec", help="write the ranking here, as a TREC run")
    p.add_argument("--top-k", type=int, metavar="N", help="passages kept a query (default: 1000 at most)")
    p.add_argument("--batch-size", type=int, default=32, help="texts encoded together (default: 32)")
    p.add_argument("--measures", nargs="+", default=list(metrics.MEASURES), metavar="NAME@K",
                   help=f"any of {', '.join(metrics.FUNCTIONS)}, with any cut-off")  # fmt: skip
    p.add_argument("--self-hits", choices=SELF_HITS, default="drop",
                   help="what happens to a passage that has the query's id (default: drop, as BEIR does)")  # fmt: skip
    p.add_argument("--cache", action=argparse.BooleanOptionalAction,
                   help=f"keep the transformer's vectors on disk for the next model (default: up to {CACHED:,} passages)")  # fmt: skip
    p.add_argument("--device", default="auto", help="auto, cpu, cuda, ...")
    p.add_argument("--dtype", default="auto", help="auto, float32, bfloat16 or float16")
    return p


def run_command(args: argparse.Namespace) -> None:
    """Do what the options ask for; every check that needs no model comes before the model is loaded."""
    for measure in args.measures:
        metrics.parse_measure(measure)
    if args.batch_size < 1:
        raise EvaluateError(f"batch-size is {args.batch_size}, expected at least 1")
    outputs = [file for file in (args.out, args.run) if file is not None]
    if len({file.absolute() for file in outputs}) < len(outputs):
        raise EvaluateError(f"{args.out}: --out and --run name the same file")
    corpus, queries, qrels = load_beir(args.data, split=args.split)
    if args.top_k is not None:
        check_k(args.top_k, len(corpus))
    for file in outputs:
        check_writable(file)
    keep = len(corpus) <= CACHED if args.cache is None else args.cache
    scored = evaluate_model(
        args.model, corpus, queries, qrels,
        measures=args.measures, top_k=args.top_k, batch_size=args.batch_size, device=args.device,
        dtype=args.dtype, self_hits=args.self_hits, run_file=args.run, progress=True,
        cache=cache_dir() / "pooled" if keep else None,
    )  # fmt: skip
    folder = Path(args.data)
    collection = folder.resolve().name if args.data != "sample" and folder.is_dir() else args.data
    record = {"collection": collection, "split": args.split, **scored}
    if args.out is not None:
        with replacing(args.out) as sink:
            json.dump(record, sink, ensure_ascii=False, indent=1)
            sink.write("\n")
    print(table(record))


def main(argv: list[str] | None = None) -> int:
    """The command line: 0 if all went well, 2 with one sentence on stderr if not."""
    try:
        run_command(parser().parse_args(argv))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
