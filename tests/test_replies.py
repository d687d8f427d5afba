"""Reading replies: accepted forms, refusals with their reasons, a fuzz test, the time it takes."""

import contextlib
import json
import random
import re
import time

import pytest

from repro.prompts import ReplyError, parse_reply
from repro.replies import LONGEST_PASSAGE, LONGEST_REPLY, read_passage, tidy

GOOD = {3: "alpha one", 2: "beta two", 1: "gamma three", 0: "delta four"}
JSON = json.dumps({str(level): text for level, text in GOOD.items()})

FORMS = {
    "json": JSON,
    "prose around": f"Sure, here you go:\n{JSON}\nI hope that helps {{really}}.",
    "code fence": f"```json\n{JSON}\n```",
    "indented": json.dumps({str(level): text for level, text in GOOD.items()}, indent=4),
    "inside passages": json.dumps(
        {"query": "q", "passages": {str(level): text for level, text in GOOD.items()}}
    ),
    "reordered": json.dumps({str(level): GOOD[level] for level in (1, 3, 0, 2)}),
    "extra level": json.dumps({"4": "too much"} | {str(level): text for level, text in GOOD.items()}),
    "list of objects": json.dumps([{"level": level, "passage": text} for level, text in GOOD.items()]),
    "four objects": "\n".join(
        json.dumps({"grade": str(level), "text": text}) for level, text in GOOD.items()
    ),
    "named keys": json.dumps({"Level 3": GOOD[3], "two": GOOD[2], "grade_1": GOOD[1], "irrelevant": GOOD[0]}),
    "meaning in key": json.dumps({f"{level} (as asked)": text for level, text in GOOD.items()}),
    "trailing comma": JSON[:-1] + ",}",
    "single quotes": str({str(level): text for level, text in GOOD.items()}),
    "bare keys": "{" + ", ".join(f'{level}: "{text}"' for level, text in GOOD.items()) + "}",
    "no closing brace": JSON[:-1],
    "labelled lines": "\n".join(f"Level {level}: {text}" for level, text in GOOD.items()),
    "numbers": "\n\n".join(f"{level}. {text}" for level, text in GOOD.items()),
    "numbers, brackets": "\n\n".join(f"({level}) - {text}" for level, text in GOOD.items()),
    "bold": "\n".join(f"**{level}** {text}" for level, text in GOOD.items()),
    "bold with colon": "\n".join(f"**Level {level}:** {text}" for level, text in GOOD.items()),
    "headings": "\n".join(f"## Level {level}\n\n{text}\n" for level, text in GOOD.items()),
    "in words": "\n".join(
        f"Grade {word}: {text}"
        for word, text in zip(("three", "two", "one", "zero"), GOOD.values(), strict=True)
    ),
    "meanings": "\n".join(
        f"{name}: {text}"
        for name, text in zip(
            ("Perfectly relevant", "Highly relevant", "Related", "Irrelevant"), GOOD.values(), strict=True
        )
    ),
    "number and meaning": "\n".join(
        f"{level}. {name}: {text}"
        for (level, text), name in zip(
            GOOD.items(), ("perfectly relevant", "highly relevant", "related", "irrelevant"), strict=True
        )
    ),
    "worst first": "\n".join(f"Level {level}: {GOOD[level]}" for level in (0, 1, 2, 3)),
    "repeated alike": "\n".join(f"Level {level}: {GOOD[level]}" for level in (3, 2, 1, 0, 3)),
    "wild spacing": "\n".join(
        f"  Level {level} :   {text.replace(' ', '  ')}\t\n\n" for level, text in GOOD.items()
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_accepted_forms(form):
    found = parse_reply(FORMS[form])
    assert found == GOOD and list(found) == [3, 2, 1, 0] and all(type(level) is int for level in found)


def test_apostrophes_in_single_quotes():
    reply = "{'3': 'it's here', '2': 'don't', '1': 'a', '0': 'b',}"
    assert parse_reply(reply) == {3: "it's here", 2: "don't", 1: "a", 0: "b"}


REFUSED = {
    "": "empty",
    "   \n\t": "empty",
    "I cannot help with that.": "no level found",
    '{"3": "alpha", "2": "beta", "1": "gam': "levels 1, 0 missing",
    '{"3": "a", "2": "b", "1": "c"}': "level 0 missing",
    '{"3": "a", "3": "b", "2": "c", "1": "d", "0": "e"}': "level 3: stands there twice",
    "Level 3: a\nLevel 3: b\nLevel 2: c\nLevel 1: d\nLevel 0: e": "level 3: stands there twice",
    '{"3": "", "2": "b", "1": "c", "0": "d"}': "level 3: the passage is empty",
    '{"3": "...", "2": "b", "1": "c", "0": "d"}': "level 3: the passage is empty",
    "Level 3: a\nLevel 2:\nLevel 1: c\nLevel 0: d": "level 2: the passage is empty",
    '{"3": 7, "2": "b", "1": "c", "0": "d"}': "level 3: expected text, found int",
    '{"3": {"a": 1}, "2": "b", "1": "c", "0": "d"}': "level 3: expected text, found an object",
    '{"3": null, "2": "b", "1": "c", "0": "d"}': "level 3: expected text, found NoneType",
    "x" * (LONGEST_REPLY + 1): "characters",
    "[" * 15000: "no level found",
    '{"a":' * 3000: "no level found",
    '{"3":' + "9" * 5000 + "}": "missing|no level found",
}


@pytest.mark.parametrize("reply", REFUSED, ids=range(len(REFUSED)))
def test_refused_with_a_reason(reply):
    with pytest.raises(ReplyError, match=REFUSED[reply]):
        parse_reply(reply)
    assert issubclass(ReplyError, ValueError)


def test_other_level_counts():
    assert parse_reply('{"1": "a", "0": "b", "2": "c"}', (1, 0)) == {1: "a", 0: "b"}
    assert (
        parse_reply("Level 4: a\nLevel 3: b\nLevel 2: c\nLevel 1: d\nLevel 0: e", (4, 3, 2, 1, 0))[4] == "a"
    )
    with pytest.raises(ReplyError, match="no level found"):  # names are ambiguous with two levels
        parse_reply("Perfectly relevant: a\nIrrelevant: b", (1, 0))


def test_numbers_in_prose_are_no_labels():
    text = "Level 3: It took\n12 days.\nLevel 2: b\nLevel 1: c\n5. is not asked for\nLevel 0: d"
    assert parse_reply(text) == {3: "It took 12 days.", 2: "b", 1: "c 5. is not asked for", 0: "d"}


PIECES = [
    "{",
    "}",
    "[",
    "]",
    '"',
    "'",
    ",",
    ":",
    "\\",
    "\\u",
    "```",
    "```json",
    "**",
    "Level",
    "Grade three:",
    "3",
    "-1",
    "99999999999999999999",
    "null",
    "\x00",
    "\ud800",
    "\udfff",
    "‮",
    "𝟛",
    "٣",
    "\n",
    "\r",
    "\x1b[0m",
    "  ",
    "\u2028",
    "[" * 3000,
    "9" * 4500,
    "1e999",
    "NaN",
    "<think>",
    '{"3":',
    "passages",
    "\ufeff",
    " " * 2000,
    "()" * 500,
]


def mutate(reply: str, rng: random.Random) -> str:
    """One to five random cuts, repeats, swaps, insertions, case changes."""
    for _ in range(rng.randint(1, 5)):
        if not reply:
            return rng.choice(PIECES)
        i, j = sorted((rng.randrange(len(reply) + 1), rng.randrange(len(reply) + 1)))
        reply = rng.choice(
            [
                lambda: reply[:i] + reply[j:],
                lambda: reply[:j] + reply[i:],
                lambda: reply[:i] + rng.choice(PIECES) + reply[i:],
                lambda: reply[i:j] or reply,
                lambda: reply[:i] + reply[i:j][::-1] + reply[j:],
                lambda: (
                    reply[:i] + chr(rng.choice([rng.randrange(128), rng.randrange(0x11000)])) + reply[i + 1 :]
                ),
                lambda: reply.swapcase(),
                lambda: reply.replace(rng.choice("\"',:{}\n 0123"), rng.choice(PIECES)),
                lambda: reply + rng.choice(list(FORMS.values())),
            ]
        )()
    return reply


def test_fuzz_passages_or_a_reason():
    """12,000 mutated replies: well-formed passages or a ReplyError, nothing else, each in short time."""
    rng = random.Random(7)
    forms = list(FORMS.values())
    outcomes = {"passages": 0, "reason": 0}
    slowest = 0.0
    for _ in range(12_000):
        reply = mutate(rng.choice(forms), rng)
        start = time.perf_counter()
        try:
            found = parse_reply(reply)
        except ReplyError as error:
            assert str(error)
            outcomes["reason"] += 1
        else:
            assert list(found) == [3, 2, 1, 0]
            for passage in found.values():
                assert (
                    passage == " ".join(passage.split())
                    and re.search(r"\w", passage)
                    and "```" not in passage
                )
                passage.encode("utf-8")  # no lone surrogates
            outcomes["passages"] += 1
        slowest = max(slowest, time.perf_counter() - start)
        with contextlib.suppress(ReplyError):
            assert read_passage(reply)
    assert min(outcomes.values()) > 1000, outcomes
    assert slowest < 2.0


@pytest.mark.parametrize(
    "unit", ["1:'", '"3":"', "3: ", "**3** ", "level ", '{"3":', " ", "\t\n", "'1' : ", "3)", ">#*"]
)
def test_long_runs_take_no_quadratic_time(unit):
    text = (unit * LONGEST_REPLY)[:LONGEST_REPLY]
    start = time.perf_counter()
    with pytest.raises(ReplyError):
        parse_reply(text)
    assert time.perf_counter() - start < 5.0


def test_tidy():
    assert tidy('```text\n "a  b\n c" \n```') == "a b c"
    assert tidy("**bold** and “quoted”") == "bold and “quoted”"
    assert tidy("\x00\ud800 x \x1b") == "x"


SENTENCE = "This sentence about rivers has exactly nine plain words."
LONG = " ".join(f"Sentence number {n} is about river{n} and town{n}." for n in range(30))


def test_read_passage_cuts_to_whole_sentences():
    whole = "The river rises in the northern hills near the border. It then crosses a wide and empty plain."
    for reply in (
        whole,
        f"{whole} After that it meets the",
        f"Here is a paragraph:\n\n{whole}",
        f"```\n{whole}\n```",
    ):
        assert read_passage(reply) == whole
    kept = read_passage(LONG)
    assert kept.endswith(".") and LONGEST_PASSAGE - 8 <= len(kept.split()) <= LONGEST_PASSAGE
    assert LONG.startswith(kept)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "found 0"),
        ("Too short.", "found 2"),
        ("word " * 50, "found 0"),
        (f"{SENTENCE} " * 8, "repeats itself"),
    ],
)
def test_read_passage_refuses(text, reason):
    with pytest.raises(ReplyError, match=reason):
        read_passage(text)
