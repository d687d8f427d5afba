"""Files and folders that appear whole or not at all, and the end of a command."""

import contextlib
import io
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any


def one_line(text: object, most: int = 300) -> str:
    """Text from outside, fit for a terminal: printable, single spaces, cut at `most`."""
    printable = "".join(c if c.isprintable() else " " for c in str(text))
    plain = " ".join(printable.split())
    if len(plain) > most:
        plain = plain[: most - 3] + "..."
    return plain


class _Console:
    """stdout or stderr that cannot end a command: what a closed pipe or full disk refuses is lost.

    Characters that its encoding lacks are escaped.
    """

    def __init__(self, stream: Any) -> None:
        self.stream = stream or io.StringIO()  # Python has None for one that was closed before
        if isinstance(stream, io.TextIOWrapper):  # not so in a notebook
            stream.reconfigure(errors="backslashreplace")

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> None:
        with contextlib.suppress(OSError):
            self.stream.write(text)

    def flush(self) -> None:
        try:
            self.stream.flush()
        except OSError:  # Python would try again when it ends, and end with another exit code
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())


def run_command(work: Callable[[], object]) -> int:
    """Do the work of a command and return its exit code, which printing cannot change.

    0, or 2 with a sentence on stderr (bad input, files, memory), or 130 after Ctrl-C.
    """
    code = 0
    out, err = _Console(sys.stdout), _Console(sys.stderr)
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            work()
        except KeyboardInterrupt:
            print("stopped", file=err)
            code = 130
        except Exception as error:
            out_of_memory = type(error).__name__ == "OutOfMemoryError"  # torch's, not imported here
            if not (out_of_memory or isinstance(error, ValueError | OSError)):
                raise
            print(f"error: {one_line(error, 1000)}", file=err)
            code = 2
        out.flush()
        err.flush()
    return code


def _check_place(path: Path) -> Path:
    """`path`, if something can be made there; leaves nothing behind."""
    parent = path.parent
    while not parent.exists():
        parent = parent.parent
    try:
        tempfile.TemporaryFile(dir=parent).close()
    except OSError as error:
        raise ValueError(f"{path}: cannot be written: {error.strerror}") from error
    return path


def check_output(path: str | Path, overwrite: bool = False) -> Path:
    """The absolute path of a file that may be written; nothing is created.

    Raises ValueError if it exists and is not to be overwritten, is a folder, or cannot be written.
    """
    path = Path(path).expanduser().resolve()
    if path.exists() and not path.is_file():
        raise ValueError(f"{path}: is not a file, expected the name of one")
    if path.exists() and not overwrite:
        raise ValueError(f"{path}: exists; name another file, or give --overwrite")
    return _check_place(path)


@contextlib.contextmanager
def _beside(path: Path) -> Iterator[Path]:
    """A place beside `path` for what is not whole yet; what stays there is removed in the end."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".") as scratch:
        yield Path(scratch, path.name)


def write_text(path: str | Path, text: str) -> None:
    """Write a UTF-8 file whole or not at all; missing folders are made."""
    with _beside(Path(path)) as scratch:
        scratch.write_text(text, encoding="utf-8", newline="\n")
        scratch.replace(path)


def write_json(path: str | Path, content: dict[str, Any]) -> None:
    """Write an object as indented JSON, whole or not at all."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def check_new_folder(folder: str | Path, overwrite: bool = False) -> Path:
    """The absolute path of a folder that may be made; nothing is created.

    Raises ValueError if something is there (an empty folder may be; with `overwrite`, one that
    holds a train.json), or if nothing can be made there.
    """
    path = Path(folder).expanduser().resolve()
    trained = overwrite and (path / "train.json").is_file()
    empty = path.is_dir() and not any(path.iterdir())
    if path.exists() and not trained and not empty:
        raise ValueError(
            f"{path}: exists; name a new folder (--overwrite replaces only one with a train.json)"
        )
    return _check_place(path)


@contextlib.contextmanager
def new_folder(folder: str | Path, overwrite: bool = False) -> Iterator[Path]:
    """A scratch folder that takes the place of `folder` if the block ends well, or else is removed.

    Raises what `check_new_folder` raises.
    """
    path = check_new_folder(folder, overwrite)
    with _beside(path) as scratch:
        scratch.mkdir()
        yield scratch
        rights = scratch.stat().st_mode & 0o666
        for file in scratch.rglob("*"):
            if file.is_file():
                file.chmod(rights)  # safetensors lets nobody else read what it saves
        if path.exists():
            shutil.rmtree(path)
        scratch.rename(path)
