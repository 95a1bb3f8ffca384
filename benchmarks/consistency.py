"""Consistency between runs against CEBRA, and against one matrix product of the same size."""

import itertools
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from benchmarks.measure import Comparison, compare, peak_memory, seconds
from cebra_jax_metrics import consistency_score

NUMBERS, LENGTHS, WIDTHS = (2, 10, 40, 100), (1_000, 10_000, 100_000), (3, 8, 32)
LARGE = 10, 1_000_000, 8  # for memory
HEADLINES = {(2, 1_000, 3), (10, 100_000, 8), (40, 10_000, 8), (40, 10_000, 32), LARGE}
LONGEST = 30  # seconds that the peer may take, but for headlines
PEER = "CEBRA 0.6.1"


def embeddings(number: int, length: int, width: int) -> list[np.ndarray]:
    """Noise that shares some dimensions, float64."""
    rng = np.random.default_rng(0)
    shared = rng.normal(size=(length, 3))
    return [
        shared @ rng.normal(size=(3, width)) + rng.normal(size=(length, width))
        for _ in range(number)
    ]


def ours(data: list[np.ndarray]) -> object:
    """The scores as this package computes them."""
    return consistency_score(data, between="runs")


def theirs(data: list[np.ndarray]) -> object:
    """The scores as CEBRA computes them."""
    import cebra

    return cebra.sklearn.metrics.consistency_score(data, between="runs")


def ours_in_full(*sizes: str) -> None:
    """Data and scores, to measure memory."""
    ours(embeddings(*map(int, sizes)))


def theirs_in_full(*sizes: str) -> None:
    """The same of CEBRA."""
    theirs(embeddings(*map(int, sizes)))


def bare_product(data: list[np.ndarray]) -> Callable[[], object]:
    """One matrix product of all columns with each other: the least that any method does."""
    product = jax.jit(lambda x: jnp.einsum("np,nq->pq", x, x))
    with jax.enable_x64(True):
        columns = jnp.concatenate([jnp.asarray(x) for x in data], axis=1)

    def run() -> object:
        with jax.enable_x64(True):
            return product(columns).block_until_ready()

    return run


def run(quick: bool) -> list[Comparison]:
    """Time all sizes; CEBRA only where it takes no minutes."""
    import cebra  # noqa: F401 (its import is no part of what is timed)

    sizes = list(itertools.product(NUMBERS, LENGTHS, WIDTHS))
    chosen = [(2, 1_000, 3)] if quick else [*sizes, LARGE]
    return [row for size in tqdm(chosen, disable=None) for row in _compared(size)]


def _repeats(columns: int, length: int) -> int:
    """Fewer for larger products."""
    operations = columns**2 * length
    return 7 if operations < 1e10 else 3 if operations < 5e11 else 1


def _compared(size: tuple[int, int, int]) -> Iterator[Comparison]:
    number, length, width = size
    data = embeddings(*size)
    case = f"{number} embeddings, {length} x {width}, float64"
    expected = seconds(lambda: theirs(data[:2])) * number * (number - 1) / 2
    repeats = 3 if expected < 15 else 1
    memory = peak_memory("benchmarks.consistency:ours_in_full", *size)
    is_headline = size in HEADLINES
    if expected < LONGEST or is_headline:
        yield compare(
            case,
            PEER,
            lambda: ours(data),
            lambda: theirs(data),
            repeats,
            headline=is_headline,
            our_memory=memory,
            their_memory=peak_memory(
                "benchmarks.consistency:theirs_in_full", *size, also_import="cebra"
            ),
        )
    limit = bare_product(data)
    yield compare(
        case,
        "bare matrix product",
        lambda: ours(data),
        limit,
        _repeats(number * width, length),
        headline=is_headline,
        our_memory=memory,
    )
