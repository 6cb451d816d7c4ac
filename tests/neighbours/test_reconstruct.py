"Losses and the judge of reconstruction, against autograd, scikit-image and scipy."
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from nioodd.core.datasets import load
from nioodd.core.errors import NiooddError
from nioodd.core.images import ImageSet
from nioodd.core.models import Classifier
from nioodd.inversion.invert import LOSSES
from nioodd.neighbours.reconstruct import (
    WEIGHTS,
    bank,
    bootstrap_interval,
    frechet,
    head_gradient_norm,
    margins,
    memorise,
    nearest_ssim,
    network_gradient_norm,
    pixel_range,
    recall,
    reconstruct,
    ssim,
    stationarity,
    total_variation,
)


def test_head_gradient_against_autograd():
    torch.manual_seed(0)
    net = Classifier(5, size=8).double().eval()
    x, y = torch.randn(6, 1, 8, 8).double(), torch.tensor([0, 4, 2, 2, 1, 3])
    features = net.features(x)
    closed = head_gradient_norm(net.head(features), features, y)
    every = network_gradient_norm(net, x, y)
    for i in range(6):
        loss = F.cross_entropy(net(x[i:i + 1]), y[i:i + 1])
        head = torch.autograd.grad(loss, list(net.head.parameters()), retain_graph=True)
        whole = torch.autograd.grad(loss, list(net.parameters()))
        torch.testing.assert_close(closed[i], torch.cat([g.flatten() for g in head]).norm())
        torch.testing.assert_close(every[i], torch.cat([g.flatten() for g in whole]).norm())
    assert (closed <= every + 1e-12).all()


def test_the_gradient_can_be_differentiated():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(9, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    x = torch.randn(2, 1, 3, 3).double().requires_grad_()
    y = torch.tensor([0, 2])
    assert torch.autograd.gradcheck(lambda x: network_gradient_norm(net, x, y), x)
    assert all(p.grad is None for p in net.parameters())


def test_variation_and_range():
    x = torch.randn(3, 2, 5, 6)
    by_hand = [(i[:, :, 1:] - i[:, :, :-1]).pow(2).mean() + (i[:, 1:] - i[:, :-1]).pow(2).mean() for i in x]
    torch.testing.assert_close(total_variation(x), torch.stack(by_hand))
    assert pixel_range(x.tanh()).max() == 0 and pixel_range(torch.full((1, 1, 2, 2), -1.5)) == 0.5


@pytest.mark.parametrize("channels", [1, 3])
def test_ssim_against_scikit_image(channels):
    metrics = pytest.importorskip("skimage.metrics")
    torch.manual_seed(0)
    a, b = (torch.randint(256, (3, channels, 12, 14), dtype=torch.uint8) for _ in range(2))
    b[0] = (a[0].float() * 0.7 + 20).byte()
    found = ssim(a, b)
    for i in range(3):
        for j in range(3):
            wanted = metrics.structural_similarity(a[i].numpy(), b[j].numpy(), channel_axis=0, data_range=255)
            assert found[i, j].item() == pytest.approx(wanted, abs=1e-9)


def test_ssim_of_floats_against_scikit_image():
    metrics = pytest.importorskip("skimage.metrics")
    torch.manual_seed(0)
    a, b = torch.rand(2, 4, 1, 16, 16) * 2 - 1
    b = (a + b) / 2
    for x, y, found in zip(a, b, ssim(a, b).diagonal()):
        expected = metrics.structural_similarity(x[0].numpy(), y[0].numpy(), data_range=2)
        assert abs(expected - found.item()) < 1e-5
    with pytest.raises(NiooddError, match="expected two uint8"): ssim(a, (b * 127).byte())


def test_frechet_against_scipy():
    linalg = pytest.importorskip("scipy.linalg")
    torch.manual_seed(0)
    a, b = torch.randn(200, 5).double(), 1.5 * torch.randn(300, 5).double() + 0.3
    c1, c2 = a.T.cov(), b.T.cov()
    root = linalg.sqrtm((c1 @ c2).numpy()).real.trace()
    wanted = (a.mean(0) - b.mean(0)).square().sum() + c1.trace() + c2.trace() - 2 * root
    assert frechet(a, b) == pytest.approx(wanted.item(), rel=1e-9)


def test_nearest_looks_within_the_class_and_banks_are_equal():
    digits = load("digits5k", "train", n=200)
    shelf = bank(digits, 5)
    assert shelf.labels.bincount().tolist() == [5] * 10
    assert nearest_ssim(shelf.images, shelf.labels, shelf).min() > 1 - 1e-9
    wrong = nearest_ssim(shelf.images[:5], (shelf.labels[:5] + 1) % 10, shelf)
    assert wrong.max() < 0.99
    with pytest.raises(NiooddError, match="expected 500 for a bank"): bank(digits, 500)
    with pytest.raises(NiooddError, match="expected two uint8"): ssim(shelf.images, shelf.images[..., :9])


def test_bootstrap_interval():
    torch.manual_seed(0)
    low, high = bootstrap_interval(torch.randn(400) + 1)
    assert low < 1.05 and high > 0.95 and high - low == pytest.approx(2 * 1.96 / 20, rel=0.2)


def test_stationarity_of_a_minimum():
    torch.manual_seed(0)
    x, y = torch.randn(6, 1, 4, 4), torch.arange(6) % 2
    net = memorise(x, y, hidden=20)
    logits = net(x)
    assert (logits.argmax(1) == y).all()
    shares = margins(logits, y).neg().sigmoid() / (6 * 1e-3) # −dL/dm / (N·decay)
    assert stationarity(net, x, y, shares.detach()) < 0.1
    assert stationarity(net, x, y, torch.zeros(6)) == 1
    found, labels, left = recall(net, 6, torch.zeros(1, 4, 4), steps=5)
    assert found.dtype == torch.uint8 and found.shape == (6, 1, 4, 4) and labels.tolist() == [0, 1] * 3 and left > 0
    assert recall(net, 6, torch.zeros(1, 4, 4), steps=5)[0].equal(found)


def test_reconstruct_uses_the_loop_of_invert():
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
    found = reconstruct(net, 6, size=8, channels=1, steps=2, batch_size=4, progress=False)
    assert found.images.shape == (6, 1, 8, 8) and WEIGHTS.keys() <= LOSSES.keys()
    every = dict(steps=1, batch_size=4, size=8, channels=1, progress=False, weights={"network_gradient": 1.0})
    assert reconstruct(net, 3, **every).images.shape == (3, 1, 8, 8)
    assert isinstance(bank(ImageSet("x", found.images, found.labels, ["0", "1", "2"]), 2), ImageSet)
