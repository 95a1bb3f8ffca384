"""Positives at a fixed distance in time."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array

from cebra_jax_metrics.arrays import as_integer, is_traced
from cebra_jax_metrics.samplers.base import (
    Leaf,
    Proposal,
    SampleInTwoSteps,
    as_leaf,
    as_steps,
    jitted,
    pytree,
    set_fields,
    uniform_steps,
)


@pytree()
class Time(SampleInTwoSteps):
    """References and negatives uniform on ``[0, length - time_offset)``; positives that much later.

    Args:
        length: Number of time steps of the recording.
        time_offset: Steps from a reference to its positive.
        steps: Draw references and negatives from these time steps: a slice, or integers
            ``(steps,)``, which may repeat; all by default. Those without room for the positive are
            left out.

    Raises:
        ValueError: The recording is not longer than the time offset, or steps leave no room for it.

    Source: CEBRA 0.6.1 ``cebra.distributions.continuous.TimeContrastive``.
    """

    length: Leaf
    time_offset: Leaf = 1
    steps: Leaf = None

    def __post_init__(self) -> None:
        length, offset = self.length, self.time_offset
        if not is_traced(offset):
            offset = as_integer("time_offset", offset, at_least=0)
        if not is_traced(length):
            length = as_integer("length", length, at_least=1)
        if not is_traced(length, offset) and length <= offset:
            raise ValueError(
                "number of samples has to exceed the time offset, but got "
                f"{length} <= {offset}. Use a longer recording or a smaller time offset."
            )
        set_fields(
            self,
            length=as_leaf(length, jnp.int32),
            time_offset=as_leaf(offset, jnp.int32),
            steps=_with_room(as_steps(self.steps, length), length - offset),
        )

    def padded(self) -> "Time":
        """The same sampler: it holds no labels."""
        return self

    @jitted
    def propose(self, key: Array, batch_size: int) -> Proposal:
        """Draw references and negatives; the query is the positive itself."""
        number = self.length - self.time_offset if self.steps is None else len(self.steps)
        steps = uniform_steps(key, (2, batch_size), number)
        if self.steps is not None:
            steps = self.steps[steps]
        return Proposal(steps[0], steps[1], steps[0] + self.time_offset)

    def probabilities(self, num_steps: int) -> tuple[Array]:
        """How probable every time step is as a reference, or as a negative ``(time,)``."""
        if self.steps is not None:
            share = jnp.full(len(self.steps), 1 / len(self.steps), jnp.float32)
            return (jnp.zeros(num_steps, jnp.float32).at[self.steps].add(share),)
        number = jnp.asarray(self.length - self.time_offset)
        is_drawn = jnp.arange(num_steps, dtype=jnp.int32) < number
        return (jnp.where(is_drawn, 1 / number.astype(jnp.float32), 0),)

    def mean_positive(self, values: Array) -> Array:
        """The mean of values ``(time, features)`` over the positives of every time step."""
        steps = jnp.arange(len(values), dtype=jnp.int32) + self.time_offset
        return values[jnp.minimum(steps, len(values) - 1)]

    def query(self, key: Array, reference: Array) -> Array:
        """Positives of given references, which may lie beyond the end; nothing is drawn."""
        return reference + self.time_offset

    def resolve(self, query: Array) -> Array:
        """Return the query: it is the positive."""
        return query


def _with_room(steps: Any, stop: Any) -> Any:
    """Those steps that leave room for their positive."""
    if steps is None or is_traced(steps, stop):
        return steps
    known = np.asarray(steps)
    if known.min() >= stop:
        raise ValueError(
            f"None of the steps leaves room for its positive: the last that does is {stop - 1}."
        )
    return jnp.asarray(known[known < stop])
