"""The folder of a training run: what identifies it, its checkpoints, and how it goes on after a kill.

A run is known by its settings and a hash of its lists.  A checkpoint is one safetensors file with
the trainable weights and AdamW's moments; nothing is pickled, and the file is replaced whole, so a kill
at any moment leaves the one before.
"""

import hashlib
import json
import os
import platform
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from repro.files import replacing
from repro.lists import GradedList


class RunError(ValueError):
    """An output folder that belongs to another run, or to none."""


def identity(settings: dict[str, Any], lists: list[GradedList]) -> dict[str, Any]:
    """What identifies a run: its settings and a hash of its lists, but not where it is written or computed."""
    settings = {key: value for key, value in settings.items() if key not in ("out", "device", "checkpoint_every")}
    settings = json.loads(json.dumps(settings))  # tuples become lists, as when it is read back
    content = json.dumps([[item.id, item.query, item.passages, item.grades] for item in lists])
    return {"settings": settings, "queries": len(lists), "lists_sha256": hashlib.sha256(content.encode()).hexdigest()}


def check_same_run(path: Path, record: dict[str, Any]) -> None:
    """Raise RunError naming the first setting in which the run at `path` differs from this one."""
    try:
        other = json.loads(path.read_text(encoding="utf-8"))
        theirs = {**other["settings"], "lists_sha256": other["lists_sha256"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(f"{path.parent}: is there already and is no run of this command; name a new folder") from error
    ours = {**record["settings"], "lists_sha256": record["lists_sha256"]}
    for key in ours:
        if theirs.get(key) != ours[key]:
            raise RunError(
                f"{path}: {key} is {theirs.get(key)!r} there and {ours[key]!r} here; name a new folder or delete that one"
            )


def is_finished(out: Path, record: dict[str, Any]) -> bool:
    """True if `out` holds this very run, ended; False if there is nothing; RunError if it is another run's."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    check_same_run(out / "train.json", record)
    return True


def save_checkpoint(work: Path, step: int, seconds: float, trainable: list[Tensor], optimiser: torch.optim.Optimizer) -> None:
    """Weights and AdamW's two moments after `step` steps, in one file that is replaced whole."""
    tensors = {f"weight.{n}": p.detach().cpu().contiguous() for n, p in enumerate(trainable)}
    for n, parameter in enumerate(trainable):
        for key, value in optimiser.state[parameter].items():
            tensors[f"{key}.{n}"] = value.detach().cpu().contiguous()
    save_file(tensors, work / "state.tmp", metadata={"step": str(step), "seconds": str(seconds)})
    os.replace(work / "state.tmp", work / "state.safetensors")


def resume(
    work: Path, record: dict[str, Any], trainable: list[Tensor], optimiser: torch.optim.Optimizer
) -> tuple[int, float]:
    """Load the last checkpoint of an unfinished run; (steps done, seconds spent).  (0, 0) if it wrote none.

    Raises RunError if `work` holds anything that is not this run's: it is deleted when the run ends.
    """
    if any(not path.name.endswith(".tmp") for path in work.iterdir()):
        check_same_run(work / "settings.json", record)
    shutil.rmtree(work / "model", ignore_errors=True)  # a save that did not end
    path = work / "state.safetensors"
    done, seconds = 0, 0.0
    if path.exists():
        with safe_open(path, "pt") as file:
            done, seconds = int(file.metadata()["step"]), float(file.metadata()["seconds"])
            with torch.no_grad():
                for n, parameter in enumerate(trainable):
                    parameter.copy_(file.get_tensor(f"weight.{n}"))
            keys = ("step", "exp_avg", "exp_avg_sq")
            state = {n: {key: file.get_tensor(f"{key}.{n}") for key in keys} for n in range(len(trainable))}
            optimiser.load_state_dict({"state": state, "param_groups": optimiser.state_dict()["param_groups"]})
        print(f"{work}: goes on after step {done}", file=sys.stderr)
    return done, seconds


def trim_log(work: Path, done: int) -> None:
    """Keep the first `done` lines of the log: steps behind the checkpoint are run, and logged, again."""
    log = work / "log.jsonl"
    lines = log.read_text(encoding="utf-8").splitlines(keepends=True)[:done] if log.exists() else []
    log.write_text("".join(lines), encoding="utf-8")


def machine(device: torch.device) -> dict[str, Any]:
    """What a measured number must name: device, processor type, cores and the versions that matter."""
    versions = {"python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__}
    return {"device": str(device), "processor": platform.machine(), "cores": os.cpu_count(), **versions}


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write an object as indented JSON; the file appears whole or not at all."""
    with replacing(path) as sink:
        sink.write(json.dumps(content, indent=2, ensure_ascii=False) + "\n")
