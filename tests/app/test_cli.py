"The command line: its grammar and its help, what it prints, mistakes in one line; a detector exported and scored."
import argparse
import inspect
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from small_networks import small_classifier, small_images

from nioodd.app.cli import COMMANDS, argument, main, parser
from nioodd.inversion.detector import GarbageDetector

WORDS = ["run", "train", "trust fit", "trust compare", "guard", "export", "page", "explore", "score", "data", "report",
         "bench ood", "bench photographs", "bench loop", "bench trust", "bench neighbours", "bench worth",
         "bench stream", "bench detectors"]


@pytest.fixture(scope="module")
def network(): return small_classifier()


def error(capsys, *argv):
    "The line that a wrong command prints."
    assert main(list(map(str, argv))) == 2
    err = capsys.readouterr().err
    assert err.startswith("nioodd: error: ") and err.count("\n") == 1
    return err


# Grammar

def test_every_command_is_there_and_has_help(capsys):
    assert list(COMMANDS) == WORDS
    for words in WORDS:
        with pytest.raises(SystemExit) as e: main([*words.split(), "--help"])
        assert e.value.code == 0 and capsys.readouterr().out.startswith(f"usage: nioodd {words} ")


def test_every_argument_that_is_shown_says_what_it_is():
    for words, command in COMMANDS.items():
        for a in command.arguments: assert a.options["help"], f"{words} {a.names}"


@pytest.mark.parametrize("argv, name, value", [
    (["run", "--rounds", "3"], "rounds", 3), (["run", "--epochs", "3"], "rounds", 3), (["run"], "rounds", None),
    (["bench", "ood", "--networks", "C1,C3"], "networks", "C1,C3"),
    (["bench", "ood", "--cells", "C1"], "networks", "C1"), (["bench", "ood"], "networks", None),
    (["bench", "trust", "--cells", "C2"], "networks", "C2"), (["bench", "trust"], "networks", "C1"),
    (["bench", "detectors", "--networks", "C2"], "networks", "C2"),
    (["bench", "detectors", "--cells", "C2"], "networks", "C2"),
    (["train", "C1", "--epochs", "2"], "epochs", 2), (["guard", "m"], "false_alarms", 0.05)])
def test_older_spellings_still_work(argv, name, value):
    assert getattr(parser().parse_args(argv), name) == value


@pytest.mark.parametrize("argv", [["run"], ["bench", "ood"], ["bench", "trust"]])
def test_older_spellings_are_not_shown(argv, capsys):
    with pytest.raises(SystemExit): main([*argv, "--help"])
    shown = capsys.readouterr().out
    assert "--cells" not in shown and "--epochs" not in shown


def test_defaults_are_in_the_help():
    assert argument("--n", default=3, help="so many").options["help"] == "so many (default %(default)s)"
    assert argument("--n", default=0, help="so many").options["help"] == "so many"
    assert argument("--n").options["help"] == argparse.SUPPRESS


