"""Pictures. matplotlib (``pip install 'cebra-jax-metrics[plot]'``) is imported when drawing."""

from collections.abc import Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any

import numpy as np

from cebra_jax_metrics.arrays import as_numpy
from cebra_jax_metrics.consistency import NullTest
from cebra_jax_metrics.estimation import Estimate
from cebra_jax_metrics.metrics import Consistency, ConsistencyTest, goodness_of_fit_history
from cebra_jax_metrics.metrics.settings import as_checkpoint
from cebra_jax_metrics.model import Checkpoint, Model
from cebra_jax_metrics.nulls import GoodnessOfFitTest
from cebra_jax_metrics.uncertainty import Bootstrap

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LOSS, BITS = "InfoNCE (nats)", "Goodness of fit (bits)"
CHANCE = "grey"
UNSAMPLED = NullTest, ConsistencyTest
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
        ax = _new_axes("plot_consistency", figsize, dpi)
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


def plot_loss(
    model: Any,
    label: str | float | None = None,
    ax: "Axes | None" = None,
    color: str = "magenta",
    linewidth: float = 1,
    x_label: bool = True,
    y_label: bool = True,
    figsize: tuple[float, float] = (7, 4),
    dpi: float = 100,
    **kwargs: Any,
) -> "Axes":
    """The InfoNCE loss at every training step, in nats.

    Args:
        model: A :class:`Checkpoint`, the path of one, or a fitted ``cebra.CEBRA``.
        label: Name of the line in a legend.
        ax: Where to draw; a new figure by default.
        color: Colour of the line.
        linewidth: Its width in points.
        x_label: Whether to label the horizontal axis.
        y_label: Whether to label the vertical axis.
        figsize: Width and height of a new figure in inches.
        dpi: Resolution of a new figure.
        **kwargs: Further arguments of ``matplotlib.axes.Axes.plot``.

    Returns:
        The matplotlib Axes.

    Raises:
        ValueError: The model holds no history, or is a stack of models.
        ImportError: matplotlib is not installed.

    Source: CEBRA 0.6.1 ``cebra.plot_loss``.
    """
    style = {"color": color, "linewidth": linewidth, **kwargs}
    loss = _recorded(model, "total")
    ax = _new_axes("plot_loss", figsize, dpi) if ax is None else ax
    return _history(ax, loss, LOSS, label, (x_label, y_label), style)


def plot_temperature(
    model: Any,
    ax: "Axes | None" = None,
    color: str = "dodgerblue",
    linewidth: float = 1,
    x_label: bool = True,
    y_label: bool = True,
    figsize: tuple[float, float] = (7, 4),
    dpi: float = 100,
    **kwargs: Any,
) -> "Axes":
    """The temperature at every training step; a level line unless it was learned.

    Args:
        model: A :class:`Checkpoint`, the path of one, or a fitted ``cebra.CEBRA``.
        ax: Where to draw; a new figure by default.
        color: Colour of the line.
        linewidth: Its width in points.
        x_label: Whether to label the horizontal axis.
        y_label: Whether to label the vertical axis.
        figsize: Width and height of a new figure in inches.
        dpi: Resolution of a new figure.
        **kwargs: Further arguments of ``matplotlib.axes.Axes.plot``.

    Returns:
        The matplotlib Axes.

    Raises:
        ValueError: The model holds no history, or is a stack of models.
        ImportError: matplotlib is not installed.

    Source: CEBRA 0.6.1 ``cebra.plot_temperature``.
    """
    style = {"color": color, "linewidth": linewidth, **kwargs}
    values = _recorded(model, "temperature")
    ax = _new_axes("plot_temperature", figsize, dpi) if ax is None else ax
    return _history(ax, values, "Temperature", None, (x_label, y_label), style)


