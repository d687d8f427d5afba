"""List-wise losses over a batch of queries and all the passages in the batch.

Every loss takes `scores (B, N)` and `labels (B, N)`: B queries against the N = B * k passages of the batch.
The labels are grades: row i holds those of query i's own k passages, and 0 elsewhere (`expand_labels`).

    P = softmax(scores / temperature)           what the model believes, a distribution for each query
    T = softmax(labels / label_temperature)     what the grades ask for

All are pure, differentiable in the scores, and return a scalar in their dtype, float32 at least.  `mask`
(B, N) or (N,) is False at padding: no mass, no gradient, whatever its score and grade.  `target_mask` is
False where T is to be 0 while P and the grade stay; with the mask of own passages T does not flatten as the
batch grows.  ValueError: other shapes, a temperature not positive and finite, a row in which none is True.
"""

import math

import torch
from torch import Tensor


def expand_labels(labels: Tensor) -> Tensor:
    """(B, k) -> (B, B * k) as in the released code: row i has grades in columns i*k ... i*k + k-1, else 0."""
    if labels.ndim != 2:
        raise ValueError(f"labels: expected a (B, k) matrix of grades, got shape {tuple(labels.shape)}")
    own = torch.eye(len(labels), dtype=labels.dtype, device=labels.device)  # (B, B)
    return torch.einsum("ij,ik->ijk", own, labels).flatten(1)  # (B, N)


def target_distribution(labels: Tensor, label_temperature: float = 1.0, mask: Tensor | None = None) -> Tensor:
    """T = softmax(labels / label_temperature) along the passages: (B, N) -> (B, N), 0 where mask is False.

    Grade 0 keeps mass too, so T flattens as N grows: with k = 4 and grades 3, 2, 1, 0 the best passage holds
    0.64 of the mass alone and 0.22 in a batch of 16 lists.  A small label temperature sharpens T.
    """
    rows = labels.reshape(-1, labels.shape[-1])
    return torch.softmax(_logits(rows, rows, 1.0, label_temperature, mask)[1], dim=1).reshape(labels.shape)


def infonce(scores: Tensor, labels: Tensor, temperature: float = 1.0, *,
            ignore_between: bool = False, mask: Tensor | None = None) -> Tensor:  # fmt: skip
    """InfoNCE: -log P[positive], the mean over rows, in nats (van den Oord et al. 2018, arXiv 1807.03748).

    The positive of a row is its highest-graded passage, the first if several share that grade; every other
    column is a negative.  With `ignore_between`, passages graded above 0 but below the positive are left out
    of the softmax instead of being pushed away.  A row whose grades are all 0 has no positive and is left
    out of the mean; if no row has one the loss is 0.
    """
    x, _, grades = _logits(scores, labels, temperature, 1.0, mask)
    best = grades.max(dim=1, keepdim=True)  # (B, 1)
    if ignore_between:
        x = x.masked_fill((grades > 0) & (grades < best.values), -math.inf)
    log_p = torch.log_softmax(x, dim=1).gather(1, best.indices)  # (B, 1)
    has_positive = best.values > 0
    return -torch.where(has_positive, log_p, 0).sum() / has_positive.sum().clamp(min=1).to(x.dtype)


def kl(scores: Tensor, labels: Tensor, temperature: float = 1.0, label_temperature: float = 1.0, *,
       mask: Tensor | None = None, target_mask: Tensor | None = None) -> Tensor:  # fmt: skip
    """KL(T || P) = sum_j T_j (log T_j - log P_j), the mean over rows, in nats; 0 exactly at P = T.

    ListNet's cross entropy (Cao et al. 2007) less the entropy of T.  It is blind to how far apart grades are:
    where T is the same on two passages, mass that sits wrongly on grade 2 or on grade 0 costs the same.
    """
    x, z, _ = _logits(scores, labels, temperature, label_temperature, mask, target_mask)
    log_p, log_t = torch.log_softmax(x, dim=1), torch.log_softmax(z, dim=1)  # (B, N), finite even for mass 0
    return (log_t.exp() * (log_t - log_p)).sum(dim=1).mean()


