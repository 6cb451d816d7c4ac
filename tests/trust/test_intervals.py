"Intervals: which weights, the loss and its gradient, learning, the stopping rule, files."
import copy
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset
from trust_networks import SHAPE, Auxiliary, Behind, Residual, images, small_network

from nioodd.core.errors import NiooddError
from nioodd.core.files import load_tensors, save_tensors
from nioodd.core.images import to_input
from nioodd.core.models import Classifier, _vgg_stage, architecture
from nioodd.trust.detector import TrustIntervalDetector
from nioodd.trust.intervals import (
    REGULARISERS,
    LearningOptions,
    TrustIntervals,
    draw,
    scales,
    strength,
    uniform_sigma,
    why_stop,
)
from nioodd.trust.siblings import DISTRIBUTIONS, Siblings


@pytest.fixture(autouse=True)
def own_randomness():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


@pytest.fixture
def network(): return small_network()


def classes(n, k=4): return torch.arange(n) % k


def batch_of(n): return images(n), classes(n)


# Which parameters

def test_parameters_by_choice():
    net = Residual()
    assert list(scales(net)) == ["gain", "first.weight", "second.weight", "second.bias", "head.weight", "head.bias"]
    assert list(scales(net, "conv")) == ["first.weight", "second.weight", "second.bias"]
    assert list(scales(net, "head")) == list(scales(net, "head", norm=True)) == ["head.weight", "head.bias"]
    assert {"norm.weight", "norm.bias"} == scales(net, norm=True).keys() - scales(net).keys()
    of_second = scales(net)["second.weight"]
    assert scales(net)["second.bias"] == of_second == pytest.approx(net.second.weight.std().item(), rel=1e-6)
    s = uniform_sigma(net, .3, norm=True)
    assert strength(net, s) == pytest.approx(.3)
    assert all(s[k].shape == p.shape for k, p in net.named_parameters() if k in s)


def test_odd_parameters():
    "RMS norm is a norm; an empty parameter is none; spectral norm is not moved on by looking at it."
    assert list(scales(nn.Sequential(nn.Linear(8, 8, bias=False), nn.RMSNorm(8)))) == ["0.weight"]
    empty = nn.Linear(8, 8)
    empty.spare = nn.Parameter(torch.empty(0))
    assert list(scales(empty)) == ["weight", "bias"]
    net = nn.Sequential(nn.Flatten(), nn.utils.parametrizations.spectral_norm(nn.Linear(64, 4))).train()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    trust = TrustIntervals(net)
    trust.fit([batch_of(32)], progress=False)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items()) and net.training


def test_weights_that_eval_mode_does_not_use():
    with torch.no_grad():
        trust = TrustIntervals(Auxiliary())
        trust.fit([batch_of(32)], steps=3, progress=False)
    assert all(r.isfinite().all() for r in trust.rho.values()) and len(trust.rho) == 6
    with pytest.raises(NiooddError, match="which='head' found second.weight, but the network has 4 outputs"):
        TrustIntervals(Auxiliary(), "head").fit([batch_of(8)], progress=False)


def test_no_parameters():
    for net in (nn.Flatten(), nn.Sequential(nn.BatchNorm2d(3))):
        for make in (TrustIntervals, uniform_sigma):
            with pytest.raises(NiooddError, match="has no parameters"): make(net)
    with pytest.raises(NiooddError, match="has no parameters for which='conv'"): TrustIntervals(nn.Linear(3, 3), "conv")
    assert list(TrustIntervals(nn.Sequential(nn.BatchNorm2d(3)), norm=True).rho) == ["0.weight", "0.bias"]


def test_which_finds_layers_with_weight_norm_and_heads_without_bias():
    norm = torch.nn.utils.parametrizations.weight_norm
    net = nn.Sequential(norm(nn.Conv2d(1, 4, 3)), nn.ReLU(), nn.Flatten(), norm(nn.Linear(4 * 36, 4, bias=False)))
    part = "parametrizations.weight.original"
    assert list(scales(net, "head")) == [f"3.{part}0", f"3.{part}1"]
    assert list(scales(net, "conv")) == ["0.bias", f"0.{part}0", f"0.{part}1"]


BAD_CONSTRUCTION = [
    (dict(which="convs"), "did you mean 'conv'"),
    (dict(distribution="gauss"), "gaussian"),
    (dict(sigma_init=0), "sigma_init"),
    (dict(sigma_init=.5, sigma_max=.2), "sigma_max"),
]


