"""What the API pages say (.ci/site/api.py), of a small package made for it."""
import importlib.util
import sys
from pathlib import Path

import pytest

root = Path(__file__).resolve().parents[1]
spec = importlib.util.spec_from_file_location("ci_api", root/".ci"/"site"/"api.py")
api = importlib.util.module_from_spec(spec)
sys.modules["ci_api"] = api  # dataclasses look their module up
spec.loader.exec_module(api)

ONE = '''"""The first"""
# %% auto #0
__all__ = ['LIMIT', 'Thing', 'make']

# %% ../../nbs/core/00_one.ipynb #00000001
LIMIT = 3 # As many as there may be

class Thing:
    "One thing."
    def __init__(self, size: int): self.size = size # In metres

# %% ../../nbs/core/00_one.ipynb #00000002
@patch
def grow(self: Thing, by: int = 1) -> None: # By so much
    "Grows."

@patch(classmethod)
def make(cls: type[Thing]) -> "Thing": # A new one
    "Makes one."

# %% ../../nbs/core/00_one.ipynb #00000003
def make(
    n: int, # How many
) -> list[Thing]: # Of size 1
    "Makes several."
'''
TWO = '''"""The second"""
# %% auto #0
__all__ = ['Better']

# %% ../../nbs/top/01_two.ipynb #00000004
from ..core.one import Thing
from ..core import one
from .three import helper

class Better(Thing):
    "A better thing."

@patch
def shrink(self: Thing): "Shrinks."
'''
TOP = '''__version__ = "1"
"""The top"""
# %% auto #0
__all__ = ['NAMES']

# %% ../nbs/top/02_top.ipynb #00000005
from .core import one
NAMES = {"Thing": "core.one"}
'''


@pytest.fixture
def modules(tmp_path) -> dict:
    "A package of two rooms, read."
    package = tmp_path/"lib"
    files = {"__init__.py": TOP, "_modidx.py": "d = {}", "core/__init__.py": "", "core/one.py": ONE, "top/two.py": TWO}
    for name, source in files.items():
        (package/name).parent.mkdir(parents=True, exist_ok=True)
        (package/name).write_text(source, encoding="utf-8")
    return api.read_package(package)


def test_modules_are_named_by_their_rooms(modules):
    assert {name: (m.full, m.notebook, m.doc) for name, m in modules.items()} == {
        "": ("lib", "top/02_top.ipynb", "The top"),
        "core.one": ("lib.core.one", "core/00_one.ipynb", "The first"),
        "top.two": ("lib.top.two", "top/01_two.ipynb", "The second"),
    }


def test_relative_imports_lead_to_full_names(modules):
    names = modules["top.two"].names
    assert names["Thing"] == "lib.core.one.Thing" and names["one"] == "lib.core.one"
    assert names["helper"] == "lib.top.three.helper"
    assert modules[""].names["one"] == "lib.core.one"


def test_methods_that_are_given_later(modules):
    thing, = (o for o in modules["core.one"].objects if o.kind == "class")
    assert [(x.kind, x.name, x.call, x.cell) for x in thing.members] == [
        ("method", "Thing.grow", "(by=1)", "00000002"),
        ("classmethod", "Thing.make", "()", "00000002"),
        ("method", "Thing.shrink", "()", "00000004"),
    ]
    function, = (o for o in modules["core.one"].objects if o.name == "make")
    assert function.kind == "function" and [p.words for p in function.parameters] == ["How many"]
    assert function.words == "Of size 1"


MEANT = {
    "Thing": "lib.core.one.Thing",
    "Thing.grow()": "lib.core.one.Thing.grow",
    "lib.Thing.grow": "lib.core.one.Thing.grow",  # by way of the top
    "core.one.make": "lib.core.one.make",
    "lib.core.one": "lib.core.one",
    "lib": "lib",
}


def test_links(modules):
    links = api.Links(modules, "lib")
    names = modules["top.two"].names
    for name, full in MEANT.items(): assert links.target(name, names) == full, name
    assert links.target("make", {}) is None  # an everyday word
    assert links.url("lib.core.one.Thing.grow", "../") == "../api/core.one.html#lib.core.one.Thing.grow"
    assert links.url("lib.core.one", "") == "api/core.one.html#module-lib.core.one"
    assert links.url("lib.NAMES", "") == "api/lib.html#lib.NAMES"


def test_cells_know_what_they_define(modules):
    cells = api.Links(modules, "lib").of_cell
    assert [name for name, _ in cells["core/00_one.ipynb", "00000002"]] == ["Thing.grow", "Thing.make"]
    assert cells["top/01_two.ipynb", "00000004"] == [
        ("Thing.shrink", "lib.core.one.Thing.shrink"), ("Better", "lib.top.two.Better")]


def test_pages(modules):
    pages = api.Pages(modules, "lib", {m.notebook: "a chapter" for m in modules.values()})
    top, two = pages.page(modules[""]), pages.page(modules["top.two"])
    assert '<a class="api" href="../api/core.one.html#lib.core.one.Thing"><code>Thing</code></a>' in top
    assert "which brings" in two and "lib.core.one.Thing.grow" in two and 'href="../top/01_two.html"' in two
    index = pages.index([("Core", ["core/00_one.ipynb"]), ("Top", ["top/01_two.ipynb", "top/02_top.ipynb"])])
    assert "core.one\ntop.two\nlib\n" in index
    assert pages.sources()["lib.core.one.Thing.shrink"] == "../top/01_two.html#cell-00000004"
