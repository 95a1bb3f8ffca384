"""Positives whose label is near the reference's, after a change drawn at random."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from cebra_jax_metrics.arrays import as_integer, is_traced
from cebra_jax_metrics.neighbors import nearest
from cebra_jax_metrics.samplers.base import (
    FromSteps,
    Leaf,
    Proposal,
    as_continuous,
    as_floats,
    as_leaf,
    as_length,
    as_steps,
    jitted,
    pytree,
    set_fields,
)


def label_change(labels: Array, steps: Array, time_offset: ArrayLike) -> Array:
    """How labels changed over the ``time_offset`` steps before each of ``steps``.

    Returns:
        ``(len(steps), features)``; 0 where not that many steps have passed.
    """
    change = labels[steps] - labels[jnp.maximum(steps - time_offset, 0)]
    return jnp.where((steps >= time_offset)[:, None], change, jnp.zeros((), labels.dtype))


def as_time_offset(time_offset: ArrayLike) -> Array:
    """A time offset of at least one step as an int32 leaf."""
    if not is_traced(time_offset):
        time_offset = as_integer("time_offset", time_offset, at_least=1)
        if time_offset >= 2**31:
            raise ValueError(f"time_offset has to be less than the recording, got {time_offset}.")
    return as_leaf(time_offset, jnp.int32)


@pytree()
class TimeDelta(FromSteps):
    """Positives nearest to the reference's label plus a change that occurred in the recording.

    References and negatives are uniform over time; the change is that of the labels over
    ``time_offset`` steps, at a time drawn uniformly (0 for the first ``time_offset`` steps).

    Args:
        labels: Continuous labels ``(time,)`` or ``(time, features)``; kept as float32.
        time_offset: Steps over which the labels change.
        length: Number of real rows where ``labels`` (or ``steps``) are padded; all by default.
        steps: Draw references, negatives and positives from these time steps of the recording:
            a slice, or integers ``(steps,)``, which may repeat; all by default.

    Raises:
        ValueError: Labels are empty, not finite or have more than two dimensions.

    Source: CEBRA 0.6.1 ``cebra.distributions.continuous.TimedeltaDistribution``.
    """

    labels: Leaf
    time_offset: Leaf = 1
    length: Leaf = None
    steps: Leaf = None

    def __post_init__(self) -> None:
        labels = as_continuous(self.labels)
        steps = as_steps(self.steps, labels.shape[0])
        set_fields(
            self,
            labels=labels,
            time_offset=as_time_offset(self.time_offset),
            length=as_length(self.length, labels, steps),
            steps=steps,
        )

    @jitted
    def propose(self, key: Array, batch_size: int) -> Proposal:
        """Draw references and negatives; queries are labels ``(batch, features)``."""
        reference, negative, step = self.drawn(key, (3, batch_size))
        change = label_change(self.labels, step, self.time_offset)
        return Proposal(reference, negative, self.labels[reference] + change)

    def query(self, key: Array, reference: Array) -> Array:
        """Draw the labels to look for at given references."""
        step = self.drawn(key, reference.shape)
        return self.labels[reference] + label_change(self.labels, step, self.time_offset)

    def resolve(self, query: Array) -> Array:
        """Find the time steps whose labels are nearest."""
        return self.at(nearest(self.of_steps(self.labels), query, self.length))


@pytree()
class DeltaNormal(FromSteps):
    """Positives nearest to a draw from an isotropic normal around the reference's label.

    References and negatives are uniform over time.

    Args:
        labels: Continuous labels ``(time,)`` or ``(time, features)``; kept as float32.
        delta: Standard deviation, in the units of the labels.
        length: Number of real rows where ``labels`` (or ``steps``) are padded; all by default.
        steps: Draw references, negatives and positives from these time steps of the recording:
            a slice, or integers ``(steps,)``, which may repeat; all by default.

    Raises:
        ValueError: ``delta`` is not a positive number, or the labels are empty, not finite or have
            more than two dimensions.

    Source: CEBRA 0.6.1 ``cebra.distributions.continuous.DeltaNormalDistribution``.
    """

    labels: Leaf
    delta: Leaf
    length: Leaf = None
    steps: Leaf = None

    def __post_init__(self) -> None:
        labels = as_continuous(self.labels)
        steps = as_steps(self.steps, labels.shape[0])
        largest = float(np.finfo(np.float32).max)
        is_number = isinstance(self.delta, int | float | np.number | np.ndarray | Array)
        if not is_traced(self.delta) and not (
            is_number and np.ndim(self.delta) == 0 and 0 <= self.delta < largest
        ):
            raise ValueError(f"delta has to be a finite number of at least 0, got {self.delta!r}.")
        set_fields(
            self,
            labels=labels,
            delta=as_floats("delta", self.delta),
            length=as_length(self.length, labels, steps),
            steps=steps,
        )

    @jitted
    def propose(self, key: Array, batch_size: int) -> Proposal:
        """Draw references and negatives; queries are labels ``(batch, features)``."""
        return self.propose_in(jnp.float32, key, batch_size)

    def propose_in(self, dtype: Any, key: Array, batch_size: int) -> Proposal:
        """The same with queries computed in another dtype, for derivatives in float64."""
        prior, noise = jax.random.split(key)
        steps = self.drawn(prior, (2, batch_size))
        return Proposal(steps[0], steps[1], self._query(dtype, noise, steps[0]))

    def query(self, key: Array, reference: Array) -> Array:
        """Draw the labels to look for at given references."""
        return self._query(jnp.float32, key, reference)

    def _query(self, dtype: Any, key: Array, reference: Array) -> Array:
        shape = (*reference.shape, self.labels.shape[1])
        noise = jax.random.normal(key, shape, dtype=jnp.float32).astype(dtype)
        return self.labels[reference].astype(dtype) + self.delta.astype(dtype) * noise

    def resolve(self, query: Array) -> Array:
        """Find the time steps whose labels are nearest."""
        return self.at(nearest(self.of_steps(self.labels), query, self.length))
