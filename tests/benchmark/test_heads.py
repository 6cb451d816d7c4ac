"Heads on a fixed backbone, and the features that their garbage is made of."
from functools import partial

import pytest
import torch

from nioodd.benchmark import heads
from nioodd.benchmark.recipes import Recipe, train_classifier
from nioodd.core.errors import NiooddError
from nioodd.core.training import seeded

OPTIONS = heads.HeadOptions(rounds=1, added=30, noise=40, steps=5, generator_steps=3, batch_size=16, generator_batch=8)


@pytest.fixture(scope="module")
def features():
    "Three clusters of known features, and one between two of them."
    rng = torch.Generator().manual_seed(0)
    centres = torch.eye(3, 8) * 4
    labels = torch.arange(90) % 3
    def around(x): return x + 0.3 * torch.randn(x.shape, generator=rng)
    train, test, noise = around(centres[labels]), around(centres[labels]), 4 * torch.randn(60, 8, generator=rng)
    return heads.Features(train, labels, test, labels, noise, dict(far=around(torch.zeros(20, 8) - 4)))


@pytest.mark.parametrize("arm", heads.ARMS)
def test_each_arm_adds_as_many_features(features, arm):
    with seeded(0):
        loop = heads.HeadLoop(features, arm, OPTIONS)
        loop.train()
        added = loop.add()
    assert added.shape == (30, 8) and len(loop.garbage) == 70 and added.isfinite().all() and not added.requires_grad


def test_generated_features_stay_in_the_range_of_the_known_ones(features):
    generator = heads.FeatureGenerator(features.train, 4)
    with torch.no_grad():
        generator.body[-1].weight.mul_(1e6)
        x = generator.sample(torch.eye(4).repeat(20, 1), None)
    low, high = features.train.amin(0), features.train.amax(0)
    slack = 1e-5 * (high - low)
    assert (x >= low - slack).all() and (x <= high + slack).all()


def test_between_are_means_of_two_classes(features):
    with seeded(0): x = heads.HeadLoop(features, "between", OPTIONS).between(50)
    assert len(x) == 50
    pairs = (x[:, :3] > 1).sum(1)  # Each centre has 4 in an entry of its own; a mean of two has 2 in two entries
    assert (pairs == 2).all()


def test_noise_is_drawn_without_replacement(features):
    with seeded(0): x = heads.HeadLoop(features, "noise", OPTIONS).noise(60)
    assert len(x.unique(dim=0)) == 60


def test_mixtures_end_between_two_classes(features):
    options = heads.HeadOptions(rounds=1, added=60, noise=40, steps=100, generator_steps=100, generator_batch=32)
    with seeded(0):
        loop = heads.HeadLoop(features, "mixtures", options)
        loop.train()
        added = loop.add()
        two = loop.head(added).softmax(1)[:, :3].topk(2).values
    assert two.median(0).values.min() > 0.3


def test_a_row_is_a_function_of_its_seed(features):
    first, second = (heads.head_row(features, "mixtures", 1, OPTIONS) for _ in range(2))
    assert first == second and first != heads.head_row(features, "mixtures", 2, OPTIONS)


def test_between_makes_as_many_of_two_classes_as_of_three(features):
    two = features.labels < 2
    few = features._replace(train=features.train[two], labels=features.labels[two])
    with seeded(0): loop = heads.HeadLoop(few, "between", OPTIONS)
    for seed in range(20):
        with seeded(seed): assert len(loop.between(25)) == 25  # Half of the pairs that are drawn have one class


def test_unknown_arm(features):
    with pytest.raises(NiooddError, match="mixtures"): heads.HeadLoop(features, "mixture")


def test_too_little_noise_is_no_smaller_control(features):
    with pytest.raises(NiooddError, match="60 features of noise; expected 61"):
        heads.HeadLoop(features, "noise", heads.HeadOptions(noise=61))


def test_one_known_class(features):
    one = features._replace(labels=torch.zeros_like(features.labels))
    with pytest.raises(NiooddError, match="1 known class"): heads.HeadLoop(one, "between", OPTIONS)


def test_unknown_sets():
    assert heads.unknown_sets("mnist[0,1,2,4,5,9]") == ("mnist[not 0,1,2,4,5,9]", "fashion_mnist", "letters")
    for data in ("mnist", "svhn[0,1]"):
        with pytest.raises(NiooddError, match="6/4 split"): heads.unknown_sets(data)


def test_wrong_options():
    with pytest.raises(NiooddError, match="rounds"): heads.HeadOptions(rounds=0)


def test_rows_of_a_trained_backbone(tmp_path, monkeypatch):
    recipe = Recipe("C1", "digits5k[0,1,2]", epochs=1, train_images=150, validation_images=20)
    train_classifier(recipe, tmp_path/"net", progress=False)
    few = partial(heads.backbone_features, n_noise=50)
    monkeypatch.setattr(heads, "backbone_features", few)
    monkeypatch.setattr(heads, "unknown_sets", lambda data: ("digits5k[not 0,1,2]",))
    monkeypatch.setattr(heads, "head_row", lambda features, arm, seed: dict(arm=arm, seed=seed, sets={}))
    rows = heads.bench_heads(tmp_path/"heads.json", [tmp_path/"net"], [0], progress=False)
    assert [row["arm"] for row in rows] == ["none", *heads.ARMS]
    assert 0 <= rows[0]["accuracy"] <= 1 and "digits5k[not 0,1,2]" in rows[0]["sets"]
    monkeypatch.setattr(heads, "backbone_features", None)  # Nothing is left to do
    assert heads.bench_heads(tmp_path/"heads.json", [tmp_path/"net"], [0], progress=False) == rows
