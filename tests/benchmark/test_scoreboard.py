"""The benchmark: each cell once, whatever happens; results that are read, not remembered."""
import json
import subprocess
import sys

import pytest
import torch
from fake_sets import write_cifar, write_svhn

from nioodd.app.cli import main
from nioodd.benchmark import scoreboard as board
from nioodd.benchmark.recipes import PAPER_NETWORKS, RECIPES, load_classifier, train_classifier
from nioodd.benchmark.scoreboard import (
    DETECTORS,
    PAPER2,
    TABLES,
    Cell,
    TrainedNetwork,
    absent,
    add_rows,
    better,
    cell_of,
    cells,
    missing,
    plan,
    read_rows,
    refusals,
    run_cells,
    scoreboard,
    summarise,
)
from nioodd.core.datasets import source_name
from nioodd.core.errors import NiooddError
from nioodd.core.files import load_tensors
from nioodd.core.metrics import ood_metrics
from nioodd.core.options import with_values
from nioodd.posthoc.baselines import BASELINES

SMALL = ["data=digits5k", "epochs=1", "train_images=1000", "validation_images=300", "size=14"]
QUICK = ("energy", "msp", "mahalanobis")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    "Two C1 of one epoch."
    folder = tmp_path_factory.mktemp("models")
    for seed in (0, 1):
        train_classifier(with_values(RECIPES["C1"], SMALL), folder / f"C1-seed{seed}", seed=seed, progress=False)
    return folder


@pytest.fixture
def go(models, tmp_path):
    "Runs cells into tmp_path."
    return lambda todo, **more: run_cells(todo, tmp_path / "out", tmp_path / "work", models,
                                          **dict(images=200, progress=False) | more)


def some(detectors=QUICK, ood=("letters", "photos"), seeds=(0,)):
    return [Cell("C1", s, d, o) for s in seeds for d in detectors for o in ood]


def test_rows_say_what_was_measured(go, models, tmp_path):
    todo = some()
    assert go(todo) == dict(run=todo, absent=[], busy=[])
    rows = read_rows(tmp_path / "out")
    assert [cell_of(r) for r in rows] == todo
    kept = load_tensors(tmp_path / "work/scores/C1-seed0/energy.safetensors")[0]
    assert {k: rows[0][k] for k in ood_metrics([0], [1])} == ood_metrics(kept["id"], kept["letters"])
    network = TrainedNetwork(models / "C1-seed0", tmp_path / "work", images=200)
    assert rows[0]["weights"] == network.weights
    assert rows[0]["images"] == network.fingerprint_of("letters")
    assert rows[0]["id"] == "digits5k"
    assert rows[0]["n_id"] == rows[0]["n_ood"] == 200
    described = json.loads((tmp_path / "out/C1-seed0.model.json").read_text())
    assert described["accuracy"] == load_classifier(models / "C1-seed0")[1]["accuracy"]


def test_only_what_is_missing_is_run_and_forwards_are_shared(go, tmp_path, monkeypatch):
    go(some(("energy",)))
    calls = []
    real = board.kept_outputs.__globals__["network_outputs"]
    monkeypatch.setitem(board.kept_outputs.__globals__, "network_outputs", lambda *a,
                        **k: calls.append(1) or real(*a, **k))
    assert go(some())["run"] == some(("msp", "mahalanobis")) and not calls       # detectors more: no forward pass
    assert go(some(ood=("letters", "photos", "uniform")))["run"] == some(ood=("uniform",)) and len(calls) == 1
    assert not go(some())["run"]


def test_order_does_not_matter(go, tmp_path, models, monkeypatch):
    def brief(network):
        score = BASELINES["bayes_adapter_2"].make(network.fit_data, steps=3)
        return lambda name: score(network.images(name))
    monkeypatch.setitem(DETECTORS, "bayes_adapter_2", brief)
    todo = some(("energy", "layerwise", "bayes_adapter_2"))  # The last one draws
    go(todo)
    run_cells(todo[::-1], tmp_path / "back", tmp_path / "work2", models, images=200, progress=False)

    def figures(folder): return {cell_of(r): r["auroc"] for r in read_rows(tmp_path / folder)}
    assert figures("out") == figures("back")


