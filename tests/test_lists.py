"""Graded lists: reading, shaping, writing and batching."""

import json
import random
from pathlib import Path

import pytest
import torch

from repro.data import DataError, load_beir
from repro.lists import (
    GradedList, as_collection, as_real, binary, collate, combine, cut, lists_from_beir, lists_from_jsonl, load_lists,
    relabel, split_lists, write_beir,
)  # fmt: skip

A = GradedList("a", "tide", ["moon tide", "moon", "bank", "tea"], [3, 2, 1, 0])
B = GradedList("b", "Rust ", ["iron rust", "tea"], [1, 0])


def write_rows(path: Path, *rows: dict) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_reads_plain_lists_and_cache_records_best_grade_first(tmp_path: Path) -> None:
    plain = write_rows(tmp_path / "plain.jsonl", {"query": "tide", "passages": {"0": "tea", "3": "moon", "1": "bank", "2": "sea"}})
    assert lists_from_jsonl(plain) == [GradedList("plain-1", "tide", ["moon", "sea", "bank", "tea"], [3, 2, 1, 0])]


def test_failed_records_are_counted_and_retries_win(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    good = {"3": "x", "0": "y"}
    path = write_rows(
        tmp_path / "cache.jsonl",
        {"id": "1", "query": "a", "passages": None, "error": "level 0 is missing"},
        {"id": "2", "query": "b", "passages": None, "error": "level 0 is missing"},
        {"id": "1", "query": "a", "passages": good, "error": None},
    )
    assert [item.id for item in lists_from_jsonl(path)] == ["1"]
    assert "1 of 2 queries have no passages" in capsys.readouterr().err


@pytest.mark.parametrize(
    "row, message",
    [
        ({"passages": {"3": "a", "0": "b"}}, "field 'query': expected text, found no such field"),
        ({"query": " ", "passages": {"3": "a", "0": "b"}}, "field 'query': expected text, found it empty"),
        ({"query": "q", "passages": {"3": "a"}}, "field 'passages': expected an object of 2 or more grades"),
        ({"query": "q", "passages": ["a", "b"]}, "field 'passages': expected an object"),
        ({"query": "q", "passages": {"3": "a", "-1": "b"}}, "expected a whole grade of 0 or more, found '-1'"),
        ({"query": "q", "passages": {"3": "a", "0.5": "b"}}, "found '0.5'"),
        ({"query": "q", "passages": {"3": "a", "0": "  "}}, "field '0': expected text, found it empty"),
        ({"query": "q", "passages": {"3": "a", "0": None}}, "field '0': expected text, found NoneType"),
    ],
)
def test_bad_lists_are_named(tmp_path: Path, row: dict, message: str) -> None:
    with pytest.raises(DataError, match=rf"bad\.jsonl:2: .*{message}"):
        lists_from_jsonl(write_rows(tmp_path / "bad.jsonl", {"query": "q", "passages": {"1": "a", "0": "b"}}, row))


def test_round_trip_through_a_beir_folder(tmp_path: Path) -> None:
    folder = write_beir([A, B], tmp_path / "out")
    corpus, queries, qrels = load_beir(folder, split="train")
    assert (corpus, {k: v.strip() for k, v in queries.items()}) == (as_collection([A, B])[0], {"a": "tide", "b": "Rust"})
    assert qrels == {"a": {"a-0": 3, "a-1": 2, "a-2": 1, "a-3": 0}, "b": {"b-0": 1, "b-1": 0}}
    assert [item.passages for item in lists_from_beir(folder)] == [A.passages, B.passages]
    with pytest.raises(DataError, match="exists already"):
        write_beir([A], folder)
    with pytest.raises(DataError, match="two lists have the id 'a'"):
        write_beir([A, A], tmp_path / "twice")
    assert not (tmp_path / "twice").exists() and not list(tmp_path.glob(".twice*"))


def test_queries_without_a_relevant_passage_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder = write_beir([A, GradedList("z", "nothing", ["tea"], [0])], tmp_path / "out")
    assert [item.id for item in load_lists([folder])] == ["a"]
    assert "1 queries have no relevant passage" in capsys.readouterr().err


def test_ids_of_several_files_stay_unique(tmp_path: Path) -> None:
    row = {"id": "1", "query": "q", "passages": {"1": "a", "0": "b"}}
    one, two = write_rows(tmp_path / "one.jsonl", row), write_rows(tmp_path / "two.jsonl", row)
    assert [item.id for item in load_lists([one, two])] == ["1", "two.jsonl:1"]
    with pytest.raises(DataError, match="named twice"):
        load_lists([one, two, two])


def test_shapes_of_the_recipes() -> None:
    assert binary(A).grades == [1, 0, 0, 0]
    assert relabel(A, {3: 2, 2: 1}).grades == [2, 1, 1, 0]
    assert as_real(GradedList("r", "q", ["x", "y", "z"], [1, 0, 0])).grades == [3, 1, 1]
    real = [as_real(GradedList("r", "rust", ["p", "n1", "n2", "n3"], [1, 0, 0, 0])), GradedList("s", "else", ["p"], [3])]
    joined = combine([A, B], real)
    assert [(item.id, item.grades) for item in joined] == [("a", [3, 2, 1, 0]), ("b", [1, 0, 3, 1, 1]), ("s", [3])]
    assert joined[1].passages == ["iron rust", "tea", "p", "n1", "n2"]


def test_cut_keeps_one_top_passage_and_is_seeded() -> None:
    long = GradedList("l", "q", list("abcdefgh"), [3, 3, 1, 1, 0, 0, 0, 0])
    drawn = [cut(long, 3, random.Random(seed)) for seed in range(50)]
    assert all(len(item.passages) == 3 and item.grades.count(3) == 1 and item.grades == sorted(item.grades, reverse=True) for item in drawn)
    assert {item.passages[0] for item in drawn} == {"a", "b"} and len({tuple(item.passages) for item in drawn}) > 10
    assert cut(long, 3, random.Random(4)) == cut(long, 3, random.Random(4))
    assert all(long.grades[long.passages.index(text)] == grade for item in drawn for text, grade in zip(item.passages, item.grades, strict=True))
    assert cut(A, 4, random.Random(0)) == A
    assert cut(GradedList("t", "q", list("abc"), [3, 3, 0]), 2, random.Random(0)).grades == [3, 0]


def test_split_is_seeded_and_disjoint() -> None:
    lists = [GradedList(str(n), "q", ["x"], [1]) for n in range(50)]
    rest, held = split_lists(lists, 0.1, seed=3)
    assert len(held) == 5 and len(rest) == 45 and not {x.id for x in rest} & {x.id for x in held}
    assert split_lists(lists, 0.1, seed=3) == (rest, held) != split_lists(lists, 0.1, seed=4)


def test_collate_is_query_major_and_masks_padding() -> None:
    batch = collate([A, B])
    assert batch.queries == ["tide", "Rust "]
    assert batch.passages == ["moon tide", "moon", "bank", "tea", "iron rust", "tea", "", ""]
    assert torch.equal(batch.labels, torch.tensor([[3.0, 2, 1, 0], [1, 0, 0, 0]]))
    assert batch.mask.tolist() == [[True] * 4, [True, True, False, False]]
    with pytest.raises(DataError, match="at least one list"):
        collate([])
