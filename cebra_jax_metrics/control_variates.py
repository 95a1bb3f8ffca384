"""Less noise from the same batches: what a batch has by chance is known, and taken off its loss.

**Which controls.** A batch has references r_i and negatives n_j, drawn independently from a prior
p over the time steps, and positives. With φ the similarity over the temperature and B negatives,
its loss is ``mean_i[-φ(r_i, positive_i)] + U`` with ``U = mean_i log Σ_j exp φ(r_i, n_j)``. Let
``g(t) = Σ_s p_s exp φ(t, s)``, the same sum over the whole recording, and ``x_i = Σ_j exp φ(r_i,
n_j) / (B g(r_i)) - 1``, by how much the drawn one is off. Then, exactly,

    U = log B + mean_i log g(r_i) + mean_i log(1 + x_i),    log(1 + x) = x - x²/2 + ...

The expectation of ``log g(r_i)`` is a sum over the recording, and that of every ``x_i`` is 0, since
given r_i the negatives are draws from p: the two means are the controls of U. What they leave is of
second order: with v the relative variance of ``exp φ``, ``x²`` is of the order of ``v / B``.

The align part is compared with ``a(t)``, what to expect of ``-φ(t, positive)``. Where the sampler
says it (the positive is a fixed step later, or uniform among equal labels), the align part is
``Σ_t p_t a(t)`` and has no noise. Elsewhere it is the mean over more pairs than those of the batch;
``a(t)`` is taken from the steps around t, which resemble its positives, and its mean over the
references of these pairs is a control.

**Why their means are known.** A mean of a function f of single time steps, drawn from p, has the
expectation ``Σ_t p_t f(t)``, whatever f is, with the probabilities p that the sampler gives; that
of ``x`` is 0 by the definition of g. Negatives of several sessions are B from each, and g is the
mean over the sessions.

g takes an exponential for every pair of steps. Where these are more than those of the batches, a
sum ĝ over some steps l, evenly spaced, takes its place: ``log ĝ(t)`` is as good a function of t.
But the mean of ``x`` is not known any more, and gives way to its part that depends on the negatives
alone, ``mean_j h(n_j)`` with ``h(s) = Σ_l w_l exp φ(l, s) / ĝ(l)`` for weights w of these steps.

**Why nothing is biased.** The estimate of a batch is its loss minus a linear combination of its
controls. The coefficients come from the other half of the batches, which is independent of this
one, so that the expectation is the same whatever they are: for U least squares over batches, for
``a`` the slope over single pairs. For the same reason the spread of these values is an honest
measure of their noise. The other half also decides whether to do it at all: where the variance that
it promises, the noise of the fit included, is not clearly lower than that of the plain losses,
those are kept. For derivatives the coefficients are constants.

**When it is no use.** Where v is not small against B (low temperatures, small batches) ``x`` is not
small. Where positives are drawn, what is left is mostly their noise, and falls with the number of
pairs. Full batches have no noise in U, and are left alone. Of fewer than ``MIN_BATCHES`` batches
nothing is fitted.

Source: this library. Control variates and the fit of their coefficients: Owen, *Monte Carlo theory,
methods and examples* (2013), chapter 8.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import ArrayLike

from cebra_jax_metrics.arrays import is_traced
from cebra_jax_metrics.infonce import (
    SIMILARITIES,
    InfoNCE,
    infonce_terms,
    largest_similarity,
)
from cebra_jax_metrics.sharding import spread

# Pairs drawn for each reference of a batch where it is not known what to expect of its positives.
PAIRS = 8
# Steps before and after a reference that its positives are expected to resemble.
REACH = 10
# Steps that are summed over come in multiples of this, so that lengths share compilations.
MULTIPLE = 1024
# Sums over a batch exceed those over a recording at most by one over the probability of a step:
# what is larger than this is rounding, of similarities over the temperature beyond 1e7.
LARGEST_EXPONENT = 30.0
# Exponents that may be rounded by more than this have no exponentials of a known mean.
MOST_ROUNDING = 0.1
# Fewer batches are averaged as they are.
MIN_BATCHES = 16

Mean = Callable[[Array], Array]


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class StepFunction:
    """A function of time steps, and its mean over the prior.

    Attributes:
        values: ``(steps,)``.
        mean: The sum of the values times the probabilities of the steps.
    """

    values: Array
    mean: Array

    @classmethod
    def of(cls, values: Array, weights: ArrayLike) -> "StepFunction":
        """A function whose steps have given probabilities."""
        middle = jnp.mean(values)  # taken off first, since float32 sums lose digits
        weights = jnp.asarray(weights).astype(values.dtype)
        return cls(values, middle + jnp.sum(weights * (values - middle)))

    def excess(self, steps: Array) -> Array:
        """By how much the mean over drawn steps is off."""
        return jnp.mean(self.values[steps] - self.mean)


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class Known:
    """What is known of the references, and of the negatives, of one objective or session.

    Attributes:
        level: Log of the mean of ``exp φ(t, s)`` over the prior of the negatives s.
        influence: What a negative adds to the sums of all references, where ``level`` is that of
            some steps only; ``None`` where it is that of all.
        align: What to expect of minus the similarity to the positive.
        is_precise: Whether rounding leaves the exponentials of similarities their digits; where it
            does not, the negatives are no control.
        is_exact: Whether ``align`` is the expectation itself.
    """

    level: StepFunction
    influence: StepFunction | None
    align: StepFunction
    is_precise: Array
    is_exact: bool = field(metadata={"static": True})


def products(
    similarity: str, temperature: Array, rows: Array, centre: Array
) -> tuple[Array, Array]:
    """Features of references and of negatives whose dot products are similarity over temperature.

    Args:
        similarity: ``"cosine"``, ``"dot"`` or ``"euclidean"``.
        temperature: A scalar.
        rows: Embeddings ``(steps, features)``.
        centre: Where Euclidean distances are taken from ``(features,)``: any point near the rows,
            the same for both sides.

    Returns:
        Features as references, and as negatives, ``(steps, features)`` or two features more.
    """
    if similarity != "euclidean":
        return rows / temperature, rows
    rows = rows - centre[None]
    squares, ones = jnp.sum(rows**2, axis=1, keepdims=True), jnp.ones_like(rows[:, :1])
    left = jnp.concatenate([2 * rows, -squares, -ones], axis=1) / temperature
    return left, jnp.concatenate([rows, ones, squares], axis=1)


def around(values: Array) -> Array:
    """Means over the steps up to ``REACH`` before and after each ``(steps, features)``."""
    window = (2 * REACH + 1, 1), (1, 1), "SAME"
    nothing = np.zeros((), values.dtype)  # known, or JAX does not see a sum, which has derivatives
    total = lax.reduce_window(values, nothing, lax.add, *window)
    return total / lax.reduce_window(jnp.ones_like(values[:, :1]), nothing, lax.add, *window)


class Marks(NamedTuple):
    """Time steps that sums run over: integers, some of which may repeat.

    Attributes:
        reference: All steps that references are drawn from.
        negative: All steps that negatives are drawn from, or their places among all sessions.
        some: Where there are too many pairs of them: some of each.
    """

    reference: np.ndarray
    negative: np.ndarray
    some: tuple[np.ndarray, np.ndarray] | None

    @classmethod
    def of(cls, reference: ArrayLike, negative: ArrayLike, most_pairs: int) -> "Marks":
        """Those of probabilities ``(steps,)``, for at most so many similarities."""
        steps, others = map(_support, (reference, negative))
        if len(steps) * len(others) <= most_pairs:
            return cls(_multiple(steps), _multiple(others), None)
        number = max(most_pairs // (len(steps) + len(others)), 1)
        some, of_others = (x[np.arange(number) * len(x) // number] for x in (steps, others))
        return cls(_multiple(steps), _multiple(others), (some, of_others))


def _support(weights: ArrayLike) -> np.ndarray:
    """Steps that are drawn from."""
    if is_traced(weights):
        return np.arange(np.shape(weights)[0])
    return np.flatnonzero(np.asarray(weights) > 0)


def _multiple(steps: np.ndarray) -> np.ndarray:
    """The same, some of them twice, so that their number is a multiple of ``MULTIPLE``."""
    return np.resize(steps, size_of(len(steps)))


def size_of(number: int) -> int:
    """A number of steps that several lengths share."""
    return -(-number // MULTIPLE) * MULTIPLE


def known(
    similarity: str,
    temperature: Array,
    reference: tuple[Array, Array],
    negative: tuple[Array, Array],
    marks: Marks,
    mean_positive: Mean | None = None,
    over: Callable[..., Any] = spread,
) -> Known:
    """What is known of a recording: the functions of time steps that batches are compared with.

    Args:
        similarity: ``"cosine"``, ``"dot"`` or ``"euclidean"``.
        temperature: What similarities are divided by.
        reference: Embeddings of all time steps ``(steps, features)``, and the probabilities that a
            reference is drawn from them ``(steps,)``.
        negative: The same of the negatives, which may come from several recordings.
        marks: The steps that sums run over.
        mean_positive: Turns features of all time steps ``(steps, k)`` into their expectation over
            the positives of each; ``None`` takes the steps around it instead.
        over: How work is spread over devices.
    """
    centre = lax.stop_gradient(jnp.mean(negative[0], axis=0))
    left, own = products(similarity, temperature, reference[0], centre)
    right = products(similarity, temperature, negative[0], centre)[1]

    def log_means(rows: Array, features: Array, log_weights: Array, steps: ArrayLike) -> Array:
        steps = jnp.asarray(steps)
        return over(_log_sums, (features[steps], log_weights), rows)

    def of_steps(values: Array, steps: ArrayLike, weights: Array) -> StepFunction:
        scattered = jnp.zeros(weights.shape, values.dtype).at[jnp.asarray(steps)].set(values)
        return StepFunction.of(scattered, weights)

    among = marks.negative if marks.some is None else marks.some[1]
    shares = _log_shares(negative[1], among).astype(right.dtype)
    level = log_means(left[marks.reference], right, shares, among)
    influence = None
    if marks.some is not None:
        of_some = log_means(left[marks.some[0]], right, shares, among)
        shares = _log_shares(reference[1], marks.some[0]).astype(left.dtype)
        # φ is symmetric: the negatives take the place of the references here.
        summed = log_means(
            right[marks.negative], left, shares - lax.stop_gradient(of_some), marks.some[0]
        )
        summed = jnp.minimum(summed, LARGEST_EXPONENT)
        influence = of_steps(jnp.exp(summed), marks.negative, negative[1])
    align = -jnp.sum(left * (mean_positive or around)(own), axis=1)
    largest = largest_similarity(SIMILARITIES[similarity], reference[0], negative[0])
    return Known(
        level=of_steps(level, marks.reference, reference[1]),
        influence=influence,
        align=StepFunction.of(align, reference[1]),
        is_precise=jnp.finfo(largest.dtype).eps * largest / temperature < MOST_ROUNDING,
        is_exact=mean_positive is not None,
    )


def _log_shares(weights: Array, steps: ArrayLike) -> Array:
    """Logs of the weights of some steps, which sum to 1; those that repeat share theirs."""
    steps = jnp.asarray(steps)
    counts = jnp.zeros_like(weights).at[steps].add(1)
    # Of a step that is never drawn the log would have no gradient.
    shares = jnp.maximum(weights[steps] / counts[steps], jnp.finfo(weights.dtype).tiny)
    return jnp.log(shares / jnp.sum(shares))


@jax.jit
def _log_sums(right: Array, log_weights: Array, left: Array) -> Array:
    """Log of the weighted sum of the exponentials of products, for every row of ``left``."""
    middle = jnp.mean(log_weights)  # equal weights become 0, so that exponents stay small
    right = jnp.concatenate([right, (log_weights - middle)[:, None]], axis=1)
    left = jnp.concatenate([left, jnp.ones_like(left[:, :1])], axis=1)
    return infonce_terms(left, left, right, similarity="dot").uniform + middle


class Compared(NamedTuple):
    """Batches compared with the recording; scalars, or ``(num_batches,)``.

    Attributes:
        align: Minus the mean similarity of the pairs that were drawn, or its expectation.
        excess: By how much what is expected of these pairs is off for their references.
        squares: Mean square of what is expected, centred.
        products: Its mean product with the align part of each pair.
        uniform: The uniform part.
        controls: What is off in the uniform part: for the references, and for the negatives, each
            with an expectation of 0 ``(2,)``, or ``(num_batches, 2)``.
    """

    align: Array
    excess: Array
    squares: Array
    products: Array
    uniform: Array
    controls: Array


def compared(
    known: Known, uniform: Array, align: Array, reference: Array, negative: Array
) -> Compared:
    """One batch compared with the recording.

    Args:
        known: What is known of the recording.
        uniform: The uniform part of every reference ``(batch,)``.
        align: The align part of each pair: those of the batch, and further ones, ``(pairs,)``.
        reference: Steps of the references of all pairs, those of the batch first ``(pairs,)``.
        negative: Steps of the negatives, or their places among those of all sessions.
    """
    own = reference[: len(uniform)]
    if known.influence is None:
        drawn = uniform - math.log(len(negative))
        above = jnp.minimum(drawn - known.level.values[own], LARGEST_EXPONENT)
        from_negatives = jnp.mean(jnp.expm1(jnp.where(known.is_precise, above, 0)))
    else:
        from_negatives = jnp.where(known.is_precise, known.influence.excess(negative), 0)
    expected = known.align.values[reference] - known.align.mean
    nothing = jnp.zeros_like(known.align.mean)
    return Compared(
        align=known.align.mean if known.is_exact else jnp.mean(align),
        excess=nothing if known.is_exact else jnp.mean(expected),
        squares=jnp.mean(expected**2),
        products=jnp.mean(expected * (align - jnp.mean(align))),
        uniform=jnp.mean(uniform),
        controls=jnp.stack([known.level.excess(own), from_negatives]),
    )


@jax.jit
@jax.default_matmul_precision("highest")
def reduced(plain: InfoNCE, compared: Compared) -> InfoNCE:
    """Losses of batches, with what is known to be off taken from them where that is of use.

    Args:
        plain: Loss and parts of every batch ``(num_batches,)``, drawn independently.
        compared: The same batches, compared with the recording.

    Returns:
        Losses of the same expectation; the plain ones where the other half of the batches does not
        promise less variance, or where there are fewer than ``MIN_BATCHES``.
    """
    number = len(plain.loss)
    if number < MIN_BATCHES:
        return plain
    first, second = slice(None, number // 2), slice(number // 2, None)

    def part(mine: slice, theirs: slice) -> InfoNCE:
        here, there = (jax.tree.map(lambda x: x[s], (plain, compared)) for s in (mine, theirs))  # noqa: B023
        return _reduced_by(*here, *lax.stop_gradient(there))

    return jax.tree.map(lambda *x: jnp.concatenate(x), part(first, second), part(second, first))


def _reduced_by(
    plain: InfoNCE, compared: Compared, other_plain: InfoNCE, other: Compared
) -> InfoNCE:
    """Losses of some batches by coefficients and a choice that other batches give.

    The variance that these promise is that of their residuals, with ``n - 3`` degrees of freedom,
    times ``1 + 2 / (n - 4)`` for the noise of two coefficients (exact for normal controls). It has
    to be lower than that of plain losses by twice the standard error of a variance.
    """
    number, count = other.controls.shape
    tiny = jnp.finfo(other.uniform.dtype).tiny
    slope = jnp.sum(other.products) / jnp.maximum(jnp.sum(other.squares), tiny)
    scale = jnp.std(other.controls, axis=0, keepdims=True)
    scale = jnp.where(scale > 0, scale, 1)  # what is constant there has the coefficient 0
    centred = (other.controls - jnp.mean(other.controls, axis=0, keepdims=True)) / scale
    wanted = other.uniform - jnp.mean(other.uniform)
    coefficients, *_ = jnp.linalg.lstsq(centred, wanted)

    def better(compared: Compared, slope: Array, coefficients: Array) -> tuple[Array, Array]:
        uniform = compared.uniform - compared.controls / scale @ coefficients
        return compared.align - slope * compared.excess, uniform

    rest = sum(better(other, slope, coefficients))
    promised = jnp.var(rest, ddof=1 + count) * (1 + count / (number - count - 2))
    is_useful = promised * (1 + 2 * math.sqrt(2 / number)) < jnp.var(other_plain.loss, ddof=1)
    # Controls may leave the range of floats where losses do not.
    is_useful &= jnp.all(jnp.isfinite(compared.controls)) & jnp.all(jnp.isfinite(compared.excess))
    # Where they are no use they may be NaN, and so would derivatives of what is not chosen.
    slope, coefficients = (jnp.where(is_useful, x, 0) for x in (slope, coefficients))
    align, uniform = better(compared, slope, coefficients)
    chosen = InfoNCE(align + uniform, align, uniform)
    return jax.tree.map(lambda x, y: jnp.where(is_useful, x, y), chosen, plain)
