"""Scores of a model on a recording: checks, defaults, calls down.

They take a :class:`Checkpoint`, the path of a checkpoint or a fitted ``cebra.CEBRA``, arrays of any
kind, and return Python floats and NumPy arrays.
"""

import dataclasses
import os
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypedDict, Unpack, overload

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh

from cebra_jax_metrics.arrays import as_integer, as_numpy, check_dimensions, check_finite
from cebra_jax_metrics.checkpoints import import_once, load
from cebra_jax_metrics.estimation import MAX_BATCHES, Estimate, Method, estimate_infonce
from cebra_jax_metrics.evaluation import FeatureRange, check_losses
from cebra_jax_metrics.model import Checkpoint, Model, as_recording, select_encoder
from cebra_jax_metrics.samplers import (
    DeltaNormal,
    Discrete,
    DiscreteMultisession,
    FullBatch,
    Hybrid,
    Mixed,
    Multisession,
    Sampler,
    Time,
    TimeDelta,
)

RENAMED = {"time_offset": "time_offsets"}


class Settings(TypedDict, total=False):
    """What a score may have otherwise than the model was trained with.

    Attributes:
        batch_size: References and negatives per batch; ``None`` takes all time steps at once.
        time_offset: Steps from a reference to its positive, or over which labels change.
        conditional: ``"time"``, ``"time_delta"`` or ``"delta_normal"``.
        delta: Standard deviation of the labels of positives, for ``"delta_normal"``.
        prior: Of discrete labels, ``"empirical"`` or ``"uniform"``.
        temperature: What similarities are divided by.
        feature_range: Features of the embedding that are scored: a slice, or several whose losses
            are added (:func:`evaluate`).
        renormalize: Divide the embeddings in a feature range by their norm.
    """

    batch_size: int | None
    time_offset: int
    conditional: str | None
    delta: float
    prior: str
    temperature: float
    feature_range: FeatureRange
    renormalize: bool


@overload
def infonce_loss(
    cebra_model: Any,
    X: Any,
    *y: Any,
    session_id: int | None = ...,
    num_batches: int = ...,
    correct_by_batchsize: bool = ...,
    key: Array | None = ...,
    target_stderr_bits: float | None = ...,
    max_batches: int = ...,
    method: Method = ...,
    return_estimate: Literal[False] = ...,
    mesh: Mesh | None = ...,
    axis_name: str | None = ...,
    **settings: Unpack[Settings],
) -> float: ...
@overload
def infonce_loss(
    cebra_model: Any,
    X: Any,
    *y: Any,
    session_id: int | None = ...,
    num_batches: int = ...,
    correct_by_batchsize: bool = ...,
    key: Array | None = ...,
    target_stderr_bits: float | None = ...,
    max_batches: int = ...,
    method: Method = ...,
    return_estimate: Literal[True],
    mesh: Mesh | None = ...,
    axis_name: str | None = ...,
    **settings: Unpack[Settings],
) -> Estimate: ...
def infonce_loss(
    cebra_model: Any,
    X: Any,
    *y: Any,
    session_id: int | None = None,
    num_batches: int = 500,
    correct_by_batchsize: bool = False,
    key: Array | None = None,
    target_stderr_bits: float | None = None,
    max_batches: int = MAX_BATCHES,
    method: Method = "plain",
    return_estimate: bool = False,
    mesh: Mesh | None = None,
    axis_name: str | None = None,
    **settings: Unpack[Settings],
) -> float | Estimate:
    """InfoNCE loss of a model on one recording, averaged over batches drawn from that recording.

    Args:
        cebra_model: A :class:`Checkpoint`, the path of one, or a fitted ``cebra.CEBRA``.
        X: The recording ``(time, neurons)``.
        *y: Labels, one array for each that the model was fitted with, as long as ``X``: floats
            ``(time,)`` or ``(time, features)`` are continuous, integers ``(time,)`` discrete.
        session_id: Which session's encoder of a multi-session model to use; ``None`` for others.
        num_batches: Batches to average; 500 or more for a score to report.
        correct_by_batchsize: Subtract the log of the batch size.
        key: JAX PRNG key; by default always ``jax.random.key(0)``, so that scores repeat.
        target_stderr_bits: Go on until the standard error is at most this, in bits
            (:func:`estimate_infonce`).
        max_batches: The most batches to draw for it.
        method: ``"control_variates"`` for a smaller standard error (:func:`estimate_infonce`).
        return_estimate: Return the :class:`Estimate` with its standard error and its parts.
        mesh: Devices to spread the work over (:func:`estimate_infonce`).
        axis_name: The axis of the mesh, where it has several.
        **settings: What to do otherwise than in training: ``batch_size``, ``time_offset``,
            ``conditional``, ``delta``, ``prior``, ``temperature``, ``feature_range`` (a slice of
            the features to score, or several) and ``renormalize``.

    Returns:
        The loss in nats; that of a hybrid model is the sum of its two objectives. The ``Estimate``
        is not corrected by the batch size. A model trained on full batches is scored on all time
        steps of ``X`` at once.

    Raises:
        sklearn.exceptions.NotFittedError: The estimator is not fitted.
        NotImplementedError: Several sessions were given (see :func:`multisession_infonce_loss`), or
            settings and labels of which CEBRA makes no batches.
        RuntimeError: Missing or wrong ``session_id``.
        ValueError: ``X`` or ``y`` do not fit the model, are not finite or differ in length; a
            setting or the number of batches makes no sense, or a setting has no effect here.
        TypeError: A setting of another name.

    Source: CEBRA 0.6.1 ``cebra.integrations.sklearn.metrics.infonce_loss``.
    """
    checkpoint = as_checkpoint(cebra_model)
    if correct_by_batchsize and _changed(checkpoint, settings).settings.get("batch_size") is None:
        raise ValueError(
            "Batch size is None, please provide a model with a batch size to correct the InfoNCE."
        )
    estimate = score(
        checkpoint,
        X,
        *y,
        session_id=session_id,
        num_batches=num_batches,
        key=key,
        target_stderr_bits=target_stderr_bits,
        max_batches=max_batches,
        method=method,
        mesh=mesh,
        axis_name=axis_name,
        **settings,
    )
    if return_estimate:
        return estimate
    correction = np.log(estimate.num_negatives) if correct_by_batchsize else 0.0
    return float(estimate.loss) - float(correction)


