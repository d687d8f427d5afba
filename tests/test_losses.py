"""The losses against golden values, scipy, finite differences, brute force and their own laws."""

import math

import numpy as np
import pytest
import scipy.linalg
import scipy.optimize
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from repro.losses import expand_labels, infonce, kl, target_distribution, wasserstein_1d, wasserstein_gaussian

LOSSES = {
    "infonce": infonce,
    "infonce, ignore between": lambda s, y, **o: infonce(s, y, ignore_between=True, **o),
    "kl": kl,
    "w1 grade": wasserstein_1d,
    "w1 gain": lambda s, y, **o: wasserstein_1d(s, y, axis="gain", **o),
    "w2 grade": lambda s, y, **o: wasserstein_1d(s, y, order=2, **o),
    "w2 gain": lambda s, y, **o: wasserstein_1d(s, y, order=2, axis="gain", **o),
    "gaussian": wasserstein_gaussian,
}
DISTANCES = {name: loss for name, loss in LOSSES.items() if not name.startswith("infonce")}


def golden_batch(rows: int, k: int = 4) -> tuple[Tensor, Tensor]:
    """s[i][j] = 2 sin(1.7 i + 0.9 j), grades 3, 2, 1, 0 block-diagonally, float64."""
    i, j = torch.arange(rows, dtype=torch.float64)[:, None], torch.arange(rows * k, dtype=torch.float64)
    labels = expand_labels(torch.tensor([[3.0, 2, 1, 0]], dtype=torch.float64).repeat(rows, 1))
    return (2 * torch.sin(1.7 * i + 0.9 * j)).requires_grad_(), labels


def random_batch(seed: int, rows: int = 5, k: int = 4, scale: float = 2.0) -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 4, (rows, k), generator=rng).double()
    return scale * torch.randn(rows, rows * k, generator=rng, dtype=torch.float64), expand_labels(labels)


# Values made independently with the eigenvalue form of the released code and with plain numpy.
GOLDEN = [
    # rows, Gaussian W2, its gradient at s[0][0..2], KL, W1 on the grade axis
    (4, 0.2123341058, (-0.000252891, 0.006775551, 0.016244690), 2.1165087547, 1.6004657869),
    (16, 0.0536361606, (-7.386e-06, 5.60088e-05, 1.682962e-04), 1.3713366794, 0.7659561144),
    (1, 0.4965045731, (-0.100006552, -0.063588779, 0.181202470), 1.2024751139, 1.1996734118),
]


@pytest.mark.parametrize("rows, gaussian, gradient, kl_value, w1", GOLDEN)
def test_golden_values(rows: int, gaussian: float, gradient: tuple[float, ...], kl_value: float, w1: float) -> None:
    scores, labels = golden_batch(rows)
    loss = wasserstein_gaussian(scores, labels)
    loss.backward()
    assert loss.item() == pytest.approx(gaussian, abs=1e-9)
    assert scores.grad[0, :3].tolist() == pytest.approx(list(gradient), abs=1e-9)
    assert kl(scores, labels).item() == pytest.approx(kl_value, abs=1e-9)
    assert wasserstein_1d(scores, labels).item() == pytest.approx(w1, abs=1e-9)


def test_target_of_a_batch_of_sixteen() -> None:
    row = target_distribution(golden_batch(16)[1])[0]
    assert row[:6].tolist() == pytest.approx([0.22025, 0.08103, 0.02981, 0.01097, 0.01097, 0.01097], abs=5e-6)
    assert row.sum().item() == pytest.approx(1)


def test_single_row_gradient_is_that_of_the_squared_distance() -> None:
    # At B = 1 both covariances vanish: L = |P - T|^2, whose gradient is 2 P (D - P . D) with D = P - T.
    scores, labels = golden_batch(1)
    p, t = torch.softmax(scores.detach(), 1), torch.softmax(labels, 1)
    by_hand = 2 * p * ((p - t) - (p * (p - t)).sum())
    (gradient,) = torch.autograd.grad(wasserstein_gaussian(scores, labels), scores)
    torch.testing.assert_close(gradient, by_hand)


