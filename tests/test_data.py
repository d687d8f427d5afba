"""Collections and graded lists are read, what is left out is counted, bad rows are named."""

import gzip
import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from repro import data
from repro.data import GradedList, as_collection, as_grade, collate, load_beir, load_lists

HEADER = "query-id\tcorpus-id\tscore\n"
QRELS = "q1\tp1\t3\nq1\tp2\t-1\nq1\t4\t1\nq2\tp2\t1\n"  # below 0: spam, counts as 0
CORPUS = [
    {"_id": "p1", "title": "Moon", "text": "It raises tides."},
    {"_id": "p2", "title": "", "text": " Rust måste ha\u2028vatten."},
    {"_id": "p3", "text": "No title."},
    {"_id": 4, "title": None, "text": None},
]
QUERIES = [{"_id": "q1", "text": "the tide"}, {"_id": "q2", "text": " Why rust"}]
EXPECTED = (
    {"p1": "Moon It raises tides.", "p2": "Rust måste ha\u2028vatten.", "p3": "No title.", "4": ""},
    {"q1": "the tide", "q2": "Why rust"},
    {"q1": {"p1": 3, "p2": 0, "4": 1}, "q2": {"p2": 1}},
)
TIDE = GradedList("a", "tide", ["moon tide", "moon", "bank", "tea"], [3, 2, 1, 0])
IRON = GradedList("b", "Rust ", ["iron rust", "tea"], [1, 0])
GOOD = {"3": "a", "0": "b"}


def write_rows(path: Path, rows: list | str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(rows, list):
        rows = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    path.write_bytes(rows if isinstance(rows, bytes) else rows.encode())
    return path


def write_collection(folder: Path, split: str = "test", **parts: list | str | bytes) -> Path:
    write_rows(folder / "corpus.jsonl", parts.get("corpus", CORPUS))
    write_rows(folder / "queries.jsonl", parts.get("queries", QUERIES))
    write_rows(folder / f"qrels/{split}.tsv", parts.get("qrels", QRELS))
    return folder


@pytest.mark.parametrize(
    "parts",
    [
        {},
        {"qrels": HEADER + QRELS},
        {"qrels": "\ufeff" + (HEADER + QRELS).replace("\n", "\r\n")},
        {"corpus": "\ufeff" + "\r\n\r\n".join(map(json.dumps, CORPUS))},
        {"queries": [*QUERIES, {"_id": "q3", "text": "not judged"}]},
    ],
)
def test_a_folder_in_the_layout_of_beir(tmp_path: Path, parts: dict) -> None:
    assert load_beir(write_collection(tmp_path, **parts)) == EXPECTED


def test_packed_files(tmp_path: Path) -> None:
    write_collection(tmp_path)
    for name in ("corpus.jsonl", "queries.jsonl", "qrels/test.tsv"):
        path = tmp_path / name
        write_rows(tmp_path / f"{name}.gz", gzip.compress(path.read_bytes()))
        path.unlink()
    assert load_beir(tmp_path) == EXPECTED


@pytest.mark.parametrize("header", ["query-id\tcorpus-id\n", ""])
def test_judgments_without_scores_have_grade_1(tmp_path: Path, header: str) -> None:
    folder = write_collection(tmp_path, qrels=header + "q1\tp1\nq2\tp2\n")
    assert load_beir(folder)[2] == {"q1": {"p1": 1}, "q2": {"p2": 1}}


@pytest.mark.parametrize(
    "place, revision, inner",
    [("o/set", None, ""), ("o/set@v2", "v2", ""), ("o/set/in/it", None, "in/it/")],
)
def test_a_hub_id_is_a_folder_fetched_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str, revision: str | None, inner: str
) -> None:
    asked = []

    def hub_folder(*arguments: object) -> Path:
        asked.append(arguments)
        return tmp_path

    write_collection(tmp_path / inner)
    monkeypatch.setattr(data, "hub_folder", hub_folder)
    assert load_beir(place) == EXPECTED
    assert asked[1] == ("o/set", "dataset", (f"{inner}qrels/test.tsv*",), revision)


def test_a_judged_passage_outside_the_corpus_stays_judged(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    corpus, _, qrels = load_beir(write_collection(tmp_path, qrels=QRELS + "q2\tp9\t2\n"))
    assert "p9" not in corpus
    assert qrels["q2"] == {"p2": 1, "p9": 2}
    message = "1 of 4 judged passages are not in the corpus, never found: 'p9'"
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("rows", [[], [{"_id": "q9", "text": " "}], [{"_id": "q9", "text": None}]])
def test_a_judged_query_without_text_is_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture, rows: list
) -> None:
    folder = write_collection(tmp_path, queries=QUERIES + rows, qrels=QRELS + "q9\tp1\t1\n")
    assert load_beir(folder) == EXPECTED
    assert "1 of 3 judged queries have no text, left out: 'q9'" in capsys.readouterr().err


