"""Train a bi-encoder on graded lists with one of the four losses: one plain loop.

Each step embeds the queries and passages of `batch_size` lists, scores every query against every passage of
the batch, and hands scores and grades to the loss.  Under `torchrun` the ranks share the embedding, and the
loss always sees the whole batch.  OUT becomes a sentence-transformers folder with `train.json` (settings,
versions, minutes) and `log.jsonl` (a line a step); until then all lies in OUT.partial, and after a kill the
same command goes on from there.
"""

import hashlib
import inspect
import json
import math
import os
import random
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stdout
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.nn.functional as dist_nn
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import AdamW
from tqdm import tqdm
from transformers import HfArgumentParser

from repro import checkpoints
from repro.checkpoints import check_new_folder, ending, locked, pick_dtype, same_run, write_json, writing
from repro.data import AUTHORED, RECIPES, Batch, GradedList, collate, combine, load_lists, real_lists, recipe
from repro.encoder import BiEncoder
from repro.losses import LOSSES, expand_labels

# For cosines: (temperature, label temperature) of each loss's best trial from `base` with the other defaults.
COSINE = {"infonce": (0.2, 1.0), "kl": (0.2, 0.2), "wasserstein_1d": (0.1, 0.2)}
COSINE["wasserstein_gaussian"] = (0.2, 1.0)
CHOICES = {"loss": tuple(LOSSES), "order": (1, 2), "axis": ("grade", "gain"), "target": ("all", "own")}
CHOICES["recipe"] = (*RECIPES, "real")
RANGES = (
    ("epochs steps batch_size accumulate chunk checkpoint_every", 1, math.inf, "of 1 or more"),
    ("lr temperature label_temperature clip", 5e-324, math.inf, "above 0"),
    ("seed", 0, 2**31, "from 0 to 2^31"),  # times steps and ranks, it seeds dropout
    ("weight_decay freeze", 0, math.inf, "of 0 or more"), ("warmup average", 0, 1, "from 0 to 1"))
Lists = Sequence[GradedList]
Row = dict[str, float]

@dataclass
class TrainConfig:
    """What a run is made of.  None means: by the kind of encoder (`filled`), and written to train.json."""
    lists: list[str] = field(default_factory=list)  # caches, BEIR folders, hub ids; none: authored.jsonl
    queries: str | None = None  # folder or hub id with the texts of the lists' queries, where they have none
    recipe: str = "graded"  # graded, binary, ends, merged (repro/data.py), or real: only the lists of --real
    real: str | None = None  # collection whose judged passages join the lists (k = 7)
    negatives: str | None = None  # its mined passages; none: judged ones that are not relevant
    out: str = "runs/model"  # folder that becomes the model
    loss: str = "wasserstein_1d"  # infonce, kl, wasserstein_1d or wasserstein_gaussian
    seed: int = 0  # of the order of the lists, of what a recipe draws, and of dropout
    model: str = "base"  # where training starts: base, a folder, a built-in name or a hub id
    epochs: int | None = None  # passes over the lists; none: 5 where only a linear map trains, else 1
    steps: int | None = None  # optimiser steps, instead of whole epochs
    batch_size: int = 16  # lists in one loss, over all ranks (64 in the released commands)
    accumulate: int = 1  # losses whose gradients make one step (4 in the released commands)
    lr: float | None = None  # learning rate; none: 4e-4 where layers are frozen, else 1e-5
    temperature: float | None = None  # of the scores; none: 1, for cosines by the loss
    label_temperature: float | None = None  # of the grades; none: 1, for cosines by the loss
    order: int = 1  # of wasserstein_1d: 1 or 2
    axis: str = "grade"  # of wasserstein_1d: grade or gain
    target: str = "all"  # who has target mass: all passages of the batch, or the query's own
    ignore_between: bool = False  # infonce: leave out the grades between the positive and 0
    average: float = 1.0  # share of the way from the start's weights to the trained ones
    freeze: int | None = None  # embeddings and n layers stay; none: all under a linear map, else nothing
    warmup: float = 0.05  # share of the steps, then linear decay to 0
    weight_decay: float = 0.01  # of AdamW
    clip: float = 1.0  # largest gradient norm
    chunk: int | None = None  # texts embedded at once; the backward pass computes them again
    checkpoint_every: int = 50  # steps
    device: str = "auto"  # auto, cpu, cuda, mps
    dtype: str = "auto"  # number format of the transformer's sums; weights stay float32

    def __post_init__(self) -> None:
        self.loss = self.loss.replace("-", "_")
        for name, allowed in CHOICES.items():
            if (value := getattr(self, name)) not in allowed:
                raise ValueError(f"{name}: expected {' or '.join(map(str, allowed))}, got {value!r}")
        for names, low, high, words in RANGES:
            for name in names.split():
                value = getattr(self, name)
                if value is not None and not (low <= value <= high and math.isfinite(value)):
                    raise ValueError(f"{name}: expected a number {words}, got {value!r}")
        if self.lists or not self.real if self.recipe == "real" else self.negatives and not self.real:
            raise ValueError("recipe real: expected --real and no --lists; negatives: expected --real")
        if self.target == "own" if self.loss == "infonce" else self.ignore_between:
            raise ValueError(f"target own and ignore_between: not for {self.loss}")
        pick_dtype(self.dtype)