def test_a_row_is_there_or_not(go, tmp_path, dies_before):
    todo = some()
    with dies_before(4, board), pytest.raises(SystemExit): go(todo)
    assert set(go(todo)["run"]) | {cell_of(r) for r in read_rows(tmp_path / "out")} == set(todo)
    assert len(read_rows(tmp_path / "out")) == len(todo)


def test_what_another_process_is_at_is_left_to_it(go, tmp_path):
    (tmp_path / "work/locks").mkdir(parents=True)
    lock = str(tmp_path / "work/locks/C1-seed0-msp.lock")
    code = f"from filelock import FileLock; l = FileLock({lock!r}); l.acquire(); print('held', flush=True); input()"
    other = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert other.stdout.readline() == "held\n"
    result = go(some())
    assert result["busy"] == some(("msp",)) and len(result["run"]) == 4
    other.kill()
    other.communicate()
    assert go(some())["run"] == some(("msp",))                                   # a killed process holds nothing


def test_other_weights_are_refused(go, models, tmp_path):
    go(some(("energy",)))
    other = tmp_path / "other"
    train_classifier(with_values(RECIPES["C1"], SMALL), other / "C1-seed0", seed=5, progress=False)
    with pytest.raises(NiooddError, match="other weights"):
        run_cells(some(), tmp_path / "out", tmp_path / "work", other, images=200, progress=False)


def test_a_missing_network_is_trained(tmp_path, monkeypatch):
    monkeypatch.setitem(board.RECIPES, "C1", with_values(RECIPES["C1"], SMALL))
    monkeypatch.setitem(train_classifier.__globals__["RECIPES"], "C1", with_values(RECIPES["C1"], SMALL))
    assert "to be trained first: C1-seed3" in plan(some(("energy",), seeds=(3,)), tmp_path / "out", tmp_path / "models")
    run_cells(some(("energy",), seeds=(3,)), tmp_path / "out", tmp_path / "work", tmp_path / "models", images=100,
              progress=False)
    assert load_classifier(tmp_path / "models/C1-seed3")[1]["seed"] == 3
    add_rows(tmp_path / "other", [row("msp", 3, "letters", 0.5) | dict(weights="of another training")])
    with pytest.raises(NiooddError, match="other weights"):
        run_cells(some(("energy",), seeds=(3,)), tmp_path / "other", tmp_path / "work", tmp_path / "anew", images=100,
                  progress=False)


def test_ensemble_takes_the_next_seed_and_needs_one(go, tmp_path):
    assert not go(some(("ensemble",)))["run"] and "second network" in refusals(read_rows(tmp_path / "out"))["ensemble"]
    both = some(("ensemble",), seeds=(0, 1))
    # the refusal was no result; the pair is one, and stands once
    assert go(both)["run"] == both[:2]
    figures = {cell_of(r): r for r in read_rows(tmp_path / "out")}
    assert len(figures) == 4 and all(("auroc" in figures[c]) == (c.seed == 0) for c in both)
    assert not go(both)["run"]
    again = {cell_of(r): r.get("auroc") for r in read_rows(tmp_path / "out")}
    assert again == {c: r.get("auroc") for c, r in figures.items()}


def test_a_detector_that_fails_does_not_stop_the_others(go, tmp_path, monkeypatch):
    def fails(network): raise ValueError("no correct predictions")
    def fails_later(network):
        def score(name):
            if name == "letters": raise NiooddError("NaN for 3 images")
            return torch.arange(200.)
        return score
    monkeypatch.setitem(DETECTORS, "msp", fails)
    monkeypatch.setitem(DETECTORS, "gen", fails_later)
    todo = some(("msp", "gen", "energy"))
    assert go(todo)["run"] == todo[3:]
    rows = {cell_of(r): r.get("not_run") for r in read_rows(tmp_path / "out")}
    assert rows == dict(zip(todo, ["ValueError: no correct predictions"] * 2 + ["NaN for 3 images", None, None, None]))
    monkeypatch.undo()
    assert go(todo)["run"] == todo[:3]                                            # tried again, and mended


