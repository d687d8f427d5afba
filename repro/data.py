"""Collections and graded lists in, batches out.

A row that cannot be used is a ValueError that names file, line and field.  What stands there twice,
or refers to something that is missing, is counted on stderr and named.
"""

import gzip
import hashlib
import json
import random
import re
import sys
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from repro.support.models import hub_folder

AUTHORED = Path(__file__).parents[1] / "cached_prompts" / "authored.jsonl"  # lists that ship
SAMPLE = Path(__file__).parent / "sample"  # the collection that ships
HUB_ID = re.compile(r"([\w-]+/[\w.-]+)(?:@([\w.-]+))?/((?:[\w.-]+/)*)")  # owner/name@revision/in/


@dataclass(frozen=True)
class GradedList:
    """One query, its passages, and one grade a passage (0: irrelevant; higher: more relevant)."""

    id: str
    query: str
    passages: list[str]
    grades: list[int]


Place = str | Path
Lists = list[GradedList]
Texts = dict[str, str]  # {id: text}
Qrels = dict[str, dict[str, int]]  # {query id: {passage id: grade}}
Pairs = list[tuple[int, str]]  # (grade, passage)
Found = dict[str, tuple[str, Pairs]]  # {id: (query, pairs)}
Collection = tuple[Texts, Texts, Qrels]  # corpus, queries, qrels


def read_lines(path: Place) -> Iterator[tuple[str, str]]:
    """Yield ("path:number", line) of a UTF-8 text file, plain or .gz, without blank lines.

    Raises ValueError if the file is missing, unreadable, damaged or not UTF-8.
    """
    number = 0
    opener = gzip.open if str(path).endswith(".gz") else open
    try:
        with opener(path, "rb") as file:
            for number, raw in enumerate(file, start=1):
                line = raw.decode("utf-8-sig").rstrip("\r\n")  # Windows starts files with a mark
                if line.strip():
                    yield f"{path}:{number}", line
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise ValueError(f"{path}:{number}: cannot be read as UTF-8 text: {error}") from error