def test_expand_labels_against_a_slow_loop() -> None:
    labels = torch.tensor([[3, 2, 1], [0, 5, 1], [2, 2, 0]])
    slow = torch.zeros(3, 9, dtype=labels.dtype)
    for query in range(3):
        for rank in range(3):
            slow[query, query * 3 + rank] = labels[query, rank]
    assert torch.equal(expand_labels(labels), slow)
    with pytest.raises(ValueError, match=r"\(B, k\)"):
        expand_labels(torch.zeros(4))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("axis", ["grade", "gain"])
def test_order_one_equals_scipy(seed: int, axis: str) -> None:
    scores, labels = random_batch(seed)
    p, t = torch.softmax(scores / 0.7, 1).numpy(), torch.softmax(labels / 0.5, 1).numpy()
    x = labels.numpy() if axis == "grade" else 2 ** labels.numpy() - 1
    scipy_mean = np.mean([scipy.stats.wasserstein_distance(x[i], x[i], p[i], t[i]) for i in range(len(x))])
    assert wasserstein_1d(scores, labels, 0.7, 0.5, axis=axis).item() == pytest.approx(scipy_mean, rel=1e-12)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("axis", ["grade", "gain"])
def test_order_two_equals_optimal_transport(seed: int, axis: str) -> None:
    """The squared cost, minimised over all couplings by linear programming, knows nothing of quantiles."""
    scores, labels = random_batch(seed, rows=3)
    p, t = torch.softmax(scores, 1).numpy(), torch.softmax(labels, 1).numpy()
    x = labels.numpy() if axis == "grade" else 2 ** labels.numpy() - 1
    n, costs = x.shape[1], []
    marginals = np.vstack([np.kron(np.eye(n), np.ones(n)), np.kron(np.ones(n), np.eye(n))])
    for i in range(len(x)):
        cost = (x[i][:, None] - x[i][None, :]).ravel() ** 2
        best = scipy.optimize.linprog(cost, A_eq=marginals, b_eq=np.concatenate([p[i], t[i]]), method="highs")
        costs.append(best.fun)
    assert wasserstein_1d(scores, labels, order=2, axis=axis).item() == pytest.approx(np.mean(costs), abs=1e-8)


def test_gaussian_equals_matrix_square_root() -> None:
    """scipy's sqrtm of the covariances, on more rows than passages so that both have full rank."""
    rng = torch.Generator().manual_seed(3)
    scores = torch.randn(40, 6, generator=rng, dtype=torch.float64)
    labels = torch.randint(0, 4, (40, 6), generator=rng).double()
    p, t = torch.softmax(scores, 1).numpy(), torch.softmax(labels, 1).numpy()
    # Rows sum to 1, so both covariances are singular along (1, ..., 1); in the plane across it they have
    # full rank, and distances are the same there.
    plane = scipy.linalg.null_space(np.ones((1, 6)))  # (6, 5), orthonormal
    cov_p, cov_t = np.cov((p @ plane).T), np.cov((t @ plane).T)
    cross = np.trace(scipy.linalg.sqrtm(cov_p @ cov_t).real)
    expected = ((p.mean(0) - t.mean(0)) ** 2).sum() + np.trace(cov_p) + np.trace(cov_t) - 2 * cross
    # 35 of the 40 singular values are 0 here; the released code's rounding takes 2 * 3.2e-8 for each.
    assert wasserstein_gaussian(scores, labels).item() == pytest.approx(expected - 35 * 2 * 1e-15**0.5, abs=1e-8)


def test_gaussian_gradient_equals_eigenvalue_form() -> None:
    scores, labels = random_batch(5, rows=8)
    scores.requires_grad_()
    p, t = torch.softmax(scores, 1), torch.softmax(labels, 1)
    cov_p, cov_t = torch.cov(p.T), torch.cov(t.T)
    eigenvalues = torch.linalg.eigvals(cov_p @ cov_t).real
    cross = eigenvalues[eigenvalues > 1e-14].sqrt().sum()  # the rest is the null space of 8 rows in 32 dimensions
    slow = (p.mean(0) - t.mean(0)).square().sum() + cov_p.trace() + cov_t.trace() - 2 * cross
    (expected,) = torch.autograd.grad(slow, scores, retain_graph=True)
    (found,) = torch.autograd.grad(wasserstein_gaussian(scores, labels), scores)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-4)


