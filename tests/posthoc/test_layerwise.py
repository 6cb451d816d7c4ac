"""The post hoc detector that listens at all depths: any network, files, p-values, what it must not touch."""
import math
import sys

import pytest
import torch
from pytorch_ood.benchmark import Benchmark
from pytorch_ood.metrics import OODMetrics
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from nioodd.core.detector import Detector, read_detector, write_detector
from nioodd.core.errors import NiooddError
from nioodd.core.images import to_input
from nioodd.core.metrics import ood_metrics
from nioodd.core.models import ARCHITECTURES, Classifier
from nioodd.core.scores import energy
from nioodd.inversion.detector import GarbageDetector
from nioodd.posthoc.layerwise import (
    BETWEEN,
    Bank,
    LayerwiseDetector,
    Surprise,
    directions,
    layer_scores,
    listening_posts,
    prototype_classes,
    prototypes,
    read_directions,
    subspace,
)

SHAPE = (1, 8, 8)


def images(n, low=0, high=256, seed=0, shape=SHAPE):
    return torch.randint(low, high, (n, *shape), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(autouse=True)
def own_randomness():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


@pytest.fixture
def network():
    net = Classifier(4, size=8)
    net(torch.randn(64, *SHAPE))  # batch norm's running statistics leave their initial values
    return net.eval()


@pytest.fixture
def detector(network):
    return LayerwiseDetector(network, classes=["a", "b", "c"], n_known=3).fit(images(200), images(200, seed=1))


@pytest.fixture
def sorter():
    "A detector of a network that names all its classes, and whose output layer reads a pooled map."
    net = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 16, 3, padding=1),
                        nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4)).eval()
    features = net[:-1](to_input(images(200))).mean(0)
    with torch.no_grad(): net[-1].bias.copy_(-net[-1].weight @ features)
    return LayerwiseDetector(net).fit(images(200), images(200, seed=1))


def linear_only():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 4))


# Any network

def resnet18():
    from torchvision.models import resnet18
    return resnet18(num_classes=4)


def with_garbage(): return Classifier(4, size=8)


NETWORKS = {name: (create, None) for name, create in ARCHITECTURES.items()}  # Name → how it is made, known classes
NETWORKS |= {"garbage": (with_garbage, 3), "linear": (linear_only, None), "resnet18": (resnet18, None)}
VERDICT = dict(label=torch.int64, uncertainty=torch.float64, p_value=torch.float64, score=torch.float64, ood=torch.bool,
               early=torch.float64)


@pytest.mark.parametrize("name", NETWORKS)
def test_any_network_learns_judges_and_comes_back_from_its_files(name, tmp_path):
    make, n_known = NETWORKS[name]
    net = make().eval()
    a = getattr(net, "arguments", dict(channels=3, size=32) if name == "resnet18" else dict(channels=1, size=8))
    shape = (a["channels"], a["size"], a["size"])
    d = LayerwiseDetector(net, n_known=n_known).fit(images(24, shape=shape), images(80, seed=1, shape=shape),
                                                    dimensions=16)
    gaps = {name + BETWEEN for name, bank in d.banks.items() if bank.classes is not None}
    assert len(d.banks) >= 2 and set(d.surprise) == {"energy", *d.banks, *gaps} and set(d.sums) == {"late", "whole"}
    x = images(5, seed=2, shape=shape)
    v = d.verdict(x)
    assert {k: t.dtype for k, t in v.items()} == VERDICT
    assert all(t.shape == (5,) for t in v.values())
    assert ((0 < v["p_value"]) & (v["p_value"] <= 1)).all()
    assert v["score"].isfinite().all()
    assert n_known is None or v["label"].max() < n_known
    into = None if name in ARCHITECTURES or name == "garbage" else make()
    again = Detector.load(d.save(tmp_path), model=into)
    assert type(again) is LayerwiseDetector
    assert list(again.evidence(x)[1]) == list(d.evidence(x)[1])
    assert again.n_known == n_known
    assert torch.equal(again.predict(x), d.predict(x)) and again.threshold == d.threshold


def test_posts_are_the_last_of_each_resolution_and_never_the_image(network):
    assert listening_posts(network, torch.randn(2, *SHAPE)) == ["body.1.0", "penultimate.0", "head"]
    assert listening_posts(linear_only(), torch.randn(2, *SHAPE)) == ["1", "3", "5"]
    whole = nn.Sequential(nn.Conv2d(1, 4, 8), nn.Flatten())
    with pytest.raises(NiooddError, match="nothing to listen to"): listening_posts(whole, torch.randn(2, *SHAPE))
    with pytest.raises(NiooddError, match="nothing to listen to"):
        LayerwiseDetector(whole).fit(images(20), images(80, seed=1))
    with pytest.raises(NiooddError, match="expected logits"): listening_posts(whole[0], torch.randn(2, *SHAPE))


