"""The shape of the kit: one-way imports, short files, a notebook committed as it was run."""

import ast
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# A module may import only what stands before it.
ORDER = (
    "checkpoints files replies prompts decode generators likelihood cache ask generate data lists losses warmup folders layers states encoder "
    "plots quality recipe runs train metrics retrieval stats evaluate arms tune experiments claims report"
).split()


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module == "repro":
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("repro."):
            found.add(node.module.split(".")[1])
        elif isinstance(node, ast.Import):
            found |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("repro.")}
    return found


def test_every_module_has_its_place() -> None:
    assert sorted(path.stem for path in (ROOT / "repro").glob("*.py") if path.stem != "__init__") == sorted(
        ORDER
    )


@pytest.mark.parametrize("module", ORDER)
def test_imports_go_one_way_and_files_are_short(module: str) -> None:
    path = ROOT / "repro" / f"{module}.py"
    later = {name for name in imports(path) if ORDER.index(name) >= ORDER.index(module)}
    assert not later, f"{module} imports {later}, which stand behind it"
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 330
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            assert ast.get_docstring(node), f"{module}.{node.name} has no docstring"


def test_nothing_reads_pickles_or_runs_code_from_a_checkpoint() -> None:
    for path in (ROOT / "repro").glob("*.py"):
        text = path.read_text(encoding="utf-8")
        assert not re.search(
            r"\bimport pickle|torch\.load\(|trust_remote_code=True|\beval\(|\bexec\(",
            text.replace(".eval()", ""),
        ), path.name


def test_notebook_is_committed_as_it_ran() -> None:
    notebook = json.loads((ROOT / "reproduce.ipynb").read_text(encoding="utf-8"))
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    assert not [output for cell in code for output in cell["outputs"] if output["output_type"] == "error"]
    assert "widgets" not in notebook["metadata"]
    assert max(len("".join(cell["source"]).splitlines()) for cell in code) <= 10
    assert notebook["cells"][0]["cell_type"] == "markdown"
    text = json.dumps(notebook)
    assert not re.search(r"/(root|home|tmp)/", text), "an output names a folder of the machine it ran on"


def test_readme_names_only_modules_and_options_that_exist() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for module in re.findall(r"python -m repro\.(\w+)", readme):
        assert module in ORDER
    for module in re.findall(r"`repro/(\w+)\.py`", readme):
        assert module in ORDER
