"Siblings run together equal siblings run one by one, whatever the network; they are the same everywhere, and never of old weights."
import copy
import time

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

from nioodd.app.cli import main
from nioodd.core.errors import NiooddError
from nioodd.core.models import Classifier, architecture
from nioodd.speed.siblings import bench_trust, contestants, exactness, images_for, learning_jobs, race
from nioodd.trust.siblings import DISTRIBUTIONS, Siblings, _Linears, noise, plain_logits, sibling


@pytest.fixture(autouse=True)
def seeded():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def sigma_of(model, share=0.1, only=""): return {k: share * p.detach().abs().mean().expand_as(p) + 1e-3 for k, p in model.named_parameters() if only in k}

def difference(a, b): return ((a - b).abs().max() / b.abs().max()).item()

def one_by_one(s, x):
    "The members' logits by functional_call, the model in eval mode."
    with torch.no_grad(): return torch.stack([functional_call(copy.deepcopy(s.model).eval(), s.weights(i), (x,)) for i in range(s.n)])

def used(model):
    "Batch norms as after training: statistics and affine parameters that are not 0 and 1."
    for m in model.modules():
        if isinstance(m, nn.modules.batchnorm._NormBase) and m.running_mean is not None:
            m.running_mean.normal_(0, 0.3), m.running_var.uniform_(0.5, 2)
            if m.affine: nn.init.uniform_(m.weight, -1.5, 1.5), nn.init.normal_(m.bias, 0, 0.2)
    return model


class Functional(nn.Module):
    "Functions instead of modules, tied layers, a sum, a concatenation, a parameter of its own, in-place operations, a number taken from a shape."
    def __init__(self):
        super().__init__()
        self.conv1, self.conv2, self.norm = nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False), nn.Conv2d(8, 8, 3, padding=1, groups=2), nn.BatchNorm2d(8)
        self.scale, self.head = nn.Parameter(torch.rand(8, 1, 1)), nn.Linear(16, 5)

    def forward(self, x):
        x = F.relu(self.conv1(x), inplace=True)
        y = self.norm(self.conv2(self.conv2(x))) * self.scale                       # conv2 twice: its batch norm must stay
        y += x
        y = F.dropout(torch.cat([F.leaky_relu(y, 0.2), x], 1), 0.5, self.training)
        return self.head(F.adaptive_avg_pool2d(F.max_pool2d(y, 2), 1).view(x.size(0), -1))

class Residual(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(c, c, 3, padding=1), nn.BatchNorm2d(c, affine=False), nn.ReLU(inplace=True), nn.Conv2d(c, c, 3, padding=1, bias=False), nn.BatchNorm2d(c))
    def forward(self, x): return F.relu(self.body(x) + x)

class Dense(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.new = nn.Sequential(nn.BatchNorm2d(c), nn.ReLU(), nn.Conv2d(c, 4, 3, padding=1))
    def forward(self, x): return torch.cat([x, self.new(x)], 1)

class Squeeze(nn.Module):
    "Squeeze and excitation, by products; depthwise convolutions."
    def __init__(self):
        super().__init__()
        self.conv, self.depth, self.gate, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 8, 1), nn.Linear(8, 5)
    def forward(self, x):
        x = F.silu(self.depth(self.conv(x)))
        return self.head(torch.flatten(F.adaptive_avg_pool2d(x * torch.sigmoid(self.gate(F.adaptive_avg_pool2d(x, 1))), 1), 1))

class Mean(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 8, 3), nn.Linear(8, 5)
    def forward(self, x): return self.head(F.silu(self.conv(x)).mean((2, 3)))

def tied():
    layer = nn.Linear(12, 12)
    other = nn.Linear(12, 12)
    other.weight = layer.weight
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 12 * 12, 12), layer, nn.ReLU(), layer, nn.Tanh(), other)

