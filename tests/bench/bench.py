"""How fast the kit is: each task against a peer that takes turns with it in the same run.

    python tests/bench/bench.py [--quick]

Both sides get the same texts, lengths, batch, number format and threads, and one turn to warm up.
A rate is that of the median of three turns, a ratio that of the rates.  The rows are written to
SPEED.md in repro/experiment/results; with --quick, in tiny sizes, only printed.
"""

import itertools
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from timeit import timeit
from typing import Any
from unittest import mock

import numpy as np
import sentence_transformers as st
import torch
import transformers
from datasets import Dataset
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2]))
from repro import data, generate, losses, search, train
from repro.encoder import BiEncoder
from repro.experiment.claims import RESULTS
from repro.experiment.report import table
from repro.support.files import write_text
from repro.support.models import machine, model_folder, pick_dtype

QUICK = "--quick" in sys.argv
TURNS = 1 if QUICK else 3
FORMATS = ["float32"]
if pick_dtype("auto", torch.device("cpu"), encoding=True) == torch.bfloat16:
    FORMATS.append("bfloat16")
MINILM = "all-minilm-l6-v2"
TEMPERATURE = 0.25
# The kit trains without dropout; sentence-transformers with it, unless told otherwise.
TRAINERS = {
    "sentence-transformers' trainer": {},
    "the same, without dropout": {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
}
INTRO = """\
The kit and each peer took turns in one run, with the same texts, number format and threads. A ratio
above 1 means that the kit is faster. `python tests/bench/bench.py` writes this page. The goal for
training, which the kit does without dropout, is a ratio of 1.6 in float32 and of 1.8 in native
bfloat16."""
Row = dict[str, Any]
Work = Callable[[], object]


def versus(what: str, peer: str, units: float, ours: Work, theirs: Work) -> Row:
    """One row: the kit and its peer in turns, the first to warm up; a call does so many units."""
    turns = [[timeit(ours, number=1), timeit(theirs, number=1)] for _ in range(TURNS + 1)]
    kit, other = np.median(turns[1:], axis=0)
    return {
        "what": what,
        "peer": peer,
        "ours": round(units / kit, 1),
        "peer's": round(units / other, 1),
        "ratio": round(other / kit, 2),
    }


def released_gaussian(scores: Tensor, labels: Tensor) -> Tensor:
    """The released way, from its formula: (N, N) covariances, eigenvalues of a (B, B) product."""
    p = scores.softmax(1).double()
    t = labels.softmax(1).double()
    a = p - p.mean(0)
    c = t - t.mean(0)
    n = len(p) - 1
    cross = torch.linalg.eigvals((a @ c.T / n) @ (c @ a.T / n)) + 1e-15
    traces = torch.trace(a.T @ a / n + c.T @ c / n)
    return (p.mean(0) - t.mean(0)).square().sum() + traces - 2 * cross.sqrt().abs().sum()


def bench_losses() -> Iterator[Row]:
    calls = 2 if QUICK else 50

    def run(loss: Callable, labels: Tensor) -> None:
        scores = torch.randn(labels.shape, requires_grad=True)
        for _ in range(calls):
            loss(scores, labels).backward()

    for lists in (16, 64):
        labels = losses.expand_labels(torch.tensor([[3.0, 2.0, 1.0, 0.0]] * lists))
        ours = partial(run, losses.wasserstein_gaussian, labels)
        theirs = partial(run, released_gaussian, labels)
        what = f"Gaussian W2 and its gradient, {lists} lists, calls/s"
        yield versus(what, "released eigenvalue form", calls, ours, theirs)


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
        bf16=form == "bfloat16",
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        logging_strategy="no",
    )
    lists = Dataset.from_list(rows)
    return st.SentenceTransformerTrainer(model, options, lists, loss=InBatchKL(model)).train


