"""Collections and graded lists are read, what is left out is counted, bad rows are named."""

import gzip
import hashlib
from unittest.mock import Mock

import pytest
import torch
from conftest import graded_lists, write_jsonl

from repro import data
from repro.data import GradedList, as_collection, collate, load_beir, load_lists

QRELS = "q1\tp1\t3.0\nq1\tp2\t-1\nq1\t4\t1\nq2\tp2\t1\n"  # below 0: spam, counts as 0
CORPUS = """\
{"_id": "p1", "title": "Moon", "text": "It raises tides."}
{"_id": "p2", "title": "", "text": " Rust måste ha\u2028vatten."}
{"_id": "p3", "text": "No title."}
{"_id": 4, "title": null, "text": ""}
"""
QUERIES = """\
{"_id": "q1", "text": "the tide"}
{"_id": "q2", "text": " Why rust"}
{"_id": "q3", "text": "not judged"}
{"_id": "q4", "text": " "}
"""
EXPECTED = (
    {"p1": "Moon It raises tides.", "p2": "Rust måste ha\u2028vatten.", "p3": "No title.", "4": ""},
    {"q1": "the tide", "q2": "Why rust"},
    {"q1": {"p1": 3, "p2": 0, "4": 1}, "q2": {"p2": 1}},
)
TIDE = GradedList("a", "tide", ["moon tide", "moon", "bank", "tea"], [3, 2, 1, 0])
IRON = GradedList("b", "Rust ", ["iron rust", "tea"], [1, 0])
GOOD = '{"query": "q", "passages": {"3": "a", "0": "b"}}\n'


def write_collection(folder, split="test", corpus=CORPUS, queries=QUERIES, qrels=QRELS):
    write_jsonl(folder / "corpus.jsonl", corpus)
    write_jsonl(folder / "queries.jsonl", queries)
    write_jsonl(folder / f"qrels/{split}.tsv", qrels)
    return folder


@pytest.mark.parametrize(
    "part, content",
    [
        ("qrels", QRELS),
        ("qrels", "\ufeff" + f"query-id\tcorpus-id\tscore\n{QRELS}".replace("\n", "\r\n")),
        ("corpus", "\ufeff" + CORPUS.replace("\n", "\r\n\r\n")),
    ],
)
def test_a_folder_in_the_layout_of_beir(tmp_path, part, content):
    assert load_beir(write_collection(tmp_path, **{part: content})) == EXPECTED


def test_packed_files(tmp_path):
    write_collection(tmp_path)
    for path in [*tmp_path.rglob("*.*")]:
        packed = path.rename(f"{path}.gz")
        packed.write_bytes(gzip.compress(packed.read_bytes()))
    assert load_beir(tmp_path) == EXPECTED


def test_judgments_without_scores_have_grade_1(tmp_path):
    folder = write_collection(tmp_path, qrels="query-id\tcorpus-id\nq1\tp1\nq2\tp2\n")
    assert load_beir(folder)[2] == {"q1": {"p1": 1}, "q2": {"p2": 1}}


@pytest.mark.parametrize(
    "place, revision, inner", [("o/set", None, ""), ("o/set@v2/in/it", "v2", "in/it/")]
)
def test_a_hub_id_is_a_folder_fetched_first(tmp_path, monkeypatch, place, revision, inner):
    hub_folder = Mock(return_value=tmp_path)
    monkeypatch.setattr(data, "hub_folder", hub_folder)
    write_collection(tmp_path / inner)
    assert load_beir(place) == EXPECTED
    hub_folder.assert_any_call("o/set", "dataset", (f"{inner}qrels/test.tsv*",), revision)


