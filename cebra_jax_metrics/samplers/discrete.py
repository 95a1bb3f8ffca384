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
    start = jnp.searchsorted(values, wanted, side="left").astype(jnp.int32)
    stop = jnp.searchsorted(values, wanted, side="right").astype(jnp.int32)
    stop = jnp.minimum(stop, length)
    return order[start + uniform_steps(key, wanted.shape, stop - start)]


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

    def resolve(self, query: Array) -> Array:
        """Return the query: it is the positive."""
        return query
