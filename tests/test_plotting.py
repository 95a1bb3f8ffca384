"""Pictures: what is drawn, not how many pixels."""

import sys

import jax
import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.figure import Figure

from cebra_jax_metrics import (
    Bootstrap,
    Checkpoint,
    Consistency,
    Encoder,
    Estimate,
    GoodnessOfFitTest,
    Model,
    NullTest,
    compare_models,
    estimate_infonce,
    goodness_of_fit_history,
    plot_consistency,
    plot_distribution,
    plot_embedding,
    plot_goodness_of_fit,
    plot_loss,
    plot_temperature,
    samplers,
)

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


# Histories, embeddings, distributions


STEPS = np.arange(1, 21)
HISTORY = {"total": 5 + 1 / STEPS, "temperature": np.full(20, 0.5)}
MODEL = Model((Encoder.init(jax.random.key(0), "offset1-model", 3, 4, 3),))
TRAINED = Checkpoint(MODEL, {"batch_size": 64}, HISTORY)
STACK = Checkpoint(MODEL, {"batch_size": 64}, {k: np.stack([x] * 3) for k, x in HISTORY.items()})
RNG = np.random.default_rng(0)
EMBEDDING = RNG.normal(size=(30, 4))
PLOTS = {
    plot_loss: ("total", "InfoNCE (nats)", "magenta"),
    plot_temperature: ("temperature", "Temperature", "dodgerblue"),
}


def estimate(per_batch):
    losses = jax.numpy.asarray(per_batch)
    mean, error = losses.mean(-1), losses.std(-1)
    return Estimate(mean, error, losses, mean, mean, 8)


def line_of(ax):
    (line,) = ax.lines
    return line


@pytest.mark.parametrize("plot", PLOTS)
def test_histories(axes, plot):
    field, name, color = PLOTS[plot]
    assert plot(TRAINED, ax=axes) is axes
    line = line_of(axes)
    np.testing.assert_array_equal(line.get_xdata(), STEPS)
    np.testing.assert_array_equal(line.get_ydata(), HISTORY[field])
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("Training step", name)
    assert (line.get_color(), line.get_linewidth()) == (color, 1)
    assert axes.get_legend() is None


def test_options_of_histories(axes):
    plot_loss(TRAINED, "run", axes, "red", 3, False, False, linestyle=":")
    line = line_of(axes)
    assert (line.get_color(), line.get_linewidth(), line.get_linestyle()) == ("red", 3, ":")
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("", "")
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["run"]


def test_goodness_of_fit_and_chance(axes):
    plot_goodness_of_fit(TRAINED, ax=axes)
    bits, chance = axes.lines
    np.testing.assert_allclose(bits.get_ydata(), goodness_of_fit_history(TRAINED))
    assert list(chance.get_ydata()) == [0, 0]
    assert [text.get_text() for text in axes.texts] == ["chance"]
    assert axes.get_ylabel() == "Goodness of fit (bits)"


def test_models_side_by_side(axes, golden_folder):
    compare_models([TRAINED, golden_folder / "time.pt"], ["mine", "theirs"], ax=axes)
    np.testing.assert_array_equal(axes.lines[0].get_ydata(), HISTORY["total"])
    assert len(axes.lines[1].get_xdata()) == 3
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["mine", "theirs"]
    first, second = (line.get_color() for line in axes.lines)
    assert not np.array_equal(first, second)
    compare_models([TRAINED], ax=axes, cmap=mpl.colormaps["cool"], color=np.array([1, 0, 0]))
    np.testing.assert_array_equal(axes.lines[2].get_color(), [1, 0, 0])
    other = Figure().subplots()
    compare_models((TRAINED, TRAINED), ax=other, color="green")
    assert {line.get_color() for line in other.lines} == {"green"}
    assert other.get_legend() is None


