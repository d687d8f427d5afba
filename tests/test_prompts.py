"""The prompts: levels, plans, what is drawn for the lower levels, the hash, the example."""

import json
import re
from pathlib import Path

import pytest

from repro import prompts
from repro.prompts import (
    ReplyError,
    calls,
    draw,
    grades,
    kind_of,
    messages,
    parse_reply,
    prompt_sha256,
    read_reply,
    topic,
)

GOOD = {3: "alpha one", 2: "beta two", 1: "gamma three", 0: "delta four"}
DRAWN = {"neighbour": "the history of bread", "unrelated": "why is the sky blue"}
JSON = json.dumps({str(level): text for level, text in GOOD.items()})


@pytest.mark.parametrize("count", [2, 3, 4, 5])
@pytest.mark.parametrize("plan", prompts.PLANS)
@pytest.mark.parametrize("example", [False, True])
def test_every_plan_asks_for_every_level_once(plan, count, example):
    asked = calls(plan, count)
    assert (
        [level for levels in asked for level in levels]
        == list(range(count - 1, -1, -1))
        == list(grades(count))
    )
    for levels in asked:
        chat = messages(plan, levels, "why do cats purr", DRAWN, {count - 1: "BEST PASSAGE"}, count, example)
        roles = [turn["role"] for turn in chat]
        assert roles == ["system"] + ["user", "assistant"] * example + ["user"]
        assert (
            not any("{" in turn["content"] and "}" in turn["content"] for turn in chat)
            or plan == "all-levels"
        )
        last = chat[-1]["content"]
        if plan == "all-levels":
            assert "why do cats purr" in last and all(f"\n{level} " in last for level in levels)
            if example:
                assert list(parse_reply(chat[2]["content"], levels)) == list(levels)
        else:
            kind = kind_of(levels[0], count)
            assert ("why do cats purr" in last) == (kind == "exact")
            assert (DRAWN["unrelated"] in last) == (kind == "other")
            assert ("BEST PASSAGE" in last) == (plan == "from-answer" and kind == "partial")


def test_level_meanings_follow_the_count():
    assert [kind_of(level, 4) for level in grades(4)] == ["exact", "partial", "related", "other"]
    assert [kind_of(level, 2) for level in grades(2)] == ["exact", "other"]
    for bad in (0, 1, 6, True):
        with pytest.raises(ValueError, match="expected 2, 3, 4 or 5"):
            grades(bad)


def test_hash_changes_with_the_text_and_nothing_else(monkeypatch):
    known = {prompt_sha256(plan, n, e) for plan in prompts.PLANS for n in (2, 3, 4, 5) for e in (False, True)}
    assert len(known) == 24 and all(re.fullmatch("[0-9a-f]{64}", text) for text in known)
    before = {plan: prompt_sha256(plan) for plan in prompts.PLANS}
    monkeypatch.setattr(prompts, "RETELL_ASK", "something else {answer}")
    assert prompt_sha256("from-answer") != before["from-answer"]
    assert (
        prompt_sha256("by-level") == before["by-level"]
        and prompt_sha256("all-levels") == before["all-levels"]
    )
    with pytest.raises(ValueError, match="plan: expected one of"):
        prompt_sha256("other")


def test_draw_depends_on_seed_query_and_pool_alone():
    pool = [
        "how long does bread dough rise",
        "why is the sky blue",
        "normal heart rate",
        "capital city of mongolia",
    ]
    first = draw(pool[0], pool, 1)
    assert first == draw(pool[0], list(pool), 1)
    assert len({json.dumps(draw(pool[0], pool, seed)) for seed in range(20)}) > 5
    for seed in range(50):
        drawn = draw(pool[0], pool, seed)
        assert drawn["unrelated"] in pool[1:]  # never itself, never one that shares a content word
        assert any(word in drawn["neighbour"].split() for word in ("bread", "dough", "rise"))
    assert draw("lonely query", ["lonely query"], 3)["unrelated"] in prompts.UNRELATED
    assert (
        "the" not in draw("sky blue", ["the sky", "blue sea"], 0)["unrelated"].split()
    )  # falls back: all share a word


@pytest.mark.parametrize(
    ("query", "content"),
    [
        ("how long does a sprained ankle take to heal", "sprained ankle heal"),
        ("what does it do", "what does it do"),
        ("usb-c vs. micro-usb", "usb-c micro-usb"),
        ("日本の首都", "日本の首都"),
        ("???", "???"),
    ],
)
def test_topic(query, content):
    assert topic(query) == content


def test_read_reply_names_the_level():
    with pytest.raises(ReplyError, match="level 2: expected 15 words"):
        read_reply("by-level", (2,), "no")
    assert read_reply("all-levels", (3, 2, 1, 0), JSON) == GOOD


def test_the_example_is_no_query_of_the_kit():
    lines = (Path(prompts.__file__).parent.parent / "cached_prompts" / "authored.jsonl").read_text(
        encoding="utf-8"
    )
    assert prompts.EXAMPLE["query"] not in lines
    for text in (prompts.EXAMPLE[kind] for kind in prompts.KINDS[5]):
        assert 35 <= len(text.split()) <= 90
