"""Least squares from second moments, for all embeddings at once, in blocks of rows.

``Q`` being an orthonormal basis of the columns of X, and y a column of Y, both centred, the fit of
y explains ``|Qᵀ y|²``: products of all columns with each other are all that it takes.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from cebra_jax_metrics.arrays import wide
from cebra_jax_metrics.sharding import first_item

Terms = Callable[[Array, Array], Any]
HIGHEST = lax.Precision.HIGHEST
# scikit-learn's LinearRegression drops singular values below this share of the largest.
RANK_TOLERANCE = 1e-6
# Moments lose digits as the square of the condition number: where more than this share of a value
# may be lost, bases are made orthonormal a second time.
LOSS_TOLERANCE = 1e-10


class Rows:
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


def project_on(columns: Array) -> Callable[[Array], Array]:
    """What gives blocks of rows in other coordinates ``(embeddings, features, columns)``."""
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


def orthonormal_bases(rows: Rows, moments: Array) -> tuple[Array, Array]:
    """The maps to orthonormal bases, and of which embeddings moments alone would lose digits."""
    bases, condition = _whitening(jnp.einsum("ipiq->ipq", moments))
    is_ill = condition**2 * jnp.finfo(moments.dtype).eps > LOSS_TOLERANCE

    def again() -> Array:
        project = project_on(bases)
        correction, _ = _whitening(rows.sum(lambda x, is_asked: _own(project(x * is_asked))))
        return jnp.einsum("ipk,ikl->ipl", bases, correction, precision=HIGHEST)

    return lax.cond(jnp.any(is_ill), again, lambda: bases), is_ill


@jax.custom_jvp
def explained_squares(moments: Array, bases: Array) -> Array:
    """Sum of squares that each embedding explains of every column ``(source, target, column)``."""
    cross = jnp.einsum("ipk,ipjq->ikjq", bases, moments, precision=HIGHEST)
    return jnp.sum(cross**2, axis=1)


@explained_squares.defjvp
def _explained_squares_jvp(primals: tuple[Array, Array], tangents: tuple[Array, Array]) -> tuple:
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
    return explained_squares(moments, bases), linear - quadratic


def share(explained: Array, total: Array) -> Array:
    """Explained of total, 1 where there is nothing to explain."""
    is_constant = total == 0
    ratio = explained / jnp.where(is_constant, jnp.ones_like(total), total)
    return jnp.where(is_constant, jnp.ones_like(ratio), ratio)


def held_out_error(rows: Rows, columns: Array, folds: tuple[tuple[int, int], ...]) -> Array:
    """Squared error of predicting each fold from the fit to all others, summed over rows.

    Args:
        rows: The embeddings.
        columns: Maps ``(embeddings, features, columns)`` to the coordinates of the fits.
        folds: First row of each, and the one after its last.

    Returns:
        ``(embeddings, embeddings, features)``: source, target, and its columns.
    """
    project = project_on(columns)

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
