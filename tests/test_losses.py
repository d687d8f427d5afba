"""The losses against golden values, scipy, linear programming, finite differences, and their own laws."""

import itertools
import math
from functools import partial

import numpy as np
import pytest
import scipy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from repro.losses import LOSSES, expand_labels, infonce, kl, target_distribution, wasserstein_1d
from repro.losses import wasserstein_gaussian as gaussian

LINES = list(itertools.product((1, 2), ("grade", "gain")))
FORMS = LOSSES | {f"{axis} {order}": partial(wasserstein_1d, order=order, axis=axis) for order, axis in LINES}
FORMS["infonce, ignore between"] = partial(infonce, ignore_between=True)
every_form = pytest.mark.parametrize("name", FORMS)
OWN = expand_labels(torch.ones(3, 4)).bool()  # which passages are a query's own, in a batch of 3

def golden_batch(rows: int, k: int = 4) -> tuple[Tensor, Tensor]:
    """s[i][j] = 2 sin(1.7 i + 0.9 j), grades 3, 2, 1, 0 block-diagonally, float64."""
    i, j = torch.arange(rows, dtype=torch.float64)[:, None], torch.arange(rows * k, dtype=torch.float64)
    labels = expand_labels(torch.tensor([[3.0, 2, 1, 0]], dtype=torch.float64).repeat(rows, 1))
    return (2 * torch.sin(1.7 * i + 0.9 * j)).requires_grad_(), labels

def random_batch(seed: int, rows: int = 3, k: int = 4, scale: float = 2.0) -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    labels = expand_labels(torch.randint(0, 4, (rows, k), generator=rng).double())
    return (scale * torch.randn(labels.shape, generator=rng, dtype=torch.float64)).requires_grad_(), labels

def measured(loss: Tensor, scores: Tensor) -> tuple[float, Tensor]:
    return loss.item(), torch.autograd.grad(loss, scores)[0]

def transported(x: Tensor, p: Tensor, t: Tensor, order: int) -> float:
    """The least mean cost |x_i - x_j|^order over all couplings, by linear programming: no quantiles."""
    ones, eye = np.ones(x.shape[1]), np.eye(x.shape[1])
    marginals, masses = np.vstack([np.kron(eye, ones), np.kron(ones, eye)]), torch.cat([p, t], 1).detach()
    costs = ((x[:, :, None] - x[:, None, :]).abs() ** order).flatten(1)  # (B, N * N)
    pairs = zip(costs.numpy(), masses.numpy(), strict=True)
    return np.mean([scipy.optimize.linprog(cost, A_eq=marginals, b_eq=mass).fun for cost, mass in pairs])

# Values made independently with the eigenvalue form of the released code and with plain numpy.
@pytest.mark.parametrize("rows, w2, slope, kl_value, w1", [
    (4, 0.2123341058, (-0.000252891, 0.006775551, 0.016244690), 2.1165087547, 1.6004657869),
    (16, 0.0536361606, (-7.386e-06, 5.60088e-05, 1.682962e-04), 1.3713366794, 0.7659561144),
    (1, 0.4965045731, (-0.100006552, -0.063588779, 0.181202470), 1.2024751139, 1.1996734118)])
def test_golden_values(rows: int, w2: float, slope: tuple[float, ...], kl_value: float, w1: float) -> None:
    scores, labels = golden_batch(rows)
    value, gradient = measured(gaussian(scores, labels), scores)
    others = kl(scores, labels).item(), wasserstein_1d(scores, labels).item()
    found, expected = [value, *gradient[0, :3].tolist(), *others], [w2, *slope, kl_value, w1]
    assert found == pytest.approx(expected, rel=0, abs=1e-9)
    if rows == 16:
        row = target_distribution(labels)[0]
        assert row[:5].tolist() == pytest.approx([0.22025, 0.08103, 0.02981, 0.01097, 0.01097], abs=5e-6)
        found = row.sum().item(), row[4:].sum().item(), kl(labels.roll(1, dims=0), labels).item()
        assert found == pytest.approx((1, 0.658, 0.787), abs=5e-4)

@pytest.mark.parametrize("order, axis, seed", [(*line, seed) for line in LINES for seed in range(4)])
def test_1d_equals_scipy_and_linear_programming(order: int, axis: str, seed: int) -> None:
    scores, labels = random_batch(seed)
    p, t = torch.softmax(scores / 0.7, 1), torch.softmax(labels / 0.5, 1)
    x = labels if axis == "grade" else 2**labels - 1
    found = wasserstein_1d(scores, labels, 0.7, 0.5, order=order, axis=axis).item()
    assert found == pytest.approx(transported(x, p, t, order), abs=1e-8)
    rows = zip(*(values.detach().numpy() for values in (x, p, t)), strict=True)
    exact = np.mean([scipy.stats.wasserstein_distance(x, x, t, p) for x, p, t in rows])  # symmetric: T, P
    assert order == 2 or found == pytest.approx(exact, rel=1e-12)

