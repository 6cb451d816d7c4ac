"What does it say? Without a browser: images and explanations, the picture and the table, mistakes."
import io

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close

from nioodd.core.detector import Detector
from nioodd.core.errors import NiooddError
from nioodd.core.images import ImageSet
from nioodd.core.models import Classifier
from nioodd.core.scores import garbage_log_odds, msp
from nioodd.core.show import png
from nioodd.explore.ask import Ask, answer_picture, from_strokes, morphed, networks, share_text, spoilt, verdict_table
from nioodd.explore.explorer import EMPTY
from nioodd.inversion.detector import GarbageDetector
from nioodd.posthoc.layerwise import LayerwiseDetector
from nioodd.trust.detector import TrustIntervalDetector
from nioodd.trust.intervals import uniform_sigma

SHAPE = (1, 8, 8)


def images(n, seed=0, shape=SHAPE):
    return torch.randint(256, (n, *shape), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


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
    found = {"layers": LayerwiseDetector(net, classes=["a", "b", "c"]),
             "siblings": TrustIntervalDetector(net, uniform_sigma(net), n=3),
             "garbage": GarbageDetector(network(4)),
             "own": Plain(net)}
    for d in found.values(): d.fit(images(200), images(100, 1))
    return found


@pytest.fixture
def ask(detectors):
    explorer = Ask(detectors, {"one": images(5), "two": ImageSet("two", images(9, 2, (3, 12, 12)))}).wait()
    yield explorer
    explorer.close()


# Explanations

MORE = {"layers": set(), "siblings": {"agreement"}, "garbage": {"garbage_probability"}, "own": set()}


def test_an_explanation_is_the_verdict_of_each_image_alone_or_in_a_batch(detectors):
    x = images(6, 3)
    for name, d in detectors.items():
        said = d.explain(x)
        for k, v in d.verdict(x).items(): assert torch.equal(said[k], v)
        assert torch.equal(said["ood"], d.is_ood(x)) and torch.equal(said["score"], d.predict(x))
        assert said["label"].max() < 3 and ((0 <= said["uncertainty"]) & (said["uncertainty"] <= 1)).all()
        for i in range(6): assert torch.equal(d.explain(x[i:i + 1])["ood"], said["ood"][i:i + 1])


def test_what_each_detector_knows(detectors):
    for name, d in detectors.items():
        said = d.explain(images(6, 3))
        assert said["probabilities"].shape == (6, 4 if name == "garbage" else 3)
        assert_close(said["probabilities"], d.logits(images(6, 3)).double().softmax(1))
        assert {k for k in said if k in ("garbage_probability", "agreement")} == MORE[name]
    garbage = detectors["garbage"]
    expected = garbage_log_odds(garbage.logits(images(6, 3))).sigmoid()
    assert torch.allclose(garbage.explain(images(6, 3))["garbage_probability"], expected)


def test_the_garbage_output_of_a_guarded_network_is_told():
    net = network(4)
    layers = LayerwiseDetector(net, n_known=3).fit(images(200), images(100, 1))
    siblings = TrustIntervalDetector(net, uniform_sigma(net), n_known=3).fit(held_out=images(100, 1))
    for d in (layers, siblings, Plain(net, n_known=3).fit(held_out=images(100, 1))):
        said = d.explain(images(6, 3))
        assert_close(said["probabilities"], d.logits(images(6, 3)).double().softmax(1))
        assert torch.equal(said["garbage_probability"], said["probabilities"][:, 3])


class Counting(Classifier):
    "Counts how often it runs."
    runs = 0

    def forward(self, x):
        Counting.runs += 1
        return super().forward(x)


def test_an_explanation_runs_the_network_once():
    net = Counting(4, size=8)
    layers = LayerwiseDetector(net, n_known=3).fit(images(200), images(100, 1))
    for d in (layers, GarbageDetector(net, threshold=0.0)):
        for call in (d.verdict, d.explain):
            Counting.runs = 0
            call(images(9, 3))
            assert Counting.runs == 1


def test_siblings_that_are_the_network_itself_agree_entirely(detectors):
    net = detectors["own"].model
    zero = {k: 0 * s for k, s in uniform_sigma(net).items()}
    same = TrustIntervalDetector(net, zero, n=3, threshold=0.0)
    assert torch.allclose(same.explain(images(5))["agreement"], torch.ones(5).double())


def test_networks_are_told_apart_by_identity(detectors):
    assert networks(detectors) == {"layers, siblings, own": "layers", "garbage": "garbage"}


# Images

@pytest.mark.parametrize("channels,size", [(1, 28), (3, 32), (1, 8)])
def test_strokes_become_an_image_of_any_size(channels, size):
    x = from_strokes([[(.1, .1), (.3, .3)], [], [(.2, .1)]], size, channels)
    assert x.shape == (1, channels, size, size) and x.dtype == torch.uint8 and x.max() > 90


def test_a_centred_drawing_does_not_depend_on_where_and_how_large_it_was_drawn():
    stroke = np.array([(.2, .2), (.6, .2), (.4, .8)])
    smaller = stroke * .6 + .3
    here, there = from_strokes([stroke], 28), from_strokes([smaller], 28)
    assert (here.int() - there.int()).abs().float().mean() < 3
    assert not torch.equal(from_strokes([stroke], 28, centre=False), from_strokes([smaller], 28, centre=False))
    assert not from_strokes([], 28).any() and not from_strokes([[]], 28).any()


def test_dials_at_nothing_change_nothing_and_leave_the_network_alone():
    net, x = network().train(), images(1)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    assert torch.equal(spoilt(x, net), x) and torch.equal(spoilt(x, net, .3), spoilt(x, net, .3))
    assert not torch.equal(spoilt(x, net, .3), spoilt(x, net, .3, seed=1))
    assert (spoilt(x, net, 0, 7).int() - x.int()).abs().max() <= 7
    assert net.training and all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert all(p.grad is None for p in net.parameters())
    assert torch.equal(morphed(x, images(1, 1), 1.0), images(1, 1))


# Seen

@pytest.mark.parametrize("k", [2, 11, 100])
def test_the_picture_of_few_and_of_many_classes(k):
    p = {"a": torch.randn(k).softmax(0), "b": torch.randn(k + 1).softmax(0)}
    figure = answer_picture(images(1, shape=(3, 9, 9)), p, [f"class {i}" for i in range(k)])
    assert len(figure.axes[1].get_xticklabels()) == min(k + 1, 12 if k > 12 else k + 1) and png(figure)


def test_names_are_escaped_in_the_table(detectors):
    answers = {"<b>": detectors["own"].explain(images(1))}
    text = verdict_table(answers, ["<i>"] * 3, {"<b>": .5})
    assert "<b>" not in text and "&lt;b&gt;" in text and "<i>" not in text and "–" in text


def test_shares_near_an_end_are_not_rounded_to_it():
    texts = [share_text(v) for v in (0, 1e-9, 0.25, 1 - 1e-9, 1)]
    assert texts == ["0.0 %", "< 0.1 %", "25.0 %", "> 99.9 %", "100.0 %"]


# The explorer

def test_sliders_make_the_image_and_every_detector_answers(ask):
    first = ask.picture.value
    assert first != EMPTY and torch.equal(ask.image, images(5)[:1])
    assert set(ask.answers) == {"layers", "siblings", "garbage", "own"}
    settings = {"index": 3, "to set": "one", "to index": 4, "morph": .5, "noise": .1, "attack": 9, "network": "garbage"}
    for k, v in settings.items(): ask.controls[k].value = v
    ask.wait()
    between = morphed(images(5)[3:4], images(5)[4:5], .5)
    assert torch.equal(ask.image, spoilt(between, ask.detectors["garbage"].model, .1, 9))
    assert ask.picture.value != first
    ask.controls["set"].value = "two"
    ask.wait()
    assert ask.controls["index"].max == 8 and ask.sets["two"].shape == (9, 1, 8, 8)
    assert "unknown" in ask.table.value or "known" in ask.table.value


def test_drawing_and_clearing(ask):
    line = [(.2, .2), (.8, .8)]
    ask.stroke(line)
    ask.wait()
    assert ask.controls["source"].value == "drawing" and torch.equal(ask.image, from_strokes([line], 8))
    ask.controls["centre"].value = False
    ask.wait()
    assert torch.equal(ask.image, from_strokes([line], 8, centre=False))
    if hasattr(ask, "pad"):  # where ipycanvas is installed
        ask.pad.clear.click()
        assert not ask.wait().image.any()


def test_the_pen_makes_strokes(ask):
    pytest.importorskip("ipycanvas")
    ask.pad.move(9, 9)  # not down: nothing
    ask.pad.down(0, 112)
    ask.pad.move(224, 112)
    ask.pad.up()
    ask.pad.finger_down([(56, 56), (1, 1)])
    ask.pad.finger_move([(57, 56)])
    ask.pad.up()
    ask.pad.up()
    assert ask.wait().strokes == [[(0, .5), (.1 / 224, .5), (1, .5)], [(.25, .25), (56.1 / 224, .25), (57 / 224, .25)]]
    assert torch.equal(ask.image, from_strokes(ask.strokes, 8))


def test_a_file_is_read_and_a_bad_one_is_named(ask):
    file = io.BytesIO()
    Image.fromarray(images(1, shape=(3, 30, 20))[0].permute(1, 2, 0).numpy()).save(file, "PNG")
    ask.controls["source"].value = "file"
    ask.wait()
    assert "choose" in ask.message.value
    entry = dict(name="a.png", content=memoryview(file.getvalue()))
    ask.controls["file"].value = [entry]
    light = ask.wait().image
    assert light.shape == (1, 1, 8, 8)
    ask.controls["negative"].value = True
    assert torch.equal(ask.wait().image, 255 - light)
    ask.controls["file"].value = [entry | dict(name="b.png", content=memoryview(b"no image"))]
    with pytest.raises(NiooddError, match="b.png"): ask.wait()
    assert "b.png" in ask.message.value
    ask.controls["file"].value = [entry]
    ask.wait()


def test_without_ipycanvas_and_without_images(detectors, monkeypatch):
    monkeypatch.setattr("nioodd.explore.ask.importlib.util.find_spec", lambda name: None)
    explorer = Ask(detectors["own"]).wait()
    assert [o[1] for o in explorer.controls["source"].options] == ["drawing", "file"]
    assert not explorer.image.any() and list(explorer.answers) == ["Plain"]
    explorer.stroke([(.1, .5), (.9, .5)])
    assert explorer.wait().image.any()


def test_mistakes_of_ask_are_one_line(detectors):
    other = Plain(network(5), threshold=0.5)
    wrong = [((network(),), "expected a Detector"),
             (({},), "no detectors"),
             ((Plain(network()),), "no threshold"),
             ((detectors, None, ["a"]), "1 class names"),
             ((detectors, torch.zeros(0, 1, 8, 8)), "without images"),
             ((detectors | {"other": other},), "different numbers of classes"),
             ((detectors, None, None, 20), "20×20")]
    for args, words in wrong:
        with pytest.raises(NiooddError, match=words) as e: Ask(*args)
        assert "\n" not in str(e.value)
