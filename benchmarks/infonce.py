"""The main case against CEBRA: goodness of fit of a model on a recording, 500 batches."""

import warnings

import numpy as np

from benchmarks.measure import Comparison, compare
from cebra_jax_metrics import from_cebra, infonce_loss

STEPS, NEURONS, LABELS, BATCH_SIZE = 10_000, 120, 3, 512


def recording() -> tuple[np.ndarray, np.ndarray]:
    """Spike counts that depend on three smooth labels."""
    rng = np.random.default_rng(0)
    labels = rng.normal(size=(STEPS, LABELS)).cumsum(0)
    labels /= labels.std(0)
    rates = np.exp(labels @ rng.normal(size=(LABELS, NEURONS)) / 2 - 1)
    return rng.poisson(rates).astype(np.float32), labels.astype(np.float32)


def run(quick: bool) -> list[Comparison]:
    """Time ``infonce_loss`` of both on a model that CEBRA trained for some steps."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import cebra

        X, labels = recording()
        estimator = cebra.CEBRA(
            model_architecture="offset10-model",
            batch_size=BATCH_SIZE,
            max_iterations=20,
            time_offsets=10,
            output_dimension=3,
            device="cpu",
        ).fit(X, labels)
        checkpoint = from_cebra(estimator)
        num_batches, repeats = (20, 2) if quick else (500, 3)

        def theirs() -> float:
            return cebra.sklearn.metrics.infonce_loss(estimator, X, labels, num_batches=num_batches)

        def ours() -> float:
            return infonce_loss(checkpoint, X, labels, num_batches=num_batches)

        case = (
            f"offset10-model, time_delta, {STEPS} steps, {NEURONS} neurons, {LABELS}-D labels, "
            f"{num_batches} batches of {BATCH_SIZE}, warm"
        )
        return [compare(case, f"CEBRA {cebra.__version__}", ours, theirs, repeats)]