def test_a_layer_whose_rows_are_not_the_images_is_passed_over():
    class Folded(nn.Module):
        def __init__(self):
            super().__init__()
            self.window, self.head = nn.Linear(8, 8), nn.Linear(64, 4)
        def forward(self, x): return self.head(self.window(x.reshape(-1, 8)).reshape(len(x), 64))
    assert listening_posts(Folded(), torch.randn(2, *SHAPE)) == ["head"]
    assert LayerwiseDetector(Folded()).fit(images(30), images(80, seed=1)).predict(images(3)).shape == (3,)


# What is computed, written out

def test_directions_and_subspace():
    t = torch.rand(5, 3, 8, 12)
    u = directions(t)
    assert {k: v.shape[1] for k, v in u.items()} == {" where": 3 * 4 * 4, " what": 3}
    for v in u.values(): torch.testing.assert_close(v.norm(dim=1), torch.ones(5))
    maxima = t.unflatten(3, (4, 3)).unflatten(2, (4, 2)).amax((3, 5)).flatten(1)
    torch.testing.assert_close(u[" where"], nn.functional.normalize(maxima, dim=1))
    torch.testing.assert_close(u[" what"], nn.functional.normalize(t.square().sum((2, 3)).sqrt(), dim=1))
    assert directions(torch.rand(5, 3, 2, 9))[" where"].shape == (5, 3 * 2 * 4)
    assert torch.equal(directions(torch.zeros(2, 6))[""], torch.zeros(2, 6))
    u = torch.randn(200, 12) * 0.2 ** torch.arange(12) @ torch.linalg.qr(torch.randn(48, 12))[0].T
    state = torch.get_rng_state()
    v = subspace(u, 4)
    torch.testing.assert_close(v.T @ v, torch.eye(4), atol=1e-5, rtol=0)
    exact = torch.linalg.svd(u)[2][:4].T
    torch.testing.assert_close(v @ v.T, exact @ exact.T, atol=1e-3, rtol=0)
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(v, subspace(u, 4))
    assert subspace(u[:5], 100).shape == (48, 5)


def test_score_written_out(network):
    x, known = images(6, seed=3), images(40)
    logits, seen = read_directions(network, x, ["head"])
    u = read_directions(network, known, ["head"])[1]["head"]
    basis = subspace(u, 8)
    z, s = layer_scores(network, x, {"head": Bank(basis.double(), u @ basis)}, n_known=3)
    plain = nn.functional.normalize(network.features(to_input(x)), dim=1)
    torch.testing.assert_close(seen["head"], plain.detach())
    want = [-max((a @ basis) @ (b @ basis) for b in u) for a in seen["head"]]
    torch.testing.assert_close(s["head"], torch.stack(want).double(), rtol=1e-5, atol=1e-6)
    assert torch.equal(s["energy"], energy(logits, 3)) and torch.equal(z, logits)


def test_the_nearest_is_found_exactly_also_under_autocast():
    u = nn.functional.normalize(torch.rand(2000, 64, generator=torch.Generator().manual_seed(0)), dim=1)
    basis = subspace(u, 16).double()
    bank = Bank(basis, prototypes((u @ basis.float())[:1500]).half().float())
    with torch.autocast("cpu", torch.bfloat16): inside = bank(u[1500:])
    assert torch.equal(inside, bank(u[1500:]))
    torch.testing.assert_close(inside, -(u[1500:].double() @ basis @ bank.known.double().T).amax(1), rtol=0, atol=3e-7)


@pytest.mark.parametrize("n", [20, 25, 1000])
def test_surprise_is_the_empirical_tail_then_a_line(n):
    known = torch.randn(n, generator=torch.Generator().manual_seed(0)).double()
    f, at = Surprise(known), torch.linspace(-5, 20, 4000, dtype=torch.float64)
    s, u = f(at), known.quantile(0.9)
    assert (s >= 0).all() and s.isfinite().all() and (s.diff() >= -1e-12).all()
    assert s.diff().max() <= (at[1] - at[0]) * f.slope.max() * (1 + 1e-9)  # no steps
    assert (f(known.min()[None] - 1) == 0).all()
    torch.testing.assert_close(f(u[None]), torch.tensor([math.log(10)]).double())
    for share in (0.5, 0.3, 0.1):  # at the quantiles that it goes through
        level = 10 ** -(torch.tensor(-math.log10(share) * 16).round() / 16).double()
        torch.testing.assert_close(f(known.quantile(1 - level)[None]), -level.log()[None])
    inside = at[(at > known.min()) & (at < u)]
    counted = torch.stack([-((known >= a).sum() / n).log() for a in inside]).double()
    assert (f(inside) - counted).abs().max() < (0.9 if n < 30 else 0.1)
    far = s[at > u]
    torch.testing.assert_close(far.diff() * (known[known > u] - u).mean(), at[at > u].diff())
    assert (s[at > known.max()] >= 2.2).all() and s[-1] > math.log(n)