@overload
def goodness_of_fit_score(
    cebra_model: Any,
    X: Any,
    *y: Any,
    session_id: int | None = ...,
    num_batches: int = ...,
    key: Array | None = ...,
    target_stderr_bits: float | None = ...,
    max_batches: int = ...,
    method: Method = ...,
    return_estimate: Literal[False] = ...,
    mesh: Mesh | None = ...,
    axis_name: str | None = ...,
    **settings: Unpack[Settings],
) -> float: ...
@overload
def goodness_of_fit_score(
    cebra_model: Any,
    X: Any,
    *y: Any,
    session_id: int | None = ...,
    num_batches: int = ...,
    key: Array | None = ...,
    target_stderr_bits: float | None = ...,
    max_batches: int = ...,
    method: Method = ...,
    return_estimate: Literal[True],
    mesh: Mesh | None = ...,
    axis_name: str | None = ...,
    **settings: Unpack[Settings],
) -> Estimate: ...
def goodness_of_fit_score(
    cebra_model: Any,
    X: Any,
    *y: Any,
    session_id: int | None = None,
    num_batches: int = 500,
    key: Array | None = None,
    target_stderr_bits: float | None = None,
    max_batches: int = MAX_BATCHES,
    method: Method = "plain",
    return_estimate: bool = False,
    mesh: Mesh | None = None,
    axis_name: str | None = None,
    **settings: Unpack[Settings],
) -> float | Estimate:
    """Goodness of fit of a model on one recording: 0 bits is chance, below 0 is worse than chance.

    Chance is the log of the negatives really used, so that a multi-session model that learned
    nothing scores 0 here (in CEBRA 0.6.1 log2 of the number of sessions).

    Args:
        cebra_model: A :class:`Checkpoint`, the path of one, or a fitted ``cebra.CEBRA``.
        X: The recording ``(time, neurons)``.
        *y: Labels, see :func:`infonce_loss`.
        session_id: Which session's encoder of a multi-session model to use; ``None`` for others.
        num_batches: Batches to average; 500 or more for a score to report.
        key: JAX PRNG key; by default always ``jax.random.key(0)``, so that scores repeat.
        target_stderr_bits: Go on until the standard error is at most this, in bits
            (:func:`estimate_infonce`).
        max_batches: The most batches to draw for it.
        method: ``"control_variates"`` for a smaller standard error (:func:`estimate_infonce`).
        return_estimate: Return the :class:`Estimate`, whose ``bits`` and ``bits_stderr`` are the
            score and its standard error.
        mesh: Devices to spread the work over (:func:`estimate_infonce`).
        axis_name: The axis of the mesh, where it has several.
        **settings: What to do otherwise than in training, see :func:`infonce_loss`.

    Returns:
        The goodness of fit in bits.

    Raises:
        Exception: What :func:`infonce_loss` raises.

    Source: CEBRA 0.6.1 ``cebra.integrations.sklearn.metrics.goodness_of_fit_score``.
    """
    estimate = score(
        cebra_model,
        X,
        *y,
        session_id=session_id,
        num_batches=num_batches,
        key=key,
        target_stderr_bits=target_stderr_bits,
        max_batches=max_batches,
        method=method,
        mesh=mesh,
        axis_name=axis_name,
        **settings,
    )
    return estimate if return_estimate else float(estimate.bits)


