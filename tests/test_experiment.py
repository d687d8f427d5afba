"""The experiment: what arms are, the rule, the records, one run in small, the page."""

from dataclasses import asdict
from itertools import chain
from pathlib import Path

import pandas as pd
import pytest
from conftest import graded_lists, write_jsonl, write_lists

from repro.compare import Comparison
from repro.data import as_collection
from repro.encoder import BiEncoder
from repro.experiment import arms, claims, report, run

RECORDED = claims.read_runs(claims.RESULTS)


def changed(one: arms.Arm, other: arms.Arm) -> set[str]:
    """The fields in which two arms differ, but for their names."""
    pairs = asdict(one).items() ^ asdict(other).items()
    return {field for field, _ in pairs} - {"name", "tuned_as"}


@pytest.mark.parametrize("below, above, label", arms.LADDER)
def test_a_rung_changes_one_thing(below, above, label):
    assert len(changed(arms.BY_NAME[below], arms.BY_NAME[above])) == 1


@pytest.mark.parametrize("group", arms.CHANGES)
def test_an_ablation_changes_its_field_alone(group):
    for arm in arms.ABLATIONS[group]:
        assert changed(arm, arms.BY_NAME[arm.tuned_as]) == {arms.CHANGES[group][0]}


@pytest.fixture
def sources(tmp_path, monkeypatch):
    """Lists beside a small WikiQA: one relevant and two other sentences for each of 8 questions.

    Half of the questions have graded lists.
    """
    corpus, questions, qrels = [], [], []
    for n in range(8):
        questions.append({"_id": f"train-{n}", "text": f"question {n}"})
        for j, grade in enumerate((1, 0, 0)):
            corpus.append({"_id": f"p{n}-{j}", "text": f"sentence {n} {j}"})
            qrels.append(f"train-{n}\tp{n}-{j}\t{grade}\n")
    wikiqa = tmp_path / "wikiqa"
    write_jsonl(wikiqa / "corpus.jsonl", corpus)
    write_jsonl(wikiqa / "queries.jsonl", questions)
    write_jsonl(wikiqa / "qrels/train.tsv", "".join(qrels))
    passages = {"3": "a", "2": "b", "1": "c", "0": "d"}
    graded = [{"id": f"train-{n}", "passages": passages} for n in range(4)]
    write_jsonl(tmp_path / "wikiqa-graded.jsonl", graded)
    authored = write_lists(tmp_path / "authored.jsonl", 120)
    monkeypatch.setattr(arms, "AUTHORED", authored)
    monkeypatch.setattr(arms, "QUESTIONS", 2)
    return arms.load_sources(wikiqa, seeds=2)


def test_no_arm_trains_on_development_data(sources):
    used = {item.id for item in chain(sources.authored, *sources.real)}
    for _, _, qrels in sources.development:
        assert used.isdisjoint(qrels)


@pytest.mark.parametrize(
    "name, grades",
    [
        ("KL", [3, 2, 1, 0]),
        ("InfoNCE", [3, 0, 0]),
        ("InfoNCE, real", [3, 1, 1]),
        ("1-D W, same questions", [3, 2, 1, 0]),
        ("1-D W, synthetic + real", [3, 2, 1, 0, 3, 1, 1]),
    ],
)
def test_the_lists_of_an_arm(sources, name, grades):
    assert arms.arm_lists(arms.BY_NAME[name], sources, seed=1)[0].grades == grades


def test_an_ablation_takes_so_many_queries(sources):
    assert len(arms.arm_lists(arms.ABLATIONS["queries"][0], sources, seed=0)) == 100


@pytest.mark.parametrize(
    "difference, high, p, expected",
    [
        (0.02, 0.03, 0.05, "holds"),
        (-0.02, -0.01, 0.05, "reversed"),
        (0.001, 0.009, 0.2, "no gain of .01"),
        (0.001, 0.02, 0.2, "undecided"),
    ],
)
def test_the_rule(difference, high, p, expected):
    assert claims.verdict(Comparison(difference, -0.03, high, p, 10), p) == expected


def rows_of(arm: str, seed: str, value: float, queries: int = 30) -> pd.DataFrame:
    """A run that has the same queries and values in all collections."""
    rows = []
    for name in claims.COLLECTIONS:
        rows += [("base", arm, seed, name, f"q{n}", value + n / 1000) for n in range(queries)]
    return pd.DataFrame(rows, columns=claims.COLUMNS)


def test_seeds_are_averaged_query_by_query():
    runs = [rows_of("1-D W", "0", 0.4), rows_of("1-D W", "1", 0.6), rows_of("start", "", 0.3)]
    found = claims.judge(pd.concat(runs), "base", "1-D W")[1].fresh
    assert found[:3] == pytest.approx((0.2, 0.2, 0.2))
    assert found.queries == 3 * 30


def test_runs_of_different_queries_are_refused():
    runs = pd.concat([rows_of("1-D W", "0", 0.4), rows_of("start", "", 0.3, queries=29)])
    with pytest.raises(ValueError, match="finite"):
        claims.judge(runs, "base", "1-D W")


def test_an_arm_that_was_not_run_is_not_judged():
    rows = claims.judge(rows_of("KL", "0", 0.4), "base", "1-D W")
    assert {row.verdict for row in rows} == {"not measured"}


