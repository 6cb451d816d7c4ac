"Siblings are the same everywhere, never of old weights, and leave the network as it was."
import copy
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from sibling_networks import NETWORKS, Functional, difference, one_by_one, sigma_of, tied, used
from torch import nn
from torch.nn.utils import prune

from nioodd.core.datasets import load
from nioodd.core.errors import NiooddError
from nioodd.core.models import Classifier
from nioodd.trust.detector import TrustIntervalDetector
from nioodd.trust.intervals import uniform_sigma
from nioodd.trust.siblings import DISTRIBUTIONS, Siblings, Watch, call_with, noise, plain_logits


@pytest.fixture(autouse=True)
def seeded():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


# Noise

def test_noise_is_a_function_of_its_arguments():
    shape = torch.Size([3, 2, 5])
    a = noise("w", shape, 3, 7)
    torch.randn(5)
    assert torch.equal(a, noise("w", shape, 3, 7)) and a.dtype == torch.float32 and a.shape == shape
    for other in (noise("v", shape, 3, 7), noise("w", shape, 4, 7), noise("w", shape, 3, 8)):
        assert not torch.equal(a, other)
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
    # The same siblings; only member 0 is another
    assert difference(Siblings(model, sigma_of(model), 3, 5, name, original=False).logits(x)[1:], z[1:]) <= 1e-6
    assert difference(z[0], model.eval()(x)) <= 1e-6
    assert difference(s.redraw(6).logits(x)[1], z[1]) > 1e-4
    assert torch.equal(s.redraw(5).logits(x)[:3], z)
    fewer = Siblings(model, {k: v for k, v in sigma_of(model).items() if "weight" in k}, 3, 5, name)
    assert all(torch.equal(fewer.weights(2)[k], s.weights(2)[k]) for k in fewer.sigma)  # whoever else takes part


# Errors

def test_errors():
    model = NETWORKS["linear"]()
    good = sigma_of(model)
    for arguments, words in [
        ((nn.ReLU(), good), "no parameters"),
        ((model, {}), "names no parameter"),
        ((model, {"1.wieght": good["1.weight"]}), "did you mean '1.weight'"),
        ((model, {"1.bias": torch.ones(3)}), "[3]; expected the parameter's, [20]"),
        ((model, {"1.bias": -good["1.bias"]}), "negative"),
        ((model, {"1.bias": good["1.bias"] * float("nan")}), "not finite"),
        ((model, good, 0), "n is 0"),
        ((model, good, 2, -1), "seed is -1"),
        ((model, good, 2, 0, "normal"), "unknown distribution"),
    ]:
        with pytest.raises(NiooddError) as e: Siblings(*arguments)
        assert words in str(e.value) and "\n" not in str(e.value)
    s = Siblings(model, good, 3)
    with pytest.raises(NiooddError, match="3 members already"): s.grow(2)
    with pytest.raises(NiooddError, match="seed is -1"): s.redraw(-1)
    with pytest.raises(NiooddError, match="no member 3"): s.weights(3)
    with pytest.raises(NiooddError, match="distribution"): noise("w", (2,), 0, 0, "x")


@pytest.mark.parametrize("sigma", [None, 3, {"1.weight": 0.1}])
def test_sigma_that_is_none(sigma):
    net = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
    with pytest.raises(NiooddError, match="expected tensors by parameter name"): Siblings(net, sigma)


def test_shapes_that_do_not_fit_say_so():
    model = Classifier(4)
    with pytest.raises(NiooddError, match="this network takes"):
        Siblings(model, sigma_of(model)).logits(torch.zeros(2, 1, 20, 20))


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


# Other weights for one call

def test_a_module_in_two_places_is_left_alone():
    "functional_call would leave the last sibling's weights in it (pytorch issue 164759)."
    model = tied()
    own, x = dict(model.named_parameters()), torch.randn(2, 3, 12, 12)
    z = plain_logits(model, [{"2.weight": torch.zeros(12, 12)}], x)
    assert all(p is own[k] for k, p in model.named_parameters())
    assert model[2].weight is model[6].weight is own["2.weight"]
    changed = tied()
    changed.load_state_dict(model.state_dict() | {f"{i}.weight": torch.zeros(12, 12) for i in (2, 4, 6)})
    with torch.no_grad(): assert torch.equal(z[0], changed(x))


