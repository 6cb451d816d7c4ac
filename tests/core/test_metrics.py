"""The metrics against scikit-learn, pytorch-ood and their own definitions, on random scores with and without ties."""
import numpy as np
import pytest
import torch
from pytorch_ood.metrics import OODMetrics, aurra, calibration_error
from sklearn import metrics as skm
from sklearn.calibration import calibration_curve

from nioodd.core.errors import NiooddError
from nioodd.core.metrics import (
    HIGHER_IS_BETTER,
    METRICS,
    accepted,
    accuracy_all,
    aupr,
    aurc,
    auroc,
    ece,
    fpr_at_tpr,
    known_accuracy,
    known_accuracy_per_class,
    ood_metrics,
    paired_bootstrap,
    rejected_at_argmax,
    reliability,
    risk_coverage,
    threshold_keeping,
)
from nioodd.core.scores import (
    checked_logits,
    energy,
    entropy,
    garbage_log_odds,
    garbage_probability,
    max_logit,
    msp,
    uncertainty,
)


def cases(n_cases, seed=0):
    "Pairs of ID and OOD scores: 1 to 400 of each, from all tied to none, also integers and infinities."
    rng = np.random.default_rng(seed)
    for i in range(n_cases):
        sizes, levels = rng.integers(1, 400, 2), rng.choice([1, 2, 7, 50, 1e9])
        pair = [np.round(rng.normal(mean, 1, n) * levels) for mean, n in zip((0, rng.normal(1)), sizes)]
        if i % 10 == 0: pair[0][0], pair[1][0] = -np.inf, np.inf
        yield pair


def sklearn_metrics(id_scores, ood_scores):
    y, s = np.r_[np.zeros(len(id_scores)), np.ones(len(ood_scores))], np.r_[id_scores, ood_scores]
    s = np.unique(s, return_inverse=True)[1].astype(float)  # ranks: scikit-learn refuses infinities

    def pr(y, s): return skm.auc(*skm.precision_recall_curve(y, s)[1::-1])

    def fpr(y, s):
        fpr, tpr, _ = skm.roc_curve(y, s, drop_intermediate=False)
        return fpr[np.argmax(tpr >= .95)]
    return dict(auroc=skm.roc_auc_score(y, s),
                aupr_in=pr(1 - y, -s), aupr_out=pr(y, s),
                fpr95_id_positive=fpr(1 - y, -s), fpr95_ood_positive=fpr(y, s))


def test_agrees_with_scikit_learn():
    for pair in cases(200): assert ood_metrics(*pair) == pytest.approx(sklearn_metrics(*pair), rel=0, abs=1e-12)


@pytest.mark.filterwarnings("ignore:AUTC")
def test_agrees_with_pytorch_ood():
    names = dict(auroc="AUROC", aupr_in="AUPR-IN", aupr_out="AUPR-OUT", fpr95_ood_positive="FPR95TPR")
    for i, o in cases(200, seed=1):
        ours = ood_metrics(i, o)
        labels = torch.cat([torch.zeros(len(i)), -torch.ones(len(o))]).long()
        theirs = OODMetrics().update(torch.from_numpy(np.r_[i, o]), labels).compute()
        assert {k: ours[k] for k in names} == pytest.approx({k: theirs[v] for k, v in names.items()}, rel=0, abs=1e-12)


def test_auroc_is_the_share_of_won_pairs():
    for i, o in cases(50, seed=2):
        assert auroc(accepted(i, o)) == ((o[:, None] > i).sum() + (o[:, None] == i).sum() / 2) / (len(i) * len(o))


def test_both_fprs_by_their_definitions():
    rng = np.random.default_rng(3)
    for i, o in cases(200, seed=3):
        c, tpr = accepted(i, o), rng.uniform(0.01, 1)
        t = min(t for t in i if np.mean(i <= t) >= tpr)
        assert fpr_at_tpr(c, tpr, "id") == np.mean(o <= t)
        t = max(t for t in o if np.mean(o >= t) >= tpr)
        assert fpr_at_tpr(c, tpr, "ood") == np.mean(i >= t)


def test_swapping_the_classes_and_the_sign_mirrors_everything():
    for i, o in cases(50, seed=4):
        a, b = ood_metrics(i, o), ood_metrics(-o, -i)
        assert a["auroc"] == b["auroc"]
        assert (a["aupr_in"], a["fpr95_id_positive"]) == (b["aupr_out"], b["fpr95_ood_positive"])


def test_a_rising_transform_of_the_scores_changes_nothing():
    for i, o in cases(20, seed=5):
        transformed = ood_metrics(np.arctan(i / 1e3), np.arctan(o / 1e3))
        assert ood_metrics(i, o) == transformed or len({*i, *o}) > 300


