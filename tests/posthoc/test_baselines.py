"Every post-hoc detector of pytorch-ood runs on shared outputs, by its own code; ours does what its formula says."
import copy
import math

import pytest
import pytorch_ood.detector as ood
import torch
from torch import nn
from torch.distributions import Normal, kl_divergence

from nioodd.core.errors import NiooddError
from nioodd.core.forward import as_input
from nioodd.core.models import Classifier, architecture
from nioodd.core.scores import entropy, msp
from nioodd.core.training import train_epoch
from nioodd.posthoc.baselines import (
    BASELINES,
    EPSILONS,
    NOT_RUN,
    FitData,
    bayes_adapter,
    ensemble_score,
    kl_per_image,
    odin_grid,
    odin_logits,
    stages,
    vim_dimension,
)
from nioodd.posthoc.outputs import Outputs, network_outputs

K, SIZE = 4, 10


def patterns(n, seed):
    "Four kinds of stripes, uint8 [n, 1, SIZE, SIZE], and their labels."
    rng = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % K
    grid = torch.arange(SIZE)
    stripes = torch.stack([(grid % 4 < 2).expand(SIZE, SIZE), (grid % 4 < 2)[:, None].expand(SIZE, SIZE),
                           ((grid + grid[:, None]) % 6 < 3), (grid + grid[:, None]) < SIZE]).float()
    return (200 * stripes[y] + 80 * torch.rand(n, SIZE, SIZE, generator=rng) - 20).clamp(0, 255).to(torch.uint8)[:,
        None], y


def network():
    return nn.Sequential(nn.Conv2d(1, 6, 3, padding=1), nn.MaxPool2d(2), nn.ReLU(), nn.Conv2d(6, 12, 3, padding=1),
                         nn.ReLU(), nn.Flatten(),
                         nn.Linear(12 * 25, 24), nn.ReLU(), nn.Linear(24, K))


