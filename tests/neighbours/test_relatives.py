"""Laplace against dense algebra and integrals, BatchEnsemble against multiplied weights, losses by hand."""
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

from nioodd.core.errors import NiooddError
from nioodd.core.models import Classifier
from nioodd.core.scores import msp
from nioodd.neighbours import relatives as r
from nioodd.posthoc.baselines import FitData
from nioodd.posthoc.outputs import network_outputs


def test_laplace_equals_the_dense_inverse():
    features, logits = torch.randn(40, 5), torch.randn(40, 3)
    found = r.Laplace(features, logits, prior=0.3).covariance(features[:4])
    phi, p = F.pad(features.double(), (0, 1), value=1.0), logits.double().softmax(1)
    curvature = torch.diag_embed(p).mean(0) - p.T @ p / len(p)
    inverse = torch.linalg.inv(torch.kron(phi.T @ phi, curvature) + 0.3 * torch.eye(18))
    for row, covariance in zip(phi, found):
        jacobian = torch.kron(row[None], torch.eye(3, dtype=torch.float64))
        assert_close(covariance, jacobian @ inverse @ jacobian.T)


def test_kronecker_factors_are_exact_where_all_answers_are_alike():
    features, logits = torch.randn(20, 2), torch.randn(1, 3).expand(20, 3)
    phi, p = F.pad(features.double(), (0, 1), value=1.0), logits[0].double().softmax(0)
    hessian = sum(torch.kron(row.outer(row), p.diag() - p.outer(p)) for row in phi)
    jacobian = torch.kron(phi[:1], torch.eye(3, dtype=torch.float64))
    exact = jacobian @ torch.linalg.inv(hessian + torch.eye(9)) @ jacobian.T
    assert_close(r.Laplace(features, logits).covariance(features[:1])[0], exact)


def test_curvature_is_the_hessian_of_the_cross_entropy():
    phi, w = torch.randn(3, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64)

    def loss(flat): return F.cross_entropy((flat.view(4, 3) @ phi)[None], torch.tensor([2]))
    hessian = torch.autograd.functional.hessian(loss, w.flatten()).view(4, 3, 4, 3).permute(1, 0, 3, 2).reshape(12, 12)
    p = (w @ phi).softmax(0)
    assert_close(hessian, torch.kron(phi.outer(phi), p.diag() - p.outer(p)))


def test_probit_is_near_the_exact_integral():
    t = torch.linspace(-12, 12, 40_001, dtype=torch.float64)
    normal = (-t.square() / 2).exp() / math.sqrt(2 * math.pi)
    for z, v in [(0.0, 3.0), (2.0, 1.0), (-4.0, 9.0), (6.0, 25.0)]:
        exact = torch.trapezoid(normal * (z + v**0.5 * t).sigmoid(), t).item()
        assert abs(torch.tensor(z / math.sqrt(1 + math.pi * v / 8)).sigmoid().item() - exact) < 0.02


def test_laplace_is_less_sure_far_from_the_data_and_keeps_the_class():
    features, logits = torch.randn(200, 4), 3 * torch.randn(200, 3)
    laplace = r.Laplace(features, logits)
    near, far = features[:5], 50 * features[:5]
    assert (laplace.covariance(far).diagonal(dim1=1, dim2=2) > laplace.covariance(near).diagonal(dim1=1, dim2=2)).all()
    assert (msp(laplace.shrunk_logits(far, logits[:5])) >= msp(logits[:5].double()) - 1e-9).all()


@pytest.fixture(scope="module")
def data():
    torch.manual_seed(0)
    images, labels = torch.randint(0, 256, (60, 1, 8, 8), dtype=torch.uint8), torch.arange(60) % 3
    model = Classifier(3, size=8).eval()
    o = network_outputs(model, images)
    return FitData(model, o, labels, images, o, images, labels, 1)


def test_laplace_is_a_baseline(data):
    score = r.RELATIVE_BASELINES["laplace"].make(data)
    o = data.outputs
    found = score(o)
    assert found.shape == (60,) and found.dtype == torch.float64
    assert_close(found[:7], score(o[:7]))


def test_dropout_is_a_baseline_whose_score_is_that_of_the_image_alone(data):
    score = r.RELATIVE_BASELINES["mc_dropout"].make(data)
    found = score(data.images)
    assert_close(found[[5, 9]], score(data.images[[5, 9]]), atol=1e-4, rtol=1e-4)
    assert_close(found, r.RELATIVE_BASELINES["mc_dropout"].make(data)(data.images))


