"""The encoder against slow loops, sentence-transformers, and itself frozen; the label-free start."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Dense, Normalize, Pooling, Transformer
from transformers import AutoModel, AutoTokenizer

from repro import encoder as encoder_module
from repro import start
from repro.encoder import BiEncoder
from repro.start import cut_out, sif_weights, warm_up, whitening

TEXTS = "how long does bread dough rise|the moon|why is the sky blue in the city|tea|rust of iron".split("|")

def weighted(folder: Path, mapped: bool = False, **options) -> BiEncoder:
    encoder = BiEncoder.load(folder, device="cpu")
    rng = torch.Generator().manual_seed(5)
    encoder.token_weights = torch.rand(len(encoder.tokenizer), generator=rng)
    encoder.centre = 0.1 * torch.randn(16, generator=rng)
    if mapped:
        encoder.projection = torch.nn.Parameter(torch.randn(7, 16, generator=rng))
    encoder.normalise = True
    for key, value in options.items():
        setattr(encoder, key, value)
    return encoder

def assert_close(a: torch.Tensor, b: torch.Tensor, atol: float = 1e-5) -> None:
    assert a.numel()
    torch.testing.assert_close(a, b, atol=atol, rtol=0)

@pytest.mark.parametrize("kind", ["tiny_llama", "tiny_bert"])
def test_mean_pooling_against_one_text_at_a_time(kind: str, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(kind)
    encoder, slow = weighted(folder), []
    model, tokenizer = AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    for text in TEXTS:
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        hidden = model(input_ids=ids).last_hidden_state[0].detach()
        weights = encoder.token_weights[ids[0]]
        vector = sum(w * h for w, h in zip(weights, hidden, strict=True)) / weights.sum() - encoder.centre
        slow.append(vector / vector.norm())
    for size in (1, 2, 100):
        assert_close(encoder.encode(TEXTS, batch_size=size), torch.stack(slow))
    assert encoder.encode([]).shape == (0, 16) and torch.isfinite(encoder.encode(["", " "])).all()
    for options, name in (({"kind": "document"}, "one of passage, query"), ({"batch_size": -1}, "batch_")):
        with pytest.raises(ValueError, match=name):
            encoder.encode(TEXTS, **options)

def test_long_texts_are_cut_and_encode_restores_the_mode(tiny_llama: Path) -> None:
    encoder = weighted(tiny_llama, max_length=5)
    whole = "how long does it take to bake bread"
    assert_close(encoder.encode([whole]), encoder.encode(["how long does it take"]))
    assert len(encoder.train().encode(TEXTS)) == len(TEXTS) and encoder.training

@pytest.mark.parametrize("kind", ["tiny_llama", "tiny_bert"])
def test_saved_folder_gives_the_same(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    encoder = weighted(request.getfixturevalue(kind), mapped=kind == "tiny_llama", max_length=9)
    texts = [*TEXTS, "how long does it take to bake bread dough with tea and coffee beans"]
    encoder.save(tmp_path / "all")
    assert len({path.stat().st_mode & 0o44 for path in (tmp_path / "all").rglob("*")}) == 1  # as its folders
    other = SentenceTransformer(str(tmp_path / "all"), device="cpu")
    assert_close(torch.from_numpy(other.encode(texts)), encoder.encode(texts))
    encoder.prompts["passage"] = "why "  # an empty query prompt stays empty beside the default one
    encoder.save(tmp_path / "prompts")
    again = BiEncoder.load(tmp_path / "prompts", device="cpu")
    assert again.max_length == 9 and again.prompts == encoder.prompts
    for side in ("query", "passage"):
        assert torch.equal(again.encode(texts, side), encoder.encode(texts, side))
    encoder.prompts["passage"] = ""
    encoder.token_weights = encoder.centre = encoder.projection = None
    encoder.normalise, encoder.pooling = False, "cls"
    encoder.save(tmp_path / "cls")
    other = SentenceTransformer(str(tmp_path / "cls"), device="cpu")
    assert_close(torch.from_numpy(other.encode(texts)), encoder.encode(texts))
    with pytest.raises(ValueError, match="expected a list of texts, got one str"):
        encoder.encode("tea")

def test_folder_written_by_sentence_transformers(tiny_bert: Path, tmp_path: Path) -> None:
    parts = [Transformer(str(tiny_bert), max_seq_length=20), Pooling(16, "mean"), Normalize()]
    linear = Dense(16, 4, bias=False, activation_function=torch.nn.Identity())
    prompts = {"query": "why ", "document": "the "}
    for name, modules in {"plain": parts, "mapped": [*parts[:2], linear, parts[2]]}.items():
        theirs = SentenceTransformer(modules=modules, device="cpu", prompts=prompts)
        theirs.save(str(tmp_path / name))
        assert (ours := BiEncoder.load(tmp_path / name, device="cpu")).max_length == 20
        for side, prompt in (("query", "query"), ("passage", "document")):
            encoded = torch.from_numpy(theirs.encode(TEXTS, prompt_name=prompt))
            assert_close(ours.encode(TEXTS, side), encoded)
    half = {key: w.half() for key, w in load_file(tmp_path / "mapped/2_Dense/model.safetensors").items()}
    save_file(half, tmp_path / "mapped/2_Dense/model.safetensors")
    assert BiEncoder.load(tmp_path / "mapped", device="cpu").encode(TEXTS).isfinite().all()
    max_pooling = [parts[0], Pooling(16, "max")]
    order = "subtracts a centre or is a linear map|in the order centre, linear map|found max"
    for n, modules in enumerate(
            ([*parts, Dense(16, 4)], [*parts, linear], [*parts[:2], linear, linear], max_pooling)):
        SentenceTransformer(modules=modules, device="cpu").save(str(tmp_path / str(n)))
        with pytest.raises(ValueError, match=order):
            BiEncoder.load(tmp_path / str(n))

def test_chunks_give_the_same_gradients(tiny_bert: Path) -> None:
    """Gradient caching recomputes each chunk, so it must not change anything."""
    encoder, gradients = weighted(tiny_bert).eval(), []
    for chunk in (None, 2):
        encoder.zero_grad()
        queries, passages = encoder(TEXTS[:2], TEXTS, chunk=chunk)
        (queries @ passages.T).square().sum().backward()
        gradients.append({n: p.grad.clone() for n, p in encoder.named_parameters() if p.grad is not None})
    assert len(gradients[0]) > 20
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-6, rtol=1e-5)

def test_freeze_counts(tiny_llama: Path, cache: Path) -> None:
    encoder = BiEncoder.load(tiny_llama, device="cpu")
    for layers, first in ((0, "layers.0"), (3, "layers.3")):
        encoder.freeze(layers)
        names = [name for name, p in encoder.model.named_parameters() if p.requires_grad]
        assert names[0].startswith(first) and names[-1] == "norm.weight" and not encoder.frozen_whole
    encoder.freeze(None)
    assert all(p.requires_grad for p in encoder.parameters())
    for layers in (4, -1):
        with pytest.raises(ValueError, match=f"expected 0 to 3 layers for this model, got {layers}"):
            encoder.freeze(layers)

def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many texts went through the transformer, one number a batch; memory is emptied."""
    calls, original = [], BiEncoder._mean
    monkeypatch.setattr(encoder_module, "_KEPT", {})
    monkeypatch.setattr(BiEncoder, "_mean", lambda self, ids: calls.append(len(ids)) or original(self, ids))
    return calls

