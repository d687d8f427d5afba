"""Read test and training collections: one contract everywhere, the BEIR layout.

A collection is a folder with `corpus.jsonl` (`_id`, `title`, `text`), `queries.jsonl` (`_id`,
`text`) and `qrels/SPLIT.tsv` (`query-id`, `corpus-id`, `score`), plain or gzipped, or a hub data
set with the same columns.

Readers never skip a bad row in silence: an error names file, line and field; what is harmless is
counted and warned about once.
"""

import os
import re
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from repro.files import DataError, as_grade, read_jsonl, read_lines, text_field

__all__ = ["DataError", "load_beir", "read_corpus", "read_qrels", "read_queries"]

SAMPLE = Path(__file__).parent / "sample"  # the kit's own small graded collection, by the name "sample"

Corpus = dict[str, str]
Queries = dict[str, str]
Qrels = dict[str, dict[str, int]]
Rows = Iterable[tuple[str, dict[str, Any]]]  # (where it stands, the row)


def read_corpus(rows: Rows) -> Corpus:
    """{passage id: title and text, joined by a space}.  A passage without any text is kept, counted and warned about."""
    corpus, empty = {}, 0
    for where, row in rows:
        key = text_field(row, "_id", where)
        if key in corpus:
            raise DataError(f"{where}: field '_id': {key!r} stands for an earlier passage already")
        title = text_field(row, "title", where, empty=True) if row.get("title") is not None else ""
        corpus[key] = f"{title.strip()} {text_field(row, 'text', where, empty=True).strip()}".strip()
        empty += not corpus[key]
    if empty:
        warnings.warn(f"corpus: {empty} of {len(corpus)} passages have neither title nor text", stacklevel=2)
    return corpus


def read_queries(rows: Rows) -> Queries:
    """{query id: text}.  Raises DataError for an empty query or an id that is used twice."""
    queries: Queries = {}
    for where, row in rows:
        key = text_field(row, "_id", where)
        if key in queries:
            raise DataError(f"{where}: field '_id': {key!r} stands for an earlier query already")
        queries[key] = text_field(row, "text", where).strip()
    return queries


def read_qrels(rows: Rows, corpus: Corpus, queries: Queries) -> Qrels:
    """{query id: {passage id: grade}}.  Raises DataError for an unknown id or two grades for one pair."""
    qrels: Qrels = {}
    repeated = 0
    for where, row in rows:
        query, passage, grade = str(row["query-id"]), str(row["corpus-id"]), as_grade(row["score"], where)
        if query not in queries:
            raise DataError(f"{where}: field 'query-id': {query!r} is not among the {len(queries)} queries")
        if passage not in corpus:
            raise DataError(f"{where}: field 'corpus-id': {passage!r} is not among the {len(corpus)} passages")
        judged = qrels.setdefault(query, {})
        if judged.get(passage, grade) != grade:
            raise DataError(f"{where}: field 'score': {query!r} and {passage!r} have grade {judged[passage]} already")
        repeated += passage in judged
        judged[passage] = grade
    if repeated:
        warnings.warn(f"qrels: {repeated} judgments stand there twice with the same grade", stacklevel=2)
    return qrels


def _find(folder: Path, name: str) -> Path:
    """`folder/name` or its .gz; DataError naming what the folder holds instead."""
    for path in (folder / name, folder / f"{name}.gz"):
        if path.is_file():
            return path
    parent = (folder / name).parent
    there = sorted(p.name for p in parent.iterdir()) if parent.is_dir() else []
    raise DataError(f"{parent}: expected {Path(name).name} (or .gz) there, found {', '.join(there) or 'nothing'}")


def _folder_jsonl(folder: Path, name: str) -> Rows:
    path = _find(folder, name)
    return ((f"{path}:{number}", row) for number, row in read_jsonl(path))


