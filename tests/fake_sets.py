"""Image sets in the form in which they are published, small and made up."""
import hashlib
import pickle

import numpy as np


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


def write_svhn(root, monkeypatch, labels=(10, 1, 2, 9)):
    "Both files as they are published, whose checksums then stand in the reader class; the images of the test file [32, 32, 3, N] and its path."
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
