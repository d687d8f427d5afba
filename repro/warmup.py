"""Make a retriever out of a language model's lower layers without any relevance label.

Three steps, each on mean vectors that are computed once: weights that make rare tokens count more, a
soft whitening that evens out the few directions which all texts share, and a short training of that
linear map in which a few words cut out of a passage must find the passage again (the inverse cloze
task, as in Contriever's making).  The result is where every trained arm starts.
"""

import random
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from repro.losses import infonce

SIF_A = 1e-4  # the usual constant of inverse frequency weights
SOFTNESS = 1.0  # share of the mean variance that is added to every direction's variance before whitening
SPAN = (2, 8)  # words in a cut: as many as a query has
EPOCHS, BATCH, LR, TEMPERATURE = 3, 64, 3e-4, 0.05
RECIPE = f"sif {SIF_A}, whitening {SOFTNESS}, cuts {SPAN}, {EPOCHS} x {BATCH} at {LR}, {TEMPERATURE}"


def sif_weights(ids: Sequence[Sequence[int]], vocabulary: int, a: float = SIF_A) -> Tensor:
    """Smooth inverse frequency of each token, w = a / (a + p), p its share of all tokens: (V,).

    Arora et al. 2017, "A Simple but Tough-to-Beat Baseline for Sentence Embeddings".
    """
    counts = torch.bincount(torch.tensor([token for row in ids for token in row]), minlength=vocabulary)
    return a / (a + counts / counts.sum())


def whitening(vectors: Tensor, softness: float = SOFTNESS) -> Tensor:
    """Soft ZCA whitening of (n, d) vectors: W (d, d) = V (L + softness * mean(L))^(-1/2) V^T, scaled to |W|_F = sqrt(d).

    V L V^T is the covariance.  Softness 0 gives every direction the same variance, noise included; a
    large one gives the identity.  The scale, which cosine scores do not see, is the identity's, so that
    learning rates keep their meaning.  Su et al. 2021, "Whitening Sentence Representations" (arXiv
    2103.15316), is softness 0 up to a rotation.
    """
    values, directions = torch.linalg.eigh(torch.cov(vectors.double().T))
    scales = (values.clamp(min=0) + softness * values.mean()).rsqrt()
    w = directions @ torch.diag(scales) @ directions.T
    return (w * len(w) ** 0.5 / w.norm()).to(vectors.dtype)


def cut_out(passages: Sequence[str], seed: int) -> list[str]:
    """A run of 2 to 8 neighbouring words out of each passage, drawn with the seed."""
    rng = random.Random(seed)
    cuts = []
    for passage in passages:
        words = passage.split()
        count = rng.randint(*SPAN)
        first = rng.randrange(max(1, len(words) - count + 1))
        cuts.append(" ".join(words[first : first + count]))
    return cuts


def warm_up(start: Tensor, cuts: Tensor, passages: Tensor, seed: int) -> Tensor:
    """Train the linear map `start` (m, d) so that cut i finds passage i among its batch; both are (n, d), centred.

    InfoNCE on cosines, AdamW with linear decay.  Same seed, same result on the same machine.
    """
    w = start.clone().requires_grad_()
    size = min(BATCH, len(passages))
    steps = EPOCHS * (len(passages) // size)
    optimiser = torch.optim.AdamW([w], lr=LR, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: 1 - step / steps)
    order = torch.Generator().manual_seed(seed)
    for _ in range(EPOCHS):
        for rows in torch.randperm(len(passages), generator=order).split(size):
            if len(rows) == size:
                short, long = (nn.functional.normalize(x[rows] @ w.T, dim=1) for x in (cuts, passages))  # (B, m)
                infonce(short @ long.T, torch.eye(size), TEMPERATURE).backward()
                optimiser.step()
                optimiser.zero_grad()
                schedule.step()
    return w.detach()
