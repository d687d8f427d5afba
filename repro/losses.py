"""List-wise losses of B queries against all N = B * k passages of a batch: (B, N), (B, N) -> a scalar.

Row i of the labels holds the grades of query i's own k passages, and 0 elsewhere (`expand_labels`).
    P = softmax(scores / temperature)           what the model believes, a distribution for each query
    T = softmax(labels / label_temperature)     what the grades ask for
The scalar has the dtype of the scores, float32 at least.  `mask`, (B, N) or (N,), is False at padding: no
mass, no gradient, whatever its score and grade.  `target_mask` is False where T is to be 0 while P and the
grade stay; with the mask of own passages T does not flatten as the batch grows.  ValueError: other shapes, a
temperature not positive and finite, a row without a passage.
"""

import math

import torch
from torch import Tensor

Mask = Tensor | None  # True where a passage is

def expand_labels(labels: Tensor) -> Tensor:
    """(B, k) -> (B, B * k) as in the released code: row i has grades in columns i*k ... i*k + k-1, else 0."""
    if labels.ndim != 2:
        raise ValueError(f"labels: expected a (B, k) matrix of grades, got shape {tuple(labels.shape)}")
    return torch.einsum("ij,ik->ijk", torch.eye(len(labels)).to(labels), labels).flatten(1)

def target_distribution(labels: Tensor, label_temperature: float = 1.0, mask: Mask = None) -> Tensor:
    """T = softmax(labels / label_temperature) along the passages: (B, N) -> (B, N), 0 where mask is False.

    Grade 0 keeps mass, so T flattens as N grows: with grades 3, 2, 1, 0 the best passage holds 0.64 alone and
    0.22 in a batch of 16 lists.  A small label temperature sharpens T."""
    return torch.softmax(_logits(labels, labels, 1.0, label_temperature, mask)[1], dim=1)

def infonce(scores: Tensor, labels: Tensor, temperature: float = 1.0, *, ignore_between: bool = False,
            mask: Mask = None) -> Tensor:
    """InfoNCE: -log P[positive], the mean over rows, in nats (van den Oord et al. 2018, arXiv 1807.03748).

    A row's positive is its highest-graded passage, the first of equals; `ignore_between` leaves those between
    it and grade 0 out of the softmax.  A row of grades 0 is left out of the mean; without a row it is 0."""
    x, _, grades = _logits(scores, labels, temperature, 1.0, mask)
    best, positive = grades.max(dim=1)  # (B,), (B,)
    if ignore_between:
        x = x.masked_fill((grades > 0) & (grades < best[:, None]), -math.inf)
    losses = torch.nn.functional.cross_entropy(x, positive, reduction="none")  # (B,)
    return losses.masked_fill(best <= 0, 0).sum() / (best > 0).sum().clamp(min=1)

def kl(scores: Tensor, labels: Tensor, temperature: float = 1.0, label_temperature: float = 1.0, *,
       mask: Mask = None, target_mask: Mask = None) -> Tensor:
    """KL(T || P) = sum_j T_j (log T_j - log P_j), the mean over rows, in nats; 0 exactly at P = T.

    ListNet's cross entropy (Cao et al. 2007) less the entropy of T.  It is blind to how far apart grades are:
    where T is the same on two passages, mass that sits wrongly on grade 2 or on grade 0 costs the same."""
    x, z, _ = _logits(scores, labels, temperature, label_temperature, mask, target_mask)
    log_p, log_t = torch.log_softmax(x, dim=1), torch.log_softmax(z, dim=1)  # (B, N), finite even for mass 0
    return (log_t.exp() * (log_t - log_p)).sum(dim=1).mean()

def wasserstein_1d(scores: Tensor, labels: Tensor, temperature: float = 1.0, label_temperature: float = 1.0,
        *, order: int = 1, axis: str = "grade", mask: Mask = None, target_mask: Mask = None) -> Tensor:
    """W_p^p between P and T on the line of grades, in closed form, the mean over rows.

    Put passage j at x_j = its grade (`axis="grade"`) or its gain 2^y - 1 (`axis="gain"`).  With g the gaps
    between the L places, from the highest down, and F and G the masses of P and T above each gap:
        order 1:  W_1   = sum_a g_a |F_a - G_a|
        order 2:  W_2^2 = sum_a g_a^2 |F_a - G_a| + 2 sum_{a<b} g_a g_b ([F_a - G_b]_+ + [G_a - F_b]_+)
    Order 1 equals `scipy.stats.wasserstein_distance(x, x, P, T)` (Vallender 1973).  Order 2 is under the
    quantile coupling (Dall'Aglio 1956), without the root, whose gradient is infinite at 0.  Units: grades (or
    gains), squared for order 2.  Where T is one-hot at grade 3, the highest, they are sum_j P_j (3 - y_j) and
    sum_j P_j (3 - y_j)^2: the grades act through the axis, not the target.  The blind spot: passages of one
    grade exchange mass freely."""
    if order not in (1, 2) or axis not in ("grade", "gain"):
        raise ValueError(f"expected order 1 or 2 and axis 'grade' or 'gain', got {order!r} and {axis!r}")
    x, z, grades = _logits(scores, labels, temperature, label_temperature, mask, target_mask)
    p, t, lowest = torch.softmax(x, dim=1), torch.softmax(z, dim=1), grades.min()  # (B, N), (B, N), ()
    # Most passages of a batch have the lowest grade; their mass lies above no gap, so the others are enough.
    row, column = (grades > lowest).nonzero(as_tuple=True)
    negative, slot = torch.cat([-grades[row, column], -lowest[None]]).unique(return_inverse=True)  # (L,)
    gaps = (negative if axis == "grade" else 1 - torch.exp2(-negative)).diff()  # (L-1,), downwards

    def above(mass: Tensor) -> Tensor:  # (B, N) -> (B, L-1), the mass above each gap
        at = mass.new_zeros(len(mass), len(gaps))
        return at.index_put((row, slot[:-1]), mass[row, column], accumulate=True).cumsum(dim=1)

    if order == 1:
        return (gaps * above(p - t).abs()).sum(dim=1).mean()
    f, g = above(p), above(t)
    ahead = (f[:, :, None] - g[:, None, :]).relu() + (g[:, :, None] - f[:, None, :]).relu()  # (B, L-1, L-1)
    across = (torch.outer(gaps, gaps).triu(1) * ahead).sum(dim=(1, 2))  # (B,), only a < b
    return ((gaps.square() * (f - g).abs()).sum(dim=1) + 2 * across).mean()

