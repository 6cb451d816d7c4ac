"""The networks of both papers: counts, shapes, what they compute, how they are rebuilt."""
import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

from nioodd.core.detector import Detector, describe_network, rebuild_network
from nioodd.core.errors import NiooddError
from nioodd.core.forward import logits_and_features, logits_of
from nioodd.core.models import ARCHITECTURES, NETWORKS, Classifier, architecture, n_parameters
from nioodd.core.training import shifted, train_epoch
from nioodd.inversion.detector import GarbageDetector

NAMES = sorted(ARCHITECTURES)


def images(model, n=2):
    a = model.arguments
    return torch.rand(n, a["channels"], a["size"], a["size"]) * 2 - 1


def lively(model):
    "Batch norm as after training, some scales negative; eval mode."
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            for t in (m.running_mean, m.bias.data): t.normal_(0, 0.2)
            m.running_var.uniform_(0.5, 1.5); m.weight.data.normal_(1, 0.5)
    return model.eval()


# --- counts --------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name, exact, published", [
    ("C1", 1_111_946, None), ("C2", 15_249_354, None), ("C3", 269_722, "0.27"), ("C4", 550_794, None), ("C5", 769_162, "0.8")])
def test_parameters(name, exact, published):
    "ResNet-20: He et al. (2016), Table 6; DenseNet-BC (k=12, L=100): Huang et al. (2017), Table 2, in millions. Convolutions of VGG-16: 14.71 M with biases."
    n = n_parameters(architecture(name))
    assert n == exact
    if published: assert f"{n / 1e6:.{len(published) - 2}f}" == published
    if name == "C2":
        convs = [m for m in architecture(name).modules() if isinstance(m, nn.Conv2d)]
        assert len(convs) == 13 and sum(m.weight.numel() + m.out_channels for m in convs) == 14_714_688


def test_frozen_parameters_are_not_counted():
    net = architecture("C1")
    net.body[0].requires_grad_(False)
    assert n_parameters(net) == 1_111_946 - 832


# --- shapes --------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size, channels, n_outputs", [(16, 1, 2), (17, 3, 11), (28, 1, 10), (32, 3, 100), (47, 4, 3)])
def test_any_size_channels_and_classes(name, size, channels, n_outputs):
    net = architecture(name, n_outputs, channels, size).eval()
    x = images(net)
    with torch.no_grad():
        z = net(x)
        assert z.shape == (2, n_outputs) and z.dtype == torch.float32 and z.isfinite().all()
        assert torch.equal(torch.fx.symbolic_trace(net)(x), z)
        logits, features = logits_and_features(net, x)
        assert torch.equal(logits, z) and torch.equal(net.body[-1](features), z)


@pytest.mark.parametrize("size", range(8, 17))
def test_c1_of_small_images(size): assert architecture("C1", 4, 3, size)(torch.zeros(2, 3, size, size)).shape == (2, 4)


@pytest.mark.parametrize("call, says", [
    (lambda: architecture("c3"), "unknown architecture 'c3'.*C3"), (lambda: architecture("C3", size=15), "size is 15.*at least 16"),
    (lambda: architecture("C1", size=7), "size is 7.*at least 8"), (lambda: architecture("C2", 1), "n_outputs is 1"), (lambda: architecture("C4", channels=0), "channels is 0"),
    (lambda: Classifier(3, size=3), "at least 4"), (lambda: architecture("C5")(torch.zeros(2, 1, 28, 28)), r"shape \[2, 1, 28, 28\].*takes \[N, 3, 32, 32\]"),
    (lambda: architecture("C1")(torch.zeros(1, 28, 28)), r"takes \[N, 1, 28, 28\]")])
def test_what_does_not_fit_is_said_in_one_line(call, says):
    with pytest.raises(NiooddError, match=says) as e: call()
    assert "\n" not in str(e.value)


# --- what they compute ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", ["C1", "C2", "C4"])
def test_pooling_first_is_exact(name):
    "Every pair pool, ReLU swapped back to the papers' order gives the same bits."
    net = lively(architecture(name))
    layers = list(net.body)
    pools = [i for i, m in enumerate(layers) if isinstance(m, nn.MaxPool2d)]
    for i in pools: layers[i], layers[i + 1] = layers[i + 1], layers[i]
    assert all(isinstance(layers[i], nn.ReLU) for i in pools) and pools
    x = images(net)
    with torch.no_grad(): assert torch.equal(nn.Sequential(*layers)(x), net(x))


