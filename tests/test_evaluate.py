"""The record of one model on one collection, and the command around it."""

import json
import shlex
from math import log2
from pathlib import Path

import pytest
import torch
from conftest import write_jsonl

from repro import encoder as encoder_room
from repro import evaluate
from repro.encoder import BiEncoder
from repro.evaluate import Settings, evaluate_model
from repro.metrics import mean, write_run
from repro.search import retrieve

CORPUS = {"p1": "bread dough", "p2": "cat sleep", "p3": "the blue sky"}
QUERIES = {"q1": "bread", "q2": "sky"}
QRELS = {"q1": {"p1": 3, "p2": 1}, "q2": {"p3": 2, "lost": 2}}  # `lost` is not in the corpus
COLLECTION = (CORPUS, QUERIES, QRELS)
JUDGMENTS = "q1\tp1\t3\nq1\tp2\t1\nq2\tp3\t2\nq2\tlost\t2\n"
VECTORS = {
    "bread dough": [3, 0],
    "cat sleep": [2, 1],
    "the blue sky": [-1, 0],
    "bread": [1, 0],
    "sky": [0, 1],
}


class Table:
    """A model that looks vectors up."""

    def encode(self, texts, **options):
        return torch.tensor([VECTORS[text] for text in texts])


@pytest.fixture
def command(tmp_path, monkeypatch):
    """The command line as a function; the collection is `tiny` in the working folder."""
    monkeypatch.chdir(tmp_path)
    for name, texts in (("corpus", CORPUS), ("queries", QUERIES)):
        rows = [{"_id": key, "text": text} for key, text in texts.items()]
        write_jsonl(Path(f"tiny/{name}.jsonl"), rows)
    write_jsonl(Path("tiny/qrels/test.tsv"), JUDGMENTS)
    write_jsonl(Path("tiny/qrels/large.tsv"), "q1\tp1\t1000\n")
    return lambda options: evaluate.main(shlex.split(options))


def test_the_values_by_hand():
    """For q2, p2 is first, p1 and p3 score 0, and of these the larger id comes first: p3."""
    found = evaluate_model(Table(), *COLLECTION)["per_query"]
    assert found["q1"] == {"ndcg@10": 1, "mrr@10": 1, "recall@100": 1}
    ndcg = pytest.approx((2 / log2(3)) / (2 + 2 / log2(3)))
    assert found["q2"] == {"ndcg@10": ndcg, "mrr@10": 0.5, "recall@100": 0.5}


def test_only_the_best_top_k_count():
    found = evaluate_model(Table(), *COLLECTION, Settings(top_k=1))["per_query"]
    assert found["q1"]["recall@100"] == 0.5


def test_unjudged_queries_are_not_asked():
    queries = {**QUERIES, "q3": "a text without a vector"}
    assert set(evaluate_model(Table(), CORPUS, queries, QRELS)["per_query"]) == {"q1", "q2"}


def test_the_command_writes_a_record_without_a_path_of_the_machine(command, tmp_path):
    assert command(f"--model bm25 --data '{tmp_path}/tiny' --out new/r.json") == 0
    text = Path("new/r.json").read_text()
    record = json.loads(text)
    assert str(tmp_path) not in text
    assert record["per_query"] == evaluate_model("bm25", *COLLECTION)["per_query"]
    assert record["metrics"] == mean(record["per_query"])
    expected = {
        "collection": "tiny",
        "split": "test",
        "model": "bm25",
        "counts": {"passages": 3, "queries": 2, "judgments": 4},
    }
    assert record == record | expected
    assert record["machine"]["device"] == "cpu"


def test_overwrite_replaces_what_is_there(command):
    Path("r").write_text("old")
    assert command("--model bm25 --data tiny --run r --overwrite") == 0
    assert Path("r").read_text().startswith("q1 Q0 p1 1 ")


REFUSED = [
    ("--top-k 0", "top-k is 0"),
    ("--batch-size 0", "batch-size is 0"),
    ("--measures map@3", "unknown measure 'map@3'"),
    ("--device abacus", "'abacus' is not usable"),
    ("--model bm25 --dtype int32", "unknown dtype 'int32'"),
    ("--run new --out new", "--out and --run name the same file"),
    ("--run tiny", "exists; name another file"),
    ("--run tiny/corpus.jsonl", "exists; name another file"),
    ("--out tiny/corpus.jsonl", "exists; name another file"),
    ("--out tiny/corpus.jsonl/new", "cannot be written"),
    ("--split train", "qrels/train.tsv"),
    ("--split large --measures ndcg_exp@10", "query q1, passage p1: grade 1000"),
    ("--model bm25 --query-prompt x", "bm25 takes no prompt"),
    ("", "unknown model 'nowhere'"),
]


@pytest.mark.parametrize("options, message", REFUSED)
def test_a_refusal_is_a_sentence_comes_before_the_model_and_writes_nothing(
    command, capsys, options, message
):
    assert command(f"--data tiny --model nowhere {options}") == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ")
    assert message in error
    assert [path.name for path in Path(".").iterdir()] == ["tiny"]


def test_an_id_that_a_run_cannot_carry_is_refused_before_the_model():
    with pytest.raises(ValueError, match="id 'p 1' is empty or holds white space"):
        evaluate_model("nowhere", {"p 1": "one"}, QUERIES, QRELS, run_file="r")


def test_the_prompt_options_take_the_place_of_the_models_own(command, tiny_bert):
    encoder = BiEncoder.load(tiny_bert, "cpu")
    encoder.prompts.update(query="the ", passage="a ")
    write_run(retrieve(encoder, CORPUS, QUERIES, 3), "expected", "bert")
    options = f"--model '{tiny_bert}' --data tiny --device cpu --dtype float32"
    prompts = "--query-prompt 'the ' --passage-prompt 'a '"
    assert command(f"{options} {prompts} --run r --out r.json") == 0
    assert Path("r").read_text() == Path("expected").read_text()
    assert json.loads(Path("r.json").read_text())["prompts"] == encoder.prompts


def test_a_model_with_a_linear_map_is_float32_unless_asked(tiny_bert, tmp_path, monkeypatch):
    encoder = BiEncoder.load(tiny_bert, "cpu")
    encoder.projection = torch.nn.Parameter(torch.eye(16))
    encoder.save(tmp_path / "linear")
    monkeypatch.setattr(encoder_room, "pick_dtype", lambda *_, **__: torch.bfloat16)  # as if native
    expected = [
        (tmp_path / "linear", "auto", torch.float32),
        (tmp_path / "linear", "bfloat16", torch.bfloat16),
        (tiny_bert, "auto", torch.bfloat16),
    ]
    for name, dtype, number_format in expected:
        assert BiEncoder.load(name, "cpu", dtype).model.dtype == number_format
