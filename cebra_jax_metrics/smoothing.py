"""Means over label space, weighted by a kernel: the differentiable form of the nearest label."""

from functools import partial

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

from cebra_jax_metrics.arrays import map_rows

BLOCK_SIZE = 1024


def kernel_mean(
    labels: Array,
    values: Array,
    query: Array,
    *,
    bandwidth: ArrayLike,
    weights: ArrayLike,
    length: ArrayLike | None = None,
    block_size: int = BLOCK_SIZE,
) -> Array:
    """Mean of values, each weighted by how near its label is to a query.

    With labels ``l``, values ``v`` and a query ``q`` it is::

        Σ_t p_t v_t    where    p_t ∝ exp(-Σ_k weights_k (q_k - l_tk)² / bandwidth)

    As the bandwidth goes to 0 it becomes the value at the nearest label, or the mean of those at
    equally near ones. Differentiable in everything but ``length``. Works in blocks of queries and
    labels, which derivatives compute anew, so that memory is linear in the number of either.

    Args:
        labels: ``(time, features)``.
        values: ``(time, dimensions)``.
        query: ``(queries, features)``.
        bandwidth: Positive scalar, in squared units of the labels.
        weights: Of the features ``(features,)``, at least 0.
        length: How many rows of labels and values are real; the others are padding. All by default.
        block_size: Queries, and labels, worked on at a time.

    Returns:
        ``(queries, dimensions)``, in the widest of the dtypes of the arguments, which are floats.

    Source: Nadaraya, *Theory of Probability & Its Applications* 9, 141-142 (1964); Watson,
    *Sankhyā* A 26, 359-372 (1964). The running minimum is that of Milakov & Gimelshein,
    arXiv:1805.02867.
    """
    arrays = (labels, values, query, jnp.asarray(bandwidth), jnp.asarray(weights))
    dtype = max((x.dtype for x in arrays), key=lambda dtype: dtype.itemsize)
    labels, values, query, bandwidth, weights = (x.astype(dtype) for x in arrays)
    length = labels.shape[0] if length is None else length
    is_real = jnp.arange(labels.shape[0], dtype=jnp.int32) < length
    padding = -labels.shape[0] % block_size
    blocks = tuple(
        jnp.pad(x, [(0, padding)] + [(0, 0)] * (x.ndim - 1)).reshape(-1, block_size, *x.shape[1:])
        for x in (labels, values, is_real)
    )
    some = partial(_mean_of_blocks, blocks, bandwidth, weights)
    return map_rows(some, (query,), block_size)


def _mean_of_blocks(
    blocks: tuple[Array, ...], bandwidth: Array, weights: Array, query: Array
) -> Array:
    @jax.checkpoint
    def add(
        state: tuple[Array, Array, Array], block: tuple[Array, Array, Array]
    ) -> tuple[tuple[Array, Array, Array], None]:
        nearest, total, weighted = state
        labels, values, is_real = block
        distance = jnp.where(is_real[None], _squared_distances(query, labels, weights), jnp.inf)
        # Any offset gives the same weights: it is no part of what is differentiated.
        nearer = jnp.minimum(nearest, lax.stop_gradient(jnp.min(distance, axis=1)))
        # Before the first block there is nothing to keep.
        kept = jnp.exp(jnp.where(jnp.isfinite(nearest), nearer - nearest, 0) / bandwidth)
        excess = jnp.where(is_real[None], distance - nearer[:, None], 0)
        share = jnp.where(is_real[None], jnp.exp(-excess / bandwidth), 0)
        added = jnp.einsum("ql,ld->qd", share, values, precision=lax.Precision.HIGHEST)
        state = nearer, total * kept + jnp.sum(share, axis=1), weighted * kept[:, None] + added
        return state, None

    number = len(query)
    nearest = jnp.full(number, jnp.inf, query.dtype)
    nothing = jnp.zeros(number, query.dtype), jnp.zeros((number, blocks[1].shape[-1]), query.dtype)
    (_, total, weighted), _ = lax.scan(add, (nearest, *nothing), blocks)
    return weighted / total[:, None]


def _squared_distances(query: Array, labels: Array, weights: Array) -> Array:
    """``(queries, time)``: differences are taken first, since products would round them away."""

    @jax.checkpoint
    def add(total: Array, feature: tuple[Array, Array, Array]) -> tuple[Array, None]:
        left, right, weight = feature
        return total + weight * (left[:, None] - right[None]) ** 2, None

    nothing = jnp.zeros((query.shape[0], labels.shape[0]), query.dtype)
    return lax.scan(add, nothing, (query.T, labels.T, weights), unroll=8)[0]
