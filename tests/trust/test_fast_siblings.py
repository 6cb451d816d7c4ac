"Siblings run together equal siblings run one by one, whatever the network."
import copy

import pytest
import torch
import torch.nn.functional as F
from sibling_networks import NETWORKS, difference, one_by_one, sigma_of, tied, used
from torch import nn

from nioodd.core.errors import NiooddError
from nioodd.core.models import architecture
from nioodd.speed.siblings import exactness, images_for
from nioodd.trust.fast_siblings import ACCELERATIONS, Operations, Stacked, fused, remove_norms, sibling
from nioodd.trust.siblings import Siblings, call_with


@pytest.fixture(autouse=True)
def seeded():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def stacked(s, without=()): return Stacked(s.model, [s.weights(i) for i in range(s.n)], without)


def operations_of(graph): return [n.target for n in graph.nodes if n.op == "call_module"]


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("only", ["", "weight", "head"])
def test_exact(name, only):
    "Together and one by one, with all parameters noisy, the weights alone, the last layer alone."
    model = used(NETWORKS[name]())
    if only == "head": only = next(reversed(dict(model.named_parameters())))
    x = torch.randn(150, 1 if name.startswith("grey") else 3, 12, 12)  # more than goes through at a time
    s = Siblings(model, sigma_of(model, only=only), n=3)
    z = s.logits(x)
    assert s.why_plain is None and z.shape == (3, 150, z.shape[-1]) and z.dtype == torch.float32 and not z.requires_grad
    assert difference(z, one_by_one(s, x)) <= 1e-6
    assert difference(z[1], z[0]) > 1e-3
    assert difference(s.logits(x[[7, 3]]), z[:, [7, 3]]) <= 1e-6  # the image alone
    for _ in range(2): assert difference(s.logits(x[5:6]), z[:, 5:6]) <= 4e-6  # one image: both ways, then side by side


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("only", ["", "head"])
def test_one_image_side_by_side(name, only):
    model = used(NETWORKS[name]())
    if only == "head": only = next(reversed(dict(model.named_parameters())))
    together = stacked(s := Siblings(model, sigma_of(model, only=only), n=3))
    x = torch.randn(1, 1 if name.startswith("grey") else 3, 12, 12)
    for _ in range(2): assert difference(together(x), one_by_one(s, x)) <= 4e-6
    assert (together.together is not None) == (name not in ("dense", "functional") or only != "")


@pytest.mark.parametrize("without", ACCELERATIONS)
@pytest.mark.parametrize("name", ["grey", "squeeze", "residual"])
def test_each_acceleration_can_be_left_out(name, without):
    model = used(NETWORKS[name]())
    s = Siblings(model, sigma_of(model), n=3)
    x = torch.randn(5, 1 if name == "grey" else 3, 12, 12)
    some = stacked(s, (without,))
    for images in (x, x[:1], x[:1]): assert difference(some(images), one_by_one(s, images)) <= 4e-6
    if without == "side by side": assert some.together is None
    kinds = {type(m).__name__ for m in some.branches[0].modules()}
    assert ("BatchNorm2d" in kinds) == (without == "fold norms" and name != "squeeze")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("image", ["as it is", "zeros", "nan", "bigger numbers"])
def test_one_image_through_a_large_linear_layer(dtype, image):
    "As near to float64 as sums of products in another order can be: n · eps · Σ|w·x| for n terms."
    net = nn.Sequential(nn.Flatten(), nn.Linear(18, 1028), nn.ReLU(), nn.Linear(1028, 600, bias=False)).to(dtype)
    x = torch.randn(2, 2, 3, 3, dtype=dtype)
    together = stacked(s := Siblings(net, sigma_of(net), n=3))
    for images in (x, x[:1]): together(images)
    assert together.together is not None
    one = {"as it is": x[1:], "zeros": 0 * x[1:], "nan": x[1:] / 0 * 0, "bigger numbers": 1e6 * x[1:]}[image]
    found = together(one)
    assert found.shape == (3, 1, 600) and found.dtype == dtype
    if image == "nan":
        assert found.isnan().all()
        return
    for i, logits in enumerate(found):
        w = {k: t.double() for k, t in s.weights(i).items()}
        hidden = F.linear(one.double().flatten(1), w["1.weight"], w["1.bias"]).relu()
        exact = hidden @ w["3.weight"].t()
        # Of both layers: the hidden units are sums too, and their errors are carried through the second layer
        eps = torch.finfo(dtype).eps
        error_1 = 19 * eps * (one.double().flatten(1).abs() @ w["1.weight"].abs().t() + w["1.bias"].abs())
        bound = (1028 * eps * hidden + error_1) @ w["3.weight"].abs().t()
        assert ((logits.double() - exact).abs() <= bound).all()


