"""InfoNCE of a model on a recording: the mean over batches, with its standard error."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from cebra_jax_metrics.arrays import as_integer, as_key
from cebra_jax_metrics.encoders import Encoder
from cebra_jax_metrics.infonce import InfoNCE, goodness_of_fit
from cebra_jax_metrics.model import (
    Checkpoint,
    Criterion,
    Model,
    as_model,
    as_recording,
    select_encoder,
)
from cebra_jax_metrics.samplers import Batch, Proposal, Sampler

# How many positives to look for at a time: bounds memory, and paces the progress bar.
MAX_QUERIES_AT_ONCE = 2**18


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class Estimate:
    """A Monte-Carlo estimate of an InfoNCE loss, in nats.

    Attributes:
        loss: Mean over the batches.
        stderr: Standard error of that mean; NaN for a single batch.
        per_batch: Loss of every batch ``(num_batches,)``.
        align: Mean of the align part.
        uniform: Mean of the uniform part.
        num_negatives: Negatives in each batch, which set the level of chance.
    """

    loss: Array
    stderr: Array
    per_batch: Array
    align: Array
    uniform: Array
    num_negatives: int | Array

    @property
    def bits(self) -> Array:
        """Goodness of fit in bits: 0 is chance, below 0 is worse than chance."""
        return goodness_of_fit(self.loss, self.num_negatives)

    @property
    def bits_stderr(self) -> Array:
        """Standard error of the goodness of fit, in bits."""
        return self.stderr / math.log(2)

    def __repr__(self) -> str:
        if any(isinstance(x, Array) and x.size == 1 for x in (self.loss, self.stderr)):
            try:
                return (
                    f"Estimate(loss={float(self.loss):.4f} ± {float(self.stderr):.4f} nats, "
                    f"{float(self.bits):.4f} ± {float(self.bits_stderr):.4f} bits, "
                    f"{self.per_batch.size} batches, {self.num_negatives} negatives)"
                )
            except jax.errors.ConcretizationTypeError:
                pass
        return f"Estimate(loss={self.loss!r}, num_negatives={self.num_negatives!r})"


def draw(
    key: Array, sampler: Sampler, batch_size: int, num_batches: int, *, start: int = 0
) -> Batch:
    """Draw batches of indices; batch i depends on ``fold_in(key, i)`` and nothing else.

    Args:
        key: A JAX PRNG key.
        sampler: One of ``cebra_jax_metrics.samplers``.
        batch_size: References, positives and negatives per batch; may exceed the recording's
            length, since draws are with replacement.
        num_batches: How many batches.
        start: Number of the first one, to draw many in several calls.

    Returns:
        int32 indices, ``(num_batches, batch_size)`` each.

    Raises:
        ValueError: A size is below 1.
        TypeError: The key is no JAX key, or a size no integer.
    """
    batch_size = as_integer("batch_size", batch_size, at_least=1)
    num_batches = as_integer("num_batches", num_batches, at_least=1)
    proposal = _propose(as_key(key), sampler, start, batch_size=batch_size, num_batches=num_batches)
    return Batch(proposal.reference, sampler.resolve(proposal.query), proposal.negative)


@partial(jax.jit, static_argnames=("batch_size", "num_batches"))
def _propose(
    key: Array, sampler: Sampler, start: ArrayLike, *, batch_size: int, num_batches: int
) -> Proposal:
    numbers = jnp.arange(num_batches, dtype=jnp.uint32) + jnp.asarray(start).astype(jnp.uint32)
    return jax.vmap(lambda i: sampler.propose(jax.random.fold_in(key, i), batch_size))(numbers)


def evaluate(
    model: Model | Checkpoint, X: object, batch: Batch, *, session_id: int | None = None
) -> InfoNCE:
    """InfoNCE of every batch; differentiable in the model and the recording.

    Every window of the recording is embedded once; a window that would reach over the edge is the
    first or last whole one, as in CEBRA.

    Args:
        model: A model or a checkpoint.
        X: The recording ``(time, neurons)``.
        batch: Indices ``(num_batches, batch)`` each, as ``draw`` returns them.
        session_id: Which encoder of a multi-session model to use.

    Returns:
        Loss, align and uniform in nats, ``(num_batches,)`` each.

    Raises:
        ValueError: The recording does not fit the model.
        RuntimeError: Missing or wrong ``session_id``.
    """
    encoder = select_encoder(model, session_id)
    X = as_recording(X, encoder, session_id)
    return _losses(as_model(model).criterion, encoder, _windows(encoder, X), batch)


_windows = jax.jit(Encoder.encode_windows)


@jax.jit
def _losses(criterion: Criterion, encoder: Encoder, windows: Array, batch: Batch) -> InfoNCE:
    num_steps = len(windows) + encoder.receptive_field - 1

    @jax.checkpoint
    def one(batch: Batch) -> InfoNCE:
        reference, positive, negative = (
            windows[encoder.window_of(steps, num_steps)] for steps in batch
        )
        return criterion(reference, positive, negative)

    return jax.lax.map(one, Batch(*batch))


def estimate_infonce(
    key: Array,
    model: Model | Checkpoint,
    X: object,
    sampler: Sampler,
    *,
    batch_size: int,
    num_batches: int = 500,
    session_id: int | None = None,
    chunk_size: int | None = None,
    progress: Callable[[range], Iterable[int]] = iter,
) -> Estimate:
    """InfoNCE of a model on a recording, averaged over batches drawn by a sampler.

    It is ``draw``, then ``evaluate``, then a mean. Works under ``jit``, under ``grad`` with respect
    to the model or the recording (indices stay outside the gradient), and under ``vmap`` over
    stacked models.

    Args:
        key: A JAX PRNG key; the same key gives the same draws.
        model: A model or a checkpoint.
        X: The recording ``(time, neurons)``.
        sampler: One of ``cebra_jax_metrics.samplers``.
        batch_size: References, positives and negatives per batch.
        num_batches: Batches to average.
        session_id: Which encoder of a multi-session model to use.
        chunk_size: Batches drawn at a time: bounds memory, changes no draw.
        progress: Wraps the loop over chunks, such as ``tqdm.tqdm``.

    Returns:
        The mean loss with its standard error, and the goodness of fit as ``.bits``.

    Raises:
        ValueError: The recording does not fit the model, or a size is below 1.
        TypeError: The key is no JAX key, or a size no integer.
        RuntimeError: Missing or wrong ``session_id``.

    Source: CEBRA 0.6.1 ``cebra.integrations.sklearn.metrics.infonce_loss``.
    """
    key = as_key(key)
    batch_size = as_integer("batch_size", batch_size, at_least=1)
    num_batches = as_integer("num_batches", num_batches, at_least=1)
    chunk_size = _even_chunks(num_batches, batch_size, chunk_size)
    encoder = select_encoder(model, session_id)
    windows = _windows(encoder, as_recording(X, encoder, session_id))
    parts = []
    for start in progress(range(0, num_batches, chunk_size)):
        # Chunks are all of one size, so that one compilation serves them: the last overshoots.
        batch = draw(key, sampler, batch_size, chunk_size, start=start)
        parts.append(_losses(as_model(model).criterion, encoder, windows, batch))
    num_negatives = batch.negative.shape[-1]
    return _summarise(tuple(parts), num_batches=num_batches, num_negatives=num_negatives)


def _even_chunks(num_batches: int, batch_size: int, chunk_size: int | None) -> int:
    if chunk_size is not None:
        return min(as_integer("chunk_size", chunk_size, at_least=1), num_batches)
    num_chunks = math.ceil(num_batches * batch_size / MAX_QUERIES_AT_ONCE)
    return math.ceil(num_batches / num_chunks)


@partial(jax.jit, static_argnames=("num_batches", "num_negatives"))
def _summarise(parts: tuple[InfoNCE, ...], *, num_batches: int, num_negatives: int) -> Estimate:
    loss, align, uniform = (jnp.concatenate(x)[:num_batches] for x in zip(*parts, strict=True))
    spread = jnp.std(loss, ddof=1) if num_batches > 1 else jnp.full((), jnp.nan, loss.dtype)
    return Estimate(
        loss=jnp.mean(loss),
        stderr=spread / math.sqrt(num_batches),
        per_batch=loss,
        align=jnp.mean(align),
        uniform=jnp.mean(uniform),
        num_negatives=num_negatives,
    )
