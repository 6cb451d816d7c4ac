"Counts of operations against a hand count and PyTorch's own; the usual way computes what ours does; the report's rows."
import pytest
import torch
from torch.testing import assert_close
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode

from nioodd.core.datasets import load
from nioodd.core.forward import logits_and_features
from nioodd.core.images import to_input
from nioodd.core.models import Classifier
from nioodd.core.training import has_bfloat16
from nioodd.inversion.generator import CONDITIONINGS, Generator, sample_conditions
from nioodd.inversion.invert import GeneratedBatch, frozen, inversion_loss
from nioodd.speed.loop import (
    KINDS,
    PilDigits,
    UsualClassifier,
    bench_loop,
    classifier_calls,
    conv_job,
    generator_calls,
    interleaved,
    layer_calls,
    matmul_job,
    measure,
    memory_lines,
    step_profile,
    usual_epoch,
    usual_generator_steps,
    usual_loss,
)


@pytest.fixture(autouse=True)
def one_thread():
    "These checks are of counts, not of times: leave the other cores alone."
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield
    torch.set_num_threads(threads)


CONV1, CONV2, LINEAR = 28 * 28 * 32 * 9, 14 * 14 * 64 * 9 * 32, 3136 * 128 + 128 * 11  # multiply–adds of an image
PROJECT, UP1, UP2, LAST = 111 * 6272, 7 * 7 * 128 * 64 * 16, 14 * 14 * 64 * 32 * 16, 28 * 28 * 32 * 9


def test_classifier_operations_by_hand():
    "Three times the forward pass, except for the image's gradient."
    calls = classifier_calls(Classifier(11), torch.zeros(5, 1, 28, 28, dtype=torch.uint8))
    assert [c.forward for c in calls] == [2 * 5 * n for n in (CONV1, CONV2, 3136 * 128, 128 * 11)]
    assert sum(c.flops for c in calls) == 2 * 5 * (2 * CONV1 + 3 * CONV2 + 3 * LINEAR)
    assert [c.is_conv for c in calls] == [True, True, False, False]


def test_generator_operations_by_hand():
    """Its own layers three times, the first twice, since noise wants no gradient.

    The frozen classifier's twice, since its weights want none."""
    classifier = Classifier(11).requires_grad_(True).train()
    calls = generator_calls(Generator(11), classifier, 3)
    own, frozen_part = 2 * PROJECT + 3 * (UP1 + UP2 + LAST), 2 * (CONV1 + CONV2 + LINEAR)
    assert sum(c.flops for c in calls) == 2 * 3 * (own + frozen_part)
    assert classifier.training and all(p.requires_grad for p in classifier.parameters())


def counted(step, *networks) -> tuple[int, int]:
    "Operations of `step(*networks)`, a scalar, and its backward pass: by `layer_calls`, and by PyTorch."
    ours = sum(c.flops for c in layer_calls(step, *networks))
    with FlopCounterMode(display=False) as counter: step(*networks).backward()
    return ours, counter.get_total_flops()


@pytest.mark.parametrize("shape", [(1, 28), (3, 32), (3, 45)])
def test_classifier_operations_against_torch(shape):
    channels, size = shape
    net, x = Classifier(7, channels, size), torch.rand(4, channels, size, size)
    ours, theirs = counted(lambda net: net(x).sum(), net)
    assert ours == theirs > 0


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_generator_operations_against_torch(conditioning):
    generator, classifier = Generator(11, conditioning=conditioning), Classifier(11)
    c, y = sample_conditions(4, 11)
    def step(learning, fixed): return fixed(learning.sample(c, y)).sum()
    ours, theirs = counted(step, generator, frozen(classifier))
    assert ours == theirs > 0


def test_convolutions_alone_do_the_counted_operations():
    calls = classifier_calls(Classifier(11), torch.zeros(4, 1, 28, 28, dtype=torch.uint8))
    job, flops = conv_job(calls, "float32", times=2)
    job()
    assert flops == 2 * 2 * 4 * (2 * CONV1 + 3 * CONV2) and all(p.grad is None for c in calls for p in c.parameters)
    job, flops = matmul_job("float32", n=32)
    with FlopCounterMode(display=False) as counter: job()
    assert counter.get_total_flops() == flops


def test_hooks_are_removed():
    net = Classifier(5)
    with pytest.raises(ZeroDivisionError): layer_calls(lambda net: 1 / 0, net)
    assert not any(m._forward_hooks for m in net.modules())


@pytest.fixture
def both() -> tuple[Classifier, UsualClassifier]:
    "The two classifiers with the same weights and batch statistics."
    ours, usual = Classifier(11), UsualClassifier(11)
    ours.train()(torch.randn(32, 1, 28, 28))
    # batch norm's scales and shifts too, of either sign
    for p in ours.parameters(): p.data += 0.1 * torch.randn_like(p)
    ours.body[0][1].weight.data[::2] *= -1
    usual.load_state_dict(dict(zip(usual.state_dict(), ours.state_dict().values())))
    return ours, usual


