"""The generation cache: append, resume, lock, torn lines, full disk, shards, import."""

import errno
import fcntl
import hashlib
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

from repro import cache
from repro.cache import (
    CacheError,
    CacheWriter,
    as_line,
    check_identity,
    identity,
    import_authored,
    latest,
    merge,
    read_records,
    shard_path,
    shards_of,
)

CACHED = Path(cache.__file__).parent.parent / "cached_prompts"


def record(key="q1", attempt=0, passages=True, **changes):
    texts = {"3": "drei — best", "2": "b", "1": "c", "0": "d"}
    return {
        "id": key,
        "query": f"query {key}",
        "prompt_version": "v",
        "prompt_sha256": "0" * 64,
        "plan": "by-level",
        "generator": "tiny",
        "parameters": {"levels": [3, 2, 1, 0], "temperature": 0.7, "drawn": {"unrelated": key}},
        "seed": 1,
        "attempt": attempt,
        "reply": ["raw\nreply"] * 4,
        "passages": texts if passages else None,
        "error": None if passages else "level 2: empty",
    } | changes


def write(path, records):
    with CacheWriter(path) as writer:
        writer.append(records)
    return path


def test_round_trip_keeps_everything(tmp_path):
    odd = record("q2", reply='quote " tab \t newline \n 日本 \u2028 lone \ud800')
    path = write(tmp_path / "deep" / "x.jsonl", [record(), odd])
    write(path, [record("q3")])
    assert read_records(path) == [record(), odd, record("q3")]
    assert path.read_bytes().count(b"\n") == 3


@pytest.mark.parametrize("share", [0.01, 0.5, 0.99])
def test_torn_last_line_is_dropped_with_a_notice(tmp_path, capsys, share):
    path = write(tmp_path / "x.jsonl", [record("q1"), record("q2")])
    whole = path.read_bytes()
    path.write_bytes(whole + as_line(record("q3"))[: max(1, int(share * len(as_line(record("q3")))))])
    assert [r["id"] for r in read_records(path)] == ["q1", "q2"]
    assert path.read_bytes() != whole  # reading changes nothing
    with CacheWriter(path) as writer:
        assert [r["id"] for r in writer.records] == ["q1", "q2"]
        assert path.read_bytes() == whole
    assert capsys.readouterr().err.count("incomplete") == 2


def test_cut_anywhere_leaves_whole_records(tmp_path):
    path = write(tmp_path / "x.jsonl", [record(f"q{n}") for n in range(5)])
    whole = path.read_bytes()
    rng = random.Random(0)
    for _ in range(60):
        end = rng.randrange(len(whole))
        path.write_bytes(whole[:end])
        assert len(read_records(path)) == whole[:end].count(b"\n")


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"not json\n", ":2: expected one JSON record"),
        (b"[1]\n", ":2: expected a cache record"),
        (b"\n", ":2: expected one JSON"),
        (b'{"id": "x"}\n', "no field 'query'"),
        (b"\xff\xfe\n", ":2: expected one JSON record"),
        (b"[" * 9999 + b"\n", ":2: expected"),
    ],
)
def test_bad_line_in_the_middle_is_named(tmp_path, line, reason):
    path = tmp_path / "x.jsonl"
    path.write_bytes(as_line(record("q1")) + line + as_line(record("q2")))
    for reader in (read_records, CacheWriter):
        with pytest.raises(CacheError, match=reason):
            reader(path)
    with open(path, "ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the refused writer let go of its lock


def test_second_writer_is_refused_also_from_another_process(tmp_path):
    path = write(tmp_path / "x.jsonl", [record()])
    code = (
        "import sys; from repro.cache import CacheWriter\n"
        "try: CacheWriter(sys.argv[1])\nexcept ValueError as error: print(error)"
    )
    with CacheWriter(path):
        with pytest.raises(CacheError, match="another process is writing"):
            CacheWriter(path)
        done = subprocess.run(
            [sys.executable, "-c", code, str(path)], capture_output=True, text=True, cwd=CACHED.parent
        )
        assert "another process is writing" in done.stdout and done.returncode == 0
    CacheWriter(path).file.close()


class FullDisk:
    """A file that takes `room` bytes and then reports that the disk is full."""

    def __init__(self, file, room):
        self.file, self.room = file, room

    def write(self, data):
        if self.room == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        count = self.file.write(data[: self.room])
        self.room -= count
        return count

    def __getattr__(self, name):
        return getattr(self.file, name)


@pytest.mark.parametrize("room", [0, 1, 300, 700])
def test_full_disk_keeps_what_was_written(tmp_path, room):
    path = write(tmp_path / "x.jsonl", [record("q1")])
    with CacheWriter(path) as writer:
        writer.file = FullDisk(writer.file, room)
        with pytest.raises(CacheError, match=r"No space left.*the 1 records before are kept"):
            writer.append([record("q2"), record("q3")])
    assert read_records(path) == [record("q1")]
    write(path, [record("q2")])
    assert len(read_records(path)) == 2


def test_short_writes_are_continued(tmp_path):
    class Slow(FullDisk):
        def write(self, data):
            return self.file.write(data[:7])

    with CacheWriter(tmp_path / "x.jsonl") as writer:
        writer.file = Slow(writer.file, 0)
        writer.append([record("q1"), record("q2")])
    assert read_records(tmp_path / "x.jsonl") == [record("q1"), record("q2")]


def test_size_limit_of_the_system(tmp_path):
    """A real refusal by the kernel: RLIMIT_FSIZE in a child process."""
    code = (
        "import resource, signal, sys, json\nfrom repro.cache import "
        "CacheWriter\nsignal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))\nrecords = "
        "json.loads(sys.stdin.read())\nwith CacheWriter(sys.argv[1]) as writer:\n    for r in records: "
        "writer.append([r])\n"
    )
    path, records = tmp_path / "x.jsonl", [record(f"q{n}") for n in range(9)]
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)],
        input=json.dumps(records),
        capture_output=True,
        text=True,
        cwd=CACHED.parent,
    )
    assert "CacheError" in done.stderr and "File too large" in done.stderr
    kept = read_records(path)
    assert 1 <= len(kept) < 9 and kept == records[: len(kept)] and path.stat().st_size <= 2000


