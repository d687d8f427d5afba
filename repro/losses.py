"""List-wise losses of B queries against all N = B * k passages of a batch.

Scores (B, N) and labels (B, N) give a scalar.  Row i of the labels holds the grades of query i's
own k passages, and 0 elsewhere (`expand_labels`).

    P = softmax(scores / temperature)           what the model believes, one distribution a query
    T = softmax(labels / label_temperature)     what the grades ask for

The scalar has the dtype of the scores, float32 at least.  `mask`, (B, N) or (N,), is False at
padding: no mass, no gradient, whatever its score and grade.  ValueError: other shapes, a
temperature that is not positive and finite, a row without a passage.
"""

import math
import sys
from collections.abc import Callable, Iterable

import numpy as np
import torch
from scipy.optimize import minimize_scalar
from torch import Tensor

Mask = Tensor | None  # True where a passage is

# fit_temperature: a coarse grid in units of the scores' standard deviation.  Softer than 30 the
# softmax is all but flat, sharper than .03 all but one-hot.
COARSE = np.geomspace(0.03, 30, 25)


def expand_labels(labels: Tensor) -> Tensor:
    """(B, k) -> (B, B * k): row i has its grades in columns i*k ... i*k + k-1, else 0."""
    if labels.ndim != 2:
        shape = tuple(labels.shape)
        raise ValueError(f"labels: expected a (B, k) matrix of grades, got shape {shape}")
    return torch.einsum("ij,ik->ijk", torch.eye(len(labels)).to(labels), labels).flatten(1)


def target_distribution(
    labels: Tensor, label_temperature: float = 1.0, mask: Mask = None
) -> Tensor:
    """T = softmax(labels / label_temperature) along the passages: (B, N), 0 where mask is False.

    Grade 0 keeps mass, so T flattens as N grows: with grades 3, 2, 1, 0 the best passage holds
    0.64 alone and 0.22 in a batch of 16 lists.  A small label temperature sharpens T.
    """
    _, z, _ = _logits(labels, labels, 1.0, label_temperature, mask)
    return torch.softmax(z, dim=1)


def infonce(
    scores: Tensor, labels: Tensor, temperature: float = 1.0, *, mask: Mask = None
) -> Tensor:
    """InfoNCE: -log P[positive], the mean over rows, in nats.

    Van den Oord et al. 2018, arXiv 1807.03748.  A row's positive is its highest-graded passage,
    the first of equals; all others are equally wrong.  Gradient by a row's scores: (P - onehot) /
    temperature.  A row of grades 0 is left out of the mean; without any other row the loss is 0.
    """
    x, _, grades = _logits(scores, labels, temperature, 1.0, mask)
    best, positive = grades.max(dim=1)  # (B,), (B,)
    losses = torch.nn.functional.cross_entropy(x, positive, reduction="none")  # (B,)
    judged = best > 0
    return losses.masked_fill(~judged, 0).sum() / judged.sum().clamp(min=1)


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
    log_p = torch.log_softmax(x, dim=1)  # (B, N), finite even for mass 0
    log_t = torch.log_softmax(z, dim=1)
    return (log_t.exp() * (log_t - log_p)).sum(dim=1).mean()


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
    the signed length of line that mass at j has to travel.  ValueError for other ties.
    """
    if ties not in ("spread", "merged"):
        raise ValueError(f"ties: expected 'spread' or 'merged', got {ties!r}")
    x, z, grades = _logits(scores, labels, temperature, label_temperature, mask)
    surplus = torch.softmax(x, dim=1) - torch.softmax(z, dim=1)  # (B, N), P - T
    with torch.no_grad():
        order, places = _line(x, grades, spread=ties == "spread")
    above = surplus.gather(1, order).cumsum(dim=1)[:, :-1]  # (B, N-1), the surplus above each gap
    gaps = -places.diff(dim=1)
    return (gaps * above.abs()).sum(dim=1).mean()


def _line(x: Tensor, grades: Tensor, spread: bool) -> tuple[Tensor, Tensor]:
    """Passages from the top of the line down: their columns and their places, (B, N) each."""
    by_score = x.argsort(dim=1, descending=True, stable=True)
    by_grade = grades.gather(1, by_score).argsort(dim=1, descending=True, stable=True)
    order = by_score.gather(1, by_grade)
    places = grades.gather(1, order)  # descending; of equal grades the best score first
    if not spread:
        return order, places
    climbing = -places
    first = torch.searchsorted(climbing, climbing)  # (B, N), where a passage's grade begins
    last = torch.searchsorted(climbing, climbing, right=True)
    rank = torch.arange(places.shape[1], device=places.device) - first
    return order, places - rank.to(places) / (last - first)


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
    nuclear norm of A C^T / (B - 1), (B, B).  In float64.  Only mean and covariance are seen:
    permute the rows of P = T, so that each query ranks another's passages, and loss and gradient
    stay 0.  Distributed training must gather the batch first.
    """
    x, z, _ = _logits(scores, labels, temperature, label_temperature, mask)
    home = x.device
    if home.type == "mps":  # Apple's GPUs lack float64
        home = torch.device("cpu")
    p = torch.softmax(x.to(home).double(), dim=1)  # (B, N)
    t = torch.softmax(z.to(home).double(), dim=1)
    samples = max(len(p) - 1, 1)
    a = p - p.mean(dim=0)
    c = t - t.mean(dim=0)
    shift = (p.mean(dim=0) - t.mean(dim=0)).square().sum()
    spread = (a.square().sum() + c.square().sum()) / samples  # both traces
    cross = torch.nan_to_num(a @ c.T / samples)  # (B, B); a nan reaches the loss through shift
    sigma = torch.linalg.svdvals(cross)
    # Where P has lost a direction the nuclear norm has a kink.  Rounded off as in the released
    # code its gradient is no noise there; the value moves by at most 6.4e-8 a query, maybe to
    # just below 0.
    overlap = (sigma.square() + 1e-15).sqrt().sum()
    return (shift + spread - 2 * overlap).to(x.dtype).to(x.device)


