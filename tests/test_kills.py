"""Killed at any file event, a command leaves a folder with which the same command ends as if nothing had happened.

A file event is a file that is opened for writing, flushed, renamed or removed, or a folder that is made or removed.
In CI each command is killed at a few of its events; NIOODD_KILLS=1 kills at each of them."""
import contextlib
import io
import json
import os
import shutil
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from nioodd.app.cli import main
from nioodd.app.export import Exported
from nioodd.inversion import report

EVENTS = ("open", "fsync", "replace", "rename", "unlink", "mkdir", "rmdir")
SETTINGS = dict(id_set="folder:tiny", ood_sets="folder:odd", size=16, rounds=1, pretrain_epochs=1, generator_steps=2,
                generator_batch=8, samples=20, trust_steps=0, eval_images=20, batch_size=64, latent_dim=4,
                precision="float32")
RUN = [f"--set={k}={v}" for k, v in SETTINGS.items()]
TRAIN = [f"--set={s}" for s in ("size=16", "channels=1", "epochs=2", "validation_images=100", "batch_size=64",
                                "precision=float32")]


class Killed(BaseException):
    "Nothing that the program does afterwards reaches the disk, as after `kill -9`."


@contextlib.contextmanager
def file_events(folder, stop=None):
    "Counts the file events below `folder`; at number `stop`, and at all later ones, `Killed` is raised instead."
    count, real = [0], {name: getattr(os, name) for name in EVENTS}
    folder = os.path.realpath(folder)

    def event(name):
        def call(first, *rest, **options):
            if name == "open" and not (rest and rest[0] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)):
                return real[name](first, *rest, **options)
            below = name == "fsync" or os.path.abspath(os.fsdecode(first)).startswith(folder)
            if name in ("open", "mkdir") and str(first).endswith(".lock"): below = False
            if name == "open" and os.path.isdir(first): below = False  # filelock tries, once, what a folder can do
            if below:
                count[0] += 1
                if stop is not None and count[0] >= stop: raise Killed
            return real[name](first, *rest, **options)
        return call

    for name in EVENTS: setattr(os, name, event(name))
    try: yield count
    finally:
        for name in EVENTS: setattr(os, name, real[name])


def command(*words):
    "The exit code of a command that runs in this process, and what it printed."
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(io.StringIO()):
        return main([*map(str, words)]), out.getvalue()


def contents(folder, *names):
    "What is in the files that must be the same; of JSON lines without the seconds that it took."
    found = {}
    for name in names:
        path = folder/name
        if name.endswith(".jsonl"):
            rows = [json.loads(line) for line in path.read_text().splitlines()]
            for row in rows:
                for key in [k for k in row if k.endswith("seconds")]: del row[key]
            found[name] = rows
        else: found[name] = path.read_bytes()
    return found


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    "A folder with two sets, a network and its detectors; the working folder of these tests."
    here, before = tmp_path_factory.mktemp("kills"), os.getcwd()
    os.chdir(here)
    patch = pytest.MonkeyPatch()
    patch.setattr(report, "png", lambda figure: b"a picture")  # drawn, they take longer than all the rest of a run
    patch.setattr(report, "tsne", lambda x, n: report.pca(x))
    patch.setenv("NIOODD_DATA", str(here/"nothing"))  # of the benchmark's sets only noise is there
    rng = np.random.default_rng(0)
    for part, n in (("train", 120), ("test", 60)):
        for k, name in enumerate(("bar", "dash")):
            (here/"tiny"/part/name).mkdir(parents=True)
            for i in range(n):
                pixels = rng.integers(0, 60, (16, 16)).astype(np.uint8)
                pixels[(slice(6, 10), slice(None)) if k else (slice(None), slice(6, 10))] += 150
                Image.fromarray(pixels).save(here/"tiny"/part/name/f"{i}.png")
    (here/"odd").mkdir()
    for i in range(30): Image.fromarray(rng.integers(0, 255, (16, 16)).astype(np.uint8)).save(here/f"odd/{i}.png")
    assert command("train", "C1", "--data", "folder:tiny", *TRAIN, "--out", "net")[0] == 0
    assert command("run", "quickstart", "--out", "done", *RUN)[0] == 0
    shutil.copytree(here/"net", here/"models"/"C1-seed0")
    yield here
    patch.undo()
    os.chdir(before)


