"""What tests share: two tiny random models with a tokenizer, lists in its words, the cache."""

import json
import os
import sys
from pathlib import Path

# One thread, also in processes that tests start: some tests compare bits, and two threads sum in
# another order.  No test talks to a hub.  Plain `pytest` does not put the repository on the path.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
sys.path.insert(0, str(Path(__file__).parents[1]))

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BertConfig,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from repro.data import GradedList
from repro.encoder import BiEncoder
from repro.support.models import WHEELS

torch.set_num_threads(1)

WORDS = """
    the a of in on for with how long does it take to bake bread dough rise sleep cat dog river bank
    moon tide why is sky blue capital city iron steel rust tea coffee beans roast engine oil change
    heart rate normal
"""
TOPICS = [
    "bread dough rise",
    "moon tide",
    "iron rust",
    "coffee beans roast",
    "engine oil change",
    "cat sleep",
    "sky blue",
    "heart rate",
]
VOCABULARY = ["[PAD]", "[UNK]", "[END]", *dict.fromkeys(WORDS.split())]
SIZES = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "pad_token_id": 0,
    "vocab_size": len(VOCABULARY),
}


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "checkpoint: needs the built-in 135M model")


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip a `checkpoint` test unless the model is in the cache or asked for."""
    folder = f"models/smollm2-135m-{WHEELS['smollm2-135m'][1][:12]}"
    root = os.environ.get("SYCL_CACHE", "~/.cache/sycl-repro")
    there = Path(root, folder).expanduser().exists()
    asked = "SYCL_TEST_CHECKPOINT" in os.environ
    if item.get_closest_marker("checkpoint") and not there and not asked:
        pytest.skip("SYCL_TEST_CHECKPOINT=1 runs it")


def save_model(folder: Path, model: torch.nn.Module) -> Path:
    """A model's folder with a tokenizer: one token a word of WORDS, anything else is [UNK]."""
    numbers = {token: n for n, token in enumerate(VOCABULARY)}
    words = Tokenizer(models.WordLevel(numbers, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]", eos_token="[END]"
    )
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory):
    """A folder with a random 4-layer Llama and its tokenizer, 16 dimensions wide."""
    torch.manual_seed(0)
    config = LlamaConfig(
        **SIZES,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        eos_token_id=2,
        bos_token_id=2,
    )
    return save_model(tmp_path_factory.mktemp("tiny") / "llama", LlamaForCausalLM(config))


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory):
    """A folder with a random 3-layer BERT (dropout 0.1, with a pooler) and the same tokenizer."""
    torch.manual_seed(1)
    config = BertConfig(
        **SIZES, num_hidden_layers=3, num_attention_heads=2, max_position_embeddings=64
    )
    return save_model(tmp_path_factory.mktemp("tiny") / "bert", BertModel(config))


@pytest.fixture
def llama(tiny_llama):
    """That Llama as an encoder."""
    return BiEncoder.load(tiny_llama, "cpu")


@pytest.fixture
def bert(tiny_bert):
    """That BERT as an encoder."""
    return BiEncoder.load(tiny_bert, "cpu")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache folder for one test."""
    monkeypatch.setenv("SYCL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def assert_close(ours: torch.Tensor, theirs: object) -> None:
    torch.testing.assert_close(ours, torch.as_tensor(theirs), atol=1e-5, rtol=0)


def graded_lists(count: int = 16) -> list[GradedList]:
    """Queries about a topic: grade 3 has all of its words, 2 the first, 1 the last, 0 another's."""
    made = []
    for n in range(count):
        topic, other = TOPICS[n % 8], TOPICS[(n + 1) % 8]
        first, *_, last = topic.split()
        passages = [
            f"the {topic} of it",
            f"a {first} in the city",
            f"why is {last}",
            f"the {other} of it",
        ]
        query = f"how {topic} {'long' * (n // 8)}".strip()
        made.append(GradedList(f"l{n}", query, passages, [3, 2, 1, 0]))
    return made


def write_jsonl(path: Path, rows: list[dict] | str) -> Path:
    """A file with a line a row, or with this text; missing folders are made."""
    if isinstance(rows, list):
        rows = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(rows, encoding="utf-8", newline="")
    return path


def write_lists(path: Path, count: int = 16) -> Path:
    """`graded_lists` as a file for --lists."""
    rows = []
    for item in graded_lists(count):
        passages = dict(zip("3210", item.passages, strict=True))
        rows.append(vars(item) | {"passages": passages})
    return write_jsonl(path, rows)
