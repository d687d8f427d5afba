"""The generation cache: one JSON record a line, appended, never rewritten.

A record says which query was asked, with which prompt (version and sha256), by which generator,
with which parameters and seed, what came back, and the passages or the reason why there are none.
A writer holds a lock, so there is one at a time; each batch is on the disk (fsync) before the next
begins.  A process killed while writing leaves a torn last line at most: it is dropped with a
notice, and the run goes on.  `python -m repro.cache import-authored` and `merge` make files.
"""

import argparse
import fcntl
import hashlib
import json
import os
import re
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from repro.files import DataError, read_jsonl

Record = dict[str, Any]
FIELDS = (
    "id",
    "query",
    "prompt_version",
    "prompt_sha256",
    "plan",
    "generator",
    "parameters",
    "seed",
    "attempt",
    "reply",
    "passages",
    "error",
)
IDENTITY = ("prompt_version", "prompt_sha256", "plan", "generator", "parameters", "seed")


class CacheError(ValueError):
    """A cache file that cannot be read, locked, continued or written; the message names the file."""


def parse_lines(path: Path, raw: bytes) -> tuple[list[Record], int]:
    """(records, length in bytes of the whole lines).  What follows the last newline is torn and left out.

    Raises CacheError for a whole line that is not a record.
    """
    whole = raw.rfind(b"\n") + 1
    records = []
    for number, line in enumerate(raw[:whole].split(b"\n")[:-1], start=1):
        try:
            record = json.loads(line.decode("utf-8"))
        except (ValueError, RecursionError) as error:
            raise CacheError(f"{path}:{number}: expected one JSON record, but {error}") from error
        missing = [field for field in FIELDS if field not in record] if isinstance(record, dict) else FIELDS
        if missing:
            raise CacheError(f"{path}:{number}: expected a cache record, but it has no field {missing[0]!r}")
        records.append(record)
    return records, whole


def read_records(path: str | Path) -> list[Record]:
    """All records of a cache file in file order; a torn last line is left out with a notice on stderr."""
    path = Path(path)
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise CacheError(f"{path}: cannot be read: {error.strerror}") from error
    records, whole = parse_lines(path, raw)
    if whole < len(raw):
        print(
            f"{path}: the last line is incomplete and was left out ({len(raw) - whole} bytes)",
            file=sys.stderr,
        )
    return records


def latest(records: Iterable[Record]) -> dict[str, Record]:
    """One record an id: the last good one, or the last failed one if none is good."""
    best: dict[str, Record] = {}
    for record in records:
        if record["passages"] is not None or best.get(record["id"], record)["passages"] is None:
            best[record["id"]] = record
    return best


def identity(record: Record) -> dict[str, Any]:
    """What all records of one file have in common; `parameters.drawn` belongs to one query: left out."""
    common = {field: record[field] for field in IDENTITY}
    common["parameters"] = {key: value for key, value in record["parameters"].items() if key != "drawn"}
    return common


def check_identity(path: str | Path, records: Iterable[Record], expected: dict[str, Any]) -> None:
    """Raise CacheError naming the first field in which a record differs from what this run would write."""
    for record in records:
        found = identity(record)
        for field in IDENTITY:
            if found[field] == expected[field]:
                continue
            old, new = found[field], expected[field]
            if field == "parameters":
                field = next(key for key in [*old, *new] if old.get(key) != new.get(key))
                old, new = old.get(field), new.get(field)
            raise CacheError(
                f"{path}: was written with {field} {old!r}, this run has {new!r}; "
                "name another --out, or repeat the settings of the file"
            )


