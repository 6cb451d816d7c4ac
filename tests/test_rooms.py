"""The rooms of the house: a module imports from its own room or from one below it, and no two import each other."""
import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

package = Path(__file__).resolve().parents[1]/"nioodd"
FLOORS = [{"core"}, {"inversion", "trust"}, {"posthoc"}, {"neighbours"}, {"benchmark"}, {"speed"}, {"explore"},
          {"app"}]  # From below
FLOOR = {room: i for i, rooms in enumerate(FLOORS) for room in rooms}
MODULES = {f"{p.parent.name}.{p.stem}": p for p in package.glob("*/*.py") if p.stem != "__init__"}


def imports(file: Path) -> set[str]:
    "Modules of the package, as `room.module`, that a file imports, also within functions."
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            name = node.module or ""
            if node.level == 1: found.add(f"{file.parent.name}.{name}")
            elif node.level == 2: found.add(name)
            elif name.startswith("nioodd."): found.add(name.removeprefix("nioodd."))
        elif isinstance(node, ast.Import):
            found |= {a.name.removeprefix("nioodd.") for a in node.names if a.name.startswith("nioodd.")}
    return found & MODULES.keys()


def test_every_module_is_in_a_room():
    assert {p.name for p in package.iterdir() if p.is_dir() and p.name != "__pycache__"} == FLOOR.keys()
    assert {p.name for p in package.glob("*.py")} == {"__init__.py", "__main__.py", "_modidx.py"}


@pytest.mark.parametrize("module", sorted(MODULES))
def test_imports_run_downwards(module):
    room = module.partition(".")[0]
    for other in imports(MODULES[module]):
        there = other.partition(".")[0]
        assert there == room or FLOOR[there] < FLOOR[room], f"{module} imports {other}, which is not below it"


def test_no_module_imports_itself_by_way_of_others():
    [*TopologicalSorter({m: imports(p) for m, p in MODULES.items()}).static_order()]  # raises CycleError


def test_a_chapter_comes_after_those_it_imports():
    nbs = package.parent/"nbs"
    number = {f"{p.parent.name}.{p.stem[3:]}": int(p.stem[:2]) for p in nbs.glob("*/[0-9]*.ipynb")}
    for module, file in MODULES.items():
        for other in imports(file):
            same_room = other.partition(".")[0] == module.partition(".")[0]
            if same_room: assert number[other] < number[module], f"{module} comes before {other}, which it imports"