def test_resnet_written_out():
    "C3 beside a ResNet of plain functions, on its weights."
    net = lively(architecture("C3"))
    x = images(net, 3)
    layer = lambda t, m: F.batch_norm(F.conv2d(t, m[0].weight, None, m[0].stride, 1), m[1].running_mean, m[1].running_var, m[1].weight, m[1].bias)
    y = F.relu(layer(x, net.body[0]))
    for i, b in enumerate(net.body[2:11]):
        short = y
        if i in (3, 6): short = torch.cat([y[:, :, ::2, ::2], torch.zeros(3, y.shape[1], y.shape[2] // 2, y.shape[3] // 2)], 1)
        y = F.relu(short + layer(F.relu(layer(y, b.residual[0])), b.residual[2]))
    assert_close(net(x), F.linear(y.mean((2, 3)), net.body[-1].weight, net.body[-1].bias))
    assert [tuple(b.residual[2][0].weight.shape[:1]) for b in net.body[2:11]] == [(16,)] * 3 + [(32,)] * 3 + [(64,)] * 3


def test_densenet_written_out():
    "C5 beside a DenseNet of plain functions in the paper's order: 1×1 convolution, then average."
    net = lively(architecture("C5"))
    x = images(net)
    norm = lambda t, m: F.relu(F.batch_norm(t, m.running_mean, m.running_var, m.weight, m.bias))
    layers = iter(net.body)
    maps = F.conv2d(x, next(layers).weight, padding=1)
    widths = [maps.shape[1]]
    for stage in range(3):
        if stage:
            bn, _, _, conv = (next(layers) for _ in range(4))
            maps = F.avg_pool2d(F.conv2d(norm(maps, bn), conv.weight), 2)
        for _ in range(16):
            d = next(layers).new
            maps = torch.cat([maps, F.conv2d(norm(F.conv2d(norm(maps, d[0]), d[2].weight), d[3]), d[5].weight, padding=1)], 1)
        widths.append(maps.shape[1])
    assert widths == [24, 216, 300, 342]
    z = F.linear(norm(maps, next(layers)).mean((2, 3)), net.body[-1].weight, net.body[-1].bias)
    assert_close(net(x), z, rtol=1e-4, atol=1e-4 * z.abs().max().item())


@pytest.mark.parametrize("name", NAMES)
def test_begins_well_and_learns(name):
    "Logits of an untrained network are neither 0 nor huge, every parameter gets a gradient, and a few steps on 16 images bring the loss down."
    torch.manual_seed(0)
    net = architecture(name, 2, 1, 16)
    x, y = images(net, 16), torch.arange(16) % 2
    x[y == 1, :, 4:12, 4:12] += 1
    optimiser = torch.optim.Adam(net.parameters(), 1e-3)
    losses = []
    for _ in range(6):
        loss = F.cross_entropy(net(x), y)
        optimiser.zero_grad(); loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in net.parameters())
        optimiser.step()
        losses.append(loss.item())
    assert losses[0] < 2 and min(losses[-3:]) < 0.7 * losses[0]


# --- rebuilt -------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", [*NETWORKS])
def test_rebuilt_from_json(name, tmp_path):
    torch.manual_seed(0)
    net = lively(NETWORKS[name](3, channels=1, size=20)).to(memory_format=torch.channels_last)
    again = rebuild_network(json.loads(json.dumps(describe_network(net))), net.state_dict())
    x = images(net)
    assert type(again) is type(net) and again.arguments == net.arguments and not again.training
    assert torch.equal(logits_of(again, x), logits_of(net, x))
    GarbageDetector(net, threshold=0.0).save(tmp_path / "d")
    loaded = Detector.load(tmp_path / "d")                                       # without a module to load into
    assert torch.equal(loaded.predict(x), GarbageDetector(net).predict(x))


def test_a_subclass_or_an_unknown_network_is_not_rebuilt():
    class Mine(ARCHITECTURES["C1"]):
        pass
    assert describe_network(Mine())["arguments"] is None
    with pytest.raises(NiooddError, match="unknown network 'ResNet21'; did you mean 'ResNet20'"):
        rebuild_network({"class": "nioodd.core.models.ResNet21", "arguments": {}, "channels_last": False}, {})


# --- augmentation --------------------------------------------------------------------------------------------------------

class Seen(nn.Module):
    "Notes the images it is given."
    def __init__(self):
        super().__init__()
        self.w, self.batches = nn.Parameter(torch.zeros(2)), []

    def forward(self, x):
        self.batches.append(((x + 1) * 127.5).round().to(torch.uint8))
        return self.w.expand(len(x), 2)


def test_flip_mirrors_half_of_the_images_and_draws_nothing_when_off():
    x, y = torch.randint(0, 256, (200, 2, 5, 6), dtype=torch.uint8), torch.arange(200) % 2

    def epoch(**kw):
        torch.manual_seed(3)
        net = Seen()
        train_epoch(net, x, y, torch.optim.SGD(net.parameters(), 0.1), batch_size=50, **kw)
        return torch.cat(net.batches), torch.get_rng_state()
    torch.manual_seed(3)
    order = torch.randperm(200)
    plain, state = epoch()
    assert torch.equal(plain, x[order]) and torch.equal(state, torch.get_rng_state())     # one permutation, nothing else
    mirrored, _ = epoch(flip=True)
    turned, same = ((mirrored == z).flatten(1).all(1) for z in (plain.flip(3), plain))
    assert (turned ^ same).all() and 70 < turned.sum() < 130
    moved, _ = epoch(shift=1)
    torch.manual_seed(3); torch.randperm(200)
    assert torch.equal(moved[:50], shifted(x[order[:50]], 1))
