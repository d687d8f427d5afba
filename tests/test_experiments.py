"""Arms, tuning, records and report on a tiny model: same budget, resumable, equal to the plain path, nothing by hand."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from test_train import lists, write_lists

from repro import experiments, report, tune
from repro.arms import ABLATIONS, MAIN, list_sets
from repro.data import load_beir
from repro.encoder import BiEncoder
from repro.evaluate import evaluate_model
from repro.experiments import main
from repro.lists import write_beir
from repro.states import StateBank
from repro.stats import compare


def tiny_model(tiny_llama: Path, folder: Path) -> Path:
    encoder = BiEncoder.load(tiny_llama, device="cpu", projection=torch.eye(16), normalise=True)
    encoder.save(folder / "start")
    return folder / "start"


@pytest.fixture(scope="module")
def bench(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two arms, two seeds, one collection, frozen layers shared; two trials and six steps an arm."""
    folder = tmp_path_factory.mktemp("experiments")
    write_beir(lists(8), folder / "tiny", split="test")
    options = ["--data", str(folder / "tiny"), "--authored", str(write_lists(folder / "lists.jsonl", 32)), "--generated", "", "--group", "main",
               "--arms", "InfoNCE", "1-D W", "--seeds", "0", "1", "--model", str(tiny_model(tiny_llama, folder)), "--device", "cpu",
               "--results", str(folder / "results"), "--keep-models", str(folder / "models")]  # fmt: skip
    (folder / "options.json").write_text(json.dumps(options))
    return folder


@pytest.fixture(scope="module")
def results(bench: Path) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        small(patch, bench)
        assert main(json.loads((bench / "options.json").read_text())) == 0
    return bench


def small(patch: pytest.MonkeyPatch, folder: Path) -> None:
    patch.setenv("SYCL_CACHE", str(folder / "cache"))
    patch.setattr(tune, "TRIALS", 2)
    patch.setattr(tune, "STEPS", 6)
    patch.setattr(tune, "BATCH", 4)


def test_shared_states_give_the_scores_of_the_plain_path(results: Path) -> None:
    record = json.loads((results / "results/main/1-D-W-seed1.json").read_text())
    found = record["collections"]["tiny"]
    corpus, queries, qrels = load_beir(results / "tiny")
    plain = evaluate_model(BiEncoder.load(results / "models/main/1-D-W-seed1", device="cpu"), corpus, queries, qrels)
    assert found["metrics"] == pytest.approx(plain["metrics"], abs=1e-5)
    for query, row in plain["per_query"].items():
        assert found["per_query"][query] == pytest.approx([row[measure] for measure in record["measures"]], abs=1e-5)
    assert (record["group"], record["arm"], record["seed"], found["passages"]) == ("main", "1-D W", 1, 32)
    told = record["training"]
    assert told["loss"] == "wasserstein_1d" and told["steps"] == 6 and told["batch_size"] == 4 and told["queries"] == 29
    assert 0 < told["development"] <= 1 and record["machine"]["torch"] == torch.__version__


def test_every_arm_gets_the_same_trials_and_the_best_one_is_used(results: Path) -> None:
    tuning = json.loads((results / "results/tuning.json").read_text())
    assert {arm: len(found["trials"]) for arm, found in tuning.items()} == {"InfoNCE": 2, "1-D W": 2}
    for arm, found in tuning.items():
        best = max(found["trials"], key=lambda trial: trial["ndcg@10"])
        assert found["best"].items() <= best.items()
        record = json.loads((results / f"results/main/{arm.replace(' ', '-')}-seed0.json").read_text())
        assert found["best"].items() <= record["training"].items()


