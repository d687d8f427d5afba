"""How fast the kit is: ratios, each against a peer that takes turns with it in the same run.

    python tests/bench/bench.py [--only losses training growth ...] [--data FOLDER] [--quick]

Both sides get the same texts, lengths, batch, number format, threads (OMP_NUM_THREADS), a turn to warm up;
a ratio is the median of 5.  Where faiss is installed, search meets it.  bench.json keeps one machine's rows.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import datasets
import numpy as np
import pytrec_eval
import sentence_transformers as st
import torch
import transformers
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parents[2]))
from repro import checkpoints, data, encoder, evaluate, generate, losses, metrics, prompts, train
from repro.experiment import report

OUT = Path(losses.__file__).parent / "experiment" / "results" / "bench.json"
COLUMNS = ("what", "format", "peer", "unit", "ours", "peer's", "ratio", "goal", "note")
MODEL, HEAT = "all-minilm-l6-v2", {"temperature": 0.05, "label_temperature": 0.3}
NATIVE = checkpoints.pick_dtype("auto", torch.device("cpu"), encoding=True) == torch.bfloat16
QUICK = "--quick" in sys.argv
TURNS = 2 if QUICK else 5
Row, Work = dict[str, Any], Callable[[], Any]

def row(what: str, peer: str, unit: str, units: float, ours: Work, theirs: Work, goal: float | str = "", *,
        form: str = "float32", share: float = 1, note: str = "") -> Row:  # fmt: skip
    """Time both in turns.  A call of ours does so many units, one of the peer's a `share` of them."""
    rates = []
    for _ in range(TURNS + 1):
        times = [time.perf_counter()]
        for work in (ours, theirs):
            work()
            times.append(time.perf_counter())
        rates.append((units / (times[1] - times[0]), share * units / (times[2] - times[1])))
    a, b = (float(f"{median(side):.4g}") for side in zip(*rates[1:], strict=True))
    ratio = round(median(a / b for a, b in rates[1:]), 2)
    return dict(zip(COLUMNS, (what, form, peer, unit, a, b, ratio, goal, note), strict=True))

def released(scores: Tensor, labels: Tensor) -> Tensor:
    """The released eigenvalue form, from its formula: (N, N) covariances, eigenvalues of a (B, B) product."""
    p, t = (torch.softmax(x, 1).double() for x in (scores, labels))
    a, c, n = p - p.mean(0), t - t.mean(0), max(len(p) - 1, 1)
    cross = (torch.linalg.eigvals((a @ c.T / n) @ (c @ a.T / n)) + 1e-15).sqrt().abs().sum()
    return ((p.mean(0) - t.mean(0)) ** 2).sum() + torch.trace(a.T @ a / n + c.T @ c / n) - 2 * cross

def bench_losses(collection: str) -> Iterator[Row]:
    labels, count = losses.expand_labels(torch.tensor([[3.0, 2, 1, 0]]).repeat(64, 1)), 5 if QUICK else 50
    scores = torch.randn(labels.shape, requires_grad=True)

    def calls(loss: Callable[..., Tensor]) -> list[Any]:
        return [torch.autograd.grad(loss(scores, labels), scores) for _ in range(count)]

    for name, goal in (("wasserstein_gaussian", 3), ("wasserstein_1d", 8), ("kl", "")):
        works = partial(calls, losses.LOSSES[name]), partial(calls, released)
        yield row(f"{name}, B 64, N 256", "released eigenvalue form", "calls/s", count, *works, goal)

