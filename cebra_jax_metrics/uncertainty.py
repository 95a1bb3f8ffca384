"""How far a score may be trusted: resampled recordings, paired comparisons, held-out rows."""

import itertools
import math
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from statistics import NormalDist
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh
from jax.typing import ArrayLike

from cebra_jax_metrics.arrays import as_integer, as_key, as_numpy, check_dimensions
from cebra_jax_metrics.estimation import Estimate, estimate_infonce
from cebra_jax_metrics.evaluation import (
    FeatureRange,
    check_lengths,
    check_losses,
    embedded,
    length_of,
    losses_of,
    rows_at,
    subspaces,
)
from cebra_jax_metrics.model import Checkpoint, Model, as_model, select_encoder
from cebra_jax_metrics.samplers import DeltaNormal, Discrete, Mixed, Sampler, Time, TimeDelta
from cebra_jax_metrics.samplers.drawing import MAX_QUERIES_AT_ONCE, check_sampler, draw
from cebra_jax_metrics.sharding import spread

IntervalKind = Literal["basic", "percentile", "standard"]
# The score itself is averaged over so many times the batches of a resampled recording.
OBSERVED_BATCHES = 20


@dataclass(frozen=True, eq=False)
class Bootstrap:
    """A score, and what it is on recordings resampled from this one.

    Attributes:
        observed: The score.
        samples: Scores of resampled recordings ``(num_resamples, …)``.
        block_length: Steps that were kept together.
        noise: Variance that the sampling of batches adds to each of ``samples``; it is taken out of
            the standard error and the intervals.
    """

    observed: np.ndarray
    samples: np.ndarray
    block_length: int
    noise: float = 0.0

    @property
    def stderr(self) -> np.ndarray:
        """Standard error of the score: its spread over recordings."""
        return np.sqrt(np.maximum(self.samples.var(axis=0, ddof=1) - self.noise, 0.0))

    @property
    def bias(self) -> np.ndarray:
        """How much lower or higher resampled recordings score, on average."""
        return self.samples.mean(axis=0) - self.observed

    def interval(self, level: float = 0.95, kind: IntervalKind = "standard") -> tuple[Any, Any]:
        """Limits of a confidence interval of the score.

        Resampled recordings lack a third of their steps, so that their nearest labels are less near
        and they score lower (``bias``), by more than a recording differs from a longer one.

        Args:
            level: Share of recordings whose interval is to hold the long-run score.
            kind: ``"standard"`` is the observed score plus and minus so many standard errors;
                ``"basic"`` reflects the quantiles of the resampled scores about the observed one,
                and so takes all of their bias for that of the recording; ``"percentile"`` takes the
                quantiles as they are, bias included.

        Raises:
            ValueError: The level is not between 0 and 1, or the kind is unknown.

        Source: Efron & Tibshirani, *An Introduction to the Bootstrap* (1993), chapters 12 and 13;
        Davison & Hinkley, *Bootstrap Methods and their Application* (1997), section 5.2.
        """
        if not 0 < level < 1:
            raise ValueError(f"level has to be between 0 and 1, got {level!r}.")
        tails = np.array([(1 - level) / 2, (1 + level) / 2])
        if kind == "standard":
            half = NormalDist().inv_cdf(float(tails[1])) * self.stderr
            return self.observed - half, self.observed + half
        spread = self.samples.std(axis=0, ddof=1)
        shrink = self.stderr / np.where(spread > 0, spread, 1.0)
        low, high = shrink * np.quantile(self.samples - self.samples.mean(axis=0), tails, axis=0)
        if kind == "basic":
            centre = self.observed - self.bias
            return centre - high, centre - low
        if kind == "percentile":
            middle = self.observed + self.bias
            return middle + low, middle + high
        raise ValueError(f"kind has to be 'basic', 'percentile' or 'standard', got {kind!r}.")

    def __repr__(self) -> str:
        if self.samples.ndim > 1:
            return (
                f"Bootstrap({self.samples.shape[1]} scores, {len(self.samples)} resamples of "
                f"blocks of {self.block_length})"
            )
        low, high = self.interval()
        return (
            f"Bootstrap({float(self.observed):.4f} ± {float(self.stderr):.4f}, 95 % from {low:.4f} "
            f"to {high:.4f}, {len(self.samples)} resamples of blocks of {self.block_length})"
        )


