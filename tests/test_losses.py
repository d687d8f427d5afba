"""The losses against golden values, scipy, linear programming, differences and their own laws."""

import itertools
import math
from functools import partial

import numpy as np
import pandas as pd
import pytest
import scipy
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close

from repro.losses import LOSSES, expand_labels, fit_temperature, infonce, kl, target_distribution
from repro.losses import wasserstein_1d as spread
from repro.losses import wasserstein_gaussian as gaussian

merged = partial(spread, ties="merged")
every_form = pytest.mark.parametrize("loss", [*LOSSES.values(), merged])


def golden_batch(rows):
    """Scores s[i][j] = 2 sin(1.7 i + 0.9 j), grades 3, 2, 1, 0 block-diagonally."""
    angles = np.add.outer(1.7 * np.arange(rows), 0.9 * np.arange(4 * rows))
    grades = torch.tensor([[3.0, 2, 1, 0]] * rows)
    return torch.from_numpy(2 * np.sin(angles)), expand_labels(grades)


def random_batch(seed, rows=3, k=4):
    """Scores and labels, (rows, rows * k) each."""
    torch.manual_seed(seed)
    labels = expand_labels(torch.randint(4, (rows, k)).double())
    return 2 * torch.randn_like(labels), labels


def measured(loss, scores, *arguments, **options):
    """A loss and its gradient by the scores."""
    scores = scores.clone().requires_grad_()
    value = loss(scores, *arguments, **options)
    value.backward()
    return value, scores.grad


# Loss, lists, value, maybe the gradient by s[0][0], s[0][1], s[0][2].  Made independently: with the
# eigenvalue form of the released code, and with plain numpy.
GOLDEN = [
    (gaussian, 1, [0.4965045731, -0.100006552, -0.063588779, 0.181202470]),
    (gaussian, 4, [0.2123341058, -0.000252891, 0.006775551, 0.016244690]),
    (gaussian, 16, [0.0536361606, -7.386e-06, 5.60088e-05, 1.682962e-04]),
    (spread, 1, [1.1996734118, -0.112645577, -0.223509809, 0.135576881]),
    (spread, 4, [1.6942161781, -0.016466949, -0.047288523, -0.022968069]),
    (spread, 16, [0.9275773051, -0.001221079, -0.003779639, -0.002502509]),
    (kl, 1, [1.2024751139]),
    (kl, 4, [2.1165087547]),
    (kl, 16, [1.3713366794]),
    (merged, 1, [1.1996734118]),
    (merged, 4, [1.6004657869]),
    (merged, 16, [0.7659561144]),
]


@pytest.mark.parametrize("loss, rows, golden", GOLDEN)
def test_golden_values_and_gradients(loss, rows, golden):
    value, gradient = measured(loss, *golden_batch(rows))
    found = [value.item(), *gradient[0, :3].tolist()]
    assert found[: len(golden)] == pytest.approx(golden, rel=0, abs=1e-9)


def most_work(x, p, t):
    """The largest mean difference of a function that rises by at most 1 a grade: Kantorovich."""
    eye = np.eye(30)
    pairs = (eye[:, None] - eye).reshape(-1, 30)  # times f: all f_i - f_j
    return -scipy.optimize.linprog(t - p, pairs, abs(pairs @ x), bounds=(None, None)).fun


@pytest.mark.parametrize("loss, width", [(spread, 1), (merged, 0)])
def test_the_1d_form_is_the_distance_on_the_line(loss, width):
    """Passages of one grade lie evenly on `width` below it, best score first."""
    torch.manual_seed(0)
    grades = torch.randint(7, (30,)).double() / 2
    scores = torch.randn_like(grades).round()  # some are equal
    groups = pd.Series(-scores).groupby(grades.numpy())
    better = groups.rank("first") - 1
    x = grades.numpy() - width * better / groups.transform("size")
    p, t = scores.softmax(0).numpy(), grades.softmax(0).numpy()
    found = loss(scores[None], grades[None]).item()
    assert found == pytest.approx(scipy.stats.wasserstein_distance(x, x, p, t))
    assert found == pytest.approx(most_work(x, p, t))


@every_form
def test_gradients_are_those_of_finite_differences(loss):
    scores, labels = random_batch(7)
    torch.autograd.gradcheck(partial(loss, labels=labels), scores.requires_grad_(), atol=1e-5)


few = st.integers(1, 5)
batches = st.builds(random_batch, st.integers(0, 9999), few, few)
law = settings(max_examples=25, deadline=None)


@every_form
@law
@given(batches)
def test_neither_a_shift_of_a_query_s_scores_nor_the_order_changes_anything(loss, batch):
    scores, labels = batch
    if loss is infonce:  # it takes the first of equals
        labels = labels + 0.1 * torch.rand(labels.shape)
    shifted = scores + 50 * torch.arange(len(scores))[:, None]
    assert_close(loss(shifted.flip(1), labels.flip(1)), loss(scores, labels))


