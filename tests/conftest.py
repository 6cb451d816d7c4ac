import gc
import os
import sys
from contextlib import contextmanager
from pathlib import Path

import matplotlib
import pytest
import torch

from nioodd.core import files

matplotlib.use("Agg")
files.check_schema({}, {}, "nothing")  # before nbformat imports jsonschema, with a grammar that takes seconds to build
gc.set_threshold(50_000, 20, 20)  # a tenth of the tests' time was the search for garbage
torch.set_num_threads(1)  # the tests' tensors are tiny: two threads are no faster, and on a busy machine far slower


def pytest_collection_finish():
    "The search for garbage leaves out what was imported."
    gc.freeze()


@pytest.fixture
def data_folder() -> Path:
    "The folder of the full data sets; without one the test is skipped."
    if not (folder := os.environ.get("NIOODD_DATA")): pytest.skip("NIOODD_DATA is not set: no folder of full data sets")
    return Path(folder)


@pytest.fixture
def no_data(monkeypatch, tmp_path) -> Path:
    "A machine without data: no NIOODD_DATA, an empty per-user cache, an empty working folder, which is returned."
    monkeypatch.delenv("NIOODD_DATA", raising=False)
    monkeypatch.setenv("MPLCONFIGDIR", matplotlib.get_cachedir())  # its list of fonts takes seconds to make anew
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path/"cache"))
    (work := tmp_path/"work").mkdir()
    monkeypatch.chdir(work)
    return work


@pytest.fixture
def dies_before(monkeypatch):
    """dies_before(stop, *modules): a context in which the process "dies" (SystemExit).

    It dies just before it would write its file number `stop`."""
    @contextmanager
    def context(stop, *modules):
        count, real = 0, files.write_atomic

        def dies(path, content):
            nonlocal count
            count += 1
            if count == stop: raise SystemExit("killed")
            return real(path, content)
        with monkeypatch.context() as patch:
            for module in (files, *modules): patch.setattr(module, "write_atomic", dies)
            yield
    return context


@pytest.fixture
def not_imported():
    """As in a process that has imported nothing of nioodd: what is imported now is made anew.

    Afterwards it is taken out again. A new process would load PyTorch again, which takes seconds."""
    def ours(): return [name for name in sys.modules if name.partition(".")[0] == "nioodd"]
    before = {name: sys.modules.pop(name) for name in ours()}
    yield
    for name in ours(): del sys.modules[name]
    sys.modules.update(before)
