"""The garbage-class detector: its score, its verdict, and life inside pytorch-ood."""
import pytest
import torch
from pytorch_ood.benchmark import Benchmark
from pytorch_ood.detector import EnergyBased
from pytorch_ood.metrics import OODMetrics
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from nioodd.core.detector import Detector
from nioodd.core.errors import NiooddError
from nioodd.core.images import to_input
from nioodd.core.metrics import ood_metrics
from nioodd.core.models import Classifier
from nioodd.core.scores import garbage_log_odds
from nioodd.inversion.detector import GarbageDetector

SHAPE = (1, 8, 8)


def images(n, low=0, high=256, seed=0):
    rng = torch.Generator().manual_seed(seed)
    return torch.randint(low, high, (n, *SHAPE), dtype=torch.uint8, generator=rng)


@pytest.fixture
def network():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = Classifier(4, size=8)
        net(torch.randn(64, *SHAPE))  # batch norm's running statistics leave their initial values
    return net


@pytest.fixture
def detector(network):
    d = GarbageDetector(network, classes=["a", "b", "c"])
    d.calibrate(d.predict(images(200)))
    return d


def test_score_is_the_log_odds_of_the_last_output(network):
    x = images(7)
    score = GarbageDetector(network, n_known=3).predict(x)
    assert score.dtype == torch.float64 and score.shape == (7,)
    assert torch.equal(score, garbage_log_odds(network.eval()(to_input(x))))


def test_verdict(detector):
    x = images(30)
    v, p = detector.verdict(x), detector.logits(x).double().softmax(1)
    kinds = dict(label=torch.int64, uncertainty=torch.float64, p_value=torch.float64,
                 garbage_probability=torch.float64, score=torch.float64, ood=torch.bool)
    assert {k: t.dtype for k, t in v.items()} == kinds and {len(t) for t in v.values()} == {30}
    assert torch.equal(v["label"], p[:, :3].argmax(1))
    assert torch.equal(v["ood"], detector.is_ood(x)) and torch.equal(v["score"], detector.predict(x))
    torch.testing.assert_close(v["garbage_probability"], p[:, 3])
    known = p[:, :3] / p[:, :3].sum(1, keepdim=True)
    torch.testing.assert_close(v["uncertainty"], (1 - (known**2).sum(1)) * 3 / 2)


def test_bad_construction(network):
    with pytest.raises(NiooddError, match="4 outputs; expected 5"): GarbageDetector(network, n_known=4)
    with pytest.raises(NiooddError, match="2 class names"): GarbageDetector(network, n_known=3, classes=["a", "b"])
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
    with pytest.raises(NiooddError, match="3 outputs; expected 4"):
        GarbageDetector(net, n_known=3).predict(images(2))


def test_a_saved_one_is_found_by_its_name_and_scores_alike(detector, tmp_path):
    loaded, x = Detector.load(detector.save(tmp_path)), images(20, seed=5)
    assert type(loaded) is GarbageDetector and loaded.classes == ["a", "b", "c"] and loaded.n_known == 3
    assert torch.equal(loaded.predict(x), detector.predict(x)) and torch.equal(loaded.is_ood(x), detector.is_ood(x))


# Inside pytorch-ood

class Small(Benchmark):
    "One ID set of tensors and two OOD sets."
    ood_names = ["dark", "noise"]
    known, labels = images(60, 100, 256, seed=1), torch.arange(60) % 3
    unknown = dict(dark=images(40, 0, 50, seed=2), noise=images(30, seed=3))

    def train_set(self): return TensorDataset(self.known, self.labels)

    def test_sets(self, known=True, unknown=True):
        return [self.mixed(o) for o in self.unknown.values()]

    def mixed(self, o):
        labels = torch.cat([self.labels, -torch.ones(len(o), dtype=torch.long)])
        return TensorDataset(torch.cat([self.known, o]), labels)


@pytest.mark.parametrize("batch_size", [7, 32])
def test_drops_into_the_benchmark(network, batch_size):
    benchmark = Small()
    network.train()  # as training left it: the benchmark does not switch it
    d = GarbageDetector(network).fit(DataLoader(benchmark.train_set(), batch_size=32))
    rows = benchmark.evaluate(d, loader_kwargs=dict(batch_size=batch_size))
    assert [r["Dataset"] for r in rows] == benchmark.ood_names and network.training
    for r in rows:
        # the same batches as the benchmark's: a score's last bits depend on the batch it was computed in
        x = torch.cat([benchmark.known, benchmark.unknown[r["Dataset"]]])
        scores = torch.cat([d.predict(part) for part in x.split(batch_size)])
        m = ood_metrics(scores[:60], scores[60:])
        ours = [m["auroc"], m["aupr_in"], m["aupr_out"], m["fpr95_ood_positive"]]
        theirs = [r["AUROC"], r["AUPR-IN"], r["AUPR-OUT"], r["FPR95TPR"]]
        assert theirs == pytest.approx(ours, rel=0, abs=1e-12)


def test_stands_beside_another_detector_in_one_benchmark(network):
    class Floats(Small):
        known, unknown = to_input(Small.known), {k: to_input(v) for k, v in Small.unknown.items()}
    rows = Floats().evaluate([GarbageDetector(network), EnergyBased(network.eval())], loader_kwargs=dict(batch_size=32))
    assert [r["Detector"] for r in rows] == ["GarbageDetector", "EnergyBased"] * 2
    assert all(0 <= r["AUROC"] <= 1 for r in rows)


def test_drops_into_oodmetrics(detector):
    metrics, i, o = OODMetrics(), images(50), images(50, high=60)
    for x, y in ((i, torch.zeros(50).long()), (o, -torch.ones(50).long())): metrics.update(detector(x), y)
    assert metrics.compute()["AUROC"] == pytest.approx(ood_metrics(detector(i), detector(o))["auroc"], abs=1e-12)
