"""The one forward pass: logits and features of any network."""
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from nioodd.core.errors import NiooddError
from nioodd.core.forward import (
    KeptImages,
    Prepared,
    as_input,
    bare,
    batches,
    layer_inputs,
    logits_and_features,
    logits_of,
    preparation_of,
    prepared,
    take,
)
from nioodd.core.images import Preparation
from nioodd.core.models import ARCHITECTURES, Classifier, architecture


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


def bytes_of(n, size=8):
    rng = torch.Generator().manual_seed(0)
    return torch.randint(256, (n, 1, size, size), dtype=torch.uint8, generator=rng)


def test_bytes_are_prepared_and_floats_are_taken_as_they_are():
    net, x = Classifier(3, size=8).eval(), bytes_of(5)
    model = prepared(net, mean=0.2, std=0.3)
    assert preparation_of(model) == Preparation(8, 1, mean=(0.2,), std=(0.3,))
    assert torch.equal(logits_of(model, x), logits_of(net, (x.float() / 255 - 0.2) / 0.3))
    floats = torch.randn(5, 1, 8, 8)
    assert torch.equal(logits_of(model, floats), logits_of(net, floats))
    assert torch.equal(as_input(x, None, preparation_of(model)), as_input(x, model))


def test_a_preparation_is_put_round_a_network_once():
    net = Classifier(3, size=8)
    assert prepared(net) is net and prepared(net, mean=None) is net
    twice = prepared(prepared(net, mean=0.2), std=0.3)
    assert bare(twice) is net and twice.network is net and preparation_of(twice).mean == (0.2,)
    assert preparation_of(torch.nn.DataParallel(twice)) == preparation_of(twice)
    assert Prepared(net.eval(), Preparation()).training is False
    with pytest.raises(TypeError, match="maen"): prepared(net, maen=0.2)
    with pytest.raises(ValueError, match="takes 8×8"): as_input(bytes_of(2, 9), twice)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.float64, torch.bfloat16])
def test_images_in_a_file_come_back(dtype):
    x = torch.randn(50, 3, 5, 7).mul(50).to(dtype)
    kept = KeptImages(x.shape[1:], dtype)
    order = torch.randperm(50)
    kept.write(x[order], order)
    kept.rows = torch.arange(50)
    assert (kept.shape, kept.ndim, len(kept), kept.dtype) == (x.shape, 4, 50, dtype)
    assert torch.equal(kept[:], x) and torch.equal(kept[40:60], x[40:])
    some = take(take(kept, order), slice(3, 20))
    assert torch.equal(torch.cat([*some.split(6)]), take(x[order], slice(3, 20)))
    kept.write(x[:1] + 1, torch.tensor([7]))
    assert torch.equal(kept[7:8], x[:1] + 1) and torch.equal(kept[8:], x[8:])


def test_batches_of_images_in_a_file_are_those_of_a_tensor():
    net, x = Classifier(3, size=8), torch.randn(700, 1, 8, 8)
    kept = KeptImages(x.shape[1:], x.dtype)
    kept.write(x, torch.arange(700))
    kept.rows = torch.arange(700)
    for a, b in zip(batches(net, x), batches(net, kept), strict=True): assert torch.equal(a, b)


def test_a_full_disk_is_one_line():
    class Full:
        def seek(self, place): pass
        def write(self, data): raise OSError(28, "No space left on device")
    with pytest.raises(ValueError, match="No space left on device.*TMPDIR"):
        KeptImages((1, 8, 8), torch.uint8, Full()).write(bytes_of(2), torch.arange(2))


def test_what_layers_read_is_freed_without_a_search_for_cycles():
    import gc
    import weakref
    net, x = Classifier(3, size=8), torch.randn(4, 1, 8, 8)
    gc.disable()
    try:
        seen = layer_inputs(net, x)[1]
        alive = [weakref.ref(t) for t in seen.values()]
        del seen, x
        assert not any(ref() is not None for ref in alive)
    finally: gc.enable()


def test_a_preparation_is_not_put_round_another():
    net = prepared(Classifier(3, size=8), mean=0.2)
    for inner in (net, torch.nn.Sequential(net)):
        with pytest.raises(ValueError, match="preparation already"): Prepared(inner, Preparation())
    colour = prepared(torch.nn.Conv2d(3, 4, 1), mean=(0.1, 0.2, 0.3))
    with pytest.raises(ValueError, match="expected images in colour"): as_input(bytes_of(2), colour)


class Elsewhere(nn.Module):
    "Its forward is a part of itself, which it holds in some way."
    def __init__(self, holder):
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.Dropout(0.5), nn.Linear(8, 3))
        self.held = holder(self.body)
    def forward(self, x): return getattr(self.held, "run", self.held)(x)


HOLDERS = {"closure": lambda body: lambda x: body(x), "partial": lambda body: partial(nn.Sequential.forward, body),
           "namespace": lambda body: SimpleNamespace(run=body), "method": lambda body: body.forward}


@pytest.mark.parametrize("how", HOLDERS)
def test_what_a_module_holds_does_not_run_in_training_mode(how):
    "Either a copy of it runs, in eval mode, or one line says why it cannot."
    net, x = Elsewhere(HOLDERS[how]).eval(), torch.randn(6, 1, 4, 4)
    expected = net(x).detach()
    assert torch.equal(logits_of(net, x), expected)
    if how in ("closure", "namespace"):
        with pytest.raises(NiooddError, match="the held of this Elsewhere"): logits_of(net.train(), x)
    else: assert torch.equal(logits_of(net.train(), x), expected)


def test_no_folder_for_temporary_files_is_one_line(monkeypatch):
    def fails(): raise FileNotFoundError("no usable temporary directory")
    monkeypatch.setattr("tempfile.TemporaryFile", fails)
    with pytest.raises(NiooddError, match="TMPDIR"): KeptImages((1, 4, 4), torch.uint8)
