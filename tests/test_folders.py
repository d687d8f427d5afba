"""Folders of sentence-transformers: ours read by it, its own read by us, the rest refused."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import SIZES, VOCABULARY, assert_close, save_model
from sentence_transformers import CrossEncoder, SentenceTransformer, SparseEncoder
from sentence_transformers.sentence_transformer.modules import (
    Dense,
    Normalize,
    Pooling,
    Transformer,
)
from transformers import BertConfig, BertForMaskedLM, BertForTokenClassification, T5Config, T5Model

from repro.encoder import BiEncoder
from repro.support.folders import read_prompts, read_word_weights

TEXTS = ["how long does bread dough rise", "the moon", "why is the sky blue in the city", "tea"]
SETTINGS = "config_sentence_transformers.json"
TRANSFORMER = "sentence_bert_config.json"
POOLING = "1_Pooling/config.json"
DENSE = "2_Dense/config.json"
NORMALIZE = "3_Normalize/config.json"
LINEAR = Dense(16, 16, bias=False, activation_function=torch.nn.Identity())


@pytest.mark.parametrize("pooling, weights", [("cls", None), ("mean", torch.rand(len(VOCABULARY)))])
def test_a_saved_folder_gives_the_same_vectors_there_and_here(pooling, weights, bert, tmp_path):
    ours = BiEncoder(
        bert.model,
        bert.tokenizer,
        pooling=pooling,
        normalise=True,
        token_weights=weights,
        centre=torch.randn(16),
        projection=torch.randn(7, 16),
        max_length=5,
        prompts={"query": "why ", "passage": "the "},
    )
    folder = ours.save(tmp_path / "saved")
    theirs = SentenceTransformer(str(folder), device="cpu")
    assert_close(ours.encode(TEXTS, "query"), theirs.encode_query(TEXTS))
    assert_close(ours.encode(TEXTS), theirs.encode_document(TEXTS))
    assert_close(ours.encode(TEXTS), theirs.encode(TEXTS))
    again = BiEncoder.load(folder, "cpu")
    assert torch.equal(again.encode(TEXTS, "query"), ours.encode(TEXTS, "query"))
    assert torch.equal(again.encode(TEXTS), ours.encode(TEXTS))


def saved(folder: Path, modules: list, **options) -> SentenceTransformer:
    model = SentenceTransformer(modules=modules, device="cpu", **options)
    model.save(str(folder))
    return model


@pytest.mark.parametrize("similarity", ["cosine", "dot", None])
@pytest.mark.parametrize("end", [[LINEAR], [Normalize()]])
@pytest.mark.parametrize("mode", ["mean", "cls"])
def test_their_folders_give_the_same_vectors_here(similarity, end, mode, tiny_bert, tmp_path):
    modules = [Transformer(str(tiny_bert), max_seq_length=6), Pooling(16, mode), *end]
    theirs = saved(tmp_path / "theirs", modules, prompts={"query": "why ", "document": "the "})
    edit(tmp_path / "theirs", SETTINGS, "similarity_fn_name", similarity)
    encoder = BiEncoder.load(tmp_path / "theirs", "cpu")
    options = {"normalize_embeddings": similarity == "cosine"}
    assert_close(encoder.encode(TEXTS, "query"), theirs.encode_query(TEXTS, **options))
    assert_close(encoder.encode(TEXTS), theirs.encode_document(TEXTS, **options))


def test_weights_of_words_may_be_lower_cased_or_the_default():
    weights = {"moon": 3.0, "the": 0.5}
    words = ["Moon", "the", "tea"]
    config = {"vocab": words, "word_weights": weights, "unknown_word_weight": 2.0}
    assert read_word_weights(config).tolist() == [3.0, 0.5, 2.0]


@pytest.fixture
def folder(tiny_bert, tmp_path):
    """A folder that can be read: Transformer, Pooling, Dense, Normalize."""
    saved(tmp_path / "folder", [Transformer(str(tiny_bert)), Pooling(16), LINEAR, Normalize()])
    return tmp_path / "folder"


def edit(folder: Path, file: str, field: str, value: object, row: int = 0) -> None:
    """Change a field of a JSON file, or of one row of modules.json."""
    content = json.loads((folder / file).read_text())
    rows = content if file == "modules.json" else [content]
    rows[row][field] = value
    (folder / file).write_text(json.dumps(content))


@pytest.mark.parametrize(
    "file, field, value",
    [
        (SETTINGS, "truncate_dim", 8),
        (SETTINGS, "similarity_fn_name", "euclidean"),
        (SETTINGS, "a_later_field", 1),
        (TRANSFORMER, "do_lower_case", True),
        (TRANSFORMER, "transformer_task", "fill-mask"),
        (TRANSFORMER, "tokenizer_args", {"truncation_side": "left"}),
        ("config.json", "auto_map", {"AutoModel": "own.Model"}),
        (POOLING, "pooling_mode", "max"),
        (POOLING, "pooling_mode", []),
        (POOLING, "pooling_mode_weightedmean_tokens", True),
        (POOLING, "include_prompt", False),
        (DENSE, "activation_function", "torch.nn.modules.activation.Tanh"),
        (DENSE, "activation_function", "mine.Identity"),
        (NORMALIZE, "module_input_name", "token_embeddings"),
    ],
)
def test_fields_that_change_vectors_or_scores_are_refused(folder, file, field, value):
    edit(folder, file, field, value)
    with pytest.raises(ValueError, match=f"{file}: this kit does not have {field}"):
        BiEncoder.load(folder)


def test_lower_case_is_read_where_the_tokenizer_has_it_by_itself(folder):
    expected = BiEncoder.load(folder, "cpu").encode(TEXTS)
    for file in (TRANSFORMER, "tokenizer_config.json"):
        edit(folder, file, "do_lower_case", True)
    assert torch.equal(BiEncoder.load(folder, "cpu").encode(TEXTS), expected)


def test_the_yes_and_no_of_older_poolings_are_read(folder):
    config = {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}
    (folder / POOLING).write_text(json.dumps(config))
    assert BiEncoder.load(folder, "cpu").pooling == "cls"


def test_a_transformer_may_lie_in_a_folder_of_its_own(folder, tiny_bert):
    expected = BiEncoder.load(folder, "cpu").encode(TEXTS)
    shutil.copytree(tiny_bert, folder / "0_Transformer")
    (folder / "model.safetensors").unlink()
    edit(folder, "modules.json", "path", "0_Transformer")
    assert torch.equal(BiEncoder.load(folder, "cpu").encode(TEXTS), expected)


@pytest.mark.parametrize("place", ["models", "models.Pooling", "base.modules.pooling"])
def test_old_and_new_places_of_modules_are_read(folder, place):
    edit(folder, "modules.json", "type", f"sentence_transformers.{place}.Pooling", row=1)
    assert BiEncoder.load(folder, "cpu").pooling == "mean"


@pytest.mark.parametrize(
    "field, value",
    [
        ("type", "another.models.Pooling"),
        ("type", "sentence_transformers.models.LSTM"),
        ("type", "sentence_transformers.sparse_encoder.models.Pooling"),
        ("path", "../other"),
        ("path", "/etc"),
    ],
)
def test_modules_from_elsewhere_are_refused(folder, field, value):
    edit(folder, "modules.json", field, value, row=1)
    with pytest.raises(ValueError, match=f"this kit has no module .*{value}"):
        BiEncoder.load(folder)


@pytest.mark.parametrize(
    "modules, message",
    [
        ([], "its modules give max_length, expected"),
        ([Pooling(16), Normalize(), LINEAR], "normalise projection, expected"),
        ([Pooling(16), LINEAR, LINEAR], "projection projection, expected"),
        ([Pooling(16), Dense(16, 16, activation_function=None)], "expected a Dense with"),
    ],
)
def test_other_chains_of_modules_are_refused(modules, message, tiny_bert, tmp_path):
    saved(tmp_path / "other", [Transformer(str(tiny_bert)), *modules])
    with pytest.raises(ValueError, match=message):
        BiEncoder.load(tmp_path / "other")


def test_pickled_weights_are_not_read(folder):
    (folder / "2_Dense/model.safetensors").rename(folder / "2_Dense/pytorch_model.bin")
    with pytest.raises(ValueError, match="No such file or directory: .*model.safetensors"):
        BiEncoder.load(folder)


def test_damaged_files_are_named(folder):
    (folder / POOLING).write_text("{")
    with pytest.raises(ValueError, match=f"{POOLING}: expected JSON"):
        BiEncoder.load(folder)


@pytest.mark.parametrize("kind", [CrossEncoder, SparseEncoder])
def test_their_other_kinds_of_model_are_named(kind, tiny_bert, tmp_path):
    kind(str(tiny_bert), device="cpu").save(str(tmp_path / "other"))
    with pytest.raises(ValueError, match=f"this kit does not have .*model_type {kind.__name__}"):
        BiEncoder.load(tmp_path / "other")


BERT = BertConfig(**SIZES, num_hidden_layers=1, num_attention_heads=2)
T5 = T5Config(vocab_size=9, num_layers=1)


@pytest.mark.parametrize("model", [BertForTokenClassification(BERT), T5Model(T5)])
def test_plain_checkpoints_of_another_kind_are_named(model, tmp_path):
    folder = save_model(tmp_path / "other", model)
    with pytest.raises(ValueError, match=f"is a {type(model).__name__}, expected a text encoder"):
        BiEncoder.load(folder)


@pytest.mark.parametrize("kind", ["BertForMaskedLM", "Contriever"])
def test_a_plain_checkpoint_is_mean_pooled_without_normalising(kind, tmp_path):
    folder = save_model(tmp_path / "plain", BertForMaskedLM(BERT))
    edit(folder, "config.json", "architectures", [kind])
    encoder = BiEncoder.load(folder, "cpu")
    assert (encoder.pooling, encoder.normalise, encoder.max_length) == ("mean", False, 256)


@pytest.mark.parametrize(
    "named, query, passage",
    [
        ({"query": None, "document": None}, "", ""),
        ({"query": "q ", "document": "", "passage": "p "}, "q ", ""),
        ({"passage": "p "}, "", "p "),
        ({"corpus": "c "}, "", "c "),
        ({"any": "a "}, "", ""),
    ],
)
def test_the_prompts_of_a_folder(named, query, passage):
    found = read_prompts({"prompts": named})
    assert found == {"query": query, "passage": passage}
