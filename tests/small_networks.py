"A small classifier and images for it, shared by tests of several rooms; processes of their own import it, too."
import torch

from nioodd.core.models import Classifier


def small_images(n, seed=0):
    "uint8 [n, 1, 8, 8]."
    return torch.randint(256, (n, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def small_classifier():
    "Of four classes, in eval mode; batch norm's running statistics have left their initial values."
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = Classifier(4, size=8)
        net(torch.randn(64, 1, 8, 8))
    return net.eval()
