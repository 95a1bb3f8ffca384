"""Score models on a recording with all devices of several processes, or hosts.

Start the same command once per process; README, "Many devices, many hosts", says how.

    python examples/many_hosts.py recording.npy labels.npy model.pt [model.pt ...]
        [--split rows | models] [--num-batches 500]
        [--coordinator HOST:PORT --num-processes N --process-id I]

With ``--split rows`` all processes work on one model at a time: each reads its own rows of the
recording, and draws and scores its own batches. With ``--split models`` each scores models of its
own. Both give the scores that one process gives.
"""

import argparse

import jax
import numpy as np
from jax.experimental.multihost_utils import process_allgather

from cebra_jax_metrics import goodness_of_fit_score, load

# Seconds after which the others give up on a process that died, or did not start.
PATIENCE, STARTING = 20, 60


def connect(coordinator: str | None, num_processes: int | None, process_id: int | None) -> None:
    """Find the other processes; Slurm, Open MPI and TPU pods need no arguments."""
    jax.distributed.initialize(
        coordinator,
        num_processes,
        process_id,
        initialization_timeout=STARTING,
        heartbeat_timeout_seconds=PATIENCE,
        shutdown_timeout_seconds=PATIENCE,
    )


def scores_by_rows(
    paths: list[str], X: np.ndarray, labels: np.ndarray, num_batches: int
) -> np.ndarray:
    """Bits and their standard errors ``(models, 2)``, all processes working on each model."""
    mesh = jax.make_mesh((jax.device_count(),), ("devices",))
    scores = []
    for path in paths:
        estimate = goodness_of_fit_score(
            path, X, labels, num_batches=num_batches, return_estimate=True, mesh=mesh
        )
        scores.append([float(estimate.bits), float(estimate.bits_stderr)])
    return np.array(scores)


def scores_by_models(
    paths: list[str], X: np.ndarray, labels: np.ndarray, num_batches: int
) -> np.ndarray:
    """Bits and their standard errors ``(models, 2)``, each process working on models of its own."""
    processes, here = jax.process_count(), jax.process_index()
    if len(paths) < processes:
        raise SystemExit(f"There are {processes} processes, but only {len(paths)} models.")
    own = np.full((-(-len(paths) // processes), 2), np.nan)
    for place, path in enumerate(paths[here::processes]):
        estimate = goodness_of_fit_score(
            load(path), X, labels, num_batches=num_batches, return_estimate=True
        )
        own[place] = float(estimate.bits), float(estimate.bits_stderr)
    everyone = process_allgather(own, tiled=False).reshape(processes, -1, 2)
    return everyone.transpose(1, 0, 2).reshape(-1, 2)[: len(paths)]


def main() -> None:
    """Read the command line, score, and print a table from the first process."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("recording", help=".npy file (time, neurons)")
    parser.add_argument("labels", help=".npy file (time,) or (time, features)")
    parser.add_argument("models", nargs="+", help="files that cebra.CEBRA.save wrote")
    parser.add_argument("--split", choices=["rows", "models"], default="rows")
    parser.add_argument("--num-batches", type=int, default=500)
    parser.add_argument("--coordinator", metavar="HOST:PORT")
    parser.add_argument("--num-processes", type=int)
    parser.add_argument("--process-id", type=int)
    arguments = parser.parse_args()
    X = np.load(arguments.recording, mmap_mode="r")  # only the rows that are needed are read
    labels = np.load(arguments.labels)
    connect(arguments.coordinator, arguments.num_processes, arguments.process_id)
    score = scores_by_rows if arguments.split == "rows" else scores_by_models
    scores = score(arguments.models, X, labels, arguments.num_batches)
    if jax.process_index() == 0:
        for path, (bits, stderr) in zip(arguments.models, scores, strict=True):
            print(f"{path}\t{bits:.6f}\t{stderr:.6f}")


if __name__ == "__main__":
    main()
