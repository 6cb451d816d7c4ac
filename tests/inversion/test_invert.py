"Inversion of anybody's classifier: what it returns, what it leaves alone, what it refuses."
import math

import pytest
import torch
from torch import nn

from nioodd.core.datasets import load
from nioodd.core.errors import NiooddError
from nioodd.core.forward import logits_of
from nioodd.core.images import to_input
from nioodd.core.models import Classifier
from nioodd.core.training import train_epoch
from nioodd.inversion.generator import Conditions, Generator, sample_conditions
from nioodd.inversion.invert import (
    LOSSES,
    GeneratedBatch,
    GeneratorOptions,
    Inverted,
    TrainingOptions,
    cosine_loss,
    draw,
    generator_loss,
    image_shape,
    inversion_loss,
    invert,
    loss_weights,
    orthogonality_loss,
    train_generator,
)

TERMS = ("kl", "ce", "cosine", "ortho")


@pytest.fixture(autouse=True)
def _seed():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def resnet(n_outputs=7):
    torchvision = pytest.importorskip("torchvision")
    net = torchvision.models.resnet18(weights=None, num_classes=n_outputs)
    net.conv1 = nn.Conv2d(3, 64, 3, 2, 1, bias=False)
    return net


def linear(channels=3, size=16, n_outputs=5):
    return nn.Sequential(nn.Flatten(), nn.Linear(channels * size * size, n_outputs))


def snapshot(net):
    modes = [m.training for m in net.modules()]
    params = [(p.requires_grad, p.grad, p.stride()) for p in net.parameters()]
    return modes, params, {k: v.clone() for k, v in net.state_dict().items()}


def assert_untouched(net, before):
    modes, params, tensors = snapshot(net)
    assert modes == before[0]
    for now, then in zip(params, before[1]):
        assert now[0] == then[0] and now[1] is then[1] and now[2] == then[2]
    for k, v in tensors.items(): assert v.equal(before[2][k]), k


CLASSIFIERS = {
    "paper": (lambda: Classifier(11), (1, 28, 11), {}),
    "resnet18": (resnet, (3, 32, 7), dict(size=32)),
    "linear": (linear, (3, 16, 5), {}),
}


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_invert_any_classifier_and_leave_it_as_found(name):
    make, (channels, size, k), shape = CLASSIFIERS[name]
    net = make().train()
    first = next(net.parameters())
    first.requires_grad_(False)  # flags, modes and gradients that are not all alike
    next(m for m in net.modules() if not list(m.children())).eval()
    list(net.parameters())[-1].grad = torch.ones_like(list(net.parameters())[-1])
    before, rng = snapshot(net), torch.get_rng_state()
    out = invert(net, 2 * k, steps=2, batch_size=4, progress=False, **shape)
    assert_untouched(net, before)
    assert torch.get_rng_state().equal(rng)
    images, conditions, labels = out[:3]
    assert isinstance(out, Inverted) and images.dtype == torch.uint8 and images.shape == (2 * k, channels, size, size)
    assert conditions.shape == out.probabilities.shape == (2 * k, k) and conditions.dtype == torch.float32
    assert labels.bincount().tolist() == [2] * k and conditions.argmax(1).equal(labels)
    again = invert(net, 2 * k, steps=2, batch_size=4, progress=False, **shape)
    for a, b in zip(out, again): assert a.equal(b)
    assert not invert(net, 2 * k, steps=2, batch_size=4, progress=False, seed=1, **shape).images.equal(images)


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_the_classifier_is_as_found_after_training_and_after_an_error(mode):
    net = Classifier(4, size=8).train()
    generator = Generator(4, size=8)
    optimiser = torch.optim.Adam(generator.parameters())
    before = snapshot(net)
    quiet = dict(batch_size=4, options=TrainingOptions(frozen_mode=mode), progress=False)
    log = train_generator(generator, net, optimiser, steps=3, **quiet)
    assert_untouched(net, before)
    assert list(log) == ["loss", *TERMS, "accuracy", *(f"grad_{name}" for name in TERMS)]
    assert all(isinstance(v, float) and math.isfinite(v) for v in log.values())
    other = Classifier(5, size=8).train()
    with pytest.raises(NiooddError, match="4 outputs, but the classifier has 5"):
        train_generator(generator, other, optimiser, steps=1, **quiet)
    assert other.training and all(p.requires_grad for p in other.parameters())


def test_hard_inversion_of_a_trained_classifier():
    digits = load("digits5k", "train", size=16, n=3000)
    net = Classifier(10, size=16)
    train_epoch(net, digits.images, digits.labels, torch.optim.Adam(net.parameters(), 1e-3), batch_size=32)
    out = invert(net, 200, steps=80, batch_size=32, generator=GeneratorOptions("label"),
                 conditions=Conditions(hard=True), progress=False)
    assert out.accuracy > 0.7  # chance: 0.1
    assert len(out.accuracy_per_class) == 10
    assert abs(sum(out.accuracy_per_class) / 10 - out.accuracy) < 1e-9
    logits = logits_of(net, out.images)  # what is stored is what the stored bytes give
    torch.testing.assert_close(logits.softmax(1), out.probabilities, atol=1e-5, rtol=1e-4)


