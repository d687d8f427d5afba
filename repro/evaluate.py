"""Score one model on one collection: `python -m repro.evaluate --model NAME --data COLLECTION`.

Ranks the passages for every judged query, by exact search over embeddings or by BM25, and compares
the ranking with the judgments.  The record holds the means, the values per query and the machine.
"""

import argparse
import re
import sys
import time
from pathlib import Path
from typing import Any

import torch

from repro import metrics
from repro.data import Place, Texts, load_beir
from repro.encoder import BiEncoder
from repro.search import retrieve
from repro.support.files import check_output, one_line, run_command, write_json
from repro.support.models import machine, pick_device, pick_dtype


def plain_name(model: Any) -> str:
    """What a record calls a model or a collection: of a folder the last name, never its path."""
    if not isinstance(model, Place):
        return type(model).__name__
    path = Path(model).expanduser()
    return path.resolve().name if path.is_dir() else str(model)


def load_model(model: Any, device: str, dtype: str, prompts: dict[str, str | None]) -> Any:
    """The encoder of a name or folder; "bm25" and an object with `encode` stay what they are.

    With dtype "auto" one with a linear map is float32, since its transformer's vectors are kept.
    A prompt that is not None takes the place of the encoder's own.
    """
    number_format = pick_dtype(dtype, pick_device(device), encoding=True)
    given = {kind: prompt for kind, prompt in prompts.items() if prompt is not None}
    if model == "bm25" and given:
        raise ValueError("bm25 takes no prompt")
    if model == "bm25" or not isinstance(model, Place):
        return model
    encoder = BiEncoder.load(model, device)
    if dtype != "auto" or not encoder.frozen:
        encoder.model.to(number_format)
    encoder.prompts.update(given)
    return encoder


def conditions(model: Any) -> dict[str, Any]:
    """The fields of a record that say how a model ran: prompts, device, number format, machine."""
    transformer = getattr(model, "model", None)
    dtype = getattr(transformer, "dtype", torch.float32)
    used = machine(getattr(model, "device", "cpu"), dtype)
    return {
        "prompts": dict(getattr(model, "prompts", {})),
        "device": used["device"],
        "dtype": used["dtype"],
        "machine": used,
    }


def evaluate_model(
    model: Any,
    corpus: Texts,
    queries: Texts,
    qrels: metrics.Qrels,
    *,
    measures: tuple[str, ...] = metrics.MEASURES,
    top_k: int = 1000,
    batch_size: int = 32,
    device: str = "auto",
    dtype: str = "auto",
    query_prompt: str | None = None,
    passage_prompt: str | None = None,
    run_file: Place | None = None,
    progress: bool = False,
) -> dict[str, Any]:
    """Rank and score one model on one collection: the record that the command line writes.

    `model`: "bm25", a name or folder for `BiEncoder.load`, or an object with `encode`.  Only judged
    queries are asked; `top_k` passages are kept for each, at most all, and no measure sees more.
    The prompts are for a named encoder; `run_file` gets the ranking as a TREC run.  Raises
    ValueError for bad input before a model loads.
    """
    if top_k < 1 or batch_size < 1:
        raise ValueError(f"top-k is {top_k}, batch-size is {batch_size}: expected 1 or more")
    metrics.check_qrels(qrels, measures)
    if run_file is not None:
        metrics.check_ids([*qrels, *corpus], run_file)
    asked = {query: queries[query] for query in qrels}
    encoder = load_model(model, device, dtype, {"query": query_prompt, "passage": passage_prompt})
    start = time.perf_counter()
    run = retrieve(encoder, corpus, asked, top_k, batch_size=batch_size, progress=progress)
    seconds = round(time.perf_counter() - start, 2)
    name = plain_name(model)
    if run_file is not None:
        metrics.write_run(run, run_file, tag=re.sub(r"\s+", "_", name))
    values = metrics.evaluate(qrels, run, measures)
    judgments = sum(map(len, qrels.values()))
    return {
        "model": name,
        "metrics": metrics.mean(values),
        "top_k": min(top_k, len(corpus)),
        "counts": {"passages": len(corpus), "queries": len(qrels), "judgments": judgments},
        "seconds": seconds,
        **conditions(encoder),
        "per_query": values,
    }


def command(
    data: str, split: str, out: Path | None, run: Path | None, overwrite: bool, **options: Any
) -> None:
    """Check the outputs, load the collection, evaluate the model, write and print the record."""
    if out:
        out = check_output(out, overwrite)
    if run:
        run = check_output(run, overwrite)
    if out and out == run:
        raise ValueError(f"{out}: --out and --run name the same file")
    corpus, queries, qrels = load_beir(data, split=split)
    options |= {"corpus": corpus, "queries": queries, "qrels": qrels}
    found = evaluate_model(**options, run_file=run, progress=True)
    record = {"collection": plain_name(data), "split": split, **found}
    if out:
        write_json(out, record)
    counts = ", ".join(f"{count} {what}" for what, count in record["counts"].items())
    print(one_line(f"{record['model']} on {record['collection']} ({split}): {counts}"))
    for measure, value in record["metrics"].items():
        print(f"{measure:<12}{value:.4f}")


def main(argv: list[str] | None = None) -> int:
    """The command line: 0, or 2 with one sentence on stderr."""
    parser = argparse.ArgumentParser("python -m repro.evaluate", description=__doc__)
    add = parser.add_argument
    add("--model", default="base", help="bm25 (English), base, all-minilm-l6-v2, folder, hub id")
    add("--data", default="sample", help="sample, a BEIR folder, a hub id")
    add("--split", default="test", help="which judgments to use")
    add("--out", type=Path, help="write the record, as JSON, to this file")
    add("--run", type=Path, help="write the ranking, as a TREC run, to this file")
    add("--overwrite", action="store_true", help="replace these files if they exist")
    add("--top-k", type=int, default=1000, help="passages kept a query, at most all")
    add("--batch-size", type=int, default=32, help="texts encoded together")
    add("--measures", nargs="+", default=metrics.MEASURES, help="ndcg@K ndcg_exp@K mrr@K recall@K")
    add("--query-prompt", help="text put in front of every query, such as 'query: '")
    add("--passage-prompt", help="text put in front of every passage")
    add("--device", default="auto", help="auto, cpu, cuda, ...")
    add("--dtype", default="auto", help="float32, bfloat16, float16; auto: bfloat16 where native")
    options = vars(parser.parse_args(argv))
    return run_command(lambda: command(**options))


if __name__ == "__main__":
    sys.exit(main())
