"""Exact nearest neighbours: on the host, under jit, and both alike."""

import subprocess
import sys

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cebra_jax_metrics import neighbors
from cebra_jax_metrics.neighbors import nearest, nearest_on_host, nearest_under_jit


def squared_distances(labels, query):
    labels, query = np.asarray(labels, np.float64), np.asarray(query, np.float64)
    return ((query[:, None] - labels[None]) ** 2).sum(-1)


def assert_right(labels, query, found, tolerance):
    """The definition of the contract: the smallest distance, and the earliest of equal labels."""
    distances = squared_distances(labels, query)
    smallest = distances.min(1)
    chosen = distances[np.arange(len(query)), found]
    assert (chosen <= smallest + tolerance * (1 + smallest)).all()
    for label, step in zip(np.asarray(labels)[found], found, strict=True):
        assert step == np.flatnonzero((np.asarray(labels) == label).all(1))[0]


def case(seed, steps, features, queries, grid):
    """Labels on a grid have many duplicates and ties."""
    rng = np.random.default_rng(seed)
    labels, query = rng.normal(size=(steps, features)), 1.5 * rng.normal(size=(queries, features))
    if grid:
        labels, query = np.round(4 * labels) / 4, np.round(8 * query) / 8
    return labels.astype(np.float32), query.astype(np.float32)


sizes = dict(
    seed=st.integers(0, 2**31),
    steps=st.integers(1, 70),
    features=st.integers(1, 5),
    queries=st.integers(1, 40),
    grid=st.booleans(),
)


@hypothesis.settings(max_examples=150, deadline=None, derandomize=True)
@hypothesis.given(**sizes)
def test_host_finds_the_nearest(seed, steps, features, queries, grid):
    labels, query = case(seed, steps, features, queries, grid)
    assert_right(labels, query, nearest_on_host(labels, query, steps), tolerance=1e-14)


@pytest.mark.parametrize("features", [1, 2, 3, 8, 12, 64, 100])
@pytest.mark.parametrize("grid", [False, True])
def test_jit_finds_the_nearest_and_agrees_with_the_host(features, grid):
    labels, query = case(features, 5000, features, 300, grid)
    found = np.asarray(nearest_under_jit(labels, query, len(labels)))
    assert_right(labels, query, found, tolerance=1e-6)
    on_host = nearest_on_host(labels, query, len(labels))
    rows = np.arange(len(query))
    distances = squared_distances(labels, query)
    differ = found != on_host
    gap = distances[rows, found] - distances[rows, on_host]
    assert (np.abs(gap[differ]) <= 1e-6 * (1 + distances[rows, on_host][differ])).all()
    assert differ.mean() == 0 if grid else differ.mean() < 0.01


@pytest.mark.parametrize("features", [1, 3])
def test_padding_is_never_found(features):
    labels, query = case(0, 50, features, 200, False)
    padded = np.concatenate([labels, np.zeros((30, features), np.float32)])
    expected = nearest_on_host(labels, query, 50)
    np.testing.assert_array_equal(nearest_on_host(padded, query, 50), expected)
    np.testing.assert_array_equal(nearest_under_jit(padded, query, 50), expected)


@pytest.mark.parametrize("features", [1, 3])
def test_groups_restrict_the_candidates(features):
    labels, query = case(1, 80, features, 120, False)
    rng = np.random.default_rng(2)
    groups, asked = rng.integers(0, 3, 80), rng.integers(0, 3, 120)
    distances = squared_distances(labels, query)
    distances[asked[:, None] != groups[None]] = np.inf
    for search in (nearest_on_host, nearest_under_jit):
        np.testing.assert_array_equal(search(labels, query, 80, groups, asked), distances.argmin(1))


def test_large_labels_do_not_lose_the_nearest():
    """The case that a² - 2ab + b² in float32 gets wrong."""
    rng = np.random.default_rng(3)
    labels = (1000 + rng.uniform(size=(2000, 3))).astype(np.float32)
    query = (1000 + rng.uniform(size=(500, 3))).astype(np.float32)
    expected = squared_distances(labels, query).argmin(1)
    np.testing.assert_array_equal(nearest_on_host(labels, query, 2000), expected)
    np.testing.assert_array_equal(nearest_under_jit(labels, query, 2000), expected)