@pytest.fixture(scope="module")
def fit():
    (x, y), (hx, hy) = patterns(600, 0), patterns(200, 1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = network()
        optimiser = torch.optim.AdamW(net.parameters(), 3e-3)
        for _ in range(4): train_epoch(net, x, y, optimiser)
    optimiser.zero_grad()
    return FitData(net.eval(), network_outputs(net, x), y, x, network_outputs(net, hx), hx, hy, seed=3)


@pytest.fixture(scope="module")
def noise():
    return torch.randint(256, (40, 1, SIZE, SIZE), dtype=torch.uint8, generator=torch.Generator().manual_seed(5))


def make(name, fit):
    return BASELINES[name].make(fit, steps=8) if name.startswith("bayes") else BASELINES[name].make(fit)

def sees(name, fit, images): return network_outputs(fit.model, images) if BASELINES[name].needs == "outputs" else images


def test_every_detector_of_pytorch_ood_is_run_or_listed():
    classes = {d for d in ood.__all__ if isinstance(getattr(ood, d), type)}
    run = {b.detector for b in BASELINES.values() if b.detector}
    assert run | set(NOT_RUN) == classes and not run & set(NOT_RUN)
    assert all(name == b.name and b.needs in ("outputs", "images") and b.source for name, b in BASELINES.items())


@pytest.mark.parametrize("name", BASELINES)
def test_scores_are_finite_reproducible_of_one_image_each_and_leave_the_network_alone(name, fit, noise):
    before = copy.deepcopy(fit.model.state_dict())
    fit.model.train()
    torch.manual_seed(1)
    stream = torch.get_rng_state()
    score = make(name, fit)
    assert fit.model.training and all(p.grad is None and p.requires_grad for p in fit.model.parameters())
    assert torch.equal(stream, torch.get_rng_state())                                     # the caller's random numbers
    fit.model.eval()
    images = torch.cat([fit.held_out_images[:60], noise])
    s = score(sees(name, fit, images))
    assert s.shape == (100,)
    assert s.dtype == torch.float64
    assert s.device.type == "cpu"
    assert not s.isnan().any()
    assert not s.requires_grad
    scale = 1e-4 * (s - s.median()).abs().median().item()
    for some in (slice(0, 1), slice(3, 9), slice(59, 62)):
        torch.testing.assert_close(score(sees(name, fit, images[some])), s[some], rtol=1e-3, atol=scale)
    torch.testing.assert_close(make(name, fit)(sees(name, fit, images)), s, rtol=1e-6, atol=scale)
    assert all(torch.equal(v, before[k]) for k, v in fit.model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in fit.model.modules())
    assert score(sees(name, fit, images)[:0]).shape == (0,)


@pytest.mark.parametrize("name", ["energy", "vim", "knn", "gen", "react", "scale", "odin"])
def test_noise_is_further_out_than_digits(name, fit, noise):
    score = make(name, fit)
    assert score(sees(name, fit, noise)).median() > score(sees(name, fit, fit.held_out_images)).median()


def last_weight(name): return name == "8.weight"
def last_layer(name): return name.startswith("8.")


def whole(name, m, encoder, head):
    "A detector made of the whole network and fitted from a loader, as pytorch-ood's users would."
    of_network = dict(max_logit=ood.MaxLogit, energy=ood.EnergyBased, gen=ood.GEN, msp=ood.MaxSoftmax,
                      openmax=ood.OpenMax)
    of_encoder = dict(mahalanobis=ood.Mahalanobis, rmd=ood.RMD, knn=ood.KNN, gmm=ood.GMM)
    of_both = dict(she=ood.SHE, nci=ood.NCI, fdbd=ood.fDBD, nnguide=ood.NNGuide, pnml=ood.PNML, lts=ood.LTS,
                   react=ood.ReAct, vra=ood.VRA)
    if name in of_network: return of_network[name](m)
    if name in of_encoder: return of_encoder[name](encoder)
    if name in of_both: return of_both[name](encoder, head)
    if name == "vim": return ood.ViM(encoder, 12, head.weight, head.bias)
    if name == "dice": return ood.DICE(encoder, head.weight, head.bias, 0.9)
    if name == "gradnorm": return ood.GradNorm(m, last_weight)
    if name == "grad_uncertainty": return ood.GradUncertainty(m, last_layer)
    if name == "nac": return ood.NACUE(m, [m[7]])


WHOLE = ["max_logit", "energy", "gen", "msp", "mahalanobis", "rmd", "knn", "she", "nci", "fdbd", "nnguide", "pnml",
         "lts", "gmm", "vim", "dice", "react", "vra", "gradnorm", "grad_uncertainty", "nac", "openmax"]


@pytest.mark.parametrize("name", WHOLE)
def test_shared_outputs_give_what_pytorch_ood_gives_on_the_network(name, fit):
    dtype = torch.float64 if name in ("mahalanobis", "rmd", "openmax") else torch.float32
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(dtype)
        m = copy.deepcopy(fit.model).eval().to(dtype)
        detector = whole(name, m, m[:8], m[8])
        def taken(x): return as_input(x, m)  # the same kernels: in ViM and pNML the last digits of features may decide
        if detector.requires_fit:
            detector.fit([(taken(x), y) for x, y in zip(fit.images.split(500), fit.labels.split(500))])
        theirs = detector.predict(taken(fit.held_out_images)).detach().double()
    finally: torch.set_default_dtype(before)
    ours = BASELINES[name].make(fit)(fit.held_out_outputs)
    if name == "msp": ours = ours - 1
    share = 1e-2 if name == "openmax" else 1e-4
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=share * theirs.abs().max().item())


@pytest.mark.parametrize("name, field", [("mahalanobis", "features"), ("mahalanobis_before", "before")])
def test_mahalanobis_is_its_formula_in_float64(name, field, fit):
    z, x = (getattr(o, field).double() for o in (fit.outputs, fit.held_out_outputs))
    mu = torch.stack([z[fit.labels == k].mean(0) for k in range(K)])
    centred, ridge = z - mu[fit.labels], 1e-6 * torch.eye(z.shape[1], dtype=torch.float64)
    precision = torch.linalg.inv(centred.T @ centred + ridge)
    d = x[:, None] - mu
    torch.testing.assert_close(BASELINES[name].make(fit)(fit.held_out_outputs),
                               torch.einsum("nkd,de,nke->nk", d, precision, d).amin(1) / 2, rtol=1e-6, atol=1e-9)
    assert torch.get_default_dtype() == torch.float32


def test_openmax_of_an_image_does_not_depend_on_its_company(fit, noise):
    o = network_outputs(fit.model, noise)
    score = BASELINES["openmax"].make(fit)
    torch.testing.assert_close(torch.cat([score(o[i:i + 1]) for i in range(len(noise))]), score(o), rtol=1e-9,
                               atol=1e-12)


