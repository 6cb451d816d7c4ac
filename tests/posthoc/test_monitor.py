"p-values over months: false discoveries, what one calibration promises, classes, and streams that change."
import json
import math

import pytest
import torch
from scipy import stats
from torch import nn

from nioodd.core.detector import Detector, benjamini_hochberg
from nioodd.core.errors import NiooddError
from nioodd.posthoc.monitor import (
    STRETCHES,
    ClassConditional,
    Monitor,
    asleep,
    awakening,
    bet_factors,
    bet_ranks,
    calibration_conditional,
    growing_ranks,
    guaranteed_level,
    monitor_study,
    play,
    rate_bounds,
    rate_ceilings,
    simulate,
    simulate_batches,
    smallest_share,
)


class Mean(Detector):
    "The mean of an image is its score, and the sign of its first pixel names its class."
    def predict(self, x): return x.double().mean((1, 2, 3))

    def logits_and_scores(self, x):
        named = (x[:, 0, 0, 0] > 0).long()
        return nn.functional.one_hot(named, 3).float(), self.predict(x)


def images(n, shift=0., seed=0):
    return torch.randn(n, 1, 4, 4, generator=torch.Generator().manual_seed(seed)).clamp(-5, 5) + shift


@pytest.fixture
def detector(): return Mean(nn.Identity(), n_known=2).fit(held_out=images(400))


def p_values(n, images, seed, share=0.):
    "Uniform conformal p-values by n held-out images; at `share`, the smallest."
    rng = torch.Generator().manual_seed(seed)
    k = torch.randint(1, n + 2, (images,), generator=rng)
    return k.where(torch.rand(images, generator=rng) >= share, 1).double() / (n + 1)


# ---- False discoveries

def by_definition(p, fdr):
    "Benjamini and Hochberg's rule, word for word."
    order = sorted(range(len(p)), key=p.__getitem__)
    kept = [k for k, i in enumerate(order, 1) if p[i] <= fdr * k / len(p) + 1e-15]
    rejected = order[:max(kept, default=0)]
    return [i in rejected for i in range(len(p))]


@pytest.mark.parametrize("seed", range(20))
def test_benjamini_hochberg_is_the_rule(seed):
    rng = torch.Generator().manual_seed(seed)
    p = torch.rand(30, generator=rng, dtype=torch.float64)**2 + 1e-9
    fdr = 0.05 + 0.4 * torch.rand((), generator=rng).item()
    assert benjamini_hochberg(p, fdr).tolist() == by_definition(p.tolist(), fdr)


def test_benjamini_hochberg_agrees_with_scipy_also_under_ties():
    p = torch.tensor([1, 1, 2, 3, 5, 8, 8, 40, 77, 100.], dtype=torch.float64) / 100
    for fdr in (0.01, 0.04, 0.05, 0.1, 0.2):
        assert benjamini_hochberg(p, fdr).tolist() == (stats.false_discovery_control(p) <= fdr * (1 + 1e-12)).tolist()


def test_a_p_value_at_its_limit_counts():
    assert benjamini_hochberg([0.3], 0.3).tolist() == [True]
    assert benjamini_hochberg([0.1 * 3 / 3] * 3, 0.1).all()
    assert benjamini_hochberg([k / 1000 for k in range(1, 11)], 0.001 * 10).all()  # k · 0.01 / 10, rounded otherwise


def test_fdr_of_a_thousand_batches_is_below_its_level_and_the_uncorrected_rule_fails():
    corrected, uncorrected = simulate_batches(1000, seed=1)
    expected = 0.1 * 180 / 200  # By the proof
    assert corrected.mean() <= expected + 3 * corrected.std() / math.sqrt(1000)
    assert corrected.mean() > expected / 2  # It rejects something
    assert uncorrected.mean() > 0.3


def test_fdr_without_unknown_images():
    corrected, uncorrected = simulate_batches(400, n=100, known=50, unknown=0, seed=2)  # Each rejection is false
    assert corrected.mean() <= 0.1 + 3 * corrected.std() / math.sqrt(400)
    assert uncorrected.mean() > 0.9


@pytest.mark.parametrize("p, says", [
    ([0.5, math.nan], r"1 of 2 p-values are not in \(0, 1\]"), ([0., 0.2], r"not in \(0, 1\]"),
    ([1.5], r"not in \(0, 1\]"), ([], "expected one per image"), ([[0.5]], "expected one per image"),
])
def test_what_are_no_p_values(p, says):
    with pytest.raises(NiooddError, match=says): benjamini_hochberg(p)
    with pytest.raises(NiooddError, match=says): Monitor(n=9).update_p(p)
    with pytest.raises(NiooddError, match=says): calibration_conditional(p, 9)