def test_dropout_siblings_share_a_mask_and_keep_the_mean(data):
    model = nn.Sequential(nn.Dropout(0.25), nn.Flatten())
    siblings = r.dropout_siblings(model, n=400)
    x = torch.ones(2, 10)
    found = torch.stack([network(x) for network in siblings])
    assert torch.equal(found[:, 0], found[:, 1])
    assert_close(found.unique(), torch.tensor([0.0, 4 / 3]))
    assert abs(found.mean().item() - 1) < 0.03


def test_exposure_and_oecc_by_hand():
    z = torch.randn(4, 3)
    p = z.softmax(1)
    assert_close(r.exposure_loss(z), -p.log().sum(1).mean() / 3)
    expected = 0.07 * (0.8 - p.amax(1).mean()) ** 2 + 0.05 * (p - 1 / 3).abs().sum(1).mean()
    assert_close(r.oecc_loss(z, z, 0.8), expected)


def test_mixtures_are_those_of_two_images():
    torch.manual_seed(0)
    x = torch.randn(5, 1, 2, 2)
    found, order, share = r.mixed(x)
    assert 0 <= share <= 1 and sorted(order.tolist()) == [0, 1, 2, 3, 4]
    assert_close(found, share * x + (1 - share) * x[order])


def test_fast_weights_are_multiplied_weights():
    torch.manual_seed(0)
    layer = r.FastWeights(nn.Conv2d(2, 3, 3, padding=1), members=2)
    nn.init.normal_(layer.r), nn.init.normal_(layer.s), nn.init.normal_(layer.bias)
    x = torch.randn(4, 2, 5, 5)
    found = layer(torch.cat([x, x])).view(2, 4, 3, 5, 5)
    for m in range(2):
        weight = layer.layer.weight * layer.r[m].outer(layer.s[m])[:, :, None, None]
        own = F.conv2d(x, weight, layer.layer.bias * layer.r[m] + layer.bias[m], padding=1)
        assert_close(found[m], own, atol=1e-5, rtol=1e-4)


def test_batch_ensemble_answers_the_mean_of_its_members():
    images = torch.randint(0, 256, (7, 1, 8, 8), dtype=torch.uint8)
    before = Classifier(3, size=8)
    ensemble = r.BatchEnsemble(before, 3)
    each = ensemble.sibling_logits(images)
    assert each.shape == (3, 7, 3) and not torch.allclose(each[0], each[1])
    mean = ensemble(r.to_input(images)).exp()
    assert_close(mean, each.softmax(-1).mean(0), atol=1e-5, rtol=1e-4)
    assert ensemble.train()(r.to_input(images)).shape == (7, 3)
    assert isinstance(before.head, nn.Linear)  # Not changed


@pytest.mark.parametrize("kind", r.KINDS)
def test_every_kind_trains(kind):
    images, labels = torch.randint(0, 256, (40, 1, 8, 8), dtype=torch.uint8), torch.arange(40) % 2
    images[labels == 1] //= 8
    torch.manual_seed(0)
    model = Classifier(2 + (kind == "garbage"), size=8)
    r.train_relative(model, images, labels, kind, r.Schedule(epochs=12, batch_size=10, families=("noise:",)))
    assert (model(r.to_input(images))[:, :2].argmax(1) == labels).float().mean() > 0.9


@pytest.mark.parametrize("call, says", [
    (lambda: r.Laplace(torch.zeros(2, 3), torch.zeros(2, 2), prior=0), "prior is 0"),
    (lambda: r.Laplace(torch.zeros(2, 3), torch.zeros(3, 2)), "2 features for 3 logits"),
    (lambda: r.Laplace(torch.full((2, 3), math.nan), torch.zeros(2, 2)), "not finite"),
    (lambda: r.dropout_siblings(nn.Linear(2, 2)), "has no dropout"),
    (lambda: r.dropout_siblings(nn.Dropout(0.5), 1), "n is 1"),
    (lambda: r.BatchEnsemble(nn.Linear(2, 2), 1), "members is 1"),
    (lambda: r.BatchEnsemble(nn.ReLU()), "no linear or convolutional"),
    (lambda: r.BatchEnsemble(nn.Conv2d(4, 4, 3, groups=2)), "in groups"),
    (lambda: r.train_relative(nn.Linear(2, 2), torch.zeros(2), torch.zeros(2), "exposed"), "did you mean 'exposure'"),
])
def test_errors_are_one_line(call, says):
    with pytest.raises(NiooddError) as e: call()
    assert says in str(e.value) and "\n" not in str(e.value)
