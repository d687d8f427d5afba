"""Shared by the tests: two tiny random transformers with a tokenizer, lists in its words, the marks."""

import json
import os
import sys
from pathlib import Path

# One thread, also in processes that tests start: two sum in another order, and some tests compare every bit.
os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch

torch.set_num_threads(1)
sys.path.insert(0, str(Path(__file__).parents[1]))  # plain `pytest` does not put the repository on the path
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test talks to a hub
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM
from transformers import PreTrainedTokenizerFast as FastTokenizer

from repro.checkpoints import WHEELS, cache_dir
from repro.data import GradedList

WORDS = ("the a of in on for with how long does it take to bake bread dough rise sleep cat dog river bank "
         "moon tide why is sky blue capital city iron steel rust tea coffee beans roast engine oil change "
         "heart rate normal").split()
TOPICS = "bread dough rise|moon tide|iron rust|coffee beans roast|engine oil change|cat sleep|sky blue"
TOPICS += "|heart rate"

def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "checkpoint: needs the built-in 135M model")

def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip `checkpoint` tests unless the model is there or asked for."""
    there = (cache_dir() / "models" / f"smollm2-135m-{WHEELS['smollm2-135m'][1][:12]}").exists()
    for item in items if not there and os.environ.get("SYCL_TEST_CHECKPOINT") != "1" else ():
        if "checkpoint" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="SYCL_TEST_CHECKPOINT=1 runs it"))

def _save(folder: Path, model: torch.nn.Module) -> Path:
    """One token a word of WORDS; anything else is [UNK]."""
    vocabulary = {token: n for n, token in enumerate(["[PAD]", "[UNK]", "[END]", *dict.fromkeys(WORDS)])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "eos_token": "[END]"}
    FastTokenizer(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    model.save_pretrained(folder)
    return folder

SIZES = {"vocab_size": 3 + len(set(WORDS)), "hidden_size": 16, "intermediate_size": 32, "pad_token_id": 0}

@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random 4-layer Llama and its tokenizer, 16 dimensions wide."""
    torch.manual_seed(0)
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 4}
    config = LlamaConfig(**SIZES, **heads, max_position_embeddings=128, eos_token_id=2, bos_token_id=2)
    return _save(tmp_path_factory.mktemp("tiny") / "llama", LlamaForCausalLM(config))

@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random 3-layer BERT (dropout 0.1, with a pooler) and the same tokenizer."""
    torch.manual_seed(1)
    heads = {"num_attention_heads": 2, "num_hidden_layers": 3}
    config = BertConfig(**SIZES, **heads, max_position_embeddings=64)
    return _save(tmp_path_factory.mktemp("tiny") / "bert", BertModel(config))

@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder for one test."""
    monkeypatch.setenv("SYCL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"

def graded_lists(count: int = 16) -> list[GradedList]:
    """Queries about a topic; grade 3 holds all of its words, 2 the first, 1 the last, 0 another topic's."""
    topics, made = [topic.split() for topic in TOPICS.split("|")], []
    for n in range(count):
        words, other = topics[n % len(topics)], topics[(n + 1) % len(topics)]
        passages = [f"the {' '.join(words)} of it", f"a {words[0]} in the city", f"why is {words[-1]}"]
        query = f"how {' '.join(words)} {'long' * (n // len(topics))}".strip()
        made.append(GradedList(f"l{n}", query, [*passages, f"the {' '.join(other)} of it"], [3, 2, 1, 0]))
    return made

def write_lists(path: Path, count: int = 16) -> Path:
    """The same as a file for --lists."""
    rows = [{"id": x.id, "query": x.query, "passages": dict(zip("3210", x.passages, strict=True))}
            for x in graded_lists(count)]
    return write_jsonl(path, rows)

def write_jsonl(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
