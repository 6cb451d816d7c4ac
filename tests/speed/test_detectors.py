"pytorch-ood's detectors give the scores that nioodd's baselines give; what the times are made of; errors in one line."
import time

import pytest
import torch
from torch.testing import assert_close

from nioodd.core.errors import NiooddError
from nioodd.core.models import ARCHITECTURES, architecture
from nioodd.posthoc.baselines import BASELINES
from nioodd.posthoc.outputs import network_outputs
from nioodd.speed.detectors import (
    TOLERANCE,
    USUAL,
    SecondsPerImage,
    Sizes,
    TableSeconds,
    bench_detectors,
    disagreement,
    layerwise_cost,
    make_setup,
    network_parts,
    table_seconds,
)

SMALL = dict(images=60, fit_images=200, train_images=200)


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def c1(): return make_setup("C1", **SMALL)


def test_every_baseline_that_reads_outputs_has_its_counterpart():
    assert set(USUAL) == {name for name, b in BASELINES.items() if b.needs == "outputs"}


def test_a_setup_has_as_many_images_as_were_asked_for_and_is_reproducible(c1):
    state = torch.get_rng_state()
    again = make_setup("C1", **SMALL)
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(c1.model.state_dict().values(), again.model.state_dict().values()))
    assert len(c1.images) == len(c1.labels) == 200 and [len(x) for x in c1.sets.values()] == [60] * 4
    assert c1.labels.unique().tolist() == list(range(10))
    assert not c1.model.training
    assert all(p.grad is None for p in c1.model.parameters())
    # it has learnt something
    assert (network_outputs(c1.model, c1.held_out).logits.argmax(1) == c1.held_out_labels).double().mean() > 0.3


def test_more_images_than_there_are_come_again_shifted():
    s = make_setup("C1", images=5, fit_images=4010, train_images=200)
    assert len(s.images) == 4010 and torch.equal(s.labels[4000:], s.labels[:10])
    assert not torch.equal(s.images[4000:], s.images[:10])


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_pieces_make_up_the_network(name):
    with torch.random.fork_rng():
        net = architecture(name).eval()
        a = net.arguments
        x = torch.rand(2, a["channels"], a["size"], a["size"]) * 2 - 1
    p = network_parts(net, x)
    with torch.no_grad():
        assert_close(p.head(p.encoder(x)), net(x))
        assert p.backbone(x).shape == (2, p.head.in_features, 1, 1)
        assert_close(p.map_head(p.backbone(x)), net(x))
    assert (p.before is None) == (name in ("C3", "C5", "R18"))
    if p.before is not None: assert_close(p.before(x).detach().flatten(1), network_outputs(net, x).before)


@pytest.mark.parametrize("name", USUAL)
def test_scores_agree_with_pytorch_ood(name, c1):
    before = {k: v.clone() for k, v in c1.model.state_dict().items()}
    assert disagreement(name, c1) < TOLERANCE
    assert torch.get_default_dtype() == torch.float32
    assert all(v.dtype == before[k].dtype and torch.equal(v, before[k]) for k, v in c1.model.state_dict().items())


def test_a_difference_is_seen(c1, monkeypatch):
    monkeypatch.setitem(USUAL, "msp", USUAL["energy"])
    assert disagreement("msp", c1) > 10 * TOLERANCE


def test_ratios_are_usual_over_ours_within_a_round():
    assert SecondsPerImage([2.0, 9.0, 4.0], [1.0, 3.0, 4.0], [0.1] * 3).ratio == 2.0
    assert TableSeconds(1.0, dict(a=4.0, b=6.0), dict(a=0.5, b=0.5)).ratio == 5.0


def test_a_table_shares_its_forward_passes(c1):
    "pytorch-ood passes what it fits on and four sets through the network for each detector; nioodd all sets once."
    seen = []
    hook = c1.model.register_forward_pre_hook(lambda m, x: seen.append(len(x[0])))
    try: t, fitted = table_seconds(["msp", "energy", "kl_matching"], c1, 50)
    finally: hook.remove()
    held_out, sets = len(c1.held_out), 4 * 60
    ours = len(c1.images) + held_out + sets
    pieces = 3 * 2                                                       # two images each, to find the network's pieces
    assert sum(seen) == ours + 3 * sets + held_out + pieces              # of these three only kl_matching is fitted
    assert set(t.usual) == set(t.ours) == set(fitted) == {"msp", "energy", "kl_matching"} and t.forwards > 0


def test_layerwise_costs_at_least_a_pass(c1):
    # no more than that: this is a check of the ratio's direction
    assert layerwise_cost(c1, rounds=2, limit=0.0, clock=time.process_time) > 0.5


def test_report_has_its_rows():
    state = torch.get_rng_state()
    report = bench_detectors(detectors=("msp", "vim"), sizes=Sizes(30, 200, 200), rounds=2,
                             limit=0.0, progress=False)
    lines = report.splitlines()
    rows = [line for line in lines if line.startswith(("msp ", "vim ", "detector "))]
    assert len(rows) == 3 and len({len(r) for r in rows}) == 1           # columns line up
    for start in ("each detector at least as fast", "same scores to 1e-03", "table of 2 detectors × 3 sets",
                  "LayerwiseDetector: "):
        assert sum(line.startswith(start) and ("met" in line or "MISSED" in line) for line in lines) == 1, start
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("options, said", [
    (dict(detectors=("vimm",)), "vim"),
    (dict(detectors=("odin",), sizes=Sizes(5, 200, 200)), "odin needs images"),
    (dict(detectors=()), "nothing to measure"),
    (dict(architectures=()), "nothing to measure"),
    (dict(architectures=("C9",)), "C9"),
    (dict(sizes=Sizes(images=0)), "0 images"),
    (dict(sizes=Sizes(fit_images=10)), "10 to fit on"),
    (dict(batch=0), "batches of 0"),
    (dict(rounds=0), "0 rounds"),
    (dict(sizes=Sizes(5, 200, 2)), "of 10 digits")])
def test_one_line_for_what_cannot_be_measured(options, said):
    with pytest.raises(NiooddError, match=said) as e: bench_detectors(progress=False, **options)
    assert "\n" not in str(e.value)
