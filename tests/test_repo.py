"""The shape of the kit: its rooms, imports that run one way, pinned requirements."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = """
    support.files support.models data prompts generate losses support.folders encoder support.start
    recipes train search metrics evaluate compare plots
"""
ORDER = ROOMS.split()  # each may import those before it
# `base` is built with the encoder, which loads it by name: the one import that runs back.
BACK = {"encoder": {"support.start"}}


def place(room):
    return ROOT / "repro" / f"{room.replace('.', '/')}.py"


def imports(room):
    """The kit's rooms that a room imports, at its top or inside of a function."""
    found = set()
    for node in ast.walk(ast.parse(place(room).read_bytes())):
        if isinstance(node, ast.Import | ast.ImportFrom):
            for alias in node.names:
                name = f"{getattr(node, 'module', '')}.{alias.name}"
                found |= set(re.findall(r"^\.?repro\.(support\.\w+|\w+)", name))
    return found


def test_every_room_has_its_place():
    found = [*ROOT.glob("repro/*[!_].py"), *ROOT.glob("repro/support/*[!_].py")]
    assert set(found) == set(map(place, ORDER))


@pytest.mark.parametrize("room", ORDER)
def test_imports_run_one_way(room):
    before = ORDER[: ORDER.index(room)]
    assert imports(room) <= {*before, *BACK.get(room, ())}


def test_the_metrics_load_no_torch():
    code = "import repro.metrics, sys; print({'torch', 'transformers'} & set(sys.modules))"
    assert subprocess.check_output([sys.executable, "-c", code], cwd=ROOT) == b"set()\n"


def test_every_requirement_is_pinned():
    text = (ROOT / "requirements.txt").read_text(encoding="utf-8")
    assert re.findall(r"(?m)^(?![\w.-]+==[\w.]+ *(?:#|$)|#).+", text) == []