NETWORKS = { # name → network on images [3, 12, 12] or, with "grey", [1, 12, 12]
    "linear": lambda: nn.Sequential(nn.Flatten(), nn.Linear(432, 20), nn.LeakyReLU(), nn.Dropout(0.5), nn.Linear(20, 5)),
    "leaky before pool": lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.LeakyReLU(), nn.Dropout2d(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(200, 5)),
    "decreasing before pool": lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.LeakyReLU(-0.5), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(200, 5)),
    "residual": lambda: nn.Sequential(nn.Conv2d(3, 8, 3), Residual(8), Residual(8), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 5)),
    "dense": lambda: nn.Sequential(nn.Conv2d(3, 8, 3, padding=2, dilation=2), Dense(8), Dense(12), nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(16, 5)),
    "functional": Functional,
    "mean": Mean,
    "squeeze": Squeeze,
    "tied": tied,
    "grey": lambda: nn.Sequential(nn.Conv2d(1, 6, 5, padding=2), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(3, 2, 1), nn.Conv2d(6, 8, 3), nn.ReLU6(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(32, 5)),
    "grey, stride": lambda: nn.Sequential(nn.Conv2d(1, 6, (3, 5), stride=(2, 1), padding=(1, 0), bias=False), nn.Conv2d(6, 4, 3), nn.Flatten(), nn.Linear(96, 5)),
    "grey, reflected, dilated": lambda: nn.Sequential(nn.Conv2d(1, 6, 3, padding=1, padding_mode="reflect"), nn.ReLU(), nn.Conv2d(6, 4, 3, dilation=2, padding="same"), nn.Flatten(), nn.Linear(576, 5)),
}

@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("only", ["", "weight", "head"])
def test_exact(name, only):
    "Together and one by one, with all parameters noisy, the weights alone, the last layer alone."
    model = used(NETWORKS[name]())
    if only == "head": only = next(reversed(dict(model.named_parameters())))
    x = torch.randn(150, 1 if name.startswith("grey") else 3, 12, 12)               # more than goes through at a time
    s = Siblings(model, sigma_of(model, only=only), n=3)
    z = s.logits(x)
    assert s.why_plain is None and z.shape == (3, 150, z.shape[-1]) and z.dtype == torch.float32 and not z.requires_grad
    assert difference(z, one_by_one(s, x)) <= 1e-6
    assert difference(z[1], z[0]) > 1e-3
    assert difference(s.logits(x[[7, 3]]), z[:, [7, 3]]) <= 1e-6                     # the image alone
    for _ in range(2): assert difference(s.logits(x[5:6]), z[:, 5:6]) <= 4e-6       # one image: both ways, then side by side
    assert isinstance(s._kept.stacked.side_by_side, nn.Module) == (name not in ("dense", "functional") or only not in ("", "weight"))

@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("image", ["as it is", "zeros", "nan", "bigger numbers"])
@pytest.mark.parametrize("alive", [0.04, 0.96])
def test_one_image_through_a_large_linear_layer(dtype, image, alive):
    "Where most meet a zero, weights that do are not read."
    net = nn.Sequential(nn.Flatten(), nn.Linear(18, 1028), nn.ReLU(), nn.Linear(1028, 600, bias=False), nn.ReLU(), nn.Linear(600, 3)).to(dtype)
    net[1].bias.data += 1 if alive > 0.5 else -1
    s, x = Siblings(net, sigma_of(net), n=3), torch.randn(2, 2, 3, 3, dtype=dtype)
    for images in (x, x[:1]): s.logits(images)
    assert dict(s._kept.stacked.side_by_side.named_children())["_3"].large
    assert (net[:3](x).count_nonzero() > net[:3](x).numel() / 2) == (alive > 0.5)
    one = {"as it is": x[1:], "zeros": 0 * x[1:], "nan": x[1:] / 0 * 0, "bigger numbers": 1e6 * x[1:]}[image]
    found, plain = s.logits(one), one_by_one(s, one)
    assert found.shape == (3, 1, 3) and found.dtype == dtype
    assert found.isnan().all() if image == "nan" else difference(found, plain) < (2e-6 if dtype == torch.float32 else 1e-14)

