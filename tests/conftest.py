"""Strict JAX for all tests, and the golden files that CEBRA 0.6.1 made."""

import itertools
from pathlib import Path

import jax
import numpy as np
import pytest

from cebra_jax_metrics.cli import main

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")

GOLDEN = Path(__file__).parent / "golden"

TESTS = itertools.count()
MOST_MAPPINGS = 25_000  # of memory; Linux allows a process 65 530, and XLA crashes beyond that


def pytest_runtest_teardown():
    """Forget what is compiled before a long run of tests has mapped too much memory for it."""
    mappings = Path("/proc/self/maps")
    is_due = next(TESTS) % 25 == 0 and mappings.exists()
    if is_due and mappings.read_bytes().count(b"\n") > MOST_MAPPINGS:
        jax.clear_caches()


@pytest.fixture(scope="session")
def golden_folder():
    return GOLDEN


@pytest.fixture(scope="session")
def recording():
    """The small recording that the golden models were fitted to."""
    with np.load(GOLDEN / "recording.npz") as data:
        return dict(data)


@pytest.fixture
def run(capsys):
    """Run the command in this process: exit code, standard output, standard error."""

    def run(*arguments):
        try:
            code = main(["--no-cache", *(str(argument) for argument in arguments)])
        except SystemExit as stop:
            code = stop.code
        return code, *capsys.readouterr()

    return run
