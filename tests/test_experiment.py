"""The experiment: what arms are, the rule, the records, one run in small, the page."""

from dataclasses import replace
from itertools import chain

import pandas as pd
import pytest
from conftest import graded_lists, write_jsonl, write_lists

from repro.compare import Comparison
from repro.data import as_collection
from repro.encoder import BiEncoder
from repro.experiment import arms, claims, report, run

RECORDED = claims.read_runs(claims.RESULTS)


def changed(one, other):
    """The fields in which two arms differ, but for their names."""
    pairs = vars(one).items() ^ vars(other).items()
    return {field for field, _ in pairs} - {"name", "tuned_as"}


@pytest.mark.parametrize("label, above, below", claims.LADDER)
def test_a_rung_changes_one_thing(label, above, below):
    assert len(changed(arms.BY_NAME[below], arms.BY_NAME[above])) == 1


def test_an_ablation_changes_its_field_alone():
    found = [changed(arm, arms.BY_NAME[arm.tuned_as]) for arm in arms.ABLATIONS]
    assert found == [{"multiple"}] * 16 + [{"label_temperature"}] * 9 + [{"queries"}] * 12


@pytest.fixture
def sources(tmp_path, monkeypatch):
    """Lists beside a small WikiQA: one relevant and two other sentences for each of 8 questions.

    Half of the questions have graded lists.
    """
    corpus = questions = qrels = graded = ""
    for n in range(8):
        questions += f'{{"_id": "train-{n}", "text": "question {n}"}}\n'
        for j, grade in enumerate((1, 0, 0)):
            corpus += f'{{"_id": "p{n}-{j}", "text": "sentence {n} {j}"}}\n'
            qrels += f"train-{n}\tp{n}-{j}\t{grade}\n"
    for n in range(4, 8):
        passages = '{"3": "a", "2": "b", "1": "c", "0": "d"}'
        graded += f'{{"id": "train-{n}", "passages": {passages}}}\n'
    wikiqa = tmp_path / "wikiqa"
    write_jsonl(wikiqa / "corpus.jsonl", corpus)
    write_jsonl(wikiqa / "queries.jsonl", questions)
    write_jsonl(wikiqa / "qrels/train.tsv", qrels)
    write_jsonl(tmp_path / "wikiqa-graded.jsonl", graded)
    authored = write_lists(tmp_path / "authored.jsonl", 120)
    monkeypatch.setattr(arms, "AUTHORED", authored)
    monkeypatch.setattr(arms, "QUESTIONS", 2)
    return arms.load_sources(wikiqa, seeds=2)


def test_no_arm_trains_on_development_data(sources):
    used = {item.id for item in chain(sources.authored, sources.same_questions, *sources.real)}
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
    assert len(arms.arm_lists(arms.ABLATIONS[-12], sources, seed=0)) == 100


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


def rows_of(arm, seed, value, queries=30):
    """A run that has the same queries and values in all collections."""
    rows = [
        ("base", arm, seed, name, f"q{n}", value + n / 1000)
        for name in claims.COLLECTIONS
        for n in range(queries)
    ]
    return pd.DataFrame(rows, columns=claims.COLUMNS)


def test_seeds_are_averaged_query_by_query():
    runs = [rows_of("1-D W", "0", 0.4), rows_of("1-D W", "1", 0.6), rows_of("start", "", 0.3)]
    claim = claims.Judged("C2", "1-D W", "start")
    claims.compare_arms(pd.concat(runs), "base", [claim])
    assert claim.fresh[:3] == pytest.approx((0.2, 0.2, 0.2))
    assert claim.fresh.queries == 3 * 30


def test_runs_of_different_queries_are_refused():
    runs = pd.concat([rows_of("1-D W", "0", 0.4), rows_of("start", "", 0.3, queries=29)])
    with pytest.raises(ValueError, match="finite"):
        claims.compare_arms(runs, "base", [claims.Judged("C2", "1-D W", "start")])


def test_a_start_that_lacks_a_run_is_not_judged():
    assert report.measured(RECORDED) == list(report.STARTS)
    lacking = (RECORDED["arm"] == "KL") & (RECORDED["seed"] == "2")
    assert report.measured(RECORDED[~lacking]) == []
    assert report.measured(RECORDED[RECORDED["arm"] != "BM25"]) == []


def add(folder, seed, query, value):
    """Put a run with one row among a folder's records."""
    record = {"start": "base", "arm": "KL", "seed": seed}
    row = (*claims.key_of(record), "npl", query, value)
    claims.add_run(folder, record, [row])


