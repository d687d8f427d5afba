"""Score one model on one collection: `python -m repro.evaluate --model NAME --data COLLECTION`.

Ranks the passages for every judged query, by exact search over embeddings or by BM25, and compares the
ranking with the judgments.  The record (JSON) holds the means, the values per query and the machine.
"""

import argparse
import json
import re
import sys
import time
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import bm25s
import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from repro import checkpoints, metrics
from repro.checkpoints import checked_output, ending, locked, one_line, writing
from repro.data import Place, Texts, load_beir
from repro.encoder import BiEncoder
from repro.train import process_group, rank_and_ranks

BLOCK, QUERY_BLOCK = 32_768, 512  # passages and queries compared at a time: 67 MB of scores
KEPT = 100_000  # passages whose vectors are kept in the cache: 230 MB with 576 numbers each

def search(query_embeddings: Tensor, passage_embeddings: Any, k: int, block: int = BLOCK) -> list[Tensor]:
    """The k best passages of every query by dot product, exactly: scores (Q, k), indices (Q, k), best first.

    Takes (Q, d), Q >= 1, and (N, d) or what can be sliced like it, `block` rows at a time.  Of equal float32
    scores the lower index comes first.  ValueError unless 1 <= k <= N and all are finite."""
    if not (n := len(passage_embeddings)) >= k >= 1:
        raise ValueError(f"k is {k}, expected a number from 1 to {n}, the number of passages")
    parts = torch.as_tensor(query_embeddings).float().split(QUERY_BLOCK)
    best = [(part[:, :0], part[:, :0].long()) for part in parts]  # of all blocks so far
    for first in range(0, n, block):
        rows = torch.as_tensor(passage_embeddings[first : first + block]).to(parts[0])
        for j, part in enumerate(parts):
            scores = part @ rows.T
            if not torch.stack(scores.aminmax()).isfinite().all():
                raise ValueError("an embedding or a score is not a finite number; the model cannot be judged")
            # `topk` promises no order of equals: it finds one more, and a row where that is equal is sorted.
            top, places = scores.topk(min(k + 1, len(rows)), dim=1)
            tied = (top[:, k - 1 :].diff(dim=1) == 0).any(dim=1)
            whole = scores[tied].sort(dim=1, descending=True, stable=True)
            top[tied], places[tied] = whole.values[:, : k + 1], whole.indices[:, : k + 1]
            indices, order = torch.cat([best[j][1], places + first], 1).sort(dim=1)
            both = torch.cat([best[j][0], top], 1).gather(1, order) + 0.0  # which makes -0.0 equal to 0.0
            both, order = both.sort(dim=1, descending=True, stable=True)
            best[j] = both[:, :k], indices.gather(1, order)[:, :k]
    return [torch.cat(found).cpu() for found in zip(*best, strict=True)]

def _as_run(rows: Iterable[tuple], corpus: Texts, queries: Texts, k: int) -> metrics.Run:
    """A run from rows (query id, scores, indices), the best k each.  A query that is a passage (ArguAna)
    loses it: the same id, and the query's text, maybe behind a title; case and white space do not count."""
    ids, run = list(corpus), {}
    for qid, scores, indices in rows:
        found = {ids[i]: score for i, score in zip(indices, scores, strict=True)}
        texts = [" ".join(["", *text.casefold().split()]) for text in (corpus.get(qid, ""), queries[qid])]
        if qid in found and texts[0].endswith(texts[1]):
            del found[qid]
        run[qid] = dict(list(found.items())[:k])
    return run

def retrieve(model: Any, corpus: Texts, queries: Texts, k: int, batch_size: int = 32, progress: bool = False
             ) -> metrics.Run:
    """The best k passages of every query by `model.encode`, the earlier of equals; no query finds itself.

    Under torchrun the ranks share the passages out; all have all embeddings, and return the same run."""
    options, (rank, ranks) = {"batch_size": batch_size, "progress": progress}, rank_and_ranks()

    class Encoded(list):  # texts; a slice of them is their embeddings, as if they were a matrix
        def __getitem__(self, rows: slice) -> Tensor:
            texts = super().__getitem__(rows)
            found = mine = model.encode(texts[rank::ranks], kind="passage", **options)
            if ranks > 1:
                found = mine.new_zeros(len(texts), mine.shape[1])
                found[rank::ranks] = mine
                dist.all_reduce(found)  # a sum, in which each row is one rank's
            return found

    asked = model.encode(list(queries.values()), kind="query", **options).to(getattr(model, "device", "cpu"))
    scores, indices = search(asked, Encoded(corpus.values()), min(k + 1, len(corpus)))
    return _as_run(zip(queries, scores.tolist(), indices.tolist(), strict=True), corpus, queries, k)

