"""What a model's settings, and those of a call, ask for: the sampler of given labels."""

import dataclasses
import os
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

import jax.numpy as jnp
import numpy as np

from cebra_jax_metrics.arrays import as_integer, as_numpy, check_dimensions, check_finite
from cebra_jax_metrics.checkpoints import import_once, load
from cebra_jax_metrics.evaluation import FeatureRange
from cebra_jax_metrics.model import Checkpoint, Model
from cebra_jax_metrics.samplers import (
    DeltaNormal,
    Discrete,
    FullBatch,
    Hybrid,
    Mixed,
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


def changed(checkpoint: Checkpoint, settings: Mapping[str, Any]) -> Checkpoint:
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


def check_used(settings: Mapping[str, Any], sampler: Any, has_labels: bool) -> None:
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


def space_of(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that say in which space embeddings are compared."""
    return {name: settings[name] for name in ("feature_range", "renormalize") if name in settings}


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
        raise no_such_batches(settings, labels)
    time_offset = one_time_offset(settings.get("time_offsets", 1))
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


def no_such_batches(settings: Mapping[str, Any], labels: Sequence[np.ndarray]) -> Exception:
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


def as_labels(label: Any) -> np.ndarray:
    """Labels as NumPy; kinds of floats that NumPy or JAX lack become float32 or float64."""
    array = as_numpy(label)
    if not jnp.issubdtype(array.dtype, jnp.floating):
        return array
    return array if array.dtype in (np.float32, np.float64) else array.astype(np.float32)


def one_time_offset(time_offsets: Any) -> int:
    """The time offset of settings that may list several, of which CEBRA allows one."""
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


def check_labels(
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
