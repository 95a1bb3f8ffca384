"""Training against CEBRA, and many seeds in one call against one call for each."""

from collections.abc import Iterator

import jax
import numpy as np

from benchmarks.data import BATCH_SIZE, recording
from benchmarks.measure import Comparison, compare
from cebra_jax_metrics import fit, samplers

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


def run(quick: bool) -> list[Comparison]:
    """Both."""
    num_steps, repeats = (2, 1) if quick else (100, 3)
    rows = list(against_cebra(num_steps, repeats))
    return [*rows, many_seeds(2 if quick else 20, repeats)]
