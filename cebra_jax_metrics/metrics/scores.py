"""Scores of a model on a recording: checks, defaults, calls down.

They take a :class:`Checkpoint`, the path of a checkpoint or a fitted ``cebra.CEBRA``, arrays of any
kind, and return Python floats and NumPy arrays.
"""

from collections.abc import Sequence
from typing import Any, Literal, Unpack, overload

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh

from cebra_jax_metrics.arrays import as_integer, as_numpy
from cebra_jax_metrics.estimation import MAX_BATCHES, Estimate, Method, estimate_infonce
from cebra_jax_metrics.evaluation import check_losses
from cebra_jax_metrics.metrics.settings import (
    Settings,
    as_checkpoint,
    as_labels,
    changed,
    check_labels,
    check_used,
    no_such_batches,
    one_time_offset,
    sampler_for,
    space_of,
)
from cebra_jax_metrics.model import Checkpoint, as_recording, select_encoder
from cebra_jax_metrics.samplers import DiscreteMultisession, Multisession, Sampler


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
    if correct_by_batchsize and changed(checkpoint, settings).settings.get("batch_size") is None:
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
    checkpoint = changed(as_checkpoint(cebra_model), settings)
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
    labels = [as_labels(label) for label in y[0]]
    for session, (x, label) in enumerate(zip(recordings, labels, strict=True)):
        if np.ndim(label) and x.shape[0] != len(label):
            raise ValueError(
                f"Invalid number of samples in session {session} for set of label 0: X has "
                f"{x.shape[0]}, while y has {len(label)}"
            )
        check_labels(checkpoint.settings, [label], x.shape[0], session)
    if len({np.issubdtype(label.dtype, np.integer) for label in labels}) > 1:
        raise ValueError(
            f"Some sessions have integer labels, others floats: {[str(y.dtype) for y in labels]}."
        )
    if checkpoint.settings.get("hybrid") or checkpoint.settings.get("batch_size") is None:
        raise no_such_batches(checkpoint.settings, labels)
    sampler: Sampler
    if np.issubdtype(labels[0].dtype, np.integer):
        sampler = DiscreteMultisession(labels)
    else:
        sampler = Multisession(labels, one_time_offset(checkpoint.settings.get("time_offsets", 1)))
    check_used(settings, sampler, False)
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
        **space_of(settings),
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
    checkpoint = changed(as_checkpoint(cebra_model), settings)
    for what, values in (("Data", X), ("Labels", y[0] if y else None)):
        if isinstance(values, list) and values and np.ndim(_first(values)) == 2:
            raise NotImplementedError(
                f"{what} invalid: score cannot be computed on multiple sessions, got "
                f"{len(values)} sessions. Score them one by one with session_id, or jointly with "
                "multisession_infonce_loss."
            )
    encoder = select_encoder(checkpoint, session_id)
    X = as_recording(X, encoder, session_id)
    labels = [as_labels(label) for label in y]
    check_labels(checkpoint.settings, labels, X.shape[0], session_id)
    sampler = sampler_for(checkpoint.settings, X.shape[0], labels, encoder.offset)
    check_used(settings, sampler, bool(labels))
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
        **space_of(settings),
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


def _first(values: Any) -> Any:
    first = values[0]
    return first if isinstance(first, list | tuple) else as_numpy(first)