@pytest.mark.parametrize(
    "part, content, message",
    [
        (
            "qrels",
            QRELS + "q2\tp9\t2\n",
            "1 of 4 judged passages are not in the corpus, never found: 'p9'",
        ),
        (
            "qrels",
            QRELS + "q4\tp1\t1\nq9\tp1\t1\n",
            "2 of 4 judged queries have no text, left out: 'q4, q9'",
        ),
        ("corpus", CORPUS + '{"_id": "p1", "text": "again"}', "corpus.jsonl:5"),
        ("queries", QUERIES + '{"_id": "q1", "text": "again"}', "queries.jsonl:5"),
    ],
)
def test_what_is_left_out_is_counted(tmp_path, capsys, part, content, message):
    assert load_beir(write_collection(tmp_path, **{part: content}))[:2] == EXPECTED[:2]
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "part, content, message",
    [
        ("qrels", "q9\tp1\t1", "found nothing to use: 1 of 1 judged queries have no text"),
        ("qrels", "q1\tp9\t1", "found nothing to use: 1 of 1 judged passages are not in the c"),
        ("qrels", "q1 p1 3", ":1: expected query-id, corpus-id, score and tabs"),
        ("qrels", "q1\t\t1", ":1: expected query-id, corpus-id, score and tabs"),
        ("qrels", "\tp1\t1", ":1: expected query-id, corpus-id, score and tabs"),
        ("qrels", "q1\tp1\t", ":1: expected query-id, corpus-id, score and tabs"),
        ("qrels", "q1\tp1\t3\nq1\tp1\t2", ":2: field 'score': this pair has grade 3 already"),
        ("qrels", "q1\tp1\t3\nq1\tp2\t1.5", ":2: field 'score': expected a whole grade"),
        ("qrels", "q1\tp1\t³", ":1: field 'score': expected a whole grade"),
        ("qrels", "q1\tp1\t- 1", ":1: field 'score': expected a whole grade"),
        ("corpus", '\n{"_id": ', r"corpus\.jsonl:2: expected one JSON object"),
        ("corpus", '[["_id", "p"], ["text", "a"]]', ":1: expected one JSON object"),
        ("corpus", r'{"_id": "\ud800"}', ":1: expected one JSON object"),
        ("corpus", '{"_id": "p", "body": "a"}', ":1: field 'text': expected text, found None"),
        ("queries", '{"_id": " ", "text": "a"}', ":1: field '_id': expected text, found ' '"),
    ],
)
def test_bad_rows_are_named(tmp_path, part, content, message):
    with pytest.raises(ValueError, match=message):
        load_beir(write_collection(tmp_path, **{part: content}))


@pytest.mark.parametrize(
    "place, split, message",
    [
        (
            "sample",
            "dev",
            r"sample/qrels/dev\.tsv: not found, nor \.gz; expected a folder with it, a hub id",
        ),
        ("mteb/scifact", "test", "mteb/scifact: no folder here has queries.jsonl*"),
    ],
)
def test_what_is_not_there_is_named(place, split, message):
    with pytest.raises(ValueError, match=message):
        load_beir(place, split)


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("cut.jsonl.gz", gzip.compress(b'{"a": 1}' * 99)[:-9], "cannot be read: .*end-of-stream"),
        ("plain.jsonl.gz", b"{}", "cannot be read: Not a gzipped file"),
        ("latin.jsonl", b'{}\n{"_id": "\xff"}', "2: expected UTF-8 text: .*0xff"),
    ],
)
def test_damaged_files_are_named(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"{name}: ?{message}"):
        list(data.read_jsonl(path))


def test_lists_have_their_best_passages_first(tmp_path):
    row = '{"query": "tide", "passages": {"1": "c", "3": ["b", "a "], "0": "d"}}'
    path = write_jsonl(tmp_path / "plain.jsonl", row)
    assert load_lists(path) == [GradedList("plain-1", "tide", ["b", "a", "c", "d"], [3, 3, 1, 0])]


def test_the_last_line_with_passages_counts(tmp_path, capsys):
    rows = """
        {"id": "1", "query": "tide", "passages": null}
        {"id": "2", "query": "tide", "passages": null}
        {"id": "1", "query": "tide", "passages": {"3": "a", "0": "b"}}
        {"id": "1", "query": "tide", "passages": {"3": "x", "0": "y"}}
        {"id": "1", "query": "tide", "passages": null}
    """
    path = write_jsonl(tmp_path / "cache.jsonl", rows)
    assert load_lists([path]) == [GradedList("1", "tide", ["x", "y"], [3, 0])]
    assert "1 of 2 queries have no relevant passage" in capsys.readouterr().err