def _folder_tsv(folder: Path, name: str) -> Rows:
    path, columns = _find(folder, name), ("query-id", "corpus-id", "score")
    for position, (number, line) in enumerate(read_lines(path)):
        fields = line.split("\t")
        if len(fields) != 3:
            raise DataError(f"{path}:{number}: expected 3 tab-separated fields {columns}, found {len(fields)}")
        if position or not fields[2].strip().isalpha():  # the header's third field is the word "score"
            yield f"{path}:{number}", dict(zip(columns, fields, strict=True))


def _hub_rows(hub_id: str, part: str, split: str) -> Rows:
    """Rows of one part (corpus, queries, qrels) of a hub data set, through `datasets`.

    Knows the three layouts in use: a config for each part (`mteb/...`), judgments in a data set of
    their own (`BeIR/...` and `BeIR/...-qrels`), and the bare BEIR files (`BatsResearch/sycl`).
    """
    from datasets import get_dataset_config_names, load_dataset  # slow to import, seldom needed
    from datasets.exceptions import DatasetNotFoundError

    where = f"{hub_id} ({part}, {split})"
    try:
        configs = get_dataset_config_names(hub_id)
        if "corpus" not in configs:
            file = {"qrels": f"qrels/{split}.tsv"}.get(part, f"{part}.jsonl")
            options = {"sep": "\t"} if part == "qrels" else {}
            kind = "csv" if part == "qrels" else "json"
            base = hub_id if os.path.isdir(hub_id) else f"hf://datasets/{hub_id}"
            rows = load_dataset(kind, data_files=f"{base}/{file}", split="train", **options)
        elif part == "qrels":
            config = next((name for name in ("default", "qrels") if name in configs), None)
            rows = load_dataset(hub_id, config, split=split) if config else load_dataset(f"{hub_id}-qrels", split=split)
        else:
            rows = next(iter(load_dataset(hub_id, part).values()))  # its only split, whatever it is called
    except (DatasetNotFoundError, OSError, ValueError) as error:
        raise DataError(f"{where}: the hub did not deliver it: {' '.join(str(error).split())[:300]}") from error
    return ((f"{where}, row {number}", row) for number, row in enumerate(rows, start=1))


def load_beir(
    path_or_hub_id: str | Path, split: str = "test", queries_from: str | Path | None = None
) -> tuple[Corpus, Queries, Qrels]:
    """Load a collection: (corpus {id: title and text}, queries {id: text}, qrels {query id: {passage id: grade}}).

    Takes a BEIR folder, a hub id (`mteb/scifact`), or "sample".  Only the queries that have a
    judgment in `split` are returned, as BEIR's own loader does.  `queries_from` names another
    folder or hub id for the queries (`BatsResearch/sycl` ships none: they are `mteb/msmarco`'s).
    Raises DataError for the first row that breaks the contract, and for an empty corpus.
    """
    name = os.fspath(path_or_hub_id)
    folder = SAMPLE if name == "sample" else Path(name).expanduser()
    if folder.is_dir():
        texts, judgments = _folder_jsonl, _folder_tsv(folder, f"qrels/{split}.tsv")
        corpus = read_corpus(texts(folder, "corpus.jsonl"))
        own_queries = None if queries_from else texts(folder, "queries.jsonl")
    elif re.fullmatch(r"[\w-]+/[\w.-]+", name):
        judgments = _hub_rows(name, "qrels", split)
        corpus = read_corpus(_hub_rows(name, "corpus", split))
        own_queries = None if queries_from else _hub_rows(name, "queries", split)
    else:
        raise DataError(f"{name}: expected a folder in BEIR layout, a hub id such as owner/name, or 'sample'")
    if not corpus:
        raise DataError(f"{name}: expected passages in the corpus, found none")
    if own_queries is None:
        other = Path(os.fspath(queries_from)).expanduser()
        is_folder = other.is_dir()
        own_queries = _folder_jsonl(other, "queries.jsonl") if is_folder else _hub_rows(str(queries_from), "queries", split)
    queries = read_queries(own_queries)
    qrels = read_qrels(judgments, corpus, queries)
    if not qrels:
        raise DataError(f"{name}: expected judgments in split {split!r}, found none")
    return corpus, {query: queries[query] for query in qrels}, qrels
