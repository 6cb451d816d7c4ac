"""Gaussian processes: scikit-learn's as the oracle, sums over pairs, and the detectors' contract."""
import math

import pytest
import torch
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import RBF, ConstantKernel, WhiteKernel
from torch import nn
from torch.testing import assert_close

from nioodd.core.detector import Detector
from nioodd.core.errors import NiooddError
from nioodd.neighbours import gaussian_process as gp
from nioodd.neighbours.gaussian_process import (
    AS_CODED,
    GP_BASELINES,
    SCORES,
    AtThresholds,
    ClassProcesses,
    GaussianProcess,
    GPDetector,
    GPScores,
    Prediction,
    Settings,
    at_class_thresholds,
    divergence,
    divergence_as_coded,
    kernel,
    likelihood_gradient,
    principal_axes,
    reference_of,
    references,
    solve,
)
from nioodd.posthoc.baselines import FitData
from nioodd.posthoc.outputs import Outputs

torch.set_num_threads(1)


def points(n=60, d=2, seed=0):
    rng = torch.Generator().manual_seed(seed)
    x = 3 * torch.rand(n, d, generator=rng, dtype=torch.float64)
    y = (2 * x[:, 0]).sin() + x[:, -1] ** 2 / 3 + 0.1 * torch.randn(n, generator=rng, dtype=torch.float64) + 5
    return x, y


def drawn(n=400, k=4, d=12, seed=0, far=0.0):
    "Outputs of a network with k classes in d features; `far` moves the images away from all of them."
    rng = torch.Generator().manual_seed(seed)
    centres = 3 * torch.randn(k, d, generator=torch.Generator().manual_seed(1))
    labels = torch.arange(n) % k
    features = centres[labels] + torch.randn(n, d, generator=rng) + far
    return Outputs(features @ centres.T / 3, features, features), labels


# ---- one process -----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("separable", [False, True])
def test_fixed_kernel_as_scikit_learn(separable):
    (x, y), (new, _) = points(), points(50, seed=1)
    theta = torch.tensor([1.3, 4.0] if separable else [2.0], dtype=torch.float64)
    ours = GaussianProcess(separable, nugget=0.02).fit(x, y, theta, learn=False)
    length = (theta / 2).sqrt().numpy() if separable else math.sqrt(theta / 2)
    fixed = ConstantKernel(ours.variance.item()) * (RBF(length) + WhiteKernel(0.02))
    theirs = GaussianProcessRegressor(fixed, alpha=0, optimizer=None).fit(x, y - y.mean())
    mean, std = theirs.predict(2 * new, return_std=True)
    assert_close(ours.predict(2 * new).mean.numpy(), mean + y.mean().item(), rtol=0, atol=1e-6)
    assert_close(ours.predict(2 * new).std.numpy(), std, rtol=0, atol=1e-6)
    assert abs(ours.log_likelihood - theirs.log_marginal_likelihood()) < 1e-6


@pytest.mark.parametrize("separable", [False, True])
@pytest.mark.parametrize("learn_nugget", [False, True])
def test_the_same_maximum_as_scikit_learn(separable, learn_nugget):
    x, y = points()
    ours = GaussianProcess(separable, 0.01, learn_nugget, bounds=(1e-3, 1e5)).fit(x, y)
    noise = WhiteKernel(0.01, (1e-8, 10)) if learn_nugget else WhiteKernel(0.01, "fixed")
    limits = (math.sqrt(1e-3 / 2), math.sqrt(1e5 / 2))
    free = ConstantKernel(1.0, (1e-4, 1e7)) * (RBF([1.0, 1.0] if separable else 1.0, limits) + noise)
    theirs = GaussianProcessRegressor(free, alpha=0, n_restarts_optimizer=2, random_state=0).fit(x, y - y.mean())
    best = theirs.log_marginal_likelihood_value_
    assert abs(ours.log_likelihood - best) < 1e-6
    assert_close((ours.theta / 2).sqrt().numpy(), theirs.kernel_.k2.k1.length_scale * (ours.theta.numpy() * 0 + 1),
                 rtol=1e-2, atol=0)


