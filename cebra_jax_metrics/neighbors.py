"""Exact nearest neighbours in label space.

On the CPU and outside ``jit`` the search runs in float64: a sorted search for one-dimensional
labels, SciPy's k-d tree for the others. Under ``jit`` and on accelerators it runs in float32 with
direct differences (no a² - 2ab + b²): a sorted search in one dimension, a blocked brute force in
more. Among equally near labels the earliest time step is returned.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import ArrayLike
from scipy.spatial import cKDTree

QUERY_BLOCK = 512
LABEL_BLOCK = 2048


def nearest(
    labels: Array,
    query: Array,
    length: ArrayLike | None = None,
    groups: Array | None = None,
    query_groups: Array | None = None,
) -> Array:
    """Index of the label nearest to each query.

    Args:
        labels: ``(time, features)``, float32.
        query: ``(..., features)``, float32.
        length: How many rows of ``labels`` are real; the others are padding. All by default.
        groups: Integers ``(time,)``: only labels of the query's group are candidates.
        query_groups: Integers ``(...)``, the group of every query.

    Returns:
        int32 indices ``(...)``. On the host the distance in float64 is the smallest there is;
        under ``jit`` it is so up to float32 rounding.
    """
    length = labels.shape[0] if length is None else length
    flat = query.reshape(-1, query.shape[-1])
    flat_groups = None if query_groups is None else query_groups.reshape(-1)
    arrays = (labels, flat, length, groups, flat_groups)
    search = nearest_on_host if _on_host(arrays) else nearest_under_jit
    return jnp.asarray(search(*arrays)).reshape(query.shape[:-1])


def _on_host(arrays: tuple[ArrayLike | None, ...]) -> bool:
    """Whether all values are known and in the CPU's memory."""
    return all(
        not isinstance(x, jax.core.Tracer) and all(d.platform == "cpu" for d in x.devices())
        for x in arrays
        if isinstance(x, Array)
    )


def nearest_on_host(
    labels: ArrayLike,
    query: ArrayLike,
    length: ArrayLike,
    groups: ArrayLike | None = None,
    query_groups: ArrayLike | None = None,
) -> np.ndarray:
    """:func:`nearest` for NumPy, in float64, for queries ``(queries, features)``."""
    labels = np.asarray(labels, np.float64)[: int(np.asarray(length))]
    query = np.asarray(query, np.float64)
    if groups is None:
        return _search_host(labels, query)
    groups, query_groups = np.asarray(groups)[: len(labels)], np.asarray(query_groups)
    nearest = np.zeros(len(query), np.int32)
    for group in np.unique(query_groups):
        members, asking = np.flatnonzero(groups == group), np.flatnonzero(query_groups == group)
        nearest[asking] = members[_search_host(labels[members], query[asking])]
    return nearest


def _search_host(labels: np.ndarray, query: np.ndarray) -> np.ndarray:
    # A k-d tree returns any of several identical labels: search among the first of each.
    if labels.shape[1] == 1:
        values, first = np.unique(labels[:, 0], return_index=True)
        right = np.minimum(np.searchsorted(values, query[:, 0]), len(values) - 1)
        left = np.maximum(right - 1, 0)
        below, above = np.abs(query[:, 0] - values[left]), np.abs(values[right] - query[:, 0])
        is_left = (below < above) | ((below == above) & (first[left] < first[right]))
        return first[np.where(is_left, left, right)].astype(np.int32)
    values, first = np.unique(labels, axis=0, return_index=True)
    return _search_tree(cKDTree(values), first, query).astype(np.int32)