def wasserstein_1d(scores: Tensor, labels: Tensor, temperature: float = 1.0, label_temperature: float = 1.0,
                   *, order: int = 1, axis: str = "grade", mask: Tensor | None = None,
                   target_mask: Tensor | None = None) -> Tensor:  # fmt: skip
    """W_p^p between P and T on the line of grades, in closed form, the mean over rows.

    Put passage j at x_j = its grade (`axis="grade"`) or its gain 2^y - 1 (`axis="gain"`).  P and T are then
    two distributions on one line with L distinct places and gaps g between neighbours, counted from the
    highest place down.  With F and G the masses of P and T above each gap:

        order 1:  W_1   = sum_a g_a |F_a - G_a|
        order 2:  W_2^2 = sum_a g_a^2 |F_a - G_a| + 2 sum_{a<b} g_a g_b ([F_a - G_b]_+ + [G_a - F_b]_+)

    Order 1 equals `scipy.stats.wasserstein_distance(x, x, P, T)` (Vallender 1973).  Order 2 is the squared
    distance under the quantile coupling, its integral written out (Dall'Aglio 1956); not the root, whose
    gradient is infinite at 0.  Units: grades (or gains), for order 2 their squares.

    The one-hot limit: where T is one-hot at grade 3, the highest, order 1 is sum_j P_j (3 - y_j) and order 2
    sum_j P_j (3 - y_j)^2: the grades act through the axis, not through the target.  The blind spot: passages
    of one grade exchange mass freely.  The released code's loss is `wasserstein_gaussian`, not this one.
    """
    if order not in (1, 2) or axis not in ("grade", "gain"):
        raise ValueError(f"expected order 1 or 2 and axis 'grade' or 'gain', got {order!r} and {axis!r}")
    x, z, grades = _logits(scores, labels, temperature, label_temperature, mask, target_mask)
    p, t = torch.softmax(x, dim=1), torch.softmax(z, dim=1)  # (B, N)
    # Most passages of a batch have the lowest grade; their mass lies above no gap, so the others are enough.
    lowest = grades.min()
    row, column = (grades > lowest).nonzero(as_tuple=True)
    negative, slot = (-grades[row, column]).unique(return_inverse=True)  # from the highest grade down
    places = torch.cat([-negative, lowest[None]])  # (L,)
    gaps = -(places if axis == "grade" else torch.exp2(places) - 1).diff()  # (L-1,)

    def above(mass: Tensor) -> Tensor:  # (B, N) -> (B, L-1), the mass above each gap
        at = mass.new_zeros(len(mass), len(gaps)).index_put((row, slot), mass[row, column], accumulate=True)
        return at.cumsum(dim=1)

    if order == 1:
        return (gaps * above(p - t).abs()).sum(dim=1).mean()
    f, g = above(p), above(t)
    ahead = (f[:, :, None] - g[:, None, :]).relu() + (g[:, :, None] - f[:, None, :]).relu()  # (B, L-1, L-1)
    across = (torch.outer(gaps, gaps).triu(1) * ahead).sum(dim=(1, 2))  # (B,), only a < b
    return ((gaps.square() * (f - g).abs()).sum(dim=1) + 2 * across).mean()


