"""What the generator is asked, and how its reply is read.

For one query the model writes one passage at each level of relevance, 3 (best) to 0.  The prompt is the
kit's own.  `all-levels` asks for the four passages in one JSON reply, so that they contrast (for large
models); `by-level` asks for one passage a call and never for a bad answer, which small models cannot give
on purpose: a lower level is a good answer to another question, drawn with a seed.
"""

import hashlib
import json
import random
import re
from collections.abc import Mapping, Sequence

PROMPT_VERSION = "sycl-v1"
PLANS = ("all-levels", "by-level")
LEVELS = (3, 2, 1, 0)
KINDS = dict(zip(LEVELS, ("exact", "partial", "related", "other"), strict=True))
MEANING = {
    3: "perfectly relevant: the passage is about the query and holds its exact, complete answer",
    2: "highly relevant: some of the answer, but imprecise, incomplete or buried among other things",
    1: "related: on the topic of the query, but without an answer",
    0: "irrelevant: another subject altogether, nothing to do with the need behind the query",
}
ALL_SYSTEM = "You write short passages that read like excerpts of real web pages."
ALL_ASK = (
    "Query: {query}\n\nWrite {count} passages for this query, one at each level of relevance:\n{definitions}"
    "\n\nEach passage is plain prose of 35 to 90 words, all about equally long, accurate, in the voice of a "
    "real page (encyclopedia, clinic, forum, shop, news, textbook), with varied openings. No lists, no "
    "markdown, no word about relevance or the query. Reply with one JSON object and nothing else:\n{shape}"
)
ONE_SYSTEM = "You write short excerpts of web pages. Reply with one plain paragraph of 40 to 80 words."
ONE_ASK = {  # "hint" is never asked for, but belongs to the text whose hash the committed records carry
    "exact": "Write an excerpt of a web page that gives the exact and complete answer to: {query}",
    "partial": "Write an encyclopedia paragraph with general background about: {topic}",
    "hint": "Write an encyclopedia paragraph about {neighbour} that mentions {topic} in passing.",
    "related": "Write an encyclopedia paragraph about {neighbour}",
    "other": "Write an excerpt of a web page that answers: {unrelated}",
}
FACETS = (
    "the history of {part}|common mistakes with {part}|people who work with {part}|learning about {part}|"
    "{part} in popular culture|famous examples of {part}"
).split("|")
UNRELATED = (
    "how to prune roses|what is a sonnet|how do sailing boats turn|rules of table tennis|what is a city "
    "council|how is paper recycled|how to train for a marathon|types of clouds|how do violins make sound|"
    "what do archivists do|how to fold a fitted sheet|why do leaves fall"
).split("|")
COMMON = frozenset(
    """a about after age all an and any are as at average be become before best better between by calculate
called can cause caused causes come cost day days definition describe did difference digits do does during
each english ever everyday exactly example examples explain fast find first for formula from get good had
happens has have hour hours how i in into is it its just keep kind kinds know known last long made make many
mean meaning means meant minutes month months most much my name names need needed normal number of old on one
or out over part parts per purpose range really safe should so stand stands symptoms take takes than that the
their them there they this through time to treat type types under use used uses using versus vs was way week
weeks were what when where which who why will with without word words work works year years you your
    """.split()
)
LONGEST_REPLY = 20_000  # characters; a longer reply is no reply to this prompt
SHORTEST_PASSAGE, LONGEST_PASSAGE = 15, 90  # words, where one passage is asked for
WORDS = {"zero": 0, "one": 1, "two": 2, "three": 3, "four": 4, "five": 5}
NAMES = r"perfectly[ _-]relevant|highly[ _-]relevant|(?:partially[ _-])?related|irrelevant"
NUMBER = rf"(?P<number>[0-9]{{1,2}}|{'|'.join(WORDS)})"
NOUN = r"(?:relevance )?(?:level|grade|score|passage|rating)s?"
KEY = re.compile(rf"(?i)\W*(?:(?:{NOUN})?[\s_:#-]*{NUMBER}\b.{{0,60}}|(?P<name>{NAMES})(?:.passage)?)\W*")
LABEL = re.compile(  # how a line opens: "Level 3:", "**3** ", "[3] ", "## Grade three", "Highly relevant - "
    rf"(?im)^[ \t#>_`\"'(\[-]*(?P<bold>\*\*)?\*?[ \t]*\[?(?P<square>(?<=\[))?"
    rf"(?:{NOUN}[ \t]*[:#-]?[ \t]*{NUMBER}|(?P<bare>[0-9])|(?P<name>{NAMES}))(?![\w%])"
    rf"(?:[ \t]*[.:(),*–—-]*[ \t]*\(?(?:{NAMES})(?![\w]))?"
    r"(?:[ \t_`\"'*)\]]*(?:[:.)=–—-]+[ \t*_`\"']*|$)"
    r"|(?(square)\][ \t*_`\"']*|(?(bold)[:.)]*\*\*[ \t]*|(?!))))"
)
PAIR = re.compile(  # JSON that is not quite JSON: single quotes, bare keys, no closing brace
    rf"(?is)[\"']?(?P<key>(?:(?:level|grade)[ _]?)?{NUMBER})[\"']?\s*:\s*"
    r"(?:\"(?P<double>(?:[^\"\\]|\\.)*)\"|'(?P<single>[^\"]{0,1200}?)'"
    r"(?=\s*(?:,\s*[\"']?[\w ]{1,12}[\"']?\s*:|,?\s*\}|,?\s*\Z)))"
)
FENCE = re.compile(r"`{3,}[ \t]*[a-zA-Z]*|~{3,}")
Found = list[tuple[int, object]]  # (level, what stands there), in the order of the reply


