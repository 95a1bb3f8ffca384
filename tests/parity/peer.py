"""What the comparisons share: a simulated recording, and CEBRA fitted to it with a fixed seed."""

from typing import NamedTuple

import cebra
import numpy as np
import torch

SETTINGS = {
    "model_architecture": "offset5-model",
    "max_iterations": 5,
    "batch_size": 32,
    "num_hidden_units": 8,
    "output_dimension": 3,
    "device": "cpu",
    "verbose": False,
}


class Recording(NamedTuple):
    """Neurons tuned to a path in the plane."""

    X: np.ndarray
    position: np.ndarray
    height: np.ndarray  # rounded: has ties
    direction: np.ndarray  # every value of 0, 1, 2 occurs


def simulate(seed, num_steps, num_neurons):
    rng = np.random.default_rng(seed)
    turns = np.linspace(0, 2 * np.pi, num_steps)[:, None]
    position = np.sin(turns * rng.uniform(2, 4, 2) + rng.uniform(0, 2 * np.pi, 2))
    rates = np.cos(position @ rng.normal(size=(2, num_neurons)) * 2)
    X = rates + 0.3 * rng.normal(size=rates.shape)
    direction = np.digitize(position[:, 0], [-0.8, 0.3])
    return Recording(
        X.astype(np.float32),
        position.astype(np.float32),
        position[:, 1].round(2).astype(np.float32),
        direction.astype(np.int64),
    )


def seed(number):
    """Seed both global generators: CEBRA draws from torch's and from NumPy's."""
    torch.manual_seed(number)
    np.random.seed(number)  # noqa: NPY002 (the generator that CEBRA uses)


def fit(X, *labels, **settings):
    seed(0)
    return cebra.CEBRA(**{**SETTINGS, **settings}).fit(X, *labels)