def test_rows_of_other_images_or_weights_are_refused_though_nothing_is_missing(go, models, tmp_path):
    go(some(("energy",)))
    with pytest.raises(NiooddError, match="at most 200 images of each set, not 50"): go(some(("energy",)), images=50)
    (tmp_path / "other").mkdir()
    (tmp_path / "other/C1-seed0").symlink_to(models / "C1-seed1")
    out, other = tmp_path / "out", tmp_path / "other"
    with pytest.raises(NiooddError, match="other weights"):
        run_cells(some(("energy",)), out, tmp_path / "work", other, images=200, progress=False)
    with pytest.raises(NiooddError, match="other weights"): plan(some(("energy",)), out, other)


def test_missing_data_is_named_and_the_rest_is_run(go, models, tmp_path, monkeypatch):
    monkeypatch.delenv("NIOODD_DATA", raising=False)
    todo = [Cell("C1", 0, "energy", o) for o in ("svhn", "cmaterdb-inverted", "letters")]
    done = go(todo, root=tmp_path)
    assert done["run"] == todo[2:] and done["absent"] == todo[:2]
    lacking, how = absent(todo, models, tmp_path)
    assert lacking == todo[:2] and list(how) == ["cmaterdb", "svhn"]


def test_svhn_and_cifar100_rows_run_when_the_root_has_them(tmp_path, monkeypatch):
    "Tiny files in their real formats; SVHN as the ID set of C4, CIFAR-100 as unknown."
    from torchvision.datasets import CIFAR100
    write_svhn(tmp_path, monkeypatch, labels=[1 + i % 10 for i in range(260)])
    write_cifar(tmp_path / "cifar-100-python", ["train", "test"], "fine_labels", [f"class {i}" for i in range(100)],
                "meta", "fine_label_names", monkeypatch, CIFAR100)
    recipe = with_values(RECIPES["C4"], ["epochs=1", "validation_images=100", "train_images=160", "batch_size=32"])
    train_classifier(recipe, tmp_path / "models/C4-seed0", root=tmp_path, progress=False)
    todo = [Cell("C4", 0, d, o) for d in ("energy", "mahalanobis_both", "layerwise")
            for o in ("cifar100", "gaussian-like", "gaussian-noise:3", "fgsm:0.03")]
    done = run_cells(todo, tmp_path / "out", tmp_path / "work", tmp_path / "models", root=tmp_path, images=100,
                     progress=False)
    rows = read_rows(tmp_path / "out")
    assert len(done["run"]) == len(todo) and not refusals(rows)
    assert {(r["id"], r["n_ood"]) for r in rows if r["ood"] == "cifar100"} == {("svhn", 3)}  # its test part


def test_every_table_names_sets_there_are(tmp_path, models):
    network = TrainedNetwork(models / "C1-seed0", tmp_path, images=20)
    for table in TABLES.values(): assert set(table) <= set(RECIPES)
    for name in ("paper2", "stress", "validation"): assert tuple(TABLES[name]) == PAPER_NETWORKS
    sets = {source_name(ood) for ood, *_ in TABLES["near"].values()}
    assert sets == {"mnist", "fashion_mnist", "cifar10", "cifar100"} and len(TABLES["near"]) == 4 + 3 * 5
    for ood in {o for t in ("stress", "validation") for o in TABLES[t]["C1"]} | {"gaussian", "gaussian-like"}:
        x = network.images(ood)
        dtype = torch.float32 if ood.startswith("fgsm") else torch.uint8
        assert len(x) and x.shape[1:] == (1, 14, 14) and x.dtype == dtype, ood
    assert not set(TABLES["validation"]["C1"]) & set(TABLES["paper2"]["C1"])
    with pytest.raises(NiooddError, match="image set"): network.images("leters")