def test_weights_that_meet_a_zero_are_not_read():
    layers = [nn.Linear(1024, 512) for _ in range(2)]
    x = torch.randn(2, 1024)
    x[:, 400:] = 0
    for layer in layers: layer.weight.data[:, 400:] = torch.nan
    expected = torch.stack([F.linear(row[:400], layer.weight[:, :400], layer.bias) for row, layer in zip(x, layers)])
    assert difference(_Linears(layers)(x), expected) < 2e-6

@pytest.mark.parametrize("options", [{}, dict(stride=2), dict(padding="same"), dict(padding_mode="reflect"), dict(groups=4), dict(dilation=2, padding=2), dict(bias=False), dict(kernel_size=(3, 1), padding=(1, 0))], ids=str)
def test_convolutions_at_any_size(options):
    "One image or several, small maps and larger ones, in turn: the weights lie in another order for each."
    conv = lambda i, o: nn.Conv2d(i, o, **dict(dict(kernel_size=3, padding=1), **options))
    net = nn.Sequential(nn.Conv2d(3, 16, 1), conv(16, 32), nn.ReLU(), conv(32, 32), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 4))
    s = Siblings(net, sigma_of(net), n=2)
    for _ in range(2):
        for size, n in (((12, 12), 1), ((12, 9), 1), ((12, 12), 3), ((4, 6), 1), ((12, 12), 1)):
            x = torch.randn(n, 3, *size)
            assert difference(s.logits(x), one_by_one(s, x)) <= 1e-5 and s.why_plain is None
    assert isinstance(s._kept.stacked.side_by_side, nn.Module)

@pytest.mark.parametrize("only", ["", "0."])
@pytest.mark.parametrize("stride", [1, 2])
def test_large_convolutions_at_any_size(stride, only):
    "In planes on small maps, else channels last; the network's own weights stay as they are."
    net = nn.Sequential(nn.Conv2d(3, 256, 1), nn.Conv2d(256, 512, 3, stride, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 4))
    weight, s = net[1].weight, Siblings(net, sigma_of(net, only=only), n=2)
    for width, n in ((12, 2), (4, 2), (2, 3), (12, 1), (3, 1), (4, 1), (1, 2), (12, 1)):
        x = torch.randn(n, 3, 5, width)
        assert difference(s.logits(x), one_by_one(s, x)) <= 1e-5 and s.why_plain is None
        if n > 1: assert s._kept.stacked.branches[1].get_submodule("1").weight.is_contiguous() == (width in (2, 4))
    assert s._kept.stacked.side_by_side is None and net[1].weight is weight and weight.is_contiguous() and weight.requires_grad

def test_weights_are_packed_for_single_images_only():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(64, 4))
    s, x = Siblings(net, sigma_of(net), n=2), torch.randn(40, 3, 8, 8)
    packed = lambda: [m.packed is not None for part in (*s._kept.stacked.networks, s._kept.stacked.side_by_side) if isinstance(part, nn.Module) for m in part.modules() if isinstance(m, nn.Conv2d)]
    for images in (x, x[:1]): s.logits(images)
    assert not any(packed())
    s.logits(x[:1])
    if torch.backends.mkldnn.is_available(): assert sum(packed()) == 2             # of the network of both siblings; if this fails, nioodd.trust.siblings._packed does not know this PyTorch
    with torch.autocast("cpu", torch.bfloat16): assert difference(s.logits(x[:1]), one_by_one(s, x[:1])) < 0.05
    with torch.inference_mode(): assert difference(s.logits(x[:1]), one_by_one(s, x[:1])) < 1e-6
    assert difference(copy.deepcopy(s).logits(x[:1]), one_by_one(s, x[:1])) < 1e-6