def test_where_the_target_is_one_hot() -> None:
    """The grades then act through the axis alone, and KL does not see on which wrong grade the mass lies."""
    scores, labels = golden_batch(4)
    for order in (1, 2):
        expected = measured((torch.softmax(scores, 1) * (3 - labels) ** order).sum(1).mean(), scores)
        found = measured(wasserstein_1d(scores, labels, 1.0, 0.01, order=order), scores)
        torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)
    labels = labels[:1, :4]
    near, far = torch.tensor([[0.5, 0.3, 0.1, 0.1], [0.5, 0.1, 0.1, 0.3]], dtype=torch.float64).log().split(1)
    alike, unlike = ([f(s, labels, 1.0, 0.01).item() for s in (near, far)] for f in (kl, wasserstein_1d))
    assert alike[0] == pytest.approx(alike[1], abs=1e-12) and unlike[1] - unlike[0] == pytest.approx(0.2 * 2)

def test_gaussian_equals_matrix_square_root() -> None:
    rng = torch.Generator().manual_seed(3)
    scores = torch.randn(40, 6, generator=rng, dtype=torch.float64)
    labels = torch.randint(0, 4, (40, 6), generator=rng).double()
    # Rows sum to 1, so both covariances are singular along (1, ..., 1); in the plane across it they are not.
    p, t = (torch.softmax(x, 1).numpy() @ scipy.linalg.null_space(np.ones((1, 6))) for x in (scores, labels))
    root = scipy.linalg.sqrtm(np.cov(p.T) @ np.cov(t.T)).real
    expected = ((p.mean(0) - t.mean(0)) ** 2).sum() + np.trace(np.cov(p.T) + np.cov(t.T) - 2 * root)
    # 35 of the 40 singular values are 0 here; the released code's rounding takes 2 * 3.2e-8 for each.
    assert gaussian(scores, labels).item() == pytest.approx(expected - 35 * 2 * 1e-15**0.5, abs=1e-8)

def test_infonce_by_hand() -> None:
    scores = torch.tensor([[2.0, 1.0, 0.0, -1.0], [0.5, 0.0, 1.5, 1.0]], dtype=torch.float64)
    labels = torch.tensor([[3.0, 1.0, 0.0, 0.0], [0.0, 0.0, 1.0, 2.0]], dtype=torch.float64)
    by_class = torch.nn.functional.cross_entropy(scores / 0.05, torch.tensor([0, 3])).item()
    assert infonce(scores, labels, temperature=0.05).item() == pytest.approx(by_class)
    kept = torch.logsumexp(scores[0, [0, 2, 3]], 0) - 2, torch.logsumexp(scores[1, [0, 1, 3]], 0) - 1
    assert infonce(scores, labels, ignore_between=True).item() == pytest.approx(sum(kept).item() / 2)
    labels[1] = 0  # a row without a positive is left out
    assert infonce(scores, labels).item() == pytest.approx(infonce(scores[:1], labels[:1]).item())

@every_form
@settings(max_examples=40, deadline=None)
@given(st.tuples(st.integers(0, 9999), st.integers(1, 6), st.integers(1, 5)), st.floats(-100, 100))
def test_laws(name: str, sizes: tuple[int, int, int], shift: float) -> None:
    """Shifted rows and the order of passages change nothing; distances are 0 at P = T and never less."""
    scores, labels = random_batch(*sizes, scale=(0.1, 1, 5)[sizes[0] % 3])
    if "infonce" in name:  # ties in the grade go to the first passage, so order matters there; break them
        labels = labels + torch.linspace(0, 0.5, labels.shape[1], dtype=torch.float64) * (labels > 0)
    value = FORMS[name](scores, labels).item()
    shifted = scores + shift * torch.arange(1, len(scores) + 1)[:, None]
    assert FORMS[name](shifted, labels).item() == pytest.approx(value, abs=1e-6)
    order = torch.randperm(scores.shape[1], generator=torch.Generator().manual_seed(sizes[0]))
    assert FORMS[name](scores[:, order], labels[:, order]).item() == pytest.approx(value, abs=1e-6)
    if "infonce" not in name:
        perfect = labels.clone().requires_grad_()  # softmax(labels) is the target
        least, gradient = measured(FORMS[name](perfect, labels), perfect)
        assert value >= -1e-6 and abs(least) < 1e-6 and gradient.abs().max().item() < 1e-6
    assert name != "wasserstein_gaussian" or gaussian(labels, scores).item() == pytest.approx(value, abs=1e-9)

def test_what_the_gaussian_form_does_not_see() -> None:
    """It cannot tell whose passages a query ranks first; the per-query losses can."""
    scores, labels = golden_batch(4)
    wrong = labels.roll(1, dims=0).clone().requires_grad_()  # query i asks for query i-1's passages
    value, gradient = measured(gaussian(wrong, labels), wrong)
    assert abs(value) < 1e-6 and gradient.abs().max().item() < 1e-6
    assert kl(wrong, labels).item() > 0.5 and wasserstein_1d(wrong, labels).item() > 0.5
    halves = [gaussian(scores[rows], labels[rows]).item() for rows in (slice(0, 2), slice(2, 4))]
    assert abs(np.mean(halves) - gaussian(scores, labels).item()) > 0.01  # nor is a batch its halves' mean