def bench_training() -> Iterator[Row]:
    lists = data.load_lists(data.AUTHORED)[: 16 if QUICK else 32]
    encoder = BiEncoder.load(MINILM, "cpu")
    rows = []
    for item in lists:
        passages = dict(zip("3210", item.passages, strict=True))
        rows.append({"query": item.query, **passages, "label": item.grades})
    for form, (peer, dropout) in itertools.product(FORMATS, TRAINERS.items()):
        config = train.TrainConfig(loss="kl", temperature=TEMPERATURE, dtype=form)
        ours = partial(train.train_encoder, encoder, lists, config)
        what = f"training {MINILM} in {form}, 16 lists a batch, lists/s"
        yield versus(what, peer, len(lists), ours, peer_training(rows, form, dropout))


def bench_encoding() -> Iterator[Row]:
    corpus, _, _ = data.load_beir("sample")
    texts = list(corpus.values())[: 8 if QUICK else None]
    turns = itertools.count()

    def encode(model: Any) -> None:  # new texts every time: vectors of frozen layers are kept
        turn = next(turns)
        model.encode([f"{turn} {text}" for text in texts], batch_size=32)

    for name, form in itertools.product((MINILM, "base"), FORMATS):
        encoder = BiEncoder.load(name, "cpu", form)
        with tempfile.TemporaryDirectory() as folder:
            saved = str(BiEncoder.load(name, "cpu").save(f"{folder}/model"))
            peer = st.SentenceTransformer(saved, device="cpu")
            peer[0].to(pick_dtype(form))  # not its linear map, as the kit has it
            ours, theirs = partial(encode, encoder), partial(encode, peer)
            what = f"encoding {len(texts)} passages with {name} in {form}, passages/s"
            with mock.patch.dict(os.environ, SYCL_CACHE=folder):
                yield versus(what, "sentence-transformers", len(texts), ours, theirs)


def bench_generation() -> Iterator[Row]:
    count, new = (4, 4) if QUICK else (32, 24)
    lists = data.load_lists(data.AUTHORED)[:count]
    chats = [[{"role": "user", "content": item.passages[0]}] for item in lists]
    jobs = [(chat, str(n)) for n, chat in enumerate(chats)]
    writer = generate.LocalGenerator("smollm2-135m", "cpu", "float32")
    writer.model.generation_config.min_new_tokens = new  # no reply ends early, on either side
    writer.tokenizer.padding_side = "left"
    pipeline = transformers.pipeline(
        "text-generation", model=writer.model, tokenizer=writer.tokenizer
    )
    ours = partial(writer.reply, jobs, generate.Sampling(max_new_tokens=new))
    options = {"do_sample": True, "temperature": 0.7, "top_p": 0.9, "top_k": 50}
    theirs = partial(pipeline, chats, batch_size=count, max_new_tokens=new, **options)
    what = f"generation, {count} prompts in a batch, {new} tokens each, tokens/s"
    yield versus(what, "transformers' pipeline", count * new, ours, theirs)


def bench_search() -> Iterator[Row]:
    rows = 2_000 if QUICK else 200_000
    queries = torch.randn(43, 384)
    passages = torch.randn(rows, 384)
    ours = partial(search.search, queries, passages, 100)
    what = f"search, {rows:,} x 384, 100 found, queries/s"
    yield versus(
        what, "torch: one product, topk", 43, ours, lambda: (queries @ passages.T).topk(100)
    )


def page(rows: list[Row]) -> str:
    """SPEED.md: the machine, and a table with a line a row."""
    facts = ", ".join(f"{name} {value}" for name, value in machine().items())
    lines = table(list(rows[0]), [row.values() for row in rows])
    return f"# Speed\n\n{INTRO}\n\nMachine: {facts}.\n\n{lines}\n"


def main() -> None:
    rows = []
    for bench in (bench_losses, bench_search, bench_generation, bench_encoding, bench_training):
        for row in bench():
            print(*row.values(), sep=" | ", flush=True)
            rows.append(row)
    if not QUICK:
        write_text(RESULTS / "SPEED.md", page(rows))


if __name__ == "__main__":
    main()
