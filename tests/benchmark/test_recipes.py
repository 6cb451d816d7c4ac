"""Training a plain classifier to a folder: resume, what is written, what is refused."""
import dataclasses
import errno
import hashlib
import json
import os
import random
import signal
import time

import pytest
import torch
from PIL import Image
from processes import forkserver, run_training
from safetensors.torch import load_file

from nioodd.benchmark import recipes
from nioodd.benchmark.recipes import (
    PAPER_NETWORKS,
    RECIPES,
    Recipe,
    load_classifier,
    recipe_data,
    train_classifier,
)
from nioodd.core.datasets import known_and_unknown, load
from nioodd.core.errors import NiooddError
from nioodd.core.files import load_tensors, save_tensors
from nioodd.core.forward import logits_of
from nioodd.core.metrics import accuracy_all
from nioodd.core.models import Classifier, architecture
from nioodd.inversion.detector import GarbageDetector


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    "A folder of 2 × 40 training and 2 × 10 test images, bright left or right."
    folder = tmp_path_factory.mktemp("pictures")
    g = torch.Generator().manual_seed(0)
    for split, n in (("train", 40), ("test", 10)):
        for k in range(2):
            (folder / split / "ab"[k]).mkdir(parents=True)
            for i in range(n):
                x = torch.randint(0, 90, (16, 16), generator=g, dtype=torch.uint8)
                x[3:13, 8 * k:8 * k + 8] += 120
                Image.fromarray(x.numpy()).save(folder / split / "ab"[k] / f"{i:02d}.png")
    return f"folder:{folder}"


@pytest.fixture
def recipe(pictures): return Recipe("C1", pictures, size=16, epochs=4, batch_size=16, validation_images=20, shift=1)


def log(folder):
    "The rows of a training's log without its times."
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    for row in rows: del row["seconds"]
    return rows


def same(a, b):
    x, y = (load_tensors(d / "model.safetensors")[0] for d in (a, b))
    assert x.keys() == y.keys() and all(torch.equal(x[k], y[k]) for k in x)
    assert log(a) == log(b)


# --- recipes --------------------------------------------------------------------------------------

def test_the_papers_recipes():
    """Architectures, data and accuracies (in %) of paper 2's Table 1.

    There are held-out images in each; digits are never mirrored."""
    table = dict(
        C1=("C1", "mnist", 98.53),
        C2=("C2", "cifar10", 93.54),
        C3=("C3", "cifar10", 91.68),
        C4=("C4", "svhn", 95.93),
        C5=("C5", "cifar10", 93.51))
    papers = {k: RECIPES[k] for k in PAPER_NETWORKS}
    assert {k: (r.architecture, r.data, round(100 * r.accuracy, 2)) for k, r in papers.items()} == table
    assert all(r.validation_images == 5000 for r in papers.values())
    assert all(r.flip == r.data.startswith("cifar10") for r in RECIPES.values())


@pytest.mark.parametrize("name", ["mnist", "fashion_mnist", "cifar10"])
def test_recipes_of_six_classes(name):
    "Five splits of each set; the recipe knows six classes, `known_and_unknown` has the other four."
    for i in range(5):
        known, unknown = known_and_unknown(name, i)
        assert RECIPES[f"{name}-split{i}"].data == known and unknown.startswith(f"{name}[not ")


