"Conditions and the generator: shapes, definitions, what is refused."
import pytest
import torch

from nioodd.core.errors import NiooddError
from nioodd.inversion.generator import (
    CONDITIONINGS,
    Conditions,
    Generator,
    condition_matrix,
    sample_conditions,
)


@pytest.fixture(autouse=True)
def _seed():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
@pytest.mark.parametrize("k, size, channels", [(2, 8, 1), (10, 28, 1), (3, 9, 3), (100, 32, 3)])
def test_generator_of_any_shape(conditioning, k, size, channels):
    images = Generator(k, 3, conditioning, channels, size).sample(*sample_conditions(2, k))
    assert images.shape == (2, channels, size, size) and images.abs().max() <= 1


@pytest.mark.parametrize("wrong, message", [
    (dict(conditioning="vectr"), "did you mean 'vector'"), (dict(size=7), "size of the generator is 7"),
    (dict(latent_dim=0), "latent_dim"), (dict(channels=0), "channels"), (dict(n_outputs=1), "n_outputs")])
def test_a_generator_that_cannot_be(wrong, message):
    with pytest.raises(NiooddError, match=message): Generator(**dict(n_outputs=3) | wrong)


def test_condition_matrix_against_its_definition():
    m = condition_matrix(torch.arange(6), 6)
    for y in range(6):
        for i in range(6):
            for j in range(6): assert m[y, 0, i, j] == float(i == y or j == y)


@pytest.mark.parametrize("conditions", [
    Conditions(), Conditions(temperature=0.2), Conditions(hard=True), Conditions(exclude=[0, -1])])
def test_conditions_are_probabilities_whose_largest_entry_is_the_wanted_output(conditions):
    c, y = sample_conditions(300, 5, **conditions._asdict())
    torch.testing.assert_close(c.sum(1), torch.ones(300))
    assert (c >= 0).all() and c.argmax(1).equal(y)
    assert not set(y.tolist()) & {k % 5 for k in conditions.exclude}


def test_given_labels_are_kept():
    labels = torch.tensor([4, 0, 4, 2])
    for hard in (False, True):
        c, y = sample_conditions(4, 5, labels=labels, hard=hard)
        assert y.equal(labels) and c.argmax(1).equal(labels)


def test_mixtures_ask_for_two_allowed_outputs_and_leave_the_random_stream_without_them():
    torch.manual_seed(0)
    c, y = sample_conditions(400, 6, exclude=[2, -1], mixtures=1.0)
    assert set(c.unique().tolist()) == {0.0, 0.5} and ((c > 0).sum(1) == 2).all() and (c[:, [2, 5]] == 0).all()
    assert (c[range(400), y] == 0.5).all()
    partners = c.masked_fill(torch.nn.functional.one_hot(y, 6).bool(), 0).argmax(1)
    assert set(zip(y.tolist(), partners.tolist())) == {(a, b) for a in (0, 1, 3, 4) for b in (0, 1, 3, 4) if a != b}
    torch.manual_seed(1)
    without = sample_conditions(10, 6)
    torch.manual_seed(1)
    assert all(torch.equal(a, b) for a, b in zip(without, sample_conditions(10, 6, mixtures=0.0)))


@pytest.mark.parametrize("wrong", [dict(mixtures=1.5), dict(mixtures=-0.1), dict(mixtures=float("nan")),
                                   dict(mixtures=0.5, exclude=[0, 1])])
def test_wrong_mixtures(wrong):
    with pytest.raises(NiooddError, match="mixtures"): sample_conditions(4, 3, **wrong)
