"""Image sets by name: every file format on tiny files in their real layout, the pure sets, and one-line errors."""
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
from fake_sets import (
    CIFAR10,
    grey,
    picture,
    refused,
    write_cifar,
    write_cmaterdb,
    write_idx,
    write_jpegs,
    write_mnist,
    write_svhn,
)
from PIL import Image

from nioodd.core import datasets as data
from nioodd.core.datasets import (
    SOURCES,
    available,
    data_root,
    data_set,
    files_under,
    known_and_unknown,
    load,
    load_problem,
    noise,
)
from nioodd.core.images import check_classes, from_arrays, to_input

ROOT = os.environ.get("NIOODD_DATA")
needs_data = pytest.mark.skipif(not ROOT, reason="NIOODD_DATA is not set: the real image sets are not here")

@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    "A cache folder of its own for each test."
    monkeypatch.setattr(data, "user_cache_dir", lambda name: str(tmp_path / "cache"))
    return tmp_path / "cache"


# ---- noise

@pytest.mark.parametrize("kind", ["gaussian", "uniform"])
@pytest.mark.parametrize("size,channels", [(28, 1), (32, 3), (5, 1)])
def test_noise_is_a_function_of_seed_and_index(kind, size, channels):
    x = noise(kind, 0, 40, size, channels, seed=3)
    assert x.shape == (40, channels, size, size) and x.dtype == torch.uint8
    assert torch.equal(noise(kind, 11, 29, size, channels, seed=3), x[11:29])
    assert not torch.equal(noise(kind, 0, 40, size, channels, seed=4), x)
    assert len(torch.unique(x.flatten(1), dim=0)) == 40
    a, b = (load(kind, size=size, channels=channels, n=n, seed=3) for n in (10, 20))
    assert torch.equal(a.images, b.images[:10]) and torch.equal(a.images, x[:10])


def test_noise_does_not_touch_the_global_generator():
    state = torch.random.get_rng_state()
    load("gaussian", n=5)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_noise_splits_share_nothing():
    train, test = (load("gaussian", split, n=5).images for split in ("train", "test"))
    both = load("gaussian", "all", n=10_005).images
    assert torch.equal(both[:5], train) and torch.equal(both[10_000:], test) and not torch.equal(train, test)
    assert len(load("uniform", size=2)) == 10_000


@pytest.mark.parametrize("kind", ["gaussian", "uniform"])
def test_noise_distributions(kind):
    """Chi-square over the 256 levels against the exact probabilities.

    One good generator in 30,000 fails 350 at 255 degrees of freedom."""
    counts = torch.bincount(noise(kind, 0, 2000).flatten().int(), minlength=256).double()
    edges = torch.special.ndtr((torch.arange(255).double() + 0.5) / 127.5 - 1)  # between neighbouring levels
    p = torch.full((256,), 1 / 256)
    if kind == "gaussian": p = torch.diff(torch.cat([torch.zeros(1), edges, torch.ones(1)]))
    e = counts.sum() * p.double()
    assert ((counts - e) ** 2 / e).sum() < 350


def test_noise_is_the_same_forever():
    "Published figures depend on these bytes."
    both = b"".join(load(kind, n=10).images.numpy().tobytes() for kind in ("gaussian", "uniform"))
    assert hashlib.sha256(both).hexdigest()[:16] == "0666dd85c97f412b"


# ---- sets that come with a package

def test_digits5k():
    train, test, both = (load("digits5k", s) for s in ("train", "test", "all"))
    assert torch.bincount(train.labels).tolist() == [400] * 10 and torch.bincount(test.labels).tolist() == [100] * 10
    assert torch.equal(both.images, torch.cat([train.images, test.images])) and both.classes == list("0123456789")
    rows = {x.tobytes() for x in both.images.numpy()}
    assert len(rows) == 5000  # no image in both splits
    assert torch.equal(load("digits5k", n=7).images, train.images[:7])


def test_letters_are_made_once(own_cache):
    a = load("letters")
    file, = (own_cache / "made").iterdir()
    assert file.name.startswith("letters")
    written = file.stat().st_mtime_ns
    assert torch.equal(load("letters").images, a.images) and file.stat().st_mtime_ns == written
    test = load("letters", "test")
    assert torch.bincount(a.labels).tolist() == [112] * 36 and torch.bincount(test.labels).tolist() == [28] * 36
    assert not set("OoDQIliZzSsbGBgq0123456789") & set(a.classes)
    edge = torch.cat([a.images, test.images]).double()
    ink = edge.sum((1, 2, 3))
    assert (ink > 0).all() and a.images.max() == 255
    assert (a.images == 0).double().mean() > 0.6  # white on black
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


