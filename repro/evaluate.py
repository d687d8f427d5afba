"""Score one model on one collection: `python -m repro.evaluate --model NAME --data COLLECTION`.

Ranks the passages for every judged query, by exact search over embeddings or by BM25, and compares
the ranking with the judgments.  The record holds the means, the values per query and the machine.
"""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from repro import metrics
from repro.data import Place, Texts, load_beir
from repro.encoder import BiEncoder
from repro.search import retrieve
from repro.support.files import check_output, command_line, one_line, write_json
from repro.support.models import machine, pick_dtype, plain_name


@dataclass
class Options:
    """Score one model on one collection: rank its passages for every judged query.

    model: bm25 (English), base, all-minilm-l6-v2, a folder, a hub id
    data: sample, a BEIR folder, a hub id; split: which judgments to use
    out: write the record, as JSON, to this file
    run: write the ranking, as a TREC run, to this file
    overwrite: replace these files if they exist

    measures: ndcg@K ndcg_exp@K mrr@K recall@K
    top_k: passages kept a query, at most all
    batch_size: texts encoded together
    query_prompt, passage_prompt: in front of the texts, such as "query: "; none: the model's own
    device: auto, cpu, cuda, ...
    dtype: float32, bfloat16, float16; auto: bfloat16 where native
    """

    model: str = "base"
    data: str = "sample"
    split: str = "test"
    out: Path | None = None
    run: Path | None = None
    overwrite: bool = False


@dataclass
class Settings:
    """How a model runs and is scored; see `Options`."""

    measures: list[str] = field(default_factory=metrics.MEASURES.copy)
    top_k: int = 1000
    batch_size: int = 32
    query_prompt: str | None = None
    passage_prompt: str | None = None
    device: str = "auto"
    dtype: str = "auto"

    def __post_init__(self) -> None:
        if min(self.top_k, self.batch_size) < 1:
            raise ValueError(
                f"top-k is {self.top_k}, batch-size is {self.batch_size}: expected 1 or more"
            )
        pick_dtype(self.dtype)  # raises ValueError for another


def load_model(model: Any, asked: Settings) -> Any:
    """The encoder of a name or folder; "bm25" and an object with `encode` stay what they are.

    Raises ValueError for bm25 with a prompt, and as `BiEncoder.load` does.
    """
    prompts = asked.query_prompt, asked.passage_prompt
    if model == "bm25" and prompts != (None, None):
        raise ValueError("bm25 takes no prompt")
    if model == "bm25" or not isinstance(model, Place):
        return model
    return BiEncoder.load(model, asked.device, asked.dtype, *prompts)


def evaluate_model(
    model: Any,
    corpus: Texts,
    queries: Texts,
    qrels: metrics.Qrels,
    asked: Settings | None = None,
    run_file: Place | None = None,
    progress: bool = False,
) -> dict:
    """Rank and score one model on one collection: the record that the command line writes.

    `model`: "bm25", a name or folder for `BiEncoder.load`, or an object with `encode`.  Only judged
    queries are asked; `top_k` passages are kept for each, at most all, and no measure sees more.
    Prompts, device and dtype are for a named encoder; `run_file` gets the ranking as a TREC run.
    Raises ValueError for bad input before a model loads, and KeyError for a judged query without a
    text, which `load_beir` leaves out.
    """
    asked = asked or Settings()
    metrics.check_qrels(qrels, asked.measures)
    if run_file:
        metrics.check_ids([*qrels, *corpus], run_file)
    judged = {query: queries[query] for query in qrels}
    encoder = load_model(model, asked)
    run = retrieve(
        encoder, corpus, judged, asked.top_k, batch_size=asked.batch_size, progress=progress
    )
    name = plain_name(model)
    if run_file:
        metrics.write_run(run, run_file, tag=re.sub(r"\s+", "_", name))
    values = metrics.evaluate(qrels, run, asked.measures)
    place = machine()
    if isinstance(encoder, BiEncoder):
        place = machine(encoder.device, encoder.model.dtype)
    return {
        "model": name,
        "metrics": metrics.mean(values),
        "counts": {
            "passages": len(corpus),
            "queries": len(qrels),
            "judgments": sum(map(len, qrels.values())),
        },
        "prompts": getattr(encoder, "prompts", {}),
        "machine": place,
        "per_query": values,
    }


def command(asked: Options, settings: Settings) -> None:
    """Check the outputs, load the collection, evaluate the model, write and print the record."""
    out = asked.out and check_output(asked.out, asked.overwrite)
    run = asked.run and check_output(asked.run, asked.overwrite)
    if out and out == run:
        raise ValueError(f"{out}: --out and --run name the same file")
    collection = load_beir(asked.data, asked.split)
    found = evaluate_model(asked.model, *collection, settings, run, progress=True)
    record = {"collection": plain_name(asked.data), "split": asked.split, **found}
    if out:
        write_json(out, record)
    print(one_line(f"{record['model']} on {record['collection']} ({asked.split})"))
    for what, value in (record["counts"] | record["metrics"]).items():
        print(f"{what:<12} {round(value, 4)}")


main = command_line(command, Options, Settings)

if __name__ == "__main__":
    raise SystemExit(main())