class CacheWriter:
    """Append records to one file under an exclusive lock; use as a context manager.

    `records` holds what was there.  Raises CacheError if another process is writing the file, if it
    holds something else than records, or if the disk does not take a write; in the last case the
    file is cut back to its last whole batch, so that it stays readable.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.file: BinaryIO = open(self.path, "a+b", buffering=0)  # noqa: SIM115 (closed by __exit__)
        except OSError as error:
            raise CacheError(f"{self.path}: cannot be written: {error.strerror}") from error
        try:
            try:
                fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise CacheError(
                    f"{self.path}: another process is writing this file; wait for it to end"
                ) from error
            self.file.seek(0)
            raw = self.file.read()
            self.records, whole = parse_lines(self.path, raw)
            if whole < len(raw):
                print(
                    f"{self.path}: dropped an incomplete last line ({len(raw) - whole} bytes)",
                    file=sys.stderr,
                )
                self.file.truncate(whole)
        except BaseException:
            self.file.close()
            raise

    def __enter__(self) -> "CacheWriter":
        return self

    def __exit__(self, *exception: object) -> None:
        self.file.close()

    def append(self, records: Sequence[Record]) -> None:
        """Write records and wait until they are on the disk."""
        start = os.fstat(self.file.fileno()).st_size
        data = b"".join(as_line(record) for record in records)
        try:
            done = 0
            while done < len(data):
                done += self.file.write(data[done:])
            os.fsync(self.file.fileno())
        except OSError as error:
            os.ftruncate(self.file.fileno(), start)
            raise CacheError(
                f"{self.path}: writing failed ({error.strerror}); "
                f"the {len(self.records)} records before are kept, run the same command again to continue"
            ) from error
        self.records.extend(records)


def as_line(record: Record) -> bytes:
    """One record as one UTF-8 line; a lone surrogate, which UTF-8 cannot hold, becomes a JSON escape."""
    text = json.dumps(record, ensure_ascii=False)
    try:
        return text.encode("utf-8") + b"\n"
    except UnicodeEncodeError:
        return json.dumps(record).encode("ascii") + b"\n"


def shard_path(out: str | Path, rank: int, world: int) -> Path:
    """The file that one of `world` processes writes: `x.jsonl` itself, or `x.rank0-of-2.jsonl`."""
    out = Path(out)
    return out if world == 1 else out.with_name(f"{out.stem}.rank{rank}-of-{world}{out.suffix}")


def shards_of(out: str | Path) -> list[Path]:
    """The shard files beside `out`, of any number of processes, by name."""
    out = Path(out)
    pattern = re.compile(re.escape(out.stem) + r"\.rank\d+-of-\d+" + re.escape(out.suffix))
    return sorted(p for p in out.parent.glob(f"{out.stem}.rank*{out.suffix}") if pattern.fullmatch(p.name))


def write_whole(path: Path, records: Iterable[Record]) -> None:
    """Write a file through a temporary name, so that it appears complete or not at all."""
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        with open(handle, "wb") as file:
            file.writelines(as_line(record) for record in records)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)  # mkstemp makes it private
        os.replace(temporary, path)
    except OSError as error:
        raise CacheError(f"{path}: writing failed ({error.strerror}); nothing was changed") from error
    finally:
        if temporary and os.path.exists(temporary):
            os.unlink(temporary)


def merge(out: str | Path) -> int:
    """Join the shards of `out` into it, each (id, attempt) once, and remove them; returns how many records.

    Every file is locked while this runs.  Raises CacheError if a shard is being written or was made
    with other settings; then nothing is changed.
    """
    out = Path(out)
    shards = shards_of(out)
    if not shards and not out.exists():
        raise CacheError(
            f"{out}: expected shards named {out.stem}.rank*-of-*{out.suffix} beside it, found none"
        )
    writers: list[CacheWriter] = []
    try:
        for path in [*([out] if out.exists() else []), *shards]:
            writers.append(CacheWriter(path))
        joined = {
            (r["id"], r["attempt"]): r for writer in reversed(writers) for r in reversed(writer.records)
        }
        records = list(reversed(joined.values()))  # file order, the first of two equal keys kept
        if records:
            check_identity(out, records, identity(records[0]))
        write_whole(out, records)
        for path in shards:
            path.unlink()
    finally:
        for writer in writers:
            writer.file.close()
    return len(records)


def import_authored(version: str, lists: str | Path, spec: str | Path) -> list[Record]:
    """Graded lists written by hand or by a model elsewhere, as records of the generator "authored".

    `lists`: lines {"query", "passages": {"3": ..., "2": ..., "1": ..., "0": ...}}; `spec`: the prompt
    text, whose sha256 goes into each record.  Record i of version v1-contrast is `v1-0001`.  `reply`
    is null: the reply was the line itself, and the passages need not stand there twice.
    """
    sha256 = hashlib.sha256(Path(spec).read_bytes()).hexdigest()
    records: list[Record] = []
    seen: dict[str, int] = {}
    for number, row in read_jsonl(lists):
        query, passages = row.get("query"), row.get("passages")
        if not isinstance(query, str) or not query.strip():
            raise CacheError(f"{lists}:{number}: field 'query': expected text")
        if not isinstance(passages, dict) or sorted(passages) != ["0", "1", "2", "3"]:
            raise CacheError(f"{lists}:{number}: field 'passages': expected the levels 3, 2, 1, 0")
        if empty := [
            level for level, text in passages.items() if not isinstance(text, str) or not text.strip()
        ]:
            raise CacheError(f"{lists}:{number}: field 'passages': level {empty[0]} has no text")
        if (first := seen.setdefault(query.strip().lower(), number)) != number:
            raise CacheError(f"{lists}:{number}: field 'query': the same query stands in line {first}")
        records.append(
            {
                "id": f"{version.split('-')[0]}-{len(records) + 1:04d}",
                "query": query.strip(),
                "prompt_version": f"authored-{version}",
                "prompt_sha256": sha256,
                "plan": "all-levels",
                "generator": "authored",
                "parameters": {"levels": [3, 2, 1, 0]},
                "seed": 0,
                "attempt": 0,
                "reply": None,
                "passages": {level: passages[level].strip() for level in ("3", "2", "1", "0")},
                "error": None,
            }
        )
    return records


def main(argv: list[str] | None = None) -> int:
    """Command line of the module; see --help."""
    parser = argparse.ArgumentParser(
        prog="python -m repro.cache", description="Make and join generation caches."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    authored = commands.add_parser("import-authored", help="turn files of graded lists into cache records")
    authored.add_argument(
        "--lists",
        nargs=3,
        action="append",
        required=True,
        metavar=("VERSION", "LISTS", "SPEC"),
        help="e.g. v2-plain v2-plain.jsonl SPEC-v2-plain.md; repeat for more versions",
    )
    authored.add_argument("--out", required=True, help="the cache file to write")
    joined = commands.add_parser("merge", help="join the shards of a sharded run into one file")
    joined.add_argument("out", help="the file whose shards (OUT.rank*-of-*.jsonl) lie beside it")
    arguments = parser.parse_args(argv)
    try:
        if arguments.command == "merge":
            print(f"{arguments.out}: {merge(arguments.out)} records")
            return 0
        records = [record for each in arguments.lists for record in import_authored(*each)]
        if len({record["id"] for record in records}) < len(records):
            raise CacheError("--lists: two versions start with the same name, so their ids would be equal")
        texts = [record["query"].lower() for record in records]
        if twice := len(texts) - len(set(texts)):
            print(f"{twice} queries stand in more than one version", file=sys.stderr)
        write_whole(Path(arguments.out), records)
        print(f"{arguments.out}: {len(records)} records")
    except (CacheError, DataError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
