"""The lesson and its solutions: committed as they ran, with checks that can fail."""

import re
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import nbformat
import pytest

ROOT = Path(__file__).parents[1]
PAGES = ("reproduce.ipynb", "tests/solutions.ipynb")
EXERCISES = range(1, 7)


def code(page: str, tag: str | None = None) -> list[dict[str, Any]]:
    """The code cells of a page; with a tag, those that have it."""
    cells = nbformat.read(ROOT / page, as_version=4).cells
    cells = [cell for cell in cells if cell.cell_type == "code"]
    return [cell for cell in cells if tag in (None, *cell.metadata.get("tags", ()))]


def outputs(page: str) -> list[dict[str, Any]]:
    return list(chain(*(cell.outputs for cell in code(page))))


@pytest.fixture
def lesson(monkeypatch):
    """The names that an exercise may use."""
    monkeypatch.chdir(ROOT)
    names: dict[str, Any] = {}
    for cell in code("tests/solutions.ipynb", "setup"):
        exec(cell.source, names)
    return names


@pytest.mark.parametrize("page", PAGES)
def test_a_page_is_committed_in_the_order_in_which_it_ran(page):
    counts = [cell.execution_count for cell in code(page)]
    assert counts == list(range(1, len(counts) + 1))


@pytest.mark.parametrize("page", PAGES)
def test_a_page_ran_without_an_error(page):
    assert "error" not in {output["output_type"] for output in outputs(page)}


@pytest.mark.parametrize("page", PAGES)
def test_no_output_needs_a_widget_or_names_a_folder_of_the_machine(page):
    pattern = r"widget|/(?:root|home|tmp|work|Users)/"
    assert re.findall(pattern, str(outputs(page))) == []


def test_every_figure_is_described_in_words_below_it():
    for picture, words in pairwise(outputs("reproduce.ipynb")):
        if "image/png" in picture.get("data", {}):
            description = picture["metadata"]["image/png"]["alt"]
            assert description in words["data"]["text/markdown"]


@pytest.mark.parametrize("page", PAGES)
def test_no_line_of_code_is_cut_on_a_narrow_page(page):
    for cell in code(page):
        assert [line for line in cell.source.splitlines() if len(line) > 84] == []


@pytest.mark.parametrize("number", EXERCISES)
def test_an_exercise_is_open_until_it_is_solved(lesson, number):
    (cell,) = code("reproduce.ipynb", f"ex{number}")
    exec(cell.source, lesson)
    assert lesson["solved"] == {number: False}


@pytest.mark.parametrize("number", EXERCISES)
def test_a_solution_passes_the_check_of_its_exercise(lesson, number):
    (task,) = code("reproduce.ipynb", f"ex{number}")
    (solution,) = code("tests/solutions.ipynb", f"ex{number}")
    exec(solution.source, lesson)
    assert lesson["solved"] == {number: True}
    assert solution.source.split("@exercise")[1] == task.source.split("@exercise")[1]


def test_the_lesson_says_what_the_records_say(lesson, capsys):
    for cell in code("reproduce.ipynb", "records"):
        exec(cell.source, lesson)
    printed = re.findall("NOT SO|as the records say", capsys.readouterr().out)
    assert set(printed) == {"as the records say"}