@pytest.mark.parametrize("name", ["digits5k", "photos"])
def test_what_is_kept_in_memory_is_not_what_is_handed_out(name):
    first = load(name, "test")
    images, labels = first.images.clone(), first.labels.clone()
    first.images.zero_(), first.labels.zero_(), first.classes.clear()
    again = load(name, "test")
    assert torch.equal(again.images, images) and torch.equal(again.labels, labels) and again.classes


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
    assert torch.equal(s.images[:, 0], torch.from_numpy(grey(6)))
    assert s.labels.tolist() == list(range(6)) and s.labels.dtype == torch.int64 and len(s.classes) == 10
    both = load(name, "all", root=tmp_path, size=14, channels=3)
    assert both.images.shape == (10, 3, 14, 14) and both.labels.tolist() == [*range(6), *range(4)]
    assert [r.found for r in available(tmp_path) if r.name == name] == [True]


def test_idx_cut_short(tmp_path):
    raw = write_mnist(tmp_path)
    images, labels = raw / "train-images-idx3-ubyte", raw / "train-labels-idx1-ubyte"
    images.write_bytes(images.read_bytes()[:-100])
    refused(load, "mnist", root=tmp_path, says=[str(images), "4,620", "4,720"])
    assert len(load("mnist", "test", root=tmp_path)) == 4  # the other files are sound
    images.write_bytes(b"\0\0")
    refused(load, "mnist", root=tmp_path, says=[str(images), "not an idx file"])
    images.write_bytes(b"<html>not found</html>")
    refused(load, "mnist", root=tmp_path, says=[str(images), "not an idx file"])
    write_idx(images, grey(6)); write_idx(labels, np.arange(5, dtype=np.uint8))
    refused(load, "mnist", root=tmp_path, says=["6 images", "5 labels"])
    labels.unlink()
    words = ["mnist is not here", "train-labels-idx1-ubyte", "download=True", "nioodd data"]
    refused(load, "mnist", root=tmp_path, says=words)


@pytest.mark.parametrize("name", ["mnist", "fashion_mnist", "cifar10", "cifar10-jpeg", "cifar10-files", "cifar100",
                                  "cifar100-files", "svhn", "cmaterdb"])
def test_missing_root_and_missing_set(tmp_path, name):
    help_with = "git clone" if "-" in name else "download=True"
    nowhere = tmp_path / "nowhere"
    refused(load, name, root=nowhere, says=["there is no folder", str(nowhere), help_with, "nioodd data"])
    refused(load, name, root=tmp_path, says=[f"{name} is not here", str(tmp_path), help_with])


def test_root_is_the_argument_then_the_environment_then_the_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("NIOODD_DATA", str(tmp_path / "env"))
    assert data_root(tmp_path / "arg") == tmp_path / "arg" and data_root() == tmp_path / "env"
    monkeypatch.delenv("NIOODD_DATA")
    assert data_root() == tmp_path / "cache"


def test_cifar10_batches_come_before_jpeg(tmp_path, monkeypatch):
    from torchvision.datasets import CIFAR10 as Kind
    names = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]
    folder = write_cifar(tmp_path / "cifar-10-batches-py", names, "labels", CIFAR10, "batches.meta", "label_names",
                         monkeypatch, Kind)
    write_jpegs(tmp_path / "cifar10-jpeg")
    s = load("cifar10", root=tmp_path)
    first = pickle.loads((folder / "data_batch_1").read_bytes())
    assert s.name == "cifar10" and s.images.shape == (15, 3, 32, 32)
    assert s.classes == CIFAR10 and s.labels[:3].tolist() == [0, 1, 2]
    assert torch.equal(s.images[:3].reshape(3, -1), torch.from_numpy(first["data"]))
    assert load("cifar10-jpeg", root=tmp_path).name == "cifar10-jpeg"
    (folder / "data_batch_3").write_bytes(b"something else")
    refused(load, "cifar10", root=tmp_path, says=["cifar10 cannot be read", "corrupted"])


def test_cifar100(tmp_path, monkeypatch):
    from torchvision.datasets import CIFAR100 as Kind
    classes = [f"class {i}" for i in range(100)]
    write_cifar(tmp_path / "cifar-100-python", ["train", "test"], "fine_labels", classes, "meta", "fine_label_names",
                monkeypatch, Kind)
    s = load("cifar100", "all", root=tmp_path, size=28, channels=1)
    assert s.images.shape == (6, 1, 28, 28) and s.classes == classes and s.labels.tolist() == [0, 1, 2, 1, 1, 2]


