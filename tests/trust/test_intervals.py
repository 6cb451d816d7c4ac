"""Agreement between siblings, learnt intervals, and their detector."""
import copy
import math
import warnings

import pytest
import torch
from pytorch_ood.benchmark import Benchmark
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from nioodd.core.detector import Detector
from nioodd.core.errors import NiooddError
from nioodd.core.images import to_input
from nioodd.core.metrics import ood_metrics
from nioodd.core.models import Classifier, architecture
from nioodd.trust.agreement import MEASURES, class_dispersion, disagreement, dispersion, kl_to_mean, measure
from nioodd.trust.detector import TrustIntervalDetector
from nioodd.trust.intervals import (
    REGULARISERS,
    TrustIntervals,
    draw,
    rmsprop,
    scales,
    strength,
    uniform_sigma,
    why_stop,
)
from nioodd.trust.siblings import DISTRIBUTIONS, Fused, Siblings, Watch

SHAPE = (1, 8, 8)


def images(n, seed=0): return torch.randint(0, 256, (n, *SHAPE), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def logits(S=4, N=300, K=7, spread=4, seed=0): return spread * torch.randn(S, N, K, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(autouse=True)
def own_randomness():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


@pytest.fixture
def network():
    net = Classifier(4, size=8)
    net(torch.randn(64, *SHAPE))  # batch norm's running statistics leave their initial values
    return net.eval()


class Residual(nn.Module):
    "Convolutions with and without bias, batch norm, a shortcut, dropout, tied weights, a parameter of its own, a frozen one."
    def __init__(self, width=8):
        super().__init__()
        self.first, self.norm, self.second = nn.Conv2d(1, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.Conv2d(width, width, 3, padding=1)
        self.tied, self.gain, self.drop, self.head = self.second, nn.Parameter(torch.ones(1)), nn.Dropout(0.5), nn.Linear(width, 4)
        self.head.bias.requires_grad_(False)

    def forward(self, x):
        h = self.norm(self.first(x)).relu()
        return self.head(self.drop(self.gain * (h + self.tied(self.second(h).relu())).mean((2, 3))))


# Measures

@pytest.mark.parametrize("name", MEASURES)
@pytest.mark.parametrize("S, K", [(2, 2), (2, 10), (7, 3)])
def test_order_of_siblings_classes_and_images_does_not_matter(name, S, K):
    z, f = logits(S, 50, K), measure(name)
    score = f(z)
    assert score.shape == (50,) and score.dtype == torch.float64
    order = torch.randperm(50)
    for same in (f(z[torch.randperm(S)]), f(z[..., torch.randperm(K)]), f(z + torch.randn(S, 50, 1)), f(z[:, order])[order.argsort()]):
        torch.testing.assert_close(same, score, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", MEASURES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_finite_at_extremes(name, dtype):
    hot = torch.eye(10)
    for z in (torch.zeros(2, 4, 10), 1e4 * hot[None].expand(3, -1, -1), 1e4 * hot[:2, None], 3e38 * hot[:2, None], -3e38 * hot[:2, None], torch.stack([1e4 * hot, torch.zeros(10, 10)])):
        score = measure(name)(z.to(dtype))
        assert score.isfinite().all() and (name.startswith("disagree") or (score >= 0).all())


@pytest.mark.parametrize("S", [2, 3, 10])
def test_identical_siblings_agree_exactly(S):
    z = logits(1, 500, 10, spread=8).expand(S, -1, -1)
    assert all((measure(name)(z) == 0).all() for name in ("dispersion", "kl_to_mean", "mutual_information"))
    assert disagreement(z, "product").unique().numel() == 1 and disagreement(z).unique().numel() == 500


@pytest.mark.parametrize("S", [2, 3, 10])
@pytest.mark.parametrize("spread", [.1, 5, 100])
def test_bounds(S, spread):
    z = logits(S, 2000, 5, spread)
    mu, tol = z.double().softmax(-1).mean(0), 1 + 1e-9
    assert (class_dispersion(z) <= (S - 1) * mu * tol + 1e-300).all() and (dispersion(z) <= (S - 1) * tol).all()
    assert (kl_to_mean(z) <= S * math.log(S) * tol).all() and (measure("mutual_information")(z) <= math.log(S) * tol).all()
    assert (measure("entropy_of_mean")(z) <= math.log(5) * tol).all() and (measure("max_of_mean")(z) <= 1 - 1 / 5 + 1e-12).all()
    if S == 2: assert ((dispersion(z) <= kl_to_mean(z) * (1 + 1e-6)) & (kl_to_mean(z) <= 2 * math.log(2) * dispersion(z) * (1 + 1e-6))).all()


def test_definitions():
    z = logits().double()
    p, mu = z.softmax(-1), z.softmax(-1).mean(0)
    H, D = -(mu * mu.log()).sum(1), (p.var(0, unbiased=False) / mu).sum(1)
    KL = (p * (p / mu).log()).sum((0, 2))
    want = dict(disagreement_sum=(H + D).log(), disagreement_product=(H * D).log(), dispersion=D, entropy_of_mean=H, max_of_mean=1 - mu.amax(1),
                kl_to_mean=KL, mutual_information=H + (p * p.log()).sum(2).mean(0))
    assert want.keys() == MEASURES.keys()
    for name, value in want.items(): torch.testing.assert_close(measure(name)(z), value, rtol=1e-7, atol=1e-12)
    torch.testing.assert_close(disagreement(z, "product", tau=.5), (H * D + .5).log())


@pytest.mark.parametrize("name", MEASURES)
def test_no_ties_are_merged(name):
    lead = torch.linspace(3, 150, 3000)
    z = torch.zeros(2, 3000, 10)
    z[0, :, 3], z[1, :, 3] = lead, .9 * lead
    score = measure(name)(z)
    assert score.unique().numel() == 3000 and (score[100:].diff() < 0).all()


@pytest.mark.parametrize("bad, word", [(torch.zeros(3, 4), "[S, N, K]"), (torch.zeros(1, 3, 4), "S >= 2"), (torch.zeros(2, 3, 1), "2 outputs"),
                                       (torch.full((2, 3, 4), float("nan")), "NaN"), (torch.full((2, 3, 4), float("inf")), "infinity")])
@pytest.mark.parametrize("name", MEASURES)
def test_bad_logits(name, bad, word):
    with pytest.raises(NiooddError) as e: measure(name)(bad)
    assert word in str(e.value) and "\n" not in str(e.value)


def test_unknown_measure_and_form():
    with pytest.raises(NiooddError, match="did you mean 'dispersion'"): measure("dispertion")
    with pytest.raises(NiooddError, match="known: sum, product"): disagreement(logits(), "difference")


# Which parameters

def test_parameters_by_choice():
    net = Residual()
    assert list(scales(net)) == ["gain", "first.weight", "second.weight", "second.bias", "head.weight", "head.bias"]
    assert list(scales(net, "conv")) == ["first.weight", "second.weight", "second.bias"]
    assert list(scales(net, "head")) == list(scales(net, "head", norm=True)) == ["head.weight", "head.bias"]
    assert {"norm.weight", "norm.bias"} == scales(net, norm=True).keys() - scales(net).keys()
    assert scales(net)["second.bias"] == scales(net)["second.weight"] == pytest.approx(net.second.weight.std().item(), rel=1e-6)
    s = uniform_sigma(net, .3, norm=True)
    assert strength(net, s) == pytest.approx(.3) and all(s[k].shape == p.shape for k, p in net.named_parameters() if k in s)


def test_odd_parameters():
    "RMS norm is a norm; an empty parameter is none; spectral norm is not moved on by looking at it."
    assert list(scales(nn.Sequential(nn.Linear(8, 8, bias=False), nn.RMSNorm(8)))) == ["0.weight"]
    empty = nn.Linear(8, 8); empty.spare = nn.Parameter(torch.empty(0))
    assert list(scales(empty)) == ["weight", "bias"]
    net = nn.Sequential(nn.Flatten(), nn.utils.parametrizations.spectral_norm(nn.Linear(64, 4))).train()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    trust = TrustIntervals(net)
    trust.fit([(images(32), torch.arange(32) % 4)], progress=False)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items()) and net.training


class Auxiliary(nn.Module):
    "A second head that only training uses, defined last; an output layer that is defined before the body."
    def __init__(self):
        super().__init__()
        self.head, self.body, self.second = nn.Linear(16, 4), nn.Linear(64, 16), nn.Linear(16, 7)
    def forward(self, x):
        h = self.body(x.flatten(1)).relu()
        return (self.head(h), self.second(h)) if self.training else self.head(h)


class Pair(Auxiliary):
    def forward(self, x): return super().forward(x), x


def test_weights_that_eval_mode_does_not_use():
    with torch.no_grad(): trust = TrustIntervals(Auxiliary()); trust.fit([(images(32), torch.arange(32) % 4)], steps=3, progress=False)
    assert all(r.isfinite().all() for r in trust.rho.values()) and len(trust.rho) == 6
    with pytest.raises(NiooddError, match="which='head' found second.weight, but the network has 4 outputs"): TrustIntervals(Auxiliary(), "head").fit([(images(8), torch.arange(8) % 4)], progress=False)


def test_no_parameters():
    for net in (nn.Flatten(), nn.Sequential(nn.BatchNorm2d(3))):
        for make in (TrustIntervals, uniform_sigma):
            with pytest.raises(NiooddError, match="has no parameters"): make(net)
    with pytest.raises(NiooddError, match="has no parameters for which='conv'"): TrustIntervals(nn.Linear(3, 3), "conv")
    assert list(TrustIntervals(nn.Sequential(nn.BatchNorm2d(3)), norm=True).rho) == ["0.weight", "0.bias"]


@pytest.mark.parametrize("arguments, word", [(dict(which="convs"), "did you mean 'conv'"), (dict(distribution="gauss"), "gaussian"), (dict(sigma_init=0), "sigma_init"),
                                             (dict(sigma_init=.5, sigma_max=.2), "sigma_max")])
def test_bad_construction(network, arguments, word):
    with pytest.raises(NiooddError, match=word): TrustIntervals(network, **arguments)


def test_weights_that_are_not_finite(network):
    with torch.no_grad(): network.head.weight[0, 0] = float("nan")
    with pytest.raises(NiooddError, match="not finite"): TrustIntervals(network)


# Learning

@pytest.mark.parametrize("make, options", [(lambda: Classifier(4, size=8), {}), (Residual, {}), (Residual, dict(norm=True)), (Residual, dict(which="head")), (Residual, dict(which="conv"))])
def test_the_network_is_left_as_it_was(make, options):
    net = make()
    net.train(); net.get_submodule("head").eval()
    state, modes = copy.deepcopy(net.state_dict()), [m.training for m in net.modules()]
    flags = [p.requires_grad for p in net.parameters()]
    random = torch.random.get_rng_state()
    trust = TrustIntervals(net, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trust.fit([(images(80), torch.arange(80) % 4)] * 3, progress=False)
    assert all(torch.equal(state[k], v) for k, v in net.state_dict().items()) and modes == [m.training for m in net.modules()]
    assert flags == [p.requires_grad for p in net.parameters()] and all(p.grad is None for p in net.parameters())
    assert torch.equal(random, torch.random.get_rng_state())
    assert all((s > 0).all() for s in trust.sigma().values())
    assert trust.sigma().keys() == scales(net, **options).keys()


def step_and_gradient(trust, x, y, **options):
    "The terms of a step, and its gradient by ρ."
    found = []
    def seen(weights, gradients, *rest):
        found.extend(g.clone() for g in gradients)
        rmsprop(weights, gradients, *rest)
    with pytest.MonkeyPatch.context() as m:
        m.setattr("nioodd.trust.intervals.rmsprop", seen)
        terms = trust.step(x, y, **options)
    return terms, dict(zip(trust.rho, found))


@pytest.mark.parametrize("regulariser", REGULARISERS)
def test_regularisers_widen_and_the_cap_holds(network, regulariser):
    trust, x, y = TrustIntervals(network, sigma_max=.15), to_input(images(8)), torch.arange(8) % 4
    before = trust.regulariser(regulariser)
    for _ in range(60): trust.step(x, y, regulariser=regulariser, lambda2=1e6)
    assert trust.regulariser(regulariser) < before and strength(network, trust.sigma()) == pytest.approx(.15, rel=1e-3)


def test_steps_are_those_of_rmsprop(network):
    trust, x, y = TrustIntervals(network), to_input(images(8)), torch.arange(8) % 4
    rho = {k: r.clone().requires_grad_() for k, r in trust.rho.items()}
    peer = torch.optim.RMSprop(rho.values(), eps=1e-16)
    for lr in (.01, .01, .002, .03):
        _, gradient = step_and_gradient(trust, x, y, lr=lr)
        for k, r in rho.items(): r.grad = gradient[k]
        peer.param_groups[0]["lr"] = lr
        peer.step()
        for k, r in rho.items(): torch.testing.assert_close(trust.rho[k], r.detach(), rtol=1e-5, atol=1e-6)


def test_an_interval_is_never_less_than_a_hundred_millionth_of_the_scale(network):
    trust, x, y = TrustIntervals(network, sigma_init=1e-7), to_input(images(64)), torch.arange(64) % 4
    for _ in range(20): trust.step(x, y, lambda2=0, lr=.5)
    for k, s in trust.sigma().items(): assert s.min() >= .999e-8 * trust.scale[k]
    assert any(s.min() < 1.001e-8 * trust.scale[k] for k, s in trust.sigma().items()) # Some would have gone on


@pytest.mark.parametrize("scale", [1, 1e-10, 1e-20])
@pytest.mark.parametrize("sigma", [1e-8, .05])
def test_the_slope_of_a_regulariser_is_finite(network, sigma, scale):
    with torch.no_grad(): network.head.weight.mul_(scale), network.head.bias.mul_(scale)
    trust, x, y = TrustIntervals(network, sigma_init=sigma), to_input(images(8)), torch.arange(8) % 4
    for name in REGULARISERS:
        _, gradient = step_and_gradient(trust, x, y, regulariser=name)
        assert all(g.isfinite().all() for g in gradient.values())


def test_without_a_regulariser_siblings_come_to_agree(network):
    with torch.no_grad(): network.head.weight.mul_(50)  # a confident network has something to lose
    trust, x = TrustIntervals(network, sigma_init=.3), to_input(images(64))
    y = network(x).argmax(1)
    found = [trust.step(x, y, lambda2=0) for _ in range(60)]
    for term in ("nll", "variance"): assert sum(t[term] for t in found[-10:]) < 0.95 * sum(t[term] for t in found[:10])


@pytest.mark.parametrize("regulariser", REGULARISERS)
def test_step_in_parts_is_the_step_on_the_whole(network, regulariser):
    "The gradient by autograd through everything, on one batch of more images than a part holds."
    trust, x, y = TrustIntervals(network, sigma_init=.3), to_input(images(150)), torch.arange(150) % 4
    for r in trust.rho.values(): r.sub_(torch.rand_like(r))
    rho = {k: r.clone().requires_grad_() for k, r in trust.rho.items()}
    torch.manual_seed(3)
    terms, gradient = step_and_gradient(trust, x, y, regulariser=regulariser, lambda1=2, lambda2=.5, draws=3)
    torch.manual_seed(3)
    sigma = {k: r.exp().log1p() for k, r in rho.items()}
    noise = [draw(trust.rho) for _ in range(3)]
    own = {k: p.detach() for k, p in network.named_parameters()}
    p = torch.stack([torch.func.functional_call(network, own | {k: own[k] + s * e[k] for k, s in sigma.items()}, (x,)).softmax(1) for e in noise])
    nll, variance = -p[:, range(150), y].log().mean(), p.var(0).sum(1).mean()
    assert terms == dict(nll=pytest.approx(nll.item(), rel=1e-4), variance=pytest.approx(variance.item(), rel=1e-4))
    loss = nll + 2 * variance + .5 * REGULARISERS[regulariser](s / trust.scale[k] for k, s in sigma.items())
    for k, g in zip(rho, torch.autograd.grad(loss, list(rho.values()))): torch.testing.assert_close(gradient[k], g, rtol=1e-3, atol=1e-6)


def trained(name):
    "A network of paper 2 in double precision, its batch norms as after training."
    torch.manual_seed(0)
    net = architecture(name, 4, 3, 32 if name == "C2" else 16).double()
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d): m.running_mean.normal_(0, .3), m.running_var.uniform_(.5, 2), nn.init.uniform_(m.weight, -1.5, 1.5), nn.init.normal_(m.bias, 0, .2)
    return net.eval()


@pytest.mark.parametrize("name", ["C2", "C3", "C4", "C5"])
def test_a_step_on_the_simplified_network_is_one_on_the_network(name):
    net, found = trained(name), []
    x, y = torch.randn(5, 3, *[32 if name == "C2" else 16] * 2).double(), torch.arange(5) % 4
    for simplify in (True, False):
        trust = TrustIntervals(net, sigma_init=.1)
        if not simplify: trust.lean, trust.watch = Fused(net, {}), Watch(net)
        torch.manual_seed(1)
        first, (second, gradient) = trust.step(x, y), step_and_gradient(trust, x, y)
        found.append(([*first.values(), *second.values()], gradient, trust))
    (a, by_a, trust), (b, by_b, _) = found
    assert trust.lean.factor and trust.lean.network is not net
    assert a == pytest.approx(b, rel=1e-7)
    for k in by_a: torch.testing.assert_close(by_a[k], by_b[k], rtol=1e-4, atol=1e-8)


def test_a_step_after_the_network_was_changed():
    net, x, y = trained("C3"), torch.randn(5, 3, 16, 16).double(), torch.arange(5) % 4
    trust = TrustIntervals(net)
    trust.step(x, y)
    before = trust.lean
    trust.step(x, y)
    assert trust.lean is before
    next(m for m in net.modules() if isinstance(m, nn.BatchNorm2d)).running_var.mul_(4) # with this the factors
    trust.step(x, y)
    assert trust.lean is not before
    torch.testing.assert_close(trust.lean.network(x), net(x))


def test_what_is_not_simplified():
    "Norms that are noisy, hooks, what cannot be traced, and a weight that another layer shares with a convolution before a norm."
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.norm, self.b, self.head = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), nn.Conv2d(3, 3, 3, padding=1), nn.Linear(3, 4)
            self.b.weight = self.a.weight
            nn.init.constant_(self.norm.weight, 3.)
        def forward(self, x): return self.head(self.b(self.norm(self.a(x)).relu()).mean((2, 3)))
    class Loop(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = architecture("C3", 4, 3, 16)
        def forward(self, x): return self.net(x if x.mean() < 9 else -x)
    hooked = architecture("C3", 4, 3, 16)
    hooked.register_forward_hook(lambda m, x, y: y * 2)
    x, y = torch.randn(5, 3, 16, 16), torch.arange(5) % 4
    for trust in (TrustIntervals(architecture("C3", 4, 3, 16), norm=True), TrustIntervals(hooked), TrustIntervals(Loop()), TrustIntervals(Tied())):
        trust.step(x, y)
        assert trust.lean == (trust.model, {})


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_every_distribution_learns_and_is_kept(network, distribution, tmp_path):
    trust = TrustIntervals(network, distribution=distribution, sigma_init=.01)
    trust.step(to_input(images(8)), torch.arange(8) % 4)
    again = TrustIntervals.load(trust.save(tmp_path/"t.safetensors"), network)
    assert again.distribution == distribution and again.siblings(3).distribution == distribution
    x = to_input(images(5))
    assert torch.equal(again.siblings(3, seed=7).logits(x), trust.siblings(3, seed=7).logits(x))


def test_fit_repeats_itself_and_reports(network):
    loader = DataLoader(TensorDataset(images(96), torch.arange(96) % 4), batch_size=32, shuffle=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        a, b = ((t := TrustIntervals(network)).fit(loader, (images(30, 1), torch.arange(30) % 4), steps=7, check_every=3, seed=5, progress=False, draws=3) and t for _ in range(2))
        assert all(torch.equal(a.rho[k], b.rho[k]) for k in a.rho)
        rows = TrustIntervals(network).fit(loader, progress=False)
    assert [r["step"] for r in rows] == [0, 3] and rows[-1]["stopped"] == "all steps were made" and "nll" in rows[-1] and "nll" not in rows[0] and rows[-1]["regulariser"] < rows[0]["regulariser"]


def test_stops_and_goes_back(network):
    x = images(60)
    y = network(to_input(x)).argmax(1)
    trust = TrustIntervals(network, sigma_init=.01, sigma_max=5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        rows = trust.fit([(x, y)], (x, y), steps=400, check_every=5, patience=2, lambda2=1e3, lr=.1, progress=False)
    assert rows[-1]["step"] < 400 and "NLL has risen" in rows[-1]["stopped"]
    assert strength(network, trust.sigma()) == pytest.approx(rows[-3]["strength"], rel=1e-5)


def test_stopping_rule():
    assert why_stop([(1, 1)] * 20) is None and why_stop([]) is None
    rising = [(1, .1 * i) for i in range(20)]
    assert why_stop(rising) is None  # ΣVar that has never fallen does not stop anything


def test_warns_when_siblings_are_worse(network):
    x = images(200)
    y = network(to_input(x)).argmax(1)
    with pytest.warns(UserWarning, match="points of accuracy.*lower lambda2"):
        TrustIntervals(network, sigma_init=1).fit([(x, y)], progress=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        TrustIntervals(network, sigma_init=1e-4).fit([(x, y)], progress=False)


@pytest.mark.parametrize("options, word", [(dict(draws=1), "draws is 1"), (dict(lambda1=-.1), "lambda1 is -0.1"), (dict(lambda2=-1), "lambda2 is -1"), (dict(lambda2=float("nan")), "lambda2 is nan"),
                                           (dict(regulariser="log"), "unknown regulariser"), (dict(steps=0), "steps is 0"), (dict(lr=-.01), "lr is -0.01"), (dict(check_every=0), "check_every is 0"),
                                           (dict(patience=0), "patience is 0"), (dict(held_out=(images(0), torch.zeros(0).long())), "no held-out images")])
def test_bad_options(network, options, word):
    with pytest.raises(NiooddError, match=word): TrustIntervals(network).fit([(images(8), torch.arange(8) % 4)], progress=False, **options)


@pytest.mark.parametrize("loader, word", [
    ([images(8)], "without labels"), ([(images(8),)], "without labels"), (DataLoader(TensorDataset(images(8))), "without labels"),
    ([], "steps is 0"), ((b for b in []), "no length"), ([(images(8), torch.arange(8))], "labels run from 0 to 7, but the network has 4 outputs"),
    ([(images(8), -torch.ones(8).long())], "labels run from -1"), ([(images(8), torch.rand(8))], "float32"), ([(images(8), torch.zeros(7).long())], r"\[7\] for 8 images"),
    ([(torch.full((8, *SHAPE), float("nan")), torch.zeros(8).long())], "nan|NaN"), ([(images(8), torch.zeros(8).long()), (images(0), torch.zeros(0).long())], "images in a batch is 0")])
def test_bad_loaders(network, loader, word):
    with pytest.raises(NiooddError, match=word) as e: TrustIntervals(network).fit(loader, progress=False)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint8])
def test_labels_of_any_integer_kind(network, dtype):
    y, rows = torch.arange(32) % 4, []
    for labels in (y, y.to(dtype)): rows.append(TrustIntervals(network, sigma_init=1e-4).fit([(images(32), labels)], progress=False))
    assert rows[0] == rows[1]


def test_float16_is_refused_before_anything_moves(network):
    trust = TrustIntervals(network.half())
    before = {k: r.clone() for k, r in trust.rho.items()}
    with pytest.raises(NiooddError, match="weights are float16"): trust.step(to_input(images(4)).half(), torch.zeros(4).long())
    assert all(torch.equal(before[k], r) for k, r in trust.rho.items())


def test_a_loss_that_is_not_finite_names_the_term_and_changes_nothing(network):
    trust = TrustIntervals(network)
    before = {k: r.clone() for k, r in trust.rho.items()}
    with pytest.raises(NiooddError, match="the nll of the trust intervals became nan"): trust.step(torch.full((4, *SHAPE), float("nan")), torch.zeros(4).long())
    assert all(torch.equal(before[k], r) for k, r in trust.rho.items())


# Files

def test_files_of_another_architecture(network, tmp_path):
    file = TrustIntervals(network).save(tmp_path/"t.safetensors")
    with pytest.raises(NiooddError) as e: TrustIntervals.load(file, Classifier(5, size=8))
    assert "head.weight is [4, 128] in the intervals, [5, 128] in the network" in str(e.value) and "head.bias is [4]" in str(e.value) and "\n" not in str(e.value)
    with pytest.raises(NiooddError, match=r"is not in the network"): TrustIntervals.load(file, Residual())
    bigger = nn.Sequential()
    for k, m in network.named_children(): bigger.add_module(k, m)
    bigger.add_module("more", nn.Linear(4, 4))
    with pytest.raises(NiooddError, match="no intervals for more.bias, more.weight"): TrustIntervals.load(file, bigger)


def test_files_that_are_something_else(network, tmp_path):
    from nioodd.core.files import save_tensors
    with pytest.raises(NiooddError, match="does not exist"): TrustIntervals.load(tmp_path/"absent", network)
    with pytest.raises(NiooddError, match="no trust intervals"): TrustIntervals.load(save_tensors(tmp_path/"a", network.state_dict()), network)
    for meta, word in ((1, "no trust intervals"), (dict(trust=None), "no trust intervals"), (dict(trust=dict(wich="all")), "does not know .*wich")):
        with pytest.raises(NiooddError, match=word): TrustIntervals.load(save_tensors(tmp_path/"b", TrustIntervals(network).rho, meta), network)


# The detector

@pytest.fixture
def detector(network):
    return TrustIntervalDetector(network, uniform_sigma(network, .1)).fit(held_out=images(100))


@pytest.mark.parametrize("name", MEASURES)
def test_detector_scores_are_the_measure_of_its_siblings(network, name):
    sigma, x = uniform_sigma(network, .1), images(20)
    d = TrustIntervalDetector(network, sigma, name, n=3, seed=2)
    torch.testing.assert_close(d.predict(x), measure(name)(Siblings(network, sigma, 3, 2).logits(to_input(x))), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(d.sibling_logits(x)[0], d.logits(x))


def test_scores_do_not_depend_on_the_batch_or_its_order(detector):
    x, order = images(40), torch.randperm(40)
    whole = detector.predict(x)
    for other in (torch.cat([detector.predict(i[None]) for i in x]), detector.predict(x[order])[order.argsort()], detector.predict(torch.cat([images(7, 3), x]))[7:]):
        torch.testing.assert_close(other, whole, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("model", [None, "own"])
def test_saved_and_loaded_detectors_score_alike(network, tmp_path, model):
    net = Residual().eval() if model else network
    d = TrustIntervalDetector(net, uniform_sigma(net, .2, norm=True), "kl_to_mean", n=4, seed=3, distribution="laplace").fit(held_out=images(100))
    again = Detector.load(d.save(tmp_path), model=Residual() if model else None)
    assert type(again) is TrustIntervalDetector and again.arguments() == d.arguments() and again.threshold == d.threshold
    assert torch.equal(again.predict(images(30, 1)), d.predict(images(30, 1)))
    d.siblings.grow(5).redraw(9)
    for use in (lambda: d.is_ood(images(3)), lambda: d.save(tmp_path)):
        with pytest.raises(NiooddError, match="grown or been redrawn"): use() # The threshold is of the siblings of before
    d.fit(held_out=images(100))
    again = Detector.load(d.save(tmp_path), model=Residual() if model else None)
    assert (again.siblings.n, again.siblings.seed) == (5, 9) and torch.equal(again.predict(images(30, 1)), d.predict(images(30, 1)))


def test_a_score_is_never_kept(detector, network):
    x = images(10)
    before = detector.predict(x)
    with torch.no_grad(): network.head.weight.mul_(2)
    after = detector.predict(x)
    fresh = TrustIntervalDetector(network, detector.learnt()).predict(x)
    assert not torch.allclose(before, after)
    torch.testing.assert_close(after, fresh, rtol=1e-4, atol=1e-4)


def test_drops_into_the_benchmark(detector, network):
    known, unknown, labels = images(60, 1), images(30, 2) // 4, torch.arange(60) % 3

    class Small(Benchmark):
        ood_names = ["dark"]
        def train_set(self): return TensorDataset(known, labels)
        def test_sets(self, known_=True, unknown_=True): return [TensorDataset(torch.cat([known, unknown]), torch.cat([labels, -torch.ones(30).long()]))]
    network.train()
    row, = Small().evaluate(detector, loader_kwargs=dict(batch_size=16))
    scores = torch.cat([detector.predict(x) for x in torch.cat([known, unknown]).split(16)])
    assert row["AUROC"] == pytest.approx(ood_metrics(scores[:60], scores[60:])["auroc"], abs=1e-12) and network.training


@pytest.mark.parametrize("make, word", [
    (lambda net: TrustIntervalDetector(net, uniform_sigma(net), n=1), "n is 1"), (lambda net: TrustIntervalDetector(net, uniform_sigma(net), "agreement"), "unknown measure"),
    (lambda net: TrustIntervalDetector(net, uniform_sigma(Classifier(5, size=8))), r"\[5, 128\] in the intervals, \[4, 128\]"),
    (lambda net: TrustIntervalDetector(net).predict(images(2)), "no intervals"), (lambda net: TrustIntervalDetector(net, uniform_sigma(net), distribution="gausian"), "gaussian"),
    (lambda net: TrustIntervalDetector(net, uniform_sigma(net)).is_ood(images(2)), "no threshold"),
    (lambda net: TrustIntervalDetector(net, uniform_sigma(net)).predict(images(2)[0]), "shape"), (lambda net: uniform_sigma(net, -1), "share is -1"),
    (lambda net: TrustIntervalDetector(net, uniform_sigma(net), n_known=-1), "n_known is -1"), (lambda net: TrustIntervalDetector(net, uniform_sigma(net), n_known=9).predict(images(2)), "n_known is 9 .* 4 outputs"),
    (lambda net: TrustIntervalDetector(net, uniform_sigma(net), classes=["a"]).predict(images(2)), "1 class names"), (lambda net: TrustIntervalDetector(net, uniform_sigma(net), classes=["a"], n_known=3), "1 class names for n_known=3"),
    (lambda net: TrustIntervalDetector(pair := Pair(), uniform_sigma(pair)).predict(images(2)), "returned tuple for 2 images")])
def test_bad_detectors(network, make, word):
    with pytest.raises(NiooddError, match=word) as e: make(network)
    assert "\n" not in str(e.value)


def test_weights_that_share_a_gradient():
    "Autograd returns one tensor for both terms of a sum, and a spread-out number for a mean; in several parts."
    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = (nn.Parameter(torch.randn(s)) for s in ((3, 4), (3, 4), (5,)))
        def forward(self, x): return nn.functional.linear(x.flatten(1), self.a + self.b) * self.c.mean()
    torch.manual_seed(0)
    trust, x, y = TrustIntervals(Sum(), sigma_init=0.3), torch.randn(300, 1, 2, 2), torch.randint(3, (300,))
    rho = {k: r.clone().requires_grad_() for k, r in trust.rho.items()}
    torch.manual_seed(1)
    z = []
    for e in [draw(trust.rho) for _ in range(2)]:
        a, b, c = (w.detach() + nn.functional.softplus(rho[k]) * e[k] for k, w in trust.model.named_parameters())
        z.append(nn.functional.linear(x.flatten(1), a + b) * c.mean())
    loss = -torch.stack(z).log_softmax(-1)[:, range(300), y].mean() + 2 * torch.stack(z).softmax(-1).var(0).sum(1).mean()
    torch.manual_seed(1)
    _, gradient = step_and_gradient(trust, x, y, lambda1=2.0, lambda2=0.0)
    assert trust.parts == {(2, 1, 2, 2): 256}
    for k, want in zip(rho, torch.autograd.grad(loss, rho.values())): assert torch.allclose(gradient[k], want, rtol=1e-3, atol=1e-6), k


# What networks and loaders there are besides

@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_uint8_images_for_a_network_of_another_dtype(network, dtype):
    net = copy.deepcopy(network).to(dtype)
    trust = TrustIntervals(net)
    trust.fit([(images(40), torch.arange(40) % 4)], steps=2, progress=False)
    d = TrustIntervalDetector(net, trust).fit(held_out=images(100))
    torch.testing.assert_close(d.predict(images(20, 1)), d.predict(to_input(images(20, 1)).to(dtype)), rtol=1e-6, atol=1e-6)


def test_the_detector_draws_as_the_intervals_were_learnt(network):
    trust = TrustIntervals(network, distribution="laplace")
    assert TrustIntervalDetector(network, trust).siblings.distribution == "laplace"
    assert TrustIntervalDetector(network, trust, distribution="cauchy").siblings.distribution == "cauchy"
    assert TrustIntervalDetector(network, trust.sigma()).siblings.distribution == "gaussian"


def test_held_out_images_without_as_many_labels(network):
    with pytest.raises(NiooddError, match="30 images and 20 labels"):
        TrustIntervals(network).fit([(images(10), torch.arange(10) % 4)], (images(30), torch.arange(20) % 4), steps=1, progress=False)


def test_a_label_that_cannot_be_names_the_outputs_there_are(network):
    with pytest.raises(NiooddError, match="-1 to 3, but the network has 4 outputs"):
        TrustIntervals(network).fit([(images(10), torch.arange(10) % 5 - 1)], steps=1, progress=False)


def test_a_loader_without_length(network):
    class Stream(IterableDataset):
        def __iter__(self): return iter([(images(1)[0], torch.tensor(1))] * 8)
    with pytest.raises(NiooddError, match="no length"): TrustIntervals(network).fit(DataLoader(Stream(), 4), progress=False)
    assert TrustIntervals(network).fit(DataLoader(Stream(), 4), steps=3, progress=False)[-1]["step"] == 3


class Behind(nn.Module):
    "A network behind something."
    def __init__(self, network, before, kept=True):
        super().__init__()
        self.network, self.before, self.kept = network, before, kept

    def forward(self, x):
        if self.kept: return self.network(self.before(x))
        with torch.no_grad(): return self.network(self.before(x) if x.sum() < 1e9 else x) # And cannot be traced


def test_a_forward_that_writes_to_its_input(network):
    net, x, y = Behind(network, lambda x: x.sub_(0.2).mul_(1.5)), to_input(images(30)), torch.arange(30) % 4
    before, trust = x.clone(), TrustIntervals(net)
    trust.fit([(x, y)], steps=2, progress=False)
    d = TrustIntervalDetector(net, trust)
    expected = TrustIntervalDetector(Behind(network, lambda x: (x - 0.2) * 1.5), trust.sigma()).predict(before)
    for _ in range(2): torch.testing.assert_close(d.predict(x), expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(x, before)


def test_no_gradient_is_said(network):
    with pytest.raises(NiooddError, match="no gradient"):
        TrustIntervals(Behind(network, nn.Identity(), kept=False)).fit([(images(10), torch.arange(10) % 4)], steps=1, progress=False)


def test_a_checkpoint_that_lacks_something(network, tmp_path):
    from nioodd.core.files import load_tensors, save_tensors
    file, batches = tmp_path / "learning.safetensors", [(images(20), torch.arange(20) % 4)]
    TrustIntervals(network).fit(batches, steps=2, progress=False, checkpoint=file)
    tensors, meta = load_tensors(file)
    for part in ("saved/0/head.weight", "rho/head.weight", "square/head.weight"):
        save_tensors(file, {k: t for k, t in tensors.items() if k != part}, meta)
        with pytest.raises(NiooddError, match="lacks some of its tensors"): TrustIntervals(network).fit(batches, steps=2, progress=False, checkpoint=file)


def test_which_finds_layers_with_weight_norm_and_heads_without_bias():
    norm = torch.nn.utils.parametrizations.weight_norm
    net = nn.Sequential(norm(nn.Conv2d(1, 4, 3)), nn.ReLU(), nn.Flatten(), norm(nn.Linear(4 * 36, 4, bias=False)))
    part = "parametrizations.weight.original"
    assert list(scales(net, "head")) == [f"3.{part}0", f"3.{part}1"]
    assert list(scales(net, "conv")) == ["0.bias", f"0.{part}0", f"0.{part}1"]


@pytest.mark.parametrize("wrapped, says", [(lambda n: nn.DataParallel(n), "model.module"), (lambda n: torch.jit.trace(n, torch.zeros(1, *SHAPE)), "TorchScript"),
                                           (lambda n: nn.Sequential(nn.Flatten(), nn.LazyLinear(3)), "lazy")])
def test_networks_whose_weights_cannot_be_replaced(network, wrapped, says):
    for make in (TrustIntervals, lambda n: Siblings(n, {"head.weight": torch.zeros(4, 128)})):
        with pytest.raises(NiooddError, match=says): make(wrapped(network))


@pytest.mark.parametrize("wrong, says", [(dict(steps=2.5), "steps is 2.5; expected an integer"), (dict(steps="3"), "steps is '3'"), (dict(draws=2.5), "draws is 2.5"), (dict(lambda2=None), "lambda2 is None; expected a number"),
                                         (dict(check_every=1.5), "check_every is 1.5"), (dict(lr=float("nan")), "lr is nan")])
def test_options_of_the_wrong_kind(network, wrong, says):
    with pytest.raises(NiooddError, match=says) as e: TrustIntervals(network).fit([(images(20), torch.arange(20) % 4)], **dict(steps=1) | wrong, progress=False)
    assert "\n" not in str(e.value)


def test_what_is_no_loader_and_what_are_no_intervals(network):
    for loader in (None, 3):
        with pytest.raises(NiooddError, match="pass a DataLoader"): TrustIntervals(network).fit(loader, steps=1, progress=False)
    def broken(): yield 1 + "1" # Somebody's own mistake is not called a missing loader
    with pytest.raises(TypeError, match="unsupported operand"): TrustIntervals(network).fit(broken(), steps=1, progress=False)
    for sigma in (3, {"head.weight": 0.1}):
        with pytest.raises(NiooddError, match="expected TrustIntervals, or tensors by parameter name"): TrustIntervalDetector(network, sigma)
    with pytest.raises(NiooddError, match="n is 2.5"): TrustIntervalDetector(network, TrustIntervals(network), n=2.5)


def test_a_network_that_was_converted_since(network):
    trust = TrustIntervals(network)
    network.double()
    with pytest.raises(NiooddError, match="float64 on cpu now, its interval is float32 on cpu"): trust.fit([(images(20), torch.arange(20) % 4)], steps=1, progress=False)


def test_numbers_from_numpy_are_kept_like_others(network, tmp_path):
    import numpy as np
    batches, options = [(images(20), torch.arange(20) % 4)], dict(steps=np.int64(2), lambda2=np.float32(0.5), seed=np.int64(1), progress=False, checkpoint=tmp_path / "learning.safetensors")
    trust = TrustIntervals(network, sigma_init=np.float32(0.25))
    rows = trust.fit(batches, **options)
    again = TrustIntervals.load(trust.save(tmp_path / "trust.safetensors"), network)
    assert again.options == trust.options and TrustIntervals(network, sigma_init=0.25).fit(batches, **options) == rows


def test_layers_that_the_answer_does_not_depend_on_are_named():
    class Auxiliary(nn.Module):
        def __init__(self):
            super().__init__()
            self.head, self.other = nn.Linear(64, 4), nn.Linear(64, 4)
        def forward(self, x): return self.head(x.flatten(1)) + (self.other(x.flatten(1)) if self.training else 0)
    with pytest.warns(UserWarning, match="do not depend on other.weight, other.bias; their intervals only grow"):
        TrustIntervals(Auxiliary()).fit([(images(20), torch.arange(20) % 4)], steps=1, progress=False)