def test_half_precision(tmp_path):
    "What is judged is what lies in the file; batch norm's statistics are not rounded."
    small = dict(data="digits5k", size=16, channels=1, epochs=1, train_images=300, validation_images=100)
    recipe = dataclasses.replace(RECIPES["C3"], **small)
    half = train_classifier(recipe, tmp_path / "half", progress=False)
    full = train_classifier(dataclasses.replace(recipe, kept_as="float32"), tmp_path / "full", progress=False)
    tensors = load_file(tmp_path / "half" / "model.safetensors")
    kinds = {name.rpartition(".")[2]: str(t.dtype) for name, t in tensors.items()}
    assert kinds["weight"] == kinds["bias"] == "torch.float16" and kinds["running_var"] == "torch.float32"
    (judged, _), (exact, _) = (load_classifier(tmp_path / name) for name in ("half", "full"))
    for a, b in zip(judged.state_dict().values(), exact.state_dict().values()):
        assert a.dtype == b.dtype and torch.allclose(a.float(), b.float(), rtol=1e-3, atol=1e-6)
    test = recipe_data(recipe).test
    accuracy = (logits_of(judged, test.images).argmax(1) == test.labels).double().mean().item()
    assert half["accuracy"]["test"] == pytest.approx(accuracy) and full["recipe"]["kept_as"] == "float32"


@pytest.mark.parametrize("values, says", [
    (dict(architecture="C0"), "architecture is 'C0'.*C1, C2"), (dict(epochs=0), "epochs is 0"),
    (dict(lr=-1.0), "lr is -1"), (dict(flip=1), "flip is 1; expected bool"), (dict(optimiser="rmsprop"), "adamw, sgd"),
    (dict(epochs=2.5), "expected int"), (dict(channels=2), "channels is 2")])
def test_a_recipe_that_cannot_be(values, says):
    with pytest.raises(NiooddError, match=says) as e: Recipe(**values)
    assert "\n" not in str(e.value)


def test_held_out_images_are_no_training_images_and_the_same_for_every_seed():
    r = Recipe("C1", "digits5k", train_images=1000, validation_images=200)
    a, b = recipe_data(r), recipe_data(r)
    assert torch.equal(a.held_out.images, b.held_out.images)
    assert (len(a.train), len(a.held_out), len(a.test)) == (800, 200, 1000)
    kept, out = ({i.numpy().tobytes() for i in s.images} for s in (a.train, a.held_out))
    assert not kept & out and kept | out == {i.numpy().tobytes() for i in load("digits5k", "train", n=1000).images}
    assert recipe_data(dataclasses.replace(r, validation_images=0)).held_out is None
    big = recipe_data(dataclasses.replace(r, architecture="C3", train_images=250))
    assert big.train.images.shape == (50, 3, 32, 32)  # the architecture's own size and channels


# --- training -------------------------------------------------------------------------------------

def test_what_is_left_in_the_folder(recipe, pictures, tmp_path):
    state = torch.get_rng_state()
    info = train_classifier(recipe, tmp_path / "c", seed=5, details=dict(command="nioodd train C1"), progress=False)
    assert torch.equal(torch.get_rng_state(), state)
    assert sorted(p.name for p in (tmp_path / "c").glob("[!.]*")) == ["log.jsonl", "model.json", "model.safetensors"]
    assert info == json.loads((tmp_path / "c/model.json").read_text())
    assert info["status"] == "finished" and info["seed"] == 5 and info["classes"] == ["a", "b"]
    assert info["command"] == "nioodd train C1" and info["recipe"]["data"] == pictures
    assert info["sha256"] == hashlib.sha256((tmp_path / "c/model.safetensors").read_bytes()).hexdigest()
    assert info["sizes"] == dict(train=60, held_out=20, test=20)
    assert info["network"]["arguments"] == dict(n_outputs=2, channels=1, size=16)
    assert info["versions"].keys() >= {"python", "torch", "nioodd"} and info["seconds"] > 0 and "commit" in info
    rows = [json.loads(line) for line in (tmp_path / "c/log.jsonl").read_text().splitlines()]
    assert [r["epoch"] for r in rows] == [1, 2, 3, 4]
    assert info["accuracy"]["held_out"] == rows[-1]["held_out"]["accuracy"] > 0.9
    net, loaded = load_classifier(tmp_path / "c")
    assert not net.training and loaded == info | dict(garbage=False)
    test = recipe_data(recipe).test
    assert accuracy_all(logits_of(net, test.images), test.labels) == info["accuracy"]["test"] > 0.9
    assert train_classifier(recipe, tmp_path / "c", seed=5, resume=True, progress=False) == info  # nothing left to do


