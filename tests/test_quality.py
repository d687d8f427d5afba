"""The quality report: hand-worked measures, order shares, filter, table, figure, command line."""

import json
import math
import statistics

import pytest
import torch

from repro import quality
from repro.lists import GradedList, lists_from_jsonl
from repro.plots import levels_figure
from repro.quality import length, measure, overlap, report, similarity, stem, table, words


def item(key, *passages, query="how do iron gates rust", grades=(3, 2, 1, 0)):
    return GradedList(key, query, list(passages), list(grades))


LISTS = [
    item(
        "a",
        "Iron gates rust when rain stays on them.",
        "An iron gate may be painted.",
        "Gates are old.",
        "Tea is hot.",
    ),
    item("b", "Rust never sleeps at all.", "Iron gates rust.", "Gates.", "Iron gates rust too."),
]


def test_words_and_endings():
    assert words("It's 3.5% — Café, l’eau!") == ["it's", "3", "5", "café", "l’eau"]
    assert stem("gates") == stem("gate") and stem("rusting") == stem("rusts") == stem("rusted") == "rust"
    assert stem("is") == "is" and stem("berries") == stem("berry")


def test_length_and_overlap_by_hand():
    """Content words of the query: iron, gates, rust."""
    pairs = [(LISTS[0].query, passage) for passage in LISTS[0].passages]
    assert length(pairs) == [8, 6, 3, 3]
    assert overlap(pairs) == pytest.approx([1, 2 / 3, 1 / 3, 0])
    assert overlap([("???", "iron")]) == [0.0]


def test_report_by_hand():
    results = measure(LISTS, {"length": length, "overlap": overlap})
    assert results[1]["overlap"] == pytest.approx({3: 1 / 3, 2: 1.0, 1: 1 / 3, 0: 1.0})
    found = report(results)["measures"]
    assert "in_order" not in found["length"]
    assert found["length"]["levels"]["3"] == {"mean": 6.5, "deviation": 1.5}
    # list a is in order; in list b, of the six pairs, only 2 > 1 is right (ties count as wrong)
    both = found["overlap"]
    assert (both["in_order"], both["top_first"], both["ends"]) == (0.5, 0.5, 0.5)
    assert both["pairs"] == pytest.approx((1 + 1 / 6) / 2, abs=1e-4)
    levels = both["levels"]["0"]
    assert levels["mean"] == 0.5 and levels["deviation"] == pytest.approx(statistics.pstdev([0, 1]))


def test_random_scores_give_the_stated_shares():
    generator = torch.Generator().manual_seed(0)
    lists = [item(str(n), *"abcd") for n in range(6000)]
    found = report(measure(lists, {"x": lambda pairs: torch.rand(len(pairs), generator=generator).tolist()}))[
        "measures"
    ]["x"]
    for name, expected in (("in_order", 1 / 24), ("top_first", 1 / 4), ("ends", 1 / 2), ("pairs", 1 / 2)):
        assert found[name] == pytest.approx(expected, abs=0.02)


def test_passages_of_one_grade_are_averaged():
    double = item("x", "a", "a b c", "a b", grades=(1, 1, 0))
    assert measure([double], {"length": length}) == [{"length": {1: 2.0, 0: 2.0}}]


class Letters:
    """Embeds a text as its counts of a, b, c."""

    def encode(self, texts, kind, batch_size=32):
        assert kind in ("query", "passage")
        return torch.tensor([[text.count(letter) for letter in "abc"] for text in texts], dtype=torch.float32)


def test_similarity_is_the_dot_product():
    assert similarity(Letters())([("ab", "aab"), ("c", "ab")]) == [3.0, 0.0]


def test_empty_report_and_table():
    assert report([]) == {"lists": 0, "measures": {}}
    text = table({"x": report(measure(LISTS, {"length": length, "overlap": overlap})) | {"note": "2 of 3"}})
    assert (
        text.splitlines()[0] == "x: 2 lists, 2 of 3" and "pairs 0.58" in text and len(text.splitlines()) == 3
    )


def test_figure_has_labels():
    reports = {name: report(measure(LISTS, {"length": length, "overlap": overlap})) for name in ("one", "two", "three")}
    reports["failed"] = report([])
    picture = levels_figure(reports, quality.LABELS)
    assert picture.get_suptitle() and len(picture.axes) == 2
    for axis, name in zip(picture.axes, ("length", "overlap"), strict=True):
        assert axis.get_ylabel() == quality.LABELS[name] and axis.get_xlabel() == "grade of the passage"
    shades = [line[0].get_color() for line in picture.axes[0].containers]
    markers = [line[0].get_marker() for line in picture.axes[0].containers]
    assert len(set(shades)) == len(set(markers)) == 3  # told apart without colour
    assert [text.get_text() for text in picture.legends[0].get_texts()] == ["one", "two", "three"]


