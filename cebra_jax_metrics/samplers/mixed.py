"""Positives that share the reference's discrete label and are near in the continuous one."""

import jax
from jax import Array

from cebra_jax_metrics.neighbors import nearest
from cebra_jax_metrics.samplers.base import (
    FromSteps,
    Leaf,
    Proposal,
    as_continuous,
    as_discrete,
    as_length,
    as_steps,
    jitted,
    pytree,
    set_fields,
)
from cebra_jax_metrics.samplers.delta import as_time_offset, label_change
from cebra_jax_metrics.samplers.discrete import evenly_by_value, uniform_over_values


@pytree()
class Mixed(FromSteps):
    """Positives as with ``TimeDelta``, among the steps with the reference's discrete label.

    References and negatives are uniform over the discrete values that occur, then over the time
    steps of that value.

    Args:
        discrete: Integers ``(time,)``, of any values.
        continuous: Continuous labels ``(time,)`` or ``(time, features)``; kept as float32.
        time_offset: Steps over which the continuous labels change.
        length: Number of real rows where the labels (or ``steps``) are padded; all by default.
        steps: Draw references, negatives and positives from these time steps of the recording:
            a slice, or integers ``(steps,)``, which may repeat; all by default.

    Raises:
        TypeError: The discrete labels are no integers.
        ValueError: The labels differ in length, or are of the wrong shape.

    Source: CEBRA 0.6.1 ``cebra.distributions.mixed.MixedTimeDeltaDistribution``.
    """

    discrete: Leaf
    continuous: Leaf
    time_offset: Leaf = 1
    length: Leaf = None
    steps: Leaf = None

    def __post_init__(self) -> None:
        discrete, continuous = as_discrete(self.discrete), as_continuous(self.continuous)
        if len(discrete) != len(continuous):
            raise ValueError(
                f"Discrete ({len(discrete)} samples) and continuous ({len(continuous)} samples) "
                "need to match in their number of samples."
            )
        steps = as_steps(self.steps, len(continuous))
        set_fields(
            self,
            discrete=discrete,
            continuous=continuous,
            time_offset=as_time_offset(self.time_offset),
            length=as_length(self.length, continuous, steps),
            steps=steps,
        )

    @jitted
    def propose(self, key: Array, batch_size: int) -> Proposal:
        """Draw references and negatives; queries are continuous labels and discrete ones."""
        prior, change = jax.random.split(key)
        discrete = self.of_steps(self.discrete)
        places = uniform_over_values(prior, discrete, self.length, (2, batch_size))
        reference, negative = self.at(places)
        step = self.drawn(change, (batch_size,))
        query = (
            self.continuous[reference] + label_change(self.continuous, step, self.time_offset),
            self.discrete[reference],
        )
        return Proposal(reference, negative, query)

    def probabilities(self, num_steps: int) -> tuple[Array]:
        """How probable every time step is as a reference, or as a negative ``(time,)``."""
        places = evenly_by_value(self.of_steps(self.discrete), self.length)
        return (self.of_places(places, num_steps),)

    def resolve(self, query: tuple[Array, Array]) -> Array:
        """Find the time steps of the same discrete label whose continuous labels are nearest."""
        continuous, discrete = map(self.of_steps, (self.continuous, self.discrete))
        return self.at(nearest(continuous, query[0], self.length, discrete, query[1]))