def plot_goodness_of_fit(
    model: Any,
    label: str | float | None = None,
    ax: "Axes | None" = None,
    color: str = "black",
    linewidth: float = 1,
    x_label: bool = True,
    y_label: bool = True,
    figsize: tuple[float, float] = (7, 4),
    dpi: float = 100,
    **kwargs: Any,
) -> "Axes":
    """The goodness of fit at every training step, in bits, and the line of chance.

    Args:
        model: A :class:`Checkpoint`, the path of one, or a fitted ``cebra.CEBRA``.
        label: Name of the line in a legend.
        ax: Where to draw; a new figure by default.
        color: Colour of the line.
        linewidth: Its width in points.
        x_label: Whether to label the horizontal axis.
        y_label: Whether to label the vertical axis.
        figsize: Width and height of a new figure in inches.
        dpi: Resolution of a new figure.
        **kwargs: Further arguments of ``matplotlib.axes.Axes.plot``.

    Returns:
        The matplotlib Axes.

    Raises:
        ValueError: The model holds no history, is a stack of models, or was trained without a
            batch size.
        ImportError: matplotlib is not installed.

    Source: :func:`goodness_of_fit_history`.
    """
    style = {"color": color, "linewidth": linewidth, **kwargs}
    checkpoint = _with_history(model)
    _recorded(checkpoint, "total")
    bits = goodness_of_fit_history(checkpoint)
    ax = _new_axes("plot_goodness_of_fit", figsize, dpi) if ax is None else ax
    _history(ax, bits, BITS, label, (x_label, y_label), style)
    ax.axhline(0, color=CHANCE, linestyle="--", linewidth=1)
    ax.annotate(
        "chance",
        xy=(1, 0),
        xycoords=("axes fraction", "data"),
        xytext=(-4, 3),
        textcoords="offset points",
        ha="right",
        color=CHANCE,
    )
    return ax


def compare_models(
    models: Sequence[Any],
    labels: Sequence[str] | None = None,
    ax: "Axes | None" = None,
    color: str | None = None,
    cmap: str = "viridis",
    linewidth: float = 1,
    x_label: bool = True,
    y_label: bool = True,
    figsize: tuple[float, float] = (7, 4),
    dpi: float = 100,
    **kwargs: Any,
) -> "Axes":
    """The losses of several models at every training step, in nats.

    Args:
        models: Each a :class:`Checkpoint`, the path of one, or a fitted ``cebra.CEBRA``.
        labels: Their names in the legend; without any there is none.
        ax: Where to draw; a new figure by default.
        color: One colour for all.
        cmap: Colour map that the colours are taken from otherwise.
        linewidth: Width of the lines in points.
        x_label: Whether to label the horizontal axis.
        y_label: Whether to label the vertical axis.
        figsize: Width and height of a new figure in inches.
        dpi: Resolution of a new figure.
        **kwargs: Further arguments of ``matplotlib.axes.Axes.plot``.

    Returns:
        The matplotlib Axes.

    Raises:
        ValueError: There are no models, not as many labels, or a model holds no history or is a
            stack of them.
        ImportError: matplotlib is not installed.

    Source: CEBRA 0.6.1 ``cebra.compare_models``.
    """
    if not isinstance(models, list | tuple) or not models:
        raise ValueError(f"Invalid list of models, expected at least one, got {models!r}.")
    if isinstance(labels, str):
        raise ValueError(f"Invalid labels, expected a list of them, got {labels!r}.")
    if labels is not None and len(labels) != len(models):
        raise ValueError(
            f"Invalid labels, expected one for each of {len(models)} models, got {len(labels)}."
        )
    losses = [_recorded(model, "total") for model in models]
    # The light end of a map is hardly seen on white.
    palette = _import("compare_models", "matplotlib").colormaps.get_cmap(cmap)
    shades = palette(np.linspace(0, 0.85, len(models)))
    colors = shades if color is None else [color] * len(models)
    ax = _new_axes("compare_models", figsize, dpi) if ax is None else ax
    names: Sequence[str | None] = labels or [None] * len(models)
    for loss, name, one in zip(losses, names, colors, strict=True):
        style = {"color": one, "linewidth": linewidth, **kwargs}
        _history(ax, loss, LOSS, name, (x_label, y_label), style)
    return ax