def multisession_infonce_loss(
    cebra_model: Any,
    X: Sequence[Any],
    *y: Sequence[Any],
    num_batches: int = 500,
    key: Array | None = None,
    target_stderr_bits: float | None = None,
    max_batches: int = MAX_BATCHES,
    method: Method = "plain",
    mesh: Mesh | None = None,
    axis_name: str | None = None,
    **settings: Unpack[Settings],
) -> Estimate:
    """Joint InfoNCE loss of a multi-session model: the one that it was trained on.

    ``batch_size`` references of each session are scored against the negatives of all sessions;
    their positives come from sessions drawn at random (:class:`samplers.Multisession`).

    Args:
        cebra_model: A multi-session :class:`Checkpoint`, the path of one, or a fitted
            ``cebra.CEBRA``.
        X: A recording ``(time, neurons)`` for each session of the model, in its order.
        *y: One list of labels for each session: floats are continuous, integers discrete.
        num_batches: Batches to average.
        key: JAX PRNG key; by default always ``jax.random.key(0)``.
        target_stderr_bits: Go on until the standard error is at most this, in bits.
        max_batches: The most batches to draw for it.
        method: ``"control_variates"`` for a smaller standard error (:func:`estimate_infonce`).
        mesh: Devices to spread the work over (:func:`estimate_infonce`).
        axis_name: The axis of the mesh, where it has several.
        **settings: What to do otherwise than in training, see :func:`infonce_loss`.

    Returns:
        The estimate in nats, ``float(estimate)`` being the loss; ``parts["0"]`` and so on are the
        references of each session. Chance is the log of the negatives of all sessions.

    Raises:
        RuntimeError: There are no labels.
        NotImplementedError: Several lists of labels, or a model without batch size.
        ValueError: The model has no sessions; recordings and labels do not fit it or each other; a
            session lacks a discrete label that another has.

    Source: CEBRA 0.6.1 ``cebra.solver.MultiSessionSolver``, ``cebra.data.multi_session``.
    """
    checkpoint = _changed(as_checkpoint(cebra_model), settings)
    encoders = checkpoint.model.encoders
    if not checkpoint.is_multisession:
        raise ValueError("The model has one session only: use infonce_loss.")
    if not y:
        raise RuntimeError(
            "No label: labels are needed for alignment in the multisession implementation."
        )
    if len(y) > 1:
        raise NotImplementedError(
            "Support for multiple set of index is not implemented in multissesion training, got "
            f"{len(y)}: put continuous labels side by side in one array for each session."
        )
    if len(X) != len(y[0]) or len(X) != len(encoders):
        raise ValueError(
            "Invalid number of sessions: number of sessions in X and y need to match, got "
            f"X:{len(X)} and y:{[len(labels) for labels in y]}, for a model of {len(encoders)}."
        )
    recordings = [as_recording(x, e, i) for i, (x, e) in enumerate(zip(X, encoders, strict=True))]
    labels = [_label_array(label) for label in y[0]]
    for session, (x, label) in enumerate(zip(recordings, labels, strict=True)):
        if np.ndim(label) and x.shape[0] != len(label):
            raise ValueError(
                f"Invalid number of samples in session {session} for set of label 0: X has "
                f"{x.shape[0]}, while y has {len(label)}"
            )
        _check_labels(checkpoint.settings, [label], x.shape[0], session)
    if len({np.issubdtype(label.dtype, np.integer) for label in labels}) > 1:
        raise ValueError(
            f"Some sessions have integer labels, others floats: {[str(y.dtype) for y in labels]}."
        )
    if checkpoint.settings.get("hybrid") or checkpoint.settings.get("batch_size") is None:
        raise _no_such_batches(checkpoint.settings, labels)
    sampler: Sampler
    if np.issubdtype(labels[0].dtype, np.integer):
        sampler = DiscreteMultisession(labels)
    else:
        sampler = Multisession(labels, _time_offset(checkpoint.settings.get("time_offsets", 1)))
    _check_used(settings, sampler, False)
    return _estimated(
        checkpoint,
        recordings,
        sampler,
        num_batches,
        key,
        target_stderr_bits=target_stderr_bits,
        max_batches=max_batches,
        method=method,
        mesh=mesh,
        axis_name=axis_name,
        **_space(settings),
    )


