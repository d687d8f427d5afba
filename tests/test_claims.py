"""Paired statistics against brute force and scipy, the rule, the records, and the page made from them."""

import gzip
import itertools
import json
import re
from pathlib import Path
from statistics import fmean, stdev

import numpy as np
import pytest
from scipy import stats

from repro.experiment import claims, report
from repro.experiment.claims import compare, judge, read_runs, write_runs
from repro.files import write_json

PLACE = {"commit": "c0ffee", "machine": {"device": "cpu", "cores": 2}, "dtype": "float32"}
SIZES = {"cranfield": 30, "sample": 10, "scifact": 25, "wikiqa": 40}

def rows(values) -> dict[str, float]:
    return {f"q{n:03}": float(value) for n, value in enumerate(values)}

def made(group: str, arm: str, seed: int | None, gain: float, start: str | None = "base", **settings) -> dict:
    """A run on queries of unlike difficulty, `gain` above it, with a little noise of its own."""
    rng, scores, found = np.random.default_rng([*map(ord, f"{arm}{seed}")]), {}, {}
    for name, size in SIZES.items():
        hard = np.random.default_rng(size).uniform(0.2, 0.7, size)
        scores[name] = rows((hard + gain + rng.normal(0, 0.02, size)).round(5))
        metrics = {"ndcg@10": round(fmean(scores[name].values()), 5), "mrr@10": 0.5, "recall@100": 0.75}
        found[name] = {"metrics": metrics, "passages": 9 * size, "queries": size, **PLACE}
    run = {"group": group, "arm": arm, "seed": seed, "start": start, "settings": settings, "trained": PLACE}
    return {**run, "development": 0.61, "minutes": 0.25, "collections": found, "per_query": scores}

@pytest.fixture
def runs() -> list[dict]:
    gains = {"InfoNCE": 0, "1-D W": 0.06, "InfoNCE, real": 0.1, "1-D W, 2 grades": 0.06, "KL": 0.03}
    own = [made("main", arm, s, gain, label_temperature=0.3) for arm, gain in gains.items() for s in range(3)]
    group = "label temperature"
    own += [made(group, f"1-D W, {group} 0.5", seed, 0.02, label_temperature=0.5) for seed in (0, 1)]
    return [made("references", "BM25", None, 0.1, None), made("references", "start", None, -0.05), *own]

@pytest.mark.parametrize("sizes", [(3,), (4, 6), (2, 3, 5)])
def test_p_is_that_of_all_sign_patterns(sizes: tuple[int, ...]) -> None:
    rng = np.random.default_rng(sum(sizes))
    found = [rng.integers(-3, 5, size) / 10 for size in sizes]
    weighted = np.concatenate([d / len(d) / len(found) for d in found])
    patterns = np.array(list(itertools.product((1, -1), repeat=len(weighted)))) @ weighted
    ours = compare({f"c{n}": rows(d) for n, d in enumerate(found)})
    assert ours.p == pytest.approx(np.mean(abs(patterns) >= abs(weighted.sum()) - 1e-12), abs=0.02)
    assert ours.difference == pytest.approx(fmean(d.mean() for d in found)) and ours.queries == sum(sizes)

def test_one_collection_is_the_plain_paired_test() -> None:
    d = np.random.default_rng(3).normal(0.05, 0.2, 60)
    ours, turned = compare({"c": rows(d)}), compare({"c": dict(reversed(rows(-d).items()))})
    plain = stats.permutation_test((d,), np.mean, permutation_type="samples", random_state=0)
    bounds = stats.bootstrap((d,), np.mean, method="percentile", random_state=0).confidence_interval
    assert ours.p == pytest.approx(plain.pvalue, abs=0.015)
    assert (ours.low, ours.high) == pytest.approx(tuple(bounds), abs=0.004)
    assert turned == pytest.approx((-ours.difference, -ours.high, -ours.low, ours.p, 60))

def test_collections_weigh_the_same_ties_are_ties_and_bad_input_is_refused() -> None:
    apart = compare({"small": rows([0.3, 0.3]), "large": rows([0.1] * 50)})
    assert apart[:3] == pytest.approx((0.2, 0.2, 0.2))  # drawing across collections would move the mean
    assert compare({"c": rows([0.1 + 0.2 - 0.3, 0, 0])}).p == 1.0  # rounding is no difference
    assert compare({name: rows([0.1, 0.1]) for name in "abc"}).p == pytest.approx(2 / 2**6, abs=0.006)
    assert compare({"c": rows([0.25] * 20)}) == (0.25, 0.25, 0.25, 1 / 10_001, 20)
    for bad in ({}, {"c": {}}, {"c": {"q": 0.1}}, {"c": rows([0.1, float("nan")])}):
        with pytest.raises(ValueError, match="2 or more finite"):
            compare(bad)