def test_trials_are_drawn_then_move_from_the_best_to_its_neighbours() -> None:
    arm = next(arm for arm in MAIN if arm.name == "1-D W")
    rows: list[dict] = []
    while len(rows) < tune.TRIALS:
        settings = tune.next_trial(arm, rows)
        assert settings == tune.next_trial(arm, rows) and settings not in [{k: r[k] for k in arm.space} for r in rows]
        rows.append({**settings, "ndcg@10": -abs(settings["lr"] - 2e-4) - abs(settings["temperature"] - 0.1) - (settings["axis"] == "gain")})
    best = max(rows, key=lambda row: row["ndcg@10"])
    assert best["lr"] == 2e-4 and best["temperature"] == 0.1 and best["axis"] == "grade"
    changed = [sum(row[key] != best[key] for key in arm.space) for row in rows]
    assert sum(changed[tune.TRIALS // 2 :]) < 0.7 * sum(changed[: tune.TRIALS // 2])
    whole = next(arm for arm in MAIN if arm.name == "InfoNCE")
    rows = []
    while (settings := tune.next_trial(whole, rows)) is not None:
        rows.append({**settings, "ndcg@10": 0.0})
    assert len(rows) == 16 and len({tuple(row.items()) for row in rows}) == 16


def test_second_run_repeats_nothing_and_a_lost_record_is_made_again(results: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    small(monkeypatch, results)
    options = json.loads((results / "options.json").read_text())[:-2]
    files = {path: path.stat().st_mtime_ns for path in (results / "results").rglob("*.json")}
    assert len(files) == 5
    assert main(options) == 0
    assert files == {path: path.stat().st_mtime_ns for path in (results / "results").rglob("*.json")}
    lost = results / "results/main/InfoNCE-seed0.json"
    before = json.loads(lost.read_text())
    lost.unlink()
    assert main(options) == 0
    after = json.loads(lost.read_text())
    assert after["collections"] == before["collections"]
    assert {k: v for k, v in after["training"].items() if k != "minutes"} == {k: v for k, v in before["training"].items() if k != "minutes"}
    # a collection that is named later joins the records; what was measured stays
    write_beir(lists(5), tmp_path / "second", split="test")
    assert main([*options, "--data", str(results / "tiny"), str(tmp_path / "second")]) == 0
    grown = json.loads(lost.read_text())["collections"]
    assert list(grown) == ["tiny", "second"] and grown["tiny"] == before["collections"]["tiny"]
    for path in files:  # as the other tests expect them
        if path.name != "tuning.json":
            record = json.loads(path.read_text())
            record["collections"].pop("second")
            experiments.write_record(path, record)


def test_a_kill_between_collections_loses_one_collection(results: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    small(monkeypatch, results)
    write_beir(lists(5), tmp_path / "second", split="test")
    options = json.loads((results / "options.json").read_text())[:-4]
    options += ["--arms", "InfoNCE", "--seeds", "7", "--results", str(tmp_path / "results"), "--data", str(results / "tiny"), str(tmp_path / "second")]
    (tmp_path / "results").mkdir()
    (tmp_path / "results/tuning.json").write_text((results / "results/tuning.json").read_text())
    original = experiments.evaluate_model
    scored = []

    def killed(model, corpus, *args, **kwargs):  # noqa: ANN001, ANN002, ANN003, ANN202
        if scored:
            raise KeyboardInterrupt
        scored.append(len(corpus))
        return original(model, corpus, *args, **kwargs)

    monkeypatch.setattr(experiments, "evaluate_model", killed)
    with pytest.raises(KeyboardInterrupt):
        main(options)
    monkeypatch.setattr(experiments, "evaluate_model", original)
    path = tmp_path / "results/main/InfoNCE-seed7.json"
    half = json.loads(path.read_text())
    assert list(half["collections"]) == ["tiny"]
    assert main(options) == 0
    whole = json.loads(path.read_text())
    assert list(whole["collections"]) == ["tiny", "second"] and whole["collections"]["tiny"] == half["collections"]["tiny"]
    path.unlink()
    assert main(options) == 0
    assert json.loads(path.read_text())["collections"] == whole["collections"]


def test_records_hold_no_text(results: Path) -> None:
    texts = [text for item in lists(32) for text in [item.query, *item.passages]]
    for path in (results / "results").rglob("*.json"):
        content = path.read_text()
        assert not [text for text in texts if text in content]


def test_an_ablation_needs_its_parents_settings_and_missing_data_is_said(results: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:  # noqa: ANN001
    small(monkeypatch, results)
    options = json.loads((results / "options.json").read_text())[:-2]
    assert main([*options, "--group", "levels", "--arms", "KL, 2 levels"]) == 2
    assert "expected the settings of 'KL', found none; run --group main first" in capsys.readouterr().err
    assert main([*options, "--arms", "InfoNCE, real"]) == 0
    assert "left out for want of --real, --real-graded or --generated: InfoNCE, real" in capsys.readouterr().err


def test_list_sets_split_once_and_never_train_on_held_out_queries(tmp_path: Path) -> None:
    authored, graded = write_lists(tmp_path / "a.jsonl", 40), tmp_path / "g.jsonl"
    rows = [{"id": f"r{n}", "query": f"real {n}", "passages": {"3": "a b", "2": "b", "1": "c", "0": "d"}} for n in range(10)]
    graded.write_text("".join(json.dumps(row) + "\n" for row in rows))
    real = [type(item)(f"r{n}", f"real {n}", [f"{n} one", f"{n} two", f"{n} three", f"{n} four", f"{n} five"], [0, 1, 0, 0, 0]) for n, item in enumerate(lists(20))]
    write_beir(real, tmp_path / "real", split="train")
    sets = list_sets(str(authored), None, str(tmp_path / "real"), str(graded))
    for name, one in sets.items():
        held = {item.query for item in one.held_out}
        assert held and not held & {item.query for item in one.train}, name
    assert len(sets["synthetic"].train) == 36 and len(sets["real"].train) == 18
    assert {tuple(item.grades) for item in sets["4 levels"].train} == {(3, 2, 1, 0)}
    assert {tuple(item.grades) for item in sets["3 levels"].train} == {(3, 1, 1, 0)}
    assert {tuple(item.grades) for item in sets["2 levels"].train} == {(3, 0, 0, 0)}
    assert {tuple(item.grades) for item in sets["best and worst"].train} == {(3, 0)}
    assert {tuple(item.grades) for item in sets["2 levels"].held_out} == {(3, 2, 1, 0)}  # judged as before
    assert {tuple(item.grades) for item in sets["real"].train} == {(3, 1, 1, 1)}
    held_real = {item.query for item in sets["real"].held_out}
    plus, both = sets["synthetic+"], sets["synthetic+real"]
    assert not held_real & {item.query for item in plus.train} and {item.id for item in plus.train} == {item.id for item in both.train}
    joined = [item for item in both.train if item.id.startswith("r")]
    assert {tuple(item.grades) for item in sets["synthetic+all real"].train} == {(3, 2, 1, 0), (3, 2, 1, 0, 3, 1, 1), (3, 1, 1)}
    assert joined and {tuple(item.grades) for item in joined} == {(3, 2, 1, 0, 3, 1, 1)}
    assert [item.query for item in sets["real, same"].train] == [item.query for item in sets["synthetic, same"].train] != []
    for group in ABLATIONS.values():
        assert {arm.lists for arm in group} <= sets.keys() | {"authored", "local model"} and {arm.settings_of for arm in group} <= {a.name for a in MAIN}


def test_development_score_is_that_of_the_held_out_queries(tiny_llama: Path, tmp_path: Path) -> None:
    sets = list_sets(str(write_lists(tmp_path / "a.jsonl", 40)))
    encoder = BiEncoder.load(tiny_model(tiny_llama, tmp_path), device="cpu")
    encoder.freeze(4)
    both = [*sets["synthetic"].held_out, *sets["synthetic"].train]
    corpus = {f"{item.id}-{j}": passage for item in both for j, passage in enumerate(item.passages)}
    qrels = {item.id: {f"{item.id}-{j}": grade for j, grade in enumerate(item.grades)} for item in sets["synthetic"].held_out}
    queries = {item.id: item.query for item in sets["synthetic"].held_out}
    expected = evaluate_model(encoder, corpus, queries, qrels, top_k=10, measures=("ndcg@10",))["metrics"]["ndcg@10"]
    assert tune.development_ndcg(encoder, sets["synthetic"], StateBank(encoder, progress=False)) == pytest.approx(expected)


def test_training_leaves_the_start_alone(tiny_llama: Path, tmp_path: Path) -> None:
    sets = list_sets(str(write_lists(tmp_path / "a.jsonl", 40)))
    start = BiEncoder.load(tiny_model(tiny_llama, tmp_path), device="cpu")
    start.freeze(4)
    arm, settings = MAIN[0], {"lr": 1e-2, "temperature": 0.1, "steps": 5, "batch_size": 4}
    bank = StateBank(start, progress=False)
    encoder, told = tune.train_arm(arm, settings, sets["synthetic"], 0, start, bank)
    again, _ = tune.train_arm(arm, settings, sets["synthetic"], 0, start, bank)
    other, _ = tune.train_arm(arm, settings, sets["synthetic"], 1, start, bank)
    assert torch.equal(start.projection, torch.eye(16)) and not torch.equal(encoder.projection, start.projection)
    assert torch.equal(encoder.projection, again.projection) and not torch.equal(encoder.projection, other.projection)
    assert told["steps"] == 5 and told["freeze"] == 4


def test_tables_come_from_the_records(results: Path, tmp_path: Path) -> None:
    records = report.read_records(results / "results")
    rows = report.means_table(records, ("main",)).splitlines()
    assert [row.split(" | ")[0].strip("| ") for row in rows[2:]] == ["InfoNCE", "1-D W"]
    runs = {arm: [r["collections"]["tiny"] for r in records if r["arm"] == arm] for arm in ("InfoNCE", "1-D W")}
    by_hand = [run["metrics"]["ndcg@10"] for run in runs["1-D W"]]
    assert f"{np.mean(by_hand):.3f} ± {np.std(by_hand, ddof=1):.3f}" in rows[-1]
    sides = [{q: np.mean([run["per_query"][q][0] for run in runs[arm]]) for q in runs[arm][0]["per_query"]} for arm in ("InfoNCE", "1-D W")]
    test = compare(*sides)
    assert f"{test.difference:+.3f} ({test.low:+.3f} to {test.high:+.3f}, p {test.p:.2g})" in report.differences_table(records, ("main", "InfoNCE"))
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{report.BEGIN}\nstale words\n{report.END}\nafter\n")
    assert report.main(["--results", str(results / "results"), "--readme", str(readme)]) == 0
    text = readme.read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "stale words" not in text and rows[-1] in text
    assert "4 trained models, seeds 0, 1," in text and "tiny: 32 passages, 8 queries" in text and "What tuning chose" in text


def test_report_names_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert report.main(["--results", str(tmp_path)]) == 2
    assert "expected run records, found none" in capsys.readouterr().err
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "x.json").write_text("{")
    assert report.main(["--results", str(tmp_path)]) == 2
    assert "x.json: expected a run record" in capsys.readouterr().err


def test_random_start_is_small_seeded_and_all_of_it_trains(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experiments, "BASE_CHECKPOINT", str(tiny_llama))
    one, same, other = (experiments.random_encoder(seed, "cpu") for seed in (0, 0, 1))
    vectors = [encoder.encode(["moon tide", "iron rust"]) for encoder in (one, same, other)]
    assert torch.equal(vectors[0], vectors[1]) and not torch.equal(vectors[0], vectors[2])
    assert all(p.requires_grad for p in one.parameters()) and one.frozen == 0