def test_large_convolutions_stay_apart():
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 2800, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2800, 3))
    s = Siblings(net, sigma_of(net), n=2)
    for _ in range(2): s.logits(torch.randn(1, 3, 6, 6))
    assert s._kept.stacked.side_by_side is None and s.why_plain is None

@pytest.mark.parametrize("noisy", ["0.weight", "1.bias", "5.weight"])
def test_exact_where_few_are_noisy(noisy):
    "A convolution, or only the batch norm that is folded into one, or a layer behind a trunk."
    net = used(nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(100, 5)))
    s, x = Siblings(net, sigma_of(net, only=noisy), n=3), torch.randn(4, 1, 12, 12)
    assert difference(s.logits(x), one_by_one(s, x)) <= 1e-6 and s.why_plain is None
    assert len(list(s._kept.stacked.trunk.graph.nodes)) == (2 if noisy != "5.weight" else 6)

@pytest.mark.parametrize("name", ["C1", "C2", "C3", "C4", "C5"])
def test_exact_for_the_papers_networks(name):
    "Up to what a change of the memory layout alone does to the plain logits."
    siblings, layout = exactness(name, n=2 if name in ("C2", "C5") else 8)
    assert siblings <= max(1e-6, 2 * layout)
    assert name not in ("C3", "C5") or siblings <= 1e-6

@pytest.mark.parametrize("name, together", [("C1", True), ("C2", False), ("C3", False), ("C4", True)])
def test_one_image_of_the_papers_networks(name, together):
    net, x = architecture(name).eval(), images_for(name, 3)
    s = Siblings(net, sigma_of(net), 2)
    s.logits(x[:1])
    assert isinstance(s._kept.stacked.side_by_side, nn.Module) == together
    assert difference(torch.cat([s.logits(one) for one in x.split(1)], 1), one_by_one(s, x)) <= 1e-5


def test_what_does_not_end_in_numbers_decides_nothing():
    "A first image of NaN cannot tell whether siblings may lie side by side."
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(400, 5))
    s, x = Siblings(net, sigma_of(net), 2), torch.randn(2, 3, 12, 12)
    s.logits(x)
    assert s.logits(x[:1] * float("nan")).isnan().all() and not isinstance(s._kept.stacked.side_by_side, nn.Module)
    s.logits(x[:1])
    assert isinstance(s._kept.stacked.side_by_side, nn.Module)


def test_what_is_rearranged():
    "Fewer operations: no dropout, no batch norm behind a convolution, activations behind the pooling; nothing noisy in the trunk."
    model = used(NETWORKS["leaky before pool"]())
    s = Siblings(model, sigma_of(model))
    s.logits(torch.randn(1, 3, 12, 12))
    kinds = [type(m).__name__ for m in s._kept.stacked.branches[0].modules()]
    assert not {"BatchNorm2d", "Dropout2d"} & set(kinds)
    order = [n.target for n in s._kept.stacked.branches[0].graph.nodes if n.op == "call_module"]
    assert order == ["0", "4", "2", "5", "6"]
    s = Siblings(model, sigma_of(model, only="6."))
    s.logits(torch.randn(1, 3, 12, 12))
    assert [n.target for n in s._kept.stacked.branches[0].graph.nodes if n.op == "call_module"] == ["6"]


class Curious(nn.Module):
    "Looks at the image."
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(432, 5)
    def forward(self, x): return self.head((x if x.mean() > 0 else -x).flatten(1))

class Mutating(nn.Module):
    "Changes in place what it goes on to use under another name, which a graph of operations does not show."
    def __init__(self):
        super().__init__()
        self.first, self.head = nn.Linear(432, 20), nn.Linear(20, 5)
    def forward(self, x):
        y = self.first(x.flatten(1))
        z = y
        z += 3
        return self.head(y)

def hooked():
    model = nn.Sequential(nn.Flatten(), nn.Linear(432, 5))
    model[1].register_forward_hook(lambda m, args, y: 2 * y)
    return model

