"""Inputs made from images: the same for a subset as for the whole, of the stated strength; the network stays."""
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from nioodd.benchmark.stress import SEVERITIES, corrupted, fgsm, gaussian_images, pixel_moments, standard_normal
from nioodd.core.datasets import load
from nioodd.core.errors import NiooddError
from nioodd.core.forward import logits_of
from nioodd.core.images import ImageSet, from_arrays, to_input, to_uint8
from nioodd.core.models import Classifier, architecture


def random_images(*shape, low=0, high=256, seed=0):
    return torch.randint(low, high, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Classifier(5, channels=3, size=16)


# Noise that belongs to an image

@pytest.mark.parametrize("index", [[0], [700, 3, 3, 255, 256, 257], [*range(250, 520)], [100_000], []])
def test_normal_is_a_function_of_the_index(index):
    index = torch.tensor(index, dtype=torch.int64)
    got = standard_normal(index, 10, seed=3)
    assert got.shape == (len(index), 10) and got.dtype == torch.float32
    for i, row in zip(index, got): assert torch.equal(row, standard_normal(i[None], 10, seed=3)[0])


def test_normal_is_normal_and_seeds_and_streams_are_others():
    a = standard_normal(torch.arange(500), 400).double()
    x = a.flatten().sort().values
    ks = (torch.special.ndtr(x) - torch.arange(1, len(x) + 1) / len(x)).abs().max()  # Kolmogorov–Smirnov
    assert ks < 1.95 / len(x)**.5
    for b in (standard_normal(torch.arange(500), 400, seed=1), standard_normal(torch.arange(500), 400, stream=1),
              a.roll(1, 0), a.roll(1, 1)):
        assert abs((a * b).mean()) < .01
    assert torch.equal(standard_normal(torch.arange(3), 4, 2**32 - 1, 2),
                       standard_normal(torch.arange(3), 4, 2**32 - 1, 2))


def test_the_callers_random_stream_is_left_alone(net):
    images = random_images(4, 3, 16, 16)
    torch.manual_seed(5)
    want = torch.rand(3)
    torch.manual_seed(5)
    corrupted(images, "gaussian", 3), gaussian_images(from_arrays(images), 3), fgsm(net, images)
    assert torch.equal(torch.rand(3), want)


# Gaussian images

def test_pixel_moments():
    images = random_images(30, 3, 7, 9)
    images[:, 1] //= 3
    for got, want in zip(pixel_moments(images), ((images / 255.).double().mean((0, 2, 3)),
                                                 (images / 255.).double().std((0, 2, 3), correction=0))):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=0)
    assert pixel_moments(torch.full((2, 1, 3, 3), 255, dtype=torch.uint8)) == (1, 0)


def test_gaussian_images_have_the_moments_of_each_channel():
    like = from_arrays(random_images(200, 3, 12, 12, low=90, high=160), name="mid")
    like.images[:, 2] -= 40
    made = gaussian_images(like, 2000)
    assert made.name == "gaussian-like-mid" and made.images.shape == (2000, 3, 12, 12) and made.labels is None
    (m, s), (mean, std) = pixel_moments(like.images), pixel_moments(made.images)  # hardly clipped
    torch.testing.assert_close(mean, m, rtol=0, atol=.002)
    torch.testing.assert_close(std, s, rtol=.02, atol=0)


def test_gaussian_images_by_given_numbers():
    like = load("digits5k", "test")
    x = gaussian_images(like, 1500, seed=4, mean=.5, std=1.).images
    assert abs((x == 0).double().mean() - .3092) < .003 and abs((x == 255).double().mean() - .3092) < .003
    assert torch.equal(gaussian_images(like, 1100, seed=4, mean=.5, std=1.).images, x[:1100])
    assert not torch.equal(gaussian_images(like, 5, mean=.5, std=1.).images, x[:5])
    assert (gaussian_images(like, 5, mean=.2, std=0.).images == 51).all()


# Severities

@pytest.mark.parametrize("kind", SEVERITIES)
@pytest.mark.parametrize("severity", range(1, 6))
def test_corruption_is_cifar_10_cs_formula(kind, severity):
    """Its two functions written in NumPy as published, with our random numbers.

    Rounding to the nearest level is at most one level from cutting off."""
    images = random_images(7, 3, 9, 11)
    x, n = images.numpy() / 255., standard_normal(torch.arange(7), 3 * 9 * 11).view(images.shape).numpy()
    c = dict(gaussian=[0.04, 0.06, .08, .09, .10], speckle=[.06, .1, .12, .16, .2])[kind][severity - 1]
    published = np.clip(x + c * n if kind == "gaussian" else x + x * c * n, 0, 1) * 255
    got = corrupted(images, kind, severity)
    assert got.dtype == torch.uint8 and np.abs(got.numpy() - published).max() <= .5001
    assert (got.numpy().astype(int) - np.uint8(published)).min() >= 0


def test_corrupted_subset_has_the_noise_of_the_whole():
    images = random_images(2300, 1, 6, 6)
    whole, before = corrupted(images, "gaussian", 4, seed=2), images.clone()
    for index in (torch.tensor([2299, 0, 1000, 999]), torch.arange(900, 1100),
                  (torch.arange(2300) % 7 == 3).nonzero()[:, 0]):
        assert torch.equal(corrupted(images[index], "gaussian", 4, seed=2, index=index), whole[index])
    assert torch.equal(images, before) and not torch.equal(corrupted(images, "gaussian", 4), whole)


# The fast gradient sign method