def test_seeds_differ_and_repeat(recipe, tmp_path):
    short = dataclasses.replace(recipe, epochs=1)
    a, b, c = (train_classifier(short, tmp_path / name, seed=seed, progress=False)["sha256"]
               for name, seed in (("a", 0), ("b", 0), ("c", 1)))
    assert a == b != c


SGD = dict(optimiser="sgd", lr=0.05, weight_decay=5e-4, flip=True, precision="float32")


@pytest.fixture(scope="module")
def left_alone(pictures, tmp_path_factory):
    "Recipe and folder of an uninterrupted training, each trained once: four epochs of two steps."
    made = {}

    def get(name, values):
        if name not in made:
            recipe = Recipe(name, pictures, size=16, channels=1, epochs=4, batch_size=10, validation_images=60, shift=1)
            recipe = dataclasses.replace(recipe, **values)
            made[name] = recipe, tmp_path_factory.mktemp("left") / "whole"
            train_classifier(*made[name], progress=False)
        return made[name]
    return get


@pytest.mark.parametrize("name, values", [("C1", {}), ("C3", SGD), ("C4", dict(weight_decay=0.01))])
@pytest.mark.parametrize("stop", (2, 3, 4, 11, 15, 16))
def test_resume_from_any_file_is_bit_identical(left_alone, tmp_path, dies_before, name, values, stop):
    """The process dies just before the file with that number would be written.

    Dropout, momentum, augmentation and learning rate go on as if nothing had been."""
    recipe, whole = left_alone(name, values)
    with dies_before(stop), pytest.raises(SystemExit):
        train_classifier(recipe, tmp_path / "part", progress=False)
    with pytest.raises(NiooddError, match="unfinished training.*--resume"): load_classifier(tmp_path / "part")
    train_classifier(recipe, tmp_path / "part", resume=True, progress=False)
    same(whole, tmp_path / "part")
    assert not (tmp_path / "part/checkpoint.safetensors").exists()


def test_killed_at_random_moments_and_resumed(recipe, tmp_path):
    recipe, rng, kills = dataclasses.replace(recipe, epochs=16), random.Random(0), 0
    out = tmp_path / "part"

    def logged(): return (out / "log.jsonl").read_text() if (out / "log.jsonl").exists() else ""
    for _ in range(2):
        p = forkserver.Process(target=run_training, args=(recipe, out, out.exists()))
        before = logged()
        p.start()
        while p.is_alive() and logged() == before: time.sleep(0.005)
        time.sleep(rng.random() * 0.2)
        p.kill(); p.join(60)
        kills += p.exitcode == -signal.SIGKILL
    assert kills == 2
    train_classifier(recipe, out, resume=True, progress=False)
    train_classifier(recipe, tmp_path / "whole", progress=False)
    same(tmp_path / "whole", out)


def test_c1_on_mnist_learns(data_folder, tmp_path):
    "A few images of the full set, by name."
    recipe = dataclasses.replace(RECIPES["C1"], epochs=2, train_images=3000, validation_images=500)
    info = train_classifier(recipe, tmp_path / "c", root=data_folder, progress=False)
    assert info["data"] == "mnist" and info["accuracy"]["test"] > 0.8


# --- what is refused ------------------------------------------------------------------------------

def test_folders_that_hold_something_else(recipe, tmp_path):
    short = dataclasses.replace(recipe, epochs=1)
    train_classifier(short, tmp_path / "c", progress=False)
    (tmp_path / "x").mkdir()
    (tmp_path / "x/thesis.tex").write_text("")
    refused = [
        ("holds another classifier", "c", {}),
        ("not empty and holds no classifier", "x", {}),
        ("nothing to resume", "y", dict(resume=True)),
        ("another recipe.*seed: 0 → 1", "c", dict(resume=True, seed=1))]
    for says, out, more in refused:
        with pytest.raises(NiooddError, match=says) as e:
            train_classifier(short, tmp_path / out, progress=False, **more)
        assert "\n" not in str(e.value)
    with pytest.raises(NiooddError, match="epochs: 1 → 4"):
        train_classifier(recipe, tmp_path / "c", resume=True, progress=False)
    with pytest.raises(NiooddError, match="unknown recipe 'C9'"): train_classifier("C9", tmp_path / "z")
    assert not (tmp_path / "z").exists()