def test_help_imports_no_torch():
    code = """import sys
from nioodd.app.cli import main
try: main(["--help"])
except SystemExit: pass
print({"torch", "numpy", "matplotlib"} & {*sys.modules})"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "set()"


# Options

def test_fields_lists_the_options(capsys):
    for words in ("run", "run exp4", "train C3", "trust fit"): assert main([*words.split(), "--fields"]) == 0
    out = capsys.readouterr().out
    assert "pretrain_epochs" in out and "lambda1" in out


def test_wrong_options_are_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "quickstart" in error(capsys, "run", "quikstart")
    assert "rounds" in error(capsys, "run", "--set", "round=3")
    assert "to resume" in error(capsys, "run", "--resume")
    assert "--seeds is 'a'" in error(capsys, "bench", "ood", "--seeds", "a")
    assert "--members is '2,b'" in error(capsys, "bench", "trust", "--members", "2,b")
    assert "cannot be used" in error(capsys, "bench", "loop", "--device", "nothing")
    assert not list(tmp_path.iterdir())


def test_a_bare_resume_takes_the_stored_configuration(tmp_path, monkeypatch):
    from nioodd.app import cli
    from nioodd.core.options import to_dict, with_values
    from nioodd.inversion.config import preset
    stored = with_values(preset("quickstart"), ["rounds=2", "seed=7"])
    (tmp_path / "run.json").write_text(json.dumps(dict(config=to_dict(stored))))
    a = parser().parse_args(["run", "--resume", "--out", str(tmp_path)])
    assert cli._configuration(a, tmp_path, "quickstart") == stored
    a = parser().parse_args(["run", "--resume", "--out", str(tmp_path), "--rounds", "3"])
    assert cli._configuration(a, tmp_path, "quickstart") == with_values(preset("quickstart"), ["rounds=3"])


# From a detector's folder to a file, and scored by both

@pytest.fixture(params=[".pt2", ".onnx"])
def suffix(request):
    if request.param == ".onnx":
        for package in ("onnx", "onnxscript", "onnxruntime"):
            pytest.importorskip(package, reason=f"{package} is not installed: pip install 'nioodd[onnx]'")
    return request.param


@pytest.fixture
def files(tmp_path):
    "Three image files."
    for i, image in enumerate(small_images(3, seed=8)): Image.fromarray(image[0].numpy()).save(tmp_path / f"{i}.png")
    return sorted(map(str, tmp_path.glob("*.png")))


def test_export_and_score_from_the_command_line(network, suffix, files, tmp_path, capsys):
    detector = GarbageDetector(network, classes=["a", "b", "c"])  # quick to export; test_export.py has the others
    detector.fit(held_out=small_images(400, seed=1), false_alarms=0.01).save(tmp_path / "guard")
    out = tmp_path / f"d{suffix}"
    assert main(["export", str(tmp_path / "guard"), "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"uint8 \[B, 1, 8, 8\] to label, uncertainty, p_value, score, ood", printed)
    rows = []
    for judge in (tmp_path / "guard", out):
        assert main(["score", str(judge), *files, "--format", "json"]) == 0
        rows.append(json.loads(capsys.readouterr().out))
    assert [r["class"] for r in rows[0]] == [r["class"] for r in rows[1]] and [*rows[0][0]] == [*rows[1][0]]
    for a, b in zip(*rows):
        assert b["score"] == pytest.approx(a["score"], rel=1e-5, abs=1e-5) and a["ood"] == b["ood"]


def test_score_prints_tables_of_files_and_folders(network, files, tmp_path, capsys):
    GarbageDetector(network, threshold=0.0).save(tmp_path / "run")
    assert main(["score", str(tmp_path / "run"), *files]) == 0
    table = capsys.readouterr().out.splitlines()
    assert table[0].split()[:2] == ["file", "class"] and len(table) == 4
    assert main(["score", str(tmp_path / "run"), str(tmp_path), "--format", "csv"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("file,class,uncertainty,") and [line.split(",")[0] for line in lines[1:]] == files


def test_mistakes_are_one_line(network, tmp_path, capsys):
    GarbageDetector(network, threshold=0.0).save(tmp_path / "run")
    assert "neither .onnx nor .pt2" in error(capsys, "export", tmp_path / "run", "--out", tmp_path / "d.txt")
    assert "does not exist" in error(capsys, "export", tmp_path / "nothing", "--out", tmp_path / "d.pt2")
    Image.new("L", (8, 8)).save(tmp_path / "a.png")
    wrong = tmp_path / "run" / "detector.json"
    assert "neither .onnx nor .pt2" in error(capsys, "score", wrong, tmp_path / "a.png")
    assert "does not exist" in error(capsys, "score", tmp_path / "run", tmp_path / "b.png")
    assert "holds no image files" in error(capsys, "score", tmp_path / "run", tmp_path / "run")


def test_an_interruption_and_a_reader_that_has_gone(monkeypatch, capsys):
    def interrupted(a): raise KeyboardInterrupt("go on with: this")
    monkeypatch.setitem(COMMANDS, "data", COMMANDS["data"]._replace(run=interrupted))
    assert main(["data"]) == 130 and "nioodd: interrupted; go on with: this" in capsys.readouterr().err


def test_the_neighbours_figures_go_where_they_are_wanted(monkeypatch, tmp_path, capsys):
    from nioodd.neighbours import beliefs, gaussian_process, reconstruct, relatives, sat, surrogate
    asked, root = {}, str(tmp_path/"data")
    modules = dict(beliefs=beliefs, reconstruct=reconstruct, sat=sat, surrogate=surrogate, gp=gaussian_process,
                   relatives=relatives)
    for name, module in modules.items():
        takes = inspect.signature(getattr(module, f"bench_{name}"))
        def called(*args, name=name, takes=takes, **kwargs): asked[name] = takes.bind(*args, **kwargs)
        monkeypatch.setattr(module, f"bench_{name}", called)
        assert main(["bench", "neighbours", name, "--out", str(tmp_path), "--models", "nets", "--root", root]) == 0
        given = asked[name].arguments
        assert Path(given["out"]) == tmp_path/f"{name}.json" and given.get("root", root) == root
        assert {given.get(k, "nets") for k in ("models", "networks")} == {"nets"}
    assert {name for name, of in asked.items() if "root" in of.arguments} == {*modules} - {"surrogate"}
    capsys.readouterr()
    assert "C1-seed0" in error(capsys, "bench", "neighbours", "bridge", "--models", tmp_path/"none", "--out", tmp_path)
