"""The encoder: its formula by a slow loop, its gradients, its length limit, its kept vectors."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import SIZES, save_model
from tokenizers import normalizers, pre_tokenizers, processors
from transformers import (
    AutoModel,
    AutoTokenizer,
    BertConfig,
    BertModel,
    MPNetConfig,
    MPNetModel,
    RobertaConfig,
    RobertaModel,
    T5Config,
    T5EncoderModel,
)

from repro import encoder as encoder_module
from repro.encoder import BiEncoder, set_dropout, text_limit

TEXTS = ["how long does bread rise", "the moon", "why is the sky blue in the city", "[END]", "tea"]
KINDS = ["tiny_llama", "tiny_bert"]


def weighted(folder: Path, mapped: bool = False) -> BiEncoder:
    """An encoder with every option, 7 tokens a text; `mapped`: with a map, so frozen."""
    encoder = BiEncoder.load(folder, device="cpu")
    rng = torch.Generator().manual_seed(5)
    encoder.token_weights = torch.rand(len(encoder.tokenizer), generator=rng)
    encoder.centre = 0.1 * torch.randn(16, generator=rng)
    encoder.max_length = 7
    if mapped:
        encoder.projection = torch.nn.Parameter(torch.randn(7, 16, generator=rng))
    encoder.normalise = True
    return encoder


def assert_close(a: torch.Tensor, b: torch.Tensor, atol: float = 1e-5) -> None:
    assert a.numel() > 0
    torch.testing.assert_close(a, b, atol=atol, rtol=0)


@pytest.mark.parametrize("batch_size", [1, 2, 100])
@pytest.mark.parametrize("kind", KINDS)
def test_vectors_follow_the_formula_one_text_at_a_time(kind, batch_size, request) -> None:
    folder = request.getfixturevalue(kind)
    encoder = weighted(folder)
    model = AutoModel.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    expected = []
    for text in TEXTS:
        ids = tokenizer(text, truncation=True, max_length=7, return_tensors="pt")["input_ids"]
        hidden = model(input_ids=ids).last_hidden_state[0].detach()
        weights = encoder.token_weights[ids[0]]
        mean = sum(w * h for w, h in zip(weights, hidden, strict=True)) / weights.sum()
        vector = mean - encoder.centre
        expected.append(vector / vector.norm())
    assert_close(encoder.encode(TEXTS, batch_size=batch_size), torch.stack(expected))


def test_no_texts_give_no_rows(tiny_bert: Path) -> None:
    assert BiEncoder.load(tiny_bert, "cpu").encode([]).shape == (0, 16)


def test_empty_texts_have_finite_vectors(tiny_bert: Path) -> None:
    assert weighted(tiny_bert).encode(["", " "]).isfinite().all()


def test_other_kinds_of_text_are_refused(tiny_bert: Path) -> None:
    with pytest.raises(ValueError, match="expected query or passage, got 'document'"):
        weighted(tiny_bert).encode(TEXTS, "document")


def test_a_string_is_no_list_of_texts(tiny_bert: Path) -> None:
    with pytest.raises(ValueError, match="expected a list of texts, got one str"):
        weighted(tiny_bert).encode("tea")


def test_encoding_has_no_dropout_and_keeps_the_mode(tiny_bert: Path) -> None:
    encoder = weighted(tiny_bert).train()
    in_training = encoder.encode(TEXTS)
    assert encoder.training
    assert_close(in_training, encoder.eval().encode(TEXTS))


def test_gradient_caching_gives_the_same_gradients(tiny_bert: Path) -> None:
    encoder = weighted(tiny_bert).eval()
    found = []
    for chunk in (None, 2):
        queries, passages = encoder(TEXTS[:2], TEXTS, chunk=chunk)
        loss = (queries @ passages.T).square().sum()
        found.append(torch.autograd.grad(loss, encoder.trainable()))
    torch.testing.assert_close(found[0], found[1], atol=1e-6, rtol=1e-5)


def test_without_a_linear_map_every_weight_trains(tiny_bert: Path) -> None:
    encoder = BiEncoder.load(tiny_bert, "cpu")
    assert encoder.trainable() == list(encoder.parameters())


def test_with_a_linear_map_only_the_map_trains(tiny_bert: Path) -> None:
    plain = BiEncoder.load(tiny_bert, "cpu")
    encoder = BiEncoder(plain.model, plain.tokenizer, projection=torch.eye(16))
    wanted = [p for p in encoder.parameters() if p.requires_grad]
    assert wanted == encoder.trainable() == [encoder.projection]


def test_a_map_gets_the_gradient_of_the_formula(tiny_bert: Path, cache: Path) -> None:
    encoder = weighted(tiny_bert, mapped=True)
    encoder.normalise = False
    queries, passages = encoder(TEXTS[:1], TEXTS)
    (queries.sum() + passages.sum()).backward()
    centred = encoder.mean_vectors([TEXTS[0], *TEXTS], "query") - encoder.centre
    assert_close(encoder.projection.grad, centred.sum(dim=0).expand(7, 16))


def test_dropout_zero_makes_training_equal_evaluation(tiny_bert: Path) -> None:
    encoder = BiEncoder.load(tiny_bert, "cpu").train()
    set_dropout(encoder.model, 0.0)
    assert_close(encoder.embed(TEXTS, "query"), encoder.eval().embed(TEXTS, "query"), atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_dropout_changes_what_training_sees(kind: str, request) -> None:
    encoder = BiEncoder.load(request.getfixturevalue(kind), "cpu").train()
    set_dropout(encoder.model, 0.5)
    assert not torch.equal(encoder.embed(TEXTS, "query"), encoder.eval().embed(TEXTS, "query"))


def test_dropout_is_written_into_the_config(tiny_bert: Path) -> None:
    model = BiEncoder.load(tiny_bert, "cpu").model
    set_dropout(model, 0.25)
    assert model.config.hidden_dropout_prob == 0.25


HEADS = {"num_hidden_layers": 1, "num_attention_heads": 2}
ROBERTA = {**SIZES, **HEADS, "max_position_embeddings": 34, "pad_token_id": 1}
T5 = {"vocab_size": SIZES["vocab_size"], "d_model": 16, "d_ff": 8, "num_layers": 1, "num_heads": 2}


@pytest.mark.parametrize(
    ("model", "asked", "limit"),
    [
        (BertModel(BertConfig(**SIZES, **HEADS, max_position_embeddings=34)), 256, 34),
        (RobertaModel(RobertaConfig(**ROBERTA)), 256, 32),
        (MPNetModel(MPNetConfig(**ROBERTA)), 0, 32),
        (MPNetModel(MPNetConfig(**ROBERTA)), 20, 20),
        (T5EncoderModel(T5Config(**T5)), int(1e30), None),
    ],
)
def test_the_limit_is_what_the_model_can_take(model, asked, limit) -> None:
    assert text_limit(model, asked) == limit
    model.eval()(input_ids=torch.full((1, limit or 600), 5))


def test_a_longer_text_than_the_positions_is_cut_on_loading(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "roberta", RobertaModel(RobertaConfig(**ROBERTA)))
    encoder = BiEncoder.load(folder, "cpu")
    assert encoder.encode(["bread " * 100]).isfinite().all()


def test_no_limit_cuts_nothing(tiny_llama: Path) -> None:
    encoder = BiEncoder.load(tiny_llama, "cpu")
    encoder.max_length = None
    assert len(encoder.tokenise(["tea " * 1000])[0]) == 1000


def forget(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in the next process: only the disk remembers; two texts are a block, and worth a file."""
    monkeypatch.setattr(encoder_module, "KEPT", {})
    monkeypatch.setattr(encoder_module, "BLOCK", 2)
    monkeypatch.setattr(encoder_module, "WORTH_A_FILE", 2)


