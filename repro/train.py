"""Train a bi-encoder on graded lists with one of the four losses: one plain loop.

    python -m repro.train --lists cached_prompts/authored.jsonl --loss wasserstein_1d --out runs/w1 --seed 0

Each step takes `batch_size` lists, embeds their queries and passages, scores every query against
every passage of the batch, and hands scores and grades to the loss.  Under `torchrun` each rank
embeds its slice of the batch and the embeddings are gathered with gradient, so the loss always
sees the whole batch (the Gaussian loss of a batch is not the mean over its parts).

OUT becomes a sentence-transformers folder with `train.json` (settings, versions, minutes) and
`log.jsonl` (one line a step).  Until then everything lies in OUT.partial; the same command goes on
from the last checkpoint there after a kill.
"""

import argparse
import json
import math
import os
import random
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.nn.functional as dist_nn
from torch import Tensor, nn
from tqdm import tqdm

from repro import losses
from repro.checkpoints import pick_device, pick_dtype
from repro.encoder import AUTHORED, BiEncoder, Tokens
from repro.lists import Batch, GradedList, as_real, binary, collate, combine, cut, lists_from_beir, load_lists
from repro.runs import identity, is_finished, machine, resume, save_checkpoint, trim_log, write_json

TokenSource = Callable[[list[str], str], Tokens]  # (texts, "query" or "passage") -> tokens

# Lower layers of the built-in encoder that stay fixed: half of its 6.  Their states are computed once, and
# a step costs half; fixing 5 makes it a sixth, for less to learn with.
FREEZE = 3
LOSSES = ("infonce", "kl", "wasserstein_1d", "wasserstein_gaussian")


class TrainError(ValueError):
    """Settings that do not fit together."""


@dataclass
class TrainConfig:
    """What a run is made of.  None means: chosen by the kind of encoder, and written to train.json."""

    lists: Sequence[str] = (str(AUTHORED),)  # files or BEIR folders
    out: str = "runs/model"
    loss: str = "wasserstein_1d"
    seed: int = 0
    model: str = "base"
    recipe: str = "graded"  # or "binary": top grade against the rest
    real: str | None = None  # BEIR folder whose train judgments join the lists (positives 3, others 1)
    passages: int | None = None  # at most this many passages a list
    epochs: int = 2
    batch_size: int = 16  # lists in one loss, over all ranks; the paper has 64 on 4 GPUs
    lr: float | None = None  # 1e-5, the paper's; 3e-4 where only upper layers train
    temperature: float | None = None  # 1, the paper's; 0.05 for cosine scores, which span 2 at most
    label_temperature: float = 1.0
    order: int = 1  # of wasserstein_1d
    axis: str = "grade"  # of wasserstein_1d
    ignore_between: bool = False  # of infonce
    freeze: int | None = None  # lower layers kept fixed: 3 of the built-in encoder's 6, else none
    warmup: float = 0.05  # share of the steps, as in the paper; then linear decay to 0
    weight_decay: float = 0.01  # AdamW's usual
    clip: float = 1.0  # gradient norm
    chunk: int | None = None  # texts embedded at once; the rest is recomputed in the backward pass
    state_gb: float = 8.0  # keep the frozen layers' states only if they fit in this much memory
    checkpoint_every: int = 50  # steps
    device: str = "auto"
    dtype: str = "auto"


def loss_function(config: TrainConfig, temperature: float) -> Callable[..., Tensor]:
    """The loss named in the config with its options bound: (scores, labels, mask=) -> scalar."""
    if config.loss not in LOSSES:
        raise TrainError(f"loss: expected one of {', '.join(LOSSES)}, got {config.loss!r}")
    options: dict[str, Any] = {"temperature": temperature}
    if config.loss == "infonce":
        options["ignore_between"] = config.ignore_between
    else:
        options["label_temperature"] = config.label_temperature
    if config.loss == "wasserstein_1d":
        options |= {"order": config.order, "axis": config.axis}
    return partial(getattr(losses, config.loss), **options)


def training_lists(config: TrainConfig) -> list[GradedList]:
    """The lists of the config in the shape of its recipe.  Raises TrainError for an unknown recipe."""
    if config.recipe not in ("graded", "binary"):
        raise TrainError(f"recipe: expected graded or binary, got {config.recipe!r}")
    lists = load_lists(config.lists)
    if config.real:
        lists = combine(lists, [as_real(item) for item in lists_from_beir(config.real)])
    if config.passages:
        rng = random.Random(config.seed)
        lists = [cut(item, config.passages, rng) for item in lists]
    if config.recipe == "binary":
        lists = [binary(item) for item in lists]
    return lists


