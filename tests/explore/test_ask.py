"""What does it say, and the inversion studio, without a browser: images and verdicts, wishes and rounds, live runs, mistakes."""
import io
import threading
import time

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from nioodd.core.datasets import Problem
from nioodd.core.detector import Detector
from nioodd.core.errors import NiooddError
from nioodd.core.images import ImageSet
from nioodd.core.models import Classifier
from nioodd.core.options import with_values
from nioodd.core.scores import garbage_log_odds, msp
from nioodd.core.show import png
from nioodd.explore.ask import Ask, answer_picture, from_strokes, judgement, morphed, networks, spoilt, verdict_table
from nioodd.explore.explorer import EMPTY
from nioodd.explore.inversion_studio import InversionStudio, condition, load_round, plane, wished
from nioodd.inversion.config import Config
from nioodd.inversion.detector import GarbageDetector
from nioodd.inversion.loop import run
from nioodd.posthoc.layerwise import LayerwiseDetector
from nioodd.trust.detector import TrustIntervalDetector
from nioodd.trust.intervals import uniform_sigma

SHAPE = (1, 8, 8)


def images(n, seed=0, shape=SHAPE): return torch.randint(256, (n, *shape), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(autouse=True)
def own_randomness():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def network(outputs=4):
    net = Classifier(outputs, size=8)
    net(torch.randn(64, *SHAPE))  # batch norm's running statistics leave their initial values
    return net.eval()


class Plain(Detector):
    "A user's own: a score and nothing else."
    def predict(self, x): return msp(self.logits(x))


@pytest.fixture
def detectors():
    net = network(3)
    found = {"layers": LayerwiseDetector(net, classes=["a", "b", "c"]).fit(images(200), images(100, 1)), "siblings": TrustIntervalDetector(net, uniform_sigma(net), n=3),
             "garbage": GarbageDetector(network(4)), "own": Plain(net)}
    for d in list(found.values())[1:]: d.fit([images(100, 1)])
    return found


@pytest.fixture
def ask(detectors):
    explorer = Ask(detectors, {"one": images(5), "two": ImageSet("two", images(9, 2, (3, 12, 12)))}).wait()
    yield explorer
    explorer.close()


# Judgements

def test_a_judgement_is_what_the_detector_says_of_each_image_alone_or_in_a_batch(detectors):
    x = images(6, 3)
    for name, d in detectors.items():
        said = judgement(d, x)
        assert torch.equal(said["ood"], d.is_ood(x)) and torch.equal(said["score"], d.predict(x)) and said["label"].max() < 3
        assert said["probabilities"].shape == (6, 4 if name == "garbage" else 3) and ((0 <= said["uncertainty"]) & (said["uncertainty"] <= 1)).all()
        assert {k for k in ("garbage", "p_value", "agreement") if k in said} == {"layers": {"p_value"}, "siblings": {"agreement"}, "garbage": {"garbage"}, "own": set()}[name]
        for i in range(6): assert torch.equal(judgement(d, x[i:i + 1])["ood"], said["ood"][i:i + 1])
    assert torch.allclose(judgement(detectors["garbage"], x)["garbage"], garbage_log_odds(detectors["garbage"].logits(x)).sigmoid())


def test_siblings_that_are_the_network_itself_agree_entirely(detectors):
    net = detectors["own"].model
    same = TrustIntervalDetector(net, {k: 0 * s for k, s in uniform_sigma(net).items()}, n=3, threshold=0.0)
    assert torch.allclose(judgement(same, images(5))["agreement"], torch.ones(5).double())


def test_networks_are_told_apart_by_identity(detectors): assert networks(detectors) == {"layers, siblings, own": "layers", "garbage": "garbage"}


# Images

@pytest.mark.parametrize("channels,size", [(1, 28), (3, 32), (1, 8)])
def test_strokes_become_an_image_of_any_size(channels, size):
    x = from_strokes([[(.1, .1), (.3, .3)], [], [(.2, .1)]], size, channels)
    assert x.shape == (1, channels, size, size) and x.dtype == torch.uint8 and x.max() > 90


def test_a_centred_drawing_does_not_depend_on_where_and_how_large_it_was_drawn():
    stroke = np.array([(.2, .2), (.6, .2), (.4, .8)])
    here = from_strokes([stroke], 28).int()
    assert (from_strokes([stroke * .6 + .3], 28).int() - here).abs().float().mean() < 3
    assert not torch.equal(from_strokes([stroke], 28, centre=False), from_strokes([stroke * .6 + .3], 28, centre=False))
    assert not from_strokes([], 28).any() and not from_strokes([[]], 28).any()


def test_dials_at_nothing_change_nothing_and_leave_the_network_alone():
    net, x = network().train(), images(1)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    assert torch.equal(spoilt(x, net), x) and torch.equal(spoilt(x, net, .3), spoilt(x, net, .3)) and not torch.equal(spoilt(x, net, .3), spoilt(x, net, .3, seed=1))
    assert (spoilt(x, net, 0, 7).int() - x.int()).abs().max() <= 7
    assert net.training and all(torch.equal(v, before[k]) for k, v in net.state_dict().items()) and all(p.grad is None for p in net.parameters())
    assert torch.equal(morphed(x, images(1, 1), 1.0), images(1, 1))


# Seen

@pytest.mark.parametrize("k", [2, 11, 100])
def test_the_picture_of_few_and_of_many_classes(k):
    p = {"a": torch.randn(k).softmax(0), "b": torch.randn(k + 1).softmax(0)}
    figure = answer_picture(images(1, shape=(3, 9, 9)), p, [f"class {i}" for i in range(k)])
    assert len(figure.axes[1].get_xticklabels()) == min(k + 1, 12 if k > 12 else k + 1) and png(figure)


def test_names_are_escaped_in_the_table(detectors):
    answers = {"<b>": judgement(detectors["own"], images(1))}
    text = verdict_table(answers, ["<i>"] * 3, {"<b>": .5})
    assert "<b>" not in text and "&lt;b&gt;" in text and "<i>" not in text and "–" in text


# The explorer

def test_sliders_make_the_image_and_every_detector_answers(ask):
    first = ask.picture.value
    assert first != EMPTY and torch.equal(ask.image, images(5)[:1]) and set(ask.answers) == {"layers", "siblings", "garbage", "own"}
    for k, v in {"index": 3, "to set": "one", "to index": 4, "morph": .5, "noise": .1, "attack": 9, "network": "garbage"}.items(): ask.controls[k].value = v
    ask.wait()
    assert torch.equal(ask.image, spoilt(morphed(images(5)[3:4], images(5)[4:5], .5), ask.detectors["garbage"].model, .1, 9)) and ask.picture.value != first
    ask.controls["set"].value = "two"
    ask.wait()
    assert ask.controls["index"].max == 8 and ask.sets["two"].shape == (9, 1, 8, 8) and "unknown" in ask.table.value or "known" in ask.table.value


def test_drawing_and_clearing(ask):
    ask.stroke([(.2, .2), (.8, .8)])
    ask.wait()
    assert ask.controls["source"].value == "drawing" and torch.equal(ask.image, from_strokes([[(.2, .2), (.8, .8)]], 8))
    ask.controls["centre"].value = False
    ask.wait()
    assert torch.equal(ask.image, from_strokes([[(.2, .2), (.8, .8)]], 8, centre=False))


def test_a_file_is_read_and_a_bad_one_is_named(ask):
    file = io.BytesIO()
    Image.fromarray(images(1, shape=(3, 30, 20))[0].permute(1, 2, 0).numpy()).save(file, "PNG")
    ask.controls["source"].value = "file"
    ask.wait()
    assert "choose" in ask.message.value
    entry = dict(name="a.png", content=memoryview(file.getvalue()))
    ask.controls["file"].value = [entry]
    ask.wait()
    light = ask.image
    assert light.shape == (1, 1, 8, 8)
    ask.controls["negative"].value = True
    ask.wait()
    assert torch.equal(ask.image, 255 - light)
    ask.controls["file"].value = [entry | dict(name="b.png", content=memoryview(b"no image"))]
    with pytest.raises(NiooddError, match="b.png"): ask.wait()
    assert "b.png" in ask.message.value
    ask.controls["file"].value = [entry]
    ask.wait()


def test_without_ipycanvas_and_without_images(detectors, monkeypatch):
    monkeypatch.setattr("nioodd.explore.ask.importlib.util.find_spec", lambda name: None)
    explorer = Ask(detectors["own"]).wait()
    assert [o[1] for o in explorer.controls["source"].options] == ["drawing", "file"] and not explorer.image.any() and list(explorer.answers) == ["Plain"]
    explorer.stroke([(.1, .5), (.9, .5)])
    assert explorer.wait().image.any()


def test_mistakes_of_ask_are_one_line(detectors):
    other = Plain(network(5), threshold=0.5)
    for wrong, words in (((network(),), "expected a Detector"), (({},), "no detectors"), ((Plain(network()),), "no threshold"), ((detectors, None, ["a"]), "1 class names"),
                         ((detectors, torch.zeros(0, 1, 8, 8)), "without images"), ((detectors | {"other": other},), "different numbers of classes"), ((detectors, None, None, 20), "20×20")):
        with pytest.raises(NiooddError, match=words) as e: Ask(*wrong)
        assert "\n" not in str(e.value)


# The studio

def test_a_condition_is_a_probability_vector_whatever_the_sum():
    c, y = condition([0, 2, 6])
    assert torch.allclose(c, torch.tensor([[0, .25, .75]])) and y.tolist() == [2]
    for bad in ([0, 0], [-1, 2], [float("nan"), 1], [[1, 2]]):
        with pytest.raises(NiooddError): condition(bad)


def test_the_plane_of_features_is_that_of_their_largest_variance():
    x = torch.randn(50, 5) * torch.tensor([1., 9, 1, 4, 1])
    mean, v = plane(x)
    assert v.shape == (5, 2) and v[1, 0].abs() > .95 and v[3, 1].abs() > .9 and torch.allclose(mean, x.double().mean(0))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    problem = Problem(*(ImageSet(n, images(60, s), torch.arange(60) % 3, ["a", "b", "c"]) for n, s in (("train", 0), ("test", 1))), {"ood": ImageSet("ood", images(20, 2))})
    config = with_values(Config(), ["size=8", "rounds=3", "pretrain_epochs=1", "generator_steps=3", "samples=40", "temperature=0.3", "batch_size=16", "generator_batch=8", "noise_images=20"])
    out = tmp_path_factory.mktemp("runs") / "small"
    run(config, out, problem=problem, progress=False)
    return out


def test_rounds_are_what_the_run_found(folder):
    for r in (1, 2, 3):
        found = load_round(folder, r)
        z = wished(found.generator, found.before, *condition([1, 0, 0, 0]), torch.randn(2, 100)) if r > 1 else None
        assert found.found.images.shape == (40, 1, 8, 8) and (found.generator is None) == (r == 1) and (z is None or z.images.shape == (2, 1, 8, 8))
    for bad in (0, 4):
        with pytest.raises(NiooddError, match="expected 1 to 3"): load_round(folder, bad)


def test_a_round_then_a_wish_then_a_live_run(folder):
    studio = InversionStudio(folder, known=images(30), every=10).wait()
    assert studio.classes == ["a", "b", "c", "garbage"] and studio.view.title == "round 3, wanted: a" and set(studio.view.bars) == {"asked", "answered when found", "after this round"}
    studio.controls["class"].value = "garbage"
    assert studio.wait().view.title == "round 3, wanted: garbage"
    studio.entries[0].value = .5
    assert "mostly garbage" in studio.wait().view.title
    studio.controls["steps"].value = 20
    before = torch.get_rng_state()
    studio.run_live()
    studio.wait()
    assert [s["step"] for s in studio.way] == [10, 20] and studio.view.title.startswith("live, after round 3") and not studio.live and torch.equal(before, torch.get_rng_state())
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
    while len(studio.way) < 2 and time.monotonic() < deadline: time.sleep(.01)
    studio.entries[2].value = .7  # does not end the run
    while (studio.view is None or "mostly" not in studio.view.title) and time.monotonic() < deadline: time.sleep(.01)
    assert studio.live and threading.active_count() > 1
    studio.stop()
    studio.wait()
    assert not studio.live and len(studio.way) < 1000 and "mostly 0" in studio.view.title
    studio.controls["class"].value = "3"
    assert studio.wait().view.title == "live, asked for 3"
    assert net.training and all(torch.equal(v, before[k]) for k, v in net.state_dict().items()) and all(p.requires_grad for p in net.parameters())
    studio.close()


def test_a_live_run_is_a_function_of_its_seed_and_weights():
    def ways(seed, **weights):
        torch.manual_seed(0)
        studio = InversionStudio(GarbageDetector(network(), classes=["a", "b", "c"]), known=images(20), every=20, seed=seed).wait()
        studio.controls["steps"].value = 20
        for k, v in weights.items(): studio.controls[k].value = v
        studio.run_live()
        return studio.wait().way
    first = ways(0)
    assert first == ways(0) and first != ways(1) and first != ways(0, α=0.0, γ=0.0)


def test_any_classifier_of_its_own_shape():
    net = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 5))
    studio = InversionStudio(net, size=8, channels=3, classes=list("abcde"), every=20).wait()
    studio.controls["steps"].value = 20
    studio.controls["conditioning"].value = "label"
    studio.run_live()
    assert studio.wait().view.images.images.shape == (24, 3, 8, 8) and studio.view.known is None


def test_mistakes_of_the_studio_are_one_line(tmp_path):
    for wrong, words in (((3,), "cannot be inverted"), ((tmp_path,), "holds no run"), ((network(), None, ["a"]), "1 class names")):
        with pytest.raises(NiooddError, match=words) as e: InversionStudio(*wrong)
        assert "\n" not in str(e.value)
