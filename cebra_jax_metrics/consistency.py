"""Consistency: how well one embedding predicts another linearly, for all pairs at once.

The R² of an ordinary least-squares fit needs nothing but second moments. With X and Y centred,
``Q`` an orthonormal basis of the columns of X, and y a column of Y::

    R²(X → y) = |Qᵀ y|² / |y|²

so that one matrix product of all embeddings' columns with each other serves every ordered pair, the
moments of some rows less give every cross-validation fit, and a circular cross-correlation of Q and
y gives R² at every time shift.
"""

import itertools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.sharding import Mesh
from jax.typing import ArrayLike

from cebra_jax_metrics.alignment import bin_means
from cebra_jax_metrics.arrays import as_array, as_integer, check_dimensions, unit_rows, wide
from cebra_jax_metrics.sharding import first_item, spread

Terms = Callable[[Array, Array], Any]
HIGHEST = lax.Precision.HIGHEST
# scikit-learn's LinearRegression drops singular values below this share of the largest.
RANK_TOLERANCE = 1e-6
# Moments lose digits as the square of the condition number: where more than this share of a value
# may be lost, bases are made orthonormal a second time.
LOSS_TOLERANCE = 1e-10
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
    rows = _Rows(embeddings, block_size, axis_name, number)
    moments = rows.moments()
    bases, is_ill = _bases(rows, moments)
    total = jnp.einsum("jqjq->jq", moments)
    if folds is None:
        explained = _explained(moments, lax.stop_gradient(bases))
    else:
        # With fewer rows to fit than columns the fit depends on the coordinates: they are only
        # changed where it does not, and where digits would be lost.
        fitted_rows = number - max(stop - start for start, stop in folds)
        changes = is_ill & jnp.asarray(np.array([x.shape[1] for x in embeddings]) < fitted_rows)
        identity = jnp.eye(bases.shape[1], dtype=bases.dtype)
        columns = jnp.where(changes[:, None, None], bases, identity[None])
        explained = total[None] - _held_out_error(rows, columns, folds)
    return jnp.einsum("ijq,jq->ij", _share(explained, total[None]), rows.weights, precision=HIGHEST)


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


