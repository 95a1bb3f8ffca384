"""Embeddings of different recordings onto shared label bins, so that their rows correspond.

Labels are digitised on the host; the means over bins are segment sums, pure and jitted.
"""

import contextlib
import itertools
import warnings
from collections.abc import Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from cebra_jax_metrics.arrays import as_array, as_integer, as_numpy, check_dimensions, unit_rows

REACH = 2  # an empty bin takes the steps of the bins within 1 of it, then within 2


@partial(jax.jit, static_argnames=("num_bins", "reach"))
def bin_means(
    embedding: Array, bins: Array, valid: Array, *, num_bins: int, reach: int = REACH
) -> tuple[Array, Array]:
    """Mean embedding of every bin, an empty one taking the nearest bins within ``reach``.

    Args:
        embedding: ``(time, features)``, possibly padded.
        bins: Integers ``(time,)``: bin of every time step; those outside ``[0, num_bins)`` are
            left out.
        valid: Booleans ``(time,)``: which time steps count.
        num_bins: Number of bins.
        reach: How far an empty bin may reach.

    Returns:
        Means ``(num_bins, features)`` and which of them are filled ``(num_bins,)``; rows that are
        not hold NaN.
    """
    clean = jnp.where(valid[:, None], embedding, jnp.zeros((), embedding.dtype))
    places = jnp.where(valid & (bins >= 0) & (bins < num_bins), bins, num_bins)
    sums = jax.ops.segment_sum(clean, places, num_bins + 1)[:num_bins]
    counts = jax.ops.segment_sum(valid.astype(embedding.dtype), places, num_bins + 1)[:num_bins]
    total, number = sums, counts
    for distance in range(1, reach + 1):
        is_empty = number == 0
        wide_sums, wide_counts = (_window_sum(x, distance) for x in (sums, counts[:, None]))
        total = jnp.where(is_empty[:, None], wide_sums, total)
        number = jnp.where(is_empty, wide_counts[:, 0], number)
    filled = number > 0
    mean = total / jnp.where(filled, number, jnp.ones_like(number))[:, None]
    return jnp.where(filled[:, None], mean, jnp.nan), filled


def _window_sum(x: Array, distance: int) -> Array:
    """Sum over the rows within ``distance`` of each."""
    padded = jnp.pad(x, ((distance, distance), (0, 0)))
    return sum(padded[i : i + len(x)] for i in range(2 * distance + 1))  # type: ignore[return-value]


def align_embeddings(
    embeddings: Sequence[Any],
    labels: Sequence[Any],
    normalize: bool = True,
    n_bins: int = 100,
    *,
    on_missing: Literal["raise", "drop"] = "raise",
) -> list[np.ndarray]:
    """Align embeddings on their labels: one row per bin or value of the labels, for all alike.

    With float labels, the range of all labels is cut by ``n_bins`` edges; row b is the mean of the
    steps whose label lies in bin b or, if there is none, in the bins within 1 or 2 of it. With
    integer labels there is one row per value. Time steps with NaN in the embedding are left out.

    Args:
        embeddings: Arrays ``(time, features)``; lengths and widths may differ.
        labels: Arrays ``(time,)``, one per embedding, all of floats or all of integers.
        normalize: Divide every row by its norm.
        n_bins: Number of edges for float labels, giving ``n_bins - 1`` rows.
        on_missing: What to do with integer values that not all embeddings have: ``"raise"``, or
            ``"drop"`` them with a warning that lists them.

    Returns:
        Arrays ``(rows, features)``, in the dtype of the embeddings.

    Raises:
        ValueError: Lengths do not match, labels are not finite numbers, a bin has no steps near it,
            a mean to be normalised is 0, or an integer value is missing from one of the embeddings.

    Source: CEBRA 0.6.1 ``cebra.integrations.sklearn.helpers.align_embeddings`` (which bins integers
    like floats, and loses those of the largest value).
    """
    n_bins = as_integer("n_bins", n_bins, at_least=-(2**31))
    if n_bins < 1:
        raise ValueError(
            f"Invalid value for n_bins, expect a value at least equals to 1, got {n_bins}."
        )
    arrays = [as_array(embedding) for embedding in embeddings]
    values = [_label_array(label) for label in labels]
    if len(arrays) != len(values):
        raise ValueError(f"Got {len(arrays)} embeddings, but labels for {len(values)}.")
    for array, value in zip(arrays, values, strict=True):
        if array.ndim != 2 or not array.shape[1]:
            raise ValueError(f"Embeddings have to be (time, features), got shape {array.shape}.")
        check_dimensions(array, least=2)
        if len(array) != len(value):
            raise ValueError(
                "Labels invalid, the labels associated to an embedding should contain the same "
                f"number of samples as its embedding, got {len(array)} samples in embedding and "
                f"{len(value)} samples in label."
            )
    bins = label_bins(values, n_bins, on_missing)
    aligned = [_aligned(array, bins, i) for i, array in enumerate(arrays)]
    if not normalize:
        return aligned
    for number, rows in enumerate(aligned):
        if not rows.any(axis=1).all():
            empty = int(np.argmin(rows.any(axis=1)))
            raise ValueError(
                f"The mean of embedding {number} in bin {empty + bins.margin} (labels "
                f"{bins.names[empty]}) is 0 and cannot be normalised: use fewer bins, or pass "
                "normalize=False."
            )
    return [unit_rows(rows) for rows in aligned]


