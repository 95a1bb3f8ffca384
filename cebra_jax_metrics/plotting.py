"""Pictures. matplotlib (``pip install 'cebra-jax-metrics[plot]'``) is imported when drawing."""

from typing import TYPE_CHECKING, Any

import numpy as np

from cebra_jax_metrics.arrays import as_numpy
from cebra_jax_metrics.metrics import Consistency

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BOUNDS = {"vmin": 0, "vmax": 100}
DARK, LIGHT = "black", 0.5  # text on cells that are lighter than this
FONT_SIZE, SMALLEST, MOST_LETTERS = 10.0, 4.0, 50  # in points; of names side by side


def plot_consistency(
    scores: Any,
    pairs: Any = None,
    datasets: Any = None,
    ax: "Axes | None" = None,
    cmap: str = "binary",
    text_color: str | None = "white",
    colorbar_label: str | None = "Consistency score (%)",
    title: str | None = None,
    figsize: tuple[float, float] = (5, 5),
    dpi: float = 100,
    **kwargs: Any,
) -> "Axes":
    """Heat map of consistency scores: the row's embedding predicts the column's.

    Args:
        scores: R² ``(pairs,)``, or all that :func:`consistency_score` returns.
        pairs: Ids ``(pairs, 2)``.
        datasets: Ids in the order of rows and columns.
        ax: Where to draw; a new figure by default.
        cmap: Colour map; from 0 to 100 % unless ``vmin`` and ``vmax`` say otherwise.
        text_color: Colour of the values in dark cells (black in light ones); ``None`` leaves the
            values out, and so do cells too small for them.
        colorbar_label: Label of the colour bar; ``None`` leaves the bar out.
        title: Title of the plot.
        figsize: Width and height of a new figure in inches.
        dpi: Resolution of a new figure.
        **kwargs: Further arguments of ``matplotlib.axes.Axes.imshow``.

    Returns:
        The matplotlib Axes.

    Raises:
        ValueError: Pairs or datasets are missing, or do not fit the scores.
        ImportError: matplotlib is not installed.

    Source: CEBRA 0.6.1 ``cebra.plot_consistency``.
    """
    if isinstance(scores, Consistency):
        scores, pairs, datasets = scores
    if pairs is None or datasets is None:
        raise ValueError(
            "Missing datasets or pairs, provide both of them to plot consistency: "
            "plot_consistency(*consistency_score(...))."
        )
    percent = 100 * _square(as_numpy(scores), pairs, datasets)
    if ax is None:
        ax = _new_axes(figsize, dpi)
    image = ax.imshow(percent, cmap=cmap, **({} if "norm" in kwargs else BOUNDS) | kwargs)
    names = [str(name).replace("$", r"\$") for name in datasets]
    cell = 72 * ax.get_window_extent().width / ax.figure.dpi / len(names)  # in points
    size = min(FONT_SIZE, cell / 3)
    if text_color is not None and size >= SMALLEST:
        for (row, column), value in np.ndenumerate(percent):
            if not np.isnan(value):
                color = DARK if _luminance(image, value) > LIGHT else text_color
                ax.text(
                    column, row, f"{value:.1f}", ha="center", va="center", color=color, size=size
                )
    if colorbar_label is not None:
        bar = ax.figure.colorbar(image, ax=ax, fraction=0.046, pad=0.04)
        bar.outline.set_visible(False)
        bar.set_label(colorbar_label, rotation=-90, va="bottom")
    if title is not None:
        ax.set_title(title)
    is_crowded = len(" ".join(names)) > MOST_LETTERS
    ax.set_xticks(range(len(names)), names, rotation=90 if is_crowded else 0)
    ax.set_yticks(range(len(names)), names)
    ax.tick_params(length=0, labelsize=min(FONT_SIZE, cell))
    ax.set_xlabel("predicted")
    ax.set_ylabel("predicting")
    ax.spines[:].set_visible(False)
    return ax


def _new_axes(figsize: tuple[float, float], dpi: float) -> "Axes":
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise ImportError(
            "plot_consistency needs matplotlib: pip install 'cebra-jax-metrics[plot]'."
        ) from error
    return plt.subplots(figsize=figsize, dpi=dpi, layout="constrained")[1]


def _square(scores: np.ndarray, pairs: Any, ids: Any) -> np.ndarray:
    if scores.ndim != 1:
        raise ValueError(f"Invalid scores dimensions, expect 1D, got {scores.ndim}D.")
    try:
        return Consistency(scores, pairs, ids).matrix
    except (KeyError, TypeError, ValueError):
        raise ValueError(
            "Shape of the scores, datasets and pairs do not match, expected one pair of datasets "
            f"for each score, got scores:{scores.shape}, datasets:{len(ids)} and "
            f"pairs:{len(pairs)}."
        ) from None


def _luminance(image: Any, value: float) -> float:
    red, green, blue, _ = image.cmap(image.norm(value))
    return 0.299 * red + 0.587 * green + 0.114 * blue