@pytest.mark.parametrize("n_theta", [1, 3])
def test_gradient_as_autograd(n_theta):
    x, y = points(30, 3)
    y = y - y.mean()
    logs = torch.linspace(-1, 1, n_theta + 1, dtype=torch.float64).requires_grad_()
    c = (-((x[:, None] - x).square() / logs[:-1].exp()).sum(2)).exp() + logs[-1].exp() * torch.eye(30).double()
    likelihood = -15 * ((2 * math.pi * (y @ torch.linalg.solve(c, y)) / 30).log() + 1) - torch.logdet(c) / 2
    likelihood.backward()
    theta, nugget = logs[:-1].detach().exp(), logs[-1].exp().item()
    found = solve(x, y, theta, nugget)
    assert abs(found.log_likelihood - likelihood.item()) < 1e-9
    assert_close(likelihood_gradient(x, theta, nugget, found), logs.grad)


def test_far_away_it_knows_nothing():
    x, y = points()
    process = GaussianProcess(nugget=0.01).fit(x, y)
    far = process.predict(x[:3] + 1e6)
    assert_close(far.mean, y.mean().expand(3))
    assert_close(far.std.square(), (1.01 * process.variance).expand(3))
    assert_close(process.predict(x[:3] + 1e6, noise=False).std.square(), process.variance.expand(3))
    assert GaussianProcess(centred=False, nugget=0.01).fit(x, y).predict(x[:1] + 1e6).mean.abs() < 1e-9


def test_variances_are_never_negative():
    x, y = points(300, 1)
    process = GaussianProcess(nugget=1e-8).fit(x, x[:, 0], 50.0, learn=False)
    assert (process.predict(x, noise=False).std > 0).all()


def test_theta_stays_within_bounds():
    x, _ = points()
    theta = GaussianProcess(bounds=(0.01, 0.3)).fit(x, x.sum(1), 0.1).theta # A line wants a greater one
    assert (theta >= 0.01 - 1e-12).all() and (theta <= 0.3 + 1e-12).all() and theta.max() > 0.299


def test_part_of_the_points_learns_theta():
    x, y = points(200)
    few, every = GaussianProcess().fit(x, y, learn_from=30), GaussianProcess().fit(x, y)
    assert len(few.x) == 200 and not torch.equal(few.theta, every.theta) and few.log_likelihood <= every.log_likelihood


@pytest.mark.parametrize("change, error", [
    (lambda x, y: (x, y.index_fill(0, torch.tensor([3, 4]), math.nan)), "2 of the targets' numbers are not finite"),
    (lambda x, y: (x.index_fill(0, torch.tensor([3]), math.inf), y), "2 of the points' numbers are not finite"),
    (lambda x, y: (x.index_fill(1, torch.tensor([1]), 2.0), y), "column 1 of the points is constant"),
    (lambda x, y: (x, y[:5]), r"points have shape \[60, 2\] and targets \[5\]"),
    (lambda x, y: (x[:1], y[:1]), "expected")])
def test_bad_points(change, error):
    with pytest.raises(NiooddError, match=error) as e: GaussianProcess().fit(*change(*points()))
    assert "\n" not in str(e.value)


def test_constant_columns_are_let_be_by_an_isotropic_kernel():
    x, y = points()
    with_constant = torch.cat([x, torch.ones(60, 1)], 1)
    a, b = (GaussianProcess(separable=False).fit(t, y, 2.0, learn=False) for t in (x, with_constant))
    assert_close(a.log_likelihood, b.log_likelihood)
    with pytest.raises(NiooddError, match="constant"): GaussianProcess(separable=False).fit(x * 0, y)


def test_points_that_are_alike_need_a_nugget():
    x, y = points()
    with pytest.raises(NiooddError, match="give a larger nugget"):
        GaussianProcess(nugget=0.0).fit(torch.cat([x, x]), torch.cat([y, y + 1]), 1.0, learn=False)


# ---- scores ----------------------------------------------------------------------------------------------------------