@pytest.mark.parametrize("make, why", [(Curious, "control flow"), (Mutating, "other logits"), (hooked, "hooks"),
                                       (lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False), nn.Flatten(), nn.Linear(400, 5)), "by the batch")])
def test_plain_where_it_must_be(make, why):
    "What cannot be rearranged runs one by one, exactly, and says why."
    model, x = make(), torch.randn(6, 3, 12, 12)
    s = Siblings(model, sigma_of(model))
    assert torch.equal(s.logits(x), one_by_one(s, x)) and why in s.why_plain


@pytest.mark.parametrize("name", ["grey", "functional"])
def test_never_of_old_weights(name):
    "Whatever is changed in whatever way, the next logits are of siblings of the network as it is."
    model = used(NETWORKS[name]())
    x = torch.randn(4, 1 if name == "grey" else 3, 12, 12)
    s = Siblings(model, sigma_of(model))
    last, conv = (model[-1], model[0]) if name == "grey" else (model.head, model.conv1)
    norm = model[1] if name == "grey" else model.norm
    def step():
        sgd = torch.optim.SGD(model.parameters(), 0.1)
        model.train()(x).square().mean().backward()
        sgd.step()
        model.eval()
    def no_grad():
        with torch.no_grad(): last.weight[0, 0] += 1
    def replaced(): last.weight = nn.Parameter(torch.randn_like(last.weight))
    for change in (step, no_grad, replaced, lambda: conv.weight.data.mul_(1.3), lambda: setattr(last.bias, "data", torch.randn(5)), lambda: norm.running_var.add_(0.5),
                   lambda: model.load_state_dict({k: v * 1.1 for k, v in model.state_dict().items()}), lambda: last.register_forward_hook(lambda m, args, y: y / 5),
                   lambda: last._forward_hooks.clear()):
        before = s.logits(x)
        change()
        assert difference(s.logits(x), before) > 1e-4, change
        assert difference(s.logits(x), one_by_one(s, x)) <= 2e-6, change
    again = s._kept.stacked
    s.logits(x)
    assert s._kept.stacked is again                                                      # and kept while nothing changes

def test_the_model_is_left_alone():
    model = used(Functional()).train()
    model.norm.eval()
    model.scale.requires_grad_(False)
    before, state = {k: v.clone() for k, v in model.state_dict().items()}, [(m.training, len(m._forward_hooks)) for m in model.modules()]
    ids = [(id(p), p.requires_grad, p.grad) for p in model.parameters()]
    rng = torch.get_rng_state()
    Siblings(model, sigma_of(model)).grow(3).redraw(4).logits(torch.randn(3, 3, 12, 12, generator=torch.Generator().manual_seed(0)))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items()) and torch.equal(torch.get_rng_state(), rng)
    assert [(m.training, len(m._forward_hooks)) for m in model.modules()] == state and [(id(p), p.requires_grad, p.grad) for p in model.parameters()] == ids

def test_constants_that_forward_makes_are_not_left_in_the_model():
    class Normalised(nn.Sequential):
        def forward(self, x): return super().forward((x - torch.tensor(.13)) / torch.tensor([.3, .2, .1]).view(3, 1, 1))
    model = used(Normalised(nn.Conv2d(3, 8, 5), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(512, 5)))
    before, s, x = vars(model).keys() - {}, Siblings(model, sigma_of(model)), torch.randn(4, 3, 12, 12)
    for seed in range(3):
        assert difference(s.redraw(seed).logits(x), one_by_one(s, x)) <= 2e-6 and s.why_plain is None
        assert vars(model).keys() == before

def test_another_layer_without_weights():
    model = used(nn.Sequential(nn.Flatten(), nn.Linear(432, 20), nn.ReLU(), nn.Linear(20, 5)))
    s, x = Siblings(model, sigma_of(model)), torch.randn(4, 3, 12, 12)
    before, model[2] = s.logits(x), nn.Tanh()
    assert difference(s.logits(x), before) > 1e-3 and difference(s.logits(x), one_by_one(s, x)) <= 2e-6

