"""Collections and graded lists in, batches out; recipes shape lists into what a method trains on.
The first bad row is a ValueError naming file, line and field; what is left out is counted on stderr.
"""

import gzip
import hashlib
import json
import random
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from torch.nn.utils.rnn import pad_sequence

from repro.checkpoints import one_line

AUTHORED = Path(__file__).parents[1] / "cached_prompts" / "authored.jsonl"  # the graded lists of the kit
COLUMNS = ("query-id", "corpus-id", "score")
RECIPES = {"graded": "every passage with its own grade",
           "binary": "the released synthetic binary: a positive drawn from grades 3 and 2, negatives 1 and 0",
           "ends": "two grades: only the best and the worst passage, as of a prompt for one of each",
           "merged": "two grades by merging: 3 stays 3; 2, 1 and 0 become 0"}

@dataclass(frozen=True)
class GradedList:
    """One query, its passages, and one grade a passage (0 = irrelevant; higher is more relevant)."""
    id: str
    query: str
    passages: list[str]
    grades: list[int]

Place = str | Path
Lists = list[GradedList]
Texts = dict[str, str]  # {id: text}
Collection = tuple[Texts, Texts, dict[str, dict[str, int]]]  # corpus, queries, qrels

def read_lines(path: str | Path) -> Iterator[tuple[str, str]]:
    """Yield ("path:number", line) of a UTF-8 text file, plain or .gz; blank lines are left out.

    Raises ValueError if the file is missing, unreadable, damaged or not UTF-8."""
    path, number = Path(path), 0
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else open(path, "rb") as file:
            for number, raw in enumerate(file, start=1):
                line = raw.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
                if line.strip():
                    yield f"{path}:{number}", line
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise ValueError(f"{path}:{number}: expected UTF-8 text, found byte {byte:#04x}") from error
    except (OSError, EOFError, gzip.zlib.error) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ValueError(f"{path}: cannot be read after line {number}: {reason}") from error

