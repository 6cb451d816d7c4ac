"Explorers without a browser: a slider is an object with a value, and what the browser would show is another."
import threading
import time
from base64 import b64decode
from io import BytesIO

import ipywidgets as widgets
import matplotlib
import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import precision_recall_curve, roc_curve

from nioodd.core.errors import NiooddError
from nioodd.core.models import Classifier
from nioodd.core.show import Plot, style
from nioodd.explore import explorer as explore
from nioodd.explore.explorer import EMPTY, Explorer, Newest, Picture, Stopped
from nioodd.explore.siblings import SiblingExplorer, scaled_logits, sibling_figures
from nioodd.explore.threshold_desk import ThresholdDesk, operating_point
from nioodd.trust.detector import TrustIntervalDetector
from nioodd.trust.intervals import uniform_sigma
from nioodd.trust.siblings import Siblings, plain_logits


def until(true, seconds=10):
    "Waits for what another thread does."
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.001)


class Doors:
    "Computations that stand at a door: `go(name)` opens it."
    def __init__(self): self.doors, self.begun, self.shown = {}, [], []
    def __call__(self, step, name):
        self.begun.append(name)
        while not self.doors.get(name):
            step(1, 2, name)
            time.sleep(0.001)
        return lambda: self.shown.append(name)
    def go(self, name): self.doors[name] = True


def test_the_newest_request_wins():
    explorer, f = Explorer(), Doors()
    explorer.run(f, "first")
    until(lambda: f.begun == ["first"])
    for name in ("second", "third", "last"): explorer.run(f, name)
    until(lambda: f.begun[-1] == "last")  # the first one was told to end though its door is shut
    f.go("last")
    explorer.wait()
    assert f.begun[0] == "first" and f.begun[-1] == "last" and f.shown == ["last"]


def test_of_many_requests_while_one_runs_only_the_last_is_computed():
    newest, door, log = Newest(), threading.Event(), []
    def job(job, i): door.wait(10); log.append(i)
    newest.run(job, 0)
    until(lambda: newest._job is not None)
    for i in range(1, 500): newest.run(job, i)
    door.set()
    newest.wait(10)
    assert log == [0, 499] and newest._thread is None


def test_requests_from_many_threads_end_with_one_of_them_shown_last_and_no_thread_left():
    explorer, shown = Explorer(), []
    def f(step, i): step(0, 1); return lambda: shown.append(i)
    threads = [threading.Thread(target=lambda k=k: [explorer.run(f, (k, i)) for i in range(200)]) for k in range(8)]
    for t in threads: t.start()
    for t in threads: t.join()
    explorer.wait()
    assert shown[-1][1] == 199 and explorer._newest._thread is None and explorer._newest._job is None
    for k in range(8):
        own = [i for who, i in shown if who == k]
        assert own == sorted(own)  # never back to an older one


@pytest.mark.parametrize("how", ["stop", "button"])
def test_stop_ends_what_runs_and_drops_what_waits(how):
    explorer, f = Explorer(), Doors()
    explorer.run(f, "first")
    until(lambda: f.begun)
    if how == "button": until(lambda: explorer.stop_button.layout.visibility == "visible")
    explorer.stop_button.click() if how == "button" else explorer.stop()
    explorer.wait()
    assert f.shown == [] and explorer.message.value == "stopped" and explorer.bar.layout.visibility == explorer.stop_button.layout.visibility == "hidden"
    f.go("again")
    explorer.run(f, "again")
    assert explorer.wait().message.value == "" and f.shown == ["again"]


def test_a_stopped_computation_that_ends_well_is_not_shown():
    explorer, door, begun, shown = Explorer(), threading.Event(), threading.Event(), []
    def deaf(step): begun.set(); door.wait(10); return lambda: shown.append(1)
    explorer.run(deaf)
    begun.wait(10)
    explorer.stop()
    door.set()
    explorer.wait()
    assert shown == [] and explorer.message.value == "stopped"


def test_stopped_passes_an_except_exception_and_runs_finally():
    explorer, log = Explorer(), []
    def f(step):
        try:
            while True:
                try: step(0, 1); time.sleep(0.001)
                except Exception: log.append("taken for a failure")
        finally: log.append("finally")
    explorer.run(f)
    until(lambda: explorer._newest._job is not None)
    explorer.stop()
    explorer.wait()
    assert log == ["finally"] and not issubclass(Stopped, Exception)