@pytest.mark.parametrize("arguments, word", BAD_CONSTRUCTION)
def test_bad_construction(network, arguments, word):
    with pytest.raises(NiooddError, match=word): TrustIntervals(network, **arguments)


def test_bad_noise_of_one_size(network):
    with pytest.raises(NiooddError, match="share is -1"): uniform_sigma(network, -1)


def test_weights_that_are_not_finite(network):
    with torch.no_grad(): network.head.weight[0, 0] = float("nan")
    with pytest.raises(NiooddError, match="not finite"): TrustIntervals(network)


WRAPPED = [
    (lambda n: torch.jit.trace(n, torch.zeros(1, *SHAPE)), "TorchScript"),
    (lambda n: nn.Sequential(nn.Flatten(), nn.LazyLinear(3)), "lazy"),
]


@pytest.mark.parametrize("wrapped, says", WRAPPED)
def test_networks_whose_weights_cannot_be_replaced(network, wrapped, says):
    with pytest.raises(NiooddError, match=says): TrustIntervals(wrapped(network))
    with pytest.raises(NiooddError, match=says): Siblings(wrapped(network), {"head.weight": torch.zeros(4, 128)})


# One step

LEFT_AS_IT_WAS = [
    (small_network, {}),
    (Residual, {}),
    (Residual, dict(norm=True)),
    (Residual, dict(which="head")),
    (Residual, dict(which="conv")),
]


