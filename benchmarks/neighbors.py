"""Nearest labels against SciPy, scikit-learn and a brute force in NumPy; and how time grows."""

from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from scipy.spatial import cKDTree
from sklearn.neighbors import NearestNeighbors

from benchmarks.measure import Comparison, Growth, compare, warm
from cebra_jax_metrics.neighbors import host_search, nearest_on_host, nearest_under_jit

KINDS = ("smooth", "independent")
QUERIES = 16_384


def labels_and_queries(
    kind: str, steps: int, dimensions: int, queries: int
) -> tuple[np.ndarray, np.ndarray]:
    """Labels along a random walk or independent of each other; queries as of ``TimeDelta``."""
    rng = np.random.default_rng(0)
    labels = rng.normal(size=(steps, dimensions))
    if kind == "smooth":
        labels = labels.cumsum(0)
        labels /= labels.std(0)
    change = labels[10:] - labels[:-10]
    picked = rng.integers(0, steps, queries), rng.integers(0, len(change), queries)
    query = labels[picked[0]] + change[picked[1]]
    return labels.astype(np.float32), query.astype(np.float32)


def brute_force(labels: np.ndarray, query: np.ndarray) -> np.ndarray:
    """Squared distances by a product, in blocks."""
    squares = (labels**2).sum(1)
    blocks = np.array_split(query, max(1, len(query) // 512))
    return np.concatenate([(squares - 2 * q @ labels.T).argmin(1) for q in blocks])


def peers(labels: np.ndarray, query: np.ndarray) -> dict[str, Callable[[], object]]:
    """Other exact searches for the same; the brute force is exact up to rounding."""
    wide, points = labels.astype(np.float64), query.astype(np.float64)
    search = NearestNeighbors(n_neighbors=1, n_jobs=-1)
    return {
        "scipy cKDTree": lambda: cKDTree(wide).query(points, workers=-1),
        "scikit-learn": lambda: search.fit(wide).kneighbors(points),
        "NumPy brute force": lambda: brute_force(labels, query),
        "ours under jit": jax.tree_util.Partial(
            lambda *x: nearest_under_jit(*x, len(labels)).block_until_ready(),
            jnp.asarray(labels),
            jnp.asarray(query),
        ),
    }


def run(quick: bool) -> list[Comparison | Growth]:
    """Dimensions at one length, then lengths at one dimension."""
    return [*_dimensions(quick), *_lengths(quick)]


def _dimensions(quick: bool) -> Iterator[Comparison]:
    for kind in KINDS:
        for dimensions in (1, 3) if quick else (1, 2, 3, 8, 16, 64, 768):
            steps = 1_000 if quick else 10_000
            queries = QUERIES if dimensions <= 16 else QUERIES // 4
            labels, query = labels_and_queries(kind, steps, dimensions, queries)
            for peer, search in peers(labels, query).items():
                if dimensions > 16 and peer == "scipy cKDTree":
                    continue  # it takes minutes
                yield compare(
                    f"{queries} queries, {steps} {kind} labels of {dimensions} dimensions",
                    peer,
                    lambda a=labels, b=query: nearest_on_host(a, b, len(a)),
                    search,
                    1 if quick or dimensions > 16 else 3,
                    headline=kind == "smooth" and dimensions in (3, 768),
                )


def _lengths(quick: bool) -> Iterator[Growth]:
    sizes = [1_000, 10_000] if quick else [1_000, 10_000, 100_000, 1_000_000]
    for dimensions in (1, 2, 3):
        building, asking = [], []
        for steps in sizes:
            labels, query = (
                x.astype(np.float64)
                for x in labels_and_queries("smooth", steps, dimensions, 256_000)
            )
            building.append(warm(lambda labels=labels: host_search(labels)))
            search = host_search(labels)
            asking.append(warm(lambda search=search, query=query: search(query)))
        case = f"smooth labels of {dimensions} dimensions; labels:"
        yield Growth(f"256 000 queries, {case}", sizes, asking)
        yield Growth(f"preparing the search, {case}", sizes, building)
