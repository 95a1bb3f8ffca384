"""Fresh processes that import, load a model and score 500 batches; and the command ``score``."""

from tempfile import TemporaryDirectory

from benchmarks.data import stored
from benchmarks.infonce import MAIN, PEER
from benchmarks.measure import Comparison, compare, run_python, seconds

OURS = """
import sys, numpy, cebra_jax_metrics as cjm
with numpy.load(sys.argv[2]) as data:
    print(cjm.infonce_loss(
        cjm.load(sys.argv[1]), data["X"], data["labels0"], num_batches=int(sys.argv[3])))
"""
THEIRS = """
import sys, numpy, cebra
with numpy.load(sys.argv[2]) as data:
    print(cebra.sklearn.metrics.infonce_loss(
        cebra.CEBRA.load(sys.argv[1], weights_only=False), data["X"], data["labels0"],
        num_batches=int(sys.argv[3])))
"""


def run(quick: bool) -> list[Comparison]:
    """Whole processes, without and with JAX's compilation cache."""
    num_batches, repeats = (20, 1) if quick else (500, 3)
    with stored(*MAIN) as (model, data), TemporaryDirectory() as cache:
        arguments = model, data, num_batches
        cached = {
            "JAX_COMPILATION_CACHE_DIR": cache,
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        }
        command = "-m", "cebra_jax_metrics", "score", model, data, "--num-batches", num_batches
        home = {"XDG_CACHE_HOME": cache}

        def theirs() -> str:
            return run_python("-c", THEIRS, *arguments)

        rows = [
            compare(
                "whole process, no cache",
                PEER,
                lambda: run_python("-c", OURS, *arguments),
                theirs,
                repeats,
            )
        ]
        others = {
            "whole process, compilation cache": lambda: run_python(
                "-c", OURS, *arguments, environment=cached
            ),
            "command `score` (which keeps a cache)": lambda: run_python(*command, environment=home),
            "command `--no-cache score`": lambda: run_python(
                *command[:2], "--no-cache", *command[2:], environment=home
            ),
        }
        for case, ours in others.items():
            ours()
            times = [seconds(ours) for _ in range(repeats)]
            rows.append(Comparison(case, PEER, times, rows[0].theirs))
    return rows
