"""The verdict rule on made-up records, and the plots' numbers."""

import matplotlib
import pytest

matplotlib.use("Agg")

from repro import plots  # noqa: E402
from repro.claims import BASE, CLAIMS, INFO, collections_of, differences, judge, per_query, verdict  # noqa: E402
from repro.stats import Comparison  # noqa: E402


def found(*rows: tuple[float, float, float, float]) -> dict:
    """{collection: (comparison, p)} from (difference, low, high, p) rows."""
    return {f"c{n}": (Comparison(40, 0.3, 0.3 + d, d, low, high, p), p) for n, (d, low, high, p) in enumerate(rows)}


BETTER, WORSE, FLAT, OPEN = (0.05, 0.02, 0.08, 0.001), (-0.05, -0.08, -0.02, 0.001), (0.0, -0.01, 0.01, 0.9), (0.02, -0.02, 0.06, 0.3)


@pytest.mark.parametrize(
    "rows, expected",
    [
        ([BETTER, BETTER, OPEN], "holds"),
        ([BETTER, OPEN], "holds"),
        ([BETTER, OPEN, OPEN], "undecided here"),
        ([BETTER, WORSE, BETTER], "mixed"),
        ([WORSE, OPEN, OPEN], "does not hold"),
        ([FLAT, FLAT], "does not hold"),
        ([FLAT, OPEN], "undecided here"),
        ([], "not measured"),
    ],
)
def test_verdict_rule(rows: list, expected: str) -> None:
    assert verdict(found(*rows)) == expected


def test_the_sample_has_no_vote() -> None:
    rows = found(OPEN, OPEN, OPEN)
    rows["sample"] = found(BETTER)["c0"]
    assert verdict(rows) == "undecided here"
    assert verdict({"sample": rows["sample"]}) == "not measured"


def record(group: str, arm: str, seed: int | None, **collections: list[float]) -> dict:
    content = {name: {"per_query": {f"q{n}": [0.0, value] for n, value in enumerate(values)}} for name, values in collections.items()}
    return {"group": group, "arm": arm, "seed": seed, "measures": ["mrr@10", "ndcg@10"], "collections": content}


def test_seeds_are_averaged_and_p_is_corrected_over_the_claims_own_collections() -> None:
    low, high = [0.1 * (n % 3) for n in range(30)], [0.1 * (n % 3) + 0.2 + 0.01 * (n % 5) for n in range(30)]
    records = [
        record(*INFO, 0, wikiqa=low, scifact=low, sample=low),
        record("main", "1-D W", 0, wikiqa=low, scifact=high, sample=high),
        record("main", "1-D W", 1, wikiqa=high, scifact=high, sample=high),
        record("main", "InfoNCE, real", 0, wikiqa=high, scifact=low),
    ]
    assert collections_of(records) == ["wikiqa", "sample", "scifact"]
    assert per_query(records, ("main", "1-D W"), "wikiqa")["q4"] == pytest.approx((low[4] + high[4]) / 2)
    assert per_query(records, BASE, "wikiqa") is None
    both = differences(records, ("main", "1-D W"), INFO, ["wikiqa", "scifact"])
    alone = differences(records, ("main", "1-D W"), INFO, ["scifact"])
    assert both["scifact"][1] == pytest.approx(2 * alone["scifact"][1], rel=1e-6) and both["wikiqa"][0].difference == pytest.approx(0.11, abs=1e-9)
    judged = {claim.text: (names, result) for claim, names, result in judge(records)}
    names, result = judged[CLAIMS[0].text]
    assert list(names) == ["wikiqa", "sample", "scifact"] and result == "holds"
    shift = next(claim for claim in CLAIMS if claim.shift_only)
    names, result = judged[shift.text]
    assert list(names) == ["scifact"] and result == "holds"
    assert judged[CLAIMS[3].text] == ({}, "not measured")


def test_every_claim_compares_arms_that_exist() -> None:
    from repro.arms import ABLATIONS, MAIN
    from repro.experiments import REFERENCES

    known = {("main", arm.name) for arm in MAIN} | {("references", name) for name in REFERENCES}
    known |= {(group, arm.name) for group, members in ABLATIONS.items() for arm in members}
    assert {side for claim in CLAIMS for side in (claim.better, claim.than)} <= known
    assert {claim.claim for claim in CLAIMS} == {"C1", "C2", "C3", "C4", "C5"}


