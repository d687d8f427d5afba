"""The lesson and its solutions: committed as they ran, with checks that can fail."""

import re
from itertools import pairwise
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).parents[1]
PAGES = ("reproduce.ipynb", "tests/solutions.ipynb")


def code(page, tag=None):
    """The code cells of a page; with a tag, those that have it."""
    cells = nbformat.read(ROOT / page, as_version=4).cells
    cells = [cell for cell in cells if cell.cell_type == "code"]
    return [cell for cell in cells if tag in (None, *cell.metadata.get("tags", ()))]


@pytest.fixture(params=PAGES)
def cells(request):
    return code(request.param)


@pytest.fixture
def outputs(cells):
    return [output for cell in cells for output in cell.outputs]


@pytest.fixture
def lesson(monkeypatch):
    """The names that an exercise may use."""
    monkeypatch.chdir(ROOT)
    names = {}
    for cell in code("tests/solutions.ipynb", "setup"):
        exec(cell.source, names)
    return names


def test_a_page_is_committed_in_the_order_in_which_it_ran(cells):
    counts = [cell.execution_count for cell in cells]
    assert counts == list(range(1, len(counts) + 1))


def test_a_page_ran_without_an_error(outputs):
    assert "error" not in {output["output_type"] for output in outputs}


def test_no_output_needs_a_widget_or_names_a_folder_of_the_machine(outputs):
    pattern = r"widget|/(?:root|home|tmp|work|Users)/"
    assert re.findall(pattern, str(outputs)) == []


def test_every_figure_is_described_in_words_below_it(outputs):
    for picture, words in pairwise(outputs):
        if "image/png" in picture.get("data", {}):
            description = picture["metadata"]["image/png"]["alt"]
            assert description in words["data"]["text/markdown"]


@pytest.mark.parametrize("number", range(1, 7))
@pytest.mark.parametrize(
    "page, solved", [("reproduce.ipynb", False), ("tests/solutions.ipynb", True)]
)
def test_an_exercise_is_open_until_it_is_solved(lesson, number, page, solved):
    (cell,) = code(page, f"ex{number}")
    exec(cell.source, lesson)
    assert lesson["solved"] == {number: solved}


def test_a_solution_keeps_the_check_of_its_exercise():
    lesson, solutions = [
        {cell.source.partition("@exercise")[2] for cell in code(page)} for page in PAGES
    ]
    assert lesson == solutions


def test_the_lesson_says_what_the_records_say(lesson, capsys):
    for cell in code("reproduce.ipynb", "records"):
        exec(cell.source, lesson)
    printed = re.findall("NOT SO|as the records say", capsys.readouterr().out)
    assert set(printed) == {"as the records say"}