def test_unwritable_place_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(CacheError, match="cannot be written"):
        CacheWriter(tmp_path / "file" / "x.jsonl")
    with pytest.raises(CacheError, match="cannot be read: No such file"):
        read_records(tmp_path / "none.jsonl")


def test_latest_prefers_good_and_later_records():
    first, failed, again = record(attempt=0), record(attempt=1, passages=False), record(attempt=2, seed=9)
    assert latest([first, failed]) == {"q1": first}
    assert latest([failed, first]) == {"q1": first}
    assert latest([first, failed, again]) == {"q1": again}
    assert latest([failed, record(attempt=3, passages=False)])["q1"]["attempt"] == 3


def test_identity_ignores_what_was_drawn_and_names_the_field(tmp_path):
    check_identity("x", [record("q1"), record("q2")], identity(record("q3")))
    for change, name in (
        ({"seed": 2}, "seed 2"),
        ({"prompt_sha256": "1"}, "prompt_sha256"),
        ({"plan": "other"}, "plan"),
        ({"parameters": {"levels": [3, 2, 1, 0], "temperature": 1.0}}, "temperature 1.0"),
        ({"parameters": {"temperature": 0.7}}, "levels None"),
        ({"generator": "big"}, "generator"),
    ):
        with pytest.raises(CacheError, match=f"x: was written with {name}"):
            check_identity("x", [record("q1"), record(**change)], identity(record()))


def test_merge_joins_shards_of_any_number_once(tmp_path, capsys):
    out = tmp_path / "x.jsonl"
    assert shard_path(out, 0, 1) == out and shard_path(out, 1, 3).name == "x.rank1-of-3.jsonl"
    write(out, [record("q1")])
    write(shard_path(out, 0, 2), [record("q2", passages=False)])
    write(shard_path(out, 1, 2), [record("q3"), record("q1")])
    write(shard_path(out, 0, 3), [record("q2", attempt=1)])
    write(tmp_path / "x.rankings.jsonl", [record("q9")])  # not a shard
    assert len(shards_of(out)) == 3
    assert cache.main(["merge", str(out)]) == 0
    assert sorted((r["id"], r["attempt"]) for r in read_records(out)) == [
        ("q1", 0),
        ("q2", 0),
        ("q2", 1),
        ("q3", 0),
    ]
    assert shards_of(out) == [] and (tmp_path / "x.rankings.jsonl").exists()
    assert out.stat().st_mode & 0o777 == 0o644


def test_merge_refuses_and_changes_nothing(tmp_path, capsys):
    out = tmp_path / "x.jsonl"
    with pytest.raises(CacheError, match="found none"):
        merge(out)
    write(shard_path(out, 0, 2), [record("q1")])
    write(shard_path(out, 1, 2), [record("q2", seed=5)])
    assert cache.main(["merge", str(out)]) == 2
    assert "seed" in capsys.readouterr().err and not out.exists() and len(shards_of(out)) == 2
    with CacheWriter(shard_path(out, 1, 2)), pytest.raises(CacheError, match="another process"):
        merge(out)
    assert len(shards_of(out)) == 2


def authored_lines(count, **changes):
    rows = [
        {"query": f"query {n}", "passages": {level: f"{level} {n}" for level in "3210"}} for n in range(count)
    ]
    rows[-1].update(changes)
    return "".join(json.dumps(row) + "\n" for row in rows)


def test_import_authored(tmp_path, capsys):
    for name in ("v1-x", "v2-y"):
        (tmp_path / f"{name}.jsonl").write_text(authored_lines(3), encoding="utf-8")
        (tmp_path / f"{name}.md").write_text(f"spec of {name}\n", encoding="utf-8")
    options = [
        part
        for name in ("v1-x", "v2-y")
        for part in ("--lists", name, str(tmp_path / f"{name}.jsonl"), str(tmp_path / f"{name}.md"))
    ]
    assert cache.main(["import-authored", *options, "--out", str(tmp_path / "out.jsonl")]) == 0
    assert "3 queries stand in more than one version" in capsys.readouterr().err
    records = read_records(tmp_path / "out.jsonl")
    assert [r["id"] for r in records] == ["v1-0001", "v1-0002", "v1-0003", "v2-0001", "v2-0002", "v2-0003"]
    assert records[4]["prompt_version"] == "authored-v2-y" and records[4]["passages"]["0"] == "0 1"
    assert records[4]["prompt_sha256"] == hashlib.sha256(b"spec of v2-y\n").hexdigest()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"query": " "}, "3: field 'query'"),
        ({"query": "QUERY 0"}, "3: field 'query': the same query stands in line 1"),
        ({"passages": {"3": "a"}}, "3: field 'passages'"),
        ({"passages": dict.fromkeys("3210", " ")}, "level 3 has no text"),
    ],
)
def test_import_authored_names_the_bad_row(tmp_path, change, reason):
    (tmp_path / "a.jsonl").write_text(authored_lines(3, **change), encoding="utf-8")
    (tmp_path / "spec.md").write_text("spec")
    with pytest.raises(CacheError, match=reason):
        import_authored("v1", tmp_path / "a.jsonl", tmp_path / "spec.md")