def test_a_null_is_rejected_at_its_rate_and_a_planted_effect_found() -> None:
    rng, null, planted = np.random.default_rng(4), [], []
    for n in range(200):
        noise = {"a": rng.normal(0, 0.2, 15), "b": rng.normal(0, 0.2, 40)}
        null.append(compare({name: rows(d) for name, d in noise.items()}, n, 400))
        planted.append(compare({name: rows(d + 0.15) for name, d in noise.items()}, n, 400))
    assert 0.01 <= np.mean([one.p <= 0.05 for one in null]) <= 0.1
    assert np.mean([one.p <= 0.05 for one in planted]) > 0.9
    assert 0.87 <= np.mean([one.low <= 0.15 <= one.high for one in planted]) <= 0.99

def test_holm_by_hand() -> None:
    # sorted: .005 * 4, .01 * 3, .03 * 2, .04 * 1 = .02, .03, .06, .04, and .04 is raised to .06
    found = claims.holm({"c": 0.03, "a": 0.01, "d": 0.005, "b": 0.04})
    assert found == pytest.approx({"c": 0.06, "a": 0.03, "d": 0.02, "b": 0.06}) and [*found] == [*"cadb"]
    assert claims.holm({"x": 0.5, "y": 0.9}) == {"x": 1.0, "y": 1.0}

def test_rule() -> None:
    cases = {(0.05, 0.08, 0.05): "holds", (0.005, 0.008, 0.01): "holds", (0.05, 0.08, 0.051): "undecided"}
    cases |= {(-0.01, 0.012, 0.05): "does not hold", (-0.01, 0.012, 0.051): "undecided"}
    cases |= {(0.0, 0.0099, 0.9): "does not hold", (0.0, 0.01, 0.9): "undecided"}
    for (difference, high, p), expected in cases.items():
        assert claims.verdict(claims.Comparison(difference, -1, high, 0.5, 9), p) == expected

def test_claims_are_judged_on_voting_collections_with_seeds_averaged(runs: list[dict]) -> None:
    found = {row.claim: row for row in judge(runs, "base")}
    verdicts = ["holds", "holds", "does not hold", "not measured", "does not hold"]
    assert [row.verdict for row in found.values()] == verdicts
    assert [*found["C1"].collections] == ["cranfield", "scifact", "wikiqa"]
    assert [*found["C3"].collections] == ["cranfield", "scifact"] and found["C4"].comparison is None
    assert found["C1"].p == pytest.approx(5 * found["C1"].comparison.p)  # C4 stays in the family
    sides = [[r["per_query"]["wikiqa"]["q007"] for r in runs if r["arm"] == a] for a in ("1-D W", "InfoNCE")]
    paired = claims.differences(runs, "base", "1-D W", "InfoNCE")
    assert paired["wikiqa"]["q007"] == pytest.approx(fmean(sides[0]) - fmean(sides[1]))
    del next(r for r in runs if r["arm"] == "1-D W")["per_query"]["wikiqa"]["q007"]
    with pytest.raises(ValueError, match="wikiqa: the runs of 1-D W and InfoNCE did not answer the same"):
        judge(runs, "base")
    assert {row.verdict for row in judge(runs, "no such start")} == {"not measured"}