@pytest.mark.parametrize(
    ("width", "order", "drawn"),
    [
        (2, None, [0, 1]),
        (3, None, [0, 1, 2]),
        (4, None, [0, 1, 2]),
        (4, (3, 1), [3, 1]),
        (4, [2, 3, 0], [2, 3, 0]),
    ],
)
def test_embedding(width, order, drawn):
    projection = "3d" if len(drawn) == 3 else None
    axes = Figure().add_subplot(projection=projection)
    assert plot_embedding(EMBEDDING[:, :width], "time", axes, order) is axes
    (points,) = axes.collections
    found = points._offsets3d if projection else points.get_offsets().T
    np.testing.assert_array_equal(np.array(found), EMBEDDING[:, drawn].T)
    np.testing.assert_array_equal(points.get_array(), np.arange(30))
    labels = [axes.get_xlabel(), axes.get_ylabel()]
    labels += [axes.get_zlabel()] if projection else []
    assert labels == [f"feature {i}" for i in drawn]
    assert axes.get_title() == "Embedding"


@pytest.mark.parametrize("labels", [EMBEDDING[:, 0], EMBEDDING[:, :1], np.arange(30) % 3])
def test_embedding_coloured_by_labels(axes, labels):
    plot_embedding(EMBEDDING, labels, axes, (0, 1), 9, 0.7, "viridis", None, colorbar_label="m")
    (points,) = axes.collections
    np.testing.assert_array_equal(points.get_array(), np.ravel(labels))
    assert (points.get_cmap().name, points.get_alpha()) == ("viridis", 0.7)
    np.testing.assert_array_equal(points.get_sizes(), [9])
    assert axes.get_title() == ""
    assert [ax.get_ylabel() for ax in axes.figure.axes] == ["feature 1", "m"]


@pytest.mark.parametrize("color", ["grey", None])
def test_embedding_of_one_colour(axes, color):
    plot_embedding(jax.numpy.asarray(EMBEDDING), color, axes, (0, 1), colorbar_label="m")
    (points,) = axes.collections
    assert points.get_array() is None
    np.testing.assert_allclose(points.get_facecolor()[0, :3], mpl.colors.to_rgb("grey"))
    assert axes.figure.axes == [axes]


def test_batches_of_an_estimate(axes):
    sampler, sizes = samplers.Time(30), {"batch_size": 8, "num_batches": 25}
    estimate = estimate_infonce(jax.random.key(0), MODEL, EMBEDDING[:, :3], sampler, **sizes)
    plot_distribution(estimate, axes, bins=5)
    heights = [patch.get_height() for patch in axes.patches]
    expected = np.histogram(np.asarray(estimate.per_batch_bits), 5)[0]
    np.testing.assert_array_equal(heights, expected)
    assert line_of(axes).get_xdata()[0] == pytest.approx(float(estimate.bits))
    assert f"{float(estimate.bits):.4f} ± " in axes.get_legend().get_texts()[0].get_text()
    assert axes.get_ylim()[1] > expected.max()


def test_one_batch_has_no_error(axes):
    plot_distribution(estimate([0.5]), axes, log=True)
    name = axes.get_legend().get_texts()[0].get_text()
    assert "nan" not in name
    assert "±" not in name


def test_null_of_a_test(axes):
    null = RNG.normal(size=99)
    result = GoodnessOfFitTest(2.5, null, 0.01, "shift", np.arange(99))
    plot_distribution(result, axes, bins=7, color="pink")
    heights = [patch.get_height() for patch in axes.patches]
    np.testing.assert_array_equal(heights, np.histogram(null, 7)[0])
    assert line_of(axes).get_xdata()[0] == 2.5
    assert axes.get_legend().get_texts()[0].get_text() == "observed 2.5000 bits, p = 0.01"
    assert axes.get_ylabel() == "null samples (99 in all)"


