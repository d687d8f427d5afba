"""Collections, graded lists and their recipes; every bad row is named."""

import gzip
import hashlib
import json
from pathlib import Path

import datasets
import pytest
import torch

from repro import data
from repro.data import GradedList, as_collection, collate, combine, load_beir, load_lists, real_lists, recipe

CACHED = Path(data.__file__).parents[1] / "cached_prompts"
HEADER = "query-id\tcorpus-id\tscore\n"
QRELS = HEADER + "q1\tp1\t3\nq1\tp2\t0\nq1\tp3\t0\nq1\tp4\t1\nq2\tp2\t1\nq2\tp3\t0\n"
P1 = '{"_id": "p1", "title": "Moon", "text": "The moon raises the tides."}\n'
P2 = '{"_id": "p2", "title": "", "text": "Rust needs water."}\n'
CORPUS = P1 + P2 + '{"_id": "p3", "text": "No title."}\n{"_id": "p4", "title": null, "text": ""}\n'
QUERIES = [{"_id": f"q{n}", "text": text} for n, text in ((1, "the tide"), (2, " Why rust"), (3, "unused"))]
A = GradedList("a", "tide", ["moon tide", "moon", "bank", "tea"], [3, 2, 1, 0])
B = GradedList("b", "Rust ", ["iron rust", "tea"], [1, 0])

