"""Consistency between embeddings of the same or of different recordings, its null, its spread."""

import contextlib
from collections.abc import Hashable, Iterator, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh
from jax.typing import ArrayLike

from cebra_jax_metrics.alignment import align_embeddings, label_bins
from cebra_jax_metrics.arrays import (
    as_array,
    as_integer,
    as_key,
    as_numpy,
    check_dimensions,
    check_finite,
)
from cebra_jax_metrics.consistency import (
    NullTest,
    against_null,
    consistency_matrix,
    relabelled_consistency,
    resampled_consistency,
    shift_test,
)
from cebra_jax_metrics.uncertainty import Bootstrap, optimal_block_length, resampled_places

Between = Literal["datasets", "runs"]
NULL_QUANTILES = (0.05, 0.5, 0.95)
# A resampled recording lacks a third of its steps: rather than none, a bin takes the nearest within
# so many times the distance that it may reach in the whole recording.
FARTHER = 5


class Consistency(NamedTuple):
    """Scores of all ordered pairs, and their ids: the triple that CEBRA returns.

    Attributes:
        scores: R² ``(pairs,)``.
        pairs: Ids ``(pairs, 2)``: of the predicting embedding, and of the predicted one.
        ids: Every id once.
    """

    scores: np.ndarray
    pairs: np.ndarray
    ids: np.ndarray

    @property
    def matrix(self) -> np.ndarray:
        """The scores as a square ``(ids, ids)``, row predicts column; NaN on the diagonal."""
        places = {name: place for place, name in enumerate(self.ids)}
        square = np.full((len(places), len(places)), np.nan)
        for (source, target), score in zip(self.pairs, self.scores, strict=True):
            square[places[source], places[target]] = score
        return square


class ConsistencyTest(NamedTuple):
    """Consistency scores against their null distribution.

    Attributes:
        pairs: Ids ``(pairs, 2)``: of the predicting embedding, and of the predicted one.
        ids: Every id once.
        pairwise: The test of every pair, arrays ``(pairs,)``.
        overall: The test of the mean over all pairs.
    """

    pairs: np.ndarray
    ids: np.ndarray
    pairwise: NullTest
    overall: NullTest


