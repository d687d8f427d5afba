"""The prompts and the parser: plans, hashes, accepted forms, refusals with reasons, mutated replies."""

import json
import random
import re
import time

import pytest

from repro import prompts
from repro.prompts import ReplyError, parse_reply, read_reply

GOOD = {3: "alpha one", 2: "beta two", 1: "gamma three", 0: "delta four"}
NAMES = {3: "Perfectly relevant three", 2: "Highly relevant two", 1: "Related one", 0: "Irrelevant zero"}
JSON = json.dumps(TEXTS := {str(level): text for level, text in GOOD.items()})
DRAWN = {"neighbour": "the history of bread", "unrelated": "why is the sky blue"}

def lines(form, order=(3, 2, 1, 0)):  # {0} number, {1} text, {2} meaning, {3} number as a word
    return "\n".join(form.format(n, GOOD[n], *NAMES[n].rsplit(" ", 1)) for n in order)

LINES = "Level {0}: {1}|{0}. {1}\n|({0}) - {1}|[{0}] {1}|**[{0}]** {1}|- [Level {0}] {1}|**{0}** {1}|{2}: {1}"
LINES += '|[{0}] "{1}"|* **Level {0}**: {1}|• Level {0}: “{1}”|7. Level {0}: {1}'
LINES += "|**Level {0}:** {1}|## Level {0}\n\n{1}\n|Grade {3}: {1}|{0}. {2}: {1}|  Level {0} :   {1}\t\n"
FORMS = [*map(lines, LINES.split("|")), lines("Level {0}: {1}", range(4)), lines("{0}: {1}", (3, 2, 1, 0, 3)),
         JSON, JSON[:-1] + ",}", JSON[:-1], str(TEXTS), str(GOOD), f"\n```json\n{JSON}\n```\nIs {{it}} ok?",
         json.dumps({"q": "a", "passages": TEXTS}, indent=4), json.dumps({"4": "one too many"} | TEXTS),
         json.dumps([{"level": level, "passage": text} for level, text in GOOD.items()]),
         json.dumps({str(level): {"passage": text} for level, text in GOOD.items()}),
         "\n".join(json.dumps({"grade": str(level), "text": text}) for level, text in GOOD.items()),
         json.dumps({"Level 3": GOOD[3], "two": GOOD[2], "grade_1": GOOD[1], "irrelevant": GOOD[0]}),
         json.dumps({f"{level} (as asked)": text for level, text in GOOD.items()})]
REFUSED = {
    "": "empty", " \n\t": "empty", "I cannot help with that.": "no level found", '{"-1": "d"}': "no level",
    "3] a\n2] b\n1] c\n0] d": "no level found", '{"a":' * 3000: "no level found",
    '{"3": "alpha", "2": "beta", "1": "gam': "no level found, or it is cut off",
    '{\n  "3": "he said "a"",\n  "2": "b",\n  "1": "c",\n  "0": "d"\n}': "no level found",
    '{"3": "a", "3": "b", "2": "c", "1": "d", "0": "e"}': "level 3: stands there twice",
    "Level 3: a\nLevel 3: b\nLevel 2: c\nLevel 1: d\nLevel 0: e": "level 3: stands there twice",
    '{"3": "...", "2": "b", "1": "c", "0": "d"}': "level 3: the passage is empty",
    "Level 3: a\nLevel 2:\nLevel 1: c\nLevel 0: d": "level 2: the passage is empty",
    '{"3": 7, "2": "b", "1": "c", "0": "d"}': "level 3: expected text, found int",
    '{"3": {"a": 1}, "2": "b", "1": "c", "0": "d"}': "level 3: expected text, found dict",
    "x" * (prompts.LONGEST_REPLY + 1): "characters", '{"3":' + "9" * 5000 + "}": "missing|no level found"}

def test_every_form_is_read_and_everything_else_refused_with_a_reason():
    for form in FORMS:
        assert list(parse_reply(form).items()) == list(GOOD.items()), form
    for reply, reason in REFUSED.items():
        with pytest.raises(ReplyError, match=reason):
            parse_reply(reply)

def test_corners_of_the_parser():
    quoted = parse_reply("""{'3': 'it's here', '2': 'a \\'b\\' "c"', '1': "don't", '0': 'b, c',}""")
    assert quoted == {3: "it's here", 2: "a 'b' \"c\"", 1: "don't", 0: "b, c"}
    prose = parse_reply("Level 3: It took\n12 days.\n\n---\nLevel 2: b\n***\nLevel 1: c\n5. is not asked for"
                        "\nLevel 0: d\n\nShall I write more?")
    assert prose == {3: "It took 12 days.", 2: "b", 1: "c 5. is not asked for", 0: "d"}
    marked = '{"1": "```text\\n “x” \ud800 **a**``` \x00", "0": "b", "2": "c"}'
    assert parse_reply(marked, (1, 0)) == {1: "“x” a", 0: "b"} and issubclass(ReplyError, ValueError)