def batch_loss(
    encoder: nn.Module,
    batch: Batch,
    tokens: TokenSource,
    loss: Callable[..., Tensor],
    chunk: int | None = None,
) -> Tensor:
    """Loss of one batch, computed by every rank on all of it, from embeddings that the ranks share out.

    Rank r embeds lists r*B/W ... (r+1)*B/W - 1.  The gather's backward sums the W ranks' equal
    gradients and DDP's mean divides by W, so the parameter gradients are those of one process.
    """
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    rows, k = batch.labels.shape
    mine = slice(rank * rows // ranks, (rank + 1) * rows // ranks)
    present = batch.mask[mine].flatten()  # padding is not embedded
    texts = [text for text, real in zip(batch.passages[mine.start * k : mine.stop * k], present, strict=True) if real]
    queries, found = encoder(tokens(batch.queries[mine], "query"), tokens(texts, "passage"), chunk=chunk)
    passages = found.new_zeros(len(present), found.shape[1])  # (B*k / W, d)
    passages[present.to(found.device)] = found
    if ranks > 1:
        queries, passages = (torch.cat(dist_nn.all_gather(x.contiguous())) for x in (queries, passages))
    # Autocast is for the transformer: bfloat16 scores would lose the third digit, times 20 at temperature 0.05.
    with torch.autocast(queries.device.type, enabled=False):
        scores = queries.float() @ passages.float().T  # (B, B*k)
        labels = losses.expand_labels(batch.labels).to(scores.device)
        mask = None if batch.mask.all() else batch.mask.flatten().to(scores.device)  # (B*k,)
        return loss(scores, labels, mask=mask)


def default_freeze(config: TrainConfig) -> int:
    """How many lower layers stay fixed: as asked; else FREEZE of the built-in encoder's 6, none of another's."""
    return config.freeze if config.freeze is not None else FREEZE if config.model == "base" else 0


def token_source(
    encoder: BiEncoder, queries: Sequence[str], passages: Sequence[str], state_gb: float = 8.0
) -> TokenSource:
    """How texts become tokens: tokenised on the fly, or looked up with the frozen layers' states.

    The states of all the texts are computed here, once, if they fit in `state_gb`; if not, stderr
    says so and the frozen layers run again in every step.
    """
    if not encoder.frozen:
        return encoder.tokenise
    unique = {"query": list(dict.fromkeys(queries)), "passage": list(dict.fromkeys(passages))}
    tokens = {kind: encoder.tokenise(texts, kind) for kind, texts in unique.items()}
    count = sum(len(row) for group in tokens.values() for row in group.ids)
    size = count * encoder.model.config.hidden_size * encoder.model.dtype.itemsize / 1e9
    if size > state_gb:
        print(
            f"the frozen layers' states of {count} tokens need {size:.1f} GB, more than the {state_gb:g} GB "
            "allowed (state_gb); they are computed again in every step instead",
            file=sys.stderr,
        )
        return encoder.tokenise
    kept = {kind: encoder.keep_states(group, progress=True) for kind, group in tokens.items()}
    row_of = {kind: {text: row for row, text in enumerate(group)} for kind, group in unique.items()}
    return lambda wanted, kind: kept[kind][[row_of[kind][text] for text in wanted]]


def learning_rate(step: int, steps: int, config_lr: float, warmup: float) -> float:
    """Linear warm-up over the first `warmup` share of the steps, then linear decay to 0 (step counts from 0)."""
    rise = max(1, math.ceil(warmup * steps))
    return config_lr * min((step + 1) / rise, (steps - step) / max(1, steps - rise + 1))


def train(
    config: TrainConfig,
    lists: list[GradedList] | None = None,
    tokens: TokenSource | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Train as the config says and write the model to `config.out`; returns what train.json holds.

    `lists` replaces the ones that the config names, and `tokens` hands in the frozen layers' states
    (a `token_source` of the same start and freeze), so that several runs can share them.  A finished
    run with the same settings is not repeated; an unfinished one is resumed from its last checkpoint
    and ends with the same weights as one that was never stopped.  Raises TrainError, RunError or
    DataError (all ValueErrors) before anything is written if the settings do not fit.
    """
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    lists = training_lists(config) if lists is None else lists
    out, work = Path(config.out), Path(f"{config.out}.partial")
    record = identity(asdict(config), lists)
    if is_finished(out, record):
        print(f"{out}: finished already with these settings, nothing to do", file=sys.stderr)
        return json.loads((out / "train.json").read_text(encoding="utf-8"))
    if config.batch_size < 1 or config.batch_size % ranks or len(lists) < ranks:
        raise TrainError(
            f"batch_size: expected a multiple of the {ranks} ranks, at least 1, and as many lists as ranks, "
            f"got {config.batch_size} and {len(lists)} lists"
        )
    size = min(config.batch_size, len(lists) // ranks * ranks)
    if size < config.batch_size:
        print(f"only {len(lists)} lists: a batch is {size} of them, not {config.batch_size}", file=sys.stderr)
    device = pick_device(config.device)
    encoder = BiEncoder.load(config.model, str(device), "float32")  # weights stay float32; dtype is autocast's
    autocast = pick_dtype(config.dtype, device)
    freeze = default_freeze(config)
    encoder.freeze(freeze)
    temperature = config.temperature or (0.05 if encoder.normalise else 1.0)
    peak_lr = config.lr or (3e-4 if freeze else 1e-5)
    loss = loss_function(config, temperature)
    record["chosen"] = {"freeze": freeze, "temperature": temperature, "lr": peak_lr, "batch_size": size, "ranks": ranks}
    if tokens is None:
        texts = [item.query for item in lists], [passage for item in lists for passage in item.passages]
        tokens = token_source(encoder, *texts, config.state_gb)
    encoder.train()
    model = nn.parallel.DistributedDataParallel(encoder) if ranks > 1 else encoder
    trainable = [p for p in encoder.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(trainable, lr=peak_lr, weight_decay=config.weight_decay)
    per_epoch = len(lists) // size  # a last, smaller batch would be another loss; it is left out
    steps = config.epochs * per_epoch
    start, seconds = resume(work, record, trainable, optimiser) if work.exists() else (0, 0.0)
    if ranks > 1:
        dist.barrier()  # every rank has looked before the first one writes
    if rank == 0:
        work.mkdir(parents=True, exist_ok=True)
        write_json(work / "settings.json", record)  # first, so that whatever lies here is known as this run's
        trim_log(work, start)
    began = time.monotonic() - seconds
    bar = tqdm(total=steps, initial=start, desc=f"train {config.loss}", unit="step", disable=not progress or rank > 0)
    with bar, open(work / "log.jsonl" if rank == 0 else os.devnull, "a", encoding="utf-8") as log:
        for step in range(start, steps):
            epoch, position = divmod(step, per_epoch)
            order = random.Random(f"{config.seed}/{epoch}").sample(range(len(lists)), len(lists))
            chosen = order[position * size : (position + 1) * size]
            batch = collate([lists[j] for j in chosen])
            for group in optimiser.param_groups:
                group["lr"] = learning_rate(step, steps, peak_lr, config.warmup)
            torch.manual_seed((config.seed * steps + step) * ranks + rank)  # dropout's; nothing to save for a resume
            with torch.autocast(device.type, autocast, enabled=autocast != torch.float32):
                value = batch_loss(model, batch, tokens, loss, config.chunk)
            value.backward()
            norm = nn.utils.clip_grad_norm_(trainable, config.clip)
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
            row = {"step": step, "epoch": epoch, "loss": value.item(), "lr": group["lr"], "grad_norm": norm.item()}
            if not math.isfinite(row["loss"]):
                raise TrainError(f"step {step}: the loss is {row['loss']}; lower --lr or raise --temperature")
            log.write(json.dumps(row) + "\n")
            bar.set_postfix_str(f"loss {row['loss']:.4f}")
            bar.update()
            if rank == 0 and (step + 1) % config.checkpoint_every == 0 and step + 1 < steps:
                log.flush()
                save_checkpoint(work, step + 1, time.monotonic() - began, trainable, optimiser)
    record |= {"steps": steps, "minutes": (time.monotonic() - began) / 60, "machine": machine(device)}
    if rank == 0:
        encoder.save(work / "model")
        (work / "log.jsonl").rename(work / "model" / "log.jsonl")
        write_json(work / "model" / "train.json", record)
        if out.exists():
            out.rmdir()  # an empty folder, as is_finished has checked
        (work / "model").rename(out)
        shutil.rmtree(work)
    return record


def main(argv: list[str] | None = None) -> int:
    """Command line: one option a field of TrainConfig."""
    parser = argparse.ArgumentParser(prog="python -m repro.train", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    defaults = TrainConfig()
    kinds: dict[str, type] = {"passages": int, "lr": float, "temperature": float, "freeze": int, "chunk": int}
    for field in fields(TrainConfig):
        flag, default = f"--{field.name.replace('_', '-')}", getattr(defaults, field.name)
        if field.name == "lists":
            parser.add_argument(flag, nargs="+", default=default, metavar="FILE", help="cache files, .jsonl lists, or BEIR folders")
        elif field.name == "loss":
            parser.add_argument(flag, choices=LOSSES, default=default, type=lambda name: name.replace("-", "_"))
        elif isinstance(default, bool):
            parser.add_argument(flag, action="store_true")
        else:
            kind = type(default) if default is not None else kinds.get(field.name, str)
            parser.add_argument(flag, type=kind, default=default, help=f"default: {default}")
    config = TrainConfig(**vars(parser.parse_args(argv)))
    distributed = "WORLD_SIZE" in os.environ and int(os.environ["WORLD_SIZE"]) > 1
    if distributed:
        on_cuda = config.device in ("auto", "cuda") and torch.cuda.is_available()
        if on_cuda:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl" if on_cuda else "gloo")
    try:
        record = train(config)
        if distributed and dist.get_rank() > 0:
            return 0
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    finally:
        if distributed:
            dist.destroy_process_group()
    print(f"{config.out}: {record['steps']} steps on {record['queries']} lists in {record['minutes']:.1f} minutes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