@pytest.mark.parametrize("features", [1, 3, 70])
@pytest.mark.parametrize("scale", [1e-10, 1e20, 1e30])
def test_labels_of_any_size(features, scale):
    labels, query = case(5, 300, features, 100, False)
    labels, query = (x * np.float32(scale) for x in (labels, query))
    expected = nearest_on_host(labels, query, 300)
    assert_right(labels / np.float32(scale), query / np.float32(scale), expected, tolerance=1e-6)
    np.testing.assert_array_equal(nearest_under_jit(labels, query, 300), expected)


@pytest.mark.parametrize("features", [1, 2])
def test_nearest_works_on_any_shape_and_under_transformations(features):
    labels, query = (jnp.asarray(x) for x in case(4, 60, features, 24, False))
    expected = np.asarray(nearest(labels, query))
    assert expected.dtype == np.int32
    stacked = query.reshape(4, 6, features)
    np.testing.assert_array_equal(nearest(labels, stacked), expected.reshape(4, 6))
    np.testing.assert_array_equal(jax.jit(nearest)(labels, query), expected)
    np.testing.assert_array_equal(
        jax.vmap(nearest, (None, 0))(labels, stacked), expected.reshape(4, 6)
    )


def test_single_label():
    labels, query = np.zeros((1, 2), np.float32), np.ones((3, 2), np.float32)
    for search in (nearest_on_host, nearest_under_jit):
        np.testing.assert_array_equal(search(labels, query, 1), [0, 0, 0])
        np.testing.assert_array_equal(search(labels[:, :1], query[:, :1], 1), [0, 0, 0])


@pytest.mark.heavy
@pytest.mark.parametrize("rest", [1, 20, 400])
def test_ties_of_labels_that_rest_on_a_grid(rest):
    """Changes of several steps lead to places between labels, equally near to some of them."""
    rng = np.random.default_rng(6)
    path = np.clip(rng.integers(-1, 2, (40_000 // rest, 2)).cumsum(0), -30, 30)
    labels = np.repeat(path, rest, axis=0).astype(np.float32)
    change = labels[400:] - labels[:-400]
    query = labels[rng.integers(0, len(labels), 100)] + rng.permutation(change)[:100]
    expected = squared_distances(labels, query).argmin(1)  # the earliest
    np.testing.assert_array_equal(nearest_on_host(labels, query, len(labels)), expected)
    np.testing.assert_array_equal(nearest_under_jit(labels, query, len(labels)), expected)


@pytest.mark.parametrize("spacing", [0.0, 1e-7])
def test_labels_that_a_product_cannot_tell_apart(spacing, monkeypatch):
    """All are candidates; they are compared in pieces that end within one query's."""
    monkeypatch.setattr(neighbors, "CANDIDATE_VALUES", 100 * 70)
    rng = np.random.default_rng(7)
    labels = rng.normal(size=(1, 70)) + spacing * rng.normal(size=(3000, 70))
    query = np.concatenate([labels[rng.integers(0, 3000, 20)], 1e3 * rng.normal(size=(5, 70))])
    labels, query = labels.astype(np.float32), query.astype(np.float32)
    expected = squared_distances(labels, query).argmin(1)
    np.testing.assert_array_equal(nearest_on_host(labels, query, 3000), expected)


def test_queries_far_from_tiny_labels():
    labels, query = case(8, 300, 70, 10, False)
    labels, query = labels * np.float32(1e-30), query * np.float32(1e30)
    expected = squared_distances(labels, query).argmin(1)
    np.testing.assert_array_equal(nearest_on_host(labels, query, 300), expected)


INTERRUPTED_SEARCHES = """
import signal
import time
import numpy as np
from cebra_jax_metrics.neighbors import host_search

signal.signal(signal.SIGALRM, signal.default_int_handler)
rng = np.random.default_rng(0)
labels, query = rng.normal(size=(20_000, 3)), rng.normal(size=(200_000, 3))
interrupted = 0
for _ in range(20):
    search = host_search(labels)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        search(query)
        time.sleep(1)
    except KeyboardInterrupt:
        interrupted += 1
    del search
print(interrupted)
"""


def test_search_that_is_interrupted():
    """Ctrl-C, in a notebook, say: SciPy's threads still read the tree, which must not be gone."""
    command = [sys.executable, "-c", INTERRUPTED_SEARCHES]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "20\n", "")