def test_weights_come_back_after_an_error():
    model = NETWORKS["linear"]()
    before = dict(model.named_parameters())
    zeros = {"1.weight": torch.zeros(20, 432)}
    with pytest.raises(NiooddError, match="cannot take"): call_with(model, zeros, torch.zeros(1, 5))
    assert all(p is before[k] for k, p in model.named_parameters())


def test_other_weights_are_nobody_elses():
    "The network answers as ever while another thread calls it with other weights."
    model, x = NETWORKS["linear"]().eval(), torch.randn(2, 3, 12, 12)
    own, zeros = model(x).detach(), {"1.weight": torch.zeros(20, 432)}
    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(lambda: [call_with(model, zeros, x) for _ in range(200)])
        while not other.done(): assert torch.equal(model(x).detach(), own)
    first, *others = other.result()
    assert not torch.equal(first, own) and all(torch.equal(z, first) for z in others)


def test_a_weight_that_a_hook_computes_is_the_networks_own_afterwards():
    "The attribute, between two forward passes."
    layer = nn.Linear(432, 5)
    prune.l1_unstructured(layer, "weight", amount=0.3)
    net = nn.Sequential(nn.Flatten(), layer).eval()
    before, x = layer.weight, torch.randn(3, 3, 12, 12)
    s = Siblings(net, sigma_of(net), 2)
    z = s.logits(x)
    assert layer.weight is before and "hooks" in s.why_plain and torch.equal(z[0], net(x))
    assert difference(z[1], z[0]) > 1e-3


# The way they run

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


def with_a_hook():
    def double(module, args, y): return 2 * y
    model = nn.Sequential(nn.Flatten(), nn.Linear(432, 5))
    model[1].register_forward_hook(double)
    return model


def by_the_batch():
    norm = nn.BatchNorm2d(4, track_running_stats=False)
    return nn.Sequential(nn.Conv2d(3, 4, 3), norm, nn.Flatten(), nn.Linear(400, 5))


@pytest.mark.parametrize("make, why", [(Curious, "control flow"), (Mutating, "other logits"), (with_a_hook, "hooks"),
                                       (by_the_batch, "by the batch")])
def test_plain_where_it_must_be(make, why):
    "What cannot be rewritten runs one by one, exactly, and says why."
    model, x = make(), torch.randn(6, 3, 12, 12)
    s = Siblings(model, sigma_of(model))
    assert torch.equal(s.logits(x), one_by_one(s, x)) and why in s.why_plain


def test_empty_and_double():
    model = Classifier(4).double()
    s = Siblings(model, sigma_of(model))
    assert s.logits(torch.zeros(0, 1, 28, 28).double()).shape == (2, 0, 4)
    x = torch.rand(3, 1, 28, 28).double()
    assert difference(s.logits(x), one_by_one(s, x)) < 1e-12


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


def keeping():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), Position(), nn.Flatten(), nn.Linear(400, 5))


def expanded(): return Buffered(torch.full((1,), 0.5).expand(3, 12, 12))
def sparse(): return Buffered(torch.eye(3).to_sparse())
def not_a_number(): return Buffered(torch.full((3,), torch.nan))


@pytest.mark.parametrize("make", [keeping, Either, expanded, sparse, not_a_number])
def test_unusual_networks_are_run_and_left_as_they_were(make, monkeypatch):
    x, model = torch.randn(7, 3, 12, 12), make().eval()
    s = Siblings(model, sigma_of(model), 3)
    z = s.logits(x)
    assert difference(z, one_by_one(s, x)) < 2e-6 and isinstance(model(x), torch.Tensor)
    if make is not keeping: monkeypatch.setattr(Siblings, "weights", None)  # not drawn anew for nothing
    assert difference(s.logits(x), z) < 2e-6


# Changes

@pytest.mark.parametrize("name", ["grey", "functional"])
def test_never_of_old_weights(name, monkeypatch):
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
    def by_data(): conv.weight.data.mul_(1.3)
    def other_data(): last.bias.data = torch.randn(5)
    def buffer(): norm.running_var.add_(0.5)
    def loaded(): model.load_state_dict({k: v * 1.1 for k, v in model.state_dict().items()})
    def fifth(module, args, y): return y / 5
    def hook(): last.register_forward_hook(fifth)
    def unhook(): last._forward_hooks.clear()

    for change in (step, no_grad, replaced, by_data, other_data, buffer, loaded, hook, unhook):
        before = s.logits(x)
        change()
        assert difference(s.logits(x), before) > 1e-4, change
        assert difference(s.logits(x), one_by_one(s, x)) <= 2e-6, change
    monkeypatch.setattr(Siblings, "weights", None)  # nothing changes, so none is drawn
    s.logits(x)


