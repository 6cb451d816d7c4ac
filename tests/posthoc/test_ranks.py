"One detector of several processes: the sample, the banks, the threshold and the p-values of a single one."
import pytest
import torch
from ranks import HELD_OUT, KINDS, NEW, TRAIN, fit, given
from small_networks import small_classifier, small_images
from torch.utils.data import DataLoader, TensorDataset

from nioodd.core.detector import Detector, all_images
from nioodd.core.errors import NiooddError
from nioodd.core.forward import SharedImages, gathered, take
from nioodd.posthoc.layerwise import LayerwiseDetector


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    "What two processes have made."
    folder = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(fit, (2, str(folder)), nprocs=2)
    return folder


@pytest.mark.parametrize("kind, n", KINDS.items())
def test_two_processes_make_the_detector_of_one(kind, n, folder):
    data = given(kind, 0, 1)
    one = LayerwiseDetector(small_classifier()).fit(*data, n=n, bank=40)
    two = [Detector.load(folder / kind / str(rank)) for rank in (0, 1)]
    for name, v in two[0].learnt().items(): assert torch.equal(two[1].learnt()[name], v), name
    assert two[0].threshold == two[1].threshold and len(two[0].calibration) == len(one.calibration)
    expected, found = one.verdict(NEW), two[0].verdict(NEW)
    assert torch.allclose(found["score"], expected["score"], atol=1e-4)
    assert torch.equal(found["p_value"], expected["p_value"]) and torch.equal(found["ood"], expected["ood"])


def test_without_a_group_there_is_one_line():
    with pytest.raises(NiooddError, match="torchrun"):
        LayerwiseDetector(small_classifier()).fit(TRAIN, HELD_OUT, across_ranks=True)


@pytest.mark.parametrize("index", [slice(3, 20), slice(None, None), slice(50, 60), torch.randperm(60)[:31]])
def test_a_part_of_the_images_selects_as_the_whole(index):
    x, own = small_images(60), torch.arange(60) % 3 == 1
    shared = SharedImages(x[own], own.nonzero()[:, 0], 60)
    wanted, some = take(x, index), take(shared, index)
    assert len(some) == len(wanted) and some.shape == wanted.shape
    assert torch.equal(some.own, wanted[some.places]) and (some.places.diff() > 0).all()
    assert gathered(x, wanted) is wanted


def test_a_sample_is_that_of_one_process_whatever_the_number():
    loader = DataLoader(TensorDataset(TRAIN), 37)
    assert torch.equal(all_images(loader, 100), all_images([TRAIN], 100))