def score(
    cebra_model: Any,
    X: Any,
    *y: Any,
    session_id: int | None = None,
    num_batches: int = 500,
    key: Array | None = None,
    target_stderr_bits: float | None = None,
    max_batches: int = MAX_BATCHES,
    method: Method = "plain",
    chunk_size: int | None = None,
    progress: Any = iter,
    mesh: Mesh | None = None,
    axis_name: str | None = None,
    **settings: Unpack[Settings],
) -> Estimate:
    """What the two scores share."""
    checkpoint = _changed(as_checkpoint(cebra_model), settings)
    for what, values in (("Data", X), ("Labels", y[0] if y else None)):
        if isinstance(values, list) and values and np.ndim(_first(values)) == 2:
            raise NotImplementedError(
                f"{what} invalid: score cannot be computed on multiple sessions, got "
                f"{len(values)} sessions. Score them one by one with session_id, or jointly with "
                "multisession_infonce_loss."
            )
    encoder = select_encoder(checkpoint, session_id)
    X = as_recording(X, encoder, session_id)
    labels = [_label_array(label) for label in y]
    _check_labels(checkpoint.settings, labels, X.shape[0], session_id)
    sampler = sampler_for(checkpoint.settings, X.shape[0], labels, encoder.offset)
    _check_used(settings, sampler, bool(labels))
    return _estimated(
        checkpoint,
        X,
        sampler,
        num_batches,
        key,
        session_id=session_id,
        target_stderr_bits=target_stderr_bits,
        max_batches=max_batches,
        method=method,
        chunk_size=chunk_size,
        progress=progress,
        mesh=mesh,
        axis_name=axis_name,
        **_space(settings),
    )


def _estimated(
    checkpoint: Checkpoint,
    X: Any,
    sampler: Sampler,
    num_batches: int,
    key: Array | None,
    **options: Any,
) -> Estimate:
    if num_batches is None or (isinstance(num_batches, int) and num_batches < 1):
        raise ValueError(
            f"num_steps cannot be less than or equal to zero or None. Got {num_batches}; "
            "num_batches has to be at least 1."
        )
    if "batch_size" not in checkpoint.settings:
        raise ValueError(
            "Batch size is None, please provide a model with a batch size, or pass batch_size=."
        )
    estimate = estimate_infonce(
        jax.random.key(0) if key is None else key,
        checkpoint,
        X,
        sampler,
        batch_size=checkpoint.settings["batch_size"],
        num_batches=num_batches,
        **options,
    )
    check_losses(estimate.loss)
    return estimate


