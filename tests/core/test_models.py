"""The networks of both papers: counts, shapes, what they compute, how they are named and rebuilt."""
import json
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

from nioodd.benchmark.recipes import Recipe, find_recipe, load_classifier, train_classifier
from nioodd.core.detector import Detector, describe_network, rebuild_network
from nioodd.core.errors import NiooddError
from nioodd.core.forward import logits_of
from nioodd.core.models import (
    ARCHITECTURES,
    NETWORKS,
    Architecture,
    Classifier,
    architecture,
    n_parameters,
    named_architecture,
)
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
            m.running_var.uniform_(0.5, 1.5)
            m.weight.data.normal_(1, 0.5)
    return model.eval()


# --- counts ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name, exact, published", [
    ("C1", 1_111_946, None),
    ("C2", 15_249_354, None),
    ("C3", 269_722, "0.27"),  # millions: He et al. (2016), Table 6
    ("C4", 550_794, None),
    ("C5", 769_162, "0.8"),  # millions: Huang et al. (2017), Table 2, DenseNet-BC (k=12, L=100)
])
def test_parameters(name, exact, published):
    n = n_parameters(architecture(name))
    assert n == exact
    if published: assert f"{n / 1e6:.{len(published) - 2}f}" == published


def test_vgg16_has_the_published_convolutions():
    "14.71 M weights with biases."
    convs = [m for m in architecture("C2").modules() if isinstance(m, nn.Conv2d)]
    assert len(convs) == 13 and sum(m.weight.numel() + m.out_channels for m in convs) == 14_714_688


def test_frozen_parameters_are_not_counted():
    net = architecture("C1")
    net.body[0].requires_grad_(False)
    assert n_parameters(net) == 1_111_946 - 832


# --- shapes ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size, channels, n_outputs",
                         [(16, 1, 2), (17, 3, 11), (28, 1, 10), (32, 3, 100), (47, 4, 3)])
def test_any_size_channels_and_classes(name, size, channels, n_outputs):
    net = architecture(name, n_outputs, channels, size).eval()
    x = images(net)
    with torch.no_grad():
        z = net(x)
        assert z.shape == (2, n_outputs) and z.dtype == torch.float32 and z.isfinite().all()
        assert torch.equal(torch.fx.symbolic_trace(net)(x), z)


def test_the_check_of_the_images_is_one_node_of_a_traced_network():
    for net in (Classifier(3), architecture("C1")):
        called = [n.target.__name__ for n in torch.fx.symbolic_trace(net).graph.nodes if n.op == "call_function"]
        assert called == ["checked_shape"]


@pytest.mark.parametrize("size", range(8, 17))
def test_c1_of_small_images(size):
    assert architecture("C1", 4, 3, size)(torch.zeros(2, 3, size, size)).shape == (2, 4)


def unfit(name, *shape):
    "A network is given images of another shape."
    return lambda: architecture(name)(torch.zeros(*shape))


@pytest.mark.parametrize("call, says", [
    (lambda: architecture("c3"), "unknown architecture 'c3'.*C3"),
    (lambda: architecture("C3", size=15), "size is 15.*at least 16"),
    (lambda: architecture("C1", size=7), "size is 7.*at least 8"),
    (lambda: architecture("C2", 1), "n_outputs is 1"),
    (lambda: architecture("C4", channels=0), "channels is 0"),
    (lambda: Classifier(3, size=3), "at least 4"),
    (unfit("C5", 2, 1, 28, 28), r"shape \[2, 1, 28, 28\].*takes \[N, 3, 32, 32\]"),
    (unfit("C1", 1, 28, 28), r"takes \[N, 1, 28, 28\]"),
])
def test_what_does_not_fit_is_said_in_one_line(call, says):
    with pytest.raises(NiooddError, match=says) as e: call()
    assert "\n" not in str(e.value)


