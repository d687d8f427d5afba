"""Read passages out of what a model replied, or say why that is not possible.

Models wrap what was asked for in prose, code fences and labels.  The readers here accept the forms
that have one meaning only: JSON (also with single quotes or a comma too many) and labelled lines
("Level 3: ...", "**3** ...", "Grade three: ...", "Perfectly relevant: ...").  A level that was not
asked for is ignored.  A missing level, one level with two different texts, or a level without
words is refused.  Whatever the text, the result is passages or a `ReplyError`.
"""

import json
import re
from collections.abc import Callable, Iterable

LONGEST_REPLY = 20_000  # characters; a longer reply is no reply to this prompt
SHORTEST_PASSAGE, LONGEST_PASSAGE = 15, 90  # words; applies to single-passage replies
WORDS = {"zero": 0, "one": 1, "two": 2, "three": 3, "four": 4, "five": 5}
NAMES = {  # from best to worst; a name tells the level only where all four levels are asked for
    3: r"perfectly[ _-]relevant",
    2: r"highly[ _-]relevant",
    1: r"(?:partially[ _-])?related",
    0: r"irrelevant",
}
NUMBER = r"(?P<number>[0-9]{1,2}|" + "|".join(WORDS) + ")"
NAME = r"(?P<name>" + "|".join(NAMES.values()) + ")"
NOUN = r"(?P<noun>(?:relevance )?(?:level|grade|score|passage|rating)s?)"
KEY = re.compile(rf"\W*(?:{NOUN}?[\s_:#-]*{NUMBER}\b.{{0,60}}|{NAME}(?:[\s_]passage)?)\W*", re.I)
LABEL = re.compile(
    rf"^[ \t#>_`\"'(\[-]*(?P<bold>\*\*)?\*?[ \t]*"
    rf"(?:{NOUN}[ \t]*[:#-]?[ \t]*{NUMBER}|(?P<bare>[0-9])|{NAME})(?![\w%])"
    r"(?:[ \t]*[.:(),*–—-]*[ \t]*\(?(?:" + "|".join(NAMES.values()) + r")(?![\w]))?"
    r"(?:[ \t_`\"'*)\]]*(?:[:.)=–—-]+[ \t*_`\"']*|$)|(?(bold)[:.)]*\*\*[ \t]*|(?!)))",
    re.I | re.M,
)
PAIR = re.compile(
    r"[\"']?(?P<key>(?:(?:level|grade)[ _]?)?(?:[0-9]{1,2}|" + "|".join(WORDS) + r"))[\"']?\s*:\s*"
    r"(?:\"(?P<double>(?:[^\"\\]|\\.)*)\"|'(?P<single>[^\"]{0,1200}?)'"
    r"(?=\s*(?:,\s*[\"']?[\w ]{1,12}[\"']?\s*:|,?\s*\}|,?\s*\Z)))",
    re.I | re.S,
)
FENCE = re.compile(r"`{3,}[ \t]*[a-zA-Z]*|~{3,}")


class ReplyError(ValueError):
    """A reply that does not hold what was asked; the message is the reason."""


def tidy(text: str) -> str:
    """One line of plain text: no fences, outer quotes or markup, control characters or lone surrogates."""
    text = FENCE.sub(" ", text)
    text = "".join(
        " " if ord(c) < 32 or 0x7F <= ord(c) < 0xA0 or 0xD800 <= ord(c) < 0xE000 else c for c in text
    )
    text = " ".join(text.replace("**", " ").replace("__", " ").split())
    while len(text) > 1 and (text[0] + text[-1] in ('""', "''", "“”", "**") and text[0] not in text[1:-1]):
        text = text[1:-1].strip()
    return " ".join(text.strip("`").split())


def level_of(key: object, levels: tuple[int, ...]) -> int | None:
    """The asked level that a JSON key or label names, or None."""
    if isinstance(key, int) and not isinstance(key, bool):
        return key if key in levels else None
    found = KEY.fullmatch(key) if isinstance(key, str) and len(key) < 120 else None
    if not found:
        return None
    if number := found["number"]:
        level = WORDS[number.lower()] if number.lower() in WORDS else int(number)
        return level if level in levels else None
    return name_level(found["name"], levels)


def name_level(name: str, levels: tuple[int, ...]) -> int | None:
    """The level of a name ("highly relevant": 2) where the levels are 3, 2, 1, 0; else None."""
    if set(levels) != set(NAMES):
        return None
    return next(level for level, pattern in NAMES.items() if re.fullmatch(pattern, name, re.I))


Found = list[tuple[int, object]]  # (level, what stands there), in the order of the reply


def json_values(text: str) -> Iterable[object]:
    """Every complete JSON object or array in the text, left to right; objects as pairs, to see repeats."""
    decoder = json.JSONDecoder(object_pairs_hook=lambda pairs: ("object", pairs), strict=False)
    position, tries = 0, 0
    while (start := re.compile(r"[{\[]").search(text, position)) and tries < 64:
        tries += 1
        try:
            value, position = decoder.raw_decode(text, start.start())
            yield value
        except (ValueError, RecursionError):
            position = start.start() + 1


