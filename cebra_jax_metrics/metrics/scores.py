"""Scores of a model on a recording: checks, defaults, calls down.

They take a :class:`Checkpoint`, the path of a checkpoint or a fitted ``cebra.CEBRA``, arrays of any
kind, and return Python floats and NumPy arrays.
"""

import os
from collections.abc import Mapping, Sequence
from typing import Any, Literal, overload

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from cebra_jax_metrics.arrays import as_integer, as_numpy, check_dimensions, check_finite
from cebra_jax_metrics.checkpoints import from_cebra, load
from cebra_jax_metrics.estimation import Estimate, estimate_infonce
from cebra_jax_metrics.model import Checkpoint, Model, as_recording, select_encoder
from cebra_jax_metrics.samplers import DeltaNormal, Discrete, Mixed, Sampler, Time, TimeDelta


@overload
def infonce_loss(
    cebra_model: Any,
    X: Any,
    *y: Any,
    session_id: int | None = ...,
    num_batches: int = ...,
    correct_by_batchsize: bool = ...,
    key: Array | None = ...,
    return_estimate: Literal[False] = ...,
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
    return_estimate: Literal[True],
) -> Estimate: ...
def infonce_loss(
    cebra_model: Any,
    X: Any,
    *y: Any,
    session_id: int | None = None,
    num_batches: int = 500,
    correct_by_batchsize: bool = False,
    key: Array | None = None,
    return_estimate: bool = False,
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
        return_estimate: Return the :class:`Estimate` with its standard error.

    Returns:
        The loss in nats. The ``Estimate`` is not corrected by the batch size.

    Raises:
        sklearn.exceptions.NotFittedError: The estimator is not fitted.
        NotImplementedError: Several sessions were given, or the model is of a kind that is not
            scored yet (hybrid, full-batch).
        RuntimeError: Missing or wrong ``session_id``.
        ValueError: ``X`` or ``y`` do not fit the model, are not finite or differ in length; a
            setting or the number of batches makes no sense.

    Source: CEBRA 0.6.1 ``cebra.integrations.sklearn.metrics.infonce_loss``.
    """
    estimate = score(cebra_model, X, *y, session_id=session_id, num_batches=num_batches, key=key)
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
    return_estimate: Literal[False] = ...,
) -> float: ...
@overload
def goodness_of_fit_score(
    cebra_model: Any,
    X: Any,
    *y: Any,
    session_id: int | None = ...,
    num_batches: int = ...,
    key: Array | None = ...,
    return_estimate: Literal[True],
) -> Estimate: ...
def goodness_of_fit_score(
    cebra_model: Any,
    X: Any,
    *y: Any,
    session_id: int | None = None,
    num_batches: int = 500,
    key: Array | None = None,
    return_estimate: bool = False,
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
        return_estimate: Return the :class:`Estimate`, whose ``bits`` and ``bits_stderr`` are the
            score and its standard error.

    Returns:
        The goodness of fit in bits.

    Raises:
        Exception: What :func:`infonce_loss` raises.

    Source: CEBRA 0.6.1 ``cebra.integrations.sklearn.metrics.goodness_of_fit_score``.
    """
    estimate = score(cebra_model, X, *y, session_id=session_id, num_batches=num_batches, key=key)
    return estimate if return_estimate else float(estimate.bits)


def score(
    cebra_model: Any,
    X: Any,
    *y: Any,
    session_id: int | None = None,
    num_batches: int = 500,
    key: Array | None = None,
    **options: Any,
) -> Estimate:
    """What the two scores share; further options go to :func:`estimate_infonce`."""
    checkpoint = as_checkpoint(cebra_model)
    if isinstance(X, list) and X and np.ndim(_first(X)) == 2:
        raise NotImplementedError(
            f"Data invalid: score cannot be computed on multiple sessions, got {len(X)} sessions. "
            "Score them one by one with session_id."
        )
    if y and isinstance(y[0], list) and y[0] and np.ndim(_first(y[0])) == 2:
        raise NotImplementedError(
            f"Labels invalid: score cannot be computed on multiple sessions, got {len(y[0])} "
            "sessions. Score them one by one with session_id."
        )
    encoder = select_encoder(checkpoint, session_id)
    X = as_recording(X, encoder, session_id)
    labels = [_label_array(label) for label in y]
    _check_labels(checkpoint.settings, labels, len(X), session_id)
    if num_batches is None or (isinstance(num_batches, int) and num_batches < 1):
        raise ValueError(
            f"num_steps cannot be less than or equal to zero or None. Got {num_batches}; "
            "num_batches has to be at least 1."
        )
    batch_size = _batch_size(checkpoint.settings)
    estimate = estimate_infonce(
        jax.random.key(0) if key is None else key,
        checkpoint,
        X,
        sampler_for(checkpoint.settings, len(X), labels),
        batch_size=batch_size,
        num_batches=num_batches,
        session_id=session_id,
        **options,
    )
    if not np.isfinite(estimate.loss):
        raise ValueError(
            f"The loss is {float(estimate.loss)}: the model's parameters or temperature are not "
            "finite, or an embedding has norm 0."
        )
    return estimate


def goodness_of_fit_history(model: Any) -> np.ndarray:
    """Goodness of fit at every training step, from the recorded loss.

    Args:
        model: A :class:`Checkpoint`, the path of one, or a fitted ``cebra.CEBRA``.

    Returns:
        Bits ``(steps,)``; several sessions are trained with a joint loss over all their negatives.

    Raises:
        sklearn.exceptions.NotFittedError: The estimator is not fitted.
        ValueError: The model was trained without a batch size, or has no history.

    Source: CEBRA 0.6.1 ``cebra.integrations.sklearn.metrics.goodness_of_fit_history``.
    """
    checkpoint = as_checkpoint(model)
    if checkpoint.settings.get("hybrid"):
        raise NotImplementedError("The history of hybrid models is not supported yet.")
    if not len(checkpoint.history.get("total", ())):
        raise ValueError("The checkpoint holds no training history.")
    return np.asarray(infonce_to_goodness_of_fit(checkpoint.history["total"], checkpoint))


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
    loss = as_numpy(infonce).astype(np.float64)
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
    return from_cebra(model)


def sampler_for(
    settings: Mapping[str, Any], num_steps: int, labels: Sequence[np.ndarray]
) -> Sampler:
    """The sampler that CEBRA's settings and the kinds of the labels ask for.

    Raises:
        ValueError: Unknown ``conditional``, missing ``delta``, or several discrete labels.
        NotImplementedError: Several time offsets.
    """
    continuous = [y.reshape(num_steps, -1) for y in labels if np.issubdtype(y.dtype, np.floating)]
    discrete = [y for y in labels if np.issubdtype(y.dtype, np.integer)]
    if len(discrete) > 1:
        raise ValueError(
            f"Only 1D discrete indices are allowed, but got {len(discrete)} discrete indices"
        )
    time_offset = _time_offset(settings.get("time_offsets", 1))
    if not labels:
        return Time(num_steps, time_offset)
    if not continuous:
        return Discrete(discrete[0])
    values = np.concatenate([y.astype(np.float32) for y in continuous], axis=1)
    if discrete:
        return Mixed(discrete[0], values, time_offset)
    conditional = settings.get("conditional") or "time_delta"
    if conditional == "time":
        return Time(num_steps, time_offset)
    if conditional == "time_delta":
        return TimeDelta(values, time_offset)
    if conditional in ("delta", "delta_normal"):
        if settings.get("delta") is None:
            raise ValueError(f"The conditional {conditional!r} needs the setting delta.")
        return DeltaNormal(values, settings["delta"])
    raise ValueError(
        f"Unknown conditional {conditional!r}: expected 'time', 'time_delta' or 'delta_normal'."
    )


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
    return as_integer("time_offsets", time_offsets, at_least=0)


def _batch_size(settings: Mapping[str, Any]) -> int:
    if settings.get("hybrid"):
        raise NotImplementedError("Hybrid models are not scored yet.")
    if "batch_size" not in settings or settings["batch_size"] is None:
        raise ValueError(
            "Batch size is None, please provide a model with a batch size: models trained on the "
            "full dataset are not scored yet."
        )
    return as_integer("batch_size", settings["batch_size"], at_least=1)


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