@pytest.mark.parametrize("make, options", LEFT_AS_IT_WAS)
def test_the_network_is_left_as_it_was(make, options):
    net = make()
    net.train()
    net.get_submodule("head").eval()
    state, modes = copy.deepcopy(net.state_dict()), [m.training for m in net.modules()]
    flags = [p.requires_grad for p in net.parameters()]
    random = torch.random.get_rng_state()
    trust = TrustIntervals(net, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trust.fit([batch_of(80)] * 3, progress=False)
    assert all(torch.equal(state[k], v) for k, v in net.state_dict().items())
    assert modes == [m.training for m in net.modules()]
    assert flags == [p.requires_grad for p in net.parameters()] and all(p.grad is None for p in net.parameters())
    assert torch.equal(random, torch.random.get_rng_state())
    assert all((s > 0).all() for s in trust.sigma().values())
    assert trust.sigma().keys() == scales(net, **options).keys()


@pytest.mark.parametrize("regulariser", REGULARISERS)
def test_regularisers_widen_and_the_cap_holds(network, regulariser):
    trust, x, y = TrustIntervals(network, sigma_max=.15), to_input(images(8)), classes(8)
    before = trust.regulariser(regulariser)
    for _ in range(60): trust.step(x, y, regulariser=regulariser, lambda2=1e6)
    assert trust.regulariser(regulariser) < before
    assert strength(network, trust.sigma()) == pytest.approx(.15, rel=1e-3)


def test_a_regulariser_of_ones_own_is_one_definition(network):
    @REGULARISERS.register()
    def half(ratios): return sum(-r.sum() for r in ratios) / 2
    try:
        trust = TrustIntervals(network)
        before = strength(network, trust.sigma())
        trust.step(to_input(images(8)), classes(8), regulariser="half", lambda2=1e6)
        assert strength(network, trust.sigma()) > before and trust.regulariser("half") < 0
    finally: del REGULARISERS["half"]


def test_steps_are_those_of_rmsprop(network):
    trust, x, y = TrustIntervals(network), to_input(images(8)), classes(8)
    rho = {k: r.clone().requires_grad_() for k, r in trust.rho.items()}
    pytorch = torch.optim.RMSprop(rho.values(), eps=1e-16)
    for i, lr in enumerate((.01, .01, .002, .03)):
        torch.manual_seed(i)
        _, gradient = trust.gradient(x, y, lr=lr)
        torch.manual_seed(i)
        trust.step(x, y, lr=lr)
        for k, r in rho.items(): r.grad = gradient[k]
        pytorch.param_groups[0]["lr"] = lr
        pytorch.step()
        for k, r in rho.items(): torch.testing.assert_close(trust.rho[k], r.detach(), rtol=1e-5, atol=1e-6)


def test_an_interval_is_never_less_than_a_hundred_millionth_of_the_scale(network):
    trust, x, y = TrustIntervals(network, sigma_init=1e-7), to_input(images(64)), classes(64)
    for _ in range(20): trust.step(x, y, lambda2=0, lr=.5)
    narrowest = {k: s.min() / trust.scale[k] for k, s in trust.sigma().items()}
    assert all(n >= .999e-8 for n in narrowest.values())
    assert any(n < 1.001e-8 for n in narrowest.values())  # Some would have gone on


@pytest.mark.parametrize("scale", [1, 1e-10, 1e-20])
@pytest.mark.parametrize("sigma", [1e-8, .05])
def test_the_slope_of_a_regulariser_is_finite(network, sigma, scale):
    with torch.no_grad(): network.head.weight.mul_(scale), network.head.bias.mul_(scale)
    trust, x, y = TrustIntervals(network, sigma_init=sigma), to_input(images(8)), classes(8)
    for name in REGULARISERS:
        _, gradient = trust.gradient(x, y, regulariser=name)
        assert all(g.isfinite().all() for g in gradient.values())
        trust.step(x, y, regulariser=name)
        assert all(r.isfinite().all() for r in trust.rho.values())


def test_without_a_regulariser_siblings_come_to_agree(network):
    with torch.no_grad(): network.head.weight.mul_(50)  # a confident network has something to lose
    trust, x = TrustIntervals(network, sigma_init=.3), to_input(images(64))
    y = network(x).argmax(1)
    found = [trust.step(x, y, lambda2=0) for _ in range(60)]
    for term in ("nll", "variance"):
        assert sum(t[term] for t in found[-10:]) < 0.95 * sum(t[term] for t in found[:10])


def reference(trust, x, y, draws, run, lambda1, lambda2, regulariser):
    "NLL, ΣVar and the gradient by ρ, by autograd through everything; `run(weights, x)` gives logits."
    rho = {k: r.clone().requires_grad_() for k, r in trust.rho.items()}
    sigma = {k: r.exp().log1p() for k, r in rho.items()}
    own = {k: p.detach() for k, p in trust.model.named_parameters()}
    z = []
    for e in [draw(trust.rho) for _ in range(draws)]:
        sibling = own | {k: own[k] + s * e[k] for k, s in sigma.items()}
        z.append(run(sibling, x))
    p = torch.stack(z).softmax(-1)
    nll, variance = -p[:, range(len(y)), y].log().mean(), p.var(0).sum(1).mean()
    R = REGULARISERS[regulariser](s / trust.scale[k] for k, s in sigma.items())
    gradient = torch.autograd.grad(nll + lambda1 * variance + lambda2 * R, list(rho.values()))
    return dict(nll=nll.item(), variance=variance.item()), dict(zip(rho, gradient))


@pytest.mark.parametrize("regulariser", REGULARISERS)
def test_the_gradient_is_that_of_the_loss(network, regulariser):
    trust, x, y = TrustIntervals(network, sigma_init=.3), to_input(images(150)), classes(150)
    for r in trust.rho.values(): r.sub_(torch.rand_like(r))
    def run(weights, x): return torch.func.functional_call(network, weights, (x,))
    torch.manual_seed(3)
    terms, gradient = trust.gradient(x, y, regulariser=regulariser, lambda1=2, lambda2=.5, draws=3)
    torch.manual_seed(3)
    want, by_hand = reference(trust, x, y, 3, run, 2, .5, regulariser)
    assert terms == pytest.approx(want, rel=1e-4)
    for k, g in by_hand.items(): torch.testing.assert_close(gradient[k], g, rtol=1e-3, atol=1e-6)


def test_weights_that_share_a_gradient():
    "Autograd returns one tensor for both terms of a sum, and a spread-out number for a mean."
    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = (nn.Parameter(torch.randn(s)) for s in ((3, 4), (3, 4), (5,)))
        def forward(self, x): return nn.functional.linear(x.flatten(1), self.a + self.b) * self.c.mean()
    trust, x, y = TrustIntervals(Sum(), sigma_init=0.3), torch.randn(300, 1, 2, 2), torch.randint(3, (300,))
    def run(w, x): return nn.functional.linear(x.flatten(1), w["a"] + w["b"]) * w["c"].mean()
    torch.manual_seed(1)
    _, want = reference(trust, x, y, 2, run, 2.0, 0.0, "neg_log")
    torch.manual_seed(1)
    _, gradient = trust.gradient(x, y, lambda1=2.0, lambda2=0.0)
    for k, g in want.items(): assert torch.allclose(gradient[k], g, rtol=1e-3, atol=1e-6), k


def narrow_c2():
    "Two stages of C2's five, of 8 and 12 channels in the place of 64 and 128, and its linear layers."
    stages = [*_vgg_stage(3, 8, 2), *_vgg_stage(8, 12, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*stages, nn.Linear(12, 16), nn.ReLU(), nn.Dropout(0.5), nn.Linear(16, 4))


def trained(name):
    "A network of paper 2, C2 with few channels, in double precision, its batch norms as after training."
    torch.manual_seed(0)
    net = (narrow_c2() if name == "C2" else architecture(name, 4, 3, 16)).double()
    for m in net.modules():
        if not isinstance(m, nn.BatchNorm2d): continue
        m.running_mean.normal_(0, .3), m.running_var.uniform_(.5, 2)
        nn.init.uniform_(m.weight, -1.5, 1.5), nn.init.normal_(m.bias, 0, .2)
    return net.eval()


@pytest.mark.parametrize("name", ["C2", "C3", "C4", "C5"])
def test_a_step_on_the_simplified_network_is_one_on_the_network(name, monkeypatch):
    net = trained(name)
    x, y = torch.randn(3, 3, 16, 16).double(), classes(3)
    def two_steps():
        trust = TrustIntervals(net, sigma_init=.1)
        torch.manual_seed(1)
        first, (second, gradient) = trust.step(x, y), trust.gradient(x, y)
        return [*first.values(), *second.values()], gradient, trust.learning_network(x)
    terms, gradient, simplified = two_steps()
    assert simplified.factor and simplified.network is not net
    monkeypatch.setattr("nioodd.trust.intervals.fused", lambda model, noisy, x: type(simplified)(model, {}))
    plain_terms, plain_gradient, plain = two_steps()
    assert plain.network is net
    assert terms == pytest.approx(plain_terms, rel=1e-7)
    for k in gradient: torch.testing.assert_close(gradient[k], plain_gradient[k], rtol=1e-4, atol=1e-8)


def test_a_step_after_the_network_was_changed():
    net, x, y = trained("C3"), torch.randn(5, 3, 16, 16).double(), classes(5)
    trust = TrustIntervals(net)
    trust.step(x, y)
    before = trust.learning_network(x)
    trust.step(x, y)
    assert trust.learning_network(x) is before
    next(m for m in net.modules() if isinstance(m, nn.BatchNorm2d)).running_var.mul_(4)  # with this the factors
    trust.step(x, y)
    assert trust.learning_network(x) is not before
    torch.testing.assert_close(trust.learning_network(x).network(x), net(x))


def test_what_is_not_simplified():
    """Norms that are noisy, hooks, what cannot be traced, and one kind of shared weight.

    Another layer shares it with a convolution before a norm."""
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = (nn.Conv2d(3, 3, 3, padding=1) for _ in range(2))
            self.norm, self.head = nn.BatchNorm2d(3), nn.Linear(3, 4)
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
    noisy_norms = TrustIntervals(architecture("C3", 4, 3, 16), norm=True)
    x, y = torch.randn(5, 3, 16, 16), classes(5)
    for trust in (noisy_norms, TrustIntervals(hooked), TrustIntervals(Loop()), TrustIntervals(Tied())):
        trust.step(x, y)
        network, factor = trust.learning_network(x)
        assert network is trust.model and not factor


def test_a_network_that_was_converted_since(network):
    trust = TrustIntervals(network)
    network.double()
    with pytest.raises(NiooddError, match="float64 on cpu now, its interval is float32 on cpu"):
        trust.fit([batch_of(20)], steps=1, progress=False)


def test_float16_is_refused_before_anything_moves(network):
    trust = TrustIntervals(network.half())
    before = {k: r.clone() for k, r in trust.rho.items()}
    with pytest.raises(NiooddError, match="weights are float16"):
        trust.step(to_input(images(4)).half(), torch.zeros(4).long())
    assert all(torch.equal(before[k], r) for k, r in trust.rho.items())


def test_a_loss_that_is_not_finite_names_the_term_and_changes_nothing(network):
    trust = TrustIntervals(network)
    before = {k: r.clone() for k, r in trust.rho.items()}
    with pytest.raises(NiooddError, match="the nll of the trust intervals became nan"):
        trust.step(torch.full((4, *SHAPE), float("nan")), torch.zeros(4).long())
    assert all(torch.equal(before[k], r) for k, r in trust.rho.items())


def test_no_gradient_is_said(network):
    net = Behind(network, nn.Identity(), kept=False)
    with pytest.raises(NiooddError, match="no gradient"):
        TrustIntervals(net).fit([batch_of(10)], steps=1, progress=False)


# Learning

@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_every_distribution_learns_and_is_kept(network, distribution, tmp_path):
    trust = TrustIntervals(network, distribution=distribution, sigma_init=.01)
    trust.step(to_input(images(8)), classes(8))
    again = TrustIntervals.load(trust.save(tmp_path/"t.safetensors"), network)
    assert again.distribution == distribution and again.siblings(3).distribution == distribution
    x = to_input(images(5))
    assert torch.equal(again.siblings(3, seed=7).logits(x), trust.siblings(3, seed=7).logits(x))


@pytest.mark.filterwarnings("ignore")
def test_fit_repeats_itself_and_reports(network):
    loader = DataLoader(TensorDataset(*batch_of(96)), batch_size=32, shuffle=True)
    found = []
    for _ in range(2):
        trust = TrustIntervals(network)
        trust.fit(loader, (images(30, 1), classes(30)), steps=7, check_every=3, seed=5, progress=False, draws=3)
        found.append(trust.rho)
    assert all(torch.equal(r, found[1][k]) for k, r in found[0].items())
    rows = TrustIntervals(network).fit(loader, progress=False)
    assert [r["step"] for r in rows] == [0, 3] and rows[-1]["stopped"] == "all steps were made"
    assert "nll" in rows[-1] and "nll" not in rows[0] and rows[-1]["regulariser"] < rows[0]["regulariser"]


def test_checks_are_made_at_multiples_and_at_the_end(network):
    rows = TrustIntervals(network, sigma_init=1e-4).fit([batch_of(8)], steps=8, check_every=3, progress=False)
    assert [r["step"] for r in rows] == [0, 3, 6, 8]


def test_options_come_as_an_object_or_by_name(network):
    options, found = LearningOptions(lambda2=.5, draws=3), []
    for given in (dict(options=options), dict(lambda2=.5, draws=3), dict(options=LearningOptions(draws=3), lambda2=.5)):
        found.append(TrustIntervals(network).fit([batch_of(20)], steps=2, progress=False, **given))
    assert found[0] == found[1] == found[2]


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
    with pytest.warns(UserWarning, match="points of accuracy.*lower lambda2") as caught:
        TrustIntervals(network, sigma_init=1).fit([(x, y)], progress=False)
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        TrustIntervals(network, sigma_init=1e-4).fit([(x, y)], progress=False)


def test_layers_that_the_answer_does_not_depend_on_are_named():
    class TwoHeads(nn.Module):
        def __init__(self):
            super().__init__()
            self.head, self.other = nn.Linear(64, 4), nn.Linear(64, 4)
        def forward(self, x): return self.head(x.flatten(1)) + (self.other(x.flatten(1)) if self.training else 0)
    said = "do not depend on other.weight, other.bias; their intervals only grow"
    with pytest.warns(UserWarning, match=said) as caught:
        TrustIntervals(TwoHeads()).fit([batch_of(20)], steps=1, progress=False)
    assert caught[0].filename == __file__


# Options and loaders that cannot be

NO_IMAGES = images(0), torch.zeros(0).long()
BAD_OPTIONS = [
    (dict(draws=1), "draws is 1"),
    (dict(lambda1=-.1), "lambda1 is -0.1"),
    (dict(lambda2=-1), "lambda2 is -1"),
    (dict(lambda2=float("nan")), "lambda2 is nan"),
    (dict(regulariser="log"), "unknown regulariser"),
    (dict(steps=0), "steps is 0"),
    (dict(lr=-.01), "lr is -0.01"),
    (dict(check_every=0), "check_every is 0"),
    (dict(patience=0), "patience is 0"),
    (dict(held_out=NO_IMAGES), "no held-out images"),
]


@pytest.mark.parametrize("options, word", BAD_OPTIONS)
def test_bad_options(network, options, word):
    with pytest.raises(NiooddError, match=word): TrustIntervals(network).fit([batch_of(8)], progress=False, **options)


OF_THE_WRONG_KIND = [
    (dict(steps=2.5), "steps is 2.5; expected an integer"),
    (dict(steps="3"), "steps is '3'"),
    (dict(draws=2.5), "draws is 2.5; expected int"),
    (dict(lambda2=None), "lambda2 is None; expected float"),
    (dict(check_every=1.5), "check_every is 1.5"),
    (dict(lr=float("nan")), "lr is nan"),
]


@pytest.mark.parametrize("wrong, says", OF_THE_WRONG_KIND)
def test_options_of_the_wrong_kind(network, wrong, says):
    with pytest.raises(NiooddError, match=says) as e:
        TrustIntervals(network).fit([batch_of(20)], **dict(steps=1) | wrong, progress=False)
    assert "\n" not in str(e.value)


BAD_LOADERS = [
    ([images(8)], "without labels"),
    ([(images(8),)], "without labels"),
    (DataLoader(TensorDataset(images(8))), "without labels"),
    ([], "steps is 0"),
    ((b for b in []), "no length"),
    ([(images(8), torch.arange(8))], "labels run from 0 to 7, but the network has 4 outputs"),
    ([(images(8), -torch.ones(8).long())], "labels run from -1"),
    ([(images(8), torch.rand(8))], "float32"),
    ([(images(8), torch.zeros(7).long())], r"\[7\] for 8 images"),
    ([(torch.full((8, *SHAPE), float("nan")), torch.zeros(8).long())], "nan|NaN"),
    ([(images(8), torch.zeros(8).long()), NO_IMAGES], "images in a batch is 0"),
]


@pytest.mark.parametrize("loader, word", BAD_LOADERS)
def test_bad_loaders(network, loader, word):
    with pytest.raises(NiooddError, match=word) as e: TrustIntervals(network).fit(loader, progress=False)
    assert "\n" not in str(e.value)


def test_what_is_no_loader(network):
    for loader in (None, 3):
        with pytest.raises(NiooddError, match="pass a DataLoader"):
            TrustIntervals(network).fit(loader, steps=1, progress=False)
    def broken(): yield 1 + "1"  # Somebody's own mistake is not called a missing loader
    with pytest.raises(TypeError, match="unsupported operand"):
        TrustIntervals(network).fit(broken(), steps=1, progress=False)


def test_a_loader_without_length(network):
    class Stream(IterableDataset):
        def __iter__(self): return iter([(images(1)[0], torch.tensor(1))] * 8)
    with pytest.raises(NiooddError, match="no length"):
        TrustIntervals(network).fit(DataLoader(Stream(), 4), progress=False)
    assert TrustIntervals(network).fit(DataLoader(Stream(), 4), steps=3, progress=False)[-1]["step"] == 3


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint8])
def test_labels_of_any_integer_kind(network, dtype):
    y, rows = classes(32), []
    for labels in (y, y.to(dtype)):
        rows.append(TrustIntervals(network, sigma_init=1e-4).fit([(images(32), labels)], progress=False))
    assert rows[0] == rows[1]


