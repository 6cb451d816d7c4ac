"Any score as a detector: the same scores as without it, files that bring them back, the false alarms asked for."
import json
import math

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from nioodd.core.detector import Detector, read_detector, write_detector
from nioodd.core.errors import NiooddError
from nioodd.core.images import ImageSet, to_input
from nioodd.core.models import Classifier
from nioodd.core.training import train_epoch
from nioodd.posthoc.baselines import BASELINES, FitData, bayes_adapter, logits_score
from nioodd.posthoc.outputs import network_outputs
from nioodd.posthoc.score_detector import ScoreDetector, labelled_images

K, SIZE = 4, 12
TIES = ("nac", "gram", "gen")  # Many images have the same score: the first two count, the third clips
FALSE_ALARMS = 0.1


def patterns(n, seed):
    "Four kinds of stripes, as an image set."
    rng = torch.Generator().manual_seed(seed)
    y, side = torch.arange(n) % K, torch.arange(SIZE)
    rows, diagonal = (side % 4 < 2)[:, None].expand(SIZE, SIZE), side + side[:, None]
    stripes = torch.stack([rows.T, rows, diagonal % 6 < 3, diagonal < SIZE]).float()
    x = 150 * stripes[y] + 200 * torch.rand(n, SIZE, SIZE, generator=rng) - 60
    return ImageSet("patterns", x.clamp(0, 255).to(torch.uint8)[:, None], y, [*"abcd"])


@pytest.fixture(scope="module", autouse=True)
def brief_fine_tuning():
    "BayesAdapter's 400 steps are most of the time; 20 will do here, by the same code."
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(bayes_adapter.__kwdefaults__, "steps", 20)
        yield


@pytest.fixture(scope="module")
def train(): return patterns(600, 0)


@pytest.fixture(scope="module")
def held_out(): return patterns(400, 1)


@pytest.fixture(scope="module")
def fresh(): return patterns(600, 2)


