"The explorer of siblings without a browser: its logits are those of siblings, and it leaves the network alone."
import pytest
import torch
from torch.testing import assert_close

from nioodd.core.errors import NiooddError
from nioodd.core.models import Classifier
from nioodd.explore.siblings import SiblingExplorer, scaled_logits, sibling_figures
from nioodd.trust.detector import TrustIntervalDetector
from nioodd.trust.intervals import uniform_sigma
from nioodd.trust.siblings import Siblings, plain_logits


@pytest.fixture
def network():
    torch.manual_seed(0)
    return Classifier(4, size=14)


@pytest.fixture
def images():
    return torch.randint(256, (30, 1, 14, 14), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def nothing(*args): "A step that is never refused."


def test_scaled_logits_are_those_of_siblings_one_by_one(network, images):
    sigma = uniform_sigma(network.eval(), 0.2)
    z = scaled_logits(nothing, network, sigma, images, 0.5, 3, batch_size=7, seed=4)
    one_by_one = Siblings(network, {k: 0.5 * s for k, s in sigma.items()}, 3, seed=4)
    expected = plain_logits(network, [one_by_one.weights(i) for i in range(3)], images / 127.5 - 1)
    assert_close(z, expected, rtol=1e-4, atol=1e-5)


def test_figures_of_siblings_leave_the_network_out():
    known = 20 * torch.nn.functional.one_hot(torch.tensor([[0, 1], [0, 0]]), 3).float()
    assert sibling_figures(known, known, torch.tensor([0, 1]))["accuracy"] == 0.5
    assert sibling_figures(known, known, torch.tensor([0, 1]))["auroc"] == 0.5


def test_sliders_of_the_siblings(network, images):
    network.train()
    weights = {k: v.clone() for k, v in network.state_dict().items()}
    explorer = SiblingExplorer(network, images[:20], images[20:], torch.arange(20) % 4)
    first = explorer.wait().overview.value, explorer.answers.value
    explorer.index.value = 3  # another image: the rest stays
    assert explorer.wait().overview.value == first[0] and explorer.answers.value != first[1]
    explorer.scale.value = 4
    assert explorer.wait().overview.value != first[0]
    explorer.n.value = 4
    assert explorer.wait().logits[4, 4][0].shape == (4, 20, 4)
    assert set(explorer.logits) == {(1, 2), (4, 2), (4, 4)}
    assert_close(explorer.logits[4, 4][1][:2], explorer.logits[4, 2][1], rtol=1e-4, atol=1e-5)
    explorer.all_button.click()
    assert {a for a, n in explorer.wait().logits if n == 4} == {2.0**e for e in range(-4, 5)}
    assert network.training and all(torch.equal(weights[k], v) for k, v in network.state_dict().items())


def test_a_detector_brings_its_intervals_seed_and_measure(network, images):
    detector = TrustIntervalDetector(network, uniform_sigma(network, 0.3), measure="dispersion", n=3, seed=7,
                                     classes=list("abcd"))
    explorer = SiblingExplorer(detector, images[:20], images[20:], torch.arange(20) % 4).wait()
    assert explorer.measure.value == "dispersion" and explorer.n.value == 3
    assert_close(explorer.logits[1, 3][0], detector.sibling_logits(images[:20]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("change, line", [
    (dict(labels=torch.arange(3)), r"labels have shape \[3\] for 30 known images"),
    (dict(unknown=torch.zeros(0, 1, 14, 14, dtype=torch.uint8)), "30 known and 0 unknown"),
    (dict(known=torch.zeros(30, 1, 14, 14)), "expected uint8")])
def test_the_sibling_explorer_says_what_it_cannot_take(network, images, change, line):
    given = dict(known=images, unknown=images, labels=torch.arange(30) % 4) | change
    with pytest.raises(NiooddError, match=line): SiblingExplorer(network, **given)
