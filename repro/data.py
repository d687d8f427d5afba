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

import torch

from repro.support.files import Place, naming
from repro.support.models import hub_folder

AUTHORED = Path(__file__).parents[1] / "cached_prompts/authored.jsonl"  # lists that ship
SAMPLE = Path(__file__).parent / "sample"  # the collection that ships


@dataclass(frozen=True)
class GradedList:
    """One query, its passages, and one grade a passage (0: irrelevant; higher: more relevant)."""

    id: str
    query: str
    passages: list[str]
    grades: list[int]


Lists = list[GradedList]
Texts = dict  # {id: text}
Qrels = dict  # {query id: {passage id: grade}}
Collection = tuple  # corpus, queries, qrels


def read_lines(path: Place) -> Iterator:
    """Yield ("path:number", line) of a UTF-8 text file, plain or .gz.

    Lines come without outer spaces, and blank ones not at all.
    Raises ValueError if the file is missing, unreadable, damaged or not UTF-8.
    """
    opener = gzip.open if str(path).endswith(".gz") else open
    with (
        naming(f"{path}: cannot be read", OSError, EOFError, zlib.error),
        opener(path, "rb") as file,
    ):
        for number, raw in enumerate(file, 1):
            where = f"{path}:{number}"
            with naming(f"{where}: expected UTF-8 text", UnicodeDecodeError):
                line = raw.decode("utf-8-sig").strip(" \r\n")  # Windows starts files with a mark
            if line.strip():
                yield where, line


def read_jsonl(path: Place) -> Iterator:
    """Yield ("path:number", object) of a JSON-lines file, plain or .gz.

    Raises ValueError for a line that is not one object, and where `read_lines` does.
    """
    for where, line in read_lines(path):
        with naming(f"{where}: expected one JSON object"):
            row = json.loads(line) | {}  # lists, texts and numbers have no such "or"
            json.dumps(row, ensure_ascii=False).encode()  # half a surrogate pair is no text
        yield where, row


def text_field(row: dict, field: str, where: str, empty: bool = False) -> str:
    """The text in `row[field]` without outer space; a whole number (an id) becomes text.

    Raises ValueError naming `where` and the field; blank text is one only with `empty`.
    """
    value = row.get(field)
    text = str(value).strip()
    if type(value) not in (int, str) or not (text or empty):
        raise ValueError(f"{where}: field {field!r}: expected text, found {value!r:.60}")
    return text


def plain_query(query: str) -> str:
    """A query less case and superfluous spaces, by which two of them are the same."""
    return " ".join(query.casefold().split())


def as_grade(value: str, where: str) -> int:
    """A whole grade, from "3" or "3.0".  One below 0, which marks spam in TREC, counts as 0.

    Raises ValueError with `where` for anything else.
    """
    with naming(f"{where}: expected a whole grade", ValueError):
        return max(0, int(value.removesuffix(".0")))


def report_unusable(place: Place, items: list, of: int, why: str) -> None:
    """Say on stderr how many of a place's `of` items cannot be used, and name the first three.

    Raises ValueError if none is left.
    """
    sentence = f"{len(items)} of {of} {why}: {', '.join(items[:3])!r:.200}"
    if len(items) == of:
        raise ValueError(f"{place}: found nothing to use: {sentence}")
    if items:
        print(f"{place}: {sentence}", file=sys.stderr)


def find_file(place: Place, file: str) -> Path:
    """The path of `file`, or of it with .gz, in a folder, in "sample", or fetched from the hub.

    A folder that is not here is a dataset's id on the hub (`mteb/scifact`), maybe with a revision
    (`mteb/scifact@main`) and a folder in it (`BatsResearch/sycl/llama33_70b`).
    Raises ValueError if the file is nowhere.
    """
    folder = SAMPLE if str(place) == "sample" else Path(place).expanduser()
    # owner/name@revision/folder/
    hub = re.fullmatch(r"([\w-]+/[\w.-]+)(?:@([\w.-]+))?/((?:[\w.-]+/)*)", f"{place}/")
    if hub and not folder.is_dir():
        repo_id, revision, inner = hub.groups()
        folder = hub_folder(repo_id, "dataset", (f"{inner}{file}*",), revision) / inner
    for path in (folder / file, folder / f"{file}.gz"):
        if path.is_file():
            return path
    raise ValueError(
        f"{Path(place, file)}: not found, nor .gz; expected a folder with it, a hub id, or 'sample'"
    )


def _texts(place: Place, part: str) -> Texts:
    """{id: text} of corpus.jsonl (`_id`, `text`, maybe `title`) or queries.jsonl."""
    path = find_file(place, f"{part}.jsonl")
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
    report_unusable(path, repeated, len(texts) + len(repeated), "rows repeat an id, left out")
    return texts


