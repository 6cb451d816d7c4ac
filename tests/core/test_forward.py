"""The one forward pass: logits and features of any network."""
import pytest
import torch

from nioodd.core.forward import logits_and_features
from nioodd.core.models import ARCHITECTURES, architecture


@pytest.mark.parametrize("name", sorted(ARCHITECTURES))
@pytest.mark.parametrize("size, channels, n_outputs",
                         [(16, 1, 2), (17, 3, 11), (28, 1, 10), (32, 3, 100), (47, 4, 3)])
@torch.no_grad()
def test_features_are_what_the_output_layer_reads(name, size, channels, n_outputs):
    net = architecture(name, n_outputs, channels, size).eval()
    x = torch.rand(2, channels, size, size) * 2 - 1
    logits, features = logits_and_features(net, x)
    z = net(x)
    assert torch.equal(logits, z) and torch.equal(net.body[-1](features), z)
