"""Image sets in the form in which they are published, small and made up, and what tests of image sets share."""
import hashlib
import pickle

import numpy as np
from PIL import Image

from nioodd.core.errors import message

CIFAR10 = "airplane automobile bird cat deer dog frog horse ship truck".split()


def refused(call, *args, says=(), **kw):
    "`call(*args, **kw)` raises a NiooddError of one short line with the words of `says`; returns it."
    text = message(call, *args, **kw)
    assert len(text) < 600, text
    for word in says: assert word in text, (word, text)
    return text


def grey(n, size=28, seed=0):
    "n random grey images uint8 [n, size, size]."
    return np.random.default_rng(seed).integers(0, 256, (n, size, size), dtype=np.uint8)


def picture(path, value=100, shape=(8, 8, 3)):
    "An image file of one level."
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full(shape, value, np.uint8)).save(path)


def write_idx(path, x):
    "A file in MNIST's format."
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(bytes([0, 0, 8, x.ndim]) + np.array(x.shape, ">u4").tobytes() + x.tobytes())


def write_mnist(root, folder="MNIST"):
    "6 training images `grey(6)` and 4 test images; returns the folder of the files."
    raw = root / folder / "raw"
    for part, n in (("train", 6), ("t10k", 4)):
        write_idx(raw / f"{part}-images-idx3-ubyte", grey(n))
        write_idx(raw / f"{part}-labels-idx1-ubyte", np.arange(n, dtype=np.uint8))
    return raw


def write_cifar(folder, names, key, classes, meta, meta_key, monkeypatch, kind):
    "Batches as torchvision unpacks them, whose checksums then stand in the reader class."
    folder.mkdir(parents=True)
    rng, md5 = np.random.default_rng(0), {}
    for i, name in enumerate(names):
        batch = {"data": rng.integers(0, 256, (3, 3072), dtype=np.uint8), key: [i % 10, 1, 2]}
        (folder / name).write_bytes(pickle.dumps(batch))
    (folder / meta).write_bytes(pickle.dumps({meta_key: classes}))
    md5 = {p.name: hashlib.md5(p.read_bytes()).hexdigest() for p in folder.iterdir()}
    monkeypatch.setattr(kind, "train_list", [[n, md5[n]] for n in names[:-1]])
    monkeypatch.setattr(kind, "test_list", [[names[-1], md5[names[-1]]]])
    monkeypatch.setattr(kind, "meta", {"filename": meta, "key": meta_key, "md5": md5[meta]})
    return folder


def write_jpegs(folder):
    "CIFAR-10 as JPEG files: 3 training and 2 test images a class, of grey level 20 × class + number."
    for split, n in (("train", 3), ("test", 2)):
        for k, c in enumerate(CIFAR10):
            for i in range(n): picture(folder / split / c / f"{i:04}.jpg", 20 * k + i, (32, 32, 3))
    return folder


def write_svhn(root, monkeypatch, labels=(10, 1, 2, 9)):
    """Both files as they are published, whose checksums then stand in the reader class.

    Returns the images of the test file [32, 32, 3, N] and its path."""
    from scipy.io import savemat
    from torchvision.datasets import SVHN as Kind
    rng, md5 = np.random.default_rng(0), {}
    for split in ("train", "test"):
        x = rng.integers(0, 256, (32, 32, 3, len(labels)), dtype=np.uint8)
        path = root / f"{split}_32x32.mat"
        savemat(path, {"X": x, "y": np.array(labels, np.uint8)[:, None]})
        md5[split] = ["", path.name, hashlib.md5(path.read_bytes()).hexdigest()]
    monkeypatch.setattr(Kind, "split_list", md5)
    return x, path


def write_cmaterdb(root):
    "30 training and 20 test images, of grey level 20 × class; returns the folder of the files."
    folder = root / "CMATERdb" / "bangla-numerals"
    folder.mkdir(parents=True)
    for part, n in (("training", 30), ("testing", 20)):
        labels = np.arange(n) % 10
        levels = (labels * 20).astype(np.uint8)[:, None, None, None]
        np.savez(folder / f"{part}-images.npz", images=np.broadcast_to(levels, (n, 32, 32, 3)), labels=labels)
    return folder
