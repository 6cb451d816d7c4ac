"""From a network's folder to a detector's: guard, trust intervals, beside the loop, and their commands."""
import json
import shutil

import pytest
import torch
from PIL import Image
from torch import nn

from nioodd.app.cli import main, parser
from nioodd.app.folders import beside_run, fit_folder, folder_problem, guard
from nioodd.benchmark.recipes import load_classifier
from nioodd.core.datasets import load
from nioodd.core.detector import Detector
from nioodd.core.errors import NiooddError
from nioodd.core.options import with_values
from nioodd.inversion import report
from nioodd.inversion.config import Config
from nioodd.inversion.loop import config_problem, run
from nioodd.inversion.report import before_after, format_table, write_report
from nioodd.trust.detector import TrustIntervalDetector, TrustOptions, fit_problem
from nioodd.trust.intervals import TrustIntervals

SMALL = ["--data", "digits5k", "--epochs", "1", "--set", "size=14", "--set", "validation_images=500"]


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    "A C1 of one epoch."
    folder = tmp_path_factory.mktemp("plain") / "net"
    assert main(["train", "C1", *SMALL, "--out", str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def trust(plain):
    folder = plain.parent / "trust"
    assert main(["trust", "fit", str(plain), "--out", str(folder), "--set", "steps=20", "--set", "members=3"]) == 0
    return folder


@pytest.fixture(scope="module")
def unheld(tmp_path_factory):
    "A run that held out no images, before its first round: to be read only."
    folder = tmp_path_factory.mktemp("unheld") / "run"
    values = ["id_set=digits5k", "ood_sets=letters", "ood_split=test", "size=12", "train_images=600", "rounds=0"]
    run(with_values(Config(), values), folder, progress=False)
    return folder


def error(capsys, *argv):
    capsys.readouterr()
    assert main(list(map(str, argv))) == 2
    err = capsys.readouterr().err.splitlines()[-1]
    assert err.startswith("nioodd: error: ")
    return err


def test_train_writes_where_it_came_from(plain):
    info = json.loads((plain / "model.json").read_text())
    assert info["status"] == "finished" and info["recipe"]["data"] == "digits5k" and 0 < info["accuracy"]["test"] <= 1
    assert info["command"] == ("nioodd train C1 --seed 0 --set data=digits5k --set size=14 "
                               "--set validation_images=500 --set epochs=1")


def test_fit_writes_a_detector_and_how_it_came_about(plain, trust):
    fit, model = (json.loads((f / n).read_text()) for f, n in ((trust, "fit.json"), (plain, "model.json")))
    assert fit["model_sha256"] == model["sha256"] and fit["options"]["members"] == 3 and fit["data"] == "digits5k"
    assert fit["command"] == "nioodd trust fit net --set steps=20 --set members=3"
    detector = Detector.load(trust)
    assert isinstance(detector, TrustIntervalDetector) and detector.n == 3 and detector.threshold is not None
    assert sorted(p.name for p in trust.glob("[!.]*")) == ["detector.json", "fit.json", "model.safetensors"]


def test_score_says_what_each_image_is(trust, tmp_path, capsys):
    for i, image in enumerate(load("digits5k", "test", n=3).images):
        Image.fromarray(image[0].numpy()).save(tmp_path / f"{i}.png")
    capsys.readouterr()
    assert main(["score", str(trust), str(tmp_path), "--format", "json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [r["file"].rpartition("/")[2] for r in rows] == ["0.png", "1.png", "2.png"]
    assert all(set(r) == {"file", "class", "uncertainty", "p_value", "score", "ood"} for r in rows)
    assert all(r["class"] in "0123456789" and 0 < r["p_value"] <= 1 for r in rows)


def test_compare_writes_rows(trust, tmp_path, capsys):
    out = tmp_path / "rows.json"
    argv = ["trust", "compare", str(trust), "--data", "digits5k", "--ood", "letters", "--images", "60", "--pool", "4",
            "--shares", "0.05,0.4", "--changes", "50", "--out", str(out)]
    assert main(argv) == 0
    assert "disagreement_sum" in capsys.readouterr().out
    result = json.loads(out.read_text())
    kinds = {"none", "learnt", "untrained", "untrained 0.05", "untrained 0.4"}
    assert {r["noise"] for r in result["rows"]} == kinds and result["error_change"].keys() == {"learnt", "untrained"}
    assert sum(result["accuracy"]["untrained 0.05"]) > sum(result["accuracy"]["untrained 0.4"])
    assert "--shares 0.05,0.4" in result["command"]
    assert {r["ood"] for r in result["rows"]} == {"letters"}
    assert "exists" in error(capsys, *argv)
    other = [*argv[:-1], str(tmp_path / "other.json")]
    for what, value, says in (("--ood", "digits5k,letters", "digits5k is the known set"),
                              ("--images", "-5", "images is -5"), ("--changes", "-1", "changes is -1"),
                              ("--shares", "a", "--shares is 'a'"), ("--shares", "-1", "share is -1")):
        assert says in error(capsys, *other, what, value)


def test_bad_input_is_one_line(plain, trust, tmp_path, capsys):
    assert "no MODEL" in error(capsys, "trust", "fit")
    assert "lambda1" in error(capsys, "trust", "fit", plain, "--set", "lambda1=-1")
    assert "members" in error(capsys, "trust", "fit", plain, "--set", "members=1")
    assert "regulariser" in error(capsys, "trust", "fit", plain, "--set", "regulariser=log")
    assert "not empty" in error(capsys, "trust", "fit", plain, "--out", trust)
    assert "holds no" in error(capsys, "trust", "fit", tmp_path)
    assert "recipe" in error(capsys, "train", "C9")
    assert "epochs" in error(capsys, "train", "C1", "--epochs", "0")
    assert "digits5k" in error(capsys, "train", "C1", "--data", "digit5k")
    assert "holds a" in error(capsys, "train", "C1", *SMALL, "--out", plain)


def test_a_run_shows_both_methods(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "png", lambda figure: b"a picture")  # tests/inversion/test_report.py has them drawn
    values = ["id_set=digits5k", "ood_sets=letters", "ood_split=test", "size=12", "train_images=600", "rounds=1",
              "samples=33", "generator_steps=4", "eval_images=60", "trust_steps=5"]
    run(with_values(Config(), values), tmp_path / "run", progress=False)
    assert "trust" not in format_table(before_after(tmp_path / "run"))
    row = beside_run(tmp_path / "run", progress=False)
    table = before_after(tmp_path / "run")
    assert table[1]["auroc_trust"] == row["ood"]["letters"]["auroc"] and table[1]["detected_trust"] is None
    assert table[0]["accuracy_known_trust"] > 0
    assert "trust intervals around the classifier of round 0" in format_table(table)
    assert " · " in format_table(table, "md")
    assert "In italics: trust intervals" in write_report(tmp_path / "run", progress=False).read_text()
    assert Detector.load(tmp_path / "run/trust").classes == list("0123456789")
    assert beside_run(tmp_path / "run", progress=False) == row                          # not learnt twice


def test_fit_of_a_run_uses_its_images(tmp_path):
    values = ["id_set=digits5k", "ood_sets=letters", "ood_split=test", "size=12", "train_images=600", "rounds=0",
              "validation_images=100", "validation_sets=photos"]
    run(with_values(Config(), values), tmp_path / "run", progress=False)
    fit = fit_folder(tmp_path / "run", tmp_path / "guard", TrustOptions(steps=3), progress=False)
    assert fit["data"] == "digits5k" and fit["threshold_from"] == "digits5k (held-out images)"
    assert fit["watched"] == "held-out"


def test_an_interrupted_learning_goes_on(plain, tmp_path, capsys, monkeypatch):
    options = TrustOptions(steps=30, batch_size=64)
    want = fit_folder(plain, tmp_path / "whole", options, progress=False)
    step, made = TrustIntervals.step, []
    def interrupted(self, *args, **kwargs):
        if len(made) == 27: raise KeyboardInterrupt
        made.append(1)
        return step(self, *args, **kwargs)
    out = tmp_path / "cut"
    with monkeypatch.context() as m:
        m.setattr(TrustIntervals, "step", interrupted)
        with pytest.raises(KeyboardInterrupt): fit_folder(plain, out, options, progress=False)
    assert [p.name for p in out.glob("[!.]*")] == ["learning.safetensors"]
    settings = ["--set", "steps=30", "--set", "batch_size=64", "--out", str(out)]
    assert "--resume" in error(capsys, "trust", "fit", plain, *settings)
    with monkeypatch.context() as m:
        def stopped(*args, **kwargs): raise KeyboardInterrupt
        m.setattr("nioodd.app.folders.fit_folder", stopped)
        m.setattr("nioodd.benchmark.recipes.train_classifier", stopped)
        for argv in (["trust", "fit", str(plain), *settings], ["train", "C1", "--out", str(out)]):
            a = parser().parse_args([*argv, "--root", "some where", "--device", "cpu"])
            with pytest.raises(KeyboardInterrupt) as e: a.do(a)
            assert str(e.value).endswith(f"--resume --out {out} --root 'some where' --device cpu")
    assert "steps: 30 → 31" in error(capsys, "trust", "fit", plain, "--resume", "--set", "steps=31", *settings[2:])
    assert "no learning" in error(capsys, "trust", "fit", plain, "--resume", *settings[:-1], tmp_path / "new")
    assert main(["trust", "fit", str(plain), "--resume", *settings]) == 0
    got = json.loads((out / "fit.json").read_text())
    assert got["rows"] == want["rows"] and not (out / "learning.safetensors").exists()
    a, b = (Detector.load(f) for f in (tmp_path / "whole", out))
    assert all(torch.equal(v, b.learnt()[k]) for k, v in a.learnt().items()) and a.threshold == b.threshold


def test_garbage_for_certain_is_not_known():
    "Siblings that agree on garbage must not be taken for siblings that know the image."
    net = nn.Sequential(nn.Flatten(), nn.Linear(4, 3))
    with torch.no_grad():
        net[1].weight.zero_()
        net[1].weight[2, 0], net[1].weight[0, 1] = 50, 50  # first pixel: garbage; second: class 0
    x = torch.tensor([[1.0, 0, 0, 0], [0, 1.0, 0, 0]]).view(2, 1, 2, 2)
    sigma = {"1.weight": torch.full((3, 4), 0.1)}
    all_outputs = TrustIntervalDetector(net, sigma).predict(x)
    known = TrustIntervalDetector(net, sigma, n_known=2).predict(x)
    assert known[0] > known[1] + 10 and all_outputs[0] < known[0] - 10


def test_a_run_without_held_out_images_gets_a_threshold(unheld, tmp_path):
    fit = fit_folder(unheld, tmp_path / "guard", TrustOptions(steps=3), progress=False)
    assert "test images" in fit["threshold_from"] and fit["watched"] == "training"
    assert Detector.load(tmp_path / "guard").is_ood(load("uniform", n=20, size=12, channels=1).images).shape == (20,)


def test_other_kinds_of_folder_are_told_apart(plain, trust, tmp_path, capsys):
    assert "nioodd trust fit" in error(capsys, "score", plain, plain / "model.json")
    assert "does not exist" in error(capsys, "score", tmp_path / "no", plain / "model.json")
    assert "pool" in error(capsys, "trust", "compare", trust, "--pool", "0", "--out", tmp_path / "x.json")
    shutil.copytree(trust, tmp_path / "damaged")
    (tmp_path / "damaged/fit.json").write_text("{")
    assert "--data" in error(capsys, "trust", "compare", tmp_path / "damaged", "--out", tmp_path / "x.json")


def test_a_set_of_another_class_count_is_refused(plain, tmp_path):
    for k in range(3):
        for part in ("train", "test"):
            (tmp_path / "mine" / part / str(k)).mkdir(parents=True)
            for i in range(4):
                Image.effect_noise((14, 14), 20 + i).save(tmp_path / "mine" / part / str(k) / f"{i}.png")
    config = with_values(Config(), [f"id_set=folder:{tmp_path / 'mine'}", "ood_sets=", "size=14"])
    with pytest.raises(NiooddError, match="10 outputs, but folder:mine has 3 classes"):
        fit_problem(config_problem(config), load_classifier(plain)[0], progress=False)


def test_a_loader_that_ends_is_told(plain):
    net, digits = load_classifier(plain)[0], load("digits5k", "train", size=14, n=40)
    batches = ((digits.images[i:i + 10], digits.labels[i:i + 10]) for i in range(0, 40, 10))
    held_out = digits.images, digits.labels
    with pytest.raises(NiooddError, match="gone through again"):
        TrustIntervals(net).fit(batches, held_out, steps=9, progress=False)


# --- guard ------------------------------------------------------------------------------------------------------------

def test_guard_is_what_the_command_prints(plain, tmp_path, capsys):
    made = guard(plain, tmp_path / "g", false_alarms=0.1, progress=False)
    _, _, problem = folder_problem(plain)
    assert (made.available, made.tested_by) == (len(problem.held_out), len(problem.test)) == (500, 1000)
    assert made.calibrated_by == len(made.detector.calibration) == 250
    assert made.rejected == made.detector.is_ood(problem.test.images).double().mean()
    capsys.readouterr()
    assert main(["guard", str(plain), "--false-alarms", "0.1", "--out", str(tmp_path / "h")]) == 0
    assert capsys.readouterr().out == str(made).replace(str(tmp_path / "g"), str(tmp_path / "h")) + "\n"
    images, loaded = load("letters", size=14, channels=1, n=20).images, Detector.load(tmp_path / "h")
    assert torch.equal(loaded.predict(images), made.detector.predict(images))


def test_guard_without_held_out_images_says_so(unheld, tmp_path):
    made = guard(unheld, tmp_path / "g", progress=False)
    assert made.tested_by is None and made.rejected is None and "the test images had to serve" in str(made)
    letters = load("letters", size=12, channels=1, n=100).images
    assert made.detector.logits(letters[:1]).shape[1] == 11  # Garbage is no class that a letter may be told to be
    assert made.detector.verdict(letters)["label"].max() < 10


def test_guard_refuses(plain, trust, tmp_path):
    (tmp_path / "file").write_text("")
    for call, says in ((lambda: guard(plain, trust), "not empty"),
                       (lambda: guard(plain, tmp_path / "file"), "is a file"),
                       (lambda: guard(tmp_path / "no", tmp_path / "g"), "holds no classifier"),
                       (lambda: guard(plain, tmp_path / "g", false_alarms=0.0), "--false-alarms"),
                       (lambda: guard(plain, tmp_path / "g", false_alarms=0.0001), "hold out more"),
                       (lambda: guard(plain, tmp_path / "g", data="mnits"), "mnist")):
        with pytest.raises(NiooddError, match=says) as e: call()
        assert "\n" not in str(e.value)
    assert not (tmp_path / "g").exists()


def test_weights_are_read_from_safetensors_only(tmp_path):
    from nioodd.app.folders import own_network
    (tmp_path / "w.pt").write_bytes(b"a pickle")
    with pytest.raises(NiooddError, match="does not end in .safetensors"):
        own_network("torch.nn:Identity", tmp_path / "w.pt")