def bench_training(collection: str) -> Iterator[Row]:
    lists = data.load_lists([data.AUTHORED])[: 16 if QUICK else 32]
    texts = [{"query": a.query, **dict(zip("3210", a.passages, strict=True))} for a in lists]
    rows = datasets.Dataset.from_list([x | {"label": a.grades} for x, a in zip(texts, lists, strict=True)])
    ours = encoder.BiEncoder.load(MODEL, "cpu", "float32")
    model = st.SentenceTransformer(checkpoints.resolve(MODEL)[0], device="cpu")
    tokens = sum(map(len, ours.tokenise([text for x in texts for text in x.values()])))

    class InBatch(torch.nn.Module):
        def forward(self, features: list[dict[str, Tensor]], labels: Tensor) -> Tensor:
            queries, *passages = (model(part)["sentence_embedding"] for part in features)
            scores = queries @ torch.stack(passages, 1).flatten(0, 1).T  # (B, B*k)
            return losses.kl(scores, losses.expand_labels(labels), **HEAT)

    # A token costs 6 FLOP a weight; attention's own products, 3 % at these lengths, are not counted.
    flop = 6 * sum(p.numel() for key, p in ours.model.named_parameters() if "embeddings" not in key)
    common = {"per_device_train_batch_size": 16, "num_train_epochs": 1, "warmup_steps": 0.05, "use_cpu": True}
    common |= {"learning_rate": 1e-5, "weight_decay": 0.01, "optim": "adamw_torch", "report_to": "none"}
    common |= {"save_strategy": "no", "logging_strategy": "no", "disable_tqdm": True}
    what = f"training {MODEL}, 16 lists a batch"
    for form, goal in (("float32", 1.5), ("bfloat16", 2))[: 1 + NATIVE]:
        config = train.TrainConfig(loss="kl", lr=1e-5, dtype=form, device="cpu", **HEAT)
        with tempfile.TemporaryDirectory() as folder:
            options = st.SentenceTransformerTrainingArguments(folder, bf16=form == "bfloat16", **common)
            peer = st.SentenceTransformerTrainer(model, options, rows, loss=InBatch())
            peer.remove_callback(transformers.PrinterCallback)
            works = partial(train.train_encoder, ours, lists, config), peer.train
            made = row(what, type(peer).__name__, "tokens/s", tokens, *works, goal, form=form)
        product = partial(torch.matmul, *torch.randn(2, 2048, 2048).to(getattr(torch, form)))
        most = row("one product", "itself", "FLOP/s", 2 * 2048**3, product, product)["ours"]
        yield made | {"note": f"{flop * made['ours'] / most:.0%} of the FLOP/s of one large product"}
    # The FLOP of a step are counted on a BERT-base, as Contriever is.  It keeps some 34 bytes a token, layer
    # and unit of width (Korthikanti et al. 2022, arXiv 2205.05198), and 16 bytes a weight.
    bert = transformers.BertModel(transformers.BertConfig(attn_implementation="eager"))
    bert = encoder.BiEncoder(bert, ours.tokenizer)
    for name, k in (("real binary", 3), ("synthetic binary", 3), ("graded", 4), ("synthetic + real", 7)):
        texts = [text for x in lists[:4] for text in (x.query, *(x.passages * 2)[:k])]
        with FlopCounterMode(display=False) as counter:
            bert.embed(texts, "passage").sum().backward()
        flop, kept = counter.get_total_flops() / 4, 34 * 12 * 768 * sum(map(len, bert.tokenise(texts))) / 4
        for gpus in (1, 4):
            hours = round(flop * 100_000 / (gpus * 0.4 * 312e12) / 3600, 3)
            note = f"estimated, not run; {(64 / gpus * kept + 16 * 110e6) / 1e9:.0f} GB a GPU"
            peer, what = f"{gpus} x A100 at 40 % of 312 TFLOP/s", f"released {name}, for each 100,000 lists"
            yield dict(zip(COLUMNS, (what, "bfloat16", peer, "hours", hours, *[""] * 3, note), strict=True))

