"""List-wise losses of B queries against all N = B * k passages of a batch.

Scores (B, N) and labels (B, N) give a scalar.  Row i of the labels holds the grades of query i's
own k passages, and 0 elsewhere (`expand_labels`).

    P = softmax(scores / temperature)           what the model believes, one distribution a query
    T = softmax(labels / label_temperature)     what the grades ask for

The scalar has the dtype of the scores, float32 at least.  `mask`, (B, N) or (N,), is False at
padding: no mass, no gradient, whatever its score and grade.  ValueError: scores and labels of other
shapes, a temperature that is not positive and finite, a row without a passage.
"""

import math
import sys
from collections.abc import Callable, Iterable

import numpy as np
import torch
from scipy.optimize import minimize_scalar
from torch import Tensor

Mask = Tensor | None  # True where a passage is


def expand_labels(labels: Tensor) -> Tensor:
    """(B, k) -> (B, B * k): row i has its grades in columns i*k ... i*k + k-1, else 0.

    ValueError for labels of another shape.
    """
    if labels.ndim != 2:
        raise ValueError(f"labels: expected a (B, k) matrix of grades, found {tuple(labels.shape)}")
    return torch.block_diag(*labels)


def target_distribution(
    labels: Tensor, label_temperature: float = 1.0, mask: Mask = None
) -> Tensor:
    """T = softmax(labels / label_temperature) along the passages: (B, N), 0 where mask is False.

    Grade 0 keeps mass, so T flattens as N grows: with grades 3, 2, 1, 0 the best passage holds
    0.64 alone and 0.22 in a batch of 16 lists.  A small label temperature sharpens T.
    """
    _, z, _ = _logits(labels, labels, 1.0, label_temperature, mask)
    return z.softmax(1)


def infonce(
    scores: Tensor, labels: Tensor, temperature: float = 1.0, *, mask: Mask = None
) -> Tensor:
    """InfoNCE: -log P[positive], the mean over rows, in nats.

    Van den Oord et al. 2018, arXiv 1807.03748.  A row's positive is its highest-graded passage,
    the first of equals; all others are equally wrong.  Gradient by a row's scores: (P - onehot) /
    temperature.  A row of grades 0 is left out of the mean; without any other row the loss is 0.
    """
    x, grades, _ = _logits(scores, labels, temperature, 1.0, mask)
    best, positive = grades.max(1)  # (B,), (B,)
    losses = torch.nn.functional.cross_entropy(x, positive, reduction="none")  # (B,)
    judged = best > 0
    return (losses * judged).sum() / judged.sum().clamp(min=1)


def kl(
    scores: Tensor,
    labels: Tensor,
    temperature: float = 1.0,
    label_temperature: float = 1.0,
    *,
    mask: Mask = None,
) -> Tensor:
    """KL(T || P) = sum_j T_j (log T_j - log P_j), the mean over rows, in nats.

    0 exactly at P = T.  ListNet's cross entropy (Cao et al. 2007) less the entropy of T.
    Gradient by a row's scores: (P - T) / temperature.  It is blind to how far apart grades are:
    where T is the same on two passages, mass that sits wrongly on grade 2 or on grade 0 costs the
    same.
    """
    x, z, _ = _logits(scores, labels, temperature, label_temperature, mask)
    log_p = x.log_softmax(1)  # (B, N), finite even for mass 0
    log_t = z.log_softmax(1)
    return (log_t.exp() * (log_t - log_p)).sum(1).mean()


def wasserstein_1d(
    scores: Tensor,
    labels: Tensor,
    temperature: float = 1.0,
    label_temperature: float = 1.0,
    *,
    ties: str = "spread",
    mask: Mask = None,
) -> Tensor:
    """W_1 between P and T on a line where every passage has its place x_j, in grades.

        W_1 = sum_a gap_a |F_a|,  F_a the mass of P - T on the places above gap a

    The mean over rows of `scipy.stats.wasserstein_distance(x, x, P, T)`, in closed form
    (Vallender 1973).  Where the passages of one grade lie:

    - ties="merged": x_j = y_j, the grade.  They exchange mass freely, so a confident mistake
      among the many passages of grade 0 costs nothing: the blind spot.
    - ties="spread": x_j = y_j - r_j / n, where r_j = 0 ... n-1 is the rank by score among the n
      passages of the row with grade y_j.  They lie evenly on the unit below it, the model's
      favourites on top, so a wrong favourite has to travel.  No gradient through the places.

    0 exactly at P = T.  Gradient by a row's scores: P_j (c_j - sum P c) / temperature, with c_j
    what mass at j adds to the work, up to a constant.  ValueError for other ties.
    """
    if ties not in ("spread", "merged"):
        raise ValueError(f"ties: expected spread or merged, found {ties!r}")
    x, z, grades = _logits(scores, labels, temperature, label_temperature, mask)
    # The passages from the top of the line down; of equal grades the best score first.
    by_score = x.argsort(descending=True, stable=True)
    depth, order = (-grades).gather(1, by_score).sort(stable=True)
    if ties == "spread":
        first = torch.searchsorted(depth, depth)  # (B, N), where a passage's grade begins
        last = torch.searchsorted(depth, depth, right=True)
        rank = torch.arange(x.shape[1]).to(depth) - first
        depth = depth + rank / (last - first)
        depth, again = depth.sort(stable=True)  # grades less than 1 apart share a unit
        order = order.gather(1, again)
    order = by_score.gather(1, order)  # (B, N), their columns
    surplus = x.softmax(1) - z.softmax(1)  # (B, N), P - T
    above = surplus.gather(1, order).cumsum(1)[:, :-1]  # (B, N-1), the surplus above each gap
    return (depth.diff() * above.abs()).sum(1).mean()