@every_form
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_extremes_are_finite(name: str, dtype: torch.dtype) -> None:
    base, labels = random_batch(2, scale=1.0)
    cases = torch.sign(base.detach()) * 1e4, torch.zeros_like(base), torch.where(labels > 0, -1e4, 1e4)
    padding = torch.arange(12).expand(3, 12) % 4 < 3
    masks = [{}, {"mask": padding}] + [{"mask": padding, "target_mask": OWN}] * ("infonce" not in name)
    for case, scale, rows, chosen, heat in itertools.product(cases, (1, 0), (3, 1), masks, (1.0, 0.01)):
        scores = case[:rows].to(dtype).requires_grad_()
        loss = FORMS[name](scores, scale * labels[:rows], heat, **{k: m[:rows] for k, m in chosen.items()})
        value, gradient = measured(loss, scores)
        assert loss.dtype == torch.promote_types(dtype, torch.float32)
        assert math.isfinite(value) and torch.isfinite(gradient).all()
    value, gradient = measured(FORMS[name](scores[:, :1], torch.tensor([[3.0]])), scores)  # one passage
    assert value == pytest.approx(0, abs=1e-6) and gradient.abs().max().item() < 1e-6
    assert FORMS[name](base * math.nan, labels).isnan()  # not an exception, in none of them

@every_form
def test_masked_passages_do_not_count(name: str) -> None:
    scores, labels = random_batch(11, k=3)
    keep = torch.tensor([True, True, False, True, True, True, True, False, True])
    value, gradient = measured(FORMS[name](scores[:, keep], labels[:, keep]), scores)
    for score, grade in ((1e4, 9.0), (-1e4, -3.0), (math.nan, math.inf)):
        padded = torch.where(keep, scores, score).detach().requires_grad_()
        found = measured(FORMS[name](padded, torch.where(keep, labels, grade), mask=keep), padded)
        assert found[0] == pytest.approx(value, abs=1e-9) and not found[1][:, ~keep].any()
        torch.testing.assert_close(found[1], gradient, atol=1e-9, rtol=1e-7)

@every_form
def test_gradcheck_and_target_mask(name: str) -> None:
    """Others' passages carry no target mass: T is that of the list alone, at any size of batch."""
    scores, labels = random_batch(7, scale=1.0)
    loss = partial(FORMS[name], labels=labels)
    assert torch.autograd.gradcheck(loss, scores, atol=1e-5)
    if "infonce" not in name:
        assert torch.autograd.gradcheck(partial(loss, target_mask=OWN), scores, atol=1e-5)
        p, own = torch.softmax(scores, 1), torch.softmax(labels[OWN].view(3, 4), 1)
        t = torch.block_diag(*own)  # (3, 12)
        torch.testing.assert_close(target_distribution(labels, 1.0, OWN), t)
        by_hand = {f"grade {order}": transported(labels, p, t, order) for order in (1, 2)}
        by_hand["kl"] = torch.xlogy(t, t / p).sum(1).mean().item()
        by_hand["wasserstein_gaussian"] = gaussian(scores, t.log().clamp(min=-1e3)).item()  # T again
        found, absent = (loss(scores, target_mask=mask).item() for mask in (OWN, None))
        assert found == pytest.approx(by_hand.get(name, found), abs=1e-8) and found != absent
        assert loss(scores, mask=OWN | True, target_mask=OWN | True).item() == absent

def test_names_layout_and_bad_arguments() -> None:
    assert list(LOSSES) == ["infonce", "kl", "wasserstein_1d", "wasserstein_gaussian"]
    assert expand_labels(torch.tensor([[3, 2], [0, 5]])).tolist() == [[3, 2, 0, 0], [0, 0, 0, 5]]
    (s, y), half = random_batch(0), torch.arange(12) < 6
    for message, call in [
        ("expand_labels", lambda: kl(s, y[:, :4])), ("expand_labels", lambda: kl(s[:0], y[:0])),
        (r"\(B, k\)", lambda: expand_labels(y[0])), ("^temperature", lambda: kl(s, y, temperature=0)),
        ("^temperature", lambda: infonce(s, y, math.nan)), ("^label_t", lambda: kl(s, y, 1, math.inf)),
        ("order", lambda: wasserstein_1d(s, y, order=3)), ("axis", lambda: wasserstein_1d(s, y, axis="rank")),
        ("^mask", lambda: kl(s, y, mask=half & ~half)), ("^mask.*shape", lambda: kl(s, y, mask=OWN[:, :1])),
        ("^target_mask", lambda: kl(s, y, mask=half, target_mask=~half))]:
        with pytest.raises(ValueError, match=message) as caught:
            call()
        assert "\n" not in str(caught.value)
