"""The experiment: what arms are, the rule, the records, one run in small, the page."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from conftest import graded_lists

from repro.compare import Comparison
from repro.data import as_collection
from repro.encoder import BiEncoder
from repro.experiment import arms, claims, report, run

CHANGES = ("loss", "lists", "ties", "label_temperature", "multiple", "queries")


def rows_of(arm: str, seed: str, values: dict[str, float], start: str = "base") -> pd.DataFrame:
    """A run that has the same queries and values in all collections."""
    rows = []
    for name in claims.COLLECTIONS:
        rows += [(start, arm, seed, name, query, value) for query, value in values.items()]
    return pd.DataFrame(rows, columns=claims.COLUMNS)


def queries(value: float, count: int = 30) -> dict[str, float]:
    return {f"q{n}": value + n / 1000 for n in range(count)}


@pytest.mark.parametrize("below, above, label", arms.LADDER)
def test_a_rung_changes_one_thing(below, above, label):
    first = asdict(arms.BY_NAME[below])
    second = asdict(arms.BY_NAME[above])
    changed = [name for name in CHANGES if first[name] != second[name]]
    assert len(changed) == 1


@pytest.mark.parametrize("group, field", report.AXES.items())
def test_an_ablation_changes_its_field_alone(group, field):
    for arm in arms.ABLATIONS[group]:
        main = asdict(arms.BY_NAME[arm.tuned_as])
        changed = [name for name in CHANGES if asdict(arm)[name] != main[name]]
        assert changed == [field]


def write_wikiqa(folder: Path, count: int = 8) -> Path:
    """A collection with a train split: one relevant and two other sentences a question."""
    (folder / "qrels").mkdir(parents=True)
    corpus, questions = [], []
    qrels = ["query-id\tcorpus-id\tscore"]
    for n in range(count):
        questions.append(f'{{"_id": "train-{n}", "text": "question {n}"}}')
        for j, grade in enumerate((1, 0, 0)):
            passage = f"p{n}-{j}"
            corpus.append(f'{{"_id": "{passage}", "title": "", "text": "sentence {n} {j}"}}')
            qrels.append(f"train-{n}\t{passage}\t{grade}")
    (folder / "corpus.jsonl").write_text("\n".join(corpus))
    (folder / "queries.jsonl").write_text("\n".join(questions))
    (folder / "qrels/train.tsv").write_text("\n".join(qrels))
    return folder


@pytest.fixture
def sources(tmp_path, monkeypatch):
    """The kit's own lists beside a small WikiQA, half of whose questions have graded lists."""
    graded = tmp_path / "wikiqa-graded.jsonl"
    passages = '"passages": {"3": "a", "2": "b", "1": "c", "0": "d"}'
    graded.write_text("\n".join(f'{{"id": "train-{n}", {passages}}}' for n in range(4)))
    authored = tmp_path / "authored.jsonl"
    authored.write_bytes(arms.AUTHORED.read_bytes())
    monkeypatch.setattr(arms, "AUTHORED", authored)
    return arms.load_sources(write_wikiqa(tmp_path / "wikiqa"), seeds=2)


def test_development_questions_are_not_trained_on(sources):
    development = set(sources.development[1][2])
    trained = {item.id for lists in sources.real.values() for item in lists}
    assert not development & trained


def test_held_out_lists_are_not_trained_on(sources):
    assert not set(sources.development[0][1]) & {item.id for item in sources.authored}


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
    lists = arms.arm_lists(arms.ABLATIONS["queries"][0], sources, seed=0)
    assert len(lists) == 100


@pytest.mark.parametrize(
    "difference, low, high, p, expected",
    [
        (0.02, 0.01, 0.03, 0.05, "holds"),
        (-0.02, -0.03, -0.01, 0.05, "reversed"),
        (0.001, -0.002, 0.009, 0.2, "no gain of .01"),
        (0.001, -0.02, 0.02, 0.2, "undecided"),
    ],
)
def test_the_rule(difference, low, high, p, expected):
    found = Comparison(difference, low, high, p, 10)
    assert claims.verdict(found, p) == expected


def test_seeds_are_averaged_query_by_query():
    first = rows_of("KL", "0", queries(0.4))
    second = rows_of("KL", "1", queries(0.6))
    start = rows_of("start", "", queries(0.3))
    runs = pd.concat([first, second, start])
    found = claims.differences(runs, "base", "KL", "start")
    assert found["npl"] == pytest.approx(dict.fromkeys(queries(0), 0.2))


def test_runs_of_different_queries_are_refused():
    trained = rows_of("KL", "0", queries(0.4))
    start = rows_of("start", "", queries(0.3, count=29))
    runs = pd.concat([trained, start])
    with pytest.raises(ValueError, match="different queries"):
        claims.differences(runs, "base", "KL", "start")


def test_an_arm_that_was_not_run_is_not_judged():
    rows = claims.judge(rows_of("KL", "0", queries(0.4)), "base", "1-D W")
    assert {row.verdict for row in rows} == {"not measured"}


def test_robustness_is_judged_on_shifted_collections():
    names = {claim[0]: claim[3] for claim in claims.claims_of("1-D W")}
    assert names["C3"] == ("cranfield", "scifact", "npl", "csfcube")


def record(arm: str, seed: int | None) -> dict[str, Any]:
    return {"start": "base", "arm": arm, "seed": seed}


