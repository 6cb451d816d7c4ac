"Image sets: every file format on tiny files in their real layout, the pure sets, and a one-line error for each bad input."
import hashlib
import os
import pickle
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch
from fake_sets import write_cifar, write_svhn
from PIL import Image

from nioodd.core import datasets as data
from nioodd.core.datasets import SOURCES, available, data_root, load, noise
from nioodd.core.errors import NiooddError
from nioodd.core.images import ImageSet, check_classes, from_arrays, read_images, resize, to_input, to_uint8

ROOT = os.environ.get("NIOODD_DATA")
needs_data = pytest.mark.skipif(not ROOT, reason="NIOODD_DATA is not set: the real image sets are not here")
CIFAR10 = "airplane automobile bird cat deer dog frog horse ship truck".split()


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    "A cache folder of its own for each test."
    monkeypatch.setattr(data, "user_cache_dir", lambda name: str(tmp_path / "cache"))
    return tmp_path / "cache"


def fails(*parts, call=load, **kw):
    "The message of the NiooddError that `call(*args)` raises: one line; the last of `parts` are looked for in it."
    args, words = parts
    with pytest.raises(NiooddError) as e: call(*args, **kw)
    message = str(e.value)
    assert "\n" not in message and len(message) < 600, message
    for word in words: assert word in message, (word, message)
    return message


def grey(n, size=28, seed=0): return np.random.default_rng(seed).integers(0, 256, (n, size, size), dtype=np.uint8)


def picture(path, value=100, shape=(8, 8, 3)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full(shape, value, np.uint8)).save(path)


def write_idx(path, x):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(bytes([0, 0, 8, x.ndim]) + np.array(x.shape, ">u4").tobytes() + x.tobytes())


def write_mnist(root, folder="MNIST"):
    raw = root / folder / "raw"
    for part, n in (("train", 6), ("t10k", 4)):
        write_idx(raw / f"{part}-images-idx3-ubyte", grey(n))
        write_idx(raw / f"{part}-labels-idx1-ubyte", np.arange(n, dtype=np.uint8))
    return raw


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
    ours = resize(torch.from_numpy(rgb).permute(2, 0, 1)[None], size, 1)[0, 0].int()
    pil = np.array(Image.fromarray(rgb).convert("L").resize((size, size), Image.Resampling.BILINEAR)).astype(int)
    assert (ours - torch.from_numpy(pil)).abs().max() <= 3


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
    fails((x.float(), 8), ["float32", "uint8"], call=resize)
    fails((x[0], 8), ["[1, 8, 8]"], call=resize)
    fails((x, 0), ["size is 0"], call=resize)
    fails((x, 8, 2), ["channels is 2"], call=resize)
    fails((torch.zeros(2, 4, 8, 8, dtype=torch.uint8), 8, 1), ["4 channels"], call=resize)


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


@pytest.mark.parametrize("images,words", [
    (np.zeros((4, 28)), ["[4, 28]", "[N, C, H, W]"]),
    (np.zeros((4, 28, 28, 2)), ["[4, 28, 28, 2]"]),
    (np.zeros((2, 8, 8), np.int64), ["int64", "uint8"]),
    (np.zeros((2, 8, 8), bool), ["bool"]),
    (np.full((2, 8, 8), np.nan), ["NaN"]),
    (np.full((2, 8, 8), np.inf), ["infinite"]),
    (np.full((2, 8, 8), 255.0), ["to 255", "[0, 1]"]),
    (np.full((2, 8, 8), -1.0), ["-1", "[0, 1]"]),
    (np.zeros((0, 8, 8), np.uint8), ["no images"]),
    (np.array([None, "a"], dtype=object), ["no images"]),
])
def test_from_arrays_refuses_images(images, words): fails((images,), words, call=from_arrays)


@pytest.mark.parametrize("labels,classes,words", [
    ([0, 1, 2], None, ["[3]", "2 images"]),
    ([0.0, 1.0], None, ["float"]),
    ([0, -1], None, ["-1"]),
    ([0, 2], ["a", "b"], ["0 to 2", "0 to 1"]),
])
def test_from_arrays_refuses_labels(labels, classes, words):
    fails((np.zeros((2, 8, 8)), np.array(labels), "mine", classes), words, call=from_arrays)


