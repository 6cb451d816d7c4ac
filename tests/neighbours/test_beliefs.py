"What a network believes: rows, witnesses and who accepts."
import pytest
import torch
from torch import nn

from nioodd.core.datasets import load
from nioodd.core.errors import NiooddError
from nioodd.core.forward import logits_of
from nioodd.inversion.invert import Diversity, Inverted, diversity, transfer
from nioodd.neighbours.beliefs import (
    Subject,
    acceptance_rows,
    as_inverted,
    belief_row,
    bench_beliefs,
    kept_network,
    train_quickly,
)


@pytest.fixture(scope="module")
def digits(): return load("digits5k", "train", size=16, n=1500), load("digits5k", "test", size=16)


@pytest.fixture(scope="module")
def subject(digits):
    train, test = digits
    return Subject("digits5k", 0, train_quickly(train, 0, epochs=1), train_quickly(train, 1, epochs=1), train, test)


def test_diversity_against_brute_force():
    torch.manual_seed(0)
    images = torch.randint(256, (9, 1, 4, 4), dtype=torch.uint8)
    images[4] = images[1]
    features, labels = torch.randn(9, 5), torch.tensor([0, 1, 0, 0, 1, 1, 2, 0, 1])
    cosines, nearest, pixels, least = [], [], [], []
    for i in range(9):
        same = [j for j in range(9) if j != i and labels[j] == labels[i]]
        if not same: continue
        c = torch.stack([nn.functional.cosine_similarity(features[i], features[j], 0) for j in same])
        d = torch.stack([(images[i].float() - images[j].float()).norm() / 127.5 for j in same])
        for values, value in zip((cosines, nearest, pixels, least), (c.mean(), c.max(), d.mean(), d.min())):
            values.append(value)
    means = [torch.stack(v).mean().item() for v in (cosines, nearest, pixels, least)]
    found = diversity(features, labels, images)
    assert found == pytest.approx(Diversity(*means, 1), abs=1e-5)


@pytest.mark.parametrize("change, says", [
    (dict(features=torch.randn(3, 2)), "3 features, 4 labels and 4 images"),
    (dict(labels=torch.arange(4)), "no class has two images"),
    (dict(images=torch.rand(4, 1, 2, 2)), "expected .* images of torch.uint8"),
])
def test_diversity_refuses_in_one_line(change, says):
    given = dict(features=torch.randn(4, 2), labels=torch.zeros(4).long(), images=torch.zeros(4, 1, 2, 2).byte())
    with pytest.raises(NiooddError, match=says) as e: diversity(**given | change)
    assert "\n" not in str(e.value)


def test_transfer(subject):
    real = as_inverted(subject.model, subject.test[:50])
    assert transfer(real, subject.model) == real.accuracy
    right = logits_of(subject.witness, real.images).argmax(1) == real.labels
    assert transfer(real, subject.witness) == pytest.approx(right.double().mean().item())
    narrow = nn.Sequential(nn.Flatten(), nn.Linear(256, 3))
    with pytest.raises(NiooddError, match="the other network has 3 outputs"): transfer(real, narrow)


def test_quick_training_is_a_function_of_its_seed(digits, tmp_path):
    train = digits[0][:100]
    state = torch.get_rng_state()
    first, again, other = (train_quickly(train, seed, epochs=1) for seed in (0, 0, 1))
    assert torch.get_rng_state().equal(state) and not first.training
    x = train.images[:4]
    assert logits_of(first, x).equal(logits_of(again, x)) and not logits_of(first, x).equal(logits_of(other, x))
    kept = [kept_network(train, 0, tmp_path, 50) for _ in range(2)]
    assert logits_of(kept[0], x).equal(logits_of(kept[1], x))


def test_a_row_and_who_accepts(subject):
    real = as_inverted(subject.model, subject.test[:200])
    row = belief_row(subject, real)
    assert row["accuracy"] > 0.6 and row["identical"] == 0 and 0 < row["cosine"] < 1
    sure = real.probabilities.clone()
    sure[:] = 0.001
    sure.scatter_(1, real.labels[:, None], 0.99)
    noise = torch.randint(256, real.images.shape, dtype=torch.uint8)
    found = Inverted(noise, real.conditions, real.labels, real.labels, sure) # As if the network were sure of noise
    rows = list(acceptance_rows(subject, found, ("layerwise", "knn"), held_out=400))
    assert [r["detector"] for r in rows] == ["layerwise", "knn"] and rows[0]["images"] == 200
    assert rows[0]["accepted"] < 0.1 and rows[0]["control"] > 0.85


def test_no_confident_image_is_no_share(subject):
    real = as_inverted(subject.model, subject.test[:20])
    unsure = real._replace(probabilities=torch.full_like(real.probabilities, 0.1))
    row, = acceptance_rows(subject, unsure, ("energy",), held_out=400)
    assert row["accepted"] is None and row["images"] == 0


def test_the_bench_goes_on(monkeypatch, tmp_path, digits):
    from nioodd.neighbours import beliefs
    train, test = digits
    calls = []

    def few(data, networks, *_):
        for k in networks: yield Subject(data, k, None, None, train, test)

    def rows(subject, wish, seed, judge):
        calls.append((subject.network, wish, seed))
        return [dict(data=subject.data, network=subject.network, wish=wish, seed=seed)]
    monkeypatch.setattr(beliefs, "subjects", few)
    monkeypatch.setattr(beliefs, "rows_of", rows)
    quiet = dict(data=["digits5k"], seeds=(0, 1), progress=False)
    assert len(bench_beliefs(tmp_path / "b.json", networks=(0,), **quiet)) == 4
    assert len(bench_beliefs(tmp_path / "b.json", networks=(0, 1), **quiet)) == 8
    assert len(calls) == len(set(calls)) == 8
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(NiooddError, match="rows"): bench_beliefs(tmp_path / "bad.json", networks=(0,), **quiet)