@pytest.mark.parametrize("part, rows", [("corpus", CORPUS), ("queries", QUERIES)])
def test_an_id_that_stands_there_twice_counts_once(
    tmp_path: Path, capsys: pytest.CaptureFixture, part: str, rows: list
) -> None:
    again = {"_id": rows[0]["_id"], "text": "again"}
    assert load_beir(write_collection(tmp_path, **{part: [*rows, again]})) == EXPECTED
    assert f"{part}.jsonl:{len(rows) + 1}" in capsys.readouterr().err


@pytest.mark.parametrize(
    "part, content, message",
    [
        ("qrels", "q9\tp1\t1", "found nothing to use: 1 of 1 judged queries have no text"),
        ("qrels", "q1\tp9\t1", "found nothing to use: 1 of 1 judged passages are not in the c"),
        ("qrels", HEADER, "found nothing to use"),
        ("qrels", "q1 p1 3", ":1: expected query-id, corpus-id, score and tabs"),
        ("qrels", "q1\t0\tp1\t3", ":1: expected query-id, corpus-id, score and tabs"),
        ("qrels", "q1\tp1\t3\nq1\tp2", ":2: .* a score stands in all lines or in none"),
        ("qrels", "q1\tp1\t3\nq1\tp1\t2", ":2: field 'score': this pair has grade 3 already"),
        ("qrels", "q1\tp1\t3\nq1\tp2\t1.5", ":2: field 'score': expected a whole grade"),
        ("corpus", '\n{"_id": ', r"corpus\.jsonl:2: expected one JSON object"),
        ("corpus", "[1]", r":1: expected one JSON object, but found \[1\]"),
        ("corpus", '{"_id": "p", "text": "\\ud800"}', ":1: .*surrogates not allowed"),
        ("corpus", b'{"_id": "p", "text": "\xff"}', ":1: cannot be read as UTF-8 text: .*0xff"),
        ("corpus", '{"_id": "p", "body": "a"}', ":1: field 'text': expected text, found None"),
        ("queries", '{"_id": "q", "text": ["a"]}', ":1: field 'text': expected text, found .'a'"),
        ("queries", '{"_id": null, "text": "a"}', ":1: field '_id': expected text, found None"),
    ],
)
def test_bad_rows_are_named(tmp_path: Path, part: str, content: str | bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_beir(write_collection(tmp_path, **{part: content}))


@pytest.mark.parametrize("value", ["3", 3, 3.0, " 3 "])
def test_whole_grades(value: object) -> None:
    assert as_grade(value, "x:1") == 3


@pytest.mark.parametrize(
    "value", [True, None, 1.5, -1, 10**9, float("nan"), [3], "³", "٣", "1_0", "+3", "- 1", ""]
)
def test_other_grades_are_refused(value: object) -> None:
    with pytest.raises(ValueError, match="x:1: expected a whole grade of 0 or more, found"):
        as_grade(value, "x:1")


@pytest.mark.parametrize(
    "place, split, message",
    [
        ("no such thing", "test", r"expected a folder with queries\.jsonl \(or \.gz\), a hub id"),
        ("sample", "dev", r"expected a folder with qrels/dev\.tsv"),
        ("mteb/scifact", "test", "mteb/scifact: the hub did not deliver"),
    ],
)
def test_what_is_not_there_is_named(place: str, split: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_beir(place, split)


@pytest.mark.parametrize("part", [slice(-20), slice(5, None), slice(0, -8)])
def test_a_damaged_archive_is_named(tmp_path: Path, part: slice) -> None:
    path = write_rows(tmp_path / "broken.jsonl.gz", gzip.compress(b'{"a": 1}\n' * 1000)[part])
    with pytest.raises(ValueError, match=r"broken\.jsonl\.gz:\d+: cannot be read"):
        list(data.read_jsonl(path))


def test_lists_have_their_best_passage_first(tmp_path: Path) -> None:
    row = {"query": "tide", "passages": {"1": "c", "3": "a ", "2": "b", "0": "d"}}
    path = write_rows(tmp_path / "plain.jsonl", [row])
    assert load_lists(path) == [GradedList("plain-1", "tide", list("abcd"), [3, 2, 1, 0])]


def test_a_grade_may_have_several_passages(tmp_path: Path) -> None:
    row = {"id": "x", "query": "tide", "passages": {"0": "c", "3": ["b", "a"]}}
    path = write_rows(tmp_path / "lists.jsonl", [row])
    assert load_lists([path]) == [GradedList("x", "tide", ["b", "a", "c"], [3, 3, 0])]


def test_the_last_line_with_passages_counts(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    one, two = ({"id": key, "query": key, "passages": None} for key in "12")
    last = {"3": "x", "0": "y"}
    rows = [one, two, one | {"passages": GOOD}, one | {"passages": last}, one]
    path = write_rows(tmp_path / "cache.jsonl", rows)
    assert load_lists([path]) == [GradedList("1", "1", ["x", "y"], [3, 0])]
    assert "1 of 2 queries have no passages" in capsys.readouterr().err


def test_a_line_with_the_id_of_another_query_is_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    rows = [{"id": "1", "query": query, "passages": GOOD} for query in ("a", "another")]
    path = write_rows(tmp_path / "clash.jsonl", rows)
    assert [item.query for item in load_lists([path])] == ["a"]
    assert "clash.jsonl:2" in capsys.readouterr().err


def test_ids_of_several_files_stay_unique(tmp_path: Path) -> None:
    rows = [{"id": "1", "query": "a", "passages": GOOD}]
    paths = [write_rows(tmp_path / name / "lists.jsonl", rows) for name in "xyz"]
    ids = ["1", "lists.jsonl:1", "lists.jsonl:lists.jsonl:1"]
    assert [item.id for item in load_lists([*paths, paths[0]])] == ids


@pytest.mark.parametrize(
    "row, message",
    [
        ({"passages": GOOD}, "field 'query': bring the collection of 'lists-2' .--queries"),
        ({"query": "q"}, "field 'passages': expected 2 or more grades, found None"),
        ({"query": "q", "passages": {"3": ["a", "b"]}}, "'passages': expected 2 or more grades"),
        ({"query": "q", "passages": ["a", "b"]}, "field 'passages': expected 2 or more grades"),
        ({"query": "q", "passages": {"3.5": "a"}}, "expected a whole grade .* found '3.5'"),
        ({"query": "q", "passages": GOOD | {"1": " "}}, "field '1': expected text, found ' '"),
        ({"query": "q", "passages": GOOD | {"1": []}}, "field '1': expected text, found .."),
    ],
)
def test_bad_lists_are_named(tmp_path: Path, row: dict, message: str) -> None:
    path = write_rows(tmp_path / "lists.jsonl", [{"query": "q", "passages": GOOD}, row])
    with pytest.raises(ValueError, match=rf"lists\.jsonl:2: .*{message}"):
        load_lists([path])


def test_lists_of_a_collection_leave_out_what_is_missing(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    qrels = "q1\tp3\t2\nq1\tp9\t3\nq1\tp1\t3\nq2\tp2\t0\n"
    folder = write_collection(tmp_path, "train", qrels=qrels)
    passages = ["Moon It raises tides.", "No title."]
    assert load_lists([folder]) == [GradedList("q1", "the tide", passages, [3, 2])]
    assert "1 of 2 queries have no relevant passage, left out: 'q2'" in capsys.readouterr().err


def test_the_released_lists_take_queries_from_elsewhere(tmp_path: Path) -> None:
    folder = write_collection(tmp_path / "sycl/llama33_70b", "train")
    (folder / "queries.jsonl").rename(tmp_path / "queries.jsonl")
    assert [item.query for item in load_lists([folder], tmp_path)] == ["the tide", "Why rust"]


def test_queries_that_do_not_ship_are_checked(tmp_path: Path) -> None:
    sha256 = hashlib.sha256(b"why rust").hexdigest()
    row = {"id": "x", "query_sha256": sha256, "passages": GOOD}
    path = write_rows(tmp_path / "lists.jsonl", [row])
    write_rows(tmp_path / "queries.jsonl", [{"_id": "x", "text": "Why  RUST"}])
    assert load_lists([path], tmp_path)[0].query == "Why  RUST"
    write_rows(tmp_path / "queries.jsonl", [{"_id": "x", "text": "the tide"}])
    with pytest.raises(ValueError, match=r"lists\.jsonl:1: .* 'x' is another query"):
        load_lists([path], tmp_path)


def test_the_split_is_the_one_of_all_runs() -> None:
    lists = [GradedList(str(n), "q", ["x"], [1]) for n in range(50)]
    rest, held = data.split_lists(lists, 0.1, seed=3)
    assert [item.id for item in held] == ["8", "15", "23", "34", "37"]
    assert rest == [item for item in lists if item not in held]


def test_lists_as_a_collection() -> None:
    corpus, queries, qrels = as_collection([TIDE, IRON])
    assert queries == {"a": "tide", "b": "Rust "}
    assert list(corpus) == ["a-0", "a-1", "a-2", "a-3", "b-0", "b-1"]
    assert list(corpus.values()) == TIDE.passages + IRON.passages
    assert qrels["b"] == {"b-0": 1, "b-1": 0}


def test_a_batch_pads_short_lists() -> None:
    batch = collate([TIDE, IRON])
    assert batch.queries == ["tide", "Rust "]
    assert batch.passages == [*TIDE.passages, *IRON.passages, "", ""]
    assert torch.equal(batch.labels, torch.tensor([[3.0, 2, 1, 0], [1, 0, 0, 0]]))
    assert batch.mask.tolist() == [[True] * 4, [True, True, False, False]]


@pytest.mark.parametrize(
    "call, lists, message",
    [(as_collection, [TIDE, TIDE], "two lists have the id 'a'"), (collate, [], "at least one")],
)
def test_lists_that_make_nothing(call: Callable, lists: list, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(lists)


def test_no_question_of_wikiqa_ships() -> None:
    rows = data.read_jsonl(data.AUTHORED.with_name("wikiqa-graded.jsonl"))
    assert not [where for where, row in rows if "query" in row]
