"""Draws of batches: on the host where the key is known and on the CPU, else under ``jit``."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh
from jax.typing import ArrayLike

from cebra_jax_metrics.arrays import as_integer, as_key, on_cpu
from cebra_jax_metrics.samplers.base import Proposal, SampleInTwoSteps, Sampler
from cebra_jax_metrics.samplers.full import FullBatch
from cebra_jax_metrics.sharding import from_shares, spread

# How many positives to look for at a time: bounds memory, and paces the progress bar.
MAX_QUERIES_AT_ONCE = 2**18


def draw(
    key: Array,
    sampler: Sampler,
    batch_size: int | None,
    num_batches: int,
    *,
    start: int = 0,
    mesh: Mesh | None = None,
    axis_name: str | None = None,
) -> Any:
    """Draw batches of indices; batch i depends on ``fold_in(key, i)`` and nothing else.

    Args:
        key: A JAX PRNG key.
        sampler: One of ``cebra_jax_metrics.samplers``.
        batch_size: References, positives and negatives per batch; may exceed the recording's
            length, since draws are with replacement. ``None`` with ``samplers.FullBatch`` only.
        num_batches: How many batches.
        start: Number of the first one, to draw many in several calls.
        mesh: Devices to spread the batches over (:func:`spread`); each process draws its own.
        axis_name: The axis of the mesh, where it has several.

    Returns:
        int32 indices, ``(num_batches, batch_size)`` each: a ``samplers.Batch``, or the batch that
        the sampler says.

    Raises:
        ValueError: A size is below 1, or the mesh does not fit.
        TypeError: The key is no JAX key, or a size no integer.
    """
    batch_size = check_batch_size(sampler, batch_size)
    num_batches = as_integer("num_batches", num_batches, at_least=1)
    key = as_key(key)
    sampler = sampler.padded() if isinstance(sampler, SampleInTwoSteps) else sampler
    if not on_cpu(key, *jax.tree.leaves(sampler)):
        numbers = np.arange(start, start + num_batches)
        over = partial(spread, mesh=mesh, axis_name=axis_name)
        batch = over(_draw, (key, sampler), numbers, batch_size=batch_size)
    else:

        def some(first: int, last: int) -> Any:
            return _draw(key, sampler, start + np.arange(first, last), batch_size=batch_size)

        # While something else is traced, known draws are made at once, on the host.
        with jax.ensure_compile_time_eval():
            batch = from_shares(some, num_batches, mesh, axis_name)
    return sampler.attached(batch) if isinstance(sampler, SampleInTwoSteps) else batch


def check_sampler(sampler: object) -> None:
    """Refuse what is no sampler."""
    if not hasattr(sampler, "propose"):
        raise TypeError(
            f"Expected a sampler, one of cebra_jax_metrics.samplers, got {type(sampler).__name__}."
        )


def check_batch_size(sampler: Sampler, batch_size: int | None) -> int:
    """The size of the batches of a sampler."""
    check_sampler(sampler)
    if not isinstance(sampler, FullBatch):
        return as_integer("batch_size", batch_size, at_least=1)
    if batch_size not in (None, sampler.batch_size):
        raise ValueError(
            f"A full batch has {sampler.batch_size} references here: batch_size has to be None, "
            f"got {batch_size!r}."
        )
    return sampler.batch_size


def _draw(key: Array, sampler: Sampler, numbers: ArrayLike, *, batch_size: int) -> Any:
    """The batches of given numbers."""
    numbers = jnp.asarray(numbers, jnp.uint32)
    return sampler.complete(_propose(key, sampler, numbers, batch_size=batch_size))


@partial(jax.jit, static_argnames="batch_size")
def _propose(key: Array, sampler: Sampler, numbers: Array, *, batch_size: int) -> Proposal:
    return jax.vmap(lambda i: sampler.propose(jax.random.fold_in(key, i), batch_size))(numbers)
