"""InfoNCE of given batches: the embeddings that are compared, and the losses of every batch."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh
from jax.typing import ArrayLike

from cebra_jax_metrics.arrays import is_traced, unit_rows
from cebra_jax_metrics.control_variates import Compared, Known, Marks, compared, known, size_of
from cebra_jax_metrics.encoders import Encoder
from cebra_jax_metrics.infonce import InfoNCE, check_temperature
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
    FullBatch,
    HybridBatch,
    MultisessionBatch,
    Soft,
    SoftBatch,
)
from cebra_jax_metrics.sharding import spread

# The features that the behaviour objective of CEBRA's hybrid models is trained on.
BEHAVIOR_FEATURES = 3

FeatureRange = slice | Sequence[slice] | None
T = TypeVar("T")


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
        rows = unit_rows(rows)
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
        return over(plain_losses, (criterion, encoders, windows, soft), batch)

    parts = parts_of(losses, spaces, batch)
    combine = jnp.mean if isinstance(batch, MultisessionBatch) else jnp.sum
    return jax.tree.map(lambda *x: combine(jnp.stack(x), axis=0), *parts.values())


def parts_of(
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
def plain_losses(
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
def controlled_losses(
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


def what_is_known(
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
def uniform_terms(criterion: Criterion, negative: Array, reference: Array) -> Array:
    """The uniform part of each reference ``(batch,)``."""
    return criterion.terms(reference, reference, negative).uniform


@jax.jit
def full_losses(
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


def check_losses(losses: ArrayLike) -> None:
    """Refuse losses that are not finite, which a model or a recording out of range gives."""
    known = np.asarray(losses)
    if not np.isfinite(known).all():
        raise ValueError(
            f"The loss is {float(known[~np.isfinite(known)].flat[0])}: the model's parameters or "
            "temperature are not finite, or an embedding has norm 0 or a norm beyond the range of "
            "floats."
        )
