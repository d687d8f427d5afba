"""What the generator is asked, and how its reply is read.

For one query the model writes a passage at each level of relevance, 3 (best) to 0.  The prompt is
the kit's own.  `all-levels` asks for all four in one JSON reply, so that they contrast (for large
models); `by-level` asks for one a call and never for a bad answer, which small models cannot give
on purpose: a lower level is a good answer to another question, drawn with a seed.
"""

import ast
import json
import random
import re
from itertools import pairwise

PROMPT_VERSION = "sycl-v1"
LEVELS = (3, 2, 1, 0)
SYSTEM = {
    "all-levels": "You write short passages that read like excerpts of real web pages.",
    "by-level": "You write short excerpts of web pages. "
    "Reply with one plain paragraph of 40 to 80 words.",
}
ASK = {  # the levels asked for in one call, and how
    LEVELS: """\
Query: {query}

Write 4 passages for this query, one at each level of relevance:
3 perfectly relevant: the passage is about the query and holds its exact, complete answer
2 highly relevant: some of the answer, but imprecise, incomplete or buried among other things
1 related: on the topic of the query, but without an answer
0 irrelevant: another subject altogether, nothing to do with the need behind the query

Each passage is plain prose of 35 to 90 words, all about equally long, accurate, in the voice of a \
real page (encyclopedia, clinic, forum, shop, news, textbook), with varied openings. No lists, no \
markdown, no word about relevance or the query. Reply with one JSON object and nothing else:
{{"3": "...", "2": "...", "1": "...", "0": "..."}}""",
    (3,): "Write an excerpt of a web page that gives the exact and complete answer to: {query}",
    (2,): "Write an encyclopedia paragraph with general background about: {topic}",
    (1,): "Write an encyclopedia paragraph about {neighbour}",
    (0,): "Write an excerpt of a web page that answers: {unrelated}",
}
FACETS = """\
the history of {part}
common mistakes with {part}
people who work with {part}
learning about {part}
{part} in popular culture
famous examples of {part}
""".splitlines()
UNRELATED = """\
how to prune roses
what is a sonnet
how do sailing boats turn
rules of table tennis
what is a city council
how is paper recycled
how to train for a marathon
types of clouds
how do violins make sound
what do archivists do
how to fold a fitted sheet
why do leaves fall
""".splitlines()
# Words of an English query that do not say what it is about.
COMMON = """
    a about after age all an and any are as at average be become before best better between by
    calculate called can cause caused causes come cost day days definition describe did difference
    digits do does during each english ever everyday exactly example examples explain fast find
    first for formula from get good had happens has have hour hours how i in into is it its just
    keep kind kinds know known last long made make many mean meaning means meant minutes month
    months most much my name names need needed normal number of old on one or out over part parts
    per purpose range really safe should so stand stands symptoms take takes than that the their
    them there they this through time to treat type types under use used uses using versus vs was
    way week weeks were what when where which who why will with without word words work works year
    years you your
""".strip().split()