def s_stem(word: str) -> str:
    """Take the plural s off an English word, as Harman's S-stemmer (1991) does."""
    if word.endswith("ies") and not word.endswith(("eies", "aies")):
        return word[:-3] + "y" if len(word) > 4 else word
    return word[:-1] if len(word) > 2 and word.endswith("s") and not word.endswith(("us", "ss")) else word

def bm25_run(corpus: Texts, queries: Texts, k: int) -> metrics.Run:
    """Rank by BM25 in Lucene's form (bm25s): at most k passages a query, each with a word of it.

    score(q, p) = sum over words w of q: ln(1 + (N - n_w + .5) / (n_w + .5)) f / (f + .9 (.6 + .4 l_p / l)):
    n_w of N passages hold w; p holds it f times among l_p words, l on average.  Words are in lower case, of
    two letters or more, no English stop words, and go through `s_stem`.  The rest is as in `retrieve`."""
    form = {"stopwords": "en_plus", "stemmer": lambda words: [*map(s_stem, words)], "return_ids": False}
    words, asked = (bm25s.tokenize([*x.values()], **form, show_progress=False) for x in (corpus, queries))
    index, rows = bm25s.BM25(method="lucene", k1=0.9, b=0.4), []
    if any(words):
        index.index(words, show_progress=False)
    for qid, query in zip(queries, asked, strict=True):
        scores = index.get_scores(query) if query and any(words) else np.zeros(0)
        best = np.argsort(-scores, kind="stable")[: min(k + 1, np.count_nonzero(scores > 0))]
        rows.append((qid, scores[best].tolist(), best.tolist()))
    return _as_run(rows, corpus, queries, k)

def evaluate_model(model: Any, corpus: Texts, queries: Texts, qrels: metrics.Qrels, *,
                   measures: Sequence[str] = metrics.MEASURES, top_k: int | None = None, batch_size: int = 32,
                   device: str = "auto", dtype: str = "auto", run_file: Place | None = None,
                   cache: bool = True, progress: bool = False) -> dict[str, Any]:
    """Rank and score one model on one collection: the record that the command line writes.

    `model`: "bm25", a name or folder for `BiEncoder.load`, or an object with `encode`.  Only judged queries
    are asked, `top_k` passages kept for each (by default 1000 or all).  `cache`: where a named encoder ends
    in a linear map, its transformer's vectors are kept for the next one.  ValueError before a model loads."""
    top_k = min(1000, len(corpus)) if top_k is None else top_k
    if not 1 <= top_k <= len(corpus) or batch_size < 1:
        raise ValueError(f"top-k is {top_k}, expected 1 to {len(corpus)}, the number of passages; "
                         f"batch-size is {batch_size}, expected 1 or more")
    metrics.evaluate({}, {}, measures)  # refuses an unknown measure
    if short := [m for m in measures if int(m.partition("@")[2]) > top_k < len(corpus)]:
        print(f"{', '.join(short)}: only the best {top_k} passages of a query count", file=sys.stderr)
    if not qrels or (unknown := sorted(qrels.keys() - queries.keys())):
        raise ValueError(f"judged query {unknown[0]!r} has no text" if qrels else "there are no judgments")
    if run_file is not None:
        metrics.check_ids([*qrels, *corpus], run_file)
    name = _plain_name(model) if isinstance(model, Place) else type(model).__name__
    number_format = checkpoints.pick_dtype(dtype, checkpoints.pick_device(device), encoding=True)
    if isinstance(model, Place) and model != "bm25":
        model = BiEncoder.load(model, device=device)
        keep = cache and model.projection is not None and len(corpus) <= KEPT
        if not keep or dtype != "auto":  # what is kept is computed once, so in float32
            model.model.to(number_format)
        if keep:
            model.freeze(model.model.config.num_hidden_layers)  # nothing trains here
    start, asked = time.perf_counter(), {qid: queries[qid] for qid in qrels}
    run = (bm25_run(corpus, asked, top_k) if model == "bm25" else
           retrieve(model, corpus, asked, top_k, batch_size, progress))
    seconds = round(time.perf_counter() - start, 2)
    if run_file is not None:
        metrics.write_run(run, run_file, tag=re.sub(r"\s+", "_", name))
    per_query = metrics.evaluate(qrels, run, measures)
    dtype = getattr(getattr(model, "model", None), "dtype", torch.float32)
    used = checkpoints.machine(getattr(model, "device", "cpu"), dtype)
    counts = {"passages": len(corpus), "queries": len(qrels), "judgments": sum(map(len, qrels.values()))}
    return {"model": name, "metrics": metrics.mean(per_query), "top_k": top_k, "counts": counts,
            "seconds": seconds, "device": used["device"], "dtype": used["dtype"], "machine": used,
            "per_query": per_query}

