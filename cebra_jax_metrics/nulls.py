"""Is a goodness of fit more than chance? Labels shifted against the recording, models refitted."""

import math
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh
from jax.typing import ArrayLike

from cebra_jax_metrics.arrays import as_integer, as_key
from cebra_jax_metrics.consistency import num_not_below
from cebra_jax_metrics.encoders import Encoder
from cebra_jax_metrics.evaluation import (
    check_lengths,
    check_losses,
    embedded,
    evaluate,
    length_of,
    rows_at,
)
from cebra_jax_metrics.infonce import InfoNCE, chance_level
from cebra_jax_metrics.model import Checkpoint, Criterion, Model, Windows, as_model, select_encoder
from cebra_jax_metrics.samplers import Batch, DeltaNormal, Discrete, Mixed, Sampler, TimeDelta
from cebra_jax_metrics.samplers.drawing import draw
from cebra_jax_metrics.sharding import spread
from cebra_jax_metrics.training import fit
from cebra_jax_metrics.uncertainty import (
    optimal_block_length,
    required_gap,
    sampled_steps,
    time_split,
    with_steps,
)

Labelled = TimeDelta | DeltaNormal | Discrete | Mixed
LABELS = ("labels", "discrete", "continuous")  # the fields of samplers that hold them
# Shuffled blocks are at least so many time offsets long, and by default so many lengths of a
# bootstrap's blocks, since seams and lost slow changes both make the null too narrow.
SEAMS, BLOCKS_PER_LENGTH = 10, 4


@dataclass(frozen=True, eq=False)
class GoodnessOfFitTest:
    """A goodness of fit against what it is where labels and recording have nothing in common.

    Attributes:
        observed: Goodness of fit, in bits.
        null: The same under the null hypothesis, bits ``(samples,)``.
        p_value: ``(1 + number of null values not below the observed) / (1 + number of them)``.
        method: ``"shift"`` or ``"refit"``.
        shifts: Steps that labels were shifted by ``(samples,)``; ``None`` where blocks of them were
            shuffled.
    """

    observed: float
    null: np.ndarray
    p_value: float
    method: str
    shifts: np.ndarray | None

    @property
    def effect(self) -> float:
        """Observed minus the mean under the null hypothesis, in bits."""
        return self.observed - float(self.null.mean())

    def __repr__(self) -> str:
        return (
            f"GoodnessOfFitTest({self.observed:.4f} bits, effect {self.effect:.4f} bits against "
            f"{len(self.null)} samples by {self.method!r}, p = {self.p_value:.4g})"
        )


