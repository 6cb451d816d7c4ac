"""A page that holds a detector: what is written, and what is refused. What it says is tested in a browser."""
import re

import pytest
import torch

from nioodd.app.cli import main
from nioodd.app.export import Exported, export
from nioodd.app.page import page_of, write_page
from nioodd.core.errors import NiooddError
from nioodd.core.models import Classifier
from nioodd.inversion.detector import GarbageDetector

for package in ("onnx", "onnxscript", "onnxruntime"): pytest.importorskip(package)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    torch.manual_seed(0)
    detector = GarbageDetector(Classifier(4, size=8).eval(), threshold=0.0, classes=["a<b", "</script>", "$x"])
    return export(detector, tmp_path_factory.mktemp("page")/"d.onnx")


def test_nothing_ends_the_script_or_the_title(exported):
    page = page_of(exported, title="<b>&</b>", runtime="a\"</script>b.mjs")
    assert page.count("</script>") == 2 and page.count("<script") == 2
    assert "<title>&lt;b&gt;&amp;&lt;/b&gt;</title>" in page
    assert '"a\\u003cb"' in page and '"\\u003c/script>"' in page and '"$x"' in page
    assert not re.search(r"\$(runtime|about|title|style|model|script|start|hidden)\b", page)


def test_without_p_values_there_is_no_slider(exported):
    assert "<p hidden><label>false alarms" in page_of(exported) and '"least": null' in page_of(exported)


def test_what_is_no_page_or_no_onnx(exported, tmp_path):
    with pytest.raises(NiooddError, match=r"ends in \.html"): write_page(exported, tmp_path/"page.txt")
    program = export(GarbageDetector(Classifier(4, size=8).eval(), threshold=0.0), tmp_path/"d.pt2")
    with pytest.raises(NiooddError, match="cannot run in a browser"): write_page(program, tmp_path/"page.html")
    assert [p.name for p in tmp_path.iterdir()] == ["d.pt2"]


def test_from_the_command_line(exported, tmp_path, capsys):
    out = tmp_path/"a"/"page.html"
    assert main(["page", str(exported.path), "--out", str(out), "--title", "Known?", "--runtime", "./ort.mjs"]) == 0
    assert "page.html" in capsys.readouterr().out
    assert out.read_text() == page_of(Exported(exported.path), "Known?", "./ort.mjs")
    assert main(["page", str(tmp_path/"missing.onnx")]) == 2
