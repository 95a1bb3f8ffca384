"""InfoNCE of a model on a recording: the mean over batches, with its standard error."""

import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal, TypeVar, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.sharding import Mesh, PartitionSpec
from jax.typing import ArrayLike

from cebra_jax_metrics.arrays import as_integer, as_key, is_traced, on_cpu
from cebra_jax_metrics.control_variates import (
    PAIRS,
    Compared,
    Known,
    Marks,
    compared,
    known,
    reduced,
    size_of,
)
from cebra_jax_metrics.encoders import Encoder
from cebra_jax_metrics.infonce import InfoNCE, chance_level, check_temperature
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
Method = Literal["plain", "control_variates"]
T = TypeVar("T")


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
        gain: Variance of plain batches over that of ``per_batch``, as estimated from the same
            draws: how many times as many plain batches it takes; 1 for those.
    """

    loss: Array
    stderr: Array
    per_batch: Array
    align: Array
    uniform: Array
    num_negatives: int | Array
    parts: dict[str, "Estimate"] = field(default_factory=dict)
    num_objectives: int = field(default=1, metadata={"static": True})
    gain: Array | float = 1.0

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
    check_temperature(as_model(model).criterion.effective_temperature)
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
        # In units of the largest feature, whose squares do not leave the range of floats.
        rows = rows / lax.stop_gradient(jnp.max(jnp.abs(rows), axis=1, keepdims=True))
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

    def losses(name: str, windows: tuple[Windows, ...], soft: Soft | None, batch: Any) -> Any:
        return over(_losses, (criterion, encoders, windows, soft), batch)

    parts = _parts(losses, spaces, batch)
    combine = jnp.mean if isinstance(batch, MultisessionBatch) else jnp.sum
    return jax.tree.map(lambda *x: combine(jnp.stack(x), axis=0), *parts.values())


def _parts(
    losses: Callable[..., tuple[T, ...]], spaces: dict[str, tuple[Windows, ...]], batch: Any
) -> dict[str, T]:
    """What ``losses(name, windows, soft, batch)`` returns, for each objective or each session."""
    if isinstance(batch, MultisessionBatch):
        ((name, windows),) = spaces.items()
        return {str(i): part for i, part in enumerate(losses(name, windows, None, batch))}
    soft, each = _by_objective(batch, spaces)
    return {name: losses(name, windows, soft, each[name])[0] for name, windows in spaces.items()}


def _by_objective(batch: Any, spaces: dict[str, Any]) -> tuple[Soft | None, dict[str, Any]]:
    """The batches of every objective, and the sampler that they need to find their positives."""
    if isinstance(batch, SoftBatch):
        return batch.sampler, dict.fromkeys(spaces, replace(batch, sampler=None))
    batches = batch.objectives if isinstance(batch, HybridBatch) else dict.fromkeys(spaces, batch)
    return None, {name: Batch(*batches[name]) for name in spaces}


def rows_at(windows: Windows, encoder: Encoder, steps: Array) -> Array:
    """Embeddings of time steps."""
    return windows.rows[encoder.window_of(steps, length_of(windows, encoder))]


def length_of(windows: Windows, encoder: Encoder) -> Any:
    """Length of the recording."""
    return windows.number + encoder.receptive_field - 1


@jax.jit
def _losses(
    criterion: Criterion,
    encoders: tuple[Encoder, ...],
    windows: tuple[Windows, ...],
    soft: Soft | None,
    batch: Any,
) -> tuple[InfoNCE, ...]:
    """InfoNCE of every batch ``(num_batches,)``, for the references of each session."""
    rows_of = _embedding_of_batches(encoders, windows, soft)

    @jax.checkpoint
    def one(batch: Any) -> tuple[InfoNCE, ...]:
        pairs, negative = rows_of(batch)
        return tuple(criterion(reference, positive, negative) for reference, positive in pairs)

    return jax.lax.map(one, batch)


def _embedding_of_batches(
    encoders: tuple[Encoder, ...], windows: tuple[Windows, ...], soft: Soft | None
) -> Callable[[Any], tuple[list[tuple[Array, Array]], Array]]:
    """A function of a batch: references and positives of each session, and the negatives of all."""
    at = partial(rows_at, windows[0], encoders[0])
    if soft is not None:
        every = at(jnp.arange(len(soft.sampler.labels), dtype=jnp.int32))

    def embed(steps: Array) -> Array:
        """``(sessions, batch)`` indices to ``(sessions, batch, features)``."""
        return jnp.stack(
            [rows_at(w, e, s) for e, w, s in zip(encoders, windows, steps, strict=True)]
        )

    def of(batch: Any) -> tuple[list[tuple[Array, Array]], Array]:
        if isinstance(batch, MultisessionBatch):
            reference, positive, negative = map(embed, batch[:3])
            pooled = positive.reshape(-1, positive.shape[-1])
            positive = pooled[batch.order].reshape(positive.shape)
            pairs = list(zip(reference, positive, strict=True))
            return pairs, negative.reshape(-1, negative.shape[-1])
        positive = at(batch.positive) if soft is None else soft.positive(every, batch.query)
        return [(at(batch.reference), positive)], at(batch.negative)

    return of


@partial(jax.jit, static_argnames="batch_size")
def _controlled_losses(
    criterion: Criterion,
    encoders: tuple[Encoder, ...],
    windows: tuple[Windows, ...],
    soft: Soft | None,
    knowns: tuple[Known, ...],
    batch: Any,
    *,
    batch_size: int,
) -> tuple[tuple[InfoNCE, Compared], ...]:
    """InfoNCE of every batch, and what :func:`compared` makes of it, for each session.

    Args:
        criterion: How embeddings are compared.
        encoders: One for each session.
        windows: Embeddings of each recording.
        soft: The sampler that makes positives of a ``SoftBatch``.
        knowns: What is known of each session.
        batch: Of each the first ``batch_size`` references, positives and negatives are the batch;
            the other references and positives are further pairs.
        batch_size: The size of the batches.
    """
    rows_of = _embedding_of_batches(encoders, windows, soft)
    starts = np.cumsum([0, *(len(known.level.values) for known in knowns[:-1])]).astype(np.int32)

    @jax.checkpoint
    def one(batch: Any) -> tuple[tuple[InfoNCE, Compared], ...]:
        pairs = batch.reference.shape[-1] // batch_size
        first = batch.negative[..., : batch.negative.shape[-1] // pairs]
        is_soft = isinstance(batch, SoftBatch)
        batch = replace(batch, negative=first) if is_soft else batch._replace(negative=first)
        pairs, negative = rows_of(batch)
        steps = batch.reference.reshape(len(knowns), -1)
        places = (first.reshape(len(knowns), -1) + starts[:, None]).reshape(-1)

        def of(known: Known, steps: Array, pair: tuple[Array, Array]) -> Any:
            reference, positive = (rows[:batch_size] for rows in pair)
            terms = criterion.terms(reference, positive, negative)
            aligns = criterion.terms(*pair, negative[:1]).align
            plain = jax.tree.map(jnp.mean, terms)
            return plain, compared(known, terms.uniform, aligns, steps, places)

        return tuple(map(of, knowns, steps, pairs))

    return jax.lax.map(one, batch)


def _what_is_known(
    criterion: Criterion,
    encoders: tuple[Encoder, ...],
    spaces: dict[str, tuple[Windows, ...]],
    sampler: Any,
    most_pairs: int,
    mesh: Mesh | None,
    axis_name: str | None,
) -> dict[str, tuple[Known, ...]]:
    """What is known of the recordings, for each objective and session."""
    windows = next(iter(spaces.values()))
    sizes = tuple(size_of(int(length)) for length in map(length_of, windows, encoders))
    sampler = sampler.padded()
    # While something else is traced, known probabilities are worked on at once.
    is_known = not is_traced(*jax.tree.leaves(sampler))
    with jax.ensure_compile_time_eval() if is_known else nullcontext():
        weights = _probabilities(sampler, sizes)
        pooled = jnp.concatenate(weights) / len(weights)
    marks = tuple(Marks.of(each, pooled, most_pairs) for each in weights)
    objectives = getattr(sampler, "objectives", {})
    return {
        name: _known(
            criterion,
            encoders,
            windows,
            weights,
            marks,
            objectives.get(name, sampler),
            mesh=mesh,
            axis_name=axis_name,
        )
        for name, windows in spaces.items()
    }


@partial(jax.jit, static_argnames="sizes")
def _probabilities(sampler: Any, sizes: tuple[int, ...]) -> tuple[Array, ...]:
    return sampler.probabilities(*sizes)


@partial(jax.jit, static_argnames=("mesh", "axis_name"))
def _known(
    criterion: Criterion,
    encoders: tuple[Encoder, ...],
    windows: tuple[Windows, ...],
    weights: tuple[Array, ...],
    marks: tuple[Marks, ...],
    sampler: Any,
    *,
    mesh: Mesh | None,
    axis_name: str | None,
) -> tuple[Known, ...]:
    """What is known of every session; steps behind the end of a recording have no weight."""
    rows = [
        rows_at(w, e, jnp.arange(len(p), dtype=jnp.int32))
        for w, e, p in zip(windows, encoders, weights, strict=True)
    ]
    negative = jnp.concatenate(rows), jnp.concatenate(weights) / len(weights)
    return tuple(
        known(
            criterion.similarity,
            criterion.effective_temperature,
            (each, weight),
            negative,
            mark,
            getattr(sampler, "mean_positive", None),
            partial(spread, mesh=mesh, axis_name=axis_name),
        )
        for each, weight, mark in zip(rows, weights, marks, strict=True)
    )


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
    method: Method = "plain",
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
        method: ``"plain"`` is the mean of the batches; ``"control_variates"`` has the same
            expectation and a smaller standard error, by comparing each batch with the recording
            (:mod:`cebra_jax_metrics.control_variates`): it looks for more positives, and computes
            at most as many similarities again. It takes from about 20 batches on. A full batch has
            nothing to gain, and is scored as it is.
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
        sampler, several feature ranges or several sessions also those of each, as ``.parts``. The
        loss is not finite where an embedding is not (one of norm 0, normalised, is NaN) or its
        squared norm leaves the range of floats; a collapsed embedding has 0 bits up to rounding.

    Raises:
        ValueError: The recording does not fit the model, a size is below 1, the method is unknown,
            a known temperature is not above 0, or the mesh does not fit (:func:`spread`).
        TypeError: The key is no JAX key, the sampler none, or a size no integer.
        RuntimeError: Missing or wrong ``session_id``.

    Source: CEBRA 0.6.1 ``cebra.integrations.sklearn.metrics.infonce_loss``.
    """
    key = as_key(key)
    batch_size = check_batch_size(sampler, batch_size)
    num_batches = as_integer("num_batches", num_batches, at_least=1)
    if method not in get_args(Method):
        raise ValueError(f"method has to be one of {get_args(Method)}, got {method!r}.")
    if target_stderr_bits is not None:
        _check_target(target_stderr_bits, num_batches, max_batches)
    processes, devices = 1, 1
    if mesh is not None:
        mesh, axis_name = checked_mesh(mesh, axis_name)
        processes, devices = check_enough("batches", num_batches, mesh), mesh.shape[axis_name]
    over = partial(spread, mesh=mesh, axis_name=axis_name)
    is_joint = isinstance(sampler, Multisession | DiscreteMultisession)
    encoders, windows = embedded(model, X, session_id, is_joint, mesh, axis_name)
    spaces = subspaces(windows, feature_range, renormalize, isinstance(sampler, Hybrid))
    check_lengths(sampler, encoders, list(map(length_of, windows, encoders)))
    criterion = as_model(model).criterion
    if mesh is not None:  # once for all chunks
        criterion, encoders, spaces = placed((criterion, encoders, spaces), mesh, PartitionSpec())
    uniform, knowns, pairs = {}, {}, 1
    if isinstance(sampler, FullBatch):
        for name, (space,) in spaces.items():  # of all full batches the same
            rows = space.rows[: sampler.batch_size]
            uniform[name] = jnp.mean(over(_uniform_terms, (criterion, rows), rows))
    elif method == "control_variates":
        if not hasattr(sampler, "probabilities"):
            raise TypeError(
                'method="control_variates" takes a sampler that says how probable its time steps '
                f"are: give {type(sampler).__name__} a method probabilities(num_steps)."
            )
        most_pairs = num_batches * batch_size**2 * len(encoders)
        knowns = _what_is_known(criterion, encoders, spaces, sampler, most_pairs, mesh, axis_name)
        pairs = 1 if all(k.is_exact for each in knowns.values() for k in each) else PAIRS
    drawn_size = pairs * batch_size
    chunk_size = _even_chunks(num_batches, processes * MAX_QUERIES_AT_ONCE, drawn_size, chunk_size)
    chunk_size += -chunk_size % devices

    def losses(name: str, windows: tuple[Windows, ...], soft: Soft | None, batch: Any) -> Any:
        shared = criterion, encoders, windows, soft
        if isinstance(sampler, FullBatch):
            return (over(_full_losses, (criterion, *encoders, *windows, uniform[name]), batch),)
        if not knowns:
            return over(_losses, shared, batch)
        return over(_controlled_losses, (*shared, knowns[name]), batch, batch_size=batch_size)

    chunks: list[dict[str, Any]] = []
    while True:
        for start in progress(range(len(chunks) * chunk_size, num_batches, chunk_size)):
            # Chunks are all of one size, so that one compilation serves them: the last overshoots.
            batch = draw(
                key, sampler, drawn_size, chunk_size, start=start, mesh=mesh, axis_name=axis_name
            )
            chunks.append(_parts(losses, spaces, batch))
            num_negatives = math.prod(batch.negative.shape[1:]) // pairs
        parts = {
            name: _summarise(tuple(chunk[name] for chunk in chunks), num_batches=num_batches)
            for name in chunks[0]
        }
        plain = None
        if knowns:
            plain = {name: part[0] for name, part in parts.items()}
            parts = {name: reduced(*part) for name, part in parts.items()}
        estimate = _combined(parts, plain, num_negatives, is_joint)
        wanted = num_batches
        if target_stderr_bits is not None:
            wanted = _batches_for(estimate, num_batches, target_stderr_bits, max_batches)
        if wanted == num_batches:
            return estimate
        num_batches = wanted


