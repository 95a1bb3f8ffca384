"""The InfoNCE loss as CEBRA defines it, and the goodness of fit in bits. Pure maths on arrays."""

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import ArrayLike

from cebra_jax_metrics.arrays import as_integer, is_traced, map_rows, wide

Similarity = Callable[[Array, Array, Array], tuple[Array, Array]]

# References and negatives in a block: up to here all pairs at once are faster, beyond it blocks are
# (benchmark "limit").
BLOCK_SIZE = 1024
# Exponents that cannot be larger, either way, are summed without taking their peak off.
SAFE_EXPONENT = 30.0


class InfoNCE(NamedTuple):
    """An InfoNCE loss and its two parts, in nats: ``loss = align + uniform``.

    Attributes:
        loss: The total loss; ``chance_level`` of the number of negatives is its value at chance.
        align: Minus the mean similarity of the positive pairs.
        uniform: The mean log-sum-exp of the similarities to the negatives.
    """

    loss: Array
    align: Array
    uniform: Array


def _dot(left: Array, right: Array) -> Array:
    return jnp.einsum("nd,md->nm", left, right, precision=lax.Precision.HIGHEST)


def dot_similarity(
    reference: ArrayLike, positive: ArrayLike, negative: ArrayLike
) -> tuple[Array, Array]:
    """Dot products, which are cosines where the embeddings are normalised.

    Args:
        reference: ``(batch, features)``.
        positive: ``(batch, features)``, row i belonging to row i of ``reference``.
        negative: ``(negatives, features)``.

    Returns:
        Similarities of the positive pairs ``(batch,)`` and of every reference to every negative
        ``(batch, negatives)``.

    Raises:
        ValueError: As :func:`infonce`.

    Source: CEBRA 0.6.1 ``cebra.models.criterions.dot_similarity``.
    """
    reference, positive, negative = _embeddings(reference, positive, negative)
    return jnp.sum(reference * positive, axis=1), _dot(reference, negative)


def euclidean_similarity(
    reference: ArrayLike, positive: ArrayLike, negative: ArrayLike
) -> tuple[Array, Array]:
    """Minus the *squared* Euclidean distances.

    Args:
        reference: ``(batch, features)``.
        positive: ``(batch, features)``, row i belonging to row i of ``reference``.
        negative: ``(negatives, features)``.

    Returns:
        Similarities of the positive pairs ``(batch,)`` and of every reference to every negative
        ``(batch, negatives)``.

    Raises:
        ValueError: As :func:`infonce`.

    Source: CEBRA 0.6.1 ``cebra.models.criterions.euclidean_similarity``.
    """
    reference, positive, negative = _embeddings(reference, positive, negative)
    # Distances do not change under a shift, but the rounding of a² - 2ab + b² does: centre first.
    centre = lax.stop_gradient(jnp.mean(negative, axis=0, keepdims=True))
    left, right = reference - centre, negative - centre
    squares = jnp.sum(left**2, axis=1)[:, None] + jnp.sum(right**2, axis=1)[None, :]
    return -jnp.sum((reference - positive) ** 2, axis=1), 2 * _dot(left, right) - squares


SIMILARITIES: dict[str, Similarity] = {
    "cosine": dot_similarity,
    "dot": dot_similarity,
    "euclidean": euclidean_similarity,
}


def infonce(
    reference: ArrayLike,
    positive: ArrayLike,
    negative: ArrayLike,
    *,
    similarity: str | Similarity = "cosine",
    temperature: ArrayLike = 1.0,
    block_size: int = BLOCK_SIZE,
) -> InfoNCE:
    """InfoNCE loss of one batch, in nats.

    With φ the similarity over the temperature::

        loss = mean_i[-φ(ref_i, pos_i)] + mean_i[log Σ_j exp φ(ref_i, neg_j)]

    The positive is not in the denominator and the sum is not divided by the number of negatives,
    so that chance is the log of their number. Pure: ``jit``, ``vmap`` and ``grad`` apply.

    Args:
        reference: Embeddings ``(batch, features)``.
        positive: Embeddings ``(batch, features)``, row i belonging to row i of ``reference``.
        negative: Embeddings ``(negatives, features)``.
        similarity: ``"cosine"`` (the dot product; ``"dot"`` says the same), ``"euclidean"``
            (minus the squared distance), or a function with the signature of
            :func:`dot_similarity`.
        temperature: What similarities are divided by; a finite scalar above 0.
        block_size: References and negatives worked on at a time: so many squared similarities are
            held in memory, also for the gradient.

    Returns:
        The loss and its parts as scalars, in the dtype of the embeddings but at least float32;
        infinite or NaN where squared norms, also over the temperature, exceed its range.

    Raises:
        ValueError: The shapes do not fit together or have a 0, the embeddings are complex, the
            similarity is unknown, the block size below 1, or a known temperature no finite scalar
            above 0.

    Source: CEBRA 0.6.1 ``cebra.models.criterions.BaseInfoNCE``; Schneider, Lee & Mathis,
    *Nature* 617, 360-368 (2023).

    >>> import jax.numpy as jnp
    >>> collapsed = jnp.ones((4, 2)) / 2**0.5
    >>> loss = infonce(collapsed, collapsed, collapsed).loss
    >>> abs(float(goodness_of_fit(loss, num_negatives=4))) < 1e-6
    True
    """
    check_temperature(temperature)
    terms = infonce_terms(
        reference,
        positive,
        negative,
        similarity=similarity,
        temperature=temperature,
        block_size=block_size,
    )
    return jax.tree.map(jnp.mean, terms)


