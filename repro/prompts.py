"""What the generator is asked, and how its reply is read.

For one query the model writes a passage at each level of relevance, 3 (best) to 0. The prompt is the kit's
own. `all-levels` asks for all four in one JSON reply, so that they contrast (for large models); `by-level`
asks for one a call and never for a bad answer, which small models cannot give on purpose: a lower level is a
good answer to another question, drawn with a seed.
"""

import hashlib
import json
import random
import re
from collections.abc import Mapping, Sequence

PROMPT_VERSION, PLANS, LEVELS = "sycl-v1", ("all-levels", "by-level"), (3, 2, 1, 0)
KINDS = dict(zip(LEVELS, ("exact", "partial", "related", "other"), strict=True))
MEANING = {3: "perfectly relevant: the passage is about the query and holds its exact, complete answer",
           2: "highly relevant: some of the answer, but imprecise, incomplete or buried among other things",
           1: "related: on the topic of the query, but without an answer",
           0: "irrelevant: another subject altogether, nothing to do with the need behind the query"}
ALL_SYSTEM = "You write short passages that read like excerpts of real web pages."
ALL_ASK = (
    "Query: {query}\n\nWrite {count} passages for this query, one at each level of relevance:\n{definitions}"
    "\n\nEach passage is plain prose of 35 to 90 words, all about equally long, accurate, in the voice of a "
    "real page (encyclopedia, clinic, forum, shop, news, textbook), with varied openings. No lists, no "
    "markdown, no word about relevance or the query. Reply with one JSON object and nothing else:\n{shape}")
ONE_SYSTEM = "You write short excerpts of web pages. Reply with one plain paragraph of 40 to 80 words."
ONE_ASK = {"exact": "Write an excerpt of a web page that gives the exact and complete answer to: {query}",
           "partial": "Write an encyclopedia paragraph with general background about: {topic}",
           "hint": "Write an encyclopedia paragraph about {neighbour} that mentions {topic} in passing.",
           "related": "Write an encyclopedia paragraph about {neighbour}",
           "other": "Write an excerpt of a web page that answers: {unrelated}"}
FACETS = ("the history of {part}|common mistakes with {part}|people who work with {part}|learning about "
          "{part}|{part} in popular culture|famous examples of {part}").split("|")
UNRELATED = ("how to prune roses|what is a sonnet|how do sailing boats turn|rules of table tennis|what is a "
             "city council|how is paper recycled|how to train for a marathon|types of clouds|how do violins "
             "make sound|what do archivists do|how to fold a fitted sheet|why do leaves fall").split("|")
COMMON = set("""a about after age all an and any are as at average be become before best better between by
calculate called can cause caused causes come cost day days definition describe did difference digits do does
during each english ever everyday exactly example examples explain fast find first for formula from get good
had happens has have hour hours how i in into is it its just keep kind kinds know known last long made make
many mean meaning means meant minutes month months most much my name names need needed normal number of old on
one or out over part parts per purpose range really safe should so stand stands symptoms take takes than that
the their them there they this through time to treat type types under use used uses using versus vs was way
week weeks were what when where which who why will with without word words work works year years you
your""".split())
LONGEST_REPLY, LEAST, MOST = 20_000, 15, 90  # characters; words, where one passage is asked for
WORDS = dict(zero=0, one=1, two=2, three=3, four=4, per=3, hig=2, par=1, rel=1, irr=0)
NAMES = r"perfectly[ _-]relevant|highly[ _-]relevant|(?:partially[ _-])?related|irrelevant"
NUMBER = r"(?P<number>[0-9]{1,2}|zero|one|two|three|four)"
NOUN = r"(?:relevance )?(?:level|grade|score|passage|rating)s?"
KEY = re.compile(rf"(?i)[^\w-]*(?:(?:{NOUN}[\s_:#-]*)?{NUMBER}\b.{{0,60}}|(?P<name>{NAMES})(?:.passage)?)\W*")
LABEL = re.compile(  # how a line opens: "Level 3:", "**3** ", "[3] ", "## Grade three", "Highly relevant - "
    rf"(?im)^(?:(?:[*•+]|\d\d?[.)](?=[ *_]*(?:{NOUN}[ \t#:-]*\d|{NAMES})))[ \t]+)?"
    r"[ \t#>_`\"'(\[-]*(?P<bold>\*\*)?\*?[ \t]*\[?(?P<square>(?<=\[))?"
    rf"(?:{NOUN}[ \t]*[:#-]?[ \t]*{NUMBER}|(?P<bare>[0-9])|(?P<name>{NAMES}))(?![\w%])"
    rf"(?:[ \t]*[.:(),*–—-]*[ \t]*\(?(?:{NAMES})(?![\w]))?"
    r"(?:[ \t_`*)\]]*(?:[:.)=–—-]+[ \t*_`]*|$)|(?(square)\][ \t*_`]*|(?(bold)[:.)]*\*\*[ \t]*|(?!))))")