def test_image_set_is_cut_and_described():
    s = from_arrays(grey(10), np.arange(10), "ten")
    assert len(s) == 10 and s[:3].labels.tolist() == [0, 1, 2] and len(s[s.labels > 6]) == 3
    assert repr(s) == "ImageSet('ten', 10 images 28×28×1 uint8, 10 classes)"
    assert s.resized(14, 3).images.shape == (10, 3, 14, 14) and s.resized(14, 3).labels is s.labels


def test_check_classes():
    x = torch.zeros(3, 1, 8, 8, dtype=torch.uint8)
    check_classes(ImageSet("s", x, torch.tensor([0, 1, 1]), ["a", "b"]))
    fails((ImageSet("s", x),), ["no labels"], call=check_classes)
    fails((ImageSet("s", x, torch.tensor([0, 0, 0]), ["a"]),), ["1 class", "at least 2"], call=check_classes)
    fails((ImageSet("s", x, torch.tensor([0, 0, 2]), ["a", "b", "c"]),), ["no images of class 'b'"], call=check_classes)


# ---- noise

@pytest.mark.parametrize("kind", ["gaussian", "uniform"])
@pytest.mark.parametrize("size,channels", [(28, 1), (32, 3), (5, 1)])
def test_noise_is_a_function_of_seed_and_index(kind, size, channels):
    x = noise(kind, 0, 40, size, channels, seed=3)
    assert x.shape == (40, channels, size, size) and x.dtype == torch.uint8
    assert torch.equal(noise(kind, 11, 29, size, channels, seed=3), x[11:29])
    assert not torch.equal(noise(kind, 0, 40, size, channels, seed=4), x)
    assert len(torch.unique(x.flatten(1), dim=0)) == 40
    a, b = load(kind, size=size, channels=channels, n=10, seed=3), load(kind, size=size, channels=channels, n=20, seed=3)
    assert torch.equal(a.images, b.images[:10]) and torch.equal(a.images, x[:10])


def test_noise_does_not_touch_the_global_generator():
    state = torch.random.get_rng_state()
    load("gaussian", n=5)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_noise_splits_share_nothing():
    train, test, both = (load("gaussian", s, n=10_005 if s == "all" else 5).images for s in ("train", "test", "all"))
    assert torch.equal(both[:5], train) and torch.equal(both[10_000:], test) and not torch.equal(train, test)
    assert len(load("uniform", size=2)) == 10_000


@pytest.mark.parametrize("kind", ["gaussian", "uniform"])
def test_noise_distributions(kind):
    "Chi-square over the 256 levels against the exact probabilities; one good generator in 30,000 fails 350 at 255 degrees of freedom."
    counts = torch.bincount(noise(kind, 0, 2000).flatten().int(), minlength=256).double()
    edges = torch.special.ndtr((torch.arange(255).double() + 0.5) / 127.5 - 1) # between neighbouring levels
    p = torch.diff(torch.cat([torch.zeros(1), edges, torch.ones(1)])) if kind == "gaussian" else torch.full((256,), 1 / 256)
    e = counts.sum() * p.double()
    assert ((counts - e) ** 2 / e).sum() < 350


def test_noise_is_the_same_forever():
    "Published figures depend on these bytes."
    digest = hashlib.sha256(b"".join(load(k, n=10).images.numpy().tobytes() for k in ("gaussian", "uniform"))).hexdigest()
    assert digest[:16] == "0666dd85c97f412b"


# ---- sets that come with a package

def test_digits5k():
    train, test, both = (load("digits5k", s) for s in ("train", "test", "all"))
    assert torch.bincount(train.labels).tolist() == [400] * 10 and torch.bincount(test.labels).tolist() == [100] * 10
    assert torch.equal(both.images, torch.cat([train.images, test.images])) and both.classes == list("0123456789")
    rows = {x.tobytes() for x in both.images.numpy()}
    assert len(rows) == 5000 # no image in both splits
    assert torch.equal(load("digits5k", n=7).images, train.images[:7])