def bench_growth(collection: str) -> Iterator[Row]:
    """How cost grows, against the same work in small: with exponent 1 twice as much takes twice as long."""
    ours, lists = encoder.BiEncoder.load(MODEL, "cpu"), data.load_lists([data.AUTHORED])[:64]
    half, size = lists[: 8 if QUICK else 16], {"device": "cpu", "lr": 1e-5}
    long = [replace(x, passages=[f"{text} {text}" for text in x.passages]) for x in half]
    wide = [replace(x, passages=x.passages * 2, grades=x.grades * 2) for x in half]

    def fit(some: list, batch_size: int = 4) -> Work:
        config = train.TrainConfig(loss="wasserstein_gaussian", batch_size=batch_size, **size, **HEAT)
        return partial(train.train_encoder, ours, some, config)

    for what, some, batch, goal in (
            ("2 x the lists", lists[: 2 * len(half)], 4, 1), ("4 x the batch", half, 16, 1),
            ("2 x the passages a list", wide, 4, 0.55), ("2 x as long passages", long, 4, 0.5)):
        share, works = len(half) / len(some), (fit(some, batch), fit(half))
        made = row(f"training, {what}", "as before", "lists/s", len(some), *works, goal, share=share)
        grown = [-math.log(ratio * share) / math.log(int(what[0])) for ratio in (made["ratio"], goal)]
        yield made | {"note": "exponent {:z.2f}, expected {:z.2f}".format(*grown)}
    asked, matrix = (torch.randn(n, 384) for n in (43, 40_000 if QUICK else 400_000))
    works = (partial(evaluate.search, asked, part, 100) for part in (matrix, matrix[::2].contiguous()))
    made = row("search, 2 x the passages", "as before", "queries/s", 43, *works, 0.5)
    yield made | {"note": f"exponent {-math.log2(made['ratio']):.2f}, expected 1.00"}

def bench_encoding(collection: str) -> Iterator[Row]:
    corpus, queries, qrels = data.load_beir(collection)
    judged = dict(sorted(qrels.items())[:2])  # of dl19-pool: 460 passages
    passages = {pid: corpus[pid] for grades in judged.values() for pid in grades}
    texts, what = list(passages.values()), f"encoding {len(passages)} passages of {Path(collection).name}"
    full, half = (encoder.BiEncoder.load(MODEL, "cpu", form) for form in ("float32", "bfloat16"))
    peer = st.SentenceTransformer(checkpoints.resolve(MODEL)[0], device="cpu")
    ours, theirs, brief = (partial(model.encode, texts, batch_size=32) for model in (full, peer, half))
    note = f"largest difference {np.abs(full.encode(texts[:64]).numpy() - peer.encode(texts[:64])).max():.0e}"
    size = ("passages/s", len(texts))
    yield row(what, "SentenceTransformer.encode", *size, ours, theirs, 1.4, note=note)
    if NATIVE:
        scored = [evaluate.evaluate_model(model, passages, queries, judged) for model in (half, full)]
        note = f"nDCG@10 {scored[0]['metrics']['ndcg@10'] - scored[1]['metrics']['ndcg@10']:+.4f}"
        yield row(what, "ours in float32", *size, brief, ours, 3, form="bfloat16", note=note)

def bench_generation(collection: str) -> Iterator[Row]:
    (new, count), empty = (4, 6) if QUICK else (32, 48), {"neighbour": "", "unrelated": ""}
    asked = [item.query for item in data.load_lists([data.AUTHORED])[:count]]
    chats = [prompts.messages("by-level", (3,), query, empty) for query in asked]
    jobs, sampling = [(chat, str(n)) for n, chat in enumerate(chats)], generate.Sampling(max_new_tokens=new)
    mine, auto = generate.LocalGenerator("smollm2-135m", "cpu", "float32"), transformers.AutoModelForCausalLM
    mine.model.generation_config.min_new_tokens = new  # no reply ends early, on either side
    mine.tokenizer.padding_side, mine.tokenizer.pad_token = "left", mine.tokenizer.eos_token
    model = checkpoints.load_pretrained("smollm2-135m", auto, dtype=torch.float32).eval()
    options = {"temperature": 0.7, "top_p": 0.9, "top_k": 50, "max_new_tokens": new, "min_new_tokens": new}
    pipe = transformers.pipeline("text-generation", model=model, tokenizer=mine.tokenizer)
    pipe = partial(pipe, **options, do_sample=True, return_full_text=False)
    parts = iter([chats[n :: TURNS + 1] for n in range(TURNS + 1)])  # one by one: another part each turn
    what, ours = f"generation, {count} prompts, {new} new tokens", partial(mine.reply, jobs, sampling)
    one, size = lambda: pipe(next(parts)), ("tokens/s", count * new)
    yield row(what, "pipeline, one by one", *size, ours, one, 5, share=1 / (TURNS + 1))
    yield row(what, f"pipeline, batch {count}", *size, ours, partial(pipe, chats, batch_size=count), 1)