SINGLE = re.compile(r"(?s)([{\[,:]\s*)'(.{0,1200}?)'(?=\s*(?:[:}\]]|,\s*['\"\d}{]))")  # a string of near-JSON
FENCE = re.compile(r"`{3,}[ \t]*[a-zA-Z]*|~{3,}|(?m:^[ \t]*[-*_=]{3,}[ \t]*$)")  # also a line of -, *, _ or =
Found = list[tuple[int, object]]  # (level, what stands there), in the order of the reply

class ReplyError(ValueError):
    """A reply that does not hold what was asked; the message is the reason."""

def prompt_sha256(plan: str) -> str:
    """Hex sha256 of everything that this plan's prompt is made from (also of "hint", asked for no more)."""
    if plan not in PLANS:
        raise ValueError(f"plan: expected one of {', '.join(PLANS)}, got {plan!r}")
    parts = [PROMPT_VERSION, plan, [f"{KINDS[level]}: {MEANING[level]}" for level in LEVELS]]
    one = [ONE_SYSTEM, ONE_ASK, FACETS, UNRELATED, sorted(COMMON)]
    parts += [ALL_SYSTEM, ALL_ASK] if plan == "all-levels" else one
    return hashlib.sha256(json.dumps(parts, ensure_ascii=False, sort_keys=True).encode()).hexdigest()

def topic(query: str) -> str:
    """The query's content words in their order; the query itself if there are none."""
    words = [word for word in re.findall(r"[^\W_](?:[\w'./&+-]*\w)?", query) if word.lower() not in COMMON]
    return " ".join(words) or query.strip()

def draw(query: str, pool: Sequence[str], seed: int) -> dict[str, str]:
    """{"neighbour": a side of half of its words, "unrelated": one of `pool` without a common word}."""
    rng, words = random.Random(f"{seed}|{query}"), topic(query).split()
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
    system, text = (ALL_SYSTEM, ALL_ASK) if plan == "all-levels" else (ONE_SYSTEM, ONE_ASK[KINDS[asked[0]]])
    shape = json.dumps({str(level): "..." for level in asked})
    values = {"query": query, "topic": topic(query), "count": len(asked), "shape": shape, **drawn}
    user = text.format(definitions="\n".join(f"{level} {MEANING[level]}" for level in asked), **values)
    return [{"role": "system", "content": system}, {"role": "user", "content": user}]

def tidy(text: str) -> str:
    """One line of plain text: no fences, outer quotes or markup, control characters or lone surrogates."""
    text = re.sub(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]|\*\*|__", " ", FENCE.sub(" ", text)).strip()
    while len(text) > 1 and text[0] + text[-1] in ('""', "''", "“”", "**") and text[0] not in text[1:-1]:
        text = text[1:-1].strip()
    return " ".join(text.strip("`").split())

def level_of(key: object, levels: tuple[int, ...]) -> int | None:
    """The asked level that a JSON key or label names, or None."""
    found = KEY.fullmatch(str(key)[:120]) if isinstance(key, int | str) else None
    word = (found["number"] or found["name"][:3]).lower() if found else ""
    level = int(word) if word.isdecimal() else WORDS.get(word)
    return level if level in levels else None

def from_json(text: str, levels: tuple[int, ...]) -> Found:
    """(level, value) of all JSON in a text: keys, {"level": 3, "passage": "..."}, {"passages": {...}}."""
    found: Found = []

    def note(pairs: list[tuple[str, object]]) -> object:  # called for each object, inner ones first
        plain = {key.lower(): item for key, item in pairs}
        label = next((plain[k] for k in ("level", "grade", "relevance", "score") if k in plain), None)
        content = next((plain[k] for k in ("passage", "text", "content") if k in plain), None)
        if label is not None and isinstance(content, str):
            pairs = [(label, content)]
        found.extend((level, item) for key, item in pairs if (level := level_of(key, levels)) is not None)
        return content if label is None and isinstance(content, str) else {}

    end, decoder = 0, json.JSONDecoder(object_pairs_hook=note, strict=False)
    for start in [match.start() for match in re.finditer("{", text)][:64]:
        before = len(found)
        try:
            end = decoder.raw_decode(text, start)[1] if start >= end else end
        except (ValueError, RecursionError):
            del found[before:]
    return found