class ReplyError(ValueError):
    """A reply that does not hold what was asked; the message is the reason."""


def prompt_sha256(plan: str) -> str:
    """Hex sha256 of everything that this plan's prompt is made from (not of the query)."""
    if plan not in PLANS:
        raise ValueError(f"plan: expected one of {', '.join(PLANS)}, got {plan!r}")
    one = [ONE_SYSTEM, ONE_ASK, FACETS, UNRELATED, sorted(COMMON)]
    parts = [PROMPT_VERSION, plan, [f"{KINDS[level]}: {MEANING[level]}" for level in LEVELS]]
    parts += [ALL_SYSTEM, ALL_ASK] if plan == "all-levels" else one
    return hashlib.sha256(json.dumps(parts, ensure_ascii=False, sort_keys=True).encode()).hexdigest()


def topic(query: str) -> str:
    """The query's content words in their order; the query itself if there are none."""
    words = [word for word in re.findall(r"[^\W_](?:[\w'./&+-]*\w)?", query) if word.lower() not in COMMON]
    return " ".join(words) or query.strip()


def draw(query: str, pool: Sequence[str], seed: int) -> dict[str, str]:
    """What levels 1 and 0 are about: {"neighbour": a side of half of its words, "unrelated": a query}.

    The latter is one of `pool` (all queries of the file) without a content word in common.
    """
    rng = random.Random(f"{seed}|{query}")
    words = topic(query).split()
    start = rng.randrange(len(words) - (keep := max(1, len(words) // 2)) + 1)
    neighbour = rng.choice(FACETS).format(part=" ".join(words[start : start + keep]))
    own = {word.lower() for word in words}
    tries = (rng.choice(pool) for _ in range(40 if len(pool) > 1 else 0))
    other = next((text for text in tries if own.isdisjoint(topic(text).lower().split())), None)
    free = [text for text in UNRELATED if own.isdisjoint(text.split())] or UNRELATED
    return {"neighbour": neighbour, "unrelated": other or rng.choice(free)}


def calls(plan: str) -> list[tuple[int, ...]]:
    """The levels asked for in each call: one call for `all-levels`, else one call a level, best first."""
    return [LEVELS] if plan == "all-levels" else [(level,) for level in LEVELS]


def messages(plan: str, asked: tuple[int, ...], query: str, drawn: Mapping[str, str]) -> list[dict[str, str]]:
    """The chat [{"role", "content"}, ...] for one item of `calls(plan)`; `drawn` comes from `draw`."""
    system, text = ONE_SYSTEM, ONE_ASK[KINDS[asked[0]]]
    values = {"query": query, "topic": topic(query), **drawn}
    if plan == "all-levels":
        system, text = ALL_SYSTEM, ALL_ASK
        values["definitions"] = "\n".join(f"{level} {MEANING[level]}" for level in asked)
        values |= {"count": str(len(asked)), "shape": json.dumps({str(level): "..." for level in asked})}
    return [{"role": "system", "content": system}, {"role": "user", "content": text.format(**values)}]


def tidy(text: str) -> str:
    """One line of plain text: no fences, outer quotes or markup, control characters or lone surrogates."""
    text = re.sub(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]", " ", FENCE.sub(" ", text))
    text = " ".join(text.replace("**", " ").replace("__", " ").split())
    while len(text) > 1 and text[0] + text[-1] in ('""', "''", "“”", "**") and text[0] not in text[1:-1]:
        text = text[1:-1].strip()
    return " ".join(text.strip("`").split())


def level_of(key: object, levels: tuple[int, ...]) -> int | None:
    """The asked level that a JSON key or label names, or None."""
    level = key if isinstance(key, int) and not isinstance(key, bool) else None
    if isinstance(key, str) and len(key) < 120 and (found := KEY.fullmatch(key)):
        if number := found["number"]:
            level = WORDS[number.lower()] if number.lower() in WORDS else int(number)
        elif set(levels) == set(LEVELS):
            level = {"per": 3, "hig": 2, "irr": 0}.get(found["name"][:3].lower(), 1)
    return level if level in levels else None


def from_json(text: str, levels: tuple[int, ...]) -> Found:
    """(level, value) of all JSON in a text: keys, {"level": 3, "passage": "..."}, {"passages": {...}}."""
    found: Found = []

    def note(pairs: list[tuple[str, object]]) -> tuple[str]:  # called for each object, inner ones first
        plain = {key.lower(): item for key, item in pairs}
        label = next((plain[k] for k in ("level", "grade", "relevance", "score") if k in plain), None)
        content = next((plain[k] for k in ("passage", "text", "content") if k in plain), None)
        if label is not None and isinstance(content, str):
            pairs = [(label, content)]
        found.extend((level, item) for key, item in pairs if (level := level_of(key, levels)) is not None)
        return ("object",)

    end, tries, decoder = 0, 0, json.JSONDecoder(object_pairs_hook=note, strict=False)
    for match in re.finditer("{", text):
        if match.start() >= end and tries < 64:
            tries, before = tries + 1, len(found)
            try:
                end = decoder.raw_decode(text, match.start())[1]
            except (ValueError, RecursionError):
                del found[before:]
    return found


def from_pairs(text: str, levels: tuple[int, ...]) -> Found:
    """(level, text) of the pairs of something that is not quite JSON."""
    found: Found = []
    for match in PAIR.finditer(text):
        if (level := level_of(match["key"], levels)) is not None:
            value = match["single"] if match["double"] is None else match["double"]
            found.append((level, re.sub(r"(?s)\\(.)", lambda m: " " if m[1] in "nrt" else m[1], value)))
    return found


def from_labels(text: str, levels: tuple[int, ...]) -> Found:
    """(level, text up to the next label) of labelled lines; a bare number counts only if it is asked for."""
    marks = [match for match in LABEL.finditer(text) if not match["bare"] or int(match["bare"]) in levels]
    ends = [match.start() for match in marks[1:]] + [len(text)]
    named = [level_of(match["bare"] or match["number"] or match["name"], levels) for match in marks]
    parts = zip(named, marks, ends, strict=False)  # without marks there is one end too many
    return [(level, text[match.end() : end]) for level, match, end in parts if level is not None]


def parse_reply(text: str, levels: tuple[int, ...] = LEVELS) -> dict[int, str]:
    """{level: passage} for all asked levels, in their order, from a reply in any form that has one meaning.

    Accepted are JSON (also with single quotes or a comma too many) and labelled lines ("Level 3: ...",
    "**3** ...", "[3] ...", "Perfectly relevant: ..."), with prose or fences around.  A level that was not
    asked for is ignored.  Passages are stripped, single-spaced plain text.  Raises ReplyError with one
    reason: nothing found, levels missing, a level repeated with other text, no words, a wrong type.
    """
    if not isinstance(text, str):
        raise ReplyError(f"expected text, found {type(text).__name__}")
    if len(text) > LONGEST_REPLY:
        raise ReplyError(f"the reply has {len(text)} characters, more than {LONGEST_REPLY}")
    text = re.sub(r"[ \t\x00]+", " ", text)  # also keeps the patterns linear in the length of blank runs
    repaired = re.sub(r",\s*([}\]])", r"\1", text)
    best: Found = []
    for reader, source in ((from_json, text), (from_json, repaired), (from_pairs, text), (from_labels, text)):
        found = reader(source, levels)
        if {level for level, _ in found} == set(levels):
            best = found
            break
        best = max(best, found, key=len)
    if not best:
        raise ReplyError("no level found in the reply" if text.strip() else "the reply is empty")
    passages: dict[int, str] = {}
    for level, value in best:
        if not isinstance(value, str):
            kind = "an object" if isinstance(value, tuple) else type(value).__name__
            raise ReplyError(f"level {level}: expected text, found {kind}")
        passage = tidy(value)
        if not re.search(r"\w", passage):
            raise ReplyError(f"level {level}: the passage is empty")
        if passages.setdefault(level, passage) != passage:
            raise ReplyError(f"level {level}: stands there twice with different text")
    if missing := [str(level) for level in levels if level not in passages]:
        names = f"level{'s' * (len(missing) > 1)} {', '.join(missing)}"
        raise ReplyError(f"{names} missing (found {len(passages)} of {len(levels)})")
    return {level: passages[level] for level in levels}


def read_reply(plan: str, asked: tuple[int, ...], text: str) -> dict[int, str]:
    """{level: passage} from the reply to one call.  Raises ReplyError with the reason.

    Where one passage was asked for, an opening line that only announces ("Here is a paragraph:") is
    dropped, and what goes past `LONGEST_PASSAGE` words or stops in mid-sentence is cut to a sentence end.
    """
    if plan == "all-levels":
        return parse_reply(text, asked)
    lines = FENCE.sub(" ", text[:LONGEST_REPLY]).strip().splitlines()
    if len(lines) > 1 and lines[0].rstrip(" *").endswith(":") and len(lines[0].split()) < 20:
        lines = lines[1:]
    words = tidy("\n".join(lines)).split()[:LONGEST_PASSAGE]
    while words and not re.search(r"[.!?][\"'”’)\]]*$", words[-1]):
        words.pop()
    if (count := len(words)) < SHORTEST_PASSAGE:
        least = f"level {asked[0]}: expected {SHORTEST_PASSAGE} words or more in whole sentences"
        raise ReplyError(f"{least}, found {count}")
    if len({word.lower().strip(".,;:!?") for word in words}) < 0.4 * count:
        raise ReplyError(f"level {asked[0]}: the passage repeats itself")
    return {asked[0]: " ".join(words)}
