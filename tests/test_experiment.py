"""The experiment's arms and runs: equal trials, names that the claims know, refusals before any run."""

import argparse
import gzip
import json
from pathlib import Path

import pytest

from repro.data import load_beir
from repro.experiment import claims, report, run
from repro.experiment.arms import ABLATIONS, MAIN, STARTS, draws

@pytest.mark.parametrize("start", STARTS)
def test_every_arm_gets_the_same_number_of_distinct_trials(start: str) -> None:
    for arm in MAIN:
        rows = draws(start, arm)
        assert rows == draws(start, arm) and len(rows) == STARTS[start].trials
        assert all(row not in rows[:n] for n, row in enumerate(rows))

def test_claims_name_arms_that_there_are_and_the_committed_page_is_theirs() -> None:
    names = {arm.name for arm in MAIN} | {"start"}
    assert {name for _, *pair in (*claims.CLAIMS, *report.SECONDARY) for name in pair} <= names
    every = [arm.name for arms in (MAIN, *ABLATIONS.values()) for arm in arms]
    assert len(every) == len(set(every))
    assert report.main(["--check"]) == 0

def test_bad_input_is_refused_before_any_run(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for name in ("a", "b"):
        (tmp_path / name / "same").mkdir(parents=True)
    same = [str(tmp_path / name / "same") for name in ("a", "b")]
    for options, message in ((["sample", "no-such-folder"], "no-such-folder"), (same, "same")):
        assert run.main(["--wikiqa", "sample", "--data", *options]) == 2
        assert message in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run.main(["--wikiqa", "sample", "--arm", "1-D V"])
    with pytest.raises(SystemExit):
        run.main(["--data", "sample"])

def test_a_run_that_is_recorded_is_not_repeated() -> None:
    arguments = argparse.Namespace(group=["main"], arm=["1-D W"])
    wanted = run.jobs(arguments, "base")
    assert [(g, arm.name, seed) for g, arm, seed in wanted] == [("main", "1-D W", n) for n in range(5)]
    done = {(r["start"], r["arm"], r["seed"]) for r in claims.read_runs(claims.RESULTS)}
    assert {("base", arm.name, seed) for _, arm, seed in wanted} <= done

def test_the_lines_that_build_dl19_pool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cached_prompts").mkdir()
    with gzip.open(tmp_path / "cached_prompts" / "dl19-pool.ids.gz", "wt") as file:
        file.write("7\n9\n")
    (tmp_path / "collection.tsv").write_text("7\tthe moon\n8\tno\n9\ttea\n")
    (tmp_path / "2019qrels-pass.txt").write_text("1 Q0 7 3\n1 Q0 9 0\n1 Q0 8 1\n")
    (tmp_path / "msmarco-test2019-queries.tsv").write_text("1\twhat is up\n2\tnot judged\n")
    exec(report.BUILD, {})
    corpus, queries, qrels = load_beir(tmp_path / "dl19-pool")
    assert (corpus, queries) == ({"7": "the moon", "9": "tea"}, {"1": "what is up"})
    assert qrels == {"1": {"7": 3, "9": 0}}
    assert json.loads((tmp_path / "dl19-pool" / "corpus.jsonl").read_text().splitlines()[0])["title"] == ""