def read_jsonl(path: Place) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield ("path:number", object) of a JSON-lines file, plain or .gz.

    Raises ValueError for a line that is not one object, and where `read_lines` does.
    """
    for where, line in read_lines(path):
        try:
            row = json.loads(line)
            json.dumps(row, ensure_ascii=False).encode()  # half a surrogate pair is no text
            if not isinstance(row, dict):
                raise ValueError(f"found {line:.60}")
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{where}: expected one JSON object, but {error}") from error
        yield where, row


def text_field(row: dict[str, Any], field: str, where: str, *, empty: bool = False) -> str:
    """The text in `row[field]` without outer space; a whole number (an id) becomes text.

    Raises ValueError naming `where` and the field; with `empty`, blank text and null are "".
    """
    value = row.get(field)
    if type(value) is int:
        value = str(value)
    if empty and field in row and value is None:
        value = ""
    if not isinstance(value, str) or not (empty or value.strip()):
        raise ValueError(f"{where}: field {field!r}: expected text, found {value!r:.60}")
    return value.strip()


def as_grade(value: Any, where: str) -> int:
    """A whole grade of at most nine digits, from 3, 3.0 or "3".  Else a ValueError with `where`."""
    digits = re.fullmatch(r" *([0-9]{1,9})(\.0)? *", str(value))
    if not digits:
        raise ValueError(f"{where}: expected a whole grade of 0 or more, found {value!r:.60}")
    return int(digits[1])


def report_unusable(place: Place, items: list[str], of: int, why: str) -> None:
    """Say on stderr how many of a place's `of` items cannot be used, and name the first three.

    Raises ValueError if none is left.
    """
    sentence = f"{len(items)} of {of} {why}: {', '.join(items[:3])!r:.200}"
    if len(items) == of:
        raise ValueError(f"{place}: found nothing to use: {sentence}")
    if items:
        print(f"{place}: {sentence}", file=sys.stderr)


def find_file(place: str, file: str) -> Path:
    """The path of `file`, or of it with .gz, in a folder, in "sample", or fetched from the hub.

    A folder that is not here is a dataset's id on the hub (`mteb/scifact`), maybe with a revision
    (`mteb/scifact@main`) and a folder in it (`BatsResearch/sycl/llama33_70b`).
    Raises ValueError if the file is nowhere.
    """
    folder = SAMPLE if place == "sample" else Path(place).expanduser()
    hub = HUB_ID.fullmatch(f"{place}/")
    if hub and not folder.is_dir():
        repo_id, revision, inner = hub.groups()
        folder = hub_folder(repo_id, "dataset", (f"{inner}{file}*",), revision) / inner
    for path in (folder / file, folder / f"{file}.gz"):
        if path.is_file():
            return path
    raise ValueError(f"{place}: expected a folder with {file} (or .gz), a hub id, or 'sample'")


def _texts(place: Place, part: str) -> Texts:
    """{id: text} of corpus.jsonl (`_id`, `text`, maybe `title`) or queries.jsonl."""
    path = find_file(str(place), f"{part}.jsonl")
    texts = {}
    repeated = []
    for where, row in read_jsonl(path):
        key = text_field(row, "_id", where)
        text = text_field(row, "text", where, empty=True)
        if part == "corpus" and row.get("title"):
            text = f"{text_field(row, 'title', where, empty=True)} {text}".strip()
        if key in texts:
            repeated.append(where)
        texts.setdefault(key, text)
    rows = len(texts) + len(repeated)
    report_unusable(path, repeated, rows, "rows have the id of an earlier one, left out")
    return texts


def _qrels(path: Path) -> Qrels:
    """{query id: {passage id: grade}} of a table with tabs; a header may be absent.

    Without a score column (NanoBEIR's) every grade is 1.  A grade below 0, with which some TREC
    tracks mark spam, counts as 0, as in trec_eval.
    """
    qrels = {}
    width = 0
    for where, line in read_lines(path):
        fields = re.split(r"\s*\t\s*", line.strip())
        width = width or len(fields)
        if width not in (2, 3) or len(fields) != width:
            found = f"found {line!r:.80}; a score stands in all lines or in none"
            raise ValueError(f"{where}: expected query-id, corpus-id, score and tabs, {found}")
        if line.startswith("query-id\tcorpus-id"):
            continue
        query, passage, score = [*fields, "1"][:3]
        grade = as_grade(re.sub("^-[0-9]+$", "0", score), f"{where}: field 'score'")
        earlier = qrels.setdefault(query, {}).setdefault(passage, grade)
        if earlier != grade:
            raise ValueError(f"{where}: field 'score': this pair has grade {earlier} already")
    return qrels


def load_beir(
    path_or_hub_id: Place, split: str = "test", queries_from: Place | None = None
) -> Collection:
    """(corpus {id: title and text}, queries {id: text}, qrels {query id: {passage id: grade}}).

    Of a folder in BEIR's layout (corpus.jsonl, queries.jsonl, qrels/SPLIT.tsv; also .gz), of
    "sample", or of the hub, see `find_file`; the queries may come from another place.  Only judged
    queries with a text are returned.  A judged passage that is not in the corpus stays in qrels:
    no search finds it, and recall and nDCG count it as missed, as trec_eval and BEIR do.
    Raises ValueError for a bad row, and if no judged query or no judged passage has a text.
    """
    place = str(path_or_hub_id)
    texts = _texts(queries_from or place, "queries")
    qrels = _qrels(find_file(place, f"qrels/{split}.tsv"))
    unasked = [query for query in qrels if not texts.get(query)]
    report_unusable(place, unasked, len(qrels), "judged queries have no text, left out")
    for query in unasked:
        del qrels[query]
    corpus = _texts(place, "corpus")
    judged = set().union(*qrels.values())
    missing = sorted(judged.difference(corpus))
    why = "judged passages are not in the corpus, never found"
    report_unusable(place, missing, len(judged), why)
    return corpus, {query: texts[query] for query in qrels}, qrels


def _graded(passages: Any, where: str) -> Pairs:
    """(grade, passage) pairs of {"3": text, "0": [text, text], ...}."""
    pairs = []
    if isinstance(passages, dict):
        for name, value in passages.items():
            grade = as_grade(name, where)
            texts = value if isinstance(value, list) and value else [value]
            pairs += [(grade, text_field({name: text}, name, where)) for text in texts]
    if len({grade for grade, _ in pairs}) < 2:
        raise ValueError(f"{where}: expected 2 or more grades, found {passages!r:.60}")
    return pairs


def _from_file(path: Path, texts: Texts) -> Found:
    lists = {}
    queries = {}
    unusable = []
    for where, row in read_jsonl(path):
        row.setdefault("id", f"{path.stem}-{where.rpartition(':')[2]}")
        key = text_field(row, "id", where)
        row.setdefault("query", texts.get(key))
        if row["query"] is None:
            raise ValueError(f"{where}: field 'query': bring the collection of {key!r} (--queries)")
        query = text_field(row, "query", where)
        plain = " ".join(query.casefold().split())
        sha256 = hashlib.sha256(plain.encode()).hexdigest()
        if row.get("query_sha256", sha256) != sha256:
            raise ValueError(
                f"{where}: field 'query_sha256': {key!r} is another query in the collection"
            )
        if queries.setdefault(key, query) != query:
            unusable.append(where)
        elif row.get("passages", "") is not None:
            lists[key] = query, _graded(row.get("passages"), f"{where}: field 'passages'")
    unusable += [key for key in queries if key not in lists]
    why = "queries have no passages, or the id of another query, left out"
    report_unusable(path, unusable, len(lists) + len(unusable), why)
    return lists


def _from_collection(place: str, queries_from: Place | None, split: str) -> Found:
    corpus, queries, qrels = load_beir(place, split, queries_from)
    lists = {}
    for key, query in queries.items():
        judged = qrels[key].items()
        pairs = [(grade, corpus[passage]) for passage, grade in judged if passage in corpus]
        if any(grade for grade, _ in pairs):
            lists[key] = query, pairs
    unusable = [key for key in queries if key not in lists]
    report_unusable(place, unusable, len(queries), "queries have no relevant passage, left out")
    return lists


def load_lists(
    paths: Iterable[Place] | Place, queries_from: Place | None = None, split: str = "train"
) -> Lists:
    """The graded lists of files and collections, passages best first.

    A file (.jsonl, .jsonl.gz) has lines {"query": text, "passages": {"3": text, "0": [text, ...]}},
    maybe with an `id`.  For one id and query the last line with passages counts; a line with the
    id of another query, or a query whose passages are null, is left out and counted on stderr.  A
    collection (see `load_beir`) gives each query's judged passages that are in its corpus.
    With `queries_from` (`mteb/msmarco` for the released lists) a collection's queries, and those
    that a file names by `id` alone, come from there, checked by `query_sha256` where a line has it.
    A place named twice is read once; an id that an earlier place used gets its place's name in
    front.  Raises ValueError for a bad row, and for a place without lists.
    """
    if isinstance(paths, str | Path):
        paths = [paths]
    lists = {}
    for place in dict.fromkeys(map(str, paths)):
        path = Path(place).expanduser()
        if path.is_file() or path.suffix in (".jsonl", ".gz"):
            texts = _texts(queries_from, "queries") if queries_from else {}
            found = _from_file(path, texts)
        else:
            found = _from_collection(place, queries_from, split)
        for key, (query, pairs) in found.items():
            while key in lists:
                key = f"{path.name}:{key}"
            pairs.sort(key=lambda pair: -pair[0])  # passages of one grade keep their order
            passages = [passage for _, passage in pairs]
            grades = [grade for grade, _ in pairs]
            lists[key] = GradedList(key, query, passages, grades)
    return list(lists.values())


def split_lists(lists: Lists, share: float, seed: int) -> tuple[Lists, Lists]:
    """(rest, held out): a seeded `share` (0 to 1) of the lists is set aside to choose settings."""
    order = random.Random(seed).sample(range(len(lists)), len(lists))
    count = round(share * len(lists))
    held = [lists[j] for j in sorted(order[:count])]
    rest = [lists[j] for j in sorted(order[count:])]
    return rest, held


def as_collection(lists: Lists) -> Collection:
    """(corpus, queries, qrels): passage j of list i is `<id of i>-<j>`.

    Raises ValueError for an id used twice.
    """
    corpus, queries, qrels = {}, {}, {}
    for item in lists:
        if item.id in queries:
            raise ValueError(f"as_collection: two lists have the id {item.id!r}")
        queries[item.id] = item.query
        qrels[item.id] = {}
        for j, grade in enumerate(item.grades):
            corpus[f"{item.id}-{j}"] = item.passages[j]
            qrels[item.id][f"{item.id}-{j}"] = grade
    return corpus, queries, qrels


@dataclass(frozen=True)
class Batch:
    """B lists, query-major: passages i*k ... i*k + k-1 are query i's; short lists end in ""."""

    queries: list[str]  # B
    passages: list[str]  # B * k
    labels: torch.Tensor  # (B, k) float32 grades
    mask: torch.Tensor  # (B, k) bool, False: padding


def collate(lists: Lists) -> Batch:
    """Stack lists into one batch; k is the longest list's length.  ValueError if there is none."""
    if not lists:
        raise ValueError("collate: expected at least one list, got none")
    rows = [torch.tensor(item.grades) for item in lists]
    grades = pad_sequence(rows, batch_first=True, padding_value=-1)
    k = grades.shape[1]
    passages = []
    for item in lists:
        passages += item.passages + [""] * (k - len(item.passages))
    queries = [item.query for item in lists]
    return Batch(queries, passages, grades.clamp(min=0).float(), grades >= 0)