def test_records_round_trip_and_same_records_give_same_bytes(runs: list[dict], tmp_path: Path) -> None:
    def turn(value):
        return {k: turn(v) for k, v in reversed(value.items())} if isinstance(value, dict) else value

    write_runs(tmp_path / "a", runs)
    write_runs(tmp_path / "b", [turn(run) for run in reversed(read_runs(tmp_path / "a"))])
    files = [{path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in "ab"]
    assert files[0] == files[1] and sorted(files[0]) == ["per_query.csv.gz", "runs.jsonl"]
    table = gzip.decompress(files[0]["per_query.csv.gz"]).decode()
    assert files[0]["per_query.csv.gz"][4:8] == bytes(4)  # no time of writing
    assert table.startswith(f"{claims.HEADER}\n,BM25,,cranfield,q000,")
    back = read_runs(tmp_path / "a")
    assert len(back) == len(runs) and all(run in back for run in runs)
    write_runs(tmp_path / "b", [*runs, made("main", "KL", 9, 0.1)])  # killed after the first of two files:
    (tmp_path / "b" / "runs.jsonl").write_bytes(files[0]["runs.jsonl"])
    assert read_runs(tmp_path / "b") == back and read_runs(tmp_path) == []

BROKEN = [  # file, what to replace, by what, the place that the message names
    ("runs.jsonl", '"arm": "KL"', '"arms": "KL"', "runs.jsonl:16: .*KeyError: 'arm'"),
    ("runs.jsonl", '"seed": 1', '"seed": 0', "runs.jsonl:3: .*same start, arm and seed"),
    ("runs.jsonl", '"ndcg@10": 0.', '"ndcg@10": 1.', "runs.jsonl:1, cranfield: .*count or mean"),
    ("runs.jsonl", '"queries": 30', '"queries": 31', "runs.jsonl:1, cranfield: .*count or mean"),
    ("per_query.csv.gz", "q007,0.", "q007,x.", "per_query.csv.gz:9: .*'x."),
    ("per_query.csv.gz", ",BM25,,cranfield,q007", ",BM25,,cranfeld,q007", "runs.jsonl:1, cranfield"),
    ("per_query.csv.gz", ",BM25,,cranfield,q007", "BM25", "per_query.csv.gz:9: "),
]

@pytest.mark.parametrize("name, old, new, message", BROKEN)
def test_bad_records_are_named(runs, tmp_path, capsys, name: str, old: str, new: str, message: str) -> None:
    write_runs(tmp_path, runs)
    unpack, pack = (gzip.decompress, gzip.compress) if name.endswith("gz") else (bytes, bytes)
    text = unpack((tmp_path / name).read_bytes()).decode().replace(old, new, 1)
    (tmp_path / name).write_bytes(pack(text.encode()))
    assert report.main(["--results", str(tmp_path)]) == 2 and not (tmp_path / "README.md").exists()
    error = capsys.readouterr().err
    assert new in text and re.search(message, error) and error.count("\n") == 1, error

def test_page_shows_the_records_and_nothing_else(runs: list[dict], tmp_path: Path, capsys) -> None:
    command = ["--results", str(tmp_path)]
    assert report.main(command) == 2 and "no record of a run" in capsys.readouterr().err
    write_runs(tmp_path, runs)
    best, values = {"lr": 8e-4, "label_temperature": 0.3, "order": 2}, [0.401, 0.433, 0.452]
    tuning = {"best": best, "start": 0.397, "trials": [{**best, "ndcg@10": value} for value in values]}
    write_json(tmp_path / "tuning.json", {"base": {"1-D W": tuning}})
    bench = {"machine": {"device": "cpu"}, "rows": [{"what": "loss", "ratio": 3.125}]}
    (tmp_path / "bench.json").write_text(json.dumps(bench))
    assert [report.main([*command, *more]) for more in (["--check"], [], ["--check"])] == [1, 0, 0]
    page = (tmp_path / "README.md").read_text(encoding="utf-8")
    known = [*values, 0.397, 3.125, 0.5, 0.75, 0.0]
    for arm in {run["arm"] for run in runs}:
        found = [run["collections"] for run in runs if run["arm"] == arm]
        means = [[row[name]["metrics"]["ndcg@10"] for name in SIZES] for row in found]
        means = [[*row, fmean([row[0], *row[2:]])] for row in means]  # without the sample
        known += [f(column) for column in zip(*means, strict=True) for f in (fmean, stdev)[: len(found)]]
    for row in (*judge(runs, "base"), *judge(runs, "base", report.SECONDARY)):
        known += [x for one in (row.comparison, *row.collections.values()) if one for x in (row.p, *one[:4])]
    shown = re.findall(r"\d*\.\d{3,}", page.replace("lr 0.0008", ""))
    texts = {f"{abs(number):.3f}".lstrip("0") for number in known} | {".001"}
    assert len(shown) > 200 and {text.lstrip("0") for text in shown} <= texts
    assert "| lr 0.0008 (edge), label_temperature 0.3, order 2 |" in page and "-0.000" not in page
    assert re.search(
        r"\| C1 \|.*\| < \.001 \| \*\*holds\*\* \|.*\n(.*\n)*\| C5 \|.*\| 1\.000 \| \*\*does", page)
    (tmp_path / "README.md").write_text("# a page of somebody else's")
    assert report.main(command) == 2

def test_curve_has_the_main_arm_as_a_point(runs: list[dict]) -> None:
    line = report.curve(runs, "base", "label temperature", "label_temperature")
    assert {arm: [*map(len, points.values())] for arm, points in line.items()} == {"1-D W": [3, 2]}
    found = next(run["collections"] for run in runs if run["arm"] == "1-D W" and run["seed"] == 1)
    votes = [found[name]["metrics"]["ndcg@10"] for name in SIZES if name != "sample"]
    assert line["1-D W"][0.3][1] == pytest.approx(fmean(votes))
    assert (report._number(-0.0001, "+"), report._p(0.0009), report._p(0.05)) == ("0.000", "< .001", ".050")
