"""The comparison of outputs (.ci/outputs.py), and what every committed notebook must be."""
import importlib.util
import sys
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

root = Path(__file__).resolve().parents[1]
spec = importlib.util.spec_from_file_location("ci_outputs", root/".ci"/"outputs.py")
outputs = importlib.util.module_from_spec(spec)
spec.loader.exec_module(outputs)

PNG = "iVBORw0KGgo="  # the first bytes of one
BAR = " 40%|████      | 4/10 [00:01<00:02,  2.7it/s]"


def printed(text, name="stdout"): return new_output("stream", text=text, name=name)
def display(**data): return new_output("display_data", data=data)
def picture(**data): return display(**{"image/png": PNG, "text/plain": "<Figure size 1x1>"} | data)


def table(n):
    data = {"text/html": f"<style>b {{}}</style><b>{n}</b>", "text/plain": "<IPython.core.display.HTML object>"}
    return new_output("execute_result", data=data)


def notebook(*outs):
    return new_notebook(cells=[new_markdown_cell("# one"), new_code_cell("#| export\nf()", outputs=[*outs])])


def differ(was, now, **kwargs):
    return outputs.text_differences(was, now, kwargs.pop("tolerance", 0.05), **kwargs)


@pytest.mark.parametrize("was, now", [
    ("accuracy 0.9731", "accuracy 0.9702"),                          # a network that was trained on another processor
    ("of 40 digits  1 rejected", "of 40   digits 1 rejected"),       # columns
    ("1,811,946 parameters", "1811946 parameters"),
    ("1.2e-06, −3e-07", "4.5e-06, 1e-08"),                           # rounding errors
    ("0.1", "0.2"),                                                  # the last digit shown
    ("FPR95 3.2%", "FPR95 4.9%"),                                    # two points
    ("12 ms per image, 0.7s, 3 min", "48 ms per image, 1.9s, 5 min"),
    ('{"epoch": 1, "seconds": 0.7801}', '{"epoch": 1, "seconds": 12.3}'),
    ("1,791 images/s on one core, 1.39 forwards", "95 images/s on one core, 4.1 forwards"),
    ("in /var/folders/tmpab12cd34/run", "in /var/folders/tmpzz98yy76/run"),
    ("<object at 0x7f12ab>", "<object at 0x55aa00>"),
    (f"{BAR}\nready", "ready"),
])
def test_same(was, now): assert differ(was, now) == []


@pytest.mark.parametrize("was, now", [
    ("accuracy 0.97", "accuracy 0.87"),
    ("accuracy 0.97", "precision 0.97"),
    ("3 of 5", "4 of 5"),
    ("FPR95 3%", "FPR95 6%"),
    ("-0.9", "0.9"),
    ("one line", "one line\nand another"),
    ("C1 is best", "C3 is best"),
    ("shape [64, 10]", "shape [10, 64]"),
    ("yes", ""),
    ("nan", "0.5"),
    ("True", "False"),
])
def test_different(was, now): assert len(differ(was, now)) >= 1


def test_tolerance():
    assert differ("1.00", "1.08") and not differ("1.00", "1.08", tolerance=0.1)


def test_speeds():
    "In a notebook about speed no number counts, words do."
    assert not differ("C1 1,234 2.10 met", "C1 99 0.50 MISSED", speeds=True)
    assert differ("C1 1,234", "C3 1,234", speeds=True)


def test_notebooks_are_named_by_their_rooms():
    names = {outputs.notebook_name(path) for path in outputs.all_notebooks()}
    assert outputs.SPEEDS | outputs.NEEDS.keys() | {"index"} <= names
    assert outputs.notebook_name(Path("elsewhere/one.ipynb")) == "one"


def test_a_line_more_is_told_alone():
    found = differ("a 1\nb 2\nc 3", "a 1\nx\nb 2\nc 3")
    assert found == ["committed: (nothing)\n      now: x"]


def test_streams_are_cut_anywhere():
    one, two = notebook(printed("a\n"), printed("b"), picture()), notebook(printed("a\nb"), picture())
    assert outputs.differences(one, two) == []


def test_a_lost_picture_is_told():
    lost, = outputs.differences(notebook(picture(), picture()), notebook(picture()))
    assert lost.startswith("cell 1, f()") and "2 pictures" in lost