def test_robustness_is_judged_on_shifted_collections():
    label, *_, names = claims.claims_of("1-D W")[2]
    assert label == "C3"
    assert names == ("cranfield", "scifact", "npl", "csfcube")


def add(folder: Path, seed: int, **values: float) -> None:
    record = {"start": "base", "arm": "KL", "seed": seed}
    key = claims.key_of(record)
    rows = [(*key, "npl", query, value) for query, value in values.items()]
    claims.add_run(folder, record, rows)


def test_records_in_any_order_give_the_same_bytes(tmp_path):
    found = []
    for seeds in ((0, 1, 2), (2, 0, 1)):
        folder = tmp_path / str(seeds)
        folder.mkdir()
        for seed in seeds:
            add(folder, seed, a=seed / 10, b=0.5)
        found.append([path.read_bytes() for path in sorted(folder.iterdir())])
    assert found[0] == found[1]


def test_records_read_back(tmp_path):
    add(tmp_path, None, **{"001": 0.25, "2": 0.5})
    expected = [["base", "KL", "", "npl", "001", 0.25], ["base", "KL", "", "npl", "2", 0.5]]
    assert claims.read_runs(tmp_path).values.tolist() == expected


def test_rows_of_a_run_without_a_record_are_replaced(tmp_path):
    add(tmp_path, 0, q=0.25)
    (tmp_path / "runs.jsonl").unlink()  # as if a kill had come between the two files
    add(tmp_path, 0, q=0.5)
    assert claims.read_runs(tmp_path)[claims.SCORE].tolist() == [0.5]


@pytest.fixture
def study(tiny_bert, tmp_path):
    lists = graded_lists()
    sources = arms.Sources(lists, lists, [lists], [as_collection(lists)])
    place = {"commit": "abc", "machine": {}, "dtype": "float32"}
    return run.Study("all-minilm-l6-v2", BiEncoder.load(tiny_bert, "cpu"), sources, place, tmp_path)


def test_a_run_is_recorded_once(study, capsys):
    collections = {"tiny": as_collection(graded_lists())}
    for _ in range(2):
        run.do(study, collections, arms.BY_NAME["KL"], 0)
    assert capsys.readouterr().out.count("KL 0") == 1


def test_the_multiple_is_of_the_fitted_temperature(study):
    ablation = arms.ABLATIONS["temperature"][9]
    fitted = run.trained(study, arms.BY_NAME[ablation.tuned_as], 1e-3, seed=0)[1]
    other = run.trained(study, ablation, 1e-3, seed=0)[1]
    expected = ablation.multiple * fitted["temperature"]
    assert other["temperature"] == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize(
    "values, expected",
    [
        ({0.001: 0.2, 0.002: 0.3, 0.004: 0.8, 0.008: 0.9, 0.016: 0.1}, 0.008),
        ({0.00025: 0.2, 0.0005: 0.9, 0.001: 0.8, 0.002: 0.3, 0.004: 0.3}, 0.0005),
    ],
)
def test_tuning_tries_beyond_an_edge_and_each_rate_once(study, monkeypatch, values, expected):
    monkeypatch.setitem(arms.STARTS, study.start, arms.Start((0.001, 0.002, 0.004), 1, 1))
    monkeypatch.setattr(run, "trained", lambda study, arm, rate, seed: (values.pop(rate), {}))

    def evaluated(value: float, *collection: dict, **settings: object) -> dict:
        return {"metrics": {claims.SCORE: value}}

    monkeypatch.setattr(run, "evaluate_model", evaluated)
    assert run.tune(study, arms.BY_NAME["KL"]) == expected
    assert run.tune(study, arms.BY_NAME["KL"]) == expected  # from the record


def test_a_missing_collection_is_refused(tmp_path, capsys):
    assert run.main(["--data", str(tmp_path)]) == 2
    assert "dl19-pool: expected a folder" in capsys.readouterr().err


def test_a_typo_is_refused(capsys):
    with pytest.raises(SystemExit):
        run.main(["--data", "data", "--arm", "InfoNC"])
    assert "invalid choice: 'InfoNC'" in capsys.readouterr().err


def test_a_share_has_a_number_and_a_count(capsys):
    assert run.main(["--data", "data", "--share", "2", "1"]) == 2
    assert "--share: expected I N" in capsys.readouterr().err


def test_the_means_of_a_record_are_those_of_its_rows():
    means = RECORDED.groupby([*claims.KEY, "collection"])[claims.SCORE].mean()
    for record in claims.read_records(claims.RESULTS):
        found = record["collections"].items()
        stored = {name: one["metrics"]["ndcg@10"] for name, one in found}
        assert means[tuple(claims.key_of(record))].to_dict() == pytest.approx(stored, abs=2e-5)


def test_the_page_is_what_the_records_give():
    folder = claims.RESULTS
    text = report.page(RECORDED, claims.read_records(folder), claims.read_tuning(folder))
    assert text == (folder / "README.md").read_text(encoding="utf-8")


def test_readme_shows_the_verdicts_of_the_records():
    assert report.summary(RECORDED) in report.README.read_text(encoding="utf-8")