def test_surprise_of_ties_and_of_too_few():
    f = Surprise(torch.zeros(50).double())
    assert f(torch.zeros(1).double()) == 0
    assert f(torch.ones(1).double()).isfinite()
    assert f(torch.ones(1).double()) > 100
    assert f(-torch.ones(1).double()) == 0
    with pytest.raises(NiooddError, match="19 held-out scores"): Surprise(torch.zeros(19))


def test_p_values_by_counting(detector):
    s = detector.predict(images(40, seed=7))
    want = [(1 + (detector.calibration >= v).sum().item()) / (1 + len(detector.calibration)) for v in s]
    assert detector.p_values(s).tolist() == pytest.approx(want, abs=1e-15)
    assert detector.p_values(detector.calibration[-1:]).item() == 2 / 101
    assert detector.p_values(torch.tensor([math.inf]).double()).item() == 1 / 101
    for a in (0.02, 0.1, 0.5): assert torch.equal(detector.is_ood(images(40, seed=7), a), torch.tensor(want) <= a)


def test_false_alarms_are_at_most_what_was_asked_for(network):
    "Over many draws of held-out and new images; the mean rate is at most α, up to its own error."
    d = LayerwiseDetector(network).fit(images(200), images(400, seed=1))
    pool = torch.cat([d.calibration, d.predict(images(400, seed=2))])
    for a in (0.01, 0.05, 0.1):
        rates = []
        for _ in range(200):
            one, other = pool[torch.randperm(len(pool))].split([200, 400])
            d.calibration = one.sort().values
            rates.append((d.p_values(other) <= a).double().mean())
        rates = torch.stack(rates)
        assert a / 3 < rates.mean() <= a + 3 * rates.std() / math.sqrt(200)


def test_unknown_images_have_small_p(detector):
    dark = images(50, 0, 40, seed=3)
    assert (detector.p_values(detector.predict(dark)) <= 0.02).double().mean() > 0.9
    assert detector.is_ood(dark, false_alarms=0.01).any() and detector.is_ood(dark).double().mean() > 0.9
    assert detector.is_ood(images(300, seed=4)).double().mean() < 0.2


# Late and early evidence

def test_the_gap_written_out():
    u = nn.functional.normalize(torch.rand(300, 12, generator=torch.Generator().manual_seed(0)), dim=1)
    classes = torch.arange(40) % 3
    bank = Bank(torch.eye(12).double(), u[:40], classes)
    scores = bank.scores(u[40:])
    assert torch.equal(scores[""], bank(u[40:])) and torch.equal(scores[""], Bank(bank.basis, bank.known)(u[40:]))
    for row, gap in zip(u[40:80].double(), scores[BETWEEN]):
        products = u[:40].double() @ row
        others = products[classes != classes[products.argmax()]]
        assert gap.item() == pytest.approx(-(products.max() - others.max()).item(), abs=1e-6) and gap <= 1e-12


def test_prototypes_have_the_class_of_most_of_their_images():
    x = nn.functional.normalize(torch.tensor([[1., 0], [1, .1], [1, -.1], [0, 1], [.1, 1], [-1, 0]]), dim=1)
    known = torch.tensor([[1., 0], [0, 1], [0, -1]])
    assert prototype_classes(x, known, torch.tensor([2, 2, 1, 1, 1, 0])).tolist() == [2, 1, 0]