@pytest.mark.parametrize("error, line", [
    (NiooddError("no such class; expected 0 to 9; choose <another>"), "no such class; expected 0 to 9; choose &lt;another&gt;"),
    (ZeroDivisionError("division by zero"), "ZeroDivisionError: division by zero"), (SystemExit("3"), "SystemExit: 3")])
def test_errors_are_shown_and_raised_whether_in_computing_or_in_showing(error, line):
    def raises(): raise error
    for f in (lambda step: raises(), lambda step: raises):
        explorer = Explorer()
        explorer.run(f)
        with pytest.raises(type(error)) as caught: explorer.wait()
        assert caught.value is error and line in explorer.message.value and "#D55E00" in explorer.message.value
        with pytest.raises(type(error)): explorer.wait()  # as long as it is the last computation
        explorer.run(lambda step: None)
        assert explorer.wait().message.value == ""


def test_wait_says_when_it_has_waited_in_vain():
    explorer, f = Explorer(), Doors()
    explorer.run(f, "a")
    with pytest.raises(NiooddError, match="still computing after 0.05 s"): explorer.wait(0.05)
    explorer.stop()
    explorer.wait()


def test_the_bar_moves_appears_late_and_does_not_flood(monkeypatch):
    explorer, moves, seen = Explorer(), [], []
    explorer.bar.observe(lambda c: moves.append(c["new"]), "value")
    explorer.bar.layout.observe(lambda c: seen.append(c["new"]), "visibility")
    def f(step):
        for i in range(20_001): step(i, 20_000)
    explorer.run(f)
    explorer.wait()
    assert moves[-1] == 20_000 and len(moves) < 1000 and explorer.bar.max == 20_000
    monkeypatch.setattr(explore, "APPEAR", 30)
    seen.clear()
    explorer.run(f)
    explorer.wait()
    assert seen == []
    monkeypatch.setattr(explore, "APPEAR", 0)
    explorer.run(lambda step: until(lambda: seen == ["visible"]))
    explorer.wait()
    assert seen == ["visible", "hidden"]


def test_follow_computes_at_once_and_after_each_change():
    explorer, a, b, got = Explorer(), widgets.IntSlider(1), widgets.Text("x"), []
    explorer.follow(lambda step, *values: lambda: got.append(values), a, b)
    explorer.wait()
    a.value = 5; explorer.wait()
    b.value = "y"; explorer.wait()
    assert got == [(1, "x"), (5, "x"), (5, "y")]


def test_threads_of_torch_are_handed_on_and_gradients_are_on():
    explorer, got, threads = Explorer(), [], torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        with torch.no_grad():
            explorer.run(lambda step: got.append((torch.get_num_threads(), torch.is_grad_enabled())))
            explorer.wait()
    finally: torch.set_num_threads(threads)
    assert got == [(3, True)]


@style()
def figure(n): return Plot(figsize=(n, 1))


def test_a_notebook_stores_the_pictures_from_top_to_bottom_and_errors_in_words():
    first, never, second = Picture(), Picture(), Picture()
    explorer = Explorer(widgets.HBox([first]), never, second)
    def f(step): time.sleep(0.1); return lambda: (first.show(figure, 2), second.show(figure(3)))
    explorer.run(f)
    bundle = explorer._repr_mimebundle_()  # waits
    assert Image.open(BytesIO(b64decode(bundle["image/png"]))).size == (240, 160) and bundle["text/plain"] == "Explorer"
    assert "application/vnd.jupyter.widget-view+json" in bundle
    explorer.run(lambda step: 1 / 0)
    assert explorer._repr_mimebundle_()["text/plain"] == "Explorer: division by zero"
    assert "image/png" not in Explorer(Picture())._repr_mimebundle_() and first.value != EMPTY == never.value


def test_explorers_that_draw_at_once_leave_the_style_outside_alone():
    before, explorers = dict(matplotlib.rcParams), [Explorer(Picture()) for _ in range(4)]
    def f(step, picture):
        for i in range(30): step(i, 30); picture.show(figure, 1 + i % 2)
    for e in explorers: e.run(f, e.children[0])
    for e in explorers: e.wait()
    assert dict(matplotlib.rcParams) == before


