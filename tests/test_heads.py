"""The heads of chapters (.ci/heads.py), on a small library made for it."""
import importlib.util
import sys
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

root = Path(__file__).resolve().parents[1]
spec = importlib.util.spec_from_file_location("ci_heads", root/".ci"/"heads.py")
heads = importlib.util.module_from_spec(spec)
spec.loader.exec_module(heads)

SETTINGS = "[DEFAULT]\nlib_path = lib\nuser = somebody\nrepo = lib\nbranch = main\n"


def chapter(folder: Path, name: str, module: str, *cells) -> Path:
    "Writes a chapter and returns its path."
    path = folder/"nbs"/name
    path.parent.mkdir(parents=True, exist_ok=True)
    first = [new_markdown_cell(f"# {module}\n\n> One line"), new_code_cell(f"#| default_exp {module}")]
    nbformat.write(new_notebook(cells=[*first, *cells]), path)
    return path


def exported(folder: Path, module: str, names: list[str]) -> None:
    "What nbdev makes of a chapter, as far as its head needs it."
    file = folder/"lib"/f"{module.replace('.', '/')}.py"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(f"__all__ = {names}\n", encoding="utf-8")


@pytest.fixture
def library(tmp_path) -> Path:
    "Two rooms with a chapter each; the second needs the first."
    (tmp_path/"settings.ini").write_text(SETTINGS, encoding="utf-8")
    (tmp_path/".ci").mkdir()
    prose = new_markdown_cell("word " * 250)
    chapter(tmp_path, "core/00_one.ipynb", "core.one", prose, new_code_cell("#| export\nimport math"))
    imports = "#| export\nfrom lib.core.one import a\nfrom lib.core import one\nfrom lib.top.two import b\n"
    shown = new_code_cell("from lib.core.three import c")  # not exported: no need of the module
    chapter(tmp_path, "top/03_two.ipynb", "top.two", new_code_cell(imports), shown)
    chapter(tmp_path, "core/01_three.ipynb", "core.three")
    exported(tmp_path, "core.one", [f"f{i}" for i in range(8)] + ["LIMIT"])
    exported(tmp_path, "top.two", ["KIND", "b"])
    exported(tmp_path, "core.three", [])
    return tmp_path


def run(monkeypatch, library: Path, *args):
    "Its exit status."
    monkeypatch.setattr(sys, "argv", ["heads.py", "--root", str(library), *args])
    try: heads.main()
    except SystemExit as e: return e.code
    return 0


def head_of(path: Path) -> list[str]:
    "Lines of the cell below the title."
    return nbformat.read(path, as_version=4).cells[1].source.splitlines()


def test_what_a_head_says(library, monkeypatch):
    assert run(monkeypatch, library) == 0
    mark, says, takes = head_of(library/"nbs/top/03_two.ipynb")
    assert mark == "<!-- head -->"
    assert says == "**Needs** [`core.one`](../core/00_one.ipynb). **Gives** `b`, `KIND`.\\"
    assert takes.startswith("1 minute to read. [Open in Colab](https://colab.research.google.com/github/somebody/lib/blob/")
    assert takes.endswith("/main/nbs/top/03_two.ipynb)")


def test_many_names_are_cut_and_constants_come_last(library, monkeypatch):
    run(monkeypatch, library)
    _, says, takes = head_of(library/"nbs/core/00_one.ipynb")
    assert says == f"**Needs** no other chapter. **Gives** {', '.join(f'`f{i}`' for i in range(8))} …\\"
    assert takes.startswith("2 minutes to read")


def test_seconds_are_named_where_they_are_known(library, monkeypatch):
    heads.seconds_file(library).write_text('{"core/00_one.ipynb": 33}', encoding="utf-8")
    run(monkeypatch, library)
    assert "2 minutes to read, 35 seconds to run. " in head_of(library/"nbs/core/00_one.ipynb")[2]
    assert "to run" not in head_of(library/"nbs/top/03_two.ipynb")[2]


@pytest.mark.parametrize("seconds, words", [
    (0, "1 second"), (7, "7 seconds"), (12, "10 seconds"), (89, "90 seconds"), (95, "2 minutes"), (300, "5 minutes"),
])
def test_run_time(seconds, words): assert heads.run_time(seconds) == words


def test_nothing_else_changes_and_a_second_time_nothing_does(library, monkeypatch):
    path = library/"nbs/core/00_one.ipynb"
    before = path.read_text(encoding="utf-8")
    assert run(monkeypatch, library, "--check") and path.read_text(encoding="utf-8") == before
    run(monkeypatch, library)
    after = path.read_text(encoding="utf-8")
    assert run(monkeypatch, library, "--check") == 0
    run(monkeypatch, library)
    assert path.read_text(encoding="utf-8") == after
    nb = nbformat.read(path, as_version=4)
    nbformat.validate(nb)
    nb.cells.pop(1)
    assert nbformat.writes(nb) + "\n" == before


def test_a_stale_head_is_written_anew_under_the_same_id(library, monkeypatch, capsys):
    path = library/"nbs/top/03_two.ipynb"
    run(monkeypatch, library)
    nb = nbformat.read(path, as_version=4)
    cell_id = nb.cells[1].id
    nb.cells.append(nb.cells.pop(1))  # moved to the end
    nbformat.write(nb, path)
    assert "nbs/top/03_two.ipynb" in run(monkeypatch, library, "--check")
    exported(library, "top.two", ["b", "c"])
    run(monkeypatch, library)
    cells = nbformat.read(path, as_version=4).cells
    assert [i for i, cell in enumerate(cells) if heads.is_head(cell)] == [1]
    assert cells[1].id == cell_id and "**Gives** `b`, `c`.\\\n" in cells[1].source
