"""A headless Chromium, and what it looks at: the site, JupyterLab and voila, each on a free port of this machine only.

Without one of them the tests that need it are skipped, and say what is missing."""
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

import pytest
from filelock import FileLock

root = Path(__file__).resolve().parents[2]
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")


def needs(*modules: str) -> None:
    "Skips unless all are installed."
    if missing := [m for m in modules if not find_spec(m)]: pytest.skip(f"{', '.join(missing)} not installed")


@pytest.fixture(scope="session")
def browser():
    "Chromium: the system's, or else playwright's own."
    needs("playwright")
    from playwright.sync_api import sync_playwright
    with sync_playwright() as p:
        path = next(filter(None, map(shutil.which, NAMES)), None) or p.chromium.executable_path
        if not Path(path).is_file(): pytest.skip("no Chromium: neither on the PATH nor installed by playwright")
        is_admin = hasattr(os, "geteuid") and os.geteuid() == 0
        chromium = p.chromium.launch(executable_path=path, args=["--no-sandbox"] if is_admin else [])
        yield chromium
        chromium.close()


@pytest.fixture
def page(browser):
    """An empty page of 1400×1000.

    `page.wrong` collects errors of the console and of scripts, `page.asked` the addresses asked for."""
    context = browser.new_context(viewport=dict(width=1400, height=1000))
    context.set_default_timeout(180_000)  # a notebook is executed meanwhile, maybe on a busy machine
    page = context.new_page()
    page.wrong, page.asked = [], []

    def said(message):
        if message.type == "error": page.wrong.append(f"console: {message.text} ({message.location.get('url', '')})")

    page.on("console", said)
    page.on("pageerror", lambda e: page.wrong.append(f"script: {e}"))
    page.on("request", lambda r: page.asked.append(r.url))
    yield page
    context.close()


@pytest.fixture(scope="session")
def site_folder(tmp_path_factory) -> Path:
    "The site as .ci/site.py builds it now: once, for all workers of pytest-xdist."
    needs("sphinx", "myst_nb", "sphinx_book_theme", "sphinx_copybutton", "sphinx-mathjax-offline")
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base)/"site"
    with FileLock(f"{folder}.lock"):
        if folder.exists(): return folder
        command = [sys.executable, root/".ci"/"site.py", "--out", folder]
        done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
        assert done.returncode == 0, done.stdout + done.stderr
    return folder


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *args): "Keeps the tests' output clean."


@contextmanager
def files_served(folder: Path):
    "The address at which the files of a folder are."
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=folder)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture(scope="session")
def site(site_folder) -> str:
    "Its address."
    with files_served(site_folder) as address: yield address


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path: return tmp_path_factory.mktemp("served")


@pytest.fixture(scope="module")
def served(folder) -> str:
    "The address of that folder."
    with files_served(folder) as address: yield address


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def environment(folder: Path) -> dict[str, str]:
    "Of a server: this checkout, one thread, and no settings but those in `folder`."
    path = os.pathsep.join([str(root), *filter(None, [os.environ.get("PYTHONPATH")])])
    env = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "IPYTHONDIR": str(folder/"ipython")}
    for kind in ("CONFIG", "DATA", "RUNTIME"): env[f"JUPYTER_{kind}_DIR"] = str(folder/kind.lower())
    for kind in ("SETTINGS", "WORKSPACES"): env[f"JUPYTERLAB_{kind}_DIR"] = str(folder/kind.lower())
    env.pop("MPLBACKEND", None)
    return env


@contextmanager
def server(folder: Path, ready: str, *command):
    "Runs a server until the context ends; its address, once `ready` below it answers."
    port, log = free_port(), folder/"server.log"
    with open(log, "w") as out:
        process = subprocess.Popen([sys.executable, "-m", *command, f"--port={port}"], cwd=folder,
                                   env=environment(folder), stdout=out, stderr=out, stdin=subprocess.DEVNULL)
    try:
        for _ in range(600):
            try:
                with urlopen(f"http://127.0.0.1:{port}{ready}", timeout=10): break
            except (URLError, ConnectionError, TimeoutError): pass
            try: process.wait(0.2)
            except subprocess.TimeoutExpired: continue
            break
        assert process.poll() is None, f"{command[0]} ended:\n{log.read_text()}"
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        try: process.wait(20)
        except subprocess.TimeoutExpired: process.kill()