def test_normalising_by_the_image_is_not_by_the_batch():
    model = used(nn.Sequential(nn.Conv2d(3, 8, 5), nn.InstanceNorm2d(8, affine=True), nn.ReLU(), nn.Flatten(), nn.Linear(512, 5)))
    s, x = Siblings(model, sigma_of(model)), torch.randn(4, 3, 12, 12)
    assert difference(s.logits(x), one_by_one(s, x)) <= 2e-6 and s.why_plain is None

def test_a_module_in_two_places_is_left_alone():
    "functional_call would leave the last sibling's weights in it (pytorch issue 164759)."
    model = tied()
    own, x = dict(model.named_parameters()), torch.randn(2, 3, 12, 12)
    z = plain_logits(model, [{"2.weight": torch.zeros(12, 12)}], x)
    assert all(p is own[k] for k, p in model.named_parameters()) and model[2].weight is model[6].weight is own["2.weight"]
    with torch.no_grad():
        changed = tied()
        changed.load_state_dict(model.state_dict() | {f"{i}.weight": torch.zeros(12, 12) for i in (2, 4, 6)})
        assert torch.equal(z[0], changed(x))

def test_parameters_not_noisy_are_shared():
    model = tied()
    copy_ = sibling(model, {"1.weight": torch.zeros(12, 432)})
    assert copy_[2].weight is model[2].weight is copy_[6].weight and copy_[2] is copy_[4]
    assert not copy_[1].weight.any() and model[1].weight.any()
    noisy = sibling(model, {"2.weight": torch.zeros(12, 12)})
    assert noisy[2].weight is noisy[6].weight and not noisy[6].weight.any()


def test_noise_is_a_function_of_its_arguments():
    shape = torch.Size([3, 2, 5])
    a = noise("w", shape, 3, 7)
    torch.randn(5)
    assert torch.equal(a, noise("w", shape, 3, 7)) and a.dtype == torch.float32 and a.shape == shape
    for other in (noise("v", shape, 3, 7), noise("w", shape, 4, 7), noise("w", shape, 3, 8)): assert not torch.equal(a, other)
    assert noise("w", torch.Size([]), 0).shape == ()

@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_width_of_the_distributions(name):
    e = noise("w", torch.Size([100_000]), 0, distribution=name)
    assert e.isfinite().all() and abs(e.median()) < 0.02
    if name == "cauchy": assert abs(e.abs().median() - 0.6745) < 0.02
    else: assert abs(e.std() - 1) < 0.02

@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_growing_redrawing_and_the_original(name):
    model, x = NETWORKS["linear"](), torch.randn(5, 3, 12, 12)
    s = Siblings(model, sigma_of(model), n=3, seed=5, distribution=name)
    z = s.logits(x)
    assert difference(s.grow(5).logits(x)[:3], z) <= 1e-6 and len(s) == 5
    assert difference(Siblings(model, sigma_of(model), 3, 5, name, original=False).logits(x)[1:], z[1:]) <= 1e-6 # the same siblings; only member 0 is another
    assert difference(z[0], model.eval()(x)) <= 1e-6
    assert difference(s.redraw(6).logits(x)[1], z[1]) > 1e-4
    assert torch.equal(s.redraw(5).logits(x)[:3], z)
    fewer = Siblings(model, {k: v for k, v in sigma_of(model).items() if "weight" in k}, 3, 5, name)
    assert all(torch.equal(fewer.weights(2)[k], s.weights(2)[k]) for k in fewer.sigma)              # whoever else takes part

