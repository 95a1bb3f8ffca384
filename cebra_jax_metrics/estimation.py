"""InfoNCE of a model on a recording: the mean over batches, with its standard error."""

import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh, PartitionSpec
from jax.typing import ArrayLike

from cebra_jax_metrics.arrays import as_integer, as_key, is_traced, on_cpu
from cebra_jax_metrics.encoders import Encoder
from cebra_jax_metrics.infonce import InfoNCE, chance_level
from cebra_jax_metrics.model import (
    Checkpoint,
    Criterion,
    Model,
    Windows,
    as_model,
    as_recording,
    encode_recording,
    select_encoder,
)
from cebra_jax_metrics.samplers import (
    Batch,
    DiscreteMultisession,
    FullBatch,
    Hybrid,
    HybridBatch,
    Multisession,
    MultisessionBatch,
    Proposal,
    Sampler,
    Soft,
    SoftBatch,
)
from cebra_jax_metrics.samplers.base import SampleInTwoSteps
from cebra_jax_metrics.sharding import check_enough, checked_mesh, from_shares, placed, spread

# How many positives to look for at a time: bounds memory, and paces the progress bar.
MAX_QUERIES_AT_ONCE = 2**18
# The features that the behaviour objective of CEBRA's hybrid models is trained on.
BEHAVIOR_FEATURES = 3

# The most batches that a wanted standard error may take.
MAX_BATCHES = 100_000

FeatureRange = slice | Sequence[slice] | None


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class Estimate:
    """A Monte-Carlo estimate of an InfoNCE loss, in nats. ``float(estimate)`` is the loss.

    Attributes:
        loss: Mean over the batches.
        stderr: Standard error of that mean; NaN for a single batch.
        per_batch: Loss of every batch ``(num_batches,)``.
        align: Mean of the align part.
        uniform: Mean of the uniform part.
        num_negatives: Negatives in each batch, which set the level of chance.
        parts: Where the loss is made of several, an estimate of each by its name: the objectives
            that it is the sum of, or the sessions that it is the mean of.
        num_objectives: How many objectives the loss is the sum of.
    """

    loss: Array
    stderr: Array
    per_batch: Array
    align: Array
    uniform: Array
    num_negatives: int | Array
    parts: dict[str, "Estimate"] = field(default_factory=dict)
    num_objectives: int = field(default=1, metadata={"static": True})

    @property
    def chance(self) -> Array:
        """The loss of an embedding that carries nothing, in nats."""
        return self.num_objectives * chance_level(self.num_negatives).astype(self.loss.dtype)

    @property
    def bits(self) -> Array:
        """Goodness of fit in bits: 0 is chance, below 0 is worse than chance."""
        return (self.chance - self.loss) / math.log(2)

    @property
    def per_batch_bits(self) -> Array:
        """Goodness of fit of every batch ``(num_batches,)``, in bits."""
        return (self.chance - self.per_batch) / math.log(2)

    @property
    def bits_stderr(self) -> Array:
        """Standard error of the goodness of fit, in bits."""
        return self.stderr / math.log(2)

    def __float__(self) -> float:
        return float(self.loss)

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


def check_batch_size(sampler: Sampler, batch_size: int | None) -> int:
    """The size of the batches of a sampler."""
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


def evaluate(
    model: Model | Checkpoint,
    X: Any,
    batch: Any,
    *,
    session_id: int | None = None,
    feature_range: FeatureRange = None,
    renormalize: bool = False,
    mesh: Mesh | None = None,
    axis_name: str | None = None,
) -> InfoNCE:
    """InfoNCE of every batch; differentiable in the model and the recording.

    Every window of the recording is embedded once; a window that would reach over the edge is the
    first or last whole one, as in CEBRA.

    Args:
        model: A model or a checkpoint.
        X: The recording ``(time, neurons)``, or a list of them with a ``MultisessionBatch``.
        batch: Indices ``(num_batches, batch)`` each, as ``draw`` returns them.
        session_id: Which encoder of a multi-session model to use.
        feature_range: Score these features of the embedding only: a slice, or several whose losses
            are added. With a ``HybridBatch`` two, for behaviour and for time; the first 3 features
            and all of them by default.
        renormalize: Divide the embeddings in a feature range by their norm.
        mesh: Devices to spread the windows, then the batches over (:func:`spread`).
        axis_name: The axis of the mesh, where it has several.

    Returns:
        Loss, align and uniform in nats, ``(num_batches,)`` each: those of several objectives are
        added, those of several sessions averaged.

    Raises:
        ValueError: The recording does not fit the model, the range not the embedding, or the mesh
            not the work.
        RuntimeError: Missing or wrong ``session_id``.
    """
    over = partial(spread, mesh=mesh, axis_name=axis_name)
    is_joint = isinstance(batch, MultisessionBatch)
    encoders, windows = embedded(model, X, session_id, is_joint, mesh, axis_name)
    spaces = subspaces(windows, feature_range, renormalize, isinstance(batch, HybridBatch))
    return losses_of(as_model(model).criterion, encoders, spaces, batch, over)


