"""Consistency: how well one embedding predicts another linearly, for all pairs at once.

The R² of an ordinary least-squares fit needs nothing but second moments. With X and Y centred,
``Q`` an orthonormal basis of the columns of X, and y a column of Y::

    R²(X → y) = |Qᵀ y|² / |y|²

so that one matrix product of all embeddings' columns with each other serves every ordered pair, the
moments of some rows less give every cross-validation fit, and a circular cross-correlation of Q and
y gives R² at every time shift.
"""

import itertools
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.sharding import Mesh
from jax.typing import ArrayLike

from cebra_jax_metrics.alignment import bin_means
from cebra_jax_metrics.arrays import as_array, as_integer, check_dimensions, unit_rows
from cebra_jax_metrics.moments import (
    HIGHEST,
    Rows,
    explained_squares,
    held_out_error,
    orthonormal_bases,
    project_on,
    share,
)
from cebra_jax_metrics.sharding import first_item, spread

BLOCK_SIZE = 2048
SAMPLES_AT_A_TIME = 16


def consistency_matrix(
    embeddings: Sequence[ArrayLike],
    *,
    cv: int | None = None,
    block_size: int = BLOCK_SIZE,
    mesh: Mesh | None = None,
    axis_name: str | None = None,
) -> Array:
    """R² of the linear regression from every embedding to every other one.

    Pure and jitted, and differentiable unless cross-validated. Rows are streamed in blocks, so that
    memory beyond the embeddings themselves does not grow with their length.

    Args:
        embeddings: M arrays ``(rows, features)`` of equal length; their widths may differ.
        cv: Number of contiguous folds of rows, each predicted by the fit to all others; ``None``
            scores the rows that were fitted.
        block_size: Rows worked on at a time.
        mesh: Devices to spread the rows over (:func:`~cebra_jax_metrics.spread`).
        axis_name: The axis of the mesh, where it has several.

    Returns:
        ``(M, M)``: at i, j the R² of predicting embedding j from embedding i, averaged over j's
        columns; 1 on the diagonal unless cross-validated. A constant column counts 1, as it is
        predicted exactly. With ``cv``, R² is that of the predictions of all rows together, about
        the mean of all rows; it is negative where predictions are worse than that mean. All scores
        of an embedding that is not finite, the diagonal with them, are NaN.

    Moments in float32 tell singular values apart down to about 1e-3 of the largest; smaller ones
    are dropped. In float64 it is 1e-6, as in scikit-learn 1.9; with ``cv``, it is that of all rows.

    Raises:
        ValueError: The embeddings differ in length, are not two-dimensional, are no real numbers,
            have fewer than two rows, no column, or fewer rows than folds.
        TypeError: ``cv`` or ``block_size`` is no integer.

    Source: CEBRA 0.6.1 ``cebra.integrations.sklearn.metrics.consistency_score``; scikit-learn
    ``LinearRegression``, ``r2_score``, ``KFold`` and ``cross_val_predict``.
    """
    embeddings = _checked(embeddings)
    return spread(
        _matrix,
        (),
        embeddings,
        mesh=mesh,
        axis_name=axis_name,
        reduces=True,
        folds=None if cv is None else _folds(len(embeddings[0]), cv),
        block_size=as_integer("block_size", block_size, at_least=1),
    )


def _checked(embeddings: Sequence[ArrayLike]) -> tuple[Any, ...]:
    """Arrays of real numbers ``(rows, features)`` of equal length."""
    arrays = tuple(map(as_array, embeddings))
    shapes = [x.shape for x in arrays]
    if len({shape[:1] for shape in shapes}) != 1 or any(len(shape) != 2 for shape in shapes):
        listed = " and ".join(map(str, shapes))
        raise ValueError(f"Expected arrays (rows, features) of equal length, got shapes {listed}.")
    if min(shapes)[0] < 2 or min(shape[1] for shape in shapes) < 1:
        raise ValueError(f"Expected at least two rows and one feature, got shapes {shapes}.")
    for array in arrays:
        check_dimensions(array, least=2)
    return arrays


