"""Positives that are means over near labels, so that what is near can be learned."""

from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np
from jax import Array

from cebra_jax_metrics.arrays import is_traced
from cebra_jax_metrics.samplers.base import (
    Leaf,
    Proposal,
    SampleInTwoSteps,
    as_floats,
    jitted,
    pytree,
    set_fields,
)
from cebra_jax_metrics.samplers.delta import DeltaNormal, TimeDelta
from cebra_jax_metrics.smoothing import kernel_mean


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class SoftBatch:
    """References, negatives and where to look for positives; from ``draw`` with batches first.

    Attributes:
        reference: Indices of time steps ``(batch,)``, int32.
        query: Labels ``(batch, features)``: the positive is the mean of all embeddings, weighted by
            how near their labels are.
        negative: Indices of time steps ``(batch,)``, int32.
        sampler: The sampler, which says what is near; one for all batches.
    """

    reference: Array
    query: Array
    negative: Array
    sampler: "Soft | None" = None


@pytree()
class Soft(SampleInTwoSteps):
    """Positives of a sampler as weighted means of embeddings instead of single time steps.

    Where ``sampler`` takes the embedding at the label nearest to a query, this one takes the mean
    of the embeddings at all labels, weighted by ``exp(-Σ_k weights_k (query_k - label_k)² /
    bandwidth)``. So losses are differentiable in what is near: the weights, the bandwidth, and the
    ``delta`` of ``DeltaNormal``. References, negatives and queries are those of ``sampler`` with
    the same key, and as the bandwidth goes to 0 so are the positives (of identical labels, which
    have the earliest step there, the mean here). The mean of normalised embeddings is shorter than
    1. The narrower the kernel against the distances between labels, the less the loss depends on
    the weights.

    Args:
        sampler: ``TimeDelta`` or ``DeltaNormal``.
        bandwidth: A positive number, in squared units of the labels.
        weights: Of the features of the labels ``(features,)``, at least 0; all 1 by default.

    Raises:
        TypeError: ``sampler`` is of another kind, or bandwidth or weights are no real numbers.
        ValueError: The bandwidth is not above 0, or the weights do not fit the labels or are below
            0 or not finite.

    >>> import jax, jax.numpy as jnp, numpy as np
    >>> from cebra_jax_metrics import Encoder, Model, estimate_infonce, samplers
    >>> key, labels = jax.random.key(0), np.random.default_rng(0).normal(size=(100, 2))
    >>> model = Model((Encoder.init(key, "offset1-model", 2),))
    >>> def bits(weights):
    ...     sampler = samplers.Soft(samplers.TimeDelta(labels), bandwidth=0.1, weights=weights)
    ...     return estimate_infonce(key, model, labels, sampler, batch_size=16, num_batches=4).bits
    >>> jax.grad(bits)(jnp.ones(2)).shape
    (2,)
    """

    sampler: Any  # TimeDelta or DeltaNormal
    bandwidth: Leaf
    weights: Leaf = None

    def __post_init__(self) -> None:
        if not isinstance(self.sampler, TimeDelta | DeltaNormal):
            raise TypeError(
                "Expected one of the samplers TimeDelta and DeltaNormal, got "
                f"{type(self.sampler).__name__}."
            )
        features = self.sampler.labels.shape[1]
        weights = np.ones(features, np.float32) if self.weights is None else self.weights
        bandwidth, weights = as_floats("bandwidth", self.bandwidth), as_floats("weights", weights)
        if bandwidth.shape != ():
            raise ValueError(f"bandwidth has to be one number, got the shape {bandwidth.shape}.")
        if weights.shape != (features,):
            raise ValueError(
                f"weights have to be one for each of the {features} features of the labels, got "
                f"the shape {weights.shape}."
            )
        smallest = np.finfo(np.float32).tiny
        if not is_traced(bandwidth) and not smallest <= float(bandwidth) < np.inf:
            raise ValueError(
                f"bandwidth has to be finite and above 0 (at least {smallest}), got {bandwidth}."
            )
        known = None if is_traced(weights) else np.asarray(weights)
        if known is not None and not ((known >= 0) & np.isfinite(known)).all():
            raise ValueError(f"weights have to be finite and at least 0, got {weights}.")
        if known is not None and not is_traced(self.sampler.labels):
            extent = 2 * np.ptp(np.asarray(self.sampler.labels, np.float64), axis=0)
            if np.sum(known * extent**2) > np.finfo(np.float32).max:
                raise ValueError(
                    "Squared distances of the labels, times the weights, exceed the range of "
                    "float32: use larger units for the labels, or smaller weights."
                )
        set_fields(self, bandwidth=bandwidth, weights=weights)

    @property
    def span(self) -> Leaf:
        """How long the recording has to be."""
        return self.sampler.span

    def probabilities(self, num_steps: int) -> tuple[Array]:
        """How probable every time step is as a reference, or as a negative ``(time,)``."""
        return self.sampler.probabilities(num_steps)

    def padded(self) -> "Soft":
        """The same sampler with labels padded to their size class."""
        return replace(self, sampler=self.sampler.padded())

    @jitted
    def propose(self, key: Array, batch_size: int) -> Proposal:
        """Draw references and negatives; queries are labels ``(batch, features)``."""
        if isinstance(self.sampler, DeltaNormal):
            return self.sampler.propose_in(self.sampler.delta.dtype, key, batch_size)
        return self.sampler.propose(key, batch_size)

    def resolve(self, query: Array) -> Array:
        """Return the query: it takes embeddings to make a positive of it."""
        return query

    def complete(self, proposal: Proposal) -> SoftBatch:
        """Make a batch of a proposal, or many of many, still without the sampler."""
        return SoftBatch(proposal.reference, proposal.query, proposal.negative)

    def attached(self, batch: SoftBatch) -> SoftBatch:
        """The batch with what weighs its positives."""
        return replace(batch, sampler=self)

    def positive(self, rows: Array, query: Array) -> Array:
        """The positives of queries, from the embeddings of all time steps ``(time, features)``."""
        sampler = self.sampler
        return kernel_mean(
            sampler.of_steps(sampler.labels),
            sampler.of_steps(rows),
            query,
            bandwidth=self.bandwidth,
            weights=self.weights,
            length=sampler.length,
        )
