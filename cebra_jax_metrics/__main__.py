"""``python -m cebra_jax_metrics`` is the command ``cebra-jax-metrics``."""

import sys

from cebra_jax_metrics.cli import program

sys.exit(program())
