"""Errors in one sentence, files and folders that appear whole or not at all, a command's end."""

import io
import json
import os
import re
import shutil
import sys
import tempfile
from argparse import RawDescriptionHelpFormatter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from pathlib import Path
from typing import Any

Place = str | Path


def one_line(text: object, most: int = 300) -> str:
    """Text from outside, fit for a terminal: printable, single spaces, cut at `most`."""
    printable = "".join(c if c.isprintable() else " " for c in str(text))
    return " ".join(printable.split())[:most]


@contextmanager
def naming(what: object, *kinds: type) -> Iterator:
    """Make errors of these kinds, or all, a ValueError that says in front what failed."""
    expected = kinds or (Exception,)
    try:
        yield
    except expected as error:
        raise ValueError(f"{what}: {one_line(error)}") from error


class _Console:
    """stdout or stderr that cannot end a command: what a closed pipe or full disk refuses is lost.

    Characters that its encoding lacks are escaped.
    """

    def __init__(self, stream: Any) -> None:
        self.stream = stream or io.StringIO()  # Python has None for one that was closed before
        with suppress(AttributeError):  # a notebook's stream has other settings
            stream.reconfigure(errors="backslashreplace")

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> None:
        with suppress(OSError):
            self.stream.write(text)

    def flush(self) -> None:
        try:
            self.stream.flush()
        except OSError:  # Python would try again when it ends, and end with another exit code
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())


def run_command(work: Callable) -> int:
    """Do the work of a command and return its exit code, which printing cannot change.

    0, or 2 with a sentence on stderr (bad input, files, memory), or 130 after Ctrl-C.
    """
    with redirect_stdout(_Console(sys.stdout)), redirect_stderr(_Console(sys.stderr)):
        try:
            work()
            return 0
        except KeyboardInterrupt:
            print("stopped", file=sys.stderr)
            return 130
        except Exception as error:
            # Python's, CUDA's, a CPU's and Apple's; only the first two have their own type
            out_of_memory = re.search(
                "MemoryError|allocate memory|out of memory", f"{type(error).__name__} {error}"
            )
            if not (out_of_memory or isinstance(error, ValueError | OSError)):
                raise
            print(f"error: {one_line(error, 1000)}", file=sys.stderr)
            return 2
        finally:
            sys.stdout.flush()


def command_line(work: Callable, *kinds: type) -> Callable:
    """main(argv=None) -> exit code: hand `work` a value of each dataclass, an option a field.

    The docstring of the first is the help.  A command line that does not fit ends the program.
    """

    def main(argv: list | None = None) -> int:
        from transformers import HfArgumentParser  # here, since the metrics do without torch

        parser = HfArgumentParser(
            kinds,
            prog=f"python -m {sys.modules[work.__module__].__spec__.name}",
            description=kinds[0].__doc__,
            formatter_class=RawDescriptionHelpFormatter,
        )
        return run_command(lambda: work(*parser.parse_args_into_dataclasses(argv)))

    return main


def _writable(place: Place) -> Path:
    """The absolute path of a place where something can be made; leaves nothing behind."""
    path = Path(place).expanduser().resolve()
    parent = next((folder for folder in path.parents if folder.exists()), path)
    with naming(f"{path}: cannot be written", OSError):
        tempfile.TemporaryFile(dir=parent).close()
    return path


def check_output(path: Place, overwrite: bool = False) -> Path:
    """The absolute path of a file that may be written; nothing is created.

    Raises ValueError if it exists and is not to be overwritten, is a folder, or cannot be written.
    """
    path = _writable(path)
    if path.exists() and not (overwrite and path.is_file()):
        raise ValueError(f"{path}: exists; name another file (some commands --overwrite files)")
    return path


@contextmanager
def _beside(path: Path) -> Iterator:
    """A place beside `path` for what is not whole yet; what stays there is removed in the end."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".") as scratch:
        yield Path(scratch, path.name)


def write_text(path: Place, text: str) -> None:
    """Write a UTF-8 file whole or not at all; missing folders are made."""
    with _beside(Path(path)) as scratch:
        scratch.write_bytes(text.encode())
        scratch.replace(path)


def write_json(path: Place, content: dict) -> None:
    """Write an object as indented JSON, whole or not at all; a path or so becomes text."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False, default=str) + "\n")


def check_new_folder(folder: Place, overwrite: bool = False) -> Path:
    """The absolute path of a folder that may be made; nothing is created.

    Raises ValueError if something is there (an empty folder may be, but no mount point, which
    cannot be replaced; with `overwrite`, one that holds a train.json), or if nothing can be made.
    """
    path = _writable(folder)
    trained = overwrite and (path / "train.json").is_file()
    empty = path.is_dir() and not path.is_mount() and not any(path.iterdir())
    if path.exists() and not trained and not empty:
        raise ValueError(f"{path}: exists; --overwrite replaces a folder only with a train.json")
    return path


@contextmanager
def new_folder(folder: Place, overwrite: bool = False) -> Iterator:
    """A scratch folder that takes the place of `folder` if the block ends well, or else is removed.

    Raises what `check_new_folder` raises.
    """
    path = check_new_folder(folder, overwrite)
    with _beside(path) as scratch:
        scratch.mkdir()
        yield scratch
        if path.exists():
            shutil.rmtree(path)
        scratch.rename(path)
