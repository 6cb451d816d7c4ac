"""A detector as one file: the same verdicts under PyTorch's and ONNX's runtimes, nothing half written."""
import copy
import importlib
import json
import math

import pytest
import torch
from torch import nn

from nioodd.app.export import LACKING, OWN_RATE, Exported, Verdict, compare, describe, export, traced
from nioodd.core.detector import Detector
from nioodd.core.errors import NiooddError
from nioodd.core.models import Classifier, Residual, conv_norm
from nioodd.inversion.detector import GarbageDetector
from nioodd.posthoc.layerwise import LayerwiseDetector
from nioodd.trust.agreement import MEASURES
from nioodd.trust.detector import TrustIntervalDetector
from nioodd.trust.intervals import uniform_sigma

SHAPE = (1, 8, 8)


def images(n, seed=0, shape=SHAPE):
    return torch.randint(256, (n, *shape), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def needs_onnx():
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package, reason=f"{package} is not installed: pip install 'nioodd[onnx]'")


@pytest.fixture(params=[".pt2", ".onnx"])
def suffix(request):
    if request.param == ".onnx": needs_onnx()
    return request.param


@pytest.fixture(autouse=True)
def own_randomness():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    net = Classifier(4, size=8)
    net(torch.randn(64, *SHAPE))  # batch norm's running statistics leave their initial values
    return net.eval()


@pytest.fixture(scope="module")
def detectors(network):
    sigma, classes = uniform_sigma(network, 0.2), ["a", "b", "c"]
    found = dict(layerwise=LayerwiseDetector(network, classes=classes, n_known=3),
                 garbage=GarbageDetector(network, classes=classes),
                 trust=TrustIntervalDetector(network, sigma, n=2, n_known=3))
    for d in found.values(): d.fit(images(200), images(400, seed=1), false_alarms=0.01)
    return found


@pytest.fixture(scope="module")
def written(detectors, tmp_path_factory):
    "written(name, suffix): that detector's file, made once."
    folder, made = tmp_path_factory.mktemp("written"), {}
    def get(name, suffix):
        if (name, suffix) not in made:
            made[name, suffix] = export(detectors[name], folder / f"{name}{suffix}", images=images(50, seed=2))
        return made[name, suffix]
    return get


# The same scores

@pytest.mark.parametrize("name", ["layerwise", "trust"])  # test_cli.py has the garbage detector
def test_same_verdicts_to_1e5_from_the_file_for_any_batch(name, suffix, detectors, written):
    detector, x = detectors[name], images(700, seed=2)
    x[350:] = 255 - x[350:] // 4  # what none of them has seen
    again = Exported(written(name, suffix).path)
    want, got = detector.verdict(x), again.verdict(x)
    assert {k: (t.dtype, t.shape) for k, t in got.items()} == {k: (t.dtype, t.shape) for k, t in want.items()}
    apart = (got["score"] - want["score"]).abs() / want["score"].abs().clamp_min(1)
    assert (apart <= 1e-5).all()
    d = compare(detector, again.verdict, x)
    assert d.images == 700 and d.score == apart.max()
    assert torch.equal(got["label"], want["label"]) and torch.equal(got["ood"], want["ood"])
    for n in (0, 1, 2, 7, 501): assert all(len(t) == n for t in again.verdict(x[:n]).values())
    one = torch.cat([again.verdict(i[None])["score"] for i in x[:20]])
    torch.testing.assert_close(one, got["score"][:20], rtol=1e-5, atol=1e-5)


def flat(gain=1.0):
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 4))
    with torch.no_grad(): net[1].weight.normal_(0, gain)
    return net.eval()


def residual():
    "One block of C3's kind, with the shortcut where the shape changes: C3 itself has nine."
    return nn.Sequential(conv_norm(1, 4), nn.ReLU(), Residual(4, 6, 2),
                         nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4))


