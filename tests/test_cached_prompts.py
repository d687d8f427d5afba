"""The committed caches: complete, parsed by today's code, with provenance that can be checked."""

import hashlib
import json
import re
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


def test_the_note_states_what_the_files_hold():
    note = " ".join((CACHED / "README.md").read_text(encoding="utf-8").split())
    records = read_records(CACHED / "smollm2-135m.jsonl")
    best = latest(records)
    good = sum(row["passages"] is not None for row in best.values())
    assert f"{good} of {len(best)} queries ({len(records)} records" in note
    plans = json.loads((CACHED / "plans.json").read_text())["reports"]
    first = {name: int(plans[name]["note"].split()[0]) for name in ("by-level", "by-level-example", "from-answer", "all-levels")}
    assert f"({first['by-level']} of 48; with an example {first['by-level-example']}, `from-answer` {first['from-answer']})" in note
    assert first["all-levels"] == 0 and f"on the {plans['by-level']['lists']} queries" in note

    def gap(plan, name):
        levels = plans[plan]["measures"][name]["levels"]
        return levels["3"]["mean"] - levels["2"]["mean"]

    for name in ("likelihood", "similarity"):
        assert gap("by-level", name) > max(gap(plan, name) for plan in ("by-level-example", "from-answer"))
    assert f"by {gap('by-level-example', 'overlap') - gap('by-level', 'overlap'):.3f}".replace("0.", ".") in note
    quality = json.loads((CACHED / "quality.json").read_text())["reports"]
    pairs = [round(100 * quality[name]["measures"]["likelihood"]["pairs"]) for name in ("smollm2-135m", "authored v2", "authored v1")]
    assert pairs == [int(x) for x in re.search(r"lists have (\d+) % .* v2 (\d+) % and v1, with its decoys, (\d+) %", note).groups()]
