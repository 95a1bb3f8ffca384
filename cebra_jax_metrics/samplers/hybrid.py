"""Two positives for every reference: by behaviour, and by time."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from cebra_jax_metrics.arrays import is_traced
from cebra_jax_metrics.samplers.base import (
    Batch,
    Leaf,
    Proposal,
    SampleInTwoSteps,
    check_conditional,
    jitted,
    pytree,
    set_fields,
    uniform_steps,
)
from cebra_jax_metrics.samplers.delta import as_time_offset
from cebra_jax_metrics.samplers.time import Time


class HybridBatch(NamedTuple):
    """Indices of time steps, int32, ``(batch,)`` each, or ``(num_batches, batch)`` from ``draw``.

    Attributes:
        reference: Draws from the prior.
        positive: One draw from the behaviour conditional for every reference.
        time_positive: The step ``time_offset`` after every reference.
        negative: Further draws from the prior.
    """

    reference: Array
    positive: Array
    time_positive: Array
    negative: Array

    @property
    def objectives(self) -> dict[str, Batch]:
        """The batches of the two objectives."""
        return {
            "behavior": Batch(self.reference, self.positive, self.negative),
            "time": Batch(self.reference, self.time_positive, self.negative),
        }


@pytree()
class Hybrid(SampleInTwoSteps):
    """References and negatives as with ``Time``; positives by behaviour, and by time.

    Args:
        behavior: The sampler of the behaviour positives: ``TimeDelta``, ``DeltaNormal`` or
            ``Time``. Its own prior is not used.
        time_offset: Steps from a reference to its positive in time.

    Raises:
        TypeError: ``behavior`` is another kind of sampler.
        ValueError: The recording is not longer than the time offset.

    Source: CEBRA 0.6.1 ``cebra.data.HybridDataLoader``.
    """

    behavior: Leaf
    time_offset: Leaf = 1

    def __post_init__(self) -> None:
        check_conditional(self.behavior)
        other = self.behavior.time_offset if isinstance(self.behavior, Time) else self.time_offset
        if not is_traced(other, self.time_offset) and int(other) != int(self.time_offset):
            raise ValueError(
                "The time offsets of both objectives have to be the same, got "
                f"{int(other)} and {int(self.time_offset)}."
            )
        offset, length = as_time_offset(self.time_offset), self.behavior.length
        if not is_traced(offset, length) and int(length) <= int(offset):
            raise ValueError(
                f"number of samples has to exceed the time offset, but got {int(length)} <= "
                f"{int(offset)}. Use a longer recording or a smaller time offset."
            )
        set_fields(self, time_offset=offset)

    @property
    def objectives(self) -> dict[str, Leaf]:
        """The samplers of the positives of the two objectives."""
        return {"behavior": self.behavior, "time": Time(self.behavior.length, self.time_offset)}

    def probabilities(self, num_steps: int) -> tuple[Array]:
        """How probable every time step is as a reference, or as a negative ``(time,)``."""
        return Time(self.behavior.length, self.time_offset).probabilities(num_steps)

    @jitted
    def propose(self, key: Array, batch_size: int) -> Proposal:
        """Draw references and negatives; the query is that of the behaviour."""
        prior, conditional = jax.random.split(key)
        stop = self.behavior.length - self.time_offset
        reference, negative = uniform_steps(prior, (2, batch_size), stop)
        return Proposal(reference, negative, self.behavior.query(conditional, reference))

    def resolve(self, query: Array) -> Array:
        """Find the behaviour positives."""
        return self.behavior.resolve(query)

    def complete(self, proposal: Proposal) -> HybridBatch:
        """Find both positives."""
        return HybridBatch(
            reference=proposal.reference,
            positive=self.resolve(proposal.query),
            time_positive=jnp.add(proposal.reference, self.time_offset),
            negative=proposal.negative,
        )