def check_temperature(temperature: ArrayLike) -> None:
    """Refuse temperatures that are no scalars or, where they are known, not finite and above 0."""
    if np.ndim(temperature):
        raise ValueError(f"temperature has to be a scalar, got the shape {np.shape(temperature)}.")
    if is_traced(temperature):
        return
    lowest, highest = (float(x) for x in (jnp.finfo(jnp.float32).tiny, jnp.finfo(jnp.float32).max))
    known = np.asarray(temperature)
    is_real = known.dtype.kind in "iuf" or jnp.issubdtype(known.dtype, jnp.floating)
    if not (is_real and lowest <= float(known) <= highest):
        hint = " (which is not finite: is the model?)" * (is_real and not np.isfinite(known))
        raise ValueError(
            f"temperature has to be finite and above 0 (at least {lowest:.3g}), got {temperature}"
            f"{hint}."
        )


def infonce_terms(
    reference: ArrayLike,
    positive: ArrayLike,
    negative: ArrayLike,
    *,
    similarity: str | Similarity = "cosine",
    temperature: ArrayLike = 1.0,
    block_size: int = BLOCK_SIZE,
) -> InfoNCE:
    """What :func:`infonce` is the mean of: loss and parts of every reference ``(batch,)``."""
    reference, positive, negative = _embeddings(reference, positive, negative)
    phi = _similarity_function(similarity)
    block_size = as_integer("block_size", block_size, at_least=1)
    temperature = jnp.asarray(temperature).astype(reference.dtype)
    is_safe = _of_all(largest_similarity(phi, reference, negative) / temperature < SAFE_EXPONENT)

    def per_reference(reference: Array, positive: Array) -> tuple[Array, Array, Array]:
        paired, _ = phi(reference, positive, negative[:1])
        log_sum_exp = partial(_log_sum_exp, phi, reference, negative, temperature, block_size)
        peak, spread = lax.cond(
            is_safe, partial(log_sum_exp, has_peak=False), partial(log_sum_exp, has_peak=True)
        )
        return paired / temperature, peak / temperature, spread

    paired, peak, spread = map_rows(per_reference, (reference, positive), block_size)
    # Taking the peak off both parts before adding them keeps the digits at low temperatures.
    return InfoNCE(loss=(peak - paired) + spread, align=-paired, uniform=spread + peak)


def _log_sum_exp(
    phi: Similarity,
    reference: Array,
    negative: Array,
    temperature: Array,
    block_size: int,
    *,
    has_peak: bool,
) -> tuple[Array, Array]:
    """Peak of each reference's similarities, and the log of the sum of exponentials above it.

    Without a peak it is taken as 0, which saves looking for it. Blocks of negatives are computed
    anew in every pass and in the gradient; a single one is kept.
    """
    peak = jnp.zeros(reference.shape[0], reference.dtype)
    # One for each row, so that the gradient of the temperature is summed by rows: fewer roundings.
    sharpness = 1 / jnp.broadcast_to(temperature, (reference.shape[0], 1))

    def crossed(block: Array) -> Array:
        return phi(reference, reference, block)[1]

    def higher(peak: Array, crossed: Array) -> Array:
        return jnp.maximum(peak, jnp.max(lax.stop_gradient(crossed), axis=1))

    def add(total: Array, crossed: Array) -> Array:
        return total + jnp.sum(jnp.exp((crossed - peak[:, None]) * sharpness), axis=1)

    whole = crossed(negative) if negative.shape[0] <= block_size else None

    def fold(step: Callable[[Array, Array], Array], initial: Array) -> Array:
        if whole is not None:
            return step(initial, whole)
        return _fold_blocks(crossed, negative, block_size, step, initial)

    if has_peak:
        peak = fold(higher, peak - math.inf)
    return peak, jnp.log(fold(add, jnp.zeros_like(peak)))


