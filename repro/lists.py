"""Graded lists: from caches and collections to the batches that the losses take.

One list is one query with its passages and their grades.  This module reads lists from generation
caches and from judged collections, shapes them into what the compared methods train on (all
grades, fewer levels, positive and rest only, synthetic and real passages side by side), writes
them as a BEIR folder, and collates B of them query-major, so that the passages of query i are the
columns i*k ... i*k + k-1 of the score matrix.
"""

import json
import random
import shutil
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from repro.data import Corpus, Qrels, Queries, load_beir
from repro.files import DataError, as_grade, read_jsonl, text_field


@dataclass(frozen=True)
class GradedList:
    """One query, its passages, and one grade a passage (0 = irrelevant; higher is more relevant)."""

    id: str
    query: str
    passages: list[str]
    grades: list[int]


def lists_from_jsonl(path: str | Path) -> list[GradedList]:
    """Graded lists of a cache file, or of any JSON lines {"query", "passages": {"3": ..., "0": ...}}.

    A record whose generation failed (`passages` null) is left out and counted on stderr; a later
    record of the same id replaces an earlier one (a retry).  Raises DataError for a bad row.
    """
    lists: dict[str, GradedList] = {}
    failed: set[str] = set()
    for number, row in read_jsonl(path):
        where = f"{path}:{number}"
        query = text_field(row, "query", where).strip()
        key = text_field(row, "id", where) if "id" in row else f"{Path(path).stem}-{number}"
        passages = row.get("passages")
        if passages is None and "error" in row:
            failed.add(key)
            continue
        if not isinstance(passages, dict) or len(passages) < 2:
            raise DataError(f"{where}: field 'passages': expected an object of 2 or more grades, found {passages!r:.60}")
        grades = {as_grade(grade, where): text_field(passages, grade, where).strip() for grade in passages}
        ordered = sorted(grades, reverse=True)
        lists[key] = GradedList(key, query, [grades[grade] for grade in ordered], ordered)
    if missing := failed - lists.keys():
        print(f"{path}: {len(missing)} of {len(lists) + len(missing)} queries have no passages (generation failed)", file=sys.stderr)
    if not lists:
        raise DataError(f"{path}: expected graded lists, found none")
    return list(lists.values())


def lists_from_beir(path_or_hub_id: str | Path, split: str = "train") -> list[GradedList]:
    """One list a query of a judged collection: its judged passages with their own grades, best first.

    A query without any passage graded above 0 teaches nothing and is left out, counted on stderr.
    """
    corpus, queries, qrels = load_beir(path_or_hub_id, split)
    lists = []
    for query, judged in qrels.items():
        if any(judged.values()):
            ordered = sorted(judged, key=judged.get, reverse=True)  # stable: file order within a grade
            passages, grades = [corpus[p] for p in ordered], [judged[p] for p in ordered]
            lists.append(GradedList(query, queries[query], passages, grades))
    if len(lists) < len(qrels):
        print(f"{path_or_hub_id}: {len(qrels) - len(lists)} queries have no relevant passage, left out", file=sys.stderr)
    if not lists:
        raise DataError(f"{path_or_hub_id}: expected a query with a relevant passage in split {split!r}, found none")
    return lists


def load_lists(paths: Iterable[str | Path], split: str = "train") -> list[GradedList]:
    """All lists of the files (`.jsonl`, `.jsonl.gz`) and collections (folder or hub id) named, in that order.

    An id that an earlier file used already gets the file's name in front, so ids stay unique.
    """
    lists: list[GradedList] = []
    taken: set[str] = set()
    for path in paths:
        is_file = Path(path).is_file() or str(path).endswith((".jsonl", ".gz"))
        for item in lists_from_jsonl(path) if is_file else lists_from_beir(path, split):
            name = item.id if item.id not in taken else f"{Path(path).name}:{item.id}"
            if name in taken:
                raise DataError(f"{path}: list {item.id!r} is there already; is the file named twice?")
            taken.add(name)
            lists.append(replace(item, id=name))
    return lists


def relabel(item: GradedList, grades: dict[int, int]) -> GradedList:
    """The same passages with other grades, e.g. {3: 2, 2: 1, 1: 1, 0: 0} for three levels.  Missing grades stay."""
    return replace(item, grades=[grades.get(grade, grade) for grade in item.grades])


def binary(item: GradedList) -> GradedList:
    """Positive and rest: the top grade becomes 1, every other grade 0 (what a contrastive method is told)."""
    return replace(item, grades=[int(grade == max(item.grades)) for grade in item.grades])


def as_real(item: GradedList, positive: int = 3, other: int = 1) -> GradedList:
    """Grade a real list as the paper does next to synthetic ones: positives 3, mined others 1 (Section 4)."""
    return replace(item, grades=[positive if grade > 0 else other for grade in item.grades])