def test_svhn(tmp_path, monkeypatch):
    x, path = write_svhn(tmp_path, monkeypatch)
    s = load("svhn", "test", root=tmp_path)
    assert s.labels.tolist() == [0, 1, 2, 9]  # 10 stands for the digit 0
    assert torch.equal(s.images[2], torch.from_numpy(x[..., 2]).permute(2, 0, 1)) and s.images.is_contiguous()
    path.write_bytes(path.read_bytes()[:200])
    refused(load, "svhn", "test", root=tmp_path, says=["svhn cannot be read", "download=True"])


def test_download_happens_only_when_asked_and_fails_in_one_line(tmp_path, monkeypatch):
    asked = []

    def refuse(url, *a, **k):
        asked.append(url)
        raise URLError("no route to host\nsecond line")

    monkeypatch.setattr("urllib.request.urlopen", refuse)
    for name in ("mnist", "cifar10", "cifar100", "svhn", "cmaterdb"):
        refused(load, name, root=tmp_path / "new", says=[name])
        assert not asked and not (tmp_path / "new").exists()
    for name in ("mnist", "cifar10", "cifar100", "svhn", "cmaterdb"):
        words = [f"{name} could not be downloaded to {tmp_path}", "no route"]
        refused(load, name, root=tmp_path / "new", download=True, says=words)
        assert asked
        asked.clear()


# ---- CIFAR-10 as JPEG files

@pytest.mark.parametrize("where", ["cifar10-jpeg", "cifar10", "."])
def test_cifar10_jpeg_folder(tmp_path, where):
    root = tmp_path / "root"
    write_jpegs(root / where)
    s = load("cifar10", "train", root=root)
    assert s.name == "cifar10-jpeg" and s.images.shape == (30, 3, 32, 32)
    assert torch.bincount(s.labels).tolist() == [3] * 10
    assert ((s.images[:, 0, 0, 0].int() - 20 * s.labels).abs() <= 4).all()  # images and labels were shuffled alike
    assert len(load("cifar10-jpeg", "all", root=root)) == 50
    assert load("cifar10-inverted", root=root, n=2).name == "cifar10-jpeg-inverted"


def test_cifar10_jpeg_archive_is_read_once_and_nothing_is_unpacked(tmp_path, own_cache, monkeypatch):
    write_jpegs(tmp_path / "files")
    root = tmp_path / "root"
    root.mkdir()
    with tarfile.open(root / "cifar10-jpeg.tar.xz", "w:xz") as tar: tar.add(tmp_path / "files", "cifar10-jpeg")
    root.chmod(0o555)
    s = load("cifar10", "test", root=root)
    assert len(s) == 20 and [p.name for p in root.iterdir()] == ["cifar10-jpeg.tar.xz"]
    assert len(list((own_cache / "made").iterdir())) == 1
    monkeypatch.setattr(data, "decode_all", None)  # a second reading would fail
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
    refused(load, "cifar10", root=tmp_path, says=[str(bad), "cannot be read as an image"])
    other = tmp_path / "other"
    other.mkdir()
    archive = other / "cifar10-jpeg.tar.xz"
    with tarfile.open(archive, "w:xz") as tar: tar.add(folder, "cifar10-jpeg")
    archive.write_bytes(archive.read_bytes()[:-400])
    refused(load, "cifar10", root=other, says=[str(archive), "cannot be unpacked"])
    archive.write_bytes(b"nonsense")
    refused(load, "cifar10", root=other, says=[str(archive), "cannot be unpacked"])
    with tarfile.open(archive, "w:xz") as tar: tar.add(__file__, "readme.txt")
    refused(load, "cifar10", root=other, says=[str(archive), "no images"])


# ---- CIFAR as image files of any coding

def write_files(folder, suffix, **options):
    "As `write_jpegs`, in another format."
    for jpeg in sorted(write_jpegs(folder).rglob("*.jpg")):
        with Image.open(jpeg) as image: image.save(jpeg.with_suffix(suffix), **options)
        if suffix != ".jpg": jpeg.unlink()
    return folder


@pytest.mark.parametrize("suffix, options, form", [
    (".png", {}, "files"), (".webp", dict(lossless=True), "files"), (".bmp", {}, "files"),
    (".webp", dict(quality=80), "jpeg"), (".jpg", {}, "jpeg")])
