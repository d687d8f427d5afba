"""Shared by the generation tests: a tiny random chat model, queries in its words, a scripted stand-in."""

import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from repro.generate import Sampling

FINE = json.dumps({str(level): f"text {level}" for level in (3, 2, 1, 0)})
LOOSE = Sampling(max_new_tokens=40, temperature=1.0, top_p=1.0, top_k=0)
WORDS = [f"word{n}" for n in range(60)] + [f"end{n}." for n in range(12)]
WORDS += "write an excerpt of web page that gives the exact paragraph about history".split()
TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }} [END] {% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
QUERIES = {f"q{n:02d}": " ".join(f"word{(n * 7 + j * 3) % 60}" for j in range(1 + n % 6)) for n in range(24)}


def make_model(folder: Path, template: str | None = TEMPLATE, **changes) -> Path:
    """A random 2-layer Llama whose vocabulary holds full stops, so that its replies have sentences."""
    specials = ["[PAD]", "[UNK]", "[END]", "<system>", "<user>", "<assistant>", ".", ":"]
    vocabulary = {token: n for n, token in enumerate(dict.fromkeys(specials + WORDS))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", eos_token="[END]"
    )
    fast.chat_template = template
    torch.manual_seed(0)
    options = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 1024} | changes
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        pad_token_id=0,
        eos_token_id=2,
        bos_token_id=2,
        **options,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        model.lm_head.weight.mul_(
            4
        )  # sharper than a fresh model, so that mistakes in attention show in the tokens
    model.save_pretrained(folder)
    fast.save_pretrained(folder)
    return folder


def options(tiny, query_file, out, *more):
    return [
        "--queries",
        str(query_file),
        "--model",
        str(tiny),
        "--out",
        str(out),
        "--seed",
        "3",
        "--batch-size",
        "5",
        "--max-new-tokens",
        "40",
        "--temperature",
        "1",
        "--top-p",
        "1",
        "--top-k",
        "0",
        "--device",
        "cpu",
        *more,
    ]


class Scripted:
    """A generator that answers from a list of texts, by the number of times it was asked for a key."""

    name = "scripted"

    def __init__(self, answer):
        self.answer, self.asked = answer, []

    def check(self, where, chat, sampling):
        return len(str(chat))

    def rows(self, longest, sampling):
        return 2

    def reply(self, chats, keys, sampling, on_step=None):
        self.asked.append(list(keys))
        return [self.answer(key) for key in keys]