def test_letters_are_made_once(own_cache):
    t = time.perf_counter(); a = load("letters"); first = time.perf_counter() - t
    files = list((own_cache / "made").iterdir())
    assert len(files) == 1 and files[0].name.startswith("letters")
    t = time.perf_counter(); b = load("letters"); second = time.perf_counter() - t
    assert torch.equal(a.images, b.images) and second < first
    test = load("letters", "test")
    assert torch.bincount(a.labels).tolist() == [112] * 36 and torch.bincount(test.labels).tolist() == [28] * 36
    assert not set("OoDQIliZzSsbGBgq0123456789") & set(a.classes)
    edge = torch.cat([a.images, test.images]).double()
    ink = edge.sum((1, 2, 3))
    assert (ink > 0).all() and a.images.max() == 255 and (a.images == 0).double().mean() > 0.6 # white on black
    assert not torch.equal(load("letters", seed=1).images, a.images)


def test_a_damaged_cache_is_made_anew(own_cache):
    a = load("letters", n=20)
    path, = (own_cache / "made").iterdir()
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.warns(UserWarning, match="damaged"): b = load("letters", n=20)
    assert torch.equal(a.images, b.images)
    assert torch.equal(load("letters", n=20).images, a.images)


def test_a_cache_that_cannot_be_written_costs_only_time(own_cache):
    own_cache.write_text("a file where the cache folder should be")
    with pytest.warns(UserWarning, match="could not be kept"): assert len(load("letters", n=20)) == 20


def test_photos():
    train, test = load("photos"), load("photos", "test")
    assert train.images.shape == (4000, 1, 28, 28) and len(test) == 1000 and train.classes == ["china", "flower"]
    assert torch.equal(load("photos").images, train.images)
    assert train.images.double().std((1, 2, 3)).min() > 15
    assert not {x.tobytes() for x in train.images.numpy()} & {x.tobytes() for x in test.images.numpy()}


def test_inverted():
    assert torch.equal(load("digits5k-inverted", "test").images, 255 - load("digits5k", "test").images)
    assert load("digits5k-inverted", "test", n=3).name == "digits5k-inverted"


# ---- sets in files

@pytest.mark.parametrize("name,folder", [("mnist", "MNIST"), ("fashion_mnist", "FashionMNIST")])
def test_idx_files(tmp_path, name, folder):
    write_mnist(tmp_path, folder)
    s = load(name, "train", root=tmp_path)
    assert torch.equal(s.images[:, 0], torch.from_numpy(grey(6))) and s.labels.tolist() == list(range(6)) and len(s.classes) == 10
    assert s.labels.dtype == torch.int64
    both = load(name, "all", root=tmp_path, size=14, channels=3)
    assert both.images.shape == (10, 3, 14, 14) and both.labels.tolist() == [*range(6), *range(4)]
    assert [r.found for r in available(tmp_path) if r.name == name] == [True]


def test_idx_cut_short(tmp_path):
    raw = write_mnist(tmp_path)
    images, labels = raw / "train-images-idx3-ubyte", raw / "train-labels-idx1-ubyte"
    images.write_bytes(images.read_bytes()[:-100])
    fails(("mnist",), [str(images), "4,620", "4,720"], root=tmp_path)
    assert len(load("mnist", "test", root=tmp_path)) == 4 # the other files are sound
    images.write_bytes(b"\0\0")
    fails(("mnist",), [str(images), "not an idx file"], root=tmp_path)
    images.write_bytes(b"<html>not found</html>")
    fails(("mnist",), [str(images), "not an idx file"], root=tmp_path)
    write_idx(images, grey(6)); write_idx(labels, np.arange(5, dtype=np.uint8))
    fails(("mnist",), ["6 images", "5 labels"], root=tmp_path)
    labels.unlink()
    fails(("mnist",), ["mnist is not here", "train-labels-idx1-ubyte", "download=True", "nioodd data"], root=tmp_path)


@pytest.mark.parametrize("name", ["mnist", "fashion_mnist", "cifar10", "cifar10-jpeg", "cifar100", "svhn", "cmaterdb"])
def test_missing_root_and_missing_set(tmp_path, name):
    help_with = "git clone" if name == "cifar10-jpeg" else "download=True"
    fails((name,), ["there is no folder", str(tmp_path / "nowhere"), help_with, "nioodd data"], root=tmp_path / "nowhere")
    fails((name,), [f"{name} is not here", str(tmp_path), help_with], root=tmp_path)