def test_infonce_by_hand() -> None:
    scores = torch.tensor([[2.0, 1.0, 0.0, -1.0], [0.5, 0.0, 1.5, 1.0]], dtype=torch.float64)
    labels = torch.tensor([[3.0, 1.0, 0.0, 0.0], [0.0, 0.0, 1.0, 2.0]], dtype=torch.float64)
    rows = [scores[0, 0] - torch.logsumexp(scores[0], 0), scores[1, 3] - torch.logsumexp(scores[1], 0)]
    assert infonce(scores, labels).item() == pytest.approx(-sum(rows).item() / 2)
    rows = [scores[0, 0] - torch.logsumexp(scores[0, [0, 2, 3]], 0), scores[1, 3] - torch.logsumexp(scores[1, [0, 1, 3]], 0)]
    assert infonce(scores, labels, ignore_between=True).item() == pytest.approx(-sum(rows).item() / 2)
    # Equals cross entropy with the positive's column as class, at a temperature.
    expected = torch.nn.functional.cross_entropy(scores / 0.05, torch.tensor([0, 3]))
    assert infonce(scores, labels, temperature=0.05).item() == pytest.approx(expected.item())


def test_infonce_leaves_rows_without_a_positive_out() -> None:
    scores, labels = random_batch(1, rows=3)
    labels[1] = 0
    assert infonce(scores, labels).item() == pytest.approx(infonce(scores[[0, 2]], labels[[0, 2]]).item())


@pytest.mark.parametrize("name", LOSSES)
def test_gradcheck(name: str) -> None:
    scores, labels = random_batch(7, rows=3, scale=1.0)
    assert torch.autograd.gradcheck(lambda s: LOSSES[name](s, labels), scores.requires_grad_(), eps=1e-6, atol=1e-5)


batches = st.tuples(st.integers(0, 10_000), st.integers(1, 6), st.integers(1, 5), st.sampled_from([0.1, 1.0, 5.0]))


@pytest.mark.parametrize("name", LOSSES)
@settings(max_examples=40, deadline=None)
@given(batch=batches, shift=st.floats(-100, 100))
def test_shift_invariance_and_column_order(name: str, batch: tuple[int, int, int, float], shift: float) -> None:
    """A constant added to a row's scores changes nothing; nor does the order of the passages."""
    scores, labels = random_batch(*batch)
    loss = LOSSES[name](scores, labels)
    shifted = scores + shift * torch.arange(1, len(scores) + 1)[:, None]
    assert LOSSES[name](shifted, labels).item() == pytest.approx(loss.item(), abs=1e-6)
    order = torch.randperm(scores.shape[1], generator=torch.Generator().manual_seed(batch[0]))
    if "infonce" in name:  # ties in the grade go to the first passage, so order matters there; break them
        labels = labels + torch.linspace(0, 0.5, labels.shape[1], dtype=torch.float64) * (labels > 0)
        loss = LOSSES[name](scores, labels)
    assert LOSSES[name](scores[:, order], labels[:, order]).item() == pytest.approx(loss.item(), abs=1e-6)


@pytest.mark.parametrize("name", DISTANCES)
@settings(max_examples=40, deadline=None)
@given(batch=batches)
def test_distances_are_non_negative_and_zero_at_the_target(name: str, batch: tuple[int, int, int, float]) -> None:
    scores, labels = random_batch(*batch)
    assert DISTANCES[name](scores, labels).item() >= -1e-6
    perfect = labels.clone().requires_grad_()  # softmax(labels) is the target
    loss = DISTANCES[name](perfect, labels)
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-6)
    assert perfect.grad.abs().max().item() < 1e-6