def consistency_score(
    embeddings: Sequence[Any],
    between: Between | None = None,
    labels: Sequence[Any] | None = None,
    dataset_ids: Sequence[Hashable] | None = None,
    num_discretization_bins: int = 100,
    *,
    cv: int | None = None,
    mesh: Mesh | None = None,
    axis_name: str | None = None,
) -> Consistency:
    """R² of the linear regression between every ordered pair of embeddings.

    Between ``"runs"``, row i of all embeddings belongs to the same time step. Between
    ``"datasets"``, embeddings are first aligned on their labels (:func:`align_embeddings`); pairs
    of the same dataset are left out, and scores of the same pair of datasets are averaged.

    R² of the rows that were fitted grows with the number of features, whether or not the
    embeddings have anything in common; ``cv`` scores rows that were not fitted.

    Args:
        embeddings: Arrays ``(time, features)`` of any widths, between datasets of any lengths.
        between: ``"runs"`` or ``"datasets"``.
        labels: Between datasets, one array ``(time,)`` per embedding.
        dataset_ids: Between datasets, what each embedding belongs to; each its own by default.
        num_discretization_bins: Number of edges by which float labels are binned.
        cv: Number of folds of neighbouring time steps or bins, each predicted by the fit to all
            others (:func:`consistency_matrix`); ``None`` is CEBRA's score.
        mesh: Devices to spread the rows over (:func:`spread`).
        axis_name: The axis of the mesh, where it has several.

    Returns:
        The triple of scores ``(pairs,)``, pairs of ids ``(pairs, 2)``, and ids; ``.matrix`` is
        the same as a square. All is computed in float64 (JAX arrays on a TPU in their own dtype);
        scores of JAX arrays come in their dtype. Constant columns count as in scikit-learn's
        ``r2_score``: 1, or 0 where their mean, rounded, is another number.

    Raises:
        ValueError: Too few embeddings or datasets, shapes that do not fit, labels or ids that are
            missing or superfluous, values that are not finite, more folds than rows.
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
    arrays, values, ids = _checked(embeddings, between, labels, dataset_ids)
    cv = None if cv is None else as_integer("cv", cv, at_least=2)
    out = _own_dtype(arrays)
    with _precision(arrays) as dtype:
        if values is not None:
            arrays = list(align_embeddings(arrays, values, n_bins=num_discretization_bins))
        for array in arrays:
            check_finite(array, "the embeddings")
        runs: list[Any] = [x.astype(dtype, copy=False) for x in arrays]
        matrix = np.asarray(consistency_matrix(runs, cv=cv, mesh=mesh, axis_name=axis_name))
    if cv is None:
        matrix = matrix - np.array([_share_of_rounded_columns(x) for x in arrays], dtype)
    return Consistency(*_by_pair(matrix.astype(out), ids))


def consistency_test(
    key: ArrayLike,
    embeddings: Sequence[Any],
    between: Between | None = None,
    labels: Sequence[Any] | None = None,
    dataset_ids: Sequence[Hashable] | None = None,
    num_discretization_bins: int = 100,
    *,
    null: Literal["shift", "permutation"] = "shift",
    num_samples: int = 1000,
    min_shift: int = 1,
    quantiles: Sequence[float] = NULL_QUANTILES,
    mesh: Mesh | None = None,
    axis_name: str | None = None,
) -> ConsistencyTest:
    """Test whether embeddings are more consistent than chance.

    Between runs, chance is what remains after one embedding is shifted circularly in time against
    the other. *All* shifts are scored, so that nothing is drawn. Each pair has its own null
    distribution; for the mean over pairs, embedding m is shifted by m times the shift.

    Between datasets, labels are shifted circularly in time or permuted before alignment. For a
    pair, once those of the predicting and once those of the predicted dataset, and what is reported
    is the one with the larger p-value: a pair is consistent only if both embeddings are related to
    their labels. For the mean over pairs, the labels of all datasets are shifted, each on its own:
    its null hypothesis is that none is related to its labels. Permuted labels lose their course in
    time: where labels and embeddings change slowly, the p-values are then too small.

    Args:
        key: PRNG key; the same key gives the same result. Between runs it is not used.
        embeddings: As in :func:`consistency_score`.
        between: ``"runs"`` or ``"datasets"``.
        labels: As in :func:`consistency_score`.
        dataset_ids: As in :func:`consistency_score`.
        num_discretization_bins: As in :func:`consistency_score`.
        null: ``"shift"``, or between datasets also ``"permutation"``.
        num_samples: Between datasets, number of draws from the null distribution.
        min_shift: The smallest shift, either way, that belongs to the null distribution (of the
            mean over pairs: the smallest between neighbours in the list). With 1,
            all but the unshifted, the test is exact for stationary series. A larger one leaves
            out shifts that resemble the data, and so rejects too often in short recordings (500
            steps of AR(1) series with coefficient 0.95 are short).
        quantiles: Levels of the null quantiles to return.
        mesh: Devices to spread the pairs of runs, or the samples over (:func:`spread`).
        axis_name: The axis of the mesh, where it has several.

    Returns:
        Per pair, and for the mean over pairs: the observed score, mean and quantiles under the
        null, the effect, and the p-value, at least ``1 / (1 + number of shifts or samples)``.

    Raises:
        ValueError: As :func:`consistency_score`; or a shift, a level or ``null`` out of range.
        TypeError: ``key`` is no PRNG key.
        NotImplementedError: As :func:`consistency_score`.

    Source: this library; for the +1, Davison & Hinkley, *Bootstrap Methods and their Application*
    (1997), section 4.2.

    >>> import jax, numpy as np
    >>> rng = np.random.default_rng(0)
    >>> first = rng.normal(size=(500, 3)).cumsum(axis=0)
    >>> second = first @ rng.normal(size=(3, 4)) + rng.normal(size=(500, 4))
    >>> test = consistency_test(jax.random.key(0), [first, second], between="runs")
    >>> test.pairs.tolist(), test.pairwise.p_value.tolist()
    ([[0, 1], [1, 0]], [0.002, 0.002])
    """
    key = as_key(key)
    arrays, values, ids = _checked(embeddings, between, labels, dataset_ids)
    num_samples = as_integer("num_samples", num_samples, at_least=1)
    min_shift = as_integer("min_shift", min_shift, at_least=1)
    levels = _checked_levels(quantiles)
    if null not in ("shift", "permutation"):
        raise ValueError(f"null has to be 'shift' or 'permutation', got {null!r}.")
    if values is None:
        if null != "shift":
            raise ValueError(
                "Between runs the null distribution is that of all shifts, null='shift': permuted "
                "time steps lose their course in time, and any two slow series seem consistent."
            )
        _check_shift(min_shift, len(arrays[0]))
        with _precision(arrays) as dtype:
            for array in arrays:
                check_finite(array, "the embeddings")
            runs = [jnp.asarray(x, dtype) for x in arrays]
            each, overall = shift_test(
                runs,
                jnp.asarray(levels, dtype),
                min_shift=min_shift,
                mesh=mesh,
                axis_name=axis_name,
            )
            _, pairs, unique = _by_pair(np.zeros((len(ids), len(ids))), ids)
            return _test_result(pairs, unique, each, overall, arrays)

    with _precision(arrays) as dtype:
        aligned = align_embeddings(arrays, values, n_bins=num_discretization_bins)
        for rows in aligned:
            check_finite(rows, "the embeddings")
        bins = label_bins(values, num_discretization_bins)
        valid = [~np.isnan(np.asarray(x)).any(axis=1) for x in arrays]
        if null == "shift":
            for is_valid in valid:
                _check_shift(min_shift, int(is_valid.sum()))
        samples = relabelled_consistency(
            jax.random.split(key, num_samples),
            [jnp.asarray(x[keep], dtype) for x, keep in zip(arrays, valid, strict=True)],
            [jnp.asarray(x[keep]) for x, keep in zip(bins.places, valid, strict=True)],
            num_bins=bins.number,
            margin=bins.margin,
            reach=bins.reach,
            permute=null == "permutation",
            min_shift=min_shift,
            mesh=mesh,
            axis_name=axis_name,
        )
        observed = consistency_matrix([jnp.asarray(x, dtype) for x in aligned])
        scores, pairs, unique = _by_pair(np.asarray(observed), ids)
        null_scores = [_by_pair(np.asarray(matrices), ids)[0] for matrices in samples]
        of_target, of_source = (against_null(scores, x, levels) for x in null_scores[:2])
        is_target = of_target.p_value >= of_source.p_value
        each = jax.tree.map(partial(jnp.where, is_target), of_target, of_source)
        overall = against_null(scores.mean(), null_scores[2].mean(axis=1), levels)
        return _test_result(pairs, unique, each, overall, arrays)


def bootstrap_consistency(
    key: ArrayLike,
    embeddings: Sequence[Any],
    between: Between | None = None,
    labels: Sequence[Any] | None = None,
    dataset_ids: Sequence[Hashable] | None = None,
    num_discretization_bins: int = 100,
    *,
    num_resamples: int = 200,
    block_length: int | None = None,
    mesh: Mesh | None = None,
    axis_name: str | None = None,
) -> Bootstrap:
    """What consistency scores would be on other recordings like these, the encoders being fixed.

    A circular block bootstrap over time. Between runs the same time steps are taken of all
    embeddings, between datasets those of each dataset are resampled on their own, with their
    labels, and aligned anew in the bins of the whole. Means of bins are noisier in resampled
    recordings, so that between datasets standard errors are on the large side.

    Args:
        key: A JAX PRNG key.
        embeddings: As in :func:`consistency_score`.
        between: As in :func:`consistency_score`.
        labels: As in :func:`consistency_score`.
        dataset_ids: As in :func:`consistency_score`.
        num_discretization_bins: As in :func:`consistency_score`.
        num_resamples: Number of resampled recordings.
        block_length: Steps kept together; by default chosen from the autocorrelation of the
            embeddings (:func:`optimal_block_length`), the longest of all.
        mesh: Devices to spread the resampled recordings over (:func:`spread`).
        axis_name: The axis of the mesh, where it has several.

    Returns:
        Scores of the pairs of :func:`consistency_score`, observed ``(pairs,)`` and resampled
        ``(num_resamples, pairs)``, with their standard errors and intervals.

    Raises:
        ValueError: As :func:`consistency_score`; a recording is shorter than two blocks; or in a
            resampled recording a label or bin is missing.
        TypeError: ``key`` is no PRNG key.
        NotImplementedError: As :func:`consistency_score`.

    Source: as :func:`bootstrap_goodness_of_fit`.

    >>> import jax, numpy as np
    >>> rng = np.random.default_rng(0)
    >>> first = rng.normal(size=(500, 2))
    >>> second = first + rng.normal(size=(500, 2))
    >>> result = bootstrap_consistency(jax.random.key(0), [first, second], between="runs")
    >>> result.stderr.round(2).tolist()
    [0.02, 0.02]
    """
    key = as_key(key)
    num_resamples = as_integer("num_resamples", num_resamples, at_least=2)
    bins = num_discretization_bins
    observed = consistency_score(embeddings, between, labels, dataset_ids, bins).scores
    arrays, values, ids = _checked(embeddings, between, labels, dataset_ids)
    valid = [~np.isnan(np.asarray(x)).any(axis=1) for x in arrays]
    for name in set(ids) if values is not None else ():
        members = [number for number, other in enumerate(ids) if other == name]
        if len({len(valid[number]) for number in members}) == 1:  # the same steps of all
            common = np.all([valid[number] for number in members], axis=0)
            for number in members:
                valid[number] = common
    if block_length is None:
        longest = max(
            optimal_block_length(np.asarray(x)[keep]) for x, keep in zip(arrays, valid, strict=True)
        )
        block_length = min(longest, min(int(keep.sum()) for keep in valid) // 2)
    # Embeddings of one recording have its steps in common.
    names = list(dict.fromkeys(ids))
    own = [key] * len(names) if values is None else jax.random.split(key, len(names))
    keys = dict(zip(names, own, strict=True))
    steps = [
        resampled_places(keys[name], int(keep.sum()), block_length, num_resamples)
        for name, keep in zip(ids, valid, strict=True)
    ]
    with _precision(arrays) as dtype:
        rows = [jnp.asarray(x[keep], dtype) for x, keep in zip(arrays, valid, strict=True)]
        over: dict[str, Any] = {"mesh": mesh, "axis_name": axis_name}
        if values is None:
            matrices = resampled_consistency(steps, rows, **over)
        else:
            found = label_bins(values, bins)
            sizes: dict[str, Any] = {
                "num_bins": found.number,
                "margin": found.margin,
                "reach": FARTHER * found.reach,
            }
            places = [jnp.asarray(x[keep]) for x, keep in zip(found.places, valid, strict=True)]
            matrices = resampled_consistency(steps, rows, places, **sizes, **over)
        samples = _by_pair(np.asarray(matrices), ids)[0]
    lacking = int(np.isnan(samples).any(axis=1).sum())
    if lacking:
        raise ValueError(
            f"In {lacking} of {num_resamples} resampled recordings a label or bin has no "
            "time steps: use fewer bins or shorter blocks, or leave rare labels out."
        )
    return Bootstrap(observed, samples.astype(observed.dtype), block_length)


def _test_result(
    pairs: np.ndarray,
    ids: np.ndarray,
    each: NullTest,
    overall: NullTest,
    arrays: Sequence[Array | np.ndarray],
) -> ConsistencyTest:
    if np.isnan(each.null_mean).any():
        raise ValueError(
            "Under the null distribution an embedding is averaged to 0 in some bin, so that the "
            "bin cannot be normalised: use fewer bins."
        )
    dtype = _own_dtype(arrays)
    each, overall = (
        NullTest(*(np.asarray(x, dtype) for x in test))  # type: ignore[arg-type]
        for test in (each, overall)
    )
    return ConsistencyTest(pairs, ids, each, overall)


def _own_dtype(arrays: Sequence[Array | np.ndarray]) -> np.dtype:
    """The dtype of scores: float64 unless all arrays are JAX's, then their own."""
    if all(isinstance(array, Array) for array in arrays):
        return np.dtype(np.result_type(np.float32, *(x.dtype for x in arrays)))
    return np.dtype(np.float64)


