"""How fast the kit is: each task against a peer that takes turns with it in the same run.

    python tests/bench/bench.py [--quick]

Both sides get the same texts, lengths, batch, number format and threads, and one turn to warm up.
A rate is the median of three turns, a ratio the median of their ratios.  The rows are written to
bench.json and SPEED.md in repro/experiment/results; with --quick, in tiny sizes, only printed.
"""

import itertools
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

import datasets
import sentence_transformers as st
import torch
import transformers
from scipy.stats import wasserstein_distance
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2]))
from repro import data, generate, losses, prompts, search, train
from repro.encoder import BiEncoder
from repro.support.files import write_json, write_text
from repro.support.models import load_pretrained, machine, model_folder, pick_dtype

RESULTS = Path(data.__file__).parent / "experiment" / "results"
QUICK = "--quick" in sys.argv
TURNS = 1 if QUICK else 3
FORMATS = {"float32": torch.float32}
if pick_dtype("auto", torch.device("cpu"), encoding=True) == torch.bfloat16:
    FORMATS["bfloat16"] = torch.bfloat16
MINILM = "all-minilm-l6-v2"
TEMPERATURE = 0.25
GOALS = {"float32": 1.6, "bfloat16": 1.8}  # of training
INTRO = """\
The kit and each peer took turns in one run, with the same texts, number format and threads. A ratio
above 1 means that the kit is faster. `python tests/bench/bench.py` writes this page."""
Row = dict[str, Any]
Work = Callable[[], object]


def seconds(work: Work) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def versus(what: str, peer: str, unit: str, units: float, sides: tuple[Work, Work]) -> Row:
    """One row: the kit and its peer in turns, the first to warm up; a call does so many `units`."""
    turns = [[seconds(work) for work in sides] for _ in range(TURNS + 1)][1:]
    return {
        "what": what,
        "format": "float32",
        "peer": peer,
        "unit": unit,
        "ours": round(units / median(ours for ours, _ in turns), 1),
        "peer's": round(units / median(theirs for _, theirs in turns), 1),
        "ratio": round(median(theirs / ours for ours, theirs in turns), 2),
        "goal": "",
    }


def released_gaussian(scores: Tensor, labels: Tensor) -> Tensor:
    """The released way, from its formula: (N, N) covariances, eigenvalues of a (B, B) product."""
    p = scores.softmax(1).double()
    t = labels.softmax(1).double()
    a = p - p.mean(0)
    c = t - t.mean(0)
    n = max(len(p) - 1, 1)
    cross = torch.linalg.eigvals((a @ c.T / n) @ (c @ a.T / n)) + 1e-15
    traces = torch.trace(a.T @ a / n + c.T @ c / n)
    return (p.mean(0) - t.mean(0)).square().sum() + traces - 2 * cross.sqrt().abs().sum()


def scipy_1d(scores: Tensor, labels: Tensor) -> None:
    """1-D W of every row on the plain line of grades; scipy has no gradient."""
    p = scores.detach().softmax(1)
    t = labels.softmax(1)
    for places, ours, target in zip(labels, p, t, strict=True):
        wasserstein_distance(places, places, ours, target)


def bench_losses() -> Iterator[Row]:
    calls = 2 if QUICK else 50
    for lists in (16, 64):
        labels = losses.expand_labels(torch.tensor([[3.0, 2.0, 1.0, 0.0]]).repeat(lists, 1))
        scores = torch.randn(labels.shape, requires_grad=True)

        def run(loss: Callable, scores: Tensor = scores, labels: Tensor = labels) -> None:
            for _ in range(calls):
                value = loss(scores, labels)
                if value is not None:
                    value.backward()

        sides = partial(run, losses.wasserstein_gaussian), partial(run, released_gaussian)
        what = f"Gaussian W2 and its gradient, {lists} lists"
        yield versus(what, "released eigenvalue form", "calls/s", calls, sides)
        sides = partial(run, losses.wasserstein_1d), partial(run, scipy_1d)
        what = f"1-D W and its gradient, {lists} lists"
        yield versus(what, "scipy, without gradient", "calls/s", calls, sides)


class InBatchKL(torch.nn.Module):
    """The kit's KL as a loss of sentence-transformers: every query against all passages."""

    def __init__(self, model: st.SentenceTransformer) -> None:
        super().__init__()
        self.model = model

    def forward(self, features: list[dict[str, Tensor]], labels: Tensor) -> Tensor:
        queries, *parts = [self.model(part)["sentence_embedding"] for part in features]
        passages = torch.stack(parts, 1).flatten(0, 1)  # (B * k, d), query-major
        return losses.kl(queries @ passages.T, losses.expand_labels(labels), TEMPERATURE)


def peer_training(rows: list[Row], form: str, dropout: Row) -> Work:
    """One epoch of sentence-transformers' trainer on MiniLM."""
    folder = str(model_folder(MINILM))
    model = st.SentenceTransformer(folder, device="cpu", config_kwargs=dropout)
    options = st.SentenceTransformerTrainingArguments(
        tempfile.gettempdir(),  # where it saves nothing
        per_device_train_batch_size=16,
        num_train_epochs=1,
        learning_rate=1e-5,
        bf16=form == "bfloat16",
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
    )
    table = datasets.Dataset.from_list(rows)
    loss = InBatchKL(model)
    trainer = st.SentenceTransformerTrainer(model, options, table, loss=loss)
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer.train