@partial(jax.jit, static_argnames=("folds", "block_size", "axis_name", "number"))
def _matrix(
    embeddings: Sequence[Array],
    *,
    folds: tuple[tuple[int, int], ...] | None,
    block_size: int,
    axis_name: str | None,
    number: int,
) -> Array:
    rows = Rows(embeddings, block_size, axis_name, number)
    moments = rows.moments()
    bases, is_ill = orthonormal_bases(rows, moments)
    total = jnp.einsum("jqjq->jq", moments)
    if folds is None:
        explained = explained_squares(moments, lax.stop_gradient(bases))
    else:
        # With fewer rows to fit than columns the fit depends on the coordinates: they are only
        # changed where it does not, and where digits would be lost.
        fitted_rows = number - max(stop - start for start, stop in folds)
        changes = is_ill & jnp.asarray(np.array([x.shape[1] for x in embeddings]) < fitted_rows)
        identity = jnp.eye(bases.shape[1], dtype=bases.dtype)
        columns = jnp.where(changes[:, None, None], bases, identity[None])
        explained = total[None] - held_out_error(rows, columns, folds)
    return jnp.einsum("ijq,jq->ij", share(explained, total[None]), rows.weights, precision=HIGHEST)


def _folds(number: int, cv: int) -> tuple[tuple[int, int], ...]:
    """First row of every contiguous fold, and the one after its last."""
    cv = as_integer("cv", cv, at_least=2)
    if cv > number:
        raise ValueError(f"cv={cv} folds need at least {cv} rows, got {number}.")
    stops = np.cumsum([len(part) for part in np.array_split(np.arange(number), cv)]).tolist()
    return tuple(itertools.pairwise([0, *stops]))


@jax.jit
def shifted_consistency(source: Array, target: Array) -> Array:
    """R² of the linear regression from one embedding to another, at every circular time shift.

    The moments of an embedding with itself do not change under a shift; those of two embeddings
    are their circular cross-correlation, which the FFT gives for all shifts at once.

    Args:
        source: ``(rows, features)``.
        target: ``(rows, other features)``.

    Returns:
        ``(rows,)``: at s, the R² of predicting ``jnp.roll(target, s, axis=0)`` from ``source``, as
        :func:`consistency_matrix` defines it.

    Raises:
        ValueError: As :func:`consistency_matrix`.
        TypeError: They are no arrays.
    """
    if not (isinstance(source, Array) and isinstance(target, Array)):
        kinds = type(source).__name__, type(target).__name__
        raise TypeError(f"Expected two arrays (rows, features), got {kinds}.")
    spectra = _Spectra.of(_checked([source, target]))
    return spectra.under_shifts(jnp.asarray(0), jnp.asarray(1))


class NullTest(NamedTuple):
    """Observed scores against what they would be if nothing but chance related the embeddings.

    Attributes:
        observed: The scores.
        null_mean: Mean of the scores under the null hypothesis.
        null_quantiles: Their quantiles, along the first axis.
        effect: Observed minus null mean.
        p_value: ``(1 + number of null scores not below the observed) / (1 + number of them)``.
    """

    observed: Array
    null_mean: Array
    null_quantiles: Array
    effect: Array
    p_value: Array


def against_null(observed: ArrayLike, null: ArrayLike, quantiles: ArrayLike) -> NullTest:
    """Compare scores with samples from their null distribution.

    Args:
        observed: Scores ``(…)``.
        null: ``(samples, …)``.
        quantiles: Levels ``(quantiles,)`` in [0, 1].
    """
    observed, null = jnp.asarray(observed), jnp.asarray(null)
    mean = jnp.mean(null, axis=0)
    reached = num_not_below(null, observed)
    return NullTest(
        observed=observed,
        null_mean=mean,
        null_quantiles=jnp.quantile(null, jnp.asarray(quantiles, null.dtype), axis=0),
        effect=observed - mean,
        p_value=(1 + reached.astype(null.dtype)) / (1 + len(null)),
    )


def num_not_below(null: Array, observed: Array) -> Array:
    """How many samples ``(samples, …)`` from a null distribution are not below the observed.

    Scores that are equal but for rounding count as equal, and NaN as reached: the cautious side.
    """
    slack = float(jnp.finfo(null.dtype).eps) ** 0.6  # 4e-10 in float64, 7e-5 in float32
    return jnp.sum(~(null < observed[None] - slack), axis=0)


def shift_test(
    embeddings: Sequence[Array],
    quantiles: Array,
    *,
    min_shift: int = 1,
    mesh: Mesh | None = None,
    axis_name: str | None = None,
) -> tuple[NullTest, NullTest]:
    """The consistency of runs against all circular time shifts of one against the other.

    Args:
        embeddings: M arrays ``(rows, features)`` of equal length.
        quantiles: Levels ``(quantiles,)``.
        min_shift: The smallest shift that belongs to the null distribution, either way.
        mesh: Devices to spread the pairs over (:func:`~cebra_jax_metrics.spread`).
        axis_name: The axis of the mesh, where it has several.

    Returns:
        The test of every ordered pair ``(M (M - 1),)``, and that of their mean. For the mean,
        embedding m is shifted by m times the shift, so that the shifts of all form a group; a few
        of them leave two embeddings as they are to each other.
    """
    each, total = spread(
        _shift_pairs,
        (tuple(embeddings), quantiles),
        np.argwhere(~np.eye(len(embeddings), dtype=bool)),
        mesh=mesh,
        axis_name=axis_name,
        reduces=True,
        min_shift=min_shift,
    )
    mean = total / len(each.observed)
    null = mean[min_shift : len(mean) + 1 - min_shift]
    each = each._replace(null_quantiles=each.null_quantiles.T)
    return each, against_null(mean[0], null, quantiles)


