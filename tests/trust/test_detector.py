"The detector of siblings: its scores, threshold and files, and the options that one is learnt by."
import pytest
import torch
from pytorch_ood.benchmark import Benchmark
from torch.utils.data import TensorDataset
from trust_networks import Pair, Residual, images, small_network

from nioodd.core.detector import Detector
from nioodd.core.errors import NiooddError
from nioodd.core.images import to_input
from nioodd.core.metrics import ood_metrics
from nioodd.core.models import Classifier
from nioodd.trust.agreement import MEASURES
from nioodd.trust.detector import TrustIntervalDetector
from nioodd.trust.intervals import TrustIntervals, uniform_sigma
from nioodd.trust.siblings import Siblings


@pytest.fixture(autouse=True)
def own_randomness():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


@pytest.fixture
def network(): return small_network()


@pytest.fixture
def detector(network): return TrustIntervalDetector(network, uniform_sigma(network, .1)).fit(held_out=images(100))


@pytest.mark.parametrize("name", MEASURES)
def test_detector_scores_are_the_measure_of_its_siblings(network, name):
    sigma, x = uniform_sigma(network, .1), images(20)
    d = TrustIntervalDetector(network, sigma, name, n=3, seed=2)
    by_hand = MEASURES[name](Siblings(network, sigma, 3, 2).logits(to_input(x)))
    torch.testing.assert_close(d.predict(x), by_hand, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(d.sibling_logits(x)[0], d.logits(x))


def test_scores_do_not_depend_on_the_batch_or_its_order(detector):
    x, order = images(40), torch.randperm(40)
    whole = detector.predict(x)
    one_by_one = torch.cat([detector.predict(i[None]) for i in x])
    in_another_order = detector.predict(x[order])[order.argsort()]
    behind_others = detector.predict(torch.cat([images(7, 3), x]))[7:]
    for other in (one_by_one, in_another_order, behind_others):
        torch.testing.assert_close(other, whole, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("model", [None, "own"])
def test_saved_and_loaded_detectors_score_alike(network, tmp_path, model):
    net = Residual().eval() if model else network
    def loaded(): return Detector.load(d.save(tmp_path), model=Residual() if model else None)
    x = images(30, 1)
    d = TrustIntervalDetector(net, uniform_sigma(net, .2, norm=True), "kl_to_mean", n=4, seed=3, distribution="laplace")
    d.fit(held_out=images(100))
    again = loaded()
    assert type(again) is TrustIntervalDetector and again.arguments() == d.arguments()
    assert again.threshold == d.threshold
    assert torch.equal(again.predict(x), d.predict(x))
    d.siblings.grow(5).redraw(9)
    for use in (lambda: d.is_ood(images(3)), lambda: d.save(tmp_path)):
        # The threshold is of the siblings of before
        with pytest.raises(NiooddError, match="grown or been redrawn"): use()
    d.fit(held_out=images(100))
    again = loaded()
    assert (again.siblings.n, again.siblings.seed) == (5, 9) and torch.equal(again.predict(x), d.predict(x))


def test_a_score_is_never_kept(detector, network):
    x = images(10)
    before = detector.predict(x)
    with torch.no_grad(): network.head.weight.mul_(2)
    after = detector.predict(x)
    fresh = TrustIntervalDetector(network, detector.learnt()).predict(x)
    assert not torch.allclose(before, after)
    torch.testing.assert_close(after, fresh, rtol=1e-4, atol=1e-4)


def test_the_verdict_is_of_the_siblings_and_the_label_of_the_network(network):
    d = TrustIntervalDetector(network, uniform_sigma(network, .3), n=4, n_known=3).fit(held_out=images(100))
    x = images(30, 1)
    v, z = d.verdict(x), d.sibling_logits(x)[..., :3]
    assert torch.equal(v["label"], z[0].argmax(1)) and torch.equal(v["ood"], d.is_ood(x))
    p = z.double().softmax(-1).mean(0)
    torch.testing.assert_close(v["uncertainty"], 1.5 * (p * (1 - p)).sum(1))
    assert torch.equal(v["score"], d.predict(x)) and torch.equal(v["p_value"], d.p_values(v["score"]))


def test_drops_into_the_benchmark(detector, network):
    known, unknown, labels = images(60, 1), images(30, 2) // 4, torch.arange(60) % 3

    class Small(Benchmark):
        ood_names = ["dark"]
        def train_set(self): return TensorDataset(known, labels)
        def test_sets(self, known_=True, unknown_=True):
            return [TensorDataset(torch.cat([known, unknown]), torch.cat([labels, -torch.ones(30).long()]))]
    network.train()
    row, = Small().evaluate(detector, loader_kwargs=dict(batch_size=16))
    scores = torch.cat([detector.predict(x) for x in torch.cat([known, unknown]).split(16)])
    assert row["AUROC"] == pytest.approx(ood_metrics(scores[:60], scores[60:])["auroc"], abs=1e-12) and network.training


def test_the_detector_draws_as_the_intervals_were_learnt(network):
    trust = TrustIntervals(network, distribution="laplace")
    assert TrustIntervalDetector(network, trust).siblings.distribution == "laplace"
    assert TrustIntervalDetector(network, trust, distribution="cauchy").siblings.distribution == "cauchy"
    assert TrustIntervalDetector(network, trust.sigma()).siblings.distribution == "gaussian"


def made(net, **arguments): return TrustIntervalDetector(net, uniform_sigma(net), **arguments)


def other_architecture(net): return TrustIntervalDetector(net, uniform_sigma(Classifier(5, size=8)))


def no_logits(_): return made(Pair()).predict(images(2))


BAD_DETECTORS = [
    (lambda net: made(net, n=1), "n is 1"),
    (lambda net: made(net, n=2.5), "n is 2.5"),
    (lambda net: made(net, measure="agreement"), "unknown measure"),
    (other_architecture, r"\[5, 128\] in the intervals, \[4, 128\]"),
    (lambda net: TrustIntervalDetector(net).predict(images(2)), "no intervals"),
    (lambda net: made(net, distribution="gausian"), "gaussian"),
    (lambda net: made(net).is_ood(images(2)), "no threshold"),
    (lambda net: made(net).predict(images(2)[0]), "shape"),
    (lambda net: made(net, n_known=-1), "n_known is -1"),
    (lambda net: made(net, n_known=9).predict(images(2)), "n_known is 9.* 4 outputs"),
    (lambda net: made(net, classes=["a"]).predict(images(2)), "1 class names, but the network has 4 outputs"),
    (lambda net: made(net, classes=["a"], n_known=3), "1 class names for n_known=3"),
    (no_logits, "returned tuple for 2 images"),
]


@pytest.mark.parametrize("make, word", BAD_DETECTORS)
def test_bad_detectors(network, make, word):
    with pytest.raises(NiooddError, match=word) as e: make(network)
    assert "\n" not in str(e.value)


def test_what_are_no_intervals(network):
    for sigma in (3, {"head.weight": 0.1}):
        with pytest.raises(NiooddError, match="expected TrustIntervals, or tensors by parameter name"):
            TrustIntervalDetector(network, sigma)