def _qrels(path: Path) -> Qrels:
    """{query id: {passage id: grade}} of a table with tabs; a header may be absent.

    Without a score column (NanoBEIR's) every grade is 1.
    """
    qrels = {}
    for where, line in read_lines(path):
        fields = re.split(" *\t *", f"{line}\t1")
        if len(fields) not in (3, 4) or "" in fields:
            raise ValueError(
                f"{where}: expected query-id, corpus-id, score and tabs, found {line!r:.80}"
            )
        if fields[0] == "query-id":
            continue
        query, passage, score = fields[:3]
        grade = as_grade(score, f"{where}: field 'score'")
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
    texts = _texts(queries_from or path_or_hub_id, "queries")
    qrels = _qrels(find_file(path_or_hub_id, f"qrels/{split}.tsv"))
    unasked = [query for query in qrels if not texts.get(query)]
    report_unusable(path_or_hub_id, unasked, len(qrels), "judged queries have no text, left out")
    for query in unasked:
        del qrels[query]
    corpus = _texts(path_or_hub_id, "corpus")
    judged = set().union(*qrels.values())
    missing = sorted(judged.difference(corpus))
    report_unusable(
        path_or_hub_id, missing, len(judged), "judged passages are not in the corpus, never found"
    )
    return corpus, {query: texts[query] for query in qrels}, qrels


def _from_file(path: Path, queries_from: Place | None) -> dict:
    """{(id, query): (grade, passage) pairs} of a file of lists."""
    queries = _texts(queries_from, "queries") if queries_from else {}
    found = {}
    for where, row in read_jsonl(path):
        row.setdefault("id", f"{path.stem}-{where.rpartition(':')[2]}")
        key = text_field(row, "id", where)
        row.setdefault("query", queries.get(key))
        query = text_field(row, "query", f"{where}, or {key!r} in --queries")
        sha256 = hashlib.sha256(plain_query(query).encode()).hexdigest()
        if row.get("query_sha256", sha256) != sha256:
            raise ValueError(f"{where}: field 'query_sha256': {key!r} has another query there")
        found.setdefault((key, query), [])
        graded = row.get("passages")
        if not graded:
            continue
        where = f"{where}: field 'passages'"
        if not isinstance(graded, dict) or len(graded) < 2:
            raise ValueError(f"{where}: expected 2 or more grades, found {graded!r:.60}")
        pairs = []
        for name, value in graded.items():
            grade = as_grade(name, where)
            texts = value if isinstance(value, list) else [value]
            pairs += [(grade, text_field({name: text}, name, where)) for text in texts]
        found[key, query] = pairs
    return found


def load_lists(paths: Iterable | Place, queries_from: Place | None = None) -> Lists:
    """The graded lists of files and collections, passages best first.

    A file (.jsonl, .jsonl.gz) has lines {"query": text, "passages": {"3": text, "0": [text, ...]}},
    maybe with an `id`.  For one id and query the last line with passages counts; a query without
    any is left out and counted on stderr.  A collection (see `load_beir`) gives each
    query's passages of qrels/train.tsv that are in its corpus.
    With `queries_from` (`mteb/msmarco` for the released lists) a collection's queries, and those
    that a file names by `id` alone, come from there, checked by `query_sha256` where a line has it.
    A place named twice is read once; an id that an earlier list has gets its place's name in
    front.  Raises ValueError for a bad row, and for a place without lists.
    """
    if isinstance(paths, Place):
        paths = [paths]
    lists = {}
    for place in dict.fromkeys(map(str, paths)):
        path = Path(place).expanduser()
        if path.is_file() or path.suffix in (".jsonl", ".gz"):
            found = _from_file(path, queries_from)
        else:
            found = {}
            corpus, queries, qrels = load_beir(place, "train", queries_from)
            for key, query in queries.items():
                judged = qrels[key].items()
                found[key, query] = [(grade, corpus[p]) for p, grade in judged if p in corpus]
        left_out = []
        for (key, query), pairs in found.items():
            pairs.sort(key=lambda pair: -pair[0])  # passages of one grade keep their order
            grades = [grade for grade, _ in pairs]
            if not any(grades):
                left_out.append(key)
                continue
            while key in lists:
                key = f"{path.name}:{key}"
            lists[key] = GradedList(key, query, [passage for _, passage in pairs], grades)
        report_unusable(place, left_out, len(found), "queries have no relevant passage, left out")
    return list(lists.values())


def split_lists(lists: Lists, share: float, seed: int) -> tuple:
    """(rest, held out): a seeded `share` (0 to 1) of the lists is set aside to choose settings."""
    drawn = random.Random(seed).sample(lists, len(lists))[: round(share * len(lists))]
    rest = [item for item in lists if item not in drawn]
    return rest, sorted(drawn, key=lists.index)


def as_collection(lists: Lists) -> Collection:
    """(corpus, queries, qrels): passage j of list i is `<id of i>-<j>`; ids are all different."""
    corpus, queries, qrels = {}, {}, {}
    for item in lists:
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
    """Stack lists into one batch; k is the longest list's length."""
    rows = [torch.tensor(item.grades) for item in lists]
    grades = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-1)
    k = grades.shape[1]
    passages = []
    for item in lists:
        padded = item.passages + [""] * k
        passages += padded[:k]
    queries = [item.query for item in lists]
    return Batch(queries, passages, grades.clamp(min=0).float(), grades >= 0)