def _changed(checkpoint: Checkpoint, settings: Mapping[str, Any]) -> Checkpoint:
    """The checkpoint with other settings."""
    unknown = set(settings) - set(Settings.__annotations__)
    if unknown:
        raise TypeError(
            f"Unknown settings {sorted(unknown)}: expected some of "
            f"{sorted(Settings.__annotations__)}."
        )
    model = checkpoint.model
    if "temperature" in settings:
        temperature = settings["temperature"]
        if not isinstance(temperature, int | float | np.number) or not (
            0 < temperature < float(np.finfo(np.float32).max)
        ):
            raise ValueError(f"temperature has to be a finite number above 0, got {temperature!r}.")
        fixed = dataclasses.replace(
            model.criterion, temperature=jnp.float32(temperature), learned=False
        )
        model = dataclasses.replace(model, criterion=fixed)
    other = {RENAMED.get(name, name): value for name, value in settings.items()}
    return dataclasses.replace(checkpoint, model=model, settings={**checkpoint.settings, **other})


def _check_used(settings: Mapping[str, Any], sampler: Any, has_labels: bool) -> None:
    """Refuse settings of a call that change nothing."""
    inner = getattr(sampler, "behavior", getattr(sampler, "conditional", sampler))
    by_conditional = has_labels and isinstance(inner, Time | TimeDelta | DeltaNormal)
    used = {name for part in (sampler, inner) for name in vars(part)}
    used |= {"conditional"} if by_conditional else set()
    for name in ("time_offset", "conditional", "delta", "prior"):
        if name in settings and name not in used:
            raise ValueError(
                f"{name}={settings[name]!r} has no effect on {type(sampler).__name__} batches, "
                "which these labels and settings ask for: leave it out."
            )