def test_a_detector_keeps_the_layer_it_was_made_of(fit):
    f = fit._replace(model=copy.deepcopy(fit.model))
    makers = {n: make(n, f) for n in ("vim", "gradnorm", "odin", "gram", "bayes_adapter_2")}
    before = {n: s(sees(n, fit, fit.held_out_images[:20])) for n, s in makers.items()}
    with torch.no_grad():
        for p in f.model.parameters(): p.zero_()
    for n, s in makers.items(): torch.testing.assert_close(s(sees(n, fit, fit.held_out_images[:20])), before[n])


def test_mahalanobis_before_reads_the_layer_before(fit):
    other = fit._replace(outputs=fit.outputs._replace(before=fit.outputs.features))
    o = fit.held_out_outputs
    torch.testing.assert_close(BASELINES["mahalanobis_before"].make(other)(o._replace(before=o.features)),
                               BASELINES["mahalanobis"].make(fit)(o))
    both, a, b = (BASELINES[n].make(fit)(o) for n in ("mahalanobis_both", "mahalanobis", "mahalanobis_before"))
    torch.testing.assert_close(both, a + b, rtol=1e-3, atol=1e-5)


def test_vim_dimension(): assert [vim_dimension(d) for d in (64, 767, 768, 1024, 2048)] == [32, 383, 512, 512, 1000]


def test_odin_moves_by_two_epsilon_and_scores_as_pytorch_ood(fit):
    images, eps = fit.held_out_images[:30], 0.002
    z = odin_logits(fit.model, images, [0., eps], batch_size=7)
    with torch.no_grad(): torch.testing.assert_close(z[0], fit.model(as_input(images)).double(), rtol=1e-5, atol=1e-5)
    theirs = ood.ODIN(fit.model, eps=eps, norm_std=[0.5])(as_input(images)).double()
    torch.testing.assert_close(msp(z[1] / 1000) - 1, theirs, rtol=0, atol=1e-6)
    assert all(p.grad is None for p in fit.model.parameters())


def test_odin_takes_the_epsilon_that_id_images_like_best(fit):
    grid = odin_grid(fit.model, fit.held_out_images, [1, 1000])
    assert grid.shape == (2, len(EPSILONS)) and (grid[0] > grid[1]).all() and EPSILONS[-1] == 0.004
    eps = EPSILONS[grid[1].argmax()]
    torch.testing.assert_close(BASELINES["odin"].make(fit)(fit.held_out_images[:50]),
                               msp(odin_logits(fit.model, fit.held_out_images[:50], [eps])[0] / 1000))


def test_ensemble(fit):
    z = torch.randn(3, 7, K, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    members = [Outputs(t.float(), torch.zeros(7, 2), torch.zeros(7, 2)) for t in z]
    mean = z.float().double().softmax(-1).mean(0)
    torch.testing.assert_close(ensemble_score(members), -(mean * mean.log()).sum(1))
    o = fit.held_out_outputs
    torch.testing.assert_close(ensemble_score([o, o]), entropy(o.logits))
    with pytest.raises(NiooddError, match="two or more"): ensemble_score([o])
    with pytest.raises(NiooddError, match="same images"): ensemble_score([o, o[:5]])


def test_kl_is_that_of_two_gaussians_and_its_gradient_the_authors_update():
    N, decay = 500, 2e-3
    mu, psi = dict(w=torch.randn(5, dtype=torch.float64).requires_grad_()), dict(w=torch.randn(5,
        dtype=torch.float64).requires_grad_())
    prior = Normal(torch.zeros(5, dtype=torch.float64), (N * decay)**-0.5)
    exact = kl_divergence(Normal(mu["w"], psi["w"].exp()), prior).sum() / N
    constant = 5 / N * (-0.5 + math.log((N * decay)**-0.5))
    torch.testing.assert_close(kl_per_image(mu, psi, N, decay) + constant, exact)
    kl_per_image(mu, psi, N, decay).backward()
    torch.testing.assert_close(mu["w"].grad, decay * mu["w"].detach())
    torch.testing.assert_close(psi["w"].grad, decay * (2 * psi["w"].detach()).exp() - 1 / N)


def test_bayes_adapter_learns_both(fit):
    net, sigma, losses = bayes_adapter(fit.model, fit.images, fit.labels, steps=60, lr_psi=1., seed=1)
    assert len(losses) == 60
    assert sigma.keys() == dict(net.named_parameters()).keys()
    assert all((s > 0).all() for s in sigma.values())
    assert any(not torch.equal(p, q) for p, q in zip(net.parameters(), fit.model.parameters()))
    # from exp(−5.5): the prior pulls σ up
    assert torch.cat([s.flatten() for s in sigma.values()]).mean() > 0.0045
    again = bayes_adapter(fit.model, fit.images, fit.labels, steps=60, lr_psi=1., seed=1)
    assert again[2] == losses and all(torch.equal(again[1][k], s) for k, s in sigma.items())
    accuracy = (network_outputs(net, fit.held_out_images).logits.argmax(1) == fit.held_out_labels).double().mean()
    assert accuracy > 0.95
    with pytest.raises(NiooddError, match="expected a finite number"):
        bayes_adapter(fit.model, fit.images, fit.labels, steps=60, lr=1e9)
    with pytest.raises(NiooddError, match="labels run"): bayes_adapter(fit.model, fit.images, fit.labels + 9, steps=1)


def test_bayes_adapter_leaves_batch_norm_alone():
    x, y = patterns(64, 2)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                        nn.Linear(4, K))
    net[1].running_mean.normal_()
    new, sigma, _ = bayes_adapter(net, x, y, steps=5, batch_size=16)
    assert set(sigma) == {"0.weight", "0.bias", "5.weight", "5.bias"}
    assert all(torch.equal(new.state_dict()[k], v) for k, v in net.state_dict().items() if k.startswith("1."))