def embedded(
    model: Model | Checkpoint,
    X: Any,
    session_id: int | None,
    is_joint: bool,
    mesh: Mesh | None,
    axis_name: str | None,
) -> tuple[tuple[Encoder, ...], tuple[Windows, ...]]:
    """The encoders that are needed, and all windows of their recordings."""
    encode = partial(encode_recording, mesh=mesh, axis_name=axis_name)
    if not is_joint:
        encoder = select_encoder(model, session_id)
        return (encoder,), (encode(encoder, as_recording(X, encoder, session_id)),)
    encoders = as_model(model).encoders
    if session_id is not None or not isinstance(X, list | tuple) or len(X) != len(encoders):
        raise ValueError(
            f"The joint loss of a model of {len(encoders)} sessions takes a list of as many "
            "recordings, and no session_id."
        )
    recordings = [as_recording(x, e, i) for i, (x, e) in enumerate(zip(X, encoders, strict=True))]
    return encoders, tuple(map(encode, encoders, recordings))


def subspaces(
    windows: tuple[Windows, ...], feature_range: FeatureRange, renormalize: bool, is_hybrid: bool
) -> dict[str, tuple[Windows, ...]]:
    """The embeddings that each objective scores, by its name."""
    if feature_range is None and not is_hybrid and not renormalize:
        return {"": windows}
    if feature_range is None:
        feature_range = [slice(0, BEHAVIOR_FEATURES), slice(None)] if is_hybrid else slice(None)
    ranges = [feature_range] if isinstance(feature_range, slice) else feature_range
    if not isinstance(ranges, list | tuple) or not all(isinstance(r, slice) for r in ranges):
        raise ValueError(
            "feature_range has to be a slice of the features, such as slice(0, 3), or a list of "
            f"slices, got {feature_range!r}."
        )
    if is_hybrid and len(ranges) != 2:
        raise ValueError(f"Hybrid models have two feature ranges, got {len(ranges)}.")
    if len(windows) > 1 and len(ranges) != 1:
        raise ValueError(f"The joint loss of sessions has one feature range, got {len(ranges)}.")
    names = [f"{r.start or 0}:{'' if r.stop is None else r.stop}" for r in ranges]
    if is_hybrid:
        names = ["behavior", "time"]
    if len(names) == 1:
        names = [""]
    if not names or len(set(names)) < len(names):
        raise ValueError(f"feature_range has to be one range or several different ones: {ranges}.")
    return {
        name: tuple(_features(w, features, renormalize) for w in windows)
        for name, features in zip(names, ranges, strict=True)
    }


def _features(windows: Windows, features: slice, renormalize: bool) -> Windows:
    width = windows.rows.shape[1]
    start, stop, step = features.indices(width)
    is_inside = (features.stop is None or features.stop <= width) and step == 1
    if not is_inside or start >= stop:
        raise ValueError(
            f"feature_range has to be a slice of the {width} features, such as slice(0, {width}), "
            f"got {features}."
        )
    rows = windows.rows[:, start:stop]
    if renormalize:
        rows = rows / jnp.linalg.norm(rows, axis=1, keepdims=True)
    return replace(windows, rows=rows)


def losses_of(
    criterion: Criterion,
    encoders: tuple[Encoder, ...],
    spaces: dict[str, tuple[Windows, ...]],
    batch: Any,
    over: Callable[..., Any] = spread,
) -> InfoNCE:
    """InfoNCE of every batch: the sum of objectives, or the mean over sessions."""
    parts = _parts(over, criterion, encoders, spaces, batch)
    combine = jnp.mean if isinstance(batch, MultisessionBatch) else jnp.sum
    return jax.tree.map(lambda *x: combine(jnp.stack(x), axis=0), *parts.values())