def _fold_blocks(
    crossed: Callable[[Array], Array],
    negative: Array,
    block_size: int,
    step: Callable[[Array, Array], Array],
    initial: Array,
) -> Array:
    @jax.checkpoint
    def body(carry: Array, block: Array) -> tuple[Array, None]:
        return step(carry, crossed(block)), None

    rest = negative.shape[0] % block_size
    whole = negative[: negative.shape[0] - rest]
    carry, _ = lax.scan(body, initial, whole.reshape(-1, block_size, negative.shape[1]))
    return body(carry, negative[-rest:])[0] if rest else carry


@jax.custom_batching.custom_vmap
def _of_all(flag: Array) -> Array:
    """The flag itself; under ``vmap`` one for all, so that a ``cond`` on it stays one."""
    return flag


@_of_all.def_vmap
def _of_all_in_batch(size: int, is_batched: list[bool], flag: Array) -> tuple[Array, bool]:
    return jnp.all(flag), False


def largest_similarity(phi: Similarity, reference: Array, negative: Array) -> Array:
    """The largest that a similarity, or minus it, can be (Cauchy-Schwarz); infinity if unknown."""
    reference, negative = lax.stop_gradient((reference, negative))
    if phi is dot_similarity:
        return _longest(reference) * _longest(negative)
    if phi is euclidean_similarity:
        centre = jnp.mean(negative, axis=0, keepdims=True)
        return (_longest(reference - centre) + _longest(negative - centre)) ** 2
    return jnp.full((), math.inf, reference.dtype)


def _longest(rows: Array) -> Array:
    return jnp.sqrt(jnp.max(jnp.sum(rows**2, axis=1)))


def chance_level(num_negatives: ArrayLike) -> Array:
    """InfoNCE of an embedding that carries nothing: the log of the number of negatives.

    Args:
        num_negatives: How many there are, of any shape.

    Returns:
        The loss in nats, of the same shape.

    Raises:
        ValueError: There are known to be none.
    """
    numbers = jnp.asarray(num_negatives, dtype=float)
    if not is_traced(numbers) and not (np.asarray(numbers) >= 1).all():
        raise ValueError(f"There has to be one negative at least, got {num_negatives!r}.")
    return jnp.log(numbers)


def goodness_of_fit(loss: ArrayLike, num_negatives: ArrayLike) -> Array:
    """Goodness of fit in bits: 0 is chance, higher is better, below 0 is worse than chance.

    Args:
        loss: InfoNCE in nats, of any shape.
        num_negatives: How many negatives that loss was computed with.

    Returns:
        Bits, of the shape of the loss.

    Source: CEBRA 0.6.1 ``cebra.integrations.sklearn.metrics.infonce_to_goodness_of_fit``.

    >>> float(goodness_of_fit(0.0, num_negatives=8))
    3.0
    """
    loss = _at_least_float32(loss)
    return (chance_level(num_negatives).astype(loss.dtype) - loss) / jnp.log(2.0).astype(loss.dtype)


def _at_least_float32(x: ArrayLike) -> Array:
    x = jnp.asarray(x)
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
        raise ValueError(f"Expected real numbers, got dtype {x.dtype}.")
    return x.astype(wide(x.dtype))


def _similarity_function(similarity: str | Similarity) -> Similarity:
    if callable(similarity):
        return similarity
    if similarity not in SIMILARITIES:
        raise ValueError(
            f"Unknown similarity {similarity!r}: expected one of {sorted(SIMILARITIES)} or a "
            "function (reference, positive, negative) -> (paired, crossed)."
        )
    return SIMILARITIES[similarity]


def _embeddings(*arrays: ArrayLike) -> tuple[Array, Array, Array]:
    """Embeddings of references, positives and negatives that fit together."""
    reference, positive, negative = map(_at_least_float32, arrays)
    shapes = [x.shape for x in (reference, positive, negative)]
    fits = (
        all(len(shape) == 2 for shape in shapes)
        and shapes[0] == shapes[1]
        and shapes[0][1] == shapes[2][1]
        and not any(0 in shape for shape in shapes)
    )
    if not fits:
        raise ValueError(
            "Expected reference (batch, features), positive (batch, features) and negative "
            f"(negatives, features), got {shapes[0]}, {shapes[1]} and {shapes[2]}; "
            "use jax.vmap for stacks of batches."
        )
    return reference, positive, negative