@settings(max_examples=40, deadline=None)
@given(batch=batches)
def test_wasserstein_is_symmetric(batch: tuple[int, int, int, float]) -> None:
    """The Gaussian form swaps P and T by swapping its arguments; for the 1-D form scipy's argument order swaps."""
    scores, labels = random_batch(*batch)
    assert wasserstein_gaussian(scores, labels).item() == pytest.approx(wasserstein_gaussian(labels, scores).item(), abs=1e-9)
    p, t, x = torch.softmax(scores, 1).numpy(), torch.softmax(labels, 1).numpy(), labels.numpy()
    swapped = np.mean([scipy.stats.wasserstein_distance(x[i], x[i], t[i], p[i]) for i in range(len(x))])
    assert wasserstein_1d(scores, labels).item() == pytest.approx(swapped, abs=1e-9)


def test_row_permutation_hazard() -> None:
    """The Gaussian form cannot tell whose passages a query ranks first; the per-query losses can."""
    labels = golden_batch(4)[1]
    wrong = labels.roll(1, dims=0).clone().requires_grad_()  # query i asks for query i-1's passages
    loss = wasserstein_gaussian(wrong, labels)
    loss.backward()
    assert abs(loss.item()) < 1e-6 and wrong.grad.abs().max().item() < 1e-6
    assert kl(wrong, labels).item() > 0.5 and wasserstein_1d(wrong, labels).item() > 0.5


def test_hazard_size_in_a_batch_of_sixteen() -> None:
    labels = golden_batch(16)[1]
    assert kl(labels.roll(1, dims=0), labels).item() == pytest.approx(0.787, abs=5e-4)


def test_gaussian_loss_of_a_batch_is_not_the_mean_of_its_halves() -> None:
    scores, labels = golden_batch(4)
    halves = [wasserstein_gaussian(scores[rows], labels[rows]).item() for rows in (slice(0, 2), slice(2, 4))]
    assert abs(np.mean(halves) - wasserstein_gaussian(scores, labels).item()) > 0.01


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_extremes_are_finite(name: str, dtype: torch.dtype) -> None:
    base, labels = random_batch(2, rows=3, scale=1.0)
    cases = {
        "huge": torch.sign(base) * 1e4,
        "equal": torch.zeros_like(base),
        "opposite": torch.where(labels > 0, -1e4, 1e4),
    }
    for case, values in cases.items():
        for grades in (labels, torch.zeros_like(labels)):
            scores = values.to(dtype).requires_grad_()
            loss = LOSSES[name](scores, grades)
            loss.backward()
            assert loss.dtype in (dtype, torch.float32) and math.isfinite(loss.item()), (case, loss)
            assert torch.isfinite(scores.grad).all(), case


@pytest.mark.parametrize("name", LOSSES)
def test_one_query_one_passage(name: str) -> None:
    scores = torch.tensor([[0.3]], requires_grad=True)
    loss = LOSSES[name](scores, torch.tensor([[3.0]]))
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-6) and scores.grad.item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("name", LOSSES)
def test_masked_passages_do_not_count(name: str) -> None:
    """A padded column changes neither the value nor the other gradients, whatever its score and grade."""
    scores, labels = random_batch(11, rows=3, k=3)
    keep = torch.tensor([True, True, False, True, True, True, True, False, True])
    short = scores[:, keep].clone().requires_grad_()
    loss = LOSSES[name](short, labels[:, keep])
    loss.backward()
    padded, grades = scores.clone(), labels.clone()
    padded[:, ~keep], grades[:, ~keep] = 1e4, 9
    padded.requires_grad_()
    masked = LOSSES[name](padded, grades, mask=keep)
    masked.backward()
    assert masked.item() == pytest.approx(loss.item(), abs=1e-9)
    torch.testing.assert_close(padded.grad[:, keep], short.grad, atol=1e-9, rtol=1e-7)
    assert padded.grad[:, ~keep].abs().max().item() == 0


def test_bad_arguments_are_named() -> None:
    scores, labels = random_batch(0)
    for call, message in [
        (lambda: kl(scores, labels[:, :4]), "expand_labels"),
        (lambda: kl(scores, labels, temperature=0), "temperature"),
        (lambda: wasserstein_1d(scores, labels, order=3), "order"),
        (lambda: wasserstein_1d(scores, labels, axis="rank"), "axis"),
        (lambda: wasserstein_gaussian(scores, labels, mask=torch.zeros(scores.shape[1])), "mask"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()
