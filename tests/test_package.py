"""The package as a user gets it: built from the sdist, installed into an empty folder, without the developers' tools."""
import ast
import importlib
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
modules = sorted(p.stem for p in (root/"nioodd").glob("*.py") if not p.stem.startswith("_"))
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
    shutil.copytree(root/"nioodd", source/"nioodd", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ["setup.py", "pyproject.toml", "settings.ini", "MANIFEST.in", "README.md", "LICENSE"]: shutil.copy(root/name, source)
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
    assert {n for n in names if "dist-info" not in n} == {f"nioodd/{p.name}" for p in (root/"nioodd").glob("*.py")}
    assert (root/"nioodd"/"__init__.py").read_text().strip() == f'__version__ = "{meta["Version"]}"'
    assert meta["License-Expression"] == "Apache-2.0" and meta["License-File"] == "LICENSE"
    assert meta["Requires-Python"] == ">=3.10"
    needed = {r.name for r in map(Requirement, meta.get_all("Requires-Dist")) if r.marker is None}
    assert "torch" in needed and not needed & developer_tools
    assert "nioodd = nioodd.cli:main" in scripts


def test_every_import_is_required():
    "What nioodd/*.py imports is the standard library, nioodd itself, a package that settings.ini names, or something it can do without."
    requirements = re.search(r"^requirements = (.*)$", (root/"settings.ini").read_text(), re.MULTILINE)[1].split()
    required, distributions = {Requirement(r).name for r in requirements}, packages_distributions()
    for file in (root/"nioodd").glob("*.py"):
        tree = ast.parse(file.read_text())
        looked_for = {*re.findall(r'find_spec\("(\w+)"\) is None', file.read_text())}
        optional = {n for t in ast.walk(tree) if isinstance(t, ast.Try) and any(isinstance(h.type, ast.Name) and h.type.id == "ImportError" for h in t.handlers) for n in t.body}
        for node in ast.walk(tree):
            if node in optional: continue
            if isinstance(node, ast.Import): names = [a.name for a in node.names]
            elif isinstance(node, ast.ImportFrom) and not node.level: names = [node.module]
            else: continue
            for name in {n.partition(".")[0] for n in names} - sys.stdlib_module_names - {"nioodd"} - looked_for:
                assert required & {*distributions.get(name, [])}, f"{file.name} imports {name}, which settings.ini does not require"


def test_installed_package_works_without_the_developers_tools(installed, tmp_path):
    env = {**os.environ, "PYTHONPATH": str(installed), "MPLBACKEND": "Agg", "OMP_NUM_THREADS": "1"}
    run(sys.executable, __file__, installed, cwd=tmp_path, env=env)  # runs `use_every_module` below


def test_help_is_quick_and_imports_no_torch(installed, tmp_path):
    env = {**os.environ, "PYTHONPATH": str(installed)}
    code = "import sys; from nioodd.cli import main; sys.argv[0] = 'nioodd'; main()"
    run(sys.executable, "-c", code, "--help", cwd=tmp_path, env=env)  # writes the bytecode, as pip does
    seconds = []
    for _ in range(5):
        start = os.times()
        done = run(sys.executable, "-c", code, "--help", cwd=tmp_path, env=env)
        end = os.times()  # processor time: what a machine busy with other things does not change
        seconds.append(end.children_user - start.children_user + end.children_system - start.children_system)
    for command in ["run", "score", "data", "report", "bench"]: assert command in done.stdout
    assert min(seconds) < 0.3, seconds
    loaded = "import atexit, sys; atexit.register(lambda: print('torch' in sys.modules)); " + code.partition(";")[2]
    assert run(sys.executable, "-c", loaded, "--help", cwd=tmp_path, env=env).stdout.splitlines()[-1] == "False"


def test_no_undefined_or_unused_names():
    run(sys.executable, "-m", "ruff", "check", "--no-cache", "--select", "F", root/"nioodd", root/"tests", root/".ci", root/"setup.py")


def test_readme_is_what_its_notebook_makes():
    run(sys.executable, root/".ci"/"readme.py", "--check")
    text = (root/"README.md").read_text()
    for notebook in (root/"nbs").rglob("*.ipynb"):
        name = notebook.relative_to(root).as_posix()
        assert name == "nbs/index.ipynb" or "/." in name or f"({name})" in text, f"README.md lacks {name}: execute nbs/index.ipynb"


def test_no_file_names_a_machine():
    "No tracked file names a folder or a package index of the machine it was written on."
    listed = subprocess.run(["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=root, capture_output=True, text=True)
    if listed.returncode: pytest.skip("not a git checkout")
    homes = ["home/", "Users/", "root/", "tmp/", "mnt/", "content/"]
    here = [f"{folder}/"[1:] for folder in (root, root.parent, Path.home()) if len(folder.parts) > 1]
    bad = re.compile(rf"(?<![\w.~:/*-])/(?:{'|'.join(map(re.escape, homes + here))})|index[-]url|find[-]links|trusted[-]host", re.IGNORECASE)
    found = []
    for name in filter(None, listed.stdout.split("\0")):
        if not (root/name).is_file() or b"\0" in (content := (root/name).read_bytes()): continue
        found += [f"{name}: {m[0]}" for m in bad.finditer(content.decode("utf-8"))]
    assert not found, "\n".join(found)


# What follows runs in a process of its own, in which `nioodd` is the installed package.

def use_every_module(folder: Path):
    "With the developers' tools out of reach, import each module, call something of it, then run the whole loop once."
    class Blocked:
        def find_spec(self, name, path=None, target=None):
            if name.partition(".")[0] in developer_tools: raise ImportError(f"{name} is not there at run time")
    sys.meta_path.insert(0, Blocked())

    loaded = {name: importlib.import_module(f"nioodd.{name}") for name in modules}
    for name, module in loaded.items():
        assert Path(module.__file__).is_relative_to(folder), f"{name} is not the installed one: {module.__file__}"
        for public in module.__all__: assert hasattr(module, public), f"{name}.{public}"

    import torch
    torch.manual_seed(0)
    images = torch.randint(256, (32, 1, 28, 28), dtype=torch.uint8)
    model, logits, labels = loaded["models"].Classifier(11), torch.randn(32, 11), torch.arange(32) % 11
    calls = dict(
        errors=lambda m: m.unknown("set", "mnst", ["mnist"]),
        config=lambda m: m.with_values(m.preset("quickstart"), ["rounds=1"]),
        data=lambda m: m.load("uniform", n=4, size=28, channels=1).resized(8, 3),
        models=lambda m: m.logits_and_features(model, torch.zeros(2, 1, 28, 28)),
        train=lambda m: m.train_epoch(model, images, labels, torch.optim.Adam(model.parameters())),
        scores=lambda m: m.garbage_log_odds(logits),
        metrics=lambda m: m.ood_metrics(torch.randn(9), torch.randn(9)),
        generator=lambda m: m.Generator(11)(torch.randn(2, 100), *m.sample_conditions(2, 11)),
        inversion=lambda m: m.invert(model, n=4, steps=2),
        outliers=lambda m: m.outliers(("gaussian",), 4, images),
        detector=lambda m: m.GarbageDetector(model).predict(torch.zeros(2, 1, 28, 28)),
        recipes=lambda m: m.recipe_data(m.Recipe(data="digits5k", validation_images=500)),
        agreement=lambda m: m.disagreement(torch.randn(2, 3, 11)),
        siblings=lambda m: m.Siblings(model, {"head.weight": torch.full((11, 128), 0.1)}).logits(torch.zeros(2, 1, 28, 28)),
        trust=lambda m: m.TrustIntervals(model).step(torch.zeros(2, 1, 28, 28), torch.tensor([0, 1])),
        compare=lambda m: m.score_rows({"id": torch.randn(3, 9, 4), "ood": torch.randn(3, 9, 4)}, sizes=(2,)),
        stress=lambda m: m.corrupted(images, "gaussian", 1),
        outputs=lambda m: m.network_outputs(model, images),
        baselines=lambda m: m.ensemble_score([loaded["outputs"].network_outputs(model, images)] * 2),
        layerwise=lambda m: m.LayerwiseDetector(model).fit(images.repeat(4, 1, 1, 1), images.repeat(3, 1, 1, 1)).verdict(images),
        export=lambda m: m.traced(loaded["detector"].GarbageDetector(model, threshold=0.0), 28, 1),
        explore=lambda m: m.Explorer().wait(),
        threshold_desk=lambda m: m.ThresholdDesk(torch.randn(9), torch.randn(9)).wait(),
        sibling_explorer=lambda m: m.SiblingExplorer(model, images, images, labels).wait(),
        ask=lambda m: m.judgement(loaded["detector"].GarbageDetector(model, threshold=0.0), images[:1]),
        inversion_studio=lambda m: m.InversionStudio(model, images).wait(),
        benchmark=lambda m: m.scoreboard([], "C1", sets=["letters"]),
        show=lambda m: m.png(m.grid(images)),
        cli=lambda m: small_run(m.main),
    )
    for name in modules:
        if name in calls: calls[name](loaded[name])
        else: assert name in {"garbage", "report", "fit", "bench", "bench_trust", "bench_detectors"}, f"nothing of {name} is called here"  # small_run calls the first three


def small_run(main):
    "`nioodd run` of seconds, in the working folder."
    from PIL import Image
    Path("foreign").mkdir()
    for i in range(64): Image.effect_noise((28, 28), 2*i).save(f"foreign/{i}.png")
    values = ["train_images=256", "ood_sets=folder:foreign", "eval_images=64", "rounds=1", "pretrain_epochs=1", "generator_steps=2", "samples=32", "trust_steps=2"]
    main(["run", "quickstart", "--out", "small", *(word for value in values for word in ("--set", value))])
    for name in ["run.json", "metrics.jsonl", "table.md", "table.csv", "report.html", "model.safetensors", "detector.json", "trust/detector.json"]:
        assert Path("small", name).stat().st_size, name


if __name__ == "__main__": use_every_module(Path(sys.argv[1]).resolve())
