"The inversion studio without a browser: conditions and rounds, live runs, mistakes."
import threading
import time

import pytest
import torch
from torch import nn

from nioodd.core.datasets import Problem
from nioodd.core.errors import NiooddError
from nioodd.core.images import ImageSet
from nioodd.core.models import Classifier
from nioodd.core.options import with_values
from nioodd.explore.explorer import EMPTY
from nioodd.explore.inversion_studio import InversionStudio, condition, generate, load_round, plane
from nioodd.inversion.config import Config
from nioodd.inversion.detector import GarbageDetector
from nioodd.inversion.loop import run

SHAPE = (1, 8, 8)
SMALL = ["size=8", "rounds=3", "pretrain_epochs=1", "generator_steps=3", "samples=40", "temperature=0.3",
         "batch_size=16", "generator_batch=8", "noise_images=20"]


def images(n, seed=0):
    return torch.randint(256, (n, *SHAPE), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(autouse=True)
def own_randomness():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def network(outputs=4):
    net = Classifier(outputs, size=8)
    net(torch.randn(64, *SHAPE))  # batch norm's running statistics leave their initial values
    return net.eval()


def test_a_condition_is_a_probability_vector_whatever_the_sum():
    c, y = condition([0, 2, 6])
    assert torch.allclose(c, torch.tensor([[0, .25, .75]])) and y.tolist() == [2]
    for bad in ([0, 0], [-1, 2], [float("nan"), 1], [[1, 2]]):
        with pytest.raises(NiooddError): condition(bad)


def test_the_plane_of_features_is_that_of_their_largest_variance():
    x = torch.randn(50, 5) * torch.tensor([1., 9, 1, 4, 1])
    mean, axes = plane(x)
    assert axes.shape == (5, 2) and axes[1, 0].abs() > .95 and axes[3, 1].abs() > .9
    assert torch.allclose(mean, x.double().mean(0))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    "A run of three rounds."
    labels, classes = torch.arange(60) % 3, ["a", "b", "c"]
    train, test = (ImageSet(name, images(60, seed), labels, classes) for seed, name in enumerate(("train", "test")))
    problem = Problem(train, test, {"ood": ImageSet("ood", images(20, 2))})
    out = tmp_path_factory.mktemp("runs") / "small"
    run(with_values(Config(), SMALL), out, problem=problem, progress=False)
    return out


def test_rounds_are_what_the_run_found(folder):
    for number in (1, 2, 3):
        r = load_round(folder, number)
        assert r.found.images.shape == (40, 1, 8, 8) and (r.generator is None) == (number == 1)
        if number == 1: continue
        again = generate(r.generator, r.before, *condition([1, 0, 0, 0]), torch.randn(2, 100))
        assert again.images.shape == (2, 1, 8, 8)
    for bad in (0, 4):
        with pytest.raises(NiooddError, match="expected 1 to 3"): load_round(folder, bad)


def test_a_round_then_a_condition_then_a_live_run(folder):
    studio = InversionStudio(folder, known=images(30), every=10).wait()
    assert studio.classes == ["a", "b", "c", "garbage"] and studio.view.title == "round 3, wanted: a"
    assert set(studio.view.bars) == {"asked", "answered when found", "after this round"}
    studio.controls["class"].value = "garbage"
    assert studio.wait().view.title == "round 3, wanted: garbage"
    studio.entries[0].value = .5
    assert "mostly garbage" in studio.wait().view.title
    studio.controls["steps"].value = 20
    before = torch.get_rng_state()
    studio.run_live()
    studio.wait()
    assert [row["step"] for row in studio.history] == [10, 20]
    assert studio.view.title.startswith("live, after round 3") and not studio.live
    assert torch.equal(before, torch.get_rng_state())
    studio.controls["round"].value = 1
    assert studio.wait().view.title == "round 1, wanted: garbage"
    studio.entries[1].value = 1.0
    with pytest.raises(NiooddError, match="not kept"): studio.wait()
    studio.close()


def test_a_live_run_can_be_stopped_steered_and_asked_and_leaves_the_network_alone():
    net = network().train()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    studio = InversionStudio(net, every=1).wait()
    assert "Run live" in studio.message.value and studio.picture.value == EMPTY
    studio.controls["steps"].value = 1000
    studio.run_live()
    deadline = time.monotonic() + 60

    def wait_until(true):
        while not true() and time.monotonic() < deadline: time.sleep(.01)
    wait_until(lambda: len(studio.history) >= 2)
    studio.entries[2].value = .7  # does not end the run
    wait_until(lambda: studio.view is not None and "mostly" in studio.view.title)
    assert studio.live and threading.active_count() > 1
    studio.stop()
    studio.wait()
    assert not studio.live and len(studio.history) < 1000 and "mostly 0" in studio.view.title
    studio.controls["class"].value = "3"
    assert studio.wait().view.title == "live, asked for 3"
    assert net.training and all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert all(p.requires_grad for p in net.parameters())
    studio.close()


def test_a_live_run_is_a_function_of_its_seed_and_weights():
    def history(seed, **weights):
        torch.manual_seed(0)
        detector = GarbageDetector(network(), classes=["a", "b", "c"])
        studio = InversionStudio(detector, known=images(20), every=4, seed=seed).wait()
        studio.controls["steps"].min = studio.controls["steps"].value = 4
        for k, v in weights.items(): studio.controls[k].value = v
        studio.run_live()
        return studio.wait().history
    first = history(0)
    assert first == history(0) and first != history(1) and first != history(0, kl=0.0, cosine=0.0)


def test_any_classifier_of_its_own_shape():
    net = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 5))
    studio = InversionStudio(net, size=8, channels=3, classes=list("abcde"), every=20).wait()
    studio.controls["steps"].value = 20
    studio.controls["conditioning"].value = "label"
    studio.run_live()
    assert studio.wait().view.images.images.shape == (24, 3, 8, 8) and studio.view.known is None


def test_mistakes_of_the_studio_are_one_line(tmp_path):
    wrong = [((3,), "cannot be inverted"), ((tmp_path,), "holds no run"), ((network(), None, ["a"]), "1 class names")]
    for args, words in wrong:
        with pytest.raises(NiooddError, match=words) as e: InversionStudio(*args)
        assert "\n" not in str(e.value)
