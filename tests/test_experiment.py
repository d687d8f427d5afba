"""The experiment on a small WikiQA, with a stub for training; the lines that build a collection."""

import gzip
import json
import shutil
from pathlib import Path

import pytest
from conftest import graded_lists, write_lists

from repro.data import AUTHORED, as_collection, load_beir
from repro.experiment import arms, claims, report, run

Y = [3, 2, 1, 0]

@pytest.fixture
def wikiqa(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: Path) -> str:
    """A folder with 20 questions; small files take the place of the kit's lists."""
    monkeypatch.setattr(arms, "AUTHORED", write_lists(tmp_path / "authored.jsonl", 40))
    write_lists(tmp_path / "smollm2-135m.jsonl", 10)
    rows = write_lists(tmp_path / "wikiqa-graded.jsonl", 8).read_text().replace('"query"', '"left out"')
    (tmp_path / "wikiqa-graded.jsonl").write_text(rows)
    corpus, queries, qrels = as_collection(graded_lists(20))
    lines = {f"{part}.jsonl": [json.dumps({"_id": key, "text": text}) for key, text in texts.items()]
             for part, texts in (("corpus", corpus), ("queries", queries))}
    table = [f"{q}\t{p}\t{int(grade == 3)}" for q, row in qrels.items() for p, grade in row.items()]
    lines |= dict.fromkeys(("qrels/train.tsv", "qrels/test.tsv"), table)
    (tmp_path / "wikiqa" / "qrels").mkdir(parents=True)
    for name, rows in lines.items():
        (tmp_path / "wikiqa" / name).write_text("\n".join(rows))
    return str(tmp_path / "wikiqa")

def test_equal_trials_known_names_and_the_committed_pages() -> None:
    for start, shared in arms.STARTS.items():
        plans = [arms.draws(start, arm) for arm in arms.MAIN]
        assert {len({str(row) for row in plan}) for plan in plans} == {shared.trials} == {*map(len, plans)}
        assert plans == [arms.draws(start, arm) for arm in arms.MAIN]
    used = {name for _, *pair in (*claims.CLAIMS, *report.SECONDARY) for name in pair}
    assert used <= {"start", *(arm.name for arm in arms.MAIN)} and len({*report.NAMES}) == len(report.NAMES)
    assert report.main(["--check"]) == 0

def test_training_sets(wikiqa: str) -> None:
    sources = arms.Sources(wikiqa)
    sets = {"graded": (36, Y), "binary": (36, [1, 0, 0]), "merged": (36, [3, 0, 0, 0]), "ends": (36, [3, 0])}
    sets |= {"real": (14, [3, 1, 1]), "same questions": (8, Y), "synthetic + real": (8, [*Y, 3, 1, 1])}
    sets |= {"5 queries": (5, Y), "6 queries, binary": (6, [1, 0, 0])}
    found = {name: sources.training_set(name, 0) for name in (*sets, "authored", "smollm2")}
    for name, (count, grades) in sets.items():
        assert len(found[name]) == count and all(item.grades == grades for item in found[name]), name
    asked = {name: [item.query for item in lists] for name, lists in found.items()}
    assert asked["authored"] == asked["smollm2"] and 5 < len(asked["authored"]) <= 10
    assert not {item.query for item in sources.held_out} & {*asked["graded"]}
    assert len(sources.questions) == 6 and not sources.questions & {item.id for item in found["real"]}

def test_bad_input_is_refused_before_any_run(wikiqa: str, monkeypatch, capsys) -> None:
    monkeypatch.delattr(run.Study, "record")
    for place, message in (("no-such", "no-such: expected a folder"), (wikiqa + "/.", "the same name")):
        assert run.main(["--wikiqa", wikiqa, "--data", wikiqa, place]) == 2
        assert message in capsys.readouterr().err
    for more in (["--arm", "1-D V"], ["--start", "all-minilm-l6-v2", "--group", "queries"]):
        with pytest.raises(SystemExit):
            run.main(["--wikiqa", wikiqa, *more])

def test_runs_are_recorded_once(wikiqa: str, tmp_path: Path, tiny_bert: Path, monkeypatch, capsys) -> None:
    done, name, fit = [], tiny_bert.name, run.train_encoder
    monkeypatch.setitem(arms.STARTS, name, arms.Start(30, 2, 2, (1e-2, 1e-5), (0.5,), freeze=0))
    monkeypatch.setattr(run, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(run, "train_encoder", lambda encoder, lists, config: done.append(
        (config, sum(p.sum().item() for p in encoder.parameters()))) or fit(encoder, lists, config))
    monkeypatch.chdir(tiny_bert.parent)
    command = ["--wikiqa", wikiqa, "--start", name, "--arm", "1-D W", "--dtype", "float32", "--data", wikiqa]
    counts = [(run.main([*command, *more]), len(done)) for more in ((), (), ("sample",))]
    found, table = claims.read_runs(run.RESULTS), claims.read_tuning(run.RESULTS)[name]["1-D W"]
    assert counts == [(0, 4), (0, 4), (0, 6)] and [run["seed"] for run in found] == [None, 0, 1, None]
    assert all({*r["collections"]} == {"sample", "wikiqa"} for r in found)
    assert len({str(r["per_query"]) for r in found}) == 4  # two seeds, the start and BM25 are four models
    best, *_, worst = sorted(table["trials"], key=lambda trial: -trial["ndcg@10"])
    assert best["ndcg@10"] > worst["ndcg@10"] and table["best"].items() <= best.items()
    assert len(table["trials"]) == 2 * len(arms.AVERAGES) and len({begun for _, begun in done}) == 1
    assert [config.seed for config, _ in done] == [0, 0, 0, 1, 0, 1]
    assert all(table["best"].items() <= vars(config).items() for config, _ in done[2:])
    assert run.main([*command[:-3], "bfloat16", "--data", str(shutil.copytree(wikiqa, tmp_path / "b"))]) == 2
    assert len(done) == 6 and "has dtype 'float32', this run 'bfloat16'" in capsys.readouterr().err

def test_the_lines_that_build_dl19_pool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("cached_prompts").mkdir()
    Path("cached_prompts/dl19-pool.ids.gz").write_bytes(gzip.compress(b"7\n9\n"))
    Path("collection.tsv").write_text('7\ta "moon"\r high\n8\tno\n9\ttea\n', encoding="utf-8")
    Path("msmarco-test2019-queries.tsv").write_text("1\twhat is up\n2\tnot judged\n")
    Path("2019qrels-pass.txt").write_text("1 Q0 7 3\n1 Q0 9 0\n")
    exec(AUTHORED.with_name("README.md").read_text("utf-8").split("```python\n")[1].split("```")[0], {})
    found = {"7": 'a "moon"\r high', "9": "tea"}, {"1": "what is up"}, {"1": {"7": 3, "9": 0}}
    assert load_beir("dl19-pool") == found