def lists_file(path, lists=LISTS):
    rows = [
        {
            "id": x.id,
            "query": x.query,
            "passages": {str(g): p for g, p in zip(x.grades, x.passages, strict=True)},
        }
        for x in lists
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_command_line_report_and_filter(tmp_path, capsys):
    path = lists_file(tmp_path / "lists.jsonl")
    kept, out, picture = tmp_path / "kept.jsonl", tmp_path / "r.json", tmp_path / "f.png"
    command = [
        "--lists",
        f"mine={path}",
        "--model",
        "none",
        "--encoder",
        "none",
        "--out",
        str(out),
        "--figure",
        str(picture),
    ]
    assert quality.main([*command, "--keep", str(kept), "--by", "overlap", "--share", "0.9"]) == 0
    captured = capsys.readouterr()
    assert "mine: 2 lists" in captured.out and "kept 1 of 2" in captured.err
    assert [x.id for x in lists_from_jsonl(kept)] == ["a"] and lists_from_jsonl(kept)[0] == LISTS[0]
    content = json.loads(out.read_text())
    assert content["reports"]["mine"]["measures"]["overlap"]["in_order"] == 0.5 and picture.exists()


def test_command_line_with_models(tmp_path, monkeypatch):
    """Likelihood and similarity go through the models named; --limit draws with the seed."""
    from tiny_lm import make_model

    from repro.encoder import BiEncoder

    path = lists_file(tmp_path / "lists.jsonl", [item(str(n), *"abcd") for n in range(9)])
    asked = []
    monkeypatch.setattr(BiEncoder, "load", lambda name, device, dtype: asked.append(name) or Letters())
    out = tmp_path / "r.json"
    command = [
        "--lists",
        str(path),
        "--model",
        str(make_model(tmp_path / "lm")),
        "--encoder",
        "some",
        "--limit",
        "4",
    ]
    assert quality.main([*command, "--out", str(out), "--device", "cpu"]) == 0
    found = json.loads(out.read_text())["reports"]["lists"]
    assert asked == ["some"] and found["lists"] == 4
    assert set(found["measures"]) == {"length", "overlap", "likelihood", "similarity"}
    assert all(-20 < level["mean"] < 0 for level in found["measures"]["likelihood"]["levels"].values())
    assert not math.isnan(found["measures"]["similarity"]["pairs"])


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        (["--keep", "x", "--by", "similarity"], "--by similarity: is not measured"),
        (["--lists", "none.jsonl"], "none.jsonl"),
        (["--lists", "{path}", "{path}"], "is used twice"),
        (["--out", "{path}/r.json"], "Not a directory"),
    ],
)
def test_command_line_refusals(tmp_path, capsys, more, reason):
    path = str(lists_file(tmp_path / "lists.jsonl"))
    command = [
        "--lists",
        path,
        "--model",
        "none",
        "--encoder",
        "none",
        *(part.format(path=path) for part in more),
    ]
    assert quality.main(command) == 2
    err = capsys.readouterr().err.splitlines()[-1]
    assert err.startswith("error: ") and reason in err


def test_authored_lists_are_reported_by_version(capsys):
    from pathlib import Path

    path = Path(quality.__file__).parent.parent / "cached_prompts" / "authored.jsonl"
    assert quality.main(["--lists", str(path), "--model", "none", "--encoder", "none"]) == 0
    out = capsys.readouterr().out
    assert "authored v1: 540 lists" in out and "authored v2: 720 lists" in out


def test_a_plan_that_failed_on_every_query_is_reported(tmp_path, capsys):
    failed = {"id": "a", "query": "q", "attempt": 0, "passages": None, "error": "no level found"}
    good = {"id": "a", "query": "q", "attempt": 1, "passages": dict.fromkeys("3210", "text"), "error": None}
    (tmp_path / "bad.jsonl").write_text(json.dumps(failed) + "\n")
    (tmp_path / "later.jsonl").write_text(json.dumps(failed) + "\n" + json.dumps(good) + "\n")
    files = [str(tmp_path / name) for name in ("bad.jsonl", "later.jsonl")]
    figure_file = str(tmp_path / "f.png")
    command = ["--lists", *files, "--model", "none", "--encoder", "none", "--figure", figure_file]
    assert quality.main(command) == 0
    out = capsys.readouterr().out
    assert "bad: 0 lists, 0 of 1 queries have passages, 0 at the first attempt" in out
    assert "later: 1 lists, 1 of 1 queries have passages, 0 at the first attempt" in out


def test_common_keeps_the_queries_that_all_sources_have(tmp_path, capsys):
    for name, queries in {"a": "xyz", "b": "yz"}.items():
        rows = [{"query": query, "passages": {"1": f"{query} passage", "0": "another"}} for query in queries]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "other.jsonl").write_text(json.dumps({"query": "w", "passages": {"1": "one", "0": "two"}}) + "\n")
    command = ["--common", "--model", "none", "--encoder", "none", "--lists"]
    assert quality.main([*command, str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")]) == 0
    assert "a: 2 lists" in (out := capsys.readouterr().out) and "b: 2 lists" in out
    assert quality.main([*command, str(tmp_path / "a.jsonl"), str(tmp_path / "other.jsonl")]) == 2
    assert "expected queries that all sources have" in capsys.readouterr().err
