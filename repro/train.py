"""Train a bi-encoder on graded lists with one of the four losses: one plain loop.

Each step embeds the queries and passages of `batch_size` lists, scores every query against every
passage of the batch, and hands scores and grades to the loss.  Under `torchrun` the ranks share the
embedding, and the loss always sees the whole batch.  OUT becomes a sentence-transformers folder
with `train.json` (settings, what was chosen, versions, minutes) and `log.jsonl` (a line a step).
"""

import argparse
import hashlib
import json
import math
import os
import random
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.nn.functional as dist_nn
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import AdamW
from tqdm import tqdm
from transformers import HfArgumentParser

from repro.data import AUTHORED, Batch, GradedList, collate, load_lists
from repro.encoder import BiEncoder, set_dropout
from repro.losses import LOSSES, expand_labels, fit_temperature
from repro.recipes import RECIPES, combine, real_lists, recipe
from repro.support.files import check_new_folder, new_folder, run_command, write_json, write_text
from repro.support.models import machine, pick_device, pick_dtype

FIT_BATCHES = 16  # on which the temperature is fitted: enough for two digits, seconds of encoding
POSITIVE = ("epochs", "steps", "batch_size", "accumulate", "chunk", "lr", "temperature")
POSITIVE += ("label_temperature", "clip")
SHARES = ("warmup", "dropout", "weight_decay")
Lists = Sequence[GradedList]
Row = dict[str, float]


@dataclass
class TrainConfig:
    """What a run is made of.  None: chosen by the kind of encoder, printed, and recorded.

    lists: files of graded lists, BEIR folders, hub ids; none: the kit's own
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
    epochs: passes over the lists; none: 5 where only a linear map trains, else 1
    steps: optimiser steps, instead of whole epochs
    batch_size: lists in one loss, over all ranks (64 in the released commands)
    accumulate: losses whose gradients make one step (4 in the released commands)
    lr: learning rate; none: 4e-4 where only a linear map trains, else 1e-5
    temperature: of the scores; none: fitted to the start
    label_temperature: of the grades
    warmup: share of the steps, then linear decay to 0
    weight_decay: of AdamW; clip: largest gradient norm
    dropout: of the transformer (BERT's own is .1)
    chunk: texts embedded at once; the backward pass computes them again, to save memory
    device: auto, cpu, cuda, mps; dtype: of the transformer's sums (weights stay float32)
    """

    lists: list[str] = field(default_factory=list)
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
    dropout: float = 0.0
    chunk: int | None = None
    device: str = "auto"
    dtype: str = "auto"

    def __post_init__(self) -> None:
        self.loss = self.loss.replace("-", "_")
        choices = {"loss": LOSSES, "ties": ("spread", "merged"), "recipe": (*RECIPES, "real")}
        for name, allowed in choices.items():
            value = getattr(self, name)
            if value not in allowed:
                raise ValueError(f"{name}: expected {' or '.join(allowed)}, got {value!r}")
        for name, value in vars(self).items():
            if name in POSITIVE and value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name}: expected a finite number above 0, got {value!r}")
            if name in SHARES and not 0 <= value <= 1:
                raise ValueError(f"{name}: expected a number from 0 to 1, got {value!r}")
        if not 0 <= self.seed <= 2**31:  # times steps and ranks it is dropout's, of 64 bits
            raise ValueError(f"seed: expected a number from 0 to 2^31, got {self.seed!r}")
        if self.recipe == "real" and not self.real:
            raise ValueError("recipe real: expected a collection in --real")
        if self.recipe == "real" and self.lists:
            raise ValueError("recipe real: expected no --lists, its lists come from --real")
        if self.negatives and not self.real:
            raise ValueError("negatives: expected the collection they belong to in --real")
        pick_dtype(self.dtype)


def training_lists(config: TrainConfig) -> list[GradedList]:
    """The lists a config names, shaped by its recipe, with the real passages it asks for."""
    real = []
    if config.real:
        real = real_lists(config.real, config.negatives, config.seed)
    if config.recipe == "real":
        return real
    lists = recipe(
        load_lists(config.lists or [AUTHORED], config.queries), config.recipe, config.seed
    )
    if config.real:
        return combine(lists, real)
    return lists


