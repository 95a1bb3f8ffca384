"""Distributions of batches: references, positives and negatives as indices of time steps."""

from cebra_jax_metrics.samplers.base import Batch, Proposal, Sampler
from cebra_jax_metrics.samplers.delta import DeltaNormal, TimeDelta
from cebra_jax_metrics.samplers.discrete import Discrete
from cebra_jax_metrics.samplers.mixed import Mixed
from cebra_jax_metrics.samplers.time import Time

__all__ = [
    "Batch",
    "DeltaNormal",
    "Discrete",
    "Mixed",
    "Proposal",
    "Sampler",
    "Time",
    "TimeDelta",
]
