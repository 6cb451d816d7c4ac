"Explorers without a browser: a slider is an object with a value, and what the browser would show is another."
import threading
import time
from base64 import b64decode
from io import BytesIO

import ipywidgets as widgets
import matplotlib
import pytest
import torch
from PIL import Image

from nioodd.core.errors import NiooddError
from nioodd.core.show import Plot, style
from nioodd.explore import explorer as explore
from nioodd.explore.explorer import EMPTY, Explorer, Newest, Picture, Stopped


def until(true, seconds=10):
    "Waits for what another thread does."
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.001)


class Doors:
    "Computations that stand at a door: `open(name)` lets one go on."

    def __init__(self): self.doors, self.begun, self.shown = {}, [], []

    def __call__(self, step, name):
        self.begun.append(name)
        while not self.doors.get(name):
            step(1, 2, name)
            time.sleep(0.001)
        return lambda: self.shown.append(name)

    def open(self, name): self.doors[name] = True


def test_the_newest_request_wins():
    explorer, f = Explorer(), Doors()
    explorer.run(f, "first")
    until(lambda: f.begun == ["first"])
    for name in ("second", "third", "last"): explorer.run(f, name)
    until(lambda: f.begun[-1] == "last")  # the first one was told to end though its door is shut
    f.open("last")
    explorer.wait()
    assert f.begun[0] == "first" and f.begun[-1] == "last" and f.shown == ["last"]


def test_of_many_requests_while_one_runs_only_the_last_is_computed():
    newest, door, log = Newest(), threading.Event(), []

    def compute(request, i):
        door.wait(10)
        log.append(i)
    newest.run(compute, 0)
    until(lambda: newest.current is not None)
    for i in range(1, 500): newest.run(compute, i)
    door.set()
    newest.wait(10)
    assert log == [0, 499] and newest.thread is None


def test_requests_from_many_threads_end_with_one_of_them_shown_last_and_no_thread_left():
    explorer, shown = Explorer(), []

    def f(step, i):
        step(0, 1)
        return lambda: shown.append(i)

    def asks(who):
        for i in range(200): explorer.run(f, (who, i))
    threads = [threading.Thread(target=asks, args=(k,)) for k in range(8)]
    for t in threads: t.start()
    for t in threads: t.join()
    explorer.wait()
    assert shown[-1][1] == 199 and explorer.newest.thread is None and explorer.newest.current is None
    for k in range(8):
        own = [i for who, i in shown if who == k]
        assert own == sorted(own)  # never back to an older one


@pytest.mark.parametrize("how", ["stop", "button"])
def test_stop_ends_what_runs_and_drops_what_waits(how):
    explorer, f = Explorer(), Doors()
    explorer.run(f, "first")
    until(lambda: f.begun)
    if how == "button": until(lambda: explorer.stop_button.layout.visibility == "visible")
    explorer.stop_button.click() if how == "button" else explorer.stop()
    explorer.wait()
    assert f.shown == [] and explorer.message.value == "stopped"
    assert explorer.bar.layout.visibility == explorer.stop_button.layout.visibility == "hidden"
    f.open("again")
    explorer.run(f, "again")
    assert explorer.wait().message.value == "" and f.shown == ["again"]


def test_a_stopped_computation_that_ends_well_is_not_shown():
    explorer, door, begun, shown = Explorer(), threading.Event(), threading.Event(), []

    def never_looks(step):
        begun.set()
        door.wait(10)
        return lambda: shown.append(1)
    explorer.run(never_looks)
    begun.wait(10)
    explorer.stop()
    door.set()
    explorer.wait()
    assert shown == [] and explorer.message.value == "stopped"


def test_stopped_passes_an_except_exception_and_runs_finally():
    explorer, log = Explorer(), []

    def f(step):
        try:
            while True:
                try:
                    step(0, 1)
                    time.sleep(0.001)
                except Exception: log.append("taken for a failure")
        finally: log.append("finally")
    explorer.run(f)
    until(lambda: explorer.newest.current is not None)
    explorer.stop()
    explorer.wait()
    assert log == ["finally"] and not issubclass(Stopped, Exception)


@pytest.mark.parametrize("error, line", [
    (NiooddError("no such class; expected 0 to 9; choose <another>"),
     "no such class; expected 0 to 9; choose &lt;another&gt;"),
    (ZeroDivisionError("division by zero"), "ZeroDivisionError: division by zero"),
    (SystemExit("3"), "SystemExit: 3")])