def test_root_is_the_argument_then_the_environment_then_the_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("NIOODD_DATA", str(tmp_path / "env"))
    assert data_root(tmp_path / "arg") == tmp_path / "arg" and data_root() == tmp_path / "env"
    monkeypatch.delenv("NIOODD_DATA")
    assert data_root() == tmp_path / "cache"


def test_cifar10_batches_come_before_jpeg(tmp_path, monkeypatch):
    from torchvision.datasets import CIFAR10 as Kind
    names = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]
    folder = write_cifar(tmp_path / "cifar-10-batches-py", names, "labels", CIFAR10, "batches.meta", "label_names", monkeypatch, Kind)
    write_jpegs(tmp_path / "cifar10-jpeg")
    s = load("cifar10", root=tmp_path)
    first = pickle.loads((folder / "data_batch_1").read_bytes())
    assert s.name == "cifar10" and s.images.shape == (15, 3, 32, 32) and s.classes == CIFAR10 and s.labels[:3].tolist() == [0, 1, 2]
    assert torch.equal(s.images[:3].reshape(3, -1), torch.from_numpy(first["data"]))
    assert load("cifar10-jpeg", root=tmp_path).name == "cifar10-jpeg"
    (folder / "data_batch_3").write_bytes(b"something else")
    fails(("cifar10",), ["cifar10 cannot be read", "corrupted"], root=tmp_path)


def test_cifar100(tmp_path, monkeypatch):
    from torchvision.datasets import CIFAR100 as Kind
    classes = [f"class {i}" for i in range(100)]
    write_cifar(tmp_path / "cifar-100-python", ["train", "test"], "fine_labels", classes, "meta", "fine_label_names", monkeypatch, Kind)
    s = load("cifar100", "all", root=tmp_path, size=28, channels=1)
    assert s.images.shape == (6, 1, 28, 28) and s.classes == classes and s.labels.tolist() == [0, 1, 2, 1, 1, 2]


def test_svhn(tmp_path, monkeypatch):
    x, path = write_svhn(tmp_path, monkeypatch)
    s = load("svhn", "test", root=tmp_path)
    assert s.labels.tolist() == [0, 1, 2, 9] # 10 stands for the digit 0
    assert torch.equal(s.images[2], torch.from_numpy(x[..., 2]).permute(2, 0, 1)) and s.images.is_contiguous()
    path.write_bytes(path.read_bytes()[:200])
    fails(("svhn", "test"), ["svhn cannot be read", "download=True"], root=tmp_path)


def test_download_happens_only_when_asked_and_fails_in_one_line(tmp_path, monkeypatch):
    asked = []
    def refuse(url, *a, **k): asked.append(url); raise URLError("no route to host\nsecond line")
    monkeypatch.setattr("urllib.request.urlopen", refuse)
    for name in ("mnist", "cifar10", "cifar100", "svhn", "cmaterdb"):
        fails((name,), [name], root=tmp_path / "new")
        assert not asked and not (tmp_path / "new").exists()
    for name in ("mnist", "cifar10", "cifar100", "svhn", "cmaterdb"):
        fails((name,), [f"{name} could not be downloaded to {tmp_path}", "no route"], root=tmp_path / "new", download=True)
        assert asked; asked.clear()


# ---- CIFAR-10 as JPEG files

def write_jpegs(folder):
    for split, n in (("train", 3), ("test", 2)):
        for k, c in enumerate(CIFAR10):
            for i in range(n): picture(folder / split / c / f"{i:04}.jpg", 20 * k + i, (32, 32, 3))
    return folder


@pytest.mark.parametrize("where", ["cifar10-jpeg", "cifar10", "."])
def test_cifar10_jpeg_folder(tmp_path, where):
    root = tmp_path / "root"
    write_jpegs(root / where)
    s = load("cifar10", "train", root=root)
    assert s.name == "cifar10-jpeg" and s.images.shape == (30, 3, 32, 32) and torch.bincount(s.labels).tolist() == [3] * 10
    assert ((s.images[:, 0, 0, 0].int() - 20 * s.labels).abs() <= 4).all() # images and labels were shuffled alike
    assert len(load("cifar10-jpeg", "all", root=root)) == 50
    assert load("cifar10-inverted", root=root, n=2).name == "cifar10-jpeg-inverted"