def test_each_text_is_computed_once_and_kept(tiny_llama: Path, cache: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(encoder_module, "BLOCK", 2)
    monkeypatch.setattr(encoder_module, "WORTH_A_FILE", 2)
    encoder = weighted(tiny_llama, mapped=True)
    plain = encoder.encode(TEXTS), encoder.encode(TEXTS, "query")
    calls = counted(monkeypatch)
    encoder.freeze(4)
    assert [name for name, p in encoder.named_parameters() if p.requires_grad] == ["projection"]
    assert_close(encoder.encode([*TEXTS, TEXTS[0]])[:5], plain[0])
    assert calls == [2, 2, 1] and len(list((cache / "vectors").glob("*.npy"))) == 2
    queries, passages = encoder(TEXTS[:1], TEXTS)
    (queries @ passages.T).sum().backward()
    assert_close(passages.detach(), plain[0])
    assert encoder.projection.grad.abs().max() > 0 and calls == [2, 2, 1]
    monkeypatch.setattr(encoder_module, "_KEPT", {})  # the next process
    files = sorted((cache / "vectors").glob("*.npy"), key=os.path.getmtime)
    data = bytearray(files[0].read_bytes())
    data[-40] ^= 1  # one bit in a number
    files[0].write_bytes(data)
    assert_close(encoder.encode(TEXTS), plain[0])
    assert calls[3:] == [2, 1] and f"{files[0]}: damaged" in capsys.readouterr().err
    encoder.prompts["query"] = "why "
    assert not torch.equal(encoder.encode(TEXTS, "query"), plain[1])

@pytest.mark.parametrize("change", "heads eps activation normaliser weights cls length words code".split())
def test_no_other_model_gets_them(change: str, tiny_llama, tmp_path: Path, cache: Path, monkeypatch) -> None:
    monkeypatch.setattr(encoder_module, "WORTH_A_FILE", 2)
    calls = counted(monkeypatch)
    folder = Path(shutil.copytree(tiny_llama, tmp_path / "other"))
    edits = {"heads": {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}}
    edits |= {"eps": {"rms_norm_eps": 0.5}, "activation": {"hidden_act": "gelu"}}
    config = json.loads((folder / "config.json").read_text()) | edits.get(change, {})
    (folder / "config.json").write_text(json.dumps(config))
    if change == "normaliser":
        tokenizer = json.loads((folder / "tokenizer.json").read_text())
        tokenizer["normalizer"] = {"type": "Lowercase"}
        (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    prints = []
    for one in (tiny_llama, folder):
        encoder = weighted(one, mapped=True)
        if one == folder:
            encoder.max_length = 9 if change == "length" else encoder.max_length
            encoder.pooling = "cls" if change == "cls" else encoder.pooling
            encoder.token_weights[3] += change == "words"
            encoder.model.norm.weight.data[0] += change == "weights"
        if one == folder and change == "code":
            monkeypatch.setattr(encoder_module, "POOLING_VERSION", 0)
        encoder.freeze(4)
        prints.append(encoder.fingerprint)
        encoder.encode(TEXTS)
    assert prints[0] != prints[1] and sum(calls) // len(TEXTS) == 2 == len([*cache.glob("vectors/*.npy")])
    monkeypatch.undo()
    again = weighted(tiny_llama, mapped=True)
    again.encode(TEXTS)  # leaves truncation settings in the tokenizer, which do not count
    again.freeze(4)
    assert again.fingerprint == prints[0]

def test_sif_weights_and_cuts() -> None:
    weights = sif_weights([[0, 1, 1], [1]], vocabulary=3, a=0.25)
    assert weights.tolist() == pytest.approx([0.25 / 0.5, 0.25 / 1.0, 1.0])
    passages = [" ".join(f"w{n}_{i}" for i in range(40)) for n in range(30)] + ["one", "two words"]
    cuts = cut_out(passages, 0)
    assert cuts == cut_out(passages, 0) and cuts != cut_out(passages, 1)
    assert all(cut and cut in passage for cut, passage in zip(cuts, passages, strict=True))
    lengths = {len(cut.split()) for cut in cuts[:30]}
    assert {2, 8} >= {min(lengths), max(lengths)} and len(lengths) > 3

def test_whitening_by_its_definition() -> None:
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(500, 6, generator=rng) @ torch.randn(6, 6, generator=rng) + 3
    w = whitening(x, softness=0)
    covariance = torch.cov((x @ w.T).T)
    torch.testing.assert_close(covariance, torch.eye(6) * covariance[0, 0], atol=1e-3, rtol=1e-3)
    assert w.norm().item() == pytest.approx(6**0.5, rel=1e-5) and torch.allclose(w, w.T, atol=1e-6)
    torch.testing.assert_close(whitening(x, softness=1e7), torch.eye(6), atol=1e-4, rtol=0)

def test_warm_up_learns_which_directions_find_the_passage(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut and passage agree in the first 4 of 12 directions only; the rest is noise of larger variance."""
    rng = torch.Generator().manual_seed(2)
    signal = torch.randn(640, 4, generator=rng)
    cuts, passages = (torch.cat([signal, 1.5 * torch.randn(640, 8, generator=rng)], dim=1) for _ in range(2))
    monkeypatch.setattr(start, "LR", 3e-2)  # a toy needs fewer and larger steps
    monkeypatch.setattr(start, "EPOCHS", 10)
    w = warm_up(torch.eye(12), cuts, passages, seed=0)
    assert torch.equal(w, warm_up(torch.eye(12), cuts, passages, 0))
    assert w[:, :4].norm() / w[:, 4:].norm() > 1.2 * (4 / 8) ** 0.5

@pytest.mark.checkpoint
def test_base_is_six_layers_weighted_centred_and_normalised() -> None:
    base = BiEncoder.load("base", device="cpu")
    assert base.model.config.num_hidden_layers == 6 and base.normalise and not base.frozen_whole
    assert base.token_weights.shape == (49152,) and base.centre.shape == (576,)
    vectors = base.encode(["how do tides work", "The moon's gravity pulls the ocean.", "Steel is an alloy."])
    assert_close(vectors.norm(dim=1), torch.ones(3))
    assert vectors[0] @ vectors[1] > vectors[0] @ vectors[2]