def test_data_that_are_not_there_leave_nothing(no_data, tmp_path):
    with pytest.raises(NiooddError, match="svhn"): train_classifier("C4", tmp_path / "c")
    assert not (tmp_path / "c").exists()


def test_damaged_files(recipe, tmp_path):
    out = tmp_path / "c"
    train_classifier(dataclasses.replace(recipe, epochs=1), out, progress=False)
    weights, info = (out / "model.safetensors").read_bytes(), (out / "model.json").read_text()

    def says(pattern):
        with pytest.raises(NiooddError, match=pattern) as e: load_classifier(out)
        assert "\n" not in str(e.value)
    (out / "model.safetensors").write_bytes(weights[:-9])
    says("not the file that model.json was saved with")
    torch.manual_seed(9)
    save_tensors(out / "model.safetensors", architecture("C1", 2, 1, 16).state_dict())
    says("not the file that model.json was saved with")
    (out / "model.safetensors").unlink()
    says("does not exist")
    (out / "model.safetensors").write_bytes(weights)
    load_classifier(out)
    for text, pattern in ((info[:50], "not valid JSON"), ("[1]", "not of type 'object'"),
                          (info.replace('"format": 1', '"format": 2'), "update nioodd")):
        (out / "model.json").write_text(text)
        says(pattern)
    (out / "model.json").unlink()
    says("holds no classifier")


def test_diverged_and_full_disk(recipe, tmp_path, monkeypatch):
    real = recipes.train_epoch

    def poisoned(model, *args, **kw):
        if (tmp_path / "c/checkpoint.safetensors").exists():
            torch.nn.init.constant_(model.body[-1].bias, float("nan"))
        return real(model, *args, **kw)
    monkeypatch.setattr(recipes, "train_epoch", poisoned)
    with pytest.raises(NiooddError, match="epoch 2: .*became nan.*kept in"):
        train_classifier(recipe, tmp_path / "c", progress=False)
    monkeypatch.undo()
    count, fsync = 0, os.fsync

    def full(fd):
        nonlocal count
        count += 1
        if count > 4: raise OSError(errno.ENOSPC, "No space left on device")
        fsync(fd)
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(NiooddError, match="the disk is full.*--resume"):
        train_classifier(recipe, tmp_path / "c", resume=True, progress=False)
    monkeypatch.undo()
    assert not [*(tmp_path / "c").glob("*.part")]
    train_classifier(recipe, tmp_path / "c", resume=True, progress=False)
    train_classifier(recipe, tmp_path / "whole", progress=False)
    same(tmp_path / "whole", tmp_path / "c")


# --- classifiers of the other method --------------------------------------------------------------

def test_a_garbage_classifier_is_loaded_too(tmp_path):
    torch.manual_seed(0)
    net = Classifier(4, size=16).eval()
    GarbageDetector(net, classes=["a", "b", "c"]).save(tmp_path / "d")
    again, info = load_classifier(tmp_path / "d")
    x = torch.rand(2, 1, 16, 16)
    assert torch.equal(again(x), net(x)) and info["garbage"] and info["classes"] == ["a", "b", "c"]
    assert info["architecture"] == "Classifier" and info["data"] is None
    (tmp_path / "d/run.json").write_text(json.dumps(dict(config=dict(id_set="digits5k"), seed=3)))
    _, info = load_classifier(tmp_path / "d")
    assert info["data"] == "digits5k" and info["seed"] == 3
