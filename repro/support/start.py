"""`base`: a retriever out of a language model's lower layers, without any relevance label.

Weights that make rare tokens count more, a soft whitening that evens out the few directions which
all texts share, and a short training of that linear map in which a few words cut out of a passage
must find the passage again (the inverse cloze task, as in Contriever's making).
"""

import hashlib
import random
import sys
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import normalize
from torch.optim.lr_scheduler import LambdaLR
from transformers import AutoTokenizer

from repro.data import AUTHORED, load_lists
from repro.encoder import BiEncoder
from repro.losses import infonce
from repro.support.models import cached, load_pretrained, model_folder

RECIPE = 2  # raise it when `base` comes out otherwise, so that it is built again
LAYERS = 6
SEED = 0
PROMPT = "#\n"  # a causal model's first token draws attention, and no word of the text should be it

EPOCHS = 3
BATCH = 64
LR = 3e-4
TEMPERATURE = 0.05


def sif_weights(ids: list, vocabulary: int, a: float = 1e-4) -> Tensor:
    """Smooth inverse frequency of each token, w = a / (a + p), p its share of all tokens: (V,).

    Arora et al. 2017, "A Simple but Tough-to-Beat Baseline for Sentence Embeddings"; a is theirs.
    """
    tokens = []
    for row in ids:
        tokens += row
    counts = torch.bincount(torch.tensor(tokens), minlength=vocabulary)
    return a / (a + counts / counts.sum())


def whitening(vectors: Tensor, softness: float = 1.0) -> Tensor:
    """Soft ZCA whitening of (n, d) vectors: W = V (L + softness * mean(L))^(-1/2) V^T, (d, d).

    V L V^T is the covariance, and W is scaled to |W|_F = sqrt(d), the norm of the identity.
    Softness 0 gives every direction the same variance, noise included (Su et al. 2021, arXiv
    2103.15316, up to a rotation); a large one gives the identity.
    """
    values, directions = torch.linalg.eigh(torch.cov(vectors.double().T))
    scales = (values.clamp(min=0) + softness * values.mean()).rsqrt()
    w = directions @ torch.diag(scales) @ directions.T
    w = w * len(w) ** 0.5 / w.norm()
    return w.to(vectors.dtype)


def cut_out(passages: list) -> list:
    """A run of neighbouring words out of each passage, 2 to 8, as many as a query has."""
    rng = random.Random(SEED)
    cuts = []
    for passage in passages:
        words = passage.split()
        count = rng.randint(2, 8)
        first = rng.randrange(max(1, len(words) - count + 1))
        cuts.append(" ".join(words[first : first + count]))
    return cuts


def warm_up(start: Tensor, cuts: Tensor, passages: Tensor) -> Tensor:
    """Train the linear map `start` (m, d) so that cut i finds passage i in its batch.

    InfoNCE on cosines; cuts and passages are (n, d), centred; AdamW with linear decay.
    """
    w = start.clone().requires_grad_()
    steps = EPOCHS * (len(passages) // BATCH)
    optimiser = torch.optim.AdamW([w], lr=LR, weight_decay=0.0)
    schedule = LambdaLR(optimiser, lambda step: 1 - step / steps)
    order = torch.Generator().manual_seed(SEED)
    for _ in range(EPOCHS):
        drawn = torch.randperm(len(passages), generator=order)
        for rows in drawn.unfold(0, BATCH, BATCH):  # whole batches
            short = normalize(cuts[rows] @ w.T)  # (B, m)
            long = normalize(passages[rows] @ w.T)
            infonce(short @ long.T, torch.eye(BATCH), TEMPERATURE).backward()
            optimiser.step()
            optimiser.zero_grad()
            schedule.step()
    return w.detach()


def build_base(folder: Path) -> None:
    """Make and save `base`; see `base_folder`."""
    print("building the label-free encoder `base` once", file=sys.stderr)
    lists = load_lists(AUTHORED)
    passages = []
    for item in lists:
        passages += item.passages
    source = model_folder("smollm2-135m")
    model = load_pretrained(source)
    # As it will be loaded again: the kept vectors are found by the config, among others.
    model.config.architectures = [type(model).__name__]
    model.layers = model.layers[:LAYERS]
    model.config.num_hidden_layers = LAYERS
    tokenizer = load_pretrained(source, AutoTokenizer)
    weights = sif_weights(tokenizer(passages).input_ids, model.config.vocab_size)
    weights[tokenizer(PROMPT).input_ids] = 0
    encoder = BiEncoder(
        model,
        tokenizer,
        normalise=True,
        token_weights=weights,
        projection=torch.eye(model.config.hidden_size),
        prompts={"query": PROMPT, "passage": PROMPT},
    )
    centre = encoder.mean_vectors([item.query for item in lists], "query").mean(0)
    short = encoder.mean_vectors(cut_out(passages), "query", progress=True) - centre
    long = encoder.mean_vectors(passages, "passage", progress=True) - centre
    encoder.centre = centre
    encoder.projection.data = warm_up(whitening(long), short, long)
    encoder.save(folder)


def base_folder() -> Path:
    """The built-in encoder `base` as a folder in the cache, made once (two minutes on two cores).

    The lower 6 of SmolLM2-135M's 30 layers; token weights counted on the authored passages;
    centred on the mean of the authored queries (a query's few tokens share more of the constant
    part than a passage's many); `whitening` and `warm_up` on the authored passages; cosine.  It was
    chosen on the authored lists and WikiQA's training questions.
    """
    lists = hashlib.sha256(AUTHORED.read_bytes()).hexdigest()
    return cached(f"models/base-{RECIPE}-{lists[:12]}", build_base)