def test_drawing_leaves_both_networks_alone_and_follows_labels():
    net, generator = Classifier(4, size=8).train(), Generator(4, size=8).train()
    before = snapshot(net), snapshot(generator)
    for mode in ("eval", "mixed"):
        out = draw(generator, net, 10, labels="balanced", mode=mode, batch_size=4,
                   conditions=Conditions(exclude=[-1]))
        assert out.labels.tolist() == [0, 1, 2] * 3 + [0] and out.conditions.argmax(1).equal(out.labels)
        assert math.isnan(out.accuracy_per_class[3])
        assert_untouched(net, before[0])
        assert_untouched(generator, before[1])
    assert draw(generator, net, 3, labels=[2, 2, 0]).labels.tolist() == [2, 2, 0]


def test_mixed_batches_keep_the_order_of_the_rows():
    class Echo(nn.Module):  # a generator whose image is its label
        n_outputs = 4
        def __init__(self): super().__init__(); self.p = nn.Parameter(torch.zeros(1))
        def sample(self, c, y): return (y / 100).view(-1, 1, 1, 1).expand(-1, 1, 8, 8) + 0 * self.p
    out = draw(Echo(), linear(1, 8, 4), 11, labels="balanced", mode="mixed", batch_size=3)
    torch.testing.assert_close(to_input(out.images)[:, 0, 0, 0], out.labels / 100, atol=0.005, rtol=0)


