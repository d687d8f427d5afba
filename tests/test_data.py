"""Collections: the BEIR layout, plain, gzipped and from a (local) hub data set; every bad row is named."""

import gzip
import json
import os
import warnings
from pathlib import Path

import pytest

from repro.data import DataError, _hub_rows, load_beir, read_corpus, read_qrels, read_queries
from repro.files import read_jsonl

CORPUS = [
    {"_id": "p1", "title": "Moon", "text": "The moon raises the tides."},
    {"_id": "p2", "title": "", "text": "Rust needs water."},
    {"_id": "p3", "text": "No title at all."},
]
QUERIES = [{"_id": "q1", "text": "what makes the tide"}, {"_id": "q2", "text": "why does iron rust"}, {"_id": "q3", "text": "unused"}]
QRELS = "query-id\tcorpus-id\tscore\nq1\tp1\t3\nq1\tp2\t0\nq2\tp2\t1\n"


def write(folder: Path, corpus: list | str = CORPUS, queries: list | str = QUERIES, qrels: str = QRELS, split: str = "test") -> Path:
    (folder / "qrels").mkdir(parents=True, exist_ok=True)
    for name, rows in (("corpus", corpus), ("queries", queries)):
        text = rows if isinstance(rows, str) else "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
    (folder / "qrels" / f"{split}.tsv").write_text(qrels, encoding="utf-8")
    return folder


def test_folder(tmp_path: Path) -> None:
    corpus, queries, qrels = load_beir(write(tmp_path))
    assert corpus == {"p1": "Moon The moon raises the tides.", "p2": "Rust needs water.", "p3": "No title at all."}
    assert queries == {"q1": "what makes the tide", "q2": "why does iron rust"}  # q3 has no judgment
    assert qrels == {"q1": {"p1": 3, "p2": 0}, "q2": {"p2": 1}}


def test_gzip_windows_lines_byte_order_mark_and_no_header(tmp_path: Path) -> None:
    plain = load_beir(write(tmp_path / "plain"))
    packed = write(tmp_path / "packed")
    for path in (packed / "corpus.jsonl", packed / "queries.jsonl", packed / "qrels/test.tsv"):
        with gzip.open(f"{path}.gz", "wb") as file:
            file.write(path.read_bytes())
        path.unlink()
    assert load_beir(packed) == plain
    windows = write(tmp_path / "windows", qrels="\ufeff" + QRELS.replace("\n", "\r\n"))
    assert load_beir(windows) == plain
    headless = write(tmp_path / "headless", qrels=QRELS.split("\n", 1)[1])
    assert load_beir(headless) == plain


def test_sample_ships_with_the_kit() -> None:
    corpus, queries, qrels = load_beir("sample")
    assert len(corpus) == 301 and len(queries) == 40 and sum(map(len, qrels.values())) == 390
    assert {grade for judged in qrels.values() for grade in judged.values()} == {0, 1, 2, 3}


def test_numeric_ids_and_unicode(tmp_path: Path) -> None:
    corpus = [{"_id": 7, "title": "Ærø", "text": "an island\u2028in one line"}]
    folder = write(tmp_path, corpus, [{"_id": "ö", "text": "où"}], "query-id\tcorpus-id\tscore\nö\t7\t2\n")
    assert load_beir(folder) == ({"7": "Ærø an island\u2028in one line"}, {"ö": "où"}, {"ö": {"7": 2}})