def test_papers_figures():
    fpr, aupr = PAPER2["fpr95_id_positive"], PAPER2["aupr_in"]
    assert fpr.keys() == aupr.keys() and len(fpr) == 9 * 7
    assert fpr["C1", "pnn", "fashion_mnist"] == fpr["C1", "pnn_product", "fashion_mnist"] == 0.1246
    assert fpr["C4", "msp", "gaussian"] == pytest.approx(0.1995)
    assert aupr["C3", "pnn", "cifar100"] == 0.9882
    assert {d for _, d, _ in fpr} <= DETECTORS.keys() and all(o in TABLES["paper2"][n] for n, _, o in fpr)


def row(detector, seed, ood, value):
    return dict(network="C1", seed=seed, detector=detector, ood=ood, fpr95_id_positive=value, auroc=1 - value)


def test_scoreboard_and_summary():
    rows = [row("energy", 0, "fashion_mnist", 0.01), row("energy", 1, "fashion_mnist", 0.03),
            row("msp", 0, "fashion_mnist", 0.02), row("energy", 0, "cifar10", 0.5)]
    s = summarise(rows)["C1", "energy", "fashion_mnist"]
    assert s.mean == pytest.approx(0.02) and s.std == pytest.approx(0.0141421, abs=1e-6) and s.seeds == 2
    lines = scoreboard(rows, "C1", detectors=["msp", "energy", "pnn"]).splitlines()
    assert lines[0] == "| C1 | fashion_mnist | cifar10 |"
    assert lines[2] == "| energy | **2.00 ± 1.41** | **50.00** |"                 # complete rows first
    assert lines[3] == "| msp | **2.00** [27.48] | – |"
    assert lines[4] == "| pnn | – [12.46] | – |"                                  # not run, and not left out
    assert "**98.00 ± 1.41**" in scoreboard(rows, "C1", "auroc", detectors=["energy"])


def test_better_is_paired(go, tmp_path):
    go(some(("energy", "msp")))
    (b,) = better("energy", "msp", "letters", "C1", [0], tmp_path / "work", n=50)
    (c,) = better("energy", "energy", "letters", "C1", [0], tmp_path / "work", n=50)
    rows = {r["detector"]: r for r in read_rows(tmp_path / "out") if r["ood"] == "letters"}
    assert b["difference"] == pytest.approx(rows["energy"]["fpr95_id_positive"] - rows["msp"]["fpr95_id_positive"])
    assert c["p_better"] == 0.5
    assert c["low"] == c["high"] == 0


def test_damaged_results(tmp_path):
    add_rows(tmp_path, [row("energy", 0, "cifar10", 0.5)])
    add_rows(tmp_path, [row("energy", 0, "cifar10", 0.25)])                        # in place of it
    assert [r["auroc"] for r in read_rows(tmp_path)] == [0.75]
    assert missing(some(("energy",), ("cifar10", "svhn")), tmp_path) == some(("energy",), ("svhn",))
    (tmp_path / "C1-seed0.jsonl").write_text('{"network": "C1"')
    with pytest.raises(NiooddError, match="not JSON lines"): read_rows(tmp_path)
    for content in (b"\xff", b"[" * 100_000):
        (tmp_path / "x.jsonl").write_bytes(content)
        with pytest.raises(NiooddError, match="not JSON lines"): read_rows(tmp_path / "x.jsonl")
    cell = dict(network="C1", seed=0, detector="msp", ood="letters")
    for wrong in (dict(network=[]), dict(seed="0"), dict(auroc="high"), dict(weights=None), dict(score_seconds={})):
        (tmp_path / "x.jsonl").write_text(json.dumps(cell | wrong))
        with pytest.raises(NiooddError, match="no rows"): read_rows(tmp_path / "x.jsonl")
    (tmp_path / "x.jsonl").unlink()


@pytest.mark.parametrize("call, says", [
    (lambda: cells("paper3"), "paper2"), (lambda: cells("paper2", ["C6"]), "network"),
    (lambda: cells("paper2", detectors=["eneryg"]), "energy"), (lambda: summarise([], "fpr"), "fpr95_id_positive"),
    (lambda: better("msp", "energy", "x", "C1", [0], "nowhere"), "no scores")])