def test_fgsm_leaves_the_network_as_it_was(net):
    images = random_images(5, 3, 16, 16)
    net.train()
    net.body.eval()
    net.head.requires_grad_(False)
    net.penultimate[0].weight.grad = torch.ones_like(net.penultimate[0].weight)
    state = {k: v.clone() for k, v in net.state_dict().items()}
    with torch.no_grad(): x = fgsm(net, images)
    assert not x.requires_grad and not torch.is_inference(x)
    assert all(torch.equal(v, state[k]) for k, v in net.state_dict().items())
    assert net.training
    assert net.dropout.training
    assert not net.body.training
    assert not net.head.weight.requires_grad
    assert net.body[0][0].weight.requires_grad
    assert (net.penultimate[0].weight.grad == 1).all() and net.body[0][0].weight.grad is None
    with pytest.raises(NiooddError): fgsm(net, images, [0, 1, 2, 3, 5])
    assert net.training and not net.body.training


@pytest.mark.parametrize("name", ["C1", "C3"])
def test_fgsm_is_the_sign_of_the_gradient(name):
    torch.manual_seed(0)
    net = architecture(name, 4, 3, 16).double().eval()
    single = nn.Module()
    single.forward = lambda x: net(x.double())
    images, y = random_images(6, 3, 16, 16), torch.tensor([0, 1, 2, 3, 0, 1])
    x = to_input(images).double().requires_grad_()
    g, = torch.autograd.grad(F.cross_entropy(net(x), y, reduction="sum"), x)
    for eps in (.001, 8 / 255, .3):
        want = (x + 2 * eps * g.sign()).clamp(-1, 1).float()
        for labels in (y, y.int(), y.tolist()):
            torch.testing.assert_close(fgsm(single, images, labels, eps, batch_size=4), want, rtol=0, atol=1e-6)
    own = net(x).argmax(1)
    assert torch.equal(fgsm(single, images), fgsm(single, images, own))


def test_fgsm_in_whole_grey_levels_is_an_image(net):
    images = random_images(9, 3, 16, 16)
    for levels in (0, 1, 8, 64, 255):
        x = fgsm(net, images, eps=levels / 255)
        assert x.dtype == torch.float32 and torch.equal(to_input(to_uint8(x)), x)
        assert (to_uint8(x).int() - images.int()).abs().max() <= levels and x.abs().max() <= 1


def test_fgsm_lowers_the_logit_odds_of_a_sure_network(net):
    "Where the cross-entropy's gradient is exactly 0 in float32."
    sure = nn.Sequential(net, nn.Linear(5, 5)).eval()
    with torch.no_grad():
        sure[1].weight.copy_(torch.eye(5) * 1e4)
        sure[1].bias.zero_()
    images = random_images(20, 3, 16, 16)
    x = to_input(images).requires_grad_()
    y = sure(x).argmax(1)
    g, = torch.autograd.grad(F.cross_entropy(sure(x), y, reduction="sum"), x)
    assert (g == 0).flatten(1).all(1).any()

    def lead(x):
        return (lambda z: z.gather(1, y[:, None])[:, 0] - z.scatter(1, y[:, None], -torch.inf).amax(1))(logits_of(net,
            x))
    assert (lead(fgsm(sure, images, eps=1 / 255)) < lead(images)).all()


def test_fgsm_of_an_image_does_not_depend_on_its_batch(net):
    images = random_images(11, 3, 16, 16)
    whole = fgsm(net, images)
    # a gradient near 0 may round either way
    for n in (1, 4, 11): assert ((fgsm(net, images, batch_size=n) - whole).abs() > 1e-6).double().mean() < .01


# What a user can get wrong

class Numb(nn.Module):
    def forward(self, x): return torch.zeros(len(x), 3)


images = random_images(4, 1, 8, 8)


@pytest.mark.parametrize("call, word", [
    (lambda: corrupted(images, "gausian", 1), "did you mean 'gaussian'"),
    (lambda: corrupted(images, "gaussian", 0), "severity is 0"),
    (lambda: corrupted(images, "gaussian", 2.5), "severity is 2.5"),
    (lambda: corrupted(images / 255, "gaussian", 1), "torch.float32"),
    (lambda: corrupted(images[:, 0], "gaussian", 1), "[4, 8, 8]"),
    (lambda: corrupted(images[:0], "gaussian", 1), "at least one"),
    (lambda: corrupted(images, "gaussian", 1, index=[1, 2]), "index has shape [2]"),
    (lambda: corrupted(images, "gaussian", 1, index=[1, 2, 3, -1]), "negative"),
    (lambda: corrupted(images, "gaussian", 1, index=images[:, 0, 0, 0] > 9), "nonzero"),
    (lambda: corrupted(images, "gaussian", 1, seed=-1), "seed is -1"),
    (lambda: corrupted(images, "gaussian", 1, seed=.5), "seed is 0.5"),
    (lambda: gaussian_images(ImageSet("none", images[:0]), 3), "at least one"),
    (lambda: gaussian_images(from_arrays(images), 0), "n is 0"),
    (lambda: gaussian_images(from_arrays(images), 3, std=-1.), "std -1.0"),
    (lambda: gaussian_images(from_arrays(images), 3, mean=float("nan")), "mean is nan"),
    (lambda: fgsm(Numb(), images), "no gradient"),
    (lambda: fgsm(Numb(), images, eps=8), "eps is 8"),
    (lambda: fgsm(Numb(), images, eps=float("nan")), "eps is nan"),
    (lambda: fgsm(Numb(), images, labels=[0]), "labels have shape [1]"),
    (lambda: fgsm(Numb(), images, labels=[0, 1, 2, 3]), "0 to 3"),
    (lambda: fgsm(Numb(), images.float()), "torch.float32"),
    (lambda: fgsm(Classifier(3, size=16), images), "[N, 1, 16, 16]"),
])
def test_errors_are_one_line(call, word):
    with pytest.raises(NiooddError) as e: call()
    assert word in str(e.value) and "\n" not in str(e.value)
