"""List-wise losses over a batch of queries and all the passages in the batch.

Every loss takes `scores (B, N)` and `labels (B, N)`: B queries against the N = B * k passages of
the whole batch.  The labels are grades: row i holds the grades of query i's own k passages, and 0
for every passage that came with another query (`expand_labels` lays them out).  With temperature t

    P = softmax(scores / t)      what the model believes, one distribution over passages a query
    T = softmax(labels / u)      what the grades ask for, u being the label temperature

InfoNCE looks at one positive.  KL and the 1-D Wasserstein loss compare P with T query by query.
The Gaussian Wasserstein loss of SyCL compares the two batches of rows through their mean and
covariance only; its docstring names what that leaves out.

All functions are pure, differentiable, and return a scalar in the dtype of the scores.
"""

import math

import torch
from torch import Tensor


def expand_labels(labels: Tensor) -> Tensor:
    """Lay the grades of B lists out block-diagonally: (B, k) -> (B, B * k).

    Passages are query-major: query i owns the columns i*k ... i*k + k-1; every other passage of the
    batch gets grade 0 in row i (Section 3 of the paper: in-batch passages count as irrelevant).
    """
    if labels.ndim != 2:
        raise ValueError(f"labels: expected a (B, k) matrix of grades, got shape {tuple(labels.shape)}")
    rows, k = labels.shape
    own = torch.eye(rows, dtype=labels.dtype, device=labels.device)  # (B, B)
    return torch.einsum("ij,ik->ijk", own, labels).reshape(rows, rows * k)  # (B, N)


def target_distribution(labels: Tensor, label_temperature: float = 1.0, mask: Tensor | None = None) -> Tensor:
    """T = softmax(labels / label_temperature) along the passages: (B, N) -> (B, N).

    Every passage keeps some mass, also the ones of grade 0, so T gets flatter as N grows: with
    k = 4 and grades 3, 2, 1, 0 the best passage holds 0.64 of the mass alone, 0.22 in a batch of 16.
    A small label temperature sharpens T.
    """
    return _log_softmax(_as_float(labels), label_temperature, mask).exp()


def infonce(
    scores: Tensor,
    labels: Tensor,
    temperature: float = 1.0,
    *,
    ignore_between: bool = False,
    mask: Tensor | None = None,
) -> Tensor:
    """InfoNCE: -log P[positive], the mean over rows (van den Oord et al. 2018, arXiv 1807.03748).

    The positive of a row is its highest-graded passage, the first one if several share that grade;
    every other column is a negative.  With `ignore_between` the passages graded above 0 but below
    the positive are left out of the softmax instead of being pushed away.  A row whose grades are
    all 0 has no positive and is left out of the mean; if no row has one the loss is 0.
    """
    scores, labels, mask = _checked(scores, labels, mask)
    graded = labels if mask is None else labels.masked_fill(~mask, 0)
    best = graded.max(dim=1, keepdim=True)  # (B, 1)
    if ignore_between:
        between = (graded > 0) & (graded < best.values)
        mask = ~between if mask is None else mask & ~between
    log_p = _log_softmax(scores, temperature, mask).gather(1, best.indices).squeeze(1)  # (B,)
    has_positive = (best.values > 0).squeeze(1)
    return -(torch.where(has_positive, log_p, 0).sum() / has_positive.sum().clamp(min=1)).to(scores.dtype)


def kl(
    scores: Tensor,
    labels: Tensor,
    temperature: float = 1.0,
    label_temperature: float = 1.0,
    *,
    mask: Tensor | None = None,
) -> Tensor:
    """KL(T || P) = sum_j T_j (log T_j - log P_j), the mean over rows: ListNet with SyCL's target.

    The paper's list-wise baseline (its ablation of the loss).  Zero exactly at P = T.
    """
    scores, labels, mask = _checked(scores, labels, mask)
    log_p = _log_softmax(scores, temperature, mask)  # (B, N)
    log_t = _log_softmax(labels, label_temperature, mask)
    t = log_t.exp()
    if mask is not None:  # a padded passage has t = 0, and 0 * (-inf - -inf) would be nan
        log_p, log_t = log_p.masked_fill(~mask, 0), log_t.masked_fill(~mask, 0)
    return (t * (log_t - log_p)).sum(dim=1).mean()


