"The threshold desk without a browser: its numbers are those of scikit-learn, its sliders move together."
import numpy as np
import pytest
import torch
from sklearn.metrics import precision_recall_curve, roc_curve

from nioodd.core.errors import NiooddError
from nioodd.explore.explorer import EMPTY
from nioodd.explore.threshold_desk import ThresholdDesk, operating_point


@pytest.fixture
def scores():
    "Rounded, so that there are ties."
    rng = np.random.default_rng(0)
    known, near, far = rng.normal(0, 1, 300), rng.normal(1, 1, 200), rng.normal(4, 1, 100)
    return known.round(1), {"near": near.round(1), "far": far.round(1)}


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
    known, desk = scores[0], ThresholdDesk(*scores)
    shown = [desk.wait().panels.value]
    assert (known <= desk.threshold.value).mean() >= 0.95
    desk.false_alarms.value = 20
    shown.append(desk.wait().panels.value)
    assert desk.threshold.value == np.sort(known)[239] and desk.false_alarms.value == 20
    desk.threshold.value = 0.05
    shown.append(desk.wait().panels.value)
    assert desk.false_alarms.value == pytest.approx(100 * (known > 0.05).mean())
    desk.set.value = "far"
    shown.append(desk.wait().panels.value)
    assert len(set(shown)) == 4


def test_the_table_counts(scores):
    desk = ThresholdDesk(*scores, threshold=0.05)
    desk.set.value = "far"
    p = operating_point(scores[0], scores[1]["far"], 0.05)
    table = desk.wait().table.value
    assert f"<b>{p['n_id']}</b>" in table and f"<b>{100 - p['n_ood']}</b>" in table
    assert f"<b>{300 - p['n_id']}</b> ({1 - p['tpr']:.1%}) false alarms" in table


def test_the_sliders_reach_both_ends(scores):
    known, desk = scores[0], ThresholdDesk(*scores)
    for false_alarms, threshold in ((100, known.min()), (0, known.max())):
        desk.false_alarms.value = false_alarms
        assert desk.wait().threshold.value == threshold
    desk.threshold.value = desk.threshold.min
    assert desk.wait().false_alarms.value == pytest.approx(100 * (known > desk.threshold.min).mean())


def as_images(scores):
    "Images that show their score."
    marks = (scores * 10 + 100).astype(np.uint8)
    return np.tile(marks[:, None, None, None], (1, 1, 8, 8))


def test_the_rows_hold_the_images_nearest_the_line(scores):
    known, unknown = scores[0], scores[1]["near"]
    desk = ThresholdDesk(known, unknown, as_images(known), torch.from_numpy(as_images(unknown)), threshold=0.5)
    mixed = desk.wait().mixed["unknown"]
    near = mixed.border(0.5)
    assert (mixed.images[near] == as_images(mixed.scores[near])).all()
    every = np.sort(np.r_[known, unknown])
    assert (mixed.scores[near[:10]] == every[every <= 0.5][::-1][:10]).all()
    assert (mixed.scores[near[10:]] == every[every > 0.5][:10]).all()
    before = desk.grid.value
    desk.threshold.value = desk.threshold.max  # all accepted: one row
    assert desk.wait().grid.value != before and len(mixed.border(desk.threshold.max)) == 10


def blank(n, size=4): return np.zeros((n, 1, size, size), np.uint8)


@pytest.mark.parametrize("args, line", [
    (([0.0, np.inf], [1.0]), "1 of the 2 scores of 'known' are not finite"),
    (([], [1.0]), "scores of known are empty"),
    (([1.0], {}), "ood_scores is empty"),
    (([1.0], [2.0], blank(1)), "images of one side only"),
    (([1.0], [2.0], blank(1), blank(2)), "2 images of 'unknown' for 1 scores"),
    (([1.0], [2.0], blank(1), blank(1, 5)), "expected uint8 of one shape")])
def test_the_desk_says_what_it_cannot_take(args, line):
    with pytest.raises(NiooddError, match=line): ThresholdDesk(*args)


def test_one_score_on_each_side_is_enough():
    assert ThresholdDesk([1.0], [1.0]).wait().panels.value != EMPTY
