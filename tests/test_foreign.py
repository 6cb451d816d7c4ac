"""Anybody's network: every call is right, or says in one line why it cannot be; and the network is left as it was."""
import pytest
import torch
from foreign_networks import NETWORKS, images, make, reference, same_state, state
from torch import nn
from torch.testing import assert_close

from nioodd import LayerwiseDetector, ScoreDetector, TrustIntervalDetector, TrustIntervals
from nioodd.core.detector import Detector
from nioodd.core.errors import NiooddError
from nioodd.core.forward import features_of, logits_of
from nioodd.inversion.invert import invert
from nioodd.posthoc.baselines import BASELINES, bayes_adapter
from nioodd.posthoc.outputs import network_outputs

# What some networks cannot do, and a word of the line that says so
NO_LAYERS, NO_HEAD = "no linear or convolutional layer", "not those of its last linear layer"
REFUSED = {
    ("returns a tuple", "*"): "expected logits",
    ("a linear layer only", "layerwise"): "nothing to listen to",
    ("doubles the batch", "layerwise"): "nothing to listen to",
    ("scripted", "trust"): "TorchScript", ("float16", "trust"): "float16",
    ("quantised", "odin"): "cannot be computed", ("a thousand classes", "vim"): "no training image of class",
}
REFUSED |= {("doubles the batch", call): "rows for" for call in ("features", "outputs", "vim", "odin")}
for name in ("scripted", "exported", "its forward is replaced"):
    REFUSED |= {(name, call): NO_LAYERS for call in ("layerwise", "features", "outputs", "vim", "odin")}
for name in ("one logit", "one logit, no axis", "quantised", "tensors that do not copy"): REFUSED[name, "vim"] = NO_HEAD
# Scores that some networks cannot have: they need a sequence of layers, the output layer's weights, or float32
SEQUENCE = {"rankfeat", "gram"}
WEIGHTS = {"gmm", "knn", "vim", "dice", "nnguide", "fdbd", "nci", "pnml", "lts", "react", "vra", "scale", "ash_s",
           "ash_p", "ash_b", "gradnorm", "grad_uncertainty", "nac"}
SELDOM = {"returns an object": SEQUENCE, "channels last inside": SEQUENCE, "tokens": SEQUENCE,
          "compiled in part": SEQUENCE, "float64": {"nnguide", "fdbd", "nci", "pnml"}, "one logit": {"gram"} | WEIGHTS}
NOT_INVERTED = {"float16", "returns a tuple", "quantised", "scripted", "exported", "doubles the batch",
                "its forward is replaced"}


def refused(name: str, call: str) -> str | None: return REFUSED.get((name, "*"), REFUSED.get((name, call)))


def close(found, expected):
    half = expected.dtype in (torch.float16, torch.bfloat16)
    assert_close(found.double(), expected.double(), rtol=2e-2 if half else 1e-4, atol=2e-2 if half else 1e-4)


def tried(name: str, call: str, run):
    "What `run` returns; None where the line that is expected says why there is nothing."
    said = refused(name, call)
    if said is None: return run()
    with pytest.raises(NiooddError, match=said): run()
    return None


@pytest.fixture(params=NETWORKS, scope="module")
def name(request): return request.param


@pytest.fixture(scope="module")
def net(name): return make(name)


@pytest.fixture
def x(name, net):
    before = state(net)
    yield images(name, 240)
    assert same_state(before, state(net)), "the network was changed"


def test_logits(net, name, x):
    given = x[:20].clone()
    found = tried(name, "logits", lambda: logits_of(net, given))
    if found is not None: close(found, reference(net, x[:20]))
    assert torch.equal(given, x[:20])


def test_features(net, name, x):
    found = tried(name, "features", lambda: features_of(net, x[:20]))
    if found is not None: close(found[0], reference(net, x[:20]))
    outputs = tried(name, "outputs", lambda: network_outputs(net, x[:20]))
    if outputs is not None: assert outputs.features.ndim == outputs.before.ndim == 2


def judged(d: Detector, net: nn.Module, x: torch.Tensor):
    "A verdict is the network's own answer, and does not depend on the company."
    v, z = d.verdict(x), reference(net, x)
    assert (z.gather(1, v["label"][:, None])[:, 0].double() >= z.double().amax(1) - 2e-2).all()
    assert_close(d.verdict(x[3:5])["score"], v["score"][3:5], rtol=2e-2, atol=2e-2)
    assert 0 <= v["p_value"].min() and v["p_value"].max() <= 1


def test_layerwise(net, name, x, tmp_path):
    d = tried(name, "layerwise", lambda: LayerwiseDetector(net).fit(x[:140], x[140:]))
    if d is None: return
    judged(d, net, images(name, 40, seed=1))
    if name == "quantised": # Its weights are no tensors
        with pytest.raises(NiooddError, match="quantised"): d.save(tmp_path/"d")
        return
    again = LayerwiseDetector.load(d.save(tmp_path/"d"), make(name))
    assert torch.equal(again.predict(x[:9]), d.predict(x[:9]))


def outputs(net, x):
    "How many classes the network tells apart; of one without logits any number."
    z = reference(net, x[:2])
    return 2 if z is None else z.shape[1]


@pytest.mark.parametrize("score", ["vim", "odin"])
def test_scores(net, name, x, score):
    labels = torch.arange(140) % outputs(net, x)
    d = tried(name, score, lambda: ScoreDetector(net, score).fit((x[:140], labels), x[140:]))
    if d is not None: judged(d, net, images(name, 40, seed=1))


def test_trust_intervals(net, name, x):
    def fit():
        trust = TrustIntervals(net)
        labels = logits_of(net, x[:40]).argmax(1)
        trust.fit([(x[:40], labels)], steps=1, progress=False)
        return TrustIntervalDetector(net, trust).fit(held_out=x[140:])
    d = tried(name, "trust", fit)
    if d is not None: judged(d, net, images(name, 40, seed=1))


def test_inversion(net, name, x):
    size, channels = NETWORKS[name][1][-1], NETWORKS[name][1][0]
    try: found = invert(net, 8, size=size, channels=channels, steps=2, batch_size=8, progress=False)
    except NiooddError as e:
        assert "\n" not in str(e)
        assert len(NETWORKS[name][1]) != 3 or name in NOT_INVERTED, str(e)
    else: close(found.probabilities, reference(net, found.images).float().softmax(1))


def test_every_score_takes_it_or_says_why_not(monkeypatch):
    "All scores, on networks whose layers are found in unusual ways. Few need what such a network does not have."
    monkeypatch.setitem(bayes_adapter.__kwdefaults__, "steps", 5)  # of 400: whether it can be trained shows at once
    for name, few in SELDOM.items():
        net, x = make(name), images(name, 120)
        y, not_taken = torch.arange(80) % outputs(net, x), set()
        for score in BASELINES:
            try: ScoreDetector(net, score).fit((x[:80], y), (x[80:], y[:40])).verdict(x[:4])
            except NiooddError as e:
                assert "\n" not in str(e)
                not_taken.add(score)
        # she wants a right answer of each class, which these may not give; mc_dropout wants dropout
        assert not_taken - {"she", "mc_dropout"} == few, name