def test_divergences_as_sums_over_pairs():
    rng = torch.Generator().manual_seed(0)
    def said(n):
        mean, std = torch.randn(n, generator=rng).double(), torch.rand(n, generator=rng).double()
        return Prediction(5 * mean, 0.1 + std)
    images, v = said(7), said(40)
    normal = torch.distributions.Normal
    pairs = torch.distributions.kl_divergence(normal(images.mean[:, None], images.std[:, None]), normal(*v))
    assert_close(divergence(images, reference_of(v)), pairs.mean(1))
    for i, (m, s) in enumerate(zip(*images)):
        terms = (s**2 + (m - v.mean)**2) / (2 * v.std**2) + (v.std**2).log() - (s**2).log()
        assert_close(divergence_as_coded(images, reference_of(v))[i], terms.mean())


def test_only_the_predicted_class_is_asked():
    (train, labels), (some, _) = drawn(), drawn(60, seed=2)
    processes = ClassProcesses(Settings(rank=5, nugget=1e-2)).fit(train, labels)
    axes = principal_axes(train.features, 5)
    answers = some.logits.argmax(1)
    said = processes(some.features, answers)
    for i in range(0, 60, 7):
        c = answers[i].item()
        own = GaussianProcess(False, 1e-2).fit(axes(train.features[labels == c]), train.logits[labels == c, c],
                                               learn_from=200, steps=30)
        mean, std = own.predict(axes(some.features[i:i + 1]))
        assert_close(said.mean[i:i + 1], mean)
        assert_close(said.std[i:i + 1], std)


@pytest.mark.parametrize("which", ["predicted", "all"])
def test_references(which):
    (train, labels), (held, _) = drawn(), drawn(100, seed=3)
    processes, answers = ClassProcesses(Settings(rank=5)).fit(train, labels), held.logits.argmax(1)
    for c, found in enumerate(references(processes, held, which)):
        chosen = answers == c if which == "predicted" else answers >= 0
        features = held.features[chosen]
        assert_close(found, reference_of(processes(features, torch.full((len(features),), c))))


def test_scores_find_what_is_far_and_do_not_depend_on_company():
    (train, labels), (held, _), (known, _) = drawn(), drawn(200, seed=3), drawn(200, seed=4)
    far = drawn(50, far=3.0)[0]
    scores = GPScores(ClassProcesses(Settings(rank=None)).fit(train, labels)).compare(held)
    for name in SCORES:
        of_known = scores(known, name)
        assert_close(torch.cat([scores(known[i:i + 1], name) for i in range(5)]), of_known[:5])
        if name in ("std", "combined"): assert (scores(far, name) > of_known.max()).double().mean() > 0.9
    parts = scores.all_of(known, ("divergence", "std", "combined"))
    own = scores.all_of(held, ("divergence", "std"))
    sums = sum((parts[k] - own[k].mean()) / own[k].std() for k in own)
    assert_close(parts["combined"], sums)


def test_as_coded():
    (train, labels), (held, _), (some, _) = drawn(), drawn(100, seed=3), drawn(20, seed=5)
    scores = GPScores(ClassProcesses(Settings(**{**vars(AS_CODED), "rank": 4})).fit(train, labels), "all").compare(held)
    axes, answers, found = principal_axes(train.features, 4), some.logits.argmax(1), scores(some, "as_coded")
    for i in range(20):
        c = answers[i].item()
        x, y = axes(train.features[labels == c]).double(), train.logits[labels == c, c].double()
        low, extent = x.amin(0), x.amax(0) - x.amin(0)
        process = scores.processes.processes[c]
        assert (process.theta <= 0.3 + 1e-12).all() and (process.theta >= 0.01 - 1e-12).all()
        k = kernel((x - low) / extent, (x - low) / extent, process.theta) + 2**-26 * torch.eye(len(x)).double()
        def said(features):
            new = kernel((axes(features).double() - low) / extent, (x - low) / extent, process.theta)
            left = 1 - (new @ torch.linalg.inv(k) * new).sum(1)
            variance = y @ torch.linalg.solve(k, y) / len(y)
            return new @ torch.linalg.solve(k, y), (variance * left).clamp(min=2**-26).sqrt()
        (m, s), (mv, sv) = said(some.features[i:i + 1]), said(held.features)
        by_hand = ((s**2 + (m - mv)**2) / (2 * sv**2) + (sv**2).log() - (s**2).log()).mean()
        assert_close(found[i], by_hand, rtol=1e-4, atol=1e-4)