def test_cifar10_jpeg_archive_is_read_once_and_nothing_is_unpacked(tmp_path, own_cache, monkeypatch):
    write_jpegs(tmp_path / "files")
    root = tmp_path / "root"; root.mkdir()
    with tarfile.open(root / "cifar10-jpeg.tar.xz", "w:xz") as tar: tar.add(tmp_path / "files", "cifar10-jpeg")
    root.chmod(0o555)
    s = load("cifar10", "test", root=root)
    assert len(s) == 20 and [p.name for p in root.iterdir()] == ["cifar10-jpeg.tar.xz"]
    assert len(list((own_cache / "made").iterdir())) == 1
    monkeypatch.setattr(data, "_make_cifar10_jpeg", None) # a second reading would fail
    assert torch.equal(load("cifar10", "test", root=root).images, s.images)
    root.chmod(0o755)


def test_cifar10_jpeg_folder_is_read_again_when_it_changes(tmp_path):
    folder = write_jpegs(tmp_path / "cifar10-jpeg")
    assert len(load("cifar10", root=tmp_path)) == 30
    picture(folder / "train" / "cat" / "9999.jpg", 1, (32, 32, 3))
    assert len(load("cifar10", root=tmp_path)) == 31


def test_cifar10_jpeg_damage(tmp_path):
    folder = write_jpegs(tmp_path / "cifar10-jpeg")
    bad = folder / "train" / "dog" / "0001.jpg"
    bad.write_bytes(bad.read_bytes()[:300])
    fails(("cifar10",), [str(bad), "cannot be read as an image"], root=tmp_path)
    other = tmp_path / "other"; other.mkdir()
    archive = other / "cifar10-jpeg.tar.xz"
    with tarfile.open(archive, "w:xz") as tar: tar.add(folder, "cifar10-jpeg")
    archive.write_bytes(archive.read_bytes()[:-400])
    fails(("cifar10",), [str(archive), "cannot be unpacked"], root=other)
    archive.write_bytes(b"nonsense")
    fails(("cifar10",), [str(archive), "cannot be unpacked"], root=other)
    with tarfile.open(archive, "w:xz") as tar: tar.add(__file__, "readme.txt")
    fails(("cifar10",), [str(archive), "no images"], root=other)


# ---- CMATERdb

def write_cmaterdb(root):
    folder = root / "CMATERdb" / "bangla-numerals"; folder.mkdir(parents=True)
    for part, n in (("training", 30), ("testing", 20)):
        labels = np.arange(n) % 10
        images = np.broadcast_to((labels * 20).astype(np.uint8)[:, None, None, None], (n, 32, 32, 3))
        np.savez(folder / f"{part}-images.npz", images=images, labels=labels)
    return folder


def test_cmaterdb(tmp_path):
    write_cmaterdb(tmp_path)
    s = load("cmaterdb", root=tmp_path, size=28, channels=1)
    assert s.images.shape == (30, 1, 28, 28) and torch.equal(s.images[:, 0, 5, 5].long(), s.labels * 20)
    assert len(load("cmaterdb-inverted", "all", root=tmp_path)) == 50