def block():
    "One block of C4's kind, on colour images: C4 itself has three."
    first = nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU()
    second = nn.Conv2d(4, 4, 3, padding=1), nn.MaxPool2d(2), nn.ReLU(), nn.Dropout(0.3)
    return nn.Sequential(*first, *second, nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 4))


def linear(): return nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 4))


@pytest.mark.parametrize("make, channels, suffix", [
    (residual, 1, ".onnx"), (residual, 1, ".pt2"), (block, 3, ".pt2"), (linear, 1, ".pt2")])
def test_any_network(make, channels, suffix, tmp_path):
    if suffix == ".onnx": needs_onnx()
    net, shape = make(), (channels, 8, 8)
    x, state = images(120, shape=shape), net.train().state_dict()
    before = {k: t.clone() for k, t in state.items()}
    d = LayerwiseDetector(net).fit(x[:40], x[40:], dimensions=16)
    some = images(24, seed=3, shape=shape)
    made = export(d, tmp_path / f"d{suffix}", size=8, channels=channels, images=some)
    assert made.difference.score <= 1e-5 and (made.size, made.channels) == (8, channels)
    assert net.training and all(p.requires_grad for p in net.parameters())
    assert all(torch.equal(t, before[k]) for k, t in net.state_dict().items())


class EveryMeasure(TrustIntervalDetector):
    "Its verdict has the score by each measure, too."
    def verdict_of_siblings(self, logits):
        return super().verdict_of_siblings(logits) | {name: f(logits) for name, f in MEASURES.items()}


def test_every_measure_of_siblings():
    "The graph that is translated to ONNX, run by PyTorch."
    net, x = flat(), images(300, seed=2)
    d = EveryMeasure(net, uniform_sigma(net, 0.3)).fit(held_out=images(80, seed=1))
    program = traced(d, 8, 1).run_decompositions(LACKING)
    assert not {n.target for n in program.graph.nodes} & {*LACKING}
    run, want = program.module(), d.verdict(x)
    found = run(x, OWN_RATE)
    for name in MEASURES: assert ((found[name] - want[name]).abs() <= 1e-5 * want[name].abs().clamp_min(1)).all(), name
    assert compare(d, lambda images: run(images, OWN_RATE), x).score <= 1e-5


def test_siblings_that_are_certain(tmp_path):
    "Where log1p and expm1 matter: probabilities within 1e-20 of 1, and siblings that differ by little."
    needs_onnx()
    net, x = flat(10.0), images(300, seed=4)
    d = TrustIntervalDetector(net, uniform_sigma(net, 1e-4), threshold=0.0)
    assert d.predict(x).amin() < -50
    assert export(d, tmp_path / "d.onnx", size=8, channels=1, images=x).difference.score <= 1e-5


def test_a_detector_of_ones_own(network, suffix, tmp_path):
    class Louder(GarbageDetector):
        def predict_logits(self, logits): return 2 * super().predict_logits(logits)

    class Bare(Detector):
        "A score and nothing else."
        def predict(self, x): return self.logits(x)[:, 0].double()
    louder, x = export(Louder(network, threshold=0.5), tmp_path / "d.pt2"), images(9)
    expected = 2 * GarbageDetector(network).predict(x)
    torch.testing.assert_close(louder.verdict(x)["score"], expected, rtol=1e-5, atol=1e-5)
    bare = Bare(network, threshold=0.0)
    exported = export(bare, tmp_path / f"bare{suffix}")
    assert exported.outputs == ["label", "uncertainty", "score", "ood"]
    torch.testing.assert_close(exported.verdict(x)["score"], bare.predict(x), rtol=1e-5, atol=1e-5)


def test_a_copy_in_one_pass_leaves_the_detector_alone(detectors):
    x = images(7, seed=3)
    for d in detectors.values():
        made = d.in_one_pass()
        assert made.exported_networks and not d.exported_networks and made.model is not d.model
        torch.testing.assert_close(made.predict(x), d.predict(x), rtol=1e-5, atol=1e-5)
        assert not any(p.requires_grad for p in made.model.parameters())


