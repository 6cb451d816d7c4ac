"Families of outliers: what they give, how they are named and mixed."
import pytest
import torch

from nioodd.core.errors import NiooddError
from nioodd.inversion.outliers import FAMILIES, family, family_names, outliers


def images(size=12, channels=1, n=20):
    return torch.randint(256, (n, channels, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def drawn(name, n, base, seed=1):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return outliers((name,), n, base)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("size, channels", [(8, 1), (33, 3)])
def test_a_family_gives_what_was_asked_for_and_the_same_for_a_seed(name, size, channels):
    base = images(size, channels)
    for n in (1, 5):
        x = drawn(name, n, base)
        assert x.shape == (n, channels, size, size) and x.dtype == torch.uint8 and x.equal(drawn(name, n, base))
    assert not drawn(name, 5, base).equal(drawn(name, 5, base, seed=2))


def test_a_family_leaves_the_id_images_alone():
    base = images()
    before = base.clone()
    outliers(tuple(FAMILIES), 40, base)
    assert base.equal(before)


def test_names_and_kinds():
    kinds = {f.kind for f in FAMILIES.values()}
    assert kinds == {"noise", "id", "prior"}
    assert sorted(family_names(("noise:", "id:", "prior:"))) == sorted(FAMILIES)
    assert family_names(("strokes", "id:", "tiles"))[:2] == ["strokes", "tiles"]  # each once


def test_a_mixture_is_shared_equally():
    @family("noise")
    def black(n, size, channels, images): return torch.zeros(n, channels, size, size, dtype=torch.uint8)
    try:
        x = outliers(("black", "negative"), 10, torch.zeros(3, 1, 8, 8, dtype=torch.uint8))
        assert x.flatten(1).float().mean(1).tolist() == [0.0] * 5 + [255.0] * 5
    finally: del FAMILIES["black"]


@pytest.mark.parametrize("names, shape, message", [
    (("gausian",), (12, 12), "did you mean 'gaussian'"), (("nois:",), (12, 12), "did you mean 'noise:'"),
    ((), (12, 12), "no family of outliers named"), (("gaussian",), (12, 10), "12 × 10; square ones")])
def test_mistakes_are_one_line(names, shape, message):
    base = torch.zeros(2, 1, *shape, dtype=torch.uint8)
    with pytest.raises(NiooddError, match=message) as e: outliers(names, 5, base)
    assert "\n" not in str(e.value)
