"""The detector interface: threshold, yes/no, files, and life inside pytorch-ood."""
import copy
import importlib
import json
import math
import pkgutil
import warnings

import numpy as np
import pytest
import torch
from fake_sets import picture
from sklearn.preprocessing import LabelEncoder
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from nioodd.core import detector as of_detectors
from nioodd.core.detector import DETECTORS, Detector, all_images, detector_class, known_images
from nioodd.core.errors import NiooddError
from nioodd.core.forward import KeptImages, as_input, batches, is_channels_last, logits_of
from nioodd.core.images import ImageFiles, Preparation, list_folder, to_input
from nioodd.core.models import Classifier
from nioodd.inversion.detector import GarbageDetector

SHAPE = (1, 8, 8)


def images(n, low=0, high=256, seed=0):
    rng = torch.Generator().manual_seed(seed)
    return torch.randint(low, high, (n, *SHAPE), dtype=torch.uint8, generator=rng)


@pytest.fixture
def network():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = Classifier(4, size=8)
        net(torch.randn(64, *SHAPE))  # batch norm's running statistics leave their initial values
    return net


@pytest.fixture
def own():
    "A user's network: not a Classifier, with tied weights and a buffer."
    class Own(nn.Module):
        def __init__(self, width=16):
            super().__init__()
            self.conv, self.norm, self.head = nn.Conv2d(1, width, 3), nn.BatchNorm2d(width), nn.Linear(width, 4)
            self.tied = self.head

        def forward(self, x): return self.tied(self.norm(self.conv(x)).mean((2, 3)))
    return Own


@pytest.fixture
def detector(network):
    d = GarbageDetector(network, classes=["a", "b", "c"])
    d.calibrate(d.predict(images(200)))
    return d


def test_uint8_and_float_images_score_alike(detector):
    assert torch.equal(detector.predict(images(5)), detector.predict(to_input(images(5))))


def test_mode_and_gradients_are_left_alone(detector, network):
    network.train(); network.body.eval()
    before = [m.training for m in network.modules()]
    detector.verdict(images(3))
    with pytest.raises(NiooddError): detector.predict(torch.zeros(2, 1, 9, 9))
    assert [m.training for m in network.modules()] == before
    assert all(p.requires_grad and p.grad is None for p in network.parameters())


def test_many_images_at_once_equal_one_by_one(detector):
    x = images(13)
    one_by_one = torch.cat([detector.logits(i[None]) for i in x])
    torch.testing.assert_close(logits_of(detector.model, x, batch_size=5), one_by_one, rtol=1e-4, atol=1e-5)
    assert detector.predict(x[:0]).shape == (0,)


@pytest.mark.parametrize("false_alarms", [0.005, 0.05, 0.5, 0.99])
def test_threshold_from_scores_and_from_a_loader(network, false_alarms):
    "Of n images that calibrate, floor(α(n + 1)) have p ≤ α, the one at the threshold among them; it is accepted."
    x, d = images(199), GarbageDetector(network)
    assert d.calibrate(d.predict(x), false_alarms) is d
    assert d.is_ood(x).sum().item() == math.floor(false_alarms * 200 + 1e-9) - 1
    assert torch.equal(d.is_ood(x), d.is_ood(x, false_alarms))
    for given in (dict(held_out=DataLoader(x, batch_size=199)), dict(train=x), dict(train=images(3), held_out=x)):
        other = GarbageDetector(network).fit(**given, false_alarms=false_alarms)
        assert other.threshold == pytest.approx(d.threshold, rel=1e-5)


def test_too_few_images_to_calibrate_by(network):
    d = GarbageDetector(network)
    with pytest.raises(NiooddError, match="expected a share from 0.053 to 1"): d.fit(held_out=images(18))
    d.fit(held_out=images(19))
    with pytest.raises(NiooddError, match="hold out more"): d.is_ood(images(2), false_alarms=0.01)
    for share in (0, 1, -1, float("nan")):
        with pytest.raises(NiooddError, match="false_alarms is"): d.calibrate(torch.randn(50), share)
    with pytest.raises(NiooddError, match="expected fit"): d.fit()