def test_usual_images_are_ours():
    s = load("digits5k", "test", n=20)
    data = PilDigits(s.images, s.labels)
    x, y = next(iter(DataLoader(data, batch_size=20)))
    assert len(data) == 20 and torch.equal(y, s.labels)
    assert_close(x, to_input(s.images))


def test_usual_classifier_computes_the_same(both):
    "Logits, features, the cross-entropy and its gradients: eval mode, and training mode without dropout."
    ours, usual = both
    s = load("digits5k", "test", n=64)
    x = to_input(s.images)
    for m in both: m.dropout.p = 0.0
    for training in (False, True):
        for m in both: m.train(training)
        (a, f), (b, g) = logits_and_features(ours, x.contiguous(memory_format=torch.channels_last)), usual(x)
        assert_close(a, b, atol=1e-5, rtol=1e-5)
        assert_close(f, g, atol=1e-5, rtol=1e-5)
        losses = [torch.nn.functional.cross_entropy(z, s.labels) for z in (a, b)]
        assert_close(*losses, atol=1e-5, rtol=1e-5)
        grads = [torch.autograd.grad(loss, list(m.parameters())) for loss, m in zip(losses, both)]
        for p, q in zip(*grads): assert_close(p, q, atol=1e-4, rtol=1e-3)


def test_usual_inversion_loss_is_ours(both):
    logits, features = logits_and_features(both[0].eval(), torch.randn(32, 1, 28, 28))
    c, y = sample_conditions(32, 11)
    assert_close(usual_loss(logits, features, c, y), inversion_loss(GeneratedBatch(logits, features, c, y))[0])


def test_the_usual_way_trains():
    s = load("digits5k", "train", n=256)
    model = UsualClassifier(11)
    adam = torch.optim.Adam(model.parameters(), 1e-3)
    loader = DataLoader(PilDigits(s.images, s.labels), batch_size=64, shuffle=True)
    losses = [usual_epoch(model, loader, adam) for _ in range(4)]
    assert losses[-1] < losses[0]
    generator = Generator(11)
    before = generator.image[0].weight.clone()
    adam_g = torch.optim.Adam(generator.parameters(), 1e-3)
    assert usual_generator_steps(generator, model, adam_g, steps=2, batch_size=8) > 0
    assert not torch.equal(before, generator.image[0].weight)


def test_interleaved_takes_turns_and_stops():
    seen = []
    jobs = dict(a=lambda: seen.append("a"), b=lambda: seen.append("b"))
    taken = interleaved(jobs, rounds=3)
    assert "".join(seen) == "ab" * 4 and [len(t) for t in taken.values()] == [3, 3]
    assert [len(t) for t in interleaved(jobs, rounds=9, limit=0.0).values()] == [2, 2]  # two rounds at the least


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_profile_counts_nothing_twice(precision):
    s, net = load("digits5k", "train", n=192), Classifier(11)
    parts = step_profile(net, torch.optim.AdamW(net.parameters()), s, 64, precision)
    assert list(parts) == [*KINDS, "optimiser", "rest"] and all(ms > 0 for ms in parts.values()), parts


def test_memory_of_exp3():
    # 56,000 · 784 bytes
    assert "50 rounds × 1,000 + 6,000 images): 44 MB as uint8, 176 MB as float32" in memory_lines()[0]


def test_report_has_its_rows(monkeypatch):
    def briefly(device, **options): return measure(device, **options | dict(steps=1, limit=0.0))
    monkeypatch.setattr("nioodd.speed.loop.measure", briefly)  # the chapter has it as it is
    state = torch.get_rng_state()
    lines = bench_loop("cpu", quick=True, progress=False).splitlines()
    precisions = ["float32"] + ["bfloat16"] * has_bfloat16()
    for p in precisions:
        starts = [f"matrix product 1024×1024, {p}: ", f"classifier epoch, {p}, 64 ", f"classifier epoch, {p}, 256 ",
                  f"generator step, {p}, 64 ",
                  f"classifier epoch, {p} ", f"generator step, {p} "]
        for start in starts: assert sum(line.startswith(start) for line in lines) == 1, start
    assert sum(line.endswith("×") for line in lines) == 2 * len(precisions)
    for kind in ("convolution, backward", "batch norm, forward", "max-pool, backward", "optimiser", "rest"):
        assert sum(line.startswith("  " + kind) for line in lines) == 1, kind
    assert any("uint8" in line for line in lines) and any("peak memory" in line for line in lines)
    # columns line up
    assert len({len(line) for line in lines if line.startswith(("classifier epoch, float32, ",
                                                                "generator step, float32, "))}) == 1
    assert torch.equal(state, torch.get_rng_state())
