"""Make the demo recording and the demo model: `place_cells.npz` and `place_cells.pt`.

The recording is simulated, not measured: a rat runs back and forth on a 1.6 m linear track while
40 hippocampal place cells fire Poisson spikes, counted in bins of 25 ms. The model is trained by
the real CEBRA, which also scores it; its score is stored next to the recording, so that it can be
compared without CEBRA installed.

Run with the `parity` extra installed (it brings CEBRA):

    python -m cebra_jax_metrics.demo.make_demo

Keys of `place_cells.npz`:

- `spikes`: (N, 40) uint8, spike counts per bin.
- `position`: (N, 3) float32: metres along the track, running right (0/1), running left (0/1).
- `cebra_goodness_of_fit`: CEBRA's goodness of fit of the model on this recording, in bits.
- `cebra_version`: the version of CEBRA that trained the model and computed the score.

The same machine and package versions give the same recording, weights and score on every run.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import cebra

SEED = 7
NUM_STEPS = 4000
NUM_NEURONS = 40
BIN_SECONDS = 0.025
TRACK_METRES = 1.6

MAX_ITERATIONS = 1500
NUM_BATCHES = 500
SHIFTS = (500, 1000, 1500, 2000, 2500, 3000)
SHIFT_BATCHES = 100

MODEL_PATH = Path(__file__).with_name("place_cells.pt")
DATA_PATH = Path(__file__).with_name("place_cells.npz")


def simulate(
    rng: np.random.Generator, num_steps: int, num_neurons: int
) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """Simulate spike counts (num_steps, num_neurons) and positions (num_steps, 3)."""
    metres, right = _simulate_running(rng, num_steps)
    spikes = rng.poisson(_firing_rates(rng, metres, right, num_neurons) * BIN_SECONDS)
    tracked = metres + rng.normal(0.0, 0.002, num_steps)  # the camera's error: 2 mm
    position = np.column_stack([tracked, right, ~right])
    return np.minimum(spikes, 255).astype(np.uint8), position.astype(np.float32)


def _simulate_running(
    rng: np.random.Generator, num_steps: int
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """True position in metres and whether the rat heads right, lap after lap."""
    metres: list[NDArray[np.float64]] = []
    right: list[NDArray[np.bool_]] = []
    start, heads_right, total = 0.05, True, 0
    while total < num_steps:
        margin = rng.uniform(0.02, 0.1)
        stop = TRACK_METRES - margin if heads_right else margin
        lap = _simulate_lap(rng, start, stop)
        metres.append(lap)
        right.append(np.full(len(lap), heads_right))
        start, heads_right, total = stop, not heads_right, total + len(lap)
    return np.concatenate(metres)[:num_steps], np.concatenate(right)[:num_steps]


def _simulate_lap(rng: np.random.Generator, start: float, stop: float) -> NDArray[np.float64]:
    """Run from `start` to `stop` at a varying speed, then pause for a random time."""
    seconds = abs(stop - start) / rng.uniform(0.25, 0.8)
    num_running = round(seconds / BIN_SECONDS)
    num_pausing = round(min(rng.exponential(0.8), 3.0) / BIN_SECONDS)
    wobble = np.convolve(rng.normal(size=num_running + 20), np.hanning(21), mode="valid")
    speed = np.exp(0.15 * wobble) * np.sin(np.linspace(0.15, np.pi - 0.15, num_running)) ** 0.5
    progress = np.cumsum(speed) / np.sum(speed)
    return np.concatenate([start + (stop - start) * progress, np.full(num_pausing, stop)])


def _firing_rates(
    rng: np.random.Generator,
    metres: NDArray[np.float64],
    right: NDArray[np.bool_],
    num_neurons: int,
) -> NDArray[np.float64]:
    """Rates in Hz of Gaussian place fields, about 60 % of which prefer one direction."""
    centre = rng.uniform(0.0, TRACK_METRES, num_neurons)
    width = rng.uniform(0.08, 0.2, num_neurons)
    peak = rng.uniform(10.0, 30.0, num_neurons)
    baseline = rng.uniform(0.1, 1.0, num_neurons)
    selective = rng.random(num_neurons) < 0.6
    prefers_right = rng.random(num_neurons) < 0.5
    field = np.exp(-0.5 * ((metres[:, None] - centre) / width) ** 2)
    gain = np.where(selective & (right[:, None] != prefers_right), 0.1, 1.0)
    return baseline + peak * gain * field


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Make CEBRA's initial weights and its sampling repeatable inside a `with` block.

    CEBRA 0.6.1 has no working seed for its samplers: each one seeds a generator of its own from
    the operating system. Inside the block each takes its seed from torch's global generator, which
    changes no distribution that is sampled from.
    """
    import torch
    from cebra.distributions.base import HasGenerator

    original = HasGenerator.__init__

    def reseeded(self: HasGenerator, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        self.generator.manual_seed(int(torch.randint(2**31, ())))

    torch.set_num_threads(1)
    torch.manual_seed(seed)
    with mock.patch.object(HasGenerator, "__init__", reseeded):
        yield


def train(spikes: NDArray[np.uint8], position: NDArray[np.float32]) -> cebra.CEBRA:
    """Fit CEBRA to the recording, with the position as the continuous label."""
    import cebra

    model = cebra.CEBRA(
        model_architecture="offset10-model",
        batch_size=512,
        learning_rate=1e-3,
        temperature=0.5,
        time_offsets=10,
        conditional="time_delta",
        output_dimension=3,
        num_hidden_units=32,
        max_iterations=MAX_ITERATIONS,
        device="cpu",
        verbose=False,
    )
    with _seeded(SEED):
        return model.fit(spikes.astype(np.float32), position)


def score(
    model: cebra.CEBRA,
    spikes: NDArray[np.uint8],
    position: NDArray[np.float32],
    num_batches: int,
) -> float:
    """CEBRA's own goodness of fit in bits, reseeded so that it is repeatable."""
    from cebra.integrations.sklearn import metrics

    counts = spikes.astype(np.float32)
    with _seeded(SEED + 1):
        return float(
            metrics.goodness_of_fit_score(model, counts, position, num_batches=num_batches)
        )


def _report_shifts(
    model: cebra.CEBRA, spikes: NDArray[np.uint8], position: NDArray[np.float32]
) -> None:
    """Print the score on labels shifted in time, which should be 0 bits or below."""
    for shift in SHIFTS:
        bits = score(model, spikes, np.roll(position, shift, axis=0), SHIFT_BATCHES)
        print(f"labels shifted by {shift} steps: {bits:.3f} bits")


def main() -> None:
    """Simulate, train, save, score and report."""
    import cebra
    from cebra.integrations.sklearn import metrics

    spikes, position = simulate(np.random.default_rng(SEED), NUM_STEPS, NUM_NEURONS)
    began = time.perf_counter()
    model = train(spikes, position)
    print(f"trained in {time.perf_counter() - began:.0f} s")
    model.save(str(MODEL_PATH))
    bits = score(model, spikes, position, NUM_BATCHES)
    np.savez_compressed(
        DATA_PATH,
        spikes=spikes,
        position=position,
        cebra_goodness_of_fit=np.float64(bits),
        cebra_version=np.str_(cebra.__version__),
    )
    history = metrics.goodness_of_fit_history(model)
    print(f"goodness of fit: {bits:.4f} bits; last training steps: {history[-50:].mean():.4f} bits")
    _report_shifts(model, spikes, position)
    for path in (DATA_PATH, MODEL_PATH):
        print(f"{path.name}: {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