def count_runs(encoder: BiEncoder) -> list[int]:
    """The texts in each batch that goes through the transformer."""
    runs = []
    encoder.model.register_forward_hook(lambda *_: runs.append(1))
    return runs


def test_a_text_goes_through_a_frozen_transformer_once(tiny_llama, cache, monkeypatch) -> None:
    forget(monkeypatch)
    encoder = weighted(tiny_llama, mapped=True)
    runs = count_runs(encoder)
    encoder.encode(TEXTS)
    encoder(TEXTS[:1], TEXTS)
    assert len(runs) == 3  # blocks of 2, 2 and 1


def test_the_next_process_reads_whole_blocks(tiny_llama, cache, monkeypatch) -> None:
    forget(monkeypatch)
    computed = weighted(tiny_llama, mapped=True).encode(TEXTS)
    forget(monkeypatch)
    encoder = weighted(tiny_llama, mapped=True)
    encoder.tokenizer(TEXTS, padding=True, truncation=True, max_length=2)  # an earlier call
    runs = count_runs(encoder)
    assert torch.equal(encoder.encode(TEXTS), computed)
    assert len(runs) == 1  # the last block is too small for a file


def in_pipeline(part: str, value: object) -> Callable[[BiEncoder], None]:
    return lambda encoder: setattr(encoder.tokenizer.backend_tokenizer, part, value)


ENDED = processors.TemplateProcessing("$A [END]", None, [("[END]", 2)])
EDITS = {
    "truncation side": lambda e: setattr(e.tokenizer, "truncation_side", "left"),
    "special tokens in texts": lambda e: setattr(e.tokenizer, "split_special_tokens", True),
    "length": lambda e: setattr(e, "max_length", 2),
    "normaliser": in_pipeline("normalizer", normalizers.Replace("moon", "tea")),
    "words": in_pipeline("pre_tokenizer", pre_tokenizers.CharDelimiterSplit("h")),
    "special tokens": in_pipeline("post_processor", ENDED),
    "prompt": lambda e: e.prompts.update(passage="tea "),
    "pooling": lambda e: setattr(e, "pooling", "cls"),
    "token weights": lambda e: e.token_weights.mul_(torch.arange(len(e.token_weights))),
    "weights": lambda e: e.model.norm.weight.data[0].add_(1),
    "number format": lambda e: e.model.bfloat16(),
}


@pytest.mark.parametrize("name", EDITS)
def test_other_settings_do_not_get_kept_vectors(name, tiny_llama, cache, monkeypatch) -> None:
    forget(monkeypatch)
    kept = weighted(tiny_llama, mapped=True).mean_vectors(TEXTS, "passage")
    computed, looked_up = weighted(tiny_llama), weighted(tiny_llama, mapped=True)
    EDITS[name](computed)
    EDITS[name](looked_up)
    found = looked_up.mean_vectors(TEXTS, "passage")
    assert not torch.equal(found, kept)
    assert_close(found, computed.mean_vectors(TEXTS, "passage"))


def test_another_config_does_not_get_them(tiny_llama, tmp_path, cache, monkeypatch) -> None:
    forget(monkeypatch)
    weighted(tiny_llama, mapped=True).encode(TEXTS)
    folder = Path(shutil.copytree(tiny_llama, tmp_path / "other"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.5}))
    found = weighted(folder, mapped=True).mean_vectors(TEXTS, "passage")
    assert_close(found, weighted(folder).mean_vectors(TEXTS, "passage"))