@pytest.mark.parametrize("n, d", [(2, 3), (64, 128), (300, 128)])
def test_losses_against_the_pairwise_definitions_and_in_float32(n, d):
    phi = torch.randn(n, d, dtype=torch.float64) + 0.5
    u = nn.functional.normalize(phi)
    gram = u @ u.T
    cosine, ortho = (gram.sum() - gram.trace()) / (n * (n - 1)), (gram - torch.eye(n)).square().mean()
    torch.testing.assert_close(cosine_loss(phi), cosine)
    torch.testing.assert_close(orthogonality_loss(phi), ortho)
    torch.testing.assert_close(cosine_loss(phi.float()).double(), cosine, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(orthogonality_loss(phi.float()).double(), ortho, atol=1e-6, rtol=1e-5)


def test_gradient_of_the_whole_loss():
    z = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    phi = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    y = torch.tensor([0, 1, 2, 3, 0])
    c = sample_conditions(5, 4, labels=y)[0].double()
    weights = dict(zip(TERMS, (1, 2, 3, 4)))
    for direction in ("forward", "reverse"):
        for normalise in (True, False):
            options = dict(kl=dict(direction=direction), ortho=dict(normalise=normalise))

            def total(z, phi): return inversion_loss(GeneratedBatch(z, phi, c, y), weights, options)[0]
            assert torch.autograd.gradcheck(total, (z, phi))


def test_weights_that_are_left_out_keep_their_default():
    assert loss_weights() == dict(kl=500, ce=500, cosine=6000, ortho=10)
    assert loss_weights({"ortho": 0}) == dict(kl=500, ce=500, cosine=6000, ortho=0)
    assert list(loss_weights({"ortho": 1, "kl": 2})) == list(TERMS)


@pytest.fixture
def brightness():
    "A loss of one's own: the mean of the pixels."
    @generator_loss("brightness")
    def mean_pixel(batch, of=0.0):
        "Pixels are to be dark."
        return (batch.images - of).mean()
    yield LOSSES["brightness"]
    del LOSSES["brightness"]


def test_a_loss_of_ones_own_counts_where_it_has_a_weight(brightness):
    assert brightness.doc == "Pixels are to be dark." and brightness.title == "brightness"
    assert "brightness" not in loss_weights()  # its default weight is 0
    net, quiet = linear(1, 8, 3), dict(n=30, steps=30, batch_size=8, progress=False)
    dark = invert(net, weights={"brightness": 1e5}, **quiet)
    assert dark.images.float().mean() < 0.7 * invert(net, **quiet).images.float().mean()


def test_a_loss_of_ones_own_in_a_training(brightness):
    net, generator = linear(1, 8, 3), Generator(3, size=8)
    optimiser = torch.optim.Adam(generator.parameters())

    def log(**wanted):
        return train_generator(generator, net, optimiser, steps=1, batch_size=4, progress=False, **wanted)
    with_it = log(weights={"brightness": 2.0})
    assert [*with_it][1:6] == [*TERMS, "brightness"] and with_it["grad_brightness"] > 0
    measured = log(weights={"brightness": 0.0}, loss_options={"brightness": {"of": 100.0}})
    assert measured["brightness"] < -90 and measured["grad_brightness"] == 0
    assert "brightness" not in log()


def test_a_default_weight_counts_everywhere(brightness):
    generator_loss("brightness", weight=7.0)(brightness.function)
    assert loss_weights()["brightness"] == 7 and loss_weights({"kl": 1})["brightness"] == 7


def test_losses_that_cannot_be(brightness):
    with pytest.raises(NiooddError, match="no loss can be called 'accuracy'"): generator_loss("accuracy")
    generator_loss("brightness")(lambda batch: batch.images)
    batch = GeneratedBatch(torch.randn(4, 3), torch.randn(4, 2), *sample_conditions(4, 3), torch.rand(4, 1, 8, 8))
    with pytest.raises(NiooddError, match="'brightness' gives a tensor of shape .* expected a scalar"):
        inversion_loss(batch, {"brightness": 1.0})
    with pytest.raises(NiooddError, match="did you mean 'cosine'"): inversion_loss(batch, loss_options={"cosin": {}})


def test_losses_that_are_no_tensors_or_have_no_gradient(brightness):
    quiet = dict(n=4, steps=1, batch_size=4, progress=False, weights={"brightness": 1.0})
    for value, says in ((lambda b: 0.5, "gives a float"), (lambda b: b.images.mean().item(), "gives a float"),
                        (lambda b: None, "gives a NoneType"), (lambda b: b.images.detach().mean(), "has no gradient")):
        generator_loss("brightness")(value)
        with pytest.raises(NiooddError, match=f"'brightness' {says}") as e: invert(linear(1, 8, 3), **quiet)
        assert "\n" not in str(e.value)


def test_a_loss_does_not_take_anothers_name(brightness):
    def loss(batch): return batch.images.mean()
    with pytest.raises(NiooddError, match="'kl' is taken by a loss of nioodd.inversion.invert"):
        generator_loss("kl")(loss)
    assert LOSSES["kl"].weight == 500


def test_image_shape():
    assert image_shape(Classifier(10, 3, 32)) == (3, 32, 10)
    assert image_shape(linear(1, 28, 2)) == (1, 28, 2)
    with pytest.raises(NiooddError, match="several shapes.*say channels= and size="): image_shape(resnet())
    with pytest.raises(NiooddError, match="takes no image"): image_shape(linear(), size=28)


class Broken(nn.Module):  # gives NaN only for images that are not grey
    def __init__(self): super().__init__(); self.net = linear(1, 8, 3)
    def forward(self, x): z = self.net(x); return z if not x.abs().max() else z * float("nan")


@pytest.mark.parametrize("change, message", [
    (dict(n=0), "n is 0"), (dict(steps=0), "steps is 0"), (dict(batch_size=1), "batch_size is 1"),
    (dict(conditions=Conditions(0.5)), "temperature is 0.5, but a hard wish has none"),
    (dict(generator=GeneratorOptions("vectr")), "did you mean 'vector'"), (dict(size=28), "takes no image"),
    (dict(conditions=Conditions(temperature=-1)), "temperature is -1"),
    (dict(weights=dict(zip(TERMS, (1, -1, 1, 1)))), "loss weights"),
    (dict(weights=(1, 1, 1, 1)), "loss weights are a tuple"),
    (dict(weights=dict.fromkeys(TERMS, 0)), "a finite sum above 0"), (dict(weights={"cos": 1}), "unknown loss 'cos'"),
    (dict(labels=[9] * 10), "label 9 cannot be wanted"),
    (dict(conditions=Conditions(exclude=[7])), "exclude names output 7"),
    (dict(options=TrainingOptions("evil")), "did you mean 'eval'"),
    (dict(loss_options=dict(kl=dict(direction="forwards"))), "did you mean 'forward'"),
    (dict(labels="balance"), "did you mean 'balanced'"),
])
def test_bad_input_is_one_line(change, message):
    arguments = dict(n=10, steps=2, batch_size=4, progress=False) | change
    with pytest.raises(NiooddError, match=message) as e: invert(linear(), **arguments)
    assert "\n" not in str(e.value)


def test_classifiers_that_are_not_finite():
    net = linear(1, 8, 3)
    nn.init.constant_(net[1].weight, float("nan"))
    with pytest.raises(NiooddError, match="NaN or infinite logits"): invert(net, 10, steps=1, progress=False)
    with pytest.raises(NiooddError, match="logits are not finite at generator step 0"):
        invert(Broken(), 10, steps=1, progress=False)


def test_a_term_that_is_not_finite_is_named_and_the_weights_stay_finite():
    net, generator = linear(1, 8, 3), Generator(3, size=8)
    with torch.no_grad():  # logits are finite, their differences are not
        net[1].bias.copy_(torch.tensor([3e38, -3e38, 0.0]))
    optimiser = torch.optim.Adam(generator.parameters())
    with pytest.raises(NiooddError, match="kl loss became inf at step 0"):
        train_generator(generator, net, optimiser, steps=2, batch_size=4, progress=False)
    assert all(p.isfinite().all() for p in generator.parameters())


def test_one_class_cannot_be_mixed():
    with pytest.raises(NiooddError, match="mode 'eval'"):
        draw(Generator(5, channels=3, size=16), linear(), 4, labels=[1] * 4, mode="mixed")
