"""Explorers from names, and the page of one cell that is served."""
import pytest
import torch
from small_networks import small_classifier, small_images

from nioodd.core.errors import NiooddError
from nioodd.explore.ask import Ask
from nioodd.explore.inversion_studio import InversionStudio
from nioodd.explore.open import TOOLS, open_explorer, page_notebook
from nioodd.explore.siblings import SiblingExplorer
from nioodd.explore.threshold_desk import ThresholdDesk
from nioodd.posthoc.layerwise import LayerwiseDetector
from nioodd.trust.detector import TrustIntervalDetector
from nioodd.trust.intervals import uniform_sigma


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder, net = tmp_path_factory.mktemp("open"), small_classifier()
    LayerwiseDetector(net).fit(small_images(100), small_images(100, seed=1)).save(folder/"layers")
    TrustIntervalDetector(net, uniform_sigma(net)).fit(held_out=small_images(100, seed=1)).save(folder/"trust")
    return folder


SETS = dict(known="digits5k[0,1,2,3]", unknown="letters,uniform", n=12)


@pytest.mark.parametrize("tool, kind, of", [
    ("ask", Ask, "layers"), ("threshold", ThresholdDesk, "layers"), ("siblings", SiblingExplorer, "trust"),
    ("studio", InversionStudio, "layers")])
def test_each_tool_opens_on_a_saved_detector(tool, kind, of, folder):
    explorer = open_explorer(tool, folder/of, **SETS)
    explorer.wait()
    assert isinstance(explorer, kind)
    explorer.close()
    assert tool in TOOLS


def test_the_desk_has_the_scores_of_the_detector(folder):
    from nioodd.core.datasets import load
    from nioodd.core.detector import Detector
    desk = open_explorer("threshold", folder/"layers", **SETS)
    desk.wait()
    letters = load("letters", "all", size=8, channels=1)
    chosen = letters.images[torch.arange(12) * len(letters) // 12]
    expected = Detector.load(folder/"layers").predict(chosen)
    torch.testing.assert_close(desk.unknown["letters"].sort().values, expected.double().sort().values)
    desk.close()


def test_ask_needs_no_sets(folder):
    explorer = open_explorer("ask", folder/"layers")
    explorer.wait()
    assert not explorer.sets
    explorer.close()


def test_what_is_missing_is_named(folder, tmp_path):
    with pytest.raises(NiooddError, match="unknown explorer 'desk'"): open_explorer("desk", folder/"layers")
    with pytest.raises(NiooddError, match="expected --unknown;"):
        open_explorer("threshold", folder/"layers", known="digits5k")
    with pytest.raises(NiooddError, match="expected --known and --unknown;"): open_explorer("siblings", folder/"trust")
    with pytest.raises(NiooddError): open_explorer("ask", tmp_path)


def test_the_page_is_one_cell_that_opens_it(folder):
    page = page_notebook(tool="ask", folder=str(folder/"layers"), known="it's", root=None)
    (cell,), scope = page["cells"], {}
    opened, _, call = cell["source"].partition("\n\n")
    exec(opened, scope)
    scope["open_explorer"] = lambda **arguments: arguments
    assert eval(call, scope) == dict(tool="ask", folder=str(folder/"layers"), known="it's")
