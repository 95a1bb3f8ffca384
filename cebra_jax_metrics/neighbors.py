"""Exact nearest neighbours in label space.

On the CPU and outside ``jit`` the search runs in float64, under ``jit`` and on accelerators in
float32. Three searches, of which ``benchmarks neighbors`` measures when each is the fastest:

- one-dimensional labels are sorted;
- SciPy's k-d tree, on the host only: its time hardly depends on how many labels there are, as long
  as they vary along few dimensions;
- a matrix product finds the labels that can be nearest by ``a² - 2ab + b²`` in float32, and only
  for them are differences taken and squared.

Among identical labels the earliest time step is returned; among others that are equally near too,
but from a tree whose labels showed no such case in a trial.
"""

import time
from collections import deque
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import ArrayLike

from cebra_jax_metrics.arrays import map_rows, on_cpu

# Up to so many dimensions the tree is always used on the host; up to so many it is tried.
TREE_DIMENSIONS, TRIED_DIMENSIONS = 8, 64
TRIAL_QUERIES = 128
# What the product takes for each query and label, and for each dimension of them (two cores).
PRODUCT_SECONDS, PRODUCT_SECONDS_PER_DIMENSION = 1e-9, 1e-11
QUERY_BLOCK, LABEL_BLOCK = 512, 2048
CANDIDATE_VALUES = 2**22  # how many are compared exactly at a time: bounds memory
# Trees of the last searches that were interrupted: threads that read them may go on for a while.
STILL_READ: deque[Any] = deque(maxlen=8)


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
    is_on_host = on_cpu(labels, query, length, groups, query_groups)
    search: Callable[..., Any] = nearest_on_host if is_on_host else nearest_under_jit
    as_known: Callable[..., Any] = np.asarray if is_on_host else jnp.asarray
    flat = as_known(query).reshape(-1, query.shape[-1])
    flat_groups = None if query_groups is None else as_known(query_groups).reshape(-1)
    found = search(labels, flat, length, groups, flat_groups)
    return jnp.asarray(found.reshape(query.shape[:-1]))


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
        return host_search(labels)(query)
    groups, query_groups = np.asarray(groups)[: len(labels)], np.asarray(query_groups)
    nearest = np.zeros(len(query), np.int32)
    for group in np.unique(query_groups):
        members, asking = np.flatnonzero(groups == group), np.flatnonzero(query_groups == group)
        found = host_search(labels[members])(np.take(query, asking, axis=0))
        nearest[asking] = members[found]
    return nearest