def plot_embedding(
    embedding: Any,
    embedding_labels: Any = "grey",
    ax: "Axes | None" = None,
    idx_order: Sequence[int] | None = None,
    markersize: float = 1,
    alpha: float = 0.4,
    cmap: str = "cool",
    title: str | None = "Embedding",
    figsize: tuple[float, float] = (5, 5),
    dpi: float = 100,
    *,
    colorbar_label: str | None = None,
    **kwargs: Any,
) -> "Axes":
    """An embedding in two or three dimensions, coloured by a label.

    Args:
        embedding: ``(time, features)``.
        embedding_labels: A colour, ``"time"`` for the time step, or numbers ``(time,)``.
        ax: Where to draw; a new figure by default. Three dimensions take axes of
            ``projection="3d"``.
        idx_order: Two or three features to draw; by default the first three, or both of two.
        markersize: Area of the points, in points squared.
        alpha: Their opacity.
        cmap: Colour map of labels.
        title: Title of the plot.
        figsize: Width and height of a new figure in inches.
        dpi: Resolution of a new figure.
        colorbar_label: Draw a bar of the label's colours, and call it so.
        **kwargs: Further arguments of ``matplotlib.axes.Axes.scatter``.

    Returns:
        The matplotlib Axes.

    Raises:
        ValueError: The embedding has fewer than two features; ``idx_order`` names others than two
            or three of them; labels are no colour and not one number for each time step; or
            ``ax`` has not as many dimensions.
        ImportError: matplotlib is not installed.

    Source: CEBRA 0.6.1 ``cebra.plot_embedding``.
    """
    embedding = as_numpy(embedding)
    if embedding.ndim != 2 or embedding.shape[1] < 2:
        raise ValueError(
            "Invalid embedding dimension, expects (time, features) of at least 2 features, got "
            f"{embedding.shape}."
        )
    width = embedding.shape[1]
    order = list(range(min(width, 3))) if idx_order is None else list(idx_order)
    if len(order) not in (2, 3) or not all(i in range(width) for i in order):
        raise ValueError(
            f"Invalid idx_order, expects 2 or 3 of the features 0 to {width - 1}, got {idx_order}."
        )
    is_solid = len(order) == 3
    colors = _colors(embedding_labels, len(embedding))
    if ax is None:
        ax = _new_axes("plot_embedding", figsize, dpi, "3d" if is_solid else None)
    elif is_solid != (ax.name == "3d"):
        raise ValueError(
            f"{len(order)} features take axes of {len(order)} dimensions: make them with "
            f"projection={'3d' if is_solid else None!r}, or choose features (idx_order)."
        )
    if not isinstance(colors, str):
        kwargs = {"cmap": cmap, **kwargs}
    points = ax.scatter(
        *embedding[:, order].T,
        c=colors,
        s=markersize,  # type: ignore[misc]  # the third argument of 3-D axes is an array
        alpha=alpha,
        **kwargs,
    )
    locator = _import("plot_embedding", "matplotlib.ticker").MaxNLocator
    ax.set_aspect("equal")
    for axis, feature in zip("xyz", order, strict=False):
        getattr(ax, f"set_{axis}label")(f"feature {feature}")
        getattr(ax, f"{axis}axis").set_major_locator(locator(5))
    if title is not None:
        ax.set_title(title)
    if colorbar_label is not None and not isinstance(colors, str):
        pad = 0.12 if is_solid else 0.04
        bar = ax.figure.colorbar(points, ax=ax, label=colorbar_label, fraction=0.046, pad=pad)
        bar.solids.set(alpha=1)  # type: ignore[union-attr]
    return ax