def _checked(
    embeddings: Sequence[Any],
    between: str | None,
    labels: Sequence[Any] | None,
    dataset_ids: Sequence[Hashable] | None,
) -> tuple[list[Array | np.ndarray], list[np.ndarray] | None, list[Hashable]]:
    """Embeddings as arrays, their labels between datasets, and their ids."""
    embeddings = list(embeddings)
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
        _check_runs(arrays, labels, dataset_ids)
        return arrays, None, list(range(len(arrays)))
    ids: list[Hashable] = list(range(len(arrays)) if dataset_ids is None else dataset_ids)
    return arrays, _check_datasets(arrays, labels, ids), ids


def _check_shift(min_shift: int, steps: int) -> None:
    if min_shift > steps // 2:
        raise ValueError(
            f"min_shift={min_shift} leaves no shift of {steps} time steps; at most half their "
            "number is possible."
        )


def _checked_levels(quantiles: Sequence[float]) -> np.ndarray:
    levels = np.asarray(quantiles, float)
    if levels.ndim != 1 or not ((levels >= 0) & (levels <= 1)).all():
        raise ValueError(f"quantiles have to be a list of levels from 0 to 1, got {quantiles!r}.")
    return levels


@contextlib.contextmanager
def _precision(arrays: Sequence[Array | np.ndarray]) -> Iterator[np.dtype]:
    """The dtype to compute in: float64, which tells more singular values apart than float32.

    A TPU has no fast float64: there, JAX arrays are computed in their own dtype.
    """
    if jax.default_backend() == "tpu" and all(isinstance(array, Array) for array in arrays):
        yield _own_dtype(arrays)
    else:
        with jax.enable_x64(True):
            yield np.dtype(np.float64)


