"""The prompts and the parser: what is asked, accepted forms, refusals with reasons, mutations."""

import json
import random
import re

import pytest

from repro import prompts
from repro.prompts import LEVELS, ReplyError, parse_reply, read_reply

GOOD = {3: "alpha one", 2: "beta two", 1: "gamma three", 0: "delta four"}
MEANINGS = ["Irrelevant", "Related", "Highly relevant", "Perfectly relevant"]
NUMBERS = ["zero", "one", "two", "three"]
TEXTS = {str(level): text for level, text in GOOD.items()}
JSON = json.dumps(TEXTS)
PROSE = "The river rises in the northern hills near the border. It crosses a wide and empty plain."

FORMS = [
    JSON,
    JSON[:-1] + ",}",
    str(TEXTS),
    str(GOOD),
    f"Here it is:\n```json\n{JSON}\n```\nShall I write more?",
    json.dumps({"query": "a", "passages": TEXTS}, indent=4),
    f"<answer>\n~~~\n{JSON}\n~~~\n</answer>",
    json.dumps({f"grade_{level}": {"text": text} for level, text in GOOD.items()}),
]
LINES = [  # {0} the level, {1} the passage, {2} its meaning, {3} the level as a word
    "Level {0}: {1}",
    "{0}. {1}\n",
    "({0}) - {1}",
    "[{0}] {1}",
    "**[{0}]** {1}",
    "- [Level {0}] {1}",
    "**{0}** {1}",
    "* **Level {0}**: {1}",
    "• Level {0}: “{1}”",
    "7. **Level {0}:** {1}",
    "## Level {0}\n\n{1}\n",
    "  Level {0} :   {1}\t\r",
    "Level {0}：{1}",
    "{2}: {1}",
    "{0}. {2}: {1}",
    "Level {0} ({2}): {1}",
    "Grade {3}: {1}",
]
for line in LINES:
    parts = [line.format(n, GOOD[n], MEANINGS[n], NUMBERS[n]) for n in LEVELS]
    FORMS.append("\n".join(parts))
    FORMS.append("\n---\n".join(parts) + "<|eot_id|>\n\n*Let me know if you want changes!*")
REFUSED = [
    ("", r"found no level \[3, 2, 1, 0\]"),
    ('{"3": "alpha", "2": "beta", "1": "gam', "or the reply is cut off"),
    ('{"3": "alpha", "2": "beta"}', r"found no level \[1, 0\]"),
    ('{"3": "a", "3": "b", "2": "c", "1": "d", "0": "e"}', "level 3: stands there twice"),
    ("Level 3: a\nLevel 3: b\nLevel 2: c", "level 3: stands there twice"),
    (
        '{"3": "...", "2": "b", "1": "c", "0": "d"}',
        "level 3: expected a text with words, found '...'",
    ),
    ('{"3": 7, "2": "b", "1": "c", "0": "d"}', "level 3: expected a text with words, found 7"),
    ("x" * (prompts.LONGEST_REPLY + 1), "at most 20000 characters"),
]
REASONING = [
    ("<think>", "</think>"),
    ("", "\n</think>\n\n"),
    ("<thinking>", "</thinking>"),
    ("<THOUGHT>", "</THOUGHT>"),
    ('<reasoning type="long">', "</reasoning>"),
    ("[THINK]", "[/THINK]"),
    ("<|channel>thought\n", "<channel|>"),
    ("◁think▷", "◁/think▷"),
    ("<seed:think>", "</seed:think>"),
    ("<|begin_of_thought|>", "<|end_of_thought|>"),
    ("<|channel|>analysis<|message|>", "<|end|><|start|>assistant<|channel|>final<|message|>"),
    ("analysis", "assistantfinal"),  # the same without its special tokens
]
PIECES = [
    *"{}[]\"',:\n\0\ud800",
    "9" * 4500,
    "[" * 3000,
    "\\u",
    "**",
    "Level",
    "𝟛",
    "NaN",
    "<think>",
]


@pytest.mark.parametrize("reply", FORMS)
def test_every_form_with_one_meaning_is_read(reply):
    assert list(parse_reply(reply).items()) == list(GOOD.items())


@pytest.mark.parametrize("reply, reason", REFUSED)
def test_everything_else_is_refused_with_a_reason(reply, reason):
    with pytest.raises(ReplyError, match=reason):
        parse_reply(reply)


def test_a_passage_is_one_line_without_markup():
    reply = '{"3": "```text\\n “x” \ud800 **2**10**``` \x00", "2": "not asked for"}'
    assert parse_reply(reply, (3,)) == {3: "“x” 2**10"}


def test_numbers_in_a_passage_do_not_divide_it():
    reply = "Level 3: It took\n12 days.\n5. is not asked for\n2.5 litres\nLevel 2: b"
    assert parse_reply(reply, (3, 2))[3] == "It took 12 days. 5. is not asked for 2.5 litres"