def check_losses(losses: ArrayLike) -> None:
    """Refuse losses that are not finite, which a model or a recording out of range gives."""
    known = np.asarray(losses)
    if not np.isfinite(known).all():
        raise ValueError(
            f"The loss is {float(known[~np.isfinite(known)].flat[0])}: the model's parameters or "
            "temperature are not finite, or an embedding has norm 0 or a norm beyond the range of "
            "floats."
        )


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
def _summarise(chunks: tuple[T, ...], *, num_batches: int) -> T:
    """What is known of every batch, the overshoot left out."""
    return jax.tree.map(lambda *x: jnp.concatenate(x)[:num_batches], *chunks)


@partial(jax.jit, static_argnames=("num_negatives", "is_joint"))
def _combined(
    parts: dict[str, InfoNCE],
    plain: dict[str, InfoNCE] | None,
    num_negatives: int,
    is_joint: bool,
) -> Estimate:
    """The estimate of a sum of objectives, or of the mean over sessions, and of each.

    Args:
        parts: Losses of every batch, for each objective or session.
        plain: The same before control variates, where there were any.
        num_negatives: Negatives in each batch.
        is_joint: Whether the parts are sessions.
    """
    combine = jnp.mean if is_joint else jnp.sum

    def total(parts: dict[str, InfoNCE]) -> InfoNCE:
        return jax.tree.map(lambda *x: combine(jnp.stack(x), axis=0), *parts.values())

    before = parts if plain is None else plain
    each = {name: _estimate(part, before[name], num_negatives) for name, part in parts.items()}
    if len(each) == 1 and not is_joint:
        return each.popitem()[1]
    estimate = _estimate(total(parts), total(before), num_negatives)
    return replace(estimate, parts=each, num_objectives=1 if is_joint else len(each))


def _estimate(losses: InfoNCE, plain: InfoNCE, num_negatives: int) -> Estimate:
    count = len(losses.loss)
    nothing = jnp.full((), jnp.nan, losses.loss.dtype)
    spread, before = (
        jnp.std(x, ddof=1) if count > 1 else nothing for x in (losses.loss, plain.loss)
    )
    is_plain = count == 1 or spread == before
    gain = jnp.where(is_plain, 1, (before / spread) ** 2)
    return Estimate(
        loss=jnp.mean(losses.loss),
        stderr=spread / math.sqrt(count),
        per_batch=losses.loss,
        align=jnp.mean(losses.align),
        uniform=jnp.mean(losses.uniform),
        num_negatives=num_negatives,
        gain=gain,
    )
