"""Surrogates against exact kinematics, 256 overprints, a known noise and scikit-image."""
import cmath
from itertools import product

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from nioodd.core.errors import NiooddError
from nioodd.neighbours import surrogate as s
from nioodd.trust.agreement import mutual_information


def test_arm_is_a_sum_of_complex_numbers():
    x = torch.randn(50, 4, dtype=torch.float64)
    for row, hand in zip(x.tolist(), s.planar_arm(x).tolist()):
        height, *angles = row
        place, angle = complex(0, height), 0.0
        for length, turn in zip(s.ARM, angles):
            angle += turn
            place += length * cmath.exp(1j * angle)
        assert abs(place - complex(*hand)) < 1e-12


def test_printer_is_the_sum_over_overprints():
    a, once = torch.rand(3, 8, dtype=torch.float64), s.transmittances().double()
    on = torch.tensor(list(product([False, True], repeat=8)))
    share = torch.where(on[:, None], a, 1 - a).prod(-1)  # [256, 3]
    overprint = s.PAPER * torch.where(on[..., None], once, 1.0).prod(1) ** 2  # [256, 31]
    total = torch.einsum("oi,ol->il", share, overprint ** (1 / s.YULE_NIELSEN))
    assert_close(s.printer(a), total ** s.YULE_NIELSEN, atol=1e-6, rtol=0)
    assert_close(s.printer(a + 5), s.printer(torch.ones_like(a)))  # Paper cannot be covered twice


def test_examples_are_noisy_or_missing_only_where_they_should():
    x, y = s.arm_data(2000, noise=0.2, seed=3)
    off = y - s.planar_arm(x)
    assert (off[x[:, 1] <= 0] == 0).all()
    assert abs(off[x[:, 1] > 0].std().item() / 0.2 - 1) < 0.1
    hole = s.arm_data(2000, hole=True)[0][:, 1]
    assert len(hole) == 2000 and not ((hole > 0) & (hole < 0.3)).any()
    assert_close(s.arm_data(50, seed=1)[0], s.arm_data(50, seed=1)[0])


@pytest.fixture(scope="module")
def noisy_line():
    rng = torch.Generator().manual_seed(1)
    x = torch.rand(3000, 1, generator=rng) * 4 - 2
    y = x.sin() + torch.where(x > 0, 0.4, 0.1) * torch.randn(x.shape, generator=rng)
    return s.SurrogateEnsemble(1, 1, width=24, seed=1).fit(x, y, steps=400)


def test_aleatoric_recovers_a_known_noise(noisy_line):
    x = torch.linspace(0.2, 1.8, 50)[:, None]
    for sign, sigma in [(1, 0.4), (-1, 0.1)]:
        found = noisy_line.predict(sign * x).aleatoric.sqrt().mean().item()
        assert abs(found / sigma - 1) < 0.2


def test_epistemic_rises_with_distance(noisy_line):
    at = torch.tensor([[0.0], [3.0], [5.0], [8.0]])
    at = torch.stack([at, -at])
    e = torch.stack([noisy_line.predict(a).epistemic.flatten() for a in at]).mean(0)
    assert (e.diff() > 0).all()


def test_prediction_is_the_members_mean_and_variances(noisy_line):
    x = torch.randn(7, 1)
    z = ((x - noisy_line.of_x[0]) / noisy_line.of_x[1]).expand(5, 7, 1)
    mu, log_variance = noisy_line._forward(z)
    centre, scale = noisy_line.of_y
    p = noisy_line.predict(x)
    assert_close(p.mean, (mu * scale + centre).mean(0))
    assert_close(p.epistemic, (mu * scale).var(0, correction=0))
    assert_close(p.aleatoric, (log_variance.exp() * scale**2).mean(0))


def test_inversion_finds_what_a_search_finds(noisy_line):
    targets = torch.tensor([[0.5], [-0.8]])
    found = s.invert_surrogate(noisy_line, targets, "mean", search=s.Search(tries=16, steps=100))
    grid = torch.linspace(-2, 2, 4001)[:, None]
    for target, cost in zip(targets, found.cost):
        best = (noisy_line.predict(grid).mean - target).square().min()
        assert cost <= best + 1e-5


def test_the_boundary_loss_keeps_inputs_in_the_box(noisy_line):
    target, edges = torch.tensor([[0.9]]), (torch.tensor([-1.0]), torch.tensor([1.0]))  # sin 1.12
    options = dict(box=(-1, 1), search=s.Search(4, 60))
    free, inside = (s.invert_surrogate(noisy_line, target, m, **options) for m in ("mean", "na"))
    assert s.outside(inside.inputs, *edges) < 0.02 < s.outside(free.inputs, *edges)
    assert_close(s.outside(torch.tensor([[-2.0, 3.0]]), torch.tensor([-1.0, 0.0]), torch.tensor([1.0, 1.0])),
                 torch.tensor([3.0]))


def test_uncertain_inputs_cost(noisy_line):
    target = torch.tensor([[0.0]])
    options = dict(alpha=1, beta=1, search=s.Search(steps=60))
    calm, any_ = (s.invert_surrogate(noisy_line, target, m, **options) for m in ("uana", "mean"))
    assert calm.predicted.aleatoric <= any_.predicted.aleatoric + 1e-4
    assert calm.inputs.item() < 0.1  # Zero is reached at the quiet side's edge