def test_errors(call, says):
    with pytest.raises(NiooddError, match=says) as e: call()
    assert "\n" not in str(e.value)


def test_command_line(models, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    args = ["bench", "ood", "--table", "validation", "--cells", "C1", "--seeds", "0", "--detectors", "msp,energy",
            "--models", str(models), "--images", "100"]
    assert main([*args, "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "not measured yet" in out and not (tmp_path / "results").exists()
    assert main(args) == 0
    out = capsys.readouterr().out
    assert "| C1 | letters | photos |" in out and "28 cells run, 0 lack their data" in out
    assert main(args) == 0 and "0 cells run" in capsys.readouterr().out
    assert main([*args, "--dry-run"]) == 0 and "in all 0 s" in capsys.readouterr().out
    for wrong, says in ((["--seeds", "a"], "--seeds"), (["--table", "x"], "paper2"), (["--metric", "x"], "metric")):
        assert main([*args, *wrong]) == 2
        err = capsys.readouterr().err
        assert says in err and err.count("nioodd: error") == 1


def test_guard(models, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["guard", str(models / "C1-seed0"), "--false-alarms", "0.1", "--out", "g"]) == 0
    assert "detector  g" in capsys.readouterr().out
    assert main(["guard", str(models / "C1-seed0"), "--out", "g"]) == 2 and "not empty" in capsys.readouterr().err
    assert main(["guard", str(models / "C1-seed0"), "--false-alarms", "1"]) == 2
    assert "--false-alarms" in capsys.readouterr().err
    from PIL import Image

    from nioodd.core.datasets import load
    Image.fromarray(load("letters", n=1).images[0, 0].numpy()).save("letter.png")
    assert main(["score", "g", "letter.png"]) == 0
    assert "p value" in capsys.readouterr().out


def test_compare_all_is_a_row_per_rival_and_set(go, tmp_path):
    todo = some(("energy", "msp", "ensemble"))
    go(todo)
    rows = board.compare_all("energy", todo, tmp_path / "out", tmp_path / "work", n=20, progress=False)
    assert [(r["than"], r["ood"]) for r in rows] == [("msp", "letters"), ("msp", "photos")]  # the ensemble refused
    assert read_rows(tmp_path / "out/better/C1-energy.jsonl") == rows and len(read_rows(tmp_path / "out")) == len(todo)
    assert all(r["low"] <= r["difference"] <= r["high"] for r in rows)


def test_what_is_wrong_with_a_command_is_said_before_anything_runs(models, tmp_path, capsys):
    def error(*more):
        assert main(["bench", "ood", "--table", "validation", "--cells", "C1", "--seeds", "0", "--detectors", "msp",
                     "--models", str(models), "--work", str(tmp_path / "w"), "--out", str(tmp_path / "o"), *more]) == 2
        assert not (tmp_path / "o").exists()
        return capsys.readouterr().err
    assert "metric" in error("--metric", "foo")
    assert "--better" in error("--better", "energy")
    assert "images is -3" in error("--images", "-3")
    (tmp_path / "file").write_text("")
    assert "cannot be made" in error("--work", str(tmp_path / "file/w"), "--images", "50")


def test_damaged_files(go, models, tmp_path):
    go(some(("energy",)))
    path = tmp_path / "out/C1-seed0.jsonl"
    whole = path.read_text()
    path.write_text(whole + "\n\n")
    assert len(read_rows(path)) == 2                                              # empty lines are nothing
    for line in ("{}", "5"):
        path.write_text(whole + line + "\n")
        with pytest.raises(NiooddError, match="no rows"): read_rows(path)
    folder = tmp_path / "models/C1-seed0"
    folder.mkdir(parents=True)
    for text, says in (("xx", "not valid JSON"), ("{}", "not the JSON of a classifier"),
                       ('{"status": "finished"}', "not the JSON of a classifier")):
        (folder / "model.json").write_text(text)
        with pytest.raises(NiooddError, match=says): absent(some(), tmp_path / "models")