def test_the_score_written_out(sorter):
    "Late evidence always counts; all of it beyond 3, and single maps beyond 5."
    detector, x = sorter, torch.cat([images(40, seed=5), images(40, 0, 40, seed=3)])
    parts = detector.evidence(x)[1]
    maps = [name for name in parts if name.endswith((" where", " what"))]
    gaps = [name for name in parts if name.endswith(BETWEEN)]
    assert len(maps) >= 2 and set(gaps) == {name + BETWEEN for name in maps[-2:]}
    late = detector.sums["late"](sum(s for name, s in parts.items() if name not in maps))
    whole = detector.sums["whole"](sum(s for name, s in parts.items() if name not in gaps))
    early = 2 * (whole - 3).clamp(min=0) + sum((parts[name] - 5).clamp(min=0) for name in maps)
    torch.testing.assert_close(detector.predict(x), late + early)
    verdict = detector.verdict(x)
    torch.testing.assert_close(verdict["early"], early / (late + early).clamp(min=1e-9))
    assert ((verdict["early"] >= 0) & (verdict["early"] <= 1)).all()
    assert verdict["early"][40:].mean() > verdict["early"][:40].mean()


def test_noise_in_early_layers_says_nothing_of_known_images(network):
    "Whatever maps say of most known images, the score does not change."
    d = LayerwiseDetector(network).fit(images(200), images(400, seed=1))
    x = images(300, seed=4)
    parts = d.evidence(x)[1]
    score, early = d.combine(parts)
    quiet = early == 0
    assert quiet.double().mean() > 0.8
    without = {name: s if name.endswith(BETWEEN) or not name.endswith((" where", " what")) else 0 * s
               for name, s in parts.items()}
    assert torch.equal(d.combine(without)[0][quiet], score[quiet])


def test_a_detector_of_before_adds_all_parts(sorter, tmp_path):
    "A folder without gaps and sums, as earlier versions saved it."
    detector, x = sorter, images(50, seed=5)
    description, tensors = read_detector(detector.save(tmp_path))
    kept = {k: t for k, t in tensors.items() if BETWEEN not in k and not k.startswith(("learnt.sum", "learnt.classes"))}
    write_detector(tmp_path, {k: v for k, v in description.items() if k not in ("format", "nioodd", "sha256")}, kept)
    old = LayerwiseDetector.load(tmp_path, model=sorter.model)
    parts = {name: s for name, s in detector.evidence(x)[1].items() if not name.endswith(BETWEEN)}
    assert torch.equal(old.predict(x), sum(parts.values())) and list(old.evidence(x)[1]) == list(parts)
    assert old.verdict(x)["early"].max() <= 1


@pytest.mark.parametrize("name, bad", [
    ("learnt.sum.late", torch.tensor([1., 0]).double()), ("learnt.classes.", torch.zeros(200).int()),
    ("learnt.classes.", torch.zeros(3).int())])
def test_damaged_sums_and_classes(sorter, tmp_path, name, bad):
    description, tensors = read_detector(sorter.save(tmp_path))
    damaged = next(k for k in tensors if k.startswith(name))
    write_detector(tmp_path, {k: v for k, v in description.items() if k not in ("format", "nioodd", "sha256")},
                   tensors | {damaged: bad})
    with pytest.raises(NiooddError, match="expected .*save") as e: Detector.load(tmp_path, model=sorter.model)
    assert "\n" not in str(e.value)


# How it is fed

def test_tensors_loaders_and_floats_give_the_same_detector(network):
    known, held_out = images(200), images(200, seed=1)
    labels, x = torch.arange(200) % 3, images(9, seed=2)
    one = LayerwiseDetector(network).fit(known, held_out)
    # negative labels: left out
    labelled = DataLoader(TensorDataset(torch.cat([known, images(20, 0, 9)]),
                                        torch.cat([labels, -torch.ones(20).long()])), batch_size=33)
    for a, b in ((labelled, DataLoader(held_out, batch_size=7)), ([known[:150], known[150:]], [(held_out,)]),
                 (to_input(known), to_input(held_out))):
        other = LayerwiseDetector(network).fit(a, b)
        assert torch.equal(other.predict(x), one.predict(x)) and other.threshold == one.threshold
    assert torch.equal(one.predict(to_input(x)), one.predict(x))


def test_one_set_is_split(network):
    d = LayerwiseDetector(network).fit(images(400))
    assert [len(b.known) for b in d.banks.values()] == [300] * 4
    assert len(d.calibration) == 50
    assert d.threshold is not None