CONVOLUTIONS = [{}, dict(stride=2), dict(padding="same"), dict(padding_mode="reflect"), dict(groups=4),
                dict(dilation=2, padding=2), dict(bias=False), dict(kernel_size=(3, 1), padding=(1, 0))]


@pytest.mark.parametrize("options", CONVOLUTIONS, ids=str)
def test_convolutions_at_any_size(options):
    "One image or several, of one size after another: the weights are packed for one of them."
    def conv(i, o): return nn.Conv2d(i, o, **dict(dict(kernel_size=3, padding=1), **options))
    head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 4)
    net = nn.Sequential(nn.Conv2d(3, 16, 1), conv(16, 32), nn.ReLU(), conv(32, 32), *head)
    together = stacked(s := Siblings(net, sigma_of(net), n=2))
    for _ in range(2):
        for size, n in (((12, 12), 1), ((12, 9), 1), ((12, 12), 3), ((4, 6), 1), ((12, 12), 1)):
            x = torch.randn(n, 3, *size)
            assert difference(together(x), one_by_one(s, x)) <= 1e-5
    assert together.together is not None


def test_packed_weights_obey_autocast_inference_mode_and_copies():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(64, 4))
    s, x = Siblings(net, sigma_of(net), n=2), torch.randn(40, 3, 8, 8)
    for images in (x, x[:1], x[:1]): s.logits(images)
    with torch.autocast("cpu", torch.bfloat16): assert difference(s.logits(x[:1]), one_by_one(s, x[:1])) < 0.05
    with torch.inference_mode(): assert difference(s.logits(x[:1]), one_by_one(s, x[:1])) < 1e-6
    assert difference(copy.deepcopy(s).logits(x[:1]), one_by_one(s, x[:1])) < 1e-6


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this PyTorch comes without oneDNN")
def test_this_pytorch_packs_weights():
    "If this fails, `_SideBySideConv._pack` does not know this PyTorch: all is right, but slower."
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(64, 4))
    together = stacked(Siblings(net, sigma_of(net), n=2))
    together(torch.randn(1, 3, 8, 8))
    packed = [m.packed is not None for m in together.together.modules() if isinstance(m, nn.Conv2d)]
    assert packed == [True, True]


def test_large_convolutions_stay_apart():
    head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2800, 3)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 2800, 3), *head)
    together = stacked(s := Siblings(net, sigma_of(net), n=2))
    x = torch.randn(1, 3, 6, 6)
    for _ in range(2): assert difference(together(x), one_by_one(s, x)) <= 1e-5
    assert together.together is None


@pytest.mark.parametrize("noisy", ["0.weight", "1.bias", "5.weight"])
def test_exact_where_few_are_noisy(noisy):
    "A convolution, or only the batch norm that is folded into one, or a layer behind a trunk."
    front = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2)
    net = used(nn.Sequential(*front, nn.Flatten(), nn.Linear(100, 5)))
    s, x = Siblings(net, sigma_of(net, only=noisy), n=3), torch.randn(4, 1, 12, 12)
    assert difference(s.logits(x), one_by_one(s, x)) <= 1e-6 and s.why_plain is None
    trunk = operations_of(stacked(s).trunk.graph)
    assert trunk == ([] if noisy != "5.weight" else ["0", "2", "3", "4"])


@pytest.mark.parametrize("name", ["C1", "C2", "C3", "C4", "C5"])
def test_exact_for_the_papers_networks(name):
    "Up to what a change of the memory layout alone does to the plain logits."
    siblings, layout = exactness(name, n=2 if name in ("C2", "C5") else 8)
    assert siblings <= max(1e-6, 2 * layout)
    assert name not in ("C3", "C5") or siblings <= 1e-6