def test_what_goes_to_stderr_is_told():
    warning = printed("DeprecationWarning: no", "stderr")
    said, = outputs.differences(notebook(printed("a")), notebook(printed("a"), warning))
    assert "DeprecationWarning" in said
    assert outputs.differences(notebook(printed("a")), notebook(printed("a"), printed(BAR, "stderr"))) == []


def test_tables_are_compared():
    assert outputs.differences(notebook(table(1)), notebook(table(1))) == []
    assert outputs.differences(notebook(table(1)), notebook(table(7)))


def test_committed_form():
    widget = {outputs.WIDGET: {"model_id": "1"}}
    bars = display(**widget | {"text/plain": "HBox(children=(…))"})
    nb = notebook(picture(**widget), bars, printed(f"\r{BAR}\r{BAR}", "stderr"), printed("said"))
    nb.metadata["widgets"] = {"state": {}}
    assert outputs.faults(nb, 0)
    kept = outputs.committed_form(nb).cells[1].outputs
    assert [sorted(o.get("data", {})) for o in kept] == [["image/png", "text/plain"], []]
    assert kept[1].text == "said" and outputs.faults(nb, 0) == []


@pytest.mark.parametrize("output, word", [
    (new_output("error", ename="ValueError", evalue="no", traceback=[]), "ValueError"),
    (picture(**{"image/png": "bm90IG9uZQ=="}), "not image/png"),
    (printed("in /tmp" + "/tmpab12cd34 there is none"), "a temporary folder"),
    (printed(BAR, "stderr"), "progress bar"),
])
def test_faults(output, word):
    assert any(word in fault for fault in outputs.faults(notebook(output), 1))


def test_too_large_is_a_fault():
    assert "1,500,001 bytes" in outputs.faults(notebook(), 1_500_001)[0]


@pytest.mark.parametrize("path", outputs.all_notebooks(), ids=outputs.notebook_name)
def test_committed_notebook(path):
    "Small enough, without errors, widgets and progress bars; every picture is one."
    assert outputs.faults(nbformat.read(path, as_version=4), path.stat().st_size) == []


SOURCE = """import nioodd
from IPython.display import display, Image
import base64
for t in range(3): print('step', t)
0.25"""
KERNEL = {"name": "python3", "display_name": "python3", "language": "python"}


def test_executes_and_compares(tmp_path, monkeypatch, capsys):
    "From the command line: in place, then --check; a changed output is found."
    path = tmp_path/"one.ipynb"
    nbformat.write(new_notebook(cells=[new_code_cell(SOURCE)], metadata={"kernelspec": KERNEL}), path)

    def run(*args):
        monkeypatch.setattr(sys, "argv", ["outputs.py", *args, str(path)])
        with pytest.raises(SystemExit) as e: outputs.main()
        return e.value.code
    assert run() == 0
    cell = nbformat.read(path, as_version=4).cells[0]
    assert cell.outputs[0].text.split() == "step 0 step 1 step 2".split() and cell.execution_count is None
    assert run("--check") == 0
    nb = nbformat.read(path, as_version=4)
    nb.cells[0].outputs[0].text = "step 0\nstep 1\nstop 2\n"
    nbformat.write(nb, path)
    capsys.readouterr()
    assert run("--check") and "committed: stop 2\n      now: step 2" in capsys.readouterr().out


def test_only_the_quick_ones(tmp_path, monkeypatch):
    (tmp_path/".ci").mkdir()
    (tmp_path/".ci"/"seconds.json").write_text('{"core/00_one.ipynb": 10, "core/01_two.ipynb": 11}')
    monkeypatch.setattr(outputs, "root", tmp_path)
    names = ["core/00_one", "core/01_two", "core/02_not_timed"]
    paths = [tmp_path/"nbs"/f"{name}.ipynb" for name in names]
    assert outputs.quick(paths, 10) == paths[:1]
    assert outputs.quick(paths, 11) == paths[:2]


def test_text_that_came_in_pieces_is_one_output():
    pieces = [new_output("stream", name=name, text=text)
              for name, text in (("stdout", "a\n"), ("stdout", "b\n"), ("stderr", "c\n"), ("stdout", "d\n"))]
    nb = new_notebook(cells=[new_code_cell("1", outputs=pieces)])
    found = [(o.name, o.text) for o in outputs.committed_form(nb).cells[0].outputs]
    assert found == [("stdout", "a\nb\n"), ("stderr", "c\n"), ("stdout", "d\n")]