def _parts(
    over: Callable[..., Any],
    criterion: Criterion,
    encoders: tuple[Encoder, ...],
    spaces: dict[str, tuple[Windows, ...]],
    batch: Any,
) -> dict[str, InfoNCE]:
    """InfoNCE of every batch, for each objective or each session."""
    if isinstance(batch, MultisessionBatch):
        (windows,) = spaces.values()
        losses = over(_joint_losses, (criterion, encoders, windows), batch)
        return {
            str(session): InfoNCE(*(x[:, session] for x in losses))
            for session in range(len(encoders))
        }
    if isinstance(batch, SoftBatch):
        drawn = batch.reference, batch.query, batch.negative
        return {
            name: over(_soft_losses, (criterion, encoders[0], windows[0], batch.sampler), drawn)
            for name, windows in spaces.items()
        }
    batches = batch.objectives if isinstance(batch, HybridBatch) else dict.fromkeys(spaces, batch)
    return {
        name: over(_losses, (criterion, encoders[0], windows[0]), Batch(*batches[name]))
        for name, windows in spaces.items()
    }


def rows_at(windows: Windows, encoder: Encoder, steps: Array) -> Array:
    """Embeddings of time steps."""
    return windows.rows[encoder.window_of(steps, length_of(windows, encoder))]


def length_of(windows: Windows, encoder: Encoder) -> Any:
    """Length of the recording."""
    return windows.number + encoder.receptive_field - 1


@jax.jit
def _losses(criterion: Criterion, encoder: Encoder, windows: Windows, batch: Batch) -> InfoNCE:
    @jax.checkpoint
    def one(batch: Batch) -> InfoNCE:
        reference, positive, negative = (rows_at(windows, encoder, steps) for steps in batch)
        return criterion(reference, positive, negative)

    return jax.lax.map(one, batch)


@jax.jit
def _soft_losses(
    criterion: Criterion,
    encoder: Encoder,
    windows: Windows,
    sampler: Soft,
    batch: tuple[Array, Array, Array],
) -> InfoNCE:
    every = rows_at(windows, encoder, jnp.arange(len(sampler.sampler.labels), dtype=jnp.int32))

    @jax.checkpoint
    def one(batch: tuple[Array, Array, Array]) -> InfoNCE:
        reference, query, negative = batch
        reference, negative = (rows_at(windows, encoder, steps) for steps in (reference, negative))
        return criterion(reference, sampler.positive(every, query), negative)

    return jax.lax.map(one, batch)


@jax.jit
def _joint_losses(
    criterion: Criterion,
    encoders: tuple[Encoder, ...],
    windows: tuple[Windows, ...],
    batch: MultisessionBatch,
) -> InfoNCE:
    """InfoNCE of the references of each session against the negatives of all.

    Returns:
        ``(num_batches, sessions)`` each.
    """

    def embed(steps: Array) -> Array:
        """``(sessions, batch)`` indices to ``(sessions, batch, features)``."""
        return jnp.stack(
            [rows_at(w, e, s) for e, w, s in zip(encoders, windows, steps, strict=True)]
        )

    @jax.checkpoint
    def one(batch: MultisessionBatch) -> InfoNCE:
        reference, positive, negative = map(embed, batch[:3])
        pooled = positive.reshape(-1, positive.shape[-1])
        positive = pooled[batch.order].reshape(positive.shape)
        negative = negative.reshape(-1, negative.shape[-1])
        each = [criterion(ref, pos, negative) for ref, pos in zip(reference, positive, strict=True)]
        return InfoNCE(*(jnp.stack(x) for x in zip(*each, strict=True)))

    return jax.lax.map(one, batch)


@jax.jit
def _uniform_terms(criterion: Criterion, negative: Array, reference: Array) -> Array:
    return criterion.terms(reference, reference, negative).uniform


@jax.jit
def _full_losses(
    criterion: Criterion, encoder: Encoder, windows: Windows, uniform: Array, batch: Batch
) -> InfoNCE:
    """InfoNCE of full batches: only their positives differ."""
    reference = rows_at(windows, encoder, batch.reference[0])

    def align(steps: Array) -> Array:
        return criterion(reference, rows_at(windows, encoder, steps), reference[:1]).align

    each = jax.lax.map(align, batch.positive)
    return InfoNCE(each + uniform, each, jnp.broadcast_to(uniform, each.shape))


def check_lengths(sampler: Any, encoders: Sequence[Encoder], num_steps: list[Any]) -> None:
    """Refuse samplers of longer recordings, whose steps would silently be clamped."""
    if isinstance(sampler, FullBatch):
        if (sampler.num_steps, sampler.offset) != (num_steps[0], encoders[0].offset):
            raise ValueError(
                f"The sampler is for {sampler.num_steps} time steps and the offset "
                f"{sampler.offset}, the recording has {num_steps[0]} and the encoder "
                f"{encoders[0].offset}."
            )
        return
    inner = getattr(sampler, "behavior", sampler)
    span = getattr(inner, "span", getattr(inner, "length", 0))
    lengths = getattr(inner, "lengths", (span,))
    if len(lengths) != len(num_steps):
        raise ValueError(
            f"The sampler is for {len(lengths)} sessions, there are {len(num_steps)} recordings."
        )
    for length, steps in zip(lengths, num_steps, strict=True):
        if not is_traced(length) and np.ndim(length) == 0 and int(length) > steps:
            raise ValueError(
                f"The sampler is for {length} time steps, but the recording has {steps}."
            )