BENCH = ["bench", "ood", "--networks", "C1", "--seeds", "0", "--detectors", "msp,energy", "--better", "msp",
         "--images", "30", "--models", "models", "--work", "OUT/work", "--out", "OUT"]
# Command → its words, the files that must come out the same, what goes on with it where it left a folder, and at how
# many events CI kills it
WEIGHTS = ("model.safetensors",)
COMMANDS = {
    "run": (["run", "quickstart", "--out", "OUT", *RUN], (*WEIGHTS, "metrics.jsonl"), ["--resume"], 2),
    "train": (["train", "C1", "--data", "folder:tiny", *TRAIN, "--out", "OUT"], WEIGHTS, ["--resume"], 4),
    "trust fit": (["trust", "fit", "net", "--set=steps=2", "--out", "OUT"], WEIGHTS, ["--resume"], 4),
    "guard": (["guard", "net", "--out", "OUT"], WEIGHTS, [], 4),
    "export": (["export", "done", "--out", "OUT/d.pt2"], (), [], 1),
    "report": (["report", "OUT"], ("table.csv", "table.md"), [], 1),
    "score": (["score", "done", "odd", "--out", "OUT/rows.jsonl"], ("rows.jsonl",), [], 8),
    "bench ood": (BENCH, ("C1-seed0.jsonl", "better/C1-msp.jsonl"), [], 2),
}
AGAIN = {"report", "bench ood", "score"}  # They are given again even if their files are there


def start(name, out):
    "The folder as the command finds it."
    shutil.rmtree(out, ignore_errors=True)
    if name == "report": shutil.copytree("done", out)
    if name == "export": os.mkdir(out)


def end(words, name, out, more):
    words = [w.replace("OUT", str(out)) for w in words]
    resume = more if out.exists() else []
    return command(*words, *resume)[0]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", COMMANDS)
def test_killed_at_a_file_event(here, name):
    words, same, more, few = COMMANDS[name]
    out = here/name.replace(" ", "-")
    start(name, out)
    with file_events(here) as count: assert end(words, name, out, []) == 0
    expected, n = contents(out, *same), count[0]
    assert n > 2
    few = n if os.environ.get("NIOODD_KILLS") else few
    stops = sorted({1 + (2 * i + 1) * n // (2 * few) for i in range(few)} & {*range(1, n + 1)})
    for stop in stops:
        start(name, out)
        with pytest.raises(Killed), file_events(here, stop): end(words, name, out, [])
        finished = not more and out.is_dir() and same and set(same) <= {p.name for p in out.iterdir()}
        where = f"killed at event {stop} of {n}"
        if not finished or name in AGAIN: assert end(words, name, out, more) == 0, where
        assert contents(out, *same) == expected, where
        if name == "export": assert len(Exported(out/"d.pt2").verdict(torch.zeros(3, 1, 16, 16).byte())["score"]) == 3
        left = [p.name for p in out.rglob("*.part")] + [p.name for p in here.glob("*.part")]
        assert all(str(os.getpid()) in p for p in left) # This process lives; those of a dead one are removed
    print(f"{name}: {len(stops)} of {n} events", file=sys.stderr)


def test_the_instrument_sees_what_writing_does(tmp_path):
    from nioodd.core.files import write_atomic
    with file_events(tmp_path) as count: write_atomic(tmp_path/"a/b.txt", "x")
    assert count[0] == 5 # A folder, a file, a flush, a new name; and nothing is left to remove
    for stop in range(1, 5):
        with pytest.raises(Killed), file_events(tmp_path, stop): write_atomic(tmp_path/"c/d.txt", "x")
        assert not (tmp_path/"c/d.txt").exists()
