"""The path to a network's input, arrays, image files and folders of them, and a one-line error for each bad input."""
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from fake_sets import grey, picture, refused
from PIL import Image

from nioodd.core.images import (
    ImageFiles,
    ImageSet,
    Preparation,
    check_classes,
    from_arrays,
    list_folder,
    prepare,
    read_ahead,
    read_folder,
    read_images,
    read_preparation,
    resize,
    to_input,
    to_uint8,
)

# ---- the path to the network's input

def test_input_round_trip():
    levels = torch.arange(256, dtype=torch.uint8)
    x = to_input(levels)
    assert x.dtype == torch.float32 and x.min() == -1 and x.max() == 1
    assert torch.equal(to_uint8(x), levels)
    assert to_uint8(torch.tensor([-3.0, 3.0])).tolist() == [0, 255]


def test_to_uint8_and_to_input_leave_their_argument_alone():
    x, y = torch.zeros(3), torch.zeros(3, dtype=torch.uint8)
    to_uint8(x), to_input(y)
    assert x.tolist() == [0, 0, 0] and y.tolist() == [0, 0, 0]


@pytest.mark.parametrize("shape,size", [((40, 40), 28), ((33, 57), 28), ((20, 20), 64), ((300, 200), 28)])
def test_resize_agrees_with_pil(shape, size):
    rgb = np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)
    x = torch.from_numpy(rgb).permute(2, 0, 1)[None]
    grey = Image.fromarray(rgb).convert("L")
    squashed = prepare(x, Preparation(size, 1, keep_aspect=False))[0, 0].int()
    pil = grey.resize((size, size), Image.Resampling.BILINEAR)
    assert (squashed - torch.from_numpy(np.array(pil).astype(int))).abs().max() <= 3
    h, w = (size * side // min(shape) for side in shape)
    pil = torch.from_numpy(np.array(grey.resize((w, h), Image.Resampling.BILINEAR)).astype(int))
    top, left = round((h - size) / 2), round((w - size) / 2)
    assert (resize(x, size, 1)[0, 0].int() - pil[top:top + size, left:left + size]).abs().max() <= 3


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic", "nearest"])
@pytest.mark.parametrize("shape", [(40, 30), (31, 64), (32, 32), (100, 399)])
@pytest.mark.parametrize("size, to", [(32, None), (28, 32), (16, 40)])
def test_pictures_are_prepared_as_torchvision_does(shape, size, to, interpolation):
    from torchvision.transforms import v2
    x = torch.randint(256, (2, 3, *shape), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    mode = v2.InterpolationMode(interpolation)
    theirs = v2.Compose([v2.Resize(to or size, mode, antialias=True), v2.CenterCrop(size)])
    p = read_preparation(v2.Compose([*theirs.transforms, v2.ToImage(), v2.ToDtype(torch.float32, scale=True),
                                     v2.Normalize((0.4, 0.5, 0.6), (0.2, 0.3, 0.4))]))
    assert (p.size, p.resize, p.mean, p.std) == (size, to or size, (0.4, 0.5, 0.6), (0.2, 0.3, 0.4))
    assert torch.equal(prepare(x, p), theirs(x))
    normal = v2.functional.normalize(theirs(x) / 255, p.mean, p.std)
    assert torch.equal(to_input(prepare(x, p), p), normal)


def test_of_a_very_long_picture_only_the_middle_is_resized():
    x = torch.zeros(1, 1, 2, 3_000_000, dtype=torch.uint8)
    x[..., 1_499_998:1_500_002] = 255
    assert (resize(x, 64) > 0).any() and resize(x, 64).shape == (1, 1, 64, 64)


@pytest.mark.parametrize("transform, expected", [
    (dict(input_size=(3, 224, 224), crop_pct=0.9, interpolation="bicubic", mean=(0.5,) * 3, std=(0.5,) * 3),
     dict(size=224, resize=248, interpolation="bicubic", channels=3)),
    (dict(input_size=(3, 64, 64), crop_mode="squash", mean=(0.5,) * 3, std=(0.5,) * 3),
     dict(size=64, resize=None, keep_aspect=False)),
    (dict(size={"height": 32, "width": 32}, resample=3, image_mean=[0.1] * 3, image_std=[0.2] * 3),
     dict(size=32, keep_aspect=False, interpolation="bicubic", mean=(0.1,) * 3)),
    (dict(size={"shortest_edge": 224}, crop_pct=0.875, resample=2, image_mean=[0.1] * 3, image_std=[0.2] * 3),
     dict(size=224, resize=256, keep_aspect=True)),
    (dict(size={"shortest_edge": 40}, do_center_crop=True, crop_size=32, do_normalize=False),
     dict(size=32, resize=40, mean=(0.,))),
])
def test_preparations_of_timm_and_hugging_face(transform, expected):
    p = read_preparation(transform)
    assert {name: getattr(p, name) for name in expected} == expected
    assert Preparation(**asdict(p)) == p  # As it comes back from JSON


@pytest.mark.parametrize("wrong, says", [
    (dict(mean=(123, 116, 103)), "255"),
    (dict(size=0), "size"), (dict(channels=2), "channels"), (dict(std=0), "std"), (dict(mean="a"), "mean"),
    (dict(mean=(1, 2)), "mean"), (dict(mean=float("nan")), "mean"), (dict(interpolation="lanczos"), "bicubic"),
    (dict(size=32, resize=16), "resize"), (dict(resize=16), "resize"),
    (dict(channels=1, mean=(0.1, 0.2, 0.3)), "one channel"),
    (dict(size=32, resize=40, keep_aspect=False), "resize"),
])
def test_preparations_that_make_no_sense(wrong, says): refused(read_preparation, says=[says], **wrong)


@pytest.mark.parametrize("transform", [
    dict(size={"shortest_edge": 40}, rescale_factor=1),
    dict(size={"height": 3, "width": 4}, image_mean=[0], image_std=[1]),
    dict(input_size=(3, 32, 48), mean=(0,), std=(1,)), lambda x: x, "imagenet", dict(a=1), torch.nn.ReLU(),
    dict(size={"shortest_edge": 40}, do_resize=False), dict(size={"shortest_edge": 40}, do_flip_channel_order=True),
    dict(size={"shortest_edge": 40}, crop_pct=0.9, do_center_crop=True, crop_size=40)])
def test_transforms_whose_effect_is_not_known(transform): refused(read_preparation, transform)


def odd_steps():
    from torchvision.transforms import v2
    scale = v2.ToDtype(torch.float32, scale=True)
    return [[v2.CenterCrop(32), scale], [v2.CenterCrop(48), v2.Resize(32), scale], [v2.Resize(32), scale],
            [v2.Resize(50), v2.CenterCrop(40), v2.CenterCrop(32), scale], [v2.Resize(50), v2.CenterCrop(40)],
            [v2.Resize(40, max_size=45), v2.CenterCrop(32), scale], [v2.Grayscale(3), scale],
            [scale, v2.Normalize([0.5], [0.5]), v2.Normalize([0.5], [0.5])], [v2.ToDtype(torch.float32)],
            [v2.Resize(40, antialias=False), v2.CenterCrop(32), scale], [v2.Resize((32, 32)), v2.CenterCrop(32), scale],
            [scale, v2.Normalize([0.5], [0.5]), v2.Resize(40), v2.CenterCrop(32)], [v2.PILToTensor()]]


@pytest.mark.parametrize("k", range(13))
def test_steps_in_another_order_or_of_another_kind_are_refused(k):
    from torchvision.transforms import v2
    assert len(odd_steps()) == 13
    refused(read_preparation, v2.Compose(odd_steps()[k]))


def test_files_are_read_ahead_in_order_and_a_bad_one_does_not_end_it(tmp_path):
    for k in range(10): picture(tmp_path / f"{k}.png", 20 * k)
    (tmp_path / "5.png").write_bytes(b"")
    paths = [tmp_path / f"{k}.png" for k in range(10)]
    found = []
    for part, images in read_ahead([paths[:3], paths[3:4], [], paths[4:]], Preparation(4, 1), ahead=1):
        found += [*zip(part, images)]
    assert [p for p, _ in found] == paths
    assert [x.unique().tolist() for k, (_, x) in enumerate(found) if k != 5] == [[20 * k] for k in range(10) if k != 5]
    assert "5.png" in str(found[5][1])


def test_a_data_set_of_files(tmp_path):
    for k, c in enumerate("aab"):
        (tmp_path / c).mkdir(exist_ok=True)
        picture(tmp_path / c / f"{k}.png", 20 * k)
    files = ImageFiles(list_folder(tmp_path), Preparation(4, 3))
    assert len(files) == 3 and [files[k][1] for k in range(3)] == [0, 0, 1]
    assert torch.equal(files[2][0], torch.full((3, 4, 4), 40, dtype=torch.uint8))
    assert len(ImageFiles(list_folder(tmp_path / "a"), Preparation(4, 3))[0]) == 1  # no label


def test_luma_is_pils_for_every_kind_of_colour():
    rgb = np.random.default_rng(1).integers(0, 256, (500, 500, 3), dtype=np.uint8)
    ours = resize(torch.from_numpy(rgb).permute(2, 0, 1)[None], None, 1)[0, 0]
    assert torch.equal(ours, torch.from_numpy(np.array(Image.fromarray(rgb).convert("L"))))


def test_resize_in_chunks_equals_one_by_one():
    x = torch.randint(0, 256, (3000, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    whole = resize(x, 28, 1)
    pick = [0, 1364, 1365, 1366, 2999]
    assert torch.equal(whole[pick], torch.cat([resize(x[i:i + 1], 28, 1) for i in pick]))
    assert whole.is_contiguous() and resize(x, 32, 3) is x


def test_resize_channels_and_non_square():
    x = torch.randint(0, 256, (2, 1, 10, 20), dtype=torch.uint8)
    assert resize(x, None, 3).shape == (2, 3, 10, 20) and torch.equal(resize(x, None, 3)[:, 2:], x)
    assert resize(x, 8).shape == (2, 1, 8, 8)


def test_resize_refuses():
    x = torch.zeros(2, 1, 8, 8, dtype=torch.uint8)
    refused(resize, x.float(), 8, says=["float32", "uint8"])
    refused(resize, x[0], 8, says=["[1, 8, 8]"])
    refused(resize, x, 0, says=["size is 0"])
    refused(resize, x, 8, 2, says=["channels is 2"])
    refused(resize, torch.zeros(2, 4, 8, 8, dtype=torch.uint8), 8, 1, says=["4 channels"])


# ---- arrays

@pytest.mark.parametrize("shape", [(5, 9, 7), (5, 9, 7, 1), (5, 1, 9, 7)])
def test_from_arrays_grey_layouts(shape):
    x = grey(5, 9)[:, :, :7]
    s = from_arrays(x.reshape(shape), np.arange(5) % 2)
    assert s.images.shape == (5, 1, 9, 7) and torch.equal(s.images[:, 0], torch.from_numpy(x.copy()))
    assert s.classes == ["0", "1"] and s.labels.dtype == torch.int64


def test_from_arrays_colour_and_floats():
    x = np.random.default_rng(0).integers(0, 256, (4, 6, 5, 3), dtype=np.uint8)
    a, b = from_arrays(x), from_arrays(torch.from_numpy(x).permute(0, 3, 1, 2).float() / 255)
    assert a.images.shape == (4, 3, 6, 5) and torch.equal(a.images, b.images) and a.labels is None


@pytest.mark.parametrize("labels", [[0, 1], (0, 1), torch.tensor([0, 1]), np.array([0, 1], np.uint8)])
def test_from_arrays_labels_of_any_integers(labels):
    s = from_arrays(grey(2), labels, classes=("cat", "dog"))
    assert s.labels.tolist() == [0, 1] and s.labels.dtype == torch.int64 and s.classes == ["cat", "dog"]


@pytest.mark.parametrize("images,words", [
    (np.zeros((4, 28)), ["[4, 28]", "[N, C, H, W]"]),
    (np.zeros((4, 28, 28, 2)), ["[4, 28, 28, 2]"]),
    (np.zeros((2, 8, 8), np.int64), ["int64", "uint8"]),
    (np.zeros((2, 8, 8), bool), ["bool"]),
    (np.zeros((2, 8, 8), complex), ["complex"]),
    (np.full((2, 8, 8), np.nan), ["NaN"]),
    (np.full((2, 8, 8), np.inf), ["infinite"]),
    (np.full((2, 8, 8), 255.0), ["to 255", "[0, 1]"]),
    (np.full((2, 8, 8), -1.0), ["-1", "[0, 1]"]),
    (np.zeros((0, 8, 8), np.uint8), ["no images"]),
    (np.array([None, "a"], dtype=object), ["no images"]),
    ([Image.new("L", (8, 8))] * 2, ["no images"]),
    ("photo.png", ["no images"]),
    (None, ["no images"]),
])
def test_from_arrays_refuses_images(images, words): refused(from_arrays, images, says=words)


@pytest.mark.parametrize("labels,classes,words", [
    ([0, 1, 2], None, ["[3]", "2 images"]),
    ([0.0, 1.0], None, ["float"]),
    ([True, False], None, ["bool"]),
    ([0, -1], None, ["-1"]),
    ([0, 2], ["a", "b"], ["0 to 2", "0 to 1"]),
    (["cat", "dog"], None, ["whole numbers", "names as `classes`"]),
    ([None, 1], None, ["object", "whole numbers"]),
    ([[1, 0], [0, 1]], None, ["[2, 2]", "2 images"]),
    ([[1], [0, 1]], None, ["no labels", "2 whole numbers"]),
])
def test_from_arrays_refuses_labels(labels, classes, words):
    refused(from_arrays, np.zeros((2, 8, 8)), labels, "mine", classes, says=words)


def test_image_set_is_cut_and_described():
    s = from_arrays(grey(10), np.arange(10), "ten")
    assert len(s) == 10 and s[:3].labels.tolist() == [0, 1, 2] and len(s[s.labels > 6]) == 3
    assert repr(s) == "ImageSet('ten', 10 images 28×28×1 uint8, 10 classes)"
    assert s.resized(14, 3).images.shape == (10, 3, 14, 14) and s.resized(14, 3).labels is s.labels


def test_check_classes():
    x = torch.zeros(3, 1, 8, 8, dtype=torch.uint8)
    check_classes(ImageSet("s", x, torch.tensor([0, 1, 1]), ["a", "b"]))
    refused(check_classes, ImageSet("s", x), says=["no labels"])
    one = ImageSet("s", x, torch.tensor([0, 0, 0]), ["a"])
    refused(check_classes, one, says=["1 class", "at least 2"])
    gap = ImageSet("s", x, torch.tensor([0, 0, 2]), ["a", "b", "c"])
    refused(check_classes, gap, says=["no images of class 'b'"])


# ---- image files

def save(image, path, **kw):
    image.save(path, **kw)
    return path


def as_read(image, path, **kw):
    "The only image of a file, uint8 [C, H, W]."
    return read_images([save(image, path, **kw)])[0]


def test_kinds_of_pixels(tmp_path):
    "Grey, palette, transparent, 1-bit, 16-bit, CMYK and turned by EXIF: what a viewer shows."
    assert as_read(Image.new("L", (4, 3), 7), tmp_path / "l.png").tolist() == [[[7] * 4] * 3]
    assert as_read(Image.new("1", (4, 3), 1), tmp_path / "1.png").tolist() == [[[255] * 4] * 3]
    assert as_read(Image.new("P", (4, 3), 0), tmp_path / "p.png").shape == (3, 3, 4)
    assert as_read(Image.new("RGBA", (4, 3), (0, 0, 0, 0)), tmp_path / "clear.png").min() == 255
    assert as_read(Image.new("LA", (4, 3), (0, 255)), tmp_path / "la.png").tolist() == [[[0] * 4] * 3]
    assert as_read(Image.new("CMYK", (4, 3)), tmp_path / "cmyk.jpg").shape == (3, 3, 4)
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90°
    assert as_read(Image.new("RGB", (4, 3)), tmp_path / "turned.jpg", exif=exif).shape == (3, 4, 3)
    both = read_images([tmp_path / "l.png", tmp_path / "p.png"])
    assert both.shape == (2, 3, 3, 4)  # grey beside colour is colour


@pytest.mark.parametrize("name", ["16.png", "16.tif", "16.pgm"])
def test_of_16_bits_the_upper_8_are_kept(tmp_path, name):
    image = Image.fromarray(np.full((3, 4), 0x80FF, np.uint16))
    assert as_read(image, tmp_path / name).tolist() == [[[0x80] * 4] * 3]


@pytest.mark.parametrize("dtype, says", [(np.int32, "32-bit integer"), (np.float32, "32-bit float")])
def test_pixels_of_32_bits_are_refused(tmp_path, dtype, says):
    levels = np.linspace(0, 255, 12).reshape(3, 4).astype(dtype)
    path = save(Image.fromarray(levels), tmp_path / "cells.tif")
    refused(read_images, [path], says=["cells.tif", says, "8 bits per channel"])


def test_one_path_is_one_image(tmp_path):
    picture(tmp_path / "a.png", 7)
    for path in (tmp_path / "a.png", str(tmp_path / "a.png")):
        assert torch.equal(read_images(path), read_images([path]))
    refused(read_images, tmp_path / "gone.png", says=["gone.png"])
    refused(read_images, str(tmp_path / "gone.png"), says=["gone.png"])
    refused(read_images, [], says=["no image files"])


# ---- folders

def read(folder, split="train", size=None, channels=None, n=None):
    return read_folder(Path(folder), split, size, channels, n)


def test_flat_folder(tmp_path):
    suffixes = (".png", ".JPG", ".bmp", ".webp", ".tif", ".gif")
    for i, suffix in enumerate(suffixes): picture(tmp_path / f"{i}{suffix}", 40 * i)
    for hidden in (".DS_Store", "Thumbs.db"): (tmp_path / hidden).write_text("hidden")
    s = read(tmp_path, "test", size=28, channels=1)
    assert s.images.shape == (6, 1, 28, 28) and s.labels is None and s.classes == []
    assert s.name == f"folder:{tmp_path.name}"
    assert (s.images[:, 0, 3, 3].int() - 40 * torch.arange(6)).abs().max() <= 3
    assert len(read(tmp_path, n=2)) == 2


def test_folder_with_a_subfolder_per_class(tmp_path):
    for c, n in (("dog", 2), ("cat", 3)):
        for i in range(n): picture(tmp_path / c / f"{i}.png", 10 * i)
    s = read(tmp_path)
    assert s.classes == ["cat", "dog"] and s.labels.tolist() == [0, 0, 0, 1, 1]
    (tmp_path / "eel").mkdir()
    refused(check_classes, read(tmp_path), says=["no images of class 'eel'"])


@pytest.mark.parametrize("test", ["test", "val", "valid", "validation"])
def test_folder_with_train_and_test(tmp_path, test):
    for split, n in (("train", 3), (test, 2)):
        for c in ("a", "b"):
            for i in range(n): picture(tmp_path / split / c / f"{i}.png")
    assert [len(read(tmp_path, s)) for s in ("train", "test", "all")] == [6, 4, 10]
    picture(tmp_path / test / "c" / "0.png")
    refused(read, tmp_path, "all", says=["classes", "differ"])
    refused(read, tmp_path, "test", says=["classes", "differ"])
    assert len(read(tmp_path, "train")) == 6


def test_the_folder_test_comes_before_val(tmp_path):
    for split, value in (("train", 1), ("val", 2), ("test", 3)): picture(tmp_path / split / "a.png", value)
    assert read(tmp_path, "test").images.unique().tolist() == [3]
    assert len(read(tmp_path, "all")) == 2


@pytest.mark.parametrize("empty", [True, False])
def test_a_class_without_test_images_does_not_renumber_the_others(tmp_path, empty):
    for c in ("ant", "bee", "cow"): picture(tmp_path / "train" / c / "0.png")
    for c in ("bee", "cow"): picture(tmp_path / "test" / c / "0.png")
    if empty: (tmp_path / "test" / "ant").mkdir()
    s = read(tmp_path, "test")
    assert s.classes == ["ant", "bee", "cow"] and s.labels.tolist() == [1, 2]
    assert read(tmp_path, "all").labels.tolist() == [0, 1, 2, 1, 2]


def test_a_flat_split_beside_one_with_classes(tmp_path):
    picture(tmp_path / "train" / "ant" / "0.png")
    picture(tmp_path / "test" / "0.png")
    assert read(tmp_path, "test").labels is None and read(tmp_path, "train").labels.tolist() == [0]
    refused(read, tmp_path, "all", says=["classes", "differ"])


def test_folder_refused(tmp_path):
    refused(read, tmp_path / "nowhere", says=["there is no folder", "nowhere"])
    refused(read, tmp_path, says=["holds no images"])
    picture(tmp_path / "a.png")
    picture(tmp_path / "b.png", shape=(9, 8, 3))
    refused(read, tmp_path, says=["8×8 to 9×8", "size=28"])
    assert len(read(tmp_path, size=8)) == 2
    (tmp_path / "notes.txt").write_text("hello")
    refused(read, tmp_path, size=28, says=["notes.txt is not an image"])
    (tmp_path / "notes.txt").unlink()
    (tmp_path / "c.png").write_text("hello")
    refused(read, tmp_path, size=28, says=["c.png", "cannot be read as an image"])
    (tmp_path / "c.png").write_bytes((tmp_path / "a.png").read_bytes()[:-30])
    refused(read, tmp_path, size=28, says=["c.png", "cannot be read as an image"])
    (tmp_path / "c.png").unlink()
    (tmp_path / "sub").mkdir()
    refused(read, tmp_path, size=28, says=["beside subfolders"])