def test_bayes_adapter_takes_any_measure_of_agreement(fit):
    a = BASELINES["bayes_adapter_2"].make(fit, steps=2, measure="mutual_information")(fit.held_out_images[:5])
    assert (a >= 0).all()
    assert not torch.equal(a, BASELINES["bayes_adapter_2"].make(fit, steps=2)(fit.held_out_images[:5]))
    with pytest.raises(NiooddError, match="unknown measure"):
        BASELINES["bayes_adapter_2"].make(fit, steps=2, measure="entropie")


@pytest.mark.parametrize("name", ["C1", "C2", "C3", "C4", "C5"])
def test_stages_of_the_papers_networks(name):
    net = architecture(name).eval()
    x = torch.rand(2, *(net.arguments[k] for k in ("channels", "size", "size"))) * 2 - 1
    with torch.no_grad():
        y, sides = x, []
        for piece in stages(net, x):
            y = piece(y)
            sides.append(y.shape[2:].numel() if y.ndim == 4 else 0)
        assert torch.equal(y, net(x)) and sides[-1] == 0 and all(a > b for a, b in zip(sides, sides[1:]))


def test_stages_refuse_what_is_no_sequence():
    with pytest.raises(NiooddError, match="not a sequence"):
        stages(Classifier(4, size=12).eval(), torch.zeros(1, 1, 12, 12))
    with pytest.raises(NiooddError, match="no feature maps"):
        stages(nn.Sequential(nn.Flatten(), nn.Linear(4, 3)), torch.zeros(1, 1, 2, 2))


@pytest.mark.parametrize("name", ["msp", "vim", "nac", "mahalanobis_both", "openmax", "odin", "gram",
                                  "bayes_adapter_2"])
@pytest.mark.parametrize("change, message", [
    (lambda f: dict(labels=f.labels[:9]), "9 labels"),
    (lambda f: dict(labels=f.labels % 3), "no training image of class 3"),
    (lambda f: dict(labels=f.labels + 1), "labels run"),
    (lambda f: dict(held_out_images=f.held_out_images[:7]), "7 images"),
    (lambda f: dict(held_out_labels=f.held_out_labels - 1), "held-out labels run")])
def test_a_fit_that_does_not_fit_gets_one_line(name, change, message, fit):
    with pytest.raises(NiooddError, match=message) as e: make(name, fit._replace(**change(fit)))
    assert "\n" not in str(e.value)


def test_nan_and_unknown_names_get_one_line(fit):
    o = fit.held_out_outputs
    with pytest.raises(NiooddError, match="vim gave NaN for 1 of 200 images"):
        damaged = torch.where(torch.arange(200)[:, None] == 5, torch.nan, o.features)
        BASELINES["vim"].make(fit)(o._replace(features=damaged))
    with pytest.raises(NiooddError, match="did you mean 'energy'"): BASELINES["energie"]
    assert BASELINES["energy"].name == "energy"