# --- what they compute -----------------------------------------------------------------------------------------------

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

    def layer(t, m):
        conv, norm = m
        y = F.conv2d(t, conv.weight, None, conv.stride, 1)
        return F.batch_norm(y, norm.running_mean, norm.running_var, norm.weight, norm.bias)

    y = F.relu(layer(x, net.body[0]))
    for i, b in enumerate(net.body[2:11]):
        short = y
        if i in (3, 6):
            zeros = torch.zeros(3, y.shape[1], y.shape[2] // 2, y.shape[3] // 2)
            short = torch.cat([y[:, :, ::2, ::2], zeros], 1)
        y = F.relu(short + layer(F.relu(layer(y, b.residual[0])), b.residual[2]))
    assert_close(net(x), F.linear(y.mean((2, 3)), net.body[-1].weight, net.body[-1].bias))
    widths = [tuple(b.residual[2][0].weight.shape[:1]) for b in net.body[2:11]]
    assert widths == [(16,)] * 3 + [(32,)] * 3 + [(64,)] * 3


def test_densenet_written_out():
    "C5 beside a DenseNet of plain functions in the paper's order: 1×1 convolution, then average."
    net = lively(architecture("C5"))
    x = images(net)

    def norm(t, m): return F.relu(F.batch_norm(t, m.running_mean, m.running_var, m.weight, m.bias))

    layers = iter(net.body)
    maps = F.conv2d(x, next(layers).weight, padding=1)
    widths = [maps.shape[1]]
    for stage in range(3):
        if stage:
            bn, _, _, conv = (next(layers) for _ in range(4))
            maps = F.avg_pool2d(F.conv2d(norm(maps, bn), conv.weight), 2)
        for _ in range(16):
            d = next(layers).new
            narrow = F.conv2d(norm(maps, d[0]), d[2].weight)
            maps = torch.cat([maps, F.conv2d(norm(narrow, d[3]), d[5].weight, padding=1)], 1)
        widths.append(maps.shape[1])
    assert widths == [24, 216, 300, 342]
    z = F.linear(norm(maps, next(layers)).mean((2, 3)), net.body[-1].weight, net.body[-1].bias)
    assert_close(net(x), z, rtol=1e-4, atol=1e-4 * z.abs().max().item())


@pytest.mark.parametrize("name", NAMES)
def test_begins_well_and_learns(name):
    """Logits of an untrained network are neither 0 nor huge, every parameter gets a gradient, and a few steps on 16
    images bring the loss down."""
    torch.manual_seed(0)
    net = architecture(name, 2, 1, 16)
    x, y = images(net, 16), torch.arange(16) % 2
    x[y == 1, :, 4:12, 4:12] += 1
    optimiser = torch.optim.Adam(net.parameters(), 1e-3)
    losses = []
    for _ in range(6):
        loss = F.cross_entropy(net(x), y)
        optimiser.zero_grad()
        loss.backward()
        for p in net.parameters(): assert p.grad is not None and p.grad.isfinite().all() and p.grad.any()
        optimiser.step()
        losses.append(loss.item())
    assert losses[0] < 2 and min(losses[-3:]) < 0.7 * losses[0]


# --- rebuilt ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", [*NETWORKS])
def test_rebuilt_from_json(name, tmp_path):
    torch.manual_seed(0)
    net = lively(NETWORKS[name](3, channels=1, size=20)).to(memory_format=torch.channels_last)
    again = rebuild_network(json.loads(json.dumps(describe_network(net))), net.state_dict())
    x = images(net)
    assert type(again) is type(net) and again.arguments == net.arguments and not again.training
    assert torch.equal(logits_of(again, x), logits_of(net, x))
    GarbageDetector(net, threshold=0.0).save(tmp_path / "d")
    loaded = Detector.load(tmp_path / "d")  # without a module to load into
    assert torch.equal(loaded.predict(x), GarbageDetector(net).predict(x))


def test_a_subclass_or_an_unknown_network_is_not_rebuilt():
    class Mine(ARCHITECTURES["C1"]):
        pass
    assert describe_network(Mine())["arguments"] is None
    with pytest.raises(NiooddError, match="unknown network 'ResNet21'; did you mean 'ResNet20'"):
        rebuild_network({"class": "nioodd.core.models.ResNet21", "arguments": {}, "channels_last": False}, {})


def test_the_names_are_those_of_saved_folders():
    saved = dict(C1="ShallowCNN", C2="VGG16", C3="ResNet20", C4="BlockCNN", C5="DenseNet100")
    assert {name: ARCHITECTURES[name].__name__ for name in saved} == saved
    assert NETWORKS.keys() >= {"Classifier", "ShallowCNN", "VGG16", "ResNet20", "BlockCNN", "DenseNet100"}
    assert [*Classifier(11).state_dict()][:2] == ["body.0.0.weight", "body.0.0.bias"]
    assert Classifier(11).arguments == dict(n_outputs=11, channels=1, size=28, dropout=0.5)


# --- an architecture of one's own ------------------------------------------------------------------------------------

class TinyCNN(Architecture):
    smallest = 4

    def __init__(self, n_outputs: int = 10, channels: int = 1, size: int = 28, width: int = 8):
        super().__init__(n_outputs, channels, size, width=width)
        self.body = nn.Sequential(nn.Conv2d(channels, width, 3, stride=2, padding=1), nn.ReLU(),
                                  nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(16 * width, n_outputs))


@pytest.fixture
def tiny():
    "The class, registered as \"tiny\" for one test."
    yield named_architecture("tiny")(TinyCNN)
    del ARCHITECTURES["tiny"], NETWORKS["TinyCNN"]


def test_an_own_architecture_is_built_by_name_and_rebuilt_from_a_saved_detector(tiny, tmp_path):
    assert architecture("tiny", 5).arguments == dict(n_outputs=5, channels=1, size=28, width=8)
    net = tiny(3, channels=3, size=20, width=5).eval()
    GarbageDetector(net, threshold=0.0).save(tmp_path / "d")
    loaded, x = Detector.load(tmp_path / "d"), images(net)
    assert type(loaded.model) is TinyCNN and loaded.model.arguments["width"] == 5
    assert torch.equal(loaded.predict(x), GarbageDetector(net).predict(x))


def test_an_own_architecture_is_offered_for_training(tiny, tmp_path):
    assert find_recipe("tiny") == Recipe("tiny") and find_recipe("C4").data == "svhn"
    recipe = Recipe("tiny", "digits5k", train_images=300, validation_images=50, epochs=1)
    train_classifier(recipe, tmp_path / "net", progress=False)
    model, info = load_classifier(tmp_path / "net")
    assert type(model) is TinyCNN and info["architecture"] == "tiny"


def test_an_architecture_that_is_not_registered_is_not_offered():
    with pytest.raises(NiooddError, match="unknown architecture 'tiny'"): architecture("tiny")
    with pytest.raises(NiooddError, match="unknown recipe 'tiny'; .*known: C1, C2, C3, C4, C5"): find_recipe("tiny")
    with pytest.raises(NiooddError, match="architecture is 'tiny'; expected one of C1"): Recipe("tiny")


def test_registering_again_replaces_and_a_taken_name_is_refused(tiny):
    assert named_architecture("tiny")(TinyCNN) is TinyCNN  # as when a cell is run again
    other = type("VGG16", (TinyCNN,), {})
    with pytest.raises(NiooddError, match="architecture 'C1' is nioodd.core.models.ShallowCNN already"):
        named_architecture("C1")(TinyCNN)
    with pytest.raises(NiooddError, match="network 'VGG16' is nioodd.core.models.VGG16 already"):
        named_architecture("my vgg")(other)
    assert "my vgg" not in ARCHITECTURES and NETWORKS["VGG16"] is ARCHITECTURES["C2"]


def own(constructor, **members):
    "An architecture \"own\" with this constructor."
    return named_architecture("own")(type("Own", (Architecture,), {"__init__": constructor, **members}))


@pytest.fixture
def no_own():
    yield
    ARCHITECTURES.pop("own", None), NETWORKS.pop("Own", None)


def flat(n_outputs, channels, size): return nn.Sequential(nn.Flatten(), nn.Linear(channels * size**2, n_outputs))


def test_what_an_own_architecture_lacks_is_said(no_own):
    def no_body(self, n_outputs=3, channels=1, size=16): Architecture.__init__(self, n_outputs, channels, size)

    def no_super(self, n_outputs=3, channels=1, size=16): self.body = flat(n_outputs, channels, size)

    def modules_only(self, n_outputs=3, channels=1, size=16): nn.Module.__init__(self)

    def ten_outputs(self, n_outputs=3, channels=1, size=16):
        Architecture.__init__(self, n_outputs, channels, size)
        self.body = flat(10, channels, size)

    def one_size(self, n_outputs=3, channels=1, size=16):
        Architecture.__init__(self, n_outputs, channels, size)
        self.body = flat(n_outputs, channels, 16)

    def loses(self, n_outputs=3, channels=1, size=16, width=8):
        Architecture.__init__(self, n_outputs, channels, size)
        self.body = flat(n_outputs, channels, size)
    for constructor, size, says in (
            (no_body, 16, "Own has no body"), (no_super, 16, "a Own cannot be made .* begins with super"),
            (modules_only, 16, "a Own cannot be made .* begins with super"),
            (ten_outputs, 16, r"Own gives \[2, 10\] for two images; expected logits \[2, 3\]"),
            (one_size, 20, "Own cannot take its own images"), (loses, 16, "Own would lose width in saving")):
        own(constructor)
        with pytest.raises(NiooddError, match=says) as e: architecture("own", 3, size=size)
        assert "\n" not in str(e.value)
    own(no_body, forward=lambda self, x: (x, x))
    with pytest.raises(NiooddError, match="Own gives tuple"): architecture("own", 3)
    own(one_size)
    net = architecture("own", 3)
    assert net.training and net.arguments == dict(n_outputs=3, channels=1, size=16)


def test_a_class_without_defaults_or_no_architecture_is_refused():
    class Sizeless(Architecture):
        def __init__(self, n_outputs=10, channels=1): super().__init__(n_outputs, channels, 28)

    class Needy(Architecture):
        def __init__(self, n_outputs, channels=1, size=28): super().__init__(n_outputs, channels, size)

    for bad, says in ((Sizeless, "no default for size"), (Needy, "no default for n_outputs"),
                      (nn.Identity, "Identity is no Architecture"), (SimpleNamespace, "is no Architecture")):
        with pytest.raises(NiooddError, match=says): named_architecture("bad")(bad)
    assert "bad" not in ARCHITECTURES