def _plain_name(place: Place) -> str:
    return Path(place).resolve().name if Path(place).is_dir() else str(place)  # no path of this machine

def _command(model: str, data: str, split: str, out: Path | None, run: Path | None, **options: Any) -> None:
    if others := rank_and_ranks()[0] > 0:
        out = run = None  # the first rank writes
    out = out and checked_output(out, re.compile(r'\{"collection": ').match)  # how an own file begins
    own = re.escape(re.sub(r"\s+", "_", _plain_name(model)))  # another model's run is not overwritten
    run = run and checked_output(run, re.compile(rf"[^ ]+ Q0 [^ ]+ \d+ \S+ {own}\s*$").match)
    if out and run and out.resolve() == run.resolve() and (out.is_file() or not out.exists()):
        raise ValueError(f"{out}: --out and --run name the same file")
    collection = load_beir(data, split=split)
    with ExitStack() as stack:
        for path in (p for p in (out, run) if p and (p.is_file() or not p.exists())):  # no device
            stack.enter_context(locked(path))
        record = evaluate_model(model, *collection, run_file=run, progress=not others, **options)
        record = {"collection": _plain_name(data), "split": split, **record}
        if out:
            fields = (f'"{key}": {json.dumps(value, ensure_ascii=False)}' for key, value in record.items())
            with writing(out) as sink:
                sink.write("{" + ",\n ".join(fields) + "}\n")
    counts = ", ".join(f"{count} {what}" for what, count in record["counts"].items())
    print(f"collection  {one_line(record['collection'])} ({one_line(split)}): {counts}")
    print("model       {} ({device}, {dtype}, {seconds} s)".format(one_line(record["model"]), **record))
    print(*(f"{measure:<12}{value:.4f}" for measure, value in record["metrics"].items()), sep="\n")

def main(argv: list[str] | None = None) -> int:
    """The command line: 0, or 2 with one sentence on stderr."""
    p = argparse.ArgumentParser(prog="python -m repro.evaluate", description=__doc__.split("\n\n")[1])
    p.add_argument("--model", default="base", help="bm25, base, all-minilm-l6-v2, a model folder, a hub id")
    p.add_argument("--data", default="sample", help="sample, a BEIR folder, a hub id")
    p.add_argument("--split", default="test", help="which judgments to use")
    p.add_argument("--out", type=Path, metavar="FILE.json", help="write the record here")
    p.add_argument("--run", type=Path, metavar="FILE.trec", help="a TREC run; torchrun: -m -- repro.evaluate")
    p.add_argument("--top-k", type=int, metavar="N", help="passages kept a query, by default 1000 at most")
    p.add_argument("--batch-size", type=int, default=32, help="texts encoded together")
    p.add_argument("--measures", nargs="+", default=metrics.MEASURES, help="ndcg@K ndcg_exp@K mrr@K recall@K")
    p.add_argument("--no-cache", dest="cache", action="store_false", help="keep no vectors for other models")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda, ...")
    p.add_argument("--dtype", default="auto", help="float32, bfloat16, float16; auto: bfloat16 where native")
    a = p.parse_args(argv)
    return ending(lambda: process_group(a.device)(_command)(**vars(a)))

if __name__ == "__main__":
    sys.exit(main())
