"""Distributions of batches: references, positives and negatives as indices of time steps."""

from cebra_jax_metrics.samplers.base import Batch, Conditional, Proposal, Sampler
from cebra_jax_metrics.samplers.delta import DeltaNormal, TimeDelta
from cebra_jax_metrics.samplers.discrete import Discrete
from cebra_jax_metrics.samplers.full import FullBatch
from cebra_jax_metrics.samplers.hybrid import Hybrid, HybridBatch
from cebra_jax_metrics.samplers.mixed import Mixed
from cebra_jax_metrics.samplers.multisession import (
    DiscreteMultisession,
    Multisession,
    MultisessionBatch,
)
from cebra_jax_metrics.samplers.soft import Soft, SoftBatch
from cebra_jax_metrics.samplers.time import Time

__all__ = [
    "Batch",
    "Conditional",
    "DeltaNormal",
    "Discrete",
    "DiscreteMultisession",
    "FullBatch",
    "Hybrid",
    "HybridBatch",
    "Mixed",
    "Multisession",
    "MultisessionBatch",
    "Proposal",
    "Sampler",
    "Soft",
    "SoftBatch",
    "Time",
    "TimeDelta",
]