def test_threshold_keeps_at_least_the_share_and_no_smaller_score_does():
    rng = np.random.default_rng(6)
    for i, _ in cases(300, seed=6):
        keep = rng.choice([rng.uniform(1e-6, 1), .95, .5, 1., 1 / len(i), (len(i) // 2 + 1) / len(i)])
        t = threshold_keeping(i, keep)
        assert t in i and np.mean(i <= t) >= keep
        assert not (i < t).any() or np.mean(i < t) < keep


@pytest.mark.parametrize("n", [10, 20, 100, 300, 1000])
def test_threshold_at_exact_shares(n):
    "k/n as a float must keep k scores, not k + 1 because k/n·n was rounded up."
    for k in range(1, n + 1): assert threshold_keeping(range(n), k / n) == k - 1


def test_every_input_type_gives_the_same():
    i, o = [0., 1., 1., 3.], [1., 4.]
    want = ood_metrics(i, o)

    def half(x): return torch.tensor(x).half()
    def integer(x): return torch.tensor(x).int()
    def with_gradient(x): return torch.tensor(x, requires_grad=True)
    for make in (np.array, torch.tensor, half, integer, with_gradient):
        assert ood_metrics(make(i), make(o)) == want


@pytest.mark.parametrize("call, word", [
    (lambda: ood_metrics([], [1.]), "ID scores are empty"),
    (lambda: ood_metrics([1.], torch.empty(0)), "OOD scores are empty"),
    (lambda: ood_metrics([1., float("nan")], [1.]), "1 NaN"),
    (lambda: threshold_keeping([1.], 0), "keep is 0"),
    (lambda: threshold_keeping([1.], 95), "keep is 95"),
    (lambda: fpr_at_tpr(accepted([0.], [1.]), 1.5), "tpr is 1.5"),
    (lambda: aupr(accepted([0.], [1.]), "OOD"), "unknown positive class 'OOD'"),
    (lambda: known_accuracy(torch.zeros(2, 3), torch.tensor([0, 2])), "0 to 2"),
    (lambda: known_accuracy(torch.zeros(2, 3), torch.tensor([0, -1])), "-1"),
    (lambda: accuracy_all(torch.zeros(2, 3), torch.tensor([0])), "labels have shape [1]"),
    (lambda: paired_bootstrap([1.], [1.], [1., 2.], [1.]), "A has 1 ID scores and B 2"),
    (lambda: paired_bootstrap([1.], [1., 2., 3.], [1.], [1.]), "A has 3 OOD scores and B 1"),
    (lambda: paired_bootstrap([1.], [1.], [1.], [1.], "fpr95_id"), "fpr95_id_positive"),
    (lambda: paired_bootstrap([1.], [1.], [1.], [1.], n=0), "n is 0"),
    (lambda: paired_bootstrap([1.], [1.], [float("nan")], [1.]), "1 NaN"),
    (lambda: aurc([], []), "scores are empty"),
    (lambda: aurc([1., 2.], [True]), "2 scores and 1 answers"),
    (lambda: aurc([1., 2.], [0, 3]), "other values than 0 and 1"),
    (lambda: aurc([1., float("nan")], [0, 1]), "1 NaN"),
    (lambda: ece(torch.tensor([[3., -1.]]), torch.tensor([0])), "logits.softmax(1)"),
    (lambda: ece(torch.tensor([[.5, .4]]), torch.tensor([0])), "sum to 1"),
    (lambda: ece(torch.tensor([[.5, .5]]), torch.tensor([2])), "0 to 1"),
    (lambda: ece(torch.tensor([[.5, .5]]), torch.tensor([0]), bins=0), "bins is 0"),
    (lambda: ece(torch.zeros(0, 2), torch.zeros(0).long()), "empty"),
    (lambda: msp(torch.zeros(3)), "[3]"),
    (lambda: energy(torch.tensor([[0., float("inf")]])), "1 of 1 rows"),
    (lambda: uncertainty(torch.zeros(1, 3), n_known=4), "n_known is 4"),
])
def test_errors_are_one_line(call, word):
    with pytest.raises(NiooddError) as e: call()
    assert word in str(e.value) and "\n" not in str(e.value)


def test_argmax_metrics():
    rng = torch.Generator().manual_seed(0)
    z, y = torch.randn(500, 11, generator=rng), torch.randint(10, (500,), generator=rng)
    assert rejected_at_argmax(z) == (z.argmax(1) == 10).double().mean().item()
    assert known_accuracy(z, y) == (z[:, :10].argmax(1) == y).double().mean().item()
    assert accuracy_all(z, y) == (z.argmax(1) == y).double().mean().item()
    by_hand = [(z[y == k, :10].argmax(1) == k).double().mean().item() for k in range(10)]
    assert known_accuracy_per_class(z, y).tolist() == pytest.approx(by_hand)
    assert known_accuracy_per_class(z[y != 3], y[y != 3])[3].isnan()


# Comparing two detectors

def by_loop(a, b, metric, n, seed=0):
    "`paired_bootstrap` by drawing the images themselves and calling `ood_metrics` on them."
    a, b = ([torch.as_tensor(x) for x in pair] for pair in (a, b))
    rng, d = torch.Generator().manual_seed(seed), []
    for part in torch.arange(n).split(max(1, 2**20 // (len(a[0]) + len(a[1])))):
        drawn = [torch.randint(len(x), (len(part), len(x)), generator=rng) for x in a]
        for i, o in zip(*drawn):
            of_a, of_b = (ood_metrics(known[i], unknown[o])[metric] for known, unknown in (a, b))
            d.append(of_a - of_b)
    d = np.array(d)
    better = d > 0 if metric in HIGHER_IS_BETTER else d < 0
    return dict(difference=ood_metrics(*a)[metric] - ood_metrics(*b)[metric],
                low=np.quantile(d, .025), high=np.quantile(d, .975),
                p_better=np.mean(better) + np.mean(d == 0) / 2)


@pytest.mark.parametrize("metric", METRICS)
def test_paired_bootstrap_is_the_loop_it_replaces(metric):
    rng = np.random.default_rng(7)
    for k, a in enumerate(cases(11, seed=7)):
        b = [np.round(x + rng.normal(0, np.ptp(x[np.isfinite(x)]) / 5 + .1, len(x))) for x in a]  # infinities stay
        want = by_loop(a, b, metric, 20, k)
        assert paired_bootstrap(*a, *b, metric, n=20, seed=k) == pytest.approx(want, rel=0, abs=1e-12)


def test_paired_bootstrap_in_several_parts():
    rng = np.random.default_rng(8)
    a = [rng.normal(size=30_000), rng.normal(1, 1, 20_000)]
    b = [x + rng.normal(0, .3, len(x)) for x in a]
    r = paired_bootstrap(*a, *b, n=50)  # parts of 20
    assert r == pytest.approx(by_loop(a, b, "fpr95_id_positive", 50), rel=0, abs=1e-12)
    assert r == paired_bootstrap(*a, *b, n=50) != paired_bootstrap(*a, *b, n=50, seed=1)


def test_paired_bootstrap_is_antisymmetric_and_sees_only_the_order():
    rng = np.random.default_rng(9)
    for n in (1, 5, 100):
        a, b = ([rng.normal(m, 1, k).round(1) for m, k in ((0, n), (1, 2 * n))] for _ in range(2))
        x, y = paired_bootstrap(*a, *b, "auroc", n=200), paired_bootstrap(*b, *a, "auroc", n=200)
        assert x["difference"] == -y["difference"] and x["p_better"] == pytest.approx(1 - y["p_better"])
        assert (x["low"], x["high"]) == pytest.approx((-y["high"], -y["low"]))
        for metric in METRICS:
            same_order = paired_bootstrap(*a, *map(np.exp, a), metric, n=50)
            assert same_order == dict(difference=0, low=0, high=0, p_better=.5)


# Uncertainty: its order and its values

def selective_risk(scores, correct, rng, orders):
    "Mean over random orders of ties of the errors among the first k, over k."
    risks = []
    for _ in range(orders):
        order = np.lexsort((rng.random(len(scores)), scores))
        risks.append(np.cumsum(~correct[order]) / np.arange(1, len(scores) + 1))
    return np.mean(risks, 0)


def test_risk_coverage_is_the_mean_over_the_orders_of_ties():
    rng = np.random.default_rng(10)
    for n, levels in ((1, 1), (7, 1), (20, 3), (60, 8)):
        scores, correct = rng.integers(levels, size=n), rng.random(n) < .7
        c = risk_coverage(scores, correct)
        assert c.coverage.tolist() == [k / n for k in range(1, n + 1)]
        assert c.risk.numpy() == pytest.approx(selective_risk(scores, correct, rng, 20_000), abs=.03)
        assert c.risk[-1].item() == pytest.approx(np.mean(~correct), abs=1e-12)
        assert torch.equal(c.risk, risk_coverage(*(x[::-1].copy() for x in (scores, correct))).risk)


def test_aurc_is_pytorch_oods_aurra_turned_round():
    rng = np.random.default_rng(11)
    for n in (1, 2, 50, 3000):
        scores, correct = rng.permutation(n).astype(float), rng.random(n) < .8
        ours, theirs = aurc(scores, correct), aurra(-torch.from_numpy(scores), torch.from_numpy(correct))
        assert ours == pytest.approx(1 - theirs, rel=0, abs=1e-12)
        assert ours == pytest.approx(selective_risk(scores, correct, rng, 1).mean(), rel=0, abs=1e-12)
        assert aurc(~correct, correct) <= ours + 1e-12
        assert aurc(np.zeros(n), correct) == pytest.approx(np.mean(~correct))


def test_ece_by_its_definition():
    rng = torch.Generator().manual_seed(12)
    for n, k, bins in ((1, 2, 15), (40, 3, 15), (2000, 10, 15), (2000, 2, 7), (500, 11, 1)):
        p, y = (2 * torch.randn(n, k, generator=rng)).softmax(1), torch.randint(k, (n,), generator=rng)
        confidence, correct = p.double().amax(1).numpy(), (p.argmax(1) == y).numpy()
        want = 0
        for b in range(bins):
            inside = (confidence > b / bins) & (confidence <= (b + 1) / bins)
            if inside.any(): want += inside.sum() / n * abs(correct[inside].mean() - confidence[inside].mean())
        assert ece(p, y, bins) == pytest.approx(want, rel=0, abs=1e-12)
        r = reliability(p, y, bins)
        full = r.count > 0
        for ours, theirs in zip((r.accuracy, r.confidence), calibration_curve(correct, confidence, n_bins=bins)):
            assert ours[full].numpy() == pytest.approx(theirs, rel=0, abs=1e-12)
        assert r.count.sum() == n and r.accuracy[~full].isnan().all()
        one = calibration_error(torch.from_numpy(confidence), torch.from_numpy(correct), p="1", beta=n)
        assert ece(p, y, bins=1) == pytest.approx(one, rel=0, abs=1e-12)


def test_ece_bins_are_closed_on_the_right():
    p = torch.tensor([[.5, .5], [.5, .5], [1., 0.], [.75, .25]], dtype=torch.float64)
    assert reliability(p, torch.tensor([0, 1, 0, 0]), bins=4).count.tolist() == [0, 2, 1, 1]


# The scores the metrics are made of

def test_scores_by_their_definitions():
    rng = torch.Generator().manual_seed(0)
    for K in (3, 11, 50):
        z = 4 * torch.randn(200, K, generator=rng)
        p = z.double().softmax(1)
        one_hot = torch.nn.functional.one_hot(p.argmax(1), K).double()  # integers minus 1/K would be float32
        a, b = ((p - 1 / K)**2).sum(1), ((one_hot - 1 / K)**2).sum(1)
        defined = [
            (msp, 1 - p.amax(1)),
            (entropy, -(p * p.log()).sum(1)),
            (max_logit, -z.double().amax(1)),
            (energy, -z.double().exp().sum(1).log()),
            (uncertainty, 1 - a / b),
            (garbage_probability, p[:, -1]),
            (garbage_log_odds, (p[:, -1] / p[:, :-1].sum(1)).log())]
        for score, want in defined:
            assert score(z).dtype == torch.float64
            torch.testing.assert_close(score(z), want, rtol=1e-9, atol=1e-12)
        for score in (msp, entropy, max_logit, energy, uncertainty):
            assert torch.equal(score(z, n_known=K - 1), score(z[:, :-1]))


def test_scores_do_not_tie_where_one_minus_p_does():
    lead = torch.linspace(20, 300, 1000, dtype=torch.float64)
    z = torch.zeros(1000, 5, dtype=torch.float64)
    z[:, 0] = lead
    assert ((1 - z.softmax(1).amax(1)) == 0).double().mean() > .9
    for score in (msp, entropy, uncertainty, garbage_log_odds): assert (score(z).diff() < 0).all()


def test_scores_at_the_extremes():
    z = torch.tensor([[1e4, 0., 0.], [0., 0., 1e4], [0., 0., 0.], [-1e4, -1e4, -1e4], [1e38, -1e38, 0.]])
    for score in (msp, entropy, uncertainty, energy, max_logit, garbage_log_odds, garbage_probability):
        assert score(z).isfinite().all()
    assert uncertainty(z).tolist() == [0, 0, 1, 1, 0] and garbage_probability(z)[:2].tolist() == [0, 1]
    for score in (msp, entropy, uncertainty, garbage_log_odds): assert score(z[:0]).shape == (0,)


def test_scores_have_finite_gradients():
    for score in (msp, entropy, uncertainty, energy, max_logit, garbage_log_odds):
        z = torch.tensor([[60., 0., 0.], [0., 0., 0.], [-3., 2., 900.]], requires_grad=True)
        score(z).sum().backward()
        assert z.grad.isfinite().all(), score.__name__


def test_checked_logits_copies_nothing_needlessly_and_keeps_the_rows():
    z = torch.randn(4, 11, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert checked_logits(z) is z and torch.equal(checked_logits(z, 10), z[:, :10])