def _label_array(label: Any) -> np.ndarray:
    """Labels ``(time,)`` of finite numbers, never the caller's own array changed."""
    value = as_numpy(label)
    if value.dtype.kind not in "iufb":
        raise ValueError(f"Invalid labels dtype, expect floats or integers, got {_kind_of(value)}.")
    if value.ndim != 1:
        raise ValueError(f"Invalid label dimensions, expect 1D labels only, got {value.ndim}D.")
    if not np.isfinite(value).all():
        raise ValueError("Labels contain NaN or infinity; drop these time steps.")
    return value


def _kind_of(value: np.ndarray) -> str:
    return "string" if value.dtype.kind in "US" else str(value.dtype)


class Bins(NamedTuple):
    """Bins shared by the labels of several recordings.

    Attributes:
        places: Bin of every time step, per recording; -1 for those of no bin.
        number: Number of bins.
        margin: Number of bins at either end that become no row.
        reach: How far an empty bin may reach.
        names: What the labels of every row are.
    """

    places: list[np.ndarray]
    number: int
    margin: int
    reach: int
    names: list[str]


def label_bins(
    labels: Sequence[np.ndarray], n_bins: int, on_missing: Literal["raise", "drop"] = "raise"
) -> Bins:
    """Bins shared by the labels of several recordings: of integers by value, else by range."""
    if all(label.dtype.kind in "iu" for label in labels):
        return _bins_of_values(labels, on_missing)
    return _bins_of_range(labels, n_bins)


def _bins_of_range(values: Sequence[np.ndarray], n_bins: int) -> Bins:
    """Bins between edges that are spread evenly over the range of all labels.

    The labels at the upper limit have a bin of their own, which becomes no row: only an empty bin
    near it takes its steps.
    """
    values = [v.astype(np.float32) if v.dtype.itemsize < 4 else v for v in values]
    low, high = min(v.min() for v in values), max(v.max() for v in values)
    edges = np.linspace(low, high, n_bins)
    places = [np.digitize(value, edges) for value in values]
    names = [f"{a:g} to {b:g}" for a, b in itertools.pairwise(edges)]
    return Bins(places, n_bins + 1, 1, REACH, names)


def _bins_of_values(values: Sequence[np.ndarray], on_missing: str) -> Bins:
    """A bin for every integer value that all labels have."""
    if on_missing not in ("raise", "drop"):
        raise ValueError(f"on_missing has to be 'raise' or 'drop', got {on_missing!r}.")
    occurring = [np.unique(value) for value in values]
    everywhere = occurring[0]
    for other in occurring[1:]:
        everywhere = np.intersect1d(everywhere, other)
    somewhere = np.unique(np.concatenate(occurring))
    missing = np.setdiff1d(somewhere, everywhere).tolist()
    if missing and on_missing == "raise":
        raise ValueError(
            f"Not all embeddings have the label values {missing}: leave their time steps out, or "
            "pass on_missing='drop'."
        )
    if not everywhere.size:
        raise ValueError("The labels of the embeddings have no value in common.")
    if missing:
        warnings.warn(f"Dropped label values that not all have: {missing}.", stacklevel=4)
    places = []
    for value in values:
        place = np.minimum(np.searchsorted(everywhere, value), len(everywhere) - 1)
        places.append(np.where(everywhere[place] == value, place, -1))
    return Bins(places, len(everywhere), 0, 0, [str(x) for x in everywhere])


def _aligned(embedding: Array | np.ndarray, bins: Bins, number: int) -> np.ndarray:
    """Rows of one embedding; float64 NumPy arrays are averaged in float64."""
    is_wide = isinstance(embedding, np.ndarray) and embedding.dtype == np.float64
    with jax.enable_x64(True) if is_wide else contextlib.nullcontext():
        embedding = jnp.asarray(embedding)
        if not jnp.issubdtype(embedding.dtype, jnp.floating):
            embedding = embedding.astype(jnp.float32)
        valid = ~jnp.isnan(embedding).any(axis=1)
        places = jnp.asarray(bins.places[number], jnp.int32)
        means, filled = bin_means(embedding, places, valid, num_bins=bins.number, reach=bins.reach)
        inner = slice(bins.margin, bins.number - bins.margin)
        rows, is_filled = np.asarray(means)[inner], np.asarray(filled)[inner]
    if not is_filled.all():
        empty = int(np.argmin(is_filled))
        raise ValueError(
            "Digitalized labels does not have elements close enough to bin index "
            f"{empty + bins.margin} (labels {bins.names[empty]}) in embedding {number}: "
            "use fewer bins, or leave out the recordings that do not cover these labels."
        )
    return rows