def wasserstein_1d(
    scores: Tensor,
    labels: Tensor,
    temperature: float = 1.0,
    label_temperature: float = 1.0,
    *,
    order: int = 1,
    axis: str = "grade",
    mask: Tensor | None = None,
) -> Tensor:
    """W_p^p between P and T on the line of grades, in closed form, the mean over rows.

    Put passage j at x_j = its grade (`axis="grade"`) or its gain 2^y - 1 (`axis="gain"`).  P and T
    are then two distributions on one line with L distinct positions and gaps g between neighbours.
    With F and G their cumulative masses at the left end of each gap:

        order 1:  W_1   = sum_a g_a |F_a - G_a|
        order 2:  W_2^2 = sum_a g_a^2 |F_a - G_a|
                          + 2 sum_{a<b} g_a g_b ([F_a - G_b]_+ + [G_a - F_b]_+)

    Order 1 equals `scipy.stats.wasserstein_distance(x, x, P, T)`.  Order 2 is the squared distance
    under the quantile coupling, with the integral over quantiles written out (Vallender 1973 for
    p = 1, Dall'Aglio 1956 for p = 2); note that it is W_2^2, not its root, whose gradient is
    infinite at 0.  Units: grades (or gains) for order 1, their squares for order 2.  Two passages
    of the same grade can exchange mass freely: the loss sees grades, not passages.  This is the
    kit's own reading of "closed form"; the released code uses `wasserstein_gaussian`.
    """
    if order not in (1, 2):
        raise ValueError(f"order: expected 1 or 2, got {order!r}")
    if axis not in ("grade", "gain"):
        raise ValueError(f"axis: expected 'grade' or 'gain', got {axis!r}")
    scores, labels, mask = _checked(scores, labels, mask)
    p = _log_softmax(scores, temperature, mask).exp()  # (B, N)
    t = _log_softmax(labels, label_temperature, mask).exp()
    positions, slot = (labels if axis == "grade" else torch.exp2(labels) - 1).unique(return_inverse=True)  # (L,)
    gaps = positions.diff()  # (L-1,)
    zero = p.new_zeros(len(p), len(positions))
    cdf_p = zero.scatter_add(1, slot, p).cumsum(dim=1)[:, :-1]  # (B, L-1), mass at or below each position
    cdf_t = zero.scatter_add(1, slot, t).cumsum(dim=1)[:, :-1]
    if order == 1:
        return (gaps * (cdf_p - cdf_t).abs()).sum(dim=1).mean()
    same_gap = (gaps**2 * (cdf_p - cdf_t).abs()).sum(dim=1)  # (B,)
    ahead = (cdf_p[:, :, None] - cdf_t[:, None, :]).relu() + (cdf_t[:, :, None] - cdf_p[:, None, :]).relu()
    across = (torch.outer(gaps, gaps).triu(1) * ahead).sum(dim=(1, 2))  # (B,), only a < b
    return (same_gap + 2 * across).mean()


def wasserstein_gaussian(
    scores: Tensor,
    labels: Tensor,
    temperature: float = 1.0,
    label_temperature: float = 1.0,
    *,
    mask: Tensor | None = None,
) -> Tensor:
    """Squared 2-Wasserstein (Bures) distance between Gaussians fitted to the rows of P and of T.

        L = |mu_P - mu_T|^2 + Tr S_P + Tr S_T - 2 Tr (S_P S_T)^(1/2)

    The B rows count as B samples of one N-dimensional Gaussian; covariances divide by B - 1 (by 1
    at B = 1).  This is the loss of the released code (Section 3 of the paper; Gelbrich 1990).  With
    A, C the centred rows of P, T over sqrt(B - 1), the cross term is the nuclear norm of A C^T, a
    (B, B) matrix instead of an (N, N) root: real, symmetric and fast.  Computed in float64.

    It sees a batch only through its mean and covariance.  Permute the rows of P, so that each query
    ranks another query's passages, and the loss stays 0; the loss of a batch is not the mean of the
    losses of its halves.  Distributed training must therefore gather the batch first.
    """
    dtype = scores.dtype
    scores, labels, mask = _checked(scores, labels, mask)
    # Only Apple's MPS lacks float64; the float32 value there is good to about 1e-5.
    exact = torch.float32 if scores.device.type == "mps" else torch.float64
    p = _log_softmax(scores.to(exact), temperature, mask).exp()  # (B, N)
    t = _log_softmax(labels.to(exact), label_temperature, mask).exp()
    scale = math.sqrt(max(len(p) - 1, 1))
    mean_p, mean_t = p.mean(dim=0), t.mean(dim=0)  # (N,)
    a, c = (p - mean_p) / scale, (t - mean_t) / scale  # (B, N)
    # Where P has (nearly) lost a direction the nuclear norm has a kink and its gradient there is
    # noise.  Rounding the kink off as the released code does, sqrt(sigma^2 + 1e-15), keeps the
    # gradient tame and moves the value by at most 3e-8 a query, which may take it just below 0.
    cross = (torch.linalg.svdvals(a @ c.T).square() + 1e-15).sqrt().sum()
    loss = (mean_p - mean_t).square().sum() + a.square().sum() + c.square().sum() - 2 * cross
    return loss.to(dtype)


def _checked(scores: Tensor, labels: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Same-shape float scores and labels, at least float32 (bf16 softmax sums lose the small targets)."""
    if scores.ndim != 2 or scores.shape != labels.shape:
        raise ValueError(
            f"expected scores and labels of one shape (B, N), got {tuple(scores.shape)} and "
            f"{tuple(labels.shape)}; expand_labels turns (B, k) grades into (B, N)"
        )
    if mask is not None:
        mask = mask.to(torch.bool).expand(scores.shape)
        if not mask.any(dim=1).all():
            raise ValueError("mask: expected at least one real passage in every row, found a row of padding only")
    scores = _as_float(scores)
    return scores, labels.to(scores.dtype), mask


def _as_float(values: Tensor) -> Tensor:
    return values if values.dtype in (torch.float32, torch.float64) else values.float()


def _log_softmax(values: Tensor, temperature: float, mask: Tensor | None) -> Tensor:
    """log softmax(values / temperature) over the passages; padded ones get -inf, that is mass 0."""
    if not temperature > 0:
        raise ValueError(f"temperature: expected a positive number, got {temperature!r}")
    if mask is not None:
        values = values.masked_fill(~mask, -math.inf)
    return torch.log_softmax(values / temperature, dim=-1)
