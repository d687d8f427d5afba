"""The shape of the kit: its rooms, imports that run one way, pinned requirements, two commands."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TOP = {
    "reproduce.ipynb",
    "repro",
    "requirements.txt",
    "cached_prompts",
    "tests",
    "README.md",
    "LICENSE",
}
ROOMS = """
    support.files support.models data prompts generate losses support.folders encoder support.start
    recipes train search metrics evaluate compare plots
"""
ORDER = ROOMS.split()  # each may import those before it
# `base` is built with the encoder, which loads it by name: the one import that runs back.
BACK = {("encoder", "support.start")}


def imports(module: str) -> set[str]:
    """The kit's rooms that a room imports, at its top or inside of a function."""
    path = ROOT / "repro" / f"{module.replace('.', '/')}.py"
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import | ast.ImportFrom):
            for alias in node.names:
                name = f"{getattr(node, 'module', '')}.{alias.name}"
                found |= set(re.findall(r"^\.?repro\.(support\.\w+|\w+)", name))
    return found


def test_every_room_has_its_place():
    rooms = [*ROOT.glob("repro/*.py"), *ROOT.glob("repro/support/*.py")]
    names = {".".join(path.relative_to(ROOT / "repro").with_suffix("").parts) for path in rooms}
    assert names - {"__init__", "support.__init__"} == set(ORDER)


@pytest.mark.parametrize("module", ORDER)
def test_imports_run_one_way(module):
    before = set(ORDER[: ORDER.index(module)])
    back = {room for room in imports(module) - before if (module, room) not in BACK}
    assert back == set()


def test_the_metrics_load_no_torch():
    code = "import repro.metrics, sys; print({'torch', 'transformers'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "set()\n"


def test_the_top_level_holds_what_is_ordered():
    command = ["git", "ls-tree", "--name-only", "HEAD"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout
    assert {name for name in listed.split() if not name.startswith(".")} == TOP


def test_every_requirement_is_pinned():
    text = (ROOT / "requirements.txt").read_text(encoding="utf-8")
    assert re.findall(r"^(?![\w.-]+==[\w.]+ *(?:#|$)|#).+", text, re.MULTILINE) == []


def test_the_readme_gives_the_notebook_and_then_the_tests():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    notebook, tests = re.findall(r"^python3 -m venv .*", text, re.MULTILINE)
    assert "--execute reproduce.ipynb" in notebook
    assert tests.endswith("pytest -q tests")


def test_nothing_reads_pickles_or_runs_code_of_a_model():
    forbidden = r"\bimport pickle|torch\.load\(|remote_code\W+True|allow_pickle=True"
    for path in ROOT.glob("repro/**/*.py"):
        assert not re.search(forbidden, path.read_text(encoding="utf-8")), path.name
