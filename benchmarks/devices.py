"""Two processes of one core each against one such process, on one score."""

import os
import socket
import subprocess
import sys
import tempfile
from contextlib import closing
from pathlib import Path

import jax
import numpy as np

from benchmarks.data import NEURONS, recording
from benchmarks.measure import Comparison
from cebra_jax_metrics import Encoder, Model, goodness_of_fit_score, save
from cebra_jax_metrics.model import Checkpoint

REPEATS = 3
CHUNK = 1024  # batches: whole chunks, so that a warm-up with one compiles what all need
CHUNKS = 60  # half a minute on one core


def score(coordinator: str, process: str, processes: str, folder: str, num_batches: str) -> None:
    """Score in one of several processes on one core of its own; print bits and seconds."""
    from time import perf_counter

    os.sched_setaffinity(0, {int(process)})
    jax.distributed.initialize(coordinator, int(processes), int(process))
    mesh = jax.make_mesh((jax.device_count(),), ("devices",))
    X, labels = (np.load(Path(folder, name), mmap_mode="r") for name in ("X.npy", "labels.npy"))

    def bits(num_batches: int) -> float:
        path = Path(folder, "model.safetensors")
        return goodness_of_fit_score(path, X, labels, num_batches=num_batches, mesh=mesh)

    bits(CHUNK)
    start = perf_counter()
    print(bits(int(num_batches)), perf_counter() - start)


def seconds_of(processes: int, folder: str, num_batches: int) -> tuple[float, float]:
    """Bits, and the time of the slowest process from the call to the score."""
    with closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        coordinator = f"127.0.0.1:{free.getsockname()[1]}"
    code = "import sys; from benchmarks.devices import score; score(*sys.argv[1:])"
    running = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", code, coordinator]
            + [str(argument) for argument in (process, processes, folder, num_batches)],
            stdout=subprocess.PIPE,
            text=True,
        )
        for process in range(processes)
    ]
    outputs = [process.communicate()[0] for process in running]
    if any(process.returncode for process in running):
        raise RuntimeError(f"A process failed: {[process.returncode for process in running]}.")
    bits, taken = zip(*(map(float, output.split()[-2:]) for output in outputs), strict=True)
    if len(set(bits)) > 1:
        raise RuntimeError(f"The processes disagree: {bits}.")
    return bits[0], max(taken)


def run(quick: bool) -> list[Comparison]:
    """In turns, all compiled."""
    num_batches, repeats = (CHUNK, 1) if quick else (CHUNKS * CHUNK, REPEATS)
    X, labels = recording()
    encoder = Encoder.init(jax.random.key(0), "offset10-model", NEURONS, 32, 3)
    settings = {"batch_size": 512, "time_offsets": 10, "conditional": "time_delta"}
    with tempfile.TemporaryDirectory() as folder:
        np.save(Path(folder, "X.npy"), X)
        np.save(Path(folder, "labels.npy"), labels)
        save(Checkpoint(Model((encoder,)), settings), Path(folder, "model.safetensors"))
        two, one = [], []
        for _ in range(repeats):
            bits, taken = seconds_of(2, folder, num_batches)
            two.append(taken)
            alone, taken = seconds_of(1, folder, num_batches)
            one.append(taken)
            if not np.isclose(bits, alone, rtol=1e-6, atol=1e-6):
                raise RuntimeError(f"Two processes score {bits}, one {alone}.")
    case = f"{num_batches} batches of 512, offset10-model, two processes of one core each"
    return [Comparison(case, "one process of one core", two, one)]
