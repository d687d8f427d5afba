"""Train a bi-encoder on graded lists with one of the four losses: one plain loop.

Each step embeds the queries and passages of `batch_size` lists, scores every query against every
passage of the batch, and hands scores and grades to the loss.  Under `torchrun` the ranks share the
embedding, and the loss always sees the whole batch.  OUT becomes a sentence-transformers folder
with `train.json` (settings, what was chosen, versions, minutes) and `log.jsonl` (a line a step).
"""

import json
import math
import os
import random
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from inspect import signature
from itertools import chain, count, islice

import torch
from torch import distributed, nn
from torch.distributed.nn.functional import all_gather
from tqdm import tqdm

from repro.data import AUTHORED, Batch, Lists, as_collection, collate, load_lists
from repro.encoder import BiEncoder
from repro.losses import LOSSES, expand_labels, fit_temperature
from repro.recipes import combine, real_lists, recipe
from repro.support import files
from repro.support.models import machine, pick_dtype

RANK = int(os.environ.get("RANK", 0))  # this process's number; torchrun sets both
RANKS = int(os.environ.get("WORLD_SIZE", 1))
FIT_BATCHES = 16  # on which the temperature is fitted: enough for two digits, seconds of encoding
CHOICES = {"loss": LOSSES, "ties": ("spread", "merged"), "recipe": ("graded", "binary", "real")}
# Least and most of the numbers that may be 0; all others are above 0 and finite.  The seed times
# steps and ranks is dropout's, of 64 bits.
RANGES = {"seed": (0, 2**31), "warmup": (0, 1), "weight_decay": (0, 1)}


@dataclass
class TrainConfig:
    """What a run is made of.  None: chosen by the kind of encoder; train.json has what was used.

    lists: files of graded lists, BEIR folders, hub ids, all behind one --lists; none: the kit's own
    queries: collection with the texts of the queries, where the lists lack them
    recipe: graded, binary (one positive, two negatives), real (only the lists of --real)
    real: collection whose judged passages join the lists
    negatives: file of mined passages for --real; none: judged ones that are not relevant
    out: new folder that becomes the model; overwrite: replace it, if this command made it
    loss: infonce, kl, wasserstein_1d, wasserstein_gaussian
    ties: of wasserstein_1d, spread or merged
    seed: of the order of the lists, of what a recipe draws, of dropout
    model: where training starts: base, all-minilm-l6-v2, a folder or a hub id
    query_prompt, passage_prompt: in front of the texts, such as "query: "; none: the model's own
    epochs: passes over the lists, in whole steps; none: 5 where only a linear map trains, else 1
    steps: optimiser steps, instead of whole epochs
    batch_size: lists in one loss, over all ranks (64 in the released commands)
    accumulate: losses whose gradients make one step (4 in the released commands)
    lr: learning rate; none: 4e-4 where only a linear map trains, else 1e-5
    temperature: of the scores; none: fitted to the start
    label_temperature: of the grades; infonce has none
    warmup: share of the steps, then linear decay to 0
    weight_decay: of AdamW; clip: largest gradient norm
    dropout: train with the transformer's own (as the released commands do), not without
    chunk: texts embedded at once; the backward pass computes them again, to save memory
    device: auto, cpu, cuda, mps
    dtype: of the transformer's sums (weights stay float32; float16 has no loss scaling); where
        only a linear map trains, all is float32
    """

    lists: list[str] | None = None
    queries: str | None = None
    recipe: str = "graded"
    real: str | None = None
    negatives: str | None = None
    out: str = "runs/model"
    overwrite: bool = False
    loss: str = "wasserstein_1d"
    ties: str = "spread"
    seed: int = 0
    model: str = "base"
    query_prompt: str | None = None
    passage_prompt: str | None = None
    epochs: int | None = None
    steps: int | None = None
    batch_size: int = 16
    accumulate: int = 1
    lr: float | None = None
    temperature: float | None = None
    label_temperature: float = 1.0
    warmup: float = 0.05
    weight_decay: float = 0.01
    clip: float = 1.0
    dropout: bool = False
    chunk: int | None = None
    device: str = "auto"
    dtype: str = "auto"

    def __post_init__(self) -> None:
        for name, allowed in CHOICES.items():
            value = getattr(self, name)
            if value not in allowed:
                raise ValueError(f"{name}: expected {' or '.join(allowed)}, found {value!r}")
        for name, value in vars(self).items():
            least, most = RANGES.get(name, (1e-38, 1e38))
            if type(value) in (int, float) and not least <= value <= most:
                raise ValueError(
                    f"{name}: expected a number from {least:g} to {most:g}, found {value!r}"
                )
        if self.loss == "infonce" and self.label_temperature != 1:
            raise ValueError(
                "label_temperature: expected none for infonce, which has no use for it"
            )
        if (self.recipe == "real" or self.negatives) and not self.real:
            raise ValueError("real: expected a collection, for recipe real and for --negatives")
        if self.recipe == "real" and self.lists:
            raise ValueError("recipe real: expected no --lists, its lists come from --real")
        pick_dtype(self.dtype)