def test_another_layer_without_weights():
    model = used(nn.Sequential(nn.Flatten(), nn.Linear(432, 20), nn.ReLU(), nn.Linear(20, 5)))
    s, x = Siblings(model, sigma_of(model)), torch.randn(4, 3, 12, 12)
    before, model[2] = s.logits(x), nn.Tanh()
    assert difference(s.logits(x), before) > 1e-3 and difference(s.logits(x), one_by_one(s, x)) <= 2e-6


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


def test_a_module_more_is_noticed():
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
    watch = Watch(model)
    assert not watch.changed()
    model.append(nn.ReLU())
    assert watch.changed()
    watch = Watch(model)
    del model[2]
    assert watch.changed()


def test_the_model_is_left_alone():
    model = used(Functional()).train()
    model.norm.eval()
    model.scale.requires_grad_(False)

    def state(): return [(m.training, len(m._forward_hooks)) for m in model.modules()]
    def parameters(): return [(id(p), p.requires_grad, p.grad) for p in model.parameters()]
    tensors, before, ids = {k: v.clone() for k, v in model.state_dict().items()}, state(), parameters()
    rng, x = torch.get_rng_state(), torch.randn(3, 3, 12, 12, generator=torch.Generator().manual_seed(0))
    Siblings(model, sigma_of(model)).grow(3).redraw(4).logits(x)
    assert all(torch.equal(v, tensors[k]) for k, v in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), rng) and state() == before and parameters() == ids


def test_constants_that_forward_makes_are_not_left_in_the_model():
    class Normalised(nn.Sequential):
        def forward(self, x):
            return super().forward((x - torch.tensor(.13)) / torch.tensor([.3, .2, .1]).view(3, 1, 1))
    layers = nn.Conv2d(3, 8, 5), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(512, 5)
    model = used(Normalised(*layers))
    before, s, x = vars(model).keys() - {}, Siblings(model, sigma_of(model)), torch.randn(4, 3, 12, 12)
    for seed in range(3):
        assert difference(s.redraw(seed).logits(x), one_by_one(s, x)) <= 2e-6 and s.why_plain is None
        assert vars(model).keys() == before


# Threads and pickles

def test_threads_do_not_see_each_others_siblings():
    class Untraceable(nn.Module):
        def __init__(self):
            super().__init__()
            layers = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(800, 5)
            self.net = nn.Sequential(*layers)

        def forward(self, x): return self.net(x) if x.sum() < 1e9 else x
    model, x = Untraceable().eval(), torch.randn(4, 3, 12, 12)
    weights = {k: v.clone() for k, v in model.state_dict().items()}
    s = Siblings(model, sigma_of(model, 0.5), 3)
    z = s.logits(x)
    assert s.why_plain
    with ThreadPoolExecutor(4) as pool: found = list(pool.map(s.logits, [x] * 60))
    assert all(torch.allclose(f, z) for f in found)
    assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("name", ["grey", "dense", "functional"])
def test_siblings_that_have_answered_are_pickled_and_copied(name):
    model = used(NETWORKS[name]()).eval()
    s, x = Siblings(model, sigma_of(model), 3), torch.randn(5, 1 if name == "grey" else 3, 12, 12)
    z = s.logits(x)
    s.logits(x[:1])
    for other in (pickle.loads(pickle.dumps(s)), copy.deepcopy(s)):
        assert torch.equal(other.logits(x), z) and other.model is not s.model


def test_a_detector_that_has_judged_is_pickled():
    layers = nn.Conv2d(1, 8, 3), nn.ReLU(), nn.MaxPool2d(4), nn.Flatten(), nn.Linear(288, 10)
    net, images = nn.Sequential(*layers).eval(), load("digits5k", "test").images
    d = TrustIntervalDetector(net, uniform_sigma(net)).fit(held_out=images[:100])
    scores = d.predict(images[:10])
    d.predict(images[:1])
    assert torch.equal(pickle.loads(pickle.dumps(d)).predict(images[:10]), scores)