def test_close_stops_and_a_constructor_that_failed_can_be_collected(recwarn):
    explorer, f = Explorer(), Doors()
    explorer.run(f, "a")
    explorer.close()
    explorer.wait()
    assert f.shown == []

    class Fails(Explorer):
        def __init__(self): raise NiooddError("no")
    with pytest.raises(NiooddError): Fails()
    Fails.__new__(Fails).close()


# The threshold desk

@pytest.fixture
def scores():
    rng = np.random.default_rng(0)
    return rng.normal(0, 1, 300).round(1), {"near": rng.normal(1, 1, 200).round(1), "far": rng.normal(4, 1, 100).round(1)}  # rounded: ties


def test_operating_points_are_those_of_sklearn(scores):
    known, unknown = scores[0], scores[1]["near"]
    positive, minus = np.r_[np.ones(300), np.zeros(200)], -np.r_[known, unknown]
    fpr, tpr, at = roc_curve(positive, minus, drop_intermediate=False)
    points = [operating_point(known, unknown, -t) for t in at[1:]]
    np.testing.assert_allclose([(p["fpr"], p["tpr"]) for p in points], np.c_[fpr, tpr][1:])
    precision, recall, at = precision_recall_curve(positive, minus)
    points = [operating_point(known, unknown, -t) for t in at]
    np.testing.assert_allclose([(p["precision"], p["tpr"]) for p in points], np.c_[precision, recall][:-1])
    assert np.isnan(operating_point(known, unknown, -99)["precision"])


def test_the_sliders_take_each_other_along_and_the_picture_changes(scores):
    desk = ThresholdDesk(*scores)
    shown = [desk.wait().panels.value]
    assert (scores[0] <= desk.threshold.value).mean() >= 0.95
    desk.keep.value = 80
    shown.append(desk.wait().panels.value)
    assert desk.threshold.value == np.sort(scores[0])[239] and desk.keep.value == 80
    desk.threshold.value = 0.05
    shown.append(desk.wait().panels.value)
    assert desk.keep.value == pytest.approx(100 * (scores[0] <= 0.05).mean())
    desk.set.value = "far"
    shown.append(desk.wait().panels.value)
    assert len(set(shown)) == 4
    p = operating_point(scores[0], scores[1]["far"], 0.05)
    assert f"<b>{p['n_id']}</b>" in desk.table.value and f"<b>{100 - p['n_ood']}</b>" in desk.table.value
    for keep, threshold in ((0, scores[0].min()), (100, scores[0].max())):  # the slider reaches both ends
        desk.keep.value = keep
        assert desk.wait().threshold.value == threshold
    desk.threshold.value = desk.threshold.min
    assert desk.wait().keep.value == pytest.approx(100 * (scores[0] <= desk.threshold.min).mean())


def test_the_rows_hold_the_images_nearest_the_line(scores):
    known, unknown = scores[0], scores[1]["near"]
    marks = lambda x: np.tile((x * 10 + 100).astype(np.uint8)[:, None, None, None], (1, 1, 8, 8))  # each image is its score
    desk = ThresholdDesk(known, unknown, marks(known), torch.from_numpy(marks(unknown)), threshold=0.5)
    side = desk.wait()._sides["unknown"]
    near = side.border(0.5)
    assert (side.images[near, 0, 0, 0] == (side.scores[near] * 10 + 100).astype(np.uint8)).all()
    every = np.sort(np.r_[known, unknown])
    assert (side.scores[near[:10]] == every[every <= 0.5][::-1][:10]).all() and (side.scores[near[10:]] == every[every > 0.5][:10]).all()
    before = desk.grid.value
    desk.threshold.value = desk.threshold.max  # all accepted: one row
    assert desk.wait().grid.value != before and len(side.border(desk.threshold.max)) == 10