def test_any_score_has_p_values_that_come_back_from_a_file(network, tmp_path):
    d = GarbageDetector(network).fit(held_out=images(99))
    scores = d.predict(images(20, seed=5))
    counted = [(1 + (d.calibration >= s).sum().item()) / 100 for s in scores]
    assert d.p_values(scores).tolist() == counted
    assert torch.equal(d.verdict(images(20, seed=5))["p_value"], d.p_values(scores))
    again = Detector.load(d.save(tmp_path))
    assert torch.equal(again.calibration, d.calibration)
    assert torch.equal(again.p_values(scores), d.p_values(scores))


def test_a_score_that_is_not_a_number_is_rejected(network):
    d = GarbageDetector(network).fit(held_out=images(99))
    nan = torch.tensor([float("nan"), -1e9])
    assert d.rejects(nan).tolist() == d.rejects(nan, 0.05).tolist() == [True, False] and d.p_values(nan)[0] == 0.01


def test_ties_are_accepted(detector):
    class Constant(Detector):
        def predict(self, x): return x.flatten(1).double().mean(1).round()
    d = Constant(detector.model).fit(held_out=[torch.zeros(50, *SHAPE)])
    assert d.threshold == 0 and not d.is_ood(torch.zeros(3, *SHAPE)).any() and d.is_ood(torch.ones(3, *SHAPE)).all()


def test_fit_returns_self_and_leaves_out_ood_images(network):
    i, o = images(100), images(50, high=20, seed=1)
    labels = torch.cat([torch.zeros(100), -torch.ones(50)]).long()
    loader = DataLoader(TensorDataset(torch.cat([i, o]), labels), batch_size=40)  # the last batch is OOD only
    d = GarbageDetector(network)
    assert d.fit(loader) is d and not d.requires_fit
    assert d.threshold == pytest.approx(GarbageDetector(network).fit([i]).threshold, rel=1e-5)
    with pytest.raises(NiooddError, match="empty"): d.fit([])


def test_no_yes_or_no_without_a_threshold(network):
    d = GarbageDetector(network)
    d.predict(images(2))
    for ask in (d.is_ood, d.verdict):
        with pytest.raises(NiooddError, match="no threshold"): ask(images(2))


@pytest.mark.parametrize("bad, word", [
    (torch.zeros(8, 8), "shape [8, 8]"),
    (torch.zeros(SHAPE), "image[None]"),
    (torch.zeros(2, 3, 8, 8), "[2, 3, 8, 8]"),
    (torch.zeros(2, 1, 8, 9), "[2, 1, 8, 9]"),
    (torch.zeros(2, *SHAPE).long(), "int64"),
    (images(2).float(), "reach"),
    (images(2).bool(), "levels 0 … 255"),
    (torch.zeros(2, *SHAPE).to_sparse(), "sparse"),
    (torch.zeros(2, *SHAPE, device="meta"), "meta"),
    (torch.full((2, *SHAPE), float("nan")), "NaN")])
def test_bad_images(detector, bad, word):
    with pytest.raises(NiooddError) as e: detector.predict(bad)
    assert word in str(e.value) and "\n" not in str(e.value)


# Files

@pytest.mark.parametrize("channels_last", [False, True])
def test_saved_and_loaded_scores_are_bit_identical(detector, tmp_path, channels_last):
    if channels_last: detector.model.to(memory_format=torch.channels_last)
    x, folder = images(100, seed=5), tmp_path/"new"/"folder"
    assert detector.save(folder) == folder
    assert sorted(p.name for p in folder.iterdir()) == ["detector.json", "model.safetensors"]
    for cls in (GarbageDetector, Detector):
        loaded = cls.load(folder)
        assert type(loaded) is GarbageDetector and loaded.classes == ["a", "b", "c"] and loaded.n_known == 3
        assert loaded.threshold == detector.threshold and not loaded.model.training
        assert torch.equal(loaded.predict(x), detector.predict(x)) and torch.equal(loaded.is_ood(x), detector.is_ood(x))


