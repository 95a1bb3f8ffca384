"""All time steps at once: batches of CEBRA's ``batch_size=None``."""

import jax.numpy as jnp
from jax import Array

from cebra_jax_metrics.arrays import as_integer, is_traced
from cebra_jax_metrics.samplers.base import (
    Batch,
    Leaf,
    Proposal,
    SampleInTwoSteps,
    check_conditional,
    jitted,
    pytree,
    set_fields,
)


@pytree(static=("num_steps", "offset"))
class FullBatch(SampleInTwoSteps):
    """References are all time steps with a whole window (but for the last two), in order.

    The negatives are the references: CEBRA permutes them, which leaves the loss as it is. Positives
    are drawn as ``conditional`` says; one after the last whole window is replaced by its reference,
    one before the first is moved to it (in CEBRA it wraps round to the end).

    Args:
        conditional: The sampler of the positives: ``Time``, ``TimeDelta`` or ``DeltaNormal``.
        num_steps: Length of the recording.
        offset: The encoder's window, steps before and from the current one on.

    Raises:
        TypeError: ``conditional`` is another kind of sampler.
        ValueError: The recording is too short for one reference, or not as long as the labels.

    Source: CEBRA 0.6.1 ``cebra.data.FullDataLoader``, ``cebra.solver.BatchSingleSessionSolver``.
    """

    conditional: Leaf
    num_steps: int
    offset: tuple[int, int]

    def __post_init__(self) -> None:
        check_conditional(self.conditional)
        left, right = (as_integer("offset", n, at_least=0) for n in self.offset)
        num_steps = as_integer("num_steps", self.num_steps, at_least=1)
        if num_steps < 2 * left + right + 2:
            raise ValueError(
                f"A full batch needs at least {2 * left + right + 2} time steps with the offset "
                f"{(left, right)}, got {num_steps}."
            )
        length = self.conditional.length
        if not is_traced(length) and int(length) != num_steps:
            raise ValueError(
                f"The sampler of the positives is for {length} time steps, the recording has "
                f"{num_steps}."
            )
        set_fields(self, num_steps=num_steps, offset=(left, right))

    @property
    def batch_size(self) -> int:
        """Number of references."""
        left, right = self.offset
        return self.num_steps - (left + right) - 1 - left

    @jitted
    def propose(self, key: Array, batch_size: int) -> Proposal:
        """All references, and the queries of their positives."""
        reference = self.offset[0] + jnp.arange(self.batch_size, dtype=jnp.int32)
        return Proposal(reference, reference, self.conditional.query(key, reference))

    def resolve(self, query: Array) -> Array:
        """Find the positives, wherever they lie."""
        return self.conditional.resolve(query)

    def complete(self, proposal: Proposal) -> Batch:
        """Find the positives that have a whole window."""
        left, right = self.offset
        positive = jnp.maximum(self.resolve(proposal.query), left)
        is_beyond = positive > self.num_steps - right
        return Batch(
            proposal.reference,
            jnp.where(is_beyond, proposal.reference, positive),
            proposal.negative,
        )