def combine(synthetic: Sequence[GradedList], real: Sequence[GradedList], limit: int = 3) -> list[GradedList]:
    """Synthetic + real: put the first `limit` real passages of the same query behind the synthetic ones.

    Lists belong together if their query texts are equal up to case and outer space.  Queries that
    only one side has keep their list as it is.  The paper adds one positive and two others (k = 7).
    """
    extra = {item.query.strip().lower(): item for item in real}
    joined = []
    for item in synthetic:
        if more := extra.pop(item.query.strip().lower(), None):
            passages, grades = item.passages + more.passages[:limit], item.grades + more.grades[:limit]
            item = replace(item, passages=passages, grades=grades)
        joined.append(item)
    return joined + list(extra.values())


def cut(item: GradedList, k: int, rng: random.Random) -> GradedList:
    """At most k passages: one of the top grade, drawn by `rng`, and k - 1 others, drawn without replacement."""
    if len(item.passages) <= k:
        return item
    top = [j for j, grade in enumerate(item.grades) if grade == max(item.grades)]
    first = rng.choice(top)
    lower = [j for j in range(len(item.grades)) if j not in top]
    rest = rng.sample(lower, min(k - 1, len(lower)))
    spare = [j for j in top if j != first]  # only a list with too few lower grades needs a second top one
    keep = [first, *rest, *rng.sample(spare, k - 1 - len(rest))]
    keep.sort(key=lambda j: -item.grades[j])
    return replace(item, passages=[item.passages[j] for j in keep], grades=[item.grades[j] for j in keep])


def split_lists(lists: Sequence[GradedList], share: float, seed: int) -> tuple[list[GradedList], list[GradedList]]:
    """(rest, held out): a seeded `share` of the queries is set aside for choosing learning rate and the like."""
    order = random.Random(seed).sample(range(len(lists)), len(lists))
    held = set(order[: round(share * len(lists))])
    rest = [item for j, item in enumerate(lists) if j not in held]
    return rest, [lists[j] for j in sorted(held)]


def as_collection(lists: Iterable[GradedList]) -> tuple[Corpus, Queries, Qrels]:
    """(corpus, queries, qrels) of lists: passage j of list i is `<id of i>-<j>`.  DataError if an id is used twice."""
    corpus: Corpus = {}
    queries: Queries = {}
    qrels: Qrels = {}
    for item in lists:
        if item.id in queries:
            raise DataError(f"two lists have the id {item.id!r}")
        queries[item.id] = item.query
        qrels[item.id] = {f"{item.id}-{j}": grade for j, grade in enumerate(item.grades)}
        corpus.update(zip(qrels[item.id], item.passages, strict=True))
    return corpus, queries, qrels


def write_beir(lists: Iterable[GradedList], folder: str | Path, split: str = "train") -> Path:
    """Write graded lists as a BEIR folder (the layout of `BatsResearch/sycl`); returns the folder.

    The folder must not exist yet, and appears only when it is complete; DataError otherwise.
    """
    folder = Path(folder)
    if folder.exists():
        raise DataError(f"{folder}: exists already; name a new folder")
    corpus, queries, qrels = as_collection(lists)
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        (scratch / "qrels").mkdir()
        rows = {
            "corpus.jsonl": [{"_id": key, "title": "", "text": text} for key, text in corpus.items()],
            "queries.jsonl": [{"_id": key, "text": text} for key, text in queries.items()],
        }
        for name, content in rows.items():
            lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in content)
            (scratch / name).write_text(lines, encoding="utf-8")
        judged = [f"{q}\t{p}\t{grade}\n" for q, row in qrels.items() for p, grade in row.items()]
        text = "query-id\tcorpus-id\tscore\n" + "".join(judged)
        (scratch / "qrels" / f"{split}.tsv").write_text(text, encoding="utf-8")
        scratch.chmod(0o755)  # mkdtemp makes it private
        scratch.rename(folder)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return folder


@dataclass(frozen=True)
class Batch:
    """B lists, query-major.  Short lists are padded with empty passages where `mask` is False."""

    queries: list[str]  # B
    passages: list[str]  # B * k
    labels: Tensor  # (B, k) float32 grades
    mask: Tensor  # (B, k) bool, False = padding


def collate(lists: Sequence[GradedList]) -> Batch:
    """Stack lists into one batch; k is the longest list's length.  DataError if there is no list."""
    if not lists:
        raise DataError("collate: expected at least one list, got none")
    k = max(len(item.passages) for item in lists)
    padding = [k - len(item.passages) for item in lists]
    passages = [text for item, pad in zip(lists, padding, strict=True) for text in item.passages + [""] * pad]
    labels = [item.grades + [0] * pad for item, pad in zip(lists, padding, strict=True)]
    mask = [[True] * (k - pad) + [False] * pad for pad in padding]
    return Batch([item.query for item in lists], passages, torch.tensor(labels).float(), torch.tensor(mask))