def test_batches_do_not_matter(detector):
    x = images(700, seed=5)
    s = detector.predict(x)
    assert s.dtype == torch.float64 and s.device.type == "cpu" and detector.predict(x[:0]).shape == (0,)
    torch.testing.assert_close(torch.cat([detector.predict(b) for b in x.split(41)]), s, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(detector.predict(x.flip(0)).flip(0), s, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(torch.cat([detector.predict(i[None]) for i in x[:20]]), s[:20], rtol=1e-3, atol=1e-3)


def test_the_seed_decides(network):
    fit = lambda seed: LayerwiseDetector(network).fit(images(300), images(200, seed=1), bank=100, seed=seed)
    x = images(20, seed=2)
    assert torch.equal(fit(3).predict(x), fit(3).predict(x)) and not torch.equal(fit(3).predict(x), fit(4).predict(x))


def test_keep_and_bank_and_dimensions(network):
    d = LayerwiseDetector(network).fit(images(300), images(200, seed=1), false_alarms=0.2, bank=70, dimensions=5)
    # 20 of 101 ranks lie above
    assert all(b.known.shape == (70, 5) for b in d.banks.values()) and (d.calibration <= d.threshold).sum() == 81


@pytest.mark.parametrize("grad", [True, False])
def test_network_is_left_as_it_was(network, grad):
    network.train(); network.body.eval()
    modes, weights = [m.training for m in network.modules()], {k: v.clone() for k, v in network.state_dict().items()}
    state = torch.get_rng_state()
    with torch.set_grad_enabled(grad):
        d = LayerwiseDetector(network).fit(images(100), images(100, seed=1))
        x = to_input(images(5)).requires_grad_(grad)
        assert not d.predict(x).requires_grad and not d.verdict(x)["score"].requires_grad
        assert not d.is_ood(x, 0.05).requires_grad
        for bad in (torch.zeros(2, 1, 9, 9), torch.full((2, *SHAPE), float("nan"))):
            with pytest.raises(NiooddError): d.predict(bad)
    assert [m.training for m in network.modules()] == modes and torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(weights[k], v) for k, v in network.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in network.parameters())
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in network.modules())


# What goes wrong

@pytest.mark.parametrize("bad, word", [
    (torch.zeros(8, 8), "shape [8, 8]"), (torch.zeros(SHAPE), "image[None]"),
    (torch.zeros(2, 3, 8, 8), "[2, 3, 8, 8]"), (torch.zeros(2, 1, 8, 9), "[2, 1, 8, 9]"),
    (torch.zeros(2, *SHAPE).long(), "int64"), (images(2).float(), "reach"),
    (torch.full((2, *SHAPE), float("nan")), "NaN")])
def test_bad_images(detector, bad, word):
    for ask in (detector.predict, detector.verdict, detector.is_ood):
        with pytest.raises(NiooddError) as e: ask(bad)
        assert word in str(e.value) and "\n" not in str(e.value)


def test_not_fitted(network, tmp_path):
    d = LayerwiseDetector(network)
    for ask in (d.predict, d.verdict, d.evidence):
        with pytest.raises(NiooddError, match="knows no images yet; expected fit"): ask(images(2))
    with pytest.raises(NiooddError, match="knows no images yet; expected fit"): d.save(tmp_path/"no")
    with pytest.raises(NiooddError, match="no threshold; expected"): d.is_ood(images(2))
    with pytest.raises(NiooddError, match="no calibration; expected fit"): d.p_values(torch.zeros(2))
    assert not (tmp_path/"no").exists()


@pytest.mark.parametrize("share", [0, 1, -0.1, 1.5, 0.009, float("nan")])
def test_false_alarms_out_of_range(detector, share):
    with pytest.raises(NiooddError, match="expected a share from 0.0099 to 1") as e:
        detector.is_ood(images(2), false_alarms=share)
    assert "\n" not in str(e.value)


def test_too_few_images(network):
    d = LayerwiseDetector(network)
    for known, held_out in ((images(100), images(79, seed=1)), (images(316), None)):
        with pytest.raises(NiooddError, match="held-out images; expected at least 80"): d.fit(known, held_out)
    for known, held_out in ((images(100), []), ([], None)):
        with pytest.raises(NiooddError, match="held_out is empty; expected ID images"): d.fit(known, held_out)
    for known, options in ((images(1), {}), ([], {}), (images(50), dict(bank=0)), (images(50), dict(dimensions=0))):
        with pytest.raises(NiooddError, match="expected at least 2 of each"):
            d.fit(known, images(80, seed=1), **options)
    with pytest.raises(NiooddError, match="shape|takes"): d.fit(images(100, shape=(3, 8, 8)), images(80, seed=1))
    # a fit that failed leaves it as it was
    with pytest.raises(NiooddError, match="knows no images"): d.predict(images(2))


# Files

