"Networks and images that the tests of trust intervals share."
import torch
from torch import nn

from nioodd.core.models import Classifier

SHAPE = (1, 8, 8)


def images(n, seed=0):
    return torch.randint(0, 256, (n, *SHAPE), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def small_network():
    net = Classifier(4, size=8)
    net(torch.randn(64, *SHAPE))  # batch norm's running statistics leave their initial values
    return net.eval()


class Residual(nn.Module):
    """Convolutions with and without bias, batch norm, a shortcut, dropout, tied weights, a parameter of its own,
    a frozen one."""
    def __init__(self, width=8):
        super().__init__()
        self.first = nn.Conv2d(1, width, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(width)
        self.second = nn.Conv2d(width, width, 3, padding=1)
        self.tied, self.gain = self.second, nn.Parameter(torch.ones(1))
        self.drop, self.head = nn.Dropout(0.5), nn.Linear(width, 4)
        self.head.bias.requires_grad_(False)

    def forward(self, x):
        h = self.norm(self.first(x)).relu()
        return self.head(self.drop(self.gain * (h + self.tied(self.second(h).relu())).mean((2, 3))))


class Auxiliary(nn.Module):
    "A second head that only training uses, defined last; an output layer that is defined before the body."
    def __init__(self):
        super().__init__()
        self.head, self.body, self.second = nn.Linear(16, 4), nn.Linear(64, 16), nn.Linear(16, 7)

    def forward(self, x):
        h = self.body(x.flatten(1)).relu()
        return (self.head(h), self.second(h)) if self.training else self.head(h)


class Pair(Auxiliary):
    "Returns no logits but two things."
    def forward(self, x): return super().forward(x), x


class Behind(nn.Module):
    "A network behind something."
    def __init__(self, network, before, kept=True):
        super().__init__()
        self.network, self.before, self.kept = network, before, kept

    def forward(self, x):
        if self.kept: return self.network(self.before(x))
        with torch.no_grad(): return self.network(self.before(x) if x.sum() < 1e9 else x)  # And cannot be traced
