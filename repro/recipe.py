"""What a training run is made of: its settings, its loss, and its lists.

`TrainConfig` is the only configuration there is.  What it leaves open (None) is filled in by the kind of
encoder and the number of lists, and written down in train.json under `chosen`.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor

from repro import losses
from repro.encoder import AUTHORED, BiEncoder
from repro.lists import GradedList, as_real, binary, combine, cut, lists_from_beir, load_lists

# Temperature and label temperature for cosine scores: of each loss's best trial (repro/results/tuning.json).
COSINE = {"infonce": (0.1, 1.0), "kl": (0.2, 1.0), "wasserstein_1d": (0.05, 0.2), "wasserstein_gaussian": (0.2, 1.0)}
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
    epochs: int | None = None  # 5 where only a projection trains, which takes seconds; else 2
    steps: int | None = None  # this many instead of whole epochs, so that arms with fewer lists train as long
    batch_size: int = 16  # lists in one loss, over all ranks; the paper has 64 on 4 GPUs
    lr: float | None = None  # 1e-5, the paper's; 3e-4 where only upper layers train
    temperature: float | None = None  # 1, the paper's; for cosines, which span 2 at most, COSINE's
    label_temperature: float | None = None  # likewise
    order: int = 2  # of wasserstein_1d; order and axis are those of the best of its trials (repro/results/tuning.json)
    axis: str = "grade"  # of wasserstein_1d
    ignore_between: bool = False  # of infonce
    freeze: int | None = None  # lower layers kept fixed: all where there is a projection to train, else none
    projection: bool = False  # end with a linear map, the identity at first, unless the model has one (the built-in does)
    warmup: float = 0.05  # share of the steps, as in the paper; then linear decay to 0
    weight_decay: float = 0.01  # AdamW's usual
    clip: float = 1.0  # gradient norm
    chunk: int | None = None  # texts embedded at once; the rest is recomputed in the backward pass
    state_gb: float = 8.0  # keep the frozen layers' states only if they fit in this much memory
    checkpoint_every: int = 50  # steps
    device: str = "auto"
    dtype: str = "auto"


def loss_function(config: TrainConfig, chosen: dict[str, Any]) -> Callable[..., Tensor]:
    """The loss named in the config with its options bound: (scores, labels, mask=) -> scalar."""
    options: dict[str, Any] = {"temperature": chosen["temperature"]}
    if config.loss == "infonce":
        options["ignore_between"] = config.ignore_between
    else:
        options["label_temperature"] = chosen["label_temperature"]
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


def frozen_layers(config: TrainConfig, encoder: BiEncoder) -> int:
    """How many lower layers stay fixed: as asked; else all of them where there is a projection to train, else none.

    All frozen, a step of 16 lists takes milliseconds on two cores, and seconds with one layer unfrozen.
    """
    if config.freeze is not None:
        return config.freeze
    return encoder.model.config.num_hidden_layers if encoder.projection is not None else 0


def chosen_settings(config: TrainConfig, encoder: BiEncoder, lists: int, ranks: int = 1) -> dict[str, Any]:
    """The settings that the config leaves to the kind of encoder and the number of lists, as numbers.

    Raises TrainError for an unknown loss.
    """
    if config.loss not in LOSSES:
        raise TrainError(f"loss: expected one of {', '.join(LOSSES)}, got {config.loss!r}")
    temperature, label_temperature = COSINE[config.loss] if encoder.normalise else (1.0, 1.0)
    epochs = config.epochs or (5 if encoder.all_frozen else 2)
    size = min(config.batch_size, lists // ranks * ranks)
    return {
        "freeze": encoder.frozen,
        "temperature": config.temperature or temperature,
        "label_temperature": config.label_temperature or label_temperature,
        "lr": config.lr or (3e-4 if encoder.frozen else 1e-5),
        "batch_size": size,
        "steps": config.steps or epochs * (lists // size),
        "ranks": ranks,
    }
