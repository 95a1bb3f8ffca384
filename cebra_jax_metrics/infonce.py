"""The InfoNCE loss as CEBRA defines it, and the goodness of fit in bits. Pure maths on arrays."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

Similarity = Callable[[Array, Array, Array], tuple[Array, Array]]


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


def dot_similarity(reference: Array, positive: Array, negative: Array) -> tuple[Array, Array]:
    """Dot products, which are cosines where the embeddings are normalised.

    Args:
        reference: ``(batch, features)``.
        positive: ``(batch, features)``, row i belonging to row i of ``reference``.
        negative: ``(negatives, features)``.

    Returns:
        Similarities of the positive pairs ``(batch,)`` and of every reference to every negative
        ``(batch, negatives)``.

    Source: CEBRA 0.6.1 ``cebra.models.criterions.dot_similarity``.
    """
    return jnp.sum(reference * positive, axis=1), _dot(reference, negative)


def euclidean_similarity(reference: Array, positive: Array, negative: Array) -> tuple[Array, Array]:
    """Minus the *squared* Euclidean distances.

    Args:
        reference: ``(batch, features)``.
        positive: ``(batch, features)``, row i belonging to row i of ``reference``.
        negative: ``(negatives, features)``.

    Returns:
        Similarities of the positive pairs ``(batch,)`` and of every reference to every negative
        ``(batch, negatives)``.

    Source: CEBRA 0.6.1 ``cebra.models.criterions.euclidean_similarity``.
    """
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
    block_size: int | None = None,
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
        temperature: What similarities are divided by; a positive scalar.
        block_size: Number of references worked on at a time; ``None`` holds the whole
            ``(batch, negatives)`` matrix in memory.

    Returns:
        The loss and its parts as scalars, in the dtype of the embeddings but at least float32.

    Raises:
        ValueError: The shapes do not fit together, or the similarity is unknown.

    Source: CEBRA 0.6.1 ``cebra.models.criterions.BaseInfoNCE``; Schneider, Lee & Mathis,
    *Nature* 617, 360-368 (2023).

    >>> import jax.numpy as jnp
    >>> collapsed = jnp.ones((4, 2)) / 2**0.5
    >>> loss = infonce(collapsed, collapsed, collapsed).loss
    >>> abs(float(goodness_of_fit(loss, num_negatives=4))) < 1e-6
    True
    """
    reference, positive, negative = map(_at_least_float32, (reference, positive, negative))
    _check_shapes(reference, positive, negative)
    phi = _similarity_function(similarity)
    temperature = jnp.asarray(temperature).astype(reference.dtype)

    def per_reference(reference: Array, positive: Array) -> tuple[Array, Array, Array]:
        paired, crossed = phi(reference, positive, negative)
        paired, crossed = paired / temperature, crossed / temperature
        peak = lax.stop_gradient(jnp.max(crossed, axis=1))
        spread = jnp.log(jnp.sum(jnp.exp(crossed - peak[:, None]), axis=1))
        return paired, peak, spread

    if block_size is None:
        paired, peak, spread = per_reference(reference, positive)
    else:
        one = jax.checkpoint(lambda pair: per_reference(pair[0][None], pair[1][None]))
        blocks = lax.map(one, (reference, positive), batch_size=block_size)
        paired, peak, spread = (x[:, 0] for x in blocks)
    # Taking the peak off both parts before adding them keeps the digits at low temperatures.
    return InfoNCE(
        loss=jnp.mean((peak - paired) + spread),
        align=-jnp.mean(paired),
        uniform=jnp.mean(spread + peak),
    )


def chance_level(num_negatives: ArrayLike) -> Array:
    """InfoNCE of an embedding that carries nothing: the log of the number of negatives, in nats."""
    return jnp.log(jnp.asarray(num_negatives, dtype=float))


def goodness_of_fit(loss: ArrayLike, num_negatives: ArrayLike) -> Array:
    """Goodness of fit in bits: 0 is chance, higher is better, below 0 is worse than chance.

    Args:
        loss: InfoNCE in nats, of any shape.
        num_negatives: How many negatives that loss was computed with.

    Source: CEBRA 0.6.1 ``cebra.integrations.sklearn.metrics.infonce_to_goodness_of_fit``.

    >>> float(goodness_of_fit(0.0, num_negatives=8))
    3.0
    """
    loss = _at_least_float32(loss)
    return (chance_level(num_negatives).astype(loss.dtype) - loss) / jnp.log(2.0).astype(loss.dtype)


def _at_least_float32(x: ArrayLike) -> Array:
    x = jnp.asarray(x)
    is_wide = jnp.issubdtype(x.dtype, jnp.floating) and x.dtype.itemsize >= 4
    return x if is_wide else x.astype(jnp.float32)


def _similarity_function(similarity: str | Similarity) -> Similarity:
    if callable(similarity):
        return similarity
    if similarity not in SIMILARITIES:
        raise ValueError(
            f"Unknown similarity {similarity!r}: expected one of {sorted(SIMILARITIES)} or a "
            "function (reference, positive, negative) -> (paired, crossed)."
        )
    return SIMILARITIES[similarity]


def _check_shapes(reference: Array, positive: Array, negative: Array) -> None:
    shapes = [x.shape for x in (reference, positive, negative)]
    fits = (
        all(len(shape) == 2 for shape in shapes)
        and shapes[0] == shapes[1]
        and shapes[0][1] == shapes[2][1]
        and all(shape[0] > 0 for shape in shapes)
    )
    if not fits:
        raise ValueError(
            "Expected reference (batch, features), positive (batch, features) and negative "
            f"(negatives, features), got {shapes[0]}, {shapes[1]} and {shapes[2]}; "
            "use jax.vmap for stacks of batches."
        )