def wasserstein_gaussian(scores: Tensor, labels: Tensor, temperature: float = 1.0,
        label_temperature: float = 1.0, *, mask: Mask = None, target_mask: Mask = None) -> Tensor:
    """The released loss: squared 2-Wasserstein (Bures) distance of Gaussians fitted to the rows of P and T.

        L = |mu_P - mu_T|^2 + Tr S_P + Tr S_T - 2 Tr (S_P S_T)^(1/2)      in squared probabilities
    The B rows are samples of one N-dimensional Gaussian; covariances divide by B - 1 (by 1 at B = 1).  With
    A, C the centred rows of P, T, the cross term is the nuclear norm of A C^T / (B - 1), (B, B).  In float64;
    first derivatives only.  Permute the rows of P, so that each query ranks another's passages, and loss and
    gradient stay 0: only mean and covariance are seen.  Distributed training must gather the batch first."""
    x, z, _ = _logits(scores, labels, temperature, label_temperature, mask, target_mask)
    home = "cpu" if x.device.type == "mps" else x.device  # Apple's GPUs lack float64
    p, t = torch.softmax(x.to(home).double(), dim=1), torch.softmax(z.to(home).double(), dim=1)  # (B, N)
    with torch.no_grad():  # the derivative is written out, which is faster
        a, c, samples = p - p.mean(dim=0), t - t.mean(dim=0), max(len(p) - 1, 1)  # (B, N)
        shift, m = p.mean(dim=0) - t.mean(dim=0), a @ c.T / samples  # (N,), (B, B)
        # With V the eigenvectors of m m^T, V^T m has rows as long as m's singular values: fast, and as exact.
        v = torch.linalg.eigh(m @ m.T).eigenvectors if m.sum().isfinite() else m  # nan stays nan
        rows = v.T @ m
        # Where P has lost a direction the nuclear norm has a kink.  Rounded off as in the released code its
        # gradient is no noise there; the value moves by at most 6.4e-8 a query, maybe to just below 0.
        sigma = (rows.square().sum(dim=1) + 1e-15).sqrt()  # (B,)
        loss = shift.square().sum() + (a.square().sum() + c.square().sum()) / samples - 2 * sigma.sum()
        polar = v @ (rows / sigma[:, None])  # (B, B), the derivative of sigma.sum() by m
        slope = torch.addmm(a, polar, c, alpha=-1) * (2 / samples)  # (B, N), the derivative of the loss by P
        slope += 2 / len(p) * shift
    return (loss + (slope * (p - p.detach())).sum()).to(x.dtype).to(x.device)

LOSSES = {loss.__name__: loss for loss in (infonce, kl, wasserstein_1d, wasserstein_gaussian)}

def _logits(scores: Tensor, labels: Tensor, temperature: float, label_temperature: float, mask: Mask,
            target_mask: Mask = None) -> tuple[Tensor, Tensor, Tensor]:
    """What the softmaxes of P and T take, and the grades: (B, N) each.  Checks all that a loss is given."""
    shape, other = tuple(scores.shape), tuple(labels.shape)
    if len(shape) != 2 or shape != other or 0 in shape:
        raise ValueError(f"expected scores and expand_labels(labels) of one (B, N), got {shape} and {other}")
    for name, value in (("temperature", temperature), ("label_temperature", label_temperature)):
        if not 0 < value < math.inf:
            raise ValueError(f"{name}: expected a positive finite number, got {value!r}")
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))  # bfloat16 loses the small targets
    grades = labels.to(scores.dtype)
    divided = isinstance(temperature, Tensor) or temperature != 1  # by 1, only for a temperature that learns
    x = scores / temperature if divided else scores  # (B, N)
    z = grades / label_temperature if label_temperature != 1 else grades  # (B, N)
    nothing = torch.finfo(x.dtype).min  # exp gives exactly 0, and unlike -inf it leaves logarithms finite
    for name, given in (("mask", mask), ("target_mask", target_mask)):
        if given is not None:
            if given.shape not in (shape, shape[1:]):
                raise ValueError(f"{name}: expected shape {shape}, got {tuple(given.shape)}")
            z = z.masked_fill(~given.bool(), nothing)
            if name == "mask":
                x, grades = x.masked_fill(~given.bool(), nothing), grades.masked_fill(~given.bool(), 0)
            if (z == nothing).all(dim=1).any():
                raise ValueError(f"{name}: expected a real passage in every row, found a row without one")
    return x, z, grades