def plot_distribution(
    result: Any,
    ax: "Axes | None" = None,
    bins: int | str = "auto",
    color: str = "lightgrey",
    figsize: tuple[float, float] = (7, 4),
    dpi: float = 100,
    **kwargs: Any,
) -> "Axes":
    """What a score was made of: batches, resampled recordings, or the null it is held against.

    Args:
        result: An :class:`Estimate`, of which the goodness of fit of every batch is drawn, with
            its mean and the standard error of that; a :class:`Bootstrap` of a goodness of fit, of
            which the resampled scores are; or a :class:`GoodnessOfFitTest`, of which the null is,
            each with the observed score.
        ax: Where to draw; a new figure by default.
        bins: Of the histogram, as ``matplotlib.axes.Axes.hist`` takes them.
        color: Colour of the histogram.
        figsize: Width and height of a new figure in inches.
        dpi: Resolution of a new figure.
        **kwargs: Further arguments of ``matplotlib.axes.Axes.hist``.

    Returns:
        The matplotlib Axes.

    Raises:
        TypeError: The result is of another kind; those of :func:`consistency_test` keep no samples.
        ValueError: Values are not finite, or those of several estimates.
        ImportError: matplotlib is not installed.
    """
    if isinstance(result, Estimate):
        if np.ndim(result.per_batch) != 1:
            raise ValueError(
                f"Expected one estimate (num_batches,), got several {np.shape(result.per_batch)}: "
                "choose one, jax.tree.map(lambda x: x[i], estimates)."
            )
        values, line = np.asarray(result.per_batch_bits), float(result.bits)
        error = "" if len(values) == 1 else f" ± {float(result.bits_stderr):.4f}"
        name, of_what = f"mean {line:.4f}{error} bits", "batches"
    elif isinstance(result, Bootstrap) and np.ndim(result.samples) == 1:
        values, line = np.asarray(result.samples), float(result.observed)
        name = f"observed {line:.4f} ± {float(result.stderr):.4f} bits"
        of_what = "resampled recordings"
    elif isinstance(result, GoodnessOfFitTest):
        values, line = np.asarray(result.null), result.observed
        name, of_what = f"observed {line:.4f} bits, p = {result.p_value:.3g}", "null samples"
    else:
        kept = ", which keeps no samples of its null" * isinstance(result, UNSAMPLED)
        raise TypeError(
            "Expected an Estimate, a GoodnessOfFitTest or a Bootstrap of a goodness of fit, got "
            f"{type(result).__name__}{kept}."
        )
    if not np.isfinite(line) or not np.isfinite(values).all():
        raise ValueError("Expected finite values, got NaN or infinity: look for them in the model.")
    ax = _new_axes("plot_distribution", figsize, dpi) if ax is None else ax
    counts, _, _ = ax.hist(values, bins=bins, **{"color": color, "edgecolor": "white", **kwargs})
    ax.axvline(line, ymax=0.8, color="black", linewidth=1.5, label=name)
    ax.set_ylim(top=1.25 * np.max(counts))  # the legend stands above the line
    ax.legend(loc="upper left", frameon=False)
    ax.set_xlabel(BITS)
    ax.set_ylabel(f"{of_what} ({len(values)} in all)")
    _without_frame(ax)
    return ax


def _with_history(model: Any) -> Checkpoint:
    if isinstance(model, Model):
        raise TypeError("A bare Model has no training history: pass the Checkpoint it came in.")
    return as_checkpoint(model)


def _recorded(model: Any, name: str) -> np.ndarray:
    """What the history of a model holds, at every step."""
    history = _with_history(model).history
    values = np.asarray(history.get(name, ()))
    if not values.size:
        raise ValueError(
            f"The checkpoint holds no training history of {name!r}, only of {sorted(history)}."
        )
    if values.ndim != 1:
        raise ValueError(
            f"Expected the history of one model (steps,), got that of a stack {values.shape}: pass "
            "a Checkpoint of one of them, with its own row of the history."
        )
    return values


def _history(
    ax: "Axes",
    values: np.ndarray,
    what: str,
    label: str | float | None,
    is_labelled: tuple[bool, bool],
    style: dict[str, Any],
) -> "Axes":
    """A line over training steps, which are counted from 1."""
    ax.plot(np.arange(1, len(values) + 1), values, label=label, **style)
    if label is not None:
        ax.legend(frameon=False)
    if is_labelled[0]:
        ax.set_xlabel("Training step")
    if is_labelled[1]:
        ax.set_ylabel(what)
    _without_frame(ax)
    return ax


def _colors(labels: Any, length: int) -> Any:
    """One colour, or a number for each time step."""
    if labels is None:
        return "grey"
    if isinstance(labels, str) and labels == "time":
        return np.arange(length)
    colors = _import("plot_embedding", "matplotlib.colors")
    if isinstance(labels, str) and colors.is_color_like(labels):
        return labels
    numbers = None if isinstance(labels, str) else as_numpy(labels)
    if numbers is not None and numbers.size == length and numbers.dtype.kind in "biuf":
        return numbers.reshape(length)
    got = repr(labels) if numbers is None else f"{numbers.dtype} of shape {numbers.shape}"
    raise ValueError(
        "Invalid embedding labels: expected a colour, 'time', or one number for each of "
        f"{length} time steps, got {got}."
    )


def _without_frame(ax: "Axes") -> None:
    ax.spines[["top", "right"]].set_visible(False)


def _import(function: str, name: str) -> Any:
    try:
        return import_module(name)
    except ImportError as error:
        raise ImportError(
            f"{function} needs matplotlib: pip install 'cebra-jax-metrics[plot]'."
        ) from error


def _new_axes(
    function: str, figsize: tuple[float, float], dpi: float, projection: str | None = None
) -> "Axes":
    plt = _import(function, "matplotlib.pyplot")
    figure = plt.figure(figsize=figsize, dpi=dpi, layout="constrained")
    return figure.add_subplot(projection=projection)


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