@pytest.mark.parametrize("channels_last", [False, True])
def test_saved_and_loaded_scores_are_bit_identical(detector, tmp_path, channels_last):
    if channels_last: detector.model.to(memory_format=torch.channels_last)
    x = images(100, seed=5)
    for kind in (Detector, LayerwiseDetector):
        again = kind.load(detector.save(tmp_path))
        assert type(again) is LayerwiseDetector
        assert again.arguments() == detector.arguments()
        assert list(again.banks) == list(detector.banks)
        assert torch.equal(again.predict(x), detector.predict(x)) and torch.equal(again.is_ood(x), detector.is_ood(x))
        assert torch.equal(again.is_ood(x, 0.05), detector.is_ood(x, 0.05))
    assert read_detector(tmp_path)[1]["learnt.bank.head"].dtype == torch.float16
    with pytest.raises(NiooddError, match="unknown kind of detector"): GarbageDetector.load(tmp_path)


def test_the_folder_alone_says_which_class(detector, tmp_path, not_imported):
    "Where nothing was imported but `nioodd.core.detector`."
    detector.save(tmp_path)
    from nioodd.core.detector import Detector as Anew
    assert Anew is not Detector and "nioodd.posthoc.layerwise" not in sys.modules
    assert type(Anew.load(tmp_path)).__name__ == "LayerwiseDetector"


@pytest.mark.parametrize("lost", [
    ["learnt.bank.head"], ["learnt.basis.head"], ["learnt.known.004.head"], ["learnt.known.000.energy"],
    ["calibration"], ["learnt.sum.late"],
    ["learnt.bank.head", "learnt.basis.head"], ["learnt.bank.head", "learnt.known.004.head"]])
def test_a_file_without_one_of_its_parts(detector, tmp_path, lost):
    description, tensors = read_detector(detector.save(tmp_path))
    for name in lost: del tensors[name]
    write_detector(tmp_path, {k: v for k, v in description.items() if k not in ("format", "nioodd", "sha256")}, tensors)
    with pytest.raises(NiooddError, match="lacks a bank or a distribution") as e: Detector.load(tmp_path)
    assert "\n" not in str(e.value)


# Inside pytorch-ood

class Small(Benchmark):
    "One ID set of tensors and two OOD sets."
    ood_names = ["dark", "noise"]
    known, labels = images(60, 100, 256, seed=1), torch.arange(60) % 3
    unknown = dict(dark=images(40, 0, 50, seed=2), noise=images(30, seed=3))

    def train_set(self): return TensorDataset(images(400, 100, 256, seed=9), torch.arange(400) % 3)

    def test_sets(self, known=True, unknown=True):
        def with_known(ood):
            labels = torch.cat([self.labels, -torch.ones(len(ood), dtype=torch.long)])
            return TensorDataset(torch.cat([self.known, ood]), labels)
        return [with_known(ood) for ood in self.unknown.values()]


@pytest.mark.parametrize("batch_size", [7, 32])
def test_drops_into_the_benchmark(network, batch_size):
    benchmark = Small()
    network.train()  # as training left it: the benchmark does not switch it
    d = LayerwiseDetector(network).fit(DataLoader(benchmark.train_set(), batch_size=32))
    rows = benchmark.evaluate(d, loader_kwargs=dict(batch_size=batch_size))
    assert [r["Dataset"] for r in rows] == benchmark.ood_names and network.training
    for r in rows:
        # the same batches as the benchmark's: a score's last bits depend on the batch it was computed in
        both = torch.cat([benchmark.known, benchmark.unknown[r["Dataset"]]])
        scores = torch.cat([d.predict(x) for x in both.split(batch_size)])
        m = ood_metrics(scores[:60], scores[60:])
        ours = [m[key] for key in ("auroc", "aupr_in", "aupr_out", "fpr95_ood_positive")]
        assert [r["AUROC"], r["AUPR-IN"], r["AUPR-OUT"], r["FPR95TPR"]] == pytest.approx(ours, rel=0, abs=1e-12)
    assert rows[0]["AUROC"] > 0.95


def test_moved_to_a_device_it_stays_a_detector(detector, tmp_path):
    "pytorch-ood's `Detector.to` rebuilds tuples and moves tensors."
    x = images(9, seed=2)
    s, p = detector.predict(x), detector.p_values(detector.predict(x))
    assert torch.equal(detector.to("cpu").predict(x), s)
    assert torch.equal(detector.p_values(s), p)
    assert torch.equal(Detector.load(detector.save(tmp_path)).predict(x), s)


def test_drops_into_oodmetrics(detector):
    metrics, i, o = OODMetrics(), images(50), images(50, high=60)
    for x, y in ((i, torch.zeros(50).long()), (o, -torch.ones(50).long())): metrics.update(detector(x), y)
    assert metrics.compute()["AUROC"] == pytest.approx(ood_metrics(detector(i), detector(o))["auroc"], abs=1e-12)


