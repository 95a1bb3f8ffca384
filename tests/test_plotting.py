"""The heat map of consistency scores."""

import sys

import matplotlib as mpl
import numpy as np
import pytest
from matplotlib.figure import Figure

from cebra_jax_metrics import plot_consistency
from cebra_jax_metrics.metrics import Consistency

mpl.use("Agg")
IDS = np.array(["a", "b", "c"])
PAIRS = IDS[[[0, 1], [0, 2], [1, 0], [1, 2], [2, 0], [2, 1]]]
SCORES = np.array([0.1, 0.2, 0.9, -0.4, 0.5, 0.6])
RESULT = Consistency(SCORES, PAIRS, IDS)


@pytest.fixture
def axes():
    return Figure(figsize=(5, 5), dpi=100).subplots()


def texts(axes):
    """What stands in which cell, and in which colour."""
    return {(*map(round, text.get_position()[::-1]),): text for text in axes.texts}


@pytest.mark.parametrize(
    "arguments", [(RESULT,), tuple(RESULT), (SCORES.tolist(), PAIRS.tolist(), IDS.tolist())]
)
def test_a_cell_for_every_pair(axes, arguments):
    assert plot_consistency(*arguments, ax=axes) is axes
    (image,) = axes.images
    expected = [[np.nan, 10, 20], [90, np.nan, -40], [50, 60, np.nan]]
    np.testing.assert_allclose(image.get_array().filled(np.nan), expected)
    assert image.get_clim() == (0, 100)
    cells = texts(axes)
    assert {place: text.get_text() for place, text in cells.items()} == {
        (0, 1): "10.0",
        (0, 2): "20.0",
        (1, 0): "90.0",
        (1, 2): "-40.0",
        (2, 0): "50.0",
        (2, 1): "60.0",
    }
    assert cells[1, 0].get_color() == "white"
    assert cells[0, 1].get_color() == "black"
    for ticks in (axes.get_xticklabels(), axes.get_yticklabels()):
        assert [tick.get_text() for tick in ticks] == ["a", "b", "c"]
    (bar,) = (other for other in axes.figure.axes if other is not axes)
    assert bar.get_ylabel() == "Consistency score (%)"


def test_parameters(axes):
    plot_consistency(
        *RESULT, ax=axes, cmap="magma", text_color=None, colorbar_label=None, title="T", vmax=60
    )
    assert not axes.texts
    assert axes.figure.axes == [axes]
    assert axes.get_title() == "T"
    assert axes.images[0].get_cmap().name == "magma"
    assert axes.images[0].get_clim() == (0, 60)


def test_a_new_figure():
    import matplotlib.pyplot as plt

    figure = plot_consistency(RESULT, figsize=(3, 2), dpi=50).figure
    assert figure.get_size_inches().tolist() == [3, 2]
    assert figure.dpi == 50
    plt.close(figure)


def test_ids_of_any_kind_and_many_of_them(axes):
    ids = [("rat", i) for i in range(3)]
    pairs = [(source, target) for source in ids for target in ids if source != target]
    plot_consistency(SCORES, pairs, ids, ax=axes)
    assert axes.get_xticklabels()[1].get_text() == "('rat', 1)"
    numbers = np.arange(80)
    pairs = np.argwhere(~np.eye(80, dtype=bool))
    other = Figure(figsize=(5, 5)).subplots()
    plot_consistency(np.zeros(len(pairs)), pairs, numbers, ax=other)
    assert not other.texts
    assert other.get_xticklabels()[0].get_rotation() == 90


def test_matplotlib_is_asked_for_when_it_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    with pytest.raises(ImportError, match=r"cebra-jax-metrics\[plot\]"):
        plot_consistency(RESULT)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((SCORES,), "Missing datasets or pairs"),
        ((SCORES[:, None], PAIRS, IDS), "expect 1D, got 2D"),
        ((SCORES[1:], PAIRS, IDS), r"do not match.*scores:\(5,\), datasets:3 and pairs:6"),
        ((SCORES, PAIRS, IDS[:2]), "do not match"),
        ((SCORES, PAIRS[:, 0], IDS), "do not match"),
    ],
)
def test_bad_input(arguments, message):
    with pytest.raises(ValueError, match=message):
        plot_consistency(*arguments)