def test_the_rival_is_as_large_as_the_ensemble():
    like = s.SurrogateEnsemble(8, 31, width=20)
    rival = s.neural_adjoint(like)
    a, b = (sum(p.numel() for p in e.parameters()) for e in (like, rival))
    assert rival.members == 1 and a <= b < 1.05 * a


def test_image_cost_and_its_gradient():
    logits = torch.randn(3, 5, 4, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([0, 1, 2, 3, 0])
    wanted = -logits.softmax(-1).mean(0)[torch.arange(5), labels].log()
    assert_close(s.image_cost(logits, labels, 2.5), wanted + 2.5 * mutual_information(logits))
    assert torch.autograd.gradcheck(lambda z: s.image_cost(z, labels, 2.0), (logits,))


def test_nearness_is_that_of_the_nearest_of_the_class():
    known = torch.rand(6, 1, 8, 8) * 2 - 1
    labels = torch.tensor([0, 0, 0, 1, 1, 1])
    found = s.nearness(known[[1, 4]], labels[[1, 4]], known, labels)
    assert_close(found.pixels, torch.zeros(2))
    assert_close(found.ssim, torch.ones(2, dtype=torch.float64))
    assert (s.nearness(known[[1]], torch.tensor([1]), known, labels).pixels > 0).all()


def test_images_get_the_wanted_classes():
    torch.manual_seed(0)
    networks = [nn.Sequential(nn.Flatten(), nn.Linear(64, 3)) for _ in range(2)]
    labels = torch.tensor([0, 1, 2])
    before = [p.clone() for n in networks for p in n.parameters()]
    x = s.invert_images(networks, labels, (1, 8, 8), steps=80)
    assert all((n(x).argmax(1) == labels).all() for n in networks)
    assert all(torch.equal(a, p) for a, p in zip(before, (p for n in networks for p in n.parameters())))
    assert x.abs().max() <= 1


def test_a_bench_goes_on_where_it_stopped(tmp_path, monkeypatch):
    calls = []

    def rows(name, seed, targets):
        calls.append((name, seed))
        return [dict(scenario=name, seed=seed, method="uana")]
    monkeypatch.setattr(s, "scenario_rows", rows)
    out = tmp_path / "rows.json"
    s.bench_surrogate(out, seeds=[0], scenarios=["few"], progress=False)
    found = s.bench_surrogate(out, seeds=[0, 1], scenarios=["few"], progress=False)
    assert calls == [("few", 0), ("few", 1)]
    assert [r["seed"] for r in found] == [0, 1] and all("commit" in r for r in found)


def test_a_scenario_has_a_row_for_each_method(monkeypatch):
    invert = s.invert_surrogate
    monkeypatch.setattr(s, "invert_surrogate", lambda *a, **k: invert(*a, **k | dict(search=s.Search(2, 3))))
    rows = s.scenario_rows("printer", 0, targets=3, steps=4)
    assert [r["method"] for r in rows] == list(s.METHODS)
    assert all(len(r["error"]) == 3 and 0 <= r["in_box"] <= 1 for r in rows)


@pytest.mark.parametrize("call, says", [
    (lambda e: s.SurrogateEnsemble(0, 1), "n_in is 0"),
    (lambda e: s.SurrogateEnsemble(1, 1).predict(torch.zeros(1, 1)), "not fitted"),
    (lambda e: s.SurrogateEnsemble(1, 1).fit(torch.zeros(3, 1), torch.zeros(2, 1)), "3 inputs and 2 outputs"),
    (lambda e: s.SurrogateEnsemble(1, 1).fit(torch.full((3, 1), float("nan")), torch.zeros(3, 1)), "3 of 3 rows"),
    (lambda e: e.fit(torch.zeros(3, 1), torch.zeros(3, 1), steps=0), "steps is 0"),
    (lambda e: e.predict(torch.zeros(2, 3)), "expected [N, 1]"),
    (lambda e: s.invert_surrogate(e, torch.tensor([[float("inf")]])), "not finite"),
    (lambda e: s.invert_surrogate(e, torch.zeros(1, 2)), "expected [N, 1]"),
    (lambda e: s.invert_surrogate(e, torch.zeros(1, 1), "una"), "did you mean 'uana'"),
    (lambda e: s.invert_surrogate(e, torch.zeros(1, 1), alpha=-1), "alpha is -1"),
    (lambda e: s.invert_surrogate(e, torch.zeros(1, 1), "na", box=(1, 0)), "box is empty"),
    (lambda e: s.invert_surrogate(e, torch.zeros(1, 1), search=s.Search(tries=0)), "tries is 0"),
    (lambda e: s.arm_data(1), "n is 1"),
    (lambda e: s.arm_data(9, noise=-1), "noise is -1"),
    (lambda e: s.invert_images([nn.Flatten()], torch.zeros(1), (1, 8, 8)), "1 sibling"),
    (lambda e: s.bench_surrogate("x.json", scenarios=["fewer"]), "unknown scenario"),
    (lambda e: s.bench_bridge("x.json", [], None), "0 networks"),
])
def test_errors_are_one_line(call, says, noisy_line):
    with pytest.raises(NiooddError) as e: call(noisy_line)
    assert says in str(e.value) and "\n" not in str(e.value)