def test_save_without_threshold_and_over_an_earlier_one(network, detector, tmp_path):
    detector.save(tmp_path)
    GarbageDetector(network).save(tmp_path)
    assert GarbageDetector.load(tmp_path).threshold is None and GarbageDetector.load(tmp_path).classes is None


def test_own_network(own, tmp_path):
    a = GarbageDetector(own())
    a.fit([images(50)]).save(tmp_path)
    with pytest.raises(NiooddError, match="load\\(folder, model=...\\)"): GarbageDetector.load(tmp_path)
    into = own()
    b = GarbageDetector.load(tmp_path, model=into)
    assert b.model is into and torch.equal(a.predict(images(9)), b.predict(images(9))) and b.threshold == a.threshold


def test_wrong_architecture_lists_what_differs_and_leaves_the_network_alone(own, tmp_path):
    GarbageDetector(own(16)).save(tmp_path)
    other_shape = "conv.weight is [16, 1, 3, 3] float32 in the file, [8, 1, 3, 3] float32 in the network"
    misfits = [
        (own(8), (other_shape, "more")),
        (own(16).double(), ("float32 in the file", "float64 in the network")),
        (nn.Linear(3, 3), ("conv.bias is not in the network; conv.weight is not in", "do not fit this Linear")),
        (nn.Sequential(), ("not in the network",))]
    for wrong, words in misfits:
        before = copy.deepcopy(wrong.state_dict())
        with pytest.raises(NiooddError) as e: GarbageDetector.load(tmp_path, model=wrong)
        assert all(w in str(e.value) for w in words) and "\n" not in str(e.value)
        assert all(torch.equal(before[k], v) for k, v in wrong.state_dict().items())