def training_lists(config: TrainConfig) -> Lists:
    """The lists a config names, shaped by its recipe, with the real passages it asks for."""
    real = real_lists(config.real, config.negatives, config.seed) if config.real else []
    if config.recipe == "real":
        return real
    lists = load_lists(config.lists or AUTHORED, config.queries)
    lists = recipe(lists, config.recipe, config.seed)
    return combine(lists, real) if real else lists


def filled(config: TrainConfig, encoder: BiEncoder, lists: int) -> TrainConfig:
    """Fill in what a config leaves to the kind of encoder and the number of lists.

    A batch is smaller if there are too few lists, or if the ranks cannot share it evenly; stderr
    says so.  ValueError if no step is left.
    """
    size = min(config.batch_size, lists) // RANKS * RANKS or RANKS
    if size != config.batch_size:
        print(f"{lists} lists: a batch is {size} of them", file=sys.stderr)
    epochs, lr, dtype = 1, 1e-5, config.dtype
    if encoder.frozen:
        epochs, lr, dtype = 5, 4e-4, "float32"  # the map trains on vectors of that format
    steps = config.steps or (config.epochs or epochs) * (lists // size) // config.accumulate
    if steps < 1 or lists < size:
        raise ValueError(f"{lists} lists: too few for a step, lower --batch-size or --accumulate")
    return replace(config, batch_size=size, steps=steps, lr=config.lr or lr, dtype=dtype)


def loss_function(config: TrainConfig) -> Callable:
    """The loss that a config names, with its options bound: (scores, labels, mask=) -> scalar."""
    loss = LOSSES[config.loss]
    names = signature(loss).parameters
    bound = {name: value for name, value in vars(config).items() if name in names}
    return partial(loss, **bound)


def batches(lists: Lists, config: TrainConfig, epoch: int) -> Iterator:
    """The batches of one epoch: the lists in an order drawn from (seed, epoch).

    A last, smaller batch, which would be another loss, is left out.
    """
    size = config.batch_size
    order = random.Random(f"{config.seed}/{epoch}").sample(lists, len(lists))
    while len(order) >= size:
        yield collate(order[:size])
        del order[:size]


def score_batch(embed: Callable, batch: Batch) -> tuple:
    """(scores (B, B*k), labels (B, B*k), mask (B*k,)) of one batch, on every rank.

    `embed` is an encoder, maybe wrapped.  Of W ranks each embeds every W-th text; all ranks then
    hold all scores.  The gather's backward sums the W ranks' equal gradients and DDP's mean divides
    by W, so the parameters get the gradients of one process.
    """
    mask = batch.mask.flatten()  # (B*k,)
    queries, passages = embed(batch.queries[RANK::RANKS], batch.passages[RANK::RANKS])
    if RANKS > 1:
        queries = torch.stack(all_gather(queries), 1).flatten(0, 1)  # (B, d), in the old order
        passages = torch.stack(all_gather(passages), 1).flatten(0, 1)
    scores = queries @ passages.T
    return scores, expand_labels(batch.labels), mask.to(scores.device)


@torch.no_grad()
def start_temperature(encoder: BiEncoder, lists: Lists, config: TrainConfig) -> float:
    """`fit_temperature` of the config's loss on the untrained encoder, over the first batches."""
    first = islice(batches(lists, config, 0), FIT_BATCHES)
    embed = partial(encoder, chunk=config.chunk)
    scored = [score_batch(embed, batch) for batch in first]
    return fit_temperature(loss_function(config), scored)


def learning_rate(step: int, config: TrainConfig) -> float:
    """Linear warm-up over the first `warmup` share of the steps, then decay to 0; steps from 0."""
    rise = math.ceil(config.warmup * config.steps) or 1
    decay = (config.steps - step) / (config.steps - rise + 1)
    return config.lr * min((step + 1) / rise, decay)


def fit(encoder: BiEncoder, lists: Lists, config: TrainConfig) -> Iterator:
    """Train in place with a filled config; yields step, loss, lr, grad_norm.

    ValueError if the loss or its gradient is not a finite number.
    """
    weights = list(encoder.parameters())  # those that are frozen get no gradient, and stay
    # fused: one kernel for all weights, a quarter of the time of AdamW's loop over them
    optimiser = torch.optim.AdamW(weights, weight_decay=config.weight_decay, fused=True)
    model = encoder
    if RANKS > 1:
        model = nn.parallel.DistributedDataParallel(encoder, find_unused_parameters=True)
    dtype = pick_dtype(config.dtype, encoder.device)
    autocast = torch.autocast(encoder.device.type, dtype, enabled=dtype != torch.float32)
    embed = autocast(partial(model, chunk=config.chunk))
    loss = loss_function(config)
    endless = chain.from_iterable(batches(lists, config, epoch) for epoch in count())
    for step in range(config.steps):
        torch.manual_seed((config.seed * config.steps + step) * RANKS + RANK)  # of dropout
        total = 0.0
        for batch in islice(endless, config.accumulate):
            scores, labels, mask = score_batch(embed, batch)
            value = loss(scores, labels, mask=mask) / config.accumulate
            value.backward()
            total += value.item()
        norm = nn.utils.clip_grad_norm_(weights, config.clip).item()
        if not math.isfinite(total + norm):
            raise ValueError(f"step {step}: the loss or its gradient is not finite; lower --lr")
        lr = learning_rate(step, config)
        optimiser.param_groups[0]["lr"] = lr
        optimiser.step()
        optimiser.zero_grad()
        yield {"step": step, "loss": total, "lr": lr, "grad_norm": norm}


def train_encoder(
    encoder: BiEncoder, lists: Lists, config: TrainConfig, progress: bool = False
) -> tuple:
    """Train an encoder in place: (filled config, one row a step, minutes)."""
    shown = progress and RANK == 0
    config = filled(config, encoder, len(lists))
    began = time.monotonic()
    if encoder.frozen:  # all vectors at once, which a step then looks up
        corpus, queries, _ = as_collection(lists)
        encoder.mean_vectors(list(queries.values()), "query", progress=shown)
        encoder.mean_vectors(list(corpus.values()), "passage", progress=shown)
    if config.temperature is None:
        config.temperature = start_temperature(encoder, lists, config)
    encoder.model.train(config.dropout)
    steps = fit(encoder, lists, config)
    rows = list(tqdm(steps, f"train {config.loss}", config.steps, disable=not shown))
    encoder.eval()
    return config, rows, (time.monotonic() - began) / 60


def train(config: TrainConfig, lists: Lists | None = None, progress: bool = True) -> dict:
    """Train as the config says and write the model to `config.out`; returns what train.json holds.

    `lists` replaces the ones that the config names.  ValueError before any training if settings,
    lists or folder do not fit; OUT appears whole or not at all.
    """
    files.check_new_folder(config.out, config.overwrite)
    if lists is None:
        lists = training_lists(config)
    encoder = BiEncoder.load(
        config.model,
        config.device,
        query_prompt=config.query_prompt,
        passage_prompt=config.passage_prompt,
    )
    used, rows, minutes = train_encoder(encoder, lists, config, progress)
    record = {
        "settings": vars(used),
        "queries": len(lists),
        "minutes": minutes,
        "ranks": RANKS,
        "machine": machine(encoder.device, pick_dtype(used.dtype, encoder.device)),
    }
    if RANK > 0:
        return record
    with files.new_folder(config.out, config.overwrite) as folder:
        encoder.save(folder)
        log = [json.dumps(row) + "\n" for row in rows]
        files.write_text(folder / "log.jsonl", "".join(log))
        files.write_json(folder / "train.json", record)
    if progress:
        print(
            f"{config.out}: {len(lists)} lists, temperature {used.temperature:g}, {minutes:.1f} min"
        )
    return record


def command(config: TrainConfig) -> None:
    """Train; under torchrun as one of its ranks, each with its GPU."""
    if RANKS == 1:
        train(config)
        return
    if config.device in ("auto", "cuda") and torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    distributed.init_process_group()  # gloo on CPUs, nccl on GPUs
    train(config)
    distributed.destroy_process_group()


main = files.command_line(command, TrainConfig)

if __name__ == "__main__":
    raise SystemExit(main())
