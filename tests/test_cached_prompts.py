"""The committed caches: complete, parsed by today's code, with provenance that can be checked."""

import hashlib
from pathlib import Path

from repro import cache, prompts
from repro.cache import identity, latest, read_records
from repro.generate import choose, read_queries
from repro.lists import load_lists

CACHED = Path(cache.__file__).parent.parent / "cached_prompts"


def test_committed_authored_cache():
    records = read_records(CACHED / "authored.jsonl")
    specs = {
        f"authored-{path.stem.removeprefix('SPEC-')}": hashlib.sha256(path.read_bytes()).hexdigest()
        for path in CACHED.glob("SPEC-*.md")
    }
    counts = {}
    for row in records:
        assert list(row) == list(cache.FIELDS) and row["generator"] == "authored" and row["error"] is None
        assert list(row["passages"]) == ["3", "2", "1", "0"] and all(map(str.strip, row["passages"].values()))
        assert row["prompt_sha256"] == specs[row["prompt_version"]]
        counts[row["prompt_version"]] = counts.get(row["prompt_version"], 0) + 1
    assert counts == {"authored-v1-contrast": 540, "authored-v2-plain": 720}
    assert (
        len({row["id"] for row in records}) == len({row["query"].lower() for row in records}) == len(records)
    )
    assert len(load_lists([CACHED / "authored.jsonl"])) == 1260


def test_committed_generated_cache():
    """Every record of the local model's cache is what today's prompt code would have asked and read."""
    records = read_records(CACHED / "smollm2-135m.jsonl")
    best = latest(records)
    good = [row for row in best.values() if row["passages"]]
    assert len(good) >= 400 and len(best) == 420
    authored = read_queries(CACHED / "authored.jsonl")
    wanted = choose(authored, 420, records[0]["seed"])  # the README's command asks for 420
    assert {key: row["query"] for key, row in best.items()} == wanted
    pool = list(authored.values())
    assert len({(row["id"], row["attempt"]) for row in records}) == len(records)
    for row in records:
        assert list(row) == list(cache.FIELDS) and identity(row) == identity(records[0])
        assert (
            row["prompt_sha256"] == prompts.prompt_sha256(row["plan"])
            and row["prompt_version"] == prompts.PROMPT_VERSION
        )
        assert row["parameters"]["drawn"] == prompts.draw(row["query"], pool, row["seed"])
        found, error = {}, None
        for asked, text in zip(prompts.calls(row["plan"]), row["reply"], strict=False):
            try:
                found |= prompts.read_reply(row["plan"], asked, text)
            except prompts.ReplyError as reason:
                error = str(reason)
        assert error == row["error"]
        assert row["passages"] == (None if error else {str(level): text for level, text in found.items()})
    for row in good:
        assert list(row["passages"]) == ["3", "2", "1", "0"] and all(map(str.strip, row["passages"].values()))
    assert len(load_lists([CACHED / "smollm2-135m.jsonl"])) == len(good)
