"""Decoding against transformers, sampling against the softmax, memory limits, query likelihood."""

import math
from pathlib import Path

import pytest
import torch
from tiny_lm import QUERIES, make_model
from transformers import AutoModelForCausalLM

from repro import decode, generators
from repro.decode import row_noise, sample, shared_prefix
from repro.generate import GenerateError, Sampling, load_generator
from repro.likelihood import FRAME, agreement, query_likelihood


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    return make_model(tmp_path_factory.mktemp("lm") / "tiny-lm")


@pytest.fixture(scope="module")
def generator(tiny):
    torch.set_num_threads(1)
    return load_generator(str(tiny), device="cpu")


def prompts_of(generator, count=6):
    chats = [[{"role": "user", "content": QUERIES[key]}] for key in list(QUERIES)[:count]]
    return [generator.prompt_ids(chat) for chat in chats]


def test_greedy_decoding_equals_transformers_one_by_one(generator, tiny):
    """Left padding, the shared prefix, the reserved cache and the leaving of ended rows change nothing."""
    reference = AutoModelForCausalLM.from_pretrained(tiny).eval()
    rows = prompts_of(generator, 12)
    assert shared_prefix(rows) == 1 and len({len(row) for row in rows}) > 3
    for prefix in ([], [8, 9, 10, 11, 12, 13, 14, 15, 16]):
        batch = [prefix + row for row in rows]
        free = decode.decode(generator.model, batch, torch.zeros(len(batch), 30), set(), temperature=0)
        stop = {2, *(free[n][4 * n + 2] for n in range(6))}  # so that rows end at different times
        found = decode.decode(generator.model, batch, torch.zeros(len(batch), 30), stop, temperature=0)
        ends = set()
        for row, reply in zip(batch, found, strict=True):
            ids = reference.generate(
                torch.tensor([row]), max_new_tokens=30, do_sample=False, eos_token_id=list(stop)
            )
            expected = ids[0, len(row) :].tolist()
            assert reply == (expected[:-1] if expected[-1] in stop else expected)
            ends.add(len(reply))
        assert len(ends) > 2


def test_a_row_does_not_depend_on_its_neighbours(generator):
    rows = prompts_of(generator, 9)
    noise = torch.stack([row_noise(f"key {n}", 40) for n in range(9)])
    together = decode.decode(generator.model, rows, noise, {2})
    alone = [decode.decode(generator.model, [row], noise[n : n + 1], {2})[0] for n, row in enumerate(rows)]
    assert together == alone
    assert together != decode.decode(generator.model, rows, noise.flip(0), {2})


def test_sliding_window_models_use_the_librarys_cache(tmp_path):
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        sliding_window=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        eos_token_id=2,
        head_dim=8,
    )
    model = MistralForCausalLM(config).eval()
    rows = [[5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15], [9, 8, 7]]
    found = decode.decode(model, rows, torch.zeros(2, 12), {2}, temperature=0)
    for row, reply in zip(rows, found, strict=True):
        expected = model.generate(torch.tensor([row]), max_new_tokens=12, do_sample=False, pad_token_id=0)[
            0, len(row) :
        ]
        assert reply == [token for token in expected.tolist() if token != 2]


def test_sampling_follows_the_distribution():
    """20,000 evenly spaced uniforms give the softmax's shares to one count, cut by top-k and top-p."""
    logits = torch.tensor([[2.0, 0.5, 1.0, -1.0, 0.0]])
    count = 20_000
    uniform = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    for temperature, top_k, top_p in (
        (1.0, 0, 1.0),
        (0.5, 0, 1.0),
        (1.0, 3, 1.0),
        (1.0, 0, 0.75),
        (1.0, 2, 0.5),
    ):
        p = (logits[0].double() / temperature).softmax(-1)
        order = p.argsort(descending=True)
        keep = order[: top_k or 5]
        share = p[keep] / p[keep].sum()
        smallest = next(n for n in range(1, len(keep) + 1) if share[:n].sum() >= top_p - 1e-12)
        expected = torch.zeros(5, dtype=torch.float64)
        expected[keep[:smallest]] = p[keep[:smallest]] / p[keep[:smallest]].sum()
        tokens = sample(logits.expand(count, 5), uniform, temperature, top_k, top_p)
        assert torch.allclose(tokens.bincount(minlength=5).double() / count, expected, atol=1.5 / count)
    assert sample(logits, torch.tensor([0.999]), 0, 0, 1.0).item() == 0
    for edge in (0.0, 1 - 2**-53):
        assert sample(logits, torch.tensor([edge]).double(), 1.0, 3, 0.9).item() in (0, 2, 1)