@pytest.mark.parametrize("share", [0, 1, -0.1, math.nan])
def test_shares_between_0_and_1(share):
    for call in (lambda: benjamini_hochberg([0.5], share), lambda: Monitor(n=9, false_alarms=share),
                 lambda: rate_bounds(9, share), lambda: guaranteed_level(9, 0.5, share),
                 lambda: calibration_conditional([0.5], 9, share)):
        with pytest.raises(NiooddError, match="expected a share between 0 and 1"): call()


def test_a_detector_rejects_by_fdr(detector):
    x = torch.cat([images(90, seed=1), images(10, shift=2, seed=2)])
    rejected = detector.reject(x, fdr=0.2)
    assert torch.equal(rejected, benjamini_hochberg(detector.p_values(detector.predict(x)), 0.2))
    assert rejected[90:].all() and rejected[:90].sum() < 10
    assert not detector.reject(images(50, seed=3), fdr=0.001).any()  # 400 held-out images give no such p-value


def test_no_rejecting_before_calibration():
    with pytest.raises(NiooddError, match="has no calibration"): Mean(nn.Identity()).reject(images(3))


# ---- What one calibration promises

def true_rates(n, sets, seed=0):
    "U_(1) … U_(n) of each set of held-out images."
    return torch.rand(sets, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).sort(1).values


def test_bounds_are_quantiles_of_a_beta_law():
    low, high = rate_bounds(500, 0.05)
    assert [round(x, 3) for x in (low, high)] == [0.033, 0.071]
    assert (low, high) == pytest.approx(tuple(stats.beta(25, 476).ppf([0.025, 0.975])))
    rates = true_rates(200, 4000)[:, 20 - 1]  # 10 % of 201, rounded down
    low, high = rate_bounds(200, 0.1, 0.8)
    assert ((low <= rates) & (rates <= high)).double().mean() == pytest.approx(0.8, abs=0.03)


GUARANTEES = [(50, 0.1, 0.1), (1000, 0.05, 0.1), (1000, 0.05, 0.01), (300, 0.01, 0.1)]


@pytest.mark.parametrize("n, false_alarms, delta", GUARANTEES)
def test_a_guaranteed_level_is_the_largest_safe_one(n, false_alarms, delta):
    rank = round(guaranteed_level(n, false_alarms, delta) * (n + 1))
    failed = [stats.beta(k, n + 1 - k).sf(false_alarms) for k in (rank, rank + 1)]
    assert failed[0] <= delta < failed[1]


def test_too_few_images_for_a_guarantee():
    with pytest.raises(NiooddError, match="expected at least 59; hold out more"): guaranteed_level(58, 0.05, 0.05)
    assert guaranteed_level(59, 0.05, 0.05) == 1 / 60
    with pytest.raises(NiooddError, match="9 held-out images give no p-value below 0.1"): rate_bounds(9, 0.05)
    with pytest.raises(NiooddError, match="n is 0; expected the number"): rate_bounds(0)


@pytest.mark.parametrize("n", [1, 7, 200, 1000])
def test_adjusted_p_values_hold_for_nine_sets_in_ten(n):
    k = torch.arange(1, n + 1)
    adjusted = calibration_conditional(k / (n + 1), n, delta=0.1)
    assert (adjusted >= k / (n + 1)).all() and (adjusted.diff() >= 0).all() and adjusted[-1] <= 1
    assert calibration_conditional([1.], n).tolist() == [1.]
    rates = true_rates(n, 2000)
    assert (rates <= adjusted).all(1).double().mean() >= 0.9 - 0.02  # Three standard deviations of 2,000 sets
    assert (rates <= k / (n + 1)).all(1).double().mean() < 0.7  # As they are, p-values do not


def test_adjusted_p_values_do_not_depend_on_their_order_or_precision():
    p = p_values(100, 50, seed=0)
    adjusted = calibration_conditional(p, 100)
    assert torch.equal(calibration_conditional(p.flip(0), 100).flip(0), adjusted)
    assert torch.equal(calibration_conditional(p.float(), 100), adjusted)
    with pytest.raises(NiooddError, match="no multiples of 1/100"): calibration_conditional(p, 99)


def test_ranks_grow():
    assert growing_ranks(20).tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 18, 20]
    assert bet_ranks(1000).tolist() == [1, 2, 4, 8, 16, 32, 64, 128] and bet_ranks(1).tolist() == [1]
    assert len(growing_ranks(10**6)) < 200


# ---- Classes