def test_errors():
    model = NETWORKS["linear"]()
    good = sigma_of(model)
    for arguments, words in [((nn.ReLU(), good), "no parameters"), ((model, {}), "names no parameter"), ((model, {"1.wieght": good["1.weight"]}), "did you mean '1.weight'"),
                             ((model, {"1.bias": torch.ones(3)}), "[3]; expected the parameter's, [20]"), ((model, {"1.bias": -good["1.bias"]}), "negative"),
                             ((model, {"1.bias": good["1.bias"] * float("nan")}), "not finite"), ((model, good, 0), "n is 0"), ((model, good, 2, -1), "seed is -1"),
                             ((model, good, 2, 0, "normal"), "unknown distribution")]:
        with pytest.raises(NiooddError) as e: Siblings(*arguments)
        assert words in str(e.value) and "\n" not in str(e.value)
    s = Siblings(model, good, 3)
    for call, words in [(lambda: s.grow(2), "3 members already"), (lambda: s.redraw(-1), "seed is -1"), (lambda: s.weights(3), "no member 3"), (lambda: noise("w", (2,), 0, 0, "x"), "distribution")]:
        with pytest.raises(NiooddError, match=words): call()

def test_shapes_that_do_not_fit_say_so():
    model = Classifier(4)
    with pytest.raises(NiooddError, match="this network takes"): Siblings(model, sigma_of(model)).logits(torch.zeros(2, 1, 20, 20))

def test_empty_and_double():
    model = Classifier(4).double()
    s = Siblings(model, sigma_of(model))
    assert s.logits(torch.zeros(0, 1, 28, 28).double()).shape == (2, 0, 4)
    x = torch.rand(3, 1, 28, 28).double()
    assert difference(s.logits(x), one_by_one(s, x)) < 1e-12


def test_cheaper_than_plain_forward_passes():
    "C1, a batch of 128: in CPU time of one thread, with room for a busy machine (it was 0.5)."
    (r,) = race("C1", 2, (128,), rounds=5, limit=20, clock=time.process_time)
    assert r.ratio("siblings", "plain") < 0.9 and r.rate("siblings") > 0

def test_report():
    report = bench_trust(architectures=("C1",), members=(2,), batches=(1, 8), rounds=2, limit=1, progress=False, clock=time.process_time)
    for words in ("C1 S=2   batch 1", "C1 S=2   batch 8", "siblings : plain", "one by one", "ensemble", "1,111,946 parameters", "C1 batch 8: training", "MC layers"): assert words in report
    with pytest.raises(NiooddError, match="nothing to measure"): bench_trust(architectures=())
    with pytest.raises(NiooddError, match="batches of 0, 8"): bench_trust(batches=(0, 8))

def test_report_names_its_command(capsys):
    assert main(["bench", "trust", "--members", "2", "--batches", "1", "--seconds", "0"]) == 0
    assert capsys.readouterr().out.startswith("nioodd bench trust --cells C1 --members 2 --batches 1 --seconds 0, commit ")
    assert main(["bench", "trust", "--batches", "1,many"]) == 2 and "--batches is '1,many'; expected whole numbers" in capsys.readouterr().err

def test_contestants_answer():
    x = images_for("C1", 3)
    for name, way in contestants("C1", 2).items():
        z = torch.stack(list(way(x)))
        assert z.shape == (2, 3, 10), name
    jobs = learning_jobs("C1", 4)
    jobs["training"](), jobs["intervals"]()


class Position(nn.Module):
    "Keeps what it made in its first forward pass."
    def __init__(self):
        super().__init__()
        self.kept, self.seen, self.share = None, [], nn.Parameter(torch.ones(1) / 10)
    def forward(self, x):
        if self.kept is None: self.kept = torch.linspace(0, 1, x.shape[-1])
        self.seen.append(x)
        return x + self.share * self.kept

class Either(nn.Module):
    "Two ways through it; the stand-in for the labels is not None."
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(432, 5)
    def forward(self, x, labels=None):
        z = self.head(x.flatten(1))
        return z if labels is None else F.cross_entropy(z, labels)

