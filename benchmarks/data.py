"""A recording, and models that CEBRA fitted to it for a few steps."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

STEPS, NEURONS, LABELS, BATCH_SIZE = 10_000, 120, 3, 512


def recording(
    steps: int = STEPS, neurons: int = NEURONS, dimensions: int = LABELS
) -> tuple[np.ndarray, np.ndarray]:
    """Spike counts that depend on smooth labels."""
    rng = np.random.default_rng(0)
    labels = rng.normal(size=(steps, dimensions)).cumsum(0)
    labels /= labels.std(0)
    rates = np.exp(labels @ rng.normal(size=(dimensions, neurons)) / (2 * dimensions**0.5) - 1)
    return rng.poisson(rates).astype(np.float32), labels.astype(np.float32)


def label_arrays(kind: str) -> tuple[np.ndarray, list[np.ndarray]]:
    """The recording, and the labels that make CEBRA sample in a way."""
    X, continuous = recording()
    discrete = (np.arange(len(X)) // 50 % 8).astype(np.int64)
    kinds = {
        "time": [],
        "time-delta": [continuous],
        "discrete": [discrete],
        "mixed": [continuous, discrete],
    }
    return X, kinds[kind]


def fitted(architecture: str, kind: str) -> tuple[Any, np.ndarray, list[np.ndarray]]:
    """An estimator of CEBRA, and what it was fitted to."""
    import cebra

    X, labels = label_arrays(kind)
    estimator = cebra.CEBRA(
        model_architecture=architecture,
        batch_size=BATCH_SIZE,
        max_iterations=10,
        time_offsets=10,
        output_dimension=3,
        num_hidden_units=32,
        device="cpu",
    ).fit(X, *labels)
    return estimator, X, labels


@contextmanager
def stored(architecture: str, kind: str) -> Iterator[tuple[Path, Path]]:
    """Files of a fitted model and of what it was fitted to."""
    estimator, X, labels = fitted(architecture, kind)
    with TemporaryDirectory() as folder:
        model, data = Path(folder, "model.pt"), Path(folder, "data.npz")
        estimator.save(str(model))
        np.savez(data, X=X, **{f"labels{i}": label for i, label in enumerate(labels)})
        yield model, data
