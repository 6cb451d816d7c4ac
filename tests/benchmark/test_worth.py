"Pairs of runs: what is the same in both, and the test of their difference."
import itertools
import json
from dataclasses import replace

import numpy as np
import pytest

from nioodd.benchmark import worth
from nioodd.core.errors import NiooddError
from nioodd.inversion.config import Config

TINY = dict(id_set="digits5k", ood_sets=("letters",), train_images=100, rounds=1, pretrain_epochs=1, samples=20,
            generator_steps=2, generator_batch=8)


@pytest.fixture
def tiny(monkeypatch):
    for name, base in dict(worth.BASES).items(): monkeypatch.setitem(worth.BASES, name, replace(base, **TINY))


@pytest.mark.parametrize("name", worth.REGIMES)
def test_a_regime_and_its_control_differ_in_inversion_alone(name):
    regime = worth.REGIMES[name]
    control, config = worth.BASES[regime.base], regime.config
    allowed = {"inversion", *worth.WISHES[regime.wish]}
    changed = {field for field in vars(config) if getattr(config, field) != getattr(control, field)}
    assert config.inversion and not control.inversion and changed <= allowed
    assert config.exclude == "all" and not config.collapse_guard  # As many images as the control adds
    assert config.select == "last" and not config.validation_images  # Nothing chooses


def brute_force_p(differences):
    "Over all choices of signs."
    d = np.array(differences, float)
    means = [abs(np.mean(d * signs)) for signs in itertools.product((1, -1), repeat=len(d))]
    return np.mean(np.array(means) >= abs(d.mean()) - 1e-12)


@pytest.mark.parametrize("seed", range(4))
def test_p_is_that_of_all_signs(seed):
    rng = np.random.default_rng(seed)
    a, b = rng.normal(0.5, 1, 5), rng.normal(0, 1, 5)
    effect = worth.paired_effect(a, b)
    assert effect.p == pytest.approx(brute_force_p(a - b)) and effect.pairs == 5
    assert effect.difference == pytest.approx((a - b).mean()) and effect.low < effect.difference < effect.high


def test_equal_pairs_have_no_effect():
    assert worth.paired_effect([1, 2], [1, 2])[2:6] == (0, 0, 0, 1)


def test_a_constant_difference_has_an_interval_of_no_width():
    effect = worth.paired_effect([2, 3, 4], [1, 2, 3])
    assert effect.low == effect.high == effect.difference == 1 and effect.p == 2 / 8


@pytest.mark.parametrize("a, b", [([1], [1]), ([1, 2], [1]), ([], [])])
def test_too_few_pairs(a, b):
    with pytest.raises(NiooddError, match="expected two pairs or more"): worth.paired_effect(a, b)


def test_many_pairs_come_to_an_end_and_to_the_same_p():
    d = np.random.default_rng(0).normal(0.1, 1, 40)
    first, second = (worth.paired_effect(d, np.zeros(40)) for _ in range(2))
    assert first == second and 0 < first.p < 1


def test_unknown_wish():
    with pytest.raises(NiooddError, match="hard"): worth.Regime("digits", "hrad").config


def test_effect_of_takes_the_seeds_that_have_both_arms():
    def row(arm, seed, x): return dict(arm=arm, seed=seed, sets=dict(a=dict(fpr95_id_positive=x)))
    rows = [row("hard", 0, 1), row("hard", 1, 2), row("hard", 2, 99), row("control", 1, 0), row("control", 0, 3)]
    assert worth.effect_of(rows, "hard")[:3] == (1.5, 1.5, 0)


def test_all_runs_are_made_once_and_gone_on_with(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(worth, "judged", lambda loop: dict(accuracy=1.0, rejected=0.0, sets={}))
    out, regimes = tmp_path/"pairs.json", ["digits, paper", "digits, hard"]
    rows = worth.bench_worth(out, regimes, [0], progress=False)
    assert [row["arm"] for row in rows] == ["control", "paper", "hard"]
    assert [len(row["inversion_accuracy"]) for row in rows] == [0, 1, 1]
    assert json.loads(out.read_text())["rows"] == rows

    def no_run(*_): raise AssertionError("a run is made twice")
    monkeypatch.setattr(worth, "worth_row", no_run)
    assert worth.bench_worth(out, regimes, [0], progress=False) == rows


def test_an_inversion_that_adds_another_number_is_refused(tiny, monkeypatch):
    problem = worth.config_problem(worth.BASES["digits"])
    monkeypatch.setattr(worth, "judged", None)  # Not reached
    monkeypatch.setitem(worth.WISHES, "known", dict(exclude="known", wanted="known"))
    with pytest.raises(NiooddError, match="let exclude be all"): worth.worth_row("digits", "known", 0, problem)


def test_a_row_is_a_function_of_its_seed(tiny):
    problem = worth.config_problem(worth.BASES["digits"])
    problem.test = problem.test[:100]
    first, second = (worth.worth_row("digits", "paper", 3, problem) | dict(seconds=0) for _ in range(2))
    assert first == second


def test_unknown_regime(tmp_path):
    with pytest.raises(NiooddError, match="digits, paper"): worth.bench_worth(tmp_path/"x.json", ["digits, papr"], [0])


def test_the_table_is_in_per_cent():
    line = worth.worth_table(dict(x=worth.paired_effect([.1, .2], [.3, .5]))).splitlines()[-1]
    assert line.startswith("| x | 2 | 15.00 | 40.00 | -25.00 |") and line.endswith("| 0.500 |")
    assert isinstance(worth.BASES["digits"], Config)