def test_ids_of_several_queries_and_files_stay_unique(tmp_path):
    row = '{"id": "1", "query": "tide", "passages": {"3": "a", "0": "b"}}\n'
    one = write_jsonl(tmp_path / "x/lists.jsonl", row + row.replace("tide", "rust"))
    two = write_jsonl(tmp_path / "y/lists.jsonl", row)
    ids = ["1", "lists.jsonl:1", "lists.jsonl:lists.jsonl:1"]
    assert [item.id for item in load_lists([one, two, one])] == ids


@pytest.mark.parametrize(
    "row, message",
    [
        ('{"passages": {"3": "a"}}', ", or 'lists-2' in --queries: field 'query': expected text"),
        ('{"query": "q", "passages": {"3": ["a", "b"]}}', ": field 'passages': expected 2 or more"),
        ('{"query": "q", "passages": ["a", "b"]}', ": field 'passages': expected 2 or more grades"),
        (
            '{"query": "q", "passages": {"3.5": "a", "0": "b"}}',
            ": .*expected a whole grade: .*'3.5'",
        ),
        ('{"query": "q", "passages": {"": "a", "0": "b"}}', ": .*expected a whole grade: .*''"),
        (
            '{"query": "q", "passages": {"1": " ", "0": "b"}}',
            ".*field '1': expected text, found ' '",
        ),
    ],
)
def test_bad_lists_are_named(tmp_path, row, message):
    path = write_jsonl(tmp_path / "lists.jsonl", GOOD + row)
    with pytest.raises(ValueError, match=rf"lists\.jsonl:2{message}"):
        load_lists([path])


def test_lists_of_a_collection_with_queries_from_elsewhere(tmp_path, capsys):
    qrels = "q1\tp3\t2\nq1\tp9\t3\nq1\tp1\t3\nq2\tp2\t0\n"
    folder = write_collection(tmp_path / "sycl/llama33_70b", "train", qrels=qrels)
    (folder / "queries.jsonl").rename(tmp_path / "queries.jsonl")
    passages = ["Moon It raises tides.", "No title."]
    assert load_lists([folder], tmp_path) == [GradedList("q1", "the tide", passages, [3, 2])]
    assert "1 of 2 queries have no relevant passage, left out: 'q2'" in capsys.readouterr().err


def test_queries_that_do_not_ship_are_checked(tmp_path):
    sha256 = hashlib.sha256(b"why rust").hexdigest()
    row = {"id": "x", "query_sha256": sha256, "passages": {"3": "a", "0": "b"}}
    path = write_jsonl(tmp_path / "lists.jsonl", [row])
    queries = write_jsonl(tmp_path / "queries.jsonl", '{"_id": "x", "text": "Why  RUST"}')
    assert load_lists([path], tmp_path)[0].query == "Why  RUST"
    write_jsonl(queries, '{"_id": "x", "text": "why not"}')
    with pytest.raises(ValueError, match=r"lists\.jsonl:1: .* 'x' has another query there"):
        load_lists([path], tmp_path)


def test_the_split_is_the_one_of_all_runs():
    lists = graded_lists(50)
    rest, held = data.split_lists(lists, 0.1, seed=3)
    assert " ".join(item.id for item in held) == "l8 l15 l23 l34 l37"
    assert rest == [item for item in lists if item not in held]


def test_lists_as_a_collection():
    corpus, queries, qrels = as_collection([TIDE, IRON])
    assert queries == {"a": "tide", "b": "Rust "}
    assert " ".join(corpus) == "a-0 a-1 a-2 a-3 b-0 b-1"
    assert [*corpus.values()] == TIDE.passages + IRON.passages
    assert qrels["b"] == {"b-0": 1, "b-1": 0}


def test_a_batch_pads_short_lists():
    batch = collate([TIDE, IRON])
    assert batch.queries == ["tide", "Rust "]
    assert batch.passages == [*TIDE.passages, *IRON.passages, "", ""]
    assert torch.equal(batch.labels, torch.tensor([[3.0, 2, 1, 0], [1, 0, 0, 0]]))
    assert batch.mask.tolist() == [[True] * 4, [True, True, False, False]]


def test_no_question_of_wikiqa_ships():
    rows = data.read_jsonl(data.AUTHORED.with_name("wikiqa-graded.jsonl"))
    assert not [where for where, row in rows if "query" in row]
