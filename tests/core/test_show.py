"""Figures: every pixel is shown, nothing is left behind, and what cannot be drawn is one line."""
import subprocess
import sys

import matplotlib
import pytest
import torch

from nioodd.core import show
from nioodd.core.errors import NiooddError


def fails(call, *words):
    with pytest.raises(NiooddError) as e: call()
    assert "\n" not in str(e.value)
    for word in words: assert word in str(e.value)


def test_show_leaves_nothing_behind():
    "No pyplot is imported, and no rcParam changed, by drawing into axes of one's own or into a new figure."
    code = ("import sys, numpy as np; from nioodd.core import show; show.png(show.roc([0., 1], {'x': [1., 2]})); "
            "sys.exit('matplotlib.pyplot' in sys.modules)")
    subprocess.run([sys.executable, "-c", code], check=True)
    before = dict(matplotlib.rcParams)
    figure = matplotlib.figure.Figure()
    ax = figure.add_subplot()
    assert show.prediction_histogram({"a": torch.tensor([0, 1, 1])}, ["x", "garbage"], ax=ax) is figure
    show.png(figure)
    assert dict(matplotlib.rcParams) == before


def test_show_errors():
    fails(lambda: show.grid(torch.zeros(2, 5, 8, 8, dtype=torch.uint8)), "[2, 5, 8, 8]")
    fails(lambda: show.grid(torch.zeros(2, 8, 8)), "float32")
    fails(lambda: show.grid(torch.zeros(0, 8, 8, dtype=torch.uint8)), "N ≥ 1")
    fails(lambda: show.roc([0.0], {"x": []}), "'x'")
    fails(lambda: show.score_histogram([float("inf")], {}), "'ID'")


def test_names_that_are_no_text_are_drawn():
    "Names of files may hold bytes that are no UTF-8; Python keeps them as surrogates."
    name = b"caf\xe9 $x$".decode(errors="surrogateescape")
    for figure in (show.heatmap([[0.1, 0.9]], [name], [name, "b"], title=name, xlabel=name, label=name),
                   show.prediction_histogram({name: torch.tensor([0, 1, 1])}, [name, "garbage"])):
        show.png(figure)
        figure.axes[0].set_xticks([0, 1], [name, "b"])  # as anybody's own code may
        assert show.png(figure) == show.png(figure)
        labels = [label.get_text() for label in figure.axes[0].get_xticklabels()]
        assert labels == ["caf\\udce9 $x$", "b"]


@pytest.mark.parametrize("size, channels", [(8, 1), (28, 1), (40, 3), (200, 3)])
def test_grid_shows_every_pixel(size, channels):
    "The mosaic holds the images unchanged, at any size; small ones are enlarged by a whole number."
    images = torch.randint(0, 256, (6, channels, size, size), dtype=torch.uint8)
    figure = show.class_grid(images, [0, 0, 1, 1, 2, 2], [0, 1, 1, 1, 2, 0], ["a", "b", "garbage"])
    picture = torch.from_numpy(figure.axes[0].images[0].get_array().copy())
    rows, cols = picture.shape[0] // 3, picture.shape[1] // 2
    cells = picture.reshape(3, rows, 2, cols, 3)[:, -size:, :, :size].permute(0, 2, 4, 1, 3).reshape(6, 3, size, size)
    assert torch.equal(cells, images.expand(6, 3, size, size))
    assert [t.get_text() for t in figure.axes[0].texts if t.get_fontweight() == "bold"] == ["b", "a"]
    assert show.png(figure).startswith(b"\x89PNG")


def test_names_are_shown_as_they_are_and_numbers_as_powers():
    with show.style():
        figure = show.Plot(layout="constrained")
        ax = figure.subplots()
        ax.loglog([1e-4, 1], [1, 2])
        ax.set(title="$a_b$ costs $5")
        ax.set_yticks([1, 2], ["$x_1$", "y"])
    show.png(figure) # Draws it, so that all labels are there
    powers = [tick.label1 for tick in ax.xaxis.get_major_ticks()]
    assert all("mathdefault" in label.get_text() and label.get_parse_math() for label in powers)
    names = [ax.title, *(tick.label1 for tick in ax.yaxis.get_major_ticks())]
    assert not any(label.get_parse_math() for label in names)
