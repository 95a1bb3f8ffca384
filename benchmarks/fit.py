"""Training against CEBRA, many seeds in one call, and gradients over many batches."""

from collections.abc import Callable, Iterator

import jax
import numpy as np

from benchmarks.data import BATCH_SIZE, NEURONS, recording
from benchmarks.measure import Comparison, compare, peak_memory
from cebra_jax_metrics import Encoder, Model, estimate_infonce, fit, samplers

PEER = "CEBRA 0.6.1"
SEEDS, TIME_OFFSET = 16, 10
SIZES = {"num_hidden_units": 32, "output_dimension": 8, "batch_size": BATCH_SIZE}
ARCHITECTURE = "offset10-model"


def against_cebra(num_steps: int, repeats: int) -> Iterator[Comparison]:
    """As many steps from new encoders, all included."""
    import cebra

    X, labels = recording()
    cases = {
        "time": (samplers.Time(len(X), TIME_OFFSET), []),
        "time_delta": (samplers.TimeDelta(labels, TIME_OFFSET), [labels]),
    }
    for conditional, (sampler, y) in cases.items():
        estimator = cebra.CEBRA(
            model_architecture=ARCHITECTURE,
            conditional=conditional,
            time_offsets=TIME_OFFSET,
            max_iterations=num_steps,
            device="cpu",
            **SIZES,
        )

        def ours(sampler: samplers.Sampler = sampler) -> object:
            options = {"architecture": ARCHITECTURE, "num_steps": num_steps, **SIZES}
            return jax.block_until_ready(fit(jax.random.key(0), X, sampler, **options).model)

        def theirs(estimator: object = estimator, y: list[np.ndarray] = y) -> object:
            return estimator.fit(X, *y)

        case = f"fit, {num_steps} steps, {ARCHITECTURE}, {conditional}"
        yield compare(case, PEER, ours, theirs, repeats)


def many_seeds(num_steps: int, repeats: int) -> Comparison:
    """Models from different keys, trained on different batches."""
    X, labels = recording()
    sampler = samplers.TimeDelta(labels, TIME_OFFSET)
    options = {"architecture": ARCHITECTURE, "num_steps": num_steps, **SIZES}
    keys = jax.random.split(jax.random.key(0), SEEDS)

    def together() -> object:
        return jax.block_until_ready(fit(keys, X, sampler, **options).model)

    def one_by_one() -> object:
        return [jax.block_until_ready(fit(key, X, sampler, **options).model) for key in keys]

    case = f"fit, {SEEDS} seeds in one call, {num_steps} steps each"
    return compare(case, f"{SEEDS} calls", together, one_by_one, repeats)


def losses(num_batches: int) -> tuple[Model, Callable[[Model], jax.Array]]:
    """A model, and its mean loss over batches as a function of it."""
    X, labels = recording()
    key = jax.random.key(0)
    sampler = samplers.TimeDelta(labels, TIME_OFFSET)

    def loss(model: Model) -> jax.Array:
        options = {"batch_size": BATCH_SIZE, "num_batches": num_batches}
        return estimate_infonce(key, model, X, sampler, **options).loss

    return Model((Encoder.init(key, ARCHITECTURE, NEURONS, 32, 8),)), loss


def gradient_in_full(num_batches: str) -> None:
    """Data, model and gradient, to measure memory."""
    model, loss = losses(int(num_batches))
    jax.block_until_ready(jax.grad(loss)(model))


def gradient(num_batches: int, repeats: int) -> Comparison:
    """Of the goodness of fit over many batches, against its value."""
    model, loss = losses(num_batches)
    value, derivative = jax.jit(loss), jax.jit(jax.grad(loss))
    return compare(
        f"gradient of the loss over {num_batches} batches of {BATCH_SIZE}, {ARCHITECTURE}",
        "the loss alone",
        lambda: jax.block_until_ready(derivative(model)),
        lambda: jax.block_until_ready(value(model)),
        repeats,
        our_memory=peak_memory("benchmarks.fit:gradient_in_full", num_batches),
    )


def run(quick: bool) -> list[Comparison]:
    """Training, many seeds, and a gradient over many batches."""
    num_steps, repeats = (2, 1) if quick else (100, 3)
    rows = list(against_cebra(num_steps, repeats))
    rows.append(many_seeds(2 if quick else 20, repeats))
    return [*rows, gradient(5 if quick else 500, repeats)]
