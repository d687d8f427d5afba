"""The lesson, its solutions, and README: committed as they ran, checks that can fail, commands that exist."""

import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import pytest
import sentence_transformers
from conftest import graded_lists

from repro import plots
from repro.encoder import BiEncoder
from repro.losses import expand_labels, wasserstein_1d

ROOT = Path(__file__).parents[1]
PAGES = ("reproduce.ipynb", "tests/solutions.ipynb")
README = (ROOT / "README.md").read_text(encoding="utf-8")

def cells(page: str, kind: str = "code") -> list[dict[str, Any]]:
    notebook = json.loads((ROOT / page).read_text(encoding="utf-8"))
    found = [cell for cell in notebook["cells"] if cell["cell_type"] == kind]
    return [{**cell, "source": "".join(cell["source"])} for cell in found]

def exercise(page: str, number: int) -> str:
    (found,) = [cell["source"] for cell in cells(page) if f"\n@exercise({number})\n" in cell["source"]]
    return found

@pytest.fixture
def lesson(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The names that the lesson's first three code cells define."""
    monkeypatch.chdir(ROOT)
    names: dict[str, Any] = {}
    for cell in cells("reproduce.ipynb")[:3]:
        exec(cell["source"], names)
    return names

@pytest.mark.parametrize("page", PAGES)
def test_page_is_committed_as_it_ran(page: str) -> None:
    text, code = (ROOT / page).read_text(encoding="utf-8"), cells(page)
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell["outputs"]]
    assert not [output for output in outputs if output["output_type"] == "error"]
    assert "widget" not in json.dumps(outputs) and "widgets" not in json.loads(text)["metadata"]
    assert not re.search(r"/(root|home|tmp|work|Users)/", json.dumps(outputs)), "a machine's folder"
    assert all(one["metadata"]["image/png"]["alt"] for one in outputs if "image/png" in one.get("data", {}))
    assert len(text.encode()) < 1_500_000 and max(len(cell["source"].splitlines()) for cell in code) <= 25
    assert sum(len(cell["source"].split()) for cell in cells(page, "markdown")) <= 2500

@pytest.mark.parametrize("number", range(1, 9))
def test_check_fails_on_the_unsolved_form_and_passes_on_the_solved_one(lesson: dict, number: int) -> None:
    task, solution = (exercise(page, number) for page in PAGES)
    assert task.split("@exercise")[1] == solution.split("@exercise")[1] and task.count("# your code") == 1
    exec(task, lesson)
    with pytest.raises(AssertionError):
        lesson[f"check_{number}"]()
    exec(solution, lesson)
    lesson[f"check_{number}"]()
    assert lesson["solved"] == {number: True}

def test_solutions_run(lesson: dict, capsys: pytest.CaptureFixture) -> None:
    for cell in cells("tests/solutions.ipynb"):
        exec(cell["source"], lesson)
    assert "8 of 8 exercises are solved" in capsys.readouterr().out

def test_without_the_kit_the_first_cell_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="kit is missing"):
        exec(cells("reproduce.ipynb")[0]["source"], {})

def test_our_loss_in_sentence_transformers(lesson: dict, tiny_bert: Path, tmp_path: Path) -> None:
    (snippet,) = [cell["source"] for cell in cells("reproduce.ipynb") if "class GradedLoss" in cell["source"]]
    assert len([line for line in snippet.splitlines() if line and "import" not in line]) <= 15
    lesson |= {"wasserstein_1d": wasserstein_1d, "expand_labels": expand_labels}
    exec(snippet, lesson)
    BiEncoder.load(tiny_bert, device="cpu").save(tmp_path / "tiny")
    model = sentence_transformers.SentenceTransformer(str(tmp_path / "tiny"), device="cpu")
    before = model.encode(["moon tide"])
    options = {"max_steps": 2, "learning_rate": 1e-2, "use_cpu": True, "report_to": "none"}
    lesson["graded_trainer"](model, graded_lists(), str(tmp_path / "run"), **options).train()
    assert (before != model.encode(["moon tide"])).any()

def test_the_command_that_draws_the_picture_overwrites_pictures_only(tmp_path: Path) -> None:
    plots.main(str(tmp_path / "a.png"))
    (tmp_path / "b.png").write_text("mine")
    with pytest.raises(ValueError, match="not written by this command"):
        plots.main(str(tmp_path / "b.png"))

def test_readme_fits_and_its_commands_exist(capsys: pytest.CaptureFixture) -> None:
    assert "--execute reproduce.ipynb --output-dir runs" in README  # so that no tracked file changes
    assert len(README.encode()) <= 8192 and len(re.sub(r"```.*?```", "", README, flags=re.S).split()) <= 900
    for path in re.findall(r"\]\((?!http)([^)]+)\)", README):
        assert (ROOT / path).exists(), path
    blocks = "\n".join(re.findall(r"```bash\n(.*?)```", README, re.S))
    for module, options in re.findall(r"-m repro\.([\w.]+)((?: [^\n]*)?)", blocks):
        with pytest.raises(SystemExit):
            importlib.import_module(f"repro.{module}").main(["--help"])
        known = capsys.readouterr().out
        assert all(flag in known for flag in re.findall(r"--[a-z][a-z-]+", options)), (module, options)
