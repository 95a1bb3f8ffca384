"""Consistency between embeddings of the same or of different recordings."""

import contextlib
from collections.abc import Hashable, Sequence
from typing import Any, Literal

import jax
import numpy as np
from jax import Array

from cebra_jax_metrics.alignment import align_embeddings
from cebra_jax_metrics.arrays import as_array, as_numpy, check_dimensions, check_finite
from cebra_jax_metrics.consistency import consistency_matrix


def consistency_score(
    embeddings: Sequence[Any],
    between: Literal["datasets", "runs"] | None = None,
    labels: Sequence[Any] | None = None,
    dataset_ids: Sequence[Hashable] | None = None,
    num_discretization_bins: int = 100,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """R² of the linear regression between every ordered pair of embeddings.

    Between ``"runs"``, row i of all embeddings belongs to the same time step. Between
    ``"datasets"``, embeddings are first aligned on their labels (:func:`align_embeddings`); pairs
    of the same dataset are left out, and scores of the same pair of datasets are averaged.

    Args:
        embeddings: Arrays ``(time, features)`` of any widths, between datasets of any lengths.
        between: ``"runs"`` or ``"datasets"``.
        labels: Between datasets, one array ``(time,)`` per embedding.
        dataset_ids: Between datasets, what each embedding belongs to; each its own by default.
        num_discretization_bins: Number of edges by which float labels are binned.

    Returns:
        Scores ``(pairs,)``, pairs of ids ``(pairs, 2)``, and ids. NumPy arrays and lists are
        computed in float64, JAX arrays in their own dtype.

    Raises:
        ValueError: Too few embeddings or datasets, shapes that do not fit, labels or ids that are
            missing or superfluous, values that are not finite.
        NotImplementedError: ``between`` is unknown, or labels are not one-dimensional.

    Source: CEBRA 0.6.1 ``cebra.integrations.sklearn.metrics.consistency_score``.

    >>> import numpy as np
    >>> rng = np.random.default_rng(0)
    >>> first = rng.normal(size=(100, 3))
    >>> second = first @ rng.normal(size=(3, 3)) + 1
    >>> scores, pairs, ids = consistency_score([first, second], between="runs")
    >>> scores.round(6).tolist(), pairs.tolist(), ids.tolist()
    ([1.0, 1.0], [[0, 1], [1, 0]], [0, 1])
    """
    if len(embeddings) <= 1:
        raise ValueError(
            "Invalid number of embeddings for dataset, expect at least 2 embeddings to be able to "
            f"compare them, got {len(embeddings)}"
        )
    if between is None:
        raise ValueError(
            "Missing between parameter, provide the type of comparison to run, either "
            '"datasets" or "runs".'
        )
    if between not in ("runs", "datasets"):
        raise NotImplementedError(
            f"Invalid comparison, got between={between}, expects either datasets or runs."
        )
    arrays = [as_array(embedding) for embedding in embeddings]
    for array in arrays:
        check_dimensions(array, least=2)
    if between == "runs":
        ids: list[Hashable] = list(range(len(arrays)))
        _check_runs(arrays, labels, dataset_ids)
    else:
        ids = list(range(len(arrays)) if dataset_ids is None else dataset_ids)
        values = _check_datasets(arrays, labels, ids)
        arrays = list(align_embeddings(arrays, values, n_bins=num_discretization_bins))
    for array in arrays:
        check_finite(array, "the embeddings")
    return _pairwise(_matrix(arrays), ids)


def _matrix(arrays: Sequence[Array | np.ndarray]) -> np.ndarray:
    """The matrix of scores, in float64 unless all arrays are JAX's."""
    is_wide = any(isinstance(array, np.ndarray) for array in arrays)
    with jax.enable_x64(True) if is_wide else contextlib.nullcontext():
        dtype = np.float64 if is_wide else np.result_type(np.float32, *(x.dtype for x in arrays))
        return np.asarray(consistency_matrix([array.astype(dtype) for array in arrays]))


def _pairwise(
    matrix: np.ndarray, ids: Sequence[Hashable]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Scores of all ordered pairs of different ids, in the order of their first appearance."""
    scores: dict[tuple[Hashable, Hashable], list[float]] = {}
    for i, source in enumerate(ids):
        for j, target in enumerate(ids):
            if source != target:
                scores.setdefault((source, target), []).append(matrix[i, j])
    average = np.array([np.mean(values) for values in scores.values()])
    unique = _id_array(list(dict.fromkeys(ids)))
    places = {name: place for place, name in enumerate(dict.fromkeys(ids))}
    pairs = unique[[[places[source], places[target]] for source, target in scores]]
    return average, pairs, unique


def _id_array(ids: Sequence[Hashable]) -> np.ndarray:
    """Ids as a plain array where they are all of one plain kind, else as objects."""
    kinds = {type(name) for name in ids}
    if len(kinds) == 1 and issubclass(kinds.pop(), str | int | float | np.generic):
        return np.array(ids)
    array = np.empty(len(ids), object)
    for place, name in enumerate(ids):
        array[place] = name
    return array


def _check_runs(arrays: Sequence[Array | np.ndarray], labels: object, dataset_ids: object) -> None:
    if labels is not None:
        raise ValueError("No labels should be provided for between-runs consistency.")
    if dataset_ids is not None:
        raise ValueError(
            "No dataset ID should be provided for between-runs consistency. All embeddings should "
            "be computed on the same dataset."
        )
    if len({len(array) for array in arrays}) > 1:
        raise ValueError(
            "Invalid embeddings, all embeddings should be the same shape to be compared in a "
            f"between-runs way, got {[len(array) for array in arrays]} rows; for embeddings of "
            "different recordings use between='datasets'."
        )


def _check_datasets(
    arrays: Sequence[Array | np.ndarray], labels: Sequence[Any] | None, ids: Sequence[Hashable]
) -> list[np.ndarray]:
    if labels is None:
        raise ValueError(
            "Missing labels, computing consistency between datasets requires labels, expect a set "
            "of labels for each embedding."
        )
    if len(arrays) != len(labels):
        raise ValueError(
            "Invalid set of labels, computing consistency between datasets requires labels, expect "
            f"one set of labels for each embedding, got {len(arrays)} embeddings and {len(labels)} "
            "set of labels"
        )
    values = [as_numpy(label) for label in labels]
    for label, value in zip(labels, values, strict=True):
        if not value.ndim:
            raise ValueError(
                f"Invalid labels, expect np.array, torch.tensor or list, got {type(label)}."
            )
        if value.ndim > 1:
            raise NotImplementedError(
                f"Invalid label dimensions, expect 1D labels only, got {value.ndim}D."
            )
    if len(set(ids)) <= 1:
        raise ValueError(
            "Invalid number of dataset_ids, expect more than one dataset to perform the "
            f"comparison, got {len(set(ids))}"
        )
    if len(ids) != len(arrays):
        raise ValueError(f"Got {len(arrays)} embeddings, but {len(ids)} dataset_ids.")
    return values
