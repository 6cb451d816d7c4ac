"""Runs from outside, as a user sees them: resume after kills, one-line errors, what is left behind."""
import errno
import json
import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from processes import TINY, forkserver, run_command, run_loop, squares

from nioodd.app.cli import main
from nioodd.core.datasets import Problem
from nioodd.core.errors import NiooddError
from nioodd.core.files import load_tensors
from nioodd.core.images import ImageSet
from nioodd.core.options import with_values
from nioodd.inversion.config import Config
from nioodd.inversion.invert import LOSSES, generator_loss
from nioodd.inversion.loop import Loop, best_round, config_problem, judge, run, with_neighbours


def small_problem():
    g = torch.Generator().manual_seed(9)
    noise = torch.randint(0, 256, (60, 1, 12, 12), dtype=torch.uint8, generator=g)
    return Problem(squares(120, 0), squares(60, 1), {"squares": ImageSet("squares", noise, None, [])})


@pytest.fixture
def problem(): return small_problem()


@pytest.fixture
def config(): return with_values(Config(), TINY)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    "The folder of a run that was left alone: to be read, not to be written to."
    folder = tmp_path_factory.mktemp("runs") / "whole"
    run(with_values(Config(), TINY), folder, problem=small_problem(), progress=False)
    return folder


@pytest.fixture
def finished(whole, tmp_path):
    "A copy of it."
    return Path(shutil.copytree(whole, tmp_path / "r"))


def info_of(folder): return json.loads((folder / "run.json").read_text())


def same_files(a: Path, b: Path, rounds: int):
    names = [f"classifiers/round_{r:03d}" for r in range(rounds + 1)]
    names += [f"samples/round_{r:03d}" for r in range(1, rounds + 1)]
    for name in [*names, f"checkpoints/round_{rounds:03d}", "logits/after", "model"]:
        x, y = (load_tensors(d / f"{name}.safetensors")[0] for d in (a, b))
        assert x.keys() == y.keys() and all(torch.equal(x[k], y[k]) for k in x), name


# --- resume ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("stop", (3, 8, 10, 13))
def test_resume_from_any_file_is_bit_identical(problem, config, whole, tmp_path, dies_before, stop):
    """The process dies just before the file with that number would be written.

    It is resumed, and ends as an uninterrupted run."""
    with dies_before(stop), pytest.raises(SystemExit):
        run(config, tmp_path / "part", problem=problem, progress=False)
    part = run(config, tmp_path / "part", problem=problem, resume=True, progress=False)
    same_files(whole, tmp_path / "part", config.rounds)
    assert all(part[k] == info_of(whole)[k] for k in ("before", "after"))


def finished_rounds(out):
    try: return json.loads((out / "run.json").read_text())["rounds_done"]
    except (FileNotFoundError, json.JSONDecodeError): return -2


def test_killed_at_random_moments_and_resumed(tmp_path):
    "SIGKILL at three random moments: the resumed run's final weights are those of a run that was left alone."
    whole = forkserver.Process(target=run_loop, args=(str(tmp_path / "whole"), False))
    began = time.perf_counter()
    whole.start(); whole.join(300)
    one_round = (time.perf_counter() - began) / 6
    assert whole.exitcode == 0
    rng, out, kills = random.Random(0), tmp_path / "part", 0
    for _ in range(3):
        p, before = forkserver.Process(target=run_loop, args=(str(out), out.exists())), finished_rounds(out)
        p.start()
        while p.is_alive() and finished_rounds(out) <= before: time.sleep(0.005)
        until = time.perf_counter() + rng.random() * one_round
        while time.perf_counter() < until and finished_rounds(out) <= before + 1:
            time.sleep(0.005)                           # or the machine has become faster than it was
        p.kill(); p.join(60)
        kills += p.exitcode == -signal.SIGKILL
    assert kills >= 2                                   # the last may find the run finished
    p = forkserver.Process(target=run_loop, args=(str(out), True))
    p.start(); p.join(300)
    assert p.exitcode == 0
    same_files(tmp_path / "whole", out, 4)


def test_a_loss_of_ones_own_counts_by_its_name(problem, config, tmp_path, monkeypatch):
    monkeypatch.setitem(LOSSES, "dark", None)  # Taken out again afterwards
    del LOSSES["dark"]
    generator_loss("dark")(lambda batch: (batch.images + 1).mean())
    run(with_values(config, ["losses=dark:9000", "rounds=1"]), tmp_path, problem=problem, progress=False)
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert "dark" in rows[-1]["generator"]
    assert json.loads((tmp_path / "run.json").read_text())["config"]["losses"] == ["dark:9000"]


def test_an_unknown_loss_is_named_before_anything_is_trained(problem, config, tmp_path):
    with pytest.raises(NiooddError, match="unknown loss 'drak'"):
        run(with_values(config, ["losses=drak:1"]), tmp_path, problem=problem, progress=False)
    assert not (tmp_path / "checkpoints").exists()


