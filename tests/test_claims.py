"""Paired statistics against brute force and scipy, the rule, the records, and the pages made from them."""

import gzip
import itertools
import re
from pathlib import Path
from statistics import fmean, stdev

import numpy as np
import pytest
from scipy import stats

from repro.checkpoints import write_json
from repro.experiment import claims, report
from repro.experiment.claims import compare, judge, read_runs, write_runs

PLACE = {"commit": "c0ffee", "machine": {"device": "cpu", "processor": "x86_64"}, "dtype": "float32"}
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
    return {**run, "minutes": 0.25, "collections": found, "per_query": scores}

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

def test_holm_by_hand_and_the_rule() -> None:
    # sorted: .005 * 4, .01 * 3, .03 * 2, .04 * 1 = .02, .03, .06, .04, and .04 is raised to .06
    found = claims.holm({"c": 0.03, "a": 0.01, "d": 0.005, "b": 0.04})
    assert found == pytest.approx({"c": 0.06, "a": 0.03, "d": 0.02, "b": 0.06})
    assert claims.holm({"x": 0.5, "y": 0.9}) == {"x": 1.0, "y": 1.0}
    cases = {(0.05, 0.08, 0.05): "holds", (0.005, 0.008, 0.01): "holds", (0.05, 0.08, 0.051): "undecided"}
    cases |= {(-0.01, 0.012, 0.05): "does not hold", (-0.01, 0.012, 0.051): "undecided"}
    cases |= {(0.0, 0.0099, 0.9): "does not hold", (0.0, 0.01, 0.9): "undecided"}
    for (d, high, p), expected in cases.items():
        assert claims.verdict(claims.Comparison(d, -1, high, 0.5, 9), p) == expected

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
    write_runs(tmp_path / "a", runs)
    write_runs(tmp_path / "b", [dict(reversed(run.items())) for run in reversed(read_runs(tmp_path / "a"))])
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

BROKEN = (  # file, what to replace, by what, the place that the message names
    ("runs.jsonl", '"arm": "KL"', '"arms": "KL"', "runs.jsonl:16: .*KeyError: 'arm'"),
    ("runs.jsonl", '"seed": 1', '"seed": 0', "runs.jsonl:3: .*same start, arm and seed"),
    ("runs.jsonl", '"ndcg@10": 0.', '"ndcg@10": 1.', "runs.jsonl:1, cranfield: .*count or mean"),
    ("runs.jsonl", '"queries": 30', '"queries": 31', "runs.jsonl:1, cranfield: .*count or mean"),
    ("per_query.csv.gz", "q007,0.", "q007,x.", "per_query.csv.gz:9: .*'x."),
    ("per_query.csv.gz", ",BM25,,cranfield,q007", ",BM25,,cranfeld,q007", "runs.jsonl:1, cranfield"),
    ("per_query.csv.gz", ",BM25,,cranfield,q007", "BM25", "per_query.csv.gz:9: "))

@pytest.mark.parametrize("name, old, new, message", BROKEN)
def test_bad_records_are_named(runs, tmp_path: Path, name: str, old: str, new: str, message: str) -> None:
    write_runs(tmp_path, runs)
    unpack, pack = (gzip.decompress, gzip.compress) if name.endswith("gz") else (bytes, bytes)
    text = unpack((tmp_path / name).read_bytes()).decode()
    (tmp_path / name).write_bytes(pack(text.replace(old, new, 1).encode()))
    with pytest.raises(ValueError, match=message):
        read_runs(tmp_path)