# What networks and images there are besides

def vit():
    from torchvision.models import VisionTransformer
    return VisionTransformer(image_size=32, patch_size=8, num_layers=6, num_heads=2, hidden_dim=16, mlp_dim=32,
                             num_classes=4)

class ChannelsLast(nn.Module):
    "Linear layers on maps [B, H, W, C], as in ConvNeXt and Swin."
    def __init__(self):
        super().__init__()
        self.stem, self.up = nn.Conv2d(1, 6, 2, stride=2), nn.Linear(6, 24)
        self.down, self.head = nn.Linear(24, 6), nn.Linear(6, 4)
    def forward(self, x):
        x = self.stem(x).movedim(1, -1)
        return self.head((x + self.down(self.up(x).relu())).mean((1, 2)))

def test_transformers_are_heard_at_four_depths():
    net = vit().eval()
    posts = listening_posts(net, torch.randn(2, 3, 32, 32))
    four = [f"{depth}.mlp.{j}" for depth in (0, 2, 3, 5) for j in (0, 3)]
    assert [p.rpartition("encoder_layer_")[2] for p in posts[:-1]] == four
    assert posts[-1] == "heads.head"
    x = images(120, shape=(3, 32, 32))
    read = read_directions(net, x[:3], posts)[1]
    # 4 fields of 16 channels
    assert {k.rpartition(" ")[2]: u.shape[1] for k, u in read.items() if "mlp.0" in k} == {"where": 64, "what": 16}
    d = LayerwiseDetector(net).fit(x, images(100, seed=1, shape=(3, 32, 32)))
    torch.testing.assert_close(d.predict(x[:9]), torch.cat([d.predict(i[None]) for i in x[:9]]), rtol=1e-3, atol=1e-3)

def test_linear_layers_on_maps_read_channels():
    net = ChannelsLast().eval()
    read = read_directions(net, images(3), listening_posts(net, torch.randn(2, *SHAPE)))[1]
    assert {k: u.shape[1] for k, u in read.items()} == {"down where": 24 * 16, "down what": 24, "head": 6}

def test_a_normalising_layer_in_front_is_no_post(network):
    class Normalised(nn.Module):
        def __init__(self): super().__init__(); self.net = network
        def forward(self, x): return self.net((x - 0.1) / 0.3)
    posts = listening_posts(network, torch.randn(2, *SHAPE))
    assert listening_posts(Normalised().eval(), torch.randn(2, *SHAPE)) == [f"net.{p}" for p in posts]

def test_known_images_that_are_all_the_same(network):
    one = images(1)
    d = LayerwiseDetector(network).fit(one.repeat(100, 1, 1, 1), (one ^ 1).repeat(100, 1, 1, 1))
    s = torch.cat([d.predict(one), d.predict(one.repeat(3, 1, 1, 1)), d.predict(one.repeat(40, 1, 1, 1))])
    assert s.max() - s.min() < 5 and d.predict(images(1, seed=3)) > s.max() + 100

@pytest.mark.parametrize("keep", [0.8, 0.95, 0.99])
def test_threshold_and_p_value_say_the_same(network, keep):
    d = LayerwiseDetector(network).fit(images(300), images(400, seed=1), false_alarms=1 - keep)
    x = images(400, seed=2)
    assert torch.equal(d.is_ood(x), d.is_ood(x, false_alarms=1 - keep)) and d.is_ood(x).any()

def test_a_threshold_that_held_out_images_cannot_tell(network):
    d = LayerwiseDetector(network)
    with pytest.raises(NiooddError, match=r"false_alarms is 0.01; .* 0.024"):
        d.fit(images(100), images(80, seed=1), false_alarms=0.01)
    assert not d.banks and not d.surprise and d.threshold is None  # nothing half done

@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_networks_of_another_dtype(network, dtype):
    d = LayerwiseDetector(network.to(dtype)).fit(images(150), images(100, seed=1))
    torch.testing.assert_close(d.predict(images(9, seed=2)), d.predict(to_input(images(9, seed=2)).to(dtype)))

class Returns(nn.Module):
    def __init__(self, network, what): super().__init__(); self.network, self.what = network, what
    def forward(self, x): return self.what(self.network(x))

@pytest.mark.parametrize("what, says", [(lambda z: (z, z), "returned tuple"),
                                        (lambda z: dict(answer=z), "returned dict"),
                                        (lambda z: z[None], r"a tensor float32 \[1,")])
def test_networks_that_return_something_else(network, what, says):
    with pytest.raises(NiooddError, match=says):
        LayerwiseDetector(Returns(network, what)).fit(images(100), images(100, seed=1))