@partial(jax.jit, static_argnames=("min_shift", "axis_name", "number"))
def _shift_pairs(
    embeddings: Sequence[Array],
    quantiles: Array,
    pairs: Array,
    *,
    min_shift: int,
    axis_name: str | None,
    number: int,
) -> tuple[NullTest, Array]:
    """The test of every pair, and the sum of their scores at every shift ``(rows,)``."""
    spectra = _Spectra.of(embeddings)
    shifts = jnp.arange(spectra.number)

    def test(total: Array, item: tuple[Array, Array]) -> tuple[Array, NullTest]:
        (i, j), is_real = item
        scores = spectra.under_shifts(i, j)
        null = scores[min_shift : spectra.number + 1 - min_shift]
        added = jnp.where(is_real, scores[(j - i) * shifts % spectra.number], 0)
        return total + added, against_null(scores[0], null, quantiles)

    is_real = first_item(len(pairs), axis_name) + jnp.arange(len(pairs)) < number
    zeros = jnp.zeros(spectra.number, spectra.weights.dtype)
    total, each = lax.scan(test, zeros, (jnp.asarray(pairs), is_real))
    if axis_name is None:
        return each, total
    each = jax.tree.map(lambda x: lax.all_gather(x, axis_name, tiled=True)[:number], each)
    return each, lax.psum(total, axis_name)


class Relabelled(NamedTuple):
    """Consistency of datasets, with wrong labels for some.

    Attributes:
        target: ``(…, M, M)``: the labels of the predicted dataset are wrong.
        source: ``(…, M, M)``: those of the predicting one are.
        both: ``(…, M, M)``: those of both are.
    """

    target: Array
    source: Array
    both: Array


def relabelled_consistency(
    keys: Array,
    embeddings: Sequence[Array],
    places: Sequence[Array],
    *,
    num_bins: int,
    margin: int,
    reach: int,
    permute: bool = False,
    min_shift: int = 1,
    mesh: Mesh | None = None,
    axis_name: str | None = None,
) -> Relabelled:
    """The consistency of datasets whose labels are shifted or permuted before alignment.

    Args:
        keys: PRNG keys ``(samples,)``.
        embeddings: M arrays ``(time, features)`` without NaN.
        places: Integers ``(time,)`` for each: the bin of every time step.
        num_bins: Number of bins.
        margin: Number of bins at either end that become no row.
        reach: How far an empty bin may reach (:func:`~cebra_jax_metrics.alignment.bin_means`).
        permute: Permute the labels of each instead of shifting them circularly.
        min_shift: The smallest shift, either way.
        mesh: Devices to spread the samples over (:func:`~cebra_jax_metrics.spread`).
        axis_name: The axis of the mesh, where it has several.

    Returns:
        For every key matrices of scores ``(samples, M, M)``.
    """
    return spread(
        _relabelled,
        (tuple(embeddings), tuple(places)),
        keys,
        mesh=mesh,
        axis_name=axis_name,
        num_bins=num_bins,
        margin=margin,
        reach=reach,
        permute=permute,
        min_shift=min_shift,
    )


@partial(jax.jit, static_argnames=("num_bins", "margin", "reach", "permute", "min_shift"))
def _relabelled(
    embeddings: Sequence[Array],
    places: Sequence[Array],
    keys: Array,
    *,
    num_bins: int,
    margin: int,
    reach: int,
    permute: bool,
    min_shift: int,
) -> Relabelled:
    align = partial(_aligned, num_bins=num_bins, margin=margin, reach=reach)

    def wrong(key: Array, place: Array) -> Array:
        if permute:
            return jax.random.permutation(key, place)
        end = len(place) + 1 - min_shift
        return jnp.roll(place, jax.random.randint(key, (), min_shift, end, dtype=jnp.int32))

    right = [align(x, place) for x, place in zip(embeddings, places, strict=True)]
    count = len(right)

    def sample(key: Array) -> Relabelled:
        own_keys = [jax.random.fold_in(key, number) for number in range(count)]
        shuffled = [
            align(x, wrong(own_key, place))
            for own_key, x, place in zip(own_keys, embeddings, places, strict=True)
        ]
        scores = consistency_matrix([*right, *shuffled])
        return Relabelled(
            target=scores[:count, count:],
            source=scores[count:, :count],
            both=scores[count:, count:],
        )

    return lax.map(sample, keys, batch_size=SAMPLES_AT_A_TIME)