def wasserstein_gaussian(
    scores: Tensor,
    labels: Tensor,
    temperature: float = 1.0,
    label_temperature: float = 1.0,
    *,
    mask: Mask = None,
) -> Tensor:
    """The released loss: squared 2-Wasserstein (Bures) distance of two fitted Gaussians.

        L = |mu_P - mu_T|^2 + Tr S_P + Tr S_T - 2 Tr (S_P S_T)^(1/2)      in squared probabilities

    The B rows of P are samples of one N-dimensional Gaussian, those of T of another; covariances
    divide by B - 1 (by 1 at B = 1).  With A, C the centred rows of P, T, the cross term is the
    nuclear norm of A C^T / (B - 1), (B, B).  In float64 on the CPU, where the value stays, as
    Apple's GPUs lack it.  Only mean and covariance are seen: permute the rows of P = T, so that
    each query ranks another's passages, and loss and gradient stay 0.  Distributed
    training must gather the batch first.  From the released code (`ws2`; arXiv 2503.23239).
    """
    x, z, _ = _logits(scores, labels, temperature, label_temperature, mask)
    p = x.cpu().double().softmax(1)  # (B, N)
    t = z.cpu().double().softmax(1)
    samples = max(len(p) - 1, 1)
    a = p - p.mean(0)
    c = t - t.mean(0)
    shift = (p.mean(0) - t.mean(0)).square().sum()
    spread = (a.square().sum() + c.square().sum()) / samples  # both traces
    cross = torch.nan_to_num(a @ c.T / samples)  # (B, B); a nan reaches the loss through shift
    # Where P has lost a direction the nuclear norm has a kink.  Rounded off as in the released
    # code its gradient is no noise there; the value moves by at most 6.4e-8 a query, maybe to
    # just below 0.
    overlap = (torch.linalg.svdvals(cross).square() + 1e-15).sqrt().sum()
    return (shift + spread - 2 * overlap).to(x.dtype)


LOSSES = {
    "infonce": infonce,
    "kl": kl,
    "wasserstein_1d": wasserstein_1d,
    "wasserstein_gaussian": wasserstein_gaussian,
}


def fit_temperature(loss: Callable, batches: Iterable) -> float:
    """The temperature at which the batches' scores have the least mean loss.

    `loss(scores, labels, temperature=..., mask=...)`; a batch is (scores, labels) or (scores,
    labels, mask) of the untrained model on training lists: temperature scaling (Guo et al. 2017,
    arXiv 1706.04599) before training instead of after.  A log-spaced grid from .03 to 30 times
    the scores' standard deviation finds the valley, scipy's bounded search its bottom.  stderr
    says so if the best lies at an end of the grid.  ValueError: scores all equal, or not
    finite.
    """
    batches = [(*batch, torch.ones_like(batch[0]))[:3] for batch in batches]
    real = [scores.masked_select(mask.bool()) for scores, _, mask in batches]
    deviation = torch.cat(real).cpu().double().std(correction=0).item()
    if not 0 < deviation < math.inf:
        raise ValueError(f"fit_temperature: expected a deviation above 0, found {deviation}")

    def mean_loss(log_temperature: float) -> float:
        temperature = math.exp(log_temperature)
        values = [loss(s, y, temperature=temperature, mask=mask).item() for s, y, mask in batches]
        return sum(values) / len(values)

    # Softer than 30 the softmax is all but flat, sharper than .03 all but one-hot.
    grid = np.log(np.geomspace(0.03, 30, 25) * deviation)
    best = np.argmin([mean_loss(point) for point in grid])
    if best in (0, len(grid) - 1):
        print("fit_temperature: the best lies at an end of the grid", file=sys.stderr)
        return math.exp(grid[best])
    bounds = grid[[best - 1, best + 1]]
    return math.exp(minimize_scalar(mean_loss, bounds=bounds, options={"xatol": 1e-3}).x)


def _logits(
    scores: Tensor, labels: Tensor, temperature: float, label_temperature: float, mask: Mask
) -> tuple:
    """What the softmaxes of P and T take, and the grades: (B, N) each, of checked arguments."""
    if scores.ndim != 2 or scores.shape != labels.shape:
        raise ValueError(
            "scores and expand_labels(labels): expected one shape, "
            f"found {tuple(scores.shape)} and {tuple(labels.shape)}"
        )
    for value in (temperature, label_temperature):
        if not 0 < value < math.inf:
            raise ValueError(
                f"temperature, label_temperature: expected above 0 and finite, found {value!r}"
            )
    # At least float32: bfloat16 loses small targets.
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    grades = labels.to(scores)
    x = scores / temperature
    z = grades / label_temperature
    if mask is None:
        return x, z, grades
    absent = ~mask.bool().expand_as(scores)
    if absent.all(1).any():
        raise ValueError("mask: expected a passage in every row, found a row without one")
    nothing = -1e38  # its exp is exactly 0, and unlike -inf it leaves logarithms finite
    x = x.masked_fill(absent, nothing)
    z = z.masked_fill(absent, nothing)
    # Below every passage: padding shares no grade, and its place on the line costs nothing.
    lowest = grades.masked_fill(absent, 0).min() - 1
    return x, z, grades.masked_fill(absent, lowest)