@pytest.mark.parametrize("where", ["cifar10", "cifar10-png", "archive"])
def test_the_coding_decides_on_the_name(tmp_path, suffix, options, form, where):
    root = tmp_path / "root"
    folder = write_files(tmp_path / "any" if where == "archive" else root / where, suffix, **options)
    if where == "archive":
        root.mkdir()
        with tarfile.open(root / "cifar10-any.tar.gz", "w:gz") as tar: tar.add(folder, "some/where")
    s = load("cifar10", "test", root=root)
    assert s.name == f"cifar10-{form}" and torch.bincount(s.labels).tolist() == [2] * 10
    assert ((s.images[:, 0, 8, 8].int() - 20 * s.labels).abs() <= 4).all()
    other = dict(files="jpeg", jpeg="files")[form]
    refused(load, f"cifar10-{other}", "test", root=root, says=[f"cifar10-{other} is not here"])
    assert {r.name for r in available(root) if r.found} >= {"cifar10", f"cifar10-{form}"}


def test_lossless_files_come_before_jpeg(tmp_path):
    write_jpegs(tmp_path / "cifar10-a")
    write_files(tmp_path / "cifar10-b", ".png")
    assert load("cifar10", "test", root=tmp_path).name == "cifar10-files"
    assert load("cifar10-jpeg", "test", root=tmp_path).name == "cifar10-jpeg"


def test_cifar100_of_a_test_set_only(tmp_path):
    for k, c in enumerate(("apple", "bus", "worm")): picture(tmp_path / f"cifar100/test/{c}/1.png", 9 * k, (32, 32, 3))
    s = load("cifar100", "test", root=tmp_path)
    assert s.name == "cifar100-files" and len(s.classes) == 100
    assert sorted(s.classes[i] for i in s.labels) == ["apple", "bus", "worm"]
    refused(load, "cifar100", "train", root=tmp_path, says=["cifar100-files is not here", "train/CLASS"])


# ---- some classes of a set

def test_classes_by_number_and_by_name(tmp_path):
    write_jpegs(tmp_path / "cifar10")
    s = load("cifar10[8,cat]", "train", root=tmp_path)
    assert s.name == "cifar10-jpeg[8,3]" and s.classes == ["ship", "cat"] and s.labels.bincount().tolist() == [3, 3]
    assert (s.images[s.labels == 0][:, 0, 0, 0] >= 155).all()
    rest = load("cifar10[not ship,3]-inverted", "all", root=tmp_path, size=28, channels=1)
    assert rest.name == "cifar10-jpeg[not 8,3]-inverted" and len(rest.classes) == 8 and len(rest) == 40
    assert torch.equal(load("cifar10[0,1]", root=tmp_path, n=2).images, load("cifar10[0,1]", root=tmp_path).images[:2])
    assert load(s.name, root=tmp_path).name == s.name


def test_classes_of_a_folder_whose_name_has_brackets(tmp_path):
    for c in "ab": picture(tmp_path / f"pictures[1]/{c}/1.png", 9, (8, 8))
    assert load(f"folder:{tmp_path}/pictures[1]").classes == ["a", "b"]
    assert load(f"folder:{tmp_path}/pictures[1][b]").classes == ["b"]


@pytest.mark.parametrize("name, says", [
    ("digits5k[10]", ["class of digits5k", "10"]), ("digits5k[x]", ["'x'"]), ("digits5k[0,0]", ["each once"]),
    ("digits5k[not 0,1,2,3,4,5,6,7,8,9]", ["at least one"]), ("uniform[0]", ["has no classes"]),
    ("digits5k[]", ["image set"]), ("digits5k[-1]", ["'-1'"])])
def test_classes_that_cannot_be_meant(name, says): refused(load, name, "test", says=says)


def test_known_and_unknown_classes_are_all_classes():
    for i in range(5):
        known, unknown = (load(name, "test") for name in known_and_unknown("digits5k", i))
        assert sorted(known.classes + unknown.classes) == list("0123456789") and len(known.classes) == 6
    refused(known_and_unknown, "mnist", 5, says=["no split 5"])


# ---- CMATERdb

def test_cmaterdb(tmp_path):
    write_cmaterdb(tmp_path)
    s = load("cmaterdb", root=tmp_path, size=28, channels=1)
    assert s.images.shape == (30, 1, 28, 28) and torch.equal(s.images[:, 0, 5, 5].long(), s.labels * 20)
    assert len(load("cmaterdb-inverted", "all", root=tmp_path)) == 50