def filled(config: TrainConfig, encoder: BiEncoder, lists: int, ranks: int = 1) -> TrainConfig:
    """Freeze the encoder, and fill in what a config leaves to its kind and to the number of lists.

    ValueError if the batch does not fit the ranks.  With too few lists a batch is smaller; stderr says so."""
    if config.batch_size % ranks or lists < ranks:
        raise ValueError(f"batch_size: expected a multiple of {ranks} ranks, and so many lists, got {lists}")
    whole = encoder.model.config.num_hidden_layers if encoder.projection is not None else None
    encoder.freeze(whole if config.freeze is None else config.freeze)
    size = min(config.batch_size, lists // ranks * ranks)
    if size < config.batch_size:
        print(f"only {lists} lists: a batch is {size} of them, not {config.batch_size}", file=sys.stderr)
    epochs = config.epochs or (5 if encoder.frozen_whole else 1)
    temperature, label_temperature = COSINE[config.loss] if encoder.normalise else (1.0, 1.0)
    defaults = {"temperature": temperature, "label_temperature": label_temperature}
    defaults |= {"lr": 4e-4 if encoder.frozen_whole or config.freeze else 1e-5, "epochs": epochs}
    defaults["steps"] = epochs * (lists // size) // config.accumulate
    values = {key: value for key, value in defaults.items() if getattr(config, key) is None}
    return replace(config, batch_size=size, **values)

def loss_function(config: TrainConfig) -> Callable[..., Tensor]:
    """The loss that a filled config names, with its options bound: (scores, labels, mask=) -> scalar."""
    names = {"infonce": ("ignore_between",), "wasserstein_1d": ("label_temperature", "order", "axis")}
    names = ("temperature", *names.get(config.loss, ("label_temperature",)))
    return partial(LOSSES[config.loss], **{name: getattr(config, name) for name in names})

def training_lists(config: TrainConfig) -> list[GradedList]:
    """The lists that a config names, in the shape of its recipe, with the real passages it asks for."""
    real = real_lists(config.real, config.negatives, config.seed) if config.real else []
    if config.recipe == "real":
        return real
    lists = recipe(load_lists(config.lists or [AUTHORED], config.queries), config.recipe, config.seed)
    return combine(lists, real) if real else lists

def rank_and_ranks() -> tuple[int, int]:
    """(this process's number, how many there are)."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)

@contextmanager
def process_group(device: str) -> Iterator[None]:
    """Under torchrun, run a block as one of the ranks, with a GPU of its own; only the first one prints."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        if device in ("auto", "cuda") and torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    with redirect_stdout(None if rank_and_ranks()[0] else sys.stdout):
        yield
    dist.is_initialized() and dist.destroy_process_group()

def batch_loss(encoder: nn.Module, batch: Batch, loss: Callable, own: bool = False, chunk: int | None = None
               ) -> Tensor:
    """Loss of one batch, computed by every rank on all of it, from embeddings that the ranks share out.

    The gather's backward sums the W ranks' equal gradients and DDP's mean divides by W, so the parameters
    get the gradients of one process.  `own`: only a query's own passages carry target mass."""
    (rank, ranks), (rows, k) = rank_and_ranks(), batch.labels.shape
    mine = slice(rank * rows // ranks, (rank + 1) * rows // ranks)  # the lists of this rank
    present = batch.mask[mine].flatten()  # padding is not embedded
    texts = zip(batch.passages[mine.start * k : mine.stop * k], present.tolist(), strict=True)
    queries, found = encoder(batch.queries[mine], [text for text, real in texts if real], chunk=chunk)
    passages = found.new_zeros(len(present), found.shape[1])  # (B*k / W, d)
    passages[present.to(found.device)] = found
    if ranks > 1:
        queries, passages = (torch.cat(dist_nn.all_gather(x.contiguous())) for x in (queries, passages))
    # Autocast is for the transformer: bfloat16 scores would lose the third digit.
    with torch.autocast(queries.device.type, enabled=False):
        scores = queries.float() @ passages.float().T  # (B, B*k)
        mask = None if batch.mask.all() else batch.mask.flatten().to(scores.device)  # (B*k,)
        options = {"target_mask": expand_labels(batch.mask.to(scores)) > 0} if own else {}
        return loss(scores, expand_labels(batch.labels.to(scores.device)), mask=mask, **options)

def learning_rate(step: int, config: TrainConfig) -> float:
    """Linear warm-up over the first `warmup` share of the steps, then linear decay to 0; steps from 0."""
    rise = max(1, math.ceil(config.warmup * config.steps))
    return config.lr * min((step + 1) / rise, (config.steps - step) / max(1, config.steps - rise + 1))

def fit(model: nn.Module, lists: Lists, config: TrainConfig, optimiser: AdamW, first: int = 0
        ) -> Iterator[Row]:
    """Train in place from step `first` on, with a filled config; yields step, epoch, loss, lr, grad_norm.

    An epoch is a pass in an order drawn from (seed, epoch); a last, smaller batch, which would be another
    loss, is left out.  Raises ValueError if the loss is not a finite number."""
    rank, ranks = rank_and_ranks()
    trainable = optimiser.param_groups[0]["params"]
    device = trainable[0].device
    autocast = pick_dtype(config.dtype, device)
    loss, size, order = loss_function(config), config.batch_size, []
    for step in range(first, config.steps):
        torch.manual_seed((config.seed * config.steps + step) * ranks + rank)  # dropout's: no state to save
        row = {"step": step, "epoch": 0, "loss": 0.0, "lr": learning_rate(step, config)}
        for part in range(config.accumulate):
            row["epoch"], place = divmod(step * config.accumulate + part, len(lists) // size)
            if place == 0 or not order:
                order = random.Random(f"{config.seed}/{row['epoch']}").sample(range(len(lists)), len(lists))
            batch = collate([lists[j] for j in order[place * size : (place + 1) * size]])
            with torch.autocast(device.type, autocast, enabled=autocast != torch.float32):
                value = batch_loss(model, batch, loss, config.target == "own", config.chunk)
            (value / config.accumulate).backward()
            row["loss"] += value.item() / config.accumulate
        if not math.isfinite(row["loss"]):
            raise ValueError(f"step {step}: the loss is {row['loss']}; lower --lr or raise --temperature")
        optimiser.param_groups[0]["lr"] = row["lr"]
        row["grad_norm"] = nn.utils.clip_grad_norm_(trainable, config.clip).item()
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        yield row

def train_encoder(encoder: BiEncoder, lists: Lists, config: TrainConfig, work: Path | None = None,
                  progress: bool = False) -> tuple[TrainConfig, list[Row], float]:
    """Train an encoder in place: (filled config, one row a step, minutes).

    A folder `work` keeps a checkpoint, from which training goes on.  ValueError if a weight is not finite."""
    rank, ranks = rank_and_ranks()
    config, shown = filled(config, encoder, len(lists), ranks), progress and rank == 0
    if encoder.frozen_whole:  # all vectors at once, which a step then looks up
        encoder.mean_vectors([item.query for item in lists], "query", progress=shown)
        encoder.mean_vectors([text for item in lists for text in item.passages], "passage", progress=shown)
    trainable = [p for p in encoder.parameters() if p.requires_grad]
    begun = [p.detach().clone() for p in trainable]
    optimiser = AdamW(trainable, lr=config.lr, weight_decay=config.weight_decay)
    model = DistributedDataParallel(encoder, find_unused_parameters=True) if ranks > 1 else encoder
    rows, seconds = load_state(work, optimiser) if work else ([], 0.0)
    if ranks > 1:
        dist.barrier()  # every rank has looked before the first one writes
    began = time.monotonic() - seconds
    encoder.train()
    options = {"total": config.steps, "initial": len(rows), "unit": "step", "disable": not shown}
    with tqdm(desc=f"train {config.loss}", **options) as bar:
        for row in fit(model, lists, config, optimiser, len(rows)):
            rows.append(row)
            bar.set_postfix_str(f"loss {row['loss']:.4f}", refresh=False)
            bar.update()
            if work and rank == 0 and len(rows) % config.checkpoint_every == 0 and len(rows) < config.steps:
                save_state(work, rows, time.monotonic() - began, optimiser)
    with torch.no_grad():
        for now, then in zip(trainable, begun, strict=True):
            if not torch.isfinite(now).all():
                raise ValueError("a trained weight is not a finite number; lower --lr")
            if config.average != 1:
                now.copy_(torch.lerp(then, now, config.average))
    encoder.eval()
    return config, rows, (time.monotonic() - began) / 60

def save_state(work: Path, rows: list[Row], seconds: float, optimiser: AdamW) -> None:
    """Weights, AdamW's moments and the log so far, in one safetensors file that is replaced whole."""
    tensors = {}
    for n, parameter in enumerate(optimiser.param_groups[0]["params"]):
        state = {"weight": parameter.detach(), **optimiser.state[parameter]}
        tensors |= {f"{key}.{n}": value.cpu().contiguous() for key, value in state.items()}
    save_file(tensors, work / "state.tmp", metadata={"rows": json.dumps(rows), "seconds": str(seconds)})
    os.replace(work / "state.tmp", work / "state.safetensors")

def load_state(work: Path, optimiser: AdamW) -> tuple[list[Row], float]:
    """Put the last `save_state` back: (log so far, seconds spent), ([], 0.0) if there is none."""
    if not (work / "state.safetensors").exists():
        return [], 0.0
    trainable = optimiser.param_groups[0]["params"]
    with safe_open(work / "state.safetensors", "pt") as file, torch.no_grad():
        for n, parameter in enumerate(trainable):
            parameter.copy_(file.get_tensor(f"weight.{n}"))
        keys, count = ("step", "exp_avg", "exp_avg_sq"), len(trainable)
        state = {n: {key: file.get_tensor(f"{key}.{n}").clone() for key in keys} for n in range(count)}
        optimiser.load_state_dict({"state": state, "param_groups": optimiser.state_dict()["param_groups"]})
        return json.loads(file.metadata()["rows"]), float(file.metadata()["seconds"])

def train(config: TrainConfig, lists: Lists | None = None, progress: bool = True) -> dict[str, Any]:
    """Train as the config says and write the model to `config.out`; returns what train.json holds.

    `lists` replaces the ones that the config names.  A finished run with the same settings is not repeated;
    an unfinished one goes on from its last checkpoint and ends with the same weights as one that was never
    stopped.  Raises ValueError before anything is written if settings, lists or folder do not fit."""
    rank, ranks = rank_and_ranks()
    out = Path(os.path.abspath(Path(config.out).expanduser()))
    work, device = out.with_name(f"{out.name}.partial"), checkpoints.pick_device(config.device)
    if not (finished := (out / "train.json").exists()):
        check_new_folder(out)
    lists = training_lists(config) if lists is None else lists
    place = ("out", "device", "checkpoint_every")  # a run may move to another one
    settings = {key: value for key, value in asdict(config).items() if key not in place}
    content = json.dumps([asdict(item) for item in lists]).encode()
    record: dict[str, Any] = {"settings": settings, "queries": len(lists)}
    record["lists_sha256"] = hashlib.sha256(content).hexdigest()
    if finished:
        record = same_run(out / "train.json", record)
        print(f"{out}: finished already with these settings, nothing to do", file=sys.stderr)
        return record
    with locked(out) if rank == 0 else nullcontext():
        check_new_folder(out)  # again: another process may have ended while the lists were read
        if work.exists() and any(path.suffix != ".tmp" for path in work.iterdir()):
            same_run(work / "settings.json", record)
        encoder = BiEncoder.load(config.model, str(device), "float32")
        config = filled(config, encoder, len(lists), ranks)
        if rank == 0:
            work.mkdir(parents=True, exist_ok=True)
            write_json(work / "settings.json", record)  # first, so that what lies here is known as this run's
        config, rows, minutes = train_encoder(encoder, lists, config, work, progress)
        chosen = {key: value for key, value in vars(config).items() if settings.get(key, value) != value}
        record |= {"chosen": chosen, "steps": len(rows), "minutes": minutes, "ranks": ranks}
        record["machine"] = checkpoints.machine(device, pick_dtype(config.dtype, device))
        if rank == 0:
            shutil.rmtree(work / "model", ignore_errors=True)  # of a save that did not end
            encoder.save(work / "model")
            with writing(work / "model" / "log.jsonl") as sink:
                sink.writelines(json.dumps(row) + "\n" for row in rows)
            write_json(work / "model" / "train.json", record)
            if out.exists():
                out.rmdir()  # an empty folder, as checked above
            (work / "model").rename(out)
            shutil.rmtree(work)
    return record

def main(argv: list[str] | None = None) -> int:
    """Command line: one option a field of TrainConfig; under torchrun one process a rank."""
    def work() -> None:
        parser = HfArgumentParser(TrainConfig, prog="python -m repro.train", description=__doc__)
        notes = dict(re.findall(r"(\w+): .* = .*?  # (.+)", inspect.getsource(TrainConfig)))
        for action in parser._actions:
            action.help = notes.get(action.dest, action.help)
        (config,) = parser.parse_args_into_dataclasses(argv)
        with process_group(config.device):
            done = train(config)
            print("{}: {steps} steps on {queries} lists in {minutes:.1f} minutes".format(config.out, **done))
    return ending(work)

if __name__ == "__main__":
    sys.exit(main())
