"""The encoder: its formula by a slow loop, its gradients, its length limit, its kept vectors."""

from pathlib import Path

import pytest
import torch
from conftest import SIZES, assert_close, save_model
from tokenizers import normalizers, pre_tokenizers, processors
from transformers import AutoConfig, AutoModel, PreTrainedModel

from repro import encoder as room
from repro.encoder import BiEncoder, text_limit

TEXTS = ["how long does bread rise", "the moon", "why is the sky blue in the city", "[END]", "tea"]


def weighted(folder: Path, mapped: bool = False) -> BiEncoder:
    """An encoder with every option, 7 tokens a text; `mapped`: with a map, so frozen."""
    encoder = BiEncoder.load(folder, "cpu")
    rng = torch.Generator().manual_seed(5)
    encoder.token_weights = torch.rand(len(encoder.tokenizer), generator=rng)
    encoder.centre = 0.1 * torch.randn(16, generator=rng)
    encoder.max_length = 7
    if mapped:
        encoder.projection = torch.nn.Parameter(torch.randn(7, 16, generator=rng))
    encoder.normalise = True
    return encoder


@pytest.mark.parametrize("kind", ["tiny_llama", "tiny_bert"])
def test_vectors_follow_the_formula_one_text_at_a_time(kind, request):
    folder = request.getfixturevalue(kind)
    encoder = weighted(folder)
    model = AutoModel.from_pretrained(folder).eval()
    expected = []
    for text in TEXTS:
        ids = torch.tensor([encoder.tokenizer(text).input_ids[:7]])
        hidden = model(input_ids=ids).last_hidden_state[0].detach()
        weights = encoder.token_weights[ids[0]]
        vector = weights @ hidden / weights.sum() - encoder.centre
        expected.append(vector / vector.norm())
    assert_close(encoder.encode(TEXTS, batch_size=2), torch.stack(expected))


@pytest.mark.parametrize("texts", [[], ["", " "]])
def test_every_text_has_a_finite_vector(texts, tiny_bert):
    vectors = weighted(tiny_bert).encode(texts)
    assert vectors.shape == (len(texts), 16)
    assert vectors.isfinite().all()


@pytest.mark.parametrize("texts, kind", [("tea", "query"), (TEXTS, "document")])
def test_other_texts_and_kinds_are_refused(texts, kind, tiny_bert):
    with pytest.raises(ValueError, match="expected a list of texts of kind query or passage"):
        weighted(tiny_bert).encode(texts, kind)


def test_another_pooling_is_refused():
    with pytest.raises(ValueError, match="expected mean or cls, found 'max'"):
        BiEncoder(None, None, pooling="max")


def test_encoding_has_no_dropout_and_keeps_the_mode(tiny_bert):
    encoder = weighted(tiny_bert).train()
    in_training = encoder.encode(TEXTS)
    assert encoder.training
    assert_close(in_training, encoder.eval().encode(TEXTS))


def test_gradient_caching_gives_the_same_gradients(tiny_bert):
    encoder = weighted(tiny_bert).eval()
    found = []
    for chunk in (None, 2):
        queries, passages = encoder(TEXTS[:2], TEXTS, chunk=chunk)
        loss = (queries @ passages.T).square().sum()
        found.append(torch.autograd.grad(loss, list(encoder.parameters())))
    torch.testing.assert_close(found[0], found[1], atol=1e-6, rtol=1e-5)


def test_with_a_linear_map_only_the_map_trains(bert):
    encoder = BiEncoder(bert.model, bert.tokenizer, projection=torch.eye(16))
    wanted = [p for p in encoder.parameters() if p.requires_grad]
    assert wanted == [encoder.projection]


def built(kind: str, **options: int) -> PreTrainedModel:
    """A model of a kind with one layer, where the padding token is 1."""
    sizes = SIZES | {"num_hidden_layers": 1, "num_attention_heads": 2, "pad_token_id": 1}
    return AutoModel.from_config(AutoConfig.for_model(kind, **sizes | options))


@pytest.mark.parametrize(
    "model, asked, limit",
    [
        (built("bert", max_position_embeddings=34), 256, 34),
        (built("roberta", max_position_embeddings=34), 256, 32),
        (built("mpnet", max_position_embeddings=34), 0, 32),
        (built("t5").encoder, int(1e30), None),
    ],
)
def test_the_limit_is_what_the_model_can_take(model, asked, limit):
    assert text_limit(model, asked) == limit
    model.eval()(input_ids=torch.full((1, limit or 600), 5))


def test_a_longer_text_than_the_positions_is_cut_on_loading(tmp_path):
    model = built("roberta", max_position_embeddings=34)
    encoder = BiEncoder.load(save_model(tmp_path / "roberta", model), "cpu")
    assert encoder.encode(["bread " * 100]).isfinite().all()


def test_no_limit_cuts_nothing(llama):
    llama.max_length = None
    long, longer = llama.encode(["tea " * 999, "tea " * 999 + "sky"])
    assert not torch.equal(long, longer)


@pytest.fixture
def disk(cache, monkeypatch):
    """Only the disk will remember, and it is empty; two texts are a block, and worth a file."""
    monkeypatch.setattr(room, "KEPT", {})
    monkeypatch.setattr(room, "BLOCK", 2)
    monkeypatch.setattr(room, "WORTH_A_FILE", 2)


def count_runs(encoder: BiEncoder) -> list[int]:
    """An item for each batch that goes through the transformer."""
    runs = []
    encoder.model.register_forward_hook(lambda *_: runs.append(1))
    return runs


def test_a_text_goes_through_a_frozen_transformer_once(tiny_llama, disk):
    encoder = weighted(tiny_llama, mapped=True)
    runs = count_runs(encoder)
    queries, passages = encoder(TEXTS[:1], TEXTS)
    assert torch.equal(queries, encoder.encode(TEXTS[:1], "query"))
    assert torch.equal(passages, encoder.encode(TEXTS))
    assert len(runs) == 4  # one text, then blocks of 2, 2 and 1


def test_the_next_process_reads_whole_blocks(tiny_llama, disk):
    computed = weighted(tiny_llama, mapped=True).encode(TEXTS)
    room.KEPT.clear()
    encoder = weighted(tiny_llama, mapped=True)
    encoder.tokenizer(TEXTS, padding=True, truncation=True, max_length=2)  # an earlier call
    runs = count_runs(encoder)
    assert torch.equal(encoder.encode(TEXTS), computed)
    assert len(runs) == 1  # the last block is too small for a file


def in_pipeline(part, value):
    return lambda encoder: setattr(encoder.tokenizer.backend_tokenizer, part, value)


def change_config(encoder: BiEncoder) -> None:
    encoder.model.config.rms_norm_eps = 0.5
    encoder.model.norm.variance_epsilon = 0.5


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
    "config": change_config,
}


@pytest.mark.parametrize("name", EDITS)
def test_other_settings_do_not_get_kept_vectors(name, tiny_llama, disk):
    kept = weighted(tiny_llama, mapped=True).mean_vectors(TEXTS, "passage")
    computed, looked_up = weighted(tiny_llama), weighted(tiny_llama, mapped=True)
    EDITS[name](computed)
    EDITS[name](looked_up)
    found = looked_up.mean_vectors(TEXTS, "passage")
    assert not torch.equal(found, kept)
    assert_close(found, computed.mean_vectors(TEXTS, "passage"))