def test_ctrl_c_ends_cleanly_and_says_how_to_go_on(tmp_path):
    "The command, in a process of its own, interrupted after its first round."
    values = ["rounds=9", "pretrain_epochs=1", "train_images=600", "generator_steps=15", "samples=110",
              "ood_sets=uniform", "eval_images=100", "size=16"]
    errors, out = tmp_path / "errors", tmp_path / "run"
    args = (str(errors), "run", *(f"--set={v}" for v in values), "--out", str(out))
    p = forkserver.Process(target=run_command, args=args)
    p.start()
    while p.is_alive() and finished_rounds(out) < 0: time.sleep(0.05)
    os.kill(p.pid, signal.SIGINT)
    p.join(60)
    err = errors.read_text()
    assert p.exitcode == 130 and "Traceback" not in err
    assert f"nioodd run --resume --out {out}" in err.splitlines()[-1]
    assert not [f for f in out.rglob("*.part")] # nothing half-written


def test_resume_with_a_changed_configuration(problem, config, finished):
    with pytest.raises(NiooddError, match="lr: 0.001 → 0.01"):
        run(with_values(config, ["lr=0.01"]), finished, problem=problem, resume=True, progress=False)


def test_checkpoint_cut_short(problem, config, finished):
    info = info_of(finished)
    (finished / "run.json").write_text(json.dumps(info | dict(status="running")))
    newest = max((finished / "checkpoints").iterdir())
    newest.write_bytes(newest.read_bytes()[:1000])
    with pytest.raises(NiooddError, match=f"{newest.name} cannot be read.*damaged.*delete it"):
        run(config, finished, problem=problem, resume=True, progress=False)
    newest.unlink()                                                   # what the message says helps
    assert run(config, finished, problem=problem, resume=True, progress=False)["after"] == info["after"]


# --- folders --------------------------------------------------------------------------------------

def test_folder_that_holds_something_else(problem, config, finished, tmp_path):
    (tmp_path / "x").mkdir()
    (tmp_path / "x/thesis.tex").write_text("")
    for name, resume, says in (("r", False, "holds another run"), ("x", False, "not empty and holds no run"),
                               ("y", True, "nothing to resume")):
        with pytest.raises(NiooddError, match=says):
            run(config, tmp_path / name, problem=problem, resume=resume, progress=False)


def test_full_disk(problem, config, whole, tmp_path, monkeypatch):
    """The disk fills up in round 2: one line, nothing half-written.

    What was finished is kept and goes on once there is room."""
    real, count = os.fsync, 0

    def full(fd):
        nonlocal count
        count += 1
        if count > 12: raise OSError(errno.ENOSPC, "No space left on device")
        real(fd)
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(NiooddError, match="the disk is full.*--resume"):
        run(config, tmp_path / "r", problem=problem, progress=False)
    monkeypatch.undo()
    assert not [f for f in (tmp_path / "r").rglob("*.part")]
    run(config, tmp_path / "r", problem=problem, resume=True, progress=False)
    same_files(whole, tmp_path / "r", config.rounds)


# --- divergence -----------------------------------------------------------------------------------

def test_diverged_classifier_keeps_the_last_good_checkpoint(problem, config, tmp_path, monkeypatch):
    real = Loop.train

    def poisoned(self, epochs):
        if len(self.rows) == 2:
            with torch.no_grad(): self.classifier.head.weight.fill_(float("nan"))
        return real(self, epochs)
    monkeypatch.setattr(Loop, "train", poisoned)
    says = "round 2: the classifier's cross-entropy became nan.*last good checkpoint is round 1"
    with pytest.raises(NiooddError, match=says):
        run(config, tmp_path / "r", problem=problem, progress=False)
    monkeypatch.undo()
    t, meta = load_tensors(max((tmp_path / "r/checkpoints").iterdir()))
    assert len(meta["rows"]) == 2 and all(v.isfinite().all() for v in t.values() if v.is_floating_point())
    run(config, tmp_path / "r", problem=problem, resume=True, progress=False)


def test_diverged_generator_names_the_term(problem, config, tmp_path, monkeypatch):
    real = Loop.new_generator

    def poisoned(self):
        real(self)
        with torch.no_grad(): self.generator.image[0].bias.fill_(float("nan"))
    monkeypatch.setattr(Loop, "new_generator", poisoned)
    with pytest.raises(NiooddError, match="round 1: .*not finite.*last good checkpoint is round 0"):
        run(config, tmp_path / "r", problem=problem, progress=False)


# --- problems that are none -----------------------------------------------------------------------

def test_one_class_and_empty_class(config, problem, tmp_path):
    one = squares(50, 0, classes=1)
    with pytest.raises(NiooddError, match="needs at least 2"):
        run(config, tmp_path / "a", problem=Problem(one, one, {}), progress=False)
    gap = squares(60, 0)
    gap.labels[gap.labels == 1] = 2
    with pytest.raises(NiooddError, match="no images"):
        run(config, tmp_path / "b", problem=Problem(gap, gap, {}), progress=False)
    assert not (tmp_path / "a").exists() and not (tmp_path / "b").exists()