def test_figures_have_titles_labels_and_the_numbers_given() -> None:
    target = plots.target_figure({"a": [0.6, 0.4], "b": [0.5, 0.3]}, [1, 0])
    assert sorted(bar.get_height() for bar in target.axes[0].patches) == [0.3, 0.4, 0.5, 0.6]
    curve = plots.loss_figure({"a": [4.0, 2.0, 1.0, 1.0, 1.0, 1.0, 1.0], "short": [1.0, 0.5]}, window=5)
    assert curve.axes[0].lines[0].get_ydata()[0] == 1 and curve.axes[0].lines[0].get_ydata()[-1] < 0.7
    arms = plots.arms_figure({"x": {"q1": 0.2, "q2": 0.4}, "y": {"q1": 0.5, "q2": 0.5}}, "tiny", reference="x")
    assert [bar.get_width() for bar in arms.axes[0].patches] == pytest.approx([0.5, 0.3])
    forest = plots.effects_figure({"C1": {"c": (0.1, 0.0, 0.2), "d": (-0.1, -0.3, 0.1)}, "C2": {"c": (0.3, 0.2, 0.4)}})
    assert sorted(bar[0].get_xdata()[0] for bar in forest.axes[0].containers) == pytest.approx([-0.1, 0.1, 0.3])
    lines = plots.lines_figure({"a": {"d": {1.0: 0.2, 2.0: 0.4}}, "b": {"d": {1.0: 0.3}}}, "queries (count)", "curve", reference={"d": 0.1})
    assert list(lines.axes[0].lines[0].get_ydata()) == [0.2, 0.4]
    for figure in (target, curve, arms, forest, lines):
        axis = figure.axes[0]
        assert axis.get_title() or figure.get_suptitle()
        assert axis.get_xlabel()
        assert axis.get_ylabel() or figure in (arms, forest)  # whose y axes carry names
        matplotlib.pyplot.close(figure)


def test_curves_average_the_seeds_of_one_setting() -> None:
    from repro.report import curves

    runs = [(0, 4, 0.2), (1, 4, 0.4), (0, 16, 0.5)]
    records = [
        {"group": "batch", "arm": f"1-D W, {b} lists a batch", "seed": s, "training": {"batch_size": b}, "collections": {"wikiqa": {"metrics": {"ndcg@10": v}}}}
        for s, b, v in runs
    ]
    assert curves(records, "batch", "batch_size") == {"1-D W": {"wikiqa": {4: pytest.approx(0.3), 16: 0.5}}}
    assert curves(records, "levels", "batch_size") == {}


def test_committed_records_are_complete_and_the_readme_shows_them() -> None:
    """Every arm of every group has its seeds, holds no text, and README's block is what `repro.report` writes today."""
    from pathlib import Path

    from repro import report
    from repro.arms import ABLATIONS, MAIN, SEEDS
    from repro.recipe import COSINE, TrainConfig

    records = report.read_records(report.RESULTS)
    runs = {(r["group"], r["arm"], r["seed"]) for r in records}
    for group, arms in {"main": MAIN, **ABLATIONS}.items():
        assert runs >= {(group, arm.name, seed) for arm in arms for seed in range(SEEDS.get(group, 3))}, group
    tuning = report.read_tuning(report.RESULTS)
    for arm in MAIN[:4]:  # the defaults of repro.train are said to be these
        best, loss = tuning[arm.name]["best"], COSINE[arm.loss]
        assert loss[0] == best["temperature"] and loss[1] == best.get("label_temperature", 1.0), arm.name
    assert (TrainConfig.order, TrainConfig.axis) == (tuning["1-D W"]["best"]["order"], tuning["1-D W"]["best"]["axis"])
    for record in records:
        per_query = [values for found in record["collections"].values() for values in found["per_query"].values()]
        assert per_query and all(len(values) == len(record["measures"]) and all(0 <= v <= 1 for v in values) for values in per_query)
        if record["group"] == "main":
            assert tuning[record["arm"]]["best"].items() <= record["training"].items()
    readme = (Path(report.__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    shown = readme.split(report.BEGIN)[1].split(report.END)[0]
    assert shown.strip() == report.report(records, tuning).strip()