# The explorers, each a cell; nbdev_test executes their chapters
DESK = """
import torch

from nioodd.core.datasets import load
from nioodd.core.forward import logits_of
from nioodd.core.models import Classifier
from nioodd.core.scores import energy
from nioodd.core.training import train_epoch
from nioodd.explore.threshold_desk import ThresholdDesk

torch.manual_seed(0)
train, digits = (load("digits5k", split, size=14)[:1000] for split in ("train", "test"))
net = Classifier(10, size=14)
train_epoch(net, train.images, train.labels, torch.optim.Adam(net.parameters(), 2e-3))
unknown = {name: load(name, "test", size=14, channels=1)[:300].images for name in ("letters", "photos")}
id_scores = energy(logits_of(net, digits.images))
ood_scores = {name: energy(logits_of(net, images)) for name, images in unknown.items()}
ThresholdDesk(id_scores, ood_scores, digits.images, unknown, names=("digits", "unknown"))
"""
SIBLINGS = """
from nioodd.explore.siblings import SiblingExplorer

SiblingExplorer(net.eval(), digits.images[:200], unknown["letters"][:200], digits.labels[:200])
"""
ASK = """
from nioodd.explore.ask import Ask
from nioodd.posthoc.layerwise import LayerwiseDetector

layers = LayerwiseDetector(net, classes=digits.classes).fit(train[:500], digits[:200])
Ask(layers, {"digits": digits, "letters": unknown["letters"]})
"""
STUDIO = """
import tempfile

from nioodd.core.options import with_values
from nioodd.explore.inversion_studio import InversionStudio
from nioodd.inversion.config import Config
from nioodd.inversion.loop import run

small = with_values(Config(), [
    "id_set=digits5k", "size=8", "train_images=200", "ood_sets=letters", "ood_split=test", "eval_images=50", "rounds=2",
    "pretrain_epochs=1", "generator_steps=3", "generator_batch=11", "samples=44", "noise_images=20", "temperature=0.3"])
scratch = tempfile.TemporaryDirectory()
run(small, f"{scratch.name}/run", progress=False)
studio = InversionStudio(f"{scratch.name}/run", known=train.images[:100])
studio.controls["round"].value = 1
studio.wait()
"""


def explorers_page(folder: Path) -> Path:
    "A folder with the notebook explorers.ipynb: every explorer, in one kernel."
    import nbformat
    nb = nbformat.v4.new_notebook(metadata={"kernelspec": {"name": "python3", "display_name": "Python 3"}})
    nb.cells = [nbformat.v4.new_code_cell(source.strip()) for source in (DESK, SIBLINGS, ASK, STUDIO)]
    (notebooks := folder/"nbs").mkdir()
    nbformat.write(nb, notebooks/"explorers.ipynb")
    return notebooks


@pytest.fixture
def lab(tmp_path_factory) -> str:
    "JupyterLab over the explorers' page, without a token, with all cells of a notebook on the page."
    needs("jupyterlab", "ipywidgets", "jupyterlab_widgets")
    folder = tmp_path_factory.mktemp("lab")
    (settings := folder/"settings"/"@jupyterlab"/"notebook-extension").mkdir(parents=True)
    (settings/"tracker.jupyterlab-settings").write_text(json.dumps({"windowingMode": "none"}))
    options = [
        "--no-browser", "--allow-root", "--ServerApp.ip=127.0.0.1", "--IdentityProvider.token=",
        f"--ServerApp.root_dir={explorers_page(folder)}",
        "--LabApp.expose_app_in_browser=True", "--LabApp.extension_manager=readonly", "--LabApp.news_url=none",
        "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate",
    ]
    with server(folder, "/api/status", "jupyterlab", *options) as address: yield address


@pytest.fixture
def voila(tmp_path_factory) -> str:
    "voila over the explorers' page, without jupytext's extension, which wants what only JupyterLab has."
    needs("voila", "ipywidgets")
    folder = tmp_path_factory.mktemp("voila")
    options = [
        str(explorers_page(folder)), "--no-browser", "--Voila.ip=127.0.0.1", "--show_tracebacks=True",
        "--VoilaConfiguration.extension_denylist=jupyterlab-jupytext",
    ]
    with server(folder, "/voila/static/voila.js", "voila", *options) as address: yield address