def lines(path: Path, rows: list | str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(rows, list):
        rows = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_bytes(rows if isinstance(rows, bytes) else rows.encode())
    return path

def write(folder: Path, split: str = "test", **parts: list | str | bytes) -> Path:
    lines(folder / "corpus.jsonl", parts.get("corpus", CORPUS))
    lines(folder / "queries.jsonl", parts.get("queries", QUERIES))
    lines(folder / f"qrels/{split}.tsv", parts.get("qrels", QRELS))
    return folder

def refused(message: str, call, *args) -> None:
    with pytest.raises(ValueError, match=message):
        call(*args)

def test_folder_and_sample(tmp_path: Path) -> None:
    corpus, queries, qrels = load_beir(write(tmp_path))
    assert list(corpus.values()) == ["Moon The moon raises the tides.", "Rust needs water.", "No title.", ""]
    assert queries == {"q1": "the tide", "q2": "Why rust"}  # q3 has no judgment
    assert qrels == {"q1": {"p1": 3, "p2": 0, "p3": 0, "p4": 1}, "q2": {"p2": 1, "p3": 0}}
    assert [len(part) for part in load_beir("sample")] == [301, 40, 40]

def test_other_spellings_of_the_same_folder(tmp_path: Path) -> None:
    expected, packed = load_beir(write(tmp_path / "plain")), write(tmp_path / "packed")
    for path in [*packed.glob("*.jsonl"), packed / "qrels/test.tsv"]:
        lines(path.rename(f"{path}.gz"), gzip.compress(path.with_name(f"{path.name}.gz").read_bytes()))
    assert load_beir(packed) == expected
    assert load_beir(write(tmp_path / "headless", qrels=QRELS.removeprefix(HEADER))) == expected
    windows = write(tmp_path / "w", qrels="\ufeff" + QRELS.replace("\n", "\r\n"), corpus="\ufeff" + CORPUS)
    assert load_beir(windows) == expected
    (windows / "queries.jsonl").rename(tmp_path / "queries.jsonl")
    assert load_beir(windows, queries_from=tmp_path) == expected
    corpus, queries = [{"_id": 7, "title": "Ærø", "text": "\u2028in"}], [{"_id": 5, "text": "où"}]
    numbers = write(tmp_path / "n", corpus=corpus, queries=queries, qrels="5\t7\t2\n")
    assert load_beir(numbers) == ({"7": "Ærø in"}, {"5": "où"}, {"5": {"7": 2}})

@pytest.mark.parametrize("part, content, message", [
    ("corpus", P1 + '{"_id": \n', ":2: expected one JSON object"), ("qrels", "q1 p1 3\n", ":1: expected 3 f"),
    ("corpus", "[1]\n", ":1: expected one JSON object, found list"), ("queries", P1 + P1, ":2: .*': 'p1'"),
    ("corpus", P1 + '{"_id": "p2", "text": "a", "text": "b"}\n', ":2: .*'text' stands there twice"),
    ("corpus", '{"_id": "p1", "text": "\\ud800"}\n', ":1: .*surrogates not allowed"),
    ("corpus", P1.encode() + b'{"_id": "p2", "text": "\xff"}\n', ":2: expected UTF-8 text, found byte 0xff"),
    ("queries", P1 + '{"_id": "q1", "text": "  "}\n', ":2: field 'text': expected text, found str '  '"),
    ("qrels", HEADER + "q9\tp1\t1\n", ":2: field 'query-id': 'q9'"),
    ("qrels", HEADER + "q1\tp1\t1\nq1\tp9\t1\n", ":3: field 'corpus-id': 'p9' is not in the corpus"),
    ("qrels", "q1\tp1\t3\nq1\tp1\t2\n", ":2: field 'score': 'q1', 'p1' have grade 3"),
    ("qrels", "corpus-id\tquery-id\tscore\nq1\tp1\t1\n", ":1: expected 3 fields .*found .'corpus-id'"),
    ("qrels", "q1\tp1\thigh\nq1\tp2\t1\n", ":1: expected 3 fields .*'high'")])  # was taken for a header
def test_bad_rows_are_named(tmp_path: Path, part: str, content: str | bytes, message: str) -> None:
    refused(rf"{part}\S*{message}", load_beir, write(tmp_path, **{part: content}))

def test_grades(tmp_path: Path) -> None:
    assert load_beir(write(tmp_path, qrels="q1\tp1\t-1\nq1\tp2\t2\n"))[2] == {"q1": {"p1": 0, "p2": 2}}
    for grade in ("1.5", "- 1", "high", "nan", "1_0", "3.0", "+3", "٣", ""):
        folder = write(tmp_path, qrels=QRELS + f"q2\tp1\t{grade}\n")
        refused(r"test\.tsv:8: field 'score': expected a whole grade", load_beir, folder)
    assert [data.as_grade(value, "x:1") for value in ("3", 3, 3.0, "0", 10**6)] == [3, 3, 3, 0, 10**6]
    for value in (True, None, 1.5, -1, float("nan"), float("inf"), [3], "³"):
        refused("x:1: expected a whole grade", data.as_grade, value, "x:1")

def test_bad_places_and_archives_are_named(tmp_path: Path) -> None:
    refused(r"expected a folder with qrels/dev\.tsv \(or \.gz\)", load_beir, write(tmp_path), "dev")
    refused("expected judgments in split 'test', found none", load_beir, write(tmp_path, qrels=HEADER))
    for name in ("no-such-thing", str(tmp_path / "nothing here")):
        refused("expected a folder with .*, a hub id, or 'sample'", load_beir, name)
    refused(r"mteb/scifact \(queries\.jsonl\): neither here nor from the hub", load_beir, "mteb/scifact")
    whole = gzip.compress(b'{"a": 1}\n' * 1000)
    for broken in (whole[:-20], whole[:30] + b"\0" + whole[31:], whole[:-8] + bytes(8), b"no gzip"):
        rows = data.read_jsonl(lines(tmp_path / "broken.jsonl.gz", broken))
        refused(r"broken\.jsonl\.gz: cannot be read after line \d+: .", list, rows)

HUB = {"o/set": ["default", "corpus"], "o/apart": ["corpus"], "o/bare": ["default"], "o/bare/folder": []}
@pytest.mark.parametrize("name", HUB)
def test_hub_layouts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """A config a part, judgments apart, bare files, and in a folder; `datasets` reads local files here."""
    expected, load = load_beir(write(tmp_path / name)), datasets.load_dataset
    rows = [dict(zip(data.COLUMNS, line.split(), strict=True)) for line in QRELS.splitlines()[1:]]
    rows = [row | {"score": float(row["score"])} for row in rows]  # as mteb stores them
    lines(tmp_path / (f"{name}-qrels" if name == "o/apart" else name) / "default.jsonl", rows)
    def load_dataset(name: str, config: str | None, split: str | None = None) -> object:
        file = str(tmp_path / name / f"{config or 'default'}.jsonl")
        return load("json", data_files={split or "any": file}, split=split, cache_dir=str(tmp_path))
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(datasets, "get_dataset_config_names", HUB.__getitem__)
    monkeypatch.setattr(data, "hf_hub_download", lambda name, file, repo_type: str(tmp_path / name / file))
    assert load_beir(name) == expected

def test_caches_and_plain_lists(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    good = {"1": "c", "3": "a ", "2": "b", "0": "d"}
    plain = lines(tmp_path / "plain.jsonl", [{"query": "tide", "passages": good}])
    assert load_lists([plain]) == [GradedList("plain-1", "tide", list("abcd"), [3, 2, 1, 0])]
    rows = [{"id": i, "query": q, "passages": None, "error": "torn"} for i, q in (("1", "a"), ("2", "b"))]
    rows += [{"id": "1", "query": "a", "passages": p} for p in ({"3": "old", "0": "o"}, {"3": "x", "0": "y"})]
    packed = lines(tmp_path / "cache.jsonl.gz", [*rows, rows[0]])
    packed.write_bytes(gzip.compress(packed.read_bytes()))
    assert load_lists([packed]) == [GradedList("1", "a", ["x", "y"], [3, 0])]
    assert "1 of 2 queries have no passages" in capsys.readouterr().err
    again, third = (lines(tmp_path / name, rows[2:]) for name in ("again.jsonl", "b/again.jsonl"))
    assert [x.id for x in load_lists([packed, again, third])] == ["1", "again.jsonl:1", f"{third}:1"]
    refused("named twice", load_lists, [again, again])
    refused("found none", load_lists, [again, lines(tmp_path / "none.jsonl", "")])
    clash = lines(tmp_path / "clash.jsonl", [*rows, {"id": "1", "query": "another", "passages": good}])
    refused(r"clash\.jsonl:5: .*'1' has another query at .*clash\.jsonl:1", load_lists, clash)

@pytest.mark.parametrize("row, message", [
    ({"passages": {"3": "a", "0": "b"}}, "field 'query': expected text, found no such field"),
    ({"id": 7, "passages": {"3": "a", "0": "b"}}, "no 'query': bring the collection with query '7'"),
    ({"query": "q"}, "field 'passages': expected 2 or more grades, each once, found ''"),
    *(({"query": "q", "passages": passages}, f"field 'passages': {message}") for passages, message in [
        ({"3": "a"}, "expected 2 or more grades"), (["a", "b"], "expected 2 or more grades"),
        ({"3": "a", "03": "b", "0": "c"}, "expected .* each once"),
        ({"3": "a", "3.0": "b", "0": "c"}, "expected a whole grade .* found '3.0'"),
        ({"3": "a", "0": "  "}, "field '0': expected text, found str '  '"),
        ({"3": "a", "0": None}, "field '0': expected text, found NoneType")])])
def test_bad_lists_are_named(tmp_path: Path, row: dict, message: str) -> None:
    path = lines(tmp_path / "bad.jsonl", [{"query": "q", "passages": {"1": "a", "0": "b"}}, row])
    refused(rf"bad\.jsonl:2: .*{message}", load_lists, [path])

def test_the_released_layout(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    msmarco, qrels = write(tmp_path / "msmarco"), "q1\tp3\t2\nq1\tp1\t3\nq2\tp2\t0\n"
    folder = write(tmp_path / "sycl/llama33_70b", "train", qrels=qrels)
    (folder / "queries.jsonl").unlink()
    item = GradedList("q1", "the tide", ["Moon The moon raises the tides.", "No title."], [3, 2])
    assert load_lists([folder], queries_from=msmarco) == [item]
    assert "1 of 2 queries have no relevant passage" in capsys.readouterr().err
    refused(r"expected a folder with queries\.jsonl", load_lists, [folder])
    own = write(tmp_path / "own", "train", queries=[{"_id": "q1", "text": "own"}], qrels="q1\tp1\t1\n")
    assert load_lists([own], queries_from=msmarco)[0].query == "own"

def test_what_ships_without_its_third_party_text(tmp_path: Path) -> None:
    rows = [row for _, row in data.read_jsonl(CACHED / "wikiqa-graded.jsonl")]
    fields = ("id", "query_sha256", "prompt_version", "generator", "passages")
    assert {(*row, *row["passages"]) for row in rows} == {(*fields, *"3210")} and len(rows) == 360
    write(tmp_path, queries=[{"_id": row["id"], "text": f"Question {row['id']}"} for row in rows])
    refused("'train-0' is another query", load_lists, [CACHED / "wikiqa-graded.jsonl"], tmp_path)
    mine = [rows[7] | {"query_sha256": hashlib.sha256(b"question train-7").hexdigest()}]
    [item] = load_lists([lines(tmp_path / "mine.jsonl", mine)], tmp_path)
    assert item.query == "Question train-7" and item.passages == list(rows[7]["passages"].values())
    ids = [int(line) for line in gzip.decompress((CACHED / "dl19-pool.ids.gz").read_bytes()).split()]
    assert ids == sorted(set(ids)) and len(ids) == 22_917 and ids[-1] < 8_841_823  # MS MARCO's passages

def test_recipes() -> None:
    lists = [GradedList(str(n), "q", A.passages[::-1], A.grades[::-1]) for n in range(50)]
    shaped = {name: recipe(lists, name, 0) for name in data.RECIPES}
    kinds = {name: {(*x.passages, *x.grades) for x in shaped[name]} for name in shaped}
    assert shaped["graded"] == lists and [item.id for item in shaped["binary"]] == [item.id for item in lists]
    assert kinds["binary"] == {("moon tide", "bank", "tea", 1, 0, 0), ("moon", "bank", "tea", 1, 0, 0)}
    assert kinds["ends"] == {("moon tide", "tea", 3, 0)} and kinds["merged"] == {(*A.passages, 3, 0, 0, 0)}
    assert shaped["binary"][9:] == recipe(lists[9:], "binary", 0) != recipe(lists[9:], "binary", 1)
    assert 15 < sum(x.passages[0] == "moon" for x in shaped["binary"]) < 35
    refused(r"expected grades 3, 2, 1, 0; 'b' has \[1, 0\]", recipe, [A, B], "binary", 0)
    refused("expected one of graded, binary, ends, merged, got 'best'", recipe, [A], "best", 0)

def test_real_lists(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder = write(tmp_path / "c", "train", qrels=QRELS + "q3\tp1\t0\n")
    p1, p2, p3, p4 = load_beir(folder, "train")[0].values()
    drawn = [real_lists(folder, seed=seed) for seed in range(30)]
    assert {x.passages[0] for x, _ in drawn} == {p1, p4}  # p4 has grade 1: a positive, too
    assert all({*x.passages[1:]} == {p2, p3} and x.grades == [3, 1, 1] for x, _ in drawn)
    assert all(x == GradedList("q2", "Why rust", [p2, p3], [3, 1]) for _, x in drawn)
    assert drawn[4] == real_lists(folder, seed=4) and "1 of 3 queries lack" in capsys.readouterr().err
    q2, other = {"qid": "q2"}, {"qid": "q8", "docid": ["p7"]}
    row = q2 | {"docid": ["p4", "p2", "p1", "p3"], "score": [9.5, 8, 7, 1]}
    mined = lines(tmp_path / "train_qrels.jsonl", [row, other])
    drawn = [real_lists(folder, mined, seed) for seed in range(50)]
    assert all(x.id == "q2" and x.passages[0] == p2 for (x,) in drawn)
    assert len({tuple(x.passages) for (x,) in drawn}) == 6  # ordered pairs of p1, p3, p4
    for bad in ([row, row], [q2 | {"docid": "p1"}], [{"docid": []}], [q2 | {"docid": ["p9"]}]):
        refused(r"b\.jsonl:[12]: .*(qid|docid)", real_lists, folder, lines(tmp_path / "b.jsonl", bad))
    refused("found none", real_lists, folder, lines(tmp_path / "b.jsonl", [other]))
    (folder / "corpus.jsonl").unlink()  # a wrong name is found before the collection is read
    refused(r"expected a folder with x\.jsonl", real_lists, folder, tmp_path / "x.jsonl")

def test_combine(capsys: pytest.CaptureFixture) -> None:
    real = [GradedList(i, q, ["p", "n", "m"], [3, 1, 1]) for i, q in (("r", " TIDE"), ("s", "else"))]
    joined = GradedList("a", "tide", [*A.passages, "p", "n", "m"], [3, 2, 1, 0, 3, 1, 1])
    assert combine([A, B], real) == [joined, B]
    assert "1 of 2 real lists have no synthetic partner" in capsys.readouterr().err
    refused("combine: .*: 2 of 2 real lists have no synthetic partner", combine, [B], real)

def test_split_collection_and_batch() -> None:
    lists = [GradedList(str(n), "q", ["x"], [1]) for n in range(50)]
    rest, held = data.split_lists(lists, 0.1, seed=3)
    assert [item.id for item in held] == ["8", "15", "23", "34", "37"]  # golden: as in all earlier runs
    assert sorted([*rest, *held], key=lambda item: int(item.id)) == lists and len(rest) == 45
    corpus, queries, qrels = as_collection([A, B])
    assert queries == {"a": "tide", "b": "Rust "} and list(corpus.values()) == A.passages + B.passages
    assert list(corpus) == ["a-0", "a-1", "a-2", "a-3", "b-0", "b-1"] and qrels["b"] == {"b-0": 1, "b-1": 0}
    batch = collate([A, B])
    assert batch.queries == ["tide", "Rust "] and batch.passages == [*A.passages, *B.passages, "", ""]
    assert torch.equal(batch.labels, torch.tensor([[3.0, 2, 1, 0], [1, 0, 0, 0]]))
    assert batch.mask.tolist() == [[True] * 4, [True, True, False, False]]
    refused("at least one list", collate, [])
    refused("1 lists have the id", as_collection, [A, A])