def resampled_consistency(
    steps: Sequence[ArrayLike],
    embeddings: Sequence[Array],
    places: Sequence[Array] | None = None,
    *,
    num_bins: int = 0,
    margin: int = 0,
    reach: int = 0,
    mesh: Mesh | None = None,
    axis_name: str | None = None,
) -> Array:
    """The consistency of embeddings of which some rows are left out and others repeated.

    Args:
        steps: For each of M embeddings integers ``(samples, rows)``: the rows that it is made of.
        embeddings: M arrays ``(time, features)`` without NaN.
        places: Between datasets, the bin of every time step, ``(time,)`` for each.
        num_bins: Number of bins.
        margin: Number of bins at either end that become no row.
        reach: How far an empty bin may reach (:func:`~cebra_jax_metrics.alignment.bin_means`).
        mesh: Devices to spread the samples over (:func:`~cebra_jax_metrics.spread`).
        axis_name: The axis of the mesh, where it has several.

    Returns:
        Scores ``(samples, M, M)``; NaN where a bin stays empty.
    """
    shared = tuple(embeddings), None if places is None else tuple(places)
    return spread(
        _resampled,
        shared,
        tuple(steps),
        mesh=mesh,
        axis_name=axis_name,
        num_bins=num_bins,
        margin=margin,
        reach=reach,
    )


@partial(jax.jit, static_argnames=("num_bins", "margin", "reach"))
def _resampled(
    embeddings: Sequence[Array],
    places: Sequence[Array] | None,
    steps: Sequence[Array],
    *,
    num_bins: int,
    margin: int,
    reach: int,
) -> Array:
    def sample(steps: Sequence[Array]) -> Array:
        rows = [x[some] for x, some in zip(embeddings, steps, strict=True)]
        if places is not None:
            bins = [place[some] for place, some in zip(places, steps, strict=True)]
            align = partial(_aligned, num_bins=num_bins, margin=margin, reach=reach)
            rows = list(map(align, rows, bins))
        return consistency_matrix(rows)

    return lax.map(sample, tuple(steps), batch_size=SAMPLES_AT_A_TIME)


def _aligned(x: Array, place: Array, *, num_bins: int, margin: int, reach: int) -> Array:
    """Mean embedding of every bin, normalised."""
    means, _ = bin_means(x, place, jnp.ones(len(x), bool), num_bins=num_bins, reach=reach)
    return unit_rows(means[margin : num_bins - margin])


class _Spectra(NamedTuple):
    """Fourier transforms along time of orthonormal bases, and of targets of norm 1.

    Attributes:
        bases: ``(embeddings, rank, frequencies)``.
        targets: ``(embeddings, features, frequencies)``, 0 for constant columns.
        weights: ``(embeddings, features)``: what every column counts.
        constant: ``(embeddings,)``: what constant columns count together.
        number: Number of time steps.
    """

    bases: Array
    targets: Array
    weights: Array
    constant: Array
    number: int

    @classmethod
    def of(cls, embeddings: Sequence[Array]) -> "_Spectra":
        rows = Rows(embeddings, BLOCK_SIZE)
        moments = rows.moments()
        bases, _ = orthonormal_bases(rows, moments)
        total = jnp.einsum("jqjq->jq", moments)
        norm = jnp.sqrt(jnp.where(total == 0, jnp.ones_like(total), total))
        whole, _ = Rows(embeddings, rows.number).block(0, rows.number)
        return cls(
            bases=jnp.fft.rfft(project_on(bases)(whole), axis=0).transpose(1, 2, 0),
            targets=jnp.fft.rfft(whole / norm[None], axis=0).transpose(1, 2, 0),
            weights=rows.weights,
            constant=jnp.sum(jnp.where(total == 0, rows.weights, 0), axis=1),
            number=rows.number,
        )

    def under_shifts(self, source: Array, target: Array) -> Array:
        """R² at every shift of the target ``(rows,)``, one of its columns at a time."""
        basis = self.bases[source]

        def add(total: Array, column: tuple[Array, Array]) -> tuple[Array, None]:
            spectrum, weight = column
            correlation = jnp.fft.irfft(basis * jnp.conj(spectrum)[None], self.number, axis=1)
            return total + weight * jnp.sum(correlation**2, axis=0), None

        start = jnp.full(self.number, self.constant[target])
        total, _ = lax.scan(add, start, (self.targets[target], self.weights[target]))
        return total