def goodness_of_fit_test(
    key: ArrayLike,
    model: Model | Checkpoint,
    X: Any,
    sampler: Sampler,
    *,
    method: Literal["shift", "refit"] = "shift",
    held_out: slice | None = None,
    batch_size: int,
    num_batches: int = 100,
    num_samples: int | None = None,
    min_shift: int | None = None,
    surrogate: Literal["shift", "blocks"] = "shift",
    block_length: int | None = None,
    fit_options: Mapping[str, Any] | None = None,
    session_id: int | None = None,
    progress: Callable[[range], Iterable[int]] = iter,
    mesh: Mesh | None = None,
    axis_name: str | None = None,
) -> GoodnessOfFitTest:
    """Test whether a model fits its labels better than chance.

    ``"shift"``: the model is kept, and its labels are shifted circularly against the recording.
    Embeddings are computed once, and where references are drawn uniformly over time so is the part
    of the loss that depends on negatives, so that hundreds of shifts take little longer than one
    score. **It is valid only on rows that the encoder was not fitted to**: a fitted encoder knows
    its labels, related or not. ``held_out`` says which rows those are. It also takes labels or
    recording to be stationary over those rows, and is approximate in that a circle has a seam and
    small shifts are left out: of a trend in both it makes a relation.

    ``"refit"``: on each shifted or shuffled series of labels a new model is trained, and scored on
    held-out rows: what the whole procedure finds where there is nothing to be found. The observed
    score is that of a model trained in the same way on the labels as they are.

    Args:
        key: A JAX PRNG key.
        model: A model or a checkpoint; for ``"refit"`` its architecture, similarity and temperature
            count, its parameters do not.
        X: The recording ``(time, neurons)``.
        sampler: ``TimeDelta``, ``DeltaNormal``, ``Discrete`` or ``Mixed``, of all its time steps.
        method: ``"shift"`` or ``"refit"``.
        held_out: Rows that are tested on. ``"shift"``: those that the encoder was not fitted to,
            ``slice(None)`` if to none; by default all, with a warning. ``"refit"``: rows at either
            end of the recording, by default the last quarter; the others but for a gap
            (:func:`required_gap`) are fitted.
        batch_size: References, positives and negatives per batch.
        num_batches: Batches that every score is the mean of.
        num_samples: Size of the null sample; 200 by default, for ``"refit"`` 39. With fewer shifts
            than that, all are taken.
        min_shift: The smallest shift, either way; by default :func:`required_gap`, since after less
            the encoder still sees what belongs to the label.
        surrogate: For ``"refit"``, ``"shift"`` or ``"blocks"``: whether labels are shifted, or cut
            into blocks that are shuffled.
        block_length: For blocks, their length in steps; by default four times
            :func:`optimal_block_length` of the labels. What changes more slowly than that is lost,
            and with it some of the spread of the null: shifts are the safer choice.
        fit_options: For ``"refit"``, what :func:`fit` is given: at least ``num_steps``.
        session_id: For ``"shift"`` only, which encoder of a multi-session model to use.
        progress: For ``"refit"``, wraps the loop over chunks of training steps.
        mesh: Devices to spread shifts, or models, over (:func:`spread`).
        axis_name: The axis of the mesh, where it has several.

    Returns:
        Observed and null scores in bits, the effect, and the p-value, which is at least
        ``1 / (1 + num_samples)``.

    Raises:
        ValueError: The recording or its held-out part is too short for the shifts, the split or the
            blocks; labels never change; fewer than 2 batches; a loss is not finite; an option does
            not belong to the method; or what :func:`estimate_infonce` and :func:`fit` raise.
        TypeError: The sampler has no labels to shift, or the key is no JAX key.

    Source: Harris, "Nonsense correlations in neuroscience", bioRxiv 2020.11.29.402719; for the +1,
    Davison & Hinkley, *Bootstrap Methods and their Application* (1997), section 4.2.
    """
    if not isinstance(sampler, TimeDelta | DeltaNormal | Discrete | Mixed):
        raise TypeError(
            "There are labels to shift in the samplers TimeDelta, DeltaNormal, Discrete and Mixed, "
            f"got {type(sampler).__name__}."
        )
    if sampler.steps is not None:
        raise ValueError("Pass a sampler of all time steps, and held_out= for some of them.")
    key = as_key(key)
    num_batches = as_integer("num_batches", num_batches, at_least=2)
    batch_size = as_integer("batch_size", batch_size, at_least=1)
    gap = required_gap(model, sampler, session_id if method == "shift" else None)
    shifts: np.ndarray | None
    shortest = gap if min_shift is None else as_integer("min_shift", min_shift, at_least=1)
    sizes: dict[str, Any] = {"batch_size": batch_size, "num_batches": num_batches}
    over: dict[str, Any] = {"mesh": mesh, "axis_name": axis_name}
    if method == "shift":
        if fit_options is not None or surrogate != "shift" or block_length is not None:
            raise ValueError(
                "fit_options, surrogate and block_length belong to method='refit': leave them out."
            )
        number = as_integer("num_samples", 200 if num_samples is None else num_samples, 1)
        steps = _unseen_steps(sampler, held_out)
        shifts = _shifts(key, len(steps), shortest, number)
        _check_labels_change(sampler, steps)
        items = np.concatenate([[0], shifts]).astype(np.int32)
        losses = _shifted_scores(key, model, X, sampler, steps, items, session_id, sizes, over)
    elif method == "refit":
        if session_id is not None:
            raise ValueError("Refitting is of one session: leave session_id out.")
        number = as_integer("num_samples", 39 if num_samples is None else num_samples, 1)
        split = _fitted_and_held_out(sampler, held_out, gap)
        for steps in split:
            _check_labels_change(sampler, steps)
        if surrogate == "blocks" and min_shift is not None:
            raise ValueError("min_shift belongs to shifts: leave it out with surrogate='blocks'.")
        series, shifts = _surrogates(key, sampler, surrogate, shortest, block_length, number)
        options = dict(fit_options or {})
        taken = sorted(options.keys() & {"key", "progress", "mesh", "axis_name", "batch_size"})
        if taken:
            raise ValueError(f"Pass {taken} as arguments of their own, not in fit_options.")
        options["progress"] = progress
        losses = _refitted_scores(key, model, X, series, split, options, sizes, over)
    else:
        raise ValueError(f"method has to be 'shift' or 'refit', got {method!r}.")
    check_losses(losses)
    bits = (float(chance_level(batch_size)) - losses) / math.log(2)
    reached = int(num_not_below(jnp.asarray(bits[1:], jnp.float32), jnp.float32(bits[0])))
    p_value = (1 + reached) / len(bits)
    return GoodnessOfFitTest(float(bits[0]), bits[1:], p_value, method, shifts)