BAD = {
    "not JSON": ({"corpus": '{"_id": "p1", "text": "a"}\n{"_id": \n'}, r"corpus\.jsonl:2: expected one JSON object"),
    "a list": ({"corpus": "[1]\n"}, r"corpus\.jsonl:1: expected one JSON object, found list"),
    "no id": ({"corpus": '{"text": "a"}\n'}, r"corpus\.jsonl:1: field '_id': expected text, found no such field"),
    "text is a number": ({"corpus": '{"_id": "p1", "text": 3}\n'}, r"corpus\.jsonl:1: field 'text': expected text, found int 3"),
    "passage id twice": ({"corpus": CORPUS + [CORPUS[0]]}, r"corpus\.jsonl:4: field '_id': 'p1'"),
    "empty corpus": ({"corpus": ""}, "expected passages in the corpus, found none"),
    "query id twice": ({"queries": QUERIES + [QUERIES[1]]}, r"queries\.jsonl:4: field '_id': 'q2'"),
    "empty query": ({"queries": [{"_id": "q1", "text": "  "}]}, r"queries\.jsonl:1: field 'text': expected text, found it empty"),
    "unknown query": ({"qrels": QRELS + "q9\tp1\t1\n"}, r"test\.tsv:5: field 'query-id': 'q9'"),
    "unknown passage": ({"qrels": QRELS + "q1\tp9\t1\n"}, r"test\.tsv:5: field 'corpus-id': 'p9'"),
    "negative grade": ({"qrels": QRELS + "q2\tp1\t-1\n"}, r"test\.tsv:5: field 'score': .* found '-1'"),
    "half a grade": ({"qrels": QRELS + "q2\tp1\t1.5\n"}, r"test\.tsv:5: field 'score': .* found '1.5'"),
    "grade in words": ({"qrels": QRELS + "q2\tp1\thigh\n"}, r"test\.tsv:5: field 'score': .* found 'high'"),
    "grade nan": ({"qrels": QRELS + "q2\tp1\tnan\n"}, r"test\.tsv:5: field 'score': .* found 'nan'"),
    "two grades": ({"qrels": QRELS + "q1\tp1\t2\n"}, r"test\.tsv:5: field 'score': 'q1' and 'p1' have grade 3"),
    "spaces for tabs": ({"qrels": "q1 p1 3\n"}, r"test\.tsv:1: expected 3 tab-separated fields"),
    "no judgments": ({"qrels": "query-id\tcorpus-id\tscore\n"}, "expected judgments in split 'test', found none"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_rows_are_named(tmp_path: Path, name: str) -> None:
    parts, message = BAD[name]
    with pytest.raises(DataError, match=message):
        load_beir(write(tmp_path, **parts))


def test_bad_files_are_named(tmp_path: Path) -> None:
    folder = write(tmp_path / "a")
    with pytest.raises(DataError, match=r"qrels: expected dev\.tsv \(or \.gz\) there, found test\.tsv"):
        load_beir(folder, split="dev")
    (folder / "corpus.jsonl").write_bytes(b'{"_id": "p1", "text": "a"}\n{"_id": "p2", "text": "\xff"}\n')
    with pytest.raises(DataError, match=r"corpus\.jsonl:2: expected UTF-8 text, found byte 0xff"):
        load_beir(folder)
    torn = tmp_path / "torn.jsonl.gz"
    torn.write_bytes(gzip.compress(b'{"a": 1}\n' * 1000)[:-20])
    with pytest.raises(DataError, match=r"torn\.jsonl\.gz: cannot be read"):
        list(read_jsonl(torn))
    with pytest.raises(DataError, match="missing.jsonl: cannot be read after line 0: No such file"):
        list(read_jsonl(tmp_path / "missing.jsonl"))
    for name in ("no-such-thing", str(tmp_path / "nothing here")):
        with pytest.raises(DataError, match="expected a folder in BEIR layout, a hub id"):
            load_beir(name)


def test_harmless_oddities_are_counted_not_silent(tmp_path: Path) -> None:
    corpus = CORPUS + [{"_id": "p4", "title": "", "text": ""}]
    with pytest.warns(UserWarning) as seen:
        load_beir(write(tmp_path, corpus=corpus, qrels=QRELS + "q2\tp2\t1\n"))
    assert [str(w.message) for w in seen] == [
        "corpus: 1 of 4 passages have neither title nor text",
        "qrels: 1 judgments stand there twice with the same grade",
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_beir(write(tmp_path / "clean"))


def test_hub_layouts_on_a_local_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`datasets` reads a local folder through the code path of a hub id: configs, and bare BEIR files."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    expected = load_beir(write(tmp_path / "bare"))
    configured = write(tmp_path / "configured")
    (configured / "README.md").write_text(
        "---\nconfigs:\n"
        "- config_name: default\n  data_files:\n  - split: test\n    path: qrels/test.jsonl\n"
        "- config_name: corpus\n  data_files:\n  - split: corpus\n    path: corpus.jsonl\n"
        "- config_name: queries\n  data_files:\n  - split: queries\n    path: queries.jsonl\n---\n"
    )
    rows = [line.split("\t") for line in QRELS.splitlines()[1:]]
    judged = [{"query-id": q, "corpus-id": p, "score": float(s)} for q, p, s in rows]  # mteb stores floats
    (configured / "qrels" / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in judged))
    for folder in (tmp_path / "bare", configured):
        corpus = read_corpus(_hub_rows(str(folder), "corpus", "test"))
        queries = read_queries(_hub_rows(str(folder), "queries", "test"))
        qrels = read_qrels(_hub_rows(str(folder), "qrels", "test"), corpus, queries)
        assert (corpus, {q: queries[q] for q in qrels}, qrels) == expected


def test_hub_out_of_reach_is_one_sentence() -> None:
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    with pytest.raises(DataError, match=r"mteb/scifact \(qrels, test\): the hub did not deliver it"):
        load_beir("mteb/scifact")


def test_queries_from_another_folder(tmp_path: Path) -> None:
    expected = load_beir(write(tmp_path / "whole"))
    bare = write(tmp_path / "bare")
    (bare / "queries.jsonl").rename(tmp_path / "queries.jsonl")
    with pytest.raises(DataError, match="expected queries.jsonl"):
        load_beir(bare)
    assert load_beir(bare, queries_from=tmp_path) == expected