def _share_of_rounded_columns(array: Array | np.ndarray) -> float:
    """Share of constant columns whose mean rounds to another number, which ``r2_score`` calls 0."""
    array = np.asarray(array)
    if not (array[0] == array[-1]).any():
        return 0.0
    is_constant = (array == array[:1]).all(axis=0)
    return float(np.mean(is_constant & (np.average(array, axis=0) != array[0])))


def _by_pair(
    matrix: np.ndarray, ids: Sequence[Hashable]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Average scores of all pairs of different ids, in order of first appearance; pairs; ids.

    Args:
        matrix: ``(…, embeddings, embeddings)``.
        ids: One per embedding.
    """
    members: dict[tuple[Hashable, Hashable], list[tuple[int, int]]] = {}
    for i, source in enumerate(ids):
        for j, target in enumerate(ids):
            if source != target:
                members.setdefault((source, target), []).append((i, j))
    scores = [sum(matrix[..., i, j] for i, j in m) / len(m) for m in members.values()]
    places = {name: place for place, name in enumerate(dict.fromkeys(ids))}
    unique = _id_array(list(places))
    pairs = unique[[[places[source], places[target]] for source, target in members]]
    return np.stack(scores, axis=-1), pairs, unique


def _id_array(ids: Sequence[Hashable]) -> np.ndarray:
    """Ids as a plain array where they are all of one plain kind, else as objects."""
    kinds = {type(name) for name in ids}
    if len(kinds) == 1 and issubclass(kinds.pop(), str | int | float | np.generic):
        plain = np.array(ids)
        if plain.tolist() == list(ids):  # not so with NaN, or text that ends with NUL
            return plain
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