LONGEST_REPLY = 20_000  # characters, without reasoning
LEAST, MOST = 15, 90  # words, where one passage is asked for
# The patterns are verbose: [ ] is a space.  How a reply may name a level: group n + 1 is level n.
LEVEL = r"""(?ix:
    (?: (?:relevance[ ])? (?:level|grade|score|passage|rating) [ _:#-]* )?
    (?: (0|zero|irrelevant)
      | (1|one|(?:partially[ _-])?related)
      | (2|two|highly[ _-]relevant)
      | (3|three|perfectly[ _-]relevant)
    ) (?![^\W_])
)"""
LABEL = rf"""(?imx:
    ^[ ]? (?:[-*+•][ ] | \d+[.)][ ])? [#>*_(\[ ]*  # "- **Level 3", "## Grade three", "[3"
    {LEVEL}
    (?: [ :().–—-]* (?:(?:perfectly|highly)[ -]relevant|(?:partially[ ])?related|irrelevant)\b )?
    (?: [ *_:：.)\]=–—-]* [*:：.)\]=–—-] (?!\w) | [ *_]*： | [ ]*$ )  # before the passage
)"""
# Marks around reasoning, as <think>, [THINK], ◁think▷, <|START_THINKING|>, <|channel|>analysis.
THOUGHT = r"""(?x:
    (?:think|thinking|thoughts?|reason|reasoning|reflection|analysis|scratchpad)
    (?:_\w{1,20})?
)"""
REASONING_BEGINS = rf"""(?ix:
    <\|? (?:[\w:]{{0,20}}[_:])? {THOUGHT} (?:[ ][^<>]{{0,80}})? \|?>
    | [\[◁] THINK(?:ING)? [\]▷]
    | <\|channel\|?> (?!final)
    | \Aanalysis(?=[a-z])
)"""
REASONING_ENDS = rf"""(?ix:
    <\|? (?:/|end_) (?:[\w:]{{0,20}}[_:])? {THOUGHT} [ ]?\|?>
    | [\[◁]/ {THOUGHT} [\]▷]
    | <\|channel\|>final(?:<\|message\|>)?
    | <channel\|>
    | \Aanalysis(?s:.)*assistantfinal
)"""
MARKUP = r"""(?x:
    `{3,}[ \t]*[a-zA-Z]* | ~{3,}  # fences
    | (?m:^[ \t]*[-*_=]{3,}[ \t]*$)  # a line between paragraphs
    | (?i:</?(?:answer|response|output|final|solution)>)
    | <\|\w+\|>  # a model's own tokens
    | (?is:\n\s*\n [*_(\[]* (?:  # remarks behind a blank line
        note: [^.]{0,60} \b(?:passage|paragraph|excerpt|text|response|example|fiction)
        | let[ ]me[ ]know
        | feel[ ]free
        | i[ ]hope[ ]th
      ) .*\Z)
)"""
UNPRINTABLE = r"""(?x:
    [\x00-\x1f\x7f-\x9f\ud800-\udfff]  # control characters, half pairs
    | (?<![a-zA-Z0-9])\*\* | \*\*(?!\d) | __  # bold; 2**10 is none
)"""
QUOTED = r"(?s)\A(?:\"([^\"]*)\"|'([^']*)'|“([^“]*)”|\*([^*]*)\*)\Z"
# A first line of at most 19 words that ends with a colon: "Here is a paragraph:".
ANNOUNCED = r"\A(?:\S+[^\S\n]+){0,18}\S*[:：][ *]*\n"
# Scripts without spaces between words (Chinese, Japanese, Thai, ...): there a letter is counted.
UNSPACED = "\u0e00-\u109f\u1780-\u17ff\u3041-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
WORD = rf"[{UNSPACED}][^\w\s]*\s*|[^\s{UNSPACED}]+\s*"
SENTENCE_END = "[.!?。．｡！？।॥؟۔።။།][\"'”’)\\]」』）》】»]*\\s*$|[\u0e00-\u0eff]\\s$"


class ReplyError(ValueError):
    """A reply that does not hold what was asked; the message is the reason."""


def topic(query: str) -> str:
    """The query's content words in their order; the query itself if there are none."""
    words = re.findall(r"[^\W_](?:[\w'./&+-]*\w)?", query)
    content = [word for word in words if word.lower() not in COMMON]
    return " ".join(content) or query.strip()