def test_resampled_recordings(axes):
    samples = RNG.normal(size=50)
    result = Bootstrap(np.float64(0.3), samples, 20)
    plot_distribution(result, axes, bins=7)
    heights = [patch.get_height() for patch in axes.patches]
    np.testing.assert_array_equal(heights, np.histogram(samples, 7)[0])
    assert line_of(axes).get_xdata()[0] == 0.3
    name = axes.get_legend().get_texts()[0].get_text()
    assert name == f"observed 0.3000 ± {float(result.stderr):.4f} bits"
    assert axes.get_ylabel() == "resampled recordings (50 in all)"


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: plot_loss(Checkpoint(MODEL)), ValueError, "no training history of 'total'"),
        (lambda: plot_temperature(Checkpoint(MODEL)), ValueError, "'temperature', only of"),
        (lambda: plot_goodness_of_fit(Checkpoint(MODEL)), ValueError, "history"),
        (lambda: plot_loss(3), TypeError, "int"),
        (lambda: plot_loss(MODEL), TypeError, "pass the Checkpoint"),
        (lambda: plot_loss(STACK), ValueError, r"stack \(3, 20\)"),
        (lambda: plot_temperature(STACK), ValueError, r"stack \(3, 20\)"),
        (lambda: plot_goodness_of_fit(STACK), ValueError, r"stack \(3, 20\)"),
        (lambda: compare_models([TRAINED, STACK]), ValueError, r"stack \(3, 20\)"),
        (lambda: compare_models([]), ValueError, "at least one"),
        (lambda: compare_models("model.pt"), ValueError, "list of models"),
        (lambda: compare_models([TRAINED], ["a", "b"]), ValueError, "1 models, got 2"),
        (lambda: compare_models([TRAINED] * 2, "ab"), ValueError, "list of them, got 'ab'"),
        (lambda: compare_models([TRAINED], cmap="no"), ValueError, "'no' is not a valid value"),
        (lambda: plot_embedding(EMBEDDING[:, 0]), ValueError, "embedding dimension"),
        (lambda: plot_embedding(EMBEDDING[:, :1]), ValueError, "embedding dimension"),
        (lambda: plot_embedding(EMBEDDING, idx_order=(0,)), ValueError, "idx_order"),
        (lambda: plot_embedding(EMBEDDING, idx_order=(0, 4)), ValueError, "0 to 3"),
        (lambda: plot_embedding(EMBEDDING, "tim"), ValueError, "'tim'"),
        (lambda: plot_embedding(EMBEDDING, np.zeros(29)), ValueError, r"30 time.*\(29,\)"),
        (lambda: plot_embedding(EMBEDDING, ["a"] * 30), ValueError, "one number"),
        (lambda: plot_embedding(EMBEDDING, ax=Figure().subplots()), ValueError, "projection"),
        (lambda: plot_distribution(np.zeros(3)), TypeError, "ndarray"),
        (lambda: plot_distribution(Bootstrap(*np.zeros((2, 5, 1)), 2)), TypeError, "of a goodness"),
        (lambda: plot_distribution(NullTest(*np.zeros((5, 1)))), TypeError, "keeps no samples"),
        (lambda: plot_distribution(estimate([[0.1], [0.2]])), ValueError, r"several \(2, 1\)"),
        (lambda: plot_distribution(estimate([0.1, np.nan])), ValueError, "got NaN"),
    ],
)
def test_what_cannot_be_drawn(call, error, message):
    before = plt.get_fignums()
    with pytest.raises(error, match=message):
        call()
    assert plt.get_fignums() == before  # nothing empty is left for a notebook to show


@pytest.mark.parametrize(
    "plot", [plot_loss, plot_temperature, plot_goodness_of_fit, lambda m: compare_models([m])]
)
def test_new_figures(plot):
    before = plt.rcParams.copy()
    ax = plot(TRAINED)
    assert tuple(ax.figure.get_size_inches()) == (7, 4)
    plt.close(ax.figure)
    assert plot_embedding(EMBEDDING, figsize=(3, 3)).name == "3d"
    plt.close("all")
    assert before == plt.rcParams


def test_without_matplotlib(monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.setitem(sys.modules, name, None)
    calls = {plot: TRAINED for plot in (plot_loss, plot_temperature, plot_goodness_of_fit)}
    calls |= {compare_models: [TRAINED], plot_embedding: EMBEDDING, plot_consistency: RESULT}
    for plot, value in {**calls, plot_distribution: estimate([0.1, 0.2])}.items():
        with pytest.raises(ImportError, match=rf"{plot.__name__} needs.*\[plot\]"):
            plot(value)