def estimate_infonce(
    key: Array,
    model: Model | Checkpoint,
    X: Any,
    sampler: Sampler,
    *,
    batch_size: int | None = None,
    num_batches: int = 500,
    target_stderr_bits: float | None = None,
    max_batches: int = MAX_BATCHES,
    session_id: int | None = None,
    feature_range: FeatureRange = None,
    renormalize: bool = False,
    chunk_size: int | None = None,
    progress: Callable[[range], Iterable[int]] = iter,
    mesh: Mesh | None = None,
    axis_name: str | None = None,
) -> Estimate:
    """InfoNCE of a model on a recording, averaged over batches drawn by a sampler.

    It is ``draw``, then ``evaluate``, then a mean. Works under ``jit``, under ``grad`` with respect
    to the model or the recording (indices stay outside the gradient), and under ``vmap`` over
    stacked models.

    Args:
        key: A JAX PRNG key; the same key gives the same draws.
        model: A model or a checkpoint.
        X: The recording ``(time, neurons)``; a list of one per session with a sampler of several.
        sampler: One of ``cebra_jax_metrics.samplers``.
        batch_size: References, positives and negatives per batch (and session); needed unless the
            sampler is ``samplers.FullBatch``.
        num_batches: Batches to average; with a target, those to start with.
        target_stderr_bits: Draw more batches until the standard error is at most this, in bits. The
            result is that of as many batches asked for at once.
        max_batches: The most to draw for it; where they do not suffice, there is a warning.
        session_id: Which encoder of a multi-session model to use.
        feature_range: Features of the embedding to score, see :func:`evaluate`.
        renormalize: Divide the embeddings in a feature range by their norm.
        chunk_size: Batches drawn at a time: bounds memory, changes no draw.
        progress: Wraps the loop over chunks, such as ``tqdm.tqdm``.
        mesh: Devices to spread the windows, then the batches over (:func:`spread`): the draws are
            those of one device. Every process calls this with the same arguments, draws its own
            batches only, and reads the rows of ``X`` that it needs.
        axis_name: The axis of the mesh, where it has several.

    Returns:
        The mean loss with its standard error, and the goodness of fit as ``.bits``; for a hybrid
        sampler, several feature ranges or several sessions also those of each, as ``.parts``.

    Raises:
        ValueError: The recording does not fit the model, a size is below 1, or the mesh does not
            fit (:func:`spread`).
        TypeError: The key is no JAX key, or a size no integer.
        RuntimeError: Missing or wrong ``session_id``.

    Source: CEBRA 0.6.1 ``cebra.integrations.sklearn.metrics.infonce_loss``.
    """
    key = as_key(key)
    batch_size = check_batch_size(sampler, batch_size)
    num_batches = as_integer("num_batches", num_batches, at_least=1)
    if target_stderr_bits is not None:
        _check_target(target_stderr_bits, num_batches, max_batches)
    processes, devices = 1, 1
    if mesh is not None:
        mesh, axis_name = checked_mesh(mesh, axis_name)
        processes, devices = check_enough("batches", num_batches, mesh), mesh.shape[axis_name]
    chunk_size = _even_chunks(num_batches, processes * MAX_QUERIES_AT_ONCE, batch_size, chunk_size)
    chunk_size += -chunk_size % devices
    over = partial(spread, mesh=mesh, axis_name=axis_name)
    is_joint = isinstance(sampler, Multisession | DiscreteMultisession)
    encoders, windows = embedded(model, X, session_id, is_joint, mesh, axis_name)
    spaces = subspaces(windows, feature_range, renormalize, isinstance(sampler, Hybrid))
    check_lengths(sampler, encoders, list(map(length_of, windows, encoders)))
    criterion = as_model(model).criterion
    if mesh is not None:  # once for all chunks
        criterion, encoders, spaces = placed((criterion, encoders, spaces), mesh, PartitionSpec())
    uniform = {}
    if isinstance(sampler, FullBatch):
        for name, (space,) in spaces.items():  # of all full batches the same
            rows = space.rows[: sampler.batch_size]
            uniform[name] = jnp.mean(over(_uniform_terms, (criterion, rows), rows))
    chunks: list[dict[str, InfoNCE]] = []
    while True:
        for start in progress(range(len(chunks) * chunk_size, num_batches, chunk_size)):
            # Chunks are all of one size, so that one compilation serves them: the last overshoots.
            batch = draw(
                key, sampler, batch_size, chunk_size, start=start, mesh=mesh, axis_name=axis_name
            )
            if isinstance(sampler, FullBatch):
                shared = criterion, *encoders
                chunks.append(
                    {
                        name: over(_full_losses, (*shared, *space, uniform[name]), batch)
                        for name, space in spaces.items()
                    }
                )
            else:
                chunks.append(_parts(over, criterion, encoders, spaces, batch))
            num_negatives = math.prod(batch.negative.shape[1:])
        parts = {
            name: _summarise(tuple(chunk[name] for chunk in chunks), num_batches=num_batches)
            for name in chunks[0]
        }
        estimate = _combined(parts, num_negatives, is_joint)
        wanted = num_batches
        if target_stderr_bits is not None:
            wanted = _batches_for(estimate, num_batches, target_stderr_bits, max_batches)
        if wanted == num_batches:
            return estimate
        num_batches = wanted