def test_errors_are_shown_and_raised_whether_in_computing_or_in_showing(error, line):
    def raises(): raise error
    for f in (lambda step: raises(), lambda step: raises):
        explorer = Explorer()
        explorer.run(f)
        with pytest.raises(type(error)) as caught: explorer.wait()
        assert caught.value is error and line in explorer.message.value and "#D55E00" in explorer.message.value
        with pytest.raises(type(error)): explorer.wait()  # as long as it is the last computation
        explorer.run(lambda step: None)
        assert explorer.wait().message.value == ""


def test_wait_says_when_it_has_waited_in_vain():
    explorer, f = Explorer(), Doors()
    explorer.run(f, "a")
    with pytest.raises(NiooddError, match="still computing after 0.05 s"): explorer.wait(0.05)
    explorer.stop()
    explorer.wait()


def test_the_bar_moves_appears_late_and_does_not_flood(monkeypatch):
    explorer, moves, seen = Explorer(), [], []
    explorer.bar.observe(lambda c: moves.append(c["new"]), "value")
    explorer.bar.layout.observe(lambda c: seen.append(c["new"]), "visibility")

    def f(step):
        for i in range(20_001): step(i, 20_000)
    explorer.run(f)
    explorer.wait()
    assert moves[-1] == 20_000 and len(moves) < 1000 and explorer.bar.max == 20_000
    monkeypatch.setattr(explore, "APPEAR", 30)
    seen.clear()
    explorer.run(f)
    explorer.wait()
    assert seen == []
    monkeypatch.setattr(explore, "APPEAR", 0)
    explorer.run(lambda step: until(lambda: seen == ["visible"]))
    explorer.wait()
    assert seen == ["visible", "hidden"]


def test_follow_computes_at_once_and_after_each_change():
    explorer, a, b, got = Explorer(), widgets.IntSlider(1), widgets.Text("x"), []
    explorer.follow(lambda step, *values: lambda: got.append(values), a, b)
    explorer.wait()
    a.value = 5
    explorer.wait()
    b.value = "y"
    explorer.wait()
    assert got == [(1, "x"), (5, "x"), (5, "y")]


def test_threads_of_torch_are_handed_on_and_gradients_are_on():
    explorer, got, threads = Explorer(), [], torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        with torch.no_grad():
            explorer.run(lambda step: got.append((torch.get_num_threads(), torch.is_grad_enabled())))
            explorer.wait()
    finally: torch.set_num_threads(threads)
    assert got == [(3, True)]


@style()
def figure(n): return Plot(figsize=(n, 1))


def test_a_notebook_stores_the_pictures_from_top_to_bottom_and_errors_in_words():
    first, never, second = Picture(), Picture(), Picture()
    explorer = Explorer(widgets.HBox([first]), never, second)

    def f(step):
        time.sleep(0.1)
        return lambda: (first.show(figure, 2), second.show(figure(3)))
    explorer.run(f)
    bundle = explorer._repr_mimebundle_()  # waits
    assert Image.open(BytesIO(b64decode(bundle["image/png"]))).size == (240, 160)
    assert bundle["text/plain"] == "Explorer" and "application/vnd.jupyter.widget-view+json" in bundle
    explorer.run(lambda step: 1 / 0)
    assert explorer._repr_mimebundle_()["text/plain"] == "Explorer: division by zero"
    assert "image/png" not in Explorer(Picture())._repr_mimebundle_() and first.value != EMPTY == never.value


def test_explorers_that_draw_at_once_leave_the_style_outside_alone():
    before, explorers = dict(matplotlib.rcParams), [Explorer(Picture()) for _ in range(4)]

    def f(step, picture):
        for i in range(30):
            step(i, 30)
            picture.show(figure, 1 + i % 2)
    for e in explorers: e.run(f, e.children[0])
    for e in explorers: e.wait()
    assert dict(matplotlib.rcParams) == before


def test_close_stops_and_a_constructor_that_failed_can_be_collected(recwarn):
    explorer, f = Explorer(), Doors()
    explorer.run(f, "a")
    explorer.close()
    explorer.wait()
    assert f.shown == []

    class Fails(Explorer):
        def __init__(self): raise NiooddError("no")
    with pytest.raises(NiooddError): Fails()
    Fails.__new__(Fails).close()