def test_records_in_any_order_give_the_same_bytes(tmp_path):
    found = []
    for seeds in ("012", "201"):
        folder = tmp_path / seeds
        folder.mkdir()
        for seed in seeds:
            add(folder, int(seed), "q", 0.5)
        found.append([path.read_bytes() for path in sorted(folder.iterdir())])
    assert found[0] == found[1]


def test_records_read_back(tmp_path):
    add(tmp_path, None, "001", 0.25)
    assert claims.read_runs(tmp_path).values.tolist() == [["base", "KL", "", "npl", "001", 0.25]]


def test_rows_of_a_run_without_a_record_are_replaced(tmp_path):
    add(tmp_path, 0, "q", 0.25)
    (tmp_path / "runs.jsonl").unlink()  # as if a kill had come between the two files
    add(tmp_path, 0, "q", 0.5)
    assert claims.read_runs(tmp_path)[claims.SCORE].tolist() == [0.5]


@pytest.fixture
def study(tiny_bert, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "RESULTS", tmp_path)
    lists = graded_lists()
    tiny = as_collection(lists)
    sources = arms.Sources(lists, lists, [lists], [tiny])
    encoder = BiEncoder.load(tiny_bert, "cpu")
    place = {"dtype": "float32"}
    return run.Study("all-minilm-l6-v2", encoder, sources, {"tiny": tiny}, place)


def test_a_run_is_recorded_once(study, capsys):
    for _ in range(2):
        run.do(study, arms.BY_NAME["KL"], 0)
    assert capsys.readouterr().out.count("KL 0") == 1


def test_a_run_trains_as_its_arm_says_and_scores_what_it_trained(study, monkeypatch):
    seen = []

    def trained(encoder, lists, config):
        seen.extend([encoder, config.label_temperature, config.seed, config.lr])
        return replace(config, temperature=1), [{"loss": 0}], 0

    def scored(model, *_):
        assert model is seen[0]
        return {"metrics": {}, "counts": {}, "per_query": {}}

    monkeypatch.setattr(run, "train_encoder", trained)
    monkeypatch.setattr(run, "evaluate_model", scored)
    run.do(study, arms.ABLATIONS[16], 2)
    assert seen[1:] == [0.3, 2, 1e-5]


def test_the_multiple_is_of_the_fitted_temperature(study):
    ablation = arms.ABLATIONS[9]
    found = []
    for arm in (arms.BY_NAME[ablation.tuned_as], ablation):
        _, settings = run.trained(study, arm, 1e-3, seed=0)
        found.append(settings["temperature"])
    assert found[1] == pytest.approx(ablation.multiple * found[0], rel=1e-3)


@pytest.mark.parametrize(
    "values, expected",
    [
        ({1.0: 0.2, 2.0: 0.3, 4.0: 0.9, 8.0: 0.1}, 4.0),
        ({0.25: 0.2, 0.5: 0.9, 1.0: 0.8, 2.0: 0.3}, 0.5),
    ],
)
def test_tuning_tries_beyond_an_edge_and_each_rate_once(study, monkeypatch, values, expected):
    monkeypatch.setitem(arms.STARTS, study.start, arms.Start((1.0, 2.0), 1, 1))
    monkeypatch.setattr(run, "trained", lambda study, arm, rate, seed: (values.pop(rate), {}))
    monkeypatch.setattr(run, "evaluate_model", lambda value, *_: {"metrics": {claims.SCORE: value}})
    for _ in range(2):  # the second time from the record
        assert run.tune(study, arms.BY_NAME["KL"]) == expected


def test_a_missing_collection_is_refused(tmp_path, capsys):
    assert run.main(["--data", str(tmp_path)]) == 2
    assert "dl19-pool/queries.jsonl: not found" in capsys.readouterr().err


def test_a_typo_is_refused(capsys):
    with pytest.raises(SystemExit):
        run.main(["--data", "data", "--arm", "InfoNC"])
    assert "invalid choice: 'InfoNC'" in capsys.readouterr().err


def test_the_means_of_a_record_are_those_of_its_rows():
    means = RECORDED.groupby([*claims.KEY, "collection"])[claims.SCORE].mean()
    stored = {}
    for record in claims.read_records(claims.RESULTS):
        for name, found in record["collections"].items():
            stored[*claims.key_of(record), name] = found["metrics"]["ndcg@10"]
    assert means.to_dict() == pytest.approx(stored, abs=2e-5)


def test_the_page_is_what_the_records_give():
    text = (claims.RESULTS / "README.md").read_text("utf-8")
    assert report.page(RECORDED) == text


def test_readme_shows_the_verdicts_of_the_records():
    assert report.summary(RECORDED) in report.README.read_text("utf-8")
