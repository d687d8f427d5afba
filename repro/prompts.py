"""What the generator is asked, and how its reply is read.

For one query the model writes one passage at each level of relevance.  The paper does not release
its prompt, so this one is the kit's own.  Three plans: `all-levels` asks for all passages in one
JSON reply, so that they contrast (for large models); `by-level` asks for one passage a call and
never for a bad answer, which small models cannot give on purpose (a lower level is a good answer
to another question, drawn with a seed and recorded); `from-answer` is `by-level`, except that the
second best passage is retold from the best one.  The text of each plan is versioned and hashed,
and both go into every record.
"""

import hashlib
import json
import random
import re
from collections.abc import Mapping, Sequence

from repro.replies import ReplyError, parse_reply, read_passage

__all__ = [
    "PLANS",
    "PROMPT_VERSION",
    "ReplyError",
    "calls",
    "draw",
    "grades",
    "messages",
    "parse_reply",
    "prompt_sha256",
    "read_reply",
    "topic",
]

PROMPT_VERSION = "sycl-v1"
PLANS = ("all-levels", "by-level", "from-answer")

KINDS = {  # number of levels -> what each level means, best first; the grades are n-1 ... 0
    2: ("exact", "other"),
    3: ("exact", "related", "other"),
    4: ("exact", "partial", "related", "other"),
    5: ("exact", "partial", "hint", "related", "other"),
}
MEANING = {
    "exact": "perfectly relevant: the passage is about the query and holds its exact, complete answer",
    "partial": "highly relevant: some of the answer, but imprecise, incomplete or buried among other things",
    "hint": "slightly relevant: mostly about something else, with one remark that touches the answer",
    "related": "related: on the topic of the query, but without an answer",
    "other": "irrelevant: another subject altogether, nothing to do with the need behind the query",
}
ALL_SYSTEM = "You write short passages that read like excerpts of real web pages."
ALL_ASK = (
    "Query: {query}\n\nWrite {count} passages for this query, one at each level of "
    "relevance:\n{definitions}\n\nEach passage is plain prose of 35 to 90 words, all about equally long, "
    "accurate, in the voice of a real page (encyclopedia, clinic, forum, shop, news, textbook), with varied "
    "openings. No lists, no markdown, no word about relevance or the query. Reply with one JSON object and "
    "nothing else:\n{shape}"
)
ONE_SYSTEM = "You write short excerpts of web pages. Reply with one plain paragraph of 40 to 80 words."
ONE_ASK = {
    "exact": "Write an excerpt of a web page that gives the exact and complete answer to: {query}",
    "partial": "Write an encyclopedia paragraph with general background about: {topic}",
    "hint": "Write an encyclopedia paragraph about {neighbour} that mentions {topic} in passing.",
    "related": "Write an encyclopedia paragraph about {neighbour}",
    "other": "Write an excerpt of a web page that answers: {unrelated}",
}
RETELL_ASK = (
    "Here is a text:\n{answer}\n\nTell a friend in one paragraph roughly what it is about. "
    "Leave out figures and details."
)
FACETS = (
    "the history of {part}",
    "common mistakes with {part}",
    "people who work with {part}",
    "learning about {part}",
    "{part} in popular culture",
    "famous examples of {part}",
)
UNRELATED = (
    "how to prune roses",
    "what is a sonnet",
    "how do sailing boats turn",
    "rules of table tennis",
    "what is a city council",
    "how is paper recycled",
    "how to train for a marathon",
    "types of clouds",
    "how do violins make sound",
    "what do archivists do",
    "how to fold a fitted sheet",
    "why do leaves fall",
)
EXAMPLE_DRAWN = {"neighbour": "the history of paint", "unrelated": "how often should a fern be watered"}
EXAMPLE = {
    "query": "how long does exterior paint take to dry",
    "exact": "Most exterior latex paint is dry to the touch in one to two hours and ready for a second coat "
    "after four to six. Oil-based paint needs six to eight hours before it can be touched and a full day "
    "before recoating. Cool or damp weather can double these times, and the film goes on hardening for "
    "about thirty days.",
    "partial": "Exterior paint has to cope with sun, rain and frost, so it is made with more flexible "
    "binders than paint for indoor walls. Water-based kinds dry faster than oil-based ones, and warm, "
    "moving air helps. Painters usually wait for a dry spell, so that each coat of paint can set before the "
    "next one goes on.",
    "hint": "Paint is one of the oldest materials that people have made. Early painters ground coloured "
    "earth into fat or egg, and later ones used linseed oil, which dried slowly. Factory paint in tins came "
    "in the nineteenth century and made it possible for owners to look after the outside of a house by "
    "themselves.",
    "related": "Paint is one of the oldest materials that people have made. Cave artists ground ochre and "
    "charcoal into animal fat, the Egyptians mixed pigment with gum, and medieval workshops bound it with "
    "egg. Ready-mixed paint in resealable tins was sold from the second half of the nineteenth century and "
    "changed the decorating trade.",
    "other": "Ferns like their soil evenly moist but never soaked. Push a finger into the pot every two or "
    "three days, and water when the surface begins to feel dry. In a heated room a fern may also want a "
    "daily mist, or a tray of wet pebbles under the pot. Brown, crisp tips are a sign that the air is too "
    "dry.",
}
COMMON = frozenset(
    "a about after age all an and any are as at average be become before best better between by calculate "
    "called can cause caused causes come cost day days definition describe did difference digits do does "
    "during each english ever everyday exactly example examples explain fast find first for formula from "
    "get good had happens has have hour hours how i in into is it its just keep kind kinds know known last "
    "long made make many mean meaning means meant minutes month months most much my name names need needed "
    "normal number of old on one or out over part parts per purpose range really safe should so stand "
    "stands symptoms take takes than that the their them there they this through time to treat type types "
    "under use used uses using versus vs was way week weeks were what when where which who why will with "
    "without word words work works year years you your".split()
)


