"The board for a network, sets and a detector of the user's own."
import pytest
import torch
from fake_sets import refused
from PIL import Image
from torch import nn

from nioodd.app.cli import main
from nioodd.benchmark.own import Board, OwnNetwork, bench_network, check_detector, near_and_far, own_problem
from nioodd.benchmark.scoreboard import DETECTORS, Cell, in_shard, read_rows
from nioodd.core.forward import prepared


def build():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(3, 6, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 5 * 5, 3)).eval()


@pytest.fixture
def place(tmp_path, monkeypatch):
    "Colour photographs of 16×12 pixels: three classes in train and test, and a flat folder of others."
    rng = torch.Generator().manual_seed(0)
    for where, n in dict.fromkeys([f"id/{s}/{c}" for s in ("train", "test") for c in "abc"], 40).items():
        (tmp_path / where).mkdir(parents=True)
        for k in range(n):
            pixels = torch.randint(256, (12, 16, 3), dtype=torch.uint8, generator=rng)
            Image.fromarray(pixels.numpy()).save(tmp_path / where / f"{k}.png")
    (tmp_path / "near").mkdir()
    for k in range(30):
        pixels = torch.randint(128, (14, 14, 3), dtype=torch.uint8, generator=rng)
        Image.fromarray(pixels.numpy()).save(tmp_path / "near" / f"{k}.png")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def model(**fields): return prepared(build(), **(dict(size=12, channels=3, mean=0.4, std=0.2) | fields))


def test_every_detector_judges_or_says_why_not(place):
    board = Board([f"folder:{place / 'near'}"], ["letters"])
    problem = own_problem(model(), "folder:id", n=60)
    assert (len(problem.train), len(problem.test), len(problem.held_out)) == (120, 60, 60)
    judged, calibrate = ({x.numpy().tobytes() for x in s.images} for s in (problem.test, problem.held_out))
    assert not judged & calibrate
    network = OwnNetwork(model(), "mine", problem, place / "work", images=60)
    names = ["msp", "energy", "knn", "mahalanobis", "vim", "react", "odin"]
    bench_network(network, board, place / "out", names)
    rows = read_rows(place / "out")
    assert {row["detector"] for row in rows} == {*names} and not any("not_run" in row for row in rows)
    table = near_and_far(place / "out", "mine", board)
    assert table.count("\n") == len(names) + 1 and "near auroc" in table and "far fpr95" in table


def test_rows_of_another_preparation_are_not_mixed(place):
    board, problem = Board(["folder:near"]), own_problem(model(), "folder:id", n=60)
    bench_network(OwnNetwork(model(), "mine", problem, place / "work"), board, place / "out", ["msp"])
    other = OwnNetwork(model(std=0.3), "mine", problem, place / "work")
    refused(bench_network, other, board, place / "out", ["energy"], says="another network")
    before = OwnNetwork(model(), "mine", problem, place / "work").outputs("id").logits
    assert not torch.equal(other.outputs("id").logits, before)  # nor are outputs that were kept


def test_shards_are_merged_on_reading(place):
    board, problem = Board(["folder:near"], ["letters"]), own_problem(model(), "folder:id", n=60)
    network, names = OwnNetwork(model(), "mine", problem, place / "work"), ["msp", "energy", "knn"]
    for i in (1, 2): bench_network(network, board, place / "out", names, shard=(i, 2))
    written = sorted(p.name for p in (place / "out").glob("*.jsonl"))
    assert written == ["mine-seed0.1-of-2.jsonl", "mine-seed0.2-of-2.jsonl"]
    assert len(read_rows(place / "out")) == 6
    assert bench_network(network, board, place / "out", names)["run"] == []
    cells = [Cell("n", 0, d, o) for d in "abcde" for o in "xy"]
    assert sorted(sum((in_shard(cells, (i, 3)) for i in (1, 2, 3)), [])) == cells
    refused(in_shard, cells, (4, 3), says="3/3")


def test_a_detector_of_ones_own_by_name(place):
    import sys
    (place / "mine_of_the_test.py").write_text(
        "from nioodd import Detector\nclass Strange(Detector):\n"
        "    def predict(self, x): return -self.logits(x).amax(1)\nnumber = 3\n")
    try:
        assert check_detector("mine_of_the_test:Strange") in DETECTORS
        refused(check_detector, "mine_of_the_test:number", says="class of detectors")
        refused(check_detector, "mine_of_the_test:nothing", says="cannot be imported")
        refused(check_detector, "mspp", says="msp")
        problem = own_problem(model(), "folder:id", n=60)
        network = OwnNetwork(model(), "mine", problem, place / "work")
        bench_network(network, Board(["folder:near"]), place / "out", ["max_logit", "mine_of_the_test:Strange"])
        a, b = read_rows(place / "out")
        assert a["auroc"] == pytest.approx(b["auroc"], abs=1e-6)
    finally:
        DETECTORS.pop("mine_of_the_test:Strange", None)
        sys.modules.pop("mine_of_the_test", None)
        if str(place) in sys.path: sys.path.remove(str(place))


def test_what_cannot_be_benched(place):
    refused(own_problem, model(), "folder:near", says="train and test")
    two = nn.Sequential(nn.Flatten(), nn.Linear(3 * 12 * 12, 2))
    refused(own_problem, prepared(two, size=12, channels=3), "folder:id", says="3 classes and the network 2")
    network = OwnNetwork(model(), "mine", own_problem(model(), "folder:id", n=60), place / "work")
    refused(bench_network, network, Board(["folder:nothing"]), place / "out", says="nothing")
    refused(bench_network, network, Board(), place / "out", says="--near")


def test_from_the_command_line(place, capsys):
    import sys
    (place / "net_of_the_test.py").write_text(
        "import torch\nfrom torch import nn\n\ndef build():\n    torch.manual_seed(0)\n"
        "    return nn.Sequential(nn.Conv2d(3, 6, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(150, 3))\n")
    common = ["--model", "net_of_the_test:build", "--size", "12", "--channels", "3", "--mean", "0.4", "--std", "0.2"]
    try:
        assert main(["bench", "ood", *common, "--id", "folder:id", "--near", "folder:near", "--far", "letters",
                     "--detectors", "msp,energy", "--images", "60", "--out", "out", "--work", "work"]) == 0
        said = capsys.readouterr().out
        assert "| net_of_the_test-build | near auroc" in said and "4 cells run; 120 training, 60 held-out" in said
        assert main(["guard", *common, "--data", "folder:id", "--out", "g"]) == 0
        assert "--model net_of_the_test:build" in capsys.readouterr().out
        assert main(["score", "g", "near", "--out", "rows.jsonl"]) == 2  # the network cannot be rebuilt
        assert "--model MODULE:NAME" in capsys.readouterr().err
        assert main(["score", "g", "near", "--out", "rows.jsonl", "--model", "net_of_the_test:build"]) == 0
        said = capsys.readouterr()
        assert "30 images judged" in said.out and "− 0.4) / 0.2" in said.err
        assert main(["guard", *common]) == 2 and "--data" in capsys.readouterr().err
        assert main(["guard"]) == 2 and "--model MODULE:NAME" in capsys.readouterr().err
        assert main(["guard", "--model", "net_of_the_test:build", "--data", "folder:id", "--out", "h"]) == 2
        assert "--size" in capsys.readouterr().err and not (place / "h").exists()
    finally:
        sys.modules.pop("net_of_the_test", None)
        if str(place) in sys.path: sys.path.remove(str(place))
