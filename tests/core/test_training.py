"""One epoch: which images it sees, at which learning rate, in what arithmetic; and the average of the weights."""
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

from nioodd.core.errors import NiooddError
from nioodd.core.models import Classifier
from nioodd.core.training import (
    Augmentation,
    Average,
    arithmetic,
    class_weights,
    has_bfloat16,
    mirrored,
    one_cycle,
    shifted,
    train_epoch,
)


class Seen(nn.Module):
    "Notes the images it is given."
    def __init__(self):
        super().__init__()
        self.w, self.batches = nn.Parameter(torch.zeros(2)), []

    def forward(self, x):
        self.batches.append(((x + 1) * 127.5).round().to(torch.uint8))
        return self.w.expand(len(x), 2)


X, Y = torch.arange(200 * 60).remainder(256).to(torch.uint8).view(200, 2, 5, 6), torch.arange(200) % 2


def epoch(images=X, labels=Y, **options):
    "The images that a network saw in one epoch of batches of 50, and the random state after it."
    torch.manual_seed(3)
    net = Seen()
    train_epoch(net, images, labels, torch.optim.SGD(net.parameters(), 0.1), batch_size=50, **options)
    return torch.cat(net.batches), torch.get_rng_state()


def order(n=200):
    torch.manual_seed(3)
    return torch.randperm(n)


# --- augmentation ---------------------------------------------------------------------------------------------------

def test_flip_mirrors_half_of_the_images_and_draws_nothing_when_off():
    plain, state = epoch()
    assert torch.equal(plain, X[order()])
    assert torch.equal(state, torch.get_rng_state())  # one permutation, nothing else
    flipped, _ = epoch(augmentation=Augmentation(flip=True))
    turned, same = ((flipped == z).flatten(1).all(1) for z in (plain.flip(3), plain))
    assert (turned ^ same).all() and 70 < turned.sum() < 130


def test_shift_then_flip_of_the_first_batch():
    moved, _ = epoch(augmentation=Augmentation(shift=1))
    first = order()[:50]
    assert torch.equal(moved[:50], shifted(X[first], 1))
    both, _ = epoch(augmentation=Augmentation(shift=1, flip=True))
    first = order()[:50]
    assert torch.equal(both[:50], mirrored(shifted(X[first], 1)))


def test_only_labels_below_are_shifted():
    moved, _ = epoch(augmentation=Augmentation(shift=2, shift_below=1))
    first = order()[:50]
    want = shifted(X[first], 2)
    ones = Y[first] == 1
    assert torch.equal(moved[:50][ones], X[first][ones])
    assert torch.equal(moved[:50][~ones], want[~ones])


@pytest.mark.parametrize("fill", (0, 255))
def test_shifted_against_a_loop(fill):
    torch.manual_seed(0)
    x = torch.randint(1, 255, (6, 3, 4, 5), dtype=torch.uint8)
    torch.manual_seed(1)
    moved = shifted(x, 2, fill)
    torch.manual_seed(1)
    dy, dx = torch.randint(0, 5, (2, 6, 1))
    padded = F.pad(x, (2, 2, 2, 2), value=fill)
    for i in range(6):
        top, left = int(dy[i]), int(dx[i])
        assert torch.equal(moved[i], padded[i, :, top:top + 4, left:left + 5])


# --- the epoch ------------------------------------------------------------------------------------------------------

def test_a_last_single_image_is_left_out():
    seen, _ = epoch(X[:101], Y[:101])
    assert len(seen) == 100


def test_the_learning_rate_follows_the_share_of_the_epoch():
    asked = []

    def rate(done):
        asked.append(done)
        return 0.1 * (1 - done)
    net = Seen()
    optimiser = torch.optim.SGD(net.parameters(), 9.0)
    train_epoch(net, X, Y, optimiser, batch_size=50, learning_rate=rate)
    assert asked == [0.0, 0.25, 0.5, 0.75]
    assert optimiser.param_groups[0]["lr"] == pytest.approx(0.025)


def test_loss_and_accuracy_are_means_over_the_images():
    class Fixed(nn.Module):
        "Logits that no step changes: the first pixel says which class."
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.zeros(1))

        def forward(self, x):
            first = (x[:, 0, 0, 0] > 0).float()
            return torch.stack([1 - first, first], 1) + 0 * self.w
    labels = torch.arange(7) % 2
    images = (255 * labels.to(torch.uint8))[:, None, None, None].repeat(1, 1, 2, 2)
    labels[0] = 1  # one wrong
    net = Fixed()
    row = train_epoch(net, images, labels, torch.optim.SGD(net.parameters(), 0.1), batch_size=3)
    assert row["accuracy"] in (5 / 6, 1.0)  # of six images: the seventh is alone in its batch
    net.eval()
    x = (images.float() / 127.5 - 1)
    each = F.cross_entropy(net(x), labels, reduction="none")
    assert any(row["loss"] == pytest.approx((each.sum() - each[i]).item() / 6, abs=1e-6) for i in range(7))


def test_a_loss_that_is_not_finite_is_one_line():
    net = Classifier(10)
    with torch.no_grad(): net.head.bias.fill_(float("nan"))
    images = torch.zeros(8, 1, 28, 28, dtype=torch.uint8)
    with pytest.raises(NiooddError, match="cross-entropy became nan.*lower lr") as e:
        train_epoch(net, images, torch.arange(8), torch.optim.Adam(net.parameters(), 1e-3))
    assert "\n" not in str(e.value)


# --- arithmetic, weights, schedule, average -------------------------------------------------------------------------

def test_auto_is_what_the_processor_has():
    assert arithmetic("auto") == ("bfloat16" if has_bfloat16() else "float32")
    assert arithmetic("float32") == "float32" and arithmetic("bfloat16") == "bfloat16"


def test_a_class_without_images_has_weight_nought():
    weights = class_weights(torch.tensor([0, 0, 2]), 3)
    assert_close(weights, torch.tensor([0.5, 0.0, 1.0]))


def test_one_cycle_at_its_three_corners():
    assert one_cycle(0.0, 0.5) == pytest.approx(0.5 / 25)
    assert one_cycle(0.3, 0.5) == pytest.approx(0.5)
    assert one_cycle(1.0, 0.5) == pytest.approx(0.5 / 250_000)


def test_an_average_that_follows_is_updated_once_a_step():
    torch.manual_seed(0)
    net, copy, by_hand = Classifier(3, size=12), Classifier(3, size=12), Classifier(3, size=12)
    optimiser = torch.optim.SGD(net.parameters(), 0.1)
    images, labels = torch.randint(0, 256, (60, 1, 12, 12), dtype=torch.uint8), torch.arange(60) % 3
    average, other = Average(net, copy, 0.9), Average(net, by_hand, 0.9)
    average.follow(optimiser)
    optimiser.register_step_post_hook(lambda *_: other.update())
    train_epoch(net, images, labels, optimiser, batch_size=20)
    assert average.steps == other.steps == 3
    for a, b in zip(copy.state_dict().values(), by_hand.state_dict().values()): assert torch.equal(a, b)
    assert not copy.training
