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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.nn.functional as dist_nn
from torch import Tensor, nn
from tqdm import tqdm

from repro import losses
from repro.checkpoints import cache_dir, pick_device, pick_dtype
from repro.encoder import BiEncoder, Tokens
from repro.lists import Batch, GradedList, collate
from repro.recipe import LOSSES, TrainConfig, TrainError, chosen_settings, frozen_layers, loss_function, training_lists
from repro.runs import identity, is_finished, machine, resume, save_checkpoint, trim_log, write_json
from repro.states import StateBank

__all__ = ["LOSSES", "TrainConfig", "TrainError", "batch_loss", "fit", "loss_function", "main", "train", "training_lists"]

TokenSource = Callable[[list[str], str], Tokens]  # (texts, "query" or "passage") -> tokens

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


def token_source(encoder: BiEncoder, lists: Sequence[GradedList], state_gb: float = 8.0) -> TokenSource:
    """How the texts of the lists become tokens: tokenised on the fly, or looked up with what the frozen layers made of them."""
    if not encoder.frozen:
        return encoder.tokenise
    bank = StateBank(encoder, cache_dir() / "pooled", state_gb)
    bank.add([item.query for item in lists], "query")
    bank.add([passage for item in lists for passage in item.passages], "passage")
    return bank


def learning_rate(step: int, steps: int, config_lr: float, warmup: float) -> float:
    """Linear warm-up over the first `warmup` share of the steps, then linear decay to 0 (step counts from 0)."""
    rise = max(1, math.ceil(warmup * steps))
    return config_lr * min((step + 1) / rise, (steps - step) / max(1, steps - rise + 1))


def start_encoder(config: TrainConfig, device: torch.device) -> BiEncoder:
    """The encoder that a run starts from, with its projection if asked for and its frozen layers."""
    encoder = BiEncoder.load(config.model, str(device), "float32")  # weights stay float32; dtype is autocast's
    if config.projection and encoder.projection is None:
        encoder.projection = nn.Parameter(torch.eye(encoder.model.config.hidden_size, device=device))
    encoder.freeze(frozen_layers(config, encoder))
    return encoder


def fit(
    model: nn.Module,
    lists: Sequence[GradedList],
    tokens: TokenSource,
    config: TrainConfig,
    chosen: dict[str, Any],
    optimiser: torch.optim.Optimizer,
    start: int = 0,
) -> Iterator[dict[str, float]]:
    """Train `model` in place from step `start` on; yields one row a step: step, epoch, loss, lr, grad_norm.

    An epoch is one pass in an order drawn from (seed, epoch); a last, smaller batch would be another
    loss and is left out.  Raises TrainError if the loss is not a finite number.
    """
    rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    trainable = [p for group in optimiser.param_groups for p in group["params"]]
    device = trainable[0].device
    autocast = pick_dtype(config.dtype, device)
    loss = loss_function(config, chosen)
    size, steps = chosen["batch_size"], chosen["steps"]
    per_epoch = len(lists) // size
    order: list[int] = []
    for step in range(start, steps):
        epoch, position = divmod(step, per_epoch)
        if position == 0 or not order:
            order = random.Random(f"{config.seed}/{epoch}").sample(range(len(lists)), len(lists))
        batch = collate([lists[j] for j in order[position * size : (position + 1) * size]])
        lr = learning_rate(step, steps, chosen["lr"], config.warmup)
        for group in optimiser.param_groups:
            group["lr"] = lr
        torch.manual_seed((config.seed * steps + step) * ranks + rank)  # dropout's; nothing to save for a resume
        with torch.autocast(device.type, autocast, enabled=autocast != torch.float32):
            value = batch_loss(model, batch, tokens, loss, config.chunk)
        value.backward()
        norm = nn.utils.clip_grad_norm_(trainable, config.clip)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        row = {"step": step, "epoch": epoch, "loss": value.item(), "lr": lr, "grad_norm": norm.item()}
        if not math.isfinite(row["loss"]):
            raise TrainError(f"step {step}: the loss is {row['loss']}; lower --lr or raise --temperature")
        yield row


def make_optimiser(encoder: BiEncoder, config: TrainConfig, lr: float) -> torch.optim.AdamW:
    """AdamW over what is not frozen."""
    return torch.optim.AdamW([p for p in encoder.parameters() if p.requires_grad], lr=lr, weight_decay=config.weight_decay)


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
    device = pick_device(config.device)
    encoder = start_encoder(config, device)
    chosen = record["chosen"] = chosen_settings(config, encoder, len(lists), ranks)
    if chosen["batch_size"] < config.batch_size:
        print(f"only {len(lists)} lists: a batch is {chosen['batch_size']} of them, not {config.batch_size}", file=sys.stderr)
    tokens = tokens or token_source(encoder, lists, config.state_gb)
    encoder.train()
    model = nn.parallel.DistributedDataParallel(encoder) if ranks > 1 else encoder
    optimiser = make_optimiser(encoder, config, chosen["lr"])
    trainable, steps = optimiser.param_groups[0]["params"], chosen["steps"]
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
        for row in fit(model, lists, tokens, config, chosen, optimiser, start):
            log.write(json.dumps(row) + "\n")
            bar.set_postfix_str(f"loss {row['loss']:.4f}", refresh=False)
            bar.update()
            done = row["step"] + 1
            if rank == 0 and done % config.checkpoint_every == 0 and done < steps:
                log.flush()
                save_checkpoint(work, done, time.monotonic() - began, trainable, optimiser)
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
    kinds: dict[str, type] = dict.fromkeys(("passages", "freeze", "chunk", "steps", "epochs"), int)
    kinds |= dict.fromkeys(("lr", "temperature", "label_temperature"), float)
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
