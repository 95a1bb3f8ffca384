"""A small example: a model that CEBRA itself trained on a simulated recording of place cells."""

from importlib import resources
from typing import NamedTuple

import numpy as np

from cebra_jax_metrics.checkpoints import load
from cebra_jax_metrics.metrics import goodness_of_fit_history, goodness_of_fit_score
from cebra_jax_metrics.model import Checkpoint

SHIFT = 1500  # steps; long enough that position then says nothing of position now


class Demo(NamedTuple):
    """The model and its recording.

    Attributes:
        checkpoint: ``offset10-model``, three dimensions, trained by CEBRA.
        spikes: Simulated spike counts ``(time, neurons)`` in bins of 25 ms.
        position: Labels ``(time, 3)``: metres on the track, running right, running left.
        cebra_bits: Goodness of fit that CEBRA gave for them, bits.
        cebra_version: Version of CEBRA that trained and scored the model.
    """

    checkpoint: Checkpoint
    spikes: np.ndarray
    position: np.ndarray
    cebra_bits: float
    cebra_version: str


def load_demo() -> Demo:
    """Load the model and the recording that come with the package."""
    folder = resources.files(__package__)
    with resources.as_file(folder / "place_cells.pt") as path:
        checkpoint = load(path)
    with resources.as_file(folder / "place_cells.npz") as path, np.load(path) as data:
        return Demo(
            checkpoint,
            data["spikes"],
            data["position"],
            float(data["cebra_goodness_of_fit"]),
            str(data["cebra_version"]),
        )


def describe_demo() -> str:
    """Score the model of the demo, and say in a few lines what came out."""
    demo = load_demo()
    rows = []
    for name, labels in (
        ("on the recording", demo.position),
        (f"on labels shifted by {SHIFT} steps", np.roll(demo.position, SHIFT, axis=0)),
    ):
        estimate = goodness_of_fit_score(demo.checkpoint, demo.spikes, labels, return_estimate=True)
        rows.append((name, f"{float(estimate.bits):7.4f} ± {float(estimate.bits_stderr):.4f} bits"))
    last = goodness_of_fit_history(demo.checkpoint)[-1]
    rows.append(("at the last training step", f"{last:7.4f} bits"))
    rows.append((f"CEBRA {demo.cebra_version} on the recording", f"{demo.cebra_bits:7.4f} bits"))
    steps, neurons = demo.spikes.shape
    table = "\n".join(f"  {name:34} {value}" for name, value in rows)
    return (
        f"A rat on a linear track, simulated: {steps} steps of 25 ms, {neurons} place cells.\n"
        f"Goodness of fit of a model that CEBRA trained on it (0 bits is chance):\n\n{table}"
    )
