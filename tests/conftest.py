"""Strict JAX for all tests, and the golden files that CEBRA 0.6.1 made."""

from pathlib import Path

import jax
import numpy as np
import pytest

from cebra_jax_metrics.cli import main

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")

GOLDEN = Path(__file__).parent / "golden"


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