def test_held_out_images_without_as_many_labels(network):
    with pytest.raises(NiooddError, match="30 images and 20 labels"):
        TrustIntervals(network).fit([batch_of(10)], (images(30), classes(20)), steps=1, progress=False)


def test_a_label_that_cannot_be_names_the_outputs_there_are(network):
    with pytest.raises(NiooddError, match="-1 to 3, but the network has 4 outputs"):
        TrustIntervals(network).fit([(images(10), torch.arange(10) % 5 - 1)], steps=1, progress=False)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_uint8_images_for_a_network_of_another_dtype(network, dtype):
    net = copy.deepcopy(network).to(dtype)
    trust = TrustIntervals(net)
    trust.fit([batch_of(40)], steps=2, progress=False)
    d = TrustIntervalDetector(net, trust).fit(held_out=images(100))
    x = images(20, 1)
    torch.testing.assert_close(d.predict(x), d.predict(to_input(x).to(dtype)), rtol=1e-6, atol=1e-6)


def test_a_forward_that_writes_to_its_input(network):
    net, x, y = Behind(network, lambda x: x.sub_(0.2).mul_(1.5)), to_input(images(30)), classes(30)
    before, trust = x.clone(), TrustIntervals(net)
    trust.fit([(x, y)], steps=2, progress=False)
    d = TrustIntervalDetector(net, trust)
    harmless = Behind(network, lambda x: (x - 0.2) * 1.5)
    expected = TrustIntervalDetector(harmless, trust.sigma()).predict(before)
    for _ in range(2): torch.testing.assert_close(d.predict(x), expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(x, before)


# Files

def test_files_of_another_architecture(network, tmp_path):
    file = TrustIntervals(network).save(tmp_path/"t.safetensors")
    with pytest.raises(NiooddError) as e: TrustIntervals.load(file, Classifier(5, size=8))
    assert "head.weight is [4, 128] in the intervals, [5, 128] in the network" in str(e.value)
    assert "head.bias is [4]" in str(e.value) and "\n" not in str(e.value)
    with pytest.raises(NiooddError, match=r"is not in the network"): TrustIntervals.load(file, Residual())
    bigger = nn.Sequential()
    for k, m in network.named_children(): bigger.add_module(k, m)
    bigger.add_module("more", nn.Linear(4, 4))
    with pytest.raises(NiooddError, match="no intervals for more.bias, more.weight"): TrustIntervals.load(file, bigger)


def test_files_that_are_something_else(network, tmp_path):
    with pytest.raises(NiooddError, match="does not exist"): TrustIntervals.load(tmp_path/"absent", network)
    weights = save_tensors(tmp_path/"a", network.state_dict())
    with pytest.raises(NiooddError, match="no trust intervals"): TrustIntervals.load(weights, network)
    others = ((1, "no trust intervals"), (dict(trust=None), "no trust intervals"),
              (dict(trust=dict(wich="all")), "does not know .*wich"))
    for meta, word in others:
        file = save_tensors(tmp_path/"b", TrustIntervals(network).rho, meta)
        with pytest.raises(NiooddError, match=word): TrustIntervals.load(file, network)


def test_a_checkpoint_that_lacks_something(network, tmp_path):
    file, batches = tmp_path / "learning.safetensors", [batch_of(20)]
    TrustIntervals(network).fit(batches, steps=2, progress=False, checkpoint=file)
    tensors, meta = load_tensors(file)
    for part in ("saved/0/head.weight", "rho/head.weight", "square/head.weight"):
        save_tensors(file, {k: t for k, t in tensors.items() if k != part}, meta)
        with pytest.raises(NiooddError, match="lacks some of its tensors"):
            TrustIntervals(network).fit(batches, steps=2, progress=False, checkpoint=file)


def test_a_checkpoint_of_something_else(network, tmp_path):
    file, batches = tmp_path / "learning.safetensors", [batch_of(20)]
    TrustIntervals(network).fit(batches, steps=2, progress=False, checkpoint=file)
    with pytest.raises(NiooddError, match=r"begun in another way \(lambda2: 0.02 → 0.5\)"):
        TrustIntervals(network).fit(batches, steps=2, progress=False, checkpoint=file, lambda2=.5)
    with pytest.raises(NiooddError, match="begun with another network or other images"):
        TrustIntervals(network).fit(batches, (images(30, 1), classes(30)), steps=2, progress=False, checkpoint=file)
    with pytest.raises(NiooddError, match=r"begun in another way \(no trust intervals\)"):
        weights = save_tensors(tmp_path / "weights", network.state_dict())
        TrustIntervals(network).fit(batches, steps=2, progress=False, checkpoint=weights)


def test_a_checkpoint_that_names_only_the_options_that_were_given(network, tmp_path):
    "As earlier versions wrote it."
    file, batches = tmp_path / "learning.safetensors", [batch_of(20)]
    rows = TrustIntervals(network).fit(batches, steps=2, progress=False, checkpoint=file)
    tensors, meta = load_tensors(file)
    for k in ("regulariser", "lambda1", "lambda2", "draws", "lr"): del meta["begun"][k]
    save_tensors(file, tensors, meta)
    assert TrustIntervals(network).fit(batches, steps=2, progress=False, checkpoint=file) == rows


def test_numbers_from_numpy_are_kept_like_others(network, tmp_path):
    batches, checkpoint = [batch_of(20)], tmp_path / "learning.safetensors"
    options = dict(steps=np.int64(2), lambda2=np.float32(0.5), seed=np.int64(1), progress=False, checkpoint=checkpoint)
    trust = TrustIntervals(network, sigma_init=np.float32(0.25))
    rows = trust.fit(batches, **options)
    again = TrustIntervals.load(trust.save(tmp_path / "trust.safetensors"), network)
    assert again.options == trust.options
    assert TrustIntervals(network, sigma_init=0.25).fit(batches, **options) == rows