@pytest.mark.parametrize("name", ["layerwise", "trust"])
def test_false_alarms_are_an_input_of_the_graph(name, suffix, detectors, written):
    detector, x = detectors[name], torch.cat([images(300, seed=7), 255 - images(100, seed=8) // 3])
    again = Exported(written(name, suffix).path)
    for rate in (0.006, 0.01, 0.05, 0.123, 0.5):
        found = again.at_rate(rate).verdict(x)
        assert torch.equal(found["ood"], detector.is_ood(x, rate))
        assert torch.equal(found["ood"], detector.at_rate(rate).verdict(x)["ood"])
        assert torch.equal(found["score"], again.verdict(x)["score"])
    assert again.at_rate(0.01).threshold == detector.threshold_at(0.01) and again.at_rate(0.123).threshold is None


def test_onnx_elsewhere_takes_a_rate(detectors, written):
    needs_onnx()
    import onnxruntime
    session = onnxruntime.InferenceSession(written("layerwise", ".onnx").path)
    x, names = images(60, seed=9), [o.name for o in session.get_outputs()]
    for rate in (math.nan, 0.3):
        given = dict(images=x.numpy(), false_alarms=torch.tensor(rate, dtype=torch.float64).numpy())
        found = dict(zip(names, session.run(None, given)))
        assert (found["ood"] == detectors["layerwise"].is_ood(x, None if math.isnan(rate) else rate).numpy()).all()


def test_a_rate_that_cannot_be_had(network, detectors, written, tmp_path):
    e = written("layerwise", ".pt2")
    for rate in (0, 1, 0.001, -1, math.nan, "0.1", None):
        assert "expected a share from 0.005 to 1" in one_line(e.at_rate, rate)
    bare = export(GarbageDetector(network, threshold=0.0), tmp_path / "d.pt2")
    assert "takes no rate of false alarms" in one_line(bare.at_rate, 0.1)


# What ONNX lacks

def test_replacements_are_what_they_replace():
    log1p, expm1, searchsorted, pool = LACKING.values()
    for dtype, rtol in ((torch.float64, 2e-12), (torch.float32, 2e-3)):
        x = torch.logspace(-20, -0.001, 999, dtype=dtype)
        for s in (-1, 1):
            torch.testing.assert_close(log1p(s * x), torch.log1p(s * x), rtol=rtol, atol=0)
            torch.testing.assert_close(expm1(s * x), torch.expm1(s * x), rtol=rtol, atol=0)
    three = torch.tensor(3.0)
    assert log1p(torch.tensor(-1.0)) == -math.inf and expm1(three) == torch.expm1(three)
    edges, x = torch.tensor([0.0, 1, 1, 1, 5]), torch.tensor([[-1.0, 0, 1], [2, 5, math.inf]])
    for right in (False, True):
        assert torch.equal(searchsorted(edges, x, right=right), torch.searchsorted(edges, x, right=right))
    for h, w, out in ((8, 8, 4), (7, 5, 4), (3, 9, 3), (5, 5, 1)):
        m = torch.randn(2, 3, h, w)
        assert torch.equal(pool(m, [out, out])[0], nn.functional.adaptive_max_pool2d(m, out))


# What the file says

# Half of the 400 held-out images calibrate a layerwise detector: no p-value is smaller than 1/201; of the others 1/401
RATES = ["0.005", "0.01", "0.02", "0.05", "0.1", "0.2"]


@pytest.mark.parametrize("name, rates", [("layerwise", RATES), ("garbage", RATES), ("trust", RATES)])
def test_thresholds_of_false_alarms(name, rates, detectors):
    d = detectors[name]
    scores, thresholds = d.predict(images(300, seed=5)), describe(d, 8, 1)["false_alarms"]
    assert list(thresholds) == rates
    for rate, t in thresholds.items(): assert torch.equal(scores > t, d.p_values(scores) <= float(rate))


def test_without_a_calibration_there_is_one_threshold(network):
    assert "false_alarms" not in describe(GarbageDetector(network, threshold=0.0), 8, 1)


def test_metadata(detectors, suffix, written):
    e = written("layerwise", suffix)
    assert Exported(e.path).about == e.about == describe(detectors["layerwise"], 8, 1)
    assert e.classes == ["a", "b", "c"] and e.threshold == detectors["layerwise"].threshold
    assert e.about["detector"] == "LayerwiseDetector"
    if suffix == ".onnx":
        import onnx
        model = onnx.load(e.path)
        onnx.checker.check_model(model)
        assert json.loads({p.key: p.value for p in model.metadata_props}["threshold"]) == e.threshold
        given, rate = model.graph.input
        assert rate.name == "false_alarms" and not rate.type.tensor_type.shape.dim
        outputs = [o.name for o in model.graph.output]
        assert given.name == "images" and outputs == ["label", "uncertainty", "p_value", "score", "ood", "early"]
        kind = given.type.tensor_type
        assert kind.elem_type == onnx.TensorProto.UINT8 and kind.shape.dim[0].dim_param


# What is not the same, and what cannot be

def test_a_difference_is_found(detectors):
    x = images(40, seed=6)
    for d in detectors.values():
        same = {k: t.clone() for k, t in d.verdict(x).items()}
        compare(d, lambda _: same, x, tolerance=1e-5)
        changes = dict(score=same["score"] * (1 + 3e-4), label=(same["label"] + 1) % 3, ood=~same["ood"],
                       uncertainty=same["uncertainty"] + 1e-4, p_value=same["p_value"] + 0.5)
        for k, changed in changes.items():
            with pytest.raises(NiooddError, match=rf"its {k} of \d+ among 40"):
                compare(d, lambda _: same | {k: changed}, x, tolerance=1e-5)
        with pytest.raises(NiooddError, match="its score of 40"):
            compare(d, lambda _: same | dict(score=same["score"] * math.nan), x, tolerance=1e-5)


def test_nothing_is_written_when_the_scores_differ(network, tmp_path):
    class Changed(GarbageDetector):
        def predict_logits(self, logits):
            return super().predict_logits(logits) * (1 if torch.compiler.is_compiling() else 1.01)
    file = tmp_path / "d.pt2"
    file.write_text("what was there")
    with pytest.raises(NiooddError, match="does not judge as the detector does"):
        export(Changed(network, threshold=0.0), file)
    assert [*tmp_path.iterdir()] == [file] and file.read_text() == "what was there"


def test_what_is_no_number_is_ood(network):
    net = nn.Sequential(network, nn.Linear(4, 4, bias=False)).eval()
    with torch.no_grad(): net[1].weight.fill_(math.inf)
    program = traced(GarbageDetector(net, threshold=0.0), 8, 1)
    v = program.module()(images(3))
    assert v["score"].isnan().all() and v["ood"].all()


def one_line(f, *args, **kwargs):
    with pytest.raises(NiooddError) as e: f(*args, **kwargs)
    assert "\n" not in str(e.value)
    return str(e.value)


def test_errors_in_one_line(network, detectors, tmp_path):
    class Moody(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(nn.Flatten(), nn.Linear(64, 4))

        def forward(self, x): return self.body(x if x.mean() > 0 else -x)
    out = tmp_path / "d.pt2"
    assert "Moody cannot be exported" in one_line(export, GarbageDetector(Moody(), threshold=0.0), out, 8, 1)
    assert "does not say which images" in one_line(export, GarbageDetector(Moody(), threshold=0.0), out)
    assert "has no threshold" in one_line(export, GarbageDetector(network), out)
    assert "expected a Detector" in one_line(Verdict, network)
    assert "knows no images yet" in one_line(export, LayerwiseDetector(network, threshold=0.0), out)
    assert "neither .onnx nor .pt2" in one_line(export, detectors["garbage"], tmp_path / "d.zip")
    assert "this network takes [N, 1, 8, 8]" in one_line(export, detectors["garbage"], out, size=9)
    assert not list(tmp_path.iterdir())
    e = export(detectors["garbage"], out)
    for bad in (images(2).float(), images(2, shape=(1, 9, 8)), images(2)[0]):
        assert "takes uint8 [B, 1, 8, 8]" in one_line(e.verdict, bad)
    assert "does not exist" in one_line(Exported, tmp_path / "missing.pt2")
    out.write_bytes(out.read_bytes()[:500])
    assert "cannot be read" in one_line(Exported, out)
    torch.export.save(torch.export.export(network, (torch.zeros(2, *SHAPE),)), out)
    assert "could run code" in one_line(Exported, out)
    assert "was not written by nioodd export" in one_line(Exported, out, None, True)


def test_without_onnx_one_line(detectors, tmp_path, monkeypatch):
    real = importlib.import_module
    def absent(name, *args):
        if name.startswith("onnx"): raise ImportError(name)
        return real(name, *args)
    monkeypatch.setattr("nioodd.app.export.import_module", absent)
    assert "pip install 'nioodd[onnx]'" in one_line(export, detectors["garbage"], tmp_path / "d.onnx")
    (tmp_path / "e.onnx").write_bytes(b"x")
    assert "pip install 'nioodd[onnx]'" in one_line(Exported, tmp_path / "e.onnx")
    assert export(detectors["garbage"], tmp_path / "d.pt2").difference.score <= 1e-5


SOUND = dict(label=torch.zeros(2).long(), score=torch.zeros(2), ood=torch.zeros(2).bool())


@pytest.mark.parametrize("change", [
    dict(label=torch.tensor([0, 4])), dict(label=torch.tensor([-1, 0])), dict(label=torch.zeros(2)),
    dict(label=torch.zeros(3).long()), dict(ood=torch.zeros(2)), dict(ood=torch.zeros(1).bool()), dict(score=None)])
def test_what_a_file_says_is_a_verdict_on_each_image(written, change):
    "A file may compute anything; rows that are too many would go to the names of other images."
    e = copy.copy(written("garbage", ".pt2"))
    e._run = lambda images, *rate: {k: v for k, v in (SOUND | change).items() if v is not None}
    with pytest.raises(NiooddError, match="gives no verdict on 2 images"): e.verdict(images(2))
    e._run = lambda images, *rate: SOUND | dict(score=torch.tensor([0.0, math.nan]))
    assert e.verdict(images(2))["ood"].tolist() == [False, True]


def test_an_error_of_the_runtime_is_one_line(written):
    def fails(*args): raise RuntimeError("no room\nfor this")
    e = copy.copy(written("garbage", ".pt2"))
    e._run = fails
    with pytest.raises(NiooddError, match="cannot judge 2 images .no room for this"): e.verdict(images(2))


def test_onnx_reads_no_other_file(tmp_path, monkeypatch):
    "A tensor may say that it lies in another file, beside the one that is read: in the working folder."
    needs_onnx()
    import onnx
    monkeypatch.chdir(tmp_path)
    (tmp_path/"secret").write_text("s" * 16)
    kinds = onnx.TensorProto
    tensor = kinds(name="w", data_type=kinds.UINT8, dims=[16], data_location=kinds.EXTERNAL)
    tensor.external_data.add(key="location", value="secret")
    out = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.UINT8, [16])
    graph = onnx.helper.make_graph([onnx.helper.make_node("Identity", ["w"], ["y"])], "g", [], [out], [tensor])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=9)
    (tmp_path/"d.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(NiooddError, match="External data"): Exported("d.onnx")