PIECES = [*"{}[]\"',:\\\n\r\x00\ud800\u202e\u2028", "9" * 4500, "[" * 3000, " " * 2000, "()" * 500]
PIECES += '\\u|```|**|Level|Grade three:|3|-1|null|𝟛|\x1b[0m|NaN|{"3":|passages'.split("|")

def mutate(reply, rng):
    for _ in range(rng.randint(1, 5)):
        i, j = sorted((rng.randrange(len(reply) + 1), rng.randrange(len(reply) + 1)))
        piece, char = rng.choice(PIECES), chr(rng.choice([rng.randrange(128), rng.randrange(0x11000)]))
        start, middle, end, old = reply[:i], reply[i:j], reply[j:], rng.choice("\"',:{}\n 0123")
        changed = [start + end, start + middle + start, start + piece + middle + end, middle]
        changed += [start + middle[::-1] + end, start + char + reply[i + 1 :], reply.replace(old, piece)]
        reply = rng.choice([*changed, reply.swapcase(), reply + rng.choice(FORMS)]) or piece
    return reply

def test_ten_thousand_mutated_replies_are_passages_or_a_reason():
    rng, outcomes, slowest = random.Random(7), {"passages": 0, "reason": 0}, 0.0
    for _ in range(10_000):
        reply, start = mutate(rng.choice(FORMS), rng), time.perf_counter()
        for plan, asked in (("all-levels", (3, 2, 1, 0)), ("by-level", (2,))):
            try:
                found = read_reply(plan, asked, reply)
                outcomes["passages"] += tuple(found) == asked
                assert "```" not in str(found) and "".join(found.values()).encode()  # no lone surrogates
                assert all(re.search(r"\w", x) and x == " ".join(x.split()) for x in found.values())
            except ReplyError as error:
                outcomes["reason"] += bool(str(error))
        slowest = max(slowest, time.perf_counter() - start)
    assert min(outcomes.values()) > 1000 and sum(outcomes.values()) == 20_000 and slowest < 2.0, outcomes

def test_long_runs_end_with_a_reason():
    for unit in '1:\'|"3":"|**3** |level |{"3":|\t\n|\'1\' : |3)|>#*|(|[|:\'|,\'\n'.split("|"):
        with pytest.raises(ReplyError):
            parse_reply((unit * prompts.LONGEST_REPLY)[: prompts.LONGEST_REPLY])

def test_one_passage_is_cut_to_whole_sentences():
    whole = "The river rises in the northern hills near the border. It then crosses a wide and empty plain."
    for form in ("{}", "{} After that it meets the", "Here is a paragraph:\n\n{}", "```\n{}\n```"):
        assert read_reply("by-level", (2,), form.format(whole)) == {2: whole}
    sentences = " ".join(f"Sentence number {n} is about river{n} and town{n}." for n in range(30))
    kept = read_reply("by-level", (2,), sentences)[2]
    assert kept.endswith(".") and sentences.startswith(kept) and 82 <= len(kept.split()) <= 90
    for text, reason in {"No.": "found 1", "word " * 50: "found 0", "A river. " * 9: "repeats"}.items():
        with pytest.raises(ReplyError, match=f"level 2: .*{reason}"):
            read_reply("by-level", (2,), text)

def test_plans_ask_for_every_level_once_and_their_hashes_are_the_committed_ones():
    def ask(plan):
        return [prompts.messages(plan, asked, "why do cats purr", DRAWN) for asked in prompts.calls(plan)]
    (one,), texts = ([chat[1]["content"] for chat in ask(plan)] for plan in ("all-levels", "by-level"))
    assert "why do cats purr" in one and all(f"\n{level} " in one for level in GOOD) and JSON[:6] in one
    assert ["why do cats purr" in text for text in texts] == [True, False, False, False]
    assert [DRAWN["unrelated"] in text for text in texts] == [False, False, False, True]
    assert [prompts.prompt_sha256(plan)[:12] for plan in prompts.PLANS] == ["8ead06ef17f2", "e7e6da829973"]
    with pytest.raises(ValueError, match="plan: expected one of all-levels, by-level"):
        prompts.prompt_sha256("from-answer")

def test_topics_and_what_is_drawn_for_the_lower_levels():
    assert prompts.topic("how long does a sprained ankle take to heal") == "sprained ankle heal"
    assert prompts.topic("usb-c vs. micro-usb") == "usb-c micro-usb"
    assert all(prompts.topic(query) == query for query in ("what does it do", "日本の首都", "???"))
    pool = ["how long does bread dough rise", "why is the sky blue", "normal heart rate", "cat food"]
    drawn = [prompts.draw(pool[0], pool, seed) for seed in range(50)]
    assert drawn[1] == prompts.draw(pool[0], list(pool), 1) and len({str(one) for one in drawn}) > 5
    for one in drawn:  # never itself, never one that shares a content word
        assert one["unrelated"] in pool[1:] and set(one["neighbour"].split()) & {"bread", "dough", "rise"}
    for query, few in (("lonely query", ["lonely query"]), ("sky blue", ["the sky", "blue sea"])):
        assert prompts.draw(query, few, 0)["unrelated"] in prompts.UNRELATED