def bench_training() -> Iterator[Row]:
    lists = data.load_lists([data.AUTHORED])[: 16 if QUICK else 32]
    encoder = BiEncoder.load(MINILM, "cpu", "float32")
    rows = []
    for item in lists:
        passages = dict(zip("3210", item.passages, strict=True))
        rows.append({"query": item.query, **passages, "label": item.grades})
    off = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    what = f"training {MINILM}, 16 lists a batch"
    for form in FORMATS:
        config = train.TrainConfig(loss="kl", temperature=TEMPERATURE, dtype=form, device="cpu")
        ours = partial(train.train_encoder, encoder, lists, config)
        for name, dropout in (("as it comes", {}), ("without dropout", off)):
            theirs = peer_training(rows, form, dropout)
            peer = f"sentence-transformers' trainer {name}"
            row = versus(what, peer, "lists/s", len(lists), (ours, theirs))
            yield row | {"format": form, "goal": GOALS[form]}


def bench_encoding() -> Iterator[Row]:
    corpus, _, _ = data.load_beir("sample")
    texts = list(corpus.values())[: 8 if QUICK else None]
    turns = itertools.count()

    def encode(model: Any) -> Any:  # new texts every time: vectors of frozen layers are kept
        turn = next(turns)
        return model.encode([f"{turn} {text}" for text in texts], batch_size=32)

    for name, form in itertools.product((MINILM, "base"), FORMATS):
        ours = BiEncoder.load(name, "cpu", form)
        with tempfile.TemporaryDirectory() as folder:
            BiEncoder.load(name, "cpu").save(f"{folder}/model")
            options = {"dtype": FORMATS[form]}
            peer = st.SentenceTransformer(f"{folder}/model", device="cpu", model_kwargs=options)
            with mock.patch.dict(os.environ, SYCL_CACHE=folder):
                sides = partial(encode, ours), partial(encode, peer)
                what = f"encoding {len(texts)} passages, {name}"
                row = versus(what, "sentence-transformers", "passages/s", len(texts), sides)
        yield row | {"format": form}


def bench_generation() -> Iterator[Row]:
    count, new = (4, 4) if QUICK else (32, 24)
    lists = data.load_lists([data.AUTHORED])[:count]
    drawn = {"neighbour": "", "unrelated": ""}
    chats = [prompts.messages("by-level", (3,), item.query, drawn) for item in lists]
    jobs = [(chat, str(n)) for n, chat in enumerate(chats)]
    writer = generate.LocalGenerator("smollm2-135m", "cpu", "float32")
    writer.model.generation_config.min_new_tokens = new  # no reply ends early, on either side
    tokenizer = writer.tokenizer
    tokenizer.padding_side = "left"
    tokenizer.pad_token = tokenizer.eos_token
    folder = model_folder("smollm2-135m")
    model = load_pretrained(folder, transformers.AutoModelForCausalLM, dtype=torch.float32)
    pipeline = transformers.pipeline("text-generation", model=model, tokenizer=tokenizer)
    options = {"temperature": 0.7, "top_p": 0.9, "top_k": 50, "do_sample": True}
    options |= {"max_new_tokens": new, "min_new_tokens": new, "batch_size": count}
    ours = partial(writer.reply, jobs, generate.Sampling(max_new_tokens=new))
    theirs = partial(pipeline, chats, **options)
    what = f"generation, {count} prompts, {new} tokens each, one batch"
    yield versus(what, "transformers' pipeline", "tokens/s", count * new, (ours, theirs))


def bench_search() -> Iterator[Row]:
    rows = 2_000 if QUICK else 200_000
    queries = torch.randn(43, 384)
    passages = torch.randn(rows, 384)
    sides = (
        lambda: search.search(queries, passages, 100),
        lambda: (queries @ passages.T).topk(100),
    )
    what = f"search, {rows:,} x 384, 100 found"
    yield versus(what, "torch: one product, topk", "queries/s", 43, sides)


def page(record: Row) -> str:
    """SPEED.md: the machine, and a table with a line a row."""
    facts = [f"{name} {value}" for name, value in record["machine"].items()]
    columns = list(record["rows"][0])
    lines = ["# Speed", "", INTRO, "", f"Machine: {', '.join(facts)}.", ""]
    rows = [row.values() for row in record["rows"]]
    for cells in (columns, ["---"] * len(columns), *rows):
        lines.append("| " + " | ".join(str(cell) for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    rows = []
    for bench in (bench_losses, bench_search, bench_generation, bench_encoding, bench_training):
        for row in bench():
            print(*row.values(), sep=" | ", flush=True)
            rows.append(row)
    if not QUICK:
        record = {"machine": machine("cpu"), "rows": rows}
        write_json(RESULTS / "bench.json", record)
        write_text(RESULTS / "SPEED.md", page(record))


if __name__ == "__main__":
    main()