def narrow():
    "C1, but narrow."
    body = nn.Sequential(nn.Conv2d(1, 8, 5, padding=2), nn.MaxPool2d(2), nn.ReLU(),
                         nn.Conv2d(8, 16, 5, padding=2), nn.MaxPool2d(2), nn.ReLU(), nn.Flatten())
    return nn.Sequential(*body, nn.Linear(16 * (SIZE // 4)**2, 64), nn.ReLU(), nn.Linear(64, K))


@pytest.fixture(scope="module")
def net(train):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = narrow()
        optimiser = torch.optim.Adam(net.parameters(), 5e-3)
        for _ in range(4): train_epoch(net, train.images, train.labels, optimiser)
    optimiser.zero_grad()
    return net.eval()


@pytest.fixture(scope="module")
def fitted(net, train, held_out):
    "Detectors by the name of their score, each fitted once."
    made = {}

    def get(name):
        if name not in made: made[name] = ScoreDetector(net, name).fit(train, held_out, false_alarms=FALSE_ALARMS)
        return made[name]

    return get


def fit_data(net, train, held_out):
    return FitData(net, network_outputs(net, train.images), train.labels, train.images,
                   network_outputs(net, held_out.images), held_out.images, held_out.labels)


def sees(name, net, images): return network_outputs(net, images) if BASELINES[name].needs == "outputs" else images


@pytest.mark.parametrize("name", BASELINES)
def test_scores_are_those_of_the_baseline(name, net, train, held_out, fresh, fitted):
    half = held_out[torch.randperm(400, generator=torch.Generator().manual_seed(0))[:200]]
    learnt_from = half if BASELINES[name].learns_from == "held-out" else held_out
    plain = BASELINES[name].make(fit_data(net, train, learnt_from))
    expected = plain(sees(name, net, fresh.images[:100]))
    scale = 1e-4 * (expected - expected.median()).abs().median().item()
    torch.testing.assert_close(fitted(name).predict(fresh.images[:100]), expected, rtol=1e-5, atol=scale)


@pytest.mark.parametrize("name", BASELINES)
def test_files_bring_the_same_verdicts_back(name, fresh, fitted, tmp_path):
    d = fitted(name)
    again = Detector.load(d.save(tmp_path), model=narrow())
    assert type(again) is ScoreDetector
    assert (again.score, again.threshold, again.n_known) == (name, d.threshold, d.n_known)
    before, after = d.verdict(fresh.images[:60]), again.verdict(fresh.images[:60])
    for key, value in before.items(): assert torch.equal(after[key], value), key
    assert torch.equal(again.is_ood(fresh.images[:60], 0.05), d.is_ood(fresh.images[:60], 0.05))
    assert {p.name for p in tmp_path.iterdir()} == {"detector.json", "model.safetensors"}
    assert json.loads((tmp_path/"detector.json").read_text())["arguments"]["score"] == name


def test_what_was_loaded_can_be_saved(fresh, fitted, tmp_path):
    d = fitted("knn")
    again = Detector.load(d.save(tmp_path/"once"), model=narrow())
    twice = Detector.load(again.save(tmp_path/"twice"), model=narrow())
    assert torch.equal(twice.predict(fresh.images[:9]), d.predict(fresh.images[:9]))


@pytest.mark.parametrize("name", BASELINES)
def test_false_alarms_are_near_what_was_asked(name, fresh, fitted):
    d = fitted(name)
    share = d.is_ood(fresh.images).double().mean().item()
    n = len(d.calibration)
    deviation = math.sqrt(FALSE_ALARMS * (1 - FALSE_ALARMS) * (1 / n + 1 / len(fresh)))
    assert share < FALSE_ALARMS + 4 * deviation
    assert share > FALSE_ALARMS - 4 * deviation or name in TIES
    assert n == (200 if BASELINES[name].learns_from == "held-out" else 400)


def test_the_network_is_left_as_it_was(net, train, held_out, fresh):
    before, state = {k: v.clone() for k, v in net.state_dict().items()}, torch.get_rng_state()
    for name in ("knn", "gram", "bayes_adapter_2", "odin"):
        ScoreDetector(net, name).fit(train, held_out).verdict(fresh.images[:5])
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in net.parameters())
    assert torch.equal(state, torch.get_rng_state())


def test_tensors_loaders_and_sets_give_the_same_detector(net, train, held_out, fresh):
    one = ScoreDetector(net, "mahalanobis").fit(train, held_out)
    strange = torch.zeros(20, 1, SIZE, SIZE, dtype=torch.uint8)
    images, labels = torch.cat([train.images, strange]), torch.cat([train.labels, -torch.ones(20).long()])
    loader = DataLoader(TensorDataset(images, labels), batch_size=33)  # negative labels: left out
    floats = ImageSet("floats", to_input(train.images), train.labels)
    for a, b in ((loader, DataLoader(held_out.images, batch_size=7)), (floats, held_out.images)):
        other = ScoreDetector(net, "mahalanobis").fit(a, b)
        assert torch.equal(other.predict(fresh.images), one.predict(fresh.images)) and other.threshold == one.threshold


def test_images_and_labels_stay_together_in_a_loader_that_shuffles(train):
    s = labelled_images(DataLoader(TensorDataset(train.images, train.labels), batch_size=50, shuffle=True))
    assert len(s) == 600
    for image, label in zip(s.images, s.labels):
        assert (train.images[train.labels == label] == image).all((1, 2, 3)).any()


def test_without_labels_the_network_gives_them(net, train, held_out, fresh):
    answers = ImageSet("answers", train.images, network_outputs(net, train.images).logits.argmax(1))
    a, b = (ScoreDetector(net, "mahalanobis").fit(t, held_out.images) for t in (train.images, answers))
    assert torch.equal(a.predict(fresh.images), b.predict(fresh.images))


@pytest.mark.parametrize("name", [name for name, b in BASELINES.items() if b.true_labels])
def test_where_that_will_not_do_one_line_says_so(name, net, train, held_out):
    with pytest.raises(NiooddError, match=f"{name} needs the labels") as e:
        ScoreDetector(net, name).fit(train.images, held_out.images)
    assert "\n" not in str(e.value)


def test_so_many_training_images_at_most(net, train, held_out):
    d = ScoreDetector(net, "knn").fit(train, held_out, n=100)
    assert d.learnt()["features"].shape[0] == 100
    other = ScoreDetector(net, "knn").fit(train, held_out, n=100, seed=1)
    assert not torch.equal(other.learnt()["features"], d.learnt()["features"])


def test_one_set_is_split(net, train):
    assert len(ScoreDetector(net, "knn").fit(train).calibration) == 150
    assert len(ScoreDetector(net, "energy").fit(train).calibration) == 600  # no training image is needed
    assert len(ScoreDetector(net, "odin").fit(train).calibration) == 300


# A function

def spread(logits): return -logits.var(1)


def test_a_function_of_logits(net, held_out, fresh, tmp_path):
    d = ScoreDetector(net, spread).fit(held_out=held_out)
    z = network_outputs(net, fresh.images).logits.double()
    torch.testing.assert_close(d.predict(fresh.images), -z.var(1))
    with pytest.raises(NiooddError, match="spread is a function, which no file can hold") as e: d.save(tmp_path/"no")
    assert "\n" not in str(e.value) and not (tmp_path/"no").exists()


def test_a_registered_function_can_be_saved(net, held_out, fresh, tmp_path, monkeypatch):
    monkeypatch.setitem(BASELINES, "spread", None)  # taken out again afterwards
    assert logits_score()(spread) is spread
    d = ScoreDetector(net, "spread").fit(held_out=held_out)
    again = Detector.load(d.save(tmp_path), model=narrow())
    assert torch.equal(again.predict(fresh.images), d.predict(fresh.images))
    del BASELINES["spread"]
    with pytest.raises(NiooddError, match="unknown baseline 'spread'"):
        Detector.load(tmp_path, model=narrow())


# What goes wrong

def one_line(call, *args, **kwargs):
    with pytest.raises(NiooddError) as e: call(*args, **kwargs)
    assert "\n" not in str(e.value)
    return str(e.value)


def test_names_and_images_that_are_missing(net, train, held_out, tmp_path):
    assert "did you mean 'energy'" in one_line(ScoreDetector, net, "energi")
    d = ScoreDetector(net, "knn")
    assert "knows no images" in one_line(d.predict, train.images) == one_line(d.verdict, train.images)
    assert "knows no images" in one_line(d.save, tmp_path)
    assert "expected fit(train, held_out)" in one_line(d.fit, held_out=held_out)
    assert "or fit(held_out=images)" in one_line(ScoreDetector(net, "msp").fit)
    assert "held_out is empty" in one_line(d.fit, train, held_out[:0])
    assert "no training image of class 3" in one_line(d.fit, train[train.labels < 3], held_out)
    assert "expected a tensor" in one_line(d.fit, 3, held_out)
    wrong_channels = torch.zeros(9, 3, SIZE, SIZE)
    assert "shape" in one_line(ScoreDetector(Classifier(K, size=SIZE), "msp").fit, held_out=wrong_channels)
    assert "false_alarms" in one_line(d.fit, train, held_out[:9])


def test_networks_that_do_not_suit(net, train, held_out):
    fewer = ScoreDetector(net, "knn", n_known=3)
    assert "n_known=3, but the network has 4 outputs" in one_line(fewer.fit, train, held_out)
    followed = nn.Sequential(net, nn.Softmax(1))
    assert "expected nn.Linear at its end" in one_line(ScoreDetector(followed, "vim").fit, train, held_out)
    assert "not a sequence" in one_line(ScoreDetector(Classifier(K, size=SIZE), "gram").fit, train, held_out)
    ScoreDetector(followed, "msp").fit(train, held_out)  # reads logits only


@pytest.mark.parametrize("lost", ["logits", "features", "before", "images", "labels", "seed"])
def test_a_file_without_one_of_its_parts(lost, fitted, tmp_path):
    description, tensors = read_detector(fitted("knn").save(tmp_path))
    del tensors[f"learnt.{lost}"]
    head = {k: v for k, v in description.items() if k not in ("format", "nioodd", "sha256")}
    write_detector(tmp_path, head, tensors)
    assert f"lacks {lost}" in one_line(Detector.load, tmp_path, narrow())


@pytest.mark.parametrize("none", [[], [(torch.zeros(3, 1, SIZE, SIZE).byte(), torch.full((3,), -1))]])
def test_no_training_images_is_one_line(none, held_out):
    net = Classifier(K, size=SIZE).eval()
    with pytest.raises(NiooddError, match="train holds no ID images"): ScoreDetector(net, "vim").fit(none, held_out)