@pytest.mark.parametrize("loss", [gaussian, kl, merged, spread])
@law
@given(batches)
def test_a_distance_is_not_negative_and_0_at_the_target(loss, batch):
    scores, labels = batch
    value, gradient = measured(loss, labels, labels)
    assert loss(scores, labels) >= -1e-6
    assert value.abs() < 1e-6
    assert gradient.abs().max() < 1e-6


def test_the_gaussian_form_equals_the_matrix_square_root():
    torch.manual_seed(3)
    p, t = torch.randn(2, 40, 6).double().softmax(2)
    s_p, s_t = p.T.cov(), t.T.cov()
    root = scipy.linalg.sqrtm((s_p @ s_t).numpy())
    shift = (p - t).mean(0).square().sum()
    expected = shift + (s_p + s_t).trace() - 2 * root.trace().real
    assert_close(gaussian(p.log(), t.log()), expected, atol=1e-5, rtol=0)


def test_the_gaussian_form_does_not_see_whose_passages_a_query_ranks():
    _, labels = golden_batch(4)
    wrong = labels.roll(1, 0)  # each query asks for another's passages
    value, gradient = measured(gaussian, wrong, labels)
    assert value.abs() < 1e-6
    assert gradient.abs().max() < 1e-6
    assert spread(wrong, labels) > 0.5


# Mass moves to a lower grade, T one-hot; or from equals to one of them, T being where it was.
FAR = [3, 2, 1, 0], 0.01, [0.5, 0.3, 0.1, 0.1], [0.5, 0.1, 0.1, 0.3]
PILED = [3, 0, 0], 3 / math.log(3), [0.6, 0.2, 0.2], [0.6, 0.4, 0]
MOVES = [(kl, FAR, 0), (merged, FAR, 0.4), (merged, PILED, 0), (spread, PILED, 0.1)]


@pytest.mark.parametrize("loss, move, cost", MOVES)
def test_kl_is_blind_to_distance_and_merged_ties_to_a_favourite_among_equals(loss, move, cost):
    grades, heat, *masses = move
    labels = torch.tensor([grades])
    before, after = [loss(torch.tensor([p]).log(), labels, 1, heat).item() for p in masses]
    assert after - before == pytest.approx(cost, abs=1e-6)


def test_infonce_by_hand():
    scores = torch.randn(3, 3)
    labels = torch.tensor([[3, 1, 0], [0, 2, 2], [0, 0, 0]])
    positives = torch.tensor([0, 1, -100])  # the first of equals; the row of zeros is left out
    expected = nn.functional.cross_entropy(scores / 0.05, positives)
    assert_close(infonce(scores, labels, 0.05), expected)


PADDING = torch.arange(12) % 4 < 3  # the fourth of each list is not there
FORMATS = [torch.float32, torch.bfloat16]
EXTREMES = [*itertools.product(FORMATS, [0, 1e4], [0, 1], [1, 3], [None, PADDING])]


@every_form
@pytest.mark.parametrize("dtype, score, grade, rows, mask", EXTREMES)
def test_extremes_are_finite(loss, dtype, score, grade, rows, mask):
    scores, labels = [part[:rows] for part in random_batch(2)]
    extreme = score * scores.to(dtype)
    value, gradient = measured(loss, extreme, grade * labels, 0.01, mask=mask)
    assert value.isfinite()
    assert gradient.isfinite().all()
    assert value.dtype == torch.float32


@every_form
@pytest.mark.parametrize("grade", [-3, math.inf])
def test_a_mask_leaves_passages_out(loss, grade):
    scores, labels = random_batch(11)
    alone = measured(loss, scores[:, PADDING], labels[:, PADDING])
    padded = scores.where(PADDING, math.nan), labels.where(PADDING, grade)
    value, gradient = measured(loss, *padded, mask=PADDING)
    assert_close((value, gradient[:, PADDING]), alone)
    assert not gradient[:, ~PADDING].any()


@pytest.mark.parametrize("temperature", [0.05, 20])
def test_the_fitted_temperature_is_that_which_made_the_scores(temperature):
    _, labels = random_batch(0)
    scores = temperature * target_distribution(labels).log()
    batches = [(scores, labels), (scores.where(PADDING, 1e4), labels, PADDING)]
    assert fit_temperature(kl, batches) == pytest.approx(temperature, rel=2e-3)


def test_a_temperature_at_the_end_of_the_grid_is_said(capsys):
    _, labels = golden_batch(4)
    fit_temperature(infonce, [(labels, labels)])  # for perfect scores sharper is always better
    assert "an end of the grid" in capsys.readouterr().err


Y = torch.eye(4, 12)
BAD = [
    ("one shape", partial(kl, Y, Y[:3])),
    ("label_temperature: .* found 0$", partial(kl, Y, Y, 1, 0)),
    ("^ties: .* found 'even'$", partial(spread, Y, Y, ties="even")),
    ("^mask: .* without one$", partial(kl, Y, Y, mask=Y[0] > 1)),
    ("^labels: ", partial(expand_labels, Y[0])),
    ("found 0.0$", partial(fit_temperature, kl, [(Y - Y, Y)])),
]


@pytest.mark.parametrize("message, call", BAD)
def test_bad_arguments_are_refused(message, call):
    with pytest.raises(ValueError, match=message):
        call()
