"""The InfoNCE kernel against a bare ``sum(exp(x))``, encoders against their bare products."""

from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp

from benchmarks.measure import Comparison, compare
from cebra_jax_metrics import Criterion, Encoder, draw, evaluation, infonce, samplers
from cebra_jax_metrics.encoders import get_architecture
from cebra_jax_metrics.model import Windows

STEPS, NEURONS, UNITS, BATCH_SIZE = 10_000, 120, 32, 512
KEY = jax.random.key(0)


def bare_sum(pairs: int) -> Callable[[], object]:
    """Sum the exponentials of so many numbers."""
    x = jax.random.normal(KEY, (min(pairs, 2**27),))
    add = jax.jit(lambda x: jnp.sum(jnp.exp(x)))
    rounds = max(1, round(pairs / x.size))
    return lambda: [add(x).block_until_ready() for _ in range(rounds)]


def unit_rows(number: int, width: int) -> jax.Array:
    """Random embeddings of norm 1."""
    rows = jax.random.normal(KEY, (number, width))
    return rows / jnp.linalg.norm(rows, axis=1, keepdims=True)


def kernels(quick: bool) -> Iterator[Comparison]:
    """The losses of 500 batches of 512, gathered from 10 000 embeddings."""
    num_batches = 20 if quick else 500
    encoder = Encoder.init(KEY, "offset1-model", NEURONS)
    batch = draw(KEY, samplers.Time(STEPS), BATCH_SIZE, num_batches)
    limit = bare_sum(num_batches * BATCH_SIZE**2)
    for similarity in ("cosine", "euclidean"):
        for width in (3, 8, 32):
            windows = Windows(unit_rows(STEPS, width), STEPS)
            criterion = Criterion(similarity)

            def ours(windows: Windows = windows, criterion: Criterion = criterion) -> object:
                losses = evaluation.plain_losses(criterion, (encoder,), (windows,), None, batch)
                return jax.block_until_ready(losses)

            case = f"InfoNCE, {similarity}, d = {width}, {num_batches} batches of {BATCH_SIZE}"
            yield compare(case, "bare sum(exp)", ours, limit, 5, headline=similarity == "cosine")


def blocks(quick: bool) -> Iterator[Comparison]:
    """Blocks against all pairs at once: where ``infonce`` switches."""
    for size in (512, 1024) if quick else (512, 1024, 2048, 4096, 8192):
        rows = unit_rows(size, 8)
        for block_size in {512, 1024, 2048} - ({size} if size < 1024 else set()):
            if block_size >= size:
                continue

            def loss(block_size: int, rows: jax.Array = rows) -> object:
                return jax.block_until_ready(_loss(rows, block_size))

            yield compare(
                f"InfoNCE of {size} x {size}, d = 8, in blocks of {block_size}",
                "all pairs at once",
                lambda block_size=block_size, loss=loss: loss(block_size),
                lambda size=size, loss=loss: loss(size),
                5,
                headline=False,
            )


def _loss(rows: jax.Array, block_size: int) -> object:
    return _infonce(rows, rows, rows, block_size=block_size)


_infonce = jax.jit(infonce, static_argnames="block_size")


def encoders(quick: bool) -> Iterator[Comparison]:
    """Encoders, and their gradients, against the same matrix products without the rest."""
    x = jax.random.normal(KEY, (STEPS, NEURONS))
    for name in ("offset1-model", "offset10-model", "offset36-model")[: 1 if quick else 3]:
        encoder = Encoder.init(KEY, name, NEURONS, UNITS, 8)
        shapes = get_architecture(name).shapes(NEURONS, UNITS, 8) or {}
        weights = [
            jax.random.normal(KEY, (shape[1], shape[0] * (shape[2] if len(shape) > 2 else 1)))
            for shape in shapes.values()
            if len(shape) > 1
        ]
        inputs = [jax.random.normal(KEY, (STEPS, len(weight))) for weight in weights]

        def products(inputs: list[jax.Array], weights: list[jax.Array]) -> list[jax.Array]:
            return [a @ b for a, b in zip(inputs, weights, strict=True)]

        def total(inputs: list[jax.Array], weights: list[jax.Array]) -> jax.Array:
            return sum(jnp.sum(y**2) for y in products(inputs, weights))  # type: ignore[return-value]

        def loss(encoder: Encoder, x: jax.Array) -> jax.Array:
            return jnp.sum(encoder.encode_windows(x) ** 3)

        pairs = {
            "": (jax.jit(Encoder.encode_windows), jax.jit(products)),
            ", with gradient": (
                jax.jit(jax.value_and_grad(loss)),
                jax.jit(jax.value_and_grad(total, argnums=(0, 1))),
            ),
        }
        for what, (ours, theirs) in pairs.items():
            yield compare(
                f"{name} on {STEPS} steps{what}",
                "its bare matrix products",
                lambda ours=ours, encoder=encoder: jax.block_until_ready(ours(encoder, x)),
                lambda theirs=theirs, a=inputs, b=weights: jax.block_until_ready(theirs(a, b)),
                5,
                headline=False,
            )


def run(quick: bool) -> list[Comparison]:
    """Kernel, blocks and encoders."""
    return [*kernels(quick), *blocks(quick), *encoders(quick)]
