"""Read text files line by line, and say exactly where they break the contract; write them whole or not at all.

Everything that the kit reads is UTF-8, plain or gzipped, one row a line.  A bad row raises DataError
with file, line and field, so that a user can go and look.
"""

import contextlib
import gzip
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any


class DataError(ValueError):
    """A collection or list file that breaks the contract; the message names file, line and field."""


def read_lines(path: str | Path) -> Iterator[tuple[int, str]]:
    """Yield (line number from 1, line without its end) of a UTF-8 text file, plain or .gz, blank lines left out.

    Raises DataError if the file is missing, unreadable or not UTF-8.
    """
    path, number = Path(path), 0
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb") as file:
            for number, raw in enumerate(file, start=1):
                if line := raw.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n"):
                    yield number, line
    except UnicodeDecodeError as error:
        raise DataError(f"{path}:{number}: expected UTF-8 text, found byte {error.object[error.start]:#04x}") from error
    except (OSError, EOFError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise DataError(f"{path}: cannot be read after line {number}: {reason}") from error


def read_jsonl(path: str | Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (line number, object) of a JSON-lines file.  Raises DataError for a line that is not one object."""
    for number, line in read_lines(path):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}:{number}: expected one JSON object, but {error}") from error
        if not isinstance(row, dict):
            raise DataError(f"{path}:{number}: expected one JSON object, found {type(row).__name__}")
        yield number, row


def text_field(row: dict[str, Any], field: str, where: str, *, empty: bool = False) -> str:
    """The string in `row[field]`; an id may be a whole number.  Raises DataError naming `where` and the field."""
    value = row.get(field)
    if isinstance(value, int) and not isinstance(value, bool) and field in ("_id", "id"):
        value = str(value)
    if not isinstance(value, str):
        found = "no such field" if field not in row else f"{type(value).__name__} {value!r}"
        raise DataError(f"{where}: field {field!r}: expected text, found {found}")
    if not empty and not value.strip():
        raise DataError(f"{where}: field {field!r}: expected text, found it empty")
    return value


def as_grade(value: Any, where: str) -> int:
    """A grade as a whole number >= 0, from text or number.  Raises DataError otherwise."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if isinstance(value, bool) or not math.isfinite(number) or number != int(number) or number < 0:
        raise DataError(f"{where}: field 'score': expected a whole grade of 0 or more, found {value!r}")
    return int(number)


@contextlib.contextmanager
def replacing(file: str | Path) -> Iterator[IO[str]]:
    """Open a UTF-8 text file that takes the place of `file` only if the block ends well."""
    file = Path(file)
    scratch = file.with_name(f".{file.name[:100]}.{os.getpid()}.tmp")
    try:
        with open(scratch, "w", encoding="utf-8", newline="\n") as sink:
            yield sink
        os.replace(scratch, file)
    finally:
        scratch.unlink(missing_ok=True)