def _search_tree(tree: cKDTree, first: np.ndarray, query: np.ndarray) -> np.ndarray:
    """The earliest of the nearest labels: more neighbours are asked for while all are equally near.

    Labels on a grid are often equally near; a k-d tree's choice among them would bias the score.
    """
    nearest = np.empty(len(query), first.dtype)
    asking, neighbors = np.arange(len(query)), 2
    while asking.size:
        neighbors = min(neighbors, tree.n)
        ranks = range(1, neighbors + 1)
        distance, index = tree.query(query[asking], k=ranks, workers=-1)
        is_nearest = distance == distance[:, :1]
        nearest[asking] = np.where(is_nearest, first[index], np.iinfo(first.dtype).max).min(axis=1)
        asking = asking[is_nearest[:, -1]] if neighbors < tree.n else asking[:0]
        neighbors *= 4
    return nearest


@jax.jit
def nearest_under_jit(
    labels: Array,
    query: Array,
    length: ArrayLike,
    groups: Array | None = None,
    query_groups: Array | None = None,
) -> Array:
    """:func:`nearest` in float32 as one jitted function, for queries ``(queries, features)``."""
    if labels.shape[1] == 1 and groups is None:
        return _sorted_search(labels[:, 0], query[:, 0], length)
    return _brute_force(labels, query, length, groups, query_groups)


def _sorted_search(labels: Array, query: Array, length: ArrayLike) -> Array:
    labels = jnp.where(jnp.arange(len(labels), dtype=jnp.int32) < length, labels, jnp.inf)
    order = jnp.argsort(labels, stable=True).astype(jnp.int32)
    values = labels[order]
    # The left end of a run of identical labels is, the sort being stable, the earliest of them.
    right = jnp.minimum(jnp.searchsorted(values, query).astype(jnp.int32), length - 1)
    left = jnp.searchsorted(values, values[jnp.maximum(right - 1, 0)]).astype(jnp.int32)
    below, above = jnp.abs(query - values[left]), jnp.abs(values[right] - query)
    is_left = (below < above) | ((below == above) & (order[left] < order[right]))
    return order[jnp.where(is_left, left, right)]


def _brute_force(
    labels: Array,
    query: Array,
    length: ArrayLike,
    groups: Array | None,
    query_groups: Array | None,
) -> Array:
    groups = jnp.zeros(len(labels), jnp.int32) if groups is None else groups
    query_groups = jnp.zeros(len(query), jnp.int32) if query_groups is None else query_groups
    # Differences in units of the largest value, so that no square overflows: a power of 2, so that
    # scaling rounds nothing.
    largest = jnp.maximum(jnp.max(jnp.abs(labels)), jnp.max(jnp.abs(query)))
    exponent = jnp.maximum(jnp.frexp(largest)[1], 0)
    scale = jnp.ldexp(jnp.ones_like(largest), -exponent)
    padding = -len(labels) % LABEL_BLOCK
    blocks = (
        jnp.pad(labels, ((0, padding), (0, 0))).reshape(-1, LABEL_BLOCK, labels.shape[1]),
        jnp.pad(groups, (0, padding)).reshape(-1, LABEL_BLOCK),
        jnp.arange(len(labels) + padding, dtype=jnp.int32).reshape(-1, LABEL_BLOCK),
    )

    def search(asking: tuple[Array, Array]) -> Array:
        point, group = asking
        nothing = jnp.full((), jnp.inf, labels.dtype), jnp.zeros((), jnp.int32)
        return lax.scan(partial(_closer, point, group, length, scale), nothing, blocks)[0][1]

    return lax.map(search, (query, query_groups), batch_size=QUERY_BLOCK)


def _closer(
    point: Array,
    group: Array,
    length: ArrayLike,
    scale: Array,
    best: tuple[Array, Array],
    block: tuple[Array, Array, Array],
) -> tuple[tuple[Array, Array], None]:
    labels, groups, steps = block
    distance = jnp.sum(((labels - point[None, :]) * scale) ** 2, axis=1)
    distance = jnp.where((steps < length) & (groups == group), distance, jnp.inf)
    here = jnp.argmin(distance)
    is_closer = distance[here] < best[0]
    return (
        jnp.where(is_closer, distance[here], best[0]),
        jnp.where(is_closer, steps[here], best[1]),
    ), None
