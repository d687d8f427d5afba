"""The label-free start: whitening against its definition, cuts that can be found again, a map that learns to find them."""

import pytest
import torch

from repro import warmup
from repro.warmup import cut_out, warm_up, whitening


def test_whitening_without_softness_gives_every_direction_the_same_variance() -> None:
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(500, 6, generator=rng) @ torch.randn(6, 6, generator=rng) + 3
    w = whitening(x, softness=0)
    covariance = torch.cov((x @ w.T).T)
    torch.testing.assert_close(covariance, torch.eye(6) * covariance[0, 0], atol=1e-3, rtol=1e-3)
    assert w.norm().item() == pytest.approx(6**0.5, rel=1e-5) and torch.allclose(w, w.T, atol=1e-6)


def test_a_large_softness_leaves_the_vectors_as_they_are() -> None:
    x = torch.randn(50, 6, generator=torch.Generator().manual_seed(1)) * torch.tensor([5.0, 1, 1, 1, 1, 0.1])
    torch.testing.assert_close(whitening(x, softness=1e7), torch.eye(6), atol=1e-4, rtol=0)
    soft = whitening(x, softness=1.0)
    assert soft[0, 0] < soft[1, 1] < soft[5, 5]  # the loud direction is turned down


def test_cuts_are_runs_of_the_passage_and_depend_on_the_seed() -> None:
    passages = [" ".join(f"w{n}_{i}" for i in range(40)) for n in range(30)] + ["one", "two words"]
    cuts = cut_out(passages, 0)
    assert cuts == cut_out(passages, 0) and cuts != cut_out(passages, 1)
    assert all(cut and cut in passage for cut, passage in zip(cuts, passages, strict=True))
    lengths = {len(cut.split()) for cut in cuts[:30]}
    assert min(lengths) >= 2 and max(lengths) <= 8 and len(lengths) > 3


def test_warm_up_learns_which_directions_find_the_passage(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut and passage agree in the first 4 of 12 directions only; the rest is louder noise."""
    rng = torch.Generator().manual_seed(2)
    signal = torch.randn(640, 4, generator=rng)
    cuts, passages = (torch.cat([signal, 1.5 * torch.randn(640, 8, generator=rng)], dim=1) for _ in range(2))

    def found(w: torch.Tensor) -> float:
        a, b = (torch.nn.functional.normalize(x @ w.T, dim=1) for x in (cuts, passages))
        return ((a @ b.T).argmax(1) == torch.arange(640)).float().mean().item()

    monkeypatch.setattr(warmup, "LR", 3e-2)  # a toy needs fewer and larger steps
    monkeypatch.setattr(warmup, "EPOCHS", 10)
    start = torch.eye(12)
    w = warm_up(start, cuts, passages, seed=0)
    assert torch.equal(warm_up(start, cuts, passages, 0), warm_up(start, cuts, passages, 0))
    assert torch.equal(start, torch.eye(12)) and found(w) > found(start) + 0.1
    assert w[:, :4].norm() / w[:, 4:].norm() > 1.2 * (4 / 8) ** 0.5
