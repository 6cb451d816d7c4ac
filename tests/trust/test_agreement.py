"Measures of agreement: their definitions, bounds and extremes, and nothing that they must not depend on."
import math

import pytest
import torch

from nioodd.core.errors import NiooddError
from nioodd.trust.agreement import MEASURES, class_dispersion, disagreement, dispersion, kl_to_mean, measure


def logits(S=4, N=300, K=7, spread=4, seed=0):
    return spread * torch.randn(S, N, K, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(autouse=True)
def own_randomness():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


@pytest.mark.parametrize("name", MEASURES)
@pytest.mark.parametrize("S, K", [(2, 2), (2, 10), (7, 3)])
def test_order_of_siblings_classes_and_images_does_not_matter(name, S, K):
    z, f = logits(S, 50, K), measure(name)
    score = f(z)
    assert score.shape == (50,) and score.dtype == torch.float64
    order = torch.randperm(50)
    other_siblings, other_classes = f(z[torch.randperm(S)]), f(z[..., torch.randperm(K)])
    for same in (other_siblings, other_classes, f(z + torch.randn(S, 50, 1)), f(z[:, order])[order.argsort()]):
        torch.testing.assert_close(same, score, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", MEASURES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_finite_at_extremes(name, dtype):
    hot = torch.eye(10)
    extremes = [torch.zeros(2, 4, 10), 1e4 * hot[None].expand(3, -1, -1), 1e4 * hot[:2, None], 3e38 * hot[:2, None],
                -3e38 * hot[:2, None], torch.stack([1e4 * hot, torch.zeros(10, 10)])]
    for z in extremes:
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
    assert (kl_to_mean(z) <= S * math.log(S) * tol).all()
    assert (measure("mutual_information")(z) <= math.log(S) * tol).all()
    assert (measure("entropy_of_mean")(z) <= math.log(5) * tol).all()
    assert (measure("max_of_mean")(z) <= 1 - 1 / 5 + 1e-12).all()
    if S != 2: return
    assert (dispersion(z) <= kl_to_mean(z) * (1 + 1e-6)).all()
    assert (kl_to_mean(z) <= 2 * math.log(2) * dispersion(z) * (1 + 1e-6)).all()


def test_definitions():
    z = logits().double()
    p, mu = z.softmax(-1), z.softmax(-1).mean(0)
    H, D = -(mu * mu.log()).sum(1), (p.var(0, unbiased=False) / mu).sum(1)
    want = dict(
        disagreement_sum=(H + D).log(), disagreement_product=(H * D).log(), dispersion=D,
        entropy_of_mean=H, max_of_mean=1 - mu.amax(1),
        kl_to_mean=(p * (p / mu).log()).sum((0, 2)), mutual_information=H + (p * p.log()).sum(2).mean(0))
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


@pytest.mark.parametrize("bad, word", [
    (torch.zeros(3, 4), "[S, N, K]"),
    (torch.zeros(1, 3, 4), "S >= 2"),
    (torch.zeros(2, 3, 1), "2 outputs"),
    (torch.full((2, 3, 4), float("nan")), "NaN"),
    (torch.full((2, 3, 4), float("inf")), "infinity"),
])
@pytest.mark.parametrize("name", MEASURES)
def test_bad_logits(name, bad, word):
    with pytest.raises(NiooddError) as e: measure(name)(bad)
    assert word in str(e.value) and "\n" not in str(e.value)


def test_unknown_measure_and_form():
    with pytest.raises(NiooddError, match="did you mean 'dispersion'"): measure("dispertion")
    with pytest.raises(NiooddError, match="known: sum, product"): disagreement(logits(), "difference")
    with pytest.raises(NiooddError, match="tau is 0"): disagreement(logits(), tau=0)