def archive(**arrays): return lambda path: np.savez(path, **arrays)


BLANK = np.zeros((2, 32, 32, 3), np.uint8)


@pytest.mark.parametrize("spoil", [
    lambda p: p.write_bytes(p.read_bytes()[:len(p.read_bytes()) // 2]),
    lambda p: p.write_bytes(b"nonsense"),
    lambda p: p.write_bytes(b""),
    archive(pictures=np.zeros(3)),
    archive(images=np.array([{}], dtype=object), labels=np.zeros(1)),
    archive(images=BLANK, labels=np.zeros(3, int)),
    archive(images=BLANK, labels=np.array([0, 77])),
    lambda p: p.write_bytes(p.read_bytes()[:9000] + b"U" * 50 + p.read_bytes()[9050:]),  # the checksum no longer fits
])
def test_cmaterdb_damaged(tmp_path, spoil):
    path = write_cmaterdb(tmp_path) / "training-images.npz"
    spoil(path)
    refused(load, "cmaterdb", root=tmp_path, says=[str(path)])


# ---- names and arguments

def test_unknown_names():
    refused(load, "mnits", says=["unknown image set 'mnits'", "did you mean 'mnist'"])
    refused(load, "fashion-mnist-inverted", says=["'fashion-mnist'", "fashion_mnist", "folder:PATH"])
    refused(load, "mnist", "valid", says=["unknown split 'valid'", "train, test, all"])


@pytest.mark.parametrize("kw,words", [
    ({"size": 0}, ["size is 0"]),
    ({"size": 2.5}, ["size is 2.5"]),
    ({"channels": 2}, ["channels is 2"]),
    ({"n": 0}, ["n is 0"]),
    ({"seed": -1}, ["seed is -1"]),
])
@pytest.mark.parametrize("name", ["gaussian", "digits5k", "mnist"])
def test_arguments_refused(name, kw, words): refused(load, name, **kw, says=words)


def test_a_path_is_no_name(tmp_path):
    refused(load, tmp_path, says=["PosixPath", f"folder:{tmp_path}"])
    refused(load, None, says=["NoneType"])


def test_folders_by_name(tmp_path):
    for i in range(3): picture(tmp_path / "mine" / f"{i}.png", 40 * i)
    name = f"folder:{tmp_path}/mine"
    s = load(name, "test", size=28, channels=1)
    assert s.name == "folder:mine" and s.images.shape == (3, 1, 28, 28) and len(load(name, n=2)) == 2
    assert torch.equal(load(f"{name}-inverted", size=28, channels=1).images, 255 - s.images)
    refused(load, f"{name}/nowhere", says=["there is no folder", "nowhere"])


def test_folder_name_ending_in_inverted_is_taken_as_it_is(tmp_path):
    picture(tmp_path / "x-inverted" / "0.png", 10)
    assert load(f"folder:{tmp_path}/x-inverted").images[0, 0, 0, 0] == 10
    assert load(f"folder:{tmp_path}/x-inverted-inverted").images[0, 0, 0, 0] == 245


def test_the_test_images_of_a_problem_have_the_numbers_of_its_training_classes(tmp_path):
    for part in ("train/ant", "train/bee", "train/cow", "test/bee", "test/cow"):
        picture(tmp_path / part / "0.png")
    problem = load_problem(f"folder:{tmp_path}", size=8)
    assert [problem.train.classes[k] for k in problem.test.labels] == ["bee", "cow"]


def test_available_lists_every_set_and_reads_none(tmp_path):
    start = time.perf_counter()
    rows = available(tmp_path / "nowhere")
    seconds = time.perf_counter() - start
    assert [r.name for r in rows] == list(SOURCES) and seconds < 0.5
    found = {r.name for r in rows if r.found}
    assert found >= {"digits5k", "letters", "photos", "gaussian", "uniform"}
    assert {r.kind for r in rows} == {"ID", "OOD", "noise"}
    assert all(r.how_to_get and r.about and r.n > 0 for r in rows)


def test_import_is_light():
    heavy = {"torchvision", "sklearn", "mlxtend", "matplotlib", "pandas"}
    code = f"import sys, nioodd.core.datasets; print(sorted({heavy} & set(sys.modules)))"
    folder = Path(data.__file__).parents[2]
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=folder)
    assert out.stdout.strip() == "[]", out.stdout + out.stderr


# ---- sets of one's own

@pytest.fixture
def sources():
    "What a test registers is gone after it."
    before = dict(SOURCES)
    yield SOURCES
    SOURCES.clear()
    SOURCES.update(before)


def test_a_registered_set_is_found_loaded_and_listed(sources, tmp_path):
    @data_set("scans", "OOD", 5, "pages", "copy scans.npz into the root", files_under("scans.npz"))
    def read_scans(split, root, **_):
        with np.load(root / "scans.npz") as file: return from_arrays(file[split], name="scans")

    assert not available(tmp_path)[-1].found
    words = ["scans is not here", "scans.npz", "get it: copy scans.npz into the root"]
    refused(load, "scans", root=tmp_path, says=words)
    np.savez(tmp_path / "scans.npz", train=grey(3), test=grey(2, seed=1))
    row = available(tmp_path)[-1]
    assert row[:4] == ("scans", "OOD", True, str(tmp_path)) and row.n == 5
    both = load("scans", "all", root=tmp_path)
    assert torch.equal(both.images[:, 0], torch.from_numpy(np.concatenate([grey(3), grey(2, seed=1)])))
    assert both.labels is None and load("scans-inverted", "test", root=tmp_path, size=8).images.shape == (2, 1, 8, 8)
    refused(load, "scan", says=["did you mean 'scans'"])


def test_a_registered_noise_has_any_size_and_number(sources):
    @data_set("plain", "noise", 10, "grey", "always there")
    def read_plain(start, stop, size, channels, seed):
        level = torch.arange(start, stop).remainder(256).to(torch.uint8)
        return level.view(-1, 1, 1, 1).expand(-1, channels, size, size)

    s = load("plain", n=7, size=5, channels=3)
    assert s.images.shape == (7, 3, 5, 5) and s.images[:, 0, 0, 0].tolist() == [*range(7)]
    assert len(load("plain", "all")) == 20_000 and available()[-1].found


def test_what_cannot_be_registered(sources):
    refused(data_set, "x", "unknown", 1, "?", says=["unknown kind of image set 'unknown'", "ID, OOD, noise"])
    refused(data_set("mnist", "ID", 1, "mine"), grey, says=["'mnist'", "taken", "nioodd.core.datasets"])
    def read(**_): return None
    data_set("own", "OOD", 1, "mine")(read)
    assert data_set("own", "OOD", 2, "mine, again")(read) is read and SOURCES["own"].n == 2
    assert SOURCES["mnist"].n == 70_000


@pytest.mark.parametrize("name", ["own-inverted", "own[1]", "folder:own", "a,b", "", " own", 3])
def test_names_that_stand_for_something_else(sources, name):
    refused(data_set, name, "OOD", 1, "mine", says=["no image set can be called", "-inverted"])


def test_readers_that_cannot_be_called(sources):
    def lacks_rest(split, root): return None
    def wants_more(path, **_): return None
    def noise_by_name(*, start, stop, size, channels, seed): return None
    says = ["reader of own cannot be called", "def lacks_rest(split, root, **_)"]
    refused(data_set("own", "OOD", 1, "mine"), lacks_rest, says=says)
    refused(data_set("own", "OOD", 1, "mine"), wants_more, says=["'path'", "(split, root, **_)"])
    refused(data_set("own", "noise", 1, "mine"), noise_by_name, says=["(start, stop, size, channels, seed)"])
    assert "own" not in SOURCES


def test_noise_of_another_kind_is_refused(sources):
    data_set("floats", "noise", 1, "mine")(lambda start, stop, size, channels, seed: torch.zeros(stop - start, 1, 9, 9))
    refused(load, "floats", n=2, says=["reader of floats returned torch.float32 [2, 1, 9, 9]", "uint8 [2, 1, 28, 28]"])
    data_set("none", "noise", 1, "mine")(lambda *_: None)
    refused(load, "none", n=2, says=["returned NoneType"])


def test_a_reader_that_returns_no_image_set(sources):
    data_set("odd", "OOD", 1, "mine")(lambda **_: torch.zeros(3))
    refused(load, "odd", says=["reader of odd returned a Tensor", "expected an ImageSet"])


# ---- the real sets

@needs_data
def test_real_mnist_is_loaded_fast_and_whole():
    load("mnist", "test")  # imports
    start = time.perf_counter()
    s = load("mnist")
    seconds = time.perf_counter() - start
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
    if name == "cmaterdb":  # black on white as supplied
        assert s.images.double().mean() > 150 and load("cmaterdb-inverted", "test").images.double().mean() < 105