@pytest.mark.parametrize("args, message", [
    (["run", "quikstart"], "did you mean 'quickstart'"),
    (["run", "--set", "lamda=3"], "unknown option"),
    (["run", "--set", "id_set=minst"], "did you mean 'mnist'"),
    (["run", "--set", "noise=gausian"], "did you mean 'gaussian'"),
    (["run", "exp1", "--root", "no-such-folder"], "no-such-folder"),
    (["run", "--device", "cuda:99"], "device"),
    (["score", "no-run", "x.png"], "x.png does not exist"),
    (["report", "no-run"], "no run.json"),
    (["data", "--download", "mnits"], "did you mean 'mnist'"),
])
def test_one_line_and_exit_code_2(args, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(args) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1 and err.startswith("nioodd: error: "), err
    assert not list(tmp_path.glob("runs/*")), "a run that could not begin left a folder"


def test_control_adds_as_many_images(problem, config):
    torch.manual_seed(0)
    loop = Loop(with_values(config, ["inversion=no"]), problem, progress=False)
    loop.pretrain(); loop.round()
    assert len(loop.found[0]) == config.samples + config.pixel_images


def test_callers_random_stream_is_left_alone(problem, config, tmp_path):
    torch.manual_seed(5); want = torch.rand(3)
    torch.manual_seed(5); run(with_values(config, ["rounds=1"]), tmp_path / "r", problem=problem, progress=False)
    assert torch.equal(torch.rand(3), want)


def test_a_folder_without_parts_is_split(tmp_path):
    from PIL import Image
    for k in "ab":
        (tmp_path / "own" / k).mkdir(parents=True)
        for i in range(10):
            grey = torch.full((9, 9), i * 20 + ord(k) % 2, dtype=torch.uint8)
            Image.fromarray(grey.numpy()).save(tmp_path / "own" / k / f"{i}.png")
    p = config_problem(with_values(Config(), [f"id_set=folder:{tmp_path}/own", "ood_sets=uniform", "size=9"]))
    assert (len(p.train), len(p.test)) == (16, 4) and p.test.labels.bincount().tolist() == [2, 2]
    assert not (p.train.images.flatten(1)[:, None] == p.test.images.flatten(1)[None]).all(2).any()


def test_data_lists_every_set(capsys, tmp_path):
    assert main(["data", "--root", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    from nioodd.core.datasets import SOURCES
    for name in SOURCES: assert any(line.startswith(name) for line in out.splitlines()), name
    assert str(tmp_path) in out and "nioodd data --download svhn" in out


# --- what is excluded -----------------------------------------------------------------------------

def test_far_excludes_neither_garbage_nor_what_is_like_a_training_image(problem, config):
    far = Loop(with_values(config, ["exclude=far"]), problem, progress=False)
    real, odd = problem.train.images[:6], problem.ood["squares"].images[:6]
    images, predicted = torch.cat([real, real // 2, odd, odd]), torch.tensor([0] * 18 + [3] * 6)
    assert far.excluded(images, predicted).tolist() == [False] * 12 + [True] * 6 + [False] * 6
    known = Loop(with_values(config, ["exclude=known"]), problem, progress=False)
    assert known.excluded(images, predicted).tolist() == [True] * 18 + [False] * 6
    assert not far.excluded(odd, torch.full((6,), 3)).any()


def test_judge_says_what_the_uncertainty_is_good_for():
    "Three outputs, the last garbage: one digit wrong and unsure, one OOD image of two taken for a digit, and unsure."
    sure, unsure = 20.0, 0.1
    known = torch.tensor([[sure, 0, 0], [0, sure, 0], [0, sure, 0], [unsure, 0, 0]])
    row = judge(known, torch.tensor([0, 1, 1, 1]), dict(there=torch.tensor([[0, 0, sure - 1], [0, 2 * unsure, 0]])))
    assert row["id"]["predicted"] == [2, 2, 0] and row["ood"]["there"]["predicted"] == [0, 1, 1]
    assert row["id"]["aurc"] == pytest.approx(1 / 16)  # the error comes last: risk 0, 0, 0, ¼
    assert row["ood"]["there"]["aurc"] == pytest.approx(1 / 4)  # and 0, ½
    # both above the three sure digits, below the unsure one
    assert row["ood"]["there"]["ue_auroc"] == 0.75
    confidence = torch.tensor([unsure, 0, 0]).double().softmax(0)[0].item()
    assert row["id"]["ece"] == pytest.approx(confidence / 4, abs=1e-6)


def test_a_round_is_chosen_with_its_neighbours():
    "A single lucky round is not chosen, and the ends have two values."
    rows = [dict(validation=dict(error=e)) for e in (5, 5, 1, 5, 3, 2, 2, 9)]
    assert best_round(rows) == 5 and with_neighbours([1, 3]) == [2, 2] and with_neighbours([1]) == [1]