def host_search(labels: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """Prepare labels ``(time, features)`` in float64 for a search on the host."""
    dimensions = labels.shape[1]
    if dimensions == 1:
        return partial(_search_sorted, *np.unique(labels[:, 0], return_index=True))
    if dimensions > TRIED_DIMENSIONS:
        return partial(_search_product, labels)
    tree = _Tree(labels)
    return tree.search if dimensions <= TREE_DIMENSIONS else partial(_search_the_faster_way, tree)


def _search_the_faster_way(tree: "_Tree", query: np.ndarray) -> np.ndarray:
    if len(query) > TRIAL_QUERIES:
        start = time.perf_counter()
        tree.ask(query[:TRIAL_QUERIES])
        taken = (time.perf_counter() - start) / (TRIAL_QUERIES * len(tree.labels))
        if taken > PRODUCT_SECONDS + tree.labels.shape[1] * PRODUCT_SECONDS_PER_DIMENSION:
            return _search_product(tree.labels, query)
    return tree.search(query)


def _search_sorted(values: np.ndarray, first: np.ndarray, query: np.ndarray) -> np.ndarray:
    query = query[:, 0]
    right = np.minimum(np.searchsorted(values, query), len(values) - 1)
    left = np.maximum(right - 1, 0)
    below, above = np.abs(query - values[left]), np.abs(values[right] - query)
    is_left = (below < above) | ((below == above) & (first[left] < first[right]))
    return first[np.where(is_left, left, right)].astype(np.int32)


class _Tree:
    """SciPy's k-d tree, and the earliest of the nearest labels."""

    def __init__(self, labels: np.ndarray) -> None:
        from scipy.spatial import cKDTree  # takes its time to import

        # A tree returns any of several identical labels: it holds the first of each.
        self.labels = labels
        self.values, self.first = _distinct_rows(labels)
        self.first = self.first.astype(np.int32)
        self.tree = cKDTree(self.values, leafsize=24)

    @cached_property
    def has_ties(self) -> bool:
        """Whether labels, as those on a grid, are often equally near, so that one has to look.

        Of a k-d tree's choices among them a score would be biased. Decided by labels that change as
        they did elsewhere, so that it does not depend on the queries.
        """
        labels = self.labels.astype(np.float32)
        rng, count = np.random.default_rng(0), min(512, len(labels))
        now, then = rng.integers(0, len(labels), (2, count))
        before = np.maximum(then - rng.integers(1, 33, count), 0)  # labels may rest for a while
        near = labels[now] + (labels[then] - labels[before])
        distance, _ = self.ask(near.astype(float), k=2)
        return bool((distance[:, 0] == distance[:, 1]).any())

    def ask(self, query: np.ndarray, k: int | Sequence[int] = 1) -> tuple[np.ndarray, np.ndarray]:
        """Distances and indices from SciPy, whose threads outlive a call that Ctrl-C ends."""
        try:
            return self.tree.query(query, k=k, workers=-1)
        except BaseException:
            STILL_READ.append(self.tree)
            raise

    def search(self, query: np.ndarray) -> np.ndarray:
        """Index of the label nearest to each query."""
        order = _along_curve(query, self.values)  # neighbouring queries visit the same nodes
        query = np.take(query, order, axis=0)
        nearest = np.empty(len(query), np.int32)
        if self.has_ties:
            nearest[order] = self._earliest(query)
        else:
            nearest[order] = self.first[self.ask(query)[1]]
        return nearest

    def _earliest(self, query: np.ndarray) -> np.ndarray:
        """More neighbours are asked for while all are equally near."""
        nearest = np.empty(len(query), np.int32)
        asking, neighbors = np.arange(len(query)), 2
        while asking.size:
            neighbors = min(neighbors, self.tree.n)
            ranks = range(1, neighbors + 1)
            distance, index = self.ask(query[asking], k=ranks)
            is_nearest = distance == distance[:, :1]
            earliest = np.where(is_nearest, self.first[index], np.iinfo(np.int32).max).min(axis=1)
            nearest[asking] = earliest
            asking = asking[is_nearest[:, -1]] if neighbors < self.tree.n else asking[:0]
            neighbors *= 4
        return nearest


def _distinct_rows(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Distinct rows, and the first place of each."""
    column = np.sort(rows[:, 0])
    if (column[1:] != column[:-1]).all():
        return rows, np.arange(len(rows))
    return np.unique(rows, axis=0, return_index=True)


def _along_curve(points: np.ndarray, box: np.ndarray) -> np.ndarray:
    """Order of points along a Z-curve through a box, by their first dimensions."""
    dimensions = min(points.shape[1], 4)
    bits = 16 // dimensions
    spread = np.zeros(2**bits, np.uint16)  # the bits of a number, so many places apart
    for bit in range(bits):
        spread |= (np.arange(2**bits, dtype=np.uint16) >> bit & 1) << (dimensions * bit)
    place = np.zeros(len(points), np.uint16)
    for axis in range(dimensions):
        low, high = box[:, axis].min(), box[:, axis].max()
        scale = (2**bits - 1) / (high - low) if high > low else 0.0
        cell = np.clip((points[:, axis] - low) * scale, 0, 2**bits - 1).astype(np.uint8)
        place |= spread[cell] << axis
    return np.argsort(place, kind="stable")


def _search_product(labels: np.ndarray, query: np.ndarray) -> np.ndarray:
    """A product in float32 tells which labels can be the nearest; those are compared in float64."""
    centre = labels.mean(axis=0)
    # Nothing overflows in units of the largest difference.
    scale = max(np.abs(bound - centre).max() for bound in _bounds(labels) + _bounds(query)) or 1.0
    rough = ((labels - centre) / scale).astype(np.float32)
    squares = np.sum(rough**2, axis=1, keepdims=True)
    longest = np.sqrt(squares.max())
    augmented = np.concatenate([rough, squares], axis=1)
    nearest = np.empty(len(query), np.int32)
    for start in range(0, len(query), QUERY_BLOCK):
        asked = query[start : start + QUERY_BLOCK]
        around = ((asked - centre) / scale).astype(np.float32)
        length = np.sqrt(np.sum(around**2, axis=1))
        # Twice what rounding can make of a² - 2ab, in a product of any order of summation.
        rounding = 2 * (labels.shape[1] + 8) * np.finfo(np.float32).eps
        slack = rounding * (length + longest) ** 2
        factors = np.concatenate([-2 * around, np.ones_like(around[:, :1])], axis=1)
        lowest = np.full(len(asked), np.inf, np.float32)
        best = np.full(len(asked), np.inf), np.zeros(len(asked), np.int32)
        for first in range(0, len(labels), LABEL_BLOCK):
            distance = factors @ augmented[first : first + LABEL_BLOCK].T
            lowest = np.minimum(lowest, distance.min(axis=1))
            # Of one axis it is ten times as fast as of two.
            places = np.flatnonzero(distance <= (lowest + slack)[:, None])
            which, candidate = np.divmod(places, distance.shape[1])
            best = _closest(labels, asked, which, candidate + first, best)
        nearest[start : start + QUERY_BLOCK] = best[1]
    return nearest


def _bounds(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return rows.min(axis=0), rows.max(axis=0)


def _closest(
    labels: np.ndarray,
    query: np.ndarray,
    which: np.ndarray,
    candidate: np.ndarray,
    best: tuple[np.ndarray, np.ndarray],
) -> tuple[np.ndarray, np.ndarray]:
    """Compare the best so far with candidates, which come in the order of time for each query."""
    squared, nearest = best
    size = max(1, CANDIDATE_VALUES // labels.shape[1])
    for start in range(0, len(which), size):
        asking, found = which[start : start + size], candidate[start : start + size]
        exact = np.sum((labels[found] - query[asking]) ** 2, axis=1)
        order = np.lexsort((found, exact, asking))
        asking, first = np.unique(asking[order], return_index=True)
        exact, found = exact[order][first], found[order][first]
        is_closer = exact < squared[asking]
        squared[asking[is_closer]] = exact[is_closer]
        nearest[asking[is_closer]] = found[is_closer]
    return squared, nearest


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
    return _product_search(labels, query, length, groups, query_groups)


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


def _product_search(
    labels: Array,
    query: Array,
    length: ArrayLike,
    groups: Array | None,
    query_groups: Array | None,
) -> Array:
    padding = -len(labels) % LABEL_BLOCK
    labels = jnp.pad(labels, ((0, padding), (0, 0)))
    groups = jnp.zeros(len(labels), jnp.int32) if groups is None else jnp.pad(groups, (0, padding))
    query_groups = jnp.zeros(len(query), jnp.int32) if query_groups is None else query_groups
    # In units of the largest value no square overflows; a power of 2, so that it rounds nothing.
    largest = jnp.maximum(jnp.max(jnp.abs(labels)), jnp.max(jnp.abs(query)))
    scale = jnp.ldexp(jnp.ones_like(largest), -jnp.clip(jnp.frexp(largest)[1], -120, 128))
    labels = labels * scale
    steps = jnp.arange(len(labels), dtype=jnp.int32)
    is_real = steps < length
    centre = jnp.sum(jnp.where(is_real[:, None], labels, 0), axis=0)
    centre /= jnp.asarray(length).astype(labels.dtype)
    centred = (labels - centre[None]).astype(jnp.float32)
    squares = jnp.where(is_real, jnp.sum(centred**2, axis=1), jnp.inf)
    longest = jnp.sqrt(jnp.max(jnp.where(is_real, squares, 0)))
    augmented = jnp.concatenate([centred, squares[:, None]], axis=1)
    blocks = tuple(
        x.reshape(-1, LABEL_BLOCK, *x.shape[1:]) for x in (augmented, labels, groups, steps)
    )

    def search(point: Array, group: Array) -> Array:
        scaled = point * scale
        around = (scaled - centre[None]).astype(jnp.float32)
        square = jnp.sum(around**2, axis=1)
        # What rounding can make of a² - 2ab, in a product of any order of summation.
        rounding = (labels.shape[1] + 8) * jnp.finfo(jnp.float32).eps
        slack = rounding * (jnp.sqrt(square) + longest) ** 2 - square
        factors = jnp.concatenate([-2 * around, jnp.ones_like(square)[:, None]], axis=1)
        nothing = jnp.full(len(point), jnp.inf, labels.dtype), jnp.zeros(len(point), jnp.int32)

        def visit(number: ArrayLike, best: tuple[Array, Array]) -> tuple[Array, Array]:
            block = tuple(lax.dynamic_index_in_dim(x, number, keepdims=False) for x in blocks)
            return _closer(scaled, factors, slack, group, best, block)

        num_blocks = (jnp.asarray(length) + LABEL_BLOCK - 1) // LABEL_BLOCK  # none of padding only
        return lax.fori_loop(0, num_blocks, visit, nothing)[1]

    return map_rows(search, (query, query_groups), QUERY_BLOCK)


def _closer(
    point: Array,
    factors: Array,
    slack: Array,
    group: Array,
    best: tuple[Array, Array],
    block: tuple[Array, ...],
) -> tuple[Array, Array]:
    """Take those labels of a block, nearest first, that can be nearer than the best so far."""
    augmented, labels, groups, steps = block
    rough = jnp.einsum("qd,ld->ql", factors, augmented, precision=lax.Precision.HIGHEST)
    rough = jnp.where(groups[None, :] == group[:, None], rough, jnp.inf)
    place = jnp.arange(len(labels), dtype=jnp.int32)[None, :]

    def first_lowest(is_left: ArrayLike) -> tuple[Array, Array]:
        """The smallest rough distance among those left, and the first place that has it."""
        lowest = jnp.min(jnp.where(is_left, rough, jnp.inf), axis=1)
        has_it = is_left & (rough == lowest[:, None])
        return lowest, jnp.min(jnp.where(has_it, place, len(labels) - 1), axis=1)

    def can_be_nearer(state: tuple[Array, Array, tuple[Array, Array]]) -> Array:
        lowest, _, (distance, _) = state
        limit = distance.astype(jnp.float32) + slack
        return jnp.any((lowest <= limit) & (lowest < jnp.inf))

    def take(
        state: tuple[Array, Array, tuple[Array, Array]],
    ) -> tuple[Array, Array, tuple[Array, Array]]:
        lowest, here, (distance, nearest) = state
        exact = jnp.sum((labels[here] - point) ** 2, axis=1)
        exact = jnp.where(lowest < jnp.inf, exact, jnp.inf)
        is_closer = (exact < distance) | ((exact == distance) & (steps[here] < nearest))
        best = jnp.where(is_closer, exact, distance), jnp.where(is_closer, steps[here], nearest)
        low, at = lowest[:, None], here[:, None]
        is_left = (rough > low) | ((rough == low) & (place > at))
        return *first_lowest(is_left), best

    return lax.while_loop(can_be_nearer, take, (*first_lowest(True), best))[2]