def wasserstein_gaussian(scores: Tensor, labels: Tensor, temperature: float = 1.0,
                         label_temperature: float = 1.0, *, mask: Tensor | None = None,
                         target_mask: Tensor | None = None) -> Tensor:  # fmt: skip
    """Squared 2-Wasserstein (Bures) distance between Gaussians fitted to the rows of P and of T.

        L = |mu_P - mu_T|^2 + Tr S_P + Tr S_T - 2 Tr (S_P S_T)^(1/2)      in squared probabilities

    The loss of the released code.  The B rows count as B samples of one N-dimensional Gaussian; covariances
    divide by B - 1 (by 1 at B = 1).  With A, C the centred rows of P, T, the cross term is the nuclear norm
    of A C^T / (B - 1), a (B, B) matrix.  Computed in float64; first derivatives only.

    It sees a batch only through its mean and covariance.  Permute the rows of P, so that each query ranks
    another query's passages, and the loss stays 0, with gradient 0.  The loss of a batch is not the mean of
    the losses of its halves, so distributed training must gather the batch first.
    """
    x, z, _ = _logits(scores, labels, temperature, label_temperature, mask, target_mask)
    home = "cpu" if x.device.type == "mps" else x.device  # Apple's GPUs lack float64
    p, t = torch.softmax(x.to(home).double(), dim=1), torch.softmax(z.to(home).double(), dim=1)  # (B, N)
    with torch.no_grad():  # the derivative is written out, which is faster
        a, c, samples = p - p.mean(dim=0), t - t.mean(dim=0), max(len(p) - 1, 1)  # (B, N)
        shift, m = p.mean(dim=0) - t.mean(dim=0), a @ c.T / samples  # (N,), (B, B)
        # With V the eigenvectors of m m^T, V^T m has rows as long as the singular values of m: faster than
        # their own decomposition and as exact, which roots of eigenvalues are not.
        gram = m @ m.T
        v = torch.linalg.eigh(gram).eigenvectors if gram.sum().isfinite() else gram  # nan stays nan
        rows = v.T @ m
        # Where P has lost a direction the nuclear norm has a kink.  Rounded off as in the released code its
        # gradient is no noise there; the value moves by at most 6.4e-8 a query, maybe to just below 0.
        sigma = (rows.square().sum(dim=1) + 1e-15).sqrt()  # (B,)
        loss = shift.square().sum() + (a.square().sum() + c.square().sum()) / samples - 2 * sigma.sum()
        polar = v @ (rows / sigma[:, None])  # (B, B), the derivative of sigma.sum() by m
        slope = 2 * shift / len(p) + 2 * (a - polar @ c) / samples  # (B, N), the derivative of the loss by P
    return (loss + (slope * (p - p.detach())).sum()).to(x.dtype).to(x.device)


LOSSES = {loss.__name__: loss for loss in (infonce, kl, wasserstein_1d, wasserstein_gaussian)}


def _logits(scores: Tensor, labels: Tensor, temperature: float, label_temperature: float, mask: Tensor | None,
            target_mask: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """What the softmaxes of P and T take, and the grades: (B, N) each.  Checks all that a loss is given."""
    shape, other = tuple(scores.shape), tuple(labels.shape)
    if len(shape) != 2 or shape != other or 0 in shape:
        raise ValueError(
            f"expected scores and labels, as of expand_labels, of one shape (B, N), got {shape} and {other}"
        )
    for name, value in (("temperature", temperature), ("label_temperature", label_temperature)):
        if not 0 < value < math.inf:
            raise ValueError(f"{name}: expected a positive finite number, got {value!r}")
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))  # bfloat16 loses the small targets
    grades = labels.to(scores.dtype)
    x, z = scores / temperature, grades / label_temperature
    nothing = torch.finfo(x.dtype).min  # exp gives exactly 0, and unlike -inf it leaves logarithms finite
    for name, given in (("mask", mask), ("target_mask", target_mask)):
        if given is not None:
            if given.shape not in (shape, shape[1:]):
                raise ValueError(f"{name}: expected shape {shape}, got {tuple(given.shape)}")
            off = ~given.to(torch.bool)
            z = z.masked_fill(off, nothing)
            if name == "mask":
                x, grades = x.masked_fill(off, nothing), grades.masked_fill(off, 0)
            if (z == nothing).all(dim=1).any():
                raise ValueError(f"{name}: expected a real passage in every row, found a row without one")
    return x, z, grades