class Buffered(nn.Module):
    def __init__(self, buffer):
        super().__init__()
        self.register_buffer("mask", buffer)
        self.head = nn.Linear(432, 5)
    def forward(self, x): return self.head(x.flatten(1))

UNUSUAL = {
    "keeps": lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), Position(), nn.Flatten(), nn.Linear(400, 5)), "either": Either,
    "expanded": lambda: Buffered(torch.full((1,), 0.5).expand(3, 12, 12)), "sparse": lambda: Buffered(torch.eye(3).to_sparse()), "nan": lambda: Buffered(torch.full((3,), torch.nan))}

@pytest.mark.parametrize("name", UNUSUAL)
def test_unusual_networks_are_run_and_left_as_they_were(name):
    x, model = torch.randn(7, 3, 12, 12), UNUSUAL[name]().eval()
    s = Siblings(model, sigma_of(model), 3)
    z = s.logits(x)
    assert difference(z, one_by_one(s, x)) < 2e-6 and isinstance(model(x), torch.Tensor)
    kept = s._kept
    assert difference(s.logits(x), z) < 2e-6 and (name == "keeps" or s._kept is kept) # not drawn anew for nothing


def test_threads_do_not_see_each_others_siblings():
    from concurrent.futures import ThreadPoolExecutor
    class Untraceable(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(800, 5))
        def forward(self, x): return self.net(x) if x.sum() < 1e9 else x
    model, x = Untraceable().eval(), torch.randn(4, 3, 12, 12)
    weights = {k: v.clone() for k, v in model.state_dict().items()}
    s = Siblings(model, sigma_of(model, 0.5), 3)
    z = s.logits(x)
    assert s.why_plain
    with ThreadPoolExecutor(4) as pool: found = list(pool.map(lambda _: s.logits(x), range(60)))
    assert all(torch.allclose(f, z) for f in found) and all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())


def test_numbers_of_ones_own_modules_are_noticed():
    class Tempered(nn.Module):
        def __init__(self):
            super().__init__()
            self.head, self.temperature = nn.Linear(432, 5), 1.0
        def forward(self, x): return self.head(x.flatten(1)) / self.temperature
    model, x = Tempered().eval(), torch.randn(4, 3, 12, 12)
    s = Siblings(model, sigma_of(model), 2)
    s.logits(x)
    model.temperature = 5.0
    assert difference(s.logits(x), one_by_one(s, x)) < 2e-6


@pytest.mark.parametrize("traceable", [True, False])
def test_networks_that_are_random_in_eval_mode_are_refused(traceable):
    class Random(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Linear(432, 5)
        def forward(self, x): return self.head(F.dropout(x, 0.5).flatten(1) if traceable or x.sum() < 1e9 else x)
    s = Siblings(model := Random().eval(), sigma_of(model), 2)
    for _ in range(2):
        with pytest.raises(NiooddError, match="other logits each time"): s.logits(torch.randn(4, 3, 12, 12))


def test_a_weight_that_a_hook_computes_is_the_networks_own_afterwards():
    "The attribute, between two forward passes."
    from torch.nn.utils import prune
    layer = nn.Linear(432, 5)
    prune.l1_unstructured(layer, "weight", amount=0.3)
    net = nn.Sequential(nn.Flatten(), layer).eval()
    before, x = layer.weight, torch.randn(3, 3, 12, 12)
    s = Siblings(net, sigma_of(net), 2)
    z = s.logits(x)
    assert layer.weight is before and "hooks" in s.why_plain and torch.equal(z[0], net(x)) and difference(z[1], z[0]) > 1e-3


@pytest.mark.parametrize("sigma", [None, 3, {"1.weight": 0.1}])
def test_sigma_that_is_none(sigma):
    with pytest.raises(NiooddError, match="expected tensors by parameter name"): Siblings(nn.Sequential(nn.Flatten(), nn.Linear(4, 2)), sigma)