LOSSES = {loss.__name__: loss for loss in (infonce, kl, wasserstein_1d, wasserstein_gaussian)}


def fit_temperature(loss: Callable[..., Tensor], batches: Iterable[tuple[Tensor, ...]]) -> float:
    """The temperature at which the batches' scores have the least mean loss.

    `loss(scores, labels, temperature=..., mask=...)`; a batch is (scores, labels) or (scores,
    labels, mask) of the untrained model on training lists: temperature scaling (Guo et al. 2017,
    arXiv 1706.04599) before training instead of after.  A log-spaced grid from .03 to 30 times
    the scores' standard deviation finds the valley, scipy's bounded search its bottom.  stderr
    says so if the best lies at an end of the grid.  ValueError: no batch, or scores all equal or
    not finite.
    """
    batches = [(*batch, None)[:3] for batch in batches]
    if not batches:
        raise ValueError("fit_temperature: expected at least one batch of scores, got none")
    real = [scores.detach()[_present(scores, mask)] for scores, _, mask in batches]
    deviation = torch.cat(real).double().std(correction=0).item()
    if not 0 < deviation < math.inf:
        raise ValueError(f"fit_temperature: the scores' deviation is {deviation}, not above 0")

    @torch.no_grad()
    def mean_loss(log_temperature: float) -> float:
        temperature = math.exp(log_temperature)
        values = [loss(s, y, temperature=temperature, mask=mask).item() for s, y, mask in batches]
        return sum(values) / len(values)

    grid = np.log(COARSE * deviation)
    values = [mean_loss(point) for point in grid]
    if not np.isfinite(values).all():
        raise ValueError("fit_temperature: the loss is not a finite number on these batches")
    best = int(np.argmin(values))
    if best in (0, len(grid) - 1):
        temperature = math.exp(grid[best])
        print(f"fit_temperature: the best, {temperature:.3g}, ends the grid", file=sys.stderr)
        return temperature
    bounds = (grid[best - 1], grid[best + 1])
    found = minimize_scalar(mean_loss, bounds=bounds, method="bounded", options={"xatol": 1e-3})
    return math.exp(found.x)


def _present(scores: Tensor, mask: Mask) -> Tensor:
    """(B, N) bool: where a passage is."""
    if mask is None:
        return torch.ones_like(scores, dtype=torch.bool)
    return mask.bool().expand_as(scores)


def _logits(
    scores: Tensor, labels: Tensor, temperature: float, label_temperature: float, mask: Mask
) -> tuple[Tensor, Tensor, Tensor]:
    """What the softmaxes of P and T take, and the grades: (B, N) each, of checked arguments."""
    shape, other = tuple(scores.shape), tuple(labels.shape)
    if len(shape) != 2 or shape != other or 0 in shape:
        expected = "scores and expand_labels(labels) of one shape (B, N)"
        raise ValueError(f"expected {expected}, got {shape} and {other}")
    for name, value in (("temperature", temperature), ("label_temperature", label_temperature)):
        if not 0 < value < math.inf:
            raise ValueError(f"{name}: expected a positive finite number, got {value!r}")
    # At least float32: bfloat16 loses small targets.
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    grades = labels.to(scores.dtype)
    x = scores / temperature
    z = grades / label_temperature
    if mask is None:
        return x, z, grades
    if mask.shape not in (shape, shape[1:]):
        raise ValueError(f"mask: expected shape {shape}, got {tuple(mask.shape)}")
    absent = ~_present(scores, mask)
    if absent.all(dim=1).any():
        raise ValueError("mask: expected a passage in every row, found a row without one")
    # Of this exp gives exactly 0, and unlike -inf it leaves logarithms finite.
    nothing = torch.finfo(x.dtype).min
    # Below every passage: padding shares no grade, and its place on the line costs nothing.
    lowest = grades.masked_fill(absent, 0).min() - 1
    return (
        x.masked_fill(absent, nothing),
        z.masked_fill(absent, nothing),
        grades.masked_fill(absent, lowest),
    )