def filled(config: TrainConfig, encoder: BiEncoder, lists: int, ranks: int = 1) -> TrainConfig:
    """Fill in what a config leaves to the kind of encoder and the number of lists.

    With too few lists a batch is smaller; stderr says so.  ValueError if the batch does not fit the
    ranks, or if no step is left.
    """
    if config.batch_size % ranks:
        raise ValueError(f"batch_size: expected a multiple of {ranks} ranks")
    if lists < ranks:
        raise ValueError(f"lists: expected at least {ranks}, got {lists}")
    size = min(config.batch_size, lists // ranks * ranks)
    if size < config.batch_size:
        print(f"only {lists} lists: a batch is {size} of them", file=sys.stderr)
    epochs, lr = 1, 1e-5
    if encoder.frozen:
        epochs, lr = 5, 4e-4
    config = replace(config, batch_size=size, lr=config.lr or lr)
    if config.steps is not None:
        return config
    epochs = config.epochs or epochs
    steps = epochs * (lists // size) // config.accumulate
    if steps < 1:
        raise ValueError(f"accumulate: {lists} lists make less than one step; lower it")
    return replace(config, epochs=epochs, steps=steps)


def loss_function(config: TrainConfig) -> Callable[..., Tensor]:
    """The loss that a config names, with its options bound: (scores, labels, mask=) -> scalar."""
    options = {"temperature": config.temperature}
    if config.loss != "infonce":
        options["label_temperature"] = config.label_temperature
    if config.loss == "wasserstein_1d":
        options["ties"] = config.ties
    return partial(LOSSES[config.loss], **options)


def rank_and_ranks() -> tuple[int, int]:
    """(this process's number, how many there are)."""
    if dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


@contextmanager
def process_group(device: str) -> Iterator[None]:
    """Under torchrun, run a block as one of the ranks, each with its GPU; only the first prints."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield
        return
    backend = "gloo"
    if torch.cuda.is_available():
        backend = "cpu:gloo,cuda:nccl"
        if device in ("auto", "cuda"):
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group(backend)
    printed = sys.stdout
    if dist.get_rank() > 0:
        printed = None
    with redirect_stdout(printed):
        yield
    dist.destroy_process_group()


def score_batch(
    encoder: nn.Module, batch: Batch, chunk: int | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(scores (B, B*k), labels (B, B*k), mask (B*k,) or None) of one batch, on every rank.

    Each rank embeds its share of the lists; all ranks then hold all scores.
    """
    rank, ranks = rank_and_ranks()
    rows, k = batch.labels.shape
    mine = slice(rank * rows // ranks, (rank + 1) * rows // ranks)  # the lists of this rank
    present = batch.mask[mine].flatten()
    texts = batch.passages[mine.start * k : mine.stop * k]
    real = [text for text, there in zip(texts, present.tolist(), strict=True) if there]
    queries, found = encoder(batch.queries[mine], real, chunk=chunk)  # padding is not embedded
    passages = found.new_zeros(len(present), found.shape[1])  # (B*k / ranks, d)
    passages[present.to(found.device)] = found
    if ranks > 1:
        queries = torch.cat(dist_nn.all_gather(queries.contiguous()))
        passages = torch.cat(dist_nn.all_gather(passages.contiguous()))
    # Autocast is for the transformer: bfloat16 scores would lose the third digit.
    with torch.autocast(queries.device.type, enabled=False):
        scores = queries.float() @ passages.float().T
    labels = expand_labels(batch.labels.to(scores.device))
    if batch.mask.all():
        return scores, labels, None
    return scores, labels, batch.mask.flatten().to(scores.device)


def batch_loss(
    encoder: nn.Module, batch: Batch, loss: Callable[..., Tensor], chunk: int | None = None
) -> Tensor:
    """Loss of one batch, computed by every rank on all of it.

    The gather's backward sums the W ranks' equal gradients and DDP's mean divides by W, so the
    parameters get the gradients of one process.
    """
    scores, labels, mask = score_batch(encoder, batch, chunk)
    with torch.autocast(scores.device.type, enabled=False):
        return loss(scores, labels, mask=mask)


def epoch_order(count: int, seed: int, epoch: int) -> list[int]:
    """The order in which an epoch visits the lists, drawn from (seed, epoch)."""
    return random.Random(f"{seed}/{epoch}").sample(range(count), count)


@torch.no_grad()
def start_temperature(encoder: BiEncoder, lists: Lists, config: TrainConfig) -> float:
    """`fit_temperature` of the config's loss on the untrained encoder, over the first batches."""
    order = epoch_order(len(lists), config.seed, 0)
    starts = range(0, len(lists) - config.batch_size + 1, config.batch_size)
    batches = []
    for start in starts[:FIT_BATCHES]:
        some = [lists[j] for j in order[start : start + config.batch_size]]
        batches.append(score_batch(encoder, collate(some)))
    return fit_temperature(loss_function(config), batches)


def learning_rate(step: int, config: TrainConfig) -> float:
    """Linear warm-up over the first `warmup` share of the steps, then decay to 0; steps from 0."""
    rise = max(1, math.ceil(config.warmup * config.steps))
    decay = (config.steps - step) / max(1, config.steps - rise + 1)
    return config.lr * min((step + 1) / rise, decay)


def fit(model: nn.Module, lists: Lists, config: TrainConfig, optimiser: AdamW) -> Iterator[Row]:
    """Train in place with a filled config; yields step, epoch, loss, lr, grad_norm.

    A last, smaller batch of an epoch, which would be another loss, is left out.  ValueError if the
    loss is not a finite number.
    """
    rank, ranks = rank_and_ranks()
    trainable = optimiser.param_groups[0]["params"]
    device = trainable[0].device
    dtype = pick_dtype(config.dtype, device)
    loss, size = loss_function(config), config.batch_size
    order: list[int] = []
    for step in range(config.steps):
        torch.manual_seed((config.seed * config.steps + step) * ranks + rank)  # of dropout
        row = {"step": step, "epoch": 0, "loss": 0.0, "lr": learning_rate(step, config)}
        for part in range(config.accumulate):
            row["epoch"], place = divmod(step * config.accumulate + part, len(lists) // size)
            if place == 0:  # an epoch begins
                order = epoch_order(len(lists), config.seed, row["epoch"])
            batch = collate([lists[j] for j in order[place * size : (place + 1) * size]])
            with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                value = batch_loss(model, batch, loss, config.chunk)
            (value / config.accumulate).backward()
            row["loss"] += value.item() / config.accumulate
        if not math.isfinite(row["loss"]):
            raise ValueError(f"step {step}: the loss is {row['loss']}; lower --lr")
        optimiser.param_groups[0]["lr"] = row["lr"]
        row["grad_norm"] = nn.utils.clip_grad_norm_(trainable, config.clip).item()
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        yield row


def train_encoder(
    encoder: BiEncoder, lists: Lists, config: TrainConfig, progress: bool = False
) -> tuple[TrainConfig, list[Row], float]:
    """Train an encoder in place: (filled config, one row a step, minutes).

    ValueError if a weight ends up not finite.
    """
    rank, ranks = rank_and_ranks()
    shown = progress and rank == 0
    config = filled(config, encoder, len(lists), ranks)
    began = time.monotonic()
    if not encoder.frozen:
        set_dropout(encoder.model, config.dropout)
    else:  # all vectors at once, which a step then looks up
        encoder.mean_vectors([item.query for item in lists], "query", progress=shown)
        passages = [text for item in lists for text in item.passages]
        encoder.mean_vectors(passages, "passage", progress=shown)
    if config.temperature is None:
        config = replace(config, temperature=start_temperature(encoder, lists, config))
        if shown:
            print(f"temperature {config.temperature:.4g}, fitted to the start", file=sys.stderr)
    trainable = encoder.trainable()
    # fused: one kernel for all weights, a quarter of the time of AdamW's loop over them
    optimiser = AdamW(trainable, lr=config.lr, weight_decay=config.weight_decay, fused=True)
    model = encoder
    if ranks > 1:
        model = DistributedDataParallel(encoder, find_unused_parameters=True)
    encoder.train()
    rows = []
    with tqdm(total=config.steps, desc=f"train {config.loss}", disable=not shown) as bar:
        for row in fit(model, lists, config, optimiser):
            rows.append(row)
            bar.set_postfix_str(f"loss {row['loss']:.4f}", refresh=False)
            bar.update()
    encoder.eval()
    if not all(torch.isfinite(weight).all() for weight in trainable):
        raise ValueError("a trained weight is not a finite number; lower --lr")
    return config, rows, (time.monotonic() - began) / 60


def train(config: TrainConfig, lists: Lists | None = None, progress: bool = True) -> dict[str, Any]:
    """Train as the config says and write the model to `config.out`; returns what train.json holds.

    `lists` replaces the ones that the config names.  ValueError before any work if settings, lists
    or folder do not fit; OUT appears whole or not at all.
    """
    rank, ranks = rank_and_ranks()
    device = pick_device(config.device)
    check_new_folder(config.out, config.overwrite)
    if lists is None:
        lists = training_lists(config)
    encoder = BiEncoder.load(config.model, str(device), "float32")
    if config.query_prompt is not None:
        encoder.prompts["query"] = config.query_prompt
    if config.passage_prompt is not None:
        encoder.prompts["passage"] = config.passage_prompt
    used, rows, minutes = train_encoder(encoder, lists, config, progress)
    content = json.dumps([asdict(item) for item in lists]).encode()
    record = {
        "settings": asdict(used),
        "queries": len(lists),
        "lists_sha256": hashlib.sha256(content).hexdigest(),
        "steps": len(rows),
        "minutes": minutes,
        "ranks": ranks,
        "machine": machine(device, pick_dtype(config.dtype, device)),
    }
    if rank == 0:
        with new_folder(config.out, config.overwrite) as folder:
            encoder.save(folder)
            lines = [json.dumps(row) + "\n" for row in rows]
            write_text(folder / "log.jsonl", "".join(lines))
            write_json(folder / "train.json", record)
    return record


def main(argv: list[str] | None = None) -> int:
    """Command line: one option a field of TrainConfig; under torchrun one process a rank."""

    def work() -> None:
        parser = HfArgumentParser(
            TrainConfig,
            prog="python -m repro.train",
            description=TrainConfig.__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        (config,) = parser.parse_args_into_dataclasses(argv)
        with process_group(config.device):
            done = train(config)
            temperature = done["settings"]["temperature"]
            print(
                f"{config.out}: {done['steps']} steps on {done['queries']} lists at temperature "
                f"{temperature:.4g} in {done['minutes']:.1f} minutes"
            )

    return run_command(work)


if __name__ == "__main__":
    sys.exit(main())
