"""The encoder against slow loops, sentence-transformers, and itself with frozen layers."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModel, AutoTokenizer

from repro.checkpoints import CheckpointError
from repro.encoder import BiEncoder, Tokens
from repro.states import joined
from repro.warmup import sif_weights

TEXTS = ["how long does bread dough rise", "the moon", "why is the sky blue in the capital city", "tea", "rust in water of iron"]


def weighted(folder: Path, projected: bool = False, **options) -> BiEncoder:  # noqa: ANN003
    """A tiny encoder with all options on."""
    encoder = BiEncoder.load(folder, device="cpu", **options)
    rng = torch.Generator().manual_seed(5)
    encoder.token_weights = torch.rand(len(encoder.tokenizer), generator=rng)
    encoder.centre = 0.1 * torch.randn(16, generator=rng)
    if projected:
        encoder.projection = torch.nn.Parameter(torch.randn(7, 16, generator=rng))
    encoder.normalise = True
    return encoder


def assert_close(a: torch.Tensor, b: torch.Tensor, atol: float = 1e-5) -> None:
    assert a.numel()
    torch.testing.assert_close(a, b, atol=atol, rtol=0)


@pytest.mark.parametrize("kind", ["tiny_llama", "tiny_bert"])
def test_mean_pooling_against_one_text_at_a_time(kind: str, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(kind)
    encoder = weighted(folder)
    model, tokenizer = AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    slow = []
    with torch.no_grad():
        for text in TEXTS:
            ids = tokenizer(text, return_tensors="pt")["input_ids"]
            hidden = model(input_ids=ids).last_hidden_state[0]
            weights = encoder.token_weights[ids[0]]
            vector = sum(w * h for w, h in zip(weights, hidden, strict=True)) / weights.sum() - encoder.centre
            slow.append(vector / vector.norm())
    assert_close(encoder.encode(TEXTS, batch_size=2), torch.stack(slow))
    encoder.token_weights = encoder.centre = encoder.projection = None
    encoder.normalise = False
    means = torch.stack([model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].mean(0) for text in TEXTS])
    assert_close(encoder.encode(TEXTS, kind="query"), means.detach())


def test_order_batch_size_and_empty_input(tiny_bert: Path) -> None:
    encoder = weighted(tiny_bert)
    alone = torch.cat([encoder.encode([text]) for text in TEXTS])
    for size in (1, 2, 3, 100):
        assert_close(encoder.encode(TEXTS, batch_size=size), alone)
    assert encoder.encode([]).shape == (0, 16)
    assert torch.isfinite(encoder.encode(["", " "])).all()
    with pytest.raises(ValueError, match="kind: expected one of passage, query"):
        encoder.encode(TEXTS, kind="document")


def test_long_texts_are_cut_and_encode_restores_the_mode(tiny_llama: Path) -> None:
    encoder = BiEncoder.load(tiny_llama, device="cpu", max_length=5)
    long = "how long does it take to bake bread"
    assert_close(encoder.encode([long]), encoder.encode(["how long does it take"]))
    encoder.train()
    encoder.encode(TEXTS)
    assert encoder.training


@pytest.mark.parametrize("kind", ["tiny_llama", "tiny_bert"])
def test_save_and_load_give_the_same_embeddings(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    encoder = weighted(request.getfixturevalue(kind), projected=kind == "tiny_llama", max_length=9)
    encoder.prompts["query"] = "why "
    encoder.save(tmp_path / "saved")
    again = BiEncoder.load(tmp_path / "saved", device="cpu")
    assert again.max_length == 9 and again.prompts == encoder.prompts
    for side in ("query", "passage"):
        assert torch.equal(again.encode(TEXTS, side), encoder.encode(TEXTS, side))
    with pytest.raises(CheckpointError, match="not empty"):
        encoder.save(tmp_path / "saved")
    assert not list(tmp_path.glob(".saved*"))


@pytest.mark.parametrize("kind", ["tiny_llama", "tiny_bert"])
def test_sentence_transformers_reads_the_folder(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    from sentence_transformers import SentenceTransformer

    encoder = weighted(request.getfixturevalue(kind), projected=kind == "tiny_llama", max_length=9)
    encoder.save(tmp_path / "all")
    other = SentenceTransformer(str(tmp_path / "all"), device="cpu")
    long = [*TEXTS, "how long does it take to bake bread dough with tea and coffee beans"]
    assert_close(torch.from_numpy(other.encode(long)), encoder.encode(long))
    encoder.token_weights = encoder.centre = encoder.projection = None
    encoder.normalise, encoder.pooling = False, "cls"
    encoder.save(tmp_path / "cls")
    assert_close(torch.from_numpy(SentenceTransformer(str(tmp_path / "cls"), device="cpu").encode(TEXTS)), encoder.encode(TEXTS))


def test_folder_written_by_sentence_transformers(tiny_bert: Path, tmp_path: Path) -> None:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Dense, Normalize, Pooling, Transformer

    parts = [Transformer(str(tiny_bert), max_seq_length=20), Pooling(16, "mean"), Normalize()]
    theirs = SentenceTransformer(modules=parts, device="cpu", prompts={"query": "why ", "document": "the "})
    theirs.save(str(tmp_path / "theirs"))
    ours = BiEncoder.load(tmp_path / "theirs", device="cpu")
    assert ours.max_length == 20
    assert_close(ours.encode(TEXTS, "query"), torch.from_numpy(theirs.encode(TEXTS, prompt_name="query")))
    assert_close(ours.encode(TEXTS, "passage"), torch.from_numpy(theirs.encode(TEXTS, prompt_name="document")))
    linear = Dense(16, 4, bias=False, activation_function=torch.nn.Identity())
    theirs = SentenceTransformer(modules=[*parts[:2], linear, parts[2]], device="cpu")
    theirs.save(str(tmp_path / "projected"))
    assert_close(BiEncoder.load(tmp_path / "projected", device="cpu").encode(TEXTS), torch.from_numpy(theirs.encode(TEXTS)))
    refused = {"tanh": [*parts, Dense(16, 4)], "late": [*parts, linear], "twice": [*parts[:2], linear, linear]}
    for name, modules in refused.items():
        SentenceTransformer(modules=modules, device="cpu").save(str(tmp_path / name))
        with pytest.raises(CheckpointError, match="subtracts a centre or is a linear map|in the order centre, projection"):
            BiEncoder.load(tmp_path / name)
    SentenceTransformer(modules=[parts[0], Pooling(16, "max")], device="cpu").save(str(tmp_path / "max"))
    with pytest.raises(CheckpointError, match="expected mean or cls pooling, found max"):
        BiEncoder.load(tmp_path / "max")


@pytest.mark.parametrize("kind, layers", [("tiny_llama", 1), ("tiny_llama", 3), ("tiny_bert", 2)])
def test_kept_states_change_neither_embeddings_nor_gradients(kind: str, layers: int, request: pytest.FixtureRequest) -> None:
    """Starting from kept states is the same computation as running all layers with the lower ones frozen."""
    encoder = weighted(request.getfixturevalue(kind))
    encoder.freeze(layers)
    tokens = encoder.tokenise(TEXTS)
    kept = encoder.keep_states(tokens, batch_size=2)
    target = torch.randn(len(TEXTS), 16, generator=torch.Generator().manual_seed(0))
    results = []
    for source in (tokens, kept):
        encoder.zero_grad()
        (embedded,) = encoder(source)
        (embedded * target).sum().backward()
        gradients = {name: p.grad.clone() for name, p in encoder.named_parameters() if p.grad is not None}
        results.append((embedded.detach(), gradients))
    assert_close(results[0][0], results[1][0])
    assert results[0][1].keys() == results[1][1].keys() and results[0][1]
    for name, gradient in results[0][1].items():
        assert_close(gradient, results[1][1][name])
    assert_close(encoder.encode_tokens(kept, batch_size=2), encoder.encode(TEXTS))
    below = [f"layers.{n}." for n in range(layers)] + [f"layer.{n}." for n in range(layers)] + ["embed"]
    assert not [name for name in results[0][1] if any(part in name for part in below)]


def test_all_layers_frozen_keeps_one_vector_a_text_and_trains_the_projection(tiny_llama: Path) -> None:
    encoder = weighted(tiny_llama, projected=True)
    encoder.freeze(4)
    assert [name for name, p in encoder.named_parameters() if p.requires_grad] == ["projection"] and encoder.all_frozen
    tokens = encoder.tokenise(TEXTS)
    kept = encoder.keep_states(tokens, batch_size=2)
    assert kept.states is None and kept.pooled.shape == (len(TEXTS), 16)
    gradients = []
    for source in (tokens, joined([kept[:2], kept[[2, 3, 4]]])):
        encoder.zero_grad()
        (embedded,) = encoder(source)
        (embedded * torch.arange(35.0).reshape(5, 7)).sum().backward()
        gradients.append(encoder.projection.grad.clone())
    assert_close(*gradients, atol=1e-4)
    assert gradients[0].abs().max() > 0.1
    assert_close(encoder.encode_tokens(kept, batch_size=2), encoder.encode(TEXTS))


def test_freeze_counts(tiny_llama: Path) -> None:
    encoder = BiEncoder.load(tiny_llama, device="cpu")
    encoder.freeze(3)
    trainable = {name.removeprefix("model.").rsplit(".", 2)[0] for name, p in encoder.named_parameters() if p.requires_grad}
    assert all(name.startswith(("layers.3", "norm")) for name in trainable) and "norm.weight" in {n for n, p in encoder.model.named_parameters() if p.requires_grad}
    encoder.freeze(0)
    assert all(p.requires_grad for p in encoder.parameters())
    with pytest.raises(ValueError, match="expected 0 to 3, got 4; all of them only where a projection"):
        encoder.freeze(4)


def test_chunks_give_the_same_gradients(tiny_bert: Path) -> None:
    """Gradient caching recomputes each chunk, with the same dropout, so it must not change anything."""
    encoder = weighted(tiny_bert).eval()
    gradients = []
    for chunk in (None, 2):
        encoder.zero_grad()
        (embedded,) = encoder(encoder.tokenise(TEXTS), chunk=chunk)
        (embedded @ embedded.T).square().sum().backward()
        gradients.append({name: p.grad.clone() for name, p in encoder.named_parameters() if p.grad is not None})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-5, rtol=1e-4)


def test_sif_weights_by_hand() -> None:
    weights = sif_weights([[0, 1, 1], [1]], vocabulary=3, a=0.25)
    assert weights.tolist() == pytest.approx([0.25 / 0.5, 0.25 / 1.0, 1.0])


def test_tokens_can_be_sliced() -> None:
    tokens = Tokens([[1], [2, 3], [4]], [torch.zeros(1, 2), torch.ones(2, 2), torch.zeros(1, 2)])
    assert tokens[1:].ids == [[2, 3], [4]] and tokens[[2, 0]].ids == [[4], [1]] and len(tokens[[1]].states[0]) == 2


@pytest.mark.checkpoint
def test_base_is_six_layers_weighted_centred_and_normalised() -> None:
    base = BiEncoder.load("base", device="cpu")
    assert base.model.config.num_hidden_layers == 6 and base.normalise and base.frozen == 0
    assert base.token_weights.shape == (49152,) and base.centre.shape == (576,)
    vectors = base.encode(["how do tides work", "The moon's gravity pulls the ocean.", "Steel is made in a furnace."])
    assert_close(vectors.norm(dim=1), torch.ones(3))
    assert vectors[0] @ vectors[1] > vectors[0] @ vectors[2]