def bootstrap_goodness_of_fit(
    key: ArrayLike,
    model: Model | Checkpoint,
    X: Any,
    sampler: Sampler,
    *,
    batch_size: int,
    num_batches: int = 20,
    num_resamples: int = 200,
    block_length: int | None = None,
    session_id: int | None = None,
    feature_range: FeatureRange = None,
    renormalize: bool = False,
    progress: Callable[[range], Iterable[int]] = iter,
    mesh: Mesh | None = None,
    axis_name: str | None = None,
) -> Bootstrap:
    """What the goodness of fit would be on other recordings like this one, the model being fixed.

    A circular block bootstrap over time: recordings of the same length are made of blocks of this
    one, and scored. References, negatives, positives and changes of labels are all drawn from the
    steps that a resampled recording has; windows and changes are those of the original, so that
    seams between blocks do no harm.

    It tells how the score varies with what was recorded, not with the seed of the training.

    Args:
        key: A JAX PRNG key.
        model: A model or a checkpoint.
        X: The recording ``(time, neurons)``.
        sampler: ``Time``, ``TimeDelta``, ``DeltaNormal``, ``Discrete`` or ``Mixed``.
        batch_size: References, positives and negatives per batch.
        num_batches: Batches for each resampled recording, 20 times as many for the recording
            itself; their noise is taken out of the result.
        num_resamples: Number of resampled recordings.
        block_length: Steps kept together; by default chosen from the autocorrelation of the
            embedding (:func:`optimal_block_length`), which a collapsed one does not have.
        session_id: Which encoder of a multi-session model to use.
        feature_range: Features of the embedding to score, see :func:`evaluate`.
        renormalize: Divide the embeddings in a feature range by their norm.
        progress: Wraps the loop over resampled recordings, such as ``tqdm.tqdm``.
        mesh: Devices to spread the windows, then the batches over (:func:`spread`).
        axis_name: The axis of the mesh, where it has several.

    Returns:
        Bits, observed and resampled, with their standard error and intervals.

    Raises:
        ValueError: The recording is shorter than two blocks, fewer than 2 batches or resamples are
            asked for, the loss is not finite, or what :func:`estimate_infonce` raises.
        TypeError: The sampler is of another kind.

    Source: Politis & Romano, in *Exploring the Limits of Bootstrap*, 263-270 (1992).
    """
    _check_resampled(sampler)
    num_batches = as_integer("num_batches", num_batches, at_least=2)
    num_resamples = as_integer("num_resamples", num_resamples, at_least=2)
    batch_size = as_integer("batch_size", batch_size, at_least=1)
    observed_key, block_key, batch_key = jax.random.split(as_key(key), 3)
    encoders, windows = embedded(model, X, session_id, False, mesh, axis_name)
    spaces = subspaces(windows, feature_range, renormalize, False)
    check_lengths(sampler, encoders, list(map(length_of, windows, encoders)))
    steps = sampled_steps(sampler)
    if block_length is None:
        rows = np.asarray(rows_at(windows[0], encoders[0], jnp.asarray(steps)))
        block_length = min(optimal_block_length(rows), len(steps) // 2)
    places = resampled_places(block_key, len(steps), block_length, num_resamples)

    def bits(batches: list[Any]) -> np.ndarray:
        """Of every batch."""
        stacked = jax.tree.map(lambda *x: jnp.concatenate(x), *batches)
        over = partial(spread, mesh=mesh, axis_name=axis_name)
        losses = losses_of(as_model(model).criterion, encoders, spaces, stacked, over)
        check_losses(losses.loss)
        return (len(spaces) * math.log(batch_size) - np.asarray(losses.loss)) / math.log(2)

    whole = draw(observed_key, sampler, batch_size, OBSERVED_BATCHES * num_batches)
    at_once = max(1, MAX_QUERIES_AT_ONCE // (num_batches * batch_size))
    waiting: list[Any] = []
    scores: list[np.ndarray] = []
    for number in progress(range(num_resamples)):
        resampled = with_steps(sampler, steps[places[number]])
        batches = draw(jax.random.fold_in(batch_key, number), resampled, batch_size, num_batches)
        waiting.append(batches)
        if len(waiting) == at_once or number == num_resamples - 1:
            scores.append(bits(waiting))
            waiting = []
    each = np.concatenate(scores).reshape(num_resamples, num_batches)
    result = Bootstrap(
        observed=bits([whole]).mean(),
        samples=each.mean(axis=1),
        block_length=block_length,
        noise=float(each.var(axis=1, ddof=1).mean() / num_batches),
    )
    if result.stderr == 0:
        warnings.warn(
            "Resampled recordings differ no more than the sampling of batches makes them: the "
            "standard error comes out as 0. Ask for larger num_batches and num_resamples.",
            stacklevel=2,
        )
    return result


def _check_resampled(sampler: object) -> None:
    if not isinstance(sampler, Time | TimeDelta | DeltaNormal | Discrete | Mixed):
        raise TypeError(
            "Expected one of the samplers Time, TimeDelta, DeltaNormal, Discrete and Mixed, got "
            f"{type(sampler).__name__}."
        )


def sampled_steps(sampler: Any) -> np.ndarray:
    """The time steps that a sampler of one recording draws references from."""
    if sampler.steps is None:
        end = sampler.length - (sampler.time_offset if isinstance(sampler, Time) else 0)
        return np.arange(int(end), dtype=np.int32)
    steps = np.asarray(sampler.steps)
    return steps if isinstance(sampler, Time) else steps[: int(sampler.length)]


def with_steps(sampler: Any, steps: np.ndarray) -> Any:
    """The same sampler, drawing from some time steps only."""
    length = sampler.length if isinstance(sampler, Time) else None
    return replace(sampler, steps=steps, length=length)


def resampled_places(key: Array, number: int, block_length: int, num_resamples: int) -> np.ndarray:
    """Places ``(num_resamples, number)`` of a circular block bootstrap of a series.

    Raises:
        ValueError: The series is shorter than two blocks.
    """
    block_length = as_integer("block_length", block_length, at_least=1)
    if 2 * block_length > number:
        raise ValueError(
            f"A bootstrap needs two blocks at least, but the recording has {number} steps and "
            f"block_length is {block_length}: use shorter blocks or a longer recording."
        )
    num_blocks = -(-number // block_length)
    starts = jax.random.randint(key, (num_resamples, num_blocks, 1), 0, number, dtype=jnp.int32)
    steps = (np.asarray(starts) + np.arange(block_length, dtype=np.int32)) % number
    return steps.reshape(num_resamples, -1)[:, :number].astype(np.int32)


def optimal_block_length(series: ArrayLike) -> int:
    """Length of the blocks of a circular bootstrap, chosen from the autocorrelation.

    Args:
        series: ``(time,)`` or ``(time, features)``; of several features the longest is taken.

    Returns:
        Steps, at most three times the root of their number, and a third of it.

    Raises:
        ValueError: The series has fewer than 10 steps, is not finite, or never changes.

    Source: Politis & White, *Econometric Reviews* 23, 53-70 (2004), as corrected by Patton, Politis
    & White, *Econometric Reviews* 28, 372-375 (2009).
    """
    values = as_numpy(series)
    check_dimensions(values, least=1)
    values = values.astype(np.float64)
    values = values.reshape(len(values), -1) if values.size else values
    if values.ndim != 2 or len(values) < 10:
        raise ValueError(f"Expected a series of at least 10 steps, got shape {np.shape(series)}.")
    if not np.isfinite(values).all():
        raise ValueError("The series contains NaN or infinity; drop these time steps.")
    changing = values[:, (values != values[:1]).any(axis=0)]
    if not changing.shape[1]:
        raise ValueError(
            "The series (of a bootstrap: the embedding) never changes: it has no autocorrelation "
            "to choose block_length from."
        )
    return max(_block_length(column) for column in changing.T)


def _block_length(values: np.ndarray) -> int:
    number = len(values)
    # Blocks do not depend on the scale, but squares of very large or small numbers do.
    values = np.ldexp(values, -np.frexp(np.abs(values).max())[1])
    run = max(5, math.ceil(math.sqrt(math.log10(number))))
    farthest = min(math.ceil(math.sqrt(number)) + run, number - run - 1)
    centred = values - values.mean()
    spectrum = np.abs(np.fft.rfft(centred, 2 * number)) ** 2
    covariance = np.fft.irfft(spectrum)[: farthest + run + 1] / number
    # The first lag after which a run of correlations is no larger than chance.
    limit = 2 * math.sqrt(math.log10(number) / number) * covariance[0]
    is_small = np.abs(covariance[1:]) < limit
    windows = np.lib.stride_tricks.sliding_window_view(is_small, run)[:farthest]
    runs = windows.all(axis=1)
    lag = int(np.argmax(runs)) if runs.any() else farthest
    width = min(2 * max(lag, 1), farthest)
    lags = np.arange(-width, width + 1)
    weights = np.clip(2 * (1 - np.abs(lags) / width), 0, 1)  # the flat-top window
    near = covariance[np.abs(lags)]
    slope, level = np.sum(weights * np.abs(lags) * near), np.sum(weights * near)
    if level <= 0:
        return 1
    length = (2 * slope**2 / (4 / 3 * level**2)) ** (1 / 3) * number ** (1 / 3)
    return int(np.clip(math.ceil(length), 1, math.ceil(min(3 * math.sqrt(number), number / 3))))


@dataclass(frozen=True, eq=False)
class Comparison:
    """Two scores on the same draws.

    Attributes:
        first: Estimate of the first.
        second: Estimate of the second.
        difference: Bits of the first minus those of the second.
        stderr: Standard error of the difference, batch by batch, in bits.
    """

    first: Estimate
    second: Estimate
    difference: float
    stderr: float

    @property
    def independent_stderr(self) -> float:
        """The standard error that independent draws of as many batches would have, in bits."""
        return math.hypot(float(self.first.bits_stderr), float(self.second.bits_stderr))

    def __repr__(self) -> str:
        return (
            f"Comparison({self.difference:.4f} ± {self.stderr:.4f} bits, "
            f"{self.independent_stderr:.4f} with independent draws)"
        )


def compare_goodness_of_fit(
    key: ArrayLike,
    first: Model | Checkpoint,
    second: Model | Checkpoint,
    X: Any,
    sampler: Sampler | tuple[Sampler, Sampler],
    *,
    num_batches: int = 500,
    **options: Any,
) -> Comparison:
    """Which of two models fits a recording better, or one model under which of two samplers.

    Both are scored on the draws of one key, so that what the draws have in common cancels: the
    standard error of the difference is smaller, often much, than that of independent scores.

    Args:
        key: A JAX PRNG key.
        first: A model or a checkpoint.
        second: Another one, or the same.
        X: The recording ``(time, neurons)``.
        sampler: One for both, or one for each; those of one kind share most of their draws.
        num_batches: Batches that both are scored on.
        **options: Of :func:`estimate_infonce`: ``batch_size``, ``session_id`` and so on.

    Returns:
        The difference in bits with its paired standard error, and both estimates.

    Raises:
        ValueError: Fewer than 2 batches, a loss that is not finite, or what
            :func:`estimate_infonce` raises.
        TypeError: As :func:`estimate_infonce`.

    Source: this library. Common random numbers: Owen, *Monte Carlo theory, methods and examples*
    (2013), chapter 8.
    """
    samplers = sampler if isinstance(sampler, tuple | list) else (sampler, sampler)
    if len(samplers) != 2:
        raise ValueError(f"Expected one sampler or two, got {len(samplers)}.")
    num_batches = as_integer("num_batches", num_batches, at_least=2)
    if options.get("target_stderr_bits") is not None:
        raise ValueError("Both take the same batches: ask for num_batches, not for a target.")
    estimates = [
        estimate_infonce(as_key(key), model, X, each, num_batches=num_batches, **options)
        for model, each in zip((first, second), samplers, strict=True)
    ]
    for estimate in estimates:
        check_losses(estimate.loss)
    difference = np.asarray(estimates[0].per_batch_bits - estimates[1].per_batch_bits)
    return Comparison(
        first=estimates[0],
        second=estimates[1],
        difference=float(difference.mean()),
        stderr=float(difference.std(ddof=1) / math.sqrt(len(difference))),
    )


def required_gap(model: Model | Checkpoint, sampler: Any, session_id: int | None = None) -> int:
    """Steps to leave out between rows that a model is fitted to and rows that it is scored on.

    Args:
        model: A model or a checkpoint.
        sampler: One of ``cebra_jax_metrics.samplers``.
        session_id: Which encoder of a multi-session model.

    Returns:
        The receptive field plus the time offset: closer rows share samples of the recording, or
        pairs of time steps.

    Raises:
        TypeError: The sampler is none.
    """
    check_sampler(sampler)
    parts = [
        sampler,
        *(getattr(sampler, name, None) for name in ("sampler", "behavior", "conditional")),
    ]
    offsets = [int(np.asarray(getattr(part, "time_offset", 0))) for part in parts]
    return select_encoder(model, session_id).receptive_field + max(offsets)


def time_split(num_steps: int, *, gap: int, test_size: float = 0.25) -> tuple[slice, slice]:
    """Rows to fit and, after a gap, rows to score.

    Args:
        num_steps: Length of the recording.
        gap: Steps left out between them, see :func:`required_gap`.
        test_size: Share of the recording that is scored.

    Returns:
        Slices of the first and of the last rows.

    Raises:
        ValueError: The recording is too short, or the share not between 0 and 1.

    >>> time_split(1000, gap=20)
    (slice(0, 730, None), slice(750, 1000, None))
    """
    num_steps = as_integer("num_steps", num_steps, at_least=1)
    gap = as_integer("gap", gap, at_least=0)
    if not 0 < test_size < 1:
        raise ValueError(f"test_size has to be between 0 and 1, got {test_size!r}.")
    start = num_steps - round(test_size * num_steps)
    if start <= gap or start == num_steps:
        raise ValueError(
            f"{num_steps} steps are too short to be split, with a gap of {gap} steps and "
            f"{test_size} of them for the test."
        )
    return slice(0, start - gap), slice(start, num_steps)


def time_folds(num_steps: int, num_folds: int, *, gap: int) -> list[tuple[np.ndarray, slice]]:
    """Contiguous folds: each is scored once, the model being fitted to what is far enough from it.

    Args:
        num_steps: Length of the recording.
        num_folds: Number of folds, of equal length up to one step.
        gap: Steps left out on either side of a fold, see :func:`required_gap`.

    Returns:
        For each fold the time steps to fit ``(steps,)``, for the ``steps=`` of a sampler, and the
        slice to score.

    Raises:
        ValueError: The recording is too short for so many folds.

    >>> [(len(fit), score) for fit, score in time_folds(100, 2, gap=5)]
    [(45, slice(0, 50, None)), (45, slice(50, 100, None))]
    """
    num_steps = as_integer("num_steps", num_steps, at_least=1)
    num_folds, gap = as_integer("num_folds", num_folds, at_least=2), as_integer("gap", gap, 0)
    edges = np.linspace(0, num_steps, num_folds + 1).round().astype(int)
    every = np.arange(num_steps)
    folds = [
        (every[(every < start - gap) | (every >= stop + gap)], slice(int(start), int(stop)))
        for start, stop in itertools.pairwise(edges)
    ]
    if num_folds > num_steps or not all(fitted.size for fitted, _ in folds):
        raise ValueError(
            f"{num_steps} steps are too short for {num_folds} folds with gaps of {gap} steps: use "
            "fewer folds, or a longer recording."
        )
    return folds