def grades(count: int) -> tuple[int, ...]:
    """Grades for `count` levels, best first: 4 -> (3, 2, 1, 0).  ValueError unless 2 <= count <= 5."""
    if count not in KINDS:
        raise ValueError(f"levels: expected 2, 3, 4 or 5, got {count!r}")
    return tuple(range(count - 1, -1, -1))


def kind_of(level: int, count: int) -> str:
    """What a grade means among `count` levels: `kind_of(2, 4)` is "partial"."""
    return KINDS[count][count - 1 - level]


def prompt_sha256(plan: str, count: int = 4, example: bool = False) -> str:
    """Hex sha256 of everything that this plan's prompt is made from (not of the query)."""
    if plan not in PLANS:
        raise ValueError(f"plan: expected one of {', '.join(PLANS)}, got {plan!r}")
    parts: list[object] = [PROMPT_VERSION, plan, [f"{kind}: {MEANING[kind]}" for kind in KINDS[count]]]
    if plan == "all-levels":
        parts += [ALL_SYSTEM, ALL_ASK]
    else:
        parts += [ONE_SYSTEM, ONE_ASK, FACETS, UNRELATED, sorted(COMMON)]
        parts += [RETELL_ASK] if plan == "from-answer" else []
    if example:
        parts += [EXAMPLE, EXAMPLE_DRAWN]
    return hashlib.sha256(json.dumps(parts, ensure_ascii=False, sort_keys=True).encode()).hexdigest()


def topic(query: str) -> str:
    """The query's content words in their order; the query itself if there are none."""
    words = [word for word in re.findall(r"[^\W_](?:[\w'./&+-]*\w)?", query) if word.lower() not in COMMON]
    return " ".join(words) or query.strip()


def draw(query: str, pool: Sequence[str], seed: int) -> dict[str, str]:
    """What the lower levels are about: {"neighbour": another side of the topic, "unrelated": another query}.

    Depends on the seed, the query and the pool (all queries of the file, in file order) alone.  The
    neighbour names about half of the query's content words; the unrelated query shares none of them.
    """
    rng = random.Random(f"{seed}|{query}")
    words = topic(query).split()
    keep = max(1, len(words) // 2)
    start = rng.randrange(len(words) - keep + 1)
    neighbour = rng.choice(FACETS).format(part=" ".join(words[start : start + keep]))
    own = {word.lower() for word in words}
    for _ in range(40 if len(pool) > 1 else 0):
        other = rng.choice(pool)
        if own.isdisjoint(word.lower() for word in topic(other).split()):
            return {"neighbour": neighbour, "unrelated": other}
    free = [text for text in UNRELATED if own.isdisjoint(text.split())]
    return {"neighbour": neighbour, "unrelated": rng.choice(free or UNRELATED)}


def calls(plan: str, count: int = 4) -> list[tuple[int, ...]]:
    """The levels asked for in each call: one call for `all-levels`, else one call a level, best first."""
    levels = grades(count)
    return [levels] if plan == "all-levels" else [(level,) for level in levels]


def messages(
    plan: str,
    asked: tuple[int, ...],
    query: str,
    drawn: Mapping[str, str],
    done: Mapping[int, str],
    count: int = 4,
    example: bool = False,
) -> list[dict[str, str]]:
    """The chat for one call of a plan, as [{"role", "content"}, ...].

    `asked` is an item of `calls(plan, count)`, `drawn` comes from `draw`, `done` holds the passages
    of the calls before.  With `example` one finished exchange about another query stands in front.
    """

    def ask(query: str, drawn: Mapping[str, str], done: Mapping[int, str]) -> str:
        if plan == "all-levels":
            definitions = "\n".join(f"{level} {MEANING[kind_of(level, count)]}" for level in asked)
            shape = json.dumps({str(level): "..." for level in asked})
            return ALL_ASK.format(query=query, count=count, definitions=definitions, shape=shape)
        kind = kind_of(asked[0], count)
        if plan == "from-answer" and kind == "partial":
            return RETELL_ASK.format(answer=done.get(count - 1, ""))
        return ONE_ASK[kind].format(query=query, topic=topic(query), **drawn)

    chat = [{"role": "system", "content": ALL_SYSTEM if plan == "all-levels" else ONE_SYSTEM}]
    if example:
        model_reply = EXAMPLE[kind_of(asked[0], count)]
        if plan == "all-levels":
            model_reply = json.dumps({str(level): EXAMPLE[kind_of(level, count)] for level in asked})
        user = ask(EXAMPLE["query"], EXAMPLE_DRAWN, {count - 1: EXAMPLE["exact"]})
        chat += [{"role": "user", "content": user}, {"role": "assistant", "content": model_reply}]
    return [*chat, {"role": "user", "content": ask(query, drawn, done)}]


def read_reply(plan: str, asked: tuple[int, ...], text: str) -> dict[int, str]:
    """{level: passage} from the reply to one call.  Raises ReplyError with the reason."""
    if plan == "all-levels":
        return parse_reply(text, asked)
    try:
        return {asked[0]: read_passage(text)}
    except ReplyError as error:
        raise ReplyError(f"level {asked[0]}: {error}") from error