def _check_target(target: float, num_batches: int, max_batches: int) -> None:
    if is_traced(target) or not isinstance(target, int | float | np.number) or not target > 0:
        raise ValueError(f"target_stderr_bits has to be a number above 0, got {target!r}.")
    as_integer("max_batches", max_batches, at_least=1)
    if not 2 <= num_batches <= max_batches:
        raise ValueError(
            f"target_stderr_bits takes from 2 to max_batches={max_batches} batches to start with, "
            f"got num_batches={num_batches}."
        )


def _batches_for(estimate: Estimate, num_batches: int, target: float, max_batches: int) -> int:
    """How many batches to go on with, or as many as there are where there is no need."""
    if is_traced(estimate.stderr):
        raise ValueError(
            "target_stderr_bits takes known values: leave it out under jit, grad and vmap."
        )
    stderr = float(estimate.bits_stderr)
    if stderr <= target or not math.isfinite(stderr):
        return num_batches
    if num_batches == max_batches:
        warnings.warn(
            f"After max_batches={max_batches} batches the standard error is {stderr:.2g} bits, "
            f"above the {target:g} asked for.",
            stacklevel=3,
        )
        return num_batches
    most = math.sqrt(max_batches / num_batches)
    expected = num_batches * min(stderr / target, most) ** 2  # as it shrinks with the root
    return min(max(math.ceil(1.02 * expected), num_batches + 1), max_batches)


def _even_chunks(
    num_batches: int, max_queries: int, batch_size: int, chunk_size: int | None
) -> int:
    if chunk_size is not None:
        return min(as_integer("chunk_size", chunk_size, at_least=1), num_batches)
    num_chunks = min(num_batches, math.ceil(num_batches * batch_size / max_queries))
    return math.ceil(num_batches / num_chunks)


@partial(jax.jit, static_argnames="num_batches")
def _summarise(chunks: tuple[InfoNCE, ...], *, num_batches: int) -> InfoNCE:
    """Loss and parts of every batch, the overshoot left out."""
    return InfoNCE(*(jnp.concatenate(x)[:num_batches] for x in zip(*chunks, strict=True)))


@partial(jax.jit, static_argnames=("num_negatives", "is_joint"))
def _combined(parts: dict[str, InfoNCE], num_negatives: int, is_joint: bool) -> Estimate:
    """The estimate of a sum of objectives, or of the mean over sessions, and of each."""
    each = {name: _estimate(part, num_negatives) for name, part in parts.items()}
    if len(each) == 1 and not is_joint:
        return each.popitem()[1]
    combine = jnp.mean if is_joint else jnp.sum
    total = jax.tree.map(lambda *x: combine(jnp.stack(x), axis=0), *parts.values())
    estimate = _estimate(total, num_negatives)
    return replace(estimate, parts=each, num_objectives=1 if is_joint else len(each))


def _estimate(losses: InfoNCE, num_negatives: int) -> Estimate:
    count = len(losses.loss)
    nothing = jnp.full((), jnp.nan, losses.loss.dtype)
    spread = jnp.std(losses.loss, ddof=1) if count > 1 else nothing
    return Estimate(
        loss=jnp.mean(losses.loss),
        stderr=spread / math.sqrt(count),
        per_batch=losses.loss,
        align=jnp.mean(losses.align),
        uniform=jnp.mean(losses.uniform),
        num_negatives=num_negatives,
    )