class _Rows:
    """All embeddings side by side, padded with zero columns to one width, centred, in blocks.

    Of the ``number`` rows of all devices along ``axis_name``, those of this one; on the last ones
    there may be copies of the last row behind it, which count nothing.
    """

    def __init__(
        self,
        embeddings: Sequence[Array],
        block_size: int,
        axis_name: str | None = None,
        number: int | None = None,
    ) -> None:
        self.dtype = wide(jnp.result_type(*embeddings))
        embeddings = [x.astype(self.dtype) for x in embeddings]
        self.embeddings, self.axis_name = embeddings, axis_name
        self.own = len(embeddings[0])
        self.number = self.own if number is None else number
        self.block_size = min(block_size, self.own)
        self.start = first_item(self.own, axis_name)
        # From the first row on, so that the mean of a constant column is that constant.
        first = [self._of_all(jnp.where(self.start == 0, x[:1], 0)) for x in embeddings]
        rests = [x - x0 for x, x0 in zip(embeddings, first, strict=True)]
        if axis_name is not None:
            is_real = (self.start + jnp.arange(self.own) < self.number)[:, None]
            rests = [jnp.where(is_real, rest, 0) for rest in rests]
        sums = [self._of_all(jnp.sum(rest, axis=0, keepdims=True)) for rest in rests]
        self.means = [x0 + total / self.number for x0, total in zip(first, sums, strict=True)]
        # R² does not depend on the scale, but moments of very large or small numbers overflow.
        self.scales = [_power_of_two(self._largest(x)) for x in embeddings]
        widths = np.array([x.shape[1] for x in embeddings])
        self.shape = len(widths), int(widths.max())
        is_column = np.arange(self.shape[1]) < widths[:, None]
        self.weights = jnp.asarray(is_column / widths[:, None], self.dtype)

    def _of_all(self, x: Any) -> Any:
        """Sum over all devices."""
        return x if self.axis_name is None else lax.psum(x, self.axis_name)

    def _largest(self, x: Array) -> Array:
        largest = lax.stop_gradient(jnp.max(jnp.abs(x)))
        return largest if self.axis_name is None else lax.pmax(largest, self.axis_name)

    def block(self, start: Array | int, stop: Array | int) -> tuple[Array, Array]:
        """``(block, embeddings, features)``; ones for rows from start to stop, zeros for others.

        Rows are counted on this device.
        """
        first = jnp.minimum(start, self.own - self.block_size)
        steps = first + jnp.arange(self.block_size)
        parts = []
        for x, mean, scale in zip(self.embeddings, self.means, self.scales, strict=True):
            part = (lax.dynamic_slice_in_dim(x, first, self.block_size) - mean) / scale
            parts.append(jnp.pad(part, ((0, 0), (0, self.shape[1] - part.shape[1]))))
        is_asked = (steps >= start) & (steps < stop)
        return jnp.stack(parts, axis=1), is_asked.astype(self.dtype)[:, None, None]

    def sum(self, terms: Terms, start: Array | int = 0, stop: Array | int | None = None) -> Any:
        """Sum of ``terms(block, is_asked)`` over the blocks of all rows, or of those asked for."""
        is_all, end = stop is None, self.number if stop is None else stop
        if self.axis_name is not None:
            start, end = (jnp.clip(row - self.start, 0, self.own) for row in (start, end))

        def add(number: Array, total: Any) -> Any:
            new = terms(*self.block(start + number * self.block_size, end))
            return jax.tree.map(jnp.add, total, new)

        shapes = jax.eval_shape(lambda: terms(*self.block(start, end)))
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        # Reverse-mode differentiation needs to know the number of blocks.
        blocks = -(-(self.own if is_all else end - start) // self.block_size)
        return self._of_all(lax.fori_loop(0, blocks, add, zeros))

    def moments(self) -> Array:
        """Second moments ``(embeddings, features, embeddings, features)``."""
        return self.sum(lambda x, is_asked: _cross(x * is_asked, x))


def _power_of_two(x: Array) -> Array:
    """About as large as x; dividing by it rounds nothing."""
    exponent = jnp.floor(jnp.log2(jnp.where(x > 0, x, jnp.ones_like(x))))
    return lax.stop_gradient(jnp.exp2(exponent))


def _cross(a: Array, b: Array) -> Array:
    """Products of all with all, summed over rows ``(embeddings, columns, embeddings, columns)``."""
    return jnp.einsum("nip,njq->ipjq", a, b, precision=HIGHEST)


def _own(a: Array) -> Array:
    """Products of each with itself, summed over rows ``(embeddings, columns, columns)``."""
    return jnp.einsum("nip,niq->ipq", a, a, precision=HIGHEST)


def _project(columns: Array) -> Callable[[Array], Array]:
    return lambda block: jnp.einsum("nip,ipk->nik", block, columns, precision=HIGHEST)


def _whitening(moments: Array) -> tuple[Array, Array]:
    """Per embedding, the map from its columns to an orthonormal basis, and the condition.

    Args:
        moments: ``(embeddings, features, features)``.

    Returns:
        ``(embeddings, features, rank)``, columns beyond the rank 0, and ``(embeddings,)``.
    """
    values, vectors = jnp.linalg.eigh(moments)
    eps = jnp.finfo(moments.dtype).eps
    tolerance = max(RANK_TOLERANCE**2, moments.shape[1] * float(eps))
    largest = values[:, -1:]
    kept = (values > tolerance * largest) & (values > 0)
    smallest = jnp.min(jnp.where(kept, values, largest), axis=1)
    ratio = jnp.where(largest[:, 0] > 0, largest[:, 0] / smallest, jnp.ones((), values.dtype))
    scale = jnp.where(kept, lax.rsqrt(jnp.where(kept, values, jnp.ones_like(values))), 0)
    return vectors * scale[:, None, :], jnp.sqrt(ratio)


def _bases(rows: _Rows, moments: Array) -> tuple[Array, Array]:
    """The maps to orthonormal bases, and of which embeddings moments alone would lose digits."""
    bases, condition = _whitening(jnp.einsum("ipiq->ipq", moments))
    is_ill = condition**2 * jnp.finfo(moments.dtype).eps > LOSS_TOLERANCE

    def again() -> Array:
        project = _project(bases)
        correction, _ = _whitening(rows.sum(lambda x, is_asked: _own(project(x * is_asked))))
        return jnp.einsum("ipk,ikl->ipl", bases, correction, precision=HIGHEST)

    return lax.cond(jnp.any(is_ill), again, lambda: bases), is_ill


@jax.custom_jvp
def _explained(moments: Array, bases: Array) -> Array:
    """Sum of squares that each embedding explains of every column ``(source, target, column)``."""
    cross = jnp.einsum("ipk,ipjq->ikjq", bases, moments, precision=HIGHEST)
    return jnp.sum(cross**2, axis=1)


@_explained.defjvp
def _explained_jvp(primals: tuple[Array, Array], tangents: tuple[Array, Array]) -> tuple:
    """By the envelope theorem: at the least-squares fit its coefficients count as constants.

    The derivative of an orthonormal basis does not exist where singular values coincide; that of
    the explained sum of squares does.
    """
    moments, bases = primals
    change, _ = tangents
    fit = jnp.einsum("ipk,irk,irjq->ipjq", bases, bases, moments, precision=HIGHEST)
    own = jnp.einsum("ipir->ipr", change)
    linear = 2 * jnp.einsum("ipjq,ipjq->ijq", fit, change, precision=HIGHEST)
    quadratic = jnp.einsum("ipjq,ipr,irjq->ijq", fit, own, fit, precision=HIGHEST)
    return _explained(moments, bases), linear - quadratic


def _share(explained: Array, total: Array) -> Array:
    """Explained of total, 1 where there is nothing to explain."""
    is_constant = total == 0
    share = explained / jnp.where(is_constant, jnp.ones_like(total), total)
    return jnp.where(is_constant, jnp.ones_like(share), share)


def _folds(number: int, cv: int) -> tuple[tuple[int, int], ...]:
    """First row of every contiguous fold, and the one after its last."""
    cv = as_integer("cv", cv, at_least=2)
    if cv > number:
        raise ValueError(f"cv={cv} folds need at least {cv} rows, got {number}.")
    stops = np.cumsum([len(part) for part in np.array_split(np.arange(number), cv)]).tolist()
    return tuple(itertools.pairwise([0, *stops]))


def _held_out_error(rows: _Rows, columns: Array, folds: tuple[tuple[int, int], ...]) -> Array:
    """Squared error of predicting each fold from the fit to all others, summed over rows.

    Args:
        rows: The embeddings.
        columns: Maps ``(embeddings, features, columns)`` to the coordinates of the fits.
        folds: As :func:`_folds` gives them.

    Returns:
        ``(embeddings, embeddings, features)``: source, target, and its columns.
    """
    project = _project(columns)

    def terms(x: Array, is_asked: Array) -> tuple[Array, Array, Array]:
        target = x * is_asked
        source = project(target)
        return _own(source), _cross(source, target), jnp.sum(target**2, axis=0)

    # About the mean of all rows.
    own, cross, _ = rows.sum(terms)

    def error(fold: Array) -> Array:
        start, stop = fold
        held = (stop - start).astype(rows.dtype)
        sums = rows.sum(lambda x, is_asked: jnp.sum(x * is_asked, axis=0), start, stop)
        mean = -sums / (rows.number - held)  # of the other rows
        at = jnp.einsum("ip,ipk->ik", mean, columns, precision=HIGHEST)
        # Of the held-out rows and, by difference, of the others, all about the others' mean.
        held_own, held_cross, held_total = rows.sum(
            lambda x, is_asked: terms(x - mean[None], is_asked), start, stop
        )
        fitted_own = own + rows.number * at[:, :, None] * at[:, None, :] - held_own
        fitted_cross = cross + rows.number * at[:, :, None, None] * mean[None, None] - held_cross
        bases, _ = _whitening(fitted_own)
        coefficients = jnp.einsum(
            "ipk,irk,irjq->ipjq", bases, bases, fitted_cross, precision=HIGHEST
        )
        predicted = jnp.einsum(
            "ipjq,ipr,irjq->ijq", coefficients, held_own, coefficients, precision=HIGHEST
        )
        shared = jnp.einsum("ipjq,ipjq->ijq", coefficients, held_cross, precision=HIGHEST)
        return held_total[None] - 2 * shared + predicted

    return jnp.sum(lax.map(error, jnp.asarray(folds)), axis=0)


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
        rows = _Rows(embeddings, BLOCK_SIZE)
        moments = rows.moments()
        bases, _ = _bases(rows, moments)
        total = jnp.einsum("jqjq->jq", moments)
        norm = jnp.sqrt(jnp.where(total == 0, jnp.ones_like(total), total))
        whole, _ = _Rows(embeddings, rows.number).block(0, rows.number)
        return cls(
            bases=jnp.fft.rfft(_project(bases)(whole), axis=0).transpose(1, 2, 0),
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