def test_each_class_keeps_its_rate():
    rng = torch.Generator().manual_seed(0)
    named = torch.randint(0, 3, (30_000,), generator=rng)
    scores = torch.randn(30_000, generator=rng) * (1 + named)  # Class 2 is the most scattered one
    one = ClassConditional(Mean(nn.Identity())).calibrate(scores[:15_000], named[:15_000])
    p = one.p_values(scores[15_000:], named[15_000:])
    rates = [(p[named[15_000:] == c] <= 0.1).double().mean().item() for c in range(3)]
    assert rates == pytest.approx([0.1] * 3, abs=4 * math.sqrt(0.09 * 2 / 5000))
    together = Mean(nn.Identity()).calibrate(scores[:15_000], 0.1).rejects(scores[15_000:])
    assert together[named[15_000:] == 2].double().mean() > 0.15 > 10 * together[named[15_000:] == 0].double().mean()


def test_few_images_of_a_class_are_pooled():
    scores, labels = torch.arange(40.), torch.tensor([0] * 30 + [1] * 10)
    with pytest.warns(UserWarning, match=r"fewer than 19 held-out images: 1 \(10\), 2 \(0\)"):
        one = ClassConditional(Mean(nn.Identity())).calibrate(scores, labels, n_classes=3)
    assert one.pooled == [1, 2]
    assert one.p_values([39., 29., 29.], [1, 0, 2]).tolist() == [2 / 41, 2 / 31, 12 / 41]
    assert ClassConditional(Mean(nn.Identity()), fewest=10).calibrate(scores, labels).pooled == []


def test_classes_by_images(detector):
    one = ClassConditional(detector).fit(images(400, seed=5))
    x = images(500, seed=6)
    p = one.p_values(detector.predict(x), (x[:, 0, 0, 0] > 0).long())
    assert one.pooled == [] and torch.equal(one.is_ood(x, 0.1), p <= 0.1)
    assert one.is_ood(images(20, shift=3), 0.01).all()
    with pytest.raises(NiooddError, match="class 0 has .* held-out images, so no p-value below"): one.is_ood(x, 0.001)


def test_mistakes_with_classes(detector):
    one = ClassConditional(detector)
    with pytest.raises(NiooddError, match="has no held-out images"): one.p_values([1.], [0])
    with pytest.raises(NiooddError, match="held_out is empty"): one.fit(images(0))
    for labels in ([0], [0.5, 1.], [-1, 0]):
        with pytest.raises(NiooddError, match="expected a class number, 0 or more"): one.calibrate([1., 2.], labels)
    with pytest.raises(NiooddError, match="hold 1 NaN"): one.calibrate([1., math.nan], [0, 0])


# ---- Streams

def test_what_awakens_was_asleep():
    for t in (1, 2, 1000, 10**9): assert awakening(t) == pytest.approx(asleep(t - 1) - asleep(t), rel=1e-4)
    assert asleep(0) == 1


@pytest.mark.parametrize("n", [10, 1000])
def test_at_fair_odds_nobody_wins(n):
    odds = bet_ranks(n).double() / (n + 1)
    probability = torch.cat([odds, torch.ones(1)]).diff(prepend=torch.zeros(1))
    factors, playing = bet_factors(odds), torch.rand(4 * len(odds)).double()
    after = play(playing, factors, 7).mean(1) + asleep(7)  # One row for each outcome
    assert (probability @ after).item() == pytest.approx(playing.mean().item() + asleep(6), rel=1e-12)
    careful = bet_factors(rate_ceilings(n, bet_ranks(n), 0.005))
    assert (probability @ careful < 1).all()


def test_false_alarms_of_a_thousand_streams():
    careful = simulate(1000, 5000, 200, false_alarms=0.1, seed=3)
    assert (careful > 0).double().mean() <= 0.1
    naive = simulate(1000, 5000, 200, false_alarms=0.1, ceilings=False, seed=3)
    assert (naive > 0).double().mean() > 0.4  # The control


def test_delays_fall_with_the_share():
    medians = []
    for share in (0.05, 0.1, 0.2):
        alarm = simulate(200, 10_000, 1000, unknown=share, change=1000, seed=4)
        assert (alarm > 1000).double().mean() > 0.95
        medians.append(alarm.median().item() - 1000)
    assert medians == sorted(medians, reverse=True) and medians[2] < 300


def test_batches_of_any_size_give_the_same(detector):
    p = p_values(400, 3000, seed=7, share=0.02)
    whole, parts = Monitor(detector), Monitor(detector)
    whole.update_p(p)
    for part in p.split([1, 999, 1500, 3, 497]): parts.update_p(part)
    assert whole.state() == parts.state() and whole.seen == 3000
    assert len(whole.track) <= STRETCHES + 2 and max(whole.track) >= whole.wealth


