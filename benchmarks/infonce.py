"""``infonce_loss`` against CEBRA: encoders and ways of sampling, 500 batches of 512."""

from pathlib import Path

import numpy as np

from benchmarks.data import BATCH_SIZE, LABELS, NEURONS, STEPS, fitted, stored
from benchmarks.measure import Comparison, compare, peak_memory
from cebra_jax_metrics import from_cebra, infonce_loss, load

PEER = "CEBRA 0.6.1"
MAIN = "offset10-model", "time-delta"
CASES = (
    MAIN,
    ("offset36-model", "time-delta"),
    ("offset10-model", "mixed"),
    ("offset10-model", "discrete"),
    ("offset10-model", "time"),
    ("offset1-model", "time-delta"),
    ("offset1-model", "time"),
    ("offset1-model", "discrete"),
)


def read(data: str) -> tuple[np.ndarray, list[np.ndarray]]:
    """The recording and its labels, of the file of ``benchmarks.data.stored``."""
    with np.load(data) as arrays:
        return arrays["X"], [arrays[name] for name in arrays.files if name != "X"]


def ours_from_files(model: str, data: str, num_batches: str) -> None:
    """Load and score."""
    X, labels = read(data)
    print(infonce_loss(load(model), X, *labels, num_batches=int(num_batches)))


def theirs_from_files(model: str, data: str, num_batches: str) -> None:
    """Load and score with CEBRA."""
    import cebra

    X, labels = read(data)
    estimator = cebra.CEBRA.load(model, weights_only=False)
    metrics = cebra.sklearn.metrics
    print(metrics.infonce_loss(estimator, X, *labels, num_batches=int(num_batches)))


def memory(model: Path, data: Path, num_batches: int) -> dict[str, float]:
    """Peak memory of both, each in a process of its own, compilation included."""
    arguments = str(model), str(data), num_batches
    ours = peak_memory(
        "benchmarks.infonce:ours_from_files", *arguments, also_import="scipy.spatial"
    )
    theirs = peak_memory("benchmarks.infonce:theirs_from_files", *arguments, also_import="cebra")
    return {"our_memory": ours, "their_memory": theirs}


def compared(architecture: str, kind: str, num_batches: int, repeats: int) -> Comparison:
    """Both on a model that CEBRA trained for some steps."""
    import cebra

    estimator, X, labels = fitted(architecture, kind)
    checkpoint = from_cebra(estimator)

    def theirs() -> float:
        metrics = cebra.sklearn.metrics
        return metrics.infonce_loss(estimator, X, *labels, num_batches=num_batches)

    def ours() -> float:
        return infonce_loss(checkpoint, X, *labels, num_batches=num_batches)

    more = {}
    if (architecture, kind) == MAIN:
        with stored(architecture, kind) as files:
            more = memory(*files, num_batches)
    case = f"{architecture}, {kind}, warm"
    return compare(case, PEER, ours, theirs, repeats, **more)


def run(quick: bool) -> list[Comparison]:
    """All cases on 10 000 steps of 120 neurons with 3-D labels."""
    print(f"{STEPS} steps, {NEURONS} neurons, {LABELS}-D labels, batches of {BATCH_SIZE}")
    cases = (MAIN, ("offset1-model", "mixed")) if quick else CASES
    num_batches, repeats = (20, 1) if quick else (500, 3)
    return [compared(*case, num_batches, repeats) for case in cases]