def test_pages_show_the_records_and_nothing_else(runs, tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.setattr(claims, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(report, "README", tmp_path / "README.md")
    report.README.write_text("# Kit\n<!-- results -->\nold\n<!-- /results -->\nend\n")
    write_runs(claims.RESULTS, runs)
    best, values = {"lr": 8e-4, "order": 2}, {8e-4: 0.452, 4e-4: 0.433, 2e-4: 0.401}
    trials = [{**best, "lr": lr, "ndcg@10": value} for lr, value in values.items()]
    tuning = {"base": {"1-D W": {"best": best, "start": 0.397, "trials": trials}}}
    write_json(claims.RESULTS / "tuning.json", tuning)
    write_json(claims.RESULTS / "bench.json", {"machine": {}, "rows": [{"what": "loss", "ratio": 3.125}]})
    assert [report.main(options) for options in (["--check"], [], ["--check"])] == [2, 0, 0]
    page, readme = (claims.RESULTS / "README.md").read_text(encoding="utf-8"), report.README.read_text()
    assert page.count(tuned := "lr 0.0008 (edge), order 2 |") == 1 and "-.000" not in page
    known = [*values.values(), 0.397, 3.125, 0.5, 0.75]
    for arm in {run["arm"] for run in runs}:
        found = [run["collections"] for run in runs if run["arm"] == arm]
        means = [[row[name]["metrics"]["ndcg@10"] for name in SIZES] for row in found]
        means = [[*row, fmean([row[0], *row[2:]])] for row in means]  # without the sample
        known += [f(column) for column in zip(*means, strict=True) for f in (fmean, stdev)[: len(found)]]
    for row in (*judge(runs, "base"), *judge(runs, "base", report.SECONDARY)):
        known += [row.p, *(x for one in (row.comparison, *row.collections.values()) if one for x in one[:4])]
    shown = {*re.findall(r"\d*(\.\d{3,})", page.replace(tuned, "") + readme)}
    assert len(shown) > 100 and shown <= {f"{abs(x):.{n}f}"[1:] for x in known for n in (3, 4)}
    assert re.search(r"\| C1 \|.*\| 0\.0005 \| \*\*holds.*\n(.*\n)*\| C5 \|.*\| 1\.0000 \| \*\*does", page)
    cell = "holds, +{:.3f} ({:.3f} to {:.3f})".format(*judge(runs, "base")[0].comparison).replace("0.", ".")
    assert f"| C1: 1-D W over InfoNCE | {cell} | not measured |\n" in readme and readme.endswith("-->\nend\n")
    assert "on wikiqa, cranfield, scifact. base: float32, cpu x86_64, seeds 0 1 2.\n" in readme
    report.README.write_text(readme.replace("holds", "fails"))
    assert report.main(["--check"]) == 2 and f"{report.README}: out of date" in capsys.readouterr().err
    report.README.write_text("# Kit\n")
    assert [report.main([]), report.main(["--check"])] == [0, 0] and report.README.read_text() == "# Kit\n"
    assert capsys.readouterr().err.count("without <!-- results -->") == 2

def test_readme_block_is_small_at_its_longest(monkeypatch: pytest.MonkeyPatch) -> None:
    worst = {"comparison": claims.Comparison(-0.021, -0.041, -0.011, 0.01, 9), "verdict": "does not hold"}
    rows = [row._replace(**worst) for row in judge([], "base")]
    monkeypatch.setattr(claims, "judge", lambda runs, start: rows)
    shared = {"group": "main", "arm": "KL", "trained": {**PLACE, "dtype": "bfloat16"}}
    shared["collections"] = dict.fromkeys(("dl19-pool", "wikiqa", "cranfield", "scifact"))
    text = report.summary([{**shared, "start": x, "seed": n} for x in report.STARTS for n in range(5)])
    assert len(text.encode()) <= 900 and text.count("| does not hold") == 10 and "..." not in text

def test_curve_has_the_main_arm_as_a_point(runs: list[dict]) -> None:
    line = report.curve(runs, "base", "label temperature", "label_temperature")
    assert {arm: [*map(len, points.values())] for arm, points in line.items()} == {"1-D W": [3, 2]}
    found = next(run["collections"] for run in runs if run["arm"] == "1-D W" and run["seed"] == 1)
    votes = [found[name]["metrics"]["ndcg@10"] for name in SIZES if name != "sample"]
    assert line["1-D W"][0.3][1] == pytest.approx(fmean(votes))