def test_no_parameters_and_nan(network):
    with pytest.raises(NiooddError, match="no linear"):
        LayerwiseDetector(nn.Flatten()).fit(images(100), images(100, seed=1))
    x = to_input(images(100))
    x[7, 0, 0, 0] = torch.nan
    with pytest.raises(NiooddError, match="images hold NaN"): LayerwiseDetector(network).fit(x, images(100, seed=1))
    with torch.no_grad(): network.body[0][0].weight[0, 0, 0, 0] = torch.nan
    with pytest.raises(NiooddError, match="not finite"):
        LayerwiseDetector(network).fit(images(100), images(100, seed=1))

def test_images_that_are_no_tensors(network, detector):
    for wrong in (images(9).numpy(), [dict(pictures=images(9))], 3):
        with pytest.raises(NiooddError, match="expected a tensor"):
            LayerwiseDetector(network).fit(wrong, images(100, seed=1))
    with pytest.raises(NiooddError, match="expected a tensor"): detector.predict(images(9).numpy())

def test_class_names_that_do_not_fit(network):
    for classes in ([*"a"], [*"abcde"]):
        with pytest.raises(NiooddError, match=f"{len(classes)} class names, but the network has 4 outputs"):
            LayerwiseDetector(network, classes=classes).fit(images(100), images(100, seed=1))

def test_a_classifier_is_not_replaced_by_a_detector(detector, tmp_path):
    (tmp_path / "model.json").write_text("{}")
    with pytest.raises(NiooddError, match="holds a classifier"): detector.save(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["model.json"]


# Any amount of images, and layers by name

def test_fitted_from_a_file_it_judges_as_fitted_from_memory(network, monkeypatch):
    train, held_out, x = images(600), images(300, seed=1), images(50, seed=2)
    loaders = [DataLoader(TensorDataset(part), 64) for part in (train, held_out)]
    for given in (loaders, loaders[:1]):
        a = LayerwiseDetector(network).fit(*given, n=250, bank=40)
        with monkeypatch.context() as patch:
            patch.setattr("nioodd.core.detector.IN_MEMORY", 100 * train[0].nbytes)
            b = LayerwiseDetector(network).fit(*given, n=250, bank=40)
        for name, v in a.verdict(x).items(): assert torch.equal(b.verdict(x)[name], v), name


def test_copies_are_found_also_in_a_file(network, monkeypatch):
    monkeypatch.setattr("nioodd.core.detector.IN_MEMORY", 1)
    loader = DataLoader(TensorDataset(images(300)), 64)
    with pytest.raises(NiooddError, match="held-out images are among the training images"):
        LayerwiseDetector(network).fit(loader, loader)


def test_layers_by_name_and_pattern(network, tmp_path):
    train, held_out, x = images(300), images(200, seed=1), images(20, seed=2)
    every = [*LayerwiseDetector(network).fit(train, held_out, bank=40).banks]
    last = every[-1].partition(" ")[0]
    for layers in (last, [last], [last[:-1] + "?"]):
        detector = LayerwiseDetector(network, mean=0.4).fit(train, held_out, bank=40, layers=layers)
        assert {name.partition(" ")[0] for name in detector.banks} == {"network." + last}
        again = Detector.load(detector.save(tmp_path / "d"))
        assert torch.equal(again.predict(x), detector.predict(x))
    with pytest.raises(NiooddError, match="no layer .* fits 'conv9.*'"):
        LayerwiseDetector(network).fit(train, held_out, layers=[last, "conv9*"])


def test_where_is_a_share_of_each_field(network):
    train, held_out, x = images(300), images(200, seed=1), images(20, seed=2)
    detector = LayerwiseDetector(network).fit(train, held_out, bank=40)
    fields = detector.where(x)
    assert fields.shape == (20, 4, 4) and (fields >= 0).all()
    assert torch.allclose(fields.sum((1, 2)), torch.ones(20, dtype=torch.float64))
    assert torch.allclose(detector.where(x[3:5]), fields[3:5], atol=1e-5)
    vectors = LayerwiseDetector(nn.Sequential(nn.Flatten(), nn.Linear(64, 9), nn.ReLU(), nn.Linear(9, 3)))
    assert detector.where(x[:0]).shape == (0, 4, 4)
    with pytest.raises(NiooddError, match="n is '5'"): LayerwiseDetector(network).fit(train, held_out, n="5")
    with pytest.raises(NiooddError, match="reads a map"): vectors.fit(train, held_out, bank=40).where(x)
