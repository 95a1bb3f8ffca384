"""Consistency: how well one embedding predicts another linearly, for all pairs at once.

The R² of an ordinary least-squares fit needs nothing but second moments. With X and Y centred,
``Q`` an orthonormal basis of the columns of X, and y a column of Y::

    R²(X → y) = |Qᵀ y|² / |y|²

so that one matrix product of all embeddings' columns with each other serves every ordered pair.
"""

from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array, lax

Map = Callable[[Array], Array]
HIGHEST = lax.Precision.HIGHEST
# scikit-learn's LinearRegression drops singular values below this share of the largest.
RANK_TOLERANCE = 1e-6
# Moments lose digits as the square of the condition number: where more than this share of a value
# may be lost, bases are made orthonormal a second time.
LOSS_TOLERANCE = 1e-10
BLOCK_SIZE = 2048


@partial(jax.jit, static_argnames="block_size")
def consistency_matrix(embeddings: Sequence[Array], *, block_size: int = BLOCK_SIZE) -> Array:
    """R² of the linear regression from every embedding to every other one.

    Pure and jitted. Rows are streamed in blocks, so that memory beyond the embeddings themselves
    does not grow with their length.

    Args:
        embeddings: M arrays ``(rows, features)`` of equal length; their widths may differ.
        block_size: Rows worked on at a time.

    Returns:
        ``(M, M)``: at i, j the R² of predicting embedding j from embedding i, averaged over j's
        columns; 1 on the diagonal. A constant column counts 1, as it is predicted exactly.

    Raises:
        ValueError: The embeddings differ in length, or are not two-dimensional.

    Source: CEBRA 0.6.1 ``cebra.integrations.sklearn.metrics.consistency_score``; scikit-learn
    ``LinearRegression`` and ``r2_score``.
    """
    shapes = [jnp.shape(x) for x in embeddings]
    if len({shape[:1] for shape in shapes}) != 1 or any(len(shape) != 2 for shape in shapes):
        raise ValueError(f"Expected arrays (rows, features) of equal length, got {shapes}.")
    rows = _Rows(embeddings, block_size)
    moments = rows.moments(lambda block: block, lambda block: block)
    bases, condition = _whitening(moments)
    explained = lax.cond(
        condition**2 * jnp.finfo(moments.dtype).eps > LOSS_TOLERANCE,
        lambda: _explained_carefully(rows, bases),
        lambda: jnp.einsum("ipk,ipjq->ijkq", bases, moments, precision=HIGHEST),
    )
    return _r_squared(explained, moments, rows.widths)


class _Rows:
    """All embeddings side by side, padded with zero columns to one width, centred, in blocks."""

    def __init__(self, embeddings: Sequence[Array], block_size: int) -> None:
        self.embeddings = embeddings
        self.num_rows = len(embeddings[0])
        self.block_size = min(block_size, self.num_rows)
        self.widths = [x.shape[1] for x in embeddings]
        self.means = [jnp.mean(x, axis=0, keepdims=True) for x in embeddings]

    def block(self, number: Array) -> Array:
        """``(block, embeddings, features)``; rows that the block before has had are 0."""
        start = jnp.minimum(number * self.block_size, self.num_rows - self.block_size)
        steps = start + jnp.arange(self.block_size)
        is_new = (steps >= number * self.block_size)[:, None]
        widest = max(self.widths)
        parts = []
        for x, mean in zip(self.embeddings, self.means, strict=True):
            part = lax.dynamic_slice_in_dim(x, start, self.block_size) - mean
            part = jnp.where(is_new, part, jnp.zeros((), part.dtype))
            parts.append(jnp.pad(part, ((0, 0), (0, widest - part.shape[1]))))
        return jnp.stack(parts, axis=1)

    def moments(self, left: Map, right: Map) -> Array:
        """Sum over rows of the products of ``left(block)`` and ``right(block)``.

        Returns:
            ``(embeddings, features, embeddings, features)``.
        """
        num_blocks = -(-self.num_rows // self.block_size)
        size = len(self.embeddings), max(self.widths)

        def add(number: Array, total: Array) -> Array:
            block = self.block(number)
            columns = (x.reshape(len(x), -1) for x in (left(block), right(block)))
            return total + jnp.einsum("np,nq->pq", *columns, precision=HIGHEST)

        width = size[0] * size[1]
        total = jnp.zeros((width, width), jnp.result_type(*self.embeddings))
        return lax.fori_loop(0, num_blocks, add, total).reshape(*size, *size)


def _whitening(moments: Array) -> tuple[Array, Array]:
    """Per embedding, the map from its columns to an orthonormal basis, and the worst condition.

    Returns:
        ``(embeddings, features, rank)``, columns beyond the rank 0, and a scalar.
    """
    auto = jnp.einsum("ipiq->ipq", moments)
    values, vectors = jnp.linalg.eigh(auto)
    eps = jnp.finfo(moments.dtype).eps
    tolerance = max(RANK_TOLERANCE**2, moments.shape[1] * float(eps))
    largest = values[:, -1:]
    kept = (values > tolerance * largest) & (values > 0)
    smallest = jnp.min(jnp.where(kept, values, largest), axis=1)
    ratio = jnp.where(largest[:, 0] > 0, largest[:, 0] / smallest, jnp.ones((), values.dtype))
    scale = jnp.where(kept, lax.rsqrt(jnp.where(kept, values, jnp.ones_like(values))), 0)
    return vectors * scale[:, None, :], jnp.sqrt(jnp.max(ratio))


def _explained_carefully(rows: _Rows, bases: Array) -> Array:
    """Cross moments of bases that are made orthonormal from the rows themselves, once more."""

    def project(block: Array) -> Array:
        return jnp.einsum("nip,ipk->nik", block, bases, precision=HIGHEST)

    auto = jnp.einsum("ikil->ikl", rows.moments(project, project))
    values, vectors = jnp.linalg.eigh(auto)  # near 1 within the rank, 0 beyond it
    kept = values > 0.5
    scale = jnp.where(kept, lax.rsqrt(jnp.where(kept, values, jnp.ones_like(values))), 0)
    cross = rows.moments(project, lambda block: block)
    return jnp.einsum("ikl,ikjq->ijlq", vectors * scale[:, None, :], cross, precision=HIGHEST)


def _r_squared(explained: Array, moments: Array, widths: list[int]) -> Array:
    total = jnp.einsum("jqjq->jq", moments)[None]
    share = jnp.sum(explained**2, axis=2) / jnp.where(total > 0, total, jnp.ones_like(total))
    share = jnp.where(total > 0, share, jnp.ones_like(share))
    width = jnp.asarray(widths)
    is_real = jnp.arange(moments.shape[1])[None, :] < width[:, None]
    return jnp.sum(jnp.where(is_real[None], share, 0), axis=2) / width.astype(share.dtype)[None]
