"Networks of many kinds, for tests of siblings."
import copy

import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call


def sigma_of(model, share=0.1, only=""):
    "σ by name, of the parameters whose name contains `only`."
    def width(p): return share * p.detach().abs().mean().expand_as(p) + 1e-3
    return {k: width(p) for k, p in model.named_parameters() if only in k}


def difference(a, b): return ((a - b).abs().max() / b.abs().max()).item()


def one_by_one(s, x):
    "The members' logits by functional_call, the model in eval mode."
    def logits(i): return functional_call(copy.deepcopy(s.model).eval(), s.weights(i), (x,))
    with torch.no_grad(): return torch.stack([logits(i) for i in range(s.n)])


def used(model):
    "Batch norms as after training: statistics and affine parameters that are not 0 and 1."
    for m in model.modules():
        if not isinstance(m, nn.modules.batchnorm._NormBase) or m.running_mean is None: continue
        m.running_mean.normal_(0, 0.3), m.running_var.uniform_(0.5, 2)
        if m.affine: nn.init.uniform_(m.weight, -1.5, 1.5), nn.init.normal_(m.bias, 0, 0.2)
    return model


class Functional(nn.Module):
    """Functions instead of modules, tied layers, a sum, a concatenation, a parameter of its own, in-place operations,
    a number taken from a shape."""
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False)
        self.conv2, self.norm = nn.Conv2d(8, 8, 3, padding=1, groups=2), nn.BatchNorm2d(8)
        self.scale, self.head = nn.Parameter(torch.rand(8, 1, 1)), nn.Linear(16, 5)

    def forward(self, x):
        x = F.relu(self.conv1(x), inplace=True)
        y = self.norm(self.conv2(self.conv2(x))) * self.scale  # conv2 twice: its batch norm must stay
        y += x
        y = F.dropout(torch.cat([F.leaky_relu(y, 0.2), x], 1), 0.5, self.training)
        return self.head(F.adaptive_avg_pool2d(F.max_pool2d(y, 2), 1).view(x.size(0), -1))


class Residual(nn.Module):
    def __init__(self, c):
        super().__init__()
        first = nn.Conv2d(c, c, 3, padding=1), nn.BatchNorm2d(c, affine=False), nn.ReLU(inplace=True)
        self.body = nn.Sequential(*first, nn.Conv2d(c, c, 3, padding=1, bias=False), nn.BatchNorm2d(c))

    def forward(self, x): return F.relu(self.body(x) + x)


class Dense(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.new = nn.Sequential(nn.BatchNorm2d(c), nn.ReLU(), nn.Conv2d(c, 4, 3, padding=1))

    def forward(self, x): return torch.cat([x, self.new(x)], 1)


class Squeeze(nn.Module):
    "Squeeze and excitation, by products; depthwise convolutions."
    def __init__(self):
        super().__init__()
        self.conv, self.depth = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, groups=8)
        self.gate, self.head = nn.Conv2d(8, 8, 1), nn.Linear(8, 5)

    def forward(self, x):
        x = F.silu(self.depth(self.conv(x)))
        x = x * torch.sigmoid(self.gate(F.adaptive_avg_pool2d(x, 1)))
        return self.head(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))


class Mean(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 8, 3), nn.Linear(8, 5)

    def forward(self, x): return self.head(F.silu(self.conv(x)).mean((2, 3)))


def tied():
    layer, other = nn.Linear(12, 12), nn.Linear(12, 12)
    other.weight = layer.weight
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 12 * 12, 12), layer, nn.ReLU(), layer, nn.Tanh(), other)


def linear():
    return nn.Sequential(nn.Flatten(), nn.Linear(432, 20), nn.LeakyReLU(), nn.Dropout(0.5), nn.Linear(20, 5))


def pooled():
    front = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.LeakyReLU(), nn.Dropout2d(), nn.MaxPool2d(2)
    return nn.Sequential(*front, nn.Flatten(), nn.Linear(200, 5))


def decreasing():
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.LeakyReLU(-0.5), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(200, 5))


def residual():
    blocks = Residual(8), Residual(8), nn.AdaptiveAvgPool2d(2)
    return nn.Sequential(nn.Conv2d(3, 8, 3), *blocks, nn.Flatten(), nn.Linear(32, 5))


def dense():
    blocks = Dense(8), Dense(12), nn.AdaptiveMaxPool2d(1)
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=2, dilation=2), *blocks, nn.Flatten(), nn.Linear(16, 5))


def grey():
    first = nn.Conv2d(1, 6, 5, padding=2), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(3, 2, 1)
    return nn.Sequential(*first, nn.Conv2d(6, 8, 3), nn.ReLU6(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(32, 5))


def grey_with_stride():
    first = nn.Conv2d(1, 6, (3, 5), stride=(2, 1), padding=(1, 0), bias=False)
    return nn.Sequential(first, nn.Conv2d(6, 4, 3), nn.Flatten(), nn.Linear(96, 5))


def grey_reflected():
    first = nn.Conv2d(1, 6, 3, padding=1, padding_mode="reflect"), nn.ReLU()
    return nn.Sequential(*first, nn.Conv2d(6, 4, 3, dilation=2, padding="same"), nn.Flatten(), nn.Linear(576, 5))


NETWORKS = {  # name → network on images [3, 12, 12] or, with "grey", [1, 12, 12]
    "linear": linear,
    "leaky before pool": pooled,
    "decreasing before pool": decreasing,
    "residual": residual,
    "dense": dense,
    "functional": Functional,
    "mean": Mean,
    "squeeze": Squeeze,
    "tied": tied,
    "grey": grey,
    "grey, stride": grey_with_stride,
    "grey, reflected, dilated": grey_reflected,
}
