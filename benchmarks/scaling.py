"""How time and memory of ``estimate_infonce`` grow with the sizes that users choose."""

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import jax
import numpy as np

from benchmarks.measure import Comparison, Growth, peak_memory, warm
from cebra_jax_metrics import Encoder, Estimate, Model, estimate_infonce, samplers

KEY = jax.random.key(0)
NEURONS = 100
DEFAULT = {"steps": 10_000, "dimensions": 3, "batch_size": 512, "num_batches": 500}
SIZES = {
    "steps": [1_000, 10_000, 100_000, 1_000_000],
    "dimensions": [1, 2, 3, 8, 64, 768],
    "batch_size": [128, 512, 2_048, 8_192, 65_536],
    "num_batches": [50, 500, 5_000],
}
QUICK = {"steps": [1_000, 4_000], "num_batches": [5, 10]}
# Fewer where one run would take long; the time is that of so many.
FEWER = {"batch_size": {"num_batches": 4}, "dimensions": {"num_batches": 50}}


def labels_of(steps: int, dimensions: int) -> np.ndarray:
    """A random walk."""
    labels = np.random.default_rng(0).normal(size=(steps, dimensions)).astype(np.float32)
    np.cumsum(labels, axis=0, out=labels)
    labels /= labels.std(0)
    return labels


def recording_on_disk(path: Path, steps: int) -> None:
    """Spike counts, written in parts."""
    rng = np.random.default_rng(0)
    X = np.lib.format.open_memmap(path, "w+", np.float32, (steps, NEURONS))
    for start in range(0, steps, 10_000):
        X[start : start + 10_000] = rng.poisson(1.0, X[start : start + 10_000].shape)
    X.flush()


def score(X: np.ndarray, labels: np.ndarray, batch_size: int, num_batches: int) -> Estimate:
    """500 batches of 512 by default, with the encoder ``offset10-model``."""
    model = Model((Encoder.init(KEY, "offset10-model", NEURONS),))
    sampler = samplers.TimeDelta(labels, 10)
    estimate = estimate_infonce(
        KEY, model, X, sampler, batch_size=batch_size, num_batches=num_batches
    )
    return jax.block_until_ready(estimate)


def score_file(path: str, *sizes: str) -> None:
    """The same from a memory map, to measure memory."""
    steps, dimensions, batch_size, num_batches = map(int, sizes)
    X = np.load(path, mmap_mode="r")
    score(X[:steps], labels_of(steps, dimensions), batch_size, num_batches)


def run(quick: bool) -> list[Growth | Comparison]:
    """Each size by itself, the others as they are by default."""
    with TemporaryDirectory() as folder:
        path = Path(folder, "X.npy")
        sizes = QUICK if quick else SIZES
        recording_on_disk(path, max(*sizes["steps"], DEFAULT["steps"]))
        return [_growth(path, name, values, quick) for name, values in sizes.items()]


def _growth(path: Path, name: str, values: Sequence[int], quick: bool) -> Growth:
    times, memory = [], []
    X = np.load(path, mmap_mode="r")
    for value in values:
        sizes = {**DEFAULT, **FEWER.get(name, {}), **({"num_batches": 5} if quick else {})}
        sizes[name] = value
        labels = labels_of(sizes["steps"], sizes["dimensions"])
        data = X[: sizes["steps"]]
        batches = sizes["batch_size"], sizes["num_batches"]
        times.append(warm(lambda d=data, y=labels, b=batches: score(d, y, *b), 1))
        memory.append(
            peak_memory(
                "benchmarks.scaling:score_file", path, *sizes.values(), also_import="scipy.spatial"
            )
        )
    others = {**DEFAULT, **FEWER.get(name, {})}
    others.pop(name)
    fixed = ", ".join(f"{key} {value}" for key, value in others.items())
    case = f"{name}, offset10-model, {NEURONS} neurons, time-delta, {fixed}"
    return Growth(case, list(values), times, memory)
