"""Networks of other libraries, weights at random: a detector is fitted, judges, is saved, and is the same when loaded.

CI tries a few families of torchvision; NIOODD_ALL_FAMILIES=1 tries all of them, which takes minutes and gigabytes."""
import os
from functools import partial

import pytest
import torch
from torchvision import models
from torchvision.models import convnext, maxvit, swin_transformer, vision_transformer

from nioodd import LayerwiseDetector
from nioodd.core.forward import logits_of
from nioodd.posthoc.outputs import network_outputs

CLASSES, HELD_OUT = 10, 80
EVERY = pytest.mark.skipif("NIOODD_ALL_FAMILIES" not in os.environ, reason="NIOODD_ALL_FAMILIES is not set")


def small_vit():
    return vision_transformer.VisionTransformer(32, 8, num_layers=2, num_heads=2, hidden_dim=32, mlp_dim=64,
                                                num_classes=CLASSES)


def small_swin():
    return swin_transformer.SwinTransformer([4, 4], 16, [1, 1], [2, 2], [4, 4], num_classes=CLASSES)


def small_convnext():
    blocks = [convnext.CNBlockConfig(16, 32, 1), convnext.CNBlockConfig(32, None, 2)]
    return convnext.ConvNeXt(blocks, num_classes=CLASSES)


def small_maxvit():
    return maxvit.MaxVit((64, 64), stem_channels=8, partition_size=2, block_channels=[8, 16], block_layers=[1, 1],
                         head_dim=8, stochastic_depth_prob=0.0, num_classes=CLASSES)


# Name → how to make one, size of its images in pixels
QUICK = {"resnet18": 32, "squeezenet1_0": 64, "shufflenet_v2_x0_5": 32, "mobilenet_v3_small": 32}
SMALL = {small_vit: 32, small_swin: 32, small_convnext: 32, small_maxvit: 64}
SLOW = {"alexnet": 64, "vgg11": 32, "vgg11_bn": 32, "densenet121": 64, "inception_v3": 75, "googlenet": 64,
        "mobilenet_v2": 64, "resnext50_32x4d": 64, "wide_resnet50_2": 64, "regnet_y_400mf": 64, "regnet_x_400mf": 64,
        "mnasnet0_5": 64, "efficientnet_b0": 64, "efficientnet_v2_s": 64, "convnext_tiny": 64, "swin_t": 64,
        "swin_v2_t": 64}
NO_INITIALISATION = {name: dict(init_weights=False) for name in ("inception_v3", "googlenet")}  # It takes a minute


def of_torchvision(name: str):
    return partial(models.get_model, name, weights=None, num_classes=CLASSES, **NO_INITIALISATION.get(name, {}))


FAMILIES = [pytest.param(of_torchvision(name), size, id=name) for name, size in QUICK.items()]
FAMILIES += [pytest.param(make, size, id=make.__name__) for make, size in SMALL.items()]
FAMILIES += [pytest.param(of_torchvision(name), size, id=name, marks=EVERY) for name, size in SLOW.items()]
FAMILIES.append(pytest.param(partial(models.vit_b_16, image_size=32, num_classes=CLASSES), 32, id="vit_b_16",
                             marks=EVERY))


def images(n: int, size: int) -> torch.Tensor:
    "Colour images, half of them brighter, so that untrained networks tell some apart."
    x = torch.randint(128, (n, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    x[::2] += 100
    return x


@torch.no_grad()
def own_logits(net: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    found = net.eval()(x / 127.5 - 1)
    return getattr(found, "logits", found)


def check(make, size: int, folder):
    torch.manual_seed(0)
    net, x = make(), images(40 + HELD_OUT + 4, size)
    train, held_out, new = x.split([40, HELD_OUT, 4])
    expected = own_logits(net, new)
    torch.testing.assert_close(logits_of(net, new), expected, rtol=1e-3, atol=1e-4)
    detector = LayerwiseDetector(net).fit(train, held_out)
    verdict = detector.verdict(new)
    top = expected.gather(1, verdict["label"][:, None])[:, 0]
    assert (top >= expected.amax(1) - 1e-3).all() and verdict["score"].isfinite().all()
    assert verdict["ood"].tolist() == detector.rejects(verdict["score"]).tolist()
    again = LayerwiseDetector.load(detector.save(folder/"d"), make())
    for name, values in again.verdict(new).items(): assert torch.equal(values, verdict[name]), name
    outputs = network_outputs(net, new)
    assert outputs.logits.shape == (4, CLASSES)
    assert outputs.features.shape[0] == outputs.before.shape[0] == 4 and outputs.before.ndim == 2


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("make, size", FAMILIES)
def test_torchvision(make, size, tmp_path): check(make, size, tmp_path)


TIMM = {"resnet10t": {}, "convnext_atto": {}, "mobilenetv3_small_050": {}, "regnetx_002": {}, "efficientnet_lite0": {},
        "vit_tiny_patch16_224": dict(img_size=64), "deit_tiny_patch16_224": dict(img_size=64),
        "mixer_s32_224": dict(img_size=64), "swin_tiny_patch4_window7_224": dict(img_size=64, window_size=4)}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", TIMM)
def test_timm(name, tmp_path):
    timm = pytest.importorskip("timm", reason="timm is not installed: an optional test")
    check(partial(timm.create_model, name, pretrained=False, num_classes=CLASSES, **TIMM[name]), 64, tmp_path)


SMALL_VIT = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=32,
                 patch_size=8)
TRANSFORMERS = {
    "ViT": SMALL_VIT, "DeiT": SMALL_VIT, "Beit": SMALL_VIT, "Dinov2": SMALL_VIT,
    "ResNet": dict(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic"),
    "ConvNext": dict(num_stages=2, hidden_sizes=[8, 16], depths=[1, 1]),
    "Swin": dict(image_size=32, patch_size=4, embed_dim=16, depths=[1, 1], num_heads=[2, 2], window_size=4),
    "MobileNetV2": dict(image_size=32, depth_multiplier=0.35)}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", TRANSFORMERS)
def test_transformers(name, tmp_path):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed: an optional test")
    config = getattr(transformers, f"{name}Config")(num_labels=CLASSES, **TRANSFORMERS[name])
    check(partial(getattr(transformers, f"{name}ForImageClassification"), config), 32, tmp_path)