def draw(query: str, pool: list, seed: int) -> dict:
    """{"neighbour": a side of half of its words, "unrelated": a query without a common word}.

    The unrelated query is one of `pool` if 40 draws find one, else one of UNRELATED.
    """
    rng = random.Random(f"{seed}|{query}")
    words = topic(query).split()
    keep = max(1, len(words) // 2)
    start = rng.randrange(len(words) - keep + 1)
    part = " ".join(words[start : start + keep])
    neighbour = rng.choice(FACETS).format(part=part)

    own = {word.lower() for word in words}
    others = [rng.choice(pool) for _ in range(40)]
    others = [text for text in others if own.isdisjoint(topic(text).lower().split())]
    free = [text for text in UNRELATED if own.isdisjoint(text.split())]
    others = others or [rng.choice(free or UNRELATED)]
    return {"neighbour": neighbour, "unrelated": others[0]}


def calls(plan: str) -> list:
    """The levels asked for in each call: all at once for `all-levels`, one a call for `by-level`.

    Raises ValueError for another plan.
    """
    if plan not in SYSTEM:
        raise ValueError(f"plan: expected all-levels or by-level, found {plan!r}")
    if plan == "all-levels":
        return [LEVELS]
    return [(level,) for level in LEVELS]


def messages(plan: str, asked: tuple, query: str, drawn: dict) -> list:
    """The chat [{"role", "content"}, ...] for one of `calls(plan)`; `drawn` comes from `draw`."""
    user = ASK[asked].format(query=query, topic=topic(query), **drawn)
    return [{"role": "system", "content": SYSTEM[plan]}, {"role": "user", "content": user}]


def answer(text: str) -> str:
    """What follows the reasoning in a reply.  Raises ReplyError if the reasoning has no end."""
    rest = re.split(REASONING_ENDS, text)[-1]
    if re.search(REASONING_BEGINS, rest):
        raise ReplyError("the reasoning has no end, so there is no answer")
    return rest


def tidy(text: str) -> str:
    """One line of plain text: no markup, outer quotes, control characters or lone surrogates."""
    text = re.sub(f"{MARKUP}|{UNPRINTABLE}", " ", text).strip()
    text = re.sub(QUOTED, r"\1\2\3\4", text).strip(" `")
    return " ".join(text.split())


def from_braces(text: str) -> list:
    """(level, value) of each key that names a level, in the outermost object.

    It is JSON, or in Python's spelling: single quotes, bare numbers as keys, a last comma.
    """
    found = []

    def note(pairs: list) -> object:  # called for each object, inner ones first
        for name, value in pairs:
            key = re.match(LEVEL, name)
            if key:
                found.append((key.lastindex - 1, value))
        return dict(pairs).get("text")  # {"3": {"text": "..."}}

    text = text[text.find("{") : text.rfind("}") + 1]
    for from_python in (False, True):
        try:
            if from_python:
                text = json.dumps(ast.literal_eval(text))
            json.loads(text, object_pairs_hook=note, strict=False)
            break
        except Exception:  # what others write fails in more ways than the two readers name
            found.clear()
    return found


def from_labels(text: str) -> list:
    """(level, text up to the next label) of lines such as "Level 3: ..." or "Irrelevant: ..."."""
    found = []
    for mark in reversed(list(re.finditer(LABEL, text))):
        found.append((mark.lastindex - 1, text[mark.end() :]))
        text = text[: mark.start()]
    return found


def parse_reply(text: str, levels: tuple = LEVELS) -> dict[int, str]:
    """{level: passage} for all asked levels, in their order.

    Read are JSON, the same in Python's spelling, and labelled lines ("Level 3: ...", "**3** ...",
    "Perfectly relevant: ..."), with reasoning before and prose or fences around.  Raises
    ReplyError with the reason: reasoning without end, nothing found, a level that is missing,
    is no text with a word, or stands there twice.
    """
    text = answer(text)
    if len(text) > LONGEST_REPLY:
        raise ReplyError(f"expected at most {LONGEST_REPLY} characters")
    text = re.sub(r"[ \t\r\0]+", " ", text)
    passages = {}
    for level, value in from_braces(text) or from_labels(text):
        if level not in levels:
            continue
        passage = tidy(value) if isinstance(value, str) else ""
        if not re.search(r"\w", passage):
            raise ReplyError(f"level {level}: expected a text with words, found {value!r:.40}")
        if passages.setdefault(level, passage) != passage:
            raise ReplyError(f"level {level}: stands there twice with different text")
    missing = [level for level in levels if level not in passages]
    if missing:
        raise ReplyError(f"found no level {missing}, or the reply is cut off")
    return {level: passages[level] for level in levels}


def read_reply(plan: str, asked: tuple, text: str) -> dict:
    """{level: passage} from a reply; a single passage is cut to whole sentences.

    Raises ReplyError with the reason, as `parse_reply` does.
    """
    if plan == "all-levels":
        return parse_reply(text, asked)
    level = asked[0]
    text = re.sub(MARKUP, " ", answer(text)[:LONGEST_REPLY]).strip()
    text = tidy(re.sub(ANNOUNCED, "", text))
    words = re.findall(WORD, text)[:MOST]
    while words and not re.search(SENTENCE_END, words[-1]):
        words.pop()
    count = len(words)
    if count < LEAST:
        raise ReplyError(f"level {level}: expected {LEAST} words in whole sentences, found {count}")
    passage = "".join(words).strip()
    terms = [word.lower().strip(" .,;:!?") for word in words]
    if len(passage.split()) < count / 2:
        terms = list(pairwise(terms))  # mostly letters: of those, pairs say what is repeated
    if len(set(terms)) < 0.4 * count:
        raise ReplyError(f"level {level}: the passage repeats itself")
    return {level: passage}