@pytest.mark.parametrize("begin, end", REASONING)
@pytest.mark.parametrize("plan, reply", [("all-levels", JSON), ("by-level", PROSE)])
def test_reasoning_is_left_out_with_the_draft_in_it(begin, end, plan, reply):
    asked = prompts.calls(plan)[0]
    draft = JSON.replace("alpha", "a draft")
    reasoning = f"{begin}Okay, the user wants this: {draft} {PROSE}"
    assert read_reply(plan, asked, reasoning + end + reply) == read_reply(plan, asked, reply)
    if begin:
        with pytest.raises(ReplyError, match="the reasoning has no end"):
            read_reply(plan, asked, reasoning)


def mutated(reply, rng):
    """The reply after up to five changes: parts cut out, put in, turned round; marks replaced."""
    for _ in range(rng.randint(1, 5)):
        start, end = sorted(rng.choices(range(len(reply) + 1), k=2))
        part = reply[start:end]
        piece = rng.choice([*PIECES, *FORMS, chr(rng.randrange(0x11000)), part[::-1], part * 2])
        reply = reply[:start] + piece + reply[end:]
        if rng.random() < 0.1:
            reply = reply.replace(rng.choice("\"',:{}\n 0123"), piece)[:100_000]
    return reply


@pytest.mark.parametrize("plan", prompts.SYSTEM)
def test_ten_thousand_mutated_replies_are_passages_or_a_reason(plan):
    rng = random.Random(7)
    asked = prompts.calls(plan)[0]
    count = 0
    for _ in range(10_000):
        reply = mutated(rng.choice([*FORMS, PROSE]), rng)
        try:
            passages = read_reply(plan, asked, reply)
        except ReplyError:
            continue
        count += 1
        assert tuple(passages) == asked
        assert re.fullmatch(r"\S+( \S+)*", " ".join(passages.values()).encode().decode())
    assert 100 < count < 9900


@pytest.mark.parametrize("unit", ["1:", "'", '{"3":', "{1:", "**3** ", "[think ", "\n"])
def test_a_long_run_ends_with_a_reason(unit):
    with pytest.raises(ReplyError):
        parse_reply(unit * (prompts.LONGEST_REPLY // len(unit)))


def one_passage(text):
    return read_reply("by-level", (2,), text)[2]


@pytest.mark.parametrize("form", ["{}", "{} It then meets", "Here it is:\n\n{}", "```\n{}\n```"])
def test_one_passage_is_cut_to_whole_sentences(form):
    assert one_passage(form.format(PROSE)) == PROSE


def test_one_passage_has_at_most_ninety_words():
    sentences = " ".join(f"Sentence {n} is about river{n} and town{n}." for n in range(30))
    assert one_passage(sentences) == " ".join(sentences.split()[:84])


@pytest.mark.parametrize(
    "text, reason",
    [
        ("word " * 50, "found 0"),
        ("A river. " * 9, "repeats itself"),
        ("河流很长。" * 9, "repeats itself"),
        ("河流很长。", "found 4"),
    ],
)
def test_too_few_words_and_repetition_are_refused(text, reason):
    with pytest.raises(ReplyError, match=f"level 2: .*{reason}"):
        one_passage(text)


@pytest.mark.parametrize(
    "passage",
    [
        "河流发源于北部山区，靠近边境，随后穿过一片广阔的平原。它是该国最长的河流。",
        "川は北部の丘陵に源を発し、国境の近くを流れる。「長い川だ。」",
        "นี่คือแม่น้ำที่ยาวที่สุดในประเทศ ไหลผ่านที่ราบกว้างใหญ่ ",
        "यह नदी उत्तरी पहाड़ियों से निकलती है और सीमा के पास बहती है। फिर यह मैदान पार करती है।",
    ],
)
def test_other_scripts_have_other_words_and_full_stops(passage):
    assert one_passage(f"{passage} {passage[:7]}") == passage.strip()


def test_the_plan_by_level_shows_the_query_for_the_best_level_only():
    drawn = {"neighbour": "old bread", "unrelated": "why is the sky blue"}
    chats = [prompts.messages("by-level", (n,), "why do cats purr", drawn) for n in LEVELS]
    shown = [re.split(": |about ", user["content"])[-1] for _, user in chats]
    assert shown == ["why do cats purr", "cats purr", "old bread", "why is the sky blue"]


@pytest.mark.parametrize(
    "query, topic",
    [
        ("how long does a sprained ankle take to heal", "sprained ankle heal"),
        ("usb-c vs. micro-usb", "usb-c micro-usb"),
        ("what does it do", "what does it do"),
        ("日本の首都", "日本の首都"),
    ],
)
def test_a_topic_is_the_content_words(query, topic):
    assert prompts.topic(query) == topic


def test_unrelated_queries_share_no_content_word():
    pool = ["how long does bread dough rise", "why is the sky blue", "fresh bread", "cat food"]
    drawn = {prompts.draw(pool[0], pool, seed)["unrelated"] for seed in range(50)}
    assert drawn == {"why is the sky blue", "cat food"}


@pytest.mark.parametrize("pool", [["lonely query"], ["the query", "lonely sea"]])
def test_without_a_free_query_one_of_the_kits_is_drawn(pool):
    assert prompts.draw("lonely query", pool, 0)["unrelated"] in prompts.UNRELATED