def _check_labels_change(sampler: Any, steps: np.ndarray) -> None:
    fields = [
        np.asarray(getattr(sampler, name))[steps] for name in LABELS if hasattr(sampler, name)
    ]
    if all((labels == labels[:1]).all() for labels in fields):
        raise ValueError(
            f"The labels never change over the {len(steps)} rows from {steps.min()} on: shifting "
            "them does nothing. Choose other rows or labels."
        )


def _unseen_steps(sampler: Any, held_out: slice | None) -> np.ndarray:
    if held_out is None:
        warnings.warn(
            "Which rows the encoder was fitted to is not known: on those the p-value is too small. "
            "Pass held_out=, the rows that it was not fitted to (slice(None) if to none of these).",
            stacklevel=3,
        )
    return sampled_steps(sampler)[_as_slice(held_out)]


def _as_slice(held_out: slice | None) -> slice:
    if held_out is None:
        return slice(None)
    if not isinstance(held_out, slice) or held_out.step not in (None, 1):
        raise TypeError(f"held_out has to be a slice of rows without a step, got {held_out!r}.")
    return held_out


def _shifts(key: Array, number: int, shortest: int, wanted: int) -> np.ndarray:
    """Shifts of a series ``(samples,)``, each once."""
    possible = np.arange(shortest, number - shortest + 1)
    if not possible.size:
        raise ValueError(
            f"{number} rows are too short for shifts of at least {shortest} steps either way: test "
            "on more rows, or pass a smaller min_shift."
        )
    drawn = jax.random.permutation(jax.random.fold_in(key, 0), len(possible))
    return possible[np.asarray(drawn)[:wanted]]


def _shifted_scores(
    key: Array,
    model: Model | Checkpoint,
    X: Any,
    sampler: Labelled,
    steps: np.ndarray,
    items: np.ndarray,
    session_id: int | None,
    sizes: dict[str, Any],
    over: dict[str, Any],
) -> np.ndarray:
    """Losses of a model with its labels shifted by so many steps."""
    encoders, windows = embedded(model, X, session_id, False, **over)
    check_lengths(sampler, encoders, list(map(length_of, windows, encoders)))
    batch = draw(jax.random.fold_in(key, 1), with_steps(sampler, steps), **sizes)
    places: Any = Batch(*(np.searchsorted(steps, x).astype(np.int32) for x in batch))
    shared = as_model(model).criterion, encoders[0], windows[0], jnp.asarray(steps), places
    is_uniform = isinstance(sampler, TimeDelta | DeltaNormal) or (
        isinstance(sampler, Discrete) and sampler.prior == "empirical"
    )
    if not is_uniform:
        return np.asarray(spread(_shifted_losses, shared, items, **over).loss, float)
    # References that are uniform over time are so after any shift.
    uniform = np.asarray(spread(_shifted_losses, shared, items[:1]).uniform, float)
    return uniform + np.asarray(spread(_shifted_aligns, shared, items, **over), float)


@jax.jit
def _shifted_aligns(
    criterion: Criterion,
    encoder: Encoder,
    windows: Windows,
    steps: Array,
    places: Batch,
    shifts: Array,
) -> Array:
    def align(shift: Array) -> Array:
        reference, positive, _ = _after(encoder, windows, steps, places, shift)
        flat = [x.reshape(-1, x.shape[-1]) for x in (reference, positive)]
        return criterion(flat[0], flat[1], flat[0][:1]).align

    return jax.lax.map(align, shifts)


@jax.jit
def _shifted_losses(
    criterion: Criterion,
    encoder: Encoder,
    windows: Windows,
    steps: Array,
    places: Batch,
    shifts: Array,
) -> InfoNCE:
    def losses(shift: Array) -> InfoNCE:
        one = partial(_after, encoder, windows, steps, shift=shift)
        each = jax.lax.map(lambda batch: criterion(*one(places=batch)), places)
        return jax.tree.map(jnp.mean, each)

    return jax.lax.map(losses, shifts)


def _after(
    encoder: Encoder, windows: Windows, steps: Array, places: Batch, shift: Array
) -> list[Array]:
    """Embeddings of reference, positive and negative with labels that come so much later."""
    return [rows_at(windows, encoder, steps[(place + shift) % len(steps)]) for place in places]


def _fitted_and_held_out(
    sampler: Labelled, held_out: slice | None, gap: int
) -> tuple[np.ndarray, np.ndarray]:
    """Steps that models are fitted to, and those that they are scored on."""
    every = sampled_steps(sampler)
    number = len(every)
    if held_out is None:
        rows, test = time_split(number, gap=gap)
        return every[rows], every[test]
    start, stop, _ = _as_slice(held_out).indices(number)
    if not (start < stop and (start == 0) != (stop == number)):
        raise ValueError(
            f"held_out has to be at one end of the {number} rows, the others being fitted, got "
            f"rows {start} to {stop}."
        )
    fitted = every[: max(start - gap, 0)] if stop == number else every[stop + gap :]
    if not fitted.size:
        raise ValueError(f"held_out and a gap of {gap} rows leave none of {number} to be fitted.")
    return fitted, every[start:stop]