def test_thresholds_by_class():
    rng = torch.Generator().manual_seed(0)
    scores = [torch.rand(n, generator=rng).double() + shift for n, shift in ((300, 0), (200, 0), (100, 0.5))]
    classes = [torch.randint(3, (len(s),), generator=rng) for s in scores]
    found = at_class_thresholds(scores, classes, 0.9)
    limits = [scores[0][classes[0] == c].quantile(0.9) for c in range(3)]
    inside = [sum(s <= limits[c] for s, c in zip(*part)) / len(part[0]) for part in list(zip(scores, classes))[1:]]
    assert found.accepted == pytest.approx(inside[0].item()) and found.detected == pytest.approx(1 - inside[1].item())
    assert AtThresholds(0.957, 0.794).balanced_accuracy == pytest.approx(0.8755)
    nobody = at_class_thresholds([scores[0], scores[1], scores[2]], [classes[0] * 0, classes[1], classes[2] * 0 + 5])
    assert nobody.detected == 1


@pytest.mark.parametrize("rank, n, error", [
    (32, 400, "differ in 12 directions only"), (50, 40, "more images than the rank"), (0, 400, "the rank is 0")])
def test_ranks_that_cannot_be(rank, n, error):
    with pytest.raises(NiooddError, match=error): principal_axes(drawn(n)[0].features, rank)


def test_axes_are_those_of_the_covariance():
    features = drawn()[0].features
    axes = principal_axes(features, 3)
    values = torch.linalg.eigvalsh(torch.cov(features.double().T, correction=0)).flip(0)[:3]
    assert_close(torch.cov(axes(features).double().T, correction=0), values.diag(), rtol=1e-5, atol=1e-5)
    assert torch.equal(principal_axes(features, None)(features), features)


def test_classes_that_cannot_be_learnt():
    train, labels = drawn()
    with pytest.raises(NiooddError, match="class 3 has 4 training images; expected more than the rank, 8"):
        ClassProcesses(Settings(rank=8)).fit(train, torch.where((labels == 3) & (torch.arange(400) > 16), 0, labels))
    with pytest.raises(NiooddError, match="not finite"):
        ClassProcesses(Settings(rank=8)).fit(train._replace(logits=train.logits * math.nan), labels)
    held = drawn(100, seed=3)[0]
    held = held[held.logits.argmax(1) != 2]
    processes = ClassProcesses(Settings(rank=8)).fit(train, labels)
    with pytest.raises(NiooddError, match="0 validation images are predicted as class 2; .* reference='all'"):
        references(processes, held)
    assert len(references(processes, held, "all")) == 4


# ---- the detector ----------------------------------------------------------------------------------------------------

class Net(nn.Module):
    "Four known classes and one more output, of images 1×2×6."
    def __init__(self):
        super().__init__()
        rng = torch.Generator().manual_seed(0)
        self.hidden, self.out = nn.Linear(12, 12), nn.Linear(12, 5)
        with torch.no_grad():
            self.hidden.weight.copy_(torch.eye(12) + torch.randn(12, 12, generator=rng) / 10)
            self.out.weight.copy_(torch.cat([torch.eye(4).repeat(1, 3), torch.zeros(1, 12)]))
    def forward(self, x): return self.out(self.hidden(x.flatten(1)).relu())


def images(n, seed, shift=0.0):
    rng = torch.Generator().manual_seed(seed)
    centres = torch.eye(4).repeat(1, 3)[torch.arange(n) % 4]
    return (centres + torch.rand(n, 12, generator=rng) / 2 + shift).view(n, 1, 2, 6)


@pytest.fixture(scope="module")
def fitted():
    net, train, held_out = Net(), images(400, 0), images(800, 1)
    return GPDetector(net, rank=None, score="combined", n_known=4, classes=list("abcd")).fit(train, held_out), held_out


