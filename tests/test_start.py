"""The label-free start: each step by its definition, and what comes out."""

import pytest
import torch

from repro.encoder import BiEncoder
from repro.support.start import cut_out, sif_weights, warm_up, whitening


def test_rare_tokens_weigh_more_by_smooth_inverse_frequency():
    ids = [[0, 1, 1], [1]]
    weights = sif_weights(ids, vocabulary=3, a=0.25)
    assert weights.tolist() == pytest.approx([0.25 / 0.5, 0.25 / 1.0, 1.0])


def test_cuts_are_two_to_eight_neighbouring_words_of_their_passage():
    passages = [" ".join(f"w{n}_{i}" for i in range(40)) for n in range(300)]
    passages += ["one", "two words"]
    cuts = cut_out(passages)
    for cut, passage in zip(cuts, passages, strict=True):
        assert f" {cut} " in f" {passage} "
    assert {len(cut.split()) for cut in cuts[:300]} == {2, 3, 4, 5, 6, 7, 8}


def test_cuts_are_drawn_with_one_seed():
    assert cut_out(["the moon and the tide"] * 99) == cut_out(["the moon and the tide"] * 99)


@pytest.fixture
def cloud():
    """Points whose directions are of unequal variance, off the origin."""
    torch.manual_seed(0)
    return torch.randn(500, 6) @ torch.randn(6, 6) + 3


def test_whitening_evens_out_the_covariance(cloud):
    w = whitening(cloud, softness=0)
    covariance = torch.cov((cloud @ w.T).T)
    expected = torch.eye(6) * covariance[0, 0]
    torch.testing.assert_close(covariance, expected, atol=1e-3, rtol=1e-3)


def test_whitening_turns_nothing_and_keeps_the_scale(cloud):
    w = whitening(cloud, softness=0)
    torch.testing.assert_close(w, w.T, atol=1e-6, rtol=0)
    assert w.norm().item() == pytest.approx(6**0.5, rel=1e-5)


def test_very_soft_whitening_is_the_identity(cloud):
    torch.testing.assert_close(whitening(cloud, softness=1e7), torch.eye(6), atol=1e-4, rtol=0)


def test_warm_up_learns_which_directions_find_the_passage(monkeypatch):
    """Cut and passage agree in the first 4 of 12 directions; the rest is noise of more variance."""
    torch.manual_seed(2)
    signal = torch.randn(640, 4)
    noise = 1.5 * torch.randn(2, 640, 8)
    cuts = torch.cat([signal, noise[0]], dim=1)
    passages = torch.cat([signal, noise[1]], dim=1)
    monkeypatch.setattr("repro.support.start.LR", 3e-2)  # a toy needs fewer and larger steps
    monkeypatch.setattr("repro.support.start.EPOCHS", 10)
    w = warm_up(torch.eye(12), cuts, passages)
    of_signal = w[:, :4].norm()
    of_noise = w[:, 4:].norm()
    assert of_signal / of_noise > 1.2 * (4 / 8) ** 0.5


@pytest.mark.checkpoint
def test_base_is_frozen_and_finds_the_passage_that_answers():
    base = BiEncoder.load("base", "cpu")
    query = base.encode(["how do tides work"], "query")
    passages = base.encode(["The moon's gravity pulls the ocean.", "Steel is an alloy."])
    right, wrong = (query @ passages.T)[0]
    assert base.frozen
    assert right > wrong
    torch.testing.assert_close(passages.norm(dim=1), torch.ones(2))
