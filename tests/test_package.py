"""The package as a user gets it: built from the sdist, installed into an empty folder, without the developers' tools.

Run as a program, this file is what the installed package is tried with: see `use_every_module`."""
import ast
import importlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tarfile
from email import message_from_bytes
from importlib.metadata import packages_distributions
from pathlib import Path
from zipfile import ZipFile

import pytest
from packaging.requirements import Requirement

root = Path(__file__).resolve().parents[1]
package = root/"nioodd"
files = sorted(package.rglob("*.py"))
# room.module of each
modules = sorted(f"{p.parent.name}.{p.stem}" for p in files if p.parent != package and p.stem != "__init__")
developer_tools = {"nbdev", "fastcore", "execnb"}  # IPython comes with ipywidgets, which the explorers need


def run(*command, **kwargs):
    "The finished process; a failed one fails the test with all it printed."
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, stdin=subprocess.DEVNULL, **kwargs)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    "The sdist, the wheel that was built from it (not from the checkout), and what the build printed."
    source, dist = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    shutil.copytree(package, source/"nioodd", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ["setup.py", "pyproject.toml", "settings.ini", "MANIFEST.in", "README.md", "LICENSE"]:
        shutil.copy(root/name, source)
    done = run(sys.executable, "-m", "build", "--no-isolation", "--outdir", dist, source)
    return next(dist.glob("*.tar.gz")), next(dist.glob("*.whl")), done.stdout + done.stderr


@pytest.fixture(scope="module")
def installed(built, tmp_path_factory):
    "A folder that holds the installed package and nothing else."
    folder = tmp_path_factory.mktemp("installed")
    run(sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--target", folder, built[1])
    return folder


def test_sdist_is_complete_and_the_build_is_not_deprecated(built):
    sdist, _, printed = built
    names = {name.partition("/")[2] for name in tarfile.open(sdist).getnames()}
    assert {"settings.ini", "README.md", "LICENSE", "setup.py", "pyproject.toml"} <= names
    assert not re.search("deprecat", printed, re.IGNORECASE), printed


def test_wheel(built):
    with ZipFile(built[1]) as wheel:
        names = set(wheel.namelist())
        meta = message_from_bytes(wheel.read(next(n for n in names if n.endswith("/METADATA"))))
        scripts = wheel.read(next(n for n in names if n.endswith("/entry_points.txt"))).decode()
    assert {n for n in names if "dist-info" not in n} == {p.relative_to(root).as_posix() for p in files}
    assert (package/"__init__.py").read_text(encoding="utf-8").startswith(f'__version__ = "{meta["Version"]}"\n')
    assert meta["License-Expression"] == "Apache-2.0" and meta["License-File"] == "LICENSE"
    assert meta["Requires-Python"] == ">=3.10"
    needed = {r.name for r in map(Requirement, meta.get_all("Requires-Dist")) if r.marker is None}
    assert "torch" in needed and not needed & developer_tools
    assert "nioodd = nioodd.app.cli:main" in scripts


def optional_imports(tree) -> set:
    "Statements within a `try` that an ImportError ends."
    found = set()
    for node in ast.walk(tree):
        if not isinstance(node, ast.Try): continue
        caught = [h.type.id for h in node.handlers if isinstance(h.type, ast.Name)]
        if "ImportError" in caught: found |= {*node.body}
    return found


def outside_imports(source: str) -> set[str]:
    "Packages that a module imports and cannot do without, other than the standard library and nioodd."
    tree, names = ast.parse(source), []
    optional = optional_imports(tree)
    for node in ast.walk(tree):
        if node in optional: continue
        if isinstance(node, ast.Import): names += [a.name for a in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level: names.append(node.module)
    looked_for = {*re.findall(r'find_spec\("(\w+)"\) is None', source)}
    return {n.partition(".")[0] for n in names} - sys.stdlib_module_names - {"nioodd"} - looked_for


def test_every_import_is_required():
    "settings.ini names each package that a module imports, unless the module can do without."
    text = (root/"settings.ini").read_text(encoding="utf-8")
    requirements = re.search(r"^requirements = (.*)$", text, re.MULTILINE)[1].split()
    required, distributions = {Requirement(r).name for r in requirements}, packages_distributions()
    for file in files:
        for name in outside_imports(file.read_text(encoding="utf-8")):
            known = required & {*distributions.get(name, [])}
            assert known, f"{file.relative_to(root)} imports {name}, which settings.ini does not require"


def test_installed_package_works_without_the_developers_tools(installed, tmp_path):
    env = {**os.environ, "PYTHONPATH": str(installed), "MPLBACKEND": "Agg", "OMP_NUM_THREADS": "1"}
    run(sys.executable, __file__, installed, cwd=tmp_path, env=env)  # runs `use_every_module` below


def test_help_is_quick_and_imports_no_torch(installed, tmp_path):
    env = {**os.environ, "PYTHONPATH": str(installed)}
    code = "import sys; from nioodd.app.cli import main; sys.argv[0] = 'nioodd'; main()"
    run(sys.executable, "-c", code, "--help", cwd=tmp_path, env=env)  # writes the bytecode, as pip does
    seconds = []
    for _ in range(5):
        start = os.times()
        done = run(sys.executable, "-c", code, "--help", cwd=tmp_path, env=env)
        end = os.times()  # processor time: what a machine busy with other things does not change
        user, system = end.children_user - start.children_user, end.children_system - start.children_system
        seconds.append(user + system)
    for command in ["run", "score", "data", "report", "bench"]: assert command in done.stdout
    assert min(seconds) < 0.3, seconds
    as_module = run(sys.executable, "-m", "nioodd", "--help", cwd=tmp_path, env=env)
    assert as_module.stdout == done.stdout
    loaded = "import atexit, sys; atexit.register(lambda: print('torch' in sys.modules)); " + code.partition(";")[2]
    assert run(sys.executable, "-c", loaded, "--help", cwd=tmp_path, env=env).stdout.splitlines()[-1] == "False"


def test_ruff_has_nothing_to_say():
    "By the rules in pyproject.toml: code, notebooks, tests."
    run(sys.executable, "-m", "ruff", "check", "--no-cache", ".", cwd=root)


def test_readme_is_what_its_notebook_makes():
    spec = importlib.util.spec_from_file_location("ci_readme", root/".ci"/"readme.py")
    readme = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(readme)
    for file, content in readme.pages().items(): assert file.read_bytes() == content, f"{file}: see {spec.origin}"
    text = (root/"README.md").read_text(encoding="utf-8")
    for notebook in (root/"nbs").rglob("*.ipynb"):
        name = notebook.relative_to(root).as_posix()
        if name == "nbs/index.ipynb" or "/." in name: continue
        assert f"({name})" in text, f"README.md lacks {name}: execute nbs/index.ipynb"


def test_no_file_names_a_machine():
    "No tracked file names a folder or a package index of the machine it was written on."
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=root, capture_output=True, text=True)
    if listed.returncode: pytest.skip("not a git checkout")
    homes = ["home/", "Users/", "root/", "tmp/", "mnt/", "content/"]
    here = [f"{folder}/"[1:] for folder in (root, root.parent, Path.home()) if len(folder.parts) > 1]
    folders = "|".join(map(re.escape, homes + here))
    options = "index[-]url|find[-]links|trusted[-]host"
    bad = re.compile(rf"(?<![\w.~:/*-])/(?:{folders})|{options}", re.IGNORECASE)
    found = []
    for name in filter(None, listed.stdout.split("\0")):
        if not (root/name).is_file() or b"\0" in (content := (root/name).read_bytes()): continue
        content = re.sub(rb'"image/(?:png|jpeg)": "[^"]*"', b"", content)  # pictures: most of the text, and no names
        found += [f"{name}: {m[0]}" for m in bad.finditer(content.decode("utf-8"))]
    assert not found, "\n".join(found)


# What follows runs in a process of its own, in which `nioodd` is the installed package.

class Blocked:
    "Finds none of the developers' tools."

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in developer_tools: raise ImportError(f"{name} is not there at run time")


def use_every_module(folder: Path):
    "With the developers' tools out of reach, import each module, call something of it, then run the whole loop once."
    sys.meta_path.insert(0, Blocked())
    import nioodd
    assert "torch" not in sys.modules  # not before it is needed
    loaded = {name: importlib.import_module(f"nioodd.{name}") for name in modules}
    for name, module in loaded.items():
        assert Path(module.__file__).is_relative_to(folder), f"{name} is not the installed one: {module.__file__}"
        for public in module.__all__: assert hasattr(module, public), f"{name}.{public}"
    for name, module in nioodd.NAMES.items(): assert getattr(nioodd, name) is getattr(loaded[module], name), name
    loaded["inversion.report"].PLANE_IMAGES["tsne"] = (60, 20)  # of more it is most of the run's time
    calls = one_call_each(loaded)
    known = calls.keys() | CALLED_BY_THE_RUN | NOT_CALLED
    assert {*modules} == known, f"not called here, or no longer there: {sorted({*modules} ^ known)}"
    for name, call in calls.items(): call(loaded[name])


CALLED_BY_THE_RUN = {"inversion.loop", "inversion.report", "app.folders"}  # see `small_run`
NOT_CALLED = {"speed.loop", "speed.siblings", "speed.detectors", "app.stream"}  # they take long


def one_call_each(loaded: dict) -> dict:
    "Module → what to do with it."
    import torch
    torch.manual_seed(0)
    images = torch.randint(256, (32, 1, 28, 28), dtype=torch.uint8)
    blank, labels, logits = torch.zeros(2, 1, 28, 28), torch.arange(32) % 11, torch.randn(32, 11)
    model = loaded["core.models"].Classifier(11)
    detector = loaded["inversion.detector"].GarbageDetector(model).calibrate(torch.randn(99))
    sigma = {"head.weight": torch.full((11, 128), 0.1)}
    many, scores = torch.randn(3, 9, 4), torch.randn(9)

    def trained(m): m.train_epoch(model, images, labels, torch.optim.Adam(model.parameters()))

    def generated(m): m.Generator(11)(torch.randn(2, 100), *m.sample_conditions(2, 11))

    def written(m): m.save_tensors("some.safetensors", {"logits": logits})

    def learnt(m): m.TrustIntervals(model).step(blank, torch.tensor([0, 1]))

    def ensemble(m):
        outputs = loaded["posthoc.outputs"].network_outputs(model, images)
        m.ensemble_score([outputs, outputs])

    def layers(m):
        fitted = m.LayerwiseDetector(model).fit(images.repeat(4, 1, 1, 1), (255 - images).repeat(3, 1, 1, 1))
        fitted.verdict(images)

    def scored(m):
        from PIL import Image
        path = Path("some.png")
        Image.fromarray(images[0, 0].numpy()).save(path)
        assert m.score_files(detector, [path]).judged == 1

    return {
        "app.score": scored,
        "benchmark.own": lambda m: m.Board(["letters"]).sets,
        "benchmark.photographs": lambda m: m.known_classes("abcdefghij", 0),
        "core.errors": lambda m: m.unknown("set", "mnst", ["mnist"]),
        "core.registry": lambda m: m.Registry("fruit").register("apple")(object()),
        "core.scores": lambda m: m.garbage_log_odds(logits),
        "core.metrics": lambda m: m.ood_metrics(scores, scores),
        "core.show": lambda m: m.png(m.grid(images)),
        "core.images": lambda m: m.resize(images, 8, 3),
        "core.datasets": lambda m: m.load("uniform", n=4, size=28, channels=1).resized(8, 3),
        "core.models": lambda m: m.Classifier(3)(blank),
        "core.forward": lambda m: m.logits_and_features(model, blank),
        "core.training": trained,
        "core.files": written,
        "core.options": lambda m: m.field_docs(loaded["inversion.config"].Config),
        "core.glossary": lambda m: m.define("ID"),
        "core.detector": lambda m: m.detector_class(m.Detector, "GarbageDetector"),
        "inversion.config": lambda m: m.preset("quickstart"),
        "inversion.generator": generated,
        "inversion.invert": lambda m: m.invert(model, n=4, steps=2),
        "inversion.outliers": lambda m: m.outliers(("gaussian",), 4, images),
        "inversion.detector": lambda m: detector.predict(blank),
        "trust.agreement": lambda m: m.disagreement(torch.randn(2, 3, 11)),
        "trust.fast_siblings": lambda m: m.sibling(model, {"head.bias": torch.zeros(11)})(blank),
        "trust.siblings": lambda m: m.Siblings(model, sigma).logits(blank),
        "trust.intervals": learnt,
        "trust.detector": lambda m: m.TrustIntervalDetector(model, sigma).predict(blank),
        "trust.compare": lambda m: m.score_rows({"id": many, "ood": many}, sizes=(2,)),
        "posthoc.outputs": lambda m: m.network_outputs(model, images),
        "posthoc.baselines": ensemble,
        "posthoc.layerwise": layers,
        "posthoc.score_detector": lambda m: m.ScoreDetector(model, "energy").fit(held_out=images).verdict(images),
        "posthoc.monitor": lambda m: m.Monitor(n=99).update_p(torch.full((3,), 0.01)),
        "neighbours.beliefs": lambda m: m.PAPER,
        "neighbours.reconstruct": lambda m: m.total_variation(blank),
        "neighbours.binarised": lambda m: m.BinaryMLP((4, 3, 2)).eval()(torch.ones(2, 4, dtype=torch.bool)),
        "neighbours.sat": lambda m: m.Clauses(),
        "neighbours.surrogate": lambda m: m.SurrogateEnsemble(4, 2).fit(*m.arm_data(50), steps=2),
        "neighbours.gaussian_process": lambda m: m.GaussianProcess().fit(torch.rand(20, 2), torch.rand(20)),
        "neighbours.relatives": lambda m: m.Laplace(torch.randn(9, 3), torch.randn(9, 2)),
        "benchmark.recipes": lambda m: m.recipe_data(m.Recipe(data="digits5k", validation_images=500)),
        "benchmark.stress": lambda m: m.corrupted(images, "gaussian", 1),
        "benchmark.worth": lambda m: m.paired_effect([1, 2], [0, 0]),
        "benchmark.heads": lambda m: m.new_head(torch.randn(9, 3), 2)(torch.randn(4, 3)),
        "benchmark.scoreboard": lambda m: m.scoreboard([], "C1", sets=["letters"]),
        "explore.explorer": lambda m: m.Explorer().wait(),
        "explore.threshold_desk": lambda m: m.ThresholdDesk(scores, scores).wait(),
        "explore.siblings": lambda m: m.SiblingExplorer(model, images, images, labels).wait(),
        "explore.ask": lambda m: m.networks({"one": detector}),
        "explore.inversion_studio": lambda m: m.InversionStudio(model, images).wait(),
        "app.export": lambda m: m.traced(detector, 28, 1),
        "app.page": lambda m: m.RUNTIME.index("onnxruntime-web"),
        "explore.open": lambda m: m.page_notebook(tool="ask", folder="runs/first"),
        "app.cli": lambda m: small_run(m.main),
    }


SMALL = """train_images=256 ood_sets=folder:foreign eval_images=64 rounds=1 pretrain_epochs=1
generator_steps=2 samples=32 trust_steps=2""".split()
WRITTEN = """run.json metrics.jsonl table.md table.csv report.html model.safetensors detector.json
trust/detector.json""".split()


def small_run(main):
    "`nioodd run` of seconds, in the working folder."
    from PIL import Image
    Path("foreign").mkdir()
    for i in range(64): Image.effect_noise((28, 28), 2*i).save(f"foreign/{i}.png")
    main(["run", "quickstart", "--out", "small", *(word for value in SMALL for word in ("--set", value))])
    for name in WRITTEN: assert Path("small", name).stat().st_size, name


if __name__ == "__main__": use_every_module(Path(sys.argv[1]).resolve())
