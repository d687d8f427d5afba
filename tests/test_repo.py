"""The shape of the kit: its rooms, one-way imports, line budgets, one width, no foreign code."""

import ast
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ORDER = "checkpoints prompts data generate losses start encoder train metrics evaluate plots".split()
WING = "arms claims run report".split()
MODULES = [f"{name}.py" for name in ORDER] + [f"experiment/{name}.py" for name in WING]
TOP = {"reproduce.ipynb", "repro", "requirements.txt", "cached_prompts", "tests", "README.md", "LICENSE"}

def imports(path: Path) -> set[str]:
    """Names of the kit's modules that a file imports, those of the wing as experiment/NAME."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("repro"):
            parts = node.module.split(".")[1:]
            found |= {"/".join(parts)} if parts and parts != ["experiment"] else {
                "/".join([*parts, alias.name]) for alias in node.names}
    return found

def test_every_module_has_its_place() -> None:
    there = {str(path.relative_to(ROOT / "repro")) for path in (ROOT / "repro").rglob("*.py")}
    assert {name for name in there if not name.endswith("__init__.py")} == set(MODULES)
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.split()
    assert {name.split("/")[0] for name in listed if name[0] != "."} <= TOP

@pytest.mark.parametrize("module", MODULES)
def test_imports_go_one_way_and_files_are_short(module: str) -> None:
    text = (ROOT / "repro" / module).read_text(encoding="utf-8")
    before = MODULES[: MODULES.index(module)]
    assert {f"{name}.py" for name in imports(ROOT / "repro" / module)} <= set(before)
    assert len(text.splitlines()) <= 330
    for node in ast.parse(text).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            assert ast.get_docstring(node), f"{module}: {node.name} has no docstring"

def test_width_and_budgets_of_lines_that_are_not_blank() -> None:
    for folder, most in (("repro", 2700), ("tests", 2300)):
        texts = {path: path.read_text(encoding="utf-8") for path in (ROOT / folder).rglob("*.py")}
        assert sum(bool(line.strip()) for text in texts.values() for line in text.splitlines()) <= most
        wide = [path.name for path, text in texts.items() for line in text.splitlines() if len(line) > 110]
        assert not wide

def test_nothing_reads_pickles_or_runs_code_from_a_checkpoint() -> None:
    forbidden = r"\bimport pickle|torch\.load\(|remote_code\W+True|allow_pickle=True|(?<!\.)\b(eval|exec)\("
    for path in (ROOT / "repro").rglob("*.py"):
        assert not re.search(forbidden, path.read_text(encoding="utf-8")), path.name

def test_readme_names_only_what_there_is() -> None:
    for name in ("README.md", "cached_prompts/README.md"):
        text = (ROOT / name).read_text(encoding="utf-8")
        modules = [found.replace(".", "/") for found in re.findall(r"-m repro\.([\w.]+)", text)]
        modules += re.findall(r"`repro/([\w/]+)\.py`", text) + re.findall(r"`([a-z]+)\.py`", text)
        assert {f"{module}.py" for module in modules} <= {*MODULES, *(Path(name).name for name in MODULES)}
        assert len(text.encode()) <= 8192
