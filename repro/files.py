"""Text files and folders: read line by line with a name for every bad line, written whole or not at all."""

import contextlib
import gzip
import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from filelock import FileLock, Timeout

AUTHORED = Path(__file__).parents[1] / "cached_prompts" / "authored.jsonl"  # the graded lists of the kit

def one_line(text: object, most: int = 300) -> str:
    """Text from outside, fit for a terminal: no control characters, single spaces, cut at `most`."""
    plain = " ".join("".join(c if c.isprintable() else " " for c in str(text)[: 10 * most]).split())
    return plain if len(plain) <= most else plain[: most - 3] + "..."

def ending(work: Callable[[], object]) -> int:
    """Run a command line's work and end it: 0, or 2 with one sentence on stderr, or 130 after Ctrl-C."""
    try:
        work()
    except (ValueError, OSError) as error:
        print(f"error: {one_line(error, 1000)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here", file=sys.stderr)
        return 130
    return 0

def read_lines(path: str | Path) -> Iterator[tuple[str, str]]:
    """Yield ("path:number", line) of a UTF-8 text file, plain or .gz; blank lines are left out.

    Raises ValueError if the file is missing, unreadable, damaged or not UTF-8."""
    path, number = Path(path), 0
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb") as file:
            for number, raw in enumerate(file, start=1):
                line = raw.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
                if line.strip():
                    yield f"{path}:{number}", line
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise ValueError(f"{path}:{number}: expected UTF-8 text, found byte {byte:#04x}") from error
    except (OSError, EOFError, gzip.zlib.error) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ValueError(f"{path}: cannot be read after line {number}: {reason}") from error

def read_jsonl(path: str | Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield ("path:number", object) of a JSON-lines file.  ValueError for a line that is not one object."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = [key for key, _ in pairs]
        if repeated := [key for key in keys if keys.count(key) > 1]:
            raise ValueError(f"the key {repeated[0]!r} stands there twice")
        return dict(pairs)

    for where, line in read_lines(path):
        try:
            row = json.loads(line, object_pairs_hook=once)
            json.dumps(row, ensure_ascii=False).encode("utf-8")  # an escaped lone surrogate is no text
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{where}: expected one JSON object, but {error}") from error
        if not isinstance(row, dict):
            raise ValueError(f"{where}: expected one JSON object, found {type(row).__name__}")
        yield where, row

def text_field(row: dict[str, Any], field: str, where: str, *, empty: bool = False) -> str:
    """The string in `row[field]`; an id may be a whole number.  ValueError naming `where` and the field."""
    value = row.get(field)
    if field in ("_id", "id", "qid") and type(value) is int:
        value = str(value)
    if not isinstance(value, str) or not (empty or value.strip()):
        found = "no such field" if field not in row else f"{type(value).__name__} {value!r}"
        raise ValueError(f"{where}: field {field!r}: expected text, found {found}")
    return value

def as_grade(value: Any, where: str) -> int:
    """A whole grade >= 0, from a number or from plain digits.  Raises ValueError naming `where` otherwise."""
    if isinstance(value, str) and re.fullmatch(" *[0-9]{1,9} *", value):
        return int(value)
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if is_number and 0 <= value < 1e9 and value == int(value):
        return int(value)
    raise ValueError(f"{where}: expected a whole grade of 0 or more, found {value!r}")

def checked_output(path: str | Path, own: Callable[[str], bool]) -> Path:
    """The path of a file that may be written: new, a device, or this command's `own` by its first line.

    Raises ValueError for somebody else's file, a folder, or a place that cannot be written; creates nothing.
    """
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
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path.with_name(f".{path.name[:100]}.lock"))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise ValueError(f"{path}: another process is writing it; wait, or name another place") from None
    try:
        yield
    finally:
        Path(lock.lock_file).unlink(missing_ok=True)
        lock.release()

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
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{path.name[:100]}.", suffix=".tmp", dir=path.parent))
    try:
        yield scratch
        scratch.chmod(0o755)  # mkdtemp makes it private
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
    """What stands at `path`.  Raises ValueError naming the first setting in which that run differs."""
    try:
        there = json.loads(path.read_text(encoding="utf-8"))
        theirs, ours = ({**run["settings"], "lists_sha256": run["lists_sha256"]} for run in (there, record))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path.parent}: exists and is no run of this command; name a new folder") from error
    if other := [key for key in ours if theirs.get(key) != ours[key]]:
        found = f"{other[0]} is {theirs.get(other[0])!r} there and {ours[other[0]]!r} here"
        raise ValueError(f"{path}: {found}; name a new folder or delete that one")
    return there