def from_json(text: str, levels: tuple[int, ...]) -> Found:
    """Levels as keys, as {"level": 3, "passage": "..."} objects, or inside {"passages": {...}}."""
    found: Found = []

    def walk(value: object, depth: int = 0) -> None:
        if depth > 4:
            return
        if isinstance(value, list):
            for item in value:
                walk(item, depth + 1)
        elif isinstance(value, tuple):
            pairs = value[1]
            plain = {str(key).lower(): item for key, item in pairs}
            label = next((plain[k] for k in ("level", "grade", "relevance", "score") if k in plain), None)
            content = next((plain[k] for k in ("passage", "text", "content") if k in plain), None)
            if label is not None and isinstance(content, str):
                if (level := level_of(label, levels)) is not None:
                    found.append((level, content))
                return
            for key, item in pairs:
                if (level := level_of(key, levels)) is not None:
                    found.append((level, item))
                elif isinstance(item, list | tuple):
                    walk(item, depth + 1)

    for value in json_values(text):
        walk(value)
    return found


def from_pairs(text: str, levels: tuple[int, ...]) -> Found:
    """Pairs of JSON that is not quite JSON: single quotes, missing quotes around keys, no closing brace."""
    found: Found = []
    for match in PAIR.finditer(text):
        level = level_of(match["key"], levels)
        if level is not None:
            value = match["double"] if match["double"] is not None else match["single"]
            found.append(
                (level, re.sub(r"\\(.)", lambda m: " " if m[1] in "nrt" else m[1], value, flags=re.S))
            )
    return found


def from_labels(text: str, levels: tuple[int, ...]) -> Found:
    """Labelled lines; a passage runs to the next label.  A bare number counts only if its level is asked."""
    marks: list[tuple[re.Match[str], int | None]] = []
    for match in LABEL.finditer(text):
        if match["bare"]:
            level = int(match["bare"])
            if level in levels:
                marks.append((match, level))
        elif match["name"]:
            marks.append((match, name_level(match["name"], levels)))
        else:
            marks.append((match, level_of(match["number"], levels)))
    found: Found = []
    for place, (match, level) in enumerate(marks):
        end = marks[place + 1][0].start() if place + 1 < len(marks) else len(text)
        if level is not None:
            found.append((level, text[match.end() : end]))
    return found


def settle(found: Found, levels: tuple[int, ...]) -> dict[int, str]:
    """One text a level, best first.  ReplyError: wrong type, no words, a repeat with other text, a gap."""
    passages: dict[int, str] = {}
    for level, value in found:
        if not isinstance(value, str):
            kind = "an object" if isinstance(value, tuple) else type(value).__name__
            raise ReplyError(f"level {level}: expected text, found {kind}")
        passage = tidy(value)
        if not re.search(r"\w", passage) or set(passage) <= set(".… "):
            raise ReplyError(f"level {level}: the passage is empty")
        if passages.setdefault(level, passage) != passage:
            raise ReplyError(f"level {level}: stands there twice with different text")
    if missing := [level for level in levels if level not in passages]:
        names = ", ".join(map(str, missing))
        raise ReplyError(
            f"level{'s' * (len(missing) > 1)} {names} missing (found {len(passages)} of {len(levels)})"
        )
    return {level: passages[level] for level in levels}


def parse_reply(text: str, levels: tuple[int, ...] = (3, 2, 1, 0)) -> dict[int, str]:
    """{level: passage} for all asked levels, best first as in `levels`.

    Passages are stripped, single-spaced plain text.  Raises ReplyError with one reason: nothing
    found, levels missing, a level repeated with different text, an empty passage, a wrong type.
    """
    if not isinstance(text, str):
        raise ReplyError(f"expected text, found {type(text).__name__}")
    if len(text) > LONGEST_REPLY:
        raise ReplyError(f"the reply has {len(text)} characters, more than {LONGEST_REPLY}")
    text = re.sub(
        r"[ \t\x00]+", " ", text
    )  # also keeps the patterns above linear in the length of blank runs
    repaired = re.sub(r",\s*([}\]])", r"\1", text)
    readers: tuple[Callable[[str, tuple[int, ...]], Found], ...] = (
        from_json,
        from_json,
        from_pairs,
        from_labels,
    )
    best: Found = []
    for reader, source in zip(readers, (text, repaired, text, text), strict=True):
        found = reader(source, levels)
        if {level for level, _ in found} == set(levels):
            return settle(found, levels)
        best = max(best, found, key=len)
    if not best:
        raise ReplyError("no level found in the reply" if text.strip() else "the reply is empty")
    return settle(best, levels)


def read_passage(text: str) -> str:
    """The one passage of a reply to a single-level prompt, as stripped, single-spaced text.

    An opening line that only announces ("Here is a paragraph:") is dropped; what goes past
    `LONGEST_PASSAGE` words, or stops in mid-sentence, is cut back to a sentence end.  ReplyError if
    fewer than `SHORTEST_PASSAGE` words are left or most of the words repeat.
    """
    lines = FENCE.sub(" ", text[:LONGEST_REPLY]).strip().splitlines()
    if len(lines) > 1 and lines[0].rstrip(" *").endswith(":") and len(lines[0].split()) < 20:
        lines = lines[1:]
    words = tidy("\n".join(lines)).split()
    cut = words[:LONGEST_PASSAGE]
    while cut and not re.search(r"[.!?][\"'”’)\]]*$", cut[-1]):
        cut.pop()
    if len(cut) < SHORTEST_PASSAGE:
        raise ReplyError(f"expected {SHORTEST_PASSAGE} words or more in whole sentences, found {len(cut)}")
    if len({word.lower().strip(".,;:!?") for word in cut}) < 0.4 * len(cut):
        raise ReplyError("the passage repeats itself")
    return " ".join(cut)