def test_contract(fitted, tmp_path):
    detector, held_out = fitted
    new, far = images(2000, 2), images(100, 3, shift=2.0)
    assert len(detector.calibration) == 400
    deviation = math.sqrt(0.05 * 0.95 * (1 / 400 + 1 / 2000))
    assert abs(detector.is_ood(new).double().mean() - 0.05) < 4 * deviation
    assert detector.is_ood(far).double().mean() > 0.9
    logits, scores = detector.logits_and_scores(new[:20])
    assert logits.shape == (20, 5) and torch.equal(scores, detector.predict(new[:20]))
    assert set(detector.verdict(new[:3])) == {"label", "uncertainty", "p_value", "score", "ood"}
    again = Detector.load(detector.save(tmp_path / "d"), Net())
    assert type(again) is GPDetector and again.rank is None and again.score == "combined"
    assert torch.equal(again.predict(new), detector.predict(new)) and again.threshold == detector.threshold
    assert len(detector.predict(new[:0])) == 0


@pytest.mark.parametrize("options", [dict(rank=None), dict(score="std"), dict(reference="all", score="as_coded")])
def test_variants_are_saved(options, tmp_path):
    detector = GPDetector(Net(), **{"rank": 4, "n_known": 4} | options).fit(images(400, 0), images(200, 1))
    again = Detector.load(detector.save(tmp_path / "d"), Net())
    new = images(50, 2)
    assert torch.equal(again.predict(new), detector.predict(new)) and detector.arguments() == again.arguments()


def test_a_detector_that_cannot_be(fitted):
    with pytest.raises(NiooddError, match="did you mean 'predicted'"): GPDetector(Net(), reference="predict")
    with pytest.raises(NiooddError, match="did you mean 'divergence'"): GPDetector(Net(), score="divergense")
    with pytest.raises(NiooddError, match="knows no images yet"): GPDetector(Net()).predict(images(2, 0))
    with pytest.raises(NiooddError, match=r"fit\(train, held_out\)"): GPDetector(Net()).fit(held_out=images(50, 1))
    with pytest.raises(NiooddError, match="class 4 has 0 training images"):
        GPDetector(Net(), rank=4).fit(images(400, 0), images(200, 1)) # Nobody is predicted as the fifth output
    with pytest.raises(NiooddError, match="validation images are predicted as class"):
        GPDetector(Net(), rank=4, n_known=4).fit(images(400, 0), images(16, 1))


def test_rows():
    train, labels = drawn(1000, d=40)
    held, held_labels = drawn(300, d=40, seed=3)
    no_images = torch.zeros(1000, 1, 1, 1)
    data = FitData(nn.Identity(), train, labels, no_images, held, no_images[:300], held_labels)
    assert {"gp", "gp_std", "gp_as_coded"} <= GP_BASELINES.keys()
    for name, baseline in GP_BASELINES.items():
        score = baseline.make(data)
        assert baseline.name == name and score(held[:9]).shape == (9,) and score(held[:0]).shape == (0,)
        assert_close(score(held[3:4]), score(held)[3:4], rtol=1e-4, atol=1e-4)


def test_bench_goes_on_where_it_was(monkeypatch, tmp_path):
    class Fake:
        opened, sha256 = 0, "0" * 64
        def __init__(self, *_): Fake.opened += 1
        def outputs(self, name):
            return drawn(300, d=40, seed=len(name), far=0.0 if name in ("train", "held_out", "id") else 2.0)[0]
    monkeypatch.setattr(gp, "_Trained", Fake)
    monkeypatch.setattr(gp, "CANDIDATES", {"a": Settings(rank=4)})
    monkeypatch.setattr(gp, "VARIANTS", {"gp": (Settings(rank=4), "divergence", "predicted")})
    rows = gp.bench_gp(tmp_path / "gp.json", tmp_path, seeds=[0], progress=False)
    assert {r["kind"] for r in rows} == {"choice", "far"} and Fake.opened == 1
    assert all(r["seed"] == 0 and r["commit"] and 0 <= r["fpr95"] <= 1 for r in rows)
    assert gp.bench_gp(tmp_path / "gp.json", tmp_path, seeds=[0], progress=False) == rows and Fake.opened == 1
    both = gp.bench_gp(tmp_path / "gp.json", tmp_path, seeds=[0, 1], progress=False)
    assert both[:len(rows)] == rows and len(both) == 2 * len(rows) and Fake.opened == 2
