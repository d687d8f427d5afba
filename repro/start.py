"""`base`: a retriever out of a language model's lower layers, without any relevance label.

Weights that make rare tokens count more, a soft whitening that evens out the few directions which all texts
share, and a short training of that linear map in which a few words cut out of a passage must find the passage
again (the inverse cloze task, as in Contriever's making).
"""

import hashlib
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize
from transformers import AutoTokenizer

from repro.checkpoints import cached, load_pretrained
from repro.data import AUTHORED, load_lists
from repro.losses import infonce

CHECKPOINT, LAYERS, SEED = "smollm2-135m", 6, 0
PROMPT = "#\n"  # a causal model's first token is a sink for attention, and no word of the text should be it

SIF_A = 1e-4  # the usual constant of inverse frequency weights
SOFTNESS = 1.0  # share of the mean variance that is added to every direction's variance before whitening
SPAN = (2, 8)  # words in a cut: as many as a query has
EPOCHS, BATCH, LR, TEMPERATURE = 3, 64, 3e-4, 0.05
RECIPE = f"sif {SIF_A}, whitening {SOFTNESS}, cuts {SPAN}, {EPOCHS} x {BATCH} at {LR}, {TEMPERATURE}"

def sif_weights(ids: Sequence[Sequence[int]], vocabulary: int, a: float = SIF_A) -> Tensor:
    """Smooth inverse frequency of each token, w = a / (a + p), p its share of all tokens: (V,).

    Arora et al. 2017, "A Simple but Tough-to-Beat Baseline for Sentence Embeddings"."""
    counts = torch.bincount(torch.tensor([token for row in ids for token in row]), minlength=vocabulary)
    return a / (a + counts / counts.sum())

def whitening(vectors: Tensor, softness: float = SOFTNESS) -> Tensor:
    """Soft ZCA whitening of (n, d) vectors, W = V (L + softness * mean(L))^(-1/2) V^T, |W|_F = sqrt(d).

    V L V^T is the covariance.  Softness 0 gives every direction the same variance, noise included (Su et al.
    2021, arXiv 2103.15316, up to a rotation); a large one gives the identity, whose scale W has."""
    values, directions = torch.linalg.eigh(torch.cov(vectors.double().T))
    scales = (values.clamp(min=0) + softness * values.mean()).rsqrt()
    w = directions @ torch.diag(scales) @ directions.T
    return (w * len(w) ** 0.5 / w.norm()).to(vectors.dtype)

def cut_out(passages: Sequence[str], seed: int) -> list[str]:
    """A run of 2 to 8 neighbouring words out of each passage, drawn with the seed."""
    rng, cuts = random.Random(seed), []
    for passage in passages:
        words, count = passage.split(), rng.randint(*SPAN)
        first = rng.randrange(max(1, len(words) - count + 1))
        cuts.append(" ".join(words[first : first + count]))
    return cuts

def warm_up(start: Tensor, cuts: Tensor, passages: Tensor, seed: int) -> Tensor:
    """Train the linear map `start` (m, d) so that cut i finds passage i in its batch; both (n, d), centred.

    InfoNCE on cosines, AdamW with linear decay."""
    w = start.clone().requires_grad_()
    size = min(BATCH, len(passages))
    steps = EPOCHS * (len(passages) // size)
    optimiser = torch.optim.AdamW([w], lr=LR, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: 1 - step / steps)
    order = torch.Generator().manual_seed(seed)
    for _ in range(EPOCHS):
        for rows in torch.randperm(len(passages), generator=order).split(size):
            if len(rows) == size:
                short, long = (normalize(x[rows] @ w.T, dim=1) for x in (cuts, passages))  # (B, m)
                infonce(short @ long.T, torch.eye(size), TEMPERATURE).backward()
                optimiser.step()
                optimiser.zero_grad()
                schedule.step()
    return w.detach()

def base_folder(encoder_class: Any) -> Path:
    """The built-in encoder `base` as a folder in the cache, made once (two minutes on two cores).

    The lower 6 of SmolLM2-135M's 30 layers; token weights counted on the authored passages; centred on the
    mean of the authored queries (a query's few tokens share more of the constant part than a passage's many);
    `whitening` and `warm_up` on the authored passages; cosine.  It was chosen on the authored lists and
    WikiQA's training questions.  `encoder_class` is `BiEncoder`, which stands behind this module."""
    authored = hashlib.sha256(AUTHORED.read_bytes()).hexdigest()
    recipe = f"{CHECKPOINT} {LAYERS} {PROMPT!r} {RECIPE} {SEED} {authored}"

    def build(folder: Path) -> None:
        print("building the label-free encoder `base` once", file=sys.stderr)
        lists = load_lists([AUTHORED])
        queries, passages = [item.query for item in lists], [text for item in lists for text in item.passages]
        model, tokenizer = load_pretrained(CHECKPOINT), load_pretrained(CHECKPOINT, AutoTokenizer)
        model.layers, model.config.num_hidden_layers = model.layers[:LAYERS], LAYERS
        weights = sif_weights(tokenizer(passages)["input_ids"], model.config.vocab_size)
        weights[tokenizer(PROMPT)["input_ids"]] = 0
        options = {"prompts": {"query": PROMPT, "passage": PROMPT}, "normalise": True}
        identity = torch.eye(model.config.hidden_size)
        encoder = encoder_class(model, tokenizer, token_weights=weights, projection=identity, **options)
        encoder.freeze(LAYERS)
        centre = encoder.mean_vectors(queries, "query", progress=True).mean(dim=0)
        short = encoder.mean_vectors(cut_out(passages, SEED), "query", progress=True) - centre
        long = encoder.mean_vectors(passages, "passage", progress=True) - centre
        encoder.centre = centre
        encoder.projection = nn.Parameter(warm_up(whitening(long), short, long, SEED))
        encoder.save(folder)

    return cached(f"models/base-{hashlib.sha256(recipe.encode()).hexdigest()[:12]}", build)