def read_jsonl(path: str | Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield ("path:number", object) of a JSON-lines file.  ValueError for a line that is not one object."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = [key for key, _ in pairs]
        if repeated := [key for key in keys if keys.count(key) > 1]:
            raise ValueError(f"the key {repeated[0]!r} stands there twice")
        return dict(pairs)

    for where, line in read_lines(path):
        try:
            row = json.loads(line, object_pairs_hook=once)
            json.dumps(row, ensure_ascii=False).encode("utf-8")  # an escaped lone surrogate is no text
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{where}: expected one JSON object, but {error}") from error
        if not isinstance(row, dict):
            raise ValueError(f"{where}: expected one JSON object, found {type(row).__name__}")
        yield where, row

def text_field(row: dict[str, Any], field: str, where: str, *, empty: bool = False) -> str:
    """The string in `row[field]`; an id may be a whole number.  ValueError naming `where` and the field."""
    value = row.get(field)
    if field in ("_id", "id", "qid") and type(value) is int:
        value = str(value)
    if not isinstance(value, str) or not (empty or value.strip()):
        found = "no such field" if field not in row else f"{type(value).__name__} {value!r}"
        raise ValueError(f"{where}: field {field!r}: expected text, found {found}")
    return value

def as_grade(value: Any, where: str) -> int:
    """A whole grade >= 0, from a number or from plain digits.  Raises ValueError naming `where` otherwise."""
    if isinstance(value, str) and re.fullmatch(" *[0-9]{1,9} *", value):
        return int(value)
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if is_number and 0 <= value < 1e9 and value == int(value):
        return int(value)
    raise ValueError(f"{where}: expected a whole grade of 0 or more, found {value!r}")

def _tsv(path: Path) -> Iterator[tuple[str, dict]]:
    for position, (where, line) in enumerate(read_lines(path)):
        fields = tuple(line.split("\t"))
        if position or fields != COLUMNS:  # a header is that one, or there is none
            if len(fields) != 3 or not (position or fields[2].strip(" -").isdecimal()):
                raise ValueError(f"{where}: expected 3 fields {COLUMNS} and tabs, found {fields!r:.80}")
            yield where, dict(zip(COLUMNS, fields, strict=True))

def _rows(place: str, part: str, split: str = "") -> Iterator[tuple[str, dict]]:
    """(where, row) of one part: corpus.jsonl (`_id`, `title`, `text`), queries.jsonl (`_id`, `text`) or
    qrels/SPLIT.tsv (COLUMNS).  On the hub there are three layouts: a config a part (`mteb/...`), judgments
    apart (`BeIR/...-qrels`), and the bare files, which a folder may hold (`BatsResearch/sycl/...`)."""
    file = f"{part}/{split}.tsv" if split else f"{part}.jsonl"
    folder = Path(__file__).parent / "sample" if place == "sample" else Path(place).expanduser()
    source = next((path for path in (folder / file, folder / f"{file}.gz") if path.is_file()), None)
    if source is None:
        hub = re.fullmatch(r"([\w-]+/[\w.-]+)((?:/[\w.-]+)*)", place)
        if folder.is_dir() or not hub:
            raise ValueError(f"{place}: expected a folder with {file} (or .gz), a hub id, or 'sample'")
        try:
            import datasets  # slow to import, seldom needed
            configs = [] if hub[2] else datasets.get_dataset_config_names(hub[1])
            if "corpus" not in configs:
                source = Path(hf_hub_download(hub[1], f"{hub[2]}/{file}".strip("/"), repo_type="dataset"))
            elif split:
                config = next((name for name in ("default", "qrels") if name in configs), None)
                source = datasets.load_dataset(hub[1] if config else f"{hub[1]}-qrels", config, split=split)
            else:
                (source,) = datasets.load_dataset(hub[1], part).values()  # its only split, whatever its name
        except Exception as error:  # of the network, two libraries, the disk
            raise ValueError(f"{place} ({file}): neither here nor from the hub: {one_line(error)}") from error
    if isinstance(source, Path):
        return read_jsonl(source) if file.endswith(".jsonl") else _tsv(source)
    return ((f"{place} ({part}), row {n}", row) for n, row in enumerate(source, start=1))

def _texts(place: str, part: str) -> Texts:
    texts: Texts = {}
    for where, row in _rows(place, part):
        if (key := text_field(row, "_id", where)) in texts:
            raise ValueError(f"{where}: field '_id': {key!r} stands there already")
        fields = ("title", "text") if part == "corpus" and row.get("title") is not None else ("text",)
        found = [text_field(row, field, where, empty=part == "corpus").strip() for field in fields]
        texts[key] = " ".join(found).strip()
    return texts

def load_beir(path_or_hub_id: Place, split: str = "test", queries_from: Place | None = None) -> Collection:
    """(corpus {id: title and text}, queries {id: text}, qrels {query id: {passage id: grade}}) of a folder,
    "sample" or a hub id, maybe with a folder (`BatsResearch/sycl/llama33_70b`).  `queries_from`: another, for
    the queries.  Only judged queries are returned, as by BEIR.  ValueError for a bad row."""
    place, qrels, below = str(path_or_hub_id), {}, 0
    queries, rows = _texts(str(queries_from or place), "queries"), list(_rows(place, "qrels", split))
    for where, row in rows:
        query, passage = str(row.get("query-id")), str(row.get("corpus-id"))
        if query not in queries:
            raise ValueError(f"{where}: field 'query-id': {query!r} is not among the queries")
        below += (spam := bool(re.fullmatch(" *-[0-9]+ *", str(row.get("score")))))  # trec_eval's gain is 0
        grade = 0 if spam else as_grade(row.get("score"), f"{where}: field 'score'")
        if (earlier := qrels.setdefault(query, {}).setdefault(passage, grade)) != grade:
            raise ValueError(f"{where}: field 'score': {query!r}, {passage!r} have grade {earlier} already")
    if not qrels:
        raise ValueError(f"{place}: expected judgments in split {split!r}, found none")
    if below:
        print(f"{place}: {below} grades below 0 count as 0", file=sys.stderr)
    corpus = _texts(place, "corpus")
    for where, row in rows:
        if (passage := str(row.get("corpus-id"))) not in corpus:
            raise ValueError(f"{where}: field 'corpus-id': {passage!r} is not in the corpus")
    return corpus, {query: queries[query] for query in qrels}, qrels

def _kept(place: Place, lists: Lists, of: int, why: str) -> Lists:
    if not lists:
        raise ValueError(f"{place}: expected graded lists, found none: {of} of {of} {why}")
    if of > len(lists):
        print(f"{place}: {of - len(lists)} of {of} {why}, left out", file=sys.stderr)
    return lists

def _from_file(path: Path, texts: Texts) -> Lists:
    lists, seen = {}, {}
    for where, row in read_jsonl(path):
        key = text_field(row, "id", where) if "id" in row else f"{path.stem}-{where.rpartition(':')[2]}"
        if "id" in row and row.setdefault("query", texts.get(key)) is None:
            raise ValueError(f"{where}: no 'query': bring the collection with query {key!r} (--queries)")
        query, passages = text_field(row, "query", where).strip(), row.get("passages", "")
        plain = " ".join(query.casefold().split()).encode()
        if row.get("query_sha256") not in (None, hashlib.sha256(plain).hexdigest()):
            raise ValueError(f"{where}: field 'query_sha256': {key!r} is another query in the collection")
        if seen.setdefault(key, (query, where))[0] != query:
            raise ValueError(f"{where}: field 'id': {key!r} has another query at {seen[key][1]}")
        if passages is not None:
            here, grades = f"{where}: field 'passages'", passages if isinstance(passages, dict) else {}
            graded = {as_grade(name, here): text_field(grades, name, here).strip() for name in grades}
            if len(graded) < max(2, len(grades)):
                raise ValueError(f"{here}: expected 2 or more grades, each once, found {passages!r:.60}")
            order = sorted(graded, reverse=True)
            lists[key] = GradedList(key, query, [graded[grade] for grade in order], order)
    return _kept(path, list(lists.values()), len(seen), "queries have no passages")

def _from_beir(place: str, queries_from: Place | None, split: str) -> Lists:
    has_own = any(Path(place).expanduser().glob("queries.jsonl*"))
    corpus, queries, qrels = load_beir(place, split, None if has_own else queries_from)
    order = {query: sorted(judged, key=judged.get, reverse=True) for query, judged in qrels.items()}
    lists = [GradedList(query, queries[query], [corpus[p] for p in ids], [qrels[query][p] for p in ids])
             for query, ids in order.items()]  # best grade first, file order within a grade
    return _kept(place, [x for x in lists if x.grades[0]], len(lists), "queries have no relevant passage")

def load_lists(paths: Iterable[Place], queries_from: Place | None = None, split: str = "train") -> Lists:
    """Lists of files and collections, best passage first; an id in use gets its file's name or path before.

    A file (.jsonl, .jsonl.gz) has lines {"query", "passages": {"3": ..., "0": ...}}, maybe with `id`; null
    passages are counted on stderr, a later good record replaces an earlier.  A collection gives its judged
    passages.  Texts of queries that are missing come from the collection `queries_from` (`mteb/msmarco` for
    the released ones), checked by `query_sha256` if a line has it.  ValueError for a bad row or no lists."""
    names = [str(path) for path in ([paths] if isinstance(paths, str | Path) else paths)]
    if len({*names}) < len(names):
        raise ValueError(f"lists: expected each file once, one is named twice: {', '.join(names)}")
    files = {n: f for n in names if (f := Path(n).expanduser()).is_file() or n.endswith((".jsonl", ".gz"))}
    texts = _texts(str(queries_from), "queries") if queries_from and files else {}
    lists: dict[str, GradedList] = {}
    for name in names:
        found = _from_file(files[name], texts) if name in files else _from_beir(name, queries_from, split)
        for x in found:
            key = next(k for k in (x.id, f"{Path(name).name}:{x.id}", f"{name}:{x.id}") if k not in lists)
            lists[key] = replace(x, id=key)
    return list(lists.values())

def recipe(lists: Lists, name: str, seed: int) -> Lists:
    """The lists as RECIPES[name] says ("binary": grades 1, 0, 0); draws depend on seed and list id only.
    ValueError for an unknown name, and where a list is not one passage each of grades 3, 2, 1, 0."""
    if name not in RECIPES:
        raise ValueError(f"recipe: expected one of {', '.join(RECIPES)}, got {name!r}")
    shaped = []
    for item in lists if name != "graded" else ():
        if sorted(item.grades) != [0, 1, 2, 3]:
            raise ValueError(f"recipe {name!r}: expected grades 3, 2, 1, 0; {item.id!r} has {item.grades}")
        positive = random.Random(f"{seed} {item.id}").choice((3, 2))
        keep = {"binary": (positive, 1, 0), "ends": (3, 0), "merged": (3, 2, 1, 0)}[name]
        passages = [item.passages[item.grades.index(grade)] for grade in keep]
        grades = [1 if name == "binary" else 3] + [0] * (len(keep) - 1)
        shaped.append(replace(item, passages=passages, grades=grades))
    return shaped or list(lists)

def real_lists(path_or_hub_id: Place, negatives: Place | None = None, seed: int = 0, split: str = "train"
               ) -> Lists:
    """The released real binary (k = 3): a query's annotated positive (score >= 1) and two others, all drawn.

    Grades 3 and 1, as in the released synthetic + real.  The others are judged 0, or stand in a `negatives`
    file, here or on the hub (`BatsResearch/sycl/real_data/bm25_top_docs/train_qrels.jsonl`: BM25's top 1000),
    as `trove` documents them: {"qid": "1", "docid": ["7", ...]}.  With one other k = 2; with none, or without
    a positive, a query is left out and counted on stderr."""
    place, file = str(path_or_hub_id), Path(negatives or "")
    mined = _rows(file.parent.as_posix(), file.name.partition(".jsonl")[0]) if negatives else None
    corpus, queries, qrels = load_beir(place, split)
    lists: dict[str, GradedList] = {}
    for where, row in mined or [(place, {"qid": q, "docid": list(judged)}) for q, judged in qrels.items()]:
        query, pool = text_field(row, "qid", where), row.get("docid")
        if query in lists or not isinstance(pool, list):
            raise ValueError(f"{where}: expected a new 'qid' and a list in 'docid', found {query!r}")
        good = [p for p, grade in qrels.get(query, {}).items() if grade]
        others = [p for p in dict.fromkeys(map(str, pool)) if p not in good]
        if good and others:
            rng = random.Random(f"{seed} {query}")
            ids = [rng.choice(good), *rng.sample(others, min(2, len(others)))]
            if lost := [p for p in ids if p not in corpus]:
                raise ValueError(f"{where}: field 'docid': {lost[0]!r} is not in the corpus")
            lists[query] = GradedList(query, queries[query], [corpus[p] for p in ids], [3, 1, 1][: len(ids)])
    found = [lists[query] for query in qrels if query in lists]
    return _kept(place, found, len(qrels), "queries lack a positive or another passage")

def combine(synthetic: Lists, real: Lists) -> Lists:
    """Synthetic + real: a query's real passages behind its synthetic ones (4 + 3: k = 7), joined by the text
    less case and outer space.  Without a partner a synthetic list stays and a real one is left out, counted
    on stderr.  ValueError if no list has a partner."""
    partners = {item.query.strip().casefold(): item for item in reversed(real)}
    nothing = GradedList("", "", [], [])
    pairs = [(item, partners.get(item.query.strip().casefold(), nothing)) for item in synthetic]
    used = {more.id: more for _, more in pairs if more is not nothing}
    _kept("combine", list(used.values()), len(real), "real lists have no synthetic partner")
    return [replace(x, passages=x.passages + y.passages, grades=x.grades + y.grades) for x, y in pairs]

def split_lists(lists: Lists, share: float, seed: int) -> tuple[Lists, Lists]:
    """(rest, held out): a seeded `share` (0 to 1) of the lists is set aside for choosing settings."""
    held = set(random.Random(seed).sample(range(len(lists)), len(lists))[: round(share * len(lists))])
    return [x for j, x in enumerate(lists) if j not in held], [lists[j] for j in sorted(held)]

def as_collection(lists: Lists) -> Collection:
    """(corpus, queries, qrels): passage j of list i is `<id of i>-<j>`.  ValueError for an id used twice."""
    queries = {item.id: item.query for item in lists}
    if len(queries) < len(lists):
        raise ValueError(f"as_collection: {len(lists) - len(queries)} lists have the id of another")
    corpus = {f"{item.id}-{j}": text for item in lists for j, text in enumerate(item.passages)}
    return corpus, queries, {x.id: {f"{x.id}-{j}": y for j, y in enumerate(x.grades)} for x in lists}

@dataclass(frozen=True)
class Batch:
    """B lists, query-major: passages i*k ... i*k + k-1 are query i's; short lists end in empty ones."""
    queries: list[str]  # B
    passages: list[str]  # B * k
    labels: torch.Tensor  # (B, k) float32 grades
    mask: torch.Tensor  # (B, k) bool, False = padding

def collate(lists: Lists) -> Batch:
    """Stack lists into one batch; k is the longest list's length.  ValueError if there is no list."""
    if not lists:
        raise ValueError("collate: expected at least one list, got none")
    grades = pad_sequence([torch.tensor(item.grades) for item in lists], batch_first=True, padding_value=-1)
    k = grades.shape[1]
    passages = [text for item in lists for text in item.passages + [""] * (k - len(item.passages))]
    return Batch([item.query for item in lists], passages, grades.clamp(min=0).float(), grades >= 0)