def _space(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {name: settings[name] for name in ("feature_range", "renormalize") if name in settings}


def goodness_of_fit_history(model: Any) -> np.ndarray:
    """Goodness of fit at every training step, from the recorded loss.

    Args:
        model: A :class:`Checkpoint`, the path of one, or a fitted ``cebra.CEBRA``.

    Returns:
        Bits ``(steps,)``; several sessions are trained with a joint loss over all their negatives,
        hybrid models with the sum of two losses, each with a chance of its own.

    Raises:
        sklearn.exceptions.NotFittedError: The estimator is not fitted.
        ValueError: The model was trained without a batch size, or has no history.

    Source: CEBRA 0.6.1 ``cebra.integrations.sklearn.metrics.goodness_of_fit_history``.
    """
    checkpoint = as_checkpoint(model)
    if not len(checkpoint.history.get("total", ())):
        raise ValueError("The checkpoint holds no training history.")
    bits = np.asarray(infonce_to_goodness_of_fit(checkpoint.history["total"], checkpoint))
    if checkpoint.settings.get("hybrid"):
        bits = bits + np.log2(checkpoint.settings["batch_size"])
    return bits


def infonce_to_goodness_of_fit(
    infonce: float | np.ndarray,
    model: Any = None,
    batch_size: int | None = None,
    num_sessions: int | None = None,
) -> float | np.ndarray:
    """Convert the InfoNCE loss that a model is trained with into bits.

    The joint training loss of several sessions has ``batch_size * num_sessions`` negatives. For the
    loss of a single recording see :func:`goodness_of_fit`, which takes their number.

    Args:
        infonce: Loss in nats, one value or an array of any shape.
        model: A fitted model that batch size and number of sessions are taken from, or ...
        batch_size: ... the batch size, and
        num_sessions: the number of sessions (1 for a single-session model).

    Returns:
        Bits, as a float or an array of the same shape.

    Raises:
        RuntimeError: The model is not fitted.
        TypeError: The loss is no number.
        ValueError: Both a model and numbers are given, or neither; or the model was trained without
            a batch size.

    Source: CEBRA 0.6.1 ``cebra.integrations.sklearn.metrics.infonce_to_goodness_of_fit``.

    >>> infonce_to_goodness_of_fit(0.0, batch_size=512, num_sessions=1)
    9.0
    """
    if model is not None:
        if batch_size is not None or num_sessions is not None:
            raise ValueError(
                "batch_size and num_sessions should not be provided if model is provided."
            )
        if hasattr(model, "get_params") and not hasattr(model, "n_features_"):
            raise RuntimeError("Fit the CEBRA model first.")
        settings = as_checkpoint(model).settings
        batch_size, num_sessions = settings.get("batch_size"), settings.get("num_sessions") or 1
        if batch_size is None:
            raise ValueError(
                "Computing the goodness of fit is not yet supported for models trained on the full "
                "dataset (batchsize = None)."
            )
    if batch_size is None or num_sessions is None:
        raise ValueError(
            f"batch_size ({batch_size}) and num_sessions ({num_sessions})"
            "should be provided if model is not provided."
        )
    num_negatives = as_integer("batch_size", batch_size, 1) * as_integer(
        "num_sessions", num_sessions, 1
    )
    loss = as_numpy(infonce)
    if not any(jnp.issubdtype(loss.dtype, kind) for kind in (jnp.floating, jnp.integer)):
        raise TypeError(f"A loss has to be a real number, got dtype {loss.dtype}.")
    loss = loss.astype(np.float64)
    bits = (np.log(num_negatives) - loss) / np.log(2)
    return bits if loss.ndim else float(bits)


def as_checkpoint(model: Any) -> Checkpoint:
    """A checkpoint of whatever the CEBRA-signature functions take as a model."""
    if isinstance(model, Checkpoint):
        return model
    if isinstance(model, str | os.PathLike):
        return load(model)
    if isinstance(model, Model):
        raise TypeError(
            "A bare Model does not say how to sample: pass a Checkpoint, or use "
            "estimate_infonce(key, model, X, sampler, ...)."
        )
    return import_once(model)


def sampler_for(
    settings: Mapping[str, Any],
    num_steps: int,
    labels: Sequence[np.ndarray],
    offset: tuple[int, int] = (0, 1),
) -> Sampler:
    """The sampler that CEBRA's settings and the kinds of the labels ask for.

    Args:
        settings: As those of a :class:`Checkpoint`.
        num_steps: Length of the recording.
        labels: Checked labels of it.
        offset: The encoder's window, which full batches depend on.

    Raises:
        ValueError: Unknown ``conditional``, missing ``delta``, or several discrete labels.
        NotImplementedError: Several time offsets, or settings and labels that CEBRA has no sampler
            for.
    """
    continuous = [y.reshape(num_steps, -1) for y in labels if np.issubdtype(y.dtype, np.floating)]
    discrete = [y for y in labels if np.issubdtype(y.dtype, np.integer)]
    if len(discrete) > 1:
        raise ValueError(
            f"Only 1D discrete indices are allowed, but got {len(discrete)} discrete indices"
        )
    is_full, is_hybrid = settings.get("batch_size", 1) is None, bool(settings.get("hybrid"))
    if (is_hybrid and (is_full or not continuous)) or (discrete and (is_full or is_hybrid)):
        raise _no_such_batches(settings, labels)
    time_offset = _time_offset(settings.get("time_offsets", 1))
    values = (
        np.concatenate([y.astype(np.float32) for y in continuous], axis=1) if continuous else None
    )
    if discrete:
        if values is not None:
            return Mixed(discrete[0], values, time_offset)
        return Discrete(discrete[0], settings.get("prior") or "empirical")
    sampler = _by_conditional(settings, values, num_steps, time_offset)
    if is_full:
        return FullBatch(sampler, num_steps, offset)
    return Hybrid(sampler, time_offset) if is_hybrid else sampler


def _by_conditional(
    settings: Mapping[str, Any], values: np.ndarray | None, num_steps: int, time_offset: int
) -> Time | TimeDelta | DeltaNormal:
    conditional = settings.get("conditional") or "time_delta"
    if values is None or conditional == "time":
        return Time(num_steps, time_offset)
    if conditional == "time_delta":
        return TimeDelta(values, time_offset)
    if conditional not in ("delta", "delta_normal"):
        raise ValueError(
            f"Unknown conditional {conditional!r}: expected 'time', 'time_delta' or 'delta_normal'."
        )
    if settings.get("delta") is None:
        raise ValueError(f"The conditional {conditional!r} needs the setting delta.")
    if conditional == "delta":
        warnings.warn(
            '"delta" distribution will be deprecated by CEBRA: it calls it "delta_normal" now.',
            DeprecationWarning,
            stacklevel=2,
        )
    return DeltaNormal(values, settings["delta"])


def _no_such_batches(settings: Mapping[str, Any], labels: Sequence[np.ndarray]) -> Exception:
    """The error for settings and labels that CEBRA does not train with either."""
    kinds = {np.issubdtype(label.dtype, np.floating) for label in labels}
    message = (
        f"Invalid index combination.\nContinuous: {True in kinds},\nDiscrete: {False in kinds},\n"
        f"Hybrid training: {bool(settings.get('hybrid'))},\n"
        f"Full dataset: {settings.get('batch_size') is None}."
    )
    if settings.get("hybrid") and not labels:
        return ValueError(message)
    return NotImplementedError(f"{message} CEBRA has no batches for it.")


def _label_array(label: Any) -> np.ndarray:
    """Labels as NumPy; kinds of floats that NumPy or JAX lack become float32 or float64."""
    array = as_numpy(label)
    if not jnp.issubdtype(array.dtype, jnp.floating):
        return array
    return array if array.dtype in (np.float32, np.float64) else array.astype(np.float32)


def _time_offset(time_offsets: Any) -> int:
    if isinstance(time_offsets, list | tuple):
        if len(time_offsets) != 1:
            raise NotImplementedError(
                f"Support for multiple time offsets is not yet implemented, but got {time_offsets}."
            )
        (time_offsets,) = time_offsets
        if not isinstance(time_offsets, int):
            raise TypeError(
                f"Invalid type for time_offsets: {type(time_offsets)}, expected an integer."
            )
    return as_integer("time_offsets", time_offsets, at_least=0)


def _check_labels(
    settings: Mapping[str, Any],
    labels: Sequence[np.ndarray],
    num_steps: int,
    session_id: int | None,
) -> None:
    """Compare labels with those that the model was fitted with, and with the recording."""
    fitted = settings.get("label_types")
    if fitted is not None and len(fitted) != len(labels):
        raise ValueError(
            "Number of index invalid: labels must have the same number of index as for fitting,"
            f"expects {len(fitted)}, got {len(labels)} idx."
        )
    for i, label in enumerate(labels):
        check_dimensions(label, least=1)
        is_float = np.issubdtype(label.dtype, np.floating)
        if not is_float and not np.issubdtype(label.dtype, np.integer):
            raise ValueError(
                f"Labels have to be floats (continuous) or integers (discrete), got {label.dtype}."
            )
        if fitted is not None:
            entry = fitted[i] if isinstance(fitted[i], Mapping) else fitted[i][session_id or 0]
            _compare_label(entry, label)
    if any(len(label) != num_steps for label in labels):
        raise ValueError(
            "Invalid number of samples or labels sessions: provide one session for single-session "
            "training, and make sure the number of samples in X and y match, got "
            f"{num_steps} and {[len(label) for label in labels]}."
        )
    for label in labels:
        check_finite(label, "X and labels")


def _compare_label(entry: Mapping[str, Any], label: np.ndarray) -> None:
    """Compare one array of labels with that of fitting, in CEBRA's order of checks."""
    widths = [int(shape[1]) if len(shape) > 1 else 1 for shape in (entry["shape"], label.shape)]
    wrong_width = (
        "Labels invalid: must have the same number of features as the ones used for fitting,"
        f"expects {widths[0]} features, got {widths[1]}."
    )
    if widths[0] != widths[1] and len(entry["shape"]) == label.ndim == 2:
        raise ValueError(wrong_width)
    if ("float" in entry["dtype"]) != np.issubdtype(label.dtype, np.floating):
        raise ValueError(
            "Labels invalid: must have the same type of features as the ones used for fitting,"
            f"expects {entry['dtype']}, got {label.dtype}."
        )
    if np.issubdtype(label.dtype, np.integer) and widths[1] > 1:
        raise ValueError(f"All discrete indices need to be one dimensional, got {label.shape}.")
    if widths[0] != widths[1]:  # here CEBRA goes on, and scores other labels than it was fitted to
        raise ValueError(wrong_width)


def _first(values: Any) -> Any:
    first = values[0]
    return first if isinstance(first, list | tuple) else as_numpy(first)