def test_a_restored_monitor_goes_on_bit_for_bit(detector, tmp_path):
    p = p_values(400, 2500, seed=8, share=0.1)
    whole, begun = Monitor(detector), Monitor(detector)
    for part in p.split(100): whole.update_p(part)
    for part in p[:1300].split(100): begun.update_p(part)
    again = Monitor.restore(json.loads(json.dumps(begun.state())), detector)
    filed = Monitor.load(begun.save(tmp_path/"monitor.json"), detector)
    for part in p[1300:].split(100):
        again.update_p(part)
        filed.update_p(part)
    assert again.state() == filed.state() == whole.state() and whole.changed
    assert torch.equal(again.playing, whole.playing)


def test_a_monitor_of_images(detector):
    watch, by_p = Monitor(detector), Monitor(detector)
    known, strange = images(1500, seed=9), images(300, shift=0.5, seed=10)
    assert not watch.update(known) and watch.update(strange) and 1500 < watch.alarm_at < 1700
    by_p.update_p(detector.p_values(detector.predict(torch.cat([known, strange]))))
    assert watch.state() == by_p.state()
    assert watch.update(known[:1])  # An alarm stays
    detector.calibrate(detector.predict(images(400, seed=11)))
    with pytest.raises(NiooddError, match="was calibrated anew"): watch.update(known[:1])


def test_wealth_has_an_end():
    watch = Monitor(n=1000)
    watch.update_p(torch.full((3000,), 1 / 1001, dtype=torch.float64))
    assert math.isfinite(watch.wealth) and watch.wealth > 1e90


def test_other_held_out_images_are_refused(detector):
    state = Monitor(detector).state()
    other = Mean(nn.Identity()).fit(held_out=images(400, seed=11))
    for wrong in (other, Mean(nn.Identity()).fit(held_out=images(399))):
        with pytest.raises(NiooddError, match="made with other held-out images"): Monitor.restore(state, wrong)


@pytest.mark.parametrize("change, says", [
    (dict(format=2), "format"), (dict(seen=-1), "seen"), (dict(playing=[1.]), "1 gamblers and 0 stretches"),
    (dict(track=[1., 2.]), "2 stretches"), (dict(playing=["a"]), "playing"), (dict(false_alarms=2), "false_alarms"),
])
def test_damaged_states(change, says):
    with pytest.raises(NiooddError, match=says): Monitor.restore(Monitor(n=9).state() | change)


def test_files_that_are_no_state(tmp_path):
    with pytest.raises(NiooddError, match="does not exist"): Monitor.load(tmp_path/"none.json")
    (tmp_path/"cut.json").write_text('{"format": 1')
    with pytest.raises(NiooddError, match="is not valid JSON"): Monitor.load(tmp_path/"cut.json")


def test_mistakes_with_a_monitor(detector):
    watch = Monitor(detector)
    with pytest.raises(NiooddError, match="no multiples of 1/401"): watch.update_p([0.5, 0.01234])
    assert watch.seen == 0
    with pytest.raises(NiooddError, match="no images to draw"): watch.plot()
    with pytest.raises(NiooddError, match="has no detector"): Monitor(n=9).update(images(1))
    with pytest.raises(NiooddError, match="has no calibration"): Monitor(Mean(nn.Identity()))
    with pytest.raises(NiooddError, match="expected a fitted Detector"): Monitor(nn.Identity())
    for wrong in (dict(), dict(detector=detector, n=9)):
        with pytest.raises(NiooddError, match="expected either a detector or n"): Monitor(**wrong)
    with pytest.raises(NiooddError, match="n is 0"): Monitor(n=0)


def test_a_picture():
    watch = Monitor(n=100)
    watch.update_p(p_values(100, 1500, seed=12, share=0.3))
    figure = watch.plot("a stream")
    assert watch.changed and figure._repr_png_()[:4] == b"\x89PNG"


def test_the_smallest_share_is_out_of_reach():
    share = smallest_share(200)
    assert smallest_share(2000) < share / 5
    strange = simulate(50, 4000, 200, unknown=share / 2, shift=50, seed=13)
    assert (strange > 0).sum() <= 5  # Only by held-out images with too small a rate
    assert (simulate(50, 4000, 200, unknown=4 * share, shift=50, seed=13) > 0).all()


def test_the_study(tmp_path):
    file = tmp_path/"streams.json"
    monitor_study(file, streams=20, images=1000, sizes=(100,), changes=(200,), wait=500)
    study = json.loads(file.read_text())
    assert {"commit", "versions", "seed", "fdr", "no_change", "delays"} <= study.keys()
    assert [row["ceilings"] for row in study["no_change"]] == [True, False] and len(study["delays"]) == 3