def repaired(text: str) -> str:
    """Text whose JSON had single quotes, bare numbers as keys, a comma too many or no closing brace."""
    text = SINGLE.sub(lambda found: found[1] + json.dumps(re.sub(r"\\(['\"])", r"\1", found[2])), text)
    text = re.sub(r"([{,]\s*)(\d+)(?=\s*:\s*\")", r'\1"\2"', text.replace(r"\\", "\\"))
    return re.sub(r",\s*([}\]]|$)", r"\1", text) + "}"

def from_labels(text: str, levels: tuple[int, ...]) -> Found:
    """(level, text up to the next label) of labelled lines; a bare number counts only if it is asked for."""
    marks = [mark for mark in LABEL.finditer(text) if not mark["bare"] or int(mark["bare"]) in levels]
    named = [level_of(mark["bare"] or mark["number"] or mark["name"], levels) for mark in marks]
    ends = [mark.start() for mark in marks[1:]] + [None]
    parts = [FENCE.sub(" ", text[mark.end() : end]).strip() for mark, end in zip(marks, ends, strict=False)]
    if parts[1:] and not any(re.search(r"\n\s*\n", part) for part in parts[:-1]):
        parts[-1] = re.split(r"\n\s*\n", parts[-1])[0]  # what follows a blank line there closes the reply
    return [(level, part) for level, part in zip(named, parts, strict=True) if level is not None]

def parse_reply(text: str, levels: tuple[int, ...] = LEVELS) -> dict[int, str]:
    """{level: passage} for all asked levels, in their order, from a reply in any form that has one meaning.

    Accepted are JSON (also with single quotes or a comma too many) and labelled lines ("Level 3: ...",
    "**3** ...", "[3] ...", "Perfectly relevant: ..."), with prose or fences around; other levels are ignored.
    Raises ReplyError with one reason: nothing found, levels missing, with two texts or none, a wrong type."""
    if not isinstance(text, str) or len(text) > LONGEST_REPLY:
        raise ReplyError(f"expected text of at most {LONGEST_REPLY} characters")
    text = re.sub(r"[ \t\x00]+", " ", text)  # also keeps the patterns linear in the length of blank runs
    best: Found = []
    for reader, source in ((from_json, text), (from_json, repaired(text)), (from_labels, text)):
        if {level for level, _ in best} != set(levels):
            best = max(best, reader(source, levels), key=lambda found: len({level for level, _ in found}))
    if not best:
        raise ReplyError("no level found, or it is cut off" if text.strip() else "the reply is empty")
    passages: dict[int, str] = {}
    for level, value in best:
        if not isinstance(value, str):
            raise ReplyError(f"level {level}: expected text, found {type(value).__name__}")
        if not re.search(r"\w", passage := tidy(value)):
            raise ReplyError(f"level {level}: the passage is empty")
        if passages.setdefault(level, passage) != passage:
            raise ReplyError(f"level {level}: stands there twice with different text")
    if missing := [str(level) for level in levels if level not in passages]:
        raise ReplyError(f"levels {', '.join(missing)} missing (found {len(passages)} of {len(levels)})")
    return {level: passages[level] for level in levels}

def read_reply(plan: str, asked: tuple[int, ...], text: str) -> dict[int, str]:
    """{level: passage} from a reply; a single passage is cut to whole sentences.  Raises ReplyError."""
    if plan == "all-levels":
        return parse_reply(text, asked)
    lines = FENCE.sub(" ", text[:LONGEST_REPLY]).strip().splitlines()
    if len(lines) > 1 and lines[0].rstrip(" *").endswith(":") and len(lines[0].split()) < 20:
        lines = lines[1:]
    words = tidy("\n".join(lines)).split()[:MOST]
    while words and not re.search(r"[.!?][\"'”’)\]]*$", words[-1]):
        words.pop()
    if (n := len(words)) < LEAST:
        raise ReplyError(f"level {asked[0]}: expected {LEAST} words or more in whole sentences, found {n}")
    if len({word.lower().strip(".,;:!?") for word in words}) < 0.4 * n:
        raise ReplyError(f"level {asked[0]}: the passage repeats itself")
    return {asked[0]: " ".join(words)}
