"""The released ways to shape lists."""

from dataclasses import replace

import pytest
from conftest import write_jsonl
from test_data import EXPECTED, IRON, QRELS, TIDE, write_collection

from repro.data import GradedList
from repro.recipes import combine, real_lists, recipe

FIFTY = [replace(TIDE, id=str(n)) for n in range(50)]
P1, P2, P3, P4 = EXPECTED[0].values()
REAL = GradedList("r", " TIDE\u00a0", ["p", "n", "m"], [3, 1, 1])


def test_graded_lists_stay_as_they_are():
    assert recipe([TIDE, IRON], "graded", 0) == [TIDE, IRON]


def test_binary_is_one_positive_and_two_negatives():
    shaped = recipe(FIFTY, "binary", 0)
    passages = {tuple(item.passages) for item in shaped}
    assert passages == {("moon tide", "bank", "tea"), ("moon", "bank", "tea")}
    assert shaped[0].grades == [3, 0, 0]


def test_binary_draws_depend_on_seed_and_id_alone():
    first = recipe(FIFTY, "binary", 0)
    best = [item.id for item in first if item.passages[0] == "moon tide"]
    assert " ".join(best[:6]) == "1 2 3 6 7 8"  # golden: as in all earlier runs
    assert first[9:] == recipe(FIFTY[9:], "binary", 0)
    assert first != recipe(FIFTY, "binary", 1)


@pytest.mark.parametrize("name", ["binary", "mixed"])
def test_another_recipe_or_other_grades_are_refused(name):
    with pytest.raises(ValueError, match=rf"{name}: expected binary, .*; 'b' has \[1, 0\]"):
        recipe([IRON], name, 0)


@pytest.fixture
def folder(tmp_path):
    qrels = QRELS + "q1\tp3\t0\nq1\tp9\t0\nq2\tp3\t0\nq3\tp1\t1\n"
    return write_collection(tmp_path / "c", "train", qrels=qrels)


def test_real_lists_are_a_positive_and_two_others(folder):
    drawn = [real_lists(folder, seed=seed)[0] for seed in range(30)]
    positives = {item.passages[0] for item in drawn}
    assert positives == {P1, P4}
    assert all({*item.passages[1:]} == {P2, P3} for item in drawn)
    assert drawn[0].grades == [3, 1, 1]


def test_a_query_with_one_other_passage_has_two(folder):
    assert real_lists(folder)[1] == GradedList("q2", "Why rust", [P2, P3], [3, 1])


def test_what_real_lists_leave_out_is_counted(folder, capsys):
    assert [item.id for item in real_lists(folder)] == ["q1", "q2"]
    message = "1 of 3 queries lack a positive or another passage, left out: 'q3'"
    assert message in capsys.readouterr().err


def test_mined_passages_stand_in_a_file(folder):
    row = '{"qid": "q2", "docid": ["4", "p2", "p1", "p3", "p9", "4"]}\n'
    mined = write_jsonl(folder / "mined.jsonl", row + row.replace("q2", "unknown"))
    drawn = [real_lists(folder, mined, seed) for seed in range(50)]
    passages = {tuple(item.passages) for (item,) in drawn}
    assert len(passages) == 6  # p2 before the ordered pairs of p1, p3, 4
    assert {first for first, *_ in passages} == {P2}


@pytest.mark.parametrize(
    "field, row", [("docid", '{"qid": "q2", "docid": "p1"}'), ("qid", '{"docid": []}')]
)
def test_bad_mined_rows_are_named(folder, field, row):
    mined = write_jsonl(folder / "mined.jsonl", row)
    with pytest.raises(ValueError, match=rf"mined\.jsonl:1: field '{field}': expected"):
        real_lists(folder, mined)


def test_a_wrong_name_is_found_before_the_collection_is_read(tmp_path):
    with pytest.raises(ValueError, match=r"mined\.jsonl: not found"):
        real_lists(tmp_path / "nothing", tmp_path / "mined.jsonl")


def test_real_passages_stand_behind_the_synthetic_ones(capsys):
    other = replace(REAL, id="s", query="else")
    joined, alone = combine([TIDE, IRON], [REAL, other])
    assert joined.passages == ["moon tide", "moon", "bank", "tea", "p", "n", "m"]
    assert joined.grades == [3, 2, 1, 0, 3, 1, 1]
    assert alone == IRON
    assert "1 of 2 real lists have no synthetic partner, left out: 's'" in capsys.readouterr().err