@pytest.mark.parametrize("spoil", [
    lambda p: p.write_bytes(p.read_bytes()[:len(p.read_bytes()) // 2]),
    lambda p: p.write_bytes(b"nonsense"),
    lambda p: p.write_bytes(b""),
    lambda p: np.savez(p, pictures=np.zeros(3)),
    lambda p: np.savez(p, images=np.array([{}], dtype=object), labels=np.zeros(1)),
    lambda p: np.savez(p, images=np.zeros((2, 32, 32, 3), np.uint8), labels=np.zeros(3, int)),
    lambda p: np.savez(p, images=np.zeros((2, 32, 32, 3), np.uint8), labels=np.array([0, 77])),
    lambda p: p.write_bytes(p.read_bytes()[:9000] + b"U" * 50 + p.read_bytes()[9050:]), # the checksum inside no longer fits
])
def test_cmaterdb_damaged(tmp_path, spoil):
    path = write_cmaterdb(tmp_path) / "training-images.npz"
    spoil(path)
    fails(("cmaterdb",), [str(path)], root=tmp_path)


# ---- folders

def test_flat_folder(tmp_path):
    for i, suffix in enumerate((".png", ".JPG", ".bmp", ".webp", ".tif", ".gif")): picture(tmp_path / f"{i}{suffix}", 40 * i)
    (tmp_path / ".DS_Store").write_text("hidden")
    s = load(f"folder:{tmp_path}", "test", size=28, channels=1)
    assert s.images.shape == (6, 1, 28, 28) and s.labels is None and s.classes == [] and s.name == f"folder:{tmp_path.name}"
    assert (s.images[:, 0, 3, 3].int() - 40 * torch.arange(6)).abs().max() <= 3
    assert len(load(f"folder:{tmp_path}", n=2)) == 2
    assert torch.equal(load(f"folder:{tmp_path}-inverted", size=28, channels=1).images, 255 - s.images)


def test_folder_with_a_subfolder_per_class(tmp_path):
    for c, n in (("dog", 2), ("cat", 3)):
        for i in range(n): picture(tmp_path / c / f"{i}.png", 10 * i)
    s = load(f"folder:{tmp_path}")
    assert s.classes == ["cat", "dog"] and s.labels.tolist() == [0, 0, 0, 1, 1]
    (tmp_path / "eel").mkdir()
    fails((load(f"folder:{tmp_path}"),), ["no images of class 'eel'"], call=check_classes)


def test_folder_with_train_and_test(tmp_path):
    for split, n in (("train", 3), ("test", 2)):
        for c in ("a", "b"):
            for i in range(n): picture(tmp_path / split / c / f"{i}.png")
    assert [len(load(f"folder:{tmp_path}", s)) for s in ("train", "test", "all")] == [6, 4, 10]
    picture(tmp_path / "test" / "c" / "0.png")
    fails((f"folder:{tmp_path}", "all"), ["classes", "differ"])


def test_folder_name_ending_in_inverted_is_taken_as_it_is(tmp_path):
    picture(tmp_path / "x-inverted" / "0.png", 10)
    assert load(f"folder:{tmp_path}/x-inverted").images[0, 0, 0, 0] == 10
    assert load(f"folder:{tmp_path}/x-inverted-inverted").images[0, 0, 0, 0] == 245


def test_folder_refused(tmp_path):
    name = f"folder:{tmp_path}"
    fails((f"{name}/nowhere",), ["there is no folder", "nowhere"])
    fails((name,), ["holds no images"])
    picture(tmp_path / "a.png"); picture(tmp_path / "b.png", shape=(9, 8, 3))
    fails((name,), ["8×8 to 9×8", "size=28"])
    assert len(load(name, size=8)) == 2
    (tmp_path / "notes.txt").write_text("hello")
    fails((name,), ["notes.txt is not an image"], size=28)
    (tmp_path / "notes.txt").unlink()
    (tmp_path / "c.png").write_text("hello")
    fails((name,), ["c.png", "cannot be read as an image"], size=28)
    (tmp_path / "c.png").write_bytes((tmp_path / "a.png").read_bytes()[:-30])
    fails((name,), ["c.png", "cannot be read as an image"], size=28)
    (tmp_path / "c.png").unlink()
    (tmp_path / "sub").mkdir()
    fails((name,), ["beside subfolders"], size=28)
    fails(([tmp_path / "gone.png"],), ["gone.png"], call=read_images)
    fails(([],), ["no image files"], call=read_images)


def test_kinds_of_pixels(tmp_path):
    "Grey, palette, transparent, 1-bit, 16-bit, CMYK and turned by EXIF: what a viewer shows."
    def one(image, name, **kw):
        image.save(tmp_path / name, **kw)
        return read_images([tmp_path / name])[0]
    assert one(Image.new("L", (4, 3), 7), "l.png").tolist() == [[[7] * 4] * 3]
    assert one(Image.new("1", (4, 3), 1), "1.png").tolist() == [[[255] * 4] * 3]
    assert one(Image.new("P", (4, 3), 0), "p.png").shape == (3, 3, 4)
    assert one(Image.new("RGBA", (4, 3), (0, 0, 0, 0)), "clear.png").min() == 255
    assert one(Image.new("LA", (4, 3), (0, 255)), "la.png").tolist() == [[[0] * 4] * 3]
    assert one(Image.new("CMYK", (4, 3)), "cmyk.jpg").shape == (3, 3, 4)
    assert one(Image.fromarray(np.full((3, 4), 0x80FF, np.uint16)), "16.png").tolist() == [[[0x80] * 4] * 3]
    exif = Image.Exif(); exif[0x0112] = 6 # turn by 90°
    assert one(Image.new("RGB", (4, 3)), "turned.jpg", exif=exif).shape == (3, 4, 3)
    fails((Image.new("F", (4, 3)), "f.tif"), ["f.tif", "float"], call=one)
    assert read_images([tmp_path / "l.png", tmp_path / "p.png"]).shape == (2, 3, 3, 4) # grey beside colour is colour


# ---- names and arguments

def test_unknown_names():
    fails(("mnits",), ["unknown image set 'mnits'", "did you mean 'mnist'"])
    fails(("fashion-mnist-inverted",), ["'fashion-mnist'", "fashion_mnist", "folder:PATH"])
    fails(("mnist", "valid"), ["unknown split 'valid'", "train, test, all"])


@pytest.mark.parametrize("kw,words", [({"size": 0}, ["size is 0"]), ({"size": 2.5}, ["size is 2.5"]), ({"channels": 2}, ["channels is 2"]),
                                      ({"n": 0}, ["n is 0"]), ({"seed": -1}, ["seed is -1"])])
@pytest.mark.parametrize("name", ["gaussian", "digits5k", "mnist"])
def test_arguments_refused(name, kw, words): fails((name,), words, **kw)


def test_available_lists_every_set_and_reads_none(tmp_path):
    t = time.perf_counter(); rows = available(tmp_path / "nowhere"); seconds = time.perf_counter() - t
    assert [r.name for r in rows] == list(SOURCES) and seconds < 0.5
    found = {r.name for r in rows if r.found}
    assert found == {"digits5k", "letters", "photos", "gaussian", "uniform"}
    assert {r.kind for r in rows} == {"ID", "OOD", "noise"} and all(r.how and r.about and r.n > 0 for r in rows)


def test_import_is_light():
    code = "import sys, nioodd.core.datasets; print(sorted({'torchvision', 'sklearn', 'mlxtend', 'matplotlib', 'pandas'} & set(sys.modules)))"
    folder = Path(data.__file__).parents[2]
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=folder)
    assert out.stdout.strip() == "[]", out.stdout + out.stderr


# ---- the real sets

@needs_data
def test_real_mnist_is_loaded_fast_and_whole():
    load("mnist", "test") # imports
    t = time.perf_counter(); s = load("mnist"); seconds = time.perf_counter() - t
    assert s.images.shape == (60_000, 1, 28, 28) and torch.bincount(s.labels)[:3].tolist() == [5923, 6742, 5958]
    assert abs(to_input(s.images[:1000]).mean() + 0.74) < 0.02 and seconds < 5
    check_classes(s)


@needs_data
def test_real_digits5k_come_from_the_training_set_of_mnist():
    rows = {part: {x.tobytes() for x in load("mnist", part).images.numpy()} for part in ("train", "test")}
    ours = {x.tobytes() for x in load("digits5k", "all").images.numpy()}
    assert ours <= rows["train"] and not ours & rows["test"]


@needs_data
@pytest.mark.parametrize("name,n,shape", [("fashion_mnist", 70_000, (1, 28, 28)), ("cmaterdb", 6_000, (3, 32, 32))])
def test_real_sets(name, n, shape):
    if not {r.name: r.found for r in available()}[name]: pytest.skip(f"{name} is not under NIOODD_DATA")
    s = load(name, "all")
    assert s.images.shape == (n, *shape)
    check_classes(s)
    if name == "cmaterdb": # black on white as supplied
        assert s.images.double().mean() > 150 and load("cmaterdb-inverted", "test").images.double().mean() < 105