def damage(folder, how):
    model, described = folder/"model.safetensors", folder/"detector.json"
    text, weights = described.read_text(), model.read_bytes()

    def describe(**changed): described.write_text(json.dumps(json.loads(text) | changed))
    if how == "no json": described.unlink()
    elif how == "no weights": model.unlink()
    elif how == "json cut short": described.write_text(text[:len(text) // 2])
    elif how == "json of something else": described.write_text("[1, 2]")
    elif how == "weights cut short": model.write_bytes(weights[:-100])
    elif how == "weights empty": model.write_bytes(b"")
    elif how == "one bit": model.write_bytes(weights[:-1] + bytes([weights[-1] ^ 1]))
    elif how == "later format": describe(format=99)
    elif how == "unknown kind": describe(detector="GarbageDetecter")
    elif how == "unknown argument": describe(arguments=dict(n_unknown=3))
    elif how == "network null": describe(network=None)
    elif how == "network of nothing": describe(network={})
    elif how == "format in words": describe(format="one")
    elif how == "other size": described.write_text(text.replace('"size": 8', '"size": 16'))


@pytest.mark.parametrize("how, word", [
    ("no folder", "does not exist"),
    ("no json", "no detector.json"),
    ("no weights", "does not exist"),
    ("json cut short", "not valid JSON"),
    ("json of something else", "not of type 'object'"),
    ("weights cut short", "checksum"),
    ("weights empty", "checksum"),
    ("one bit", "checksum"),
    ("later format", "format 99"),
    ("unknown kind", "did you mean 'GarbageDetector'"),
    ("unknown argument", "n_unknown"),
    ("other size", "do not fit"),
    ("network null", "detector.json at network"),
    ("network of nothing", "detector.json at network"),
    ("format in words", "detector.json at format")])
def test_damaged_files(detector, tmp_path, how, word):
    detector.save(tmp_path)
    damage(tmp_path, how)
    with pytest.raises(NiooddError) as e: Detector.load(tmp_path/"absent" if how == "no folder" else tmp_path)
    assert word in str(e.value) and "\n" not in str(e.value)


def test_power_failure_between_the_two_files_is_noticed(detector, network, tmp_path, monkeypatch):
    detector.save(tmp_path)
    with torch.no_grad(): network.head.bias += 1

    def fail(*_): raise KeyboardInterrupt
    monkeypatch.setattr("nioodd.core.detector.write_atomic", fail)
    with pytest.raises(KeyboardInterrupt): detector.save(tmp_path)
    with pytest.raises(NiooddError, match="is not the file that detector.json was saved with"): Detector.load(tmp_path)


def test_loading_runs_no_code(detector, tmp_path, monkeypatch):
    detector.save(tmp_path)

    def refuse(*_, **__): raise AssertionError("unpickled")
    for name in ("pickle.load", "pickle.loads", "torch.load"): monkeypatch.setattr(name, refuse)
    Detector.load(tmp_path)


def test_what_a_subclass_learns_is_saved_too(network, tmp_path):
    class Shifted(GarbageDetector):
        def learn(self, train, held_out):
            self.shift = torch.tensor(2.5, dtype=torch.float64)
            return held_out

        def predict(self, x): return super().predict(x) + self.shift
        def learnt(self): return dict(shift=self.shift)
        def restore(self, tensors): self.shift = tensors["shift"]
    a = Shifted(network).fit([images(20)])
    b = Detector.load(a.save(tmp_path))
    assert type(b) is Shifted and torch.equal(a.predict(images(4)), b.predict(images(4)))
    plain = GarbageDetector(network).save(tmp_path)
    with pytest.raises(NiooddError, match="unknown kind of detector 'GarbageDetector'"): Shifted.load(plain)


def saved(d, folder): return Detector.load(d.save(folder))


def test_arguments_of_a_subclass_are_saved(network, tmp_path):
    class Scaled(GarbageDetector):
        def __init__(self, model, scale=1.0, part=None, **more):
            super().__init__(model, **more)
            self.scale, self.part = scale, part

        def predict(self, x): return self.scale * super().predict(x)
    d = Scaled(network, scale=3.0, classes=["a", "b", "c"]).fit(held_out=images(30))
    again = saved(d, tmp_path/"a")
    assert again.scale == 3 and again.part is None and again.classes == d.classes
    assert torch.equal(again.predict(images(5)), d.predict(images(5)))
    d.part = ["left", 2]
    assert saved(d, tmp_path/"b").part == ["left", 2]
    for value in (torch.ones(2), float("nan"), {1, 2}):
        d.part = value
        with pytest.raises(NiooddError, match="could not be read again"): d.save(tmp_path/"c")
    assert not (tmp_path/"c").exists()


def test_an_argument_that_would_be_lost_is_named(network, tmp_path):
    class Forgets(Detector):
        def __init__(self, model, power=2, **more):
            super().__init__(model, **more)
            self.exponent = power

        def predict(self, x): return self.logits(x).amax(1) ** self.exponent
    with pytest.raises(NiooddError, match="power of Forgets would be lost"): Forgets(network).save(tmp_path/"d")

    class Says(Forgets):
        def arguments(self): return dict(power=self.exponent)
    assert saved(Says(network, 3), tmp_path/"says").exponent == 3

    class Drops(Forgets):
        def arguments(self): return {}
    with pytest.raises(NiooddError, match="argument power of Drops would be lost"): Drops(network).save(tmp_path/"d")

    class Stubborn(Detector):
        def __init__(self, model): super().__init__(model)
        def predict(self, x): return self.logits(x).amax(1)
    with pytest.raises(NiooddError, match="load could not make this Stubborn again .*threshold"):
        Stubborn(network).save(tmp_path/"d")
    assert not (tmp_path/"d").exists()


def test_what_a_subclass_learns_and_would_lose_is_named(network, tmp_path):
    class Means(Detector):
        requires_fit = True
        def learn(self, train, held_out):
            self.mean = train.double().mean()
            return held_out

        def predict(self, x): return (x.double().mean((1, 2, 3)) - self.mean).abs()
    d = Means(network)
    with pytest.raises(NiooddError, match="this Means has no mean; expected it from learn, .* call fit"):
        d.predict(images(2))
    assert not hasattr(d, "mean") and copy.deepcopy(d).threshold is None
    d.fit(images(50), images(30, seed=1))
    with pytest.raises(NiooddError, match="Means has a learn of its own but no learnt"): d.save(tmp_path/"a")

    class Half(Means):
        def learnt(self): return dict(mean=self.mean)
    with pytest.raises(NiooddError, match="Half has a learn .* no restore"): Half(network).save(tmp_path/"a")

    class Takes(Half):
        def restore(self, tensors): self.mean = tensors["means"]
    folder = Takes(network).fit(images(50), images(30, seed=1)).save(tmp_path/"b")
    with pytest.raises(NiooddError, match="lacks 'means', which Takes.restore takes"): Detector.load(folder)

    class Nothing(Takes):
        def restore(self, tensors): pass
    again = saved(Nothing(network).fit(images(50), images(30, seed=1)), tmp_path/"c")
    with pytest.raises(NiooddError, match="this Nothing has no mean"): again.predict(images(2))


def test_a_constructor_that_does_not_call_its_base(network):
    class Baseless(Detector):
        def __init__(self, model): self.power = 2
        def predict(self, x): return self.logits(x).amax(1)
    with pytest.raises(NiooddError, match=r"this Baseless has no \w+; expected a constructor that begins with super"):
        Baseless(network).predict(images(2))


def test_two_detectors_of_one_name():
    def define(module):
        return type("Twice", (Detector,), {"__module__": module, "predict": lambda self, x: x.flatten(1).sum(1)})
    first = define("a.notebook")
    second = define("a.notebook")  # as when a cell is run again
    assert detector_class(Detector, "Twice") is second is not first
    with pytest.raises(NiooddError, match="'Twice' is a.notebook.Twice already; expected a new name"): define("other")
    assert detector_class(Detector, "Twice") is second
    del DETECTORS["Twice"]


def test_classes_are_texts(network, tmp_path):
    d = GarbageDetector(network, classes=torch.arange(3).tolist(), threshold=0.0)
    assert saved(d, tmp_path/"d").classes == d.classes == ["0", "1", "2"]
    with pytest.raises(NiooddError, match="could not be read again"):
        GarbageDetector(network, threshold=float("inf")).save(tmp_path/"e")


def test_as_input_keeps_floats_as_they_are():
    x = torch.randn(2, *SHAPE, dtype=torch.float64)
    assert as_input(x) is x


def test_parts_do_not_depend_on_what_was_asked_before():
    """The same sizes in the first call and the next.

    The mode and batch norm's statistics are untouched; no hook stays where the network fails."""
    layers = [nn.Conv2d(1, 512, 1), nn.BatchNorm2d(512), nn.Flatten(), nn.Linear(512 * 64, 4)]  # 131 kB of an image
    net = nn.Sequential(*layers).train()
    calls = []
    for n in (10, 40, 300, 300): calls.append([len(p) for p in batches(net, torch.zeros(n, 1, 8, 8))])
    assert calls == [[10], [40], [150, 150], [150, 150]]  # 122 suit it: rather two of 150 than a third of 56
    assert net.training and net[1].num_batches_tracked == 0
    with pytest.raises(NiooddError, match="cannot take float32 images"): batches(net, torch.zeros(40, 3, 8, 8))
    assert not [m for m in net.modules() if m._forward_hooks]


def test_every_detector_of_the_library_is_found_by_its_name(not_imported):
    "Where nothing else was imported."
    import nioodd
    from nioodd.core.detector import DETECTORS
    for module in pkgutil.walk_packages(nioodd.__path__, "nioodd."): importlib.import_module(module.name)
    ours = {name for name, cls in DETECTORS.items() if cls.__module__.startswith("nioodd.")}
    assert len(ours) >= 4 and not ours - nioodd.NAMES.keys()


def test_fit_says_what_is_missing(network):
    class Learning(Detector):
        requires_fit = True
        def predict(self, x): return self.logits(x)
    class Forgetful(Learning):
        def learn(self, train, held_out): pass
    x = images(60)
    with pytest.raises(NiooddError, match="a Learning learns from images"): Learning(network).fit(held_out=x)
    with pytest.raises(NiooddError, match=r"scores have shape \[60, \d+\]; expected one per image"):
        Learning(network).fit(x, images(60, 1))
    with pytest.raises(NiooddError, match=r"scores have shape \[60, 1\]"):
        Learning(network).calibrate(np.zeros((60, 1)))
    with pytest.raises(NiooddError, match="Forgetful.learn returned None"): Forgetful(network).fit(x, images(60, 1))


def test_the_layout_of_a_network_for_grey_images_is_kept():
    net = nn.Sequential(nn.Conv2d(1, 8, 3), nn.Flatten(), nn.Linear(8 * 36, 4)).to(memory_format=torch.channels_last)
    assert is_channels_last(net)
    assert not is_channels_last(nn.Sequential(nn.Conv2d(1, 8, 3)))


# Any amount of images

class Passed(torch.utils.data.Dataset):
    "A data set that remembers which of its images were asked for."
    def __init__(self, n): self.n, self.asked = n, []
    def __len__(self): return self.n
    def __getitem__(self, i):
        self.asked.append(i)
        return torch.full(SHAPE, i % 251, dtype=torch.uint8), i % 4


def test_of_a_data_set_only_the_sample_is_read():
    data = Passed(1000)
    x, y = known_images(data, n=50)
    assert len(x) == len(y) == 50 and len({*data.asked}) <= 51 and 300 < sum(data.asked[1:]) / 50 < 700
    assert torch.equal(x, known_images(Passed(1000), n=50)[0])
    assert not torch.equal(x, known_images(Passed(1000), 50, seed=1)[0])


@pytest.mark.parametrize("n, batch", [(None, 64), (100, 64), (100, 7), (1000, 64), (5000, 64)])
def test_a_sample_in_a_file_is_the_sample_in_memory(n, batch, monkeypatch):
    x = torch.randint(256, (1000, *SHAPE), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))
    loader = DataLoader(TensorDataset(x), batch)
    in_memory = all_images(loader, n)
    monkeypatch.setattr("nioodd.core.detector.IN_MEMORY", 50 * x[0].nbytes)
    in_file = all_images(loader, n, file=True)
    assert isinstance(in_memory, torch.Tensor) and isinstance(in_file, KeptImages)
    assert torch.equal(in_memory, in_file[:])


def test_a_sample_is_uniform_also_from_a_file(monkeypatch):
    monkeypatch.setattr("nioodd.core.detector.IN_MEMORY", 1)
    x, counts = torch.arange(100, dtype=torch.uint8).view(-1, 1, 1, 1), torch.zeros(100)
    for seed in range(400): counts[known_images([x[:30], x[30:]], 10, seed, file=True)[0][:].flatten().long()] += 1
    assert counts.sum() == 4000 and (counts - 40).abs().max() < 5 * 40 ** 0.5


def test_images_of_two_shapes_are_refused_also_from_a_file(monkeypatch):
    monkeypatch.setattr("nioodd.core.detector.IN_MEMORY", 1)
    for n in (None, 3, 10):
        with pytest.raises(NiooddError, match="batches differ"):
            all_images([torch.zeros(4, 1, 8, 8), torch.zeros(4, 1, 8, 9)], n, file=True)


# How a picture becomes input

def test_a_preparation_is_saved_and_comes_back(network, own, tmp_path):
    user = own()
    for k, (net, given) in enumerate([(network, None), (user, user)]):
        detector = GarbageDetector(net, 3, mean=0.2, std=0.3, size=8).fit(held_out=images(100))
        again = Detector.load(detector.save(tmp_path / str(k)), model=copy.deepcopy(given))
        assert again.preparation == detector.preparation and again.size == 8
        verdict, x = again.verdict(images(9, seed=1)), images(9, seed=1)
        for name, v in detector.verdict(x).items(): assert torch.equal(verdict[name], v)
        described = json.loads((tmp_path / str(k) / "detector.json").read_text())
        assert described["format"] == 2 and described["network"]["preparation"]["mean"] == [0.2]
        described["network"]["preparation"]["mean"] = "0.2"
        (tmp_path / str(k) / "detector.json").write_text(json.dumps(described))
        with pytest.raises(NiooddError, match="mean"): Detector.load(tmp_path / str(k), model=given)
    described = json.loads((GarbageDetector(network, 3).save(tmp_path / "plain") / "detector.json").read_text())
    assert described["format"] == 1 and "preparation" not in described["network"]  # Older versions read it


def test_floats_as_a_loader_prepares_them_and_bytes_are_one(network):
    x = images(200)
    def normal(x): return (x.float() / 255 - 0.2) / 0.3
    detector = GarbageDetector(network, 3, mean=0.2, std=0.3).fit(held_out=normal(x))
    assert detector.reads == "bytes" and torch.allclose(detector.predict(x), detector.predict(normal(x)), atol=1e-5)
    assert GarbageDetector(network, 3).fit(held_out=normal(x)).reads == "floats"
    with pytest.raises(TypeError, match="maen"): GarbageDetector(network, 3, maen=0.2)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_sample_does_not_write_into_the_images_it_is_given(mode):
    with mode():
        x = images(100)
        before = x.clone()
        assert len(all_images([x[:60], x[60:]], 10)) == 10 and len(all_images([x], 10)) == 10
        assert torch.equal(x, before)


def test_image_files_are_read_like_any_data_set(tmp_path):
    for k in range(20):
        (tmp_path / "ab"[k % 2]).mkdir(exist_ok=True)
        picture(tmp_path / "ab"[k % 2] / f"{k:02}.png", 10 * k)
    files = ImageFiles(list_folder(tmp_path), Preparation(8, 1))
    x, y = known_images(files)
    assert x[:, 0, 0, 0].tolist() == [*range(0, 200, 20), *range(10, 200, 20)] and y.tolist() == [0] * 10 + [1] * 10
    some, labels = known_images(files, 7)
    assert len(some) == 7 and torch.equal(labels, (some[:, 0, 0, 0] // 10 % 2).long())
    (tmp_path / "b/03.png").write_bytes(b"")
    with pytest.raises(NiooddError, match="03.png"): known_images(files)


def test_a_loader_may_use_its_memory_again():
    def reusing(x):
        buffer = torch.empty(40, *SHAPE, dtype=torch.uint8)
        for part in x.split(40):
            buffer[:len(part)] = part
            yield buffer[:len(part)]
    x = images(200)
    assert torch.equal(all_images(reusing(x)), x)


def test_pixels_as_a_loader_scales_them_are_no_bytes(network):
    "What ToTensor gives lies in [0, 1]: a plausible range, but not the network's."
    d = GarbageDetector(network).fit(held_out=images(60))
    with pytest.raises(NiooddError, match="ToTensor"): d.predict(images(4) / 255)
    for x in (images(4) / 127.5 - 1, images(4) / 255 + 1e-4, torch.zeros(4, *SHAPE)): d.predict(x)
    GarbageDetector(network, mean=0, std=1).fit(held_out=images(60)).predict(images(4) / 255)
    GarbageDetector(network).fit(held_out=images(60) / 255).predict(images(4) / 255)


class Random(nn.Sequential):
    def forward(self, x): return F.dropout(super().forward(x))


class AmongOthers(nn.Sequential):
    def forward(self, x):
        z = super().forward(x)
        return z - z.mean(0)


@pytest.mark.parametrize("kind, said", [(Random, "other logits each time"), (AmongOthers, "images beside it"),
                                        (nn.Sequential, None)])
def test_a_network_that_has_no_answer_of_its_own(network, kind, said):
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        GarbageDetector(kind(network)).fit(held_out=images(60))
    assert [said in str(w.message) for w in found] == ([True] if said else [])


class Endless(IterableDataset):
    def __iter__(self):
        while True: yield images(10), torch.zeros(10).long()


def test_a_loader_without_an_end(network, monkeypatch):
    with pytest.warns(UserWarning, match="20 were drawn from its first 200"): found = known_images(Endless(), 20)
    assert found[0].shape == (20, *SHAPE)
    monkeypatch.setattr(of_detectors, "MOST_OF_A_STREAM", (300, 1e9))
    with pytest.raises(NiooddError, match="given 310 images"): GarbageDetector(network).fit(held_out=Endless())
    monkeypatch.setattr(of_detectors, "MOST_OF_A_STREAM", (300, 2000))
    with pytest.raises(NiooddError, match="given 40 images and goes on"): known_images(x for x in Endless())
    assert len(known_images([images(200), images(200)])[0]) == 400  # A list ends


def test_autocast_around_a_detector_changes_nothing(detector):
    with torch.autocast("cpu", dtype=torch.bfloat16): found = detector.predict(images(5))
    assert torch.equal(found, detector.predict(images(5)))


Y = torch.arange(6)
LABELS = [Y, Y[:, None], Y.float(), Y.to(torch.uint16), F.one_hot(Y), F.one_hot(Y).float(), Y.tolist(), Y.numpy(),
          Y.numpy().astype(np.int8), LabelEncoder().fit_transform([*"abcdef"])]


@pytest.mark.parametrize("y", LABELS, ids=range(len(LABELS)))
def test_forms_of_labels(y):
    assert known_images((images(6), y))[1].tolist() == Y.tolist()
    assert known_images([dict(pixel_values=images(6), labels=y)])[1].tolist() == Y.tolist()


@pytest.mark.parametrize("y", [[*"abcdef"], torch.rand(6, 6), Y + 0.5, Y * math.nan, [None] * 6, Y.to(torch.complex64)])
def test_what_are_no_labels_is_let_be(y):
    x, labels = known_images([(images(6), y)])
    assert torch.equal(x, images(6)) and labels is None


def test_forms_of_batches():
    x, y = images(6), Y
    pairs = TensorDataset(x, y)
    forms = [(x, y), pairs, DataLoader(pairs, 4), ((x[i:i + 2], y[i:i + 2]) for i in (0, 2, 4)),
             [dict(image=x, label=y)], [dict(x=x, y=y)], [(x, y, [*"abcdef"])], [[x, y]]]
    for form in forms:
        found, labels = known_images(form)
        assert torch.equal(found, x) and torch.equal(labels, y)
    for form in (x, [x[:3], x[3:]], [(x,)], [dict(img=x)]):
        found, labels = known_images(form)
        assert torch.equal(found, x) and labels is None
    for wrong in (x.numpy(), "abc", None, 3, [None], [dict(foo=x)], [x.numpy()], (x.numpy(), y)):
        with pytest.raises(NiooddError, match="images are a"): known_images(wrong)


@pytest.mark.parametrize("no_network", [None, nn.Linear, len, "C1"])
def test_what_is_no_network_is_one_line(no_network):
    with pytest.raises(NiooddError, match="no nn.Module"): GarbageDetector(no_network)
    with pytest.raises(NiooddError, match="no nn.Module"): logits_of(no_network, images(2))


def test_a_network_without_values_is_one_line():
    with pytest.raises(NiooddError, match="on the device meta"): logits_of(Classifier(4, size=8).to("meta"), images(2))