def bench_search(collection: str) -> Iterator[Row]:
    rng, folder = np.random.default_rng(0), tempfile.TemporaryDirectory()
    asked = torch.from_numpy(rng.standard_normal((43, 384), np.float32))

    def run(find: Work, score: Callable[[metrics.Run], Any]) -> None:
        rows = zip(map(str, range(43)), *(found.tolist() for found in find()), strict=True)
        score({q: dict(zip(map(str, found), values, strict=True)) for q, values, found in rows})

    for n, k in ((22_917, 1000), (20_000 if QUICK else 1_000_000, 100)):
        matrix = np.memmap(Path(folder.name) / str(n), np.float32, "w+", shape=(n, 384))
        for block in np.array_split(matrix, 50):
            block[:] = rng.standard_normal(block.shape, np.float32)
        judged = {str(q): {str(p): int(p) % 4 for p in rng.integers(0, n, 200)} for q in range(43)}
        trec = pytrec_eval.RelevanceEvaluator(judged, {"ndcg_cut.10", "recip_rank", "recall.100"})
        try:
            import faiss

            (index := faiss.IndexFlatIP(384)).add(matrix)
            peer, find = "faiss IndexFlatIP, pytrec_eval", partial(index.search, asked.numpy(), k)
        except ImportError:
            peer, whole = "torch product and topk, pytrec_eval", torch.from_numpy(matrix).T
            find = lambda whole=whole, k=k: (asked @ whole).topk(k)  # noqa: E731
        ours = partial(run, partial(evaluate.search, asked, matrix, k), partial(metrics.evaluate, judged))
        theirs, what = partial(run, find, trec.evaluate), f"search and metrics, {n:,} x 384, {k} found"
        yield row(what, peer, "queries/s", 43, ours, theirs, 1)

def bench_commands(collection: str) -> Iterator[Row]:
    """Minutes that a user waits, one turn: the first run, README's two commands.  The goal is a most."""
    first = "from repro.encoder import BiEncoder as B; B.load('base'), B.load('all-minilm-l6-v2')"
    notebook = "-m jupyter nbconvert --to notebook --execute reproduce.ipynb --output-dir".split()
    with tempfile.TemporaryDirectory() as new:
        for what, goal, more, command in (("first run, empty cache", 5, {"SYCL_CACHE": new}, ["-c", first]),
                ("notebook", 10, {}, [*notebook, new]), ("tests", 4, {}, ["-m", "pytest", "-q", "tests"])):
            options, start = {"cwd": sys.path[0], "env": os.environ | more}, time.perf_counter()
            subprocess.run([sys.executable, *command], check=True, capture_output=True, **options)
            made = (what, "", "--only commands", "minutes", round((time.perf_counter() - start) / 60, 1))
            yield dict(zip(COLUMNS, (*made, "", "", goal, ""), strict=True))

def main() -> None:
    parts = {key[6:]: part for key, part in globals().items() if key.startswith("bench_")}
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--only", nargs="+", choices=parts, default=[*parts][:-1])  # all but commands
    parser.add_argument("--data", default="sample", help="collection whose judged passages are encoded")
    parser.add_argument("--quick", action="store_true", help="small sizes, 2 turns, nothing is written")
    a, here = parser.parse_args(), checkpoints.machine("cpu")
    old = json.loads(OUT.read_text(encoding="utf-8")) if OUT.exists() else {}
    rows = {tuple(r.values())[:3]: r for r in old.get("rows", []) if old["machine"] == here}
    for new in (new for part in a.only for new in parts[part](a.data)):
        print(*new.values(), sep="  ", flush=True)
        rows[tuple(new.values())[:3]] = new
        if not QUICK:
            checkpoints.write_json(OUT, {"machine": here, "rows": list(rows.values())})
            report.main([])  # the results page

if __name__ == "__main__":
    main()