@pytest.mark.parametrize("args, line", [
    (([0.0, np.inf], [1.0]), "1 of the 2 scores of 'known' are not finite"), (([], [1.0]), "scores of known are empty"), (([1.0], {}), "ood_scores is empty"),
    (([1.0], [2.0], np.zeros((1, 1, 4, 4), np.uint8)), "images of one side only"),
    (([1.0], [2.0], np.zeros((1, 1, 4, 4), np.uint8), np.zeros((2, 1, 4, 4), np.uint8)), "2 images of 'unknown' for 1 scores"),
    (([1.0], [2.0], np.zeros((1, 1, 4, 4), np.uint8), np.zeros((1, 1, 5, 5), np.uint8)), "expected uint8 of one shape")])
def test_the_desk_says_what_it_cannot_take(args, line):
    with pytest.raises(NiooddError, match=line): ThresholdDesk(*args)


def test_one_score_on_each_side_is_enough():
    assert ThresholdDesk([1.0], [1.0]).wait().panels.value != EMPTY


# The siblings

@pytest.fixture
def network():
    torch.manual_seed(0)
    return Classifier(4, size=14)


@pytest.fixture
def images(): return torch.randint(256, (30, 1, 14, 14), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def nothing(*args): "A step that is never refused."


def test_scaled_logits_are_those_of_siblings_one_by_one(network, images):
    sigma = uniform_sigma(network.eval(), 0.2)
    z = scaled_logits(nothing, network, sigma, images, 0.5, 3, batch_size=7, seed=4)
    one_by_one = Siblings(network, {k: 0.5 * s for k, s in sigma.items()}, 3, seed=4)
    torch.testing.assert_close(z, plain_logits(network, [one_by_one.weights(i) for i in range(3)], images / 127.5 - 1), rtol=1e-4, atol=1e-5)


def test_figures_of_siblings_leave_the_network_out():
    known = 20 * torch.nn.functional.one_hot(torch.tensor([[0, 1], [0, 0]]), 3).float()
    assert sibling_figures(known, known, torch.tensor([0, 1]))["accuracy"] == 0.5
    assert sibling_figures(known, known, torch.tensor([0, 1]))["auroc"] == 0.5


def test_sliders_of_the_siblings(network, images):
    network.train()
    weights = {k: v.clone() for k, v in network.state_dict().items()}
    explorer = SiblingExplorer(network, images[:20], images[20:], torch.arange(20) % 4)
    first = explorer.wait().overview.value, explorer.answers.value
    explorer.index.value = 3
    assert explorer.wait().overview.value == first[0] and explorer.answers.value != first[1]  # another image: the rest stays
    explorer.scale.value = 4
    assert explorer.wait().overview.value != first[0]
    explorer.n.value = 4
    assert explorer.wait().logits[4, 4][0].shape == (4, 20, 4) and set(explorer.logits) == {(1, 2), (4, 2), (4, 4)}
    torch.testing.assert_close(explorer.logits[4, 4][1][:2], explorer.logits[4, 2][1], rtol=1e-4, atol=1e-5)
    explorer.all_button.click()
    assert {a for a, n in explorer.wait().logits if n == 4} == {2.0**e for e in range(-4, 5)}
    assert network.training and all(torch.equal(weights[k], v) for k, v in network.state_dict().items())


def test_a_detector_brings_its_intervals_seed_and_measure(network, images):
    detector = TrustIntervalDetector(network, uniform_sigma(network, 0.3), measure="dispersion", n=3, seed=7, classes=list("abcd"))
    explorer = SiblingExplorer(detector, images[:20], images[20:], torch.arange(20) % 4).wait()
    assert explorer.measure.value == "dispersion" and explorer.n.value == 3
    torch.testing.assert_close(explorer.logits[1, 3][0], detector.sibling_logits(images[:20]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("change, line", [
    (dict(labels=torch.arange(3)), "labels have shape \\[3\\] for 30 known images"), (dict(unknown=torch.zeros(0, 1, 14, 14, dtype=torch.uint8)), "30 known and 0 unknown"),
    (dict(known=torch.zeros(30, 1, 14, 14)), "expected uint8")])
def test_the_sibling_explorer_says_what_it_cannot_take(network, images, change, line):
    with pytest.raises(NiooddError, match=line): SiblingExplorer(network, **dict(known=images, unknown=images, labels=torch.arange(30) % 4) | change)