def test_records_in_any_order_give_the_same_bytes(tmp_path):
    orders = {"a": (0, 1, 2), "b": (2, 0, 1)}
    for folder, seeds in orders.items():
        for seed in seeds:
            values = {"npl": queries(seed / 10)}
            claims.add_run(tmp_path / folder, record("KL", seed), values)
    for name in ("runs.jsonl", "per_query.csv.gz"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_records_read_back(tmp_path):
    claims.add_run(tmp_path, record("start", None), {"npl": {"001": 0.25, "2": 0.5}})
    rows = claims.read_runs(tmp_path).values.tolist()
    expected = [["base", "start", "", "npl", "001", 0.25], ["base", "start", "", "npl", "2", 0.5]]
    assert rows == expected


def test_rows_of_a_run_without_a_record_are_replaced(tmp_path):
    for value in (0.25, 0.5):
        claims.add_run(tmp_path, record("KL", 0), {"npl": {"q": value}})
        (tmp_path / "runs.jsonl").unlink()  # as if a kill had come between the two files
    assert claims.read_runs(tmp_path)[claims.SCORE].tolist() == [0.5]


@pytest.fixture
def study(tiny_bert, tmp_path):
    lists = graded_lists()
    development = [as_collection(lists)]
    sources = arms.Sources(lists, lists, {0: lists}, development)
    place = {"commit": "abc", "machine": {}, "dtype": "float32"}
    encoder = BiEncoder.load(tiny_bert, "cpu")
    return run.Study("all-minilm-l6-v2", encoder, sources, place, tmp_path / "records")


def test_a_run_is_recorded_once(study, capsys):
    job = (arms.BY_NAME["KL"], 0)
    for _ in range(2):
        run.do(study, job, {"tiny": as_collection(graded_lists())})
    assert capsys.readouterr().out.count("KL 0") == 1


def test_an_arm_and_seed_give_the_same_numbers_again(study):
    arm = arms.BY_NAME["Gaussian W2"]
    first = run.trained(study, arm, 1e-3, seed=1)[1]
    second = run.trained(study, arm, 1e-3, seed=1)[1]
    assert first | {"minutes": 0} == second | {"minutes": 0}


def test_the_multiple_is_of_the_fitted_temperature(study):
    ablation = arms.ABLATIONS["temperature"][9]
    fitted = run.trained(study, arms.BY_NAME[ablation.tuned_as], 1e-3, seed=0)[1]
    other = run.trained(study, ablation, 1e-3, seed=0)[1]
    expected = ablation.multiple * fitted["temperature"]
    assert other["temperature"] == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize(
    "values, expected",
    [
        ({0.001: 0.2, 0.002: 0.9, 0.004: 0.3}, 0.002),
        ({0.001: 0.2, 0.002: 0.3, 0.004: 0.9, 0.008: 0.1}, 0.004),
        ({0.0005: 0.2, 0.001: 0.9, 0.002: 0.3, 0.004: 0.3}, 0.001),
    ],
)
def test_tuning_tries_beyond_an_edge(study, monkeypatch, values, expected):
    start = arms.Start(rates=(0.001, 0.002, 0.004), seeds=1, steps=1)
    monkeypatch.setitem(arms.STARTS, study.start, start)
    monkeypatch.setattr(run, "trained", lambda study, arm, rate, seed: (rate, {}))
    monkeypatch.setattr(run, "development_ndcg", lambda rate, _: values[rate])
    assert run.tune(study, arms.BY_NAME["KL"]) == expected


def test_a_missing_collection_is_refused(tmp_path, capsys):
    assert run.main(["--data", str(tmp_path)]) == 2
    assert "expected a BEIR folder 'dl19-pool'" in capsys.readouterr().err


@pytest.mark.parametrize("option, name", [("--arm", "InfoNC"), ("--start", "bass")])
def test_a_typo_is_refused(option, name, tmp_path):
    with pytest.raises(SystemExit):
        run.main(["--data", str(tmp_path), option, name])


def test_the_means_of_the_records_are_those_of_their_rows():
    rows = claims.read_runs(claims.RESULTS)
    found = rows.groupby([*claims.KEY, "collection"])[claims.SCORE].mean()
    for record in claims.read_records(claims.RESULTS):
        for name, one in record["collections"].items():
            mean = found[(*claims.key_of(record), name)]
            assert mean == pytest.approx(one["metrics"]["ndcg@10"], abs=2e-5)


def test_the_page_is_what_the_records_give():
    folder = claims.RESULTS
    runs = claims.read_runs(folder)
    records = claims.read_records(folder)
    tuning = claims.read_tuning(folder)
    text = (folder / "README.md").read_text(encoding="utf-8")
    assert report.page(runs, records, tuning) == text


def test_readme_shows_the_verdicts_of_the_records():
    text = report.README.read_text(encoding="utf-8")
    assert report.summary(claims.read_runs(claims.RESULTS)) in text


@pytest.mark.parametrize("family, held", [("Gaussian W2", []), ("1-D W", ["C2", "C5"])])
def test_readme_names_the_claims_that_hold(family, held):
    rows = claims.judge(claims.read_runs(claims.RESULTS), "base", family)
    assert [row.label for row in rows if row.verdict == "holds"] == held


def test_readme_names_the_one_rung_with_a_small_p():
    rungs = claims.ladder(claims.read_runs(claims.RESULTS), "base")
    assert [rung.label for rung in rungs if rung.p <= claims.LEVEL] == ["levels"]


def test_readme_says_that_bm25_is_above_every_arm():
    means = report.arm_means(claims.read_runs(claims.RESULTS), "base")
    levels = {name: found.mean(axis=None) for name, found in means.items()}
    assert max(levels, key=levels.get) == "BM25"