@pytest.mark.parametrize("name, expected", [("C1", True), ("C2", False), ("C3", False), ("C4", True)])
def test_one_image_of_the_papers_networks(name, expected):
    net, x = architecture(name).eval(), images_for(name, 3)
    together = stacked(s := Siblings(net, sigma_of(net), 2))
    together(x[:1])
    assert (together.together is not None) == expected
    assert difference(torch.cat([together(one) for one in x.split(1)], 1), one_by_one(s, x)) <= 1e-5


def test_what_does_not_end_in_numbers_decides_nothing():
    "A first image of NaN cannot tell whether siblings may lie side by side."
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(400, 5))
    together, x = stacked(Siblings(net, sigma_of(net), 2)), torch.randn(2, 3, 12, 12)
    assert together(x[:1] * float("nan")).isnan().all() and together.together is None
    together(x[:1])
    assert together.together is not None


def test_what_is_rewritten():
    "Fewer operations: no dropout, no batch norm behind a convolution; nothing noisy in the trunk."
    model = used(NETWORKS["leaky before pool"]())
    branch = stacked(Siblings(model, sigma_of(model))).branches[0]
    assert not {"BatchNorm2d", "Dropout2d"} & {type(m).__name__ for m in branch.modules()}
    assert operations_of(branch.graph) == ["0", "2", "4", "5", "6"]
    assert operations_of(stacked(Siblings(model, sigma_of(model, only="6."))).branches[0].graph) == ["6"]


def test_a_norm_that_does_not_read_the_convolution_alone_stays():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm, self.head = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(400, 5)

        def forward(self, x): return self.head(((y := self.conv(x)) + self.norm(y)).flatten(1))
    operations = Operations(used(Both()))
    assert remove_norms(operations) == [] and "norm" in operations_of(operations.graph)


def test_normalising_by_the_image_is_not_by_the_batch():
    layers = nn.Conv2d(3, 8, 5), nn.InstanceNorm2d(8, affine=True), nn.ReLU(), nn.Flatten(), nn.Linear(512, 5)
    model = used(nn.Sequential(*layers))
    s, x = Siblings(model, sigma_of(model)), torch.randn(4, 3, 12, 12)
    assert difference(s.logits(x), one_by_one(s, x)) <= 2e-6 and s.why_plain is None


def test_hooks_are_refused():
    model = NETWORKS["linear"]()
    model[1].register_forward_hook(print)
    with pytest.raises(NiooddError, match="forward hooks"): Operations(model)


def test_parameters_not_noisy_are_shared():
    model = tied()
    other = sibling(model, {"1.weight": torch.zeros(12, 432)})
    assert other[2].weight is model[2].weight is other[6].weight and other[2] is other[4]
    assert not other[1].weight.any() and model[1].weight.any()
    noisy = sibling(model, {"2.weight": torch.zeros(12, 12)})
    assert noisy[2].weight is noisy[6].weight and not noisy[6].weight.any()


@pytest.mark.parametrize("name", ["grey", "residual", "dense", "tied"])
def test_what_is_learnt_on_is_the_network(name):
    "A change of the folded network, by its factors, is that change of the network."
    model = used(NETWORKS[name]()).eval()
    norms = {k for k, m in model.named_modules() if isinstance(m, nn.BatchNorm2d)}
    noisy = [k for k, _ in model.named_parameters() if k.rpartition(".")[0] not in norms]
    x = torch.randn(4, 1 if name == "grey" else 3, 12, 12)
    lean = fused(model, noisy, x[:2])
    assert lean.network is not model and bool(lean.factor) == (name in ("grey", "residual"))
    own, theirs = dict(model.named_parameters()), dict(lean.network.named_parameters())
    step = {k: 0.2 * torch.randn_like(own[k]) for k in noisy}
    moved = call_with(model, {k: own[k] + step[k] for k in noisy}, x)
    again = call_with(lean.network, {k: theirs[k] + step[k] * lean.factor.get(k, 1) for k in noisy}, x)
    assert difference(again, moved) < 2e-6