def test_noise_depends_on_the_key_alone():
    assert torch.equal(row_noise("a", 5), row_noise("a", 9)[:5])
    assert not torch.equal(row_noise("a", 5), row_noise("b", 5))
    assert row_noise("\ud800 日本", 1000).std() == pytest.approx(12**-0.5, abs=0.02)


def test_memory_limit_sets_the_batch_size(generator, monkeypatch):
    rows = [
        generators.LocalGenerator("t", generator.model, generator.tokenizer, memory_gb=gb).rows(
            200, Sampling()
        )
        for gb in (0.001, 0.004, 0.008, 8)
    ]
    assert rows == sorted(rows) and 1 <= rows[0] < rows[2] <= rows[3] == 64
    with pytest.raises(GenerateError, match="--memory-gb 0.0002"):
        generators.LocalGenerator("t", generator.model, generator.tokenizer, memory_gb=0.0002).rows(
            200, Sampling()
        )


def test_out_of_memory_halves_the_batch_and_says_so(generator, monkeypatch, capsys):
    sizes = []

    def tight(model, rows, *args, **kwargs):
        sizes.append(len(rows))
        if len(rows) > 3:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes")
        return decode.decode(model, rows, *args, **kwargs)

    chats = [[{"role": "user", "content": query}] for query in QUERIES.values()][:10]
    keys, sampling = [str(n) for n in range(10)], Sampling(max_new_tokens=20)
    expected = generator.reply(chats, keys, sampling)
    monkeypatch.setattr(generators, "decode", tight)
    assert generator.reply(chats, keys, sampling) == expected
    assert sizes == [10, 5, 3, 3, 3, 1]
    assert "memory ran out with 10 prompts a batch; going on with 5" in capsys.readouterr().err
    monkeypatch.setattr(generators, "decode", lambda *a, **k: (_ for _ in ()).throw(MemoryError()))
    with pytest.raises(GenerateError, match="memory ran out with a single prompt"):
        generator.reply(chats[:4], keys[:4], sampling)
    generator.batch_limit = None


def test_query_likelihood_against_a_slow_loop(generator):
    pairs = [("word1 word2 word3", "word4 word5 . word6"), ("word9", "word7"), ("word1 word2", "word8 " * 40)]
    found = query_likelihood(generator, pairs, batch_size=2)
    for (query, passage), value in zip(pairs, found, strict=True):
        context = generator.tokenizer(FRAME.format(passage=passage))["input_ids"]
        wanted = generator.tokenizer(query)["input_ids"]
        total = 0.0
        for n, token in enumerate(wanted):
            with torch.no_grad():
                logits = generator.model(torch.tensor([context + wanted[:n]])).logits[0, -1]
            total += logits.double().log_softmax(-1)[token].item()
        assert value == pytest.approx(total / len(wanted), abs=1e-4)


def test_agreement():
    assert agreement({3: 4.0, 2: 3.0, 1: 2.0, 0: 1.0}) == 1
    assert agreement({3: 1.0, 2: 2.0, 1: 3.0, 0: 4.0}) == 0
    assert agreement({3: 1.0, 2: 1.0}) == 0 and agreement({2: 5.0}) == 1
    assert agreement({3: 4.0, 2: 1.0, 1: 2.0, 0: 3.0}) == 0.5 and not math.isnan(agreement({}))
