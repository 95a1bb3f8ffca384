"""Positives that share the reference's discrete label."""

from typing import Literal

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from cebra_jax_metrics.samplers.base import (
    FromSteps,
    Leaf,
    Proposal,
    as_discrete,
    as_length,
    as_steps,
    jitted,
    pytree,
    set_fields,
    uniform_steps,
)


def sorted_steps(labels: Array, length: ArrayLike) -> tuple[Array, Array]:
    """Time steps ordered by label, and their labels; padding comes last."""
    real = jnp.arange(len(labels), dtype=jnp.int32) < length
    keys = jnp.where(real, labels, jnp.iinfo(labels.dtype).max)
    order = jnp.argsort(keys, stable=True).astype(jnp.int32)
    return order, keys[order]


def value_range(ordered: Array, length: ArrayLike, wanted: Array) -> tuple[Array, Array]:
    """Where wanted labels start among ordered ones, and how many there are."""
    start = jnp.searchsorted(ordered, wanted, side="left").astype(jnp.int32)
    stop = jnp.searchsorted(ordered, wanted, side="right").astype(jnp.int32)
    return start, jnp.minimum(stop, length) - start


def evenly_by_value(labels: Array, length: ArrayLike) -> Array:
    """Probabilities of places that :func:`uniform_over_values` draws."""
    _, count = value_range(sorted_steps(labels, length)[1], length, labels)
    is_real = jnp.arange(len(labels), dtype=jnp.int32) < length
    each = jnp.where(is_real, 1 / jnp.maximum(count, 1).astype(jnp.float32), 0)
    return each / jnp.sum(each)  # of each value they sum to 1


def uniform_over_values(
    key: Array, labels: Array, length: ArrayLike, shape: tuple[int, ...]
) -> Array:
    """Places of labels that are uniform over the values that occur, then uniform within one."""
    which, within = jax.random.split(key)
    order, values = sorted_steps(labels, length)
    place = jnp.arange(len(values), dtype=jnp.int32)
    is_first = (place == 0) | (values != jnp.roll(values, 1))
    is_first &= place < length
    starts = jnp.nonzero(is_first, size=len(values) + 1, fill_value=len(values))[0].astype(
        jnp.int32
    )
    value = uniform_steps(which, shape, jnp.sum(is_first))
    stop = jnp.minimum(starts[value + 1], length)
    start = starts[value]
    return order[start + uniform_steps(within, shape, stop - start)]


def matching_step(key: Array, labels: Array, length: ArrayLike, wanted: Array) -> Array:
    """For every wanted label a place that has it, uniform among them."""
    order, values = sorted_steps(labels, length)
    start, count = value_range(values, length, wanted)
    return order[start + uniform_steps(key, wanted.shape, count)]


@pytree(static=("prior",))
class Discrete(FromSteps):
    """Positives uniform among the time steps with the reference's label.

    Args:
        labels: Integers ``(time,)``, of any values.
        prior: Of references and negatives: ``"empirical"`` is uniform over time, ``"uniform"`` is
            uniform over the label values that occur, then over the time steps of that value.
        length: Number of real entries where ``labels`` (or ``steps``) are padded; all by default.
        steps: Draw references, negatives and positives from these time steps of the recording:
            a slice, or integers ``(steps,)``, which may repeat; all by default.

    Raises:
        TypeError: The labels are no integers.
        ValueError: The labels are not one-dimensional, or the prior is unknown.

    Source: CEBRA 0.6.1 ``cebra.distributions.discrete`` (which, under the uniform prior, gives the
    share of values that never occur to a single time step).
    """

    labels: Leaf
    prior: Literal["empirical", "uniform"] = "empirical"
    length: Leaf = None
    steps: Leaf = None

    def __post_init__(self) -> None:
        if self.prior not in ("empirical", "uniform"):
            raise ValueError(
                f"Invalid choice of prior distribution. Got {self.prior!r}, expected 'empirical' "
                "or 'uniform'."
            )
        labels = as_discrete(self.labels)
        steps = as_steps(self.steps, labels.shape[0])
        length = as_length(self.length, labels, steps)
        set_fields(self, labels=labels, length=length, steps=steps)

    @jitted
    def propose(self, key: Array, batch_size: int) -> Proposal:
        """Draw references and negatives; the query is the positive itself."""
        prior, conditional = jax.random.split(key)
        labels = self.of_steps(self.labels)
        if self.prior == "empirical":
            places = uniform_steps(prior, (2, batch_size), self.length)
        else:
            places = uniform_over_values(prior, labels, self.length, (2, batch_size))
        positive = matching_step(conditional, labels, self.length, labels[places[0]])
        return Proposal(*(self.at(place) for place in (*places, positive)))

    def probabilities(self, num_steps: int) -> tuple[Array]:
        """How probable every time step is as a reference, or as a negative ``(time,)``."""
        if self.prior == "empirical":
            return super().probabilities(num_steps)
        places = evenly_by_value(self.of_steps(self.labels), self.length)
        return (self.of_places(places, num_steps),)

    def mean_positive(self, values: Array) -> Array:
        """The mean of values ``(time, features)`` over the positives of every time step."""
        labels = self.of_steps(self.labels)
        ordered = sorted_steps(labels, self.length)[1]
        start, count = value_range(ordered, self.length, labels)
        places = jnp.arange(len(labels), dtype=jnp.int32)
        known = values[jnp.minimum(self.at(places), len(values) - 1)]
        known = jnp.where((places < self.length)[:, None], known, 0)
        total = jax.ops.segment_sum(known, start, len(labels))[start]
        mean = total / jnp.maximum(count, 1).astype(values.dtype)[:, None]
        return jnp.zeros_like(values).at[self.at(places)].set(mean)

    def resolve(self, query: Array) -> Array:
        """Return the query: it is the positive."""
        return query