def _surrogates(
    key: Array,
    sampler: Labelled,
    surrogate: str,
    shortest: int,
    block_length: int | None,
    number: int,
) -> tuple[list[Labelled], np.ndarray | None]:
    """The sampler as it is, then with labels that have nothing to do with the recording."""
    length = len(sampled_steps(sampler))
    if surrogate == "shift":
        if block_length is not None:
            raise ValueError("block_length belongs to surrogate='blocks': leave it out.")
        shifts = _shifts(key, length, shortest, number)
        orders = (np.arange(length)[None] - shifts[:, None]) % length
        return [sampler, *(_reordered(sampler, order) for order in orders)], shifts
    if surrogate != "blocks":
        raise ValueError(f"surrogate has to be 'shift' or 'blocks', got {surrogate!r}.")
    shortest_block = SEAMS * int(getattr(sampler, "time_offset", 1))
    if block_length is None:
        block_length = max(shortest_block, _block_length_of_labels(sampler))
    block_length = as_integer("block_length", block_length, at_least=1)
    if block_length < shortest_block:
        raise ValueError(
            f"block_length has to be at least {shortest_block} steps, {SEAMS} times the time "
            f"offset, since labels jump at seams; got {block_length}."
        )
    blocks = np.split(np.arange(length), range(block_length, length, block_length))
    if len(blocks) < 4:
        raise ValueError(
            f"{length} rows make {len(blocks)} blocks of {block_length}, too few to be shuffled: "
            "use shorter blocks or a longer recording."
        )
    keys = jax.random.split(jax.random.fold_in(key, 0), number)
    drawn = [np.asarray(jax.random.permutation(one, len(blocks))) for one in keys]
    shuffled = [np.concatenate([blocks[i] for i in order]) for order in drawn]
    return [sampler, *(_reordered(sampler, order) for order in shuffled)], None


def _block_length_of_labels(sampler: Labelled) -> int:
    """Blocks that are long against the autocorrelation of the labels."""
    fields = [np.asarray(getattr(sampler, name)) for name in LABELS if hasattr(sampler, name)]
    columns = np.column_stack([x[: len(sampled_steps(sampler))] for x in fields])
    return BLOCKS_PER_LENGTH * optimal_block_length(columns)


def _reordered(sampler: Labelled, order: np.ndarray) -> Labelled:
    """The sampler with the labels of other time steps."""
    labels = {name: getattr(sampler, name)[order] for name in LABELS if hasattr(sampler, name)}
    return replace(sampler, **labels, length=None)


def _refitted_scores(
    key: Array,
    model: Model | Checkpoint,
    X: Any,
    series: list[Labelled],
    split: tuple[np.ndarray, np.ndarray],
    options: dict[str, Any],
    sizes: dict[str, Any],
    over: dict[str, Any],
) -> np.ndarray:
    """Held-out losses of a model for every series of labels, trained and scored on that series."""
    encoder, criterion = select_encoder(model, None), as_model(model).criterion
    if "num_steps" not in options:
        raise ValueError("Refitting needs fit_options={'num_steps': ..., ...}, see fit.")
    options = {
        "architecture": encoder.architecture,
        "num_hidden_units": encoder.num_hidden_units,
        "output_dimension": encoder.output_dimension,
        "similarity": criterion.similarity,
        "temperature": float(np.asarray(criterion.temperature)),
        "learn_temperature": criterion.learned,
        "min_temperature": float(np.asarray(criterion.min_temperature)),
        "batch_size": sizes["batch_size"],
        **options,
    }
    fitted, held_out = split
    train = [with_steps(sampler, fitted) for sampler in series]
    # One key for all: what does not depend on the labels is the same.
    stack = fit(jax.random.fold_in(key, 1), X, train, **options, **over).model
    test = [with_steps(sampler, held_out) for sampler in series]
    batches = [draw(jax.random.fold_in(key, 2), sampler, **sizes) for sampler in test]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *batches)
    X = jnp.asarray(X, float)  # float32 but in x64
    return np.asarray(spread(_held_out_losses, (X,), (stack, stacked), **over), float)


@jax.jit
def _held_out_losses(X: Array, items: tuple[Model, Batch]) -> Array:
    """The loss of every model on its own batches."""
    return jax.lax.map(lambda item: jnp.mean(evaluate(item[0], X, item[1]).loss), items)
