"""Arms, records, report and figures on a tiny model: resumable, equal to the plain path, nothing by hand."""

import json
from pathlib import Path

import matplotlib
import numpy as np
import pytest

matplotlib.use("Agg")

from test_train import lists, write_lists  # noqa: E402

from repro import plots, report  # noqa: E402
from repro.encoder import BiEncoder  # noqa: E402
from repro.evaluate import evaluate_model  # noqa: E402
from repro.data import load_beir  # noqa: E402
from repro.experiments import main  # noqa: E402
from repro.lists import write_beir  # noqa: E402
from repro.stats import compare  # noqa: E402


@pytest.fixture(scope="module")
def results(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two arms, two seeds, one collection, frozen states shared."""
    folder = tmp_path_factory.mktemp("experiments")
    write_beir(lists(8), folder / "tiny", split="test")
    options = ["--data", str(folder / "tiny"), "--lists", str(write_lists(folder / "lists.jsonl")), "--arms", "InfoNCE", "1-D W1",
               "--seeds", "0", "1", "--epochs", "1", "--batch-size", "4", "--model", str(tiny_llama), "--freeze", "2", "--device", "cpu",
               "--runs", str(folder / "runs"), "--results", str(folder / "results")]  # fmt: skip
    assert main(options) == 0
    (folder / "options.json").write_text(json.dumps(options))
    return folder


def test_shared_states_give_the_scores_of_the_plain_path(results: Path) -> None:
    record = json.loads((results / "results/tiny/1-D-W1-seed1.json").read_text())
    corpus, queries, qrels = load_beir(results / "tiny")
    plain = evaluate_model(BiEncoder.load(results / "runs/1-D-W1-seed1"), corpus, queries, qrels)
    assert record["metrics"] == pytest.approx(plain["metrics"]) and record["per_query"].keys() == plain["per_query"].keys()
    assert (record["arm"], record["seed"], record["collection"]) == ("1-D W1", 1, "tiny")
    assert record["training"]["settings"]["loss"] == "wasserstein_1d" and record["training"]["steps"] == 4


def test_second_run_repeats_nothing_and_a_lost_record_is_made_again(results: Path, capsys: pytest.CaptureFixture) -> None:
    options = json.loads((results / "options.json").read_text())
    files = {path: path.stat().st_mtime_ns for path in (results / "results").rglob("*.json")}
    assert len(files) == 6
    assert main(options) == 0
    assert "all 6 records are there" in capsys.readouterr().out
    assert files == {path: path.stat().st_mtime_ns for path in (results / "results").rglob("*.json")}
    lost = results / "results/tiny/InfoNCE-seed0.json"
    before = json.loads(lost.read_text())
    lost.unlink()
    assert main(options) == 0
    after = json.loads(lost.read_text())
    assert after["per_query"] == before["per_query"]


def test_records_hold_no_text(results: Path) -> None:
    texts = [text for item in lists(8) for text in [item.query, *item.passages]]
    for path in (results / "results").rglob("*.json"):
        content = path.read_text()
        assert not [text for text in texts if text in content]


def test_table_comes_from_the_records(results: Path, tmp_path: Path) -> None:
    records = report.read_records(results / "results")
    rows = report.table(records).splitlines()
    assert [row.split(" | ")[0].strip("| ") for row in rows[2:]] == ["bm25", "base", "InfoNCE", "1-D W1"]
    by_hand = [records["tiny"]["1-D W1"][seed]["metrics"]["ndcg@10"] for seed in (0, 1)]
    assert f"{np.mean(by_hand):.3f} ± {np.std(by_hand, ddof=1):.3f}" in rows[-1]
    sides = [report.per_query(records["tiny"][arm], "ndcg@10") for arm in ("InfoNCE", "1-D W1")]
    assert f"{compare(*sides).difference:+.3f}" in rows[-1]
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    assert report.main(["--results", str(results / "results"), "--readme", str(readme)]) == 0
    text = readme.read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "old" not in text and rows[-1] in text
    assert "16 lists, 4 steps of 4, 2 layers frozen" in text and "Seeds: 0, 1." in text


def test_report_names_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert report.main(["--results", str(tmp_path)]) == 2
    assert "expected run records, found none" in capsys.readouterr().err
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "x.json").write_text("{")
    assert report.main(["--results", str(tmp_path)]) == 2
    assert "x.json: expected a run record" in capsys.readouterr().err


def test_figures_have_titles_labels_and_the_numbers_given() -> None:
    target = plots.target_figure({"a": [0.6, 0.4], "b": [0.5, 0.3]}, [1, 0])
    assert sorted(bar.get_height() for bar in target.axes[0].patches) == [0.3, 0.4, 0.5, 0.6]
    curve = plots.loss_figure({"a": [4.0, 2.0, 1.0, 1.0, 1.0, 1.0, 1.0], "short": [1.0, 0.5]}, window=5)
    assert curve.axes[0].lines[0].get_ydata()[0] == 1 and curve.axes[0].lines[0].get_ydata()[-1] < 0.7
    arms = plots.arms_figure({"x": {"q1": 0.2, "q2": 0.4}, "y": {"q1": 0.5, "q2": 0.5}}, "tiny", reference="x")
    assert [bar.get_width() for bar in arms.axes[0].patches] == pytest.approx([0.5, 0.3])
    for figure in (target, curve, arms):
        axis = figure.axes[0]
        assert axis.get_title() and axis.get_xlabel()
        assert axis.get_ylabel() or figure is arms  # whose y axis carries the arms' names
        matplotlib.pyplot.close(figure)
